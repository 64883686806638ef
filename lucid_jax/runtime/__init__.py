"""The process and its environment: other processes, signals, the work directory, versions."""
