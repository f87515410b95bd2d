"""What each rank of quantize.py runs: quantise one model, compare its loss, and write it."""

from torch import nn

from dist_lab.checkpoint.exchange import gptq_files
from dist_lab.checkpoint.exchange.folders import check_new
from dist_lab.comm.agree import together
from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.programs.cli.mesh_text import mesh_in_words
from dist_lab.programs.quantize.measure import Measured, measure, scheme_of
from dist_lab.programs.quantize.methods import METHODS
from dist_lab.programs.quantize.rounded_run import own_loss_note, scheme_note
from dist_lab.programs.quantize.settings import Quantize
from dist_lab.programs.quantize.source import Source, calibration_of, open_source
from dist_lab.programs.quantize.table import table
from dist_lab.quantize.blocks import check_linears
from dist_lab.quantize.packing import check_storable
from dist_lab.zoo import GPT


def run(config: Quantize, mesh: Mesh) -> int:
    """Quantise one model, or make a table of many. Returns the exit status."""
    if config.table:
        return table(config)
    source = open_source(config.checkpoint, mesh, config.data)
    assert config.bits is not None
    scheme = scheme_of(config, config.method, config.bits)
    with together(mesh.world):
        check_linears(source.model, scheme)
        if config.out:
            check_output(config, source)
    calibration = calibration_of(source, config.calibration, config.shards, mesh["dp"])
    if mesh.rank == 0:
        print(heading(config, source, mesh), flush=True)
    for note in (own_loss_note(source, mesh["dp"]), scheme_note(source.config, scheme)):
        if note and mesh.rank == 0:
            print(note, flush=True)
    measured = measure(source, calibration, config.method, scheme, config.method_options)
    with together(mesh.world):
        if mesh.rank == 0 and config.out:
            save(config, source, measured)
    if mesh.rank == 0:
        for note in measured.notes:
            print(note)
        print(f"{config.method} took {measured.seconds:.1f} s")
        print(closing_line(source, measured))
    return 0


def check_output(config: Quantize, source: Source) -> None:
    """Raise UserError, before the work, if its result could not be written."""
    check_new(config.out)
    if not isinstance(source.model, GPT):
        raise UserError(
            f"AutoGPTQ's format has no names for model {source.config.model} (--out); without "
            "--out the losses are compared, and nothing is written"
        )
    for name, linear in source.model.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            check_storable((linear.out_features, linear.in_features), name)


def save(config: Quantize, source: Source, measured: Measured) -> None:
    """Write the folder of AutoGPTQ's format, and what it comes from."""
    row = METHODS[config.method]
    samples = {"calibration": config.calibration, "shards": config.shards}
    about = {
        "run": str(source.checkpoint), "settings": source.settings, "method": config.method,
        "bits": config.bits, **(samples if row.calibrates else {}), **config.method_options,
        "loss": {"unit": source.unit, "before": measured.loss[0], "after": measured.loss[1]},
        "bytes": {"before": measured.size[0], "after": measured.size[1]},
        "notes": measured.notes,
    }  # fmt: skip
    damping = {"damp_percent": config.damping} if "damping" in row.options else {}
    options = {"desc_act": config.act_order, "model_name_or_path": str(source.checkpoint)} | damping
    gptq_files.save(
        measured.model, config.out, about=about, options=options, positions=source.config.seq,
        tokenizer=source.data.tokenizer,
    )  # fmt: skip


def heading(config: Quantize, source: Source, mesh: Mesh) -> str:
    """One line before the work begins: it may take a while."""
    samples = f"{config.calibration} samples" if METHODS[config.method].calibrates else "no samples"
    where = f"{samples}, on {mesh_in_words(mesh.axes)}"
    return f"{config.method}, {config.bits} bits, {where}: {source.checkpoint}"


def closing_line(source: Source, measured: Measured) -> str:
    """The last line: `nats/byte 1.6000 -> 1.7000, bytes 4,000 -> 1,000`."""
    (loss, loss_after), (size, size_after) = measured.loss, measured.size
    losses = f"{source.unit} {loss:.4f} -> {loss_after:.4f}"
    return f"{losses}, bytes {size:,} -> {size_after:,}"
