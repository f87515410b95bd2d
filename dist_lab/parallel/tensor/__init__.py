"""Tensor parallelism: each matrix in pieces."""
