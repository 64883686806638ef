"""Evaluation of models: loss by position, and scores on the benchmark tasks of `tasks`."""
