"""Many callers of one model at once."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from edgefm.cloud.language.engine import LanguageEngine
from edgefm.models.errors import DeadlineError, InputError, ModelError, OverloadedError
from edgefm.models.language.generate import Sampling

QUESTIONS = [
    "Name a fruit.",
    "What is the capital of Italy?",
    "Say hello.",
    "Which colours does a zebra have? " * 8,
    "Count from one to ten.",
    "What does a sumac berry look like? Write three sentences.",
]
MOST = (3, 30, 90, 6, 60, 40)


async def _answer(engine: LanguageEngine, question: str, most: int, **settings) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return [token async for token in engine.generate(messages, Sampling(most), "generate", **settings)]


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("continuous", {}),
        ("continuous", {"cache_blocks": 5}),
        ("sequence", {}),
        ("static", {"places": 3}),
        ("continuous", {"asks": True}),
    ],
    ids=["continuous", "little-cache", "sequence", "static", "asked"],
)
def test_everyone_gets_what_they_would_get_alone(run, alone, policy, settings):
    async def work(engine: LanguageEngine) -> None:
        questions = list(zip(QUESTIONS, MOST, strict=True))
        found = await asyncio.gather(*(_answer(engine, question, most) for question, most in questions))
        expected = [alone(question, most) for question, most in questions]
        assert found == expected
        assert any(len(answer) < most for answer, most in zip(expected, MOST, strict=True))
        assert engine.waiting == engine.running == engine.blocks_used == 0

    run(work, policy, **settings)


def test_requests_share_a_step(run, machine):
    batches = []
    step = machine.step

    def counted(generations):
        batches.append(len(generations))
        return step(generations)

    machine.step = counted

    async def work(engine: LanguageEngine) -> None:
        await asyncio.gather(*(_answer(engine, "Count from one to fifty.", 12) for _ in range(3)))

    run(work)
    assert max(batches) == 3 and len(batches) < 3 * 12


def test_a_system_message_is_read_once(run, machine, decoder):
    read = []
    prefill = decoder.prefill

    def counted(state, tokens, every=False):
        read.append(len(tokens))
        return prefill(state, tokens, every)

    decoder.prefill = counted
    try:

        async def work(engine: LanguageEngine) -> None:
            system = {"role": "system", "content": "You answer questions about animals in one word. " * 4}
            for animal in ("dog", "cat", "owl"):
                messages = [system, {"role": "user", "content": f"Is a {animal} large?"}]
                async for _ in engine.generate(messages, Sampling(2), "generate"):
                    pass

        run(work)
    finally:
        del decoder.prefill
    first, *rest = read
    assert first > 40  # the beginning
    assert len(rest) == 3 and max(rest) < 25


def test_the_same_seed_gives_the_same_words_whoever_is_beside_it(run):
    sampling = Sampling(16, temperature=1.0, top_p=0.9, seed=5)

    async def sampled(engine: LanguageEngine) -> list[int]:
        messages = [{"role": "user", "content": "Tell me about foxes."}]
        return [token async for token in engine.generate(messages, sampling, "generate")]

    async def work(engine: LanguageEngine) -> None:
        lonely = await sampled(engine)
        beside, *_ = await asyncio.gather(sampled(engine), *(_answer(engine, text, 8) for text in QUESTIONS[:2]))
        assert beside == lonely

    run(work)


def test_a_deadline_ends_an_answer_and_frees_its_place(run):
    async def work(engine: LanguageEngine) -> None:
        with pytest.raises(DeadlineError, match=r"not done in time; \d+ of up to 400"):
            await _answer(engine, "Go on.", 400, deadline_ms=200)
        assert await _answer(engine, "Name a fruit.", 2)  # after which the other has left
        assert engine.running == 0

    run(work, places=1, endless=True)


def test_a_caller_that_goes_away_is_not_computed(run):
    async def work(engine: LanguageEngine) -> None:
        long = asyncio.create_task(_answer(engine, "Go on.", 400))
        while not engine.running:
            await asyncio.sleep(0.01)
        long.cancel()
        began = time.perf_counter()
        while engine.running:
            await asyncio.sleep(0.01)
            assert time.perf_counter() - began < 20

    run(work, endless=True)


def test_a_full_queue_says_when_to_come_again(run):
    async def work(engine: LanguageEngine) -> None:
        tasks = [asyncio.create_task(_answer(engine, "Go on.", 60)) for _ in range(5)]
        await asyncio.sleep(0)
        while not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        refused = [task for task in tasks if task.done()]
        for task in refused:
            with pytest.raises(OverloadedError) as error:
                await task
            assert 100 <= error.value.retry_after_ms <= 60_000
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert 1 <= len(refused) <= 3

    run(work, places=1, max_queue=2, endless=True)


def test_what_is_too_long_is_refused_at_once(run):
    async def work(engine: LanguageEngine) -> None:
        with pytest.raises(InputError, match="may have 512 tokens"):
            await _answer(engine, "word " * 600, 10)
        with pytest.raises(InputError, match="cache blocks; there are 3"):
            await _answer(engine, "word " * 200, 10)

    run(work, cache_blocks=3)


def test_a_model_that_fails_fails_those_that_run_and_goes_on(run, machine):
    step, failures = machine.step, [RuntimeError("out of memory")]

    def failing(generations):
        if failures:
            raise failures.pop()
        return step(generations)

    machine.step = failing

    async def work(engine: LanguageEngine) -> None:
        with pytest.raises(ModelError, match="out of memory"):
            await _answer(engine, "Name a fruit.", 5)
        assert engine.failure == "out of memory"
        await engine.try_again()
        assert engine.failure is None
        assert await _answer(engine, "Name a fruit.", 5)
        assert engine.failure is None and engine.running == 0

    run(work)


def test_scores_are_the_log_probabilities_of_the_words(run, tokenizer, decoder):
    async def work(engine: LanguageEngine) -> None:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        begun, continuations = "The capital is", [" Paris", " the city of Paris."]
        found = await engine.scores(messages, begun, continuations)
        prompt = [*tokenizer.chat(messages), *tokenizer.encode(begun)]
        for score, text in zip(found, continuations, strict=True):
            words = tokenizer.encode(text)
            logits = decoder.prefill(decoder.begin(), [*prompt, *words], every=True)[len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, dim=-1)[range(len(words)), words].sum()
            assert score == pytest.approx(float(expected), abs=1e-3)

    run(work)


def test_one_callers_odd_settings_cost_nobody_else(run):
    async def work(engine: LanguageEngine) -> None:
        messages = [{"role": "user", "content": "Name a fruit."}]

        async def coldest() -> list[int]:
            sampling = Sampling(8, temperature=1e-38, top_p=1e-30)
            return [token async for token in engine.generate(messages, sampling, "generate")]

        cold, greedy = await asyncio.gather(coldest(), _answer(engine, "Name a fruit.", 8))
        assert cold == greedy

    run(work)


def test_the_owner_with_the_most_gives_way_when_the_queue_is_full(run):
    async def work(engine: LanguageEngine) -> None:
        greedy = [asyncio.create_task(_answer(engine, "Go on.", 200, owner="greedy"))]
        while not engine.running:
            await asyncio.sleep(0.001)
        greedy += [asyncio.create_task(_answer(engine, f"Go on, {i}.", 5, owner="greedy")) for i in range(3)]
        while engine.waiting < 3:
            assert not greedy[0].done()
            await asyncio.sleep(0.001)
        assert await _answer(engine, "Name a fruit.", 2, owner="modest")
        done = await asyncio.gather(*greedy, return_exceptions=True)
        refused = [isinstance(one, OverloadedError) for one in done]
        assert sum(refused) == 1 and not refused[0]  # prompts are read in threads: any of the others may be the newest

    run(work, places=1, max_queue=3, endless=True)


def test_scores_and_answers_take_turns(run):
    async def work(engine: LanguageEngine) -> None:
        messages = [{"role": "user", "content": "What is it? " * 20}]
        weighing = True

        async def weigh() -> int:
            count = 0
            while weighing:
                await engine.scores(messages, "It is", [" a cat", " a dog"])
                count += 1
            return count

        busy = [asyncio.create_task(weigh()) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert len(await _answer(engine, "Go on.", 30)) == 30
        weighing = False
        assert min(await asyncio.gather(*busy)) > 0

    run(work, endless=True)


def test_scores_that_nobody_waits_for_are_not_computed(run, decoder, machine):
    computed = []
    scores = machine.scores

    def counted(*arguments):
        computed.append(arguments)
        return scores(*arguments)

    machine.scores = counted

    async def work(engine: LanguageEngine) -> None:
        messages = [{"role": "user", "content": "What is it? " * 60}]
        tasks = [asyncio.create_task(engine.scores(messages, "It is", [" a cat"])) for _ in range(6)]
        await tasks[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _answer(engine, "Name a fruit.", 5)
        with pytest.raises(DeadlineError):
            await engine.scores(messages, "It is", [" a cat"] * 20, deadline_ms=1)

    run(work)
    assert len(computed) < 6
