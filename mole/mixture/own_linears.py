"""The adapter's own small linear layers, and whether they have to be called: something may take part in their calls.

The fast ways to compute an adapter read the weights of these layers without calling them. That is wrong where the
weights are there only during a call, as under accelerate's offload (its hooks load them, and put them back to the meta
device) or FSDP (a wrapper gathers them), or where somebody wants to see the calls. `called_adapters` computes then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mole.core.errors import MoleError
from mole.mixture.routers.base import ScoreLinear

PLAIN = frozenset({nn.Linear, ScoreLinear})
"""The classes of an adapter's own linear layers as they are created."""
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether something takes part in the calls of a module: hooks of it or of all modules, another `forward`."""
    return has_own_hooks(module) or _has_any_global_hook()


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own or another `forward` than its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or ("forward" in module.__dict__ and has_other_forward(module)))


def has_other_forward(module: nn.Module) -> bool:
    """Whether a module has another `forward` than its class; accelerate leaves that of the class where a hook was."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return forward.__func__ is not type(module).forward
    return forward is not None


def must_be_called(module: nn.Module) -> bool:
    """Whether reading the weights of one of an adapter's own linear layers is not the same as calling it."""
    return type(module) not in PLAIN or is_hooked(module)


def check_whole(lent: Sequence[nn.Module]) -> None:
    """Check that linear layers whose owner is another projection have their weights, or get them when they are called.

    Raises:
        MoleError: FSDP has sharded the weights with those of the owner's block, so they are there only in its call.
    """
    for module in lent:
        weight = module.weight
        sharded = hasattr(weight, "full_tensor") or (isinstance(weight, Tensor) and weight.dim() < 2)
        if sharded and not is_hooked(module) and type(module) in PLAIN:
            raise MoleError(
                "FSDP has sharded a network that all layers share (lambda_in, lambda_out) with the first of them. Wrap "
                "such networks by themselves first: with FSDP by PEFT's fsdp_auto_wrap_policy, else with "
                "fully_shard(module) for each nn.Linear whose name contains mole_studio_lambda."
            )


class OwnLinears:
    """The own linear layers of the adapters of one name in some layers.

    Both questions are asked for every token that is decoded: what they read is looked up once, and compared without a
    loop in Python.
    """

    def __init__(self, adapter: str, places: Sequence[Mapping[str, Any]]) -> None:
        """`places` are the dictionaries of the modules, by adapter, in which PEFT and wrappers find them."""
        self._places, self._of_adapter = places, itemgetter(adapter)
        self.modules: list[nn.Module] = list(map(self._of_adapter, places))
        self._hooks = [getattr(module, name) for module in self.modules for name in FORWARD_HOOKS]
        self._backward_hooks = [getattr(module, name) for module in self.modules for name in BACKWARD_HOOKS]
        # Whoever sets another `forward` adds an attribute; a parametrization changes the class and removes a parameter.
        self._entries = [entries for module in self.modules for entries in (module.__dict__, module._parameters)]
        self._plain_count = -1  # number of entries when all modules were as they are created

    def are_registered(self) -> bool:
        """Whether they are still those that the model has: FSDP, for one, replaces a module by a wrapper around it."""
        return list(map(self._of_adapter, self._places)) == self.modules

    def must_be_called(self) -> bool:
        """Whether something takes part in the calls of one of them."""
        if any(self._hooks) or _has_any_global_hook() or (torch.is_grad_enabled() and any(self._backward_hooks)):
            return True
        count = sum(map(len, self._entries))
        if count == self._plain_count:
            return False
        if any(map(must_be_called, self.modules)):
            return True
        if not any("forward" in module.__dict__ for module in self.modules):
            self._plain_count = count
        return False
