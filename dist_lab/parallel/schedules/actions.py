"""The nouns of a pipeline: actions, and a schedule, which is every rank's actions in order.

A schedule is a value. It can be printed, drawn, checked, written to a file and edited there, and
only then executed; nothing in it knows of tensors or networks.

    2F0   forward of micro-batch 0 through stage 2
    2B0   its backward, whole; or in two:
    2I0   the gradient of what the stage was given, for which the stage before waits
    2W0   the gradients of its weights, for which nobody waits before the step ends; what is cheap
          comes with 2I0: biases of linear layers

and, written by `add_communication`, what travels between ranks: 2SEND_F0 sends on what 2F0 made,
3RECV_F0 receives what 3F0 is to be given; 3SEND_B0 sends back what 3B0 or 3I0 made, to 2RECV_B0;
and, written by `add_unshard`, when a stage's parameters must be there: 2UNSHARD0, and may go:
2RESHARD7, for strategies that keep shards of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class Op(Enum):
    F = "F"
    B = "B"
    I = "I"  # noqa: E741  Qi et al. call it B, and others so what they do whole
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"


COMPUTE = (Op.F, Op.B, Op.I, Op.W)
MESSAGES = (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B)
# In units of a forward: backward is two matrix products where forward is one.
COSTS: Mapping[Op, int] = {Op.F: 1, Op.B: 2, Op.I: 1, Op.W: 1}


@dataclass(frozen=True)
class Action:
    """What a rank does next. `last`: it completes the gradients of its stage."""

    stage: int
    op: Op
    microbatch: int
    last: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action | None":
        """
        >>> Action.parse("2F0"), Action.parse("F2")
        (Action(stage=2, op=<Op.F: 'F'>, microbatch=0, last=False), None)
        """
        found = re.fullmatch(r"(\d{1,4})([A-Z_]+)(\d{1,6})", text, re.ASCII)
        if found is None or found[2] not in {op.value for op in (*COMPUTE, *MESSAGES)}:
            return None
        return cls(int(found[1]), Op[found[2]], int(found[3]))


@dataclass(frozen=True)
class Schedule:
    """Who does what in which order: one tuple of actions a rank."""

    name: str
    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """stage -> the rank that has it."""
        return {a.stage: rank for rank, actions in enumerate(self.ranks) for a in actions}

    @cached_property
    def stages(self) -> int:
        return 1 + max(self.rank_of, default=-1)

    @cached_property
    def microbatches(self) -> int:
        return 1 + max((a.microbatch for actions in self.ranks for a in actions), default=-1)

    @cached_property
    def sends(self) -> bool:
        """Whether what travels is written in it, by `add_communication`."""
        return any(action.op in MESSAGES for actions in self.ranks for action in actions)

    @property
    def forward_only(self) -> bool:
        return not any(a.op in (Op.B, Op.I, Op.W) for actions in self.ranks for a in actions)

    @property
    def splits_backward(self) -> bool:
        return any(action.op is Op.I for actions in self.ranks for action in actions)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank has, in the order of forward."""
        return sorted(stage for stage, owner in self.rank_of.items() if owner == rank)


# --- what an action needs, and what is there once it has been done -------------------------------


Thing = tuple[Op, int, int]  # op, stage, micro-batch: what is there once it has been done


def received(send: Action) -> Thing:
    """The other end of a send."""
    if send.op is Op.SEND_F:
        return Op.RECV_F, send.stage + 1, send.microbatch
    return Op.RECV_B, send.stage - 1, send.microbatch


def needs(action: Action, schedule: Schedule) -> Iterator[Thing]:
    """What must be there before an action can begin.

        F(s, m)  needs F(s-1, m)      B(s, m), I(s, m)  need F(s, m), and B or I of (s+1, m)
                                      W(s, m)           needs I(s, m)

    Once sends and receives are written in, what a stage is given has been sent and received.
    """
    op, stage, m = action.op, action.stage, action.microbatch
    if op is Op.SEND_F:
        yield Op.F, stage, m
    elif op is Op.SEND_B or op is Op.W:
        yield Op.I, stage, m
    elif op is Op.F and stage > 0:
        yield from _given(schedule, stage - 1, stage, m, Op.F, Op.SEND_F, Op.RECV_F)
    elif op in (Op.B, Op.I):
        yield Op.F, stage, m
        if stage < schedule.stages - 1:
            yield from _given(schedule, stage + 1, stage, m, Op.I, Op.SEND_B, Op.RECV_B)


def _given(
    schedule: Schedule, by: int, to: int, m: int, made: Op, send: Op, receive: Op
) -> Iterator[Thing]:
    """What a stage gets from its neighbor: made on this very rank, or sent and received."""
    if schedule.sends and schedule.rank_of.get(by) != schedule.rank_of[to]:
        yield send, by, m
        yield receive, to, m
    else:
        yield made, by, m


def made_by(action: Action) -> Thing:
    """B makes what I makes, and the gradients of the weights besides."""
    return Op.I if action.op is Op.B else action.op, action.stage, action.microbatch


def places(schedule: Schedule) -> dict[Thing, tuple[int, int]]:
    """Where each thing is made: rank and position."""
    return {
        made_by(a): (rank, i) for rank, row in enumerate(schedule.ranks) for i, a in enumerate(row)
    }
