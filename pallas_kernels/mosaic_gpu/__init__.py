"""Kernels for Hopper GPUs by Pallas' Mosaic GPU backend, of jax 0.11 and later."""
