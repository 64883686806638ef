"""Pallas kernels and their `pallas_call`s. They depend on jax alone: no VJP, mesh or dispatch."""
