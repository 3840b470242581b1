"""`edgefm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import parse_labels
from .options import extra


def demo(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder or tar for each environment: train/<label>/, val/<label>/, or plain files. "
            "May be given several times, or take several paths after one --data. "
            "Default: a simulated camera by day and by night."
        ),
    ] = None,
    more_data: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    trace: Annotated[
        str | None, typer.Option(help="Uplink bandwidth trace: what 'edgefm trace info' reads, or a made link.")
    ] = None,
    trace_down: Annotated[
        str | None, typer.Option(help="Downlink trace; by default FILE.down beside FILE.up, or the uplink's.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames in each environment, at most; the camera's night has half as many again.")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 30.0,
    accuracy_target: Annotated[
        float, typer.Option(help="Accuracy to keep, of the FM's: 0.99 may lose a point.")
    ] = 0.99,
    labels: Annotated[str | None, typer.Option(help="Labels for plain files: 'cat, dog' or @FILE.")] = None,
    seed: Annotated[int, typer.Option(help="Of camera, link and switcher.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report and logs.")] = Path("edgefm-demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Shows it all on this machine: a cloud and an agent over a shaped link, a student that learns, and a report."""
    with extra("demo"):
        from ..demo import DemoOptions, run_demo
    run_demo(
        DemoOptions(
            data=(*(data or ()), *(more_data or ())),
            trace=trace,
            trace_down=trace_down,
            frames=frames,
            fps=fps,
            accuracy_target=accuracy_target,
            labels=parse_labels(labels) or (),
            seed=seed,
            output=output,
            json_file=json_file,
        )
    )
