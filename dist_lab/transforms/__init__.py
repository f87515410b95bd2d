"""Changes to a model that are no parallelism: precision, recompute, BatchNorm, offloading."""
