"""The experts' dropout: as many zeros as asked for, an unbiased rest, the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from mole.mixture.experts import dropout


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
