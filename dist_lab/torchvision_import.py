"""Make `import torchvision` work with a CPU-only torch.

torchvision's wheel on PyPI is built for CUDA. Its compiled library does not load with a CPU-only
torch. Then its Python code fails with `operator torchvision::nms does not exist`, because it
registers shapes for two operators that the compiled library would have declared. It is enough to
declare them: models, datasets and transforms use neither.
"""

from importlib.machinery import PathFinder
from importlib.util import find_spec


def fix_torchvision() -> None:
    """Declare torchvision's operators if its compiled library cannot. Call it before the import.

    It does nothing if torchvision matches torch or is not installed, or if it is called again. It
    takes milliseconds once torch is imported.
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
        for name in ("nms", "qnms"):  # stays declared without a Library object of ours
            torch.library.define(f"torchvision::{name}", schema)
