"""`launch/bench_comm.py`: time the algorithms of each collective.

`settings` reads the command line, `measure` runs on every rank, `report` shows and writes results.
"""
