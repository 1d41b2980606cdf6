"""Device meshes, connected processes, attention kernels, and specifications of chips."""
