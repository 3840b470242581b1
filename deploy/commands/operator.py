"""`edgefm labels | rollback | status`: what an operator asks of a running cloud."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...models.errors import ConfigError
from .options import CloudAddress, Environment

if TYPE_CHECKING:
    from ...edge.operator import PoolView


def list_labels(environment: Environment = "", cloud: CloudAddress = None) -> None:
    """Prints the labels, one a line."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        for label in operator.list_labels(environment).labels:
            typer.echo(label)


def add_labels(
    labels: Annotated[list[str], typer.Argument(help="Any text, e.g. 'cup of coffee'.")],
    environment: Environment = "",
    describe: Annotated[
        bool | None, typer.Option(help="The cloud's language model writes what they look like. [if it has one]")
    ] = None,
    cloud: CloudAddress = None,
) -> None:
    """Adds labels; devices recognise them from their next pool on."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.add_labels(environment, labels, describe)
    for warning in pool.warnings:
        if any(repr(label) in warning for label in labels):
            typer.echo(f"warning: {warning}", err=True)
    typer.echo(_pool_line(pool))


def remove_labels(
    labels: Annotated[list[str], typer.Argument(help="Labels of the pool.")],
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Removes labels."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.remove_labels(environment, labels)
    typer.echo(_pool_line(pool))


def show_labels(
    label: Annotated[str, typer.Argument(help="A label; by default all.")] = "",
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Prints labels with what describes them, as 'edgefm labels describe --file' reads it."""
    from ...edge.operator import Operator
    from ..label_file import lines

    with Operator(cloud) as operator:
        found = operator.descriptions(environment, label)
    for line in lines({each.label: each.texts for each in found}):
        typer.echo(line)
    for each in found:
        if each.pending:
            typer.echo(f"{each.label}: the language model is still to describe it", err=True)
        if each.failure:
            typer.echo(f"{each.label}: not described: {each.failure}", err=True)


def describe_labels(
    labels: Annotated[list[str] | None, typer.Argument(help="Labels of the pool; with --text, one.")] = None,
    environment: Environment = "",
    text: Annotated[list[str] | None, typer.Option(help="A description by hand; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Labels and descriptions, as 'edgefm labels show' prints them.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Leaves the labels without descriptions.")] = False,
    cloud: CloudAddress = None,
) -> None:
    """Says what labels look like, in place of what described them: by hand, or else by the cloud's language model."""
    from ...edge.operator import Operator
    from ..label_file import read

    ways = sum((bool(text), file is not None, clear))
    if ways > 1 or bool(labels) == (file is not None) or (text and len(labels or ()) != 1):
        raise ConfigError(
            "give labels to be described by the language model, one label with --text, labels with --clear, or --file alone"
        )
    chosen = labels or []
    by_hand = read(file) if file else dict.fromkeys(chosen, text or []) if ways else None
    with Operator(cloud) as operator:
        if by_hand is None:
            pool = operator.describe_labels(environment, chosen)
        else:
            pool = operator.set_descriptions(environment, by_hand)
    typer.echo(_pool_line(pool))


def _pool_line(pool: PoolView) -> str:
    described = f", {pool.described} described" if pool.described else ""
    pending = f", {pool.pending} to be described" if pool.pending else ""
    return f"{len(pool.labels)} labels{described}{pending}, pool {pool.version}"


def rollback(
    environment: Annotated[str, typer.Argument(help="The environment.")],
    to: Annotated[
        int | None, typer.Option("--to", help="A version; by default the parent of the running one.", min=0)
    ] = None,
    cloud: CloudAddress = None,
) -> None:
    """Makes an earlier student version current again; devices swap it in."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        typer.echo(f"{environment} runs student version {operator.rollback(environment, to)}")


def status(
    environment: Annotated[str, typer.Argument(help="The environment; by default all.")] = "",
    cloud: CloudAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as JSON.")] = False,
) -> None:
    """Shows what the cloud runs: versions, samples, agreement, drift alarms, refusals of devices, queue."""
    from ...edge.operator import Operator
    from ..status import lines

    with Operator(cloud) as operator:
        found = operator.status(environment)
    for line in lines(found, as_json):
        typer.echo(line)
