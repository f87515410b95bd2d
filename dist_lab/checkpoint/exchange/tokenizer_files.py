"""The tokenizer of a Hugging Face folder: tokenizer.json, and the settings that transformers needs.

    tokenizer.json           the tokens: see data/tokenizer.py
    tokenizer_config.json    which class loads it, and the name of the end token

`AutoTokenizer.from_pretrained(folder)` reads both. A folder of others is read without its settings:
they may name code. Its end tokens are the ids that config.json says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lab.checkpoint.exchange.folders import inside, read_json, read_text, write_json
from dist_lab.data.tokenizer import FileTokenizer
from dist_lab.errors import UserError, shown

FILE, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
NOTE = """Ids are those of tokenizer.json:

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(".")
    ids = tokenizer("def main", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=80, do_sample=True)[0])
"""


def write(folder: Path, tokenizer: FileTokenizer, positions: int) -> None:
    """Write the tokenizer's files. `positions`: the longest text that the model was trained on."""
    (folder / FILE).write_text(tokenizer.text, encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }
    names = {number: name for name, number in tokenizer.special.items()}
    if tokenizer.ends and tokenizer.ends[0] in names:
        settings["eos_token"] = names[tokenizer.ends[0]]
    write_json(folder / SETTINGS, settings)


def read(folder: Path) -> FileTokenizer | None:
    """The tokenizer of a folder; None if it has no tokenizer.json.

    Raises:
        UserError: a token of it has no bytes of its own, or a name leads out of the folder.
        MachineError: it is damaged.
    """
    if not (folder / FILE).exists():
        return None
    text = read_text(inside(folder, FILE, "a Hugging Face folder"))
    config = read_json(inside(folder, CONFIG, "a Hugging Face folder"))
    return FileTokenizer(text, repr(str(folder / FILE)), ends=ends_in(config))


def ends_in(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens that config.json names.

    >>> ends_in({"eos_token_id": [128001, 128009]}), ends_in({"eos_token_id": 2}), ends_in({})
    ((128001, 128009), (2,), ())
    """
    found = config.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(end) is not int or end < 0 for end in ends):
        raise UserError(f"{CONFIG} has eos_token_id {shown(found)}, which is no id; set it to null")
    return tuple(ends)
