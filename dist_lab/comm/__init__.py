"""The one package that talks to the network. Every operation takes its axis as an argument.

`ops` are the collectives, which all go through `calls`, and `autograd` their differentiable pairs.
`algorithms` has them by hand, `costs` what each costs, `choice` which one is taken, and `messages`
how they send. `ledger` counts, `wire` is what all axes of a mesh share, `agree` compares small
things across ranks before they cost an hour.
"""
