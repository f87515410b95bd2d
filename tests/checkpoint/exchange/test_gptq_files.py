"""AutoGPTQ's folders: round trips with the same bits, a folder of others, bad folders."""

import copy
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dist_lab
from dist_lab.checkpoint.exchange import gptq_files, huggingface, llama
from dist_lab.checkpoint.exchange.tensors import InMemory, same_bits
from dist_lab.errors import MachineError, UserError
from dist_lab.quantize.formula import WIDTHS, Quantized, Scheme, grid_of, round_to_nearest
from dist_lab.quantize.linear import ActivationGrid, QuantizedLinear, replace_linears
from dist_lab.quantize.packing import as_stored
from dist_lab.zoo import build


def gpt(**changes):
    given = {"vocab": 64, "seed": 3, "layers": 1, "width": 64, "ffn": 96}
    return build("gpt", "tiny", **given | changes)


def linears(model):
    named = model.model.layers.named_modules(prefix="model.layers")
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def quantized(scheme, act_order=False, inputs=None, scale_dtype=torch.float16, **changes):
    """A quantised model, and the same with plain Linears of the values."""
    model = gpt(**changes)
    plain = copy.deepcopy(model)
    weights, rounded = {}, {}
    for name, linear in linears(model).items():
        matrix = as_stored(round_to_nearest(linear.weight.detach(), scheme), scale_dtype)
        if act_order:
            order = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(0))
            grid = replace(matrix.grid, groups=matrix.grid.groups[order])
            matrix = Quantized(matrix.codes[:, order], grid)
        weights[name] = matrix
        plain.get_submodule(name).weight.data = matrix.values()
        rounded[name] = inputs
    replace_linears(model, weights, {} if inputs is None else rounded)
    return model, plain


def tokens(rows=4, length=24):  # many rows, see FEW_ROWS
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def edit(folder, file, **changes):
    table = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(table))


def without_hashes(folder):
    (folder / "dist_lab.json").unlink()


@pytest.mark.slow_unless(
    lambda bits, symmetric, group, act_order: (
        bits in (3, 4) and (bits + symmetric) % 2 == 1 and (group == 32) == act_order
    )
)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_folder_has_the_same_bits_and_logits_when_it_is_loaded(
    tmp_path, bits, symmetric, group, act_order
):
    model, plain = quantized(Scheme(bits, group, symmetric), act_order)
    config = gptq_files.save(model, tmp_path / "q")
    assert (config.bits, config.group, config.symmetric) == (bits, group, symmetric)
    loaded = gptq_files.load(tmp_path / "q")
    saved, again = model.state_dict(), loaded.state_dict()
    assert saved.keys() == again.keys()
    for name, tensor in saved.items():
        mixed = name.endswith("qzeros") and config.format == "gptq_v2"  # may be packed anew
        assert mixed or same_bits(again[name], tensor), name
    for name in linears(gpt()):
        ours, theirs = (m.get_submodule(name).quantized() for m in (loaded, model))
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.grid.zero, theirs.grid.zero)
        assert ours.grid.scheme == theirs.grid.scheme
    logits = loaded(tokens())
    assert same_bits(logits, plain(tokens()))  # of Linears with these values
    with torch.no_grad():  # few rows: products of packed words
        assert same_bits(loaded(tokens(1, 3)), model(tokens(1, 3)))


@pytest.mark.slow
@pytest.mark.ranks(2, mesh={"dp": 2})
def test_a_quantised_model_is_evaluated_over_ranks_like_any_other(mesh):
    rows = tokens(8)[mesh.world.index :: 2]

    def loss_of(model):
        job = dist_lab.parallelize(model, mesh, "ddp")
        total = job.count(rows[:, 1:].numel())
        loss = lambda logits, y: dist_lab.cross_entropy_sum(logits, y) / total  # noqa: E731
        return float(job.evaluate([(rows[:, :-1], rows[:, 1:])], loss))

    model, plain = quantized(Scheme(4, 32), act_order=True)
    assert loss_of(model) == loss_of(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_tied_head_other_dtypes_and_exact_scales(tmp_path, dtype):
    model, plain = quantized(Scheme(4, 32), scale_dtype=torch.float32, tied=True, dtype=dtype)
    gptq_files.save(model, tmp_path / "q")
    stored = load_file(tmp_path / "q/model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == torch.float32
    loaded = gptq_files.load(tmp_path / "q")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_bits(loaded(tokens()), plain(tokens()))
    in_float32 = gptq_files.load(tmp_path / "q", torch.float32)
    assert in_float32(tokens()).dtype == torch.float32


@pytest.mark.parametrize("static", [False, True])
def test_rounded_inputs_are_stored_with_the_layer(tmp_path, static):
    grid = grid_of(torch.randn(50, 8) * 3, Scheme(8, None, True))
    inputs = ActivationGrid(Scheme(8, None if static else -1, True))
    if static:
        inputs = ActivationGrid(inputs.scheme, grid.scale, grid.zero)
    model, plain = quantized(Scheme(8, -1, True), inputs=inputs)
    gptq_files.save(model, tmp_path / "q")
    table = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert table["activations"] == ("static" if static else "dynamic")
    loaded = gptq_files.load(tmp_path / "q")
    assert same_bits(loaded(tokens()), model(tokens()))
    assert not torch.equal(loaded(tokens()), plain(tokens()))
    down = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert (down.input_scale is not None) == static


def test_the_files_say_what_other_programs_read(tmp_path):
    model, _ = quantized(Scheme(4, 32, True), act_order=True)
    about = {"method": "gptq", "settings": {"size": "tiny"}, "numbers": {"loss": 1.5}}
    options = {"damp_percent": 0.1, "true_sequential": True}
    gptq_files.save(model, tmp_path / "q", about=about, options=options, positions=64)
    assert sorted(os.listdir(tmp_path / "q")) == [
        "README.md", "config.json", "dist_lab.json", "model.safetensors", "quantize_config.json",
    ]  # fmt: skip
    table = json.loads((tmp_path / "q/quantize_config.json").read_text())
    assert table == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": True, "static_groups": False,
        "true_sequential": True, "damp_percent": 0.1, "model_name_or_path": None,
        "model_file_base_name": "model", "quant_method": "gptq", "checkpoint_format": "gptq",
    }  # fmt: skip
    config = json.loads((tmp_path / "q/config.json").read_text())
    assert config["quantization_config"] == table
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 64)
    opened = gptq_files.open_folder(tmp_path / "q")
    assert {key: opened.about[key] for key in about} == about
    assert opened.settings["damp_percent"] == 0.1
    stored = load_file(tmp_path / "q/model.safetensors")
    packed = {n: t for n, t in stored.items() if n.startswith("model.layers.0.mlp.down_proj")}
    assert {name.rpartition(".")[2]: tuple(t.shape) for name, t in packed.items()} == {
        "qweight": (96 // 32 * 4, 64), "qzeros": (3, 8), "scales": (3, 64), "g_idx": (96,),
    }  # fmt: skip


def test_a_zero_of_0_in_one_layer_puts_all_layers_in_the_second_format(tmp_path):
    model, _ = quantized(Scheme(4, 32))
    weight = torch.rand(64, 96) + 1  # positive: the zero is 0
    new = as_stored(round_to_nearest(weight, Scheme(4, 32)))
    layer = QuantizedLinear.from_quantized(new)
    model.set_submodule("model.layers.0.mlp.down_proj", layer)
    assert gptq_files.save(model, tmp_path / "q").format == "gptq_v2"
    loaded = gptq_files.load(tmp_path / "q")
    assert same_bits(loaded(tokens()), model(tokens()))


def test_is_quantized_knows_both_files_and_a_plain_folder_is_not(tmp_path):
    model, _ = quantized(Scheme(4))
    gptq_files.save(model, tmp_path / "q")
    huggingface.export(InMemory(gpt().state_dict()), llama.shape_of(gpt()), tmp_path / "hf")
    assert gptq_files.is_quantized(tmp_path / "q")
    (tmp_path / "q/quantize_config.json").unlink()
    assert gptq_files.is_quantized(tmp_path / "q")
    assert not gptq_files.is_quantized(tmp_path / "hf")
    assert not gptq_files.is_quantized(tmp_path / "none")
    with pytest.raises(UserError, match=r"is not quantised: it has no quantize_config.json"):
        gptq_files.load(tmp_path / "hf")
    with pytest.raises(UserError, match=r"is quantised; load it with .*gptq_files.load"):
        huggingface.open_folder(tmp_path / "q")


# --- a folder of others ---------------------------------------------------------------------------


def packed_by_hand(codes, bits):
    """Codes (L, N) -> words, by Python's own numbers: code k of a column is at bit b * k."""
    columns = []
    for column in codes.t().tolist():
        number = sum(code << bits * k for k, code in enumerate(column))
        words = [number >> 32 * i & 0xFFFFFFFF for i in range(len(column) * bits // 32)]
        columns.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def foreign(folder, bits=4, group=32):
    """A folder as AutoGPTQ 0.7 writes it, with act-order. Returns the values of its weights."""
    folder.mkdir()
    random = torch.Generator().manual_seed(7)
    full = gpt(seed=5, dtype=torch.float16)
    tensors, values = dict(full.state_dict()), {}
    for name, linear in linears(full).items():
        outputs, inputs = linear.weight.shape
        del tensors[f"{name}.weight"]
        groups = -(-inputs // group)
        codes = torch.randint(2**bits, (inputs, outputs), generator=random)
        zeros = torch.randint(1, 2**bits, (groups, outputs), generator=random)
        scales = (torch.rand(groups, outputs, generator=random) / 50 + 0.001).half()
        index = (torch.arange(inputs) // group)[torch.randperm(inputs, generator=random)]
        tensors |= {
            f"{name}.qweight": packed_by_hand(codes, bits),
            f"{name}.qzeros": packed_by_hand((zeros - 1).t(), bits).t().contiguous(),
            f"{name}.scales": scales,
            f"{name}.g_idx": index.int(),
            f"{name}.bias": torch.zeros(outputs, dtype=torch.float16),
        }
        values[name] = (scales.float()[index] * (codes - zeros[index])).t()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    base = f"gptq_model-{bits}bit-{group}g"
    save_file(tensors, folder / f"{base}.safetensors", {"format": "pt"})
    shape = llama.shape_of(full)
    (folder / "config.json").write_text(json.dumps(llama.to_config(shape, torch.float16, 2048)))
    table = {
        "bits": bits, "group_size": group, "damp_percent": 0.01, "desc_act": True,
        "static_groups": False, "sym": False, "true_sequential": True,
        "model_name_or_path": None, "model_file_base_name": base, "is_marlin_format": False,
    }  # fmt: skip
    (folder / "quantize_config.json").write_text(json.dumps(table))
    return full, values


@pytest.mark.slow_unless(lambda bits: bits == 3)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_folder_that_autogptq_could_have_written_is_loaded(tmp_path, bits):
    full, values = foreign(tmp_path / "q", bits)
    loaded = gptq_files.load(tmp_path / "q", torch.float64)
    plain = full.double()
    for name, value in values.items():
        assert torch.equal(loaded.get_submodule(name).weight, value.double())
        plain.get_submodule(name).weight.data = value.double()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()), plain(tokens()), rtol=1e-10, atol=1e-10)
    assert gptq_files.load(tmp_path / "q").model.embed_tokens.weight.dtype == torch.float16


# --- what is refused ------------------------------------------------------------------------------


def test_what_the_format_has_no_place_for_is_not_saved(tmp_path):
    def refused(model, line):
        with pytest.raises(UserError, match=line) as refusal:
            gptq_files.save(model, tmp_path / "q")
        assert "\n" not in str(refusal.value)
        assert os.listdir(tmp_path) == []

    refused(build("mlp", "tiny", vocab=64, seed=0), "names for gpt only, not for MLP")
    refused(gpt(), "self_attn.q_proj is not quantised, and AutoGPTQ's format needs all Linears")
    model, _ = quantized(Scheme(4, 32))
    other = as_stored(round_to_nearest(torch.randn(64, 96), Scheme(3, 32)))
    model.set_submodule("model.layers.0.mlp.down_proj", QuantizedLinear.from_quantized(other))
    refused(model, r"q_proj has bits=4 and model.layers.0.mlp.down_proj bits=3; AutoGPTQ's format")
    odd, _ = quantized(Scheme(4), width=120)
    refused(odd, "q_proj has 120 outputs, and AutoGPTQ's format packs 32 at a time")
    model, _ = quantized(Scheme(8))
    one = as_stored(round_to_nearest(torch.randn(64, 96), Scheme(8)))
    rounding = QuantizedLinear.from_quantized(one, inputs=ActivationGrid(Scheme(8, -1, True)))
    model.set_submodule("model.layers.0.mlp.down_proj", rounding)
    refused(model, "are rounded in different ways; dist_lab's folders have one way")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "q"
    gptq_files.save(quantized(Scheme(4, 32, True))[0], folder)
    return folder


def damaged(good, folder):
    shutil.copytree(good, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"bits": 5}, "has bits 5, not 2, 3, 4 or 8"),
        ({"bits": 3}, r"down_proj.qweight has shape \(12, 64\), and its config needs \(9, 64\)"),
        ({"group_size": 64}, r"down_proj.qzeros has shape \(3, 8\), and its config needs \(2, 8\)"),
        ({"group_size": 0}, "has group_size 0, not 1 or more, or -1"),
        ({"group_size": "32"}, "has group_size '32', not 1 or more"),
        ({"sym": 1}, "has sym 1, not true or false"),
        ({"quant_method": "awq"}, "has quant_method 'awq'; only gptq's folders"),
        ({"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'; it must be gptq or"),
        ({"is_marlin_format": True}, "has is_marlin_format true"),
        ({"activations": "some"}, "has activations 'some', not static or dynamic"),
        ({"activations": "static"}, "has activation_bits None, not 2, 3, 4 or 8"),
        (
            {"activations": "static", "activation_bits": 8},
            "14 names do not fit its config, first: .*down_proj.input_scale is missing",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(good, tmp_path, changes, line):
    folder = damaged(good, tmp_path / "q")
    without_hashes(folder)
    edit(folder, "quantize_config.json", **changes)
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, "config.json", quantization_config=table | changes)
    with pytest.raises(UserError, match=line) as refusal:
        gptq_files.load(folder)
    assert "\n" not in str(refusal.value)


def test_files_that_disagree_are_one_line(good, tmp_path):
    folder = damaged(good, tmp_path / "q")
    edit(folder, "quantize_config.json", bits=8)
    line = r"quantize_config.json has bits 8, and quantization_config of config.json 4; get the"
    with pytest.raises(MachineError, match=line):
        gptq_files.load(folder)
    edit(folder, "config.json", quantization_config=3)
    with pytest.raises(MachineError, match=r"quantization_config of config.json is 3, not a table"):
        gptq_files.load(folder)


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop(f"{LAYER}.g_idx"), f"first: {LAYER}.g_idx is missing"),
        (lambda t: t.update({"extra": torch.ones(1)}), "first: extra has no place in it"),
        (
            lambda t: t.update({f"{LAYER}.scales": torch.ones(1, 96)}),
            rf"{LAYER}.scales has shape \(1, 96\), and its config needs \(2, 96\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].float()}),
            "qweight is of torch.float32, and must be of int32",
        ),
        (
            lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].int()}),
            "scales is of torch.int32, and must be of a floating-point dtype",
        ),
        (lambda t: t[f"{LAYER}.g_idx"].fill_(2), "g_idx has groups from 2 to 2, and there are 2"),
        (lambda t: t[f"{LAYER}.g_idx"].fill_(-1), "g_idx has groups from -1 to -1"),
        (
            lambda t: t[f"{LAYER}.scales"].fill_(float("nan")),
            "scales has numbers that are not finite",
        ),
        (
            lambda t: t[f"{LAYER}.qzeros"].fill_(0),
            "qzeros has a zero of 1, and with sym all of them are 8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(good, tmp_path, change, line):
    folder = damaged(good, tmp_path / "q")
    without_hashes(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((UserError, MachineError), match=line) as refusal:
        gptq_files.load(folder)
    assert "\n" not in str(refusal.value)


def test_a_flipped_bit_a_cut_file_and_edited_settings_are_noticed(good, tmp_path):
    folder = damaged(good, tmp_path / "q")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(MachineError, match=r"model.safetensors in .* is not the file that was"):
        gptq_files.load(folder)
    path.write_bytes(whole[:-7])
    with pytest.raises(MachineError, match="is not a whole safetensors file"):
        gptq_files.load(folder)
    path.write_bytes(whole)
    gptq_files.load(folder)
    edit(folder, "config.json", rms_norm_eps=1e-4)
    with pytest.raises(MachineError, match=r"config.json in .* is not the file that was saved"):
        gptq_files.load(folder)
    path.unlink()
    with pytest.raises((UserError, MachineError), match=r"no (file )?.*model.safetensors"):
        gptq_files.load(folder)


def test_a_huge_header_takes_no_memory(good, tmp_path):
    folder = damaged(good, tmp_path / "q")
    edit(folder, "config.json", num_hidden_layers=10**9)
    with pytest.raises(UserError, match="too few for 1000000000 quantised layers of 30"):
        gptq_files.load(folder)
    huge = {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2**31 - 32}
    edit(folder, "config.json", num_hidden_layers=1, head_dim=None, **huge)
    with pytest.raises(
        UserError, match=r"embed_tokens.weight has shape \(64, 64\), and its config"
    ):
        gptq_files.load(folder)
    edit(folder, "config.json", hidden_size=64, intermediate_size=2**31 - 1)
    with pytest.raises(UserError, match="gate_proj has 2147483647 outputs, and AutoGPTQ's format"):
        gptq_files.load(folder)


def test_no_name_leads_out_of_the_folder(good, tmp_path):
    for name in ("../q/model", "/etc/passwd", "sub/model"):
        folder = damaged(good, tmp_path / f"q{len(name)}")
        (folder / "model.safetensors").unlink()
        edit(folder, "quantize_config.json", model_file_base_name=name)
        with pytest.raises(UserError, match="must be in the folder itself; do not trust this"):
            gptq_files.load(folder)
    folder = damaged(good, tmp_path / "hashes")
    edit(folder, "dist_lab.json", sha256={"../good": "0"})
    with pytest.raises(UserError, match="must be in the folder itself; do not trust this"):
        gptq_files.load(folder)
    folder = damaged(good, tmp_path / "link")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(good / "config.json")
    with pytest.raises(UserError, match=r"config.json is a link to .* out of its folder"):
        gptq_files.load(folder)


def test_weights_in_a_pickle_are_refused(good, tmp_path):
    folder = damaged(good, tmp_path / "q")
    (folder / "model.safetensors").rename(folder / "model.bin")
    edit(folder, "quantize_config.json", model_file_base_name=None)
    with pytest.raises(UserError, match=r"model.bin is a pickle, which runs code"):
        gptq_files.load(folder)


def test_an_existing_folder_is_not_overwritten(good):
    with pytest.raises(UserError, match="exists, and is not an empty folder; give a new one"):
        gptq_files.save(quantized(Scheme(4))[0], good)
