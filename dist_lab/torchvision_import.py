"""`import torchvision` beside a CPU-only torch.

torchvision's wheel on PyPI is built against CUDA. Its compiled part does not load beside a CPU-only
torch, and then its Python part stops too, at `operator torchvision::nms does not exist`, because it
registers shapes for two operators that the compiled part would have declared. Declaring them here
is enough: models, datasets and transforms need neither. A pair of wheels that match is left alone,
because the declarations are made only after an import has failed in just this way.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[object] = []  # an operator's declaration lives as long as its Library object


class _Retry(Loader):
    """Runs torchvision's own loader, and once more with the operators declared."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # what it can do besides: resources, source text

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            _declare()
            self.loader.exec_module(module)


class _Finder(MetaPathFinder):
    """Puts `_Retry` around the loader of torchvision, and has no opinion on anything else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Retry(spec.loader)
        return spec


def install() -> None:
    """Do it for this process, once. Costs nothing until torchvision is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _declare() -> None:
    import torch  # not at the top: `import dist_lab` must stay instant

    library = torch.library.Library("torchvision", "DEF")
    for schema in MISSING:
        library.define(schema)
    kept.append(library)
