"""Tensor parallelism: each weight matrix is sharded over the ranks."""
