"""The Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): image patches as tokens.

    x = [class token, project(patches)] + positions;
    per layer: x += attention(norm(x)), x += mlp(norm(x));   head(norm(x[class token]))

Pre-norm, GELU and biases throughout, as in the paper. The arithmetic is torchvision's, so its
weights give the same logits (`from_torchvision`). Parameters have the names of the gpt's where they
have the same function, and q, k and v are separate linears, so both models are split alike.

Letters: B images, C channels, P side of a patch, N patches, T = 1 + N tokens, V classes, D width,
F hidden width of the MLP, H heads, Dh = D / H.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of the norms, as in the paper's code; torch's default is 1e-5


class Patches(nn.Module):
    """Images (B, C, height, width) -> x (B, T, D): the class token, then the patches row by row.

    The projection of patches is usually a convolution whose stride is its kernel size. As a linear
    on the pixels of a patch it is one matmul, and its weight can be split like any other.
    """

    def __init__(self, image: tuple[int, int, int], patch: int, width: int):
        super().__init__()
        channels, rows, columns = image
        self.patch = patch
        self.project = nn.Linear(channels * patch * patch, width)
        self.class_token = nn.Parameter(torch.zeros(width))
        tokens = 1 + (rows // patch) * (columns // patch)
        self.positions = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, images: Tensor) -> Tensor:
        by_patch = (-1, self.patch)
        x = images.unflatten(3, by_patch).unflatten(2, by_patch)  # (B, C, rows, P, columns, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C*P*P)
        x = self.project(x)  # (B, N, C*P*P) -> (B, N, D)
        first = self.class_token.expand(len(x), 1, -1)  # (D,) -> (B, 1, D)
        return torch.cat([first, x], dim=1) + self.positions  # (B, T, D)


class Attention(nn.Module):
    """Full attention: x (B, T, D) -> (B, T, D).

    The views take H from the output width of a projection, not from the configuration, so a
    tensor-parallel rank with fewer heads runs the same code.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        by_head = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, by_head).transpose(1, 2)  # (B, T, D) -> (B, H, T, Dh)
        k = self.k_proj(x).unflatten(-1, by_head).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, by_head).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, H, T, Dh) -> (B, T, D)


class Perceptron(nn.Module):
    """An MLP with F hidden units: x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, ffn: int, dropout: float):
        super().__init__()
        self.up_proj = nn.Linear(width, ffn)
        self.drop = nn.Dropout(dropout)
        self.down_proj = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.drop(F.gelu(self.up_proj(x))))  # D -> F -> D


class Block(nn.Module):
    """One transformer layer: x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.drop_attn, self.drop_mlp = nn.Dropout(dropout), nn.Dropout(dropout)
        self.input_layernorm = nn.LayerNorm(width, EPS)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = nn.LayerNorm(width, EPS)
        self.mlp = Perceptron(width, ffn, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_attn(self.self_attn(self.input_layernorm(x)))
        return x + self.drop_mlp(self.mlp(self.post_attention_layernorm(x)))


class ClassToken(nn.Module):
    """Select the class token, which is the first: (B, T, D) -> (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class ViT(nn.Module):
    """images (B, C, height, width) in the dtype of the weights -> logits (B, V).

    Raises ValueError unless the image divides into patches, and width is divisible by heads.
    """

    reads = "images"
    units = (Block,)  # FSDP gathers, and recomputation recomputes, one unit at a time
    ends = ("embed", "head")  # more FSDP units
    stages = ("embed", "layers.*", "pool", "norm", "head")  # in forward order

    def __init__(
        self,
        classes: int,
        *,
        image: tuple[int, int, int],
        patch: int,
        layers: int,
        width: int,
        heads: int,
        ffn: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        if image[1] % patch or image[2] % patch or width % heads:
            raise ValueError(
                "vit needs images whose sides divide by patch, and width by heads, not "
                f"{image[1]} x {image[2]} by patch={patch} and width={width} by heads={heads}"
            )
        self.head_dim = width // heads
        self.depth = layers  # of the whole model: a pipeline stage initializes its layers with it
        self.embed = Patches(image, patch, width)
        self.layers = nn.ModuleDict(
            {str(i): Block(width, heads, ffn, dropout) for i in range(layers)}
        )
        self.pool = ClassToken()
        self.norm = nn.LayerNorm(width, EPS)  # after the pool, because it is per token
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)  # (B, C, height, width) -> (B, T, D)
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.norm(self.pool(x)))  # (B, T, D) -> (B, D) -> (B, V)

    def tp_plan(self) -> dict[str, str | tuple[str, int]]:
        """Globs on module names -> roles under tensor parallelism. The small head is replicated."""
        head = self.head_dim
        return {
            "embed": "scatter_output",
            "layers.*.input_layernorm": "sequence",
            "layers.*.self_attn.q_proj": ("colwise", head),
            "layers.*.self_attn.k_proj": ("colwise", head),
            "layers.*.self_attn.v_proj": ("colwise", head),
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.post_attention_layernorm": "sequence",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
            "pool": "gather_input",
            "norm": "replicate",
            "head": "replicate",
        }

    def scale_plan(self) -> dict[str, str]:
        """Globs on Linears -> the module that makes their input: see quantize/folding.py.

        down_proj is not there: gelu lies between up_proj and down_proj, and is not linear.
        """
        return {
            "layers.*.self_attn.q_proj": "layers.*.input_layernorm",
            "layers.*.self_attn.k_proj": "layers.*.input_layernorm",
            "layers.*.self_attn.v_proj": "layers.*.input_layernorm",
            "layers.*.self_attn.o_proj": "layers.*.self_attn.v_proj",
            "layers.*.mlp.up_proj": "layers.*.post_attention_layernorm",
        }

    def init_weight(self, fqn: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Biases are 0, norms 1, matrices Normal(0, 1/sqrt(columns)): outputs as large as inputs.

        Each o_proj and down_proj adds to the residual stream, and is smaller by sqrt(2 x depth).
        The class token is 0, as in the paper's code. Positions are Normal(0, 1/2): with the usual
        0.02, a short training spends its steps on learning to distinguish positions.
        """
        if fqn.endswith(("bias", "class_token")):
            tensor.zero_()
        elif fqn.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif fqn.endswith("positions"):
            tensor.normal_(0.0, 0.5, generator=generator)
        else:
            sharers = 2 * self.depth if fqn.endswith(("o_proj.weight", "down_proj.weight")) else 1
            tensor.normal_(0.0, (tensor.size(1) * sharers) ** -0.5, generator=generator)


TORCHVISION = {  # pattern of torchvision's parameter name -> our name; the first match counts
    r"conv_proj\.": "embed.project.",
    r"class_token": "embed.class_token",
    r"encoder\.pos_embedding": "embed.positions",
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_1\.": r"layers.\1.input_layernorm.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_": r"layers.\1.self_attn.",
    r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.": (
        r"layers.\1.self_attn.o_proj."
    ),
    r"encoder\.layers\.encoder_layer_(\d+)\.ln_2\.": r"layers.\1.post_attention_layernorm.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(0|linear_1)\.": r"layers.\1.mlp.up_proj.",
    r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(3|linear_2)\.": r"layers.\1.mlp.down_proj.",
    r"encoder\.ln\.": "norm.",
    r"heads\.head\.": "head.",
}


def from_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a torchvision VisionTransformer (such as vit_b_16) to our names.

    A `ViT` of the same sizes loads the result with `load_state_dict`, and gives the same logits.
    torchvision has one stacked tensor for the projections to q, k and v; here they are three.

    Raises ValueError for a parameter name that a VisionTransformer does not have.
    """
    ours: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        pattern = next((p for p in TORCHVISION if re.match(p, theirs)), None)
        if pattern is None:
            raise ValueError(f"{theirs} is not a parameter of torchvision's VisionTransformer")
        name = re.sub(pattern, TORCHVISION[pattern], theirs, count=1)
        if ".in_proj_" in theirs:
            module, kind = name.rsplit(".", 1)  # layers.0.self_attn, weight
            for letter, projection in zip("qkv", tensor.chunk(3), strict=True):
                ours[f"{module}.{letter}_proj.{kind}"] = projection
        elif theirs == "conv_proj.weight":
            ours[name] = tensor.flatten(1)  # (D, C, P, P) -> (D, C*P*P)
        elif theirs in ("class_token", "encoder.pos_embedding"):
            ours[name] = tensor.squeeze()  # (1, 1, D) -> (D,), (1, T, D) -> (T, D)
        else:
            ours[name] = tensor
    return ours
