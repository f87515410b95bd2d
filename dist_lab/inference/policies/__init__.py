"""Policies of well-known servers: who runs in a step, with how many tokens."""
