"""Where only a token's own experts are computed, the numbers are those of computing all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from mole import MoleConfig
from mole.mixture import fused_adapters, grouped

WIDTH, EXPERTS, RANK = 16, 128, 8


class Attention(nn.Module):
    """Three projections of one input, and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.o_proj = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(x)], -1)


def adapted(router: str = "topk", **settings: Any) -> Any:
    """A model of 128 experts of rank 8 on each projection, two of them for a token, with weights that all matter."""
    torch.manual_seed(0)
    values = {"num_experts": EXPERTS, "r": RANK, "lora_dropout": 0.0, **settings}
    model = inject_adapter_in_model(MoleConfig(router=router, target_modules=r".*_proj", **values), Attention())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mole_studio_" in name:
                weight.normal_(std=0.3)
    return model


def outcome(model: Any, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(1)  # of the dropout
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [weight for name, weight in model.named_parameters() if "mole_studio_" in name]
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * target).sum(), [x, *trained])]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[grouped.TokenGroups]:
    """The groups that were computed."""
    made: list[grouped.TokenGroups] = []

    def noted(weights: Tensor, max_active: int) -> grouped.TokenGroups:
        made.append(grouped.group_tokens(weights, max_active))
        return made[-1]

    monkeypatch.setattr(fused_adapters, "group_tokens", noted)
    return made


@pytest.fixture
def all_experts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it lets all experts be computed from then on."""
    return lambda: monkeypatch.setattr(fused_adapters, "grouped_is_faster", lambda *given: False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens", [(2, 37), (1, 1), (5,)], ids=str)
def test_outputs_and_gradients_are_those_of_all_experts(
    dtype: torch.dtype,
    tolerance: float,
    tokens: tuple[int, ...],
    groups: list[grouped.TokenGroups],
    all_experts: Callable[[], None],
) -> None:
    model, x = adapted().to(dtype), torch.randn(*tokens, WIDTH).to(dtype)
    found = outcome(model, x)
    assert len(groups) == 4, "every projection had its own experts computed, and no other"
    all_experts()
    for one, other in zip(found, outcome(model, x), strict=True):
        scale = other.float().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=tolerance * max(scale, 1))
    assert len(groups) == 4


def test_the_update_is_the_sum_over_the_chosen_experts(groups: list[grouped.TokenGroups]) -> None:
    model, x = adapted(), torch.randn(7, WIDTH)
    layer = model.o_proj
    with torch.no_grad():
        found = layer(x) - layer.base_layer(x)
        weights = layer.routers["default"](x).weights.double()
        down = layer.down("default").double().view(EXPERTS, RANK, -1)
        up = layer.up("default").double().view(-1, EXPERTS, RANK)
        for token, own in enumerate(weights):
            assert (own > 0).sum() == 2
            update = sum(own[i] * (up[:, i] @ (down[i] @ x[token].double())) for i in range(EXPERTS) if own[i] > 0)
            torch.testing.assert_close(found[token].double(), layer.scaling["default"] * update, rtol=1e-5, atol=1e-5)
    assert len(groups) == 1


def test_when_all_tokens_choose_the_same_experts(
    groups: list[grouped.TokenGroups], all_experts: Callable[[], None]
) -> None:
    model, x = adapted(), torch.randn(1, WIDTH).expand(50, -1).contiguous()
    found = outcome(model, x)
    assert groups[0].ends.unique().numel() == 3, "before the first, between, and after the second"
    all_experts()
    for one, other in zip(found, outcome(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_draws_the_same(groups: list[grouped.TokenGroups], all_experts: Callable[[], None]) -> None:
    model, x = adapted(lora_dropout=0.3).train(), torch.randn(9, WIDTH)
    found = outcome(model, x)
    assert groups
    all_experts()
    for one, other in zip(found, outcome(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_with_muted_experts(groups: list[grouped.TokenGroups], all_experts: Callable[[], None]) -> None:
    model, x = adapted(), torch.randn(9, WIDTH)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(model, name).routers["default"].allowed = torch.tensor([3])
    found = outcome(model, x)
    assert groups
    all_experts()
    for one, other in zip(found, outcome(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"router": "dynmole"},
        {"num_experts": 16},
        {"num_experts": 64},
        {"top_k": 16},
        {"r": 5, "num_experts": 256},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_all_are_computed_where_that_is_better_or_there_is_no_other_way(
    given: dict[str, Any], groups: list[grouped.TokenGroups]
) -> None:
    dtype = given.pop("dtype", torch.float32)  # five tokens: 64 experts are still better computed all
    adapted(**given).to(dtype)(torch.randn(5, WIDTH, dtype=dtype))
    assert not groups
