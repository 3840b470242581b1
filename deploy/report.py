"""The demo's report: one HTML page that needs nothing else, and a small picture for a README.

`result` (the demo's JSON; shares and accuracies are fractions of 1, None where there is no figure):

    environments   list in order: name; labels [str]; frames; versions (how many student versions were published and
                   swapped in); fm_accuracy, system_accuracy, student_accuracy on the scoring images;
                   version0 {student_accuracy, edge_share};
                   edge_share [[samples labelled by the FM, share], ...], version 0 first with 0 samples
    latency_ms     edge, cloud, fallback: {p50, p95, mean, predicted_mean}, or None for a route without answers
    answers        total, edge, cloud, fallback, lost
    bytes_up, bytes_down
    added_label    {name, environment, recognised_before, fm_by_text, fm_described, descriptions, recognised_after}, or None
    objective      {name, target}
    link           {uplink, downlink, propagation_ms}
    settings       TOML, where cloud and agent do not run with their defaults
    environment    {machine, versions {package: version}, seed, command, date}

`timeline`: one record per answer in order of completion: time_s since the start, environment, route, total_ms,
margin, threshold (None during cold start), student_version, bandwidth_mbps (None where not estimated).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from . import plots
from .page import page
from .timeline import ROUTES, Record, bin_timeline

Result = Mapping[str, Any]

_STYLE = """\
  .tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 0 0 1.2rem; padding: 0; }
  .tiles div { border: 1px solid #c9c9c9; border-radius: 6px; padding: 10px 12px;
                display: flex; flex-direction: column-reverse; justify-content: flex-end; }
  .tiles dt { color: #555; font-size: .84rem; line-height: 1.3; }
  .tiles dd { margin: 0 0 .1rem; font-size: 1.4rem; font-weight: 600; }
  table { table-layout: fixed; }
  table.text td { text-align: left; }
  table.text th { width: 11.5rem; }
  dl.words { display: grid; grid-template-columns: 11.5rem 1fr; gap: .3rem .6rem; font-size: .92rem; margin: 0; }
  dl.words dt { font-weight: 600; }
  dl.words dd { margin: 0; }
  @media screen and (max-width: 640px) {
    .tiles { grid-template-columns: repeat(2, 1fr); }
  }
  @media print {
    table, .tiles { break-inside: avoid; }
  }
"""


def write_report(result: Result, timeline: Sequence[Record], path: Path) -> None:
    """Write the page to `path` (UTF-8, under 1 MB however long the timeline)."""
    setup = result["environment"]
    tables = _tables(result)
    figures = _figures(result, timeline)
    body = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        when=escape(f"{setup['date']} · {setup['machine']}"),
        tiles="".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for value, what in _tiles(result)),
        summary="".join(f"<li>{escape(sentence)}</li>" for sentence in summarize(result)),
        accuracy=figures["accuracy"] + tables["accuracy"] + tables["added_label"],
        learning=figures["learning"] + tables["learning"],
        answers=figures["routes"] + figures["latency"] + tables["latency"],
        switching=figures["switching"] + tables["link"],
        setup=tables["setup"] + tables["labels"],
    )
    path.write_text(page("EdgeFM demo: report", body, _STYLE), encoding="utf-8")


def save_plot_png(result: Result, timeline: Sequence[Record], path: Path) -> None:
    """Write edge share and accuracy side by side as a PNG (at most 150 KB), the run's length in its title."""
    environments = result["environments"]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        plots.edge_share_axes(left, environments)
        plots.accuracy_axes(right, environments)
        length = f" in {timeline[-1]['time_s']:,.0f} s" if timeline else ""
        figure.suptitle(f"EdgeFM demo: {result['answers']['total']:,} answers{length}", fontsize=10)

    plots.save_png(path, draw, size_in=(10.5, 4.2))


def summarize(result: Result) -> list[str]:
    """What happened, in sentences made from the figures alone."""
    answers, latency = result["answers"], result["latency_ms"]
    environments = result["environments"]
    names = ", ".join(str(e["name"]) for e in environments)
    where = f"{len(environments)} environment{'' if len(environments) == 1 else 's'}"
    sentences = [
        f"In {where} ({names}), {answers['total']:,} images were answered: "
        f"{_share_of(answers, 'edge')} on the edge, {_share_of(answers, 'cloud')} by the foundation model (FM) "
        f"in the cloud, and {_share_of(answers, 'fallback')} by the edge as a fallback. Lost: {answers['lost']:,}."
    ]
    for e in environments:
        (_, at_first), (samples, share) = e["edge_share"][0], e["edge_share"][-1]
        sentences.append(
            f"{e['name']}: with {samples:,} samples labelled by the FM, the edge share went from "
            f"{percent(at_first)} to {percent(share)}; the student alone, {percent(e['version0']['student_accuracy'])} "
            f"as version 0, has {percent(e['student_accuracy'])} accuracy. The whole system is right on "
            f"{percent(e['system_accuracy'])} of the scoring images, the FM alone on {percent(e['fm_accuracy'])}."
        )
        sentences += [
            f"{e['name']}: {alarm['time_s']:.0f}\u00a0s after the start the cloud raised a drift alarm: the {alarm['kind']} "
            "had moved away from what the student had learned. It learns anew, and the samples since judge it."
            for alarm in e["drift"]
        ]
    medians = [f"{milliseconds(latency[r]['p50'])} ({r})" for r in ROUTES if latency.get(r)]
    if medians:
        sentences.append(f"Half of each route's answers came within {', '.join(medians)}.")
    added = result.get("added_label")
    if added:
        sentences.append(
            f"The label “{added['name']}” was added in {added['environment']} while the system ran: answered right "
            f"on {percent(added['recognised_before'])} of its scoring images before and "
            f"{percent(added['recognised_after'])} after."
        )
        if added["descriptions"]:
            sentences.append(
                f"The cloud's language model described it: “{added['descriptions'][0]}” The FM alone answers right on "
                f"{percent(added['fm_by_text'])} of its images by its text, and on {percent(added['fm_described'])} by text and "
                "descriptions together."
            )
    objective = result["objective"]
    if objective["name"] == "accuracy_target":
        sentences.append(
            "Accuracy target: the edge answers as much as it can while its estimated accuracy, against the FM's, "
            f"stays at {percent(objective['target'])} or above."
        )
    return sentences


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}\u00a0%"


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.{2 if value < 10 else 1}f}\u00a0ms"


def byte_count(value: int) -> str:
    return f"{value / 1e6:,.1f}\u00a0MB"


def _share_of(answers: Mapping[str, int], route: str) -> str:
    return percent(answers[route] / answers["total"]) if answers["total"] else "–"


def _tiles(result: Result) -> list[tuple[str, str]]:
    answers = result["answers"]
    edge, cloud = (result["latency_ms"].get(route) for route in ("edge", "cloud"))
    return [
        (f"{answers['total']:,}", f"answers, {answers['lost']:,} lost"),
        (_share_of(answers, "edge"), "answered on the edge"),
        (
            milliseconds(edge["p50"] if edge else None),
            f"median on the edge; cloud {milliseconds(cloud['p50'] if cloud else None)}",
        ),
        (byte_count(result["bytes_up"]), f"sent up; {byte_count(result['bytes_down'])} down"),
    ]


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of figures: the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _facts(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """A two-column table of names and text."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<table class="text"><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>'


def _tables(result: Result) -> dict[str, str]:
    environments = result["environments"]
    answers, latency, link, setup = (result[k] for k in ("answers", "latency_ms", "link", "environment"))
    objective, added = result["objective"], result.get("added_label")
    none = dict.fromkeys(("p50", "p95", "mean", "predicted_mean"))
    accuracy = [
        (
            str(e["name"]),
            *(percent(e[f"{who}_accuracy"]) for who in ("fm", "system", "student")),
            percent(e["version0"]["student_accuracy"]),
        )
        for e in environments
    ]
    learning = [
        (
            str(e["name"]),
            f"{e['frames']:,}",
            f"{e['edge_share'][-1][0]:,}",
            f"{e['versions']:,}",
            percent(e["edge_share"][0][1]),
            percent(e["edge_share"][-1][1]),
            ", ".join(f"{alarm['kind']} at {alarm['time_s']:.0f}\u00a0s" for alarm in e["drift"]) or "none",
        )
        for e in environments
    ]
    routes: list[tuple[str, ...]] = [
        (
            route,
            f"{answers[route]:,}",
            _share_of(answers, route),
            *(milliseconds((latency.get(route) or none)[key]) for key in none),
        )
        for route in ROUTES
    ]
    routes.append(("lost", f"{answers['lost']:,}", *["–"] * (1 + len(none))))
    return {
        "accuracy": _table(
            "Accuracy on the scoring images",
            ("environment", "FM", "system", "student", "student, version 0"),
            accuracy,
        ),
        "added_label": _table(
            "Label added while running: share of its scoring images answered right",
            ("label", "environment", "before", "FM, by its text", "FM, described", "system at the end"),
            [
                (
                    str(added["name"]),
                    str(added["environment"]),
                    *(
                        percent(added[key])
                        for key in ("recognised_before", "fm_by_text", "fm_described", "recognised_after")
                    ),
                )
            ],
        )
        if added
        else "",
        "learning": _table(
            "What each environment's student learned",
            (
                "environment",
                "frames",
                "samples labelled by the FM",
                "student versions swapped in",
                "edge share, first version",
                "edge share, last",
                "drift alarms",
            ),
            learning,
        ),
        "latency": _table(
            "Time to the answer, end to end; predicted mean: what the switcher expected",
            ("route", "answers", "share", "p50", "p95", "mean", "predicted mean"),
            routes,
        ),
        "link": _facts(
            "Objective and shaped link",
            [
                ("objective", f"{objective['name']} = {objective['target']}"),
                ("uplink", str(link["uplink"])),
                ("downlink", str(link["downlink"])),
                ("propagation", f"{link['propagation_ms']:g}\u00a0ms"),
                ("bytes up", f"{result['bytes_up']:,}\u00a0B"),
                ("bytes down", f"{result['bytes_down']:,}\u00a0B"),
            ],
        ),
        "setup": _facts(
            "Where and how it ran",
            [
                *((key, str(setup[key])) for key in ("date", "machine", "command", "seed")),
                ("settings", ", ".join(line for line in result["settings"].splitlines() if " = " in line)),
                ("versions", ", ".join(f"{name} {version}" for name, version in setup["versions"].items())),
            ],
        ),
        "labels": _facts(
            "Labels in use",
            [(f"{e['name']} ({len(e['labels'])})", ", ".join(map(str, e["labels"]))) for e in environments],
        ),
    }


def _figures(result: Result, timeline: Sequence[Record]) -> dict[str, str]:
    environments = result["environments"]
    bins = bin_timeline(timeline)
    every = f", in bins of {bins.edges_s[1] - bins.edges_s[0]:.2g} s" if bins else ""
    drawn = {
        "accuracy": (
            lambda figure: plots.accuracy_axes(figure.subplots(), environments),
            3.0,
            "Accuracy on the scoring images: FM, system, and the student alone, now and at version 0.",
        ),
        "learning": (
            lambda figure: plots.edge_share_axes(figure.subplots(), environments),
            3.2,
            "Edge share against the samples the FM has labelled. The star is version 0, before any sample.",
        ),
        "routes": (
            lambda figure: plots.routes_figure(figure, bins),
            3.2,
            f"Who answered over time{every}. Dashed lines: a new student version.",
        ),
        "latency": (
            lambda figure: plots.latency_axes(figure.subplots(), timeline),
            3.0,
            "Distribution of the time to the answer per route (number of answers in brackets); marks: p50, p95.",
        ),
        "switching": (
            lambda figure: plots.switching_figure(figure, bins),
            4.2,
            f"Threshold with the median margin (above) and the bandwidth estimate (below): medians{every}. "
            f"Dashed lines: a new student version. Gaps: no value, as during cold start.",
        ),
    }
    return {
        name: f"<figure>{plots.svg(name, draw, height_in)}"
        f'<figcaption id="{name}-caption">{escape(caption)}</figcaption></figure>'
        for name, (draw, height_in, caption) in drawn.items()
    }
