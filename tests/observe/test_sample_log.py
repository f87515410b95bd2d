"""The logged samples of a run, and the proof that each occurred exactly once per epoch."""

import json
from types import SimpleNamespace

import pytest

from dist_lab.data.images import Fake
from dist_lab.errors import MachineError, UserError
from dist_lab.observe.sample_log import Proof, SampleLog, prove, refuse_unnumbered

BATCH = 12


def take_steps(folder, steps, ranks, tp=1, data=None):
    """Log these steps as a run on `ranks` data ranks, each with `tp` ranks that read the same."""
    data = data or numbered()
    logs = []
    for rank in range(ranks * tp):
        index = rank // tp
        axis = SimpleNamespace(size=ranks, index=index)
        mesh = SimpleNamespace(rank=rank, size=ranks * tp, data=axis)
        share = BATCH // ranks
        rows = slice(share * index, share * (index + 1))
        logs.append(SampleLog(folder, mesh, data, rows, first=steps[0] - 1))
    for log in logs:
        for step in steps:
            log.tick(step)
        log.close(None)


def numbered(samples=23, seed=1):
    data = Fake("fake", batch=BATCH, seed=seed, validation_batches=0)
    from dist_lab.data.order import Order

    data.samples, data._order = samples, Order(samples, batch=BATCH, seed=seed)
    return data


def lines_of(folder, rank):
    lines = (folder / f"samples-rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def edit(folder, rank, change):
    """Rewrite a rank's file with `change` applied to its list of lines."""
    lines = change(lines_of(folder, rank))
    path = folder / f"samples-rank{rank}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_on_changing_numbers_of_ranks_is_proved_whole(tmp_path):
    """In Megatron-Bridge#5637 the data state of a rank was lost when there were fewer ranks."""
    take_steps(tmp_path, range(1, 6), ranks=4)
    take_steps(tmp_path, range(6, 8), ranks=2, tp=2)
    take_steps(tmp_path, range(8, 13), ranks=3)
    take_steps(tmp_path, range(13, 24), ranks=1)
    proof = prove(tmp_path)
    assert proof == Proof(range(1, 24), 23, whole_epochs=12, read=23 * 12)
    assert str(proof) == (
        "steps 1 to 23: 276 samples, each of 23 exactly once in 12 whole epochs, and at most once "
        "in those begun"
    )


def test_a_killed_run_that_resumes_on_fewer_ranks_logs_each_step_once(tmp_path):
    take_steps(tmp_path, range(1, 8), ranks=4)
    half = lines_of(tmp_path, 3)[-1]
    with (tmp_path / "samples-rank3.jsonl").open("a") as file:
        file.write(json.dumps(half | {"step": 8})[:40])  # killed while it was writing
    with pytest.raises(MachineError, match=r"samples-rank3.jsonl':8 is not a whole line"):
        prove(tmp_path)
    take_steps(tmp_path, range(6, 11), ranks=2)
    assert [lines_of(tmp_path, rank)[-1]["step"] for rank in range(4)] == [10, 10, 5, 5]
    assert prove(tmp_path).steps == range(1, 11)


def test_a_step_that_is_logged_twice_is_found(tmp_path):
    take_steps(tmp_path, range(1, 8), ranks=2)
    edit(tmp_path, 0, lambda lines: [*lines, lines[5]])
    with pytest.raises(MachineError, match=r"step 6 follows step 7 in '.*samples-rank0.jsonl'"):
        prove(tmp_path)


def test_a_cursor_that_is_restored_without_its_permutation_is_found(tmp_path):
    """As in accelerate#4195: the resumed run is at the right step of another order."""
    take_steps(tmp_path, range(1, 3), ranks=2)
    take_steps(tmp_path, range(3, 9), ranks=2, data=numbered(seed=2))
    with pytest.raises(MachineError, match=r"sample \d+ occurs twice, in steps \d and \d of epoch"):
        prove(tmp_path)


def test_a_cursor_that_is_lost_is_found(tmp_path):
    take_steps(tmp_path, range(1, 2), ranks=2)
    ids = [lines_of(tmp_path, rank)[0]["ids"] for rank in range(2)]
    for rank in range(2):
        edit(tmp_path, rank, lambda lines, r=rank: [*lines, lines[0] | {"step": 2, "ids": ids[r]}])
    with pytest.raises(MachineError, match="occurs twice, in steps 1 and 2 of epoch 0"):
        prove(tmp_path)


BROKEN = {
    "a step is missing": (lambda lines: lines[:2] + lines[3:], "logs of data ranks [1], not of"),
    "one sample is another's": (
        lambda lines: [lines[0] | {"ids": [lines[0]["ids"][1], *lines[0]["ids"][1:]]}, *lines[1:]],
        "occurs twice, in steps 1 and 1 of epoch 0",
    ),
    "an unknown sample": (
        lambda lines: [lines[0] | {"ids": [99, *lines[0]["ids"][1:]]}, *lines[1:]],
        "is not in every epoch, see",
    ),
    "the rows of another rank": (
        lambda lines: [line | {"data_rank": 1} for line in lines],
        "step 1 has other samples for one data rank in samples-rank1.jsonl and samples-rank0.jsonl",
    ),
    "of another run": (
        lambda lines: [line | {"data_ranks": 1} for line in lines],
        "logs of data ranks [0, 1], not of all 1",
    ),
    "another batch": (
        lambda lines: [*lines[:-1], lines[-1] | {"ids": lines[-1]["ids"][:-1]}],
        "has logs of several runs",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_lost_repeated_or_foreign_is_named(case, tmp_path):
    change, message = BROKEN[case]
    take_steps(tmp_path, range(1, 8), ranks=2)
    prove(tmp_path)
    edit(tmp_path, 0, change)
    with pytest.raises((MachineError, UserError)) as found:
        prove(tmp_path)
    assert message in str(found.value)


def test_steps_that_no_rank_logged_are_named(tmp_path):
    take_steps(tmp_path, [1, 2, 5], ranks=2)
    with pytest.raises(MachineError, match="step 3 is in no log of"):
        prove(tmp_path)


def test_a_log_that_begins_in_mid_epoch_proves_the_later_epochs_whole(tmp_path):
    take_steps(tmp_path, range(6, 24), ranks=2)  # the epoch of step 6 began in step 4
    assert prove(tmp_path) == Proof(range(6, 24), 23, whole_epochs=9, read=18 * 12)


def test_data_without_epochs_has_no_sample_twice(tmp_path):
    endless = SimpleNamespace(
        samples=None, sample_ids=lambda step, rows: range(step * 12, step * 12 + 12)[rows]
    )
    take_steps(tmp_path, range(1, 4), ranks=2, data=endless)
    assert str(prove(tmp_path)) == "steps 1 to 3: 36 samples, none of them twice"
    edit(tmp_path, 0, lambda lines: [*lines[:2], lines[2] | {"ids": lines[1]["ids"]}])
    with pytest.raises(MachineError, match="twice, in steps 2 and 3, and its data has no epochs"):
        prove(tmp_path)


def test_data_that_does_not_number_its_samples_and_a_folder_without_logs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data 'mine' does not number its samples \(--log-sam"):
        refuse_unnumbered(SimpleNamespace(name="mine", sample_ids=None))
    with pytest.raises(UserError, match=r"has no samples-rank\*.jsonl; train with --log-samples"):
        prove(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"cannot read or write '.*file/run': Not a directory"):
        take_steps(tmp_path / "file" / "run", [1], ranks=1)
