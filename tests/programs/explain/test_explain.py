"""explain shows what a run does, because it runs the step itself."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run
from real_steps import explained_and_real

from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh
from dist_lab.parallel.schedules.library import make
from dist_lab.parallel.schedules.simulate import bubble, render
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.registry import IMPLEMENTATIONS
from dist_lab.programs.explain.command import explain

ROOT = Path(__file__).parents[3]
BY_HAND = [name for name, impl in IMPLEMENTATIONS if impl == "hand" and name != "single"]
SMALL = {"batch": 8, "seq": 16, "microbatches": 2, "data": str(ROOT / "README.md")}


def program(*arguments):
    command = [sys.executable, ROOT / "launch/explain.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def printed(capsys):
    """Returns the output of explain.py, run in this process because a start takes a second."""
    read = runpy.run_path(str(ROOT / "launch/explain.py"))["read"]

    def run_explain(*arguments):
        assert explain(read(arguments), init_mesh()) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run_explain


@pytest.mark.slow  # test_mixes.py does the same for a mix
@pytest.mark.nightly_unless(
    lambda strategy, dtype: (
        strategy not in ("dp", "zero1") and (strategy, dtype) != ("pp", "float32")
    )
)
@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [(strategy, "float32") for strategy in BY_HAND]
    + [(strategy, "bfloat16") for strategy in ("ddp", "fsdp", "tp", "pp")],
)
@pytest.mark.ranks(4, timeout=120)
def test_a_dry_run_sends_and_holds_the_same_bytes_as_a_real_run(strategy, dtype, mesh):
    options = {"bucket_mb": 0.5} if strategy == "ddp" else {}
    layers = 4 if strategy == "pp" else 2
    config = Config(strategy=strategy, dtype=dtype, layers=layers, **SMALL, **options)
    explained, real = explained_and_real(config, mesh)
    assert explained == real
    assert real["peak"] == sum(real["memory"]["at_peak"].values())


def test_explain_shows_ranks_layouts_buckets_and_bytes_of_a_large_mesh(printed):
    text = printed("--strategy", "ddp", "--mesh", "dp=64", "--batch", "64", "--seq", "8")
    assert "ranks of dp=64" in text
    assert "model.layers.0-3.self_attn.q_proj.weight" in text
    assert "bucket 0: lm_head.weight" in text
    assert "2 (N-1)/N S" in text
    set_up = [line for line in text.splitlines() if "set-up of shared memory, 8 calls" in line]
    assert [line.split()[-2:] for line in set_up] == [["6,784", "6,678"]]
    row = next(line.split() for line in text.splitlines() if line.lstrip().startswith("all_reduce"))
    payload, by_formula, sent = (int(row[i].replace(",", "")) for i in (3, -2, -1))
    assert payload > 4 * 1_000_576  # all parameters, and the flags
    assert by_formula == pytest.approx(2 * 63 / 64 * payload, abs=1)
    assert sent == pytest.approx(by_formula, rel=1e-3)  # rank 0 has the longest shards


@pytest.mark.slow
def test_measured_memory_equals_the_bytes_computed_from_layouts(printed):
    text = printed("--strategy", "dp", "--mesh", "dp=8", "--batch", "8", "--seq", "8")
    table = text[text.index("memory of rank 0") : text.index("alive at the peak")]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.split()}
    assert rows["parameters"] == ["4,002,304", "4,002,304", "4.00", "4,002,304"]
    assert rows["gradients"][1:] == ["4,002,304", "4.00", "4,002,304"]
    assert rows["optimizer"] == ["8,004,764", "8,004,764", "8.00", "8,004,764"]
    assert "gathered" not in rows
    assert len(rows["activations"]) == 3  # layouts do not determine them


@pytest.mark.slow
@pytest.mark.parametrize("collectives", ["ring", "direct", "tree"])
def test_hand_written_algorithms_are_explained_without_other_ranks(collectives, printed):
    text = printed("--strategy", "ddp", "--seq", "8", "--batch", "4", "--collectives", collectives)
    row = next(line.split() for line in text.splitlines() if line.lstrip().startswith("all_reduce"))
    by_formula, sent = (int(row[i].replace(",", "")) for i in (-2, -1))
    assert sent == pytest.approx(by_formula, rel=1e-2)


@pytest.mark.slow
def test_a_step_of_nccl_is_explained_without_a_gpu(printed):
    text = printed("--strategy", "fsdp", "--backend", "nccl", "--nproc", "2", "--seq", "16")
    assert "2 ranks: rank 0 sends" in text


def test_one_process_sends_nothing():
    done = program("--seq", "8", "--batch", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("1 rank: nothing is sent; rank 0 computes ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--strategy", "ddp", "--impl", "torch"], "ddp@torch is a library's (--impl); give"),
        (
            ["--strategy", "dp", "--mesh", "dp=3", "--batch", "32"],
            "batch 32 is not a multiple of 3 data-parallel",
        ),
        (
            ["--strategy", "dp", "--mesh", "tp=3"],
            "the mesh is tp=3, but dp runs along dp (--mesh); give",
        ),
        (["--nproc", "4"], "strategy single runs in 1 process, 4 were started (--strategy); start"),
        (["--strategy", "dp", "--nproc", "4", "--mesh", "dp=2"], "mesh dp=2 needs 2 processes, 4"),
    ],
)
def test_a_run_that_cannot_be_explained_is_refused_in_one_line(arguments, line):
    done = run("explain.py", *arguments)
    [message] = done.stderr.splitlines()
    assert message.startswith("explain.py: error: ")
    assert line in message
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy dp --stages 2", "strategy dp has no stages (--stages); leave it out"),
        ("--svg a.svg", "nothing to draw (--svg); give --mesh, such as fsdp=2,tp=2"),
        ("--parameter w", "nothing to draw (--parameter); give --mesh"),
        ("--mesh dp=2 --rank 2", "mesh dp=2 has no rank 2 (--rank); give 0 to 1"),
        ("--all-ranks", "nothing to draw (--all-ranks); give --mesh, such as"),
        ("--mesh dp=2 --all-ranks --svg a.svg", "has no use for svg (--svg); leave one out"),
        ("--rank 1", "a single process has no rank 1 (--rank); give 0, or --mesh"),
        ("--strategy pp --stages 2 --mesh pp=4", "and there is --mesh pp=4 (--stages); give one"),
        (
            "--strategy pp --svg a.txt",
            "svg cannot be 'a.txt' (--svg); name it .svg, .png or .pdf",
        ),
    ],
)
def test_wrong_settings_are_refused_before_the_step_is_run(arguments, message, printed):
    with pytest.raises(UserError, match=re.escape(message)):
        printed(*arguments.split())


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 768, "vocab_size": 50257},
         "model_type 'gpt2', without hidden_size, intermediate_size, num_hidden_layers, num_att"),
        ({"model_type": "llama", "hidden_size": 64}, "num_attention_heads None, not a whole"),
        ("{", "is not JSON"),
        (None, "cannot read"),
    ],
)  # fmt: skip
def test_a_config_of_another_family_or_an_unreadable_one_is_refused(
    contents, message, printed, tmp_path
):
    path = tmp_path / "config.json"
    if contents is not None:
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    with pytest.raises((UserError, MachineError), match=re.escape(message)):
        printed("--model-config", str(path))


LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}  # fmt: skip


def test_a_llama_is_explained_from_its_config(printed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    given = ["--model-config", str(tmp_path), "--batch", "2", "--seq", "8"]
    count = 2 * 1000 * 64 + 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64) + 64
    assert f"{count:,} parameters" in printed(*given)
    with pytest.raises(
        UserError, match="4 query heads and 2 key and value heads, which do not div"
    ):
        printed(*given, "--mesh", "tp=3")
    with pytest.raises(UserError, match=r"4 stages .* are more than the 3 blocks of gpt of"):
        printed(*given, "--mesh", "pp=4", "--microbatches", "2")
    with pytest.raises(UserError, match="leave out --model, --size and --layers"):
        printed(*given, "--size", "25m")


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["--strategy zero2", "--mesh pp=2,fsdp=2,tp=2"])
def test_with_values_the_bytes_are_the_same(mix, printed, tmp_path):
    few = [*mix.split(), "--batch", "8", "--seq", "64", "--microbatches", "2"]
    for name, more in (("sizes", []), ("values", ["--values"])):
        printed(*few, *more, "--out", str(tmp_path / name))
    sizes, values = ((tmp_path / n / "explain.json").read_text() for n in ("sizes", "values"))
    assert sizes == values


@pytest.mark.slow
def test_a_model_of_seven_billion_parameters_is_explained(printed):
    text = printed("--size", "7b", "--mesh", "tp=8", "--batch", "1", "--seq", "64")
    last = text.splitlines()[-1]
    work = "8 ranks: rank 0 sends [0-9.,]+ MB a step in [0-9]+ calls, computes [0-9.,]+ GFLOP, "
    assert re.match(work + "and holds 1[0-9],", last), last


@pytest.mark.slow
def test_all_ranks_are_shown_by_classes(printed, tmp_path):
    few = "--mesh fsdp=3,tp=2 --batch 3 --seq 8 --layers 1 --all-ranks".split()
    text = printed(*few, "--out", str(tmp_path))
    assert "6 ranks in 3 classes: together they send" in text
    contents = json.loads((tmp_path / "explain.json").read_text())
    assert [one["ranks"] for one in contents["classes"]] == ["0,1", "2,3", "4,5"]
    for one in contents["classes"]:
        assert sum(kind["at_peak"] for kind in one["memory"].values()) == one["peak"]
    assert {"op", "axis", "calls", "payload", "sent"} == set(contents["classes"][0]["traffic"][0])


@pytest.mark.slow  # tests/test_readmes.py has one that is printed
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb", "zbv"])
def test_a_schedule_is_printed_and_plotted(schedule, printed, tmp_path):
    path = tmp_path / "grid.svg"
    few = "--strategy pp --stages 2 --microbatches 4 --batch 4 --seq 8".split()
    output = printed(*few, "--schedule", schedule, "--svg", str(path))
    expected = make(schedule, 2, 4)
    assert output.startswith(f"{schedule}, one column per unit of time")
    assert f"{bubble(expected):.1%} idle" in output
    assert render(expected).splitlines()[1] in output
    assert path.read_text().startswith("<?xml")


@pytest.mark.slow
def test_another_rank_is_explained_with_its_own_stage(printed, tmp_path):
    few = "--mesh pp=2,tp=2 --microbatches 2 --batch 2 --seq 8 --rank 3".split()
    output = printed(*few, "--out", str(tmp_path))
    assert "rank 3 communicates along pp with 1, along tp with 2" in output
    assert "parameters on rank 3" in output
    assert "lm_head.weight" in output
    assert "embed_tokens" not in output
    assert "4 ranks: rank 3 sends " in output
    assert json.loads((tmp_path / "explain.json").read_text())["rank"] == 3


@pytest.mark.slow
def test_a_parameter_is_shown_with_the_part_of_each_rank(printed, tmp_path):
    few = "--mesh fsdp=2,tp=2 --batch 2 --seq 8".split()
    path = tmp_path / "who.svg"
    output = printed(*few, "--parameter", "lm_head.weight", "--svg", str(path))
    assert "lm_head.weight: 256 x 128, dim 0 over tp, then dim 0 over fsdp" in output
    assert re.search(r"128:192 \|   1   \|", output)
    assert f"plotted in {path}" in output
    assert path.read_text().startswith("<?xml")
    with pytest.raises(UserError, match=r"no parameter 'lm_heat.weight' .*did you mean lm_head.we"):
        printed(*few, "--parameter", "lm_heat.weight")


def test_explain_json_has_layouts_memory_and_calls(printed, tmp_path):
    out = tmp_path / "out"
    output = printed("--strategy", "fsdp", "--batch", "4", "--seq", "8", "--out", str(out))
    assert f"written to {out / 'explain.json'}" in output
    contents = json.loads((out / "explain.json").read_text())
    assert (contents["strategy"], contents["mesh"]) == ("fsdp@hand", {"fsdp": 4})
    assert contents["layouts"]["lm_head.weight"] == {
        "shape": [256, 128],
        "dtype": "float32",
        "splits": [["fsdp", {"shard": 0, "copies": 1}]],
        "partial": [{"axis": "fsdp"}],
    }
    kinds = contents["memory"]["kinds"]
    assert sum(kind["at_peak"] for kind in kinds.values()) == contents["memory"]["peak"]
    assert {call["op"] for call in contents["calls"]} >= {"all_gather", "reduce_scatter"}
    assert {call["step"] for call in contents["calls"]} == {1, 2}


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, printed):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file.*\(--out\)"):
        printed("--strategy", "dp", "--out", str(tmp_path / "file"))


@pytest.mark.slow
def test_nproc_in_a_preset_is_explained_but_not_started(printed):
    assert "ranks of dp=2 x fsdp=2" in printed(
        "--config", str(ROOT / "configs/08_hsdp.toml"), "--batch", "4", "--seq", "8"
    )


@pytest.mark.slow
def test_nproc_is_the_number_of_ranks_to_explain(printed):
    assert "ranks of fsdp=3" in printed("--strategy", "fsdp", "--nproc", "3", "--seq", "8")
