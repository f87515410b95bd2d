"""The neural probabilistic language model (Bengio, Ducharme, Vincent, Jauvin 2003, JMLR 3:1137).

    x = project(the embeddings of the last C tokens, side by side);
    per block: x += down(gelu(up(norm(x))));   head(norm(x))

A simpler model than the gpt for the same text. It has a fixed context window instead of attention,
and biases and LayerNorm throughout. The paper has one hidden layer with tanh; here residual blocks
with GELU allow any depth.

Letters: B sequences, T tokens in each, V vocabulary, E features of an embedding, C tokens of
context, D width, F hidden width of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextWindow(nn.Module):
    """Concatenate the features of the last C tokens, oldest first: (B, T, E) -> (B, T, C*E).

    Tokens before the start of the text are zeros.
    """

    def __init__(self, context: int):
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.size(1)
        x = F.pad(x, (0, 0, self.context - 1, 0))  # (B, T, E) -> (B, C-1+T, E)
        return torch.cat([x[:, first : first + tokens] for first in range(self.context)], dim=-1)


class Block(nn.Module):
    """One residual block: x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ffn)
        self.drop_hidden, self.drop = nn.Dropout(dropout), nn.Dropout(dropout)
        self.down = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop_hidden(F.gelu(self.up(self.norm(x))))  # D -> F
        return x + self.drop(self.down(hidden))  # F -> D


class MLP(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V)."""

    reads = "text"
    units = (Block,)  # FSDP gathers, and recomputation recomputes, one unit at a time
    ends = ("embed", "project", "head")  # more FSDP units
    stages = ("embed", "window", "project", "blocks.*", "norm", "head")  # in forward order

    def __init__(
        self, vocab: int, *, layers: int, width: int, ffn: int, context: int, features: int,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.depth = layers  # of the whole model: a pipeline stage initializes its layers with it
        self.embed = nn.Embedding(vocab, features)
        self.window = ContextWindow(context)
        self.project = nn.Linear(context * features, width)
        self.blocks = nn.ModuleDict({str(i): Block(width, ffn, dropout) for i in range(layers)})
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, T) -> (B, T, E)
        x = self.project(self.window(x))  # (B, T, E) -> (B, T, C*E) -> (B, T, D)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))  # (B, T, D) -> (B, T, V)

    def tp_plan(self) -> dict[str, str | tuple[str, int]]:
        """Globs on module names -> roles under tensor parallelism: see parallel/tensor/tp.py.

        The sequence can be sharded only after the window, which reads across it.
        """
        return {
            "embed": "replicate",
            "project": "scatter_output",
            "blocks.*.norm": "sequence",
            "blocks.*.up": "colwise",
            "blocks.*.down": "rowwise",
            "norm": "sequence",
            "head": "vocabulary",
        }

    def scale_plan(self) -> dict[str, str]:
        """Globs on Linears -> the module that makes their input: see quantize/folding.py.

        `down` is not there: gelu lies between `up` and `down`, and is not linear.
        """
        return {"blocks.*.up": "blocks.*.norm"}

    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Biases are 0, norms 1, matrices Normal(0, 1/sqrt(columns)): outputs as large as inputs.

        Each `down` adds to the residual stream, and is smaller by sqrt(depth).
        """
        if fqn.endswith("bias"):
            tensor.zero_()
        elif fqn.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            sharers = self.depth if fqn.endswith("down.weight") else 1
            tensor.normal_(0.0, (tensor.size(1) * sharers) ** -0.5, generator=generator)
