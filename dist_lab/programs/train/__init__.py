"""`launch/train.py`: the training loop and its measurements."""
