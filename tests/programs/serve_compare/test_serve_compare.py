"""serve_compare.py: a race from the command line, and its mistakes in one line each."""

import csv
import json

import pytest
import short_run
from programs import refusal, run

FAST = ("--requests=3", "--cost=2,0.1", "--policy=static,vllm")


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raced")
    done = run("serve_compare.py", *FAST, f"--out={folder}")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_race_prints_a_row_for_each_policy_and_writes_its_files(raced):
    folder, text = raced
    assert "a step of n tokens takes 2.00 + 0.100 n ms" in " ".join(text.split())
    assert text.count("\n  static") == text.count("\n  vllm") == 2
    assert "all policies wrote the same texts" in text
    everything = json.loads((folder / "serve_compare.json").read_text())
    assert [row["policy"] for row in everything["rows"]] == ["static", "vllm"]
    assert [row["clock"] for row in everything["rows"]] == ["virtual"] * 2
    with (folder / "serve_compare.csv").open() as file:
        assert [row["policy"] for row in csv.DictReader(file)] == ["static", "vllm"]
    assert (folder / "serve_compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_ranks_have_the_same_times_on_the_virtual_clock(raced, tmp_path):
    done = run("serve_compare.py", *FAST, f"--out={tmp_path}", "--nproc=2", "--mesh=tp=2")
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((folder / "serve_compare.json").read_text())["rows"]
        for folder in (raced[0], tmp_path)
    )
    assert one == two


def test_a_trained_model_serves(tmp_path_factory):
    trained = short_run.trained(tmp_path_factory.getbasetemp())
    done = run("serve_compare.py", *FAST[:2], "--policy=lmdeploy", f"--checkpoint={trained}")
    assert done.returncode == 0, done.stderr
    assert "\n  lmdeploy" in done.stdout


@pytest.mark.slow
def test_a_race_on_the_wall_measures_the_cost_of_a_step(tmp_path):
    flags = "--requests=4", "--policy=orca", "--wall", f"--out={tmp_path}", "--nproc=2"
    done = run("serve_compare.py", *flags)
    assert done.returncode == 0, done.stderr
    everything = json.loads((tmp_path / "serve_compare.json").read_text())
    assert everything["a_seconds"] > 0
    assert 0 <= everything["fit_error"] < 5
    virtual, wall = everything["rows"]
    assert (virtual["clock"], wall["clock"]) == ("virtual", "wall")
    assert virtual["generated"] == wall["generated"]
    assert wall["seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--policy=static,vlm"], "no policy 'vlm' (--policy); give, separated by commas, static"),
        (["--policy="], "no policy is given (--policy); give one of static, orca,"),
        (["--blocks=19"], "the longest text of the trace has 305 tokens, and the cache has room "
         "for 304: 19 blocks of 16 (--blocks); give --blocks 20 or more"),
        (["--cost=fast"], "no cost 'fast' (--cost); give the milliseconds"),
        (["--cost=-1,2"], "no cost '-1,2' (--cost)"),
        (["--size=small", "--checkpoint=."], "checkpoint and size small are two models"),
        (["--checkpoint=nowhere"], "there is no folder 'nowhere' (--checkpoint)"),
        (["--mesh=dp=2", "--nproc=2"], "mesh axis 'dp' does not split a model"),
        (["--mesh=tp=2"], "mesh tp=2 needs several processes"),
        (["--blocks=999999999"], "a cache of 999,999,999 blocks of 16 tokens takes"),
        (["--gap=-1"], "gap cannot be -1.0 (--gap)"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_line(flags, line):
    assert line in refusal("serve_compare.py", *flags)
