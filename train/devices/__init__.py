"""Meshes, processes, attention kernels, and what is known of chips."""
