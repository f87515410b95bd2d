"""Checkpoints of people who do not mean well, and code that reads pickles."""

import ast
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from damage import mutated, read_all, refusal, seal

import dist_lab
from dist_lab.checkpoint import manifest
from dist_lab.checkpoint.load import load
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.errors import MachineError, UserError
from dist_lab.mesh.mesh import init_mesh

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "dist_lab").rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))

# --- no pickle is read ----------------------------------------------------------------------------

# Modules that run what they read. pickletools only lists a pickle's instructions.
RUN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Who may import pickle, and for which names.
PICKLE = {
    "testing.py": {"dumps", "loads"},  # the pytest plugin: between pytest and its own ranks
    "checkpoint/exchange/torch_file.py": {"UnpicklingError"},  # what torch raises for a bad file
}
READERS = {  # of torch and numpy, and which keyword makes each safe
    "torch.load": ("weights_only", True),
    "torch.jit.load": None, "torch.export.load": None, "torch.hub.load": None,
    "torch.package.PackageImporter": None, "dcp.load": None, "FileSystemReader": None,
}  # fmt: skip


WORDS = re.compile("|".join([*RUN, r"load\b", "_object", "allow_", "Importer", "Reader"]))


def named(node):
    """A dotted name as it is written, such as torch.jit.load; "" if it is none."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def pickles_in(tree):
    """Names of modules of RUN that a file uses: `pickle.loads`, or `loads` imported from it."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUN:
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and named(node.value).split(".")[0] in RUN:
            used.add(node.attr)
        elif isinstance(node, ast.Import):
            aliased = [a for a in node.names if a.name.split(".")[0] in RUN and a.asname]
            used |= {f"{a.name} as {a.asname}" for a in aliased}
    return used


def unsafe_calls_in(tree):
    """Calls that may run what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = named(node.func)
        last = name.rpartition(".")[2]
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if last.endswith(("_object", "_object_list")):
            yield name
        if keywords.get("allow_pickle") or (last == "load" and "yaml" in name):
            yield name
        if name in READERS or last in READERS:
            safe = READERS.get(name, READERS.get(last))
            if safe is None or keywords.get(safe[0]) is not safe[1]:
                yield name


def test_no_file_reads_a_pickle():
    for path in FILES:
        text = path.read_text()
        if not WORDS.search(text):
            continue  # parsing takes time
        tree = ast.parse(text)
        allowed = PICKLE.get(path.relative_to(ROOT).as_posix().removeprefix("dist_lab/"), set())
        assert pickles_in(tree) <= allowed, path
        assert not list(unsafe_calls_in(tree)), path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)", "from pickle import loads", "import pickle as p",
        "from dill import load", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)", "numpy.load(f, allow_pickle=True)", "yaml.load(f)",
        "dist.all_gather_object(a, b)", "dist.broadcast_object_list(a)", "dcp.load(a)",
        "torch.jit.load(f)",
    ],
)  # fmt: skip
def test_the_test_above_would_find(code):
    tree = ast.parse(code)
    assert WORDS.search(code)
    assert pickles_in(tree) or list(unsafe_calls_in(tree))


# --- checkpoints that were made to do harm --------------------------------------------------------


def small_job():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    job = dist_lab.parallelize(model, init_mesh(), "single")
    return job, job.optimizer(torch.optim.AdamW, lr=0.1)


@pytest.fixture
def checkpoint(tmp_path):
    job, optimizer = small_job()
    job.model(torch.ones(2, 3)).sum().backward()
    job.finish()
    optimizer.step()
    job.after_step()
    return job.save(tmp_path, optimizer, step=1, extra={"a": [1]})


def change(folder, name, edit, *, sealed=True):
    """Edit a table or the manifest, and make all hashes right again."""
    path = folder / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    if sealed:
        seal(folder)


@pytest.mark.parametrize("name", ["../rank-0.json", "/etc/passwd", "rank-0.json/../x", "x", "."])
def test_a_manifest_cannot_name_a_file_outside_of_its_folder(checkpoint, name):
    change(
        checkpoint, "manifest.json", lambda m: m["files"].update({name: m["files"]["rank-0.json"]})
    )
    assert f"has a wrong name {name!r}" in refusal(checkpoint)


def test_a_file_that_is_a_link_is_refused(checkpoint, tmp_path):
    shutil.move(checkpoint / "rank-0.safetensors", tmp_path / "elsewhere")
    (checkpoint / "rank-0.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "rank-0.safetensors' is a link, and links are not followed" in refusal(checkpoint)


def entry(table, name="model/0.weight"):
    return table["tensors"][name]


def options_in(table):
    return table["optimizer"]["groups"][0]["options"]


def huge(table):
    entry(table).update(shape=[10**6, 10**6], boxes=[[[0, 10**6], [0, 10**6]]])


def twice(table):
    """As many elements as the tensor has, but rows 0 and 1 twice."""
    entry(table).update(boxes=[[[0, 3], [0, 3]], [[0, 2], [0, 3]]])


def turned(table):
    entry(table).update(shape=[3, 5], boxes=[[[0, 3], [0, 5]]])


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("rank-0.json", twice, "model/0.weight has elements twice, and others not at all"),
        ("rank-0.json", turned, "it is F32[5, 3] in the file and F32[3, 5] in the table"),
        ("rank-0.json", lambda t: entry(t).update(dtype="int32"), "F32[5, 3] in the file and I32"),
        ("rank-0.json", huge, "bytes, and its tensors need 4000000000"),
        ("rank-0.json", lambda t: entry(t).update(shape=[-5, -3]), "a length of -5"),
        ("rank-0.json", lambda t: entry(t).update(shape=[2**70, 0]), "a length of so large"),
        ("rank-0.json", lambda t: entry(t).update(dtype="load"), "has a dtype that is none"),
        ("rank-0.json", lambda t: entry(t).update(more=1), "'more', 'shape'] in place of"),
        ("rank-0.json", lambda t: t.update(more=1), "'more', 'numbers'"),
        ("rank-0.json", lambda t: t.update(random={}), "in place of ['numpy', 'python', 'torch']"),
        ("rank-0.json", lambda t: options_in(t).update(params=[]), "an option 'params'"),
        ("manifest.json", lambda m: m.update(more=1), "has an unknown 'more'"),
        ("manifest.json", lambda m: m.update(mesh={"dp": 10**9}), "files for a mesh of"),
        ("manifest.json", lambda m: m.update(mesh={"dp": "x"}), "a length of 'x'"),
        ("manifest.json", lambda m: m.update(step=-1), "a length of -1"),
        ("manifest.json", lambda m: m.pop("files"), "has no right 'files'"),
    ],
)  # fmt: skip
def test_what_is_odd_is_refused_before_memory_is_taken(checkpoint, file, edit, message):
    change(checkpoint, file, edit)
    line = refusal(checkpoint)
    assert message in line
    assert "\n" not in line


def without(*keys):
    """Removes these keys of the optimizer's state: one parameter's, or with "*" all parameters'."""

    def edit(table):
        names = [n for n in table["tensors"] if n.rpartition("/")[2] in keys and "optimizer/" in n]
        for name in names if "*" in keys else names[:1]:
            del table["tensors"][name]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("exp_avg"), "has exp_avg of some parameters that AdamW has stepped and not of"),
        (without("exp_avg", "*"), "has exp_avg of some"),
        (lambda t: entry(t, "optimizer/0.weight/exp_avg").update(shape=[15], boxes=[[[0, 15]]]),
            "has exp_avg of shape (15,) for 0.weight of shape (5, 3)"),
        (lambda t: options_in(t).update(betas=None), "has betas None in group 0 of the optimizer"),
        (lambda t: options_in(t).update(lr="x"), "has lr 'x' in group 0 of the optimizer"),
        (lambda t: options_in(t).update(lr_scale="x"), "has lr_scale 'x' in group 0"),
        (lambda t: options_in(t).update(maximize=[1]), "has maximize a list in group 0"),
        (lambda t: t.update(optimizer=None), "has no state of an optimizer"),
    ],
)  # fmt: skip
def test_a_state_that_no_optimizer_can_go_on_with_is_refused_before_one_is_changed(
    checkpoint, edit, message
):
    change(checkpoint, "rank-0.json", edit)
    job, optimizer = small_job()
    with pytest.raises((UserError, MachineError)) as caught:
        load(Checkpoint.open(checkpoint), job, optimizer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not optimizer.state


@pytest.mark.parametrize("value", ["[" * 1500 + "]" * 1500, "1e400"])
def test_a_manifest_that_cannot_be_hashed_is_one_line(checkpoint, value):
    path = checkpoint / "manifest.json"
    text = re.sub(r'"extra": {[^}]*}', f'"extra": {{"a": {value}}}', path.read_text())
    path.write_text(text)
    assert "is no JSON" in refusal(checkpoint)


@pytest.mark.parametrize("number", [0, -3])
def test_a_format_that_never_was_is_refused(checkpoint, number):
    change(checkpoint, "manifest.json", lambda m: m.update(format=number))
    assert "has no right 'format'" in refusal(checkpoint)


ESCAPE = "\x1b[31m"


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("manifest.json", lambda m: m.update(strategies="\ud800")),
        ("manifest.json", lambda m: m.update(strategies=ESCAPE)),
        ("manifest.json", lambda m: m.update(mesh={ESCAPE: 1})),
        ("manifest.json", lambda m: m["versions"].update({ESCAPE: "1"})),
        ("manifest.json", lambda m: m["optimizer"].update({"class": ESCAPE})),
        ("rank-0.json", lambda t: t["tensors"].update({f"model/{ESCAPE}": entry(t)})),
        ("rank-0.json", lambda t: entry(t).update(shape=[ESCAPE])),
    ],
)
def test_names_that_steer_a_terminal_are_refused_without_printing_them(checkpoint, file, edit):
    change(checkpoint, file, edit)
    line = refusal(checkpoint)
    assert line
    assert line.isprintable()


def test_a_manifest_of_a_gigabyte_is_not_read(checkpoint):
    with (checkpoint / "manifest.json").open("r+b") as file:
        file.truncate(2**30)  # a hole: it takes no space
    assert "has 1,073,741,824 bytes, more than" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "NaN", "1e999", "null", "[]", "é"])
def test_a_manifest_that_is_no_table_is_one_line(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    line = refusal(checkpoint)
    assert line
    assert "\n" not in line


@pytest.mark.parametrize("sealed", [False, True])
def test_mutated_manifests_and_tables_are_one_line_or_change_no_tensor(checkpoint, sealed):
    """Sealed: all hashes are right again, as whoever has made the checkpoint could do it."""
    draw, refused = random.Random(sealed), 0
    whole = {name: (checkpoint / name).read_bytes() for name in ("manifest.json", "rank-0.json")}
    tensors = read_all(checkpoint)
    for number in range(200 if sealed else 50):
        name = ("manifest.json", "rank-0.json")[number % 2]
        value = mutated(json.loads(whole[name]), draw)
        (checkpoint / name).write_text(json.dumps(value))
        try:
            if sealed:
                seal(checkpoint)
            found = read_all(checkpoint)
            load(Checkpoint.open(checkpoint), *small_job())
            assert sealed or json.loads(whole[name]) == value, value
            assert found.keys() <= tensors.keys() | {"x", "", "../x", "__class__"}
        except (UserError, MachineError) as error:
            assert "\n" not in str(error), number  # noqa: PT017
            refused += 1
        for file, data in whole.items():
            (checkpoint / file).write_bytes(data)
    assert refused > (100 if sealed else 45)
    assert manifest.read(checkpoint)
