"""`edgefm replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...models.students import DEFAULT_STUDENT
from ..settings import parse_labels
from .options import check_sources, extra


def replay(
    source: Annotated[
        Path,
        typer.Argument(help="Images: a folder or tar laid out val/<label>/, or plain files; or a recording (.npz)."),
    ],
    trace: Annotated[
        str, typer.Option(help="Uplink: a trace file, constant:MBIT_PER_S or synthetic:SEED.")
    ] = "synthetic:0:up",
    trace_down: Annotated[
        str | None, typer.Option(help="Downlink. [FILE.down beside FILE.up; otherwise the uplink's]")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(help="Frames; past its end the stream begins again. A file of arrivals ends it sooner.", min=1),
    ] = 1000,
    rate: Annotated[float, typer.Option(help="Frames a second.")] = 2.0,
    arrivals: Annotated[
        str, typer.Option(help="fixed, poisson, or a file with a time in seconds on each line, instead of --rate.")
    ] = "fixed",
    payload: Annotated[int | None, typer.Option(help="Bytes of every image. [what it has]")] = None,
    propagation_ms: Annotated[float, typer.Option(help="One way, beside what the trace takes.")] = 25.0,
    objective: Annotated[str, typer.Option(help="accuracy_target or latency_bound.")] = "accuracy_target",
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    latency_bound_ms: Annotated[float, typer.Option(help="Mean latency to keep.")] = 200.0,
    deadline_ms: Annotated[float, typer.Option(help="Of a cloud query; then the edge answers.")] = 1000.0,
    student: Annotated[str, typer.Option(help="Which one answers on the device.")] = DEFAULT_STUDENT,
    labels: Annotated[str | None, typer.Option(help="Labels for plain files: 'cat, dog' or @FILE.")] = None,
    device_profile: Annotated[
        Path | None, typer.Option(help="What the device takes, from 'edgefm profile'. [measured here]")
    ] = None,
    cloud_profile: Annotated[
        Path | None, typer.Option(help="What the FM takes, from --cloud-profile-to or by hand. [measured here]")
    ] = None,
    record_to: Annotated[Path | None, typer.Option(help="Keep what student and FM said (.npz).")] = None,
    cloud_profile_to: Annotated[Path | None, typer.Option(help="Keep what the FM takes here.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Also with real processes over a shaped link, in real time; they must agree.")
    ] = False,
    reset_after_ms: Annotated[
        float | None, typer.Option(help="Live: an outage of that length resets every connection. [outages stall]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, times and switcher.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """What latency and accuracy a device would have on a link, on a virtual clock that runs the product's own switcher.

    With --live, exit code 1 when virtual and real differ by more than 10 % in mean or 95th percentile of latency, or by 2
    points in edge share.
    """
    with extra("cloud"):
        from rich.console import Console

        from ...edge.config import SwitcherConfig
        from ..bench.results import make_folder, save
        from ..replay.run import ReplayOptions, raise_if_disagreeing, run_replay
        from ..replay.settings import ReplaySettings
        from ..traces import downlink_beside, open_trace
    if json_file is not None:
        make_folder(json_file)
    uplink, downlink = open_trace(trace), open_trace(trace_down or downlink_beside(trace))
    switcher = SwitcherConfig(
        objective=objective,  # pyright: ignore[reportArgumentType]
        accuracy_target=accuracy_target,
        latency_bound_ms=latency_bound_ms,
        seed=seed,
    )
    settings = ReplaySettings(
        uplink, downlink, samples, rate, payload, propagation_ms, deadline_ms, switcher, seed, reset_after_ms
    )
    options = ReplayOptions(
        source=source,
        settings=settings,
        student=student,
        labels=parse_labels(labels) or (),
        arrivals=arrivals,
        device_profile=device_profile,
        cloud_profile=cloud_profile,
        record_to=record_to,
        profile_to=cloud_profile_to,
        live=live,
    )
    if not options.is_recording:
        check_sources([source])
    result = run_replay(options, Console())
    if json_file is not None:
        save(result, json_file)
    raise_if_disagreeing(result)
