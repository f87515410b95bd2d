"""Training whose bits do not depend on the layout: `--reduce-order fixed`."""
