"""The process and its surroundings: other processes, signals, the work directory, versions."""
