"""Evaluators: from parameters and data to a report; `tasks` are benchmarks for long contexts."""
