"""What PEFT's tests get as `LoraConfig`: a `MoleConfig` of the router whose turn it is, which takes LoRA's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from peft import LoraConfig

from mole import MoleConfig
from mole.mixture.layer import MoleLinear
from mole.mixture.model import METHOD_NAME, MoleModel

LORA = {name: item.default for name, item in LoraConfig.__dataclass_fields__.items()}
"""LoRA's settings with their defaults."""
ONLY_LORA = LORA.keys() - MoleConfig.__dataclass_fields__.keys() - {"fan_in_fan_out"}
"""Those that MoLE does not have; nor does it need `fan_in_fan_out`, since it looks at the layer."""
LIKE_LORA = {name: LORA[name] for name in ("r", "lora_alpha", "lora_dropout")}
"""Defaults that the tests count on; those of a `MoleConfig` are others."""


def only_lora(settings: Mapping[str, Any]) -> list[str]:
    """Which of some settings ask for what only LoRA has, such as `use_dora`. See `StandIn` for `init_lora_weights`."""
    given = {name: value for name, value in settings.items() if name in ONLY_LORA and value is not None}
    return [name for name, value in given.items() if value not in (LORA[name], False)]


class StandIn(MoleConfig):
    """A `MoleConfig` with LoRA's defaults and three experts, which puts aside what only LoRA has, in `only_lora`.

    With `init_lora_weights=False`, a new adapter changes the model's output. `target_modules=None` is all-linear.
    """

    router_in_turn: ClassVar[str] = "dynmole"

    def __init__(self, **settings: Any) -> None:
        self.only_lora = only_lora(settings)
        self.changes_output = settings.get("init_lora_weights") is False
        own = {name: value for name, value in settings.items() if name not in {*ONLY_LORA, "fan_in_fan_out"}}
        if own.get("target_modules") is None:
            own.pop("target_modules", None)
        super().__init__(**{**LIKE_LORA, "num_experts": 3, "router": self.router_in_turn, **own})


class Tuner(MoleModel):
    """The tuner for `StandIn`: it skips a test that asks for what only LoRA has, and may change the model's output."""

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if lacking := getattr(config, "only_lora", []):
            pytest.skip(f"LoRA's {', '.join(lacking)}")
        if config.bias == f"{METHOD_NAME}_only":  # what a test takes every method to call it
            config.bias = "lora_only"
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if getattr(config, "changes_output", False):
            for layer in self.model.modules():
                if isinstance(layer, MoleLinear) and adapter_name in layer.experts:
                    layer.experts[adapter_name][1].reset_parameters()  # B, which is 0 in a new adapter
