from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from edgefm.edge.agreement import AgreementCurve
from edgefm.edge.thresholds import Costs, ThresholdTable
from hypothesis import given
from hypothesis import strategies as st

# Coarse values, so that margins are often equal.
windows = st.lists(st.integers(0, 15).map(lambda n: n / 16), min_size=1, max_size=40)
costs = st.builds(Costs, st.integers(1, 40).map(float), st.integers(0, 200).map(float), st.integers(0, 60).map(float))
BORDERS, DISAGREEMENT, VARIANCE = [0.1, 0.3, 0.6], [0.5, 0.25, 0.0625], [2**-6, 2**-8, 2**-10]  # exact in binary
CURVE = AgreementCurve(np.array(BORDERS), np.array(DISAGREEMENT), np.array(VARIANCE))


def brute_force(window: list[float], cost: Costs) -> dict[float, tuple[float, float, float, float, float]]:
    """(edge share, agreement, charged latency, paper's latency, error) of every threshold, sample by sample."""
    rows = {}
    for threshold in [*window, math.inf]:
        local = [margin for margin in window if margin >= threshold]
        r = len(local) / len(window)
        steps = Counter(max(sum(border <= margin for border in BORDERS) - 1, 0) for margin in local)
        wrong = sum(count * DISAGREEMENT[step] for step, count in steps.items())
        error = math.sqrt(sum(count**2 * VARIANCE[step] for step, count in steps.items())) / len(window)
        away = cost.transit_ms + cost.cloud_ms
        charged = sum(cost.edge_ms + (0 if margin >= threshold else away) for margin in window) / len(window)
        paper = sum(cost.edge_ms if margin >= threshold else away for margin in window) / len(window)
        rows[threshold] = (r, 1 - wrong / len(window), charged, paper, error)
    return rows


@given(windows, costs)
def test_every_row_equals_brute_force(window, cost):
    table = ThresholdTable.build(np.array(window), CURVE, cost)
    rows = brute_force(window, cost)
    assert table.thresholds.tolist() == [*sorted(window), math.inf]
    for i, threshold in enumerate(table.thresholds.tolist()):
        row = (table.edge_share[i], table.agreement[i], table.latency_ms[i], table.paper_latency_ms[i], table.error[i])
        assert row == pytest.approx(rows[threshold], abs=1e-9)


@given(windows, costs, st.floats(0.3, 1.0), st.sampled_from([0.0, 1.0, 2.0]))
def test_smallest_cloud_use_is_the_lowest_threshold_that_reaches_the_target(window, cost, target, caution):
    table = ThresholdTable.build(np.array(window), CURVE, cost)
    sure = {threshold: row[1] - caution * row[4] for threshold, row in brute_force(window, cost).items()}
    chosen = float(table.thresholds[table.smallest_cloud_use(target, caution)])
    assert sure[chosen] >= target - 1e-9
    assert all(sure[threshold] < target + 1e-9 for threshold in sure if threshold < chosen)


@given(windows, costs, st.floats(0.5, 320.0), st.sampled_from(["charged", "paper"]))
def test_largest_within_is_the_highest_threshold_that_keeps_the_bound(window, cost, bound, form):
    table = ThresholdTable.build(np.array(window), CURVE, cost)
    latency = {threshold: row[2 if form == "charged" else 3] for threshold, row in brute_force(window, cost).items()}
    index = table.largest_within(bound, form)
    if index is None:
        assert all(predicted > bound - 1e-9 for predicted in latency.values())
    else:
        chosen = float(table.thresholds[index])
        assert latency[chosen] <= bound + 1e-9
        assert all(predicted > bound - 1e-9 for threshold, predicted in latency.items() if threshold > chosen)


@given(windows, costs, st.floats(1.0, 300.0), st.floats(0.0, 50.0))
def test_a_looser_bound_never_lowers_the_threshold(window, cost, bound, more):
    table = ThresholdTable.build(np.array(window), CURVE, cost)
    tight, loose = table.largest_within(bound), table.largest_within(bound + more)
    assert tight is None or (loose is not None and loose >= tight)


@given(windows, st.floats(0.3, 1.0), st.floats(0.0, 0.3), st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_a_higher_target_or_more_caution_never_lowers_the_threshold(window, target, more, caution, extra):
    table = ThresholdTable.build(np.array(window), CURVE, Costs(5.0, 40.0, 10.0))
    lowest = table.smallest_cloud_use(target, caution)
    for higher in (min(target + more, 1.0), caution), (target, caution + extra):
        assert table.thresholds[table.smallest_cloud_use(*higher)] >= table.thresholds[lowest]


def test_the_latency_forms_as_printed():
    table = ThresholdTable.build(np.array([0.1, 0.2, 0.3, 0.4]), CURVE, Costs(edge_ms=8, transit_ms=30, cloud_ms=10))
    assert table.edge_share.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert table.latency_ms.tolist() == [8.0, 18.0, 28.0, 38.0, 48.0]
    assert table.paper_latency_ms.tolist() == [8.0, 16.0, 24.0, 32.0, 40.0]


def test_the_paper_s_form_can_prefer_the_cloud():
    """A student slower than the cloud: the printed latency falls with the threshold, the charged one never does."""
    table = ThresholdTable.build(np.array([0.1, 0.2]), CURVE, Costs(edge_ms=60, transit_ms=10, cloud_ms=10))
    assert table.largest_within(30.0, "paper") == 2 and table.largest_within(30.0, "charged") is None


def test_no_threshold_keeps_an_infeasible_bound():
    table = ThresholdTable.build(np.array([0.1, 0.2]), CURVE, Costs(5.0, 40.0, 10.0))
    assert table.largest_within(4.99) is None and table.largest_within(5.0) == 0


def test_without_a_curve_only_all_cloud_is_known_to_agree():
    table = ThresholdTable.build(np.array([0.3, 0.1, 0.2]), None, Costs(5.0, 40.0, 10.0))
    assert np.isnan(table.agreement[:-1]).all() and table.agreement[-1] == 1.0
    assert table.thresholds[table.smallest_cloud_use(0.5, 1.0)] == math.inf


@given(windows, costs, st.floats(1.0, 300.0), st.floats(0.0, 200.0))
def test_a_faster_link_never_lowers_the_threshold(window, cost, bound, less):
    faster = Costs(cost.edge_ms, max(cost.transit_ms - less, 0.0), cost.cloud_ms)
    on_slow, on_fast = (ThresholdTable.build(np.array(window), CURVE, c).largest_within(bound) for c in (cost, faster))
    assert on_slow is None or (on_fast is not None and on_fast >= on_slow)
