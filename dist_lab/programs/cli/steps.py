"""Some steps of a run, as in `--timeline 3:5`. Does not import torch."""

from dist_lab.errors import UserError, shown


def read_steps(value: object, where: str) -> str:
    """Read FIRST:LAST, or "" for none. Raises UserError unless these are two numbers in order.

    >>> read_steps("3:05", "--timeline")
    '3:5'
    """
    if value == "":
        return ""
    words = str(value).split(":")
    if len(words) != 2 or not all(len(w) < 10 and w.isascii() and w.isdigit() for w in words):
        raise UserError(f"no steps {shown(value)} ({where}); give FIRST:LAST, such as 3:5")
    first, last = map(int, words)
    if first == 0:
        raise UserError(f"steps are numbered from 1, not {first} ({where}); give 1:{max(1, last)}")
    if first > last:
        raise UserError(
            f"steps {first}:{last} end before they begin ({where}); give {last}:{first}"
        )
    return f"{first}:{last}"


def check_steps(text: str, steps: int, where: str) -> None:
    """Raise UserError if a run of so many steps does not have all of these."""
    if text and (last := steps_in(text)[-1]) > steps:
        have = f"the run has {steps} steps" if steps > 1 else "the run has 1 step"
        raise UserError(
            f"{have}, and not step {last} ({where}); give {min(steps_in(text)[0], steps)}:{steps}, "
            f"or --steps {last}"
        )


def steps_in(text: str) -> range:
    """
    >>> list(steps_in("3:5")), list(steps_in(""))
    ([3, 4, 5], [])
    """
    first, _, last = text.partition(":")
    return range(int(first), int(last) + 1) if text else range(0)
