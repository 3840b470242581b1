"""`edgefm agent`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import load_config, parse_labels
from .options import INTERRUPTED, CloudAddress, ConfigFile, DeviceEnvironment, StateDir


def _schema(wanted: bool) -> None:
    if wanted:
        import json

        from ...edge.records import answer_schema

        typer.echo(json.dumps(answer_schema(), indent=2))
        raise typer.Exit


def agent(
    source: Annotated[
        str,
        typer.Argument(help="Folder or tar of images, list of paths (.txt), video file, camera:NUMBER, rtsp://... ."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="One JSON record an answer is appended here. ['answers.jsonl' or --mqtt]"),
    ] = None,
    mqtt: Annotated[
        str | None,
        typer.Option(help="And published here: mqtt://HOST:PORT/TOPIC, mqtts:// for TLS; see deploy/docs/answers.md."),
    ] = None,
    config: ConfigFile = None,
    cloud: CloudAddress = None,
    environment: DeviceEnvironment = None,
    labels: Annotated[str | None, typer.Option(help="First labels of a new environment: 'cat, dog' or @FILE.")] = None,
    device_id: Annotated[
        str | None, typer.Option(help="Tells devices apart. ['' one made once and kept in --state-dir]")
    ] = None,
    state_dir: StateDir = None,
    student: Annotated[
        str | None, typer.Option(help="Student for a new environment, or auto: by --device-profile. ['' the cloud's]")
    ] = None,
    device_profile: Annotated[
        Path | None, typer.Option(help="For --student auto: what this device can, from 'edgefm profile'.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="accuracy_target or latency_bound. [accuracy_target]")] = None,
    accuracy_target: Annotated[float | None, typer.Option(help="Accuracy to keep, of the FM's. [0.99]")] = None,
    latency_bound_ms: Annotated[float | None, typer.Option(help="Mean latency to keep. [200]")] = None,
    audit_share: Annotated[float | None, typer.Option(help="Share of sure samples the FM checks. [0.02]")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Of a cloud query; then the edge answers. [1000]")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; 0 is as fast as possible. [0]")] = None,
    upload: Annotated[
        str | None,
        typer.Option(
            help="Beside queries: never, uncertain (what the FM could not be asked in time), all. [uncertain]"
        ),
    ] = None,
    upload_bytes_per_day: Annotated[int | None, typer.Option(help="Cap on uploads, by UTC day; 0 is none. [0]")] = None,
    spool_bytes: Annotated[int | None, typer.Option(help="Images that wait for upload, at most. [67108864]")] = None,
    retention_days: Annotated[float | None, typer.Option(help="They wait no longer than this. [30]")] = None,
    prefix: Annotated[str, typer.Option(help="Take only names that begin with this, e.g. train/.")] = "",
    shuffle_seed: Annotated[int | None, typer.Option(help="Order by content hash instead of by name.")] = None,
    stride: Annotated[int | None, typer.Option(help="Of a video file: take every so many frames.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many frames.", min=0)] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON Schema of a record and exit.", is_eager=True, callback=_schema),
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics there; 0 takes a free one, without it none are served.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics.")] = "127.0.0.1",
) -> None:
    """Runs a device: answers every image of SOURCE, on the edge or by the cloud, and prints a summary.

    SIGINT (Ctrl-C) and SIGTERM end the run after the answers under way, with exit code 130 and 0; a second signal at once.
    """
    import itertools
    import json
    import signal
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack, closing

    from ...edge.agent import Agent
    from ...edge.config import AgentConfig
    from ...edge.records import Sink
    from ...edge.sinks import JsonLines, Mqtt, fan_out
    from ...edge.sources import open_source
    from ...edge.video import LiveVideo
    from ...models.errors import CloudError, InputError
    from ..device import with_selected_student
    from ..signals import result_of, stopped_by_signals

    flags = {
        "cloud": cloud,
        "environment": environment,
        "labels": parse_labels(labels),
        "device_id": device_id,
        "state_dir": state_dir,
        "student": student,
        "device_profile": device_profile,
        "deadline_ms": deadline_ms,
        "fps": fps,
        "upload": upload,
        "upload_bytes_per_day": upload_bytes_per_day,
        "spool_bytes": spool_bytes,
        "retention_days": retention_days,
        "switcher.objective": objective,
        "switcher.accuracy_target": accuracy_target,
        "switcher.latency_bound_ms": latency_bound_ms,
        "switcher.audit_share": audit_share,
    }
    settings = with_selected_student(load_config(AgentConfig, "agent", config, flags))
    with ExitStack() as opened:
        # An empty or missing source is an error before anything is contacted.
        frames = opened.enter_context(closing(open_source(source, prefix, shuffle_seed, stride)))
        broker = opened.enter_context(closing(Mqtt(mqtt))) if mqtt else None
        sinks: list[Sink] = [broker] if broker else []
        if output or not broker:
            sinks.append(opened.enter_context(closing(JsonLines(output or Path("answers.jsonl")))))
        running = opened.enter_context(Agent(settings))
        sink = fan_out(*sinks)
        if metrics_port is not None:
            from ...edge.metrics import AgentMetrics

            metrics = AgentMetrics(running.current_summary)
            opened.enter_context(metrics.serve(metrics_host, metrics_port))
            sink = metrics.observe(sink)

        def stop() -> None:
            running.stop()
            if isinstance(frames, LiveVideo):  # it may wait for a frame that never comes
                frames.close()

        # The run has a thread of its own: a handler interrupts the main thread, which then holds none of the run's locks.
        worker = opened.enter_context(ThreadPoolExecutor(1, "run"))
        with stopped_by_signals(stop) as received:
            result_of(worker.submit(running.run, itertools.islice(frames, limit), sink))
            opened.close()
            summary = running.summary.as_dict()
            for part in (frames, broker):
                if isinstance(part, (LiveVideo, Mqtt)):
                    summary |= part.counts()
            typer.echo(json.dumps(summary))
    if signal.SIGINT in received:
        raise typer.Exit(INTERRUPTED)
    counted = running.summary
    if counted.frames and counted.unreadable == counted.frames:
        raise InputError(
            f"not one of {counted.frames} images could be read; 'edgefm -v agent' names each with its reason"
        )
    if broker and not output and counted.frames and not summary["mqtt_published"]:
        raise CloudError(
            f"no answer reached the broker at {mqtt}; is it running? --output FILE keeps answers in any case"
        )
