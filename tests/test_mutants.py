"""The mutants of tests/nightly/mutants.py: each is one wrong line, and the sample is spread."""

from collections import Counter

import mutants
import pytest

SOURCE = '''
def finish(self, last):
    """Wait, and sum."""
    pending.wait()
    p.grad = all_reduce_into(p.grad, self.axis).wait()
    if last and start < stop:
        assert start >= 0, "not broken"
        raise UserError(f"rows {start} to {stop - 1}")
    other = self.replicate
    return rows[start:stop]
'''
ALL = mutants.all_mutants()


@pytest.mark.parametrize(
    ("rule", "line", "new"),
    [
        ("drop a wait", 4, "pass"),
        ("drop a sum", 5, "p.grad = p.grad"),
        (
            "sum becomes max",
            5,
            "p.grad = all_reduce_into(p.grad, self.axis, 'max').wait()",
        ),
        (
            "swap an axis",
            5,
            "p.grad = all_reduce_into(p.grad, self.replicate).wait()",
        ),
        ("drop last", 6, "if True and start < stop:"),
        ("half a condition", 6, "if (start < stop):"),
        ("other comparison", 6, "if last and start <= stop:"),
        ("off by one", 10, "return rows[start:(stop) - 1]"),
    ],
)
def test_a_rule_breaks_one_line(rule, line, new):
    made = [m for m in mutants.mutants_of("x.py", SOURCE) if (m.rule, m.line) == (rule, line)]
    assert new in [m.new.strip() for m in made]


def test_messages_and_asserts_are_not_broken():
    assert not {m.line for m in mutants.mutants_of("x.py", SOURCE)} & {3, 7, 8}


@pytest.mark.slow
def test_the_sample_has_every_rule_and_most_files_and_is_the_same_each_time():
    chosen = mutants.sample(ALL, 200, seed=0)
    assert chosen == mutants.sample(ALL, 200, seed=0)
    assert {m.rule for m in chosen} == set(mutants.RULES)
    assert max(Counter(m.path for m in chosen).values()) <= 6
    assert len({m.path for m in chosen}) > 80
    assert {m.path.split("/")[0] for m in chosen} == set(mutants.FOLDERS)


@pytest.mark.slow
def test_a_mutant_is_killed_by_a_test_that_fails_and_the_copy_is_mended(tmp_path):
    (tmp_path / "dist_lab").mkdir()
    source = "def double(x):\n    return x * 2\n"
    (tmp_path / "dist_lab" / "a.py").write_text(source)
    (tmp_path / "tests").mkdir()
    test = "from dist_lab.a import double\ndef test_it(): assert double({}) == {}\n"
    outcomes = []
    for sees in ("3", "0"):
        (tmp_path / "tests" / "test_a.py").write_text(test.format(sees, 2 * int(sees)))
        (mutant,) = (m for m in mutants.mutants_of("a.py", source) if m.new.endswith("x * 3"))
        outcomes.append(mutants.run(mutant, tmp_path, ["tests/test_a.py"], "survived"))
    assert [outcome.verdict for outcome in outcomes] == ["killed", "survived"]
    assert outcomes[0].by == "FAILED tests/test_a.py::test_it - assert 9 == 6"
    assert (tmp_path / "dist_lab" / "a.py").read_text() == source


def test_a_mutant_that_is_said_to_make_no_difference_still_exists():
    kinds = {mutant.kind for mutant in ALL}
    assert mutants.EQUIVALENT.keys() <= kinds
