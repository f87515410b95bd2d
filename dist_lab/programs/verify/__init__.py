"""`dist_lab.verify` and `launch/verify.py`: compare a parallel run with one process."""
