"""`edgefm data tiny-imagenet`: the images of the experiments, from their public download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tiny_imagenet(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="The folder tiny-imagenet-200, or its zip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; the archives take 80 MB.")] = Path(),
) -> None:
    """Makes tiny-imagenet-wild.tar, -town.tar and -world.tar: two environments for demo and bench, and the rest.

    Each class has the first images of the download by their numbers.
    """
    from rich.console import Console

    from ..tiny_imagenet import make_archives

    with Console(stderr=True).status("Reading ...") as status:
        made = make_archives(source, output, progress=lambda name: status.update(f"Making {name} ..."))
    for archive in made:
        told = (
            "those of the published figures" if archive.as_published else "other images than in the published figures"
        )
        typer.echo(f"{archive.path}: {archive.classes} classes, {archive.images:,} images, {told}")
