"""The policies by name, each with what its server has, in the order in which they came."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_lab.inference.policies.lmdeploy import LMDeploy
from dist_lab.inference.policies.orca import Orca
from dist_lab.inference.policies.splitfuse import SplitFuse
from dist_lab.inference.policies.static import Static
from dist_lab.inference.policies.tgi import TGI
from dist_lab.inference.policies.vllm import VLLM
from dist_lab.inference.queues import Policy


@dataclass(frozen=True)
class Row:
    """A policy.

    Attributes:
        build: (sequences at once, tokens of a step) -> the policy. Where the server knows no such
            budget, the second number is not used.
        prefix_cache: whether the server finds beginnings of prompts in the cache.
        server: whose policy it is.
    """

    build: Callable[[int, int], Policy]
    prefix_cache: bool
    server: str


POLICIES = {
    "static": Row(lambda most, budget: Static(most), False, "FasterTransformer"),
    "orca": Row(lambda most, budget: Orca(most), False, "Orca"),
    "tgi": Row(lambda most, budget: TGI(sequences=most), True, "text-generation-inference"),
    "vllm": Row(lambda most, budget: VLLM(budget, most), True, "vLLM"),
    "splitfuse": Row(lambda most, budget: SplitFuse(budget, most), False, "DeepSpeed-MII"),
    "lmdeploy": Row(lambda most, budget: LMDeploy(most), False, "lmdeploy, TurboMind"),
}
