"""Reports of evaluations: one HTML page that needs nothing else, Markdown, and two runs side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...models.cache import write_atomic
from ...models.errors import InputError
from .. import plots
from ..page import page
from .experiment import Chart, Shown, Table
from .presets import PRESETS
from .run import FORMAT

Result = Mapping[str, Any]


def load_result(path: Path) -> Result:
    """Raises `InputError`: there is no such file, or it is no result of `edgefm evaluate`."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    whole = isinstance(result, dict) and all(isinstance(result.get(k), dict) for k in ("experiments", "environment"))
    if not whole or result.get("format") != FORMAT:
        raise InputError(f"{path} is no result of `edgefm evaluate` that this EdgeFM reads (format {FORMAT})")
    return result


def write_reports(results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Writes `report.html` and `report.md`.

    Args:
        results: by name; of several, each experiment shows one after the other.

    Raises:
        StoreError: the disk refuses. InputError: a result lacks what its experiment shows.
    """
    shown = {name: _shown(name, result) for name, result in results.items()}
    page_file, text = folder / "report.html", folder / "report.md"
    write_atomic(page_file, html(results, shown).encode())
    write_atomic(text, markdown(results, shown).encode())
    return [page_file, text]


def _shown(name: str, result: Result) -> dict[str, Shown]:
    try:
        return {each: PRESETS[each].show(measured["data"]) for each, measured in result["experiments"].items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{name}: the result lacks what its report shows ({error!r}); measure it again") from error


# ---- HTML

_STYLE = """\
  h2 small { font-weight: 400; color: #555; font-size: .8em; }
  .objective { color: #444; margin: .3rem 0; }
  .interval { white-space: nowrap; }
  @media print { table { font-size: 7.8pt; } th, td { padding: .18rem .35rem; } .interval { font-size: .9em; } }
"""
_INTERVAL = re.compile(r"\[[^\[\]]*, [^\[\]]*\]")


def html(results: Mapping[str, Result], shown: Mapping[str, Mapping[str, Shown]]) -> str:
    several = len(results) > 1
    parts = []
    for each in _names(results):
        parts.append(f"<h2>{escape(PRESETS[each].title)} <small>{escape(each)}</small></h2>")
        for number, (name, result) in enumerate(results.items()):
            if each in result["experiments"]:
                heading = f"<h3>{escape(name)}</h3>" if several else ""
                parts.append(heading + _section(result["experiments"][each], shown[name][each], f"r{number}-"))
    parts += ["<h2>How it was measured</h2>", *(_table(_setup(name, result)) for name, result in results.items())]
    return page("EdgeFM evaluation" if not several else "EdgeFM evaluations side by side", "\n".join(parts), _STYLE)


def _section(measured: Mapping[str, Any], shown: Shown, prefix: str) -> str:
    findings = "".join(f"<li>{escape(sentence)}</li>" for sentence in shown.findings)
    objective = f"<p class='objective'>{escape(measured['objective'])}. Measured in {measured['seconds']:g} s.</p>"
    figures = "".join(_figure(chart, prefix) for chart in shown.charts)
    return f"{objective}<ul>{findings}</ul>{figures}{''.join(_table(table) for table in shown.tables)}"


def _figure(chart: Chart, prefix: str) -> str:
    name = prefix + chart.name
    drawing = plots.svg(name, chart.draw, chart.height_in)
    return f"<figure>{drawing}<figcaption id='{name}-caption'>{escape(chart.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>"
        + f"<th scope='row'>{escape(row[0])}</th>"
        + "".join(f"<td>{_INTERVAL.sub(_whole, escape(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return f"<div class='wide'><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _whole(interval: re.Match[str]) -> str:
    return f"<span class='interval'>{interval[0]}</span>"


def _setup(name: str, result: Result) -> Table:
    environment = result["environment"]
    rows = {
        "command": environment["command"],
        "date": environment["date"],
        "machine": environment["machine"],
        "versions": ", ".join(f"{package} {version}" for package, version in environment["versions"].items()),
        "size": ("quick, a check that it runs: " if result["quick"] else "") + f"{result['seeds']} seeds",
        "student, accuracy target": f"{result['student']}, {result['accuracy_target']}",
        "traffic": result["traffic"],
        "device": f"{result['device_ms']['p50']:.2f} ms a frame (median), {result['device_ms']['p95']:.2f} ms (95th percentile)",
        "cloud": "; ".join(f"batch of {b['size']}: {b['p50_ms']:.1f} ms" for b in result["cloud"]["batches"]),
        "took": f"{result['seconds']:.0f} s",
    }
    return Table(("how it was measured", name), list(rows.items()))


# ---- Markdown


def markdown(results: Mapping[str, Result], shown: Mapping[str, Mapping[str, Shown]]) -> str:
    lines = ["# EdgeFM evaluation", ""]
    for each in _names(results):
        lines += [f"## {PRESETS[each].title} (`{each}`)", ""]
        for name, result in results.items():
            if each not in result["experiments"]:
                continue
            if len(results) > 1:
                lines += [f"### {name}", ""]
            lines += [f"{result['experiments'][each]['objective']}.", ""]
            lines += [f"- {sentence}" for sentence in shown[name][each].findings] + [""]
            for table in shown[name][each].tables:
                lines += _markdown_table(table)
    for name, result in results.items():
        lines += _markdown_table(_setup(name, result))
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    caption = [table.caption, ""] if table.caption else []
    return [*caption, row(table.columns), row(["---"] * len(table.columns)), *map(row, table.rows), ""]


def _names(results: Mapping[str, Result]) -> list[str]:
    return [name for name in PRESETS if any(name in result["experiments"] for result in results.values())]
