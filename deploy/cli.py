"""The command line: `edgefm cloud | agent | labels | rollback | status | bench | demo`."""

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
from . import logs
from .settings import load_config, parse_labels

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
bench_app = typer.Typer(no_args_is_help=True, help="Measurements that take minutes.")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; flags go over it.")]
CloudAddress = Annotated[str | None, typer.Option("--cloud", help="host:port of the cloud. [127.0.0.1:50061]")]
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


@app.command()
def agent(
    source: Annotated[Path, typer.Argument(help="Folder or tar archive of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="One JSON record an answer is appended here.")] = Path(
        "answers.jsonl"
    ),
    config: ConfigFile = None,
    cloud: CloudAddress = None,
    environment: Annotated[
        str | None, typer.Option("--environment", "-e", help="Where the device stands. [default]")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="First labels of a new environment: 'cat, dog' or @FILE.")] = None,
    device_id: Annotated[str | None, typer.Option(help="Tells devices apart. [device]")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Last good student and pool. [edgefm-agent]")] = None,
    student: Annotated[str | None, typer.Option(help="Student for a new environment. [the cloud's default]")] = None,
    objective: Annotated[str | None, typer.Option(help="accuracy_target or latency_bound. [accuracy_target]")] = None,
    accuracy_target: Annotated[float | None, typer.Option(help="Agreement with the FM to keep. [0.96]")] = None,
    latency_bound_ms: Annotated[float | None, typer.Option(help="Mean latency to keep. [200]")] = None,
    audit_share: Annotated[float | None, typer.Option(help="Share of sure samples the FM checks. [0.02]")] = None,
    deadline_ms: Annotated[float | None, typer.Option(help="Of a cloud query; then the edge answers. [1000]")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; 0 is as fast as possible. [0]")] = None,
    upload: Annotated[
        str | None, typer.Option(help="never, or uncertain samples whose query failed. [uncertain]")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Take only names that begin with this, e.g. train/.")] = "",
    shuffle_seed: Annotated[int | None, typer.Option(help="Order by content hash instead of by name.")] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after this many frames.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics there; 0 takes a free one, without it none are served.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics.")] = "127.0.0.1",
) -> None:
    """Runs a device: answers every image of SOURCE, on the edge or by the cloud, and prints a summary."""
    import contextlib
    import itertools
    import json

    from ..edge.agent import Agent
    from ..edge.config import AgentConfig
    from ..edge.records import JsonLines, Sink
    from ..edge.sources import open_source

    flags = {
        "cloud": cloud,
        "environment": environment,
        "labels": parse_labels(labels),
        "device_id": device_id,
        "state_dir": state_dir,
        "student": student,
        "deadline_ms": deadline_ms,
        "fps": fps,
        "upload": upload,
        "switcher.objective": objective,
        "switcher.accuracy_target": accuracy_target,
        "switcher.latency_bound_ms": latency_bound_ms,
        "switcher.audit_share": audit_share,
    }
    settings = load_config(AgentConfig, "agent", config, flags)
    frames = itertools.islice(open_source(source, prefix, shuffle_seed), limit)
    first = next(frames, None)  # an empty or missing source is an error before anything is contacted
    sink = JsonLines(output)
    with Agent(settings) as running, contextlib.ExitStack() as stack:
        observed: Sink = sink
        if metrics_port is not None:
            from ..edge.metrics import AgentMetrics

            metrics = AgentMetrics(lambda: running.summary)
            stack.enter_context(metrics.serve(metrics_host, metrics_port))
            observed = metrics.observe(sink)
        if first is not None:
            running.run(itertools.chain([first], frames), observed)
    sink.close()
    typer.echo(json.dumps(running.summary.as_dict()))


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
    to: Annotated[int | None, typer.Option("--to", help="A version; by default the parent of the running one.")] = None,
    cloud: CloudAddress = None,
) -> None:
    """Makes an earlier student version current again; devices swap it in."""
    from ..edge.operator import Operator

    with Operator(cloud) as operator:
        typer.echo(f"{environment} runs student version {operator.rollback(environment, to)}")


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
    result = bench.bench_students(data, samples, seed, Console())
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
    accuracy_target: Annotated[float, typer.Option(help="Agreement with the FM to keep.")] = 0.96,
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
