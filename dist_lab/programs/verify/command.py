"""What one rank of `launch/verify.py` runs."""

import json
from contextlib import closing

from dist_lab.comm.agree import together
from dist_lab.loss import Pair
from dist_lab.mesh.mesh import Mesh
from dist_lab.observe import run_dir
from dist_lab.observe.console import Progress, wide_console
from dist_lab.programs.cli.setup import arguments, batch_in_words, draw_model, open_run
from dist_lab.programs.train import loop
from dist_lab.programs.verify import engine
from dist_lab.programs.verify.matrix.run import matrix
from dist_lab.programs.verify.museum.run import museum, show
from dist_lab.programs.verify.settings import Verify


def verify(config: Verify, mesh: Mesh) -> int:
    """Verify a model of the zoo against one process. Returns exit status 0 only if equal."""
    if config.matrix:
        return matrix(config.cells, config.out)
    if config.museum:
        return museum(config.out)
    if config.bug:
        return show(config.bug, config.out)
    config = config.fitted(mesh.size)
    data = open_run(config, mesh)
    with together(mesh.world):
        if mesh.rank == 0 and config.out:
            folder = run_dir.make_folder(config.out, "verify.json")
    progress = Progress("steps", config.steps, quiet=mesh.rank > 0, transient=True)

    def build_batch(step: int) -> Pair:
        progress.keep_to(step)  # each step begins with its batch
        return data.batch(step, slice(0, config.batch))

    with closing(progress):
        report = engine.verify(
            lambda: draw_model(config, data),
            build_batch,
            mesh,
            config.strategy,
            config.impl,
            steps=config.steps,
            microbatches=config.microbatches,
            clip=config.clip or None,
            optimizer=loop.OPTIMIZERS[config.optimizer],
            options={"lr": config.lr, "weight_decay": config.weight_decay},
            seed=config.seed,
            groups=loop.matrix_groups(config),
            **arguments(config, data),
        )
    if mesh.rank == 0:
        console = wide_console()
        if data.image is not None:
            batch_text = batch_in_words(config.to_dict(), data.image)
            console.print(f"{data.name}, {batch_text} a step", highlight=False, soft_wrap=True)
        console.print(report.table())
        console.print(report.sentence(), soft_wrap=True)
        if config.out:
            text = json.dumps(report.to_dict(), indent=1) + "\n"
            (folder / "verify.json").write_text(text, encoding="utf-8")
    return 0 if report.equal else 1
