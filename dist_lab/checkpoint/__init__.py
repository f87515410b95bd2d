"""Checkpoints that any layout can load: see README.md."""
