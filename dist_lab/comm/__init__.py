"""The one package that talks to the network. Every operation takes its axis as an argument.

`ops` has the collectives, which all go through `calls`, and `autograd` their differentiable pairs.
`by_hand` has the collectives as messages, and `choice` chooses between them and the backend.
`shared` has them in memory that all ranks of a machine map. `ledger` counts calls and bytes,
`context` is the state that all axes of a mesh share, and `agree` compares settings and weights
across ranks before a difference costs an hour.
"""
