"""State, step and loop of every training run."""
