"""What every rank of a run does now."""
