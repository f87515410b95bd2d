"""quantize.py --table: every method with every width, on several runs; loss against bytes.

1. without --checkpoint: train the README's model with three seeds; for qat again, with rounded
   weights. A run that is there already goes on, or stays as it is.
2. for each run start a process, which quantises it by every method with every width: `cells`
3. print the table; write quantize.json, .csv and .png
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_lab.errors import UserError, shown
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import export
from dist_lab.observe.run_dir import make_folder
from dist_lab.processes.launcher import on_new_ranks
from dist_lab.programs.cli.checks import parse
from dist_lab.programs.quantize.measure import measure, scheme_of
from dist_lab.programs.quantize.methods import METHODS, QAT, QAT_WIDTHS
from dist_lab.programs.quantize.report import report
from dist_lab.programs.quantize.rounded_run import own_loss_note
from dist_lab.programs.quantize.settings import Quantize
from dist_lab.programs.quantize.source import calibration_of, loss_of, open_source

SEEDS = 0, 1, 2
NONE = "none"  # as the methods of a run of which only the loss is wanted
RUN = "--nproc 4 --strategy fsdp --steps 200 --save-every 200 --keep 1 --resume auto"


class Failed(Exception):
    """Ranks that were started have ended with this exit status, and have said why."""

    def __init__(self, status: int) -> None:
        self.status = status


def table(config: Quantize) -> int:
    """Make the table. Returns the exit status."""
    folder = make_folder(config.out, "quantize.json")
    try:
        rows = list(all_rows(config, folder))
    except Failed as failed:
        return failed.status
    if len({(row["unit"], row["bytes_before"]) for row in rows}) != 1:
        raise UserError(
            f"the runs {shown(config.checkpoint)} are not of one model, so a mean of their losses "
            "says nothing (--checkpoint); give runs that differ in their seeds"
        )
    report(rows, config, folder)
    return 0


def all_rows(config: Quantize, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of all runs. Raises Failed."""
    methods = [method for method in config.method_list if method != QAT]
    if config.checkpoint:
        for number, path in enumerate(config.checkpoint.split(",")):
            run = Path(path.strip())
            file = folder / f"{number}-{run.name}.json"
            yield from in_process(config, run, methods, file)["rows"]
        return
    for seed in SEEDS:
        run = trained(config, folder, seed)
        plain = in_process(config, run, methods, folder / f"{run.name}.json")
        yield from plain["rows"]
        for bits in QAT_WIDTHS if QAT in config.method_list else ():
            if config.bits in (None, bits):
                aware = trained(config, folder, seed, bits)
                of_bits = replace(config, bits=bits, symmetric=False)  # as --qat rounds
                found = in_process(of_bits, aware, ["rtn"], folder / f"{aware.name}.json")
                for row in found["rows"]:
                    yield row | {"run": str(run), "method": QAT, "loss_before": plain["loss"]}


def trained(config: Quantize, folder: Path, seed: int, bits: int | None = None) -> Path:
    """Train a run, unless it is there, with weights rounded to `bits`. Returns its folder."""
    name = f"seed-{seed}" if bits is None else f"seed-{seed}-qat-{bits}-{config.columns}"
    argv = [*RUN.split(), "--seed", str(seed), "--out", str(folder / name)]
    argv += [] if bits is None else ["--qat", f"{bits}:{config.columns}"]
    settings = parse(argv)
    body = "dist_lab.programs.train.command:train"
    if status := on_new_ranks("train.py", settings, body, settings.nproc or 1):
        raise Failed(status)
    return folder / name


def in_process(config: Quantize, run: Path, methods: list[str], path: Path) -> dict[str, Any]:
    """Start a process that runs `cells`, and return what it has written. Raises Failed."""
    settings = replace(
        config, checkpoint=str(run), methods=",".join(methods) or NONE, out=str(path), table=False
    )
    body = "dist_lab.programs.quantize.table:cells"
    if status := on_new_ranks("quantize.py", settings, body, 1):
        raise Failed(status)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def cells(config: Quantize, mesh: Mesh) -> int:
    """Quantise one run by all methods, with all widths. Rank 0 writes the rows to `config.out`."""
    source = open_source(config.checkpoint, mesh, config.data)
    axis = mesh["dp"]
    calibration = calibration_of(source, config.calibration, config.shards, axis)
    before, rows = loss_of(source.model, source, axis), []
    name = Path(config.checkpoint).name
    note = own_loss_note(source, axis)
    if note and mesh.rank == 0:
        print(f"{name}: {note}", flush=True)
    for method in [] if config.methods == NONE else config.method_list:
        row = METHODS[method]
        for bits in row.widths if config.bits is None else {config.bits} & set(row.widths):
            scheme = scheme_of(config, method, bits)
            options = {name: getattr(config, name) for name in row.options}
            measured = measure(source, calibration, method, scheme, options, before=before)
            rows.append({
                "run": config.checkpoint, "method": method, "bits": bits,
                "unit": source.unit, "loss": measured.loss[1], "loss_before": before,
                "bytes": measured.size[1], "bytes_before": measured.size[0],
                "seconds": measured.seconds,
            })  # fmt: skip
            if mesh.rank == 0:
                shown = (
                    f"{method} {bits} bits: {source.unit} {before:.4f} -> {measured.loss[1]:.4f}"
                )
                print(f"{name}: {shown}", flush=True)
    if mesh.rank == 0:
        export.write_json(Path(config.out), {"loss": before, "rows": rows})
    return 0
