"""The chart in the terminal: its size, its columns and its marks."""

from __future__ import annotations

import io

import numpy as np
import pytest
from edgefm.deploy.traces import Trace, summarize_trace, synthetic_trace, with_outage
from edgefm.deploy.traces.terminal import draw_trace, print_trace
from rich.console import Console

HALVES = Trace("made", np.array([*range(2, 1001, 2), *range(1001, 2001)]))  # 6 Mbit/s for a second, then 12


def test_columns_are_as_high_as_the_rate() -> None:
    *bars, zero, axis, unit = draw_trace(HALVES, 50, height=4).splitlines()
    room = 50 - 9
    assert [len(line) for line in bars] == [50] * 4
    assert bars[0].startswith("     12 |") and bars[2].startswith("      6 |") and zero == "      0 |"
    full = [bar[9:].count("█") for bar in bars]
    assert full[2] == full[3] == room and full[:2] == pytest.approx([room / 2] * 2, abs=1)
    assert axis == "         0 s" + "2 s".rjust(room - 3) and "Mbit/s in 49 ms" in unit


@pytest.mark.parametrize("width", [1, 40, 79, 200])
def test_it_is_as_wide_as_the_terminal(width: int) -> None:
    lines = draw_trace(synthetic_trace(7), width, height=8).splitlines()
    assert len(lines) == 11
    assert max(map(len, lines)) <= max(width, 40)
    assert max(map(len, lines)) > max(width, 40) - 3


def test_outages_are_marked_where_they_are() -> None:
    marks = draw_trace(with_outage(HALVES, 0.5, 0.5), 109, outage_ms=300).splitlines()[-3][9:]
    assert marks.strip("x ") == "" and marks.index("x") == 24 and marks.rindex("x") in (49, 50)


def test_plain_characters_where_the_terminal_has_no_others() -> None:
    chart = draw_trace(HALVES, 60, ascii_only=True)
    assert chart.isascii() and "#" in chart


def test_figures_and_chart_are_printed_and_a_name_cannot_speak_to_the_terminal() -> None:
    trace = Trace("evil\x1b[31m\n[bold]name", with_outage(HALVES, 0.2, 0.4).opportunities_ms)
    out = io.StringIO()
    print_trace(trace, summarize_trace(trace), Console(file=out, width=80))
    text = out.getvalue()
    assert "\x1b" not in text and "evil?[31m [bold]name" in text
    for shown in (
        "2 s, 1,299 packets",
        "7.79 Mbit/s",
        "in 500 ms",
        "p5 ",
        "p95 12",
        "1 of 200 ms or more, longest 404 ms, 20 %",
    ):
        assert shown in text, shown
    assert max(map(len, text.splitlines())) <= 80 and "█" in text
