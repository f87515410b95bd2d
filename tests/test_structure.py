"""The shape of the house: who may import whom, and what appears nowhere."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dist_lab"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each file may import from the layers below its own, and within its own where that is `SELF`.
LAYERS = [
    ["errors", "hooks", "topology", "torchvision_import", "processes.ranks"],
    ["settings", "processes.failures"],
    ["zoo", "data", "loss", "parallel.pp_actions"],
    ["choices"],
    ["parallel.pp_refuse", "parallel.pp_file"],
    ["parallel.pp_timeline"],
    ["parallel.pp_check"],
    ["parallel.pp_schedules"],
    ["config"],
    ["checks"],
    ["explain_settings"],
    ["comm.algorithms", "comm.costs", "comm.shared", "comm.shared_collectives"],
    ["comm.ledger", "comm.choice", "comm.wire"],
    ["process_group"],
    ["mesh"],
    ["comm.messages", "comm.calls", "comm.into", "comm.coalesced"],
    ["comm.ops", "comm.autograd", "comm.agree", "comm.scratch"],
    ["layout", "offload"],
    ["gather"],
    ["recompute"],
    ["precision"],
    ["parallel.sync"],
    ["step"],
    ["unit"],
    ["meta", "runner", "pipeline_runner"],
    ["parallel"],
    ["buffers"],
    ["job"],
    ["compose"],
    ["parity_report", "observe"],
    ["meter"],
    ["train", "parity"],
    ["commands", "processes.pool", "launcher"],
    ["explain_dry_run"],
    ["explain_file", "explain_tables"],
    ["explain"],
    ["testing", "compare"],
    ["bench"],
]
TALK_TO_TORCH_DISTRIBUTED = {"mesh", "process_group", "launcher"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> int:
    found = [
        i
        for i, names in enumerate(LAYERS)
        for n in names
        if module == n or module.startswith(n + ".")
    ]
    assert found, f"{module} is in no layer: give it a place in LAYERS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Modules of ours, and torch.distributed's, that a file imports at run time or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=module_of)
def test_a_file_imports_only_what_lies_below_it(path):
    mine = module_of(path)
    for name in imports(path):
        if name.startswith("dist_lab."):
            theirs = name.removeprefix("dist_lab.")
            same_family = theirs.split(".")[0] == mine.split(".")[0]
            assert layer(theirs) < layer(mine) or (same_family and layer(theirs) == layer(mine)), (
                f"{mine} imports {theirs}, which does not lie below it"
            )


def test_the_models_know_nothing_of_the_rest():
    for path in (PACKAGE / "zoo").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("dist_lab")}
        ours -= {"dist_lab.torchvision_import.fix_torchvision"}  # of installing, not of training
        assert all(name.startswith("dist_lab.zoo") for name in ours), (path, ours)


SHARED_PARTS = {
    "buckets", "pp_actions", "pp_check", "pp_cut", "pp_file", "pp_refuse", "pp_schedules",
    "pp_stages", "pp_timeline", "pp_trace", "residual", "shards",
    "split_backward", "split_linear", "sync", "tp_plan", "vocabulary", "wrapped",
}  # fmt: skip


def test_strategies_do_not_know_each_other():
    for path in (PACKAGE / "parallel").glob("*.py"):
        ours = {n.split(".")[2] for n in imports(path) if n.startswith("dist_lab.parallel.")}
        assert ours <= SHARED_PARTS, (path.name, ours)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_communication_code_talks_to_torch_distributed(path):
    talks = any(name.startswith("torch.distributed") for name in imports(path))
    module = module_of(path)
    twin = module.startswith("parallel.") and module.endswith(("_torch", "_accelerate"))
    allowed = module in TALK_TO_TORCH_DISTRIBUTED or module.startswith("comm") or twin
    assert allowed or not talks


def test_import_dist_lab_and_its_configuration_cost_no_torch():
    code = (
        "import sys, dist_lab, dist_lab.checks, dist_lab.launcher, dist_lab.testing;"
        "import dist_lab.data.corpus; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_torchvision_is_importable_once_it_is_fixed():
    code = (
        "import dist_lab, sys; dist_lab.fix_torchvision(); dist_lab.fix_torchvision();"
        "assert 'torchvision' not in sys.modules;"
        "import torchvision, torch;"
        "print(torchvision.models.resnet18(num_classes=3)(torch.ones(2, 3, 64, 64)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([2, 3])\n", done.stderr


@pytest.mark.parametrize("compiled", ["absent", "loads", "does not load"])
def test_only_a_torchvision_whose_compiled_part_does_not_load_is_fixed(tmp_path, compiled):
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text("loads = globals().get('loads', 0) + 1\n")
    if compiled == "loads":
        lib = Path(find_spec("torch").origin).parent / "lib"
        (fake / "_C.so").symlink_to(next(lib.glob("libc10.*")))
    elif compiled == "does not load":
        (fake / "_C.so").write_text("built against another torch")
    code = (
        "import dist_lab; dist_lab.fix_torchvision(); import torch, torchvision, sys;"
        "declared = getattr(torch.ops.torchvision, 'nms', None) is not None;"
        "assert torchvision.loads == 1; print(declared)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{compiled == 'does not load'}\n", done.stderr


def test_without_torchvision_there_is_nothing_to_fix():
    code = "import dist_lab, sys; sys.modules['torchvision'] = None; dist_lab.fix_torchvision()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_dist_lab_changes_nothing_in_the_process():
    code = (
        "import sys; state = lambda: (list(sys.meta_path), list(sys.path), list(sys.path_hooks));"
        "before = state(); import dist_lab, dist_lab.config, dist_lab.data, dist_lab.zoo;"
        "assert state() == before, state()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_top_level_holds_what_it_should_and_no_more():
    allowed = {"dist_lab", "launch", "configs", "tests", "pyproject.toml", "README.md", "LICENSE"}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    tops = {name.split("/")[0] for name in tracked}
    assert {top for top in tops if not top.startswith(".")} <= allowed


def test_no_file_leaves_something_unwritten_loads_pickles_or_has_two_minds():
    words = ["NotImplementedError", "TODO", "torch.load(", "_object_list(", "hasattr("]
    for path in FILES:
        for word in words:
            assert word not in path.read_text(), f"{path.name}: {word}"


def test_only_what_meets_torchrun_reads_the_environment():
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text()}
    assert readers == {"launcher", "mesh", "process_group"}
