"""The command line `edgefm`: its commands put together, what holds for all of them, and the meaning of exit codes."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
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
from .commands import agent, bench, cloud, data, demo, device, evaluate, language, operator, replay, trace
from .commands.options import INTERRUPTED

EXIT_CODES: tuple[tuple[type[EdgeFMError], int], ...] = (
    (ConfigError, 2),
    (MissingExtraError, 3),
    (InputError, 4),
    (ModelError, 5),
    (StoreError, 6),
    (CloudError, 7),
    (EdgeFMError, 1),
)

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
labels_app = typer.Typer(
    no_args_is_help=True, help="List, add, remove and describe the labels of an environment, while it runs."
)
app.add_typer(labels_app, name="labels")
students_app = typer.Typer(no_args_is_help=True, help="The students' files.")
app.add_typer(students_app, name="students")
device_app = typer.Typer(
    no_args_is_help=True, help="What a device keeps on its disk; no network, and its agent stopped."
)
app.add_typer(device_app, name="device")
weights_app = typer.Typer(no_args_is_help=True, help="Weights that no extra of the package brings.")
app.add_typer(weights_app, name="weights")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements that take minutes.")
app.add_typer(bench_app, name="bench")
trace_app = typer.Typer(no_args_is_help=True, help="Bandwidth traces of links, recorded or made.")
app.add_typer(trace_app, name="trace")
data_app = typer.Typer(no_args_is_help=True, help="Images for experiments, from public downloads.")
app.add_typer(data_app, name="data")


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


app.command()(cloud.cloud)
app.command()(cloud.kernels)
weights_app.command("get")(cloud.get_weights)
app.command()(agent.agent)
app.command()(device.profile)
app.command()(device.select)
device_app.command()(device.rollback)
device_app.command()(device.purge)
students_app.command()(device.export)
app.command()(operator.rollback)
app.command()(operator.status)
app.command()(language.ask)
app.command()(language.rank)
labels_app.command("list")(operator.list_labels)
labels_app.command("add")(operator.add_labels)
labels_app.command("remove")(operator.remove_labels)
labels_app.command("show")(operator.show_labels)
labels_app.command("describe")(operator.describe_labels)
bench_app.command()(bench.students)
bench_app.command()(bench.learning)
bench_app.command()(bench.returning)
bench_app.command()(bench.easy)
bench_app.command()(bench.agent)
bench_app.command()(bench.service)
bench_app.command()(bench.memory)
bench_app.command()(bench.link)
bench_app.command()(bench.attention)
bench_app.command()(bench.language)
bench_app.command()(bench.labels)
bench_app.command()(bench.ranking)
bench_app.command()(bench.scheduling)
bench_app.command()(bench.sepllm)
bench_app.command()(bench.soak)
trace_app.command()(trace.info)
trace_app.command()(trace.convert)
data_app.command()(data.tiny_imagenet)
app.command()(demo.demo)
app.command()(replay.replay)
app.command()(evaluate.evaluate)
app.command()(evaluate.report)


def _terminated(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Entry point: one line and a meaning for each deliberate error, a traceback only for bugs."""
    # For torch, here and in child processes: OpenMP's threads spin while they wait for each other. Where another process
    # wants a core too, as the FM does while a student learns, that made training four times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Commands that start others end them, and their folders, on the way out; agent and cloud have handlers of their own.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except EdgeFMError as error:
        typer.echo(f"edgefm: {error}", err=True)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
