"""No rank listens off loopback, in any layout: goal R20. The launcher is in test_launcher.py."""

import os
import sys

import pytest
from processes import listening
from saved import LAYS, build, train

LOOPBACK = {"0100007F", f"{'0' * 24}01000000"}  # 127.0.0.1 and ::1, as /proc has them


def listens_while_training(rank, name):
    """The addresses on which this rank listens after two steps in a layout."""
    job, optimizer = build(LAYS[name])
    train(job, optimizer, 0, 2)
    return {address.split(":")[0] for address in listening(os.getpid())}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow_unless(lambda name: name in ("hsdp2x2", "pp2"))
@pytest.mark.parametrize("name", [name for name, lay in LAYS.items() if 1 < lay.ranks <= 4])
def test_no_rank_listens_off_loopback_in_any_layout(on_ranks, name):
    for addresses in on_ranks(LAYS[name].ranks, listens_while_training, name):
        assert addresses, "gloo's own sockets were not found"
        assert addresses <= LOOPBACK
