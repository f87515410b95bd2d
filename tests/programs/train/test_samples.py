"""launch/train.py --log-samples, and --data with a map-style Dataset, as a user starts them."""

import json
from pathlib import Path

import pytest
from programs import refusal, run

from dist_lab.observe.sample_log import Proof, prove

SMALL = "--size tiny --layers 1 --batch 8 --seq 32 --steps 8".split()
DATASET = """
import torch
class Sentences(torch.utils.data.Dataset):
    vocab = 30
    def __len__(self):
        return 20
    def __getitem__(self, index):
        tokens = torch.arange(index, index + 33) % 30
        return tokens[:-1], tokens[1:]
def words(batch, seq, seed):
    return Sentences(), Sentences()
class Unnumbered:
    name, vocab, sha256, validation_batches = "mine", 30, "", 0
    def batch(self, step, rows):
        rows = torch.arange(8)[rows, None] + torch.arange(33)
        return rows[:, :-1] % 30, rows[:, 1:] % 30
    validation = batch
def unnumbered(batch, seq, seed):
    return Unnumbered()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Returns flags for the data of mine.py, which the ranks find on their path."""
    (tmp_path / "mine_of_samples.py").write_text(DATASET)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: ["--data", f"mine_of_samples:{name}"]


@pytest.mark.slow
@pytest.mark.nightly_unless(lambda mesh: "tp" in mesh)
@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_a_run_logs_the_samples_of_each_rank_and_they_are_proved_whole(mesh, tmp_path, mine):
    ranks = 2 * mesh.count("=")
    layout = f"--mesh {mesh} --nproc {ranks} --log-samples --out".split()
    done = run("train.py", *SMALL, *layout, tmp_path / "run", *mine("words"))
    assert done.returncode == 0, done.stderr
    assert prove(tmp_path / "run") == Proof(range(1, 9), 20, whole_epochs=3, read=64)
    assert len(list((tmp_path / "run").glob("samples-rank*.jsonl"))) == ranks
    assert lines_of(tmp_path / "run", ranks - 1)[0]["data_rank"] == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["name"] == "mine_of_samples:words"
    assert summary["final_val_loss"] is not None


@pytest.mark.slow
def test_each_sample_occurs_once_per_epoch_also_if_the_ranks_change_in_mid_epoch(tmp_path, mine):
    """4 -> 2 -> 3 -> 1 ranks. The second run is ended after its last checkpoint, in step 8."""
    flags = [*SMALL[:2], *"--layers 1 --batch 12 --seq 32 --log-samples --val-every 0".split()]
    flags += [*"--save-every 2 --resume auto --out".split(), tmp_path / "run", *mine("words")]
    for ranks, steps, fault in ((4, 4, ""), (2, 9, "exit:rank=1@step=8"), (3, 10, ""), (1, 15, "")):
        layout = ["--strategy", "fsdp", "--nproc", ranks] if ranks > 1 else ["--strategy", "single"]
        ending = ["--fault", fault] if fault else []
        done = run("train.py", *flags, *layout, "--steps", steps, *ending)
        assert (done.returncode == 0) == (not fault), done.stderr
    logs = [lines_of(tmp_path / "run", rank) for rank in range(4)]
    assert [[line["step"] for line in log][-1] for log in logs] == [15, 10, 10, 4]
    # 15 steps of 12 are 9 epochs of 20: no epoch ends where the ranks change.
    assert prove(tmp_path / "run") == Proof(range(1, 16), 20, whole_epochs=9, read=180)


def lines_of(folder, rank):
    lines = (folder / f"samples-rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_data_without_numbers_is_refused_before_the_folder_is_made(tmp_path, mine):
    flags = [*SMALL, "--log-samples", "--out", tmp_path / "run", *mine("unnumbered")]
    line = refusal("train.py", *flags)
    assert "data 'mine' does not number its samples (--log-samples); give it a method" in line
    assert not Path(tmp_path / "run").exists()
