"""Pretraining: its config, presets and job, and growing and merging of Dragon Hatchlings."""
