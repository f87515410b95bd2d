"""The timeline of all ranks: segments that tile the wall time of some steps, and their collectives.

    timeline = Timeline.read("runs/003-fsdp-gpt-tiny/timeline.json")
    timeline.exposed()                     axis -> seconds that ranks were blocked, on the average
    timeline.ranks[0].share(3)             kind -> seconds of step 3

Times are nanoseconds since the recording began on the first rank. A rank does one thing at a time,
so its segments follow each other without a gap, and their lengths add up to the wall time.

    exposed    a rank is blocked in a collective, so no computation covers it: kinds waiting, idle
    waiting    all ranks of the collective have started it: the data are on their way
    idle       some rank has not started it: a slow rank, or in a pipeline the bubble
    hidden     a collective is in flight while the rank does something else
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from dist_lab.errors import UserError

FORMAT = 1
# reduce: finish(). optimizer: clipping, the step, after_step(). other: the loop's own code.
KINDS = (
    "forward", "recompute", "backward", "reduce", "optimizer", "data", "validation", "checkpoint",
    "waiting", "idle", "other",
)  # fmt: skip
BLOCKED = ("waiting", "idle")
# Phases that only some steps end with. What runs inside them counts as one of them, such as the
# forward of a validation.
NOT_OF_A_STEP = ("validation", "save")


@dataclass(frozen=True, slots=True)
class StepSpan:
    """One step of one rank. It ends when the next one begins, after validation and checkpoint."""

    step: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A rank did one thing from `start` to `end`.

    phase, unit: the labels of the ledger; all of a validation has its name
    call: the index of the collective that it waited for
    """

    start: int
    end: int
    kind: str
    phase: str
    unit: str
    call: int | None


@dataclass(frozen=True, slots=True)
class CallSpan:
    """A collective of one rank, as in the ledger (comm/ledger.py).

    step: that in which it was launched
    start, end: launched; returned from its wait, which is later than its data arrived
    exposed, hidden: nanoseconds blocked in waits for it; in flight while this rank was not blocked
    late: the rank that launched it last; None for this rank itself
    """

    number: int
    op: str
    axis: str
    size: int
    about: str
    payload: int
    sent: int
    phase: str
    unit: str
    algorithm: str
    where: str
    step: int
    start: int
    end: int
    exposed: int
    hidden: int
    late: int | None


@dataclass(frozen=True)
class RankTimeline:
    """The steps of one rank. Segments tile them, in order; calls are in order of their launch."""

    rank: int
    place: str
    host: str
    steps: tuple[StepSpan, ...]
    segments: tuple[Segment, ...]
    calls: tuple[CallSpan, ...]

    def calls_of_steps(self) -> Iterator[CallSpan]:
        """Yields the calls launched in these steps, without those of validations and checkpoints.

        Those that were launched before the recording are not among them either.
        """
        starts = [segment.start for segment in self.segments]
        steps = {span.step for span in self.steps}
        for call in self.calls:
            segment = self.segments[max(0, bisect_right(starts, call.start) - 1)]
            if call.step in steps and segment.phase not in NOT_OF_A_STEP:
                yield call

    def share(self, step: int | None = None) -> dict[str, float]:
        """Returns the seconds of each kind, in one step or in all."""
        spans = [span for span in self.steps if step in (None, span.step)]
        seconds = dict.fromkeys(KINDS, 0.0)
        for segment in self.segments:
            if any(span.start <= segment.start < span.end for span in spans):
                seconds[segment.kind] += (segment.end - segment.start) / 1e9
        return seconds


@dataclass(frozen=True)
class Timeline:
    """All ranks. `about`: strategies, mesh, and in `library` what cannot be seen."""

    about: Mapping[str, Any]
    ranks: tuple[RankTimeline, ...]

    @property
    def steps(self) -> range:
        steps = self.ranks[0].steps
        return range(steps[0].step, steps[-1].step + 1)

    def exposed(self) -> dict[str, float]:
        """Returns for each axis the seconds that a rank was blocked, the mean over ranks."""
        return self._by_axis("exposed")

    def hidden(self) -> dict[str, float]:
        """Returns for each axis the seconds in flight while the rank computed, likewise."""
        return self._by_axis("hidden")

    def _by_axis(self, field: str) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for rank in self.ranks:
            for call in rank.calls:
                share = getattr(call, field) / 1e9 / len(self.ranks)
                seconds[call.axis] = seconds.get(call.axis, 0.0) + share
        return seconds

    def __str__(self) -> str:
        """The share of each kind in one line, the largest first."""
        shares = [rank.share() for rank in self.ranks]
        mean = {kind: fmean(share[kind] for share in shares) for kind in KINDS}
        whole = sum(mean.values())
        large = sorted(mean, key=lambda kind: -mean[kind])
        parts = [f"{kind} {mean[kind] / whole:.0%}" for kind in large if mean[kind] > 0.01 * whole]
        axes = [f"{axis} {s / whole:.0%}" for axis, s in self.exposed().items()]
        sentences = [
            f"timeline of {in_words(self.steps)}: {', '.join(parts)}",
            f"exposed communication by axis: {', '.join(axes)}" if axes else "",
            str(self.about.get("library") or ""),
        ]
        return "; ".join(filter(None, sentences))

    # --- as JSON ----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Returns `about` and the ranks. Each text is written once; a row has its number."""
        texts: dict[str, int] = {}

        def number(text: str) -> int:
            return texts.setdefault(text, len(texts))

        ranks = [
            {
                "rank": rank.rank, "place": rank.place, "host": rank.host,
                "steps": [astuple(span) for span in rank.steps],
                "segments": [
                    (s.start, s.end, KINDS.index(s.kind), number(s.phase), number(s.unit), s.call)
                    for s in rank.segments
                ],
                "calls": [
                    [number(v) if isinstance(v, str) else v for v in astuple(call)]
                    for call in rank.calls
                ],
            }
            for rank in self.ranks
        ]  # fmt: skip
        return {**self.about, "texts": list(texts), "ranks": ranks}

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Timeline":
        about = {k: v for k, v in written.items() if k not in ("texts", "ranks")}
        texts = written["texts"]
        text = {i for i, field in enumerate(fields(CallSpan)) if field.type is str}
        ranks = tuple(
            RankTimeline(
                rank["rank"], rank["place"], rank["host"],
                tuple(StepSpan(*row) for row in rank["steps"]),
                tuple(
                    Segment(start, end, KINDS[kind], texts[phase], texts[unit], call)
                    for start, end, kind, phase, unit, call in rank["segments"]
                ),
                tuple(
                    CallSpan(*(texts[v] if i in text else v for i, v in enumerate(row)))
                    for row in rank["calls"]
                ),
            )
            for rank in written["ranks"]
        )  # fmt: skip
        return cls(about, ranks)

    @classmethod
    def read(cls, path: Path | str) -> "Timeline":
        """Reads timeline.json. Raises UserError if there is none, or it is of another tool."""
        again = "record it again: train.py --timeline FIRST:LAST"
        try:
            written = json.loads(Path(path).read_text(encoding="utf-8"))["otherData"]
            tool, number = written["tool"], written["format"]
            if (tool, number) == ("dist_lab", FORMAT):
                timeline = cls.from_json(written)
                if timeline.ranks and all(rank.steps and rank.segments for rank in timeline.ranks):
                    return timeline
                raise ValueError
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror}; {again}") from None
        except (ValueError, KeyError, TypeError, IndexError):
            tool = "another"
        if tool == "dist_lab":
            raise UserError(
                f"{str(path)!r} is a timeline of format {number}, this version reads {FORMAT}; "
                f"{again}"
            )
        raise UserError(f"{str(path)!r} is not a timeline of dist_lab, or is damaged; {again}")


def in_words(steps: Sequence[int]) -> str:
    """
    >>> in_words(range(3, 6)), in_words([3])
    ('steps 3 to 5', 'step 3')
    """
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
