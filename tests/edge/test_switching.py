from __future__ import annotations

import math

import numpy as np
import pytest
from edgefm.edge.config import SwitcherConfig
from edgefm.edge.link import LinkEstimator
from edgefm.edge.switcher import LinkState, Switcher
from edgefm.models.versions import Calibration

GOOD_LINK = LinkState(40.0, 10.0, 50.0)


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


def test_with_caution_the_target_is_kept_in_most_runs_and_without_in_few():
    kept = {}
    for caution in (0.0, 1.0):
        truths = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            switcher = Switcher(SwitcherConfig(accuracy_target=0.95, caution=caution, seed=seed))
            margins = rng.random(1500)
            probability = 0.6 + 0.4 * np.sqrt(margins)  # of agreeing
            for margin, agrees in zip(margins.tolist(), (rng.random(1500) < probability).tolist(), strict=True):
                decision = switcher.decide(margin, 5.0, GOOD_LINK, 1000.0)
                if decision.to_cloud:
                    switcher.learn(margin, agrees, decision.propensity)
            assert switcher.threshold is not None
            truths.append(1 - (1 - probability)[margins >= switcher.threshold].sum() / 1500)
        kept[caution] = np.mean(np.array(truths) >= 0.95)
    assert kept[0.0] < 0.5 and kept[1.0] > 0.65, kept


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
