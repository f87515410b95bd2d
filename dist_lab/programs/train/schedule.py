"""The learning rate of each step, and what becomes of it when a run goes on with other steps."""

import math
from dataclasses import replace

from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.settings import flag


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to a tenth (Loshchilov & Hutter, arXiv:1608.03983)."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def other_steps(step: int, saved: int, config: Config) -> str:
    """Says what another number of steps makes of the learning rate; "" if nothing.

    Args:
        step: the last one that was taken.
        saved: the steps of the run that took it.
    """
    if saved == config.steps or step >= config.steps:
        return ""
    was = learning_rate(min(step + 1, saved), replace(config, steps=saved))
    now = learning_rate(step + 1, config)
    return (
        f"the run had {flag('steps')} {saved} and goes on with {config.steps}: the learning rate "
        f"falls with all steps, so step {step + 1} has {now:.3g} in place of {was:.3g}"
    )
