"""Where a parameter lies: `layout` says it, `gather` makes it whole again."""
