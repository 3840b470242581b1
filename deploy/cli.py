"""The command line: `edgefm cloud | agent | device | profile | select | students | labels | rollback | status | bench | demo`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ..models.errors import (
    CloudError,
    ConfigError,
    EdgeFMError,
    InputError,
    MissingExtraError,
    ModelError,
    StoreError,
)
from ..models.students import DEFAULT_STUDENT, PROFILES
from . import logs
from .settings import load_config, parse_labels, parse_size

EXIT_CODES: tuple[tuple[type[EdgeFMError], int], ...] = (
    (ConfigError, 2),
    (MissingExtraError, 3),
    (InputError, 4),
    (ModelError, 5),
    (StoreError, 6),
    (CloudError, 7),
    (EdgeFMError, 1),
)
INTERRUPTED = 130

_EPILOG = (
    "Exit codes: 0 done, 2 wrong settings, 3 a package is missing, 4 bad input (images, labels, traces), 5 a model is "
    "missing or damaged, 6 the disk failed, 7 the cloud cannot be reached or refuses, 130 interrupted, 1 anything else."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A small model on a device answers what it is sure of, a foundation model (FM) in the cloud answers the rest, "
    "and what the FM says teaches the small model.",
    epilog=_EPILOG,
)
labels_app = typer.Typer(no_args_is_help=True, help="List, add and remove the labels of an environment, while it runs.")
app.add_typer(labels_app, name="labels")
students_app = typer.Typer(no_args_is_help=True, help="The students' files.")
app.add_typer(students_app, name="students")
device_app = typer.Typer(
    no_args_is_help=True, help="What a device keeps on its disk; no network, and its agent stopped."
)
app.add_typer(device_app, name="device")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements that take minutes.")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; flags go over it.")]
CloudAddress = Annotated[str | None, typer.Option("--cloud", help="host:port of the cloud. [127.0.0.1:50061]")]
LatencyLimit = Annotated[
    float | None, typer.Option(help="For a decoded frame: preprocessing and student, 95th percentile. [none]")
]
MemoryLimit = Annotated[float | None, typer.Option(help="For the agent's process, in 10^6 bytes. [none]")]
StateDir = Annotated[Path | None, typer.Option(help="What the device keeps: its students and samples. [edgefm-agent]")]
DeviceEnvironment = Annotated[
    str | None, typer.Option("--environment", "-e", help="Where the device stands. [default]")
]
Environment = Annotated[str, typer.Option("--environment", "-e", help="The environment; '' is the base of new ones.")]


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, not only warnings.")] = False,
    log_format: Annotated[str, typer.Option(help="text (key=value) or json; one line a record, on stderr.")] = "text",
) -> None:
    if log_format not in logs.FORMATS:
        raise ConfigError(f"--log-format is {' or '.join(logs.FORMATS)}, got {log_format!r}")
    logs.configure(verbose, log_format)
    if show_version:
        typer.echo(f"edgefm {version('edgefm')}")
        raise typer.Exit


@app.command()
def cloud(
    config: ConfigFile = None,
    data_dir: Annotated[Path | None, typer.Option(help="Samples and versions live here. [edgefm-cloud]")] = None,
    fm: Annotated[
        str | None,
        typer.Option(
            help="Foundation model: synclip, openclip:ARCHITECTURE/TAG, openclip:ARCHITECTURE//PATH. [synclip]"
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; there is no TLS yet. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one. [50061]")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once the service answers.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels of every new environment: 'cat, dog' or @FILE.")] = None,
    student: Annotated[str | None, typer.Option(help="Default student: lite0-64, -96, -128, -160. [lite0-128]")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Samples the FM sees at once, at most. [16]")] = None,
    max_delay_ms: Annotated[float | None, typer.Option(help="How long a batch may fill. [5]")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Samples that wait for the FM, at most. [1024]")] = None,
    store_bytes: Annotated[int | None, typer.Option(help="Quota of the sample store; 0: none. [0]")] = None,
    retention_days: Annotated[float | None, typer.Option(help="Older samples are removed; 0: never. [0]")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics there; 0 takes a free one, without it none are served.")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address of the metrics. [127.0.0.1]")] = None,
) -> None:
    """Runs the cloud: the FM behind gRPC, the sample store, customization and the registry of versions."""
    try:
        import asyncio

        from ..cloud.config import CloudConfig
        from ..cloud.server import serve
    except ImportError as error:
        raise MissingExtraError(f"the cloud needs more packages ({error.name}): pip install 'edgefm[cloud]'") from error
    flags = {
        "data_dir": data_dir,
        "foundation_model": fm,
        "host": host,
        "port": port,
        "port_file": port_file,
        "labels": parse_labels(labels),
        "student": student,
        "max_batch": max_batch,
        "max_delay_ms": max_delay_ms,
        "max_queue": max_queue,
        "store_bytes": store_bytes,
        "retention_days": retention_days,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
    }
    asyncio.run(serve(load_config(CloudConfig, "cloud", config, flags)))


def _schema(wanted: bool) -> None:
    if wanted:
        import json

        from ..edge.records import answer_schema

        typer.echo(json.dumps(answer_schema(), indent=2))
        raise typer.Exit


@app.command()
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

    from ..edge.agent import Agent
    from ..edge.config import AgentConfig
    from ..edge.records import Sink
    from ..edge.sinks import JsonLines, Mqtt, fan_out
    from ..edge.sources import open_source
    from ..edge.video import LiveVideo
    from .device import with_selected_student
    from .signals import stopped_by_signals

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
            from ..edge.metrics import AgentMetrics

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
            worker.submit(running.run, itertools.islice(frames, limit), sink).result()
            opened.close()
    summary = running.summary.as_dict()
    for counted in (frames, broker):
        if isinstance(counted, (LiveVideo, Mqtt)):
            summary |= counted.counts()
    typer.echo(json.dumps(summary))
    if signal.SIGINT in received:
        raise typer.Exit(INTERRUPTED)


@device_app.command("rollback")
def device_rollback(
    config: ConfigFile = None,
    environment: DeviceEnvironment = None,
    state_dir: StateDir = None,
    reason: Annotated[str, typer.Option(help="Told to the cloud.")] = "rolled back by the device's operator",
) -> None:
    """Makes the previous student the running one, until a version newer than the present one comes."""
    from ..edge.config import AgentConfig
    from ..edge.local_state import LocalState, existing_state

    settings = load_config(AgentConfig, "agent", config, {"environment": environment, "state_dir": state_dir})
    with existing_state(settings.state_dir, settings.environment):
        left, taken = LocalState(settings.state_dir, settings.environment).roll_back(reason)
    typer.echo(f"{settings.environment} goes back from student version {left.version} to {taken.version}")


@device_app.command("purge")
def device_purge(config: ConfigFile = None, state_dir: StateDir = None) -> None:
    """Deletes all samples that wait for upload, of every environment."""
    from ..edge.config import AgentConfig
    from ..edge.local_state import existing_state
    from ..edge.spool import DAY_S, Spool

    settings = load_config(AgentConfig, "agent", config, {"state_dir": state_dir})
    with existing_state(settings.state_dir):
        spool = Spool(settings.state_dir, settings.spool_bytes, settings.retention_days * DAY_S)
        try:
            deleted = spool.purge()
        finally:
            spool.close()
    typer.echo(f"{deleted} waiting samples deleted")


@labels_app.command("list")
def list_labels(environment: Environment = "", cloud: CloudAddress = None) -> None:
    """Prints the labels, one a line."""
    from ..edge.operator import Operator

    with Operator(cloud) as operator:
        for label in operator.list_labels(environment).labels:
            typer.echo(label)


@labels_app.command("add")
def add_labels(
    labels: Annotated[list[str], typer.Argument(help="Any text, e.g. 'cup of coffee'.")],
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Adds labels; devices recognise them from their next pool on."""
    from ..edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.add_labels(environment, labels)
    for warning in pool.warnings:
        if any(repr(label) in warning for label in labels):
            typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{len(pool.labels)} labels, pool {pool.version}")


@labels_app.command("remove")
def remove_labels(
    labels: Annotated[list[str], typer.Argument(help="Labels of the pool.")],
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Removes labels."""
    from ..edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.remove_labels(environment, labels)
    typer.echo(f"{len(pool.labels)} labels, pool {pool.version}")


@app.command()
def rollback(
    environment: Annotated[str, typer.Argument(help="The environment.")],
    to: Annotated[
        int | None, typer.Option("--to", help="A version; by default the parent of the running one.", min=0)
    ] = None,
    cloud: CloudAddress = None,
) -> None:
    """Makes an earlier student version current again; devices swap it in."""
    from ..edge.operator import Operator

    with Operator(cloud) as operator:
        typer.echo(f"{environment} runs student version {operator.rollback(environment, to)}")


@app.command()
def profile(
    students: Annotated[Path, typer.Argument(help="Folder of 'edgefm students export', or an agent's state folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile is written here.")] = Path("device.json"),
    device: Annotated[str, typer.Option(help="A name for people. [the board or processor]")] = "",
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Try so many; may be given several times. [1, 2, 4, ... and all cores]", min=1),
    ] = None,
    frame_size: Annotated[str, typer.Option(help="Of the camera, in pixels.")] = "640x480",
    runs: Annotated[int, typer.Option(help="Frames timed for each figure.", min=1)] = 100,
    latency_ms: LatencyLimit = None,
    memory_mb: MemoryLimit = None,
) -> None:
    """Measures on this device what each student costs, without a cloud, and says which one fits."""
    from rich.console import Console

    from ..edge.profiler import ProfileOptions
    from ..models.selection import select_student
    from .device import explain, limits_of, profile_device

    console = Console()
    options = ProfileOptions(tuple(threads or ()), parse_size(frame_size), runs)
    limits = limits_of(latency_ms, memory_mb)
    measured = profile_device(students, device, limits, options, console)
    measured.save(output)
    console.print(explain(measured, select_student(measured, limits)))
    typer.echo(f"Written to {output}; 'edgefm agent --student auto --device-profile {output}' runs the one taken.")


@app.command()
def select(
    device_profile: Annotated[Path, typer.Argument(help="From 'edgefm profile', or written by hand.")],
    latency_ms: LatencyLimit = None,
    memory_mb: MemoryLimit = None,
) -> None:
    """Says which student a device should run: the most accurate that keeps the limits, the profile's or these."""
    from rich.console import Console

    from ..models.device_profile import DeviceProfile
    from ..models.selection import select_student
    from .device import explain, limits_of

    measured = DeviceProfile.load(device_profile)
    selection = select_student(measured, limits_of(latency_ms, memory_mb, measured.limits))
    Console().print(explain(measured, selection))
    selection.require(measured.device)


@students_app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Written here, some 10 MB a student; copy it to the device.")],
    student: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    fm: Annotated[str, typer.Option(help="Foundation model whose space the students map into.")] = "synclip",
) -> None:
    """Writes the graphs of the students, for 'edgefm profile' on a device that cannot build them."""
    try:
        from rich.console import Console

        from ..models.foundation import load_foundation_model
        from .export import export_students
    except ImportError as error:
        raise MissingExtraError(f"this needs more packages ({error.name}): pip install 'edgefm[cloud]'") from error
    with Console().status("Loading the FM ...") as status:
        model = load_foundation_model(fm)
        export_students(folder, model, student or list(PROFILES), lambda name: status.update(f"Exporting {name} ..."))


@app.command()
def status(
    environment: Annotated[str, typer.Argument(help="The environment; by default all.")] = "",
    cloud: CloudAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    """Shows what the cloud runs: versions, samples, agreement, drift alarms, refusals of devices, queue."""
    from ..edge.operator import Operator
    from .status import lines

    with Operator(cloud) as operator:
        found = operator.status(environment)
    for line in lines(found, as_json):
        typer.echo(line)


@bench_app.command("students")
def bench_students(
    data: Annotated[Path, typer.Option(help="Folder or tar laid out train/<label>/, val/<label>/.")],
    samples: Annotated[int, typer.Option(help="Samples that the FM labels.")] = 1600,
    seed: Annotated[int, typer.Option(help="Which samples those are.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Every student: milliseconds a frame, accuracy before and after customization, seconds to publish."""
    try:
        from rich.console import Console

        from . import bench
    except ImportError as error:
        raise MissingExtraError(f"this needs more packages ({error.name}): pip install 'edgefm[demo]'") from error
    if json_file is not None:
        bench.make_folder(json_file)
    result = bench.bench_students(data, samples, seed, Console())
    if json_file is not None:
        bench.save(result, json_file)


@bench_app.command("learning")
def bench_learning(
    data: Annotated[list[Path], typer.Option(help="Folders or tars laid out train/<label>/, val/<label>/.")],
    student: Annotated[str, typer.Option(help="Which student.")] = DEFAULT_STUDENT,
    samples: Annotated[
        str, typer.Option(help="Numbers of samples that the FM labels; 0 is version 0.")
    ] = "0,100,400,1600",
    seeds: Annotated[int, typer.Option(help="Repeats, each with other samples.")] = 5,
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Edge share against samples, clean and by night, blurred, noisy, compressed. About 40 minutes on 2 cores."""
    try:
        from rich.console import Console

        from . import bench, bench_learning
    except ImportError as error:
        raise MissingExtraError(f"this needs more packages ({error.name}): pip install 'edgefm[demo]'") from error
    try:
        counts = sorted({int(count) for count in samples.split(",")})
    except ValueError:
        raise ConfigError(f"--samples is a list of numbers such as 0,100,400, got {samples!r}") from None
    if counts[0] < 0 or seeds < 1:
        raise ConfigError("--samples must not be negative, --seeds must be at least 1")
    if json_file is not None:
        bench.make_folder(json_file)
    result = bench_learning.bench_learning(data, student, counts, seeds, accuracy_target, Console())
    if json_file is not None:
        bench.save(result, json_file)


@app.command()
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
    trace: Annotated[Path | None, typer.Option(help="Uplink bandwidth trace in mahimahi's format.")] = None,
    trace_down: Annotated[
        Path | None, typer.Option(help="Downlink trace; by default FILE.down beside FILE.up.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames in each environment, at most.")] = None,
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
    try:
        from .demo import DemoOptions, run_demo
    except ImportError as error:
        raise MissingExtraError(f"the demo needs more packages ({error.name}): pip install 'edgefm[demo]'") from error
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


def main() -> None:
    """Entry point: one line and a meaning for each deliberate error, a traceback only for bugs."""
    try:
        app()
    except EdgeFMError as error:
        typer.echo(f"edgefm: {error}", err=True)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
