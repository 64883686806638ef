"""Checkpoints of runs, written by orbax with checksums, restored on any mesh."""
