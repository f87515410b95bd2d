"""Architectures of transformers, built from configurations: no weights are downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from others import (
    CLASSES,
    LENGTH,
    ROWS,
    VOCAB,
    Batch,
    Other,
    images,
    of_logits,
    text,
    tokens_alone,
    translation,
)
from torch import Tensor, nn


def builder(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that builds this class from a configuration, with dropout off."""

    def make() -> nn.Module:
        import transformers  # not at the top: it may not be installed

        transformers.logging.set_verbosity_error()  # token ids beyond our small vocabulary
        configuration = getattr(transformers, config)(**options)
        for each in (configuration, *vars(configuration).values()):
            for name, value in list(vars(each).items()) if hasattr(each, "to_dict") else ():
                if "drop" in name and isinstance(value, int | float):
                    setattr(each, name, 0.0)
        return getattr(transformers, model)(configuration)

    return make


def other(
    model: str,
    config: str,
    units: str,
    batch: Callable[[int], Batch],
    loss_sum: Callable[[Any, Tensor], Tensor] = of_logits,
    refused: str = "",
    tolerance: float | None = None,
    adam: bool = True,
    pp_mask: bool = True,
    **options: Any,
) -> Other:
    """Describe a model of these classes and options.

    Args:
        refused: a pattern of pp's error message, if pp refuses the model.
        pp_mask: give the model its attention mask under pp, too.
    """
    pp_batch = batch if pp_mask else without_mask(batch)
    for_pp = Other(
        builder(model, config, **options, **FOR_PP), pp_batch, loss_sum, (), tolerance=tolerance,
        adam=adam,
    )  # fmt: skip
    return Other(
        builder(model, config, **options), batch, loss_sum, tuple(units.split()),
        {"pp": refused} if refused else {}, tolerance, adam, for_pp,
    )  # fmt: skip


def words(
    model: str, config: str, units: str, batch: Callable[[int], Batch] = text, **options: Any
) -> Other:
    return other(model, config, units, batch, vocab_size=VOCAB, pad_token_id=0, **options)


# Under pp a forward must not read values or keep objects.
FOR_PP = {"attn_implementation": "eager", "use_cache": False}


def without_mask(batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """Leave out the attention mask: BERT reads its values to decide whether it needs it."""

    def tokens(step: int) -> Batch:
        inputs, targets = batch(step)
        return {k: v for k, v in inputs.items() if k != "attention_mask"}, targets

    return tokens


SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
GROUPED = SIZE | {"num_key_value_heads": 2}

IN_FLOAT32 = 1e-5  # the tolerance of models with a layer that always computes in float32
# The values of a router choose the experts.
ROUTED = r"cannot be run on the meta device, to see what it costs \(.*nonzero"

MODELS: dict[str, Other] = {
    "GPT-2": words(
        "GPT2LMHeadModel", "GPT2Config", "GPT2Block", n_layer=2, n_embd=32, n_head=4, n_positions=32
    ),
    "Llama": words("LlamaForCausalLM", "LlamaConfig", "LlamaDecoderLayer", **GROUPED),
    "Mistral": words(
        "MistralForCausalLM", "MistralConfig", "MistralDecoderLayer", sliding_window=4, **GROUPED
    ),
    "Qwen2 (tied)": words(
        "Qwen2ForCausalLM", "Qwen2Config", "Qwen2DecoderLayer", tie_word_embeddings=True, **GROUPED
    ),
    "Gemma": words(
        "GemmaForCausalLM", "GemmaConfig", "GemmaDecoderLayer", head_dim=8,
        tolerance=IN_FLOAT32, adam=False, **GROUPED,
    ),
    "Phi": words("PhiForCausalLM", "PhiConfig", "PhiDecoderLayer", **GROUPED),
    "GPT-NeoX": words("GPTNeoXForCausalLM", "GPTNeoXConfig", "GPTNeoXLayer", **SIZE),
    "OPT": words(
        "OPTForCausalLM", "OPTConfig", "OPTDecoderLayer", hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=32,
    ),
    "BLOOM": words(
        "BloomForCausalLM", "BloomConfig", "BloomBlock", hidden_size=32, n_layer=2, n_head=4
    ),
    "Mixtral": words(
        "MixtralForCausalLM", "MixtralConfig", "MixtralDecoderLayer", num_local_experts=4,
        num_experts_per_tok=2, experts_implementation="eager", refused=ROUTED, **GROUPED,
    ),
    "Qwen2-MoE": words(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", "Qwen2MoeDecoderLayer", num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        experts_implementation="eager", refused=ROUTED, **GROUPED,
    ),
    "BERT": words("BertForMaskedLM", "BertConfig", "BertLayer", pp_mask=False, **SIZE),
    "RoBERTa": words("RobertaForMaskedLM", "RobertaConfig", "RobertaLayer", pp_mask=False, **SIZE),
    "DistilBERT": words(
        "DistilBertForMaskedLM", "DistilBertConfig", "TransformerBlock", pp_mask=False, dim=32,
        n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32,
    ),
    "ALBERT": words(
        "AlbertForMaskedLM", "AlbertConfig", "AlbertLayer", pp_mask=False, embedding_size=16, **SIZE
    ),
    "ELECTRA": words(
        "ElectraForMaskedLM", "ElectraConfig", "ElectraLayer", pp_mask=False, embedding_size=16,
        **SIZE,
    ),
    "DeBERTa-v2": words(
        "DebertaV2ForMaskedLM", "DebertaV2Config", "DebertaV2Layer", relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=4, share_att_key=True, **SIZE,
    ),
    "Mamba": words(
        "MambaForCausalLM", "MambaConfig", "MambaBlock", hidden_size=32, num_hidden_layers=2,
        state_size=4, batch=tokens_alone, tolerance=IN_FLOAT32, adam=False,
    ),
    "RWKV": words(
        "RwkvForCausalLM", "RwkvConfig", "RwkvBlock", hidden_size=32, num_hidden_layers=2,
        attention_hidden_size=32, intermediate_size=48, context_length=16, batch=tokens_alone,
    ),
    "T5": words(
        "T5ForConditionalGeneration", "T5Config", "T5Block", pp_mask=False, d_model=32, d_kv=8,
        d_ff=48, num_layers=2, num_heads=4, batch=translation, decoder_start_token_id=0,
    ),
    "BART": words(
        "BartForConditionalGeneration", "BartConfig", "BartEncoderLayer BartDecoderLayer",
        pp_mask=False, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=32, batch=translation,
    ),
}  # fmt: skip


# --- images, sound, and both ----------------------------------------------------------------------

VISION = {n: SIZE[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "intermediate_size": 48, "image_size": 16, "patch_size": 4,
}  # fmt: skip


def pictures(model: str, config: str, units: str, **options: Any) -> Other:
    return other(model, config, units, pixels, adam=False, num_labels=CLASSES, **options)


def pixels(step: int) -> Batch:
    images_, classes = images(step, shape=(3, 16, 16))
    return {"pixel_values": images_}, classes


def sound(step: int) -> Batch:
    """Waves, and a class for each frame that the feature encoder makes."""
    generator = torch.Generator().manual_seed(step)
    wave = torch.randn(ROWS, 200, generator=generator, dtype=torch.float64)
    return {"input_values": wave}, torch.randint(VOCAB, (ROWS, 19), generator=generator)


def speech(step: int) -> Batch:
    """Spectrograms and tokens. Without the mask, Whisper would read the values of the tokens."""
    generator = torch.Generator().manual_seed(step)
    frames = torch.randn(ROWS, 8, 20, generator=generator, dtype=torch.float64)
    words = torch.randint(3, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    inputs = {"input_features": frames, "decoder_input_ids": words[:, :-1]}
    return inputs | {"decoder_attention_mask": torch.ones_like(words[:, 1:])}, words[:, 1:]


def captions(step: int) -> Batch:
    """Images with captions, and a target similarity for each pair."""
    inputs, _ = text(step)
    similarity = torch.randn(ROWS, generator=torch.Generator().manual_seed(step)).double()
    return inputs | pixels(step)[0], similarity


def pair_loss(output: Any, targets: Tensor) -> Tensor:
    """A loss for each pair. CLIP's own loss compares all rows of a batch with each other."""
    return ((output.image_embeds * output.text_embeds).sum(-1) - targets).square().sum()


MODELS |= {
    "ViT": pictures("ViTForImageClassification", "ViTConfig", "ViTLayer", **VISION),
    "DeiT": pictures(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", "DeiTLayer", **VISION
    ),
    "Swin": pictures(
        "SwinForImageClassification", "SwinConfig", "SwinLayer", image_size=16, patch_size=2,
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    ),
    "ConvNeXt": pictures(
        "ConvNextForImageClassification", "ConvNextConfig", "ConvNextLayer", patch_size=2,
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
    ),
    "CLIP": other(
        "CLIPModel", "CLIPConfig", "CLIPEncoderLayer", captions, pair_loss, projection_dim=16,
        text_config=SIZE | {"vocab_size": VOCAB, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=VISION,
        refused="its trace returns something else than the model",  # it writes in place
    ),
    "Whisper": words(
        "WhisperForConditionalGeneration", "WhisperConfig",
        "WhisperEncoderLayer WhisperDecoderLayer", speech, num_mel_bins=8, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10, max_target_positions=16,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "Wav2Vec2": words(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", "Wav2Vec2EncoderLayer", sound, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16],
        conv_stride=[5, 2], conv_kernel=[10, 2], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    ),
}  # fmt: skip
