"""Pretraining: config, presets and training job; growing and merging of Dragon Hatchlings."""
