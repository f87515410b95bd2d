"""`launch/sweep.py`: how each strategy scales with the number of ranks and the size of the model.

settings.py   the command line, and the cells: a comparison of all strategies for each size and
              number of ranks; no torch
cell.py       one comparison, on its ranks
command.py    runs the cells that have no result yet
results.py    speed-ups, and the costs that are fitted to all steps
report.py     the table, the plot and the files
"""
