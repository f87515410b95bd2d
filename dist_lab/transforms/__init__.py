"""What changes a model and is no parallelism: precision, recompute, BatchNorm."""
