"""Read a dataclass of settings. Flags override the TOML file, which overrides the defaults.

Each field, made by `setting`, has a help text and limits. A mistake in a flag, the file or a value
raises a UserError with one line: the problem (its place); the values to give instead. This file
does not import torch, so that the error for a misspelled flag does not take seconds.
"""

import argparse
import math
import os
import re
import shlex
import stat
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import dist_lab
from dist_lab.errors import UserError, nearest_word, one_of, printable, shown

C = TypeVar("C")
Options = Mapping[str, Field[Any]]  # name -> dataclass field
SetValues = dict[str, tuple[Any, str]]  # name -> checked value, and where: "--steps", "run.toml:3"

# For numbers without a limit of their own. torch and gloo count in int32.
LARGEST = {int: 2**31 - 1, float: sys.float_info.max}
LARGEST_FILE = 2**16  # bytes


class AtLeast(int):
    """A default number that may be rounded up to a multiple of something.

    A number from the user is a plain int. We never round it; if it does not divide, we raise an
    error.
    """

    def divided_by(self, parts: int) -> int:
        """
        >>> AtLeast(32).divided_by(3), AtLeast(32).divided_by(4)
        (33, 32)
        """
        return -(-self // parts) * parts


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Returns a dataclass field for a setting: a str, bool, int or float, possibly None.

    Limits, all optional: `choices`; `low` and `high`, both inclusive; `above`, exclusive. A field
    of another type needs `read(value, where)`, which converts a flag's text or a file's value, and
    raises UserError. --help shows `metavar` as the value. `heading` starts a group of flags, or
    continues the group of that name. `join`: the flag may be given again, its values are joined.
    """
    return field(default=default, metadata={"help": help} | limits)


def read(
    cls: type[C],
    argv: Sequence[str] | None,
    program: str,
    description: str | None,
    defaults: Mapping[str, Any],
    without: Sequence[str] = (),
) -> tuple[C, dict[str, str]]:
    """Returns an instance of `cls`, and for each setting the flag or file line that set it.

    The setting `config` names the file. The file's values are checked even if flags override them.
    This program does not use the settings in `without`: they have no flag, but a file that is
    shared with other programs may set them.
    """
    options = own_first(cls)
    default = {name: option.default for name, option in options.items()} | dict(defaults)
    flags = {name: option for name, option in options.items() if name not in without}
    parser = make_parser(program, description, options, default, without)
    parsed = read_flags(parser, flags, sys.argv[1:] if argv is None else argv)
    if "config" in parsed:
        parsed = read_file(parsed["config"][0], options) | parsed
    where = {name: flag(name) for name in options} | {name: w for name, (_, w) in parsed.items()}
    return cls(**default | {name: value for name, (value, _) in parsed.items()}), where


def own_first(cls: type[Any]) -> Options:
    """Returns name -> field: the class's own fields before those that it inherits."""

    def classes_with(option: Field[Any]) -> int:
        return sum(option.name in getattr(c, "__dataclass_fields__", ()) for c in cls.__mro__)

    return {option.name: option for option in sorted(fields(cls), key=classes_with)}


def split_names(text: str, known: Collection[str], flag: str, noun: str) -> list[str]:
    """Returns the names in a list separated by commas. Raises UserError for an unknown one."""
    names = [word.strip() for word in text.split(",")] if text else []
    for word in names:
        if word not in known:
            raise UserError(
                f"no {noun} {shown(word)} ({flag}); give, separated by commas, "
                f"{one_of(list(known), word)}"
            )
    return list(dict.fromkeys(names))


# --- one value ------------------------------------------------------------------------------------


def checked(option: Field[Any], value: Any, where: str) -> Any:
    """Returns the value in the field's type. Raises UserError unless the field accepts it."""
    if "read" in option.metadata:
        return option.metadata["read"](value, where)
    if kind(option) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if not accepts(option, value):
        problem = f"{option.name} cannot be {shown(value)} ({where})"
        raise UserError(f"{problem}; give {wanted(option, value)}")
    return value


def accepts(option: Field[Any], value: Any) -> bool:
    """Whether the value has the field's type and is within its limits."""
    limits = option.metadata
    if type(value) is not kind(option):  # not isinstance: True is an instance of int
        return False
    if isinstance(value, str):
        # No path has a NUL. Python turns bytes that are not UTF-8 into surrogates.
        is_choice: bool = value in limits.get("choices", (value,))
        return is_choice and not re.search("[\0\ud800-\udfff]", value)
    if isinstance(value, bool):
        return True
    low, high = limits.get("low", limits.get("above")), limits.get("high", LARGEST[type(value)])
    within: bool = low <= value <= high  # False for NaN
    return within and value != limits.get("above")


def wanted(option: Field[Any], value: Any) -> str:
    """Describes the values that the field accepts, for an error message about `value`."""
    limits = option.metadata
    if "choices" in limits:
        return one_of([choice for choice in limits["choices"] if choice], value)
    noun = {
        int: "a whole number", float: "a finite number",
        bool: "true or false", str: "UTF-8 text without NUL",
    }[kind(option)]  # fmt: skip
    high = limits.get("high", LARGEST.get(kind(option)))
    if type(value) is kind(option) in LARGEST and high < value < math.inf:
        return f"{noun}, {high} or less"
    if "above" in limits:
        return f"{noun} above {limits['above']}"
    return f"{noun}, {limits['low']} or more" if "low" in limits else noun


def kind(option: Field[Any]) -> Any:
    """The type of a field's values: int for `int` and for `int | None`."""
    return (get_args(option.type) or (option.type,))[0]


# --- the command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what each flag takes")


def make_parser(
    program: str,
    description: str | None,
    options: Options,
    defaults: Mapping[str, Any],
    without: Sequence[str],
) -> Parser:
    """Returns a parser that collects every value of a flag as text, to detect repeated flags."""
    parser = Parser(
        prog=program,
        usage="%(prog)s " + "[--config FILE] " * ("config" in options) + "[--FLAG VALUE ...]",
        description=description,
        epilog="In brackets: the default. A flag without a value is off by default unless its help "
        "says on;\n--no-FLAG turns it off, also where the file turns it on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist_lab {dist_lab.__version__}")
    for heading, names in by_heading(options).items():
        group = parser.add_argument_group(heading)
        for name in names:
            option = options[name]
            if name in without:
                continue
            help_text = option.metadata["help"].replace("%", "%%")
            if kind(option) is bool:
                group.add_argument(flag(name), action="append_const", const=True, help=help_text)
                group.add_argument(
                    flag(f"no_{name}"),
                    action="append_const", const=False, dest=name, help=argparse.SUPPRESS,
                )  # fmt: skip
                continue
            if defaults[name] not in (None, ""):
                help_text += f" [{defaults[name]}]"
            choices = "|".join(filter(None, option.metadata.get("choices", ())))
            meta = choices or option.metadata.get("metavar", "X" if kind(option) is float else "N")
            group.add_argument(flag(name), action="append", metavar=meta, help=help_text)
    return parser


def by_heading(options: Options) -> dict[str, list[str]]:
    """Returns heading -> names of its options, in the order of --help: see `setting`."""
    heading, groups = "settings", dict[str, list[str]]()
    for name, option in options.items():
        heading = option.metadata.get("heading", heading)
        groups.setdefault(heading, []).append(name)
    return groups


def read_flags(parser: Parser, options: Options, argv: Sequence[str]) -> SetValues:
    """Read the settings on a command line."""
    known, unknown = parser.parse_known_args(argv)
    for stray in unknown:
        if not stray.startswith("-"):
            takes = "every setting is a flag: --steps 300"
            hint = takes if "steps" in options else "--help shows all that belongs here"
            raise UserError(f"stray argument {shown(stray)}; {hint}")
        near = nearest_word(stray.partition("=")[0].strip("-").replace("-", "_"), options)
        hint = f"did you mean {flag(near)}? " if near else ""
        raise UserError(f"no flag {shown(stray)}; {hint}--help lists them all")
    parsed: SetValues = {}
    for name, values in vars(known).items():
        joint = options[name].metadata.get("join")
        if len(set(values)) > 1 and joint is None:
            both = " and ".join(map(shown, dict.fromkeys(values)))
            raise UserError(f"{name} cannot be both {both} ({flag(name)}); give it once")
        text = values[0] if joint is None else joint.join(values)
        value = checked(options[name], from_text(options[name], text), flag(name))
        parsed[name] = value, flag(name)
    return parsed


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_typed(name: str, value: Any) -> str:
    """
    >>> as_typed("bucket_mb", 5.0), as_typed("prefetch", False)
    ('--bucket-mb 5.0', '--no-prefetch')
    """
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {printable(shlex.quote(str(value)))}"


def from_text(option: Field[Any], text: str) -> Any:
    """Convert a flag's text to the field's type; return it unchanged if it cannot be converted."""
    if "read" in option.metadata:
        return text
    try:
        return kind(option)(text)
    except ValueError:
        return text


# --- the file -------------------------------------------------------------------------------------


def read_file(path: str, options: Options) -> SetValues:
    """Read the settings in a TOML file.

    Raises:
        UserError: no such file, not TOML, an unknown key, a wrong value; the message has file and
            line.
    """
    text = read_text(path)
    label = path if path.isprintable() else shown(path)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"brackets nest too deep ({label}); settings are plain values") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise UserError(toml_mistake(str(error), label, text)) from None
    if not table:
        raise UserError(f"the file sets nothing ({label}); write settings such as steps = 300")

    keys = [name for name in options if name != "config"]  # a file cannot name another file
    parsed: SetValues = {}
    for key, value in table.items():
        where = f"{label}:{line_of(key, text)}"
        if key not in keys:
            near = nearest_word(key, keys)
            hint = f"did you mean {near}?" if near else "--help lists them, with dashes"
            raise UserError(f"no setting {shown(key)} ({where}); {hint}")
        parsed[key] = checked(options[key], value, where), where
    return parsed


def read_text(path: str) -> str:
    """Read the file that --config names. Raises UserError if it is not a readable text file."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            first = min(Path(path).glob("*.toml"), default="a TOML file")
            raise UserError(f"{shown(path)} is a folder (--config); give a file: {first}")
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            raise UserError(f"{shown(path)} is not a settings file (--config); give a TOML file")
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest_word(path, map(str, Path(path).parent.glob("*.toml")), cutoff=0.8)
        hint = f"did you mean {near}?" if near else "give a TOML file, such as configs/02_dp.toml"
        raise UserError(f"no file {shown(path)} (--config); {hint}") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8 ({shown(path)})"
        raise UserError(f"{problem}; save the file as UTF-8") from None
    except OSError as error:
        problem = f"cannot read {shown(path)}: {error.strerror} (--config)"
        raise UserError(f"{problem}; give a file that you may read") from None


def toml_mistake(message: str, label: str, text: str) -> str:
    """Rewrite tomllib's message, with the place as file:line:column.

    >>> toml_mistake("Invalid value (at line 2, column 8)", "run.toml", "...")
    'not TOML: Invalid value (run.toml:2:8); correct it'
    """
    problem, _, at = message.partition(" (at ")
    end = [str(text.count("\n") + 1), str(len(text) - text.rfind("\n"))]  # "at end of document"
    place = ":".join([label, *(re.findall(r"\d+", at) or end)]) if at else label
    twice = " (is the key set twice?)" if "overwrite" in problem else ""
    return f"not TOML: {problem}{twice} ({place}); correct it"


def line_of(key: str, text: str) -> int:
    """The line that sets a key. tomllib gives no line numbers; nearly every key starts its line."""
    pattern = rf"^[ \t]*(\[+[ \t]*)?[\"']?{re.escape(key)}[\"']?[ \t]*[].=]"
    match = re.search(pattern, text, re.MULTILINE)
    return text.count("\n", 0, match.start() if match else 0) + 1
