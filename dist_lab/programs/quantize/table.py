"""quantize.py --table: every method with every width, on several runs; loss against bytes.

    1. without --checkpoint, train the README's model with three seeds, and for qat with rounded
       weights again; a run that is there goes on, or stays
    2. on each run's ranks: every method with every width (`cells_of_run`)
    3. the table, quantize.json, .csv and .png
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import export
from dist_lab.observe.console import empty_table, wide_console
from dist_lab.observe.run_dir import make_folder
from dist_lab.processes.launcher import on_new_ranks
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.quantize.measure import measure
from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.settings import Quantize
from dist_lab.programs.quantize.source import calibration_of, loss_of, open_source
from dist_lab.quantize.formula import Scheme
