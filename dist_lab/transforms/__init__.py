"""Changes to a model other than parallelism: precision, recompute, BatchNorm, offloading."""
