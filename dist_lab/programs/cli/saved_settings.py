"""The settings in a checkpoint: whoever has made it could write anything there."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.settings import checked


def checked_settings(saved: Mapping[str, Any], folder: object) -> dict[str, Any]:
    """Returns those settings that train.py has, each within the limits of its flag.

    Args:
        folder: of the checkpoint, for messages.

    Raises:
        UserError: a value is none that train.py accepts.
    """
    options = {option.name: option for option in fields(Config)}
    place = f"the settings of {str(folder)!r}"
    return {
        name: checked(options[name], value, place)
        for name, value in saved.items()
        if name in options and value is not None
    }
