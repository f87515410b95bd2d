"""The model that is quantised, its data, and its loss."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_lab.checkpoint.exchange.ours import weights_of
from dist_lab.comm import ops
from dist_lab.data import Data
from dist_lab.data.custom import is_custom
from dist_lab.errors import UserError
from dist_lab.loss import cross_entropy_sum
from dist_lab.mesh.mesh import Axis, Mesh
from dist_lab.observe.console import watched
from dist_lab.programs.cli.config import Config
from dist_lab.programs.cli.find import check_data, newest, settings_of
from dist_lab.programs.cli.setup import draw_model, open_run
from dist_lab.quantize.calibrate import Calibration, Watch, shards_of_rows


@dataclass(frozen=True)
class Source:
    """A trained model, on every rank in full.

    checkpoint: its folder
    settings: of its run
    """

    checkpoint: Path
    settings: dict[str, Any]
    config: Config
    model: nn.Module
    data: Data

    @property
    def unit(self) -> str:
        """The unit of the loss. Nobody knows how many bytes a token of your own data is."""
        if self.data.image is not None:
            return "nats/image"
        return "nats/token" if is_custom(self.config.data) else "nats/byte"


def open_source(path: str | Path, mesh: Mesh, data: str = "") -> Source:
    """Read a run's newest checkpoint, and open its data. Collective.

    Args:
        path: a run, or a checkpoint of one.
        data: if the run's own data is code, "module:function": then that code runs.

    Raises:
        UserError: there is none, it is no run of train.py, or it has no validation data.
        MachineError: it is damaged.
    """
    path = str(path)
    checkpoint = newest(path)
    checkpoint.verify()
    settings = settings_of(checkpoint)
    check_data(path, data, settings)
    # The mesh and the micro-batches are those of this program.
    config = replace(Config(**settings), mesh=None, strategy=None, impl="hand", microbatches=1)
    opened = open_run(config, mesh)
    if not opened.validation_batches:
        raise UserError(
            f"the data of {path!r} has no validation split, so no loss can be compared; have "
            "module:function return one"
        )
    own = opened.tokenizer.text if opened.tokenizer is not None else None
    if own != checkpoint.tokenizer:
        raise UserError(
            f"the text of {path!r} gives another tokenizer today than when it was trained, so no "
            "loss can be compared (--checkpoint); have the text as it was, and the same version of "
            "the library tokenizers"
        )
    model = draw_model(config, opened, "meta").to_empty(device=mesh.device)
    weights = weights_of(checkpoint)
    model.load_state_dict({name: weights.read(name) for name in weights.names()})
    return Source(checkpoint.folder, settings, config, model.eval(), opened)


def calibration_of(source: Source, samples: int, shards: int, axis: Axis) -> Calibration:
    """This rank's virtual shards of the first samples of the training data. Collective."""
    batch = source.config.batch
    batches = (source.data.batch(i, slice(0, batch))[0] for i in range(-(-samples // batch)))
    calibration = shards_of_rows(torch.cat(list(batches))[:samples], axis, shards)
    return replace(calibration, watch=progress("blocks quantised", axis))


@torch.no_grad()
def loss_of(model: nn.Module, source: Source, axis: Axis) -> float:
    """The mean loss over the validation data, in the unit of the source. Collective.

    The data is that of the run's own validation, batch for batch. Ranks share out the batches.

    Args:
        model: any with the vocabulary of the run, such as `gptq_files.load(folder)`.
        axis: the data axis, such as `mesh["dp"]`.
    """
    total, count = torch.zeros(2, dtype=torch.float64)
    data, batch, tokenizer = source.data, source.config.batch, source.data.tokenizer
    numbers = range(axis.index, data.validation_batches, axis.size)
    for number in progress("batches of the validation", axis)(numbers):
        inputs, targets = data.validation(number, slice(0, batch))
        total += cross_entropy_sum(model(inputs), targets).double()
        count += (
            targets.numel()
            if tokenizer is None
            else tokenizer.length_of(targets.flatten().tolist())
        )
    with axis.comm.label("validation"):
        total, count = ops.all_reduce(torch.stack([total, count]), axis)
    return float(total / count)


def progress(noun: str, axis: Axis) -> Watch:
    """Shows how far the first rank is: a bar, or lines in a log."""
    return partial(watched, noun=noun) if axis.index == 0 else iter
