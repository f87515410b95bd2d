"""Who computes what when in a pipeline, as data: no torch in it."""
