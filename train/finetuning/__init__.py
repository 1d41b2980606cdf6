"""What fine-tuning trains, and its config."""
