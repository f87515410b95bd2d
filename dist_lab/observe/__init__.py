"""What a run writes down and shows: logs, progress, memory, the machine's peak."""
