"""`edgefm evaluate | report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...models.students import DEFAULT_STUDENT
from .options import check_sources, extra


def evaluate(
    data: Annotated[
        list[Path],
        typer.Option(
            help="Folders or tars laid out train/<label>/, val/<label>/: where the device stands first, and where it comes "
            "to. May be given several times; at last it sees the first of them by night."
        ),
    ],
    trace: Annotated[
        list[str] | None,
        typer.Option(help="Uplinks, as for 'edgefm replay'; may be given several times. [constant 2 and 10 Mbit/s]"),
    ] = None,
    presets: Annotated[str, typer.Option(help="Experiments by name, separated by commas, or all.")] = "all",
    systems: Annotated[
        str,
        typer.Option(
            help="Compared: edgefm, cloud-only, edge-only, spinn, persephonee, FM on the device, fixed-threshold, "
            "oracle-threshold; separated by commas, or all."
        ),
    ] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: shows that it runs, not what is true.")] = False,
    student: Annotated[str, typer.Option(help="Which one learns.")] = DEFAULT_STUDENT,
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    rate: Annotated[float, typer.Option(help="Samples a second.")] = 2.0,
    payload: Annotated[int, typer.Option(help="Bytes of every image on the link.")] = 20_000,
    propagation_ms: Annotated[float, typer.Option(help="One way, beside what the trace takes.")] = 25.0,
    device_profile: Annotated[
        Path | None, typer.Option(help="What the device takes, from 'edgefm profile'. [measured here]")
    ] = None,
    cloud_profile: Annotated[
        Path | None, typer.Option(help="What the FM takes, from 'edgefm replay'. [measured here]")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the JSON.")] = Path(
        "edgefm-evaluation"
    ),
) -> None:
    """Measures what the system is worth beside its rivals, and writes a report.

    Experiments: environment-change, latency-accuracy, crossover, bandwidth, uploads, students, open-set, margins.
    """
    check_sources(data)
    with extra("demo"):
        from rich.console import Console

        from ..bench.results import make_folder, save
        from ..evaluate.experiment import SYSTEMS, Traffic
        from ..evaluate.presets import chosen_presets
        from ..evaluate.report import write_reports
        from ..evaluate.run import EvaluateOptions
        from ..evaluate.run import evaluate as measure
    console = Console()
    experiments = chosen_presets(presets)
    json_file = output / "result.json"
    make_folder(json_file)
    options = EvaluateOptions(
        data=tuple(data),
        traces=tuple(trace or ()),
        student=student,
        target=accuracy_target,
        quick=quick,
        traffic=Traffic(rate, payload, propagation_ms),
        device_profile=device_profile,
        cloud_profile=cloud_profile,
        systems=SYSTEMS if systems == "all" else tuple(name.strip() for name in systems.split(",")),
    )
    result = measure(options, experiments, console, lambda result: save(result, json_file))
    page, text = write_reports({"this run": result}, output)
    for name, path in (("Report", page), ("Markdown", text), ("JSON", json_file)):
        console.print(f"{name}: {path.resolve()}", highlight=False, soft_wrap=True)


def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files of 'edgefm evaluate'; several stand side by side.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("edgefm-report"),
) -> None:
    """Makes the report of evaluations again, of one or of several side by side."""
    with extra("demo"):
        from ..evaluate.report import load_result, write_reports
    named = {path.stem if len({p.stem for p in results}) == len(results) else str(path): path for path in results}
    for path in write_reports({name: load_result(path) for name, path in named.items()}, output):
        typer.echo(f"Written: {path.resolve()}")
