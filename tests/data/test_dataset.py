"""A map-style Dataset as data: each sample once per epoch, only own rows loaded, checked items."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

from dist_lab import data
from dist_lab.data.dataset import FromDataset
from dist_lab.errors import UserError


class Sentences(Dataset):
    """Sample i: six tokens after the token i; `loaded` records the indices that were asked for."""

    def __init__(self, count=23, vocab=40):
        self.vocab, self.count, self.loaded = vocab, count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loaded.append(index)
        tokens = torch.arange(index, index + 7) % 40
        return tokens[:-1], tokens[1:]


class Pictures(Dataset):
    """Sample i: a picture of constant value i, of class i % 3."""

    classes = ("a", "b", "c")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((1, 2, 4), float(index)), index % 3


def opened(dataset, held_out=None, batch=4, seed=3, seq=6):
    order = {"batch": batch, "seed": seed, "validation_batches": 8}
    return FromDataset("mine:words", dataset, held_out, seq=seq, **order)


def first_tokens(pair):
    return pair[0][:, 0].tolist()


@pytest.mark.parametrize("ranks", [[1], [4], [2, 1, 4], [3, 2]])
def test_each_sample_is_read_once_per_epoch_also_when_the_number_of_ranks_changes(ranks):
    dataset, batch = Sentences(23), 12
    stream = []
    for step in range(23):  # 23 steps of 12 samples are 12 epochs
        size = ranks[step % len(ranks)]
        share = batch // size
        words = opened(dataset, batch=batch)  # as a resumed run opens it
        for rank in range(size):
            stream += first_tokens(words.batch(step, slice(share * rank, share * (rank + 1))))
    epochs = np.array(stream).reshape(12, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12, "two epochs in the same order"


def test_only_the_rows_of_the_rank_are_loaded():
    dataset = Sentences()
    words = opened(dataset, batch=20)
    assert set(dataset.loaded) == {0, 22}, "the check at the start reads the first and the last"
    dataset.loaded.clear()
    inputs, targets = words.batch(1, slice(5, 8))
    assert dataset.loaded == words.sample_ids(1, slice(5, 8)).tolist()
    assert inputs[:, 0].tolist() == dataset.loaded
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert [x.shape for x in words.batch(1, slice(5, 5))] == [(0, 6), (0, 6)]


def test_images_and_class_numbers_become_tensors():
    pictures = opened(Pictures())
    inputs, targets = pictures.batch(0, slice(0, 4))
    assert (pictures.image, pictures.vocab, inputs.dtype) == ((1, 2, 4), 3, torch.float32)
    assert targets.tolist() == [index % 3 for index in pictures.sample_ids(0, slice(0, 4))]
    assert targets.dtype == torch.int64
    assert [x.shape for x in pictures.batch(0, slice(1, 1))] == [(0, 1, 2, 4), (0,)]


ITEMS = {
    "list of lists": lambda tokens: (tokens[:-1], tokens[1:]),
    "dict": lambda tokens: {"input_ids": tokens[:-1], "labels": tokens[1:]},
    "array of 16 bits": lambda tokens: [np.array(tokens[:-1], np.uint16), np.array(tokens[1:])],
}


@pytest.mark.parametrize("form", ITEMS)
def test_lists_dicts_and_arrays_are_items_too(form):
    items = Items([ITEMS[form](list(range(index, index + 7))) for index in range(9)])
    inputs, targets = opened(items, batch=9).batch(0, slice(0, 9))
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert sorted(inputs[:, 0].tolist()) == list(range(9))


def test_a_sample_of_one_repeated_token_has_equal_input_and_target():
    ones = torch.ones(6, dtype=torch.int64)
    assert first_tokens(opened(items((ones, ones))).batch(0, slice(0, 2))) == [1, 1]


class Items(list):
    vocab = 40


def test_a_second_dataset_is_for_validation_and_spread_evenly():
    words = opened(Sentences(), Sentences(9), batch=4)
    assert words.validation_batches == 2
    rows = [t for index in (0, 1) for t in first_tokens(words.validation(index, slice(0, 4)))]
    assert rows == [0, 1, 2, 3, 4, 5, 6, 7]
    halves = [words.validation(1, rows)[0] for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat(halves), words.validation(1, slice(0, 4))[0])
    assert opened(Sentences(), Sentences(2), batch=4).validation_batches == 1
    assert opened(Sentences()).validation_batches == 0


CODE = """
import torch
from torch.utils.data import TensorDataset
def words(batch, seq, seed):
    tokens = torch.arange(9)[:, None] + torch.arange(seq + 1)
    dataset = TensorDataset(tokens[:, :-1], tokens[:, 1:])
    dataset.vocab = 50
    return RETURNED
def stream(batch, seq, seed):
    class Stream(torch.utils.data.IterableDataset):
        vocab = 50
        def __iter__(self):
            yield 0
    return Stream()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield Path("mine.py")
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(("returned", "batches"), [("dataset", 0), ("(dataset, dataset)", 2)])
def test_a_function_returns_a_dataset_or_two(module, returned, batches):
    module.write_text(CODE.replace("RETURNED", returned))
    words = data.open_data("mine:words", batch=4, seq=6, seed=1)
    assert (words.name, words.vocab, words.image, words.samples) == ("mine:words", 50, None, 9)
    assert words.validation_batches == batches
    ids = words.sample_ids(0, slice(0, 4))
    assert first_tokens(words.batch(0, slice(0, 4))) == ids.tolist()


def test_a_stream_without_random_access_is_refused(module):
    module.write_text(CODE)
    with pytest.raises(UserError, match=r"a Stream without name: str.*or return a map-style Data"):
        data.open_data("mine:stream", batch=4, seq=6, seed=1)


class Fails(Sentences):
    def __getitem__(self, index):
        raise OSError(f"no file\n {index}.txt")


class Random(Sentences):
    def __getitem__(self, index):
        return torch.randint(40, (6,)), torch.randint(40, (6,))


def items(*pairs):
    return Items(pairs)


T, F = torch.arange(6), torch.zeros(1, 2, 2)
REFUSED = {
    "empty": (items(), "dataset is empty: its len() is 0"),
    "no vocab": ([(T, T + 1)], "the list has no vocab: int, the number of its token ids or cla"),
    "a subset has none": (Subset(Sentences(), range(3)), "the Subset has no vocab: int"),
    "fails": (Fails(), "dataset[0] raised OSError: no file 0.txt; --debug shows where"),
    "one tensor": (items(T), "dataset[0] is a Tensor; return two: input, target"),
    "three": (items((T, T, T)), "dataset[0] is a tuple of 3; return two"),
    "dict of three": (items({"a": T, "b": T, "c": T}), "dataset[0] is a dict of a, b, c; return"),
    "words": (items((T, "cat")), "dataset[0] holds a str, not a tensor; convert it in __getitem__"),
    "float tokens": (items((T.float(), T)), "input (6,) of torch.float32; text has token ids (6,)"),
    "bytes of an image": (items((F.byte(), 0)), "input (1, 2, 2) of torch.uint8; text has"),
    "float64 image": (items((F.double(), 0)), "(1, 2, 2) of torch.float64; text has token ids"),
    "another length": (
        items((T[:5], T[1:])), "input (5,) of torch.int64, not (6,) of torch.int64, as all",
    ),
    "a later sample is shorter": (
        items((T, T + 1), (T[:4], T[:4])), "dataset[1] has input (4,) of torch.int64, not (6,)",
    ),
    "a later image is larger": (
        items((F, 0), (torch.zeros(1, 3, 3), 0)), "dataset[1] has input (1, 3, 3) of torch.float32",
    ),
    "a later image is of another dtype": (
        items((F, 0), (F.double(), 0)), "dataset[1] has input (1, 2, 2) of torch.float64, not (1,",
    ),
    "one-hot class": (items((F, T)), "dataset[0] has target (6,) of torch.int64, not () of torch"),
    "ids beyond vocab": (items((T, T + 35)), "target 35 to 40, although vocab is 40"),
    "a class beyond vocab": (items((F, 40)), "dataset[0] has target 40, although vocab is 40"),
    "negative": (items((T, T - 1)), "target -1 to 4, although vocab is 40"),
    "not finite": (items((F / 0, 0)), "dataset[0] has input values that are not finite"),
    "random": (Random(), "dataset[0] is not the same in two calls; let it depend on the index"),
    "not shifted": (items({"input_ids": T, "labels": T}), "has equal input and target, but"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_dataset_that_does_not_fit_is_refused_in_one_line(case):
    dataset, message = REFUSED[case]
    with pytest.raises(UserError) as refused:
        opened(dataset)
    assert str(refused.value).startswith("data='mine:words': ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_validation_samples_must_be_like_those_of_training():
    with pytest.raises(UserError, match=r"held_out\[0\] has input \(4,\) of .*, not \(6,\)"):
        opened(Sentences(), items((T[:4], T[:4] + 1)))
    with pytest.raises(UserError, match=r"held_out\[0\] has target 95 to 100, although"):
        opened(Sentences(), items((T, T + 95)))
    with pytest.raises(UserError, match="held_out is empty"):
        opened(Sentences(), items())


def test_a_sample_that_differs_in_the_middle_is_named_when_it_is_read():
    pairs = [(T, T + 1)] * 5
    pairs[3] = (T, T + 90)
    words = opened(items(*pairs), batch=5)
    row = words.sample_ids(0, slice(0, 5)).tolist().index(3)
    words.batch(0, slice(0, row))
    with pytest.raises(UserError, match=r"dataset\[3\] has target 90 to 95, although vocab is 40"):
        words.batch(0, slice(row, 5))
