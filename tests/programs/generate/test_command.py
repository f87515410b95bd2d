"""generate.py: stdout is the text alone; every mistake is one line."""

import subprocess
import sys
from codecs import getincrementaldecoder

import pytest
import short_run
import torch
from programs import ROOT, refusal, run

from dist_lab.checkpoint.exchange import gptq_files, ours
from dist_lab.checkpoint.exchange.tensors import InMemory, state_dict
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.inference.sampling import Sampling, choose
from dist_lab.inference.weights import of_run
from dist_lab.quantize.formula import Scheme, round_to_nearest
from dist_lab.quantize.linear import replace_linears
from dist_lab.quantize.packing import as_stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return short_run.trained(tmp_path_factory.getbasetemp())


def model_of(folder):
    """The whole model of a run, and its weights."""
    checkpoint = Checkpoint.open(folder / "checkpoints/step-00000002")
    weights = ours.weights_of(checkpoint)
    model = of_run(checkpoint, checkpoint.manifest["settings"]).shape.build().to_empty(device="cpu")
    model.load_state_dict(state_dict(weights))
    return model


def continued(model, prompt, count, sampling):
    tokens = list(prompt.encode())
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1]
        tokens.append(choose(logits, sampling, len(tokens)))
    generated = bytes(tokens[len(prompt.encode()) :])
    return getincrementaldecoder("utf-8")("replace").decode(generated)  # no half character


@pytest.mark.parametrize(
    "ranks", [[], ["--nproc=2"], ["--nproc=2", "--mesh=pp=2"],
              pytest.param(["--nproc=4", "--mesh=pp=2,tp=2"], marks=pytest.mark.slow)],
    ids=" ".join,
)  # fmt: skip
def test_stdout_is_the_text_alone_at_any_degree(trained, ranks):
    done = run("generate.py", f"--checkpoint={trained}", "--prompt=déf ", "--tokens=11", *ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout == continued(model_of(trained), "déf ", 11, Sampling())
    assert done.stderr.startswith("11 tokens: the first after ")
    assert done.stderr.count("\n") == 1


def test_sampling_flags_reach_the_sampler(trained):
    flags = ["--temperature=0.9", "--top-k=50", "--top-p=0.95", "--seed=7"]
    done = run("generate.py", f"--checkpoint={trained}", "--prompt=x", "--tokens=9", *flags)
    sampling = Sampling(0.9, top_k=50, top_p=0.95, seed=7)
    assert done.stdout == continued(model_of(trained), "x", 9, sampling)
    for flag in ("--seed=7", "--temperature=1", "--top-p=1"):
        done = run("generate.py", f"--checkpoint={trained}", "--prompt=x", "--tokens=9", flag)
        seed = 7 if "seed" in flag else 0
        assert done.stdout == continued(model_of(trained), "x", 9, Sampling(1.0, seed=seed))


def test_a_prompt_from_a_file_may_be_longer_than_the_texts_of_the_training(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("one two three four", encoding="utf-8")
    asked = f"--checkpoint={trained}", f"--prompt-file={tmp_path / 'prompt.txt'}"
    done = run("generate.py", *asked, "--tokens=4", "--stop=zzz")
    assert done.stdout == continued(model_of(trained), "one two three four", 4, Sampling())
    note, speed = done.stderr.splitlines()
    assert note.startswith("note: the text may grow to 22 tokens, and the model was trained on 16;")
    assert speed.startswith("4 tokens: the first after")


def test_a_hugging_face_folder_continues_as_the_run_that_it_is_of(trained, tmp_path):
    done = run("checkpoint.py", "export", trained, tmp_path / "hf", "--to=hf")
    assert done.returncode == 0, done.stderr
    texts = [
        run("generate.py", f"--checkpoint={source}", "--prompt=ab", "--tokens=6").stdout
        for source in (trained, tmp_path / "hf")
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.slow
def test_in_a_new_process_text_goes_to_a_pipe_byte_by_byte(trained):
    command = [sys.executable, "launch/generate.py", "--checkpoint", trained, "--prompt", "def "]
    done = subprocess.run(
        [*command, "--tokens", "5", "--nproc", "2", "--mesh", "tp=2"],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = continued(model_of(trained), "def ", 5, Sampling())
    assert done.stdout.decode() == expected


def test_a_quantised_folder_continues_a_text(trained, tmp_path):
    model = model_of(trained)
    weights = {
        name: as_stored(
            round_to_nearest(linear.weight.detach(), Scheme(4, group=32)), torch.float32
        )
        for name, linear in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(linear, torch.nn.Linear)
    }
    replace_linears(model, weights)
    gptq_files.save(model, tmp_path / "quantised")
    asked = f"--checkpoint={tmp_path / 'quantised'}", "--prompt=x = ", "--tokens=6"
    whole = continued(gptq_files.load(tmp_path / "quantised"), "x = ", 6, Sampling())
    assert run("generate.py", *asked, "--nproc=2").stdout == whole
    with (tmp_path / "quantised/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    done = run("generate.py", *asked)
    assert done.returncode == 1
    assert "is not the file that was saved" in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "what"), [("qat", "4:32", "weights"), ("recipe", "fp8", "operands")]
)
def test_a_run_that_rounds_is_told_apart(trained, tmp_path, flag, value, what):
    checkpoint = Checkpoint.open(trained / "checkpoints/step-00000002")
    settings = checkpoint.manifest["settings"] | {flag: value}
    weights = InMemory({n: checkpoint.read(n) for n in checkpoint.names() if "model/" in n})
    copy = ours.write(weights, tmp_path, settings=settings)
    done = run("generate.py", f"--checkpoint={copy}", "--prompt=x", "--tokens=2")
    assert done.stderr.startswith(
        f"note: the run rounds {what} in its forward ({flag} {value}), and the text is that of"
    )


# --- refusals -------------------------------------------------------------------------------------

MISTAKES = [
    ([], "no model is given; add --checkpoint DIR"),
    (["--checkpoint=nowhere", "--prompt=a"], "there is no folder 'nowhere' (--checkpoint)"),
    (["--checkpoint=tests", "--prompt=a"], "there is no checkpoint in"),
    (["--checkpoint=RUN"], "the prompt is empty"),
    (["--checkpoint=RUN", "--prompt="], "the prompt is empty"),
    (["--checkpoint=RUN", "--prompt=a", "--prompt=b"], "prompt cannot be both 'a' and 'b'"),
    (["--checkpoint=RUN", "--prompt=a", "--prompt-file=b"], "are two texts"),
    (["--checkpoint=RUN", "--prompt-file=no.txt"], "there is no file 'no.txt' (--prompt-file)"),
    (["--checkpoint=RUN", "--prompt-file=EMPTY"], "is empty, and a model continues a text"),
    (["--checkpoint=RUN", "--prompt-file=BINARY"], "byte 1 of 'BINARY' is no UTF-8"),
    (["--checkpoint=RUN", "--prompt=a", "--tokens=2000000000"], "new tokens take 2,0"),
    (["--checkpoint=RUN", "--prompt=a", "--mesh=dp=2"], "mesh axis 'dp' does not split a model"),
    (["--checkpoint=RUN", "--prompt=a", "--mesh=tp=2"], "needs several processes"),
    (["--checkpoint=RUN", "--prompt=a", "--mesh=tp=2", "--nproc=3"], "needs 2 processes, 3 were"),
    (["--checkpoint=RUN", "--prompt=a", "--nproc=3"], "4 blocks of 32 outputs (heads), which do"),
    (["--checkpoint=RUN", "--prompt=a", "--mesh=pp=3", "--nproc=3"], "3 stages are more than the"),
    (["--checkpoint=RUN", "--prompt=a", "--temperature=-1"], "temperature cannot be -1"),
    (["--checkpoint=RUN", "--prompt=a", "--top-p=0"], "top_p cannot be 0"),
    (["--checkpoint=MLP", "--prompt=a"], "is of model mlp, and only gpt generates text"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    base = tmp_path_factory.mktemp("places")
    (base / "empty").write_text("")
    (base / "binary").write_bytes(b"a\xff\xfe")
    checkpoint = Checkpoint.open(trained / "checkpoints/step-00000002")
    settings = checkpoint.manifest["settings"] | {"model": "mlp"}
    mlp = ours.write(InMemory({"model/w": torch.zeros(1)}), base / "mlp", settings=settings)
    return {"RUN": trained, "EMPTY": base / "empty", "BINARY": base / "binary", "MLP": mlp}


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=lambda v: v if type(v) is str else "")
@pytest.mark.slow_unless(lambda words: "--nproc=3" not in words or "--mesh=pp=3" in words)
def test_a_mistake_is_one_line(places, words, line):
    for name, path in places.items():
        words = [word.replace(f"={name}", f"={path}") for word in words]
        line = line.replace(f"'{name}'", f"'{path}'")
    assert line in refusal("generate.py", *words)
