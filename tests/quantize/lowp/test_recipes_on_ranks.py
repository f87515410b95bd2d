"""Training in few bits has the same bits on ranks as in one process.

The codes do not depend on the ranks, because ranges are taken over all of them. Products of codes
are short numbers, so in float64 their sums are exact in any order: [Note: bits] in codecs.py. The
rest of this model is elementwise; so is SGD, here with a rate that is a power of two. The loss is a
sum of squares of multiples of 1/32, which is exact, too.
"""

import pytest
import torch
from torch import Tensor, nn

import dist_lab
from dist_lab.quantize.lowp.codecs import CODECS
from dist_lab.quantize.lowp.recipe import LowPrecision

WIDTH, HIDDEN, SAMPLES, TOKENS = 128, 256, 16, 32  # 128 tokens for each of four ranks
EXACT = [name for name in CODECS if name.endswith("pow2") or name.startswith("mx")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Net(nn.Module):
    units = (Block,)
    stages = ("enter", "blocks.*", "leave")

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Identity(), nn.Identity()  # where a sequence is split
        self.blocks = nn.ModuleDict({str(i): Block() for i in range(blocks)})
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            rows, columns = parameter.shape
            w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            w[rows // 2 :] /= 4  # so that shards have different ranges
            w[:, columns // 2 :] /= 4
            parameter.data = w * (4 / columns) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks.values():
            x = block(x)
        return self.leave(x)

    def tp_plan(self) -> dict[str, str]:
        split = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
        return split | {"enter": "scatter_output", "leave": "gather_input"}


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = SAMPLES, TOKENS, WIDTH
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    # Ranges must differ by rank and by token.
    return x * torch.logspace(-2, 0, SAMPLES, dtype=torch.float64)[:, None, None], y


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    error = (output - target + 2**18).float().double() - 2**18  # a multiple of 1/32
    return (error**2).sum() / (SAMPLES * TOKENS * WIDTH)


def one_process(recipe: str, blocks: int, ranks: int, microbatches: int, steps: int):
    """Yields the loss, the gradients and the weights of each step."""
    model = LowPrecision(recipe).on(Net(blocks))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-2)
    for step in range(steps):
        x, y = (t.view(ranks, microbatches, -1, *t.shape[1:]) for t in batch_of(step))
        total = 0.0
        for i in range(microbatches):  # the i-th of all ranks together
            loss = loss_of(model(x[:, i].flatten(0, 1)), y[:, i].flatten(0, 1))
            loss.backward()
            total += float(loss.detach())
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        yield total, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}


# mesh, strategy, micro-batches, options
MIXES = {
    "ddp": ({"dp": 4}, None, 1, {}),
    "zero1": ({"dp": 4}, "zero1", 1, {}),
    "zero2": ({"dp": 4}, "zero2", 1, {}),
    "fsdp": ({"fsdp": 4}, None, 1, {}),
    "hsdp": ({"dp": 2, "fsdp": 2}, None, 1, {"recompute": 1}),
    "ddp x tp": ({"dp": 2, "tp": 2}, None, 1, {}),
    "sequence": ({"tp": 2, "dp": 2}, None, 1, {"sequence_parallel": True, "regather": True}),
    "fsdp x tp": ({"fsdp": 2, "tp": 2}, None, 2, {}),
    "pp": ({"pp": 4}, None, 4, {}),
    "pp x tp": ({"pp": 2, "tp": 2}, None, 4, {"schedule": "zb"}),
    "pp x fsdp": ({"pp": 2, "fsdp": 2}, None, 2, {"schedule": "zb"}),
}
DEFAULT = {"ddp x tp": "fp8-block-pow2", "zero2": "nvfp4-pow2", "pp x tp": "mxfp8"}


@pytest.mark.slow_unless(lambda mix, recipe: DEFAULT.get(mix) == recipe)
@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.ranks(4)
def test_training_has_the_bits_of_one_process(mix, recipe):
    axes, strategy, microbatches, options = MIXES[mix]
    mesh = dist_lab.init_mesh(**axes)
    blocks = 4 if "pp" in axes else 2
    ranks = mesh.data.size
    if "pp" in axes:
        options = options | {"example_inputs": batch_of(0)[0][: SAMPLES // ranks // microbatches]}
    job = dist_lab.parallelize(
        Net(blocks), mesh, strategy, units=[Block], recipe=LowPrecision(recipe), **options
    )
    optimizer = job.optimizer(torch.optim.SGD, lr=2.0**-2)
    expected = one_process(recipe, blocks, ranks, microbatches, steps=3)
    for step, (loss, gradients, weights) in enumerate(expected):
        x, y = (t.chunk(ranks)[mesh.data.index].chunk(microbatches) for t in batch_of(step))
        assert job.run(list(zip(x, y, strict=True)), loss_of) == loss
        job.finish()
        found = job.full_gradients()
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), (step, name)
        optimizer.step()
        job.after_step()
        optimizer.zero_grad()
        full = job.full_state_dict()
        for name, weight in weights.items():
            assert torch.equal(full[name], weight), (step, name)
