"""run.py and configs/ as links, so that a wheel carries them under a name of its own."""
