"""A small text of several files, such as people write, and files of other people's tokenizers."""

from pathlib import Path
from typing import Any

import torch

LINES = [  # code, umlauts, emojis, and what is no UTF-8
    b"def add(self, first, second):\n        return self.first + self.second\n\n",
    "    # größer als π, sagte sie: «schön» 😀 — naïve\n".encode(),
    b"for number in range(10):\n    print(number, 'numbers')\r\n\t\t\n",
    b"\xff\xfe no UTF-8 \xc3( <|endoftext|> \xed\xa0\x80\n",
]


def folder(at: Path, files: int = 23) -> Path:
    """A folder of this many files, so that two of 23 are for validation."""
    for number in range(files):
        path = at / "text" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        turn = number % len(LINES)
        words = b" ".join(b"word%d" % (number * i % 17) for i in range(40))
        path.write_bytes(b"".join([*LINES[turn:], *LINES[:turn]] * 3) + words)
    return at / "text"


def llama_2(**changes: Any) -> dict[str, Any]:
    """A file in the form of Llama 2's, with a few tokens."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
    ]
    names += ["▁ab", "▁▁"]
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": True, **added} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "byte_fallback": True, "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": ["▁ a", "▁a b", "▁ ▁"],
        },
        **changes,
    }  # fmt: skip


class Tokens:
    """A map-style Dataset of tokens that nobody knows the meaning of: `--data written:tokens`."""

    vocab = 301

    def __init__(self, seq: int) -> None:
        self.seq = seq

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = (torch.arange(self.seq + 1) * (index + 3)) % self.vocab
        return row[:-1], row[1:]


def tokens(*, batch: int, seq: int, seed: int) -> Tokens:
    return Tokens(seq)
