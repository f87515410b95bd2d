"""This rank's part of a model for generating text: some layers, and of these some heads.

    trained   fsdp=4       each rank has a quarter of every tensor
    served    pp=2,tp=2    rank 0: layers 0 ... L/2, half of the heads; rank 1: the other half; ...

The degrees of a checkpoint and of a server have nothing to do with each other (Aminabadi et al.
2022, "DeepSpeed-Inference", arXiv:2207.00032, section IV). `load_stage` builds the whole model on
the meta device, lets the strategies keep this rank's part of it, and only then takes memory and
reads that part. There is nothing to train, so the strategies' hooks and runners are left out.

    step of N tokens      tokens (N,)                          on every rank
      pp stage 0          embed -> layers -> send (N, D)
      pp stage 1          receive -> layers -> norm, head      logits (R, V) of the R wanted tokens
                          choose R tokens -> broadcast

Sent by a step: under tp one sum of N D numbers after the embedding and two in each layer, 2 L + 1,
and one gather of the logits; under pp N D numbers between two stages, and the R chosen tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_lab.checkpoint.entries import entry_of
from dist_lab.comm import ops
from dist_lab.comm.shared.scratch import Scratch
from dist_lab.compose import Chosen, fold
from dist_lab.inference.cache import Contiguous
from dist_lab.inference.quantized import local_linear
from dist_lab.inference.weights import Weights
from dist_lab.layout.layout import Layout, Shard, shard_shape
from dist_lab.mesh.mesh import Mesh
from dist_lab.parallel.param_slots import param_slots, set_param
from dist_lab.parallel.pipeline.stages import keep_stages
from dist_lab.parallel.tensor import tp
from dist_lab.parallel.tensor.layers import replace_forward
from dist_lab.programs.cli.registry import Impl
from dist_lab.step.protocol import ROOT, Applied, Chain
from dist_lab.step.setup import Setup
from dist_lab.zoo.gpt import GPT, Block, Past


@dataclass(frozen=True)
class Stage:
    """This rank's part of the model. All its methods are collective over pp and tp.

    Attributes:
        model: the whole module tree; parts of other stages are missing.
        modules: what this rank runs, in sequence.
        width: D.
        dtype: of weights, activations and cache.
    """

    mesh: Mesh
    model: GPT
    modules: tuple[nn.Module, ...]
    width: int
    dtype: torch.dtype

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, cache: Sequence[Past], wanted: Tensor
    ) -> Tensor | None:
        """Compute new tokens of one or more sequences: see inference/cache.py.

        Args:
            tokens: (N,), the same on every rank.
            positions: (N,), of each token in its sequence.
            cache: a Past for each layer of this stage; N tokens are added to it.
            wanted: (R,), indices of the tokens whose logits are needed.

        Returns:
            The logits (R, V) on all ranks of the last stage, None on others.
        """
        pp, layers, x = self.mesh["pp"], iter(cache), tokens[None].to(self.mesh.device)  # (1, N)
        wanted_yet = False
        if pp.index > 0:
            x = torch.empty(1, len(tokens), self.width, dtype=self.dtype, device=pp.device)
            self._exchange([], [(x, pp.index - 1)])
        for module in self.modules:
            if isinstance(module, Block):
                x = module(x, positions, next(layers))  # (1, N, D)
                continue
            if not wanted_yet and not isinstance(module, nn.Embedding):
                x, wanted_yet = x[:, wanted], True  # (1, N, D) -> (1, R, D), before norm and head
            x = module(x)
        if pp.index < pp.size - 1:
            self._exchange([(x, pp.index + 1)], [])
            return None
        return x[0]

    def agree(self, tokens: list[int] | None, count: int) -> list[int]:
        """Send the `count` tokens that the last stage has chosen to all stages."""
        pp = self.mesh["pp"]
        if pp.size == 1:
            assert tokens is not None
            return tokens
        row = torch.tensor([0] * count if tokens is None else tokens, device=pp.device)
        with self.mesh.comm.label(unit="tokens"):
            agreed: list[int] = ops.broadcast(row, pp, pp.size - 1).tolist()
        return agreed

    @property
    def layers(self) -> list[Block]:
        """The layers of this stage."""
        return [module for module in self.modules if isinstance(module, Block)]

    def new_cache(self, capacity: int = 64) -> list[Contiguous]:
        """A cache for one sequence, with room for `capacity` tokens at first."""
        return [Contiguous(capacity) for _ in self.layers]

    def _exchange(
        self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]
    ) -> None:
        with self.mesh.comm.label(unit="hidden"):
            for pending in ops.exchange(sends, receives, self.mesh["pp"]):
                pending.wait()


def load_stage(weights: Weights, mesh: Mesh, dtype: torch.dtype | None = None) -> Stage:
    """Read this rank's part of a model. Collective.

    Args:
        mesh: with axes pp and tp; along all others ranks hold the same.
        dtype: to compute in; default: that of the embedding on disk.

    Raises:
        UserError: heads do not divide over tp, or there are more stages than layers.
        MachineError: the weights cannot be read.
    """
    model = weights.shape.build().requires_grad_(False).eval()  # on the meta device
    kinds = weights.kinds()
    layouts = {n: Layout(p.shape, kinds[n][1]) for n, p in model.named_parameters()}
    dtype = dtype or layouts["model.embed_tokens.weight"].dtype
    model.to(dtype)
    setup = Setup(model, mesh, {}, layouts, frozenset(), model.get_parameter, {ROOT: model})
    # Whole logits, because a token is chosen among all; in training their loss needs shards only.
    plan = {**model.tp_plan(), "lm_head": "colwise_gather_output"}
    applied = fold(
        setup,
        [
            (Chosen("pp", keep_layers, ("pp",), Impl("")), {}),
            (Chosen("tp", tp.apply, ("tp",), Impl("")), {"plan": plan}),
        ],
    )
    assert applied.stages is not None
    (stage,) = applied.stages.modules.values()
    scratch = Scratch(mesh["tp"])
    for name, linear in [*model.named_modules()]:
        if not isinstance(linear, nn.Linear):
            continue
        if (whole := weights.quantized(name, dtype)) is not None:
            part = local_linear(whole, applied.layouts[f"{name}.weight"], scratch)
            model.set_submodule(name, part.to(mesh.device))
        elif name.startswith("model.layers."):
            layout = applied.layouts[f"{name}.weight"]
            replace_forward(linear, partial(forward_only, linear, layout, scratch))
    for name, slots in param_slots(model, stage).items():
        layout = applied.layouts[name]
        local = torch.empty(shard_shape(layout, mesh.axes, mesh.coordinates), dtype=layout.dtype)
        weights.read_into(entry_of(name, layout, local, mesh))
        set_param(slots, local.to(mesh.device, dtype))
    return Stage(mesh, model, tuple(stage.children()), weights.shape.width, dtype)


def forward_only(linear: nn.Linear, layout: Layout, scratch: Scratch, x: Tensor) -> Tensor:
    """A Linear of a layer, without what tp's own forward keeps for a backward.

    That takes a quarter of the time of a step of one token (gpt small, one thread).
    """
    y = F.linear(x, linear.weight)  # x[D] . W[F_tp, D]^T -> y[F_tp], or x[D_tp] . W[F, D_tp]^T
    split = dict(layout.splits).get(scratch.axis.name)
    if isinstance(split, Shard) and split.dim == 1:
        y = scratch.all_reduce(y).wait()  # y{U_tp} -> y
    return y


def keep_layers(setup: Setup) -> Applied:
    """The strategy pp without its runner: keep the layers of this rank's stage."""
    local = keep_stages(setup, {stage: stage for stage in range(setup.axis.size)})
    return Applied(local.layouts, Chain(), buffers=local.buffers, stages=local.stages)
