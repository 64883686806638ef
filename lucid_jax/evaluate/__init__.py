"""Evaluators: from parameters and data to a report."""
