"""What several commands share: options, and the error for a package that is not installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ...models.errors import MissingExtraError

INTERRUPTED = 130

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


def check_sources(sources: Iterable[Path]) -> None:
    """Before slow imports: raises `InputError` for a folder or archive that is missing or empty."""
    from ...edge.sources import open_source

    for source in sources:
        open_source(source).close()


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports that the base install cannot do: raises `MissingExtraError` naming the extra that brings them."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"this needs more packages ({error.name}): pip install 'edgefm[{name}]'") from error
