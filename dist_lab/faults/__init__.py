"""Faults on purpose: `grammar` reads `--fault`, `inject` makes the faults happen. See README.md."""
