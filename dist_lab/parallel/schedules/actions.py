"""A pipeline's data types: an action, and a schedule: every rank's actions in order.

A schedule is plain data: it can be printed, drawn, checked, and edited in a file before it is
executed. It knows nothing of tensors or networks.

    2F0   forward of micro-batch 0 through stage 2
    2B0   its full backward; or the same in two halves:
    2I0   the gradients of the stage's inputs, for which the previous stage waits
    2W0   the gradients of the stage's weights, for which no one waits before the step ends (cheap
          ones, the biases of linear layers, are computed in 2I0)

`add_communication` inserts messages: 2SEND_F0 sends the output of 2F0 to 3RECV_F0, the input of
3F0; 3SEND_B0 sends the gradient that 3B0 or 3I0 computed to 2RECV_B0. If a strategy
shards parameters, 2UNSHARD0 all-gathers those of stage 2, and 2RESHARD7 frees them (`add_unshard`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class Op(Enum):
    F = "F"
    B = "B"
    I = "I"  # noqa: E741  Qi et al. call it B, others call a full backward B
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"


COMPUTE = (Op.F, Op.B, Op.I, Op.W)
BACKWARD = (Op.B, Op.I, Op.W, Op.SEND_B, Op.RECV_B)
MESSAGES = (Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B)
# In units of one forward: a backward is two matrix products for each one of the forward.
COSTS: Mapping[Op, int] = {Op.F: 1, Op.B: 2, Op.I: 1, Op.W: 1}


@dataclass(frozen=True)
class Action:
    """One step of a rank's work. `last`: after it the gradients of its stage are complete."""

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
        match = re.fullmatch(r"(\d{1,4})([A-Z_]+)(\d{1,6})", text, re.ASCII)
        if match is None or match[2] not in {op.value for op in (*COMPUTE, *MESSAGES)}:
            return None
        return cls(int(match[1]), Op[match[2]], int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """Every rank's actions in order: one tuple per rank."""

    name: str
    ranks: tuple[tuple[Action, ...], ...]

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """stage -> the rank that holds it."""
        return {a.stage: rank for rank, actions in enumerate(self.ranks) for a in actions}

    @cached_property
    def stages(self) -> int:
        return 1 + max(self.rank_of, default=-1)

    @cached_property
    def microbatches(self) -> int:
        return 1 + max((a.microbatch for actions in self.ranks for a in actions), default=-1)

    @cached_property
    def sends(self) -> bool:
        """Whether `add_communication` has inserted the sends and receives."""
        return any(action.op in MESSAGES for actions in self.ranks for action in actions)

    @property
    def forward_only(self) -> bool:
        return not any(a.op in (Op.B, Op.I, Op.W) for actions in self.ranks for a in actions)

    @property
    def splits_backward(self) -> bool:
        return any(action.op is Op.I for actions in self.ranks for action in actions)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in forward order."""
        return sorted(stage for stage, owner in self.rank_of.items() if owner == rank)


def compute_action(row: Sequence[Action], i: int) -> Action:
    """The action at i; for an UNSHARD or RESHARD, the compute action after or before it."""
    return row[i + {Op.UNSHARD: 1, Op.RESHARD: -1}.get(row[i].op, 0)]


# --- what an action depends on, and what it produces ---------------------------------------------


Result = tuple[Op, int, int]  # op, stage, micro-batch: it exists once that action is done


def matching_receive(send: Action) -> Result:
    """The receive on the other rank that takes this message."""
    if send.op is Op.SEND_F:
        return Op.RECV_F, send.stage + 1, send.microbatch
    return Op.RECV_B, send.stage - 1, send.microbatch


def dependencies(action: Action, schedule: Schedule) -> Iterator[Result]:
    """The results that must exist before an action can begin.

        F(s, m)  needs F(s-1, m)      B(s, m), I(s, m)  need F(s, m), and B or I of (s+1, m)
                                      W(s, m)           needs I(s, m)

    Once the schedule has messages, an input from another rank must have been sent and received.
    """
    op, stage, m = action.op, action.stage, action.microbatch
    if op is Op.SEND_F:
        yield Op.F, stage, m
    elif op is Op.SEND_B or op is Op.W:
        yield Op.I, stage, m
    elif op is Op.F and stage > 0:
        yield from _stage_input(schedule, stage - 1, stage, m, Op.F, Op.SEND_F, Op.RECV_F)
    elif op in (Op.B, Op.I):
        yield Op.F, stage, m
        if stage < schedule.stages - 1:
            yield from _stage_input(schedule, stage + 1, stage, m, Op.I, Op.SEND_B, Op.RECV_B)


def _stage_input(
    schedule: Schedule, source: int, stage: int, m: int, compute: Op, send: Op, receive: Op
) -> Iterator[Result]:
    """The results that `stage` needs from stage `source`: of the same rank, or received."""
    if schedule.sends and schedule.rank_of.get(source) != schedule.rank_of[stage]:
        yield send, source, m
        yield receive, stage, m
    else:
        yield compute, source, m


def result_of(action: Action) -> Result:
    """The result of an action. B counts as I: others only wait for the gradients of its inputs."""
    return Op.I if action.op is Op.B else action.op, action.stage, action.microbatch


def producers(schedule: Schedule) -> dict[Result, tuple[int, int]]:
    """Result -> the action that produces it, as rank and position in its row."""
    return {result_of(a): (r, i) for r, row in enumerate(schedule.ranks) for i, a in enumerate(row)}
