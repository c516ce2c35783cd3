"""The CPU backend: numba kernels for projection, sorting and blending, forward and backward."""
