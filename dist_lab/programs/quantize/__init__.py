"""quantize.py: a checkpoint in few bits, and what that costs in loss."""
