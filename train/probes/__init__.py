"""Probes of frozen models with images: answers to soft tokens, and alignment of representations."""
