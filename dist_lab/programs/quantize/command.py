"""What each rank of quantize.py runs: quantise one model, compare its loss, and write it."""


import torch

from dist_lab.comm.agree import together
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.quantize.measure import Measured, measure
from dist_lab.programs.quantize.settings import Quantize
from dist_lab.programs.quantize.source import Source, calibration_of, open_source
from dist_lab.programs.quantize.table import table
from dist_lab.quantize.formula import Scheme


def run(config: Quantize, mesh: Mesh) -> int:
    """Quantise one model, or make a table of many. Returns the exit status."""
    if config.table:
        return table(config)
    source = open_source(config.checkpoint, config.data, mesh)
    calibration = calibration_of(source, config.calibration, config.shards, mesh["dp"])
    if mesh.rank == 0:
        print(heading(config, source, mesh), flush=True)
    measured = measure(source, calibration, config.method, scheme_of(config), config.method_options)
    with together(mesh.world):
        if mesh.rank == 0 and config.out:
            save(config, source, measured)
    if mesh.rank == 0:
        for note in measured.notes:
            print(note)
        print(closing_line(source, measured))
    return 0


def scheme_of(config: Quantize) -> Scheme:
    """The scheme of the settings. Scales are those of the file, in 16 bits."""
    assert config.bits is not None
    return Scheme(config.bits, config.group, config.symmetric, torch.float16)


def save(config: Quantize, source: Source, measured: Measured) -> None: ...


def heading(config: Quantize, source: Source, mesh: Mesh) -> str:
    """One line before the work begins: it may take a while."""
    groups = "one scale a row" if config.group == -1 else f"groups of {config.group}"
    samples = f"{config.calibration} samples"
    return (
        f"{config.method}, {config.bits} bits, {groups}: {samples} on {mesh_in_words(mesh.axes)}, "
        f"{source.checkpoint}"
    )


def closing_line(source: Source, measured: Measured) -> str:
    """The last line.

    >>> closing_line(SimpleNamespace(unit="nats/byte"), Measured(..., (1.6, 1.7), (4000, 1000), 1, []))
    'nats/byte 1.6000 -> 1.7000, bytes 4,000 -> 1,000'
    """
    (loss, loss_after), (size, size_after) = measured.loss, measured.size
    losses = f"{source.unit} {loss:.4f} -> {loss_after:.4f}"
    return f"{losses}, bytes {size:,} -> {size_after:,}"
