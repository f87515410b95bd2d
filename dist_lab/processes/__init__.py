"""Rank processes: they start from a warm process, report to their parent, and end with it.

`ranks` starts and ends them, `launcher` runs a program on them, `attempts` says when it is run
again and where. `failures` finds the cause when several fail at once, and `report` prints it.
`pool` keeps some warm for tests and long tables.
"""
