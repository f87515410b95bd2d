"""explain.json of every preset and strategy is the same as before, to the byte.

baseline.json has the SHA-256 of each file. If one differs, write both files and compare them:
`python launch/explain.py ARGUMENTS --out DIR`, here and in a checkout of the commit before.
"""

import hashlib
import json
import runpy
from pathlib import Path

import pytest

from dist_lab.mesh.mesh import init_mesh
from dist_lab.programs.explain.command import explain

ROOT = Path(__file__).parents[3]
SMALL = "--batch 8 --seq 16 --microbatches 2"
OF_STRATEGIES = {
    "dp": f"--strategy dp {SMALL}",
    "ddp": f"--strategy ddp --bucket-mb 0.5 {SMALL}",
    "zero1": f"--strategy zero1 --bucket-mb 0.5 {SMALL}",
    "zero2": f"--strategy zero2 --bucket-mb 0.5 {SMALL}",
    "fsdp": f"--strategy fsdp {SMALL}",
    "fsdp, units stay gathered": f"--strategy fsdp --keep-gathered {SMALL}",
    "fsdp, one reduction": f"--strategy fsdp --defer-reduce --no-reshard-after-forward {SMALL}",
    "fsdp, in bfloat16": f"--strategy fsdp --dtype bfloat16 --reduce-dtype float32 {SMALL}",
    "fsdp, backend": f"--strategy fsdp --collectives backend {SMALL}",
    "hsdp": f"--strategy hsdp {SMALL}",
    "tp": f"--strategy tp {SMALL}",
    "tp, sequence": f"--strategy tp --sequence-parallel {SMALL}",
    "tp, regather": f"--strategy tp --sequence-parallel --regather {SMALL}",
    "pp, gpipe": "--strategy pp --schedule gpipe --batch 8 --seq 16",
    "pp, 1f1b": "--strategy pp --schedule 1f1b --batch 8 --seq 16",
    "pp, interleaved": "--strategy pp --schedule interleaved --layers 8 --batch 8 --seq 16",
    "pp, zb": "--strategy pp --schedule zb --batch 8 --seq 16",
    "pp, zbv": "--strategy pp --schedule zbv --layers 8 --batch 8 --seq 16",
}
OF_PRESETS = {
    path.stem: f"--config {path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.toml")
}
CASES = {**OF_STRATEGIES, **dict(sorted(OF_PRESETS.items()))}
WANTED = ROOT / "tests/programs/explain/baseline.json"


def digest(arguments, folder):
    read = runpy.run_path(str(ROOT / "launch/explain.py"))["read"]
    assert explain(read([*arguments.split(), "--out", str(folder)]), init_mesh()) == 0
    return hashlib.sha256((folder / "explain.json").read_bytes()).hexdigest()


USUAL = ("fsdp, backend",)
IN_SLOW = (
    "pp, 1f1b",
    "ddp", "zero2", "fsdp, one reduction", "fsdp, in bfloat16", "hsdp", "tp, sequence",
    "pp, zbv", "10_less_memory", "13_resnet", "17_fsdp_tp", "19_pp_zero1", "22_all_axes",
)  # fmt: skip


def marked(case):
    if case in USUAL:
        return case
    return pytest.param(case, marks=pytest.mark.slow if case in IN_SLOW else pytest.mark.nightly)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_explain_json_is_the_same_as_before_to_the_byte(case, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert digest(CASES[case], tmp_path) == json.loads(WANTED.read_text())[case]
