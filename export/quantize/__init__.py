"""Quantization: from statistics of the real chain to Q/DQ graphs, and the proof of what was built.

formats     the number formats: what is stored, what is rounded, in plain torch
operators   the two operations of a quantized layer, as torch computes and ONNX writes them
linear      the layer that stands where a linear layer stood
statistics  what calibration records of a layer's input, and its file
calibrate   the chain, run on prompts, with every candidate layer watched
scales      statistics -> scales, and the smoothing of outliers into the weights
policy      which layer gets which format, as data with reasons
apply       a policy and statistics -> the stages' modules, changed in place
sweep       what each group of layers costs, and a set that keeps to a quality budget
audit       what the built files really hold
"""
