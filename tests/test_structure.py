"""The structure of the package: which files may import which, and what must not appear anywhere."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import dist_lab

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dist_lab"
FILES = sorted(PACKAGE.rglob("*.py"))

# A row is a layer: folders, or single files if their folder is not all in one layer. A file may
# import from the layers above its own in this list, and from its own folder.
LAYERS = [
    ["errors", "torch_private", "torchvision_import", "mesh.topology", "processes.ranks"],
    ["faults.grammar"],
    ["comm.by_hand.costs", "comm.ledger", "step.fixed_order.order"],
    ["comm.board"],
    ["step.hooks", "transforms.init"],
    [
        "programs.cli.settings",
        "programs.cli.mesh_text",
        "programs.cli.steps",
        "programs.cli.resume",
        "programs.cli.order",
    ],
    ["parallel.schedules", "zoo", "data", "loss"],
    ["programs.cli.registry", "programs.cli.mixes"],
    [
        "programs.cli.ranks",
        "programs.cli.low_precision",
        "programs.cli.config",
        "programs.cli.checks",
    ],
    ["programs.cli.saved_settings"],
    [
        "mesh",
        "comm",
        "comm.board.join",
    ],  # these two import each other: collectives run along an axis
    ["layout"],
    ["randomness"],
    ["step"],
    [
        "transforms.recompute",
        "transforms.saved_weights",
        "transforms.operands",
        "transforms.recipe",
    ],
    ["optim"],
    ["quantize"],
    ["transforms"],
    ["sentinel", "checkpoint"],
    ["parallel"],
    ["job"],
    ["compose"],
    ["inference"],
    ["observe"],
    ["faults"],
    ["processes"],
    ["programs"],
    ["testing"],
]
IMPORT_EACH_OTHER = {"mesh", "comm"}
IMPORT_TORCH_DISTRIBUTED = {"mesh", "comm", "processes", "testing", "torch_private"}
FREE_OF_TORCH = [
    "parallel.schedules",
    "comm.board",
    "processes",
    "programs.cli",
    "programs.where",
    "programs.serve",
    "inference.line",
    "mesh.topology",
    "step.fixed_order.order",
    "faults.grammar",
    "observe.timeline.timeline",
    "observe.timeline.perfetto",
    "observe.timeline.spans",
    "errors",
    "testing",
]
EXCEPT = {"programs.cli.setup", "programs.cli.find", "programs.serve.worker", "comm.board.join"}
STRATEGIES = {"single", "dp", "ddp", "zero", "fsdp", "tp", "pp"}
FAMILIES = {"replicated", "sharded", "tensor", "pipeline"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> int:
    """Return the index of the row that names the module, or its nearest folder."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        rows = [i for i, row in enumerate(LAYERS) if ".".join(parts[:length]) in row]
        if rows:
            return rows[0]
    raise AssertionError(f"{module} is in no layer: give it a place in LAYERS")


@cache
def imports(path: Path) -> set[str]:
    """Return the full names that a file imports, at run time or for types."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=module_of)
def test_a_file_imports_only_from_lower_layers_and_its_own_folder(path):
    importer = module_of(path)
    for name in imports(path):
        if name.startswith("dist_lab."):
            imported = name.removeprefix("dist_lab.")
            folders = {imported.split(".")[0], importer.split(".")[0]}
            together = len(folders) == 1 or folders == IMPORT_EACH_OTHER
            lower, upper = layer(imported), layer(importer)
            assert lower < upper or (together and lower == upper), (
                f"{importer} imports {imported}, which is not in a lower layer"
            )


def test_there_are_no_circular_imports():
    modules = {module_of(path): path for path in FILES}
    imported_by = {
        importer: {
            name if name in modules else name.rpartition(".")[0]
            for name in (n.removeprefix("dist_lab.") for n in imports(path))
            if name in modules or name.rpartition(".")[0] in modules
        }
        for importer, path in modules.items()
        if path.name != "__init__.py"
    }
    while free := {file for file, names in imported_by.items() if not names & set(imported_by)}:
        imported_by = {file: names for file, names in imported_by.items() if file not in free}
    assert not imported_by, f"these import each other: {', '.join(sorted(imported_by))}"


def test_the_models_import_nothing_from_the_rest():
    for path in (PACKAGE / "zoo").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("dist_lab")}
        allowed = ("dist_lab.zoo.", "dist_lab.transforms.init.", "dist_lab.torchvision_import.")
        assert all(name.startswith(allowed) for name in ours), (path, ours)


def test_families_of_strategies_do_not_import_each_other():
    for path in (PACKAGE / "parallel").glob("*/*.py"):
        for name in imports(path):
            _, folder, family = [*name.split("."), "", ""][:3]
            assert folder != "parallel" or family not in FAMILIES - {path.parent.name}, (path, name)


def test_strategies_do_not_import_each_other():
    twins = ("_torch", "_accelerate")
    for path in (PACKAGE / "parallel").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["dist_lab", "parallel"] and len(parts) > 3:
                assert parts[3] not in STRATEGIES, (path, name)
                assert not parts[3].endswith(twins), (path, name)
    assert {path.stem for path in (PACKAGE / "parallel").glob("*/*.py")} >= STRATEGIES


def test_programs_share_only_the_command_line_and_the_training_loop():
    for path in (PACKAGE / "programs").glob("*/*.py"):
        program = path.parent.name
        shared = {
            "cli": set(), "train": {"cli"},
            "bench": {"cli", "compare"}, "sweep": {"cli", "compare"}, "doctor": {"cli", "verify"},
            "serve": {"cli", "generate"}, "serve_compare": {"cli", "generate"},
            "demo": {"serve"},
        }.get(program, {"cli", "train"})  # fmt: skip
        imported = {n.split(".")[2] for n in imports(path) if n.startswith("dist_lab.programs.")}
        assert imported <= shared | {program}, (path, imported)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_communication_code_imports_torch_distributed(path):
    talks = any(name.startswith("torch.distributed") for name in imports(path))
    module = module_of(path)
    twin = module.startswith("parallel.") and module.endswith(("_torch", "_accelerate"))
    folder = module.split(".")[0]
    # DCP's own writer, in one process: it communicates with nobody.
    writes = module == "checkpoint.exchange.dcp"
    assert folder in IMPORT_TORCH_DISTRIBUTED or twin or writes or not talks


def test_only_the_pytest_plugin_imports_pytest():
    """Who runs the programs need not have it: it is installed with the extra `test`."""
    for path in FILES:
        roots = {name.partition(".")[0] for name in imports(path)}
        assert module_of(path) == "testing" or not roots & {"pytest", "_pytest"}, path


def test_dist_lab_and_the_files_that_are_free_of_torch_do_not_import_torch():
    free = [
        module
        for module in map(module_of, FILES)
        if f"{module}.".startswith(tuple(f"{folder}." for folder in FREE_OF_TORCH))
        and module not in EXCEPT
    ]
    settings = [module for module in map(module_of, FILES) if module.endswith(".settings")]
    modules = ", ".join(f"dist_lab.{module}" for module in [*free, *settings, "data.corpus"])
    code = f"import sys, dist_lab, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_module_has_a_public_name_and_public_names_stay_the_same_objects():
    """Importing a module `dist_lab.verify` would overwrite the function of that name."""
    first = {name: getattr(dist_lab, name) for name in dist_lab.__all__}
    assert not set(first) & {path.stem for path in PACKAGE.iterdir()}
    for name, value in first.items():
        assert callable(value), name
        assert getattr(dist_lab, name) is value


@pytest.mark.slow
def test_torchvision_can_be_imported_after_fix_torchvision():
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
def test_only_a_torchvision_whose_compiled_library_does_not_load_is_fixed(tmp_path, compiled):
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
def test_fix_torchvision_does_nothing_without_torchvision():
    code = "import dist_lab, sys; sys.modules['torchvision'] = None; dist_lab.fix_torchvision()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_dist_lab_does_not_change_the_import_system():
    code = (
        "import sys; state = lambda: (list(sys.meta_path), list(sys.path), list(sys.path_hooks));"
        "before = state(); import dist_lab, dist_lab.data, dist_lab.zoo;"
        "import dist_lab.programs.cli.config;"
        "assert state() == before, state()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_repository_root_holds_only_the_allowed_names():
    allowed = {"dist_lab", "launch", "configs", "tests", "pyproject.toml", "README.md", "LICENSE"}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    tops = {name.split("/")[0] for name in tracked}
    assert {top for top in tops if not top.startswith(".")} <= allowed


def test_no_file_has_todos_or_uses_hasattr():
    words = ["NotImplementedError", "TODO", "hasattr("]
    for path in FILES:
        for word in words:
            assert word not in path.read_text(), f"{path.name}: {word}"


# Names with a leading underscore that files may use.
PRIVATE = {
    # the dicts of an nn.Module for its parameters, buffers and hooks, where we also write
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_pre_hooks",
    "_version",  # of a tensor, documented by torch: counts changes in place
    "_scaled_dot_product_flash_attention_for_cpu",  # names of operators, which programs print
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_shared_state",  # accelerate's, only in its twin
    "_getframe", "_exit",  # Python's
}  # fmt: skip


def test_errors_of_the_library_name_parameters_and_not_flags():
    """A script has no flags. The launcher translates parameters to flags: see `in_flags`."""
    with_flags = {"programs", "processes", "observe", "testing", "faults"}
    allowed = {"--nproc_per_node", "--force-reinstall"}  # flags of torchrun and pip
    allowed |= {"--debug"}  # a flag of the launcher, which hides the traceback that a script shows
    misplaced = []
    for path in FILES:
        if module_of(path).split(".")[0] in with_flags:
            continue
        tree = ast.parse(path.read_text())
        for raised in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            words = [
                node.value
                for node in ast.walk(raised)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(words))
            misplaced += [(module_of(path), f) for f in flags if f not in allowed]
    assert not misplaced


def test_private_names_of_torch_are_in_one_file():
    trees = {path: list(ast.walk(ast.parse(path.read_text()))) for path in FILES}
    del trees[PACKAGE / "torch_private.py"]
    defined = set()  # names that this package defines
    for node in (node for tree in trees.values() for node in tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    for path, tree in trees.items():
        used = [node.attr for node in tree if isinstance(node, ast.Attribute)]
        used += [n for name in imports(path) if name.startswith("torch.") for n in name.split(".")]
        private = {name for name in used if name.startswith("_") and not name.startswith("__")}
        assert private <= defined | PRIVATE, (path, private - defined - PRIVATE)


def test_only_the_code_for_torchrun_reads_the_environment():
    readers = {module_of(path) for path in FILES if "os.environ" in path.read_text()}
    assert readers == {"processes.launcher", "mesh.mesh", "mesh.groups"}


def test_every_promise_to_a_users_module_names_a_test_that_exists():
    tests = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    rows = [
        line.strip("|").split("|")[-1]
        for line in (PACKAGE / "step/README.md").read_text().splitlines()
        if "`test_" in line
    ]
    assert len(rows) > 25
    for row in rows:
        assert set(re.findall(r"`(\w+)`", row)) <= tests, row


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
def test_a_reading_path_is_within_its_budget(strategy, most_files, most_lines, files):
    assert len(files) == len(set(files)) <= most_files
    assert sum(map(length, files)) <= most_lines
    assert files[0].endswith(f"/{strategy}.py")
    assert "step/protocol.py" in files


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_longer_than_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


def test_files_of_tests_have_different_names():
    """pytest imports them by their names alone, because no folder of tests is a package."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
