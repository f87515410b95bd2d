"""A museum of bugs that public trainers have shipped: `launch/verify.py --museum`. See README.md.

exhibit.py   what an exhibit is; putting its mistake in place, and taking it out again
rooms/       the exhibits, as data, by the part of a trainer that they are in
trial.py     one training run with or without a mistake, compared with one process
run.py       all trials of an exhibit; the commands
table.py     the results as text
"""
