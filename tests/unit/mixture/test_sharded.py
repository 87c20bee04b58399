"""DDP and FSDP. With FSDP a part of the weights lies in each process; wrappers gather them for the calls of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mole.config import ROUTERS
from mole.core.errors import MoleError
from mole.mixture import MoleLinear

Make = Callable[..., Any]
PROCESSES = 2
RATE = 0.05


def adapted(tiny_model: Make) -> dict[str, Any]:
    """A model with an adapter of each router, to train in float64."""
    return {router: adapt(tiny_model(), router).double().train() for router in ROUTERS}


def loss_of(model: Any, rows: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def trained(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of each process's row, and the trainable weights after a step of gradient descent on their mean."""
    losses = [loss_of(model, TOKENS[rank : rank + 1]) for rank in range(PROCESSES)]
    torch.stack(losses).mean().backward()
    step(model)
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return [loss.item() for loss in losses], weights


def step(model: Any) -> None:
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=RATE).step()


def check_ddp(rank: int, folder: str, models: dict[str, Any]) -> None:
    """One of the processes: hold a step with DDP against the plain model's."""
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    for router, model in copy.deepcopy(models).items():  # what a process is given lies in shared memory
        losses, weights = trained(copy.deepcopy(model))
        parallel = DistributedDataParallel(model)
        loss = loss_of(parallel, TOKENS[rank : rank + 1])
        loss.backward()
        step(model)
        assert abs(loss.item() - losses[rank]) < 1e-9, router
        for name, weight in weights.items():
            torch.testing.assert_close(
                model.get_parameter(name),
                weight,
                rtol=0,
                atol=1e-9,
                msg=lambda text, name=name, router=router: f"{router}: {name}: {text}",
            )
    distributed.destroy_process_group()


def check_fsdp2(rank: int, folder: str, models: dict[str, Any]) -> None:
    """One of the processes: hold the gradients with FSDP2, a decoder block each, against the plain model's."""
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for router, model in copy.deepcopy(models).items():  # what a process is given lies in shared memory
        plain = copy.deepcopy(model)
        losses, _ = trained(plain)
        blocks = model.base_model.model.model.layers
        if router == "sparsegen":
            alone = copy.deepcopy(model)
            for block in alone.base_model.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(alone, mesh=mesh)
            with pytest.raises(MoleError, match=r"^FSDP has sharded a network that all layers share .*fully_shard"):
                loss_of(alone, TOKENS[:1])
            for name, module in model.named_modules():
                if "mole_studio_lambda" in name and isinstance(module, nn.Linear):
                    fully_shard(module, mesh=mesh)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = loss_of(model, TOKENS[rank : rank + 1])
        loss.backward()
        assert abs(loss.item() - losses[rank]) < 1e-9, router
        for name, weight in model.named_parameters():
            gradient = plain.get_parameter(name).grad
            assert (weight.grad is None) == (gradient is None), name
            if weight.grad is not None:
                found = weight.grad.full_tensor()  # type: ignore[attr-defined]
                torch.testing.assert_close(
                    found,
                    gradient,
                    rtol=0,
                    atol=1e-9,
                    msg=lambda text, name=name, router=router: f"{router}: {name}: {text}",
                )
    distributed.destroy_process_group()


def check_fsdp(rank: int, folder: str, models: dict[str, Any], original: bool, by_projection: bool) -> None:
    """One of the processes: hold a step with FSDP against the plain model's."""
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    for router, model in copy.deepcopy(models).items():  # what a process is given lies in shared memory
        losses, weights = trained(copy.deepcopy(model))
        sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({MoleLinear}) if by_projection else fsdp_auto_wrap_policy(model),
            device_id=torch.device("cpu"),
            use_orig_params=original,
        )
        loss = loss_of(sharded, TOKENS[rank : rank + 1])
        loss.backward()
        step(sharded)
        assert abs(loss.item() - losses[rank]) < 1e-9, router
        with FullyShardedDataParallel.summon_full_params(sharded):
            found = {name.replace("_fsdp_wrapped_module.", ""): weight for name, weight in sharded.named_parameters()}
            for name, weight in weights.items():
                torch.testing.assert_close(
                    found[name],
                    weight,
                    rtol=0,
                    atol=1e-9,
                    msg=lambda text, name=name, router=router: f"{router}: {name}: {text}",
                )
    distributed.destroy_process_group()


@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_a_step_with_fsdp_and_pefts_policy_is_that_of_the_plain_model(
    original: bool, tiny_model: Make, tmp_path: Path
) -> None:
    """The policy wraps every small linear layer of the adapter by itself."""
    spawn(check_fsdp, (str(tmp_path), adapted(tiny_model), original, False), nprocs=PROCESSES)


def test_a_step_with_fsdp_of_each_projection_is_that_of_the_plain_model(tiny_model: Make, tmp_path: Path) -> None:
    """Its weights are whole during its call only, so it computes nothing for those that read the same input."""
    models = {router: model for router, model in adapted(tiny_model).items() if router in ("dynmole", "adamole")}
    spawn(check_fsdp, (str(tmp_path), models, True, True), nprocs=PROCESSES)


def test_a_step_with_ddp_is_that_of_the_plain_model(tiny_model: Make, tmp_path: Path) -> None:
    spawn(check_ddp, (str(tmp_path), adapted(tiny_model)), nprocs=PROCESSES)


def test_gradients_with_fsdp2_are_those_of_the_plain_model(tiny_model: Make, tmp_path: Path) -> None:
    """With `fully_shard` of the decoder blocks; networks that all of them share are wrapped by themselves."""
    spawn(check_fsdp2, (str(tmp_path), adapted(tiny_model)), nprocs=PROCESSES)
