"""What `launch/verify.py` runs, and `dist_lab.verify`: a run compared with one process."""
