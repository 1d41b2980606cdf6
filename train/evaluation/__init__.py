"""Evaluation of models: held-out loss, scores of tasks, and other fork policies."""
