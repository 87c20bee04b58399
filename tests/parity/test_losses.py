"""The auxiliary losses against the slow formulas of `reference.py`, padding left out of every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from mole.mixture import losses
from mole.mixture.routers import Router, Routing, build_router, sparsegen

LAYERS, TOKENS, EXPERTS = 3, 11, 4
SPARSITY_K = 1
MASKS = {
    "no padding": torch.ones(TOKENS, dtype=torch.bool),
    "right padding": torch.arange(TOKENS) < 7,
    "left padding": torch.arange(TOKENS) >= 4,
    "two rows of a batch": torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0], dtype=torch.bool),
    "one token": torch.arange(TOKENS) == 5,
    "all padding": torch.zeros(TOKENS, dtype=torch.bool),
}
SLOW: dict[str, Callable[..., float]] = {
    "balance": lambda used, probs, entropy, logits, mask: reference.balance_loss(probs, used, mask),
    "entropy": lambda used, probs, entropy, logits, mask: reference.entropy_loss(entropy, mask),
    "z": lambda used, probs, entropy, logits, mask: reference.z_loss(logits, mask),
    "cv": lambda used, probs, entropy, logits, mask: reference.cv_loss(used, mask),
    "sparsity": lambda used, probs, entropy, logits, mask: reference.sparsity_loss(logits, entropy, SPARSITY_K, mask),
}


def router_with(loss: str, experts: int) -> Router[Any]:
    """A router that has one auxiliary loss, with coefficient 1, and balances its weights."""
    coefficients = {f"{name}_loss_coef": float(name == loss) for name in ("balance", "entropy", "z")}
    if loss == "cv":
        return build_router("dense", 8, experts, balance_loss_coef=0.0, cv_loss_coef=1.0)
    if loss == "sparsity":
        return build_router("sparsegen", 8, experts, sparsity_loss_coef=1.0, sparsity_k=SPARSITY_K)
    return build_router("dynmole", 8, experts, **coefficients)


def loss_of(loss: str, used: Tensor, probs: Tensor, entropy: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    """The loss of routings `(L, N, …)`, from sums over the tokens that are not padding, as in training → `(L,)`.

    The sparsity λ, a number below 1 like the entropy, is the same tensor.
    """
    router = router_with(loss, probs.shape[-1])
    columns = losses.token_columns(router, Routing(used, probs, entropy, logits, sparsity=entropy))
    return losses.projection_losses(router, losses.masked_sum(columns.movedim(1, 0), mask))


def some_routing(seed: int = 0, experts: int = EXPERTS, spread: float = 2.0) -> list[Tensor]:
    """Used, probs, entropy and logits of `(L, N, …)`, in float64."""
    torch.manual_seed(seed)
    logits = spread * torch.randn(LAYERS, TOKENS, experts, dtype=torch.float64)
    probs = logits.softmax(-1)
    used = (probs > 1 / experts).double() * torch.rand_like(probs)
    return [used, probs, torch.rand(LAYERS, TOKENS, dtype=torch.float64), logits]


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("loss", SLOW)
def test_a_loss_equals_the_reference(loss: str, mask: Tensor, experts: int) -> None:
    tensors = some_routing(experts=experts)
    got = loss_of(loss, *tensors, mask)
    assert got.shape == (LAYERS,)
    want = SLOW[loss](*(tensor.tolist() for tensor in tensors), mask.tolist())
    assert got.mean().item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("loss", SLOW)
def test_a_single_expert_has_no_loss(loss: str) -> None:
    assert not losses.has_losses(router_with(loss, 1)) and losses.has_losses(router_with(loss, 2))
    assert not loss_of(loss, *some_routing(experts=1), None).any()


@pytest.mark.parametrize("loss", SLOW)
def test_no_mask_means_that_every_token_counts(loss: str) -> None:
    tensors = some_routing()
    torch.testing.assert_close(loss_of(loss, *tensors, None), loss_of(loss, *tensors, MASKS["no padding"]))


@pytest.mark.parametrize("loss", SLOW)
def test_what_stands_in_padding_changes_neither_loss_nor_gradient(loss: str) -> None:
    mask, results = MASKS["two rows of a batch"], []
    for noise in (0.0, 50.0):
        tensors = [t + noise * torch.randn_like(t) * ~mask.view(1, -1, *[1] * (t.dim() - 2)) for t in some_routing()]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        value = loss_of(loss, *tensors, mask).sum()
        value.backward()
        gradients = [t.grad for t in tensors if t.grad is not None]
        assert gradients and all((gradient[:, ~mask] == 0).all() for gradient in gradients)
        results.append((value.detach(), *(gradient[:, mask] for gradient in gradients)))
    for quiet, noisy in zip(*results, strict=True):
        torch.testing.assert_close(noisy, quiet)


@pytest.mark.parametrize("loss", SLOW)
def test_a_batch_of_padding_alone_has_no_loss_and_a_finite_gradient(loss: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in some_routing()]
    value = loss_of(loss, *tensors, MASKS["all padding"]).sum()
    value.backward()
    assert value.item() == 0
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors if tensor.grad is not None)


@pytest.mark.parametrize("mask", [MASKS["two rows of a batch"], MASKS["no padding"]], ids=["padding", "none"])
@pytest.mark.parametrize("loss", SLOW)
def test_gradients_of_a_loss(loss: str, mask: Tensor) -> None:
    tensors = [tensor.requires_grad_() for tensor in some_routing()]
    if loss == "sparsity":
        tensors[3].requires_grad_(False)  # this loss moves λ only
    assert torch.autograd.gradcheck(lambda *t: loss_of(loss, *t, mask), tensors)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_where_the_sparsity_loss_is_0_at_most_k_experts_are_used(k: int) -> None:
    """And where it is not, more are: the loss is 0 exactly from the λ on at which the support shrinks to k."""
    logits = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sparsity = torch.linspace(-4, 0.98, 4000, dtype=torch.float64)
    used = sparsegen.support(logits, 1 - sparsity[:, None]).sum(-1)
    values = losses.sparsity_values(logits, sparsity, k)
    assert torch.equal(values == 0, used <= k) and 100 < (values == 0).sum() < 3900
    assert not losses.sparsity_values(logits, sparsity, 6).any(), "no more than all can be used"


def test_the_sparsity_loss_moves_the_network_of_lambda_and_not_the_gate() -> None:
    router = build_router("sparsegen", 8, EXPERTS, sparsity_loss_coef=1.0).double()
    routing = router(torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    losses.sparsity_values(routing.logits, routing.sparsity, 2).mean().backward()
    assert router.gate.weight.grad is None
    assert all((linear.weight.grad != 0).any() for linear in (router.lambda_in, router.lambda_out))


def test_balance_is_1_when_even_and_e_when_everything_goes_to_one_expert() -> None:
    even, one = torch.full((EXPERTS,), 1 / EXPERTS), torch.eye(EXPERTS)[0]
    assert losses.balance_loss(even, even).item() == pytest.approx(1)
    assert losses.balance_loss(one, one).item() == pytest.approx(EXPERTS)


def test_the_variation_of_even_weights_is_0_and_that_of_a_single_expert_is_e_minus_1() -> None:
    even, one = torch.full((EXPERTS,), 1 / EXPERTS), torch.eye(EXPERTS)[0]
    assert losses.cv_loss(even).item() == pytest.approx(0)
    assert losses.cv_loss(one).item() == pytest.approx(EXPERTS - 1)


# ---------------------------------------------------------------------------------------------------------
# What each router feeds them


def routed(name: str, **params: Any) -> tuple[Any, Routing, Tensor]:
    torch.manual_seed(0)
    router = build_router(name, 8, EXPERTS, **params).double()
    with torch.no_grad():
        router.gate.weight.normal_()
    x = torch.randn(TOKENS, 8, dtype=torch.float64)
    return router, router(x), x


def mixture_loss(routers: list[Any], routings: list[Routing], mask: Tensor | None = None) -> Tensor:
    """The loss of these routings, from their sums over the tokens that count."""
    flat = None if mask is None else mask.reshape(-1)
    values = [losses.token_columns(*pair).flatten(0, -2) for pair in zip(routers, routings, strict=True)]
    return losses.mixture_loss(routers, [losses.masked_sum(own, flat) for own in values])


@pytest.mark.parametrize("name", ["topk", "topp", "threshold", "adamole"])
def test_a_selecting_router_balances_the_share_of_tokens_that_use_an_expert(name: str) -> None:
    router, routing, _ = routed(name)
    selected = (routing.weights > 0).double()
    got = mixture_loss([router], [routing]).item()
    want = reference.balance_loss([routing.probs.tolist()], [selected.tolist()], [True] * TOKENS)
    assert got == pytest.approx(1e-3 * want, rel=1e-12)


def test_dynmole_balances_its_soft_weights_and_adds_the_mean_entropy() -> None:
    router, routing, _ = routed("dynmole", entropy_threshold=0.7)
    balance = reference.balance_loss([routing.probs.tolist()], [routing.weights.tolist()], [True] * TOKENS)
    entropy = reference.entropy_loss([routing.entropy.tolist()], [True] * TOKENS)
    got = mixture_loss([router], [routing]).item()
    assert got == pytest.approx(1e-3 * balance + 1e-2 * entropy, rel=1e-12)


def test_adamole_can_balance_the_margin_instead_of_the_probability() -> None:
    router, routing, x = routed("adamole", balance_on_margin=True)
    tau = torch.sigmoid(x @ router.threshold.weight.T + router.threshold.bias) / EXPERTS
    selected = (routing.probs >= tau).double()
    want = reference.balance_loss([(routing.probs - tau).tolist()], [selected.tolist()], [True] * TOKENS)
    assert mixture_loss([router], [routing]).item() == pytest.approx(1e-3 * want, rel=1e-12)


def test_every_coefficient_counts_and_they_add_up() -> None:
    coefficients = {"balance_loss_coef": 0.5, "entropy_loss_coef": 0.25, "z_loss_coef": 2.0, "cv_loss_coef": 3.0}
    router, routing, _ = routed("dense", **coefficients)
    mask = MASKS["two rows of a batch"]
    p, w, real = [routing.probs.tolist()], [routing.weights.tolist()], mask.tolist()
    want = (
        0.5 * reference.balance_loss(p, [[[1.0] * EXPERTS] * TOKENS], real)
        + 0.25 * reference.entropy_loss([routing.entropy.tolist()], real)
        + 2.0 * reference.z_loss([routing.logits.tolist()], real)
        + 3.0 * reference.cv_loss(w, real)
    )
    assert mixture_loss([router], [routing], mask).item() == pytest.approx(want, rel=1e-12)


def test_projections_of_different_expert_counts_and_methods_count_once_each() -> None:
    torch.manual_seed(0)
    built = [build_router(*args) for args in (("topk", 8, 2), ("topk", 8, 4), ("dynmole", 8, 4), ("topk", 8, 4))]
    routers = [router.double() for router in built]
    routings = [router(torch.randn(2, 5, 8, dtype=torch.float64)) for router in routers]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    each = [mixture_loss([r], [x], mask) for r, x in zip(routers, routings, strict=True)]
    torch.testing.assert_close(mixture_loss(routers, routings, mask), torch.stack(each).mean())
