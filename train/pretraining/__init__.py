"""What a pretraining run trains, its config and presets."""
