"""One format for the logs of all commands: a record is one line, as key=value or as JSON.

The code logs `log.info("event=swapped student=%d reason=%s", version, text)`. The template, which the code wrote, says
where keys and values are; only then are the values put in, each quoted if it needs to be. So no text from outside (a
device's name, a label, a message with a newline) can look like another key or another line. A record whose template is
no list of pairs, e.g. of another library, becomes one value: `message`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Literal

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")

_PAIRS = re.compile(r"[a-z_]+=\S+( [a-z_]+=\S+)*")
_CONVERSION = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?[a-zA-Z]")
_PLAIN = re.compile(r"[\w.:/@+,*-]+", re.ASCII)


def configure(verbose: bool, log_format: Format) -> None:
    """Logs to stderr: warnings, or with `verbose` all that happens."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(log_format))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


def plain(text: str) -> str:
    """For a terminal: on one line and without control characters. Labels, names and reasons come from outside."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


class StructuredFormatter(logging.Formatter):
    def __init__(self, log_format: Format) -> None:
        super().__init__()
        self._json = log_format == "json"

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields = {"time": at, "level": record.levelname.lower(), "logger": record.name, **dict(_fields(record))}
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(fields)
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, str]]:
    template, arguments = record.msg, record.args
    if not isinstance(template, str) or not isinstance(arguments, tuple) or not _PAIRS.fullmatch(template):
        yield "message", record.getMessage()
        return
    left = list(arguments)
    for pair in template.split(" "):
        key, _, value = pair.partition("=")
        taken = [left.pop(0) for _ in _CONVERSION.findall(value)]
        yield key, value % tuple(taken) if taken else value


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)
