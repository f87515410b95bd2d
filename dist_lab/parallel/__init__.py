"""The strategies, one short file each, next to PyTorch's own versions of them."""
