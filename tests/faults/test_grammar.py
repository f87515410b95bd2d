"""The language of --fault."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lab import faults
from dist_lab.errors import UserError
from dist_lab.faults.grammar import KINDS, PHASES, Fault, faults_of, read_spec
from dist_lab.programs.cli.checks import parse


def refusal(spec: str, *sizes: int) -> str:
    with pytest.raises(UserError) as caught:
        faults_of(read_spec(spec, "--fault"), *(sizes or (4, 10, 5)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fault_names_its_rank_and_step_and_maybe_the_event():
    spec = " kill:rank=2@step=7,phase=backward,op=3; nan:rank=0@step=1 ;stop:rank=1,step=10;"
    assert faults_of(spec, 4, 10) == [
        Fault("kill", 2, 7, "backward", 3),
        Fault("nan", 0, 1, "backward", 1),
        Fault("stop", 1, 10, "forward", 1),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_as_text_is_read_as_the_same_fault(kind):
    for phase in KINDS[kind].phases:
        fault = Fault(kind, 1, 5, phase, 2)
        assert faults_of(str(fault), 2, 5, 5) == [fault]


def test_random_faults_are_the_same_for_the_same_seed_on_every_rank_and_machine():
    drawn = faults_of("random:n=200,seed=7", 4, 10, 5)
    code = (
        "import json; from dist_lab.faults.grammar import faults_of;"
        "print(json.dumps([str(f) for f in faults_of('random:n=200,seed=7', 4, 10, 5)]))"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert json.loads(again) == [str(fault) for fault in drawn]
    assert drawn != faults_of("random:n=200,seed=8", 4, 10, 5)
    assert {fault.kind for fault in drawn} == {"kill"}
    assert {fault.rank for fault in drawn} == {0, 1, 2, 3}
    assert {fault.step for fault in drawn} == set(range(1, 11))
    assert {fault.phase for fault in drawn} == set(PHASES)
    assert {fault.step for fault in drawn if fault.phase == "save"} == {5, 10}
    assert [fault.step for fault in drawn] == sorted(fault.step for fault in drawn)


def test_random_faults_are_in_a_save_only_if_there_are_saves():
    assert "save" not in {f.phase for f in faults_of("random:n=50,seed=1", 2, 4)}
    assert {f.kind for f in faults_of("random:n=5,seed=1,kind=exc", 2, 4)} == {"exc"}


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("kil:rank=1@step=2", "no kind 'kil' (--fault); give kill, segv"),
        ("kill", "'' is not of the form key=value, or unknown (--fault)"),
        ("kill:rank=1", "step is missing (--fault)"),
        ("random:n=3", "seed is missing (--fault)"),
        ("kill:rank=1@step=2,rank=2", "'rank=2' is twice (--fault)"),
        ("kill:rank=1@step=2,when=now", "'when=now' is not of the form key=value, or unknown"),
        ("kill:rank=-1@step=2", "rank cannot be '-1' (--fault); give a whole number from 0"),
        ("kill:rank=1@step=0", "step cannot be '0' (--fault); give a whole number from 1"),
        ("kill:rank=1@step=²", "step cannot be '²'"),
        ("kill:rank=1@step=99999999999999999999", "step cannot be '99999999999999999999'"),
        ("random:n=0,seed=1", "n cannot be '0' (--fault); give a whole number from 1 to 10000"),
        ("kill:rank=1@step=2,phase=forwards", "(did you mean forward?)"),
        ("nan:rank=1@step=2,phase=forward", "no phase 'forward' of nan (--fault); give backward,"),
        ("kill:rank=9@step=5", "there is no rank 9, ranks are 0 to 3 (--fault); give another rank"),
        (
            "kill:rank=3@step=11",
            "the run has 10 steps (--fault, --steps); give a step from 1 to 10",
        ),
        ("kill:rank=1@step=7,phase=save", "no checkpoint is saved after step 7, only every 5"),
        ("diskfull:rank=1@step=3", "(--fault, --save-every); give step=5"),
    ],
)
def test_a_fault_that_is_misspelled_or_cannot_happen_is_one_line(spec, line):
    assert line in refusal(spec)


def test_a_fault_in_a_save_needs_saves():
    line = refusal("truncate:rank=1@step=3", 4, 10)
    assert line.endswith("never (--fault, --save-every); give step=3 and --save-every 3")


def test_the_flag_may_be_given_twice_and_is_checked_against_the_ranks():
    flags = "--nproc 2 --strategy dp --batch 8 --fault kill:rank=1@step=3".split()
    config = parse([*flags, "--fault", "random:n=2,seed=1"])
    assert len(config.faults(2)) == 3
    with pytest.raises(UserError, match=r"there is no rank 2, ranks are 0 to 1"):
        parse([*flags, "--fault", "kill:rank=2@step=3"])
    with pytest.raises(UserError, match=r"no kind 'kil' \(--fault\)"):
        parse([*flags, "--fault", "kil:rank=2@step=3"])


def test_settings_of_restarts_are_checked_together():
    for words, line in {
        "--resume auto": "resume auto looks for checkpoints in --out, which is not given",
        "--resume auto --out x --overwrite": "resume auto goes on with the run in --out, and",
        "--restarts 3": "restarts 3 start new ranks, which only --nproc does",
        "--keep 1": "keep 1 says which checkpoints to delete, and this run saves none (--keep)",
        "--resume=": "resume cannot be '' (--resume); give auto, a folder or auto:FOLDER",
        "--resume auto: --out x": "resume cannot be 'auto:' (--resume); give auto, a folder",
    }.items():
        with pytest.raises(UserError) as caught:
            parse(words.split())
        assert str(caught.value).startswith(line)
    assert parse("--resume autumn --overwrite".split()).resume == "autumn", "a folder"
    assert parse("--resume auto --restarts 1 --nproc 2 --strategy dp".split()).restarts == 1


def test_each_fault_of_the_lecture_can_happen_in_its_command_and_every_kind_is_there():
    text = (Path(faults.__file__).parent / "README.md").read_text()
    command = re.findall("Add the flags to `python launch/train.py ([^`]*)`", text)[0]
    kinds = set()
    for row in re.findall(r"^\| `.*@step=.*$", text, re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for spec in re.findall("`([^`]+)`", cells[0]):
            flags = " ".join(re.findall("`([^`]+)`", cells[1]))
            sizes = command.replace("--steps 12", "") if "--steps" in flags else command
            config = parse([*sizes.split(), *flags.split(), "--fault", spec])
            kinds |= {fault.kind for fault in config.faults(2)}
    assert kinds == KINDS.keys()
