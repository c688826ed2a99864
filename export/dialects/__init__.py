"""The forms in which people have FLUX, its text encoders and what they add to them, one file each.

place          where a parameter stands in a file of other names
float8         float8 weights, plain and with scales
gguf_file      GGUF files and their number formats
flux           the transformer as its authors named it
autoencoder    the VAE as its authors named it
clip, t5       the text encoders
lora           LoRA files of diffusers, PEFT and kohya
"""
