"""DDP and FSDP. With FSDP a part of the weights lies in each process; wrappers gather them for the calls of modules."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt
from peft.utils.other import fsdp_auto_wrap_policy
from test_aux_gradient import expected, gradients, own
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
Models = dict[str, Any]
PROCESSES = 2
RATE = 0.05
KINDS = ("dynmole", "adamole", "sparsegen")
"""A router with a gate alone, one with a second linear layer, and one that shares layers."""
PROJECTIONS_ALONE = ("dynmole", "adamole")
"""Those for the check in which every projection is wrapped by itself."""


def adapted(tiny_model: Make, routers: Collection[str]) -> Models:
    """A model with an adapter of each router, to train in float64."""
    return {router: adapt(tiny_model(), router).double().train() for router in routers}


def hold_close(ours: Tensor, theirs: Tensor, *names: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=lambda text: f"{': '.join(names)}: {text}")


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


def check_ddp(rank: int, models: Models) -> None:
    """Hold a step with DDP against the plain model's."""
    for router, model in copy.deepcopy(models).items():
        losses, weights = trained(copy.deepcopy(model))
        parallel = DistributedDataParallel(model)
        loss = loss_of(parallel, TOKENS[rank : rank + 1])
        loss.backward()
        step(model)
        assert abs(loss.item() - losses[rank]) < 1e-9, router
        for name, weight in weights.items():
            hold_close(model.get_parameter(name), weight, router, name)


def check_fsdp2(rank: int, models: Models) -> None:
    """Hold the gradients with FSDP2, a decoder block each, against the plain model's."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for router, model in copy.deepcopy(models).items():
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
                hold_close(found, gradient, router, name)


def check_fsdp(rank: int, models: Models, original: bool, by_projection: bool = False) -> None:
    """Hold a step with FSDP against the plain model's."""
    for router, model in copy.deepcopy(models).items():
        if by_projection and router not in PROJECTIONS_ALONE:
            continue
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
                hold_close(found[name], weight, router, name)


def check_injected(rank: int, models: Models) -> None:
    """Hold the gradients with DDP of a loss of the loop's own, with the auxiliary loss injected, against their mean."""
    for router, model in copy.deepcopy(models).items():
        model.get_base_model()._mole_routing_log.shared.aux_loss = "injected"
        rows = [expected(model, own, input_ids=TOKENS[row : row + 1]) for row in range(PROCESSES)]
        parallel = DistributedDataParallel(model)
        own(parallel(input_ids=TOKENS[rank : rank + 1])).backward()
        for name, found in gradients(model).items():
            hold_close(found, (rows[0][name] + rows[1][name]) / PROCESSES, router, name)


CHECKS: dict[str, Callable[[int, Models], None]] = {
    "DDP": check_ddp,
    "DDP of a loss of its own": check_injected,
    "FSDP by PEFT's policy": partial(check_fsdp, original=True),
    "FSDP by PEFT's policy, flat parameters": partial(check_fsdp, original=False),
    "FSDP of each projection": partial(check_fsdp, original=True, by_projection=True),
    "FSDP2 of each block": check_fsdp2,
}
"""PEFT's policy wraps every small linear layer of the adapter by itself. A projection that is wrapped has its weights
during its call only, so it computes nothing for those that read the same input."""


def one_process(rank: int, folder: str, models: Models) -> None:
    """One of the processes: run all checks, and write what went wrong in each."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    models = copy.deepcopy(models)  # what a process is given lies in shared memory
    for number, check in enumerate(CHECKS.values()):
        try:
            check(rank, models)
            problem = ""
        except Exception:
            problem = traceback.format_exc()
        Path(folder, f"{number}-{rank}").write_text(problem)
    distributed.destroy_process_group()


@pytest.fixture(
    scope="module", params=[KINDS, pytest.param(tuple(ROUTERS), marks=pytest.mark.soak)], ids=["some", "all"]
)
def problems(request: Any, tiny_model: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong in each check, by process. They share two processes, which take long to start."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(one_process, (str(folder), adapted(tiny_model, request.param)), nprocs=PROCESSES)
    return {
        name: [(folder / f"{number}-{rank}").read_text() for rank in range(PROCESSES)]
        for number, name in enumerate(CHECKS)
    }


@pytest.mark.parametrize("check", CHECKS)
def test_a_step_is_that_of_the_plain_model(check: str, problems: dict[str, list[str]]) -> None:
    assert not any(problems[check]), "\n".join(problems[check])
