"""Training: the loop, its step, what it reports, and what it needs."""
