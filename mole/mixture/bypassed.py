"""Projections whose adapter would not be exact: the base model reads or changes their weights without calling them."""

from __future__ import annotations

from torch import nn

STATE_SPACE = ("x_proj", "dt_proj", "out_proj")
"""Projections of Mamba's mixers. `dt_proj` is not called, and in training fused kernels read the others' weights."""
RESCALED = {"RwkvSelfAttention": "output", "RwkvFeedForward": "value"}
"""Projections by their parent's class. RWKV divides their weights by powers of 2 in evaluation mode."""
OTHER_OUTPUT = ("Router", "GroupedLinear", "DecoupledLinear")
"""Ends of the names of subclasses of `nn.Linear` that return something else than their product with the weights."""


def bypassed_projections(model: nn.Module) -> dict[str, str]:
    """Full names of the linear layers that get no adapter in training, with the reason."""
    found: dict[str, str] = {}
    for prefix, parent in model.named_modules():
        state_space = {"A_log", "D"} <= parent._parameters.keys()
        for name, child in parent.named_children():
            reason = ""
            if state_space and name in STATE_SPACE:
                reason = "a state-space model reads its weights without calling it"
            elif RESCALED.get(type(parent).__name__) == name:
                reason = "RWKV rescales its weights in evaluation mode"
            elif isinstance(child, nn.Linear) and type(child).__name__.endswith(OTHER_OUTPUT):
                reason = f"a {type(child).__name__} returns something else than a linear layer"
            if reason:
                found[f"{prefix}.{name}" if prefix else name] = reason
    return found
