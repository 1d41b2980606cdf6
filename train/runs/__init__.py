"""The folder of a run: checkpoints, metrics, lock and resuming; and the run's time and memory."""
