"""Supervised fine-tuning: its config, its job, demonstrations, and the battery of variants."""
