"""The files by which a quantised folder is known. Does not import torch."""

from pathlib import Path

from dist_lab.checkpoint.exchange.folders import inside, read_json

CONFIG, QUANTIZE = "config.json", "quantize_config.json"
TABLE = "quantization_config"  # of config.json


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder is of a quantised model, by any method."""
    path = Path(folder).expanduser()
    if (path / QUANTIZE).exists():
        return True
    return (path / CONFIG).is_file() and TABLE in read_json(inside(path, CONFIG, "the folder"))
