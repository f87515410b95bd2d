"""The one package that talks to the network. Every operation takes its axis as an argument.

`ledger` counts, `wire` is what all axes of a mesh share, `ops` are the collectives, `autograd`
their differentiable pairs, `agree` compares small things across ranks before they cost an hour.
"""
