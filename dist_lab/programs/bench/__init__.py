"""The collectives against each other and the clock: what `launch/bench_comm.py` runs.

`settings` is the command line, `measure` runs on every rank, `report` is what is made of it.
"""
