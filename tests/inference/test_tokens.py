"""Models whose tokens are no bytes: the tokenizer beside their weights; parts of characters."""

import json

import pytest
import torch
import written
from programs import run

from dist_lab.checkpoint.exchange import huggingface, llama
from dist_lab.checkpoint.exchange.tensors import InMemory
from dist_lab.checkpoint.reader import Checkpoint
from dist_lab.data import bpe
from dist_lab.data.tokenizer import FileTokenizer, byte_characters
from dist_lab.errors import MachineError, UserError
from dist_lab.inference.text import TextStream
from dist_lab.inference.weights import OfFolder, tokenizer_of
from dist_lab.zoo import build

VOCAB = 272  # the file has 265 tokens: models are often padded


@pytest.fixture
def folder(tmp_path):
    """A Llama of others, with a tokenizer.json in the form of Llama 2's."""
    model = build("gpt", "tiny", vocab=VOCAB, seed=3, layers=1)
    there = tmp_path / "llama"
    huggingface.export(InMemory(model.state_dict()), llama.shape_of(model), there, ids="theirs")
    put(there, eos_token_id=[2, 7])
    return there


def put(folder, file=None, **settings):
    (folder / "tokenizer.json").write_text(json.dumps(file or written.llama_2()))
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def opened(folder):
    return tokenizer_of(OfFolder(huggingface.open_folder(folder)))


def test_a_token_may_be_the_end_of_a_character_and_the_beginning_of_the_next():
    names = byte_characters()
    seam = [names[0xA9], names[0xC3]]  # é è is c3 a9 c3 a8
    tokenizer = FileTokenizer(bpe.file_of([seam]), "it")
    assert tokenizer.bytes_of(256) == b"\xa9\xc3"
    stream = TextStream(tokenizer, ["!?"])
    parts = [stream.feed(token) for token in (0xC3, 256, 0xA8, 0x21, *tokenizer.ends, 0x3F, 0x41)]
    assert parts == ["", "é", "è", "", "", "", ""]
    assert stream.stopped


def test_a_folder_of_others_has_their_tokens_and_their_ends(folder):
    tokenizer = opened(folder)
    assert tokenizer.ends == (2, 7)
    assert tokenizer.encode("ab") == [1, 263]
    assert tokenizer.bytes_of(263) == b" ab"
    assert tokenizer.bytes_of(VOCAB - 1) == b""  # the model has this id, and the file does not


def test_generate_continues_in_their_tokens(folder):
    asked = f"--checkpoint={folder}", "--prompt=ab a", "--tokens=12"
    done = run("generate.py", *asked)
    assert done.returncode == 0, done.stderr
    tokenizer, model = opened(folder), huggingface.open_folder(folder).shape.build()
    model = model.to_empty(device="cpu")
    read = huggingface.open_folder(folder).tensors
    model.load_state_dict({name: read.read(name) for name in read.names()})
    tokens, stream = tokenizer.encode("ab a"), TextStream(tokenizer)
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in tokenizer.ends:
            break
        stream.feed(tokens[-1])
    stream.finish()
    assert done.stdout == stream.text


@pytest.mark.parametrize(
    ("file", "settings", "line"),
    [({"decoder": {"type": "Metaspace"}}, {}, "turns tokens into text by Metaspace"),
     ({"model": {"type": "Unigram", "vocab": []}}, {}, "of the kind 'Unigram'"),
     ({"added_tokens": [{"id": 900, "content": "x", "special": True}]}, {},
      f"has 901 tokens, and the model {VOCAB}"),
     ({}, {"eos_token_id": "</s>"}, "has eos_token_id '</s>', which is no id"),
     ({}, {"eos_token_id": [2, -1]}, "has eos_token_id a list, which is no id"),
     ({"model": 3}, {}, "is no file of a tokenizer, or is damaged")],
)  # fmt: skip
def test_a_folder_whose_tokens_are_not_bytes_is_refused_in_one_line(folder, file, settings, line):
    put(folder, written.llama_2(**file), **settings)
    with pytest.raises((UserError, MachineError)) as refused:
        opened(folder)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_is_not_read_from_elsewhere(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="out of its folder"):
        opened(folder)


def test_a_folder_without_a_tokenizer_says_so(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has 272 tokens and no tokenizer\.json"):
        opened(folder)


def test_an_import_keeps_a_tokenizer_of_others_or_says_why_it_does_not(folder, tmp_path):
    done = run("checkpoint.py", "import", folder, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "one").iterdir()
    assert Checkpoint.open(path).tokenizer == (folder / "tokenizer.json").read_text()
    put(folder, written.llama_2(decoder={"type": "Metaspace"}))
    done = run("checkpoint.py", "import", folder, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "left out its tokenizer: " in done.stdout
    assert "by Metaspace" in done.stdout
    (path,) = (tmp_path / "two").iterdir()
    assert Checkpoint.open(path).tokenizer is None


def test_ranks_do_not_draw_other_tokens_each_where_the_file_drops_merges_at_random(folder):
    put(folder, written.llama_2(model=written.llama_2()["model"] | {"dropout": 0.9}))
    tokenizer = opened(folder)
    assert len({tuple(tokenizer.encode("ab" * 20)) for _ in range(20)}) == 1


def test_the_name_of_a_special_token_is_text_in_a_prompt(folder):
    put(folder, written.llama_2())
    tokenizer = opened(folder)
    tokens = tokenizer.encode("a</s>b")
    assert tokenizer.special["</s>"] not in tokens
    assert b"".join(map(tokenizer.bytes_of, tokens)) == b" a</s>b"


@pytest.mark.parametrize(
    "rule",
    [
        {"type": "Lowercase"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"String": " "}, "content": ""},
    ],
)
def test_a_file_whose_rules_lose_a_part_of_a_text_is_refused(folder, rule):
    steps = [rule, *written.llama_2()["normalizer"]["normalizers"]]
    put(folder, written.llama_2(normalizer={"type": "Sequence", "normalizers": steps}))
    with pytest.raises(UserError, match="and a text must come back"):
        opened(folder).encode("a")
