"""What a run reports: FLOPs, log files, pictures."""
