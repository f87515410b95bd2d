"""What a cache, continuous batching and tp bring: `python tests/nightly/serving_numbers.py`

    [--size small] [--tokens 512] [--rounds 5] [--only cache,length,race,tp]

One thread a rank. Compared things take turns, and medians count. Prints

    cache     the 256th token, and 512 tokens in all, without a cache beside with one; each to be
              10 times or more
    length    a token at 512 beside one at 32, with a contiguous cache and a paged one, one
              sequence; each to be 1.3 or less
    race      tokens a second on the wall for each policy on the built-in trace, beside static, with
              the memory of serve_compare.py and with ample memory; the best to be 2 times or more.
              And the most empty places a sequence, of policies that take blocks on demand; to be
              less than a block
    tp        tp=2 beside tp=1: tokens a second of one sequence and of 16, and bytes of weights and
              of the cache on a rank
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dist_lab.inference.cache import Contiguous
from dist_lab.inference.clock import Wall
from dist_lab.inference.engine import Engine
from dist_lab.inference.policies.table import POLICIES
from dist_lab.inference.policies.vllm import VLLM
from dist_lab.inference.sequence import Request
from dist_lab.inference.stage import Stage, load_stage
from dist_lab.inference.text import Bytes
from dist_lab.inference.trace import built_in
from dist_lab.mesh.mesh import init_mesh
from dist_lab.processes.pool import Pool
from dist_lab.processes.ranks import PRELOAD
from dist_lab.programs.serve_compare.calibrate import calibrate
from dist_lab.programs.serve_compare.random_weights import random_weights
from dist_lab.programs.serve_compare.replay import replay
from dist_lab.programs.serve_compare.results import result

BLOCK, SEQUENCES, BUDGET = 16, 16, 64
ON_DEMAND = ("vllm", "splitfuse", "lmdeploy")
SHORT, MIDDLE = 32, 256


def stage_of(size: str, tp: int = 1) -> Stage:
    return load_stage(random_weights(size), init_mesh(tp=tp))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forward(stage: Stage, tokens: torch.Tensor, cache: list[Contiguous]) -> None:
    """Compute tokens after those in the cache, and the logits of the last."""
    positions = cache[0].positions(len(tokens))
    stage.forward(tokens, positions, cache, torch.tensor([len(tokens) - 1]))


def cache_numbers(stage: Stage, tokens: int, rounds: int) -> None:
    """Token n without a cache is a forward of n tokens; with one, of one token after n - 1."""
    text = torch.arange(tokens) % 256
    at = min(MIDDLE, tokens)
    without, cached = [], []
    for _ in range(rounds):
        cache = stage.new_cache(at)
        forward(stage, text[: at - 9], cache)
        for n in range(at - 9, at - 1):  # as while a text is generated
            forward(stage, text[n : n + 1], cache)
        cached.append(seconds(lambda: forward(stage, text[at - 1 : at], cache)))  # noqa: B023
        without.append(seconds(lambda: forward(stage, text[:at], stage.new_cache(at))))
    ratio = statistics.median(without) / statistics.median(cached)
    print(
        f"cache   token {at}: {1e3 * statistics.median(without):.1f} ms without, "
        f"{1e3 * statistics.median(cached):.2f} ms with: {ratio:.1f} times"
    )

    def all_cached() -> None:
        cache = stage.new_cache()
        for n in range(tokens):
            forward(stage, text[n : n + 1], cache)

    def all_without() -> None:
        for n in range(tokens):
            forward(stage, text[: n + 1], stage.new_cache(n + 1))

    fast = min(seconds(all_cached) for _ in range(2))
    slow = seconds(all_without)
    print(
        f"cache   {tokens} tokens: {slow:.2f} s without, {fast:.2f} s with: {slow / fast:.1f} times"
    )


def length_numbers(stage: Stage, tokens: int, rounds: int) -> None:
    """Each round times a token at SHORT and one at `tokens`, with both caches."""
    lengths = (SHORT, tokens)
    contiguous = {n: stage.new_cache(n + rounds + 9) for n in lengths}
    engines = {n: decoding(stage, 1, n, rounds + 9) for n in lengths}
    for n, cache in contiguous.items():
        forward(stage, torch.arange(n) % 256, cache)
    times: dict[tuple[str, int], list[float]] = {}
    one = torch.tensor([7])
    for _ in range(rounds + 2):
        for n in lengths:
            spent = seconds(lambda: forward(stage, one, contiguous[n]))  # noqa: B023
            times.setdefault(("contiguous", n), []).append(spent)
            times.setdefault(("paged", n), []).append(seconds(engines[n].step))
    for kind in ("contiguous", "paged"):
        short, long = (statistics.median(times[kind, n][2:]) for n in lengths)
        print(
            f"length  {kind}: a token at {SHORT} {1e3 * short:.2f} ms, at {tokens} "
            f"{1e3 * long:.2f} ms: {long / short:.2f} times"
        )


def decoding(stage: Stage, count: int, length: int, new: int) -> Engine:
    """An engine in which `count` sequences of this length decode."""
    blocks = count * (-(-(length + new) // BLOCK))
    policy = VLLM(count * length, count)
    engine = Engine(stage, Bytes(), policy, blocks, BLOCK, prefix_cache=False)
    for number in range(count):
        engine.add(str(number), Request([number] * length, new))
    engine.step()
    return engine


def race_numbers(stage: Stage, requests: int, rounds: int) -> None:
    trace = built_in(requests, 6.0, Bytes.vocab)
    tick = calibrate(stage, Bytes())[0](1)
    for blocks in (80, 512):
        rates: dict[str, list[float]] = {name: [] for name in POLICIES}
        empty: dict[str, float] = {}
        for _ in range(rounds):
            for name, row in POLICIES.items():
                policy = row.build(SEQUENCES, BUDGET)
                engine = Engine(stage, Bytes(), policy, blocks, BLOCK, row.prefix_cache)
                seen = replay(engine, trace, tick, Wall(stage.mesh))
                rates[name].append(result(name, "wall", seen, BLOCK, None).rate)
                shares = [s.counts.empty / s.counts.running for s in seen.steps if s.counts.running]
                empty[name] = max(shares)
        medians = {name: statistics.median(found) for name, found in rates.items()}
        for name, found in rates.items():
            ratios = [mine / static for mine, static in zip(found, rates["static"], strict=True)]
            print(
                f"race    {blocks} blocks, {name}: {medians[name]:.0f} tokens/s, "
                f"{statistics.median(ratios):.2f} x static, of each round {min(ratios):.2f} to "
                f"{max(ratios):.2f}"
            )
        worst = max(empty[name] for name in ON_DEMAND)
        print(f"race    {blocks} blocks, on demand: {worst:.1f} empty places a sequence at most")


def tp_numbers(size: str, rounds: int, new: int) -> None:
    found: dict[int, list[tuple[dict[int, float], int, int]]] = {1: [], 2: []}
    for _ in range(rounds):
        for tp in found:
            pool = Pool(PRELOAD)
            found[tp].append(pool.run(tp, tp_on_rank, tp, size, new, timeout=900.0)[0])
            pool.close()
    for tp, runs in found.items():
        rates = {n: statistics.median(rate[n] for rate, _, _ in runs) for n in runs[0][0]}
        _, weights, cache = runs[0]
        speeds = ", ".join(f"{rate:.0f} tokens/s of {n}" for n, rate in rates.items())
        print(
            f"tp      tp={tp}: {speeds}; on a rank {weights / 1e6:.2f} MB of weights, "
            f"{cache:,} B of cache a token"
        )


def tp_on_rank(rank: int, tp: int, size: str, new: int) -> tuple[dict[int, float], int, int]:
    """Tokens a second by number of sequences, bytes of weights, and of the cache for a token."""
    torch.set_num_threads(1)
    stage = stage_of(size, tp)
    rates = {}
    for count in (1, 16):
        engine = decoding(stage, count, SHORT, new + 3)
        engine.step()
        spent = statistics.median(seconds(engine.step) for _ in range(new))
        rates[count] = count / spent
    width = stage.layers[0].self_attn.k_proj.weight.size(0)
    weights = sum(p.nbytes for p in stage.model.parameters())
    return rates, weights, 2 * len(stage.layers) * width * 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--only", default="cache,length,race,tp")
    given = parser.parse_args()
    torch.set_num_threads(1)
    only = given.only.split(",")
    stage = stage_of(given.size)
    if "cache" in only:
        cache_numbers(stage, given.tokens, given.rounds)
    if "length" in only:
        length_numbers(stage, given.tokens, 20 * given.rounds)
    if "race" in only:
        race_numbers(stage, given.requests, given.rounds)
    if "tp" in only:
        tp_numbers(given.size, given.rounds, new=50)


if __name__ == "__main__":
    main()
