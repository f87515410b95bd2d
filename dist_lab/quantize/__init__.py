"""Weights and activations in few bits: the formula, GPTQ, AWQ, and training that knows of it."""
