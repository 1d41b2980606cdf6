"""The train state, train step and training loop that all runs share."""
