"""The one package that talks to the network. Every operation takes its axis as an argument.

`ops` has the collectives, which all go through `calls`, and `autograd` their differentiable pairs.
`algorithms` has the collectives by hand, `costs` their costs, `messages` their sends and receives,
and `choice` chooses between them and the backend. `shared` is memory that all ranks map,
`shared_collectives` the collectives on it, and `scratch` uses them for activations. `ledger` counts
calls and bytes, `wire` is the state that all axes of a mesh share, and `agree` compares settings
and weights across ranks before a difference costs an hour.
"""
