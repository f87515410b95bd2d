"""A timeline of all ranks: what each of them did when, and for whom it waited. See README.md."""
