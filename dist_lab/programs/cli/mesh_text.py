"""Meshes as text: "pp=2,tp=2" on a command line, or a table in a file.

`read_mesh` converts both to a mapping, axis -> size. All other code uses the mapping.
"""

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
