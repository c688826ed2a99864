"""What programs of peers read of FLUX's files by name, and the numbers that a step is of. Python
alone: it is read in their environments, too."""

CHECKPOINT, INPUTS = "checkpoint", "inputs.npz"
TIME = 0.7  # the noise level, of 1
GUIDANCE = 3.5
