"""`launch/verify.py --matrix`: compare every mix of strategies with one process, cell by cell.

`cells` is the table of cells, `models` has their models, `cell` runs one on a rank, `run` runs them
all on a pool of ranks, and `table` renders the results.
"""
