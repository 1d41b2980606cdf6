"""Advantages, losses, reward shaping, and the update."""
