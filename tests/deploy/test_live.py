"""The live table: tidy at 80 columns on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

from edgefm.deploy.live import LiveState, LiveTable, progress_line, render
from rich.console import Console

STATE = LiveState(
    environment="wild",
    frame=1_250,
    frames=3_000,
    answered={"edge": 700, "cloud": 290, "fallback": 10},
    edge_share_recent=0.7412,
    threshold=0.0312,
    bandwidth_mbps=41.23,
    student_version=2,
    pool_size=21,
    samples_labelled=285,
    p50_ms={"edge": 2.31, "cloud": 73.9, "fallback": None},
    last_event="student version 2 swapped in",
)
COLD = replace(
    STATE,
    answered={},
    threshold=None,
    bandwidth_mbps=None,
    p50_ms={},
    environment="a very long name of an environment " * 4,
    last_event="[bold]line one\nline two\x1b[31m " * 9,
)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    environ = {"TERM": "xterm-256color"} if terminal else {}
    return Console(file=out, force_terminal=terminal, width=80, _environ=environ, color_system=None), out


def drawn(state: LiveState, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(state, width))
    return out.getvalue().splitlines()


def test_panel_is_eighty_columns_wide() -> None:
    for state in (STATE, COLD, replace(STATE, frames=0, frame=0)):
        lines = drawn(state, 80)
        assert {len(line) for line in lines} == {80}
        assert len(lines) == 12


def test_panel_shows_the_figures() -> None:
    text = "\n".join(drawn(STATE, 80))
    for figure in ("wild", "frame 1,250 of 3,000", "700", "70.0 %", "2.3 ms", "74.1 %", "0.031", "41.2 Mbit/s"):
        assert figure in text
    assert "student version 2 swapped in" in text
    cold = "\n".join(drawn(COLD, 80))
    assert "cold start" in cold
    assert "[bold]line one line two" in cold
    assert "\x1b" not in cold


def test_terminal_gets_a_table_with_events_above() -> None:
    screen, out = console(terminal=True)
    with LiveTable(screen) as table:
        table.event("cloud is up [bold]")
        table.update(STATE)
    text = out.getvalue()
    assert "cloud is up [bold]" in text
    assert text.index("cloud is up") < text.index("frame 1,250 of 3,000")


def test_pipe_gets_a_line_every_few_seconds() -> None:
    screen, out = console(terminal=False)
    clock = Clock()
    with LiveTable(screen, line_every_s=5.0, clock=clock) as table:
        for frame in range(121):
            clock.now_s = 100 + frame / 10
            table.update(replace(STATE, frame=frame))
        table.event("label added: otter")
    lines = out.getvalue().splitlines()
    assert [line.split(" frame=")[1].split("/")[0] for line in lines if "frame=" in line] == ["50", "100", "120"]
    assert lines[-2] == "  12.0 s  label added: otter"
    assert "\x1b" not in out.getvalue()


def test_nothing_to_show_is_no_error() -> None:
    for terminal in (True, False):
        screen, _ = console(terminal)
        with LiveTable(screen):
            pass


def test_progress_line_is_key_value() -> None:
    pairs = dict(pair.split("=") for pair in progress_line(STATE, 61.4).split(" "))
    assert pairs["t"] == "61s"
    assert pairs["edge"] == "700"
    assert pairs["edge_share"] == "74.1%"
    assert pairs["bandwidth"] == "41.2Mbit/s"
    assert dict(pair.split("=") for pair in progress_line(COLD, 0).split(" "))["threshold"] == "none"
