"""Generating text: forward only, with a cache of keys and values."""
