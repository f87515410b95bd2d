"""The strategies that replicate every parameter on every rank."""
