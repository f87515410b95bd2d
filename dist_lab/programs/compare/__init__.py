"""Several strategies side by side, in the same processes: which is faster, and is it certain?

settings.py   what is compared, from the command line; no torch
measure.py    the alternating rounds, on every rank
rounds.py     the clock that they run by
ratios.py     from the times of rounds to "faster", "slower" or "too noisy to tell"; pure
report.py     one row a strategy, and the tables a person reads
files.py      compare.json, compare.csv, compare.png
"""
