"""Up to how many rows does a weight of few bits pay? `python tests/nightly/weight_only.py`

AutoAWQ (MIT) says that 4-bit weights are faster while a product is bound by memory, that is for few
rows, and slower beyond. For the matrices of gpt 124m and 25m, and M rows from 1 to 512, prints the
microseconds of each product y[M, F] = x[M, D] . W[D, F]: the median of alternating rounds, of the
CPU time of one thread, so that whatever else runs on the machine does not count:

    float32, bfloat16       torch's matmul of the plain weight
    torch int8, torch int4  torch's own kernels of packed weights, bfloat16 inputs
    tiles                   ours, float32: packed_matmul, a tile of 4-bit codes at a time
    whole                   ours, float32: the whole weight is made first, then torch's matmul

and the smallest M from which float32 wins over each, and `whole` over `tiles`: that is FEW_ROWS.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_lab.quantize.formula import Scheme, round_to_nearest
from dist_lab.quantize.packed_matmul import dequantize, packed_matmul, sorted_by_group
from dist_lab.quantize.packing import as_stored, pack

SIZES = {"124m": [(1024, 1024), (1024, 2496), (2496, 1024)], "25m": [(512, 1536), (1536, 512)]}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GROUP = 32
Product = Callable[[Tensor], Tensor]


def products(inputs: int, outputs: int, bits: int) -> dict[str, Product]:
    """The products to compare, each a function of x (M, D) in float32 or bfloat16."""
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    quantized = as_stored(round_to_nearest(weight, Scheme(bits, GROUP)))
    packed = pack(quantized)
    in_order = sorted_by_group(packed)
    short = weight.bfloat16()

    rows = round_to_nearest(weight, Scheme(8, symmetric=True))
    codes, scale = rows.codes, rows.grid.scale.flatten().bfloat16()
    four = quantized.codes.int() if bits == 4 else torch.randint(16, (outputs, inputs)).int()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(four, 1)
    table = torch.stack([in_order.scales, in_order.scales * 0], -1).bfloat16().contiguous()

    return {
        "float32": lambda x: torch.nn.functional.linear(x, weight),
        "bfloat16": lambda x: torch.nn.functional.linear(x, short),
        "torch int8": lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale),
        "torch int4": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, GROUP, table),
        "tiles": lambda x: packed_matmul(x, in_order),
        "whole": lambda x: torch.nn.functional.linear(x, dequantize(packed, torch.float32)),
    }


def microseconds(functions: dict[str, Product], rows: int, inputs: int, rounds: int) -> dict:
    """The median CPU time of each product."""
    x = torch.randn(rows, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            given = x if name in ("float32", "tiles", "whole") else x.bfloat16()
            began = time.thread_time()
            function(given)
            if turn:
                seconds[name].append(time.thread_time() - began)
    return {name: 1e6 * statistics.median(each) for name, each in seconds.items()}


def crossover(table: dict[int, dict[str, float]], name: str, other: str) -> str:
    """From which M on `other` is faster than `name`, at that M and at all larger ones."""
    worse = [rows for rows in table if table[rows][other] < table[rows][name]]
    after = [rows for rows in worse if all(more in worse for more in table if more > rows)]
    if not after:
        return "none up to 512"
    return f"M = {after[0]}" if after[0] > ROWS[0] else "M = 1: never faster"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size, shapes in SIZES.items():
        for inputs, outputs in shapes:
            functions = products(inputs, outputs, given.bits)
            print(f"\ngpt {size}, W {inputs} x {outputs}, {given.bits} bits: microseconds")
            print("| M |" + "".join(f" {name} |" for name in functions))
            table = {}
            for rows in ROWS:
                table[rows] = microseconds(functions, rows, inputs, given.rounds)
                print(f"| {rows} |" + "".join(f" {t:.0f} |" for t in table[rows].values()))
            for name in ("torch int8", "torch int4", "tiles"):
                for other in ("float32", "bfloat16"):
                    print(f"{other} beats {name} from {crossover(table, name, other)}")
            print(f"whole beats tiles from {crossover(table, 'tiles', 'whole')}")


if __name__ == "__main__":
    main()
