"""A run measured against theory: what is as computed, and a likely cause where it is not."""

import pytest
from finished_run import summary_of

from dist_lab.observe.theory import against_theory, bubbles, in_one_line
from dist_lab.parallel.schedules.library import make
from dist_lab.parallel.schedules.simulate import bubble, timeline


def checks(**changes):
    return {check.name: check for check in against_theory(summary_of(**changes))}


def test_equal_bytes_and_memory_are_as_computed():
    found = checks()
    for name in ("bytes sent", "parameters", "optimizer state"):
        assert found[name].exact, name
        assert (found[name].measured, found[name].cause) == (found[name].computed, "")


def test_a_byte_too_much_is_a_bug_and_is_called_one():
    (row, *others) = summary_of()["traffic"]
    check = checks(traffic=[row | {"sent": row["sent"] + 1}, *others])["bytes sent"]
    assert not check.exact
    assert "which is a bug" in check.cause


def test_only_what_a_run_does_not_always_have_is_an_alarm():
    (row, *others) = summary_of()["traffic"]
    found = checks(traffic=[row | {"sent": row["sent"] + 1}, *others], pipeline=IDLE)
    assert [name for name, check in found.items() if not check.as_expected] == ["bytes sent"]


def test_only_a_librarys_ranks_are_said_to_count_operations_of_others():
    assert "a library's DTensors" in checks(mfu=None, about="torch fully_shard")["MFU"].cause
    assert "busy when its peak was measured" in checks(mfu=None)["MFU"].cause


def test_a_collective_that_sends_more_than_the_published_formula_is_named():
    check = checks()["bytes against the optimum"]
    assert check.cause.startswith("gloo's reduce_scatter over fsdp runs an all_reduce inside")
    rows = [row for row in summary_of()["traffic"] if row["op"] != "reduce_scatter"]
    assert "bytes against the optimum" not in checks(traffic=rows)


IDLE = {"idle_share": 0.5, "schedule_idle_share": 0.2}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"stage_work_ms": [100.0, 300.0]}, "stages are not balanced: pp=1 works 1.5 times"),
        ({}, "8 ranks share 2 cores"),
        ({"cores": 8}, "messages take time"),
    ],
)
def test_a_pipeline_that_is_longer_idle_than_its_schedule_has_a_cause(changes, cause):
    check = checks(pipeline=IDLE, **changes)["idle pipeline"]
    assert not check.exact
    assert check.cause.startswith(cause)
    assert checks(pipeline=IDLE | {"idle_share": 0.22})["idle pipeline"].exact


def test_a_simulated_step_is_as_idle_as_its_schedule():
    schedule = make("1f1b", 4, 8)
    found = bubbles(timeline(schedule), schedule)
    assert found["idle_share"] == found["schedule_idle_share"] == bubble(schedule)


def test_the_last_line_of_a_run_is_one_line_and_says_what_is_not_as_computed():
    line = in_one_line(against_theory(summary_of()))
    assert "gradients 1.20 MB, not 1.00 MB: backward holds whole gradients until" in line
    assert line.startswith("against theory: as computed: bytes sent, parameters, optimizer state;")
    assert "MFU 35.5% of 75 GFLOP/s, not 100%: small matrices" in line
    assert "\n" not in line
    fast = in_one_line(against_theory(summary_of(mfu=0.52)))
    assert "MFU 52.0% of 75 GFLOP/s, not 100%: small matrices" in fast, "never as computed"
    nothing = summary_of(traffic=[], by_layout=None)
    assert in_one_line(against_theory(nothing)).startswith("against theory: MFU 35.5%")
