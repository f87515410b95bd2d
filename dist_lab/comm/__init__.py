"""The one package that talks to the network. Every operation takes its axis as an argument.

`ops` has the collectives, which all go through `calls`, and `autograd` has the differentiable ones.
`by_hand` has our own algorithms on sends and receives, and `choice` picks one of them or the
backend's. `shared` has the same collectives on memory that all ranks of a machine map. `ledger`
counts calls and bytes, and `board` has each rank's last calls, for the others to read and `check`
to compare. `context` is the state that all axes of a mesh share, and `agree` compares settings and
weights across ranks before a difference costs an hour.
"""
