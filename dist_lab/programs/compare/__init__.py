"""Several strategies side by side, in the same processes: which is faster, and is it certain?

entries.py    the words of --strategies: a strategy, or a mesh with its mix of strategies; no torch
settings.py   the command line: which strategies, how many rounds; no torch
measure.py    the alternating rounds, on every rank
rounds.py     the time of each step
ratios.py     from the times of rounds to "faster", "slower" or "too noisy to tell"
report.py     the results as data: one row per strategy
tables.py     the results as printed tables
files.py      the results as compare.json, compare.csv and compare.png
"""
