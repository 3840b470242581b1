from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from edgefm.edge.config import SwitcherConfig
from edgefm.edge.switcher import Decision, LinkState, Switcher
from edgefm.models.errors import ConfigError
from edgefm.models.versions import Calibration

LINK = LinkState(transit_ms=40.0, cloud_ms=10.0, predicted_ms=50.0)
DEADLINE_MS = 1000.0


class Stream:
    """Margins in [0, 1) and a student that agrees with the FM more often the larger the margin."""

    def __init__(self, switcher: Switcher, seed: int = 0) -> None:
        self.switcher = switcher
        self.rng = np.random.default_rng(seed)

    def run(self, count: int, link: LinkState = LINK, learn: bool = True) -> list[tuple[float, Decision]]:
        seen = []
        for _ in range(count):
            margin = float(self.rng.random())
            decision = self.switcher.decide(margin, 5.0, link, DEADLINE_MS)
            if decision.to_cloud and learn:
                self.switcher.learn(margin, bool(self.rng.random() < 0.5 + 0.5 * margin), decision.propensity)
            seen.append((margin, decision))
        return seen


def calibration(count: int) -> Calibration:
    margins = np.random.default_rng(9).random(count)
    return Calibration(margins=margins.tolist(), agreements=(margins > 0.3).tolist(), propensities=[1.0] * count)


def test_a_cold_start_asks_the_cloud_until_evidence_fills_and_then_the_margin_decides():
    config = SwitcherConfig(accuracy_target=0.9, min_evidence=150, rebuild_every=10)
    seen = Stream(Switcher(config)).run(600)
    cold = [decision.reason == "cold-start" for _, decision in seen]
    first_warm = cold.index(False)
    assert 150 <= first_warm <= 160 and not any(cold[first_warm:])
    for _, decision in seen[:first_warm]:
        assert decision.to_cloud and decision.threshold is None and decision.propensity == 1.0
        assert decision.predicted_ms == pytest.approx(55.0)
    reasons = set()
    for margin, decision in seen[first_warm:]:
        assert decision.threshold is not None
        reasons.add((decision.reason, decision.to_cloud))
        if margin < decision.threshold:
            assert (decision.reason, decision.to_cloud, decision.propensity) == ("margin", True, 1.0)
        else:
            assert decision.reason == ("audit" if decision.to_cloud else "margin")
            assert decision.propensity == config.audit_share
        assert decision.predicted_ms == pytest.approx(55.0 if decision.to_cloud else 5.0)
    assert reasons == {("margin", True), ("margin", False), ("audit", True)}


def test_without_answers_the_cold_start_goes_on():
    """Frames alone are no evidence."""
    seen = Stream(Switcher(SwitcherConfig())).run(400, learn=False)
    assert {decision.reason for _, decision in seen} == {"cold-start"}


def test_a_carried_calibration_is_a_prior_that_shortens_the_cold_start():
    lengths = {}
    for count in (0, 60, 500):
        switcher = Switcher(SwitcherConfig(min_evidence=150, rebuild_every=1))
        switcher.model_changed(calibration(count))
        lengths[count] = sum(decision.reason == "cold-start" for _, decision in Stream(switcher).run(300))
    assert lengths == {0: 150, 60: 90, 500: 75}  # half of the evidence must be the version's own


def test_a_window_of_margins_must_fill_before_a_threshold_is_chosen():
    switcher = Switcher(SwitcherConfig(min_evidence=10, rebuild_every=1))
    switcher.model_changed(calibration(500))
    cold = [decision.reason == "cold-start" for _, decision in Stream(switcher).run(80)]
    assert cold.index(False) == 49


def test_a_changed_model_forgets_margins_and_evidence():
    stream = Stream(Switcher(SwitcherConfig(min_evidence=60, rebuild_every=5)))
    assert stream.run(200)[-1][1].threshold is not None
    stream.switcher.model_changed(Calibration())
    assert stream.switcher.threshold is None and stream.switcher.table is None
    after = stream.run(55)
    assert {decision.reason for _, decision in after} == {"cold-start"}
    assert stream.switcher.table is not None and len(stream.switcher.table.thresholds) <= 56


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2])
def test_the_share_of_audits_is_the_one_asked_for(share):
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=5.5, audit_share=share, seed=4)
    seen = Stream(Switcher(config)).run(5000)[100:]
    local = [decision for margin, decision in seen if decision.threshold is not None and margin >= decision.threshold]
    audits = [decision for decision in local if decision.reason == "audit"]
    assert len(local) > 4000
    deviation = 4 * math.sqrt(share * (1 - share) * len(local))
    assert abs(len(audits) - share * len(local)) <= deviation
    assert all(decision.to_cloud and decision.propensity == share for decision in audits)


def test_audits_do_not_follow_the_margin():
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=5.1, audit_share=0.2, seed=1)
    seen = Stream(Switcher(config)).run(4000)[200:]
    audited = [margin for margin, decision in seen if decision.reason == "audit"]
    others = [margin for margin, decision in seen if decision.reason == "margin" and not decision.to_cloud]
    assert abs(np.mean(audited) - np.mean(others)) < 4 * np.std(others) / math.sqrt(len(audited))


def test_the_latency_bound_is_kept_by_the_predicted_mean():
    """Bound 25 ms with 5 ms on the edge and 50 ms away: at most 40 % may leave."""
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=25.0, audit_share=0.0)
    seen = Stream(Switcher(config)).run(3000)[1000:]
    away = np.mean([decision.to_cloud for _, decision in seen])
    assert 0.36 < away < 0.42  # most cloud use within the bound
    assert np.mean([decision.predicted_ms for _, decision in seen]) == pytest.approx(25.0, abs=1.0)


def test_the_latency_bound_needs_no_evidence():
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=25.0)
    seen = Stream(Switcher(config)).run(300, learn=False)
    assert {decision.reason for _, decision in seen} == {"margin", "audit"}


@pytest.mark.parametrize(("bounds", "objective"), [((10, 20, 30, 50, 60), "latency_bound")])
def test_a_looser_bound_sends_no_less(bounds, objective):
    shares = []
    for bound in bounds:
        config = SwitcherConfig(objective=objective, latency_bound_ms=float(bound), audit_share=0.0)
        shares.append(np.mean([decision.to_cloud for _, decision in Stream(Switcher(config)).run(600)]))
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(set(shares)) == len(bounds)


def test_a_higher_target_chooses_no_lower_threshold():
    thresholds = []
    for target in (0.8, 0.85, 0.9, 0.95, 1.0):
        switcher = Switcher(SwitcherConfig(accuracy_target=target, min_evidence=500, rebuild_every=1))
        switcher.model_changed(Calibration())
        Stream(switcher).run(500)  # the same cold start for all
        switcher.decide(0.5, 5.0, LINK, DEADLINE_MS)
        assert switcher.threshold is not None
        thresholds.append(switcher.threshold)
    assert thresholds == sorted(thresholds) and len(set(thresholds)) >= 4


def test_an_unreachable_target_sends_everything():
    switcher = Switcher(SwitcherConfig(accuracy_target=1.0, min_evidence=50, rebuild_every=1))
    rng = np.random.default_rng(0)
    for margin in rng.random(200).tolist():
        decision = switcher.decide(margin, 5.0, LINK, DEADLINE_MS)
        switcher.learn(margin, False, decision.propensity)
    assert (decision.to_cloud, decision.reason, decision.threshold) == (True, "margin", math.inf)


def test_an_infeasible_bound_is_answered_on_the_edge_and_marked():
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=4.0, audit_share=0.1)
    seen = Stream(Switcher(config)).run(1000)
    assert {decision.reason for _, decision in seen} == {"infeasible", "audit"}
    for _, decision in seen:
        assert decision.to_cloud == (decision.reason == "audit")
        assert decision.threshold is None and decision.propensity == 0.1


@pytest.mark.parametrize("predicted_ms", [DEADLINE_MS + 0.1, math.inf])
def test_a_link_past_the_deadline_keeps_what_wanted_the_cloud_on_the_edge(predicted_ms):
    stream = Stream(Switcher(SwitcherConfig(accuracy_target=0.9, min_evidence=100)))
    slow = replace(LINK, predicted_ms=predicted_ms)
    for _, decision in stream.run(20, slow):  # in a cold start
        assert (decision.to_cloud, decision.reason) == (False, "link")
    stream.run(300)
    for margin, decision in stream.run(100, slow):
        assert not decision.to_cloud and decision.predicted_ms == pytest.approx(5.0)
        if decision.threshold is not None and margin < decision.threshold:
            assert decision.reason == "link"
    assert stream.run(50)[-1][1].reason != "link"  # and comes back with the link


def test_a_prediction_at_the_deadline_is_in_time():
    decision = Switcher(SwitcherConfig()).decide(0.1, 5.0, replace(LINK, predicted_ms=DEADLINE_MS), DEADLINE_MS)
    assert decision.to_cloud


def test_equal_seeds_decide_alike_and_others_audit_others():
    def decisions(seed: int) -> list[Decision]:
        config = SwitcherConfig(accuracy_target=0.8, audit_share=0.1, min_evidence=60, seed=seed)
        return [decision for _, decision in Stream(Switcher(config), seed=5).run(800)]

    assert decisions(1) == decisions(1)
    assert [d.reason for d in decisions(1)] != [d.reason for d in decisions(2)]


def test_the_table_is_rebuilt_every_k_samples():
    stream = Stream(Switcher(SwitcherConfig(objective="latency_bound", rebuild_every=7)))
    stream.switcher.model_changed(Calibration())
    tables = []
    for _ in range(29):
        stream.run(1)
        tables.append(stream.switcher.table)
    changes = [i for i in range(1, 29) if tables[i] is not tables[i - 1]]
    assert changes == [7, 14, 21, 28]


def test_the_table_is_rebuilt_when_the_link_moves():
    config = SwitcherConfig(objective="latency_bound", latency_bound_ms=30.0, rebuild_every=1000)
    stream = Stream(Switcher(config))
    stream.run(1)
    table = stream.switcher.table
    stream.run(200, replace(LINK, transit_ms=44.0))  # by 8 %
    assert stream.switcher.table is table
    stream.run(1, replace(LINK, transit_ms=65.0))
    moved = stream.switcher.table
    assert moved is not table and moved is not None and len(moved.thresholds) == 203
    assert moved.latency_ms[-1] == pytest.approx(5 + 75)
    stream.run(1, replace(LINK, transit_ms=20.0))
    assert stream.switcher.table is not moved


def test_the_window_forgets():
    stream = Stream(
        Switcher(SwitcherConfig(objective="latency_bound", latency_bound_ms=30.0, window=50, min_evidence=100))
    )
    stream.run(200)
    assert stream.switcher.table is not None and len(stream.switcher.table.thresholds) == 51


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "nonsense"},
        {"accuracy_target": 0.0},
        {"accuracy_target": 1.1},
        {"audit_share": -0.1},
        {"audit_share": 2.0},
        {"latency_bound_ms": 0.0},
        {"window": 0},
        {"min_evidence": 0},
        {"rebuild_every": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SwitcherConfig(**wrong)
