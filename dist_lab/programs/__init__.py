"""The programs: what `launch/X.py` runs is `dist_lab/programs/X/`."""
