"""Run folders: checkpoints, metrics, locking and resuming; measured time and memory of a run."""
