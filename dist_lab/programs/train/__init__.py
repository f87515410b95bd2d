"""What `launch/train.py` runs."""
