"""The strategies that keep every parameter whole on every rank."""
