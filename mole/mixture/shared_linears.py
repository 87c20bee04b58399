"""Linear layers of routers that several projections share: LD-MoLE has one network of λ for each input width.

One of the projections owns such a layer: in it alone it is registered, so that its weights are one parameter for
optimizers, wrappers and whatever saves. The file of a `PeftModel` has a copy for each projection all the same, since
earlier versions expect them; loading takes the owner's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mole.mixture.layer import PREFIX, MoleLinear

SHARED = ("lambda_in", "lambda_out")
"""Names of the routers' linear layers that the projections of one input width share."""
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def share_linears(model: nn.Module, adapter: str) -> None:
    """Let the projections of one input width share the layers `SHARED`, owned by the first of them."""
    owners: dict[int, MoleLinear] = {}
    for layer in model.modules():
        if isinstance(layer, MoleLinear) and adapter in layer.routers:
            owner = owners.setdefault(layer.in_features, layer)
            for name in SHARED if owner is not layer else ():
                if name in layer.routers[adapter].linears:
                    layer.share_linear(adapter, name, owner)


def copies(model: nn.Module, adapter: str) -> Iterator[tuple[str, str]]:
    """The names of the weights of a shared layer in each projection that does not own it, and in the one that does.

    They are names in a state dict, with the adapter's, without those of wrappers such as FSDP's.
    """
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, MoleLinear)}
    for module in model.modules():
        for linear, owner in module.shared.get(adapter, {}).items() if isinstance(module, MoleLinear) else ():
            for weight in ("weight", "bias"):
                own, owners = (
                    WRAPPERS.sub("", f"{names[id(layer)]}.{PREFIX}{linear}.{adapter}.{weight}")
                    for layer in (module, owner)
                )
                yield own, owners


def copy_names(model: nn.Module, adapter: str) -> set[str]:
    """The names of the copies in a file, which are without the adapter's name."""
    return {own.replace(f".{adapter}.", ".") for own, _ in copies(model, adapter)}


def without_copies(model: nn.Module, adapter: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What a file has, without the copies; a file of a `PeftModel` may be loaded into a model without its prefix."""
    names = copy_names(model, adapter)
    return {
        name: weight
        for name, weight in state_dict.items()
        if not {name, name.removeprefix("base_model.model.")} & names
    }


def with_copies(model: nn.Module, adapter: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with a copy of the shared weights for each projection; none of them shares memory."""
    found = dict(state_dict)
    for own, owners in copies(model, adapter):
        if isinstance(weight := found.get(owners), Tensor):
            found[own] = weight.clone()
    return found
