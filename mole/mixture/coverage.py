"""How much of a base model an adapter covers: the experts of many mixture-of-experts bases are no linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from mole.mixture.layer import PREFIX, MoleLinear


def uncovered_experts(model: nn.Module) -> dict[str, int]:
    """The weights of a base model's experts that are 3-D parameters, which get no adapter: full names and sizes."""
    return {
        f"{name}.{own}": weight.numel()
        for name, module in model.named_modules()
        if "Experts" in type(module).__name__ or name.endswith("experts")
        for own, weight in module._parameters.items()
        if weight is not None and weight.dim() > 2
    }


def covered_share(model: Any, adapter_name: str) -> float:
    """The share of a base model's weights, without embeddings and output layer, that an adapter's projections have."""
    layers = [module for module in model.modules() if isinstance(module, MoleLinear)]
    covered = sum(layer.in_features * layer.out_features for layer in layers if adapter_name in layer.routers)
    ends = [
        getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, name)
    ]
    left_out = {id(weight) for module in ends if module is not None for weight in module.parameters()}
    left_out |= {id(weight) for layer in layers for weight in layer.get_base_layer().parameters()}
    weights = ((name, weight) for name, weight in model.named_parameters() if PREFIX not in name)
    others = sum(weight.numel() for _, weight in weights if id(weight) not in left_out)
    every = sum(layer.in_features * layer.out_features for layer in layers)
    return covered / (every + others)


def coverage_notice(model: Any, adapter_name: str) -> str | None:
    """One line that says what share an adapter covers, where experts of the base model get none; else None."""
    experts = uncovered_experts(model)
    if not experts:
        return None
    names = ", ".join(sorted({name.rpartition(".")[2] for name in experts}))
    return (
        f"The adapter covers {covered_share(model, adapter_name):.0%} of the base model's weights (without embeddings "
        f"and output layer): its experts ({names}) are 3-D parameters, which get no adapter."
    )
