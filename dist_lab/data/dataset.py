"""A map-style Dataset as training data: the function of `--data module:function` may return one.

    return dataset               len(dataset) samples; dataset[i] is (input, target)
    return dataset, held_out     with a second one for validation

Any object with these two methods will do, such as a torch.utils.data.Dataset. Its attribute `vocab`
is the number of token ids or classes; without it, its `classes` are counted, as torchvision's
datasets have them. An item may also be a dict of two entries, first the input. Numbers, lists and
arrays become tensors, and integers int64.

order.py computes which sample is row r of step s. So every sample is read exactly once per epoch on
any number of ranks, also when that number changes in mid-epoch, and a rank loads only its own rows.
An item must depend on its index alone: two ranks of tp load it twice, and compute with both.

Letters: R rows, T = seq, C channels, H and W sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_lab.data.order import Ids, Order, positions
from dist_lab.data.user_code import calling, refusal

Pair = tuple[Tensor, Tensor]


class FromDataset:
    """The `Data` of a map-style Dataset: `batch` samples per step, over all ranks.

    Raises UserError unless its first and last items are samples of text, or of images.
    """

    sha256 = ""  # hashing would read every sample
    validation_batches = 0
    tokenizer = None

    def __init__(
        self, spec: str, dataset: Any, held_out: Any = None, *, batch: int, seq: int, seed: int,
        validation_batches: int,
    ) -> None:  # fmt: skip
        self.name, self.vocab, self._batch = spec, vocab_of(spec, dataset), batch
        self._items = Items(spec, dataset, "dataset", seq, self.vocab)
        self.samples, self.image = self._items.count, self._items.image
        self._order = Order(self.samples, batch=batch, seed=seed)
        if held_out is not None:
            self._held_out = Items(spec, held_out, "held_out", seq, self.vocab, self._items.shapes)
            # Too few samples for one batch still give one batch, which repeats some of them.
            whole_batches = max(1, self._held_out.count // batch)
            self.validation_batches = min(validation_batches, whole_batches)

    def batch(self, step: int, rows: slice) -> Pair:
        """Text: two (R, T) int64. Images: (R, C, H, W) float32 and their classes (R,) int64."""
        return self._items.load(self.sample_ids(step, rows))

    def validation(self, index: int, rows: slice) -> Pair:
        """The same samples at every call, spread evenly over `held_out`."""
        numbers = positions(index, rows, self._batch) * self._held_out.count
        return self._held_out.load(numbers // (self.validation_batches * self._batch))

    def sample_ids(self, step: int, rows: slice) -> Ids:
        """The indices in the Dataset of these rows, (R,)."""
        return self._order(step, rows)


def vocab_of(spec: str, dataset: Any) -> int:
    """The number of token ids or classes. Raises UserError if the Dataset does not say it."""
    vocab, classes = getattr(dataset, "vocab", None), getattr(dataset, "classes", None)
    if vocab is None and isinstance(classes, Sequence):
        vocab = len(classes)
    if type(vocab) is not int or vocab < 1:
        raise refusal(
            spec,
            f"the {type(dataset).__name__} has no vocab: int, the number of its token ids or "
            "classes; set dataset.vocab = N",
        )
    return vocab


class Items:
    """The items of one Dataset, as checked tensors.

    Attributes:
        shapes: of input and target, by the first item or as given; all items must have them.
    """

    def __init__(
        self, spec: str, dataset: Any, name: str, seq: int, vocab: int,
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.dataset, self.name, self.vocab = spec, dataset, name, vocab
        with calling(spec, f"len({name})"):
            self.count = len(dataset)
        if not self.count:
            raise refusal(spec, f"{name} is empty: its len() is 0; return one with samples")
        first = self._pair(0)
        self.shapes = shapes or self._shapes_of(first[0], seq)
        image = self.shapes[0]
        self.image = (image[0], image[1], image[2]) if len(image) == 3 else None
        self.dtypes = torch.float32 if self.image else torch.int64, torch.int64
        self.load([0, self.count - 1])
        if not all(torch.equal(a, b) for a, b in zip(first, self._pair(0), strict=True)):
            raise refusal(
                spec,
                f"{name}[0] is not the same in two calls; let it depend on the index alone, with "
                "random numbers of a generator that is seeded with the index",
            )
        if not self.image and torch.equal(*first) and first[0].unique().numel() > 1:
            raise refusal(
                spec,
                f"{name}[0] has equal input and target, but the target of a token is the next one; "
                "return tokens[:-1], tokens[1:]",
            )

    def load(self, indices: Sequence[int] | Ids) -> Pair:
        """Load these items and stack them. Raises UserError if one is not like the first."""
        pairs = [self._checked(int(index)) for index in indices]
        inputs, targets = (
            torch.stack([pair[side] for pair in pairs])
            if pairs
            else torch.empty(0, *self.shapes[side], dtype=self.dtypes[side])
            for side in (0, 1)
        )
        return inputs, targets

    def _checked(self, index: int) -> Pair:
        """Returns an item. Raises UserError unless it has the shapes and dtypes of the first."""
        pair = self._pair(index)
        for role, x, shape, dtype in zip(
            ("input", "target"), pair, self.shapes, self.dtypes, strict=True
        ):
            what = f"{self.name}[{index}] has {role}"
            if x.shape != shape or x.dtype != dtype:
                wanted = f"{shape} of {dtype}, as all samples must have"
                raise refusal(self.spec, f"{what} {described(x)}, not {wanted}")
            if dtype == torch.float32 and not x.isfinite().all():
                raise refusal(self.spec, f"{what} values that are not finite; leave them out")
            if dtype == torch.int64 and not 0 <= x.min() <= x.max() < self.vocab:
                ids = f"{x.min()} to {x.max()}" if x.dim() else f"{x}"
                raise refusal(self.spec, f"{what} {ids}, although vocab is {self.vocab}")
        return pair

    def _shapes_of(self, x: Tensor, seq: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of input and target, by the kind of the first input."""
        if x.dtype == torch.int64 and x.dim() == 1:
            return (seq,), (seq,)
        if x.dtype == torch.float32 and x.dim() == 3:
            return tuple(x.shape), ()
        raise refusal(
            self.spec,
            f"{self.name}[0] has input {described(x)}; text has token ids ({seq},) of torch.int64, "
            "an image is (channels, height, width) of torch.float32",
        )

    def _pair(self, index: int) -> Pair:
        """Returns an item as two tensors. Raises UserError if it is none."""
        name = f"{self.name}[{index}]"
        with calling(self.spec, name):
            item = self.dataset[index]
        sides = list(item.values()) if isinstance(item, Mapping) else item
        if not isinstance(sides, tuple | list) or len(sides) != 2:
            found = f"a {type(item).__name__}"
            if isinstance(item, Mapping):
                found += f" of {', '.join(map(str, item))}"
            elif isinstance(sides, tuple | list):
                found += f" of {len(sides)}"
            raise refusal(self.spec, f"{name} is {found:.80}; return two: input, target")
        inputs, targets = (self._tensor(side, name) for side in sides)
        return inputs, targets

    def _tensor(self, value: object, name: str) -> Tensor:
        try:
            x = torch.as_tensor(value)
        except Exception as error:  # torch raises errors of many kinds
            kind = type(value).__name__
            why = f"{name} holds a {kind}, not a tensor; convert it in __getitem__"
            raise refusal(self.spec, why) from error
        is_integer = not (x.is_floating_point() or x.is_complex())
        return x.long() if is_integer and x.dim() < 2 else x  # more dims: bytes of an image


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"
