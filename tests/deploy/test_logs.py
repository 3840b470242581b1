"""The log format: one line a record, whatever comes in."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import sys

import pytest
from edgefm.deploy.logs import Format, StructuredFormatter

EVIL = [
    "device\ntime=2026-01-01T00:00:00.000+00:00 level=error logger=edgefm.cloud event=forged",
    'device" event=forged reason="',
    "device event=forged",
    "event=forged",
    "\r\x1b[2K\x85\u2028event=forged",
    '\\" event=forged',
    "%s %d",
    "",
]


def formatted(log_format: Format, message: object, *arguments: object, error: BaseException | None = None) -> str:
    exc_info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("edgefm.test", logging.WARNING, __file__, 1, message, arguments, exc_info)
    return StructuredFormatter(log_format).format(record)


def parsed(line: str) -> list[tuple[str, str]]:
    """As a reader of key=value would: quotes hold values together."""
    return [(key, value) for key, _, value in (word.partition("=") for word in shlex.split(line))]


@pytest.mark.parametrize("text", EVIL)
def test_text_from_outside_forges_neither_a_line_nor_a_key(text: str):
    template = "event=device device=%s environment=%s count=%d"
    line = formatted("text", template, text, "yard", 3)
    assert line.isascii() and line.isprintable()  # so it is one line on every terminal and for every reader
    keys = [key for key, _ in parsed(line)]
    assert keys == ["time", "level", "logger", "event", "device", "environment", "count"]
    fields = dict(parsed(line))
    assert (fields["event"], fields["environment"], fields["count"]) == ("device", "yard", "3")

    line = formatted("json", template, text, "yard", 3)
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["device"] == text and json.loads(line)["event"] == "device"


def test_values_are_quoted_only_where_they_need_it():
    line = formatted("text", "event=serving address=%s:%d share=%.2f text=%s", "127.0.0.1", 50061, 0.5, "a b")
    assert line.endswith('level=warning logger=edgefm.test event=serving address=127.0.0.1:50061 share=0.50 text="a b"')


def test_what_is_no_list_of_pairs_becomes_one_value():
    for message, arguments, text in (
        ("Retrying in %d seconds: %s", (3, "x\nevent=forged"), "Retrying in 3 seconds: x\nevent=forged"),
        ("no arguments, 100 % sure", (), "no arguments, 100 % sure"),
        (ValueError("a\nb"), (), "a\nb"),
        ("event=x %s", ("event=forged",), "event=x event=forged"),
    ):
        line = formatted("text", message, *arguments)
        assert [key for key, _ in parsed(line)] == ["time", "level", "logger", "message"]
        assert json.loads(formatted("json", message, *arguments))["message"] == text


def test_a_traceback_stays_on_its_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        line = formatted("text", "event=failed", error=error)
        trace = json.loads(formatted("json", "event=failed", error=error))["trace"]
    assert "\n" not in line and 'trace="Traceback' in line
    assert trace.splitlines()[-2:] == ["ValueError: two", "lines"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_commands_log_in_the_format_asked_for(log_format: str):
    script = """
import logging, sys
from edgefm.deploy.cli import app
app(["--log-format", sys.argv[1], "--version"], standalone_mode=False)
logging.getLogger("edgefm.x").warning("event=odd device=%s", "a\\nb")
"""
    command = [sys.executable, "-c", script, log_format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    line = done.stderr.strip()
    assert "\n" not in line
    fields = json.loads(line) if log_format == "json" else dict(parsed(line))
    assert fields["event"] == "odd" and fields["logger"] == "edgefm.x"
