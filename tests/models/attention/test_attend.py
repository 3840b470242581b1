"""Fused attention against the equations in float64, and what attention must never do."""

from __future__ import annotations

import logging

import pytest
import torch
from edgefm.models import native
from edgefm.models.attention import api, cpu, reference
from edgefm.models.attention.api import attend, choose, fused
from edgefm.models.attention.pattern import Form, Pattern
from edgefm.models.errors import ConfigError

pytestmark = pytest.mark.usefixtures("kernels")

FORMS: tuple[Form, ...] = ("softmax", "sa", "sa_normalised")
PATTERNS = (Pattern(), Pattern(3, 20), Pattern(0, 7), Pattern(4, 64))
SHAPES = ((2, 4, 2, 70, 70, 32), (1, 3, 3, 1, 5, 16), (1, 2, 1, 130, 200, 64), (2, 2, 2, 65, 129, 48))


def made(shape, dtype=torch.float64, seed=0):
    batch, heads, key_heads, queries, keys, dim = shape
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, h, t, dim, dtype=torch.float64, generator=random).to(dtype)
        for h, t in ((heads, queries), (key_heads, keys), (key_heads, keys))
    )
    separators = torch.rand(batch, keys, generator=random) < 0.2
    visible = torch.rand(batch, keys, generator=random) < 0.9
    return q, k, v, separators, visible


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("separated", "padded"), [(False, False), (True, False), (True, True)])
def test_the_kernels_compute_the_equations_and_their_gradients(shape, pattern, form, separated, padded):
    q, k, v, separators, visible = made(shape)
    separators, visible = separators if separated else None, visible if padded else None
    exact = [x.requires_grad_() for x in (q, k, v)]
    expected = reference.attend(*exact, pattern, form, separators, visible)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, exact, grad)

    single = [x.detach().float().requires_grad_() for x in exact]
    found = fused("c++", *single, pattern, form, separators, visible, shape[-1] ** -0.5)
    grads = torch.autograd.grad(found, single, grad.float())

    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_reference_s_gradients_are_those_of_its_values(pattern: Pattern, form: Form):
    q, k, v, separators, visible = made((1, 2, 1, 6, 9, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: reference.attend(*x, pattern, form, separators, visible),  # pyright: ignore[reportCallIssue]
        inputs,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_future_token_changes_nothing_bit_for_bit(pattern: Pattern, form: Form):
    q, k, v, separators, _ = made((1, 4, 2, 150, 150, 32), torch.float32)
    before = fused("c++", q, k, v, pattern, form, separators, None, 0.2)
    for x in (q, k, v):
        x[:, :, 100:] = torch.randn_like(x[:, :, 100:]) * 9
    separators[:, 100:] = ~separators[:, 100:]
    after = fused("c++", q, k, v, pattern, form, separators, None, 0.2)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_prefill_in_one_call_equals_queries_that_come_in_parts(pattern: Pattern, form: Form):
    q, k, v, separators, _ = made((2, 4, 2, 90, 90, 32), torch.float32)
    whole = attend(q, k, v, pattern, form, separators)
    parts = [
        attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], pattern, form, separators[:, :b])
        for a, b in ((0, 40), (40, 73), (73, 74), (74, 75), (75, 90))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_sees_nothing_gets_nothing(form: Form):
    q, k, v, _, _ = made((1, 2, 1, 5, 5, 16), torch.float32)
    visible = torch.tensor([[False, False, True, True, True]])
    q.requires_grad_()
    for found in (
        fused("c++", q, k, v, Pattern(), form, None, visible, 0.25),
        reference.attend(q, k, v, Pattern(), form, None, visible),
    ):
        assert torch.equal(found[:, :, :2], torch.zeros(1, 2, 2, 16))
        (grad,) = torch.autograd.grad(found.sum(), q)
        assert torch.isfinite(grad).all() and torch.equal(grad[:, :, :2], torch.zeros(1, 2, 2, 16))


def test_self_adjust_softmax_s_gradient_goes_to_one_with_the_weight():
    """d(x p)/dx = p + x p (1 - p), arXiv 2502.18277: softmax's own, p (1 - p), vanishes there."""
    for top in (0.5, 3.0, 20.0):
        x = torch.tensor([top, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
        y = reference.weights(x, torch.ones(3, dtype=torch.bool), "sa")
        p = torch.softmax(x.detach(), dim=0)[0]
        (grad,) = torch.autograd.grad(y[0], x)
        assert grad[0].item() == pytest.approx((p + top * p * (1 - p)).item())
    assert grad[0].item() == pytest.approx(1, abs=1e-6)


def test_normalised_weights_lie_between_nothing_and_softmax_s():
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 4
    seen = torch.rand(50, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[:, 0] = True
    p, normalised = (reference.weights(x, seen, form) for form in ("softmax", "sa_normalised"))
    assert (normalised >= 0).all() and (normalised <= p + 1e-7).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_one_sign_and_the_first_row(form: Form, sign: float):
    """The first row sees itself alone; where its score is negative the normalised form leaves nothing of it."""
    q = sign * torch.ones(1, 1, 40, 16)
    k, v = torch.rand(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)) + 0.1, torch.ones(1, 1, 40, 16)
    found = fused("c++", q, k, v, Pattern(), form, None, None, 0.25)
    torch.testing.assert_close(found, reference.attend(q, k, v, Pattern(), form), atol=1e-5, rtol=1e-5)
    first = {"softmax": 1.0, "sa": float(q[0, 0, 0] @ k[0, 0, 0] * 0.25), "sa_normalised": float(sign > 0)}[form]
    assert found[0, 0, 0, 0].item() == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_keeps_its_dtype_and_the_scores_their_range(form: Form, dtype: torch.dtype):
    """Scores of some 4e4 and differences that float16 cannot hold: computed in float32 inside."""
    q, k, v, _, _ = made((1, 2, 1, 33, 33, 32), torch.float32)
    q, k, v = (20 * q).to(dtype).requires_grad_(), (20 * k).to(dtype), v.to(dtype)
    found = attend(q, k, v, form=form, visible=torch.ones(1, 33, dtype=torch.bool))
    exact = reference.attend(*(x.double() for x in (q, k, v)), Pattern(), form)
    assert found.dtype == dtype and torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(found.float().sum(), q)
    assert grad.dtype == dtype and torch.isfinite(grad).all()


def test_what_runs_is_chosen_by_shape_and_told_once(caplog: pytest.LogCaptureFixture):
    q, k, v, separators, visible = made((1, 2, 1, 40, 40, 32), torch.float32)
    assert choose(q, Pattern(), "softmax", 40).name == "sdpa"
    assert choose(q, Pattern(4, 100), "softmax", 40).name == "sdpa"  # the window holds everything
    assert choose(q, Pattern(4, 8), "softmax", 40, separators).name == "c++"
    assert choose(q, Pattern(), "softmax", 40, visible=visible).name == "c++"
    assert choose(q, Pattern(), "sa", 40).name == "c++"
    assert choose(q[:, :, :1], Pattern(), "sa", 40).name == "row"
    assert choose(q.double(), Pattern(), "sa", 40).name == "reference"
    assert choose(q[..., :24], Pattern(), "sa", 40).why == "the head size 24 is no multiple of 16"
    api.tell.cache_clear()
    with caplog.at_level(logging.INFO, "edgefm.models.attention"):
        for _ in range(2):
            attend(q, k, v, form="sa")
            attend(q.double(), k.double(), v.double(), form="sa")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in told] == ["INFO", "WARNING"]
    assert "implementation=c++ form=sa" in told[0][1] and "float64" in told[1][1]


def test_without_a_compiler_the_equations_run_and_say_what_to_install(
    monkeypatch, tmp_path, caplog: pytest.LogCaptureFixture
):
    q, k, v, separators, _ = made((1, 4, 2, 40, 40, 32), torch.float32)
    expected = attend(q, k, v, Pattern(2, 6), "sa", separators)
    monkeypatch.setenv("EDGEFM_CACHE", str(tmp_path))
    for compiler, path, said in (
        ("", "", "there is no C++ compiler"),
        ("false", "/usr/bin:/bin", "the C++ compiler failed"),
    ):
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("PATH", path)
        for function in (cpu.library, native.missing, api.tell):
            function.cache_clear()
        with caplog.at_level(logging.WARNING, "edgefm.models.attention"):
            found = attend(q, k, v, Pattern(2, 6), "sa", separators)
        assert said in caplog.records[-1].getMessage()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not list(tmp_path.glob("*.so"))
    for function in (cpu.library, native.missing):
        function.cache_clear()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda q, k, v: (q[0], k, v), "wants q"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "wants q"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "do not fit"),
        (lambda q, k, v: (q[..., :16], k, v), "do not fit"),
        (lambda q, k, v: (q[:, :3], k, v), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(broken, said: str):
    q, k, v, separators, _ = made((1, 4, 2, 40, 40, 32), torch.float32)
    with pytest.raises(ConfigError, match=said):
        attend(*broken(q, k, v))
    with pytest.raises(ConfigError, match="separators must be bool"):
        attend(q, k, v, Pattern(1, 2), separators=separators.float())
    with pytest.raises(ConfigError, match="a query sees itself"):
        Pattern(1, 0)
