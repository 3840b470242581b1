"""`edgefm ask | rank`: the cloud's language model from a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import CloudAddress

_LARGEST = 2**32 - 1
_Deadline = Annotated[
    int, typer.Option(help="Give up after so long; 0 waits as long as it takes.", min=0, max=_LARGEST)
]


def ask(
    question: Annotated[str, typer.Argument(help="In words.")],
    environment: Annotated[
        str, typer.Option("--environment", "-e", help="Tell the model what the cloud knows of this environment.")
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(help="Of the answer, at most; without an environment.", min=1, max=_LARGEST)
    ] = 256,
    deadline_ms: _Deadline = 0,
    cloud: CloudAddress = None,
) -> None:
    """Asks the cloud's language model, about an environment or about anything; prints the answer as it comes."""
    from ...edge.language import LanguageClient

    with LanguageClient(cloud) as client:
        pieces = (
            client.ask(environment, question, deadline_ms)
            if environment
            else client.generate(question, max_tokens, deadline_ms=deadline_ms)
        )
        for piece in pieces:
            typer.echo(piece, nl=False)
    typer.echo()


def rank(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG, WebP or BMP.")],
    environment: Annotated[str, typer.Option("--environment", "-e", help="Where it was taken.")],
    deadline_ms: _Deadline = 0,
    cloud: CloudAddress = None,
) -> None:
    """What the FM takes an image for, ranked anew by what the place shows often, with the language model's reason; for samples
    that the FM is unsure of."""
    from ...edge.language import LanguageClient
    from ...models.errors import InputError

    try:
        data = image.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {image}: {error.strerror}") from error
    with LanguageClient(cloud) as client:
        found = client.rank(environment, data, deadline_ms)
    for one in found.labels:
        typer.echo(f"{one.probability:6.1%}  {one.label}  (FM alone {one.fm_probability:.1%})")
    typer.echo(found.reason)
