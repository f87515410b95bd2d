"""The loop that every rank of a served model runs.

    router           rank 0                          ranks 1, 2, ...
      requests  ->   lines that have come
                     broadcast                  ->   the same lines
                     engine.add, cancel              engine.add, cancel
                     engine.step           <-sums->  engine.step
      texts     <-   events

An engine decides by its calls alone, and all ranks make the same calls. So nothing else has to be
sent to keep them together: neither tables of blocks nor lists of running texts. A text that its
client has given up is cancelled before the next step, which frees its blocks.

A rank that waits in a collective must not wait for ever, so an idle rank 0 broadcasts an empty line
once in `beat` seconds.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from dist_lab.comm import ops
from dist_lab.errors import UserError
from dist_lab.inference.engine import Engine, Event
from dist_lab.inference.line import Line
from dist_lab.inference.sampling import Sampling
from dist_lab.inference.sequence import Request
from dist_lab.mesh.mesh import Axis


def serve(engine: Engine, world: Axis, line: Line | None, beat: float = 1.0) -> None:
    """Serve until the router says stop. Collective.

    Args:
        line: to the router, on rank 0; None on the others.
        beat: seconds after which an idle rank 0 lets the others know that it is there; less than
            the time limit of a collective.

    Raises:
        MachineError: the router has ended.
    """
    tokens = range(engine.tokenizer.vocab)
    longest = max(len(engine.tokenizer.bytes_of(token)) for token in tokens)
    accepted: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    events: list[Event] = []
    while True:
        if line:
            line.send(
                {
                    "accepted": accepted,
                    "refused": refused,
                    "events": [(event.name, event.text, event.reason) for event in events],
                    "counts": asdict(engine.counts),
                }
            )
        lines = line.receive(0 if engine.busy else beat) if line else b""
        accepted, refused = {}, {}
        for command in map(json.loads, from_rank_0(lines, world).splitlines()):
            if command["do"] == "stop":
                return
            if command["do"] == "cancel":
                engine.cancel(command["name"])
                continue
            try:
                accepted[command["name"]] = add(engine, longest, command)
            except UserError as error:
                refused[command["name"]] = str(error)
        events = engine.step() if engine.busy else []


def from_rank_0(data: bytes, world: Axis) -> bytes:
    """The bytes of rank 0, on every rank. Sends 8 bytes if there are none."""
    if world.size == 1:
        return data
    with world.comm.label("commands", unit=""):
        length = int(ops.broadcast(torch.tensor([len(data)], device=world.device), world))
        if length == 0:
            return b""
        row = torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)
        return ops.broadcast(row.to(world.device), world).cpu().numpy().tobytes()


def add(engine: Engine, longest: int, command: Mapping[str, Any]) -> list[int]:
    """Add the texts of one request, all or none. Returns the numbers of tokens of their prompts.

    Args:
        longest: the bytes of the longest token.
    """
    lengths: list[int] = []
    try:
        for asked in command["asked"]:
            prompt, new = asked["prompt"], asked["new_tokens"]
            if isinstance(prompt, str):
                check_length(len(prompt.encode()), longest, new, engine.capacity)
                prompt = engine.tokenizer.encode(prompt)
            else:
                check_length(len(prompt), 1, new, engine.capacity)
            for seed in asked["seeds"]:
                request = Request(
                    prompt, new, Sampling(**asked["sampling"], seed=seed), asked["stops"]
                )
                engine.add(f"{command['name']}.{len(lengths)}", request)
                lengths.append(len(prompt))
    except UserError:
        for number in range(len(lengths)):
            engine.cancel(f"{command['name']}.{number}")
        raise
    return lengths


def check_length(size: int, longest: int, new: int, capacity: int) -> None:
    """Raise UserError for a text that is too long in any case: to encode it would hold up others.

    Args:
        size: of the prompt, in bytes, or in tokens.
        longest: so many of these are a token at most.
    """
    if size > longest * capacity:
        raise UserError(
            f"the prompt has at least {-(-size // longest):,} tokens and {new:,} are to be "
            f"generated, and the cache has room for {capacity:,}; give a shorter prompt"
        )
