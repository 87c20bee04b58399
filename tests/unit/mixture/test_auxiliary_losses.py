"""The auxiliary losses in a model's loss: once a batch, in every kind of loop, without padding, never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, padded
from torch import Tensor, nn

from mole import MoleConfig, auxiliary_loss
from mole.config import ROUTERS
from mole.core.errors import MoleError
from mole.data import split_by_length
from mole.mixture.routing_log import one_batch

Make = Callable[..., Any]
ROUTED = [name for name in ROUTERS if name != "lora"]
LOSSES = {"balance_loss_coef": 0.3, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}


def adapt64(model: Any, router: str = "dynmole", **values: Any) -> Any:
    """The adapted model in float64, so that what should be equal is equal to many digits."""
    return adapt(model, router, **values).double()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def hold_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def by_hand(model: Any, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The auxiliary loss from every router's own routing, one projection after the other."""
    values: list[Tensor] = []

    def look(router: Any, routing: Any) -> None:
        keep = torch.ones(TOKENS.numel(), dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
        weights, probs, logits = (
            getattr(routing, part).flatten(0, -2)[keep] for part in ("weights", "probs", "logits")
        )
        used = weights if router.params.name == "dynmole" else (weights > 0).float()
        balance = router.num_experts * (used.mean(0) * probs.mean(0)).sum()
        entropy = routing.entropy.reshape(-1)[keep].mean()
        z = logits.logsumexp(-1).square().mean()
        values.append(
            LOSSES["balance_loss_coef"] * balance + LOSSES["entropy_loss_coef"] * entropy + LOSSES["z_loss_coef"] * z
        )

    hooks = [
        layer.register_forward_pre_hook(lambda module, args: look(router := module.routers["default"], router(args[0])))
        for layer in layers_of(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return torch.stack(values).mean()


@pytest.mark.parametrize("router", ROUTED)
def test_in_a_plain_loop_the_models_loss_has_the_auxiliary_loss_in_it_once(router: str, tiny_model: Make) -> None:
    with_losses = adapt64(tiny_model(), router, **LOSSES).train()
    without = adapt64(tiny_model(), router, **dict.fromkeys(LOSSES, 0.0)).train()
    total = with_losses(input_ids=TOKENS, labels=TOKENS).loss
    plain = without(input_ids=TOKENS, labels=TOKENS).loss
    auxiliary = auxiliary_loss(with_losses)
    torch.testing.assert_close(total - plain, auxiliary, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(auxiliary, by_hand(with_losses, input_ids=TOKENS), rtol=1e-5, atol=1e-6)
    assert auxiliary.item() > 0 and auxiliary.requires_grad


def test_a_loop_with_its_own_loss_adds_the_auxiliary_loss_itself(tiny_model: Make) -> None:
    results = []
    for own in (True, False):
        model = adapt64(tiny_model(), **LOSSES).train()
        if own:
            scores = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(scores, TOKENS[:, 1:].flatten()) + auxiliary_loss(model)
        else:
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        results.append(gradients(model))
    hold_equal(*results, rtol=1e-4, atol=1e-6)


def test_a_projection_with_muted_experts_counts_like_the_others(tiny_model: Make) -> None:
    model = adapt64(tiny_model("llama"), "topk", **LOSSES).train()
    layers_of(model)[0].routers["default"].allowed = torch.tensor([0, 2])
    expected = by_hand(model, input_ids=TOKENS)
    model(input_ids=TOKENS)
    torch.testing.assert_close(auxiliary_loss(model), expected)


def test_the_loss_is_also_found_by_way_of_transformers_own_add_adapter(tiny_model: Make) -> None:
    native = tiny_model()
    native.add_adapter(MoleConfig(router="dynmole", num_experts=4, r=2, **LOSSES))
    native.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert auxiliary_loss(native).item() > 0
    gate = next(weight for name, weight in native.named_parameters() if "mole_studio_gate" in name)
    assert gate.grad is not None and gate.grad.abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router", ["dynmole", "topk", "adamole"])
def test_padding_is_in_no_auxiliary_loss(router: str, side: str, tiny_model: Make) -> None:
    model, seen = adapt64(tiny_model(), router, **LOSSES).train(), []
    for extra in (0, 5):
        batch = padded(side, extra)
        model(**batch)
        seen.append(auxiliary_loss(model).detach())
        torch.testing.assert_close(seen[-1], by_hand(model, batch["attention_mask"], **batch), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-6)


def test_with_a_cache_the_mask_covers_the_past_too_and_only_its_end_counts(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    for place in (5, 3):
        with torch.no_grad():
            past = model(input_ids=TOKENS[:, :place], attention_mask=mask[:, :place], use_cache=True).past_key_values
        step = {"input_ids": TOKENS[:, place:], "attention_mask": mask}
        want = by_hand(model, mask[:, place:], **step, past_key_values=copy.deepcopy(past))
        model(**step, past_key_values=past)
        torch.testing.assert_close(auxiliary_loss(model), want, rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_has_no_auxiliary_loss_and_no_nan(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    mask = torch.zeros_like(TOKENS)
    model(input_ids=TOKENS, attention_mask=mask)
    loss = auxiliary_loss(model)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("coefficients", "parts"),
    [
        ({"balance_loss_coef": 0.0, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}, [TOKENS[:2], TOKENS[1:]]),
        ({"balance_loss_coef": 0.3, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}, [TOKENS[:2], TOKENS[:2]]),
    ],
    ids=["entropy and z of different parts", "balance too, of equal parts"],
)
def test_accumulated_gradients_equal_those_of_one_big_batch(
    coefficients: dict[str, float], parts: list[Tensor], tiny_model: Make
) -> None:
    """A mean over tokens is the mean of the parts' means; a product of means (balance) only for equal parts."""
    model = adapt64(tiny_model(), **coefficients).train()
    whole = torch.cat(parts)
    model(input_ids=whole, labels=whole).loss.backward()
    at_once = gradients(model)
    model.zero_grad()
    for part in parts:
        (model(input_ids=part, labels=part).loss / len(parts)).backward()
    hold_equal(gradients(model), at_once, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    items = whole[:, 1:].numel()
    for part in parts:
        model(input_ids=part, labels=part, num_items_in_batch=items).loss.backward()
    hold_equal(gradients(model), at_once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", ROUTED)
def test_parts_of_like_length_are_one_batch(router: str, tiny_model: Make) -> None:
    """Also for the balance loss, a product of means over the whole batch: the same as with the padding."""
    model = adapt64(tiny_model(), router, **LOSSES).train()
    batch = {name: values for name, values in padded("right").items() if name != "position_ids"}
    head = model.get_output_embeddings().weight
    losses, grads = [], []
    for parts in ([batch], split_by_length(batch, overhead=0)):
        model.zero_grad()
        with one_batch(model):
            logits = [model(**part).logits[part["attention_mask"].bool()] for part in parts]
        loss = auxiliary_loss(model) + torch.cat(logits).square().sum() / head.numel()
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(model))
    assert len(parts) == 3, "rows of three lengths, and nothing to be gained by padding them"
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    hold_equal(grads[1], grads[0], rtol=1e-6, atol=1e-9)
    model(**batch)
    torch.testing.assert_close(
        auxiliary_loss(model), by_hand(model, batch["attention_mask"], **batch), rtol=1e-5, atol=1e-6
    )


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: Iterable[dict[str, Tensor]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.rows[place]


def trainer_step(
    model: Any, rows: Rows, folder: Any, batch: int, accumulation: int, trainer: Any = None, **settings: Any
) -> dict[str, Tensor]:
    """How one plain SGD step of `Trainer`, or of a `trainer` class, changes each weight: minus its gradient."""
    from transformers import Trainer, TrainingArguments

    fixed: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        **fixed,
        **quiet,
        **settings,
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    (trainer or Trainer)(model=model, args=arguments, train_dataset=rows).train()
    return {name: before[name] - weight.detach() for name, weight in model.named_parameters() if name in before}


ENTROPY_AND_Z = {"balance_loss_coef": 0.0, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}


def test_trainer_with_accumulation_takes_the_step_of_one_big_batch(tiny_model: Make, tmp_path: Any) -> None:
    tokens = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = Rows({"input_ids": row, "labels": row} for row in tokens)
    steps = [
        trainer_step(adapt64(tiny_model(), **ENTROPY_AND_Z), rows, tmp_path, batch, 4 // batch) for batch in (4, 2, 1)
    ]
    hold_equal(steps[1], steps[0], rtol=1e-3, atol=1e-6)
    hold_equal(steps[2], steps[0], rtol=1e-3, atol=1e-6)
    plain = adapt64(tiny_model(), **ENTROPY_AND_Z).train()
    plain(input_ids=tokens, labels=tokens).loss.backward()
    hold_equal(steps[0], gradients(plain), rtol=1e-3, atol=1e-6)


def test_told_the_labels_of_the_whole_batch_a_part_counts_by_its_share_of_them(tiny_model: Make) -> None:
    """What Trainer passes as `num_items_in_batch`: the parts' auxiliary losses make one weighted mean, not a sum."""
    model, bare = (adapt64(tiny_model(), **values).train() for values in (LOSSES, dict.fromkeys(LOSSES, 0.0)))
    for row, labelled in zip(TOKENS, (7, 3, 1), strict=True):
        labels = row[None].where(torch.arange(8) >= 8 - labelled, -100)
        batch = {"input_ids": row[None], "labels": labels, "num_items_in_batch": 11}
        added = model(**batch).loss - bare(**batch).loss
        torch.testing.assert_close(added, auxiliary_loss(model) * labelled / 11, rtol=1e-5, atol=1e-7)


def test_trainer_with_checkpointing_takes_the_same_step(tiny_model: Make, tmp_path: Any) -> None:
    tokens = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = Rows({"input_ids": row, "labels": row} for row in tokens)
    recompute = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    steps = [
        trainer_step(adapt64(tiny_model(), **LOSSES), rows, tmp_path, 4, 1, **settings) for settings in ({}, recompute)
    ]
    hold_equal(steps[1], steps[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", ["dynmole", "topk", "sparsegen"])
def test_non_reentrant_checkpointing_gives_the_same_loss_and_gradients(router: str, tiny_model: Make) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapt64(tiny_model(), router, **LOSSES).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        results.append({"loss": loss.detach(), "auxiliary": auxiliary_loss(model).detach(), **gradients(model)})
    hold_equal(*results, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_refused_rather_than_losing_the_loss(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(MoleError, match="use_reentrant"):
        model(input_ids=TOKENS, labels=TOKENS)


def test_reentrant_checkpointing_is_fine_without_auxiliary_losses(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **dict.fromkeys(LOSSES, 0.0)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert gradients(model)


def test_in_evaluation_the_loss_is_the_models_own_and_no_stale_auxiliary_loss_is_left(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    model(input_ids=TOKENS, labels=TOKENS)
    model.eval()
    with torch.no_grad():
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    bare = adapt64(tiny_model(), **dict.fromkeys(LOSSES, 0.0))
    torch.testing.assert_close(loss, bare(input_ids=TOKENS, labels=TOKENS).loss)
    with pytest.raises(MoleError, match="training mode"):
        auxiliary_loss(model)


def test_each_training_pass_has_its_own_auxiliary_loss(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    values = []
    for tokens in (TOKENS, TOKENS.flip(1) + 1, TOKENS):
        model(input_ids=tokens)
        values.append(auxiliary_loss(model).item())
    assert values[0] == values[2] != values[1]


def test_a_disabled_adapter_has_no_auxiliary_loss(tiny_model: Make) -> None:
    model, base = adapt64(tiny_model(), **LOSSES).train(), tiny_model().double().train()
    with model.disable_adapter():
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, base(input_ids=TOKENS, labels=TOKENS).loss)


def test_a_tuple_output_carries_the_auxiliary_loss_too(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES).train()
    named = model(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(model(input_ids=TOKENS, labels=TOKENS, return_dict=False)[0], named)


def test_a_data_parallel_wrapper_keeps_the_auxiliary_loss(tiny_model: Make) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model = adapt64(tiny_model(), **LOSSES).train()
    direct = model(input_ids=TOKENS, labels=TOKENS).loss
    wrapped = Wrapper(model)
    torch.testing.assert_close(wrapped(input_ids=TOKENS, labels=TOKENS).loss, direct)
    assert auxiliary_loss(wrapped).item() > 0


def test_with_one_expert_there_is_nothing_to_balance(tiny_model: Make) -> None:
    for router in ROUTERS:
        model = adapt64(tiny_model(), router, num_experts=1, **LOSSES).train()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        assert auxiliary_loss(model).item() == 0
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
