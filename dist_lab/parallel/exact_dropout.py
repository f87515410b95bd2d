"""Prepares a model for dropout that is equal in every layout: see randomness/dropout.py.

`ExactDropout` is made before any strategy changes the model, when names and shapes are those of one
process. `bind` connects it with the runner when all strategies are applied.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dist_lab.errors import UserError
from dist_lab.mesh.mesh import Mesh
from dist_lab.parallel.pipeline.partition import meta_copy, seams
from dist_lab.parallel.tensor.plan_source import refuse_sharded_inputs
from dist_lab.randomness.drawn import RefuseDraws
from dist_lab.randomness.dropout import bind, named_dropouts, places_of, use_exact_dropout
from dist_lab.randomness.full_shapes import FullShapes
from dist_lab.randomness.place import Place
from dist_lab.transforms.recompute import CheckpointedForward


class ExactDropout:
    """The dropouts of one model.

    Args:
        dropout: "exact": change every nn.Dropout, and refuse other random numbers. None: only those
            that are dist_lab.Dropout already.
        options: those of the strategies.
        fixed_order: refuse other random numbers, also without exact dropout.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, dropout: str | None, options: Mapping[str, Any], *,
        fixed_order: bool,
    ) -> None:  # fmt: skip
        if dropout not in (None, "exact"):
            raise UserError(f'dropout cannot be {dropout!r:.40}; give dropout="exact", or leave it')
        if dropout == "exact":
            use_exact_dropout(model)
        self.model, self.mesh = model, mesh
        self.refuses_others = dropout == "exact" or fixed_order
        self.dropouts = named_dropouts(model)
        self.full_shapes: FullShapes | None = None
        if self.dropouts and max(mesh["tp"].size, mesh["pp"].size) > 1:
            self.full_shapes = FullShapes(meta_copy(model), self.dropouts)
        if self.dropouts and mesh["pp"].size > 1:
            self._refuse_shared(options.get("example_inputs"))
        if self.dropouts and options.get("sequence_parallel"):
            refuse_sharded_inputs(model, options.get("plan"), mesh["tp"])

    def _refuse_shared(self, example: Any) -> None:
        """Raise UserError if two stages may use one dropout. Each would take its call for the
        first. A graph is cut anywhere, a model with `stages` between its modules.
        """
        several = list(places_of(self.model))
        if self.full_shapes is not None and example is not None and seams(self.model) is None:
            shapes = self.full_shapes.of((example,), {})
            several += [f"{name} is called {len(s)} times" for name, s in shapes.items() if s[1:]]
        if several:
            raise UserError(
                f"one dropout is used in several places ({several[0]}), which may be on different "
                "pipeline stages; give each place a dropout of its own"
            )

    def bind(self, place: Place, seed: int, roots: Iterable[nn.Module]) -> None:
        """Let the dropouts read the runner's place.

        Args:
            roots: the modules whose forwards are called: the model, or the stages of this rank.
        """
        if self.refuses_others:
            names = {module: name for name, module in self.model.named_modules()}
            for root in roots:
                RefuseDraws(root, names, place.remember)
        if not self.dropouts:
            return
        bind(self.dropouts, place)
        place.use(self.model, seed, self.mesh.data, self.mesh["tp"], self.full_shapes)
        for module in self.model.modules():
            if isinstance(module.forward, CheckpointedForward):
                module.forward.around.append(place.remember)
