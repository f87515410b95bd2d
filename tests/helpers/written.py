"""A small text of several files, such as people write: code, umlauts, emojis, and no UTF-8."""

from pathlib import Path

LINES = [
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
