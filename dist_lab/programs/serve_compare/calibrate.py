"""Measures what a step costs on this model and machine: a + b n seconds for n tokens."""

import time

from dist_lab.inference.clock import Cost, of_rank_0
from dist_lab.inference.engine import Engine
from dist_lab.inference.policies.orca import Orca
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import Stage
from dist_lab.inference.text import Tokenizer
from dist_lab.observe.fit import nonnegative_fit

SEQUENCES = (1, 2, 4, 8, 16, 32)  # numbers of sequences that decode together
PROMPTS = (8, 32, 128)  # lengths of a prompt that is computed alone
LENGTH = 64  # of the sequences that decode
STEPS = 7  # of each kind; the fastest counts, as other programs disturb the others


def calibrate(stage: Stage, tokenizer: Tokenizer) -> tuple[Cost, float]:
    """Time steps of different sizes, and fit a and b by least squares. Collective.

    Returns:
        The cost, and the root mean square of the relative errors of the fit.
    """
    amounts: list[list[float]] = []
    times: list[float] = []
    for count in SEQUENCES:
        amounts.append([1, count])
        times.append(decoding(stage, tokenizer, count))
    for length in PROMPTS:
        amounts.append([1, length])
        times.append(min(prompt(stage, tokenizer, length) for _ in range(STEPS)))
    fitted = nonnegative_fit(amounts, times)
    assert fitted is not None, "more rows than costs"
    a, b, error = of_rank_0(stage.mesh, *fitted.x, fitted.error or 0.0)
    return Cost(a, b), error


def decoding(stage: Stage, tokenizer: Tokenizer, count: int) -> float:
    """Seconds of a step in which so many sequences decode."""
    engine = Engine(stage, tokenizer, Orca(count), count * (LENGTH // 16 + 1), prefix_cache=False)
    for number in range(count):
        engine.add(str(number), Request([number % tokenizer.vocab] * LENGTH, STEPS + 2))
    engine.step()  # the prompts
    engine.step()  # warms up
    return min(timed(engine) for _ in range(STEPS))


def prompt(stage: Stage, tokenizer: Tokenizer, length: int) -> float:
    """Seconds of a step that computes a prompt."""
    engine = Engine(stage, tokenizer, Orca(1), length // 16 + 1, prefix_cache=False)
    engine.add("", Request([0] * length, 1))
    return timed(engine)


def timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start
