"""Optimizers that update whole matrices, exact under every strategy: README.md explains them."""

from dist_lab.optim.matrices import matrices
from dist_lab.optim.matrix_optimizer import Matrix, MatrixOptimizer
from dist_lab.optim.muon import Muon
from dist_lab.optim.shampoo import Shampoo

__all__ = ["Matrix", "MatrixOptimizer", "Muon", "Shampoo", "matrices"]
