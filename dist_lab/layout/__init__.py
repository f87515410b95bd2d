"""How a parameter is sharded (`layout`), and how its full tensor is gathered (`gather`)."""
