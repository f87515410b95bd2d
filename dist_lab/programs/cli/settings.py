"""Settings from defaults < a TOML file < the command line: a dataclass is all there is to write.

Each field, made by `setting`, carries its help and its limits. Everything that can be wrong with a
flag, a file, a line of it or a value is answered by one UserError of one line: what (where); what
to give instead. No torch here: a misspelled flag should not take seconds to answer.
"""

import argparse
import math
import os
import re
import shlex
import stat
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import dist_lab
from dist_lab.errors import UserError, nearest_word, one_of, shown

C = TypeVar("C")
Options = Mapping[str, Field[Any]]  # name -> the field it is of
Given = dict[str, tuple[Any, str]]  # name -> a checked value, and where: "--steps", "run.toml:3"

# Of numbers with no limit of their own. The libraries below us count in int32.
LARGEST = {int: 2**31 - 1, float: sys.float_info.max}
LARGEST_FILE = 2**16  # bytes


class AtLeast(int):
    """A default that gives way to the next multiple of what has to divide it.

    A number that somebody gave is a plain int, and is refused instead.
    """

    def divided_by(self, parts: int) -> int:
        """
        >>> AtLeast(32).divided_by(3), AtLeast(32).divided_by(4)
        (33, 32)
        """
        return -(-self // parts) * parts


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A field of a dataclass of settings, of type str, bool, int, float or one of them or None.

    Limits, all optional: `choices`; `low` and `high`, which are allowed, and `above`, which is
    not. A field of any other type has `read(value, where)`, which makes it of a flag's text or a
    file's value, and raises UserError. `metavar` stands for the value in --help, and `heading`
    opens a group there, or goes on with one; `first=True` has it stand before the others.
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
    """Settings of a dataclass, and who set each: a flag, or a line of the file.

    The setting `config` names the file. A value in it is checked even if a flag overrides it.
    Settings in `without` mean nothing to this program: they have no flag, and a file that it
    shares with others may set them.
    """
    options: Options = {option.name: option for option in fields(cls)}  # type: ignore[arg-type]
    start = {name: option.default for name, option in options.items()} | dict(defaults)
    flags = {name: option for name, option in options.items() if name not in without}
    parser = make_parser(program, description, options, start, without)
    given = read_flags(parser, flags, sys.argv[1:] if argv is None else argv)
    if "config" in given:
        given = read_file(given["config"][0], options) | given
    where = {name: flag(name) for name in options} | {name: w for name, (_, w) in given.items()}
    return cls(**start | {name: value for name, (value, _) in given.items()}), where


# --- one value ------------------------------------------------------------------------------------


def checked(option: Field[Any], value: Any, where: str) -> Any:
    """The value as its field wants it. Raises UserError unless the field takes it."""
    if "read" in option.metadata:
        return option.metadata["read"](value, where)
    if kind(option) is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if not accepts(option, value):
        what = f"{option.name} cannot be {shown(value)} ({where})"
        raise UserError(f"{what}; give {wanted(option, value)}")
    return value


def accepts(option: Field[Any], value: Any) -> bool:
    limits = option.metadata
    if type(value) is not kind(option):  # not isinstance, to which True is an int
        return False
    if isinstance(value, str):
        # No path holds a NUL; a surrogate is what Python makes of an argument that is not UTF-8.
        listed: bool = value in limits.get("choices", (value,))
        return listed and not re.search("[\0\ud800-\udfff]", value)
    if isinstance(value, bool):
        return True
    low, high = limits.get("low", limits.get("above")), limits.get("high", LARGEST[type(value)])
    within: bool = low <= value <= high  # a NaN is not
    return within and value != limits.get("above")


def wanted(option: Field[Any], value: Any) -> str:
    """What to give instead of `value`."""
    limits = option.metadata
    if "choices" in limits:
        return one_of(limits["choices"], value)
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
    """One that leaves it to its caller to say what is wrong and to exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows what each flag takes")


def make_parser(
    program: str,
    description: str | None,
    options: Options,
    defaults: Mapping[str, Any],
    without: Sequence[str],
) -> Parser:
    """Flags that collect what they are given, as text, so that a flag given twice is seen."""
    parser = Parser(
        prog=program,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=description,
        epilog="In brackets: the default. --no-FLAG takes back a switch that the file sets.",
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
            text = option.metadata["help"].replace("%", "%%")
            if kind(option) is bool:
                group.add_argument(flag(name), action="append_const", const=True, help=text)
                group.add_argument(
                    flag(f"no_{name}"),
                    action="append_const", const=False, dest=name, help=argparse.SUPPRESS,
                )  # fmt: skip
                continue
            if defaults[name] not in (None, ""):
                text += f" [{defaults[name]}]"
            choices = "|".join(option.metadata.get("choices", ()))
            meta = choices or option.metadata.get("metavar", "X" if kind(option) is float else "N")
            group.add_argument(flag(name), action="append", metavar=meta, help=text)
    return parser


def by_heading(options: Options) -> dict[str, list[str]]:
    """The names of the options in each group of --help, in its order: see `setting`."""
    heading, found = "settings", dict[str, list[str]]()
    for name, option in options.items():
        heading = option.metadata.get("heading", heading)
        found.setdefault(heading, []).append(name)
    first = {h: names for h, names in found.items() if "first" in options[names[0]].metadata}
    return first | found


def read_flags(parser: Parser, options: Options, argv: Sequence[str]) -> Given:
    """The settings on a command line."""
    known, rest = parser.parse_known_args(argv)
    for stray in rest:
        if not stray.startswith("-"):
            raise UserError(f"stray argument {shown(stray)}; every setting is a flag: --steps 300")
        near = nearest_word(stray.partition("=")[0].strip("-").replace("-", "_"), options)
        hint = f"did you mean {flag(near)}? " if near else ""
        raise UserError(f"no flag {shown(stray)}; {hint}--help lists them all")
    given: Given = {}
    for name, values in vars(known).items():
        if len(set(values)) > 1:
            both = " and ".join(map(shown, dict.fromkeys(values)))
            raise UserError(f"{name} cannot be both {both} ({flag(name)}); give it once")
        value = checked(options[name], from_text(options[name], values[0]), flag(name))
        given[name] = value, flag(name)
    return given


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_typed(name: str, value: Any) -> str:
    """
    >>> as_typed("bucket_mb", 5.0), as_typed("prefetch", False)
    ('--bucket-mb 5.0', '--no-prefetch')
    """
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {shlex.quote(str(value))}"


def from_text(option: Field[Any], text: str) -> Any:
    """What a flag's text means; the text itself if it means nothing, for `checked` to refuse."""
    if "read" in option.metadata:
        return text
    try:
        return kind(option)(text)
    except ValueError:
        return text


# --- the file -------------------------------------------------------------------------------------


def read_file(path: str, options: Options) -> Given:
    """The settings in a TOML file.

    Raises:
        UserError: no such file, not TOML, an unknown key, a wrong value; with file and line.
    """
    text = read_text(path)
    label = path if path.isprintable() else shown(path)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"brackets nest too deep ({label}); settings are plain values") from None
    except ValueError as error:  # tomllib's own error, or a number of thousands of digits
        raise UserError(toml_mistake(str(error), label, text)) from None
    if not table:
        raise UserError(f"the file sets nothing ({label}); write settings such as steps = 300")

    keys = [name for name in options if name != "config"]  # a file does not name another
    given: Given = {}
    for key, value in table.items():
        where = f"{label}:{line_of(key, text)}"
        if key not in keys:
            near = nearest_word(key, keys)
            hint = f"did you mean {near}?" if near else "--help lists them, with dashes"
            raise UserError(f"no setting {shown(key)} ({where}); {hint}")
        given[key] = checked(options[key], value, where), where
    return given


def read_text(path: str) -> str:
    """The text of a file that somebody named, perhaps wrongly."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            first = min(Path(path).glob("*.toml"), default="a TOML file")
            raise UserError(f"{shown(path)} is a folder (--config); give a file: {first}")
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
            raise UserError(f"{shown(path)} is no settings file (--config); give a TOML file")
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest_word(path, map(str, Path(path).parent.glob("*.toml")), cutoff=0.8)
        hint = f"did you mean {near}?" if near else "give a TOML file, such as configs/02_dp.toml"
        raise UserError(f"no file {shown(path)} (--config); {hint}") from None
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 ({shown(path)})"
        raise UserError(f"{what}; save the file as UTF-8") from None
    except OSError as error:
        what = f"cannot read {shown(path)}: {error.strerror} (--config)"
        raise UserError(f"{what}; give a file that you may read") from None


def toml_mistake(message: str, label: str, text: str) -> str:
    """tomllib's message, with the place as file:line:column.

    >>> toml_mistake("Invalid value (at line 2, column 8)", "run.toml", "...")
    'not TOML: Invalid value (run.toml:2:8); correct that'
    """
    what, _, at = message.partition(" (at ")
    end = [str(text.count("\n") + 1), str(len(text) - text.rfind("\n"))]  # "at end of document"
    place = ":".join([label, *(re.findall(r"\d+", at) or end)]) if at else label
    twice = " (is the key set twice?)" if "overwrite" in what else ""
    return f"not TOML: {what}{twice} ({place}); correct that"


def line_of(key: str, text: str) -> int:
    """Where a key is set. tomllib does not tell; a key is nearly always the first on its line."""
    pattern = rf"^[ \t]*(\[+[ \t]*)?[\"']?{re.escape(key)}[\"']?[ \t]*[].=]"
    found = re.search(pattern, text, re.MULTILINE)
    return text.count("\n", 0, found.start() if found else 0) + 1
