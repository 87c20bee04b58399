"""The auxiliary loss reaches the gradient exactly once, whatever a trainer makes its loss of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from adapting import ROUTED, TOKENS, padded, shake
from peft import get_peft_model
from test_auxiliary_losses import ENTROPY_AND_Z, LOSSES, Rows, adapt64, gradients, hold_equal, trainer_step
from torch import Tensor

from mole import MoleConfig, auxiliary_loss
from mole.core.errors import ConfigError
from mole.mixture.aux_gradient import AUX_LOSS_MODES, loss_scale

Make = Callable[..., Any]
Loss = Callable[[Any], Tensor]


def of_logits(logits: Tensor) -> Tensor:
    """A loss that a loop computes itself."""
    return -logits.log_softmax(-1)[..., 7].mean()


def own(outputs: Any) -> Tensor:
    """That of a model's outputs."""
    return of_logits(outputs.logits)


def of_model(outputs: Any) -> Tensor:
    """The loss that the model returns."""
    return outputs.loss


def expected(model: Any, loss: Loss, times: float = 1.0, **inputs: Any) -> dict[str, Tensor]:
    """The gradients of `loss(outputs)` + times · the auxiliary loss, added by hand."""
    shared = model.get_base_model()._mole_routing_log.shared
    mode, shared.aux_loss = shared.aux_loss, "manual"
    model.zero_grad()
    (loss(model(**{"input_ids": TOKENS, **inputs})) + times * auxiliary_loss(model)).backward()
    shared.aux_loss = mode
    wanted = gradients(model)
    model.zero_grad()
    return wanted


def found(model: Any, loss: Loss, **inputs: Any) -> dict[str, Tensor]:
    """The gradients of `loss(outputs)` as they come."""
    model.zero_grad()
    loss(model(**{"input_ids": TOKENS, **inputs})).backward()
    return gradients(model)


@pytest.mark.parametrize("router", ROUTED)
def test_a_loss_of_the_loops_own_has_the_auxiliary_loss_in_its_gradient(router: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), router, aux_loss="injected", **LOSSES).train()
    hold_equal(found(model, own), expected(model, own), rtol=1e-9, atol=1e-12)


OWN_LOSSES: dict[str, Loss] = {
    "the logits, though labels were given": own,
    "a head on the hidden states": lambda out: out.hidden_states[-1].square().mean(),
    "several outputs": lambda out: of_logits(out.logits) + sum(x.square().mean() for x in out.hidden_states),
    "the model's loss": lambda out: out.loss,
    "distillation, the model's loss and one of the logits": lambda out: out.loss + out.logits.square().mean(),
    "written in place": lambda out: of_logits(out.logits.div_(2.0)),
}  # fmt: skip


@pytest.mark.parametrize("what", OWN_LOSSES)
def test_it_counts_once_whichever_outputs_are_used(what: str, tiny_model: Make) -> None:
    model, loss = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train(), OWN_LOSSES[what]
    inputs = {"labels": TOKENS, "output_hidden_states": True}
    hold_equal(found(model, loss, **inputs), expected(model, loss, **inputs), rtol=1e-9, atol=1e-12)


def test_a_tuple_of_outputs_brings_it_too(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train()
    for inputs, place in (({}, 0), ({"labels": TOKENS}, 0), ({"labels": TOKENS}, 1)):
        given = {**inputs, "return_dict": False}
        loss: Loss = (lambda out: of_logits(out[1])) if place else (lambda out: out[0].mean())
        hold_equal(found(model, loss, **given), expected(model, loss, **given), rtol=1e-9, atol=1e-12)


def test_each_backward_pass_has_it_once(tiny_model: Make) -> None:
    """As a loss that is differentiated twice counts twice."""
    model = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train()
    loss = own(model(input_ids=TOKENS))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    twice = expected(model, own)
    hold_equal(once, twice, rtol=1e-9, atol=1e-12)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = own(model(input_ids=TOKENS))
    for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(grad, next(twice[name] for name, own in model.named_parameters() if own is weight))


def test_a_loop_that_adds_it_by_hand_has_it_once_with_the_loops_weight(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train()
    wanted = expected(model, own, times=0.5)
    by_hand = found(model, lambda out: own(out) + 0.5 * auxiliary_loss(model))
    hold_equal(by_hand, wanted, rtol=1e-9, atol=1e-12)


def test_looking_at_its_value_changes_nothing(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train()

    def loss(outputs: Any) -> Tensor:
        assert auxiliary_loss(model).item() > 0
        return own(outputs)

    hold_equal(found(model, loss), expected(model, loss), rtol=1e-9, atol=1e-12)


WHERE = {"auto": (1, 0), "in_loss": (1, 0), "injected": (1, 1), "manual": (0, 0)}
"""How often it is in the gradient of the model's own loss, and of a loss of the logits, outside a `Trainer`."""


@pytest.mark.filterwarnings("ignore:The routers' auxiliary loss does not reach")
@pytest.mark.parametrize("mode", AUX_LOSS_MODES)
def test_the_setting_says_where_it_is_added(mode: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss=mode, **LOSSES).train()
    in_model_loss, in_own = WHERE[mode]
    wanted = expected(model, of_model, in_model_loss, labels=TOKENS)
    hold_equal(found(model, of_model, labels=TOKENS), wanted, rtol=1e-9, atol=1e-12)
    wanted = expected(model, own, in_own)
    hold_equal(found(model, own), wanted, rtol=1e-9, atol=1e-12)


def test_only_auto_and_in_loss_change_the_value_of_the_models_loss(tiny_model: Make) -> None:
    values = {}
    for mode in AUX_LOSS_MODES:
        model = adapt64(tiny_model(), aux_loss=mode, **LOSSES).train()
        values[mode] = model(input_ids=TOKENS, labels=TOKENS).loss.item()
        auxiliary = auxiliary_loss(model).item()
    assert values["auto"] == values["in_loss"] == pytest.approx(values["manual"] + auxiliary)
    assert values["injected"] == values["manual"]


def test_a_loss_that_would_be_lost_is_said(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="in_loss", **LOSSES).train()
    with pytest.warns(UserWarning, match="does not reach the gradient: aux_loss is 'in_loss'"):
        model(input_ids=TOKENS)


def test_another_setting_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="aux_loss is 'always'; it must be one of auto, in_loss, injected, manual."):
        MoleConfig(aux_loss="always")


def test_the_setting_is_saved_with_the_adapter(tiny_model: Make, tmp_path: Path) -> None:
    adapt64(tiny_model(), aux_loss="manual").save_pretrained(tmp_path)
    assert MoleConfig.from_pretrained(tmp_path).aux_loss == "manual"


def test_checkpointing_recomputes_it_once(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="injected", **LOSSES).train()
    wanted = expected(model, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hold_equal(found(model, own), wanted, rtol=1e-9, atol=1e-12)


def test_without_gradients_and_in_evaluation_the_outputs_are_the_models_own(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), **LOSSES)
    with torch.no_grad():
        assert not model.train()(input_ids=TOKENS).logits.requires_grad
    assert "Injected" not in type(model.eval()(input_ids=TOKENS).logits.grad_fn).__name__


# ---------------------------------------------------------------------------------------------------------
# The scale of a micro-batch


class OwnLossTrainer(hf.Trainer):
    """A trainer as most are written: the loss is made of the logits."""

    loss_is_scaled_for_ga = False  # says that Trainer has to divide it by the number of micro-batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = own(outputs)
        return (loss, outputs) if return_outputs else loss


class ScaledTrainer(OwnLossTrainer):
    """One that scales its loss, as for training in float16."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


@pytest.fixture
def rows() -> Rows:
    tokens = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))
    return Rows({"input_ids": row, "labels": row} for row in tokens)


@pytest.mark.parametrize("what", OWN_LOSSES)
def test_in_a_trainer_it_counts_once_whichever_outputs_are_used(
    what: str, rows: Rows, tiny_model: Make, tmp_path: Path
) -> None:
    class AnyLossTrainer(OwnLossTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return OWN_LOSSES[what](model(**inputs, output_hidden_states=True))

    tokens = torch.stack([row["input_ids"] for row in rows.rows])
    inputs = {"input_ids": tokens, "labels": tokens, "output_hidden_states": True}
    wanted = expected(adapt64(tiny_model(), **LOSSES).train(), OWN_LOSSES[what], **inputs)
    model = adapt64(tiny_model(), **LOSSES)
    step = trainer_step(model, rows, tmp_path, 4, 1, AnyLossTrainer)
    hold_equal(step, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trainer", [OwnLossTrainer, ScaledTrainer])
def test_accumulated_in_a_trainer_it_counts_once_a_step(
    trainer: type[hf.Trainer], rows: Rows, tiny_model: Make, tmp_path: Path
) -> None:
    """Entropy and z are means over tokens, so the parts' means make that of the whole batch."""
    model = adapt64(tiny_model(), **ENTROPY_AND_Z).train()
    tokens = torch.stack([row["input_ids"] for row in rows.rows])
    wanted = expected(model, own, input_ids=tokens)
    for batch in (4, 2, 1):
        model = adapt64(tiny_model(), **ENTROPY_AND_Z)
        step = trainer_step(model, rows, tmp_path, batch, 4 // batch, trainer)
        hold_equal(step, wanted, rtol=1e-6, atol=1e-9)


def test_with_smoothed_labels_trainer_has_it_too(rows: Rows, tiny_model: Make, tmp_path: Path) -> None:
    """Trainer takes the labels away from the model then."""
    steps = []
    for values in (ENTROPY_AND_Z, dict.fromkeys(ENTROPY_AND_Z, 0.0)):
        model = adapt64(tiny_model(), **values)
        steps.append(trainer_step(model, rows, tmp_path, 2, 2, label_smoothing_factor=0.1))
    model = adapt64(tiny_model(), **ENTROPY_AND_Z).train()
    tokens = torch.stack([row["input_ids"] for row in rows.rows])
    wanted = expected(model, lambda out: 0.0 * out.logits.sum(), input_ids=tokens)
    hold_equal({name: steps[0][name] - steps[1][name] for name in wanted}, wanted, rtol=1e-4, atol=1e-7)


def test_accumulated_by_accelerate_it_counts_once_a_step(tiny_model: Make) -> None:
    model = adapt64(tiny_model(), aux_loss="injected", **ENTROPY_AND_Z).train()
    parts = [TOKENS[:2], TOKENS[1:]]
    whole = torch.cat(parts)
    wanted = expected(model, own, input_ids=whole)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = accelerator.prepare(model)
    for part in parts:
        with accelerator.accumulate(prepared):
            accelerator.backward(own(prepared(input_ids=part)))
    hold_equal(gradients(model), wanted, rtol=1e-6, atol=1e-9)
    accelerator.gradient_state._reset_state()
    assert loss_scale(torch.tensor(0.0), None) == 1


# ---------------------------------------------------------------------------------------------------------
# Other heads and architectures


def classifier(tokenizer_size: int = 320) -> Any:
    """A small classifier of texts."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=tokenizer_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForSequenceClassification(config)


def t5(layers: int = 1) -> Any:
    """A small T5 without dropout."""
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def with_mixture(model: Any, task: str, **values: Any) -> Any:
    """The model with an adapter whose weights all matter, in float64."""
    given = {"num_experts": 4, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "target_modules": "all-linear", **LOSSES}
    adapted = get_peft_model(model, MoleConfig(router="dynmole", task_type=task, **{**given, **values}))
    shake(adapted)
    return adapted.double().train()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_classifiers_labels_all_count_for_its_share(rows: int) -> None:
    """The first label of a causal model's row counts for nothing; a classifier has but one for a row."""
    model = with_mixture(classifier(), "SEQ_CLS")
    batch = {"input_ids": TOKENS[:rows], "labels": torch.arange(rows)}
    plain = model(**batch).loss - auxiliary_loss(model)
    shared = model(**batch, num_items_in_batch=torch.tensor(rows)).loss
    torch.testing.assert_close(shared, plain + auxiliary_loss(model))


def test_the_labels_of_an_encoder_decoder_all_count_for_its_share() -> None:
    model = with_mixture(t5(), "SEQ_2_SEQ_LM")
    batch = {"input_ids": TOKENS, "labels": TOKENS[:, :5].contiguous()}
    plain = model(**batch).loss - auxiliary_loss(model)
    shared = model(**batch, num_items_in_batch=torch.tensor(15)).loss
    torch.testing.assert_close(shared, plain + auxiliary_loss(model))


@pytest.mark.parametrize("targets", [5, 11], ids=["targets shorter than inputs", "targets as long as inputs"])
def test_padding_of_inputs_and_of_targets_is_in_no_loss_of_an_encoder_decoder(targets: int) -> None:
    """Rows by themselves, without padding, have the same losses as together, with it."""
    model = with_mixture(t5(), "SEQ_2_SEQ_LM", balance_loss_coef=0.0)
    batch = padded("right")
    lengths = batch["attention_mask"].sum(-1).tolist()
    labels = torch.full((3, targets), -100)
    counts = [targets, 3, 2]
    for row, count in enumerate(counts):
        labels[row, :count] = 7
    values, tokens = [], []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        alone = {"input_ids": batch["input_ids"][row : row + 1, :length], "labels": labels[row : row + 1, :count]}
        model(**alone)
        log = model.get_base_model()._mole_routing_log
        values.append({sums.name: sums.values.detach() for sums in log.sums})
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    for sums in model.get_base_model()._mole_routing_log.sums:
        torch.testing.assert_close(
            sums.values, sum(own[sums.name] for own in values), msg=lambda text, name=sums.name: f"{name}: {text}"
        )
        tokens.append(sums.values[0].item())
    assert set(tokens) == {sum(lengths), sum(counts)}, "tokens of the inputs, and of the targets"
