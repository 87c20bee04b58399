"""The experts' dropout: as many zeros as asked for, an unbiased rest, the same from the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mole.mixture.experts import dropout, dropout_mask
from mole.mixture.fused_adapters import ConcatenatedLinear


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_zeroes_a_share_p_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(1001, 1003, dtype=dtype), p, training=True)
    assert out.dtype == dtype
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=2e-3)
    assert out.double().mean().item() == pytest.approx(1, abs=2e-2)
    assert len(out.unique()) == 2


def test_dropout_is_drawn_anew_for_each_element_and_repeats_with_the_seed() -> None:
    x = torch.ones(64, 4096)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    for one, other in ((first, second), (first[:, :-1], first[:, 1:]), (first[:-1], first[1:])):
        assert ((one > 0) == (other > 0)).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_dropout_outside_training_or_at_zero_is_nothing() -> None:
    x = torch.randn(3, 5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_the_gradient_goes_through_what_was_kept() -> None:
    torch.manual_seed(2)
    x = torch.randn(7, 9, requires_grad=True)
    out = dropout(x, 0.25, training=True)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x, out)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("given", "computed"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_concatenated_product_is_that_of_each_weight(p: float, given: torch.dtype, computed: torch.dtype) -> None:
    """It keeps x in its own dtype and the mask, and computes the rest again for the backward pass."""
    torch.manual_seed(3)
    x = torch.randn(2, 5, 7).to(given).requires_grad_()
    weights = [torch.randn(n, 7, dtype=torch.promote_types(given, torch.float32)).requires_grad_() for n in (4, 4, 3)]
    mask, grad = dropout_mask(x, p), torch.randn(2, 5, 11, dtype=computed)
    outputs = []
    for fused in (True, False):
        if fused:
            product = ConcatenatedLinear.apply(x, mask, computed, *weights)
        else:
            rows = x.to(computed) if mask is None else x.to(computed) * mask.kept.to(computed) * mask.scale
            product = torch.cat([F.linear(rows, weight.to(computed)) for weight in weights], -1)
        outputs.append([product, *torch.autograd.grad(product, [x, *weights], grad)])
    for ours, slow in zip(*outputs, strict=True):
        assert ours.dtype == slow.dtype
        tolerance = 1e-12 if given == torch.float64 else 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, slow, rtol=tolerance, atol=tolerance)


def test_the_concatenated_product_can_be_differentiated_twice() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, dtype=torch.float64)
    mask = dropout_mask(x, 0.4)
    apply = lambda x, weight: ConcatenatedLinear.apply(x, mask, torch.float64, weight, 2 * weight)  # noqa: E731
    assert torch.autograd.gradcheck(apply, (x, weight.requires_grad_()))
    assert torch.autograd.gradgradcheck(apply, (x, weight))
