"""Checkpoints: orbax, with checksums, on any mesh."""
