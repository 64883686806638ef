"""Kernel bodies and their `pallas_call`; jax alone, no vjp, no mesh, no dispatch."""
