"""Quantise a trained model, after training:

    python launch/quantize.py --checkpoint RUN --method gptq --bits 3 --out DIR
    python launch/quantize.py --checkpoint RUN --method awq --bits 4 --nproc 4 --mesh dp=4 --out DIR
    python launch/quantize.py --table                       every method, every width, three seeds

Methods: rtn, gptq, awq (weights of 2, 3, 4 or 8 bits), w8a8, smoothquant (weights and inputs of 8).
Ranks share out the samples and the layers, and have the same result as one process, to the bit. The
last line compares the validation loss and the bytes of all tensors. DIR has AutoGPTQ's format.
"""

import sys
from functools import partial

from dist_lab.processes import launcher
from dist_lab.programs.quantize import settings

read = partial(settings.read, description=__doc__)

if __name__ == "__main__":
    sys.exit(launcher.main("quantize.py", read, "dist_lab.programs.quantize.command:run"))
