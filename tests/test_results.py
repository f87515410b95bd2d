"""The table "Checkpoints, kills and hangs" of RESULTS.md says what scripts have measured."""

import argparse
import json
import re
import sys

import evidence
from evidence import GOALS, IN_TESTS, ROOT

SCRIPTS = ROOT / "tests/nightly"


def test_the_table_is_the_one_that_the_measurements_make():
    text = evidence.RESULTS.read_text()
    made = evidence.with_table(text, evidence.FILE.read_text().splitlines())
    assert made == text, "run python tests/nightly/evidence.py"


def test_every_goal_has_a_row_and_a_script_or_a_test():
    rows = evidence.table(evidence.FILE.read_text().splitlines())
    for what in GOALS.values():
        assert re.search(rf"^\| {re.escape(what)}( \(.*\))? \| \S", rows, re.MULTILINE), what
    noted = re.compile(r'evidence\.note\(\s*[\w.]+, "(\w+)"')
    measured = {goal for path in SCRIPTS.glob("*.py") for goal in noted.findall(path.read_text())}
    assert measured == GOALS.keys() - IN_TESTS.keys()
    assert all((ROOT / path).exists() for path in IN_TESTS.values())


def test_a_script_appends_its_result_with_the_command_that_made_it(tmp_path, monkeypatch):
    parser, out = argparse.ArgumentParser(), tmp_path / "evidence.jsonl"
    evidence.add_out(parser)
    words = ["--count", "7", "--out", str(out), "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["/some/where/flips.py", *words])
    given = parser.parse_known_args(words)[0]
    for found in (6, 7):
        evidence.note(given.out, "R7", "", f"{found} of 7 found")
    evidence.note(None, "R7", "", "not asked for")
    first, last = map(json.loads, out.read_text().splitlines())
    assert first["command"] == "python tests/nightly/flips.py --count 7 --seed 1"
    assert last["measured"] in evidence.table(out.read_text().splitlines())
    assert first["measured"] not in evidence.table(out.read_text().splitlines())
