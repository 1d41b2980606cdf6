"""A run on disk: checkpoints, metrics, who holds the folder, what is timed."""
