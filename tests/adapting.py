"""What tests of adapted models share: tokens, an adapter whose weights all matter, and ways to look at the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from mole import MoleConfig
from mole.config import ROUTERS
from mole.core.errors import ConfigError
from mole.mixture.model import MoleModel

ROUTED = [name for name in ROUTERS if name != "lora"]
"""The methods that have a router."""
MAY_SUM_TO_LESS = ("dynmole",)
"""Methods that do not renormalise: with them, a token's weights may sum to less than 1; with all others to 1."""
MAY_SELECT_NONE = ("threshold", "adamole")
"""Methods that may select no expert, if their threshold is above 1 / E; then all weights are 0."""
TOKENS = torch.randint(5, 300, (3, 8), generator=torch.Generator().manual_seed(0))


def settings(router: str = "dynmole", **values: Any) -> Any:
    """A small `MoleConfig`: 4 experts of rank 2, scale 1, no dropout."""
    values = {"num_experts": 4, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0, **values}
    return MoleConfig(router=router, task_type="CAUSAL_LM", **values)


def refused(model: Any, line: str, **values: Any) -> None:
    """Assert that these settings are refused for a model, in one line that matches a pattern."""
    with pytest.raises(ConfigError, match=line) as error:
        get_peft_model(model, settings(**values))
    assert "\n" not in str(error.value)


def adapt(model: Any, router: str = "dynmole", seed: int = 0, **values: Any) -> Any:
    """The model, in eval mode, with an adapter whose every weight is random and large enough to matter."""
    model = get_peft_model(model, settings(router, **values))
    shake(model, seed)
    return model.eval()


def shake(model: Any, seed: int = 0, adapter: str = "default") -> None:
    """Give every weight of an adapter a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mole_studio_" in name and f".{adapter}." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def layers_of(model: Any) -> list[Any]:
    """The adapted projections."""
    return [module for module in model.modules() if isinstance(module, MoleModel.tuner_layer_cls)]


def logits(model: Any, tokens: Tensor = TOKENS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **inputs).logits


def padded(side: str, extra: int = 3) -> dict[str, Tensor]:
    """Rows of 8, 6 and 3 tokens, padded on a side to 8 + `extra`, with the mask and the positions that follow."""
    rows, masks = [], []
    for row, length in zip(TOKENS, (8, 6, 3), strict=True):
        pad = torch.zeros(8 + extra - length, dtype=torch.long)
        tokens, ones = row[:length], torch.ones(length, dtype=torch.long)
        rows.append(torch.cat([pad, tokens] if side == "left" else [tokens, pad]))
        masks.append(torch.cat([pad, ones] if side == "left" else [ones, pad]))
    mask = torch.stack(masks)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": torch.stack(rows), "attention_mask": mask, "position_ids": positions}
