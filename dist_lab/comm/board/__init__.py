"""The board: a page of memory for each rank of this machine, with its last calls. See README.md."""
