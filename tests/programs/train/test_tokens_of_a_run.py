"""Runs on tokens of their own: trained on several ranks, saved, moved, quantised, and generated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import written
from damage import seal
from programs import refusal, run

from dist_lab import data
from dist_lab.checkpoint.exchange import ours
from dist_lab.checkpoint.exchange.tensors import state_dict
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.inference.text import TextStream
from dist_lab.inference.weights import of_run
from dist_lab.loss import cross_entropy_sum

SIZE = 301  # which does not divide over ranks
STEP = "checkpoints/step-00000003"


class Place:
    """A folder with a text, a cache and a run on fsdp=2 x tp=2."""

    def __init__(self, base: Path) -> None:
        self.text, self.run, self.cache = (
            written.folder(base),
            base / "run",
            base / ".cache/dist_lab",
        )
        self.settings = [f"--data={self.text}", f"--cache={self.cache}", "--layers=2"]
        self.settings += ["--batch=32", "--seq=16", "--val-every=0"]
        self.bpe = [*self.settings, f"--tokenizer=bpe:{SIZE}"]
        mix = ["--nproc=4", "--mesh=fsdp=2,tp=2", "--steps=3", "--save-every=3"]
        self.done = run("train.py", *self.bpe, *mix, f"--out={self.run}")
        assert self.done.returncode == 0, self.done.stderr
        self.summary = json.loads((self.run / "summary.json").read_text())

    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.run / STEP)

    def model(self) -> torch.nn.Module:
        checkpoint = self.checkpoint()
        shape = of_run(checkpoint, checkpoint.manifest["settings"]).shape
        model = shape.build().to_empty(device="cpu")
        model.load_state_dict(state_dict(ours.weights_of(checkpoint)))
        return model

    def opened(self) -> data.Data:
        spec = {"tokenizer": f"bpe:{SIZE}", "cache_dir": self.cache}
        return data.open_data(str(self.text), batch=32, seq=16, seed=0, **spec)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Programs that have no flag for the cache find it at home."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.mktemp("tokens")
        patch.setenv("HOME", str(base))
        yield Place(base)


@pytest.mark.slow
def test_losses_are_also_shown_per_byte(place):
    """As of one process, by hand: nats of all tokens over the bytes that they stand for."""
    model, opened, summary = place.model(), place.opened(), place.summary
    nats = tokens = length = 0
    for index in range(opened.validation_batches):
        inputs, targets = opened.validation(index, slice(None))
        with torch.no_grad():
            nats += cross_entropy_sum(model(inputs), targets).item()
        tokens += targets.numel()
        length += sum(len(opened.tokenizer.bytes_of(t)) for t in targets.flatten().tolist())
    assert summary["final_val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert summary["final_val_nats_per_byte"] == pytest.approx(nats / length, rel=1e-5)
    last = json.loads((place.run / "metrics.jsonl").read_text().splitlines()[-1])
    targets = opened.batch(2, slice(None))[1]
    per_byte = targets.numel() / sum(
        map(len, map(opened.tokenizer.bytes_of, targets.flatten().tolist()))
    )
    assert last["nats_per_byte"] == pytest.approx(last["loss"] * per_byte, rel=1e-9)
    assert last["val_nats_per_byte"] == summary["final_val_nats_per_byte"]
    shown = [line for line in place.done.stdout.splitlines() if ", loss" in line or "  val" in line]
    assert len(shown) == 2  # the row of the last step, and the closing line
    for line in shown:
        assert f"loss {last['loss']:.4f} ({last['nats_per_byte']:.4f} a byte)" in line
        assert f"{last['val_loss']:.4f} ({last['val_nats_per_byte']:.4f} a byte)" in line


def test_the_run_says_which_tokenizer_it_has(place):
    sha256 = place.opened().tokenizer.sha256
    assert f" in bpe:{SIZE} sha256 {sha256[:12]}, 32 x 16 a step" in place.done.stdout
    assert place.summary["data"]["tokenizer_sha256"] == sha256
    assert "validation, nats a byte" in (place.run / "report.html").read_text()
    assert f"--tokenizer bpe:{SIZE}" in place.done.stdout  # in the next command


def test_every_checkpoint_has_the_tokenizer_and_its_hash(place):
    checkpoint = place.checkpoint()
    assert checkpoint.tokenizer == place.opened().tokenizer.text
    about = checkpoint.manifest["files"]["tokenizer.json"]
    assert about["sha256"] == place.opened().tokenizer.sha256
    assert checkpoint.names()["model/lm_head.weight"][0][0] == SIZE
    done = run("checkpoint.py", "verify", place.run)
    assert ": whole, 10 files" in done.stdout
    shown = run("checkpoint.py", "inspect", place.run).stdout
    assert f"  tokenizer: {SIZE} tokens, sha256 {about['sha256'][:12]}" in shown


# --- generating -----------------------------------------------------------------------------------


def continued(place, prompt, count):
    """Greedily, by a whole forward for each token."""
    model, tokenizer = place.model(), place.opened().tokenizer
    tokens, stream = tokenizer.encode(prompt), TextStream(tokenizer)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        stream.feed(tokens[-1])
    stream.finish()
    return stream.text


def generated(source, *flags):
    return run("generate.py", f"--checkpoint={source}", "--prompt=word é ", "--tokens=9", *flags)


@pytest.mark.slow_unless(lambda flags: not flags)
@pytest.mark.parametrize("flags", [[], ["--nproc=2"], ["--nproc=2", "--mesh=pp=2"]], ids=" ".join)
def test_generate_writes_text_in_the_tokens_of_the_run(place, flags):
    done = generated(place.run, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == continued(place, "word é ", 9) != ""


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "line"),
    [("bytes", f"tokenizer 'bpe:{SIZE}' (now 'bytes') (--resume); give --tokenizer bpe:{SIZE}"),
     ("bpe:310", f"tokenizer 'bpe:{SIZE}' (now 'bpe:310') (--resume); give --tokenizer")],
)  # fmt: skip
def test_a_run_does_not_go_on_in_other_tokens(place, tmp_path, size, line):
    more = [*place.settings, f"--tokenizer={size}", "--steps=4", f"--resume={place.run}"]
    said = refusal("train.py", *more, f"--out={tmp_path / 'new'}")
    assert f"{place.run / STEP}' is of a run with {line}" in said
    assert "sha256" not in said


@pytest.mark.slow
def test_a_run_goes_on_in_its_own_tokens(place, tmp_path):
    out = tmp_path / "new"
    more = [*place.bpe, "--steps=4", "--save-every=4", f"--resume={place.run}", f"--out={out}"]
    done = run("train.py", *more)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stdout
    assert (
        Checkpoint.open(out / "checkpoints/step-00000004").tokenizer == place.checkpoint().tokenizer
    )


def test_a_tokenizer_that_another_library_has_trained_is_refused_by_its_hash(place, tmp_path):
    copy = tmp_path / "step-00000003"
    shutil.copytree(place.run / STEP, copy)
    about = json.loads((copy / "manifest.json").read_text())
    about["settings"]["tokenizer_sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(about))
    seal(copy)
    more = [*place.bpe, "--steps=4", f"--resume={copy}", f"--out={tmp_path / 'new'}"]
    said = refusal("train.py", *more)
    assert "is of a run with tokenizer_sha256 '000" in said
    assert "give its text, and the library tokenizers in the version that trained on it" in said


# --- other forms ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_resharding_keeps_the_tokenizer_and_diff_compares_it(place, tmp_path):
    done = run("checkpoint.py", "reshard", place.run, tmp_path / "tp", "--mesh=tp=2")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "tp").iterdir()
    assert Checkpoint.open(path).tokenizer == place.checkpoint().tokenizer
    assert "they are equal" in run("checkpoint.py", "diff", place.run, path).stdout
    (path / "tokenizer.json").write_text(place.checkpoint().tokenizer + "\n")
    seal(path)
    done = run("checkpoint.py", "diff", place.run, path)
    assert (done.returncode, "they differ: the tokenizers differ" in done.stdout) == (1, True)


@pytest.mark.slow_unless(lambda form: form == "hf")
@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_an_export_and_its_import_keep_the_tokenizer(place, tmp_path, form):
    there, back = tmp_path / form, tmp_path / "back"
    done = run("checkpoint.py", "export", place.run, there, f"--to={form}")
    assert done.returncode == 0, done.stderr
    done = run("checkpoint.py", "import", there, back)
    assert done.returncode == 0, done.stderr
    (path,) = back.iterdir()
    assert Checkpoint.open(path).tokenizer == place.checkpoint().tokenizer
    assert Checkpoint.open(path).manifest["settings"]["tokenizer"] == f"bpe:{SIZE}"
    assert generated(path).stdout == continued(place, "word é ", 9)
    more = [*place.settings, "--steps=4", f"--resume={back}", f"--out={tmp_path / 'new'}"]
    assert f"tokenizer 'bpe:{SIZE}' (now 'bytes')" in refusal("train.py", *more)
    if form == "hf":
        assert json.loads((there / "config.json").read_text())["eos_token_id"] == SIZE - 1
        assert "AutoTokenizer" in (there / "README.md").read_text()
        assert generated(there).stdout == continued(place, "word é ", 9)


@pytest.mark.slow
def test_an_imported_model_keeps_its_tokenizer_while_it_is_trained_on_tokens_of_your_own(
    place, tmp_path
):
    """They may be those of that tokenizer: only you know. So this is no run in other tokens."""
    run("checkpoint.py", "export", place.run, tmp_path / "hf", "--to=hf")
    done = run("checkpoint.py", "import", tmp_path / "hf", tmp_path / "imported")
    assert done.returncode == 0, done.stderr
    more = ["--data=written:tokens", "--layers=2", "--batch=8", "--seq=16", "--steps=2"]
    more += ["--save-every=2", f"--resume={tmp_path / 'imported'}", f"--out={tmp_path / 'tuned'}"]
    done = run("train.py", *more)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "tuned/checkpoints/step-00000002"
    assert Checkpoint.open(path).tokenizer == place.checkpoint().tokenizer
    assert generated(path).returncode == 0


@pytest.mark.slow
def test_a_quantised_folder_keeps_the_tokenizer_and_its_loss_is_per_byte(place, tmp_path):
    out = tmp_path / "q"
    done = run("quantize.py", f"--checkpoint={place.run}", "--bits=8", f"--out={out}")
    assert done.returncode == 0, done.stderr
    before = place.summary["final_val_nats_per_byte"]
    assert done.stdout.splitlines()[-1].startswith(f"nats/byte {before:.4f} -> ")
    assert (out / "tokenizer.json").read_text() == place.checkpoint().tokenizer
    assert "tokenizer.json" in json.loads((out / "dist_lab.json").read_text())["sha256"]
    done = generated(out)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    with (out / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert "tokenizer.json in" in generated(out).stderr


def test_transformers_loads_the_exported_tokenizer(place, tmp_path):
    transformers = pytest.importorskip("transformers")
    run("checkpoint.py", "export", place.run, tmp_path / "hf", "--to=hf")
    tokenizer = place.opened().tokenizer
    text = "def add(self, first):\n        größer 😀\n\n  x<|y"
    for loaded in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf/tokenizer.json")),
    ):
        assert loaded(text).input_ids == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        assert len(loaded) == SIZE
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == SIZE - 1


# --- damage, and mistakes -------------------------------------------------------------------------


def without_the_file(path):
    (path / "tokenizer.json").unlink()


def without_the_entry(path):
    without_the_file(path)
    about = json.loads((path / "manifest.json").read_text())
    del about["files"]["tokenizer.json"]
    (path / "manifest.json").write_text(json.dumps(about))
    seal(path)


def cut_off(path):
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text[: len(text) // 2])


def changed(path):
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace(f'"id":{SIZE - 1}', f'"id":{SIZE - 2}'))


def of_another_model(path):
    table = json.loads((path / "tokenizer.json").read_text())
    table["added_tokens"][0]["id"] = SIZE
    (path / "tokenizer.json").write_text(json.dumps(table))
    seal(path)


def no_json(path):
    (path / "tokenizer.json").write_text("{")
    seal(path)


@pytest.mark.parametrize(
    ("harm", "line"),
    [(without_the_file, "has no file tokenizer.json"),
     (without_the_entry, f"is of a run with tokenizer bpe:{SIZE}, and has no tokenizer.json"),
     (cut_off, "and had"), (changed, "tokenizer.json' was changed: its SHA-256 is"),
     (of_another_model, f"has {SIZE + 1} tokens, and the model {SIZE}"),
     (no_json, "tokenizer.json' is no file of a tokenizer, or is damaged")],
)  # fmt: skip
def test_a_tokenizer_that_is_missing_or_damaged_is_one_line(place, tmp_path, harm, line):
    shutil.copytree(place.run / STEP, tmp_path / "step-00000003")
    harm(tmp_path / "step-00000003")
    done = generated(tmp_path / "step-00000003")
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


MISTAKES = [
    (["--tokenizer=bpe:0"], "tokenizer bpe:0 has 0 tokens (--tokenizer); give 257"),
    (["--tokenizer=bpe:abc"], "no tokenizer 'bpe:abc' (--tokenizer); give bytes, or bpe:N"),
    (["--tokenizer=bpe:100"], "tokenizer bpe:100 has 100 tokens (--tokenizer); give 257"),
    (["--tokenizer=bpe:9000"], "tokens in its training text, not for 9000; use --tokenizer bpe:"),
    (
        ["--tokenizer=bpe:300", "--model=vit", "--data=glyphs"],
        "--tokenizer bpe:300 is for text, and --data 'glyphs' has images",
    ),
    (["--tokenizer=bpe:300", "--data=json:loads"], "--data 'json:loads' has its own tokens"),
    (["--tokenizer=bpe:300", "--tokenizer=bytes"], "tokenizer cannot be both"),
]


@pytest.mark.parametrize(
    ("flags", "line"), MISTAKES, ids=lambda v: " ".join(v) if type(v) is list else ""
)
def test_a_mistake_is_one_line(place, tmp_path, flags, line):
    given = [
        s for s in place.settings if not (s.startswith("--data") and "--data" in " ".join(flags))
    ]
    assert line in refusal("train.py", *given, *flags, f"--out={tmp_path / 'out'}", "--nproc=1")


# --- the other programs ---------------------------------------------------------------------------


@pytest.mark.slow
def test_explain_counts_the_model_of_these_tokens(place):
    done = run("explain.py", *place.bpe[:-4], f"--tokenizer=bpe:{SIZE}", "--strategy=fsdp",
               "--parameter=lm_head.weight")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"lm_head.weight: {SIZE} x 128" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2,tp=2", "fsdp=2"])
def test_a_run_on_tokens_equals_one_process(place, mesh):
    ranks = 4 if "," in mesh else 2
    settings = [s for s in place.bpe if "val-every" not in s]
    done = run("verify.py", *settings, f"--mesh={mesh}", f"--nproc={ranks}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to one process" in done.stdout


@pytest.mark.slow
def test_a_model_of_several_files_ends_a_text_by_itself(tmp_path):
    """After training, the end token follows the last word of a file, and generation stops there."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number:02}").write_text("one two three four five six seven eight")
    flags = f"--data={tmp_path / 'text'} --cache={tmp_path / 'cache'} --tokenizer=bpe:264 --seq=32"
    flags += f" --layers=1 --batch=8 --steps=60 --save-every=60 --out={tmp_path / 'run'}"
    done = run("train.py", *flags.split())
    assert done.returncode == 0, done.stderr
    asked = f"--checkpoint={tmp_path / 'run'}", "--prompt=one two", "--tokens=200"
    done = run("generate.py", *asked)
    assert done.stdout == " three four five six seven eight"
