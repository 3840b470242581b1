"""`edgefm bench scheduling`: requests per second under every policy, on recorded lengths of answers and on live ones.

Recorded: lengths of real answers (the sequence-scheduling paper's), all waiting at once; the cloud's own scheduler over a clock,
under two models of a step's time: flat, as on a GPU with room to spare, and measured on this machine's decoder.
Live: the decoder answers questions, and every policy must give the same answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ...cloud.language.engine import shared_beginning
from ...cloud.language.generation import Generation, Machine
from ...cloud.language.lengths import ASKED_TOKENS, QUANTILE, LearnedLengths, asked_length, question
from ...cloud.language.machine import DecoderMachine
from ...cloud.language.scheduling import (
    BATCH,
    ContinuousBatching,
    Policy,
    Scheduler,
    SequenceScheduling,
    StaticBatches,
)
from ...models.errors import InputError
from ...models.language.decoder import Decoder, Precision
from ...models.language.generate import Sampling
from ...models.language.tokenizer import Message, TextTokenizer, tokenizer_of
from ...models.language.weights import open_checkpoint
from ..demo_results import describe_environment
from .questions import read_questions

MOST = 512
"""Tokens of an answer, at most (arXiv 2305.13144, section 5)."""
PREDICTOR_ERROR = 60.0
"""Mean absolute error, in tokens, of the recorded workload's predictor: Laplace noise of that scale is within 50 tokens in 57 %
of cases and within 100 in 81 %; the paper's repository states 62, 59 % and 81 % for its own."""
PROMPT = 64
"""Tokens of a recorded request's prompt, which is not recorded."""
LIVE_MOST = 192
LIVE_REPEATS = 3
"""Of every policy, in turn: the machine's speed wanders more than the policies differ."""
ENDLESS = 10**9
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_CONTEXT = 128
_STEPS, _ROUNDS = 3, 5


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step by batch size, linear between those given, and of reading a token of a prompt."""

    batches: tuple[int, ...]
    seconds: tuple[float, ...]
    read_s: float

    def step(self, batch: int) -> float:
        if batch <= self.batches[-1]:
            return float(np.interp(batch, self.batches, self.seconds))
        return self.seconds[-1] * batch / self.batches[-1]


FLAT = StepTimes((1, 10**6), (1.0, 1.0), 0.0)
"""A step takes as long whatever is in it; a prompt is read in none: the paper's setting, with a step as the unit of time."""


class Clock(Machine):
    """A decoder that only takes time; a prompt's first token is how long its answer is."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self.seconds = 0.0

    def start(self, generation: Generation) -> int:
        return len(generation.prompt) + len(generation.tokens)

    def read(self, generation: Generation, count: int) -> int | None:
        self.seconds += self._times.read_s * count
        return self._next(generation)

    def step(self, generations: Sequence[Generation]) -> list[int | None]:
        self.seconds += self._times.step(len(generations))
        return [self._next(one) for one in generations]

    def stop(self, generation: Generation) -> None:
        pass

    @staticmethod
    def _next(generation: Generation) -> int | None:
        return 0 if len(generation.tokens) < generation.prompt[0] else None


@dataclass(frozen=True)
class System:
    """Attributes:
    name: as it is printed.
    predictor: whose lengths it goes by.
    """

    name: str
    predictor: str
    policy: Callable[[], Policy]


RECORDED = (
    System(f"static batches of {BATCH}", "none", StaticBatches),
    System("sequence scheduling", "true lengths", SequenceScheduling),
    System("sequence scheduling", "predicted", SequenceScheduling),
    System("sequence scheduling, one batch size", "predicted", lambda: SequenceScheduling(sizes=())),
    *(
        System(f"continuous batching, {places} places", "predicted", lambda places=places: ContinuousBatching(places))
        for places in (16, 64, 256)
    ),
)


def read_lengths(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the answers at temperature 0, and of the longest over all temperatures, (N,) each.

    Raises:
        InputError: the file is no such record.
    """
    try:
        records = json.loads(path.read_text())
        rows = [[value for name, value in record.items() if name.startswith("L_t")] for record in records]
        cool = [record["L_t0.0"] for record in records]
        if not rows:
            raise ValueError("it is empty")
        tokens, longest = np.asarray(cool, np.int64), np.asarray(rows, np.int64).max(axis=1)
        if tokens.min() < 1:
            raise ValueError(f"a length below 1: {tokens.min()}")
        return np.minimum(tokens, MOST), np.minimum(longest, MOST)
    except OSError as error:
        raise InputError(f"cannot read the lengths {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no record of answers' lengths: {error}; wanted is a JSON list of objects with L_t0.0, L_t0.3, ..."
        ) from error


def replayed(lengths: np.ndarray, predicted: np.ndarray, policy: Policy, times: StepTimes) -> dict[str, float]:
    """All of them, waiting from the beginning."""
    clock = Clock(times)
    scheduler = Scheduler(clock, policy, ENDLESS)
    generations = [
        Generation([int(length), *[0] * (PROMPT - 1)], Sampling(most=MOST), int(guess))
        for length, guess in zip(lengths, predicted, strict=True)
    ]
    for generation in generations:
        scheduler.submit(generation)
    ended = []
    while not scheduler.idle:
        ended += [clock.seconds for moved in scheduler.advance() if moved.ended]
    return {
        "requests_per_s": len(lengths) / clock.seconds,
        "p50_s": float(np.median(ended)),
        "again": float(np.mean([one.restarts > 0 for one in generations])),
    }


def step_times(decoder: Decoder) -> StepTimes:
    """Measured: medians of steps at `_STEP_CONTEXT` tokens of context, the numbers of sequences in turn."""
    tokens = torch.arange(100, 100 + _STEP_CONTEXT)
    read: list[float] = []
    stepped: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(_ROUNDS):
        first = decoder.begin()
        began = time.perf_counter()
        decoder.prefill(first, tokens)
        read.append((time.perf_counter() - began) / _STEP_CONTEXT)
        for batch in BATCHES:
            states = [first.fork() for _ in range(batch)]
            for _ in range(_STEPS):
                began = time.perf_counter()
                decoder.step(states, [100] * batch)
                stepped[batch].append(time.perf_counter() - began)
    seconds = tuple(float(np.median(taken)) for taken in stepped.values())
    return StepTimes(BATCHES, seconds, float(np.median(read)))


# ---- live


@dataclass(frozen=True)
class Asked:
    messages: list[Message]
    prompt: list[int]
    shared: int


def asked_questions(path: Path, tokenizer: TextTokenizer, count: int) -> list[Asked]:
    """The first `count` of a file of questions. Raises InputError: there are not as many."""
    questions = read_questions(path)[:count]
    if len(questions) < count:
        raise InputError(f"{path} has {len(questions)} questions; {count} are wanted")
    asked = []
    for one in questions:
        messages: list[Message] = [{"role": "user", "content": one.question}]
        prompt = tokenizer.chat(messages)
        asked.append(Asked(messages, prompt, shared_beginning(tokenizer, messages, prompt)))
    return asked


def answered(
    machine: Machine, policy: Policy, asked: Sequence[Asked], predicted: Sequence[int], most: int
) -> tuple[list[list[int]], float, float]:
    """Answers in the order of the questions, seconds for all, and the median second at which one ended."""
    scheduler = Scheduler(machine, policy, ENDLESS)
    generations = [
        Generation(one.prompt, Sampling(most=most), guess, one.shared)
        for one, guess in zip(asked, predicted, strict=True)
    ]
    began, ended = time.perf_counter(), []
    for generation in generations:
        scheduler.submit(generation)
    while not scheduler.idle:
        ended += [time.perf_counter() - began for moved in scheduler.advance() if moved.ended]
    return [one.tokens for one in generations], time.perf_counter() - began, float(np.median(ended))


def guessed(machine: Machine, tokenizer: TextTokenizer, asked: Sequence[Asked], most: int) -> tuple[list[int], float]:
    """What the model itself expects, and the seconds that asking took."""
    questions = [Asked([], tokenizer.chat(question(one.messages)), one.shared) for one in asked]
    tokens, seconds, _ = answered(
        machine, ContinuousBatching(BATCH), questions, [ASKED_TOKENS] * len(asked), ASKED_TOKENS
    )
    return [asked_length(tokenizer.decode(some), most) for some in tokens], seconds


def judged(predicted: Sequence[int], lengths: Sequence[int]) -> dict[str, float]:
    apart = np.abs(np.asarray(predicted) - np.asarray(lengths))
    return {
        "mean_error": round(float(apart.mean()), 1),
        "within_50": round(float((apart <= 50).mean()), 3),
        "within_100": round(float((apart <= 100).mean()), 3),
        "longer_than_predicted": round(float((np.asarray(lengths) > np.asarray(predicted)).mean()), 3),
    }


def _live(
    decoder: Decoder, tokenizer: TextTokenizer, path: Path, count: int, history: int, console: Console
) -> dict[str, Any]:
    everything = asked_questions(path, tokenizer, count + history)
    earlier, asked = everything[:history], everything[history:]
    machine, learned = DecoderMachine(decoder, tokenizer.ends), LearnedLengths()
    most = [LIVE_MOST] * max(count, history)
    with console.status(f"Answering {history} questions to learn from ..."):
        before, _, _ = answered(machine, ContinuousBatching(BATCH), earlier, most[:history], LIVE_MOST)
    for one, tokens in zip(earlier, before, strict=True):
        learned.learn(one.prompt, LIVE_MOST, "generate", len(tokens))
    expected = [learned.predict(one.prompt, LIVE_MOST, "generate") for one in asked]
    with console.status("Asking how long the answers will be ..."):
        own, asking_s = guessed(machine, tokenizer, asked, LIVE_MOST)
    with console.status("Static batches ..."):
        answers, _, _ = answered(machine, StaticBatches(), asked, most[:count], LIVE_MOST)
    lengths = [len(tokens) for tokens in answers]
    systems = (
        (f"static batches of {BATCH}", "none", most[:count], 0.0, StaticBatches),
        ("sequence scheduling", "true lengths", lengths, 0.0, SequenceScheduling),
        ("sequence scheduling", "learned", expected, 0.0, SequenceScheduling),
        ("sequence scheduling", "asked", own, asking_s, SequenceScheduling),
        (f"continuous batching, {BATCH} places", "learned", expected, 0.0, ContinuousBatching),
    )
    taken = np.empty((LIVE_REPEATS, len(systems), 2))  # seconds for all, and until half were done
    same = np.empty((LIVE_REPEATS, len(systems)))
    for repeat in range(LIVE_REPEATS):
        for place, (name, predictor, predicted, extra, policy) in enumerate(systems):
            with console.status(f"{name}, {predictor}: {repeat + 1} of {LIVE_REPEATS} ..."):
                found, seconds, median_s = answered(machine, policy(), asked, predicted, LIVE_MOST)
            taken[repeat, place] = seconds + extra, median_s + extra
            same[repeat, place] = np.mean([a == b for a, b in zip(found, answers, strict=True)])
    rows = [
        {
            "system": name,
            "lengths": predictor,
            "requests_per_s": round(count / np.median(taken[:, place, 0]), 3),
            "of_static": round(float(np.median(taken[:, 0, 0] / taken[:, place, 0])), 2),
            "of_static_runs": (taken[:, 0, 0] / taken[:, place, 0]).round(2).tolist(),
            "median_s": round(float(np.median(taken[:, place, 1])), 1),
            "same_answers": round(float(same[:, place].mean()), 3),
        }
        for place, (name, predictor, *_) in enumerate(systems)
    ]
    return {
        "questions": count,
        "history": history,
        "repeats": LIVE_REPEATS,
        "most_tokens": LIVE_MOST,
        "mean_tokens": round(float(np.mean(lengths)), 1),
        "rows": rows,
        "predictors": {
            f"learned, quantile {QUANTILE}": judged(expected, lengths),
            "asked": judged(own, lengths),
            "median of the history": judged([round(float(np.median([len(x) for x in before])))] * count, lengths),
        },
        "asking_s": round(asking_s, 1),
    }


def bench_scheduling(
    weights: Path,
    lengths_file: Path,
    questions_file: Path | None,
    requests: int,
    questions: int,
    history: int,
    precision: Precision,
    console: Console,
) -> dict[str, Any]:
    """Recorded lengths under both models of time; live questions where a file of them is given."""
    true, longest = read_lengths(lengths_file)
    random = np.random.default_rng(0)
    some = random.permutation(len(true))[:requests]
    true, longest = true[some], longest[some]
    noise = random.laplace(0.0, PREDICTOR_ERROR, len(true))
    predictions = {
        "none": np.full(len(true), MOST),
        "true lengths": true,
        "predicted": np.clip(np.rint(longest + noise), 1, MOST).astype(np.int64),
    }
    checkpoint = open_checkpoint(weights)
    decoder = Decoder(checkpoint, precision)
    with console.status("Measuring a step's time ..."):
        measured = step_times(decoder)
    rows = []
    for name, times in (("flat", FLAT), ("measured", measured)):
        found = [replayed(true, predictions[one.predictor], one.policy(), times) for one in RECORDED]
        for system, row in zip(RECORDED, found, strict=True):
            rows.append(
                {
                    "step_time": name,
                    "system": system.name,
                    "lengths": system.predictor,
                    "of_static": round(row["requests_per_s"] / found[0]["requests_per_s"], 2),
                    "median_wait_of_static": round(row["p50_s"] / found[0]["p50_s"], 2),
                    "again": round(row["again"], 3),
                }
                | ({"requests_per_s": round(row["requests_per_s"], 3)} if name == "measured" else {})
            )
    result: dict[str, Any] = {
        "model": weights.name,
        "precision": precision,
        "requests": len(true),
        "mean_tokens": round(float(true.mean()), 1),
        "predictor": {"error_of_longest": PREDICTOR_ERROR, **judged(predictions["predicted"].tolist(), true.tolist())},
        "step_ms": {str(b): round(s * 1e3, 1) for b, s in zip(measured.batches, measured.seconds, strict=True)},
        "read_ms_per_token": round(measured.read_s * 1e3, 2),
        "prompt_tokens": PROMPT,
        "rows": rows,
    }
    if questions_file is not None:
        result["live"] = _live(decoder, tokenizer_of(checkpoint), questions_file, questions, history, console)
    result["environment"] = describe_environment(0)
    _print(result, console)
    return result


def _print(result: dict[str, Any], console: Console) -> None:
    for row in [*result["rows"], *result.get("live", {}).get("rows", ())]:
        rate = f", {row['requests_per_s']:.2f} requests/s" if "requests_per_s" in row else ""
        kind = f"{row['step_time']} step" if "step_time" in row else "live"
        console.print(f"{kind}: {row['system']} ({row['lengths']}): {row['of_static']:.2f} of static{rate}")
