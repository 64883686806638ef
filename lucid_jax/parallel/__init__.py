"""Meshes, and attention whose sequences are sharded over the devices of a mesh axis."""
