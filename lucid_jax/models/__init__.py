"""The language model and its loss."""
