"""What a frozen model makes of images: soft tokens in front of it, and alignment of kernels."""
