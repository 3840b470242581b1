"""`edgefm trace info | convert`: what a link's trace is like, and the same link in another format."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...models.errors import ConfigError, TraceError
from .options import extra

if TYPE_CHECKING:
    from ..traces import Trace, TraceFormat

Source = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="In mahimahi's format, Pensieve's, or CSV with named columns; "
        "or a made link: constant:MBIT_PER_S, synthetic:SEED:up, synthetic:SEED:down.",
    ),
]
SourceFormat = Annotated[
    str | None, typer.Option("--from", help="Of FILE: mahimahi, pensieve or csv. [what its first line looks like]")
]
TimeColumn = Annotated[str | None, typer.Option(help="Of CSV. [the one named like a time]")]
RateColumn = Annotated[str | None, typer.Option(help="Of CSV. [the one named like a rate]")]
TimeUnit = Annotated[str | None, typer.Option(help="Of CSV: s, ms, us or ns. [from the name, or by size]")]
RateUnit = Annotated[str | None, typer.Option(help="Of CSV: kbit/s, Mbit/s, MB/s, kbps, ... [from the name]")]
LongestHold = Annotated[
    float | None,
    typer.Option(help="Of CSV: a row's rate holds no longer; after that comes an outage. [until the next row]"),
]
WindowMs = Annotated[int, typer.Option(help="Rates are means over so long.", min=1)]


def info(
    source: Source,
    source_format: SourceFormat = None,
    time_column: TimeColumn = None,
    rate_column: RateColumn = None,
    time_unit: TimeUnit = None,
    rate_unit: RateUnit = None,
    longest_hold_s: LongestHold = None,
    window_ms: WindowMs = 500,
    outage_ms: Annotated[int, typer.Option(help="A gap is an outage from here on.", min=1)] = 200,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this .png or .svg; needs edgefm[demo].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON, and no drawing.")] = False,
) -> None:
    """Tells a trace's duration, mean, percentiles and outages, and draws it."""
    from ..traces import summarize_trace

    if plot is not None:
        with extra("demo"):
            from ..traces.picture import check_picture_name
        check_picture_name(plot)
    trace = _open(source, source_format, time_column, rate_column, time_unit, rate_unit, longest_hold_s)
    summary = summarize_trace(trace, window_ms, outage_ms)
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        from ..traces.terminal import print_trace

        print_trace(trace, summary, Console())
    if plot is not None:
        from ..traces.picture import save_picture

        save_picture(trace, summary, plot)


def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Written here; an older file is replaced, FILE itself never.")],
    output_format: Annotated[str, typer.Option("--format", help="Of the output: mahimahi or pensieve.")] = "mahimahi",
    source_format: SourceFormat = None,
    time_column: TimeColumn = None,
    rate_column: RateColumn = None,
    time_unit: TimeUnit = None,
    rate_unit: RateUnit = None,
    longest_hold_s: LongestHold = None,
    window_ms: WindowMs = 500,
) -> None:
    """Writes a trace in mahimahi's format or in Pensieve's, for which --window-ms is the time between rows."""
    from ..traces import write_mahimahi, write_pensieve

    if output_format not in ("mahimahi", "pensieve"):
        raise ConfigError(f"--format is mahimahi or pensieve, got {output_format!r}")
    trace = _open(source, source_format, time_column, rate_column, time_unit, rate_unit, longest_hold_s)
    if Path(source).exists() and output.exists() and output.samefile(source):
        raise TraceError(f"{output} is the trace that is read; write to another file")
    if output_format == "mahimahi":
        write_mahimahi(trace, output)
    else:
        write_pensieve(trace, output, window_ms)
    typer.echo(f"{trace.duration_s:g} s, {trace.mean_mbit_per_s:.3g} Mbit/s on average, written to {output}")


def _open(
    source: str,
    source_format: str | None,
    time_column: str | None,
    rate_column: str | None,
    time_unit: str | None,
    rate_unit: str | None,
    longest_hold_s: float | None,
) -> Trace:
    from ..traces import FORMATS, CsvOptions, open_trace

    known: TraceFormat | None = next((each for each in FORMATS if each == source_format), None)
    if known is None and source_format is not None:
        raise ConfigError(f"--from is {', '.join(FORMATS)}; got {source_format!r}")
    return open_trace(source, known, CsvOptions(time_column, rate_column, time_unit, rate_unit, longest_hold_s))
