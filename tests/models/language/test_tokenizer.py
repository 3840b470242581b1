"""The real model's tokenizer and chat template, and directories'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from edgefm.models.errors import ModelError
from edgefm.models.language.decoder import Decoder
from edgefm.models.language.generate import Sampling, generate
from edgefm.models.language.tokenizer import TextTokenizer, tokenizer_of
from edgefm.models.language.weights import Checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def tokenizer(smollm2: Checkpoint) -> TextTokenizer:
    return tokenizer_of(smollm2)


def test_digits_are_tokens_of_their_own_and_text_comes_back(tokenizer: TextTokenizer):
    for text in ("In 2024, 135 birds sang.", "naïve – 東京\n\tend", " two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4


def test_the_chat_template_ends_where_the_assistant_answers(tokenizer: TextTokenizer):
    tokens = tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    control = {name: tokenizer.encode(name) for name in ("<|im_start|>", "<|im_end|>")}
    assert all(len(token) == 1 for token in control.values())
    assert tokens.count(control["<|im_start|>"][0]) == 3 and tokens.count(control["<|im_end|>"][0]) == 2
    assert tokenizer.ends == set(control["<|im_end|>"])


def test_separators_are_punctuation_and_white_space(tokenizer: TextTokenizer):
    for text, expected in ((".", True), (",", True), ("\n", True), ("\n\n", True), ("a", False), ("a.", False)):
        tokens = tokenizer.encode(text)
        assert tokenizer.separators[tokens].all().item() == expected, text
    assert 20 < tokenizer.separators.sum() < 1000


def test_the_real_model_answers(smollm2: Checkpoint, tokenizer: TextTokenizer):
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    answer = tokenizer.decode(list(generate(Decoder(smollm2), prompt, tokenizer.ends, Sampling(12))))
    assert "Paris" in answer


def test_a_directory_without_a_tokenizer_is_refused(folder: Path):
    with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_of(open_checkpoint(folder))


@pytest.mark.parametrize("missing", ["tokens", "merges", "token_type"])
def test_a_gguf_file_without_a_part_of_its_tokenizer_is_refused(folder: Path, missing: str):
    whole = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1],
    }
    checkpoint = open_checkpoint(folder)
    assert tokenizer_of(replace(checkpoint, metadata=whole)).encode("ab") == [2]
    del whole[f"tokenizer.ggml.{missing}"]
    with pytest.raises(ModelError, match=f"lacks its {missing}; give the model's directory"):
        tokenizer_of(replace(checkpoint, metadata=whole))


def test_of_several_chat_templates_the_default_one_is_taken(folder: Path, tokenizer: TextTokenizer, tmp_path: Path):
    tokenizer._tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    checkpoint = replace(open_checkpoint(folder), path=tmp_path)
    for templates, said in ((named, "hello!"), (named[:1], None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
        found = tokenizer_of(checkpoint)
        if said is None:
            with pytest.raises(ModelError, match="no chat template"):
                found.chat([{"role": "user", "content": "hello"}])
        else:
            assert found.decode(found.chat([{"role": "user", "content": "hello"}])) == said
