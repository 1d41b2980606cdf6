"""Advantages, losses, credit, penalties, and the update."""
