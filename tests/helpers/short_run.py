"""The settings of a run that takes a moment."""

MODEL = {"layers": 2, "batch": 4, "seq": 16, "optimizer": "adamw"}
