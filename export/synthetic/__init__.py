"""Random checkpoints in the official layout, of any shape.

The trained weights are large and their licences are their own. These have the same files, names
and shapes, and every weight matters to the output, so that everything but the images can be
tried without them: builds at true size, memory, time, and parity on shapes that no release has.
"""
