"""Labels and their descriptions as text that an operator edits: a label a line, and indented below it a description a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..models.errors import InputError


def lines(descriptions: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for label, texts in descriptions.items():
        yield label
        yield from (f"    {text}" for text in texts)


def read(path: Path) -> dict[str, list[str]]:
    """What `lines` wrote; blank lines say nothing.

    Raises:
        InputError: it cannot be read, has no label, one twice, or a description before the first.
    """
    try:
        written = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the descriptions in {path}: {error}") from error
    found: dict[str, list[str]] = {}
    texts: list[str] | None = None
    for number, line in enumerate(written, 1):
        if not line.strip():
            continue
        if not line[0].isspace():
            label = line.strip()
            if label in found:
                raise InputError(f"{path}, line {number}: {label!r} is there twice; put its descriptions together")
            texts = found[label] = []
        elif texts is None:
            raise InputError(f"{path}, line {number}: a description before the first label; labels are not indented")
        else:
            texts.append(line.strip())
    if not found:
        raise InputError(f"{path} has no label; 'edgefm labels show' prints what such a file looks like")
    return found
