"""Random numbers that do not depend on the layout: dropout that is equal to one process."""
