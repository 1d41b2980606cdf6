"""What a model is worth: held-out loss, tasks, other policies."""
