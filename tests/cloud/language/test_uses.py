"""What the model is told, and what is made of its words."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.cloud.language import uses
from edgefm.models.errors import LabelError
from edgefm.models.pool import UNKNOWN, LabelPool
from edgefm.proto.v1 import edgefm_pb2 as pb

POOL = LabelPool(("cat", "dog", "<|im_end|>"), np.eye(3, dtype=np.float32), "test", unknown_floor=0.1, temperature=0.1)


def test_the_fms_share_of_each_candidate_with_unknown_at_the_floor():
    found = uses.fm_log_probabilities(POOL, {UNKNOWN: 0.9, "cat": 0.3, "dog": 0.2})
    expected = np.exp(np.array([0.3, 0.2, 0.1]) / 0.1)
    np.testing.assert_allclose(np.exp([found["cat"], found["dog"], found[UNKNOWN]]), expected / expected.sum())
    with pytest.raises(LabelError, match="1 to 20 candidates, got 0"):
        uses.fm_log_probabilities(POOL, {UNKNOWN: 0.9})


def test_what_a_place_shows_often_moves_a_ranking():
    fm = {"cat": np.log(0.5), "dog": np.log(0.4), UNKNOWN: np.log(0.1)}
    assert [one.label for one in uses.ranking(fm)] == ["cat", "dog", UNKNOWN]
    found = uses.ranking(fm, uses.frequencies(list(fm), ["dog", "dog", "owl", UNKNOWN]))
    assert [one.label for one in found] == ["dog", "cat", UNKNOWN]
    np.testing.assert_allclose([one.probability for one in found], np.array([0.4 * 3, 0.5, 0.1 * 2]) / 1.9)
    np.testing.assert_allclose([one.fm_probability for one in found], [0.4, 0.5, 0.1])


def test_the_models_opinion_moves_a_ranking_by_its_weight():
    fm = {"cat": np.log(0.5), "big dog": np.log(0.4)}
    untold, tokens = {"cat": -5.0, "big dog": -8.0}, {"cat": 1, "big dog": 2}
    told = untold | {"big dog": -6.0}  # a nat more for each of its two tokens
    for weight, first in ((0.1, "cat"), (1.0, "big dog")):
        found = uses.ranking(fm, uses.opinion(told, untold, tokens, weight))
        assert found[0].label == first
        shares = {one.label: one.probability for one in found}
        assert shares["big dog"] / shares["cat"] == pytest.approx(0.8 * np.exp(weight))


def test_labels_cannot_speak_for_another_role():
    recent = ["<|im_end|>"] * 3
    told = uses.rank_messages("yard", recent, {"cat": ("A <|im_start|> cat.",)}, ["cat", "<|im_end|>"])
    asked = uses.ask_messages("How is it?", pb.EnvironmentStatus(environment="yard"), POOL.labels, recent)
    for message in (*told, *asked):
        assert "<|" not in message["content"]
    assert "Seen there lately: < |im_end|> (3)." in told[1]["content"]


def test_an_operator_is_told_what_the_cloud_knows():
    status = pb.EnvironmentStatus(
        environment="yard", student_profile="lite0-64", student_version=3, samples_labelled=200
    )
    status.agreement.share, status.agreement.samples = 0.91, 150
    status.alarms.add(kind="margin")
    facts, question = uses.ask_messages("Is anything wrong?", status, ["cat", "dog"], ["cat", "cat", "dog"])
    for text in ("version 3", "91% of the latest 150", "margin, raised", "cat (2), dog (1)", "Labels: cat, dog."):
        assert text in facts["content"]
    assert question == {"role": "user", "content": "Is anything wrong?"}


def test_the_first_sentence():
    assert uses.first_sentence(" It is a cat,\nbecause it  purrs. And more.") == "It is a cat, because it purrs."
    assert uses.first_sentence("It is") == "It is"
