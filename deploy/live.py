"""The running demo in the terminal: one table that stays in place; where there is no terminal, a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .logs import plain
from .timeline import ROUTES

WIDTH = 80
STYLES = {"edge": "bold blue", "cloud": "bold yellow", "fallback": "bold red"}


@dataclass(frozen=True)
class LiveState:
    """What the demo knows after an answer; None where there is no figure yet."""

    environment: str
    frame: int
    frames: int
    answered: Mapping[str, int]  # per route
    edge_share_recent: float  # 0..1, over the demo's recent window
    threshold: float | None  # None during cold start
    bandwidth_mbps: float | None
    student_version: int
    pool_size: int  # labels in use
    samples_labelled: int  # by the FM
    p50_ms: Mapping[str, float | None]  # per route
    last_event: str = ""


class LiveTable:
    """Shows the latest `LiveState` while entered. `update` only stores it, so it may be called for every answer."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        line_every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`line_every_s` holds where `console` is no terminal; `clock` gives seconds."""
        self._console = console or Console()
        self._line_every_s = line_every_s
        self._clock = clock
        self._state: LiveState | None = None
        self._shown: LiveState | None = None
        self._started_s = self._line_s = clock()
        fixed = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4) if fixed else None

    def __enter__(self) -> LiveTable:
        self._started_s = self._line_s = self._clock()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        elif self._state is not self._shown:
            self._print_line()

    def update(self, state: LiveState) -> None:
        self._state = state
        if self._live is None and self._clock() - self._line_s >= self._line_every_s:
            self._print_line()

    def event(self, text: str) -> None:
        """Print a line that stays: above the table, or between the progress lines."""
        elapsed_s = self._clock() - self._started_s
        self._console.print(Text(f"{elapsed_s:6.1f} s  {plain(text)}"), soft_wrap=self._live is None)

    def _print_line(self) -> None:
        if self._state is None:
            return
        self._shown, self._line_s = self._state, self._clock()
        line = progress_line(self._state, self._line_s - self._started_s)
        self._console.print(Text(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._state is None:
            return Text("Waiting for the first answer ...")
        return render(self._state, min(WIDTH, self._console.width))


def progress_line(state: LiveState, elapsed_s: float) -> str:
    """The state as one line of key=value."""
    pairs = {
        "t": f"{elapsed_s:.0f}s",
        "environment": plain(state.environment).replace(" ", "_"),
        "frame": f"{state.frame}/{state.frames}",
        **{route: state.answered.get(route, 0) for route in ROUTES},
        "edge_share": f"{100 * state.edge_share_recent:.1f}%",
        "threshold": _figure(state.threshold, ".3f", none="none"),
        "bandwidth": _figure(state.bandwidth_mbps, ".1f", "Mbit/s", none="none"),
        "student": f"v{state.student_version}",
        "labels": state.pool_size,
        "labelled": state.samples_labelled,
    }
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def render(state: LiveState, width: int = WIDTH) -> Panel:
    """The state as a panel `width` columns wide."""
    total = sum(state.answered.values())
    routes = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    routes.add_column("route")
    for head in ("answers", "share", "p50"):
        routes.add_column(head, justify="right")
    for route in ROUTES:
        count = state.answered.get(route, 0)
        routes.add_row(
            Text(route, STYLES[route]),
            f"{count:,}",
            f"{100 * count / total:.1f} %" if total else "–",
            _figure(state.p50_ms.get(route), ",.1f", " ms"),
        )
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in (
        ("edge share, recent", f"{100 * state.edge_share_recent:.1f} %"),
        ("threshold", _figure(state.threshold, ".3f", none="cold start")),
        ("bandwidth", _figure(state.bandwidth_mbps, ",.1f", " Mbit/s")),
        ("student", f"version {state.student_version}"),
        ("labelled by the FM", f"{state.samples_labelled:,}"),
        ("labels in use", f"{state.pool_size:,}"),
    ):
        facts.add_row(Text(name, "dim"), Text(value, no_wrap=True))
    halves = Table.grid(padding=(0, 4, 0, 0))
    halves.add_row(routes, facts)
    frames = Table.grid(padding=(0, 2, 0, 0), expand=True)
    frames.add_column(ratio=1)
    frames.add_column(justify="right", no_wrap=True)
    frames.add_row(
        ProgressBar(total=max(state.frames, 1), completed=state.frame),
        f"frame {state.frame:,} of {state.frames:,}",
    )
    last = Text(plain(state.last_event), "italic", no_wrap=True, overflow="ellipsis")
    title = Text(f"EdgeFM · {plain(state.environment)}", no_wrap=True, overflow="ellipsis")
    return Panel(Group(frames, "", halves, "", last), title=title, title_align="left", width=width)


def _figure(value: float | None, form: str, unit: str = "", none: str = "–") -> str:
    return none if value is None else f"{value:{form}}{unit}"
