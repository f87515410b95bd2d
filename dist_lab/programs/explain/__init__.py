"""The code of `launch/explain.py`: a dry run of one step of rank 0."""
