"""The program launch/checkpoint.py."""
