"""Make `import torchvision` work beside a CPU-only torch.

torchvision's wheel on PyPI is built against CUDA. Its compiled part does not load beside a CPU-only
torch, and its Python part then stops at `operator torchvision::nms does not exist`, because it
registers shapes for two operators that the compiled part would have declared. Declaring them is
enough: models, datasets and transforms need neither.
"""

from importlib.machinery import PathFinder
from importlib.util import find_spec


def fix_torchvision() -> None:
    """Declare torchvision's operators if its compiled part cannot; call it before `import`.

    A torchvision that matches its torch, or is not installed, is left alone. Calling it again does
    nothing. It takes milliseconds once torch is imported.
    """
    import torch  # not at the top: `import dist_lab` must stay instant

    package = find_spec("torchvision")
    if package is None or getattr(torch.ops.torchvision, "nms", None) is not None:
        return
    compiled = PathFinder.find_spec("_C", package.submodule_search_locations)
    if compiled is None or compiled.origin is None:
        return
    try:
        torch.ops.load_library(compiled.origin)  # as torchvision itself is about to do
    except OSError:
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):  # torch keeps what is declared without a Library of ours
            torch.library.define(f"torchvision::{name}", schema)
