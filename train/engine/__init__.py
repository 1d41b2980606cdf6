"""The state, step and loop that all training runs share."""
