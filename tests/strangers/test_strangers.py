"""Each situation under every strategy: exact, or refused with the expected one-line message.

In float64, on ranks with different rows. Results before a refusal are compared, too.
"""

from pathlib import Path

import pytest
import table
import torch
from situation import EVERY, SITUATIONS, Place

from dist_lab.errors import UserError
from dist_lab.programs.verify.compare import error, floor_of

table.collect()

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-9
RANKS = {"single": 1, "hsdp": 4}
NUMBERS = {name: number for number, name in enumerate(SITUATIONS)}


def copied(results):
    """Return copies of the tensors and numbers, which later steps do not change."""
    tensors = {}
    for name, value in results.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().clone()
        elif isinstance(value, float | int):
            tensors[name] = torch.tensor(value, dtype=torch.float64)
        else:
            assert value is None, f"{name} is a {type(value).__name__}"
            tensors[name] = None
    return tensors


def in_one_process(situation):
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return [copied(results) for results in situation.body(Place())]


def rows():
    """Each strategy with the number of its ranks."""
    for strategy in EVERY:
        yield pytest.param(strategy, marks=pytest.mark.ranks(RANKS.get(strategy, 2)))


@pytest.mark.slow_unless(
    lambda name, strategy: (
        strategy == "fsdp"
        and "pytorch/pytorch#" in str(SITUATIONS[name].sources)
        and NUMBERS[name] % 4 == 1
    )
)
# The other strategies share their code with these, or refuse most.
@pytest.mark.nightly_unless(
    lambda name, strategy: strategy == "fsdp" or strategy == ("ddp", "zero2")[NUMBERS[name] % 2]
)
@pytest.mark.parametrize("strategy", [*rows()])
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_situation_is_exact_or_refused_in_one_line(name, strategy, mesh):
    situation = SITUATIONS[name]
    reference = in_one_process(situation)
    assert reference, "the body yields nothing"
    torch.manual_seed(0)
    place = Place(strategy, mesh.size, mesh.rank)
    expected = situation.refused.get(strategy)
    if expected is None:
        steps = compare_each(situation.body(place), reference)
        assert steps == len(reference)
        return
    with pytest.raises(UserError, match=expected) as refused:
        compare_each(situation.body(place), reference)
    assert "\n" not in str(refused.value)


def compare_each(yields, reference):
    """Compare each yield with that of one process, and return how many there were."""
    step = 0
    for step, results in enumerate(yields, 1):
        ours, expected = copied(results), reference[step - 1]
        assert ours.keys() == expected.keys()
        floor = floor_of(expected)
        for name, tensor in expected.items():
            distance = error(ours[name], tensor, floor)
            assert distance <= TOLERANCE, f"yield {step}: {name} is off by {distance:.1e}"
    return step


def test_the_table_in_results_md_is_up_to_date():
    assert table.table() in (ROOT / "dist_lab/RESULTS.md").read_text()


def test_there_are_at_least_60_situations_and_25_of_them_were_reported():
    assert len(SITUATIONS) >= 60
    assert sum(bool(situation.sources) for situation in SITUATIONS.values()) >= 25
