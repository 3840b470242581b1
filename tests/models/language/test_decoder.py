"""The decoder against transformers' own, and one way of coming to a token against another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edgefm.models.attention.api import attend
from edgefm.models.attention.pattern import Form, Pattern
from edgefm.models.errors import InputError, ModelError
from edgefm.models.language import decoder as decoders
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.generate import Sampling, generate, generate_batch
from edgefm.models.language.weights import names, open_checkpoint, save_directory

PROMPTS = [[5, 9, 3], [7], [100, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2]]


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder(open_checkpoint(folder))


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 160, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_logits_are_transformers(theirs, decoder: Decoder):
    prompt = tokens(70)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0]
    found = decoder.prefill(decoder.begin(), prompt, every=True)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    torch.testing.assert_close(decoder.prefill(decoder.begin(), prompt), found[-1])


@pytest.mark.parametrize("form", ["softmax", "sa", "sa_normalised"])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(2, 12)], ids=str)
def test_steps_and_prefill_in_parts_equal_prefill_in_one(folder: Path, pattern: Pattern, form: Form):
    separators = torch.arange(160) % 6 == 0
    decoder = Decoder(open_checkpoint(folder), "float32", pattern, [1], separators, form=form)
    prompt = tokens(60)
    whole = decoder.prefill(decoder.begin(), prompt, every=True)
    state = decoder.begin()
    parts = [decoder.prefill(state, prompt[:20], every=True), decoder.prefill(state, prompt[20:33], every=True)]
    parts += [decoder.step([state], [token]) for token in prompt[33:]]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)
    assert state.length == 60 and len(state.caches[1]) == 60
    kept = sum(separators[token] for token in prompt[2:48])
    assert len(state.caches[0]) == (60 if pattern.neighbours is None else 2 + kept + 12)


def test_sequences_of_any_lengths_step_together_as_each_alone(decoder: Decoder):
    alone = []
    for prompt in PROMPTS:
        state = decoder.begin()
        decoder.prefill(state, prompt)
        alone.append(decoder.step([state], [11])[0])
    states = [decoder.begin() for _ in PROMPTS]
    for state, prompt in zip(states, PROMPTS, strict=True):
        decoder.prefill(state, prompt)
    torch.testing.assert_close(decoder.step(states, [11] * len(PROMPTS)), torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_a_fork_of_a_shared_prompt_goes_on_as_a_sequence_of_its_own(decoder: Decoder):
    shared = decoder.begin()
    decoder.prefill(shared, [4, 5, 6])
    fork = shared.fork()
    decoder.step([shared], [7])
    again = decoder.begin()
    decoder.prefill(again, [4, 5, 6])
    assert torch.equal(decoder.step([fork], [8]), decoder.step([again], [8]))
    assert fork.length == 4 and fork.held == again.held


def test_greedy_answers_are_transformers_and_the_same_in_a_batch(theirs, decoder: Decoder):
    ends, most = frozenset({17}), Sampling(most=20)
    found = generate_batch(decoder, PROMPTS, ends, [most] * len(PROMPTS))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            said = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=17, pad_token_id=0
            )
        expected = [token for token in said[0, len(prompt) :].tolist() if token != 17]
        assert answer == expected == list(generate(decoder, prompt, ends, most))
    assert {len(answer) for answer in found} & {20}


def test_sampling_repeats_for_its_seed_and_top_p_cuts_the_tail(decoder: Decoder):
    def sampled(seed: int, top_p: float = 1.0) -> list[int]:
        return list(generate(decoder, [3, 4], frozenset(), Sampling(30, 1.5, top_p, seed)))

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1, top_p=1e-6) == list(generate(decoder, [3, 4], frozenset(), Sampling(30)))
    together = generate_batch(
        decoder, [[9], [3, 4]], frozenset(), [Sampling(30, 1.5, seed=5), Sampling(30, 1.5, seed=1)]
    )
    assert together[1] == sampled(1)


def test_bf16_is_close_to_float32(folder: Path, decoder: Decoder):
    half = Decoder(open_checkpoint(folder), "bfloat16")
    prompt = tokens(40)
    found, expected = (
        half.prefill(half.begin(), prompt, every=True),
        decoder.prefill(decoder.begin(), prompt, every=True),
    )
    assert found.dtype == torch.float32
    assert float((found - expected).abs().mean() / expected.abs().mean()) < 0.05


def test_queries_are_rounded_only_where_pytorch_s_kernel_attends_halves(folder: Path, monkeypatch):
    seen = []

    def watched(q, *rest):
        seen.append(q.dtype)
        return attend(q, *rest)

    monkeypatch.setattr(decoders, "attend", watched)
    for multiplies in (True, False):
        monkeypatch.setattr(decoders, "multiplies_halves", lambda device, multiplies=multiplies: multiplies)
        half = Decoder(open_checkpoint(folder), "bfloat16")
        state = half.begin()
        half.prefill(state, tokens(20))
        first = torch.bfloat16 if multiplies else torch.float32
        assert set(seen) == {first}
        seen.clear()
        half.prefill(state, tokens(5))  # queries in parts: the project's kernel, in float32
        assert set(seen) == {torch.float32}
        seen.clear()


def test_weights_of_8_bits_compute_what_they_stand_for(folder: Path, decoder: Decoder):
    checkpoint = open_checkpoint(folder)

    def unpacked(name: str) -> torch.Tensor:
        return checkpoint.read(name) if "norm" in name else checkpoint.blocks(name).dense()

    few, same = Decoder(checkpoint, "quantised"), Decoder(replace(checkpoint, read=unpacked))
    prompt = tokens(40)
    found, expected = (some.prefill(some.begin(), prompt, every=True) for some in (few, same))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    state = few.begin()
    steps = [few.prefill(state, prompt[:20], every=True), *(few.step([state], [token]) for token in prompt[20:])]
    torch.testing.assert_close(torch.cat(steps), expected, atol=1e-4, rtol=1e-4)
    exact = decoder.prefill(decoder.begin(), prompt, every=True)
    assert float((found - exact).abs().mean() / exact.abs().mean()) < 0.1  # random weights forgive little


def test_saved_weights_are_read_as_they_were(folder: Path, decoder: Decoder, tmp_path: Path):
    checkpoint = open_checkpoint(folder)
    save_directory(
        tmp_path / "copy", checkpoint.config, {name: checkpoint.read(name) for name in names(checkpoint.config)}
    )
    again = open_checkpoint(tmp_path / "copy")
    assert again.config == checkpoint.config
    assert torch.equal(Decoder(again).prefill(decoder.begin(), [1, 2]), decoder.prefill(decoder.begin(), [1, 2]))


@pytest.mark.parametrize("bad", [[], [160], [-1]])
def test_tokens_that_are_none_are_refused(decoder: Decoder, bad: list[int]):
    with pytest.raises(InputError, match="token"):
        decoder.prefill(decoder.begin(), bad)


def test_files_that_are_no_such_model_are_refused(folder: Path, tmp_path: Path):
    def copy(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    config = json.loads((folder / "config.json").read_text())
    changes = {
        "type": ({"model_type": "gpt2"}, "type 'gpt2'"),
        "scaled": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        "more": ({"num_hidden_layers": 5}, "has no tensor model.layers.3"),
        "heads": ({"num_key_value_heads": 3}, "heads in groups"),
    }
    for name, (change, said) in changes.items():
        (copy(name) / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=said):
            open_checkpoint(tmp_path / name)
    (copy("cut") / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="is damaged"):
        open_checkpoint(tmp_path / "cut")
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a directory"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(30))
    with pytest.raises(ModelError, match=r"no whole GGUF file|Llama's architecture|do not say"):
        open_checkpoint(tmp_path / "torn.gguf")
