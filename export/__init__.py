"""Build time: from trained checkpoints to an engine set. torch lives here and nowhere else."""
