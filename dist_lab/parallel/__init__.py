"""The strategies: one short file each, next to PyTorch's own version of the same thing."""
