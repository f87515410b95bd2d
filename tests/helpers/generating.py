"""Text generated on several ranks, with all its logits, and an oracle that has no cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lab.checkpoint.exchange import gptq_files, huggingface
from dist_lab.checkpoint.exchange.llama import shape_of
from dist_lab.checkpoint.exchange.ours import weights_of
from dist_lab.checkpoint.exchange.tensors import state_dict
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import UserError
from dist_lab.inference import generate as generation
from dist_lab.inference import step as stepping
from dist_lab.inference.generate import generate
from dist_lab.inference.quantized import OfQuantizedFolder
from dist_lab.inference.sampling import Sampling, choose
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import load_stage
from dist_lab.inference.weights import OfCheckpoint, OfFolder, Weights
from dist_lab.mesh.mesh import init_mesh
from dist_lab.observe.memory import LiveBytes
from dist_lab.programs.verify.matrix import models
from dist_lab.quantize.linear import QuantizedLinear

STEP = "step-00000002"
LAYERS = 4
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [60], [7, 7, 7, 0, 12]]
SAMPLINGS = [Sampling(), Sampling(1.0, seed=5), Sampling(0.7, top_k=20, top_p=0.9, seed=6)]
NEW = 6


class Letters:
    """A tokenizer of 61 tokens."""

    vocab = models.VOCAB
    ends: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return [byte - 60 for byte in text.encode()]

    def bytes_of(self, token: int) -> bytes:
        return bytes([60 + token])


@dataclass(frozen=True)
class Generated:
    """What a rank has seen: tokens, texts in parts, logits of each choice, collectives."""

    tokens: list[list[int]]
    reasons: list[str]
    parts: list[tuple[int, str]]
    logits: dict[tuple[int, int], Any]  # seed and position -> (V,)
    calls: list[tuple[str, str, str]]  # op, axis, unit


def requests(new: int = NEW) -> list[Request]:
    return [Request(p, new, s) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]


def weights_in(folder: str, model: str = "gpt") -> Weights:
    if gptq_files.is_quantized(folder):
        return OfQuantizedFolder(gptq_files.open_folder(folder))
    if (Path(folder) / "config.json").exists():
        return OfFolder(huggingface.open_folder(folder))
    built = models.build(model, LAYERS, torch.float64, "meta")
    return OfCheckpoint(Checkpoint.open(folder), shape_of(built))


def on_rank(
    rank: int, axes: dict[str, int], folder: str, asked: list[Request], model: str = "gpt",
    end: int | None = None, prefill: int = 512,
) -> Generated:  # fmt: skip
    """Load this rank's part of the model, and continue the prompts."""
    mesh = init_mesh(**axes)
    stage = load_stage(weights_in(folder, model), mesh)
    tokenizer, parts, logits = Letters(), [], {}
    tokenizer.ends = () if end is None else (end,)

    def choose_and_note(row, sampling, position):
        logits[sampling.seed, position] = row.tolist()
        return choose(row, sampling, position)

    with pytest.MonkeyPatch.context() as patch, mesh.comm.ledger.recording() as calls:
        patch.setattr(stepping, "choose", choose_and_note)
        patch.setattr(generation, "PREFILL", prefill)
        done = generate(stage, asked, tokenizer, lambda n, text: parts.append((n, text)))
    seen = [(call.op, call.axis, call.unit) for call in calls]
    return Generated([d.tokens for d in done], [d.reason for d in done], parts, logits, seen)


def oracle(folder: str, asked: list[Request], model: str = "gpt"):
    """The same with the whole model in one process, and a whole forward for each token."""
    built = models.build(model, LAYERS, torch.float64)
    built.load_state_dict(state_dict(weights_of(Checkpoint.open(folder))))
    return continued(built, asked)


def continued(model: torch.nn.Module, asked: list[Request]):
    """Tokens and logits, by a whole forward for each token."""
    tokens, logits = [], {}
    for request in asked:
        text = list(request.prompt)
        for _ in range(request.new_tokens):
            with torch.no_grad():
                row = model(torch.tensor([text]))[0, -1]
            logits[request.sampling.seed, len(text)] = row.tolist()
            text.append(choose(row, request.sampling, len(text)))
        tokens.append(text[len(request.prompt) :])
    return tokens, logits


def memory_on_rank(rank: int, axes: dict[str, int], folder: str) -> tuple[int, int, int]:
    """Bytes of this rank's tensors after a load, at their peak, and of all boxes read."""
    mesh = init_mesh(**axes)
    weights, read = weights_in(folder), []
    fill = Checkpoint._fill

    def count(self, name, box, out):
        read.append(out.nbytes)
        fill(self, name, box, out)

    with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        patch.setattr(Checkpoint, "_fill", count)
        stage = load_stage(weights, mesh)
    held = sum(p.nbytes for p in stage.model.parameters())
    assert live.live >= held
    return held, live.peak, sum(read)


def refusal_on_rank(rank: int, axes: dict[str, int], folder: str) -> str:
    with pytest.raises(UserError) as refused:
        load_stage(weights_in(folder), init_mesh(**axes))
    return str(refused.value)


def codes_on_rank(rank: int, axes: dict[str, int], folder: str) -> int:
    """Bytes of the packed codes of this rank's Linears."""
    stage = load_stage(weights_in(folder), init_mesh(**axes))
    layers = [m for m in stage.model.modules() if isinstance(m, QuantizedLinear)]
    assert not [m for m in stage.modules[1].modules() if isinstance(m, torch.nn.Linear)]
    return sum(layer.qweight.nbytes for layer in layers)
