"""What `launch/explain.py` runs: one step of rank 0, looked at."""
