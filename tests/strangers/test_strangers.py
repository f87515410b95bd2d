"""Each situation of the zoo under every strategy: exact, or refused by the line that is expected.

In float64, on ranks with different rows. What a body yields before it is refused is compared, too.
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
IN_SLOW = ("ddp", "zero2", "fsdp")  # the others are of the same make, or refuse most


def copied(found):
    """Tensors by name; later steps do not change them."""
    made = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            made[name] = value.detach().clone()
        elif isinstance(value, float | int):
            made[name] = torch.tensor(value, dtype=torch.float64)
        else:
            assert value is None, f"{name} is a {type(value).__name__}"
            made[name] = None
    return made


def in_one_process(situation):
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return [copied(found) for found in situation.body(Place())]


def rows():
    """Each strategy on as many ranks as it takes, and when it is tested if not always."""
    for strategy in EVERY:
        when = [] if strategy in IN_SLOW else [pytest.mark.nightly]
        yield pytest.param(strategy, marks=[pytest.mark.ranks(RANKS.get(strategy, 2)), *when])


@pytest.mark.slow_unless(
    lambda name, strategy: (
        strategy not in IN_SLOW or (strategy == "fsdp" and SITUATIONS[name].sources)
    )
)
@pytest.mark.parametrize("strategy", [*rows()])
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_stranger_is_trained_exactly_or_refused_in_a_line(name, strategy, mesh):
    situation = SITUATIONS[name]
    wanted = in_one_process(situation)
    assert wanted, "the body yields nothing"
    torch.manual_seed(0)
    place = Place(strategy, mesh.size, mesh.rank)
    expected = situation.refused.get(strategy)
    if expected is None:
        steps = compared(situation.body(place), wanted)
        assert steps == len(wanted)
        return
    with pytest.raises(UserError, match=expected) as refused:
        compared(situation.body(place), wanted)
    assert "\n" not in str(refused.value)


def compared(yields, wanted):
    """How many of the yields there were, each equal to that of one process."""
    step = 0
    for step, found in enumerate(yields, 1):
        ours, theirs = copied(found), wanted[step - 1]
        assert ours.keys() == theirs.keys()
        floor = floor_of(theirs)
        for name, tensor in theirs.items():
            distance = error(ours[name], tensor, floor)
            assert distance <= TOLERANCE, f"yield {step}: {name} is off by {distance:.1e}"
    return step


def test_the_table_of_results_says_what_is_expected_here():
    assert table.table() in (ROOT / "dist_lab/RESULTS.md").read_text()


def test_there_are_many_of_which_many_were_reported():
    assert len(SITUATIONS) >= 60
    assert sum(bool(situation.sources) for situation in SITUATIONS.values()) >= 25
