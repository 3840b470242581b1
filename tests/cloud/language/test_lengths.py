"""Expected lengths of answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.language.lengths import LearnedLengths, asked_length, question


def test_too_little_history_expects_the_most():
    lengths = LearnedLengths()
    for _ in range(10):
        lengths.learn([1, 2], 100, "ask", 20)
    assert lengths.predict([1, 2], 100, "ask") == 100
    assert lengths.predict([1, 2], 100, "generate") == 100


def test_what_a_prompt_says_of_its_answer_is_learned():
    random = np.random.default_rng(0)
    lengths = LearnedLengths()

    def request() -> tuple[list[int], int]:
        long = random.random() < 0.5  # token 7 asks for a long answer
        prompt = random.integers(10, 1000, 30).tolist() + ([7] * 5 if long else [8] * 5)
        return prompt, int(random.lognormal(np.log(200 if long else 20), 0.2))

    for _ in range(600):
        prompt, length = request()
        lengths.learn(prompt, 512, "generate", length)
    tried = [request() for _ in range(300)]
    predicted = [lengths.predict(prompt, 512, "generate") for prompt, _ in tried]
    covered = np.mean([length <= guess for guess, (_, length) in zip(predicted, tried, strict=True)])
    assert covered == pytest.approx(0.8, abs=0.07)  # the quantile that was asked for
    short = [guess for guess, (prompt, _) in zip(predicted, tried, strict=True) if prompt[-1] == 8]
    assert np.median(short) < 60  # without what the prompt says it would be some 230


def test_kinds_are_apart():
    lengths = LearnedLengths()
    for _ in range(50):
        lengths.learn([1, 2, 3], 512, "describe", 30)
        lengths.learn([1, 2, 3], 512, "ask", 200)
    assert lengths.predict([1, 2, 3], 512, "describe") < 60
    assert lengths.predict([1, 2, 3], 512, "ask") > 120
    assert lengths.predict([1, 2, 3], 100, "ask") == 100


@pytest.mark.parametrize(
    ("answer", "length"), [("120", 120), ("About 37 tokens.", 37), ("I cannot say", 200), ("999999", 200), ("0", 1)]
)
def test_the_models_own_guess(answer, length):
    assert asked_length(answer, 200) == length


def test_the_question_comes_behind_the_instruction():
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a sumac?"}]
    asked = question(messages)
    assert asked[0] == messages[0]
    assert asked[1]["content"].startswith("What is a sumac?\n\n") and "Only print the number" in asked[1]["content"]


def test_history_outlives_a_restart_and_a_damaged_file_does_not_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "kept" / "lengths.json"
    lengths = LearnedLengths(path, "small")
    for number in range(60):
        lengths.learn([number, 5], 300, "ask", 20 + number % 5)
    assert lengths.unsaved == 60
    lengths.write(lengths.snapshot())
    assert lengths.unsaved == 0
    expected = lengths.predict([3, 5], 300, "ask")
    assert 20 <= expected <= 30 and LearnedLengths(path, "small").predict([3, 5], 300, "ask") == expected
    assert LearnedLengths(path, "another").predict([3, 5], 300, "ask") == 300 and not caplog.records
    whole = path.read_text()
    longer = whole.replace('"products": [', '"products": [1.0, ')
    endless = whole.replace('"squares": [[', '"squares": [[1e999, ').replace("1e999, 60.0", "1e999", 1)
    for text in (whole[: len(whole) // 2], "[]", "{}", longer, endless):
        path.write_text(text)
        caplog.clear()
        assert LearnedLengths(path, "small").predict([3, 5], 300, "ask") == 300
        assert "event=lengths_lost" in caplog.text


def test_a_disk_that_refuses_costs_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    lengths = LearnedLengths(tmp_path / "file" / "lengths.json")
    lengths.learn([1], 10, "ask", 5)
    lengths.write(lengths.snapshot())
    assert "event=lengths_not_kept" in caplog.text
