"""The demo's report: self-contained, escaped, true to its figures, and whole when parts of a run are missing."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from edgefm.deploy.plots import COLOURS
from edgefm.deploy.report import save_plot_png, summarize, write_report
from edgefm.deploy.timeline import MAX_BINS, ROUTES, bin_timeline
from PIL import Image

HOSTILE = '<script>alert("otter & $x$")</script>'


def make_timeline(n: int, environments: tuple[str, ...] = ("wild", "town"), seed: int = 0) -> list[dict[str, Any]]:
    """n answers, evenly over the environments; the student's version goes 0, 1, 2 in each."""
    rng = np.random.default_rng(seed)
    timeline = []
    for i in range(n):
        environment, within = divmod(i * len(environments) / n, 1)
        cold = within < 0.1
        timeline.append(
            {
                "time_s": 3 + 0.01 * i,
                "environment": environments[int(environment)],
                "route": "cloud" if cold else str(rng.choice(ROUTES, p=(0.7, 0.28, 0.02))),
                "total_ms": float(rng.lognormal(2, 1)),
                "margin": float(rng.beta(2, 30)),
                "threshold": None if cold else 0.04,
                "student_version": int(3 * within),
                "bandwidth_mbps": None if i < 5 else float(rng.uniform(1, 30)),
            }
        )
    return timeline


def make_result(environments: tuple[str, ...] = ("wild", "town")) -> dict[str, Any]:
    return {
        "environments": [
            {
                "name": name,
                "labels": ["otter", "lynx", HOSTILE],
                "frames": 12_345 + i,
                "versions": 3,
                "fm_accuracy": 0.8712 - 0.02 * i,
                "system_accuracy": 0.8623 - 0.02 * i,
                "student_accuracy": 0.8234 - 0.02 * i,
                "version0": {"student_accuracy": 0.8045 - 0.02 * i, "edge_share": 0.661},
                "edge_share": [[0, 0.661], [400, 0.702], [1600, 0.7435]],
                "drift": [{"kind": "margin", "time_s": 71.3, "agreement": 0.8, "baseline": 0.9}] if i else [],
            }
            for i, name in enumerate(environments)
        ],
        "latency_ms": {
            "edge": {"p50": 2.314, "p95": 4.128, "mean": 2.541, "predicted_mean": 2.62},
            "cloud": {"p50": 73.52, "p95": 1131.4, "mean": 88.8, "predicted_mean": 91.2},
            "fallback": {"p50": 252.2, "p95": 258.6, "mean": 253.0, "predicted_mean": None},
        },
        "answers": {"total": 24_690, "edge": 18_000, "cloud": 6_600, "fallback": 90, "lost": 7},
        "bytes_up": 123_456_789,
        "bytes_down": 2_345_678,
        "added_label": {
            "name": "otter",
            "environment": "wild",
            "recognised_before": 0.0,
            "fm_by_text": 0.75,
            "fm_described": 0.875,
            "descriptions": ["An otter is a sleek brown animal."],
            "recognised_after": 0.8125,
        },
        "objective": {"name": "accuracy_target", "target": 0.96},
        "settings": '# fewer samples\ncloud.drift.window = 40\n\n# cheaper\ncloud.student = "lite0-64"\n',
        "link": {"uplink": "trace lte, 1 to 38 Mbit/s", "downlink": "50 Mbit/s", "propagation_ms": 20},
        "environment": {
            "machine": "2 cores",
            "versions": {"numpy": "2.0"},
            "seed": 7,
            "command": "edgefm demo",
            "date": "2025-01-02",
        },
    }


class Page(HTMLParser):
    """Collects tags, attributes and table rows; fails on a tag that is closed out of order."""

    void = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")


def written(result: dict[str, Any], timeline: list[dict[str, Any]], tmp_path) -> str:
    path = tmp_path / "report.html"
    write_report(result, timeline, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return written(make_result(), make_timeline(2_000), tmp_path_factory.mktemp("report"))


def test_page_needs_nothing_from_outside(text: str) -> None:
    page = Page(text)
    assert "http" not in text
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", text)
    targets = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(target.startswith("#") for target in targets)
    assert text.count("<svg") == 5


def test_ids_are_unique_and_references_resolve(text: str) -> None:
    page = Page(text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
    assert {value for _, name, value in page.attributes if name == "aria-labelledby"} <= set(ids)


def test_everything_from_data_is_escaped(tmp_path) -> None:
    result, timeline = make_result((HOSTILE, "town")), make_timeline(300, (HOSTILE, "town"))
    result["added_label"] |= {"name": HOSTILE, "descriptions": [HOSTILE]}
    for key in ("machine", "command", "date"):
        result["environment"][key] = HOSTILE
    result["environment"]["versions"] = {HOSTILE: HOSTILE}
    result["link"]["uplink"] = result["objective"]["name"] = HOSTILE
    text = written(result, timeline, tmp_path)
    assert "<script" not in text
    assert HOSTILE in [cell for row in Page(text).rows for cell in row]


def test_tables_hold_the_figures_given(text: str) -> None:
    rows = Page(text).rows
    assert ["wild", "87.1 %", "86.2 %", "82.3 %", "80.5 %"] in rows
    assert ["town", "12,346", "1,600", "3", "66.1 %", "74.4 %", "margin at 71 s"] in rows
    assert ["edge", "18,000", "72.9 %", "2.31 ms", "4.13 ms", "2.54 ms", "2.62 ms"] in rows
    assert ["cloud", "6,600", "26.7 %", "73.5 ms", "1,131.4 ms", "88.8 ms", "91.2 ms"] in rows
    assert ["fallback", "90", "0.4 %", "252.2 ms", "258.6 ms", "253.0 ms", "–"] in rows
    assert ["lost", "7", "–", "–", "–", "–", "–"] in rows
    assert ["otter", "wild", "0.0 %", "75.0 %", "87.5 %", "81.2 %"] in rows
    assert ["bytes up", "123,456,789 B"] in rows
    assert ["seed", "7"] in rows


def test_summary_says_what_the_figures_say() -> None:
    result = make_result()
    text = " ".join(summarize(result)).replace("\u00a0", " ")
    assert "24,690 images were answered: 72.9 % on the edge" in text
    assert "Lost: 7" in text
    assert "the edge share went from 66.1 % to 74.4 %" in text
    assert "stays at 96.0 %" in text
    assert "described it: “An otter is a sleek brown animal.” The FM alone answers right on 75.0 %" in text
    worse = copy.deepcopy(result)
    worse["environments"][0]["edge_share"][-1][1] = 0.5
    assert "from 66.1 % to 50.0 %" in " ".join(summarize(worse)).replace("\u00a0", " ")


@pytest.mark.parametrize("missing", ["timeline", "cloud", "label and estimates", "everything"])
def test_page_stands_without(missing: str, tmp_path) -> None:
    result, timeline = make_result(("wild",)), make_timeline(200, ("wild",))
    if missing == "timeline":
        timeline = []
    elif missing == "cloud":
        timeline = [record for record in timeline if record["route"] == "edge"]
        result["latency_ms"] |= {"cloud": None, "fallback": None}
        result["answers"] |= {"cloud": 0, "fallback": 0}
    elif missing == "label and estimates":
        del result["added_label"]
        result["environments"][0]["edge_share"] = [[0, 0.661]]
        for record in timeline:
            record |= {"threshold": None, "bandwidth_mbps": None}
    else:
        timeline = []
        result["environments"] = []
        result["latency_ms"] = dict.fromkeys(ROUTES)
        result["answers"] = dict.fromkeys(("total", *ROUTES, "lost"), 0)
        save_plot_png(result, timeline, tmp_path / "plot.png")
    page = Page(written(result, timeline, tmp_path))
    assert all("nan" not in cell and "None" not in cell for row in page.rows for cell in row)


def test_long_run_stays_small(tmp_path) -> None:
    names = tuple(f"environment {i}" for i in range(6))
    result, timeline = make_result(names), make_timeline(40_000, names)
    assert len(written(result, timeline, tmp_path).encode()) < 1_000_000
    save_plot_png(result, timeline, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size <= 150_000
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 2 * image.height


def test_bins_keep_shares_bands_and_swaps() -> None:
    timeline = make_timeline(6_000)
    bins = bin_timeline(timeline)
    assert bins is not None
    assert len(bins.edges_s) == MAX_BINS + 1
    assert bins.bands == [
        (pytest.approx(3), pytest.approx(33, abs=0.6), "wild"),
        (pytest.approx(33, abs=0.6), pytest.approx(62.99), "town"),
    ]
    assert [version for _, version in bins.new_students] == ["1", "2", "1", "2"]
    np.testing.assert_allclose(sum(bins.share.values()), 1)
    edge = sum(record["route"] == "edge" for record in timeline) / len(timeline)
    assert np.mean(bins.share["edge"]) == pytest.approx(edge, abs=1e-3)
    assert np.isnan(bins.threshold[0]) and bins.threshold[-1] == 0.04


def test_late_answer_of_an_old_student_is_no_swap() -> None:
    timeline = make_timeline(60, ("wild",))
    timeline[30]["student_version"] = 0
    bins = bin_timeline(timeline)
    assert bins is not None
    assert [version for _, version in bins.new_students] == ["1", "2"]


def test_idle_gap_infinite_threshold_and_another_script(tmp_path) -> None:
    timeline = make_timeline(600, ("森",))
    for record in timeline[300:]:
        record["time_s"] += 60
        record["threshold"] = float("inf")
    bins = bin_timeline(timeline)
    assert bins is not None
    assert np.isnan(bins.share["edge"]).any()
    assert [name for *_, name in bins.bands] == ["森"]
    assert written(make_result(("森",)), timeline, tmp_path).count("森</text>") >= 3


def test_one_colour_per_thing() -> None:
    assert set(COLOURS) == {"edge", "cloud", "fallback", "FM", "system", "student"}
    assert len(set(COLOURS.values())) == len(COLOURS)
