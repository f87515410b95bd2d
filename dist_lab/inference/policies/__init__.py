"""Policies of well-known servers: who runs in a step, with how many tokens. See table.py."""

NAMES = ("static", "orca", "tgi", "vllm", "splitfuse", "lmdeploy")
