"""Every experiment from made material to a page: the data is JSON, and the report is made of the data alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgefm.deploy.evaluate.experiment import Material, estimate
from edgefm.deploy.evaluate.presets import PRESETS, chosen_presets
from edgefm.deploy.evaluate.report import load_result, write_reports
from edgefm.deploy.evaluate.run import FORMAT
from edgefm.models.device_profile import DeviceProfile, StudentCost
from edgefm.models.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def whole(material: Material) -> Material:
    """With what other processes would have measured."""
    rng = np.random.default_rng(0)
    some = estimate(rng.random((3, 40)) < 0.7)
    uploads = [
        {
            "look": look,
            "policy": policy,
            "budget": budget,
            "edge_share": some,
            "system_minus_fm": some,
            "student_accuracy": some,
            "edge_share_minus_random": some,
        }
        for look in material.looks
        for budget in (100, 200)
        for policy in ("uncertain first", "random", "all")
    ]
    costs = [
        StudentCost(
            student=name, threads=1, preprocess_ms=0.2, session_p50_ms=ms, session_p95_ms=1.2 * ms, peak_rss_mb=90
        )
        for name, ms in (("lite0-64", 1.0), ("lite0-128", 3.0), ("lite0-128-int8", 2.0))
    ]
    return replace(
        material,
        uploads=uploads,
        added_labels=[{"labels": "every fifth", "fm": some, "before": some, "after": some}],
        profile=DeviceProfile(source="a test", device="a device", students=costs),
    )


@pytest.fixture(scope="module")
def result(whole: Material) -> dict[str, Any]:
    measured = {
        name: {"objective": preset.objective(whole), "data": preset.measure(whole), "seconds": 1.0}
        for name, preset in PRESETS.items()
    }
    return {
        "format": FORMAT,
        "quick": True,
        "student": "lite0-64",
        "accuracy_target": 0.99,
        "seeds": 3,
        "traffic": str(whole.traffic),
        "device_ms": {"p50": 4.0, "p95": 5.0},
        "cloud": whole.cloud.model_dump(mode="json"),
        "experiments": measured,
        "seconds": 9.0,
        "environment": {
            "command": "edgefm evaluate",
            "date": "today",
            "machine": "m",
            "versions": {"numpy": "2"},
            "seed": 0,
        },
    }


def test_a_report_is_one_page_that_needs_nothing_else(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result, allow_nan=False))
    page, text = write_reports({"run": load_result(path)}, tmp_path)
    html, markdown = page.read_text(), text.read_text()
    for name, preset in PRESETS.items():
        assert preset.title in html and f"`{name}`" in markdown
    assert html.count("<svg") == html.count("<figcaption") >= len(PRESETS)
    assert not re.search(r"""(src|href)=["'](?!#)""", html), "nothing is fetched"
    ids = re.findall(r'\bid=["\']([^"\']+)', html)
    assert len(ids) == len(set(ids)), "no id twice"
    assert ">nan" not in html
    assert len(html) < 3_000_000


def test_two_runs_stand_side_by_side(result: dict[str, Any], tmp_path: Path) -> None:
    other = {**result, "experiments": {name: result["experiments"][name] for name in ("margins", "crossover")}}
    page, _ = write_reports({"before": result, "after": other}, tmp_path)
    html = page.read_text()
    assert html.count("<h3>before</h3>") == len(PRESETS) and html.count("<h3>after</h3>") == 2
    ids = re.findall(r'\bid=["\']([^"\']+)', html)
    assert len(ids) == len(set(ids))


def test_what_is_no_result_says_so(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    for content, what in (
        ("{", "not JSON"),
        ("[]", "no result"),
        (f'{{"format": {FORMAT}, "experiments": {{}}}}', "no result"),
        ('{"format": 99, "experiments": {}}', "format"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=what):
            load_result(path)
    with pytest.raises(InputError, match="cannot read"):
        load_result(tmp_path / "missing.json")
    broken = {**result, "experiments": {"margins": {"objective": "", "seconds": 1, "data": {"rows": [{}]}}}}
    with pytest.raises(InputError, match="measure it again"):
        write_reports({"run": broken}, tmp_path)


def test_the_figures_are_those_of_the_material(result: dict[str, Any], whole: Material) -> None:
    rows = result["experiments"]["environment-change"]["data"]["rows"]
    full = next(r for r in rows if (r["look"], r["method"], r["samples"]) == ("place", "head and tail", 400))
    shares = [whole.version("place", seed, "head and tail").on_edge.mean() for seed in range(3)]
    assert full["edge_share"]["mean"] == pytest.approx(float(np.mean(shares)), abs=1e-4)
    low, high = full["edge_share"]["interval"]
    assert low < full["edge_share"]["mean"] < high
    bars = {row["system"]: row for row in result["experiments"]["latency-accuracy"]["data"]["rows"]}
    assert bars["cloud-only"]["latency_over_cloud_only"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert bars["edge-only"]["shares"]["edge"] == 1.0
    assert bars["cloud-only"]["accuracy_minus_cloud_only"]["mean"] == 0.0
    winners = {row["winner"] for row in result["experiments"]["crossover"]["data"]["rows"]}
    assert {"persephonee", "cloud-only"} & winners
    open_set = {(r["model"], r["score"]): r for r in result["experiments"]["open-set"]["data"]["rows"]}
    assert open_set["FM", "top similarity"]["auroc"]["mean"] > 0.6
    margins = result["experiments"]["margins"]["data"]["rows"]
    assert all(0.7 < row["auroc"]["mean"] <= 1.0 for row in margins), (
        "right where the margin is large, but for the FM's errors"
    )


def test_presets_are_chosen_by_name() -> None:
    assert [e.name for e in chosen_presets("margins, bandwidth")] == ["margins", "bandwidth"]
    assert [e.name for e in chosen_presets("all")] == list(PRESETS)
    with pytest.raises(ConfigError, match="there are environment-change"):
        chosen_presets("nonsense")
