"""No rank listens off loopback, in any mode: goal R20."""

import os
import sys

import pytest
from models import axes_of, batch, build, plan_of, units_of
from processes import listening

import dist_lab
from dist_lab.mesh.mesh import init_mesh

MODES = [(mode, "hand") for mode in ("dp", "ddp", "zero2", "fsdp", "tp", "pp")]
MODES += [(mode, "torch") for mode in ("ddp", "fsdp", "tp", "pp")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("mode", "impl"), MODES)
@pytest.mark.slow_unless(lambda mode, impl: impl == "hand" and mode in ("fsdp", "pp"))
def test_a_rank_listens_on_loopback_only(mode, impl):
    before = set(listening(os.getpid()))
    mesh = init_mesh(**axes_of(mode, 2))
    job = dist_lab.parallelize(
        build(mode, "gpt"), mesh, mode, impl, units=units_of("gpt"), **plan_of(mode, "gpt", impl)
    )
    x, y = batch(0)
    job.run([(x[:4], y[:4]), (x[4:], y[4:])], lambda out, y: dist_lab.cross_entropy_sum(out, y))
    job.finish()
    addresses = set(listening(os.getpid()))
    assert addresses, "gloo's own sockets were not found"
    loopback = ("0100007F:", f"{'0' * 24}01000000:")  # 127.0.0.1 and ::1
    assert all(address.startswith(loopback) for address in addresses | before)
