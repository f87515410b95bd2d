"""Settings, machine and versions of a run, on which its numbers depend."""

from collections.abc import Mapping
from typing import Any

from dist_lab.observe.report.folder import Run
from dist_lab.observe.report.markup import Content, Html, Section, section, tag
from dist_lab.observe.report.units import plural


def of_run(run: Run) -> Section:
    """All settings that are set, then the machine; those that are not are named."""
    summary = run.summary
    config = summary["config"]
    given = {name: value for name, value in config.items() if is_set(value)}
    unset = ", ".join(name for name in config if name not in given)
    machine = machine_of(summary)
    return section(
        "settings", "Settings and versions", pairs({n: in_text(v) for n, v in given.items()}),
        tag("h3", "Machine, data and versions"), pairs(machine),
        tag("p", f"not set: {unset}", class_="lead") if unset else None,
    )  # fmt: skip


def machine_of(summary: Mapping[str, Any]) -> dict[str, str]:
    data, threads = summary["data"], plural(summary["threads"], "thread")
    return {
        "mesh": axes(summary["mesh"]),
        "ranks": f"{summary['world_size']}, of {threads} each",
        "cores": str(summary["cores"]),
        "parameters": f"{summary['parameters']:,}",
        "data": data["name"] + (f", sha256 {data['sha256'][:12]}" if data["sha256"] else ""),
        **summary["versions"],
    }


def pairs(values: Mapping[str, Content]) -> Html:
    each = [tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items()]
    return tag("dl", *each, class_="settings")


def is_set(value: Any) -> bool:
    return value is not None and value != "" and value is not False


def in_text(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, dict):
        return axes(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)


def axes(mesh: Mapping[str, int]) -> str:
    """
    >>> axes({"pp": 2, "tp": 2})
    'pp=2, tp=2'
    """
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())
