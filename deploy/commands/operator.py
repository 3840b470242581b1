"""`edgefm labels | rollback | status`: what an operator asks of a running cloud."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import CloudAddress, Environment


def list_labels(environment: Environment = "", cloud: CloudAddress = None) -> None:
    """Prints the labels, one a line."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        for label in operator.list_labels(environment).labels:
            typer.echo(label)


def add_labels(
    labels: Annotated[list[str], typer.Argument(help="Any text, e.g. 'cup of coffee'.")],
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Adds labels; devices recognise them from their next pool on."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.add_labels(environment, labels)
    for warning in pool.warnings:
        if any(repr(label) in warning for label in labels):
            typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{len(pool.labels)} labels, pool {pool.version}")


def remove_labels(
    labels: Annotated[list[str], typer.Argument(help="Labels of the pool.")],
    environment: Environment = "",
    cloud: CloudAddress = None,
) -> None:
    """Removes labels."""
    from ...edge.operator import Operator

    with Operator(cloud) as operator:
        pool = operator.remove_labels(environment, labels)
    typer.echo(f"{len(pool.labels)} labels, pool {pool.version}")


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
