"""Prints the failures of ranks to stderr, each once, in the words of the command line."""

import re
import sys
from collections.abc import Sequence

from dist_lab.processes.failures import (
    Failure,
    by_cause,
    causes,
    describe,
    heading,
    one_of_many,
    ranks_in_words,
)


def report(program: str, failures: Sequence[Failure], size: int, debug: bool) -> int:
    """Print the failures to stderr, each once. Returns the exit status."""
    same_cause = causes(failures)
    nearest = one_of_many(same_cause)
    refusals = [failure for failure in nearest if failure.refused]
    described = [failure for failure in nearest if debug or not failure.refused]
    text = describe(described, size, debug=debug)
    others = [failure.rank for failure in failures if failure not in same_cause]
    if text and others:
        text += heading(f"{ranks_in_words(others)} of {size}: timed out, or lost the connection")
    if not any(failure.board or failure.details for failure in nearest):  # it died silently
        text += next((f"{f.board}\n" for f in by_cause(failures) if f.board), "")
    if refusals:
        text += f"{program}: error: {in_flags(refusals[0].summary)}\n"
    print(text, end="", file=sys.stderr, flush=True)
    return max(failure.status for failure in nearest)


# A Python parameter in an error message of dist_lab: `name=`, maybe with a value. After a comma it
# belongs to a call that the message quotes, and is not replaced.
PARAMETER = re.compile(
    r"""(?<!, )\b(impl|schedule|chunks|microbatches|backend|data|seq|cache|download|strategy|"""
    r"""threads|tokenizer|reduce_order|reduce_dtype|defer_reduce|sync_batchnorm|offload)="""
    r"""(?:True|"([^"]*)"|('[^']*'|\w+)|(?=[),;]))"""
)


def in_flags(line: str) -> str:
    """Returns an error message of dist_lab with flags in place of Python parameters.

    >>> in_flags('not in 3 (microbatches=); give microbatches=4, or impl="hand"')
    'not in 3 (--microbatches); give --microbatches 4, or --impl hand'
    >>> in_flags("data='a b': words(batch=4, seq=6) raised ValueError")
    "--data 'a b': words(batch=4, seq=6) raised ValueError"
    """

    def flag(match: re.Match[str]) -> str:
        return " ".join(filter(None, ("--" + match[1].replace("_", "-"), match[2], match[3])))

    return PARAMETER.sub(flag, line)
