"""CPU backend of the rasterizer: numba kernels over tiles, forward and backward."""
