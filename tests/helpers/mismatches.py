"""Every kind of mismatch that can be made with `ops`: goal R8. The last rank differs.

Each is called as kind(differs, axis, other): `other` is another group of the same ranks.
"""

from functools import partial

import torch

from dist_lab.comm import ops

F32, F64, I32 = torch.float32, torch.float64, torch.int32


def other_op(r, axis, other):
    (ops.all_reduce if r else ops.all_gather)(torch.ones(4), axis)


def other_group_first(r, axis, other):
    for group in (axis, other)[:: -1 if r else 1]:
        ops.all_reduce(torch.ones(4), group)


def one_call_less(r, axis, other):
    if r == 0:
        ops.all_reduce(torch.ones(4), axis)
    ops.all_gather(torch.ones(4), axis)


def one_call_more(r, axis, other):
    if r == 0:
        ops.all_reduce(torch.ones(4), axis)


def message(r, axis, other, *, sent=4, received=4, sent_as=F32, received_as=F32):
    if axis.index == 0:
        pendings = ops.exchange([(torch.ones(sent, dtype=sent_as), axis.size - 1)], [], axis)
    elif r:
        pendings = ops.exchange([], [(torch.zeros(received, dtype=received_as), 0)], axis)
    else:
        return
    for pending in pendings:
        pending.wait()


def both_receive(r, axis, other):
    if r or axis.index == 0:
        peer = 0 if r else axis.size - 1
        [pending] = ops.exchange([], [(torch.empty(4), peer)], axis)
        pending.wait()


KINDS = {
    "op": other_op,
    "bytes": lambda r, axis, other: ops.all_reduce(torch.ones(4 + 1000 * r), axis),
    "same numel": lambda r, axis, other: ops.all_reduce(torch.ones((4, 2) if r else (2, 4)), axis),
    "dtype": lambda r, axis, other: ops.all_reduce(torch.ones(4, dtype=(F32, F64)[r]), axis),
    "dtype of same size": lambda r, axis, other: ops.all_reduce(
        torch.ones(4, dtype=(F32, I32)[r]), axis
    ),
    "reduction": lambda r, axis, other: ops.all_reduce(torch.ones(4), axis, ("sum", "max")[r]),
    "source": lambda r, axis, other: ops.broadcast(torch.ones(4), axis, r),
    "order of groups": other_group_first,
    "missing call": one_call_less,
    "extra call": one_call_more,
    "larger message": partial(message, sent=4000),
    "smaller message": partial(message, sent=2),
    "dtype of a message": partial(message, received_as=I32),
    "both receive": both_receive,
}

# Kinds of which the ranks in the middle notice nothing, as they take no part.
BETWEEN_TWO = {"larger message", "smaller message", "dtype of a message", "both receive"}


def is_quiet(kind, axis):
    """Whether this rank makes no call that could fail."""
    last = axis.index == axis.size - 1
    return (kind == "extra call" and last) or (kind in BETWEEN_TWO and not last and axis.index > 0)
