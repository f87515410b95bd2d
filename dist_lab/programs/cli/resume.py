"""Where a run goes on, as in `--resume auto`. Does not import torch."""

import re

from dist_lab.errors import UserError, shown


def read_resume(value: object, where: str) -> str:
    """Read auto, DIR or auto:DIR. Raises UserError if it is none of these.

    >>> read_resume("auto:runs/001", "--resume")
    'auto:runs/001'
    """
    if (
        not isinstance(value, str)
        or value in ("", "auto:")
        or re.search("[\0\ud800-\udfff]", value)
    ):
        raise UserError(
            f"resume cannot be {shown(value)} ({where}); give auto, a folder or auto:FOLDER, or "
            "leave it out to start a run"
        )
    return value


def is_auto(text: str) -> bool:
    """Whether a run goes on after the newest checkpoint of its own folder, if there is one.

    >>> is_auto("auto"), is_auto("auto:runs/001"), is_auto("autumn")
    (True, True, False)
    """
    return text.partition(":")[0] == "auto"
