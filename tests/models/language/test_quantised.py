"""Blocks of few bits: read as the gguf package reads them, multiplied as what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edgefm.models.language.quantised import from_gguf, joined, quantised
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(70, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_s_blocks_are_unpacked_and_multiplied_as_its_own_package_does(weight: torch.Tensor, kind: str):
    raw = quantize(weight.numpy(), GGMLQuantizationType[kind])
    expected = torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))
    found = from_gguf(raw, kind)
    assert found is not None and found.shape == (70, 96)
    torch.testing.assert_close(found.dense(), expected, atol=1e-6, rtol=1e-6)
    for rows in (1, 4, 7, 40):  # the kernel's product, in groups and one by one, and the unpacked one
        x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(found(x), x @ expected.T, atol=1e-4, rtol=1e-4)
    some = torch.tensor([5, 69, 0])
    torch.testing.assert_close(found.rows(some).dense(), expected[some], atol=1e-6, rtol=1e-6)


def test_eight_bits_are_within_half_a_step_and_nothing_stays_nothing(weight: torch.Tensor):
    weight[3] = 0
    found = quantised(weight)
    step = weight.view(70, 3, 32).abs().amax(dim=-1) / 127
    apart = (found.dense() - weight).view(70, 3, 32).abs().amax(dim=-1)
    assert (apart <= 0.5001 * step + 1e-12).all() and not found.dense()[3].any()


def test_matrices_of_one_kind_are_joined(weight: torch.Tensor):
    raw = quantize(weight.numpy(), GGMLQuantizationType.Q4_1)
    four, eight = from_gguf(raw, "Q4_1"), quantised(weight)
    assert four is not None and joined([four, eight]) is None
    both = joined([four, four])
    assert both is not None and torch.equal(both.dense(), torch.cat([four.dense()] * 2))
    assert from_gguf(np.zeros((2, 3), np.uint8), "Q6_K") is None
