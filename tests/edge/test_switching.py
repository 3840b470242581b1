from __future__ import annotations

import math

import numpy as np
import pytest
from edgefm.edge.agreement import AgreementCurve
from edgefm.edge.config import SwitcherConfig
from edgefm.edge.link import LinkEstimator
from edgefm.edge.switcher import LinkState, Switcher
from edgefm.edge.thresholds import Costs, ThresholdTable
from edgefm.models.versions import Calibration
from hypothesis import given
from hypothesis import strategies as st

COSTS = Costs(edge_ms=5.0, transit_ms=40.0, cloud_ms=10.0)
GOOD_LINK = LinkState(40.0, 10.0, 50.0)
margins_lists = st.lists(st.integers(0, 30).map(lambda n: n / 30), min_size=1, max_size=40)


def _curve(rng: np.random.Generator, count: int = 300) -> AgreementCurve:
    margins = rng.random(count)
    return AgreementCurve.fit(margins, rng.random(count) < 0.5 + margins / 2, np.ones(count))


@given(margins_lists, st.floats(0.5, 1.0), st.floats(1.0, 80.0))
def test_choices_equal_brute_force(margins, target, bound):
    curve, window = _curve(np.random.default_rng(0)), np.array(margins)
    table = ThresholdTable.build(window, curve, COSTS)
    wrong = curve(window)
    candidates = [*sorted(set(margins)), math.inf]
    agreement = {t: 1 - wrong[window >= t].sum() / len(window) for t in candidates}
    share = {t: float((window >= t).mean()) for t in candidates}
    reached = [t for t in candidates if agreement[t] >= target]
    chosen = table.thresholds[table.smallest_cloud_use(target)]
    assert chosen == min(reached) or agreement[chosen] == pytest.approx(target)
    latency = {t: COSTS.edge_ms + (1 - share[t]) * 50.0 for t in candidates}
    within = [t for t in candidates if latency[t] <= bound]
    index = table.largest_within(bound)
    assert (index is None) == (not within)
    if index is not None:
        best = table.thresholds[index]
        assert best == max(within) or latency[best] == pytest.approx(bound)


def test_disagreement_never_rises_with_the_margin():
    for seed in range(20):
        assert (np.diff(_curve(np.random.default_rng(seed), 60).disagreement) <= 1e-12).all()


def test_agreement_is_estimated_from_a_biased_stream():
    """Cold start, then only uncertain samples and audits are seen; the chosen threshold still keeps the target."""
    truths = []
    for seed in range(5):
        rng, switcher = np.random.default_rng(seed), Switcher(SwitcherConfig(accuracy_target=0.95, seed=seed))
        margins = rng.random(3000)
        agrees = rng.random(3000) < 0.6 + 0.4 * np.sqrt(margins)
        for margin, agree in zip(margins.tolist(), agrees.tolist(), strict=True):
            decision = switcher.decide(margin, 5.0, GOOD_LINK, 1000.0)
            if decision.to_cloud:
                switcher.learn(margin, agree, decision.propensity)
        assert switcher.threshold is not None
        truths.append(1 - (~agrees[margins >= switcher.threshold]).sum() / 3000)
    assert np.mean(truths) == pytest.approx(0.95, abs=0.015)


def test_cold_start_goes_to_the_cloud_and_a_calibration_shortens_it():
    rng = np.random.default_rng(0)
    calibration = Calibration(margins=rng.random(200).tolist(), agreements=[True] * 200, propensities=[1.0] * 200)
    lengths = []
    for prior in (Calibration(), calibration):
        switcher = Switcher(SwitcherConfig())
        switcher.model_changed(prior)
        cold = 0
        for margin in rng.random(500).tolist():
            decision = switcher.decide(margin, 5.0, GOOD_LINK, 1000.0)
            if decision.to_cloud:
                switcher.learn(margin, True, decision.propensity)
            cold += decision.reason == "cold-start"
        lengths.append(cold)
    assert 150 <= lengths[0] <= 175
    assert 75 <= lengths[1] <= 100


def test_a_link_past_the_deadline_leaves_the_answer_to_the_edge():
    decision = Switcher(SwitcherConfig()).decide(0.1, 5.0, LinkState(40, 10, math.inf), 1000.0)
    assert (decision.to_cloud, decision.reason) == (False, "link")


def test_an_infeasible_bound_goes_to_the_edge_and_says_so():
    switcher = Switcher(SwitcherConfig(objective="latency_bound", latency_bound_ms=1.0, audit_share=0.0))
    decision = switcher.decide(0.1, 5.0, GOOD_LINK, 1000.0)
    assert (decision.to_cloud, decision.reason) == (False, "infeasible")


def test_audits_come_at_their_share_and_carry_it():
    switcher = Switcher(SwitcherConfig(objective="latency_bound", latency_bound_ms=5.1, audit_share=0.1, seed=3))
    decisions = [switcher.decide(0.9, 5.0, GOOD_LINK, 1000.0) for _ in range(2000)]
    audits = [decision for decision in decisions if decision.reason == "audit"]
    assert 150 < len(audits) < 250 and {decision.propensity for decision in audits} == {0.1}


def test_the_link_is_learned_from_its_queries_and_asked_again_after_an_outage():
    link, now = LinkEstimator(), 0.0
    for query in range(60):
        size = 2000 + 500 * (query % 8)
        link.sent(query, size, now)
        now += 40 + size * 8 / 2000 + 10  # 2 Mbit/s, 40 ms round trip, 10 ms in the cloud
        link.answered(query, now, 10.0)
    assert link.transit_ms(4000) == pytest.approx(56, rel=0.2)
    for query in range(60, 100):
        link.sent(query, 4000, now)
        link.lost(query, now + 1000)
        now += 1000
    assert link.predict_ms(4000, now) > 500
    assert link.predict_ms(4000, now + 1500) < 100
