"""Axes of ranks: `topology` is pure arithmetic, `mesh` has process groups, `groups` makes them."""
