"""Rank processes: they start from a warm process, report to their parent, and end with it.

`ranks` starts and ends them, `launcher` runs a program on them, `failures` reports what went wrong
on several at once, and `pool` keeps some warm for tests and long tables.
"""
