"""One run's training in this process: transformers' Trainer, the auxiliary losses, the event log, exact resume."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed

from mole.config import RunConfig
from mole.core import checkpoint
from mole.core.errors import CheckpointError, TrainingError
from mole.data.encoding import Collator, Datasets, build_datasets, by_length, chat_template
from mole.mixture.model import mole_config
from mole.mixture.routing_log import auxiliary_loss, one_batch
from mole.models.adapter_files import WEIGHTS
from mole.models.loading import TEMPLATE_FILE, Base, load_base, on_its_gpu
from mole.models.logits import summed_loss_at
from mole.models.sources import fingerprint
from mole.runs.run import Run
from mole.training import state
from mole.training.callbacks import CALMER, EventLog
from mole.training.steps import count_steps

TRAINER_STATE = "trainer_state.json"
OVERHEAD = {"cpu": 24}
OVERHEAD_GPU = 1024
"""What one more pass through the model costs, in tokens, by device."""
FREE_TO_CHANGE = {"save_steps", "save_total_limit", "logging_steps", "eval_steps"}
"""Training settings that may differ on resume: they do not change what is learnt."""

AnyTrainer = TypeVar("AnyTrainer", bound="MoleTrainer")


def train(run: Run, *, resume: bool = False, progress: bool = False) -> None:
    """Train a run from its config to its adapter, or until its stop is requested.

    The caller holds the locks of the run and the device. What happens is told in the run's events.

    Args:
        run: the run; its folder gets checkpoints and, at the end, the adapter.
        resume: go on from the newest checkpoint that verifies; from the start when there is none.
        progress: draw a progress bar on the terminal.

    Raises:
        InputError: model, data or a setting cannot be used.
        CheckpointError: config or data are not those of the checkpoint.
        TrainingError: the loss is no longer finite.
    """
    config = run.config
    base = load_base(on_its_gpu(config.model))
    datasets = build_datasets(config.data, base.tokenizer, config.training.seed)
    source = checkpoint.newest_good(run.checkpoints_dir) if resume else None
    meta = {
        "config": config.to_dict(),
        "data": datasets.report.fingerprint,
        "tokens": fingerprint_of_tokens(datasets),
        "base": fingerprint(base.folder) if base.folder else {},
    }
    if source is not None:
        require_same(checkpoint.read_manifest(source).meta, meta)
    trainer = assemble(MoleTrainer, run, config, base, datasets, meta, progress)
    trainer.announce(source)
    try:
        if source is not None and checkpoint.read_manifest(source).step >= trainer.total_steps():
            trainer.take_over(source)
        else:
            trainer.train(resume_from_checkpoint=None if source is None else str(source))
    finally:
        trainer.log_callback.close()
    trainer.conclude()


def assemble(
    kind: type[AnyTrainer],
    run: Run,
    config: RunConfig,
    base: Base,
    datasets: Datasets,
    meta: dict[str, Any],
    progress: bool,
) -> AnyTrainer:
    """A trainer of that kind, the fresh adapter on the base model, ready to train."""
    set_seed(config.training.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # checkpointing has other names in newer transformers
        model = get_peft_model(base.model, mole_config(config.adapter, task_type="CAUSAL_LM"))
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return kind(run, config, base, model, datasets, meta, progress)


def require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `CheckpointError` naming every setting that differs from the checkpoint's, the data, and the base model.

    What a checkpoint of an earlier version does not tell is not compared.
    """
    changes = []
    config = RunConfig.from_dict(before["config"]).to_dict()  # a setting that is newer than the checkpoint: its default
    for section in ("model", "data", "adapter", "training"):
        old, new = config[section], now["config"][section]
        for key in sorted({*old, *new} - FREE_TO_CHANGE):
            if old.get(key) != new.get(key):
                changes.append(f"{section}.{key} was {old.get(key)!r} and is now {new.get(key)!r}")
    data, model = now["config"]["data"], now["config"]["model"]["name"]
    if before["data"] != now["data"]:
        files = " or ".join(data[key] for key in ("path", "eval_path") if data[key])
        changes.append(f"the content of the training data has changed ({files})")
    elif before.get("tokens", now["tokens"]) != now["tokens"]:
        changes.append(f"the same data gives other tokens: tokenizer or chat template of {model} have changed")
    base = before.get("base", now["base"])
    files = ", ".join(name for name in sorted({*base, *now["base"]}) if base.get(name) != now["base"].get(name))
    if files:
        changes.append(f"the base model {model} is another one now ({files})")
    if changes:
        raise CheckpointError(
            f"The run cannot be resumed, because it is no longer the same: {'; '.join(changes)}. "
            "Undo the change, or start a new run with the new settings."
        )


def fingerprint_of_tokens(datasets: Datasets) -> str:
    """The sha256 of everything that is learnt from, as the model sees it."""
    digest = hashlib.sha256()
    for row in [*datasets.train, *datasets.eval]:
        for values in (row["input_ids"], row["labels"]):
            digest.update(np.asarray([len(values), *values], dtype=np.int64).tobytes())
    return digest.hexdigest()


def training_arguments(run: Run, config: RunConfig, base: Base) -> TrainingArguments:
    """transformers' arguments for a run; evaluation, logging and checkpoints are ours."""
    settings = config.training
    arguments = TrainingArguments(
        output_dir=str(run.checkpoints_dir),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one run, one device: more GPUs must not make it nn.DataParallel
    return arguments


def model_card(config: RunConfig) -> str:
    """The README of an adapter: what it is and how to load it."""
    adapter = config.adapter
    return f"""---
base_model: {config.model.name}
library_name: peft
tags: [mole-studio, mixture-of-lora-experts, {adapter.router}]
---

A mixture of LoRA experts for `{config.model.name}`, trained with MoLE Studio.

Router {adapter.params.title}, {adapter.num_experts} experts of rank {adapter.r} at a projection.
{adapter.params.summary}

```python
import mole  # first: without it PEFT does not know the adapter type MOLE_STUDIO and says KeyError
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

It was trained with the chat template in `chat_template.jinja`; use the same one for prompts.
"""


class MoleTrainer(Trainer):
    """Trainer with logits only where there are labels, auxiliary losses counted once a batch, and safe checkpoints."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        base: Base,
        model: PeftModel,
        datasets: Datasets,
        meta: dict[str, Any],
        progress: bool,
    ) -> None:
        self.run, self.run_config, self.base, self.data, self.meta = run, config, base, datasets, meta
        self.peft_model = model
        self.losses: dict[str, Tensor] = {}
        self.batch_tokens: Tensor | int = 1
        self.evaluated: tuple[int, dict[str, float]] | None = None
        self.log_callback = EventLog(self, progress)
        super().__init__(
            model=model,
            args=training_arguments(run, config, base),
            data_collator=Collator(base.tokenizer.pad_token_id),
            train_dataset=datasets.train,
            eval_dataset=datasets.eval,
            callbacks=[self.log_callback],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the labels of the whole accumulated batch
        base_model: Any = model.get_base_model()
        self.head: nn.Module = base_model.get_output_embeddings()

    def announce(self, source: Path | None) -> None:
        """Write the `started` and `data` events."""
        report = self.data.report
        step = 0 if source is None else checkpoint.read_manifest(source).step
        trainable = sum(p.numel() for p in self.peft_model.parameters() if p.requires_grad)
        self.run.append_event(
            "started",
            step,
            pid=os.getpid(),
            device=str(self.base.device),
            dtype=str(self.base.dtype).removeprefix("torch."),
            trainable_parameters=trainable,
            total_parameters=sum(p.numel() for p in self.peft_model.parameters()),
            total_steps=self.total_steps(),
            resumed_from=None if source is None else source.name,
        )
        self.run.append_event("data", step, **report.to_dict())

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.run_config.training, len(self.data.train))[0]

    def take_over(self, source: Path) -> None:
        """Take the weights of the last step's checkpoint: of nothing left to do, Trainer would do one step more."""
        self._load_from_checkpoint(str(source))
        self.state = TrainerState.load_from_json(str(source / TRAINER_STATE))

    def conclude(self) -> None:
        """After the last step: write the adapter and the `finished` event, or `stopped`."""
        step = self.state.global_step
        if step < self.total_steps():
            self.run.append_event("stopped", step)
            return
        metrics = {key: value for key, value in self.log_callback.summary().items() if value is not None}
        if self.data.eval is not None and len(self.data.eval):
            metrics.update(self.evaluate())
        checkpoint.write_folder(self.run.adapter_dir, self.write_adapter, step=step, meta=self.meta)
        self.run.append_event("finished", step, metrics=metrics)

    def write_adapter(self, folder: Path) -> None:
        """Put the adapter in PEFT's format, and the chat template it was trained with, into a folder.

        Raises `TrainingError` when its weights are not finite: such a checkpoint must not push out a good one.
        """
        finite = [weight.isfinite().all() for weight in self.peft_model.parameters() if weight.requires_grad]
        if not torch.stack(finite).all():
            raise TrainingError(f"The adapter's weights are not finite after step {self.state.global_step}. {CALMER}")
        # without a look for resized embeddings, which asks the hub and can take long
        self.peft_model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        (folder / TEMPLATE_FILE).write_text(chat_template(self.base.tokenizer), encoding="utf-8")
        (folder / "README.md").write_text(model_card(self.run_config), encoding="utf-8")

    # Loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.batch_tokens = sum(batch["attention_mask"].sum() for batch in samples)
        self.losses = {}
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy of the labelled tokens of the whole accumulated batch, plus the auxiliary loss.

        The auxiliary loss of a micro-batch is weighted by its share of tokens, so that means over tokens add up
        to those of one big batch.
        """
        with one_batch(model):
            loss = self.summed_loss(model, inputs)
        items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != -100).sum()
        loss = loss / items
        self.note("loss", loss)
        if model.training and self.has_router:
            auxiliary = auxiliary_loss(model) * (inputs["attention_mask"].sum() / self.batch_tokens)
            self.note("aux_loss", auxiliary)
            loss = loss + auxiliary
        return (loss, {}) if return_outputs else loss

    @property
    def has_router(self) -> bool:
        return self.run_config.adapter.router != "lora"

    def summed_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Sum of the cross-entropy over the labelled tokens of a batch, logits computed at those alone → scalar.

        Rows of like length go through the model together, so that little of the work is padding.
        """
        overhead = OVERHEAD.get(inputs["input_ids"].device.type, OVERHEAD_GPU)
        return torch.stack([self.loss_of_part(model, part) for part in by_length(inputs, overhead)]).sum()

    def loss_of_part(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The same of rows that go through the model together."""
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
        positions = (labels != -100).nonzero()[:, 0]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return summed_loss_at(model, self.head, positions, labels[positions], **given)

    def note(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's part of a loss to the step's."""
        self.losses[name] = self.losses.get(name, torch.zeros_like(value)) + value.detach()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean cross-entropy over all labelled tokens of the held-out rows, as the `eval` event; once a step."""
        if self.evaluated is None or self.evaluated[0] != self.state.global_step:
            metrics = {"eval_loss": self.held_out_loss()}
            self.evaluated = self.state.global_step, metrics
            self.run.append_event("eval", self.state.global_step, **metrics)
        return self.evaluated[1]

    def held_out_loss(self) -> float:
        """Mean cross-entropy over all labelled tokens of the held-out rows."""
        self.peft_model.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                total += self.summed_loss(self.peft_model, inputs).item()
                count += int((inputs["labels"][:, 1:] != -100).sum())
        return total / max(count, 1)

    # Checkpoints: whole or not at all, no pickle

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def writer(folder: Path) -> None:
            self.write_adapter(folder)
            state.save_state(folder, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        settings = self.run_config.training
        step = self.state.global_step
        folder = checkpoint.write(self.run.checkpoints_dir, step, writer, self.meta, limit=settings.save_total_limit)
        self.run.append_event("checkpoint", step, path=folder.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        outcome: Any = set_peft_model_state_dict(self.peft_model, load_file(Path(resume_from_checkpoint) / WEIGHTS))
        if outcome.unexpected_keys:
            strange = ", ".join(outcome.unexpected_keys[:3])
            raise CheckpointError(f"{resume_from_checkpoint} has weights that this adapter has not: {strange}.")

    def _load_optimizer_and_scheduler(self, resume_from: str | None) -> None:
        if resume_from is not None:
            state.restore_optimizer(Path(resume_from), self.optimizer, self.lr_scheduler, self.accelerator.scaler)

    def _load_scaler(self, resume_from: str | None) -> None:
        """Done with the optimizer."""

    def _load_rng_state(self, resume_from: str | None) -> None:
        if resume_from is not None:
            state.restore_random(Path(resume_from))
