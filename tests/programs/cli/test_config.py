"""The command line and the presets: how they are read, and the one line that answers a mistake."""

import dataclasses
import json
import random
import time
import tomllib
from pathlib import Path

import pytest

from dist_lab.errors import UserError, one_of
from dist_lab.processes.ranks import cores
from dist_lab.processes.report import in_flags
from dist_lab.programs.checkpoint.settings import read as read_checkpoint_settings
from dist_lab.programs.cli import registry
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.registry import IMPLEMENTATIONS, STRATEGIES
from dist_lab.programs.cli.settings import kind

PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
TOO_MANY = 4 * cores() + 1
ALL = one_of(list(STRATEGIES), "")
ALONG_DP = " or ".join(f"--strategy {name}" for name, row in STRATEGIES.items() if "dp" in row.axes)
IN_BUCKETS = " or ".join(
    f"--strategy {name}" for name, row in STRATEGIES.items() if "bucket_mb" in row.options
)


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    return in_flags(str(caught.value))  # as the launcher prints it


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes run.toml in the current folder, so that messages show a short path."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "run.toml").write_bytes(data)
        return "run.toml"

    return write


# --- what is accepted -----------------------------------------------------------------------------


def test_without_arguments_every_setting_has_its_default():
    assert parse([]) == Config()


def test_a_flag_overrides_the_file_and_the_file_overrides_the_programs_defaults(file):
    path = file("steps = 20\nlr = 0.5\n")
    config = parse(["--config", path, "--lr", "0.25"], defaults={"steps": 10, "seq": 16})
    assert (config.steps, config.lr, config.seq, config.batch) == (20, 0.25, 16, 32)


# setting -> other settings that it needs.
ONLY_WITH = (
    {"bucket_mb": {"strategy": "ddp"}, "sync_batchnorm": {"model": "resnet18"}}
    | {name: {"strategy": "fsdp"} for name in registry.SHARDING}
    | {
        "sequence_parallel": {"strategy": "tp"},
        "regather": {"strategy": "tp", "sequence_parallel": True},
        "adamw_lr": {"optimizer": "muon"},
        "keep": {"save_every": 5},
    }
    | {name: {"strategy": "pp"} for name in STRATEGIES["pp"].options}
)


def test_every_setting_is_a_flag_and_a_toml_key_and_is_listed_in_help(file, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], description="How to launch it.")
    assert left.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.index("How to launch it.") < help_text.index("--strategy single|dp")
    for option in dataclasses.fields(Config):
        flag = "--" + option.name.replace("_", "-")
        assert f"  {flag} " in help_text.replace("\n", " \n")
        if option.name in (
            "config",
            "mesh",
            "reduce_order",
            "qat",
            "qat_inputs",
        ):  # these have tests of their own
            continue
        listed = option.metadata.get("choices", ("1",))[0]
        given = option.default if option.default is not None else kind(option)(listed)
        if option.name in ("data", "resume"):  # the default "" means that of the model, or none
            given = "words.txt"
        word, around = json.dumps(given), {"batch": 1} | ONLY_WITH.get(option.name, {})
        read = parse(["--config", file(f"{option.name} = {word}\n")], defaults=around)
        assert getattr(read, option.name) == given
        text = [flag] if kind(option) is bool else [flag, str(given)]
        read = parse(text, defaults=around)
        assert getattr(read, option.name) == (kind(option) is bool or given)


def test_help_starts_with_common_settings_and_groups_the_rest_by_strategy(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    help_text = capsys.readouterr().out.replace("\n", " \n")
    headings = [line for line in help_text.splitlines() if line.endswith(": ") and line[0] != " "]
    first = ["options", "common settings", "ddp, zero1, zero2", "fsdp, hsdp"]
    first += ["zero2, fsdp, hsdp", "tp", "pp"]
    assert [heading.rstrip(": ") for heading in headings if heading[0].islower()][:7] == first
    for name, row in STRATEGIES.items():
        for option in row.options:  # the options of a strategy stand under its name
            before = help_text[: help_text.index(f"  --{option.replace('_', '-')} ")].splitlines()
            [*_, heading] = (line for line in before if line.endswith(": ") and line[0] != " ")
            assert name in heading.rstrip(": ").split(", ")
    [schedule] = (line for line in help_text.splitlines() if "--schedule NAME|FILE" in line)
    assert "with --layers 8 interleaved or zbv" in schedule


def test_help_shows_the_defaults_of_this_program(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], program="verify.py", defaults={"steps": 3})
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage: verify.py")
    assert "optimizer steps [3]" in help_text


def test_a_choice_that_stands_for_none_is_not_shown(capsys):
    """--help had --dtype |float32|float64."""
    with pytest.raises(SystemExit):
        read_checkpoint_settings(["import", "--help"], "")
    assert "--dtype float32|float64\n" in capsys.readouterr().out


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("dist_lab 0.")


def test_a_no_flag_turns_off_a_switch_that_the_file_turns_on(file):
    path = file("log_collectives = true\n")
    assert parse(["--config", path]).log_collectives
    assert not parse(["--config", path, "--no-log-collectives"]).log_collectives


def test_a_flag_may_be_repeated_with_the_same_value():
    assert parse(["--lr", "0.1", "--lr", "0.1"]).lr == 0.1


@pytest.mark.parametrize("text", ['mesh = "dp=2"', "mesh = { dp = 2 }", "[mesh]\ndp = 2"])
def test_a_mesh_in_a_file_is_text_or_a_table(file, text):
    config = parse(["--config", file(f'strategy = "dp"\n{text}\n')])
    assert config.axes(2) == {"dp": 2}


def test_an_integer_is_accepted_for_a_float_setting(file):
    value = parse(["--config", file("lr = 1\n")]).lr
    assert (value, type(value)) == (1.0, float)


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(file):
    assert parse(["--config", file(b"\xef\xbb\xbfsteps = 5\r\n")]).steps == 5


def test_a_config_is_frozen_and_converts_to_json_and_back():
    config = parse(["--strategy", "dp", "--mesh", "dp=2"])
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 1


# --- what is refused: each message in full --------------------------------------------------------

BAD_FLAGS = [
    ("--strategy zp", f"strategy cannot be 'zp' (--strategy); give {ALL} "
        "(did you mean tp?)"),
    ("--impl torch", "strategy single has no impl 'torch' (--impl); give --impl hand"),
    ("--strategy dp --bucket-mb 5", "strategy dp has no bucket_mb (--bucket-mb); leave it out, or "
        f"give {IN_BUCKETS}"),
    ("--strategy ddp --bucket-mb 0", "bucket_mb cannot be 0.0 (--bucket-mb); give a finite number "
        "above 0"),
    ("--model resnet18 --dropout 0.1", "model resnet18 has no dropout (--dropout); leave it out, "
        "or give --model gpt, mlp or vit"),
    ("--dropout 1.5", "dropout cannot be 1.5 (--dropout); give a finite number, 1.0 or less"),
    ("--sentinel -1", "sentinel cannot be -1 (--sentinel); give a whole number, 0 or more"),
    ("--sync-batchnorm", "model gpt has no BatchNorm to synchronize (--sync-batchnorm); leave it "
        "out, or give --model resnet18"),
    ("--dtype fp8", "dtype cannot be 'fp8' (--dtype); give float32, bfloat16 or float64"),
    ("--size tinny", "size cannot be 'tinny' (--size); give tiny, small, 25m, 124m, 1b, "
        "7b, 13b, 70b or 405b (did you mean tiny?)"),
    ("--size small --model resnet18", "model resnet18 has no size small (--size); give tiny, its "
        "only size"),
    ("--model resnet", "model cannot be 'resnet' (--model); give gpt, mlp, vit or resnet18 (did "
        "you mean resnet18?)"),
    ("--backend mpi", "backend cannot be 'mpi' (--backend); give gloo or nccl"),
    ("--optimizer adam", "optimizer cannot be 'adam' (--optimizer); give adamw, sgd, "
        "muon or shampoo (did you mean adamw?)"),
    ("--batchsize 32", "no flag '--batchsize'; did you mean --batch? --help lists them all"),
    ("--batchsize=32", "no flag '--batchsize=32'; did you mean --batch? --help lists them all"),
    ("--qqq", "no flag '--qqq'; --help lists them all"),
    ("--stra dp", "no flag '--stra'; did you mean --strategy? --help lists them all"),
    ("dp", "stray argument 'dp'; every setting is a flag: --steps 300"),
    ("--steps 3 4", "stray argument '4'; every setting is a flag: --steps 300"),
    ("--lr", "argument --lr: expected one argument; --help shows what each flag takes"),
    ("--overwrite=1", "argument --overwrite: ignored explicit argument '1'; --help shows what each "
        "flag takes"),
    ("--lr fast", "lr cannot be 'fast' (--lr); give a finite number above 0"),
    ("--lr 0", "lr cannot be 0.0 (--lr); give a finite number above 0"),
    ("--lr=-1e-3", "lr cannot be -0.001 (--lr); give a finite number above 0"),
    ("--lr nan", "lr cannot be nan (--lr); give a finite number above 0"),
    ("--lr inf", "lr cannot be inf (--lr); give a finite number above 0"),
    ("--lr 1e999", "lr cannot be inf (--lr); give a finite number above 0"),
    ("--clip -1", "clip cannot be -1.0 (--clip); give a finite number, 0 or more"),
    ("--weight-decay nan", "weight_decay cannot be nan (--weight-decay); give a finite number, 0 "
        "or more"),
    ("--steps 1.5", "steps cannot be '1.5' (--steps); give a whole number, 1 or more"),
    ("--steps 0", "steps cannot be 0 (--steps); give a whole number, 1 or more"),
    ("--steps -1", "steps cannot be -1 (--steps); give a whole number, 1 or more"),
    ("--steps 3000000000", "steps cannot be 3000000000 (--steps); give a whole number, 2147483647 "
        "or less"),
    ("--batch 0", "batch cannot be 0 (--batch); give a whole number, 1 or more"),
    ("--microbatches 0", "microbatches cannot be 0 (--microbatches); give a whole number, 1 or "
        "more"),
    ("--seed -1", "seed cannot be -1 (--seed); give a whole number, 0 or more"),
    ("--timeout 0", "timeout cannot be 0.0 (--timeout); give a finite number, 0.1 or more"),
    ("--timeout 1e9", "timeout cannot be 1000000000.0 (--timeout); give a finite number, 86400 or "
        "less"),
    ("--nproc 0", "nproc cannot be 0 (--nproc); give a whole number, 1 or more"),
    ("--nproc -1", "nproc cannot be -1 (--nproc); give a whole number, 1 or more"),
    ("--nproc abc", "nproc cannot be 'abc' (--nproc); give a whole number, 1 or more"),
    (f"--strategy dp --nproc {TOO_MANY}", f"nproc {TOO_MANY} is more than 4 ranks for each of "
        f"{cores()} cores (--nproc); give {TOO_MANY - 1} or less, or add --oversubscribe"),
    ("--nproc 2", "strategy single runs in 1 process, 2 were started (--strategy); start 1, or "
        "give --strategy dp"),
    ("--strategy dp --nproc 4 --batch 30", "batch 30 is not a multiple of 4 data-parallel "
        "ranks x 1 micro-batches = 4 (--batch); give --batch 32"),
    ("--strategy dp --nproc 4 --microbatches 4 --batch 3", "batch 3 is not a multiple of "
        "4 data-parallel ranks x 4 micro-batches = 16 (--batch); give --batch 16"),
    ("--nproc 1 --microbatches 3 --batch 32", "batch 32 is not a multiple of 1 data-parallel "
        "ranks x 3 micro-batches = 3 (--batch); give --batch 33"),
    ("--strategy dp --mesh dp=3 --nproc 4", "mesh dp=3 needs 3 processes, 4 were started (--mesh); "
        "type torchrun --nproc_per_node=3 ... or --nproc 3"),
    ("--strategy dp --mesh tp=2", "the mesh is tp=2, but dp runs along dp (--mesh); give --mesh "
        "dp=2,tp=2 or --strategy tp"),
    ("--strategy fsdp --mesh dp=4", "the mesh is dp=4, but fsdp runs along fsdp (--mesh); give "
        "--mesh fsdp=4 or --strategy ddp or --strategy dp or --strategy zero1 or --strategy zero2"),
    ("--strategy fsdp --mesh dp=4,fsdp=1", "the mesh is dp=4 x fsdp=1, but fsdp runs along fsdp "
        "(--mesh); give --mesh fsdp=4 or --strategy hsdp"),
    ("--strategy zero1 --mesh pp=2", "the mesh is pp=2, but zero1 runs along dp (--mesh); give "
        "--mesh pp=2,dp=2 or --strategy pp"),
    ("--mesh pp=2,pp=2", "mesh cannot be 'pp=2,pp=2' (--mesh); give each axis once, with a size of "
        "1 or more: dp=2"),
    ("--mesh pp=2,dp=2 --nproc 8", "mesh pp=2 x dp=2 needs 4 processes, 8 were started (--mesh); "
        "type torchrun --nproc_per_node=4 ... or --nproc 4"),
    ("--mesh pp=2,dp=2 --nproc 4 --batch 10", "batch 10 is not a multiple of 2 data-parallel ranks "
        "x 8 micro-batches = 16 (--batch); give --batch 16"),
    ("--mesh pp=8,dp=1 --nproc 8", "8 stages (8 ranks of pp x 1) are more than the 4 blocks of gpt "
        "tiny (--mesh); give --layers 8, or a smaller pp"),
    ("--mesh dp=2,tp=4 --nproc 8 --seq 30 --sequence-parallel", "seq 30 does not divide over 4 "
        "ranks of tp (--seq, --sequence-parallel); give --seq 32"),
    ("--mesh pp=2,fsdp=2 --strategy dp", "the mesh is pp=2 x fsdp=2, but dp runs along dp (--mesh)"
        "; give --mesh pp=2,dp=2 or --strategy fsdp"),
    ("--mesh pp=2,cp=2", "no mesh axis 'cp' (--mesh); give pp, dp, fsdp or tp (did you mean tp?)"),
    ("--mesh dp=2,tp=2 --impl torch", "tp x ddp by torch: its DistributedDataParallel takes the "
        "DTensors of its tp by device_mesh= only, and then removes them from the model in the "
        "first forward (--impl); give --impl hand"),
    ("--mesh pp=2,tp=2 --bucket-mb 5", "strategy pp x tp has no bucket_mb (--bucket-mb); leave it "
        f"out, or give {IN_BUCKETS}"),
    ("--sequence-parallel", "strategy single has no sequence_parallel (--sequence-parallel); leave "
        "it out, or give --strategy tp"),
    ("--strategy tp --regather", "regather needs inputs sharded by "
        "--sequence-parallel (--regather); give both"),
    ("--strategy pp --nproc 8 --oversubscribe", "8 stages (8 ranks of pp x 1) are more than the 4 "
        "blocks of gpt tiny (--mesh); give --layers 8, or a smaller pp"),
    ("--strategy pp --nproc 2 --microbatches 5 --batch 32", "batch 32 is not a multiple of 1 "
        "data-parallel ranks x 5 micro-batches = 5 (--batch); give --batch 30"),
    ("--strategy pp --nproc 4 --layers 8 --schedule interleaved --microbatches 2", "interleaved "
        "takes micro-batches in groups of one per rank, but 2 do not divide by 4 ranks of pp "
        "(--microbatches); give --microbatches 4"),
    ("--schedule zb", "strategy single has no schedule (--schedule); leave it out, or give "
        "--strategy pp"),
    ("--strategy pp --nproc 2 --schedule zbb", "no schedule 'zbb', and no such file (No such file "
        "or directory) (--schedule); give gpipe, 1f1b, interleaved, zb or zbv (did you mean zb?), "
        "or a file with one row per rank: 0F0,0F1,0B0,0B1"),
    ("--strategy pp --nproc 2 --schedule zb --chunks 2", "schedule zb has 1 stage a rank, not 2 "
        "(--chunks); leave it out, or give --schedule interleaved"),
    ("--strategy pp --nproc 2 --schedule zb --recompute 1", "recompute needs the backward of a "
        "block in one piece, and schedule zb splits it in two (--recompute); leave it out, or give "
        "--schedule 1f1b"),
    ("--strategy pp --impl torch --emulate-compute 20", "emulate_compute works with impl hand "
        "only, and pp@torch is a library's (--emulate-compute); leave it out, or give --impl hand"),
    ("--strategy pp --emulate-compute 0", "emulate_compute cannot be 0.0 (--emulate-compute); give "
        "a finite number above 0"),
    ("--model resnet18 --layers 3", "model resnet18 always has 8 blocks (--layers); leave it out"),
    ("--strategy tp --nproc 3", "gpt tiny has 4 query heads and 2 key and value heads, which do "
        "not divide over 3 ranks of tp@hand (--mesh); sizes that work: 1, 2, 4; give tp=2"),
    ("--strategy tp --impl torch --nproc 4", "gpt tiny has 4 query heads and 2 key and value "
        "heads, which do not divide over 4 ranks of tp@torch (--mesh); sizes that work: 1, 2; "
        "give tp=2"),
    ("--strategy tp --model resnet18 --nproc 2", "model resnet18 has no tp: tp splits matrices, "
        "and all but 17,442 of its parameters are convolutions and norms (--model); give --model "
        "gpt or --model mlp or --model vit"),
    ("--strategy tp --sequence-parallel --seq 30 --nproc 4", "seq 30 does not divide over 4 "
        "ranks of tp (--seq, --sequence-parallel); give --seq 32"),
    ("--lr 1 --lr 2", "lr cannot be both '1' and '2' (--lr); give it once"),
    ("--overwrite --no-overwrite", "overwrite cannot be both true and false (--overwrite); give it "
        "once"),
    ("--out \udcff", r"out cannot be '\udcff' (--out); give UTF-8 text without NUL"),
    ("--out a\0b", r"out cannot be 'a\x00b' (--out); give UTF-8 text without NUL"),
    ("--config nope.toml", "no file 'nope.toml' (--config); give a TOML file, such as "
        "configs/02_dp.toml"),
    ("--timeline 5:3", "steps 5:3 end before they begin (--timeline); give 3:5"),
    ("--timeline 5", "no steps '5' (--timeline); give FIRST:LAST, such as 3:5"),
    ("--profile three:4", "no steps 'three:4' (--profile); give FIRST:LAST, such as 3:5"),
    ("--profile 3:4:5", "no steps '3:4:5' (--profile); give FIRST:LAST, such as 3:5"),
    ("--timeline=-1:4", "no steps '-1:4' (--timeline); give FIRST:LAST, such as 3:5"),
    ("--timeline 0:4", "steps are numbered from 1, not 0 (--timeline); give 1:4"),
    ("--timeline 3:201", "the run has 200 steps, and not step 201 (--timeline); give 3:200, or "
        "--steps 201"),
    ("--steps 1 --profile 3:5", "the run has 1 step, and not step 5 (--profile); give 1:1, or "
        "--steps 5"),
    ("--config=", "no file '' (--config); give a TOML file, such as configs/02_dp.toml"),
    ("--config /dev/zero", "'/dev/zero' is not a settings file (--config); give a TOML file"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "line"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_a_bad_command_line_is_refused_in_one_line(arguments, line):
    assert refusal(*arguments.split(" ")) == line


@pytest.mark.parametrize(
    "mesh", ["dp", "dp=", "dp=0", "dp=x", "dp=2,dp=2", "dp=2,", f"dp={10**10}"]
)
def test_a_malformed_mesh_is_refused(mesh):
    line = f"mesh cannot be '{mesh}' (--mesh); give each axis once, with a size of 1 or more: dp=2"
    assert refusal("--strategy", "dp", "--mesh", mesh) == line


BAD_FILES = [
    ("", "the file sets nothing (run.toml); write settings such as steps = 300"),
    ("# only a comment\n", "the file sets nothing (run.toml); write settings such as steps = 300"),
    ("steps 3\n", "not TOML: Expected '=' after a key in a key/value pair (run.toml:1:7); correct "
        "it"),
    ("steps = 3\nlr = [1", "not TOML: Unclosed array (run.toml:2:8); correct it"),
    ("steps = 3\nsteps = 4\n", "not TOML: Cannot overwrite a value (is the key set twice?) "
        "(run.toml:2:10); correct it"),
    ("[mesh]\n[mesh]\n", "not TOML: Cannot declare ('mesh',) twice (run.toml:2:6); correct it"),
    ("a = " + 5000 * "[", "brackets nest too deep (run.toml); settings are plain values"),
    (b"a = 1\n\xff", "byte 6 is not UTF-8 ('run.toml'); save the file as UTF-8"),
    (70_000 * "#", "'run.toml' is not a settings file (--config); give a TOML file"),
    ("# lr\n\nbatchsize = 3\n", "no setting 'batchsize' (run.toml:3); did you mean batch?"),
    ("qqq = 3\n", "no setting 'qqq' (run.toml:1); --help lists them, with dashes"),
    ("[model]\nname = 'gpt'\n", "model cannot be a table (run.toml:1); give gpt, mlp, vit or "
        "resnet18"),
    ("config = 'b.toml'\n", "no setting 'config' (run.toml:1); --help lists them, with dashes"),
    ("lr = 'fast'\n", "lr cannot be 'fast' (run.toml:1); give a finite number above 0"),
    ("lr = true\n", "lr cannot be true (run.toml:1); give a finite number above 0"),
    ("lr = nan\n", "lr cannot be nan (run.toml:1); give a finite number above 0"),
    ("steps = '3'\n", "steps cannot be '3' (run.toml:1); give a whole number, 1 or more"),
    ("steps = 1.5\n", "steps cannot be 1.5 (run.toml:1); give a whole number, 1 or more"),
    ("steps = true\n", "steps cannot be true (run.toml:1); give a whole number, 1 or more"),
    ("steps = [3]\n", "steps cannot be a list (run.toml:1); give a whole number, 1 or more"),
    ("steps = 1979-05-27\n", "steps cannot be 1979-05-27 (run.toml:1); give a whole number, 1 or "
        "more"),
    (f"steps = 0x{5000 * 'f'}\n", "steps cannot be so large a number (run.toml:1); give a whole "
        "number, 2147483647 or less"),
    ("overwrite = 1\n", "overwrite cannot be 1 (run.toml:1); give true or false"),
    ("data = 3\n", "data cannot be 3 (run.toml:1); give UTF-8 text without NUL"),
    ('out = "a\\u0000b"\n', r"out cannot be 'a\x00b' (run.toml:1); give UTF-8 text without NUL"),
    ("strategy = 'ddpp'\n", f"strategy cannot be 'ddpp' (run.toml:1); give {ALL} "
        "(did you mean ddp?)"),
    ("mesh = 0\n", "mesh cannot be 0 (run.toml:1); give each axis once, with a size of 1 or more: "
        "dp=2"),
    ("strategy = 'dp'\nmesh.dp = '2'\n", 'mesh cannot be "dp=\'2\'" (run.toml:2); give each axis '
        "once, with a size of 1 or more: dp=2"),
    ("strategy = 'dp'\n\n[mesh]\ntp = 2\n", "the mesh is tp=2, but dp runs along dp (run.toml:3); "
        "give --mesh dp=2,tp=2 or --strategy tp"),
    (f"strategy = 'dp'\nnproc = {TOO_MANY}\n", f"nproc {TOO_MANY} is more than 4 ranks for each of "
        f"{cores()} cores (run.toml:2); give {TOO_MANY - 1} or less, or add --oversubscribe"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), BAD_FILES, ids=[repr(c[:30]) for c, _ in BAD_FILES])
def test_a_bad_file_is_refused_in_one_line_with_file_and_line_number(file, content, line):
    assert refusal("--config", file(content)) == line


def test_a_bad_value_in_the_file_is_refused_even_if_a_flag_overrides_it(file):
    assert refusal("--config", file("steps = 0\n"), "--steps", "3").startswith("steps cannot be 0")


def test_a_number_of_thousands_of_digits_is_refused(file):
    assert "(run.toml); correct it" in refusal("--config", file(f"steps = {5000 * '9'}\n"))


def test_for_a_misspelled_file_or_a_folder_an_existing_file_is_suggested(file, tmp_path):
    file("steps = 3\n")
    assert refusal("--config", "runs.toml").endswith("did you mean run.toml?")
    assert refusal("--config", ".") == "'.' is a folder (--config); give a file: run.toml"
    (tmp_path / "none").mkdir()
    assert refusal("--config", "none").endswith("give a file: a TOML file")


def test_a_file_that_cannot_be_read_is_refused(file, monkeypatch):
    path = file("steps = 3\n")

    def deny(self):  # tests may run as root, who can read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    line = "cannot read 'run.toml': Permission denied (--config); give a file that you may read"
    assert refusal("--config", path) == line


def test_any_nonsense_argument_is_answered_by_one_printable_line():
    for nasty in ("\x1b[31m\n\r\t", "x\n" * 500, "\u2028", "%s %(x)d {0}"):
        for arguments in ([nasty], ["--" + nasty], ["--strategy", nasty], ["--config", nasty]):
            line = refusal(*arguments)
            assert line.isprintable()
            assert len(line) < 300


def test_a_newline_in_a_file_name_does_not_break_the_message_into_two_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\nb.toml").write_text("steps = 0\n")
    line = r"steps cannot be 0 ('a\nb.toml':1); give a whole number, 1 or more"
    assert refusal("--config", "a\nb.toml") == line


@pytest.mark.parametrize("seed", range(4))
def test_a_randomly_damaged_preset_gives_a_config_or_a_one_line_error(file, seed):
    rng = random.Random(seed)
    began, outcomes = time.perf_counter(), set()
    for _ in range(50):
        text = mutated(rng.choice(PRESETS).read_bytes(), rng)
        try:
            outcome = parse(["--config", file(text)])
        except UserError as error:
            outcome = str(error)
        assert isinstance(outcome, Config) or (outcome.isprintable() and len(outcome) < 300), text
        outcomes.add(type(outcome))
    assert outcomes == {Config, str}
    assert time.perf_counter() - began < 10  # it takes half a second; this catches a hang


def mutated(text: bytes, rng: random.Random) -> bytes:
    """Returns the text with one to three random edits."""
    tokens = b"true nan -inf 1e999 [[ ]] { } ''' ' = . # \n \0 \xff \\ 1979-05-27 _ 0x".split(b" ")
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        a = rng.choice([a, max(a, b - 5)])  # long cuts and short ones
        text = rng.choice([
            text[:a] + text[b:],
            text[:b] + text[a:],
            text[:b] + rng.choice(tokens) + text[b:],
            text[:b] + bytes([rng.randrange(256)]) + text[b + 1 :],
            text[:b],
        ])  # fmt: skip
    return text


# --- the mesh for a number of processes -----------------------------------------------------------


def test_the_default_mesh_has_all_ranks_along_the_strategys_own_axis():
    assert Config(strategy="dp").axes(4) == {"dp": 4}
    assert Config(strategy="single").axes(1, plain=True) == {}


def test_one_rank_is_allowed_if_started_as_a_rank_and_otherwise_told_how_to_start():
    assert Config(strategy="dp").axes(1) == {"dp": 1}
    with pytest.raises(UserError) as caught:
        Config(strategy="dp").axes(1, plain=True)
    assert str(caught.value) == (
        "strategy dp needs several processes, this is a single one (--strategy); add --nproc 2, or "
        "start it with torchrun --nproc_per_node=2"
    )
    with pytest.raises(UserError, match="add --nproc 3, or"):
        Config(strategy="dp", mesh={"dp": 3}).axes(1, plain=True)


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [
        ("--strategy dp --nproc 3", 33),
        ("--strategy dp --nproc 4", 32),
        ("--strategy dp --nproc 2 --microbatches 5", 40),
        ("--strategy pp --nproc 2 --microbatches 5", 35),
    ],
)
def test_the_default_batch_is_rounded_up_to_one_that_divides(arguments, batch):
    config = parse(arguments.split())
    assert config.fitted(config.nproc).batch == batch
    config.fitted(config.nproc).axes(config.nproc)


def test_a_given_batch_is_never_rounded_even_if_it_equals_the_default():
    assert "give --batch 33" in refusal(*"--strategy dp --nproc 3 --batch 32".split())


def test_oversubscribe_allows_more_ranks_than_4_per_core():
    arguments = ["--strategy", "dp", "--nproc", str(TOO_MANY), "--batch", str(TOO_MANY)]
    assert parse([*arguments, "--oversubscribe"]).nproc == TOO_MANY


@pytest.mark.parametrize("batch", range(1, 40))
def test_the_suggested_batch_works_and_is_the_nearest_that_does(batch):
    config = Config(strategy="dp", batch=batch, microbatches=2)
    try:
        config.axes(3)
    except UserError as error:
        offered = int(str(error).rpartition(" ")[2])
        dataclasses.replace(config, batch=offered).axes(3)
        assert abs(offered - batch) <= 3 or offered == 6
    else:
        assert batch % 6 == 0


# --- the data that a model can take --------------------------------------------------------------

MISFITS = [
    ("vit", "stdlib", None, "model vit reads images, and --data 'stdlib' is text (--model); give "
        "--data glyphs, mnist, cifar10, fake or module:function"),
    ("resnet18", "glyfs", None, "model resnet18 reads images, and --data 'glyfs' is text "
        "(--model); give --data glyphs, mnist, cifar10, fake or module:function (did you mean "
        "glyphs?)"),
    ("gpt", "mnist", (1, 28, 28), "model gpt reads text, and --data 'mnist' is images of 28 x 28 "
        "(--model); give --data stdlib, or --model vit or --model resnet18"),
    ("vit", "fake:3x30x45", (3, 30, 45), "model vit cuts an image into patches of 4 x 4, and 30 "
        "x 45 does not divide into them (--data 'fake:3x30x45'); give images of 32 x 44"),
    ("vit", "my:own", (3, 1, 4), "model vit cuts an image into patches of 4 x 4, and 1 x 4 does "
        "not divide into them (--data 'my:own'); give images of 4 x 4"),
    ("resnet18", "fake:3x64x8", (3, 64, 8), "model resnet18 halves an image three times, and 64 "
        "x 8 is too small for that (--data 'fake:3x64x8'); give images of 9 x 9 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "data", "image", "line"), MISFITS)
def test_data_that_a_model_cannot_take_is_refused_in_one_line(model, data, image, line):
    with pytest.raises(UserError) as caught:
        Config(model=model, data=data).check_fits(image)
    assert str(caught.value) == line


def test_data_that_fits_the_model_is_accepted():
    for model, image in [("gpt", None), ("vit", (1, 28, 28)), ("resnet18", (3, 9, 30))]:
        Config(model=model).check_fits(image)


# --- presets, and tables that other modules also have ---------------------------------------------


def test_presets_are_numbered_in_reading_order():
    assert [int(path.name[:2]) for path in PRESETS] == list(range(1, len(PRESETS) + 1))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_describes_itself_and_sets_only_what_differs_from_the_defaults(path):
    config = parse(["--config", str(path), "--oversubscribe"])
    assert 20 < len(config.about) < 100
    config.axes(config.nproc or 1, plain=config.nproc is None)
    if path != PRESETS[0]:  # the first preset shows common settings with their defaults
        repeated = {k for k, v in config.to_dict().items() if v == getattr(Config(), k)}
        assert not repeated & tomllib.loads(path.read_text()).keys()


def test_the_choices_on_the_command_line_are_those_of_the_library():
    import torch

    from dist_lab import zoo
    from dist_lab.programs.cli import config
    from dist_lab.programs.train import loop

    offered = {(name, impl) for name, row in STRATEGIES.items() for impl in row.impls}
    assert offered == set(IMPLEMENTATIONS)
    choices = {f.name: set(f.metadata.get("choices", ())) for f in dataclasses.fields(Config)}
    assert choices["model"] == set(zoo.SIZES)
    assert choices["size"] == set().union(*zoo.SIZES.values())
    for name, model in zoo.MODELS.items():
        for size, shape in zoo.SIZES[name].items():
            assert config.MODELS[name].blocks(size) == shape.get("layers", len(model.units))
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices["dtype"])
    assert choices["optimizer"] == set(loop.OPTIMIZERS)


def test_a_program_has_no_flag_for_a_setting_it_does_not_use_but_a_shared_file_may_set_it(
    tmp_path,
):
    preset = tmp_path / "run.toml"
    preset.write_text("val_every = 7\nsteps = 5\n")
    config = parse(["--config", str(preset)], without=["val_every"])
    assert (config.val_every, config.steps) == (7, 5)
    with pytest.raises(UserError, match="no flag '--val-every'"):
        parse(["--val-every", "3"], without=["val_every"])


def test_a_deadlocking_schedule_is_refused_with_its_place_before_a_rank_starts(file):
    path = file("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n")
    message = refusal("--strategy", "pp", "--nproc", "2", "--microbatches", "2", "--schedule", path)
    assert message.splitlines() == [
        "schedule run.toml: deadlock: rank 0 waits in 0B0 for 1B0, rank 1 waits in 1F1 for 0F1; on "
        "rank 0 move 0F1 before 0B0",
        "  rank 0: 0F0 [0B0] 0F1 0B1   <-- waits for 1B0",
        "  rank 1: [1F1] 1F0 1B0 1B1   <-- waits for 0F1",
    ]


def test_with_a_fixed_order_a_rank_has_one_micro_batch_for_each_of_its_virtual_shards():
    config = parse(["--strategy", "fsdp", "--reduce-order", "fixed"])
    assert (config.reduce_order, config.threads) == ("fixed:8", 1)
    assert [config.fitted(ranks).microbatches for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    mesh = ["--mesh", "pp=2,dp=2", "--reduce-order", "fixed:4", "--batch", "9"]
    assert parse(mesh[:4]).fitted(4).microbatches == 2
    with pytest.raises(UserError, match=r"batch 9 is not a multiple of 2 .* = 4 .*give --batch 8"):
        parse(mesh).axes(4)
    wrong = ["--strategy", "ddp", "--nproc", "2", "--reduce-order", "fixed"]
    for more, message in {
        "--microbatches 2": r"2 micro-batches a rank, .*give microbatches=4",
        "--dtype bfloat16": r"the dtype is float32, not bfloat16 \(--dtype\)",
        "--threads 2": r"2 threads share .* \(--threads\)",
        "--reduce-order fixed:3": r"reduce_order cannot be both",
        "--impl torch": r"ddp@torch adds gradients in the library's own order",
    }.items():
        with pytest.raises(UserError, match=message):
            parse([*wrong, *more.split()])


def test_a_run_that_goes_on_may_divide_its_batch_unequally_but_not_in_a_pipeline():
    for flags in ("--strategy ddp", "--strategy fsdp --microbatches 2"):
        parse(f"{flags} --nproc 3 --batch 32 --resume auto --out x".split())
    for flags, words in {
        "--strategy ddp": "not a multiple of 3",
        "--strategy pp --microbatches 3 --resume run": "not a multiple of 1",
        "--strategy fsdp --microbatches 12 --resume run": "not a multiple of 3",
    }.items():
        with pytest.raises(UserError, match=words):
            parse(f"{flags} --nproc 3 --batch 32".split())
