"""plan="auto": a plan for a model of a well-known family, by the names and shapes of its layers.

    Block(("gate_proj", "up_proj"), "down_proj", FEATURES)    a row of BLOCKS

A block reads its input with some layers, and returns its output with one. Blocks are data: how
families of models name these layers. A row fits a module that has layers of these names and of
fitting shapes. The layers that read become colwise, and the one that returns becomes rowwise:

    FEATURES    between them each feature is computed alone
    HEADS       between them each attention head is computed alone; a head is never split
    FUSED       their outputs are several tensors in one (q, k and v), which shards would mix up

Outputs of FUSED layers are gathered again, so the code between sees all of them. Then weights,
optimizer state and matrix products are split, and what is between is computed by every rank. The
same is right for HEADS that do not divide over the ranks, share a weight such as a norm, or whose
code assumes a number of heads.

Names do not show what the code between the layers does. So a found plan is tested like any other,
in a forward and backward against the unsharded model (plan_check.py). And if a repeated layer has a
matrix that no row places, this is an error, which names its module and asks for a plan.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import nn

from dist_lab.errors import UserError
from dist_lab.parallel.param_slots import param_slots
from dist_lab.parallel.tensor.layers import AnyLinear, as_linear, is_transposed
from dist_lab.parallel.tensor.plan import Role


class NoPlan(UserError):
    """tp needs a plan, and none is known."""


class Kind(Enum):
    """What a block computes between its layers: see the top of this file."""

    FEATURES = auto()
    HEADS = auto()
    FUSED = auto()


@dataclass(frozen=True)
class Block:
    """A block: names, relative to the module that contains it, of the layers that read its input
    and of the layer that returns its output. Of HEADS, `reads` are those of q, k and v.
    """

    reads: tuple[str, ...]
    returns: str
    kind: Kind


HEADS, FEATURES, FUSED = Kind.HEADS, Kind.FEATURES, Kind.FUSED

BLOCKS = (
    Block(("q_proj", "k_proj", "v_proj"), "o_proj", HEADS),  # Llama, Mistral, Qwen, Gemma
    Block(("q_proj", "k_proj", "v_proj"), "out_proj", HEADS),  # OPT, BART, CLIP, GPT-J
    Block(("q_proj", "k_proj", "v_proj"), "dense", HEADS),  # Phi
    Block(("self.query", "self.key", "self.value"), "output.dense", HEADS),  # BERT, RoBERTa
    Block(("attention.query", "attention.key", "attention.value"), "output.dense", HEADS),  # ViT
    Block(("q_lin", "k_lin", "v_lin"), "out_lin", HEADS),  # DistilBERT
    Block(("wq", "wk", "wv"), "wo", HEADS),  # Meta's Llama
    Block(("q", "k", "v"), "o", HEADS),
    Block(("q", "k", "v"), "out", HEADS),
    Block(("c_attn",), "c_proj", FUSED),  # GPT-2
    Block(("q_attn", "c_attn"), "c_proj", FUSED),  # its attention to an encoder
    Block(("query_key_value",), "dense", FUSED),  # GPT-NeoX, BLOOM
    Block(("qkv_proj",), "o_proj", FUSED),  # Phi-3
    Block(("qkv",), "proj", FUSED),  # timm
    Block(("gate_proj", "up_proj"), "down_proj", FEATURES),  # Llama, Mistral, Qwen, Gemma
    Block(("gate_up_proj",), "down_proj", FUSED),  # Phi-3
    Block(("w1", "w3"), "w2", FEATURES),  # Meta's Llama
    Block(("c_fc",), "c_proj", FEATURES),  # GPT-2
    Block(("intermediate.dense",), "output.dense", FEATURES),  # BERT, RoBERTa, ViT
    Block(("fc1",), "fc2", FEATURES),  # OPT, BART, CLIP, Phi
    Block(("fc_in",), "fc_out", FEATURES),  # GPT-J
    Block(("lin1",), "lin2", FEATURES),  # DistilBERT
    Block(("dense_h_to_4h",), "dense_4h_to_h", FEATURES),  # GPT-NeoX, BLOOM
    Block(("linear1",), "linear2", FEATURES),  # nn.TransformerEncoderLayer
    Block(("0",), "2", FEATURES),  # nn.Sequential
    Block(("0",), "3", FEATURES),  # torchvision's ViT
)
FIXED_HEADS = ("OPTAttention", "WhisperAttention")  # their code assumes all of the model's heads
VOCABULARIES = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "token_embedding",
)  # fmt: skip
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")


def auto_plan(model: nn.Module, ranks: int) -> dict[str, Role]:
    """Find a plan that splits a model over this number of ranks.

    Raises:
        NoPlan: no row of BLOCKS fits, or we are not sure how to place a layer.
    """
    plan: dict[str, Role] = {}
    for path, module in model.named_modules():
        for block in BLOCKS:
            layers = _layers(module, block)
            names = {name: f"{path}.{name}" if path else name for name in layers}
            if layers and not plan.keys() & {*names.values()}:
                roles = _roles(block, layers, module, path, ranks)
                plan |= {names[name]: role for name, role in roles.items()}
    if not plan:
        raise NoPlan(
            f'plan="auto" knows no layer of {type(model).__name__} by its name and shape; give '
            'plan={"up": "colwise", "down": "rowwise", ...}'
        )
    _refuse_unplaced(model, plan)
    return with_globs(model, plan | _vocabulary(model, plan))


def with_globs(model: nn.Module, plan: Mapping[str, Role]) -> dict[str, Role]:
    """The plan with one glob for the same layer of all blocks, where they have the same role.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
    >>> with_globs(layers, {"0.1": "rowwise", "1.1": "rowwise", "2.1": "rowwise", "2.0": "colwise"})
    {'*.1': 'rowwise', '2.0': 'colwise'}
    """
    modules = [name for name, _ in model.named_modules()]
    short: dict[str, Role] = {}
    for name, role in plan.items():
        glob = re.sub(r"(?<![^.])[^.\d]*\d+(?=\.)", "*", name)
        pattern = re.compile(re.escape(glob).replace(r"\*", r"[^.]+"))
        matching = [other for other in modules if pattern.fullmatch(other)]
        same = all(plan.get(other) == role for other in matching)
        short[glob if same else name] = role
    return short


# --- one block ------------------------------------------------------------------------------------


def _layers(parent: nn.Module, block: Block) -> dict[str, AnyLinear]:
    """The block's layers by relative name; empty if their names or shapes do not fit."""
    names = (*block.reads, block.returns)
    modules = [_at(parent, name) for name in names]
    if not all(type(m) is nn.Linear or (m is not None and is_transposed(m)) for m in modules):
        return {}
    layers = {n: as_linear(m) for n, m in zip(names, modules, strict=True) if m is not None}
    widths = [layers[name].out_features for name in block.reads]
    width = layers[block.returns].in_features
    match block.kind:
        case Kind.HEADS:
            q, k, v = widths
            fits = q == width and k == v and q % k == 0
        case Kind.FEATURES:
            fits = all(w == width for w in widths) and not _weights_between(parent, block)
        case Kind.FUSED:
            fits = sum(widths) > width
    return layers if fits else {}


def _at(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _weights_between(parent: nn.Module, block: Block) -> bool:
    """Whether modules of an nn.Sequential between the block's layers have weights."""
    if not isinstance(parent, nn.Sequential):
        return False
    between = list(parent)[int(block.reads[0]) + 1 : int(block.returns)]
    return any(True for module in between for _ in module.parameters())


def _roles(
    block: Block, layers: Mapping[str, AnyLinear], parent: nn.Module, path: str, ranks: int
) -> dict[str, Role]:
    """The roles of a block's layers, by relative name."""
    roles: dict[str, Role] = dict.fromkeys(block.reads, "colwise")
    if block.kind is Kind.FUSED:
        roles = dict.fromkeys(block.reads, "colwise_gather_output")
    elif block.kind is Kind.HEADS:
        q, k, v = block.reads
        holder = parent.get_submodule(q.rpartition(".")[0])
        size = _head_size([holder, parent], layers[q].out_features, layers[k].out_features)
        if size is None:
            raise NoPlan(
                f'plan="auto" cannot tell how many heads {path or "the model"} has '
                f"({type(holder).__name__}): it has no {HEAD_COUNTS[0]} or {HEAD_SIZES[0]} that "
                f'fits; give plan={{"{path + "." * bool(path)}{q}": ("colwise", 64), ...}} with '
                "the size of a head"
            )
        grouped = layers[k].out_features < layers[q].out_features
        divides = all(layers[name].out_features // size % ranks == 0 for name in (q, k))
        placed = {holder.get_submodule(n.rpartition(".")[2]) for n in block.reads}
        placed |= {parent.get_submodule(block.returns)}
        shares = any(m._parameters for m in holder.modules() if m not in placed)
        if divides and not shares and type(holder).__name__ not in FIXED_HEADS:
            roles = {q: ("colwise", size)}
            roles |= dict.fromkeys((k, v), ("colwise_grouped" if grouped else "colwise", size))
        else:
            roles = dict.fromkeys(block.reads, "colwise_gather_output")
    return {**roles, block.returns: "rowwise"}


def _head_size(modules: Sequence[nn.Module], *widths: int) -> int | None:
    """The number of outputs of a head, from the attributes of modules or of their `config`."""
    configs = [config for module in modules if (config := getattr(module, "config", None))]
    for place in [*modules, *configs]:
        sizes = [_integer(place, name) for name in HEAD_SIZES]
        counts = [_integer(place, name) for name in HEAD_COUNTS]
        sizes += [widths[0] // n for n in counts if n and widths[0] % n == 0]
        for size in sizes:
            if size and all(width % size == 0 for width in widths):
                return size
    return None


def _integer(place: Any, name: str) -> int:
    value = getattr(place, name, 0)
    return value if isinstance(value, int) and value > 0 else 0


# --- the rest of the model ------------------------------------------------------------------------


def _refuse_unplaced(model: nn.Module, plan: Mapping[str, Role]) -> None:
    """Raise NoPlan if a repeated layer has a matrix that no row of BLOCKS places."""
    placed = {model.get_submodule(name) for name in plan}
    for path, module in _inside_of_repeated(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and module not in placed:
                parent = model.get_submodule(path.rpartition(".")[0])
                raise NoPlan(
                    f'plan="auto" cannot place {path} by its name and shape: '
                    f"{type(module).__name__} in {type(parent).__name__} with {name} "
                    f'{list(parameter.shape)}; give plan={{"up": "colwise", "down": "rowwise", '
                    "...} with the layers to split"
                )


def _inside_of_repeated(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside of the elements of lists of modules, but not nn.MultiheadAttention, which
    computes with the weights of its modules and does not call them.
    """
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    attentions = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        repeated = any(outer in lists for outer in ["", *parents][: len(parents)])
        if repeated and not any(outer in attentions for outer in [*parents, name]):
            yield name, module


def _vocabulary(model: nn.Module, plan: Mapping[str, Role]) -> dict[str, Role]:
    """The embedding of words, and the layer that computes logits: outside of blocks, and with as
    many outputs as there are words. Their outputs are unsharded, so any loss is right.
    """
    roles: dict[str, Role] = {}
    modules = {name: module for name, module in model.named_modules() if name not in plan}
    for name, module in modules.items():
        known = name.rpartition(".")[2] in VOCABULARIES and type(module) is nn.Embedding
        if known and module.max_norm is None and not module.scale_grad_by_freq:
            roles[name] = "vocabulary"
    words = {modules[name].num_embeddings for name in roles}
    for name, module in modules.items():
        if type(module) is nn.Linear and module.out_features in words:
            roles[name] = "colwise_gather_output"
    slots = param_slots(model)
    while True:  # a parameter that a layer shares with any other module stays whole
        placed = {model.get_submodule(name) for name in roles}
        shared = [[module for module, _ in each] for each in slots.values()]
        kept_whole = {m for each in shared if not placed.issuperset(each) for m in each}
        smaller = {n: r for n, r in roles.items() if model.get_submodule(n) not in kept_whole}
        if len(smaller) == len(roles):
            return roles
        roles = smaller
