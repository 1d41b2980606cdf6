"""Training, fine-tuning, evaluation and reinforcement learning of this project's architectures."""
