"""A set's ONNX graphs -> engines for TensorRT-RTX or TensorRT.

Ahead of time, on any machine: TensorRT-RTX compiles for GPUs that are not there. What a GPU cannot
do is refused before anything is built.
"""
