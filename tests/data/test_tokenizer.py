"""Tokenizers: no byte is lost, one text gives one file, others' files are read exactly."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import written

from dist_lab import data
from dist_lab.data import bpe, corpus, tokenized
from dist_lab.data.text import Text
from dist_lab.data.tokenizer import FileTokenizer, byte_characters, read_tokenizer
from dist_lab.errors import MachineError, UserError

SIZE = 320


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def folder(base):
    return written.folder(base)


@pytest.fixture(scope="module")
def tokens(base, folder):
    """The corpus in tokens."""
    found = data.check(str(folder), seq=8, tokenizer=f"bpe:{SIZE}", cache_dir=base / "cache")
    assert found is not None
    return found


@pytest.fixture
def tokenizer(tokens):
    return tokens.tokenizer


def decoded(tokenizer, ids):
    return b"".join(tokenizer.bytes_of(int(token)) for token in ids)


# --- training and encoding ------------------------------------------------------------------------


def test_no_byte_of_the_text_is_lost(base, folder, tokens, tokenizer):
    text = corpus.find(str(folder), base / "cache")
    for part, whole in ((tokens.train, text.train), (tokens.validation, text.validation)):
        assert decoded(tokenizer, part) == whole.tobytes()
        assert len(part) < 0.6 * len(whole)


def test_the_bytes_keep_their_numbers_and_the_end_is_the_last_token(tokenizer):
    assert tokenizer.vocab == SIZE
    assert [tokenizer.bytes_of(byte) for byte in range(256)] == [bytes([b]) for b in range(256)]
    assert tokenizer.ends == (SIZE - 1,)
    assert tokenizer.bytes_of(SIZE - 1) == b""
    assert len({tokenizer.bytes_of(token) for token in range(SIZE)}) == SIZE


def test_the_end_token_is_between_two_files_and_nowhere_else(tokens, tokenizer, folder):
    """Its name, which occurs in the text, is text."""
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    parts = (tokens.train, [f for i, f in enumerate(files, 1) if i % 10]), (
        tokens.validation, files[9::10],
    )  # fmt: skip
    for ids, documents in parts:
        cuts = np.flatnonzero(np.asarray(ids) == SIZE - 1)
        assert [decoded(tokenizer, run) for run in np.split(ids, cuts)] == documents


def test_a_file_that_the_border_cuts_has_no_end_there(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcd" * 100)
    (tmp_path / "b.txt").write_bytes(b"efgh" * 100)
    text = corpus.find(str(tmp_path), tmp_path / "cache")
    training, validation = text.documents()
    assert training == [b"abcd" * 100, b"efgh" * 80]
    assert validation == [b"efgh" * 20]


def test_long_texts_are_cut_where_no_token_changes(tokenizer, monkeypatch):
    text = "".join(line.decode("utf-8", "ignore") for line in written.LINES * 20)
    whole = bpe.encoded([text.encode()], tokenizer)
    monkeypatch.setattr(bpe, "PIECE", 50)
    monkeypatch.setattr(bpe, "AT_A_TIME", 3)
    assert len([*bpe.cut(text)]) > 20
    assert np.array_equal(bpe.encoded([text.encode()], tokenizer), whole)
    assert np.array_equal(tokenizer.encode(text.replace("<|", "< |")),
                          bpe.encoded([text.replace("<|", "< |").encode()], tokenizer))  # fmt: skip


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"\xc3", b"a\xc3\xa9\xff\xfe\xc3(", bytes(range(256))]
)
def test_any_bytes_can_be_encoded(tokenizer, text):
    assert decoded(tokenizer, bpe.encoded([text], tokenizer)) == text


def test_more_ids_than_16_bits_have_need_32(tokenizer):
    wide = json.loads(tokenizer.text)
    wide["added_tokens"][0]["id"] = 70_000
    ids = bpe.encoded([b"ab", b"c"], FileTokenizer(json.dumps(wide), "it"))
    assert ids.dtype == np.uint32
    assert 70_000 in ids


def test_the_same_text_and_size_give_the_same_file(folder, base, tmp_path, tokens):
    """Also in another process with one thread, where the library counts in another order."""
    code = "import sys; from pathlib import Path; from dist_lab.data import check; " \
           "print(check(sys.argv[1], seq=8, tokenizer=sys.argv[2], cache_dir=Path(sys.argv[3]))" \
           ".tokenizer.sha256, 'torch' in sys.modules)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), f"bpe:{SIZE}", str(tmp_path)],
        env=os.environ | {"RAYON_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [tokens.tokenizer.sha256, "False"]
    (one,), (two,) = (place.glob("*-bpe-*.corpus") for place in (base / "cache", tmp_path))
    assert one.read_bytes() == two.read_bytes()
    assert bpe.spec_of(tokens.tokenizer.text) == f"bpe:{SIZE}"


def test_only_the_training_text_is_trained_on(tmp_path):
    for number in range(20):
        text = b"xyxyxy " * 5000 if number % 10 == 9 else b"frequent " * 50
        (tmp_path / f"{number:02}").write_bytes(text)
    tokens = data.check(str(tmp_path), seq=8, tokenizer="bpe:262", cache_dir=tmp_path / "cache")
    learned = {tokens.tokenizer.bytes_of(token) for token in range(256, 261)}
    assert all(piece in b" frequent " for piece in learned)


def test_a_size_that_the_text_cannot_give_is_refused_with_the_largest(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"one two three one two three " * 9)
    spec, cache = str(tmp_path / "short.txt"), tmp_path / "cache"
    with pytest.raises(UserError, match=r"has pairs for \d+ tokens in its .* for 4096") as no:
        data.check(spec, seq=3, tokenizer="bpe:4096", cache_dir=cache)
    found = int(str(no.value).partition("pairs for ")[2].split()[0])
    assert f'use tokenizer="bpe:{found}", or give more text' in str(no.value)
    tokens = data.check(spec, seq=3, tokenizer=f"bpe:{found}", cache_dir=cache)
    assert tokens.tokenizer.vocab == found


def test_too_few_tokens_for_a_sequence_are_refused(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"one two three one two three " * 9)
    with pytest.raises(UserError, match=r"\d validation tokens, and seq=20 needs 21"):
        data.check(str(tmp_path / "short.txt"), seq=20, tokenizer="bpe:266", cache_dir=tmp_path)


# --- the cache ------------------------------------------------------------------------------------


def test_of_many_that_begin_at_once_one_trains_and_all_have_its_tokens(
    folder, tmp_path, monkeypatch
):
    trained = []

    def train(*arguments):
        trained.append(1)
        return bpe.train(*arguments)

    monkeypatch.setattr(tokenized, "train", train)
    found, begin = [], threading.Barrier(6)

    def one():
        begin.wait()
        found.append(data.check(str(folder), seq=8, tokenizer="bpe:300", cache_dir=tmp_path))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(trained)) == (6, 1)
    assert len({one.tokenizer.sha256 for one in found}) == 1


def test_the_cache_keeps_tokens_and_tokenizer_together(folder, base, tokens, monkeypatch):
    def no_training(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenized, "train", no_training)
    again = data.check(str(folder), seq=8, tokenizer=f"bpe:{SIZE}", cache_dir=base / "cache")
    assert again.tokenizer.text == tokens.tokenizer.text
    assert np.array_equal(again.train, tokens.train)
    assert isinstance(again.train.base, np.memmap)  # mapped, not read


def test_a_line_says_that_a_tokenizer_is_trained_if_that_takes_a_while(
    folder, tmp_path, monkeypatch
):
    told = []
    asked = {"seq": 8, "tokenizer": "bpe:290", "tell": told.append}
    data.check(str(folder), cache_dir=tmp_path / "small", **asked)
    assert told == []
    monkeypatch.setattr(tokenized, "LARGE", 100)
    for _ in range(2):
        data.check(str(folder), cache_dir=tmp_path / "large", **asked)
    assert told == [f"training the tokenizer bpe:290 on 0 MB of {folder}, once ..."]


def test_a_cache_within_the_folder_is_not_read_as_text(tmp_path):
    folder = written.folder(tmp_path)
    one, two = (
        data.check(str(folder), seq=8, tokenizer="bpe:280", cache_dir=folder / "cache")
        for _ in range(2)
    )
    assert one.path == two.path


# --- batches --------------------------------------------------------------------------------------


def test_batches_are_windows_of_tokens(folder, base, tokens):
    opened = data.open_data(
        str(folder), batch=4, seq=8, seed=1, tokenizer=f"bpe:{SIZE}", cache_dir=base / "cache"
    )
    assert isinstance(opened, Text)
    assert (opened.vocab, opened.sha256) == (SIZE, tokens.sha256)
    inputs, targets = opened.batch(0, slice(0, 4))
    assert inputs.dtype == torch.int64
    for i, row, target in zip(opened.sample_ids(0, slice(0, 4)), inputs, targets, strict=True):
        assert row.tolist() == tokens.train[8 * i : 8 * i + 8].tolist()
        assert target.tolist() == tokens.train[8 * i + 1 : 8 * i + 9].tolist()


@pytest.mark.parametrize("spec", ["glyphs", "written:folder"])
def test_data_that_is_no_text_has_no_tokenizer(spec, tmp_path):
    with pytest.raises(UserError, match=r'tokenizer="bpe:300" is for text, and data='):
        data.check(spec, seq=8, tokenizer="bpe:300", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("value", "line"),
    [("bpe:0", "has 0 tokens"), ("bpe:100", "give 257 (256 bytes and the end of a text) to"),
     ("bpe:256", "has 256 tokens"), ("bpe:99999999", "to 1048576, such as"),
     ("bpe:abc", "no tokenizer 'bpe:abc' (--tokenizer); give bytes, or bpe:N"),
     ("bpe", "no tokenizer 'bpe'"), ("bpe:-5", "no tokenizer"), ("", "no tokenizer ''"),
     (4096, "no tokenizer 4096"), ("bpe:1" + "0" * 40, "no tokenizer"), ("bpe:٣٠٠", "no tok")],
)  # fmt: skip
def test_a_wrong_value_is_one_line(value, line):
    with pytest.raises(UserError) as refused:
        read_tokenizer(value, "--tokenizer")
    assert line in str(refused.value)


def test_without_the_library_one_line_says_what_to_install(
    folder, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MachineError, match="pip install 'tokenizers"):
        data.check(str(folder), seq=8, tokenizer="bpe:290", cache_dir=tmp_path)
    fresh = FileTokenizer(tokenizer.text, "it")
    with pytest.raises(MachineError, match="pip install 'tokenizers"):
        fresh.encode("a")
    assert fresh.bytes_of(97) == b"a"  # the way back needs no library


# --- files of others ------------------------------------------------------------------------------


def test_a_file_in_the_form_of_llama_2_gives_the_bytes_that_the_library_gives():
    found = FileTokenizer(json.dumps(written.llama_2()), "it", ends=(2,))
    ids = found.encode("ab  aé")
    assert ids[0] == 1  # as its file says, a text begins with <s>
    assert decoded(found, ids) == " ab  aé".encode()
    assert found.library.decode(ids) == "ab  aé"
    assert (found.vocab, found.ends) == (265, (2,))
    assert found.bytes_of(1) == b""
    assert found.bytes_of(4000) == b""


def test_a_file_that_cuts_long_texts_off_does_not_do_so_here():
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    whole, other = (
        FileTokenizer(json.dumps(written.llama_2(**changes)), "it")
        for changes in ({}, {"truncation": cut, "padding": pad})
    )
    for text in ("ab  aé", "a"):
        assert other.encode(text) == whole.encode(text)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"decoder": {"type": "Metaspace"}}, "turns tokens into text by Metaspace, so that"),
     ({"decoder": {"type": "WordPiece"}}, "by WordPiece"), ({"decoder": None}, "by None"),
     ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}}, "by Fuse"),
     ({"model": {"type": "Unigram", "vocab": [["a", 0.1]]}}, "of the kind 'Unigram'")],
)  # fmt: skip
def test_a_file_whose_tokens_have_no_bytes_of_their_own_is_refused(change, line):
    with pytest.raises(UserError) as refused:
        FileTokenizer(json.dumps(written.llama_2(**change)), "'x/tokenizer.json'")
    assert line in str(refused.value)
    assert str(refused.value).startswith("'x/tokenizer.json'")


def of_file(**changes):
    return json.dumps(written.llama_2(**changes))


def of_model(**changes):
    return of_file(model=written.llama_2()["model"] | changes)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", "[" * 100_000, '{"model": 1}', of_model(vocab={}),
     of_model(vocab={"a": -1}), of_model(vocab={"a": True}), of_model(vocab={"a": 0, "b": 0}),
     of_model(vocab={"a": 2**40}), of_model(vocab=[1]), of_model(vocab={"a": "0"}),
     of_file(added_tokens=[{"id": 0}]), of_file(added_tokens=7), of_file(decoder={}),
     of_file(decoder={"type": "Sequence", "decoders": 3})],
)  # fmt: skip
def test_a_damaged_file_is_one_line(text):
    with pytest.raises((MachineError, UserError)) as refused:
        FileTokenizer(text, "'x/tokenizer.json'")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_file_that_only_the_library_finds_wrong_is_one_line():
    found = FileTokenizer(of_model(merges=["no such"]), "'x/tokenizer.json'")
    with pytest.raises(
        MachineError, match=r"the library tokenizers cannot read 'x/tokenizer\.json'"
    ):
        found.encode("a")


def test_our_table_of_characters_is_that_of_the_library():
    library = pytest.importorskip("tokenizers")
    assert {*byte_characters()} == {*library.pre_tokenizers.ByteLevel.alphabet()}


@pytest.mark.slow
def test_the_whole_standard_library_comes_back(tmp_path):
    tokens = data.check("stdlib", seq=128, tokenizer="bpe:4096", cache_dir=tmp_path)
    text = corpus.find("stdlib", tmp_path)
    for part, whole in ((tokens.train, text.train), (tokens.validation, text.validation)):
        assert decoded(tokens.tokenizer, part) == whole.tobytes()
        assert 3 < len(whole) / len(part) < 5  # bytes per token
    assert Path(tokens.path).stat().st_size < 0.8 * text.path.stat().st_size
