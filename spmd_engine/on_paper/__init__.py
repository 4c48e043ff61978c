"""Plans for clusters of any shape, without GPUs and without weights."""
