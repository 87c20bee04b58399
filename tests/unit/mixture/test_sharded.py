"""FSDP: in each process lies a part of the weights, which a wrapper gathers for the calls of the modules it wraps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.multiprocessing.spawn import spawn

from mole.config import ROUTERS

Make = Callable[..., Any]
PROCESSES = 2
RATE = 0.05
ROUTERS_HERE = [name for name in ROUTERS if name != "sparsegen"]


def loss_of(model: Any, rows: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def trained(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of each process's row, and the trainable weights after a step of gradient descent on their mean."""
    losses = [loss_of(model, TOKENS[rank : rank + 1]) for rank in range(PROCESSES)]
    torch.stack(losses).mean().backward()
    step(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return [float(loss) for loss in losses], weights


def step(model: Any) -> None:
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=RATE).step()


def check_fsdp(rank: int, folder: str, models: dict[str, Any], original: bool) -> None:
    """One of the processes: hold a step with FSDP against the plain model's."""
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    for router, model in models.items():
        losses, weights = trained(copy.deepcopy(model))
        sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model),
            device_id=torch.device("cpu"),
            use_orig_params=original,
        )
        loss = loss_of(sharded, TOKENS[rank : rank + 1])
        loss.backward()
        step(sharded)
        assert abs(float(loss) - losses[rank]) < 1e-9, router
        with FullyShardedDataParallel.summon_full_params(sharded):
            found = {name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in sharded.named_parameters()}
            for name, weight in weights.items():
                torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-9, msg=f"{router}: {name}")
    distributed.destroy_process_group()


@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_a_step_with_fsdp_and_pefts_policy_is_that_of_the_plain_model(
    original: bool, tiny_model: Make, tmp_path: Path
) -> None:
    """The policy wraps every small linear layer of the adapter by itself."""
    models = {router: adapt(tiny_model(), router).double().train() for router in ROUTERS_HERE}
    spawn(check_fsdp, (str(tmp_path), models, original), nprocs=PROCESSES)
