"""Pipeline parallelism: the layers in stages."""
