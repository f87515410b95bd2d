"""Meshes as text: "pp=2,tp=2" on a command line, a table in a file, or the word "pp2xtp2".

`read_mesh` and `read_mesh_word` convert them to a mapping, axis -> size. All other code uses the
mapping.
"""

import re
from collections.abc import Mapping
from typing import Any

from dist_lab.errors import UserError, shown


def read_mesh(value: Any, where: str) -> dict[str, int] | None:
    """Returns axis -> size, read from "dp=2,tp=2" or a table in a file; None if there is no axis.

    >>> read_mesh("dp=2, tp=4", "--mesh"), read_mesh("", "--mesh")
    ({'dp': 2, 'tp': 4}, None)
    """
    text = mesh_in_words(value) if isinstance(value, dict) else value
    axes: dict[str, int] = {}
    for part in str(text).split(",") if text != "" else []:
        name, _, size = (word.strip() for word in part.partition("="))
        if name in axes or not (size.isdecimal() and len(size) < 10 and int(size) > 0):
            raise UserError(
                f"mesh cannot be {shown(text)} ({where}); give each axis once, with a size of 1 or "
                "more: dp=2"
            )
        axes[name] = int(size)
    return axes or None


def mesh_in_words(axes: Mapping[str, Any]) -> str:
    """
    >>> mesh_in_words({"dp": 2, "tp": 4})
    'dp=2,tp=4'
    """
    return ",".join(f"{name}={shown(size)}" for name, size in axes.items())


def read_mesh_word(word: str, where: str) -> dict[str, int]:
    """Returns axis -> size, read from a mesh without punctuation.

    >>> read_mesh_word("pp2xfsdp4", "--strategies")
    {'pp': 2, 'fsdp': 4}
    """
    axes: dict[str, int] = {}
    for part in word.split("x"):
        match = re.fullmatch("([a-z]+)([0-9]{1,9})", part)
        if match is None or match[1] in axes or int(match[2]) < 1:
            raise UserError(
                f"mesh cannot be {shown(word)} ({where}); give each axis once, with a size of 1 or "
                "more: pp2xfsdp2"
            )
        axes[match[1]] = int(match[2])
    return axes


def mesh_word(axes: Mapping[str, int]) -> str:
    """
    >>> mesh_word({"pp": 2, "fsdp": 4})
    'pp2xfsdp4'
    """
    return "x".join(f"{name}{size}" for name, size in axes.items())
