"""The shape of the house: who may import whom, and what appears nowhere."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dist_lab

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dist_lab"
FILES = sorted(PACKAGE.rglob("*.py"))

# A row is a layer: a folder, or a file where a folder is not all of one layer. Each may import from
# the layers above it in this list, and from its own folder.
LAYERS = [
    ["errors", "torch_private", "torchvision_import", "mesh.topology", "processes.ranks"],
    ["comm.by_hand.costs"],
    ["step.hooks", "transforms.init"],
    ["programs.cli.settings", "programs.cli.mesh_text"],
    ["parallel.schedules", "zoo", "data", "loss"],
    ["programs.cli.registry", "programs.cli.config", "programs.cli.checks"],
    ["mesh", "comm"],  # an axis is what is talked over: these two know each other
    ["layout"],
    ["step"],
    ["transforms"],
    ["parallel"],
    ["job"],
    ["compose"],
    ["observe"],
    ["programs"],
    ["processes"],
    ["testing"],
]
KNOW_EACH_OTHER = {"mesh", "comm"}
TALK_TO_TORCH_DISTRIBUTED = {"mesh", "comm", "processes", "testing", "torch_private"}
FREE_OF_TORCH = [
    "parallel.schedules",
    "processes",
    "programs.cli",
    "mesh.topology",
    "errors",
    "testing",
]
BUT = {"programs.cli.setup"}
STRATEGIES = {"single", "dp", "ddp", "zero", "fsdp", "tp", "pp"}
FAMILIES = {"replicated", "sharded", "tensor", "pipeline"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> int:
    """Of the row that names it, or the nearest folder that it is in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        found = [i for i, row in enumerate(LAYERS) if ".".join(parts[:length]) in row]
        if found:
            return found[0]
    raise AssertionError(f"{module} is in no layer: give it a place in LAYERS")


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
            folders = {theirs.split(".")[0], mine.split(".")[0]}
            together = len(folders) == 1 or folders == KNOW_EACH_OTHER
            assert layer(theirs) < layer(mine) or (together and layer(theirs) == layer(mine)), (
                f"{mine} imports {theirs}, which does not lie below it"
            )


def test_no_files_import_each_other_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    below = {
        mine: {
            name if name in modules else name.rpartition(".")[0]
            for name in (n.removeprefix("dist_lab.") for n in imports(path))
            if name in modules or name.rpartition(".")[0] in modules
        }
        for mine, path in modules.items()
        if path.name != "__init__.py"
    }
    while free := {mine for mine, theirs in below.items() if not theirs & set(below)}:
        below = {mine: theirs for mine, theirs in below.items() if mine not in free}
    assert not below, f"these import each other: {', '.join(sorted(below))}"


def test_the_models_know_nothing_of_the_rest():
    for path in (PACKAGE / "zoo").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("dist_lab")}
        below = ("dist_lab.zoo.", "dist_lab.transforms.init.", "dist_lab.torchvision_import.")
        assert all(name.startswith(below) for name in ours), (path, ours)


def test_families_of_strategies_do_not_know_each_other():
    for path in (PACKAGE / "parallel").glob("*/*.py"):
        for name in imports(path):
            _, folder, family = [*name.split("."), "", ""][:3]
            assert folder != "parallel" or family not in FAMILIES - {path.parent.name}, (path, name)


def test_strategies_do_not_know_each_other():
    twins = ("_torch", "_accelerate")
    for path in (PACKAGE / "parallel").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["dist_lab", "parallel"] and len(parts) > 3:
                assert parts[3] not in STRATEGIES, (path, name)
                assert not parts[3].endswith(twins), (path, name)
    assert {path.stem for path in (PACKAGE / "parallel").glob("*/*.py")} >= STRATEGIES


def test_programs_share_the_command_line_and_the_loop_alone():
    for path in (PACKAGE / "programs").glob("*/*.py"):
        mine = path.parent.name
        shared = {
            "cli": set(), "train": {"cli"},
            "bench": {"cli", "compare"}, "doctor": {"cli", "verify"},
        }.get(mine, {"cli", "train"})  # fmt: skip
        theirs = {n.split(".")[2] for n in imports(path) if n.startswith("dist_lab.programs.")}
        assert theirs <= shared | {mine}, (path, theirs)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_communication_code_talks_to_torch_distributed(path):
    talks = any(name.startswith("torch.distributed") for name in imports(path))
    module = module_of(path)
    twin = module.startswith("parallel.") and module.endswith(("_torch", "_accelerate"))
    assert module.split(".")[0] in TALK_TO_TORCH_DISTRIBUTED or twin or not talks


def test_import_dist_lab_and_what_is_free_of_torch_cost_no_torch():
    free = [
        module
        for module in map(module_of, FILES)
        if f"{module}.".startswith(tuple(f"{folder}." for folder in FREE_OF_TORCH))
        and module not in BUT
    ]
    settings = [module for module in map(module_of, FILES) if module.endswith(".settings")]
    modules = ", ".join(f"dist_lab.{module}" for module in [*free, *settings, "data.corpus"])
    code = f"import sys, dist_lab, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_public_name_is_no_module_of_ours_and_stays_what_it_is():
    """Whoever imports a package `dist_lab.verify` overwrites the function of that name."""
    first = {name: getattr(dist_lab, name) for name in dist_lab.__all__}
    assert not set(first) & {path.stem for path in PACKAGE.iterdir()}
    for name, what in first.items():
        assert callable(what), name
        assert getattr(dist_lab, name) is what


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_without_torchvision_there_is_nothing_to_fix():
    code = "import dist_lab, sys; sys.modules['torchvision'] = None; dist_lab.fix_torchvision()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_dist_lab_changes_nothing_in_the_process():
    code = (
        "import sys; state = lambda: (list(sys.meta_path), list(sys.path), list(sys.path_hooks));"
        "before = state(); import dist_lab, dist_lab.data, dist_lab.zoo;"
        "import dist_lab.programs.cli.config;"
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


# Private by their first letter, and used for all that.
PRIVATE = {
    # where a module keeps, by name, what is its own: it is written there, and not only read
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_pre_hooks",
    "_version",  # of a tensor, which torch documents: whether it has been changed in place
    "_scaled_dot_product_flash_attention_for_cpu",  # names of operators, as programs print them
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_shared_state",  # accelerate's, in its twin alone
    "_getframe", "_exit",  # Python's
}  # fmt: skip


def test_what_the_library_refuses_names_parameters_and_no_flags():
    """A script has no command line; the launcher translates, see `in_flags`."""
    of_programs = {"programs", "processes", "observe", "testing"}
    of_others = {"--nproc_per_node", "--force-reinstall"}  # torchrun's, and pip's
    of_others |= {"--debug"}  # a launcher's, which hides the traceback that a script shows
    found = []
    for path in FILES:
        if module_of(path).split(".")[0] in of_programs:
            continue
        tree = ast.parse(path.read_text())
        for raised in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            words = [
                node.value
                for node in ast.walk(raised)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(words))
            found += [(module_of(path), f) for f in flags if f not in of_others]
    assert not found


def test_private_names_of_torch_stand_in_one_file():
    trees = {path: list(ast.walk(ast.parse(path.read_text()))) for path in FILES}
    del trees[PACKAGE / "torch_private.py"]
    own = set()  # what this package defines
    for node in (node for tree in trees.values() for node in tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    for path, tree in trees.items():
        used = [node.attr for node in tree if isinstance(node, ast.Attribute)]
        used += [n for name in imports(path) if name.startswith("torch.") for n in name.split(".")]
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        assert private <= own | PRIVATE, (path, private - own - PRIVATE)


def test_only_what_meets_torchrun_reads_the_environment():
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text()}
    assert readers == {"processes.launcher", "mesh.mesh", "mesh.groups"}


def test_every_promise_to_a_users_module_names_a_test_that_is_there():
    there = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    rows = [
        line.strip("|").split("|")[-1]
        for line in (PACKAGE / "step/README.md").read_text().splitlines()
        if "`test_" in line
    ]
    assert len(rows) > 25
    for row in rows:
        assert set(re.findall(r"`(\w+)`", row)) <= there, row


# --- what there is to read ------------------------------------------------------------------------

PATHS = [
    (cells[0], *map(int, cells[1].split("/")), re.findall(r"`([^`]+)`", cells[2]))
    for line in (PACKAGE / "README.md").read_text().splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 3
    and re.fullmatch(r"\d+ / \d+", cells[1])
]


def length(name):
    return len((PACKAGE / name).read_text().splitlines())


def test_every_strategy_has_a_reading_path():
    assert [name for name, *_ in PATHS] == ["dp", "ddp", "zero", "fsdp", "tp", "pp"]


@pytest.mark.parametrize(("strategy", "most_files", "most_lines", "files"), PATHS)
def test_a_strategy_is_read_within_its_budget(strategy, most_files, most_lines, files):
    assert len(files) == len(set(files)) <= most_files
    assert sum(map(length, files)) <= most_lines
    assert files[0].endswith(f"/{strategy}.py")
    assert "step/protocol.py" in files


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_is_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350
