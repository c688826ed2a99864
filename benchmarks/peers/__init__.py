"""Others' runtimes and ours on the same work, in one interleaved run."""
