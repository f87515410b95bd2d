"""Faults on purpose: each happens at its event, on its rank, once a run."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from models import axes_of, batch, build, plan_of, units_of

import dist_lab
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.comm import ops
from dist_lab.comm.context import CollectiveMismatch
from dist_lab.errors import MachineError, TrainingDiverged, UserError
from dist_lab.faults import inject
from dist_lab.faults.files import FilesWithFaults
from dist_lab.faults.grammar import Fault, faults_of
from dist_lab.faults.inject import injected
from dist_lab.layout.gather import local_part
from dist_lab.mesh.mesh import init_mesh
from dist_lab.programs.verify import batch as batches

STRATEGIES = ["dp", "ddp", "zero2", "fsdp", "tp", "pp"]
ROWS, SEQ = 8, 6


class Happened(Exception):
    """Stands for the death of a rank, in tests that look at the place where it dies."""


class Run:
    """A job in training with faults."""

    def __init__(self, strategy, spec, folder, steps=4):
        self.mesh = init_mesh(**axes_of(strategy, 2))
        self.job = dist_lab.parallelize(
            build(strategy, "gpt"), self.mesh, strategy, units=units_of("gpt"),
            **plan_of(strategy, "gpt"),
        )  # fmt: skip
        self.optimizer = self.job.optimizer(torch.optim.AdamW, lr=1e-2)
        self.faults, self.folder, self.steps = faults_of(spec, 2, steps), folder, steps
        self.losses, self.add_to_loss = [], 0.0

    def train(self):
        with injected(self.faults, self.job, self.folder) as self.injector:
            self.injector.begin(0)
            for step in range(1, self.steps + 1):
                self.take(step)
                self.injector.tick(step)

    def take(self, step):
        data = self.mesh.data
        own = batches.slice_rows(batch(step, ROWS, SEQ), data.size)[data.index]
        total = ROWS * SEQ
        pairs = batches.slice_rows(own, 2)
        more = self.add_to_loss
        loss = self.job.run(pairs, lambda out, y: dist_lab.cross_entropy_sum(out, y) / total + more)
        self.job.finish()
        norm = self.job.clip_grad_norm(1.0)
        self.job.check_finite(step, loss, norm)
        self.optimizer.step()
        self.job.after_step()
        self.optimizer.zero_grad()
        self.losses.append(loss)


def happened(folder):
    path = folder / inject.FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["fault"] for line in lines]


# --- where a rank dies ----------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow_unless(lambda strategy: strategy == "pp")
def test_a_rank_dies_at_the_event_that_is_asked_for(strategy, tmp_path):
    """All ranks are asked to die there, so that none waits for another."""
    for phase, op, phases in [
        ("forward", 1, {"start", "forward", "after_step"}), ("backward", 3, {"backward"}),
        ("reduce", 1, {"finish"}), ("optimizer", 2, {"clip", "loss", "finish"}),
    ]:  # fmt: skip
        spec = ";".join(f"kill:rank={r}@step=2,phase={phase},op={op}" for r in (0, 1))
        run = Run(strategy, spec, tmp_path / phase)
        run.folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:

            def die(run=run):
                raise Happened(run.mesh.comm.phase)

            patch.setattr(inject, "ENDS", {"kill": die})
            with pytest.raises(Happened) as caught:
                run.train()
        assert len(run.losses) == 1, "step 1 has ended, step 2 has not"
        assert phase == "optimizer" or str(caught.value) in phases, phase
        stepped = any(bool(state) for state in run.optimizer.state.values())
        assert stepped, "in step 1"
        assert set(happened(run.folder)) <= set(map(str, run.faults))
        assert str(run.faults[run.mesh.rank]) in happened(run.folder)


@pytest.mark.ranks(2)
def test_a_fault_happens_once_a_run_and_others_still_happen(tmp_path):
    spec = "exc:rank=0@step=2;exc:rank=1@step=2;exc:rank=0@step=3;exc:rank=1@step=3"
    for attempt in (1, 2):
        with pytest.raises(RuntimeError, match=r"a fault on purpose \(--fault\)"):
            Run("ddp", spec, tmp_path).train()
        own = [f for f in happened(tmp_path) if f"rank={torch.distributed.get_rank()}" in f]
        assert len(own) == attempt
    again = Run("ddp", spec, tmp_path)
    again.train()
    assert len(again.losses) == 4


def test_a_run_that_resumes_with_another_fault_has_it(tmp_path):
    """It had the number of the one that had happened. A line may be cut off by a full disk."""
    (tmp_path / inject.FILE).write_text('{"number": 0, "fault": "exc:ra')
    job = SimpleNamespace(mesh=SimpleNamespace(rank=0, world=None))
    for step in (2, 3):
        faults = faults_of(f"slow:rank=0@step={step}", 1, 4)
        for is_due in (True, False):
            injector = inject.Injector(faults, job, tmp_path / inject.FILE)
            assert [*injector.faults.values()] == (faults if is_due else [])
            if is_due:
                injector.happen(0, faults[0])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow_unless(lambda strategy: strategy == "fsdp")
def test_faults_that_do_not_happen_change_nothing_and_are_refused(strategy, tmp_path):
    plain = Run(strategy, "", tmp_path)
    plain.train()
    spec = ";".join(f"kill:rank={r}@step=3,phase=backward,op=999" for r in (0, 1))
    run = Run(strategy, spec, tmp_path)
    with pytest.raises(UserError) as caught:
        run.train()
    assert run.losses == plain.losses[:3]
    events = run.injector.counts["backward", False]
    assert events >= 3
    assert str(caught.value).endswith(f"give op={events} or less")
    assert happened(tmp_path) == []
    assert all(type(link).__module__ != inject.__name__ for link in run.job.sync.links)


# --- changed tensors ------------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("phase", ["backward", "reduce"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.slow_unless(
    lambda strategy, phase, kind: (
        (strategy, phase, kind) in [("tp", "reduce", "nan"), ("ddp", "reduce", "inf")]
    )
)
def test_a_gradient_that_breaks_on_one_rank_stops_all_ranks_in_that_step(
    kind, phase, strategy, tmp_path
):
    """One element of a gradient, of another one in each step. After "reduce" it is on one rank."""
    run, messages = Run(strategy, "", tmp_path), []
    rank, world = run.mesh.rank, run.mesh.world
    with injected([], run.job, tmp_path) as injector:
        injector.begin(0)
        run.take(1)
        of_rank_1 = torch.tensor(injector.counts[phase, True] * rank)
        gradients = int(ops.all_reduce(of_rank_1, world))
        chosen = range(1, gradients + 1, 1 + gradients // 8)
        faults = {n: Fault(kind, 1, 2 + i, phase, n) for i, n in enumerate(chosen)}
        injector.faults |= faults if rank == 1 else {}
        injector.tick(1)
        for step in range(2, 2 + len(chosen)):
            with pytest.raises(TrainingDiverged, match=rf"step {step}: .* on rank 1; no") as caught:
                run.take(step)
            run.optimizer.zero_grad()
            messages.append(str(caught.value))
            injector.tick(step)
    of_all_ranks = ops.all_gather_bytes(json.dumps(messages).encode(), world)
    assert of_all_ranks[0] == of_all_ranks[1]
    names = {re.search("gradient of ([^ ]+) on", message)[1] for message in messages}
    assert len(names) >= 4, "gradients of two micro-batches have one name"
    assert all(local_part(p).isfinite().all() for p in run.job.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow_unless(lambda strategy: strategy == "tp")
def test_a_loss_that_is_nan_on_one_rank_stops_all_ranks_in_that_step(strategy, tmp_path):
    """Its gradients are finite: under tp nothing else tells the other rank."""
    run = Run(strategy, "", tmp_path)
    run.add_to_loss = float("nan") if run.mesh.rank == 1 else 0.0
    with pytest.raises(TrainingDiverged, match=r"step 1: loss nan, .* all gradients are finite"):
        run.take(1)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.slow_unless(lambda strategy: strategy in ("fsdp", "tp"))
def test_ranks_agree_with_one_byte_if_the_norm_is_not_a_sum_over_all_of_them(strategy, tmp_path):
    run = Run(strategy, "", tmp_path)
    with run.mesh.comm.ledger.recording() as calls:
        run.job.check_finite(1, 0.5, 0.5)
    sent = [call.payload for call in calls]
    assert sent == ([] if strategy in ("zero2", "fsdp", "pp") else [1])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp", "tp", "pp"])
@pytest.mark.parametrize("phase", ["backward", "reduce", "optimizer"])
@pytest.mark.slow_unless(lambda strategy, phase: (strategy, phase) == ("ddp", "reduce"))
def test_a_flipped_bit_changes_one_number_a_little(strategy, phase, tmp_path):
    plain = Run(strategy, "", tmp_path)
    plain.train()
    run = Run(strategy, f"flip:rank=1@step=2,phase={phase},op=3", tmp_path)
    run.train()
    assert happened(tmp_path) == [f"flip:rank=1@step=2,phase={phase},op=3"]
    assert run.losses[:2] == plain.losses[:2]
    assert run.losses[2:] != plain.losses[2:]
    assert run.losses == pytest.approx(plain.losses, abs=0.1)


def test_a_bit_of_one_element_is_flipped_and_flipped_back():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.ones(3, 5, dtype=dtype)
        inject.flip_a_bit(x)
        assert (x != 1).sum() == 1
        assert abs(float(x.sum()) - 15) < 0.5
        inject.flip_a_bit(x)
        assert (x == 1).all()


# --- the others -----------------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.slow_unless(lambda phase: phase == "backward")
@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_a_collective_that_no_other_rank_launches_is_found_by_the_order_check(phase, tmp_path):
    run = Run("ddp", f"mismatch:rank=1@step=2,phase={phase}", tmp_path)
    run.mesh.comm.check = True
    with pytest.raises(CollectiveMismatch, match=r"the ranks of dp disagree"):
        run.train()
    assert len(run.losses) == 1 or phase == "optimizer"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_slow_rank_takes_about_twice_as_long_for_twenty_steps(tmp_path):
    run = Run("ddp", "slow:rank=1@step=1", tmp_path, steps=23)
    slept = []
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(sleep=slept.append, perf_counter=time.perf_counter, time=time.time)
        patch.setattr(inject, "time", clock)
        run.train()
    assert len(slept) == (inject.SLOW_STEPS - 1 if run.mesh.rank == 1 else 0)
    assert all(0 < seconds < 1 for seconds in slept)


@pytest.mark.ranks(2)
def test_a_full_disk_and_a_torn_file_are_found(tmp_path):
    torn_at = [Fault("truncate", 0, step, "save", 1) for step in (5, 7)]
    faults = [Fault("diskfull", 1, 3, "save", 1), *torn_at]
    run = Run("fsdp", "", tmp_path)
    with injected(faults, run.job, tmp_path) as injector:
        saver = run.job.saver(tmp_path / "saves", in_background=False, files=injector.files)
        with pytest.raises(MachineError, match="no space left for a checkpoint"):
            saver.save(run.optimizer, step=3)
        torn = saver.save(run.optimizer, step=5)
        saver.keep = 1
        with pytest.raises(MachineError, match="step-00000007 was read again after the save, and"):
            saver.save(run.optimizer, step=7)
    assert torn.is_dir(), "an older checkpoint was deleted for one that is damaged"
    assert len(happened(tmp_path)) == 3
    with pytest.raises(MachineError, match=r"rank-0\.\w+' has [\d,]+ bytes, and had [\d,]+ when"):
        Checkpoint.open(torn).verify()


def test_operations_are_counted_for_each_checkpoint(tmp_path):
    log = []
    faults = {0: Fault("kill", 0, 2, "save", 2), 1: Fault("kill", 0, 4, "save", 3)}
    files = FilesWithFaults(faults, lambda number, fault: log.append(number))
    for step in (2, 3, 4):
        folder = tmp_path / f"step-{step:08}.tmp-1a2b3c4d"
        files.make_folder(folder)
        with files.create(folder / "rank-0.json") as file:
            assert log == [0] * (step > 1)
            files.write(file, memoryview(b"{}"))
        files.sync_folder(tmp_path)
    assert log == [0, 1]


@pytest.mark.slow
def test_a_rank_that_holds_the_gil_stops_all_threads_of_its_process(monkeypatch):
    monkeypatch.setattr(inject, "FOR_EVER", 1.0)
    began = time.monotonic()
    inject.sleep_with_the_gil()
    assert time.monotonic() - began > 0.9
