"""The Llama architecture: a decoder-only language model with rotary positions.

    x = embed(tokens);   per layer: x += attention(norm(x)), x += mlp(norm(x));   head(norm(x))

RoPE arXiv:2104.09864, RMSNorm arXiv:1910.07467, SwiGLU arXiv:2002.05202, grouped-query attention
arXiv:2305.13245. Parameter names and arithmetic are those of Hugging Face's LlamaForCausalLM, so
its weights load with `load_state_dict` and give the same logits.

Letters: B sequences, T tokens in each, S tokens so far (including these T), V vocabulary, D width,
F hidden width of the MLP, H query heads, K key and value heads, Dh = D / H.

[Note: how parallelism splits it]
* A pipeline cuts between layers. Each module named in `GPT.stages` takes and returns one tensor;
  running them in order is the whole forward. A pipeline stage deletes the layers of other stages,
  and replaces their other modules by nn.Identity. The names of the remaining layers do not change,
  because layers are in a ModuleDict.
* Tensor parallelism splits heads, and F. The views take H and K from the output width of a
  projection, not from the configuration, so a rank with fewer heads runs the same code. q, k and v
  have the same input, and so do gate and up. Therefore the gradient of that input is summed over
  ranks once in `self_attn` and once in `mlp`, not once per projection.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Past(Protocol):
    """One layer's keys and values of earlier tokens. A cache of the model has one for each layer.

    How they are kept is not the model's business: see dist_lab/inference/cache.py.
    """

    def positions(self, new: int) -> Tensor:
        """The positions (T,) of the next T = `new` tokens, unless the caller gives them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add the keys and values of new tokens, and attend to these and all earlier ones.

        q (B, H, T, Dh) and k, v (B, K, T, Dh) -> (B, H, T, Dh). q and k are rotated already.
        """


class Attention(nn.Module):
    """Causal attention. Each key and value head serves H / K neighboring query heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, rope_base: float):
        super().__init__()
        self.head_dim, self.rope_base = width // heads, rope_base
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        by_head = (-1, self.head_dim)  # -1, not H or K: [Note: how parallelism splits it]
        q = self.q_proj(x).unflatten(-1, by_head).transpose(1, 2)  # (B, T, D) -> (B, H, T, Dh)
        k = self.k_proj(x).unflatten(-1, by_head).transpose(1, 2)  # (B, T, D) -> (B, K, T, Dh)
        v = self.v_proj(x).unflatten(-1, by_head).transpose(1, 2)  # (B, T, D) -> (B, K, T, Dh)
        if positions is None:
            new = q.size(2)
            positions = torch.arange(new) if past is None else past.positions(new)
        cos, sin = rope_table(positions.to(x.device), self.head_dim, self.rope_base, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = causal_attention(q, k, v) if past is None else past.attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, Dh) of the last T of S tokens, k and v (B, K, S, Dh) of all -> (B, H, T, Dh)."""
    new, seen = q.size(2), k.size(2) - q.size(2)
    sharing = q.size(1) // k.size(1)
    if new == 1:  # decoding: the query heads that share keys are as many queries of one head
        out = F.scaled_dot_product_attention(q.view(*k.shape[:2], sharing, -1), k, v)
        return out.view(q.shape)
    # enable_gqa=True would sum gradients in bfloat16
    k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)  # K -> H
    if not seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # is_causal aligns the first query with the first key, which is wrong if T < S.
    mask = torch.ones(new, seen + new, dtype=torch.bool, device=q.device).tril(seen)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rope_table(
    positions: Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x base^(-2i/Dh), each (T, Dh/2).

    Angles are in float32 or more, because in bfloat16 positions 256 and 257 are equal. Every layer
    computes its own table, which costs almost nothing. So there is no buffer to materialize from
    the meta device, to shard or to save.
    """
    precise = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, head_dim, 2, device=positions.device, dtype=precise)
    angle = torch.outer(positions.to(precise), base ** (-even / head_dim))  # (T,) -> (T, Dh/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + Dh/2]). These are Llama's pairs; the paper pairs neighbors."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, Dh) -> 2 of (B, H, T, Dh/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SwiGLU(nn.Module):
    """A gated MLP with F hidden units: x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # D -> F -> D


class Block(nn.Module):
    """One transformer layer: x (B, T, D) -> (B, T, D)."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, ffn: int, rope_base: float, eps: float,
        dropout: float,
    ):  # fmt: skip
        super().__init__()
        self.drop_attn, self.drop_mlp = nn.Dropout(dropout), nn.Dropout(dropout)
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(width, heads, kv_heads, rope_base)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = SwiGLU(width, ffn)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        x = x + self.drop_attn(self.self_attn(self.input_layernorm(x), positions, past))
        return x + self.drop_mlp(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Everything except the head: tokens (B, T) -> x (B, T, D)."""

    def __init__(self, vocab: int, width: int, blocks: list[Block], eps: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleDict({str(index): block for index, block in enumerate(blocks)})
        self.norm = nn.RMSNorm(width, eps)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Sequence[Past] | None = None
    ) -> Tensor:
        x = self.embed_tokens(tokens)  # (B, T) -> (B, T, D)
        pasts: Sequence[Past | None] = [None] * len(self.layers) if cache is None else cache
        for layer, past in zip(self.layers.values(), pasts, strict=True):
            x = layer(x, positions, past)
        return self.norm(x)


class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V).

    With `tied` the head and the embedding share one weight. `rope_base` and `eps` are arguments
    because published Llama weights differ in them. `dropout` is that of each residual branch.

    Raises ValueError unless width is divisible by 2 x heads, and heads by kv_heads.
    """

    reads = "text"
    units = (Block,)  # FSDP gathers, and recomputation recomputes, one unit at a time
    ends = ("model.embed_tokens", "lm_head")  # FSDP units too: they grow with the vocabulary
    stages = ("model.embed_tokens", "model.layers.*", "model.norm", "lm_head")  # in forward order

    def __init__(
        self,
        vocab: int,
        *,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        ffn: int,
        tied: bool = False,
        rope_base: float = 10_000.0,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % (2 * heads) or heads % kv_heads:
            raise ValueError(
                "gpt needs width divisible by 2 x heads (rotary pairs) and heads by kv_heads, "
                f"not width={width} heads={heads} kv_heads={kv_heads}"
            )
        self.head_dim = width // heads
        self.depth = layers  # of the whole model: a pipeline stage initializes its layers with it
        shape = (width, heads, kv_heads, ffn, rope_base, eps, dropout)
        blocks = [Block(*shape) for _ in range(layers)]
        self.model = Decoder(vocab, width, blocks, eps)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Sequence[Past] | None = None
    ) -> Tensor:
        """`positions` (T,) default to 0, 1, ..., continuing after the tokens in the cache.

        To decode, create `cache = [Contiguous() for _ in range(layers)]`, which is in
        dist_lab/inference/cache.py, and pass it with each part of the text. The cache grows in
        place. The logits equal those of the whole text at once.
        """
        return self.lm_head(self.model(tokens, positions, cache))  # (B, T, D) -> (B, T, V)

    def tp_plan(self) -> dict[str, str | tuple[str, int]]:
        """Globs on module names -> roles under tensor parallelism: see parallel/tensor/tp.py.

        q, k and v are split by heads; there may be fewer key and value heads than ranks.
        """
        head = self.head_dim
        return {
            "model.embed_tokens": "vocabulary",
            "model.layers.*.input_layernorm": "sequence",
            "model.layers.*.self_attn.q_proj": ("colwise", head),
            "model.layers.*.self_attn.k_proj": ("colwise_grouped", head),
            "model.layers.*.self_attn.v_proj": ("colwise_grouped", head),
            "model.layers.*.self_attn.o_proj": "rowwise",
            "model.layers.*.post_attention_layernorm": "sequence",
            "model.layers.*.mlp.gate_proj": "colwise",
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise",
            "model.norm": "sequence",
            "lm_head": "vocabulary",
        }

    def scale_plan(self) -> dict[str, str | tuple[str, int]]:
        """Globs on Linears -> the module that makes their input: see quantize/folding.py.

        Heads of v_proj are shared by heads of o_proj. gate_proj is not linear before down_proj.
        """
        return {
            "model.layers.*.self_attn.q_proj": "model.layers.*.input_layernorm",
            "model.layers.*.self_attn.k_proj": "model.layers.*.input_layernorm",
            "model.layers.*.self_attn.v_proj": "model.layers.*.input_layernorm",
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.v_proj", self.head_dim),
            "model.layers.*.mlp.gate_proj": "model.layers.*.post_attention_layernorm",
            "model.layers.*.mlp.up_proj": "model.layers.*.post_attention_layernorm",
            "model.layers.*.mlp.down_proj": "model.layers.*.mlp.up_proj",
        }

    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Norms are 1, matrices Normal(0, 1/sqrt(columns)), so outputs are as large as inputs.

        Each o_proj and down_proj adds to the residual stream, and is smaller by sqrt(2 x depth).
        """
        if fqn.endswith("norm.weight"):
            tensor.fill_(1.0)
            return
        sharers = 2 * self.depth if fqn.endswith(("o_proj.weight", "down_proj.weight")) else 1
        tensor.normal_(0.0, (tensor.size(1) * sharers) ** -0.5, generator=generator)
