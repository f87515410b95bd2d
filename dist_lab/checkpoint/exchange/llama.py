"""The shape of a gpt as Hugging Face's config.json, and back.

The names and the arithmetic of our GPT are those of LlamaForCausalLM, down to the pairs of the
rotary positions (x[i], x[i + Dh/2]); see zoo/gpt.py. So an export renames and permutes nothing:
all that remains is the file that says how many heads the columns of q_proj are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_lab.checkpoint.exchange.tensors import Kinds
from dist_lab.errors import UserError, shown
from dist_lab.zoo.gpt import GPT, Attention, SwiGLU
from dist_lab.zoo.sizes import SIZES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LARGEST = 2**31 - 1  # of a number in config.json
NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class LlamaShape:
    """All that a gpt's names and weights do not tell: see GPT for the letters."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool = False
    rope_base: float = 10_000.0
    eps: float = 1e-5

    def build(self) -> GPT:
        """A model of this shape on the meta device, without memory."""
        with torch.device("meta"):
            return GPT(
                self.vocab, layers=self.layers, width=self.width, heads=self.heads,
                kv_heads=self.kv_heads, ffn=self.ffn, tied=self.tied, rope_base=self.rope_base,
                eps=self.eps,
            )  # fmt: skip

    def size(self) -> str | None:
        """The size of the zoo with these numbers, apart from the layers; None if there is none."""
        plain = not self.tied and (self.rope_base, self.eps) == (10_000.0, 1e-5)
        for name, numbers in SIZES["gpt"].items():
            if plain and all(getattr(self, key) == numbers[key] for key in numbers.keys() - LAYERS):
                return name
        return None


LAYERS = {"layers"}


def shape_of(model: GPT) -> LlamaShape:
    """The shape of a whole model, also on the meta device."""
    first = next(iter(model.model.layers.values()))
    attention, mlp = first.get_submodule("self_attn"), first.get_submodule("mlp")
    assert isinstance(attention, Attention)
    assert isinstance(mlp, SwiGLU)
    head = attention.head_dim
    return LlamaShape(
        vocab=model.model.embed_tokens.num_embeddings,
        layers=len(model.model.layers),
        width=model.model.embed_tokens.embedding_dim,
        heads=attention.q_proj.out_features // head,
        kv_heads=attention.k_proj.out_features // head,
        ffn=mlp.gate_proj.out_features,
        tied=model.lm_head.weight is model.model.embed_tokens.weight,
        rope_base=attention.rope_base,
        eps=model.model.norm.eps or 1e-5,
    )


def shape_in_settings(settings: Mapping[str, Any], kinds: Kinds) -> LlamaShape:
    """The shape of the model of a run, from its settings and from the names of its tensors.

    Raises:
        UserError: it is no gpt of the zoo.
    """
    model, size = settings.get("model"), settings.get("size")
    if model != "gpt" or size not in SIZES["gpt"]:
        raise UserError(
            f"the checkpoint is of model {shown(model)}, size {shown(size)}, and hf has a name for "
            "gpt only; export it to dcp or torch"
        )
    if EMBEDDING not in kinds:
        raise UserError(f"the checkpoint has no {EMBEDDING}, so it is no gpt; export it to dcp")
    numbers = dict(SIZES["gpt"][size])
    numbers["layers"] = settings.get("layers") or numbers["layers"]
    return LlamaShape(**numbers | {"vocab": kinds[EMBEDDING][0][0], "tied": HEAD not in kinds})


def check_names_and_shapes(kinds: Kinds, shape: LlamaShape, what: str) -> None:
    """Raise UserError unless these are the tensors of a model of this shape, in one line.

    With a tied head its tensor may be missing: it is the embedding.
    """
    if len(kinds) < 9 * shape.layers:  # first, because millions of layers would take long to build
        raise UserError(
            f"{what} has {len(kinds)} tensors, too few for {shape.layers} layers of 9; it is not "
            "whole, or its config is another model's"
        )
    check_embedding(kinds, shape, what)
    wanted = {name: tensor.shape for name, tensor in shape.build().state_dict().items()}
    missing = sorted(wanted.keys() - kinds.keys() - ({HEAD} if shape.tied else set()))
    unknown = sorted(kinds.keys() - wanted.keys())
    if missing or unknown:
        odd = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a gpt's"
        raise UserError(
            f"{what}: {len(missing) + len(unknown)} names do not fit its config, first: {odd}"
        )
    for name, (found, dtype) in ((name, kinds[name]) for name in wanted if name in kinds):
        if found != wanted[name]:
            raise UserError(
                f"{what}: {name} has shape {tuple(found)}, and its config needs "
                f"{tuple(wanted[name])}"
            )
        if not dtype.is_floating_point:
            raise UserError(f"{what}: {name} is of {dtype}, not of floating-point numbers")


def check_embedding(kinds: Kinds, shape: LlamaShape, what: str) -> None:
    """Raise UserError unless the embedding is of this shape.

    A width that is that of a real tensor can be multiplied. Those that only a config names may
    overflow when the model is built, even on the meta device.
    """
    if EMBEDDING not in kinds:
        raise UserError(f"{what}: names do not fit its config, first: {EMBEDDING} is missing")
    found, wanted = tuple(kinds[EMBEDDING][0]), (shape.vocab, shape.width)
    if found != wanted:
        raise UserError(f"{what}: {EMBEDDING} has shape {found}, and its config needs {wanted}")


# --- config.json ----------------------------------------------------------------------------------


def to_config(
    shape: LlamaShape, dtype: torch.dtype, positions: int, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        positions: the longest text that the model was trained on.
        ends: the ids that end a text, if there are any.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        # Llama's defaults are 1 and 2, which are bytes of the text here.
        "bos_token_id": None,
        "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def from_config(config: Mapping[str, Any]) -> LlamaShape:
    """The shape that a config.json describes.

    Raises:
        UserError: the model is not a Llama, or one with a part that our GPT does not have.
    """
    if config.get("model_type") != "llama":
        missing = [key for key in NEEDED if key not in config]
        raise UserError(
            f"config.json is of model_type {shown(config.get('model_type'))}"
            f"{', without ' * bool(missing)}{', '.join(missing)}; only llama can be imported"
        )
    heads = _number(config, "num_attention_heads")
    width = _number(config, "hidden_size")
    kv_heads = _number(config, "num_key_value_heads", heads)
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    _only(config, "hidden_act", "silu")
    _only(config, "attention_bias", False)
    _only(config, "mlp_bias", False)
    for table in (rope, scaling):
        kind = table.get("rope_type", table.get("type")) if isinstance(table, dict) else table
        if kind not in (None, "default"):
            raise UserError(
                f"config.json scales rotary positions by {shown(kind)}, which gpt does not; choose "
                "a model with rope_type default"
            )
    if width % (2 * heads) or heads % kv_heads or config.get("head_dim", width // heads) not in (
        None, width // heads,
    ):  # fmt: skip
        raise UserError(
            f"config.json has hidden_size {width}, {heads} heads of {shown(config.get('head_dim'))}"
            f" and {kv_heads} key and value heads; gpt needs heads of hidden_size / heads, an even "
            "number, and heads divisible by key and value heads"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json has tie_word_embeddings {shown(tied)}, not true or false")
    base = rope.get("rope_theta", 10_000.0) if isinstance(rope, dict) else 10_000.0
    return LlamaShape(
        vocab=_number(config, "vocab_size"),
        layers=_number(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        ffn=_number(config, "intermediate_size"),
        tied=tied,
        rope_base=_real(config, "rope_theta", base),
        eps=_real(config, "rms_norm_eps", 1e-6),  # Llama's default, which is not ours
    )


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= LARGEST:
        raise UserError(f"config.json has {key} {shown(value)}, not a whole number of 1 or more")
    return value


def _real(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"config.json has {key} {shown(value)}, not a number above 0")
    return float(value)


def _only(config: Mapping[str, Any], key: str, value: Any) -> None:
    if config.get(key, value) not in (value, None):
        raise UserError(
            f"config.json has {key} {shown(config[key])}, and gpt only has {shown(value)}"
        )
