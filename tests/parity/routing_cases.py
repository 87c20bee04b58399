"""The settings every router is tried with, and how it is held against the slow formulas of `reference.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import reference
import torch
from hypothesis import strategies as st
from torch import nn

from mole.config import RouterParams
from mole.mixture.routers import Router, Routing, build_router

INPUTS = 16
COUNTS = [1, 2, 3, 8, 64]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("dense", {}),
    *[("topk", {"top_k": k}) for k in (1, 2, 5)],
    *[("topk", {"top_k": k, "renormalize": k == 1}) for k in (1, 2)],
    *[("topp", {"top_p": p}) for p in (1e-6, 0.5, 0.8, 1.0)],
    *[("threshold", {"threshold": t}) for t in (0.0, 0.05, 0.125, 0.4, 1.0)],
    *[("adamole", {"max_threshold": t}) for t in (None, 0.02, 0.3, 1.0)],
    ("dynmole", {}),
    *[("dynmole", {"entropy_index": q}) for q in (0.3, 0.9, 1.0, 1.5, 2.0)],
    *[("dynmole", {"entropy_type": "renyi", "entropy_index": q}) for q in (0.3, 1.0, 1.1, 2.0)],
    *[("dynmole", {"entropy_threshold": t}) for t in (0.0, 0.5, 1.0, 3.0)],
    *[
        ("dynmole", {"entropy_threshold": 0.5, "inclusive_top_p": i, "top_p": p})
        for i in (0, 1)
        for p in (0.3, 0.75, 1.0)
    ],
    *[("dynmole", {"entropy_threshold": 0.7, "keep_top_k": k}) for k in (1, 3, 99)],
    ("sparsegen", {}),
    ("sparsegen", {"lambda_hidden": 3}),
    ("sparsegen", {"lambda_activation": "relu"}),
]
IDS: Any = {"ids": lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))}
"""How a case is named, for `parametrize`."""


def settings_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """One of a router's settings in `CASES`, for properties: a test is parametrised by router, so each of them runs."""
    return st.sampled_from([params for router, params in CASES if router == name])


def make(
    name: str, experts: int, *, gate: float = 2.0, seed: int = 0, inputs: int = INPUTS, **params: Any
) -> Router[Any]:
    """A float64 router with random weights; `gate` is the spread of its logits for unit-variance inputs."""
    torch.manual_seed(seed)
    flags = {key: bool(value) if key == "inclusive_top_p" else value for key, value in params.items()}
    router = build_router(name, inputs, 1 if name == "lora" else experts, **flags).double()
    with torch.no_grad():
        for key, weight in router.named_parameters():
            weight.normal_(std=(gate if key.startswith("gate") else 1.0) * inputs**-0.5)
    return router


def zero(linear: nn.Linear) -> nn.Linear:
    """The linear layer, its weight and its bias, if it has one, set to 0. To be called without gradients."""
    for weight in linear.parameters():
        weight.zero_()
    return linear


def random_inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_settings(params: RouterParams) -> dict[str, Any]:
    """The settings that matter for the rule itself: not those of the losses, not the width of a network."""
    other = ("balance_on_margin", "lambda_hidden", "sparsity_k")
    return {k: v for k, v in dataclasses.asdict(params).items() if not k.endswith("_coef") and k not in other}


def expected(router: Router[Any], x: torch.Tensor) -> Routing:
    """What `reference.py` says for inputs `(…, in)`, token by token."""
    weights = {key: value.tolist() for key, value in router.state_dict().items()}
    rule = reference.ROUTERS[router.params.name]
    tokens = [rule(row, weights, **own_settings(router.params)) for row in x.reshape(-1, x.shape[-1]).tolist()]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)]
    return Routing(*(column.reshape(*x.shape[:-1], *column.shape[1:]) for column in columns), logits=torch.empty(0))


def hold_against_reference(router: Router[Any], x: torch.Tensor) -> Routing:
    got, want = router(x), expected(router, x)
    for part in ("weights", "probs", "entropy"):
        actual, should = getattr(got, part), getattr(want, part)
        assert actual.shape == should.shape, part
        torch.testing.assert_close(actual, should, rtol=0, atol=1e-12, msg=lambda text, part=part: f"{part}: {text}")
    return got


def from_probs(name: str, probs: list[float], **params: Any) -> Routing:
    """The routing of a single token whose router probabilities are as given."""
    router = make(name, len(probs), inputs=len(probs), **params)
    with torch.no_grad():
        zero(router.gate).weight.copy_(torch.diag(torch.tensor(probs, dtype=torch.float64).log()))
    return router(torch.ones(1, len(probs), dtype=torch.float64))
