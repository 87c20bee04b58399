"""Trains a run in this process: transformers' Trainer with auxiliary losses, events, and exact resume."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, set_seed

from mole.config import RunConfig
from mole.core import checkpoint
from mole.core.errors import CheckpointError, MoleNotice, TrainingError
from mole.core.text import notices_in_one_line, print_error
from mole.data import Collator, Datasets, build_datasets, chat_template, split_by_length
from mole.mixture.model import mole_config
from mole.mixture.routing_log import auxiliary_loss, one_batch
from mole.mixture.routing_statistics import layer_statistics
from mole.models.adapter_files import WEIGHTS
from mole.models.context import within_positions
from mole.models.loading import TEMPLATE_FILE, Base, load_base, on_its_gpu
from mole.models.logits import summed_loss_at
from mole.models.moved import check_base
from mole.runs.initial import begin_with
from mole.runs.run import Run
from mole.training.callbacks import DIVERGENCE_ADVICE, EventLog
from mole.training.lent import LentDevice, ended_early
from mole.training.model_card import model_card
from mole.training.notices import data_notices, signs_of_nothing_learnt, start_notices
from mole.training.resume import as_begun, check_resumable, first_date, run_identity
from mole.training.schedule import restarting_schedule, set_rate
from mole.training.state import restore_optimizer, restore_random, save_training_state
from mole.training.steps import count_steps, warmup_steps

TRAINER_STATE = "trainer_state.json"
PASS_OVERHEAD = {"cpu": 24}
PASS_OVERHEAD_GPU = 1024
"""Cost of an additional forward pass by kind of device, as the number of tokens that take equally long."""

log = logging.getLogger("mole")
AnyTrainer = TypeVar("AnyTrainer", bound="MoleTrainer")


def train(run: Run, *, resume: bool = False, progress: bool = False, lent: LentDevice | None = None) -> None:
    """Train a run to its end, or until a stop is requested; progress is written to the run's events.

    The caller holds the locks of the run and the device.

    Args:
        run: the run; checkpoints and finally the adapter are written to its folder.
        resume: continue from the newest valid checkpoint; start from the beginning if there is none.
        progress: show a progress bar on the terminal.
        lent: the device, where it is not the one that the settings name and is given back at some time.

    Raises:
        InputError: model, data or a setting cannot be used.
        CheckpointError: settings, data or base model differ from those of the checkpoint.
        TrainingError: the loss is not finite.
    """
    config = run.config if lent is None else lent.placed(run.config)
    check_base(config.model.name, f"If it has moved: mole runs resume {run.name} --base PATH.")
    base = load_base(on_its_gpu(config.model))
    data = within_positions(config, base.model.config).data
    datasets = build_datasets(data, base.tokenizer, config.training.seed, first_date(run))
    source = checkpoint.newest_good(run.checkpoints_dir) if resume else None
    before = None if source is None else checkpoint.read_manifest(source).meta
    if before is not None:
        config = as_begun(config, before)
    identity = run_identity(config, datasets, base)
    if before is not None:
        check_resumable(before, identity)
    trainer = build_trainer(MoleTrainer, run, config, base, datasets, identity, progress)
    if lent is not None:
        trainer.log_callback.until = lent.until
    begun = begin_with(trainer.peft_model, config, identity["base"]) if source is None else []
    trainer.log_start(source, begun)
    try:
        if source is not None and checkpoint.read_manifest(source).step >= trainer.total_steps():
            trainer.load_final_checkpoint(source)
        else:
            trainer.train(resume_from_checkpoint=None if source is None else str(source))
    finally:
        trainer.log_callback.close()
    trainer.finish()


def build_trainer(
    trainer_class: type[AnyTrainer],
    run: Run,
    config: RunConfig,
    base: Base,
    datasets: Datasets,
    identity: dict[str, Any],
    progress: bool,
) -> AnyTrainer:
    """Put a new adapter on the base model and make a trainer of that class for it."""
    set_seed(config.training.seed)
    kept: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers rename gradient checkpointing
        warnings.simplefilter("always", MoleNotice)
        warnings.showwarning = notices_in_one_line(warnings.showwarning, kept)
        model = get_peft_model(base.model, mole_config(config.adapter, task_type="CAUSAL_LM"))
        if config.training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = trainer_class(run, config, base, model, datasets, identity, progress)
    trainer.adapter_notices = kept
    return trainer


def training_arguments(run: Run, config: RunConfig, base: Base, steps: int) -> TrainingArguments:
    """`TrainingArguments` of a run of `steps` steps; `MoleTrainer` replaces its evaluation, logging and checkpoints."""
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
        warmup_steps=warmup_steps(settings, steps),
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device per run: Trainer would use nn.DataParallel on several
    return arguments


class MoleTrainer(Trainer):
    """Trainer with logits of labelled tokens only, the auxiliary losses, and atomic checkpoints."""

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        base: Base,
        model: PeftModel,
        datasets: Datasets,
        identity: dict[str, Any],
        progress: bool,
    ) -> None:
        self.run, self.run_config, self.base, self.data, self.identity = run, config, base, datasets, identity
        self.peft_model = model
        self.losses: dict[str, Tensor] = {}
        self.batch_tokens: Tensor | int = 1
        self.adapter_notices: list[str] = []
        """What was said when the adapter was put on the model."""
        self.last_eval: tuple[int, dict[str, float]] | None = None
        """The step and the metrics of the last evaluation."""
        self.log_callback = EventLog(self, progress)
        super().__init__(
            model=model,
            args=training_arguments(run, config, base, self.total_steps()),
            data_collator=Collator(base.tokenizer.pad_token_id),
            train_dataset=datasets.train,
            eval_dataset=datasets.eval,
            callbacks=[self.log_callback],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the labels of the whole accumulated batch
        base_model: Any = model.get_base_model()
        self.head: nn.Module = base_model.get_output_embeddings()

    def log_start(self, source: Path | None, begun: list[str]) -> None:
        """Write the `started` and `data` events.

        Args:
            source: the checkpoint that is resumed from.
            begun: what to tell of the adapter that the run begins with.
        """
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
            notices=self.adapter_notices
            + self.tell(begun + start_notices(self.run.config, self.base.model.config, self.total_steps())),
        )
        limit = within_positions(self.run_config, self.base.model.config).data.max_length
        notices = self.tell(data_notices(report, limit))
        self.run.append_event("data", step, **{**report.to_dict(), "notices": notices})

    def tell(self, notices: list[str]) -> list[str]:
        """Print what somebody should know of the run, and write it to its log → the same."""
        for notice in notices:
            log.warning(notice)
            if self.log_callback.progress:
                print_error(f"Note: {notice}")
        return notices

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.run_config.training, len(self.data.train))[0]

    def load_final_checkpoint(self, source: Path) -> None:
        """Load a checkpoint of the last step; `Trainer.train` would take one more step from there."""
        self._load_from_checkpoint(str(source))
        self.state = TrainerState.load_from_json(str(source / TRAINER_STATE))

    def finish(self) -> None:
        """Evaluate, write the adapter and the `finished` event; only the `stopped` event before the last step.

        On a lent device a run that ends before its last step is finished too, but not evaluated.
        """
        step, total = self.state.global_step, self.total_steps()
        if step < total and not self.log_callback.is_lent:
            self.run.append_event("stopped", step)
            return
        metrics = self.log_callback.summary()
        if step == total and self.data.eval is not None and len(self.data.eval):
            metrics.update(self.evaluate())
        checkpoint.write_folder(self.run.adapter_dir, self.write_adapter, step=step, meta=self.identity)
        self.run.append_event(
            "finished",
            step,
            metrics=metrics,
            notices=self.tell(ended_early(step, total) + signs_of_nothing_learnt(self.peft_model, self.log_callback)),
        )

    def write_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, its README and the chat template of the training into a folder.

        Raises `TrainingError` when its weights are not finite, so that such a checkpoint never replaces a good one.
        """
        finite = [weight.isfinite().all() for weight in self.peft_model.parameters() if weight.requires_grad]
        if not torch.stack(finite).all():
            raise TrainingError(
                f"The adapter's weights are not finite after step {self.state.global_step}. {DIVERGENCE_ADVICE}"
            )
        # save_embedding_layers=False: the search for resized embeddings would ask the hub, which can take long
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
        """Cross-entropy of a micro-batch divided by the labels of the whole accumulated batch, plus the auxiliary loss.

        The auxiliary loss is weighted by the micro-batch's share of tokens: summed over the accumulated batch, means
        over tokens equal those of one large batch.
        """
        with one_batch(model):
            loss = self.summed_loss(model, inputs)
        items = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != -100).sum()
        loss = loss / items
        self.add_loss("loss", loss)
        if model.training and self.has_router:
            auxiliary = auxiliary_loss(model) * (inputs["attention_mask"].sum() / self.batch_tokens)
            self.add_loss("aux_loss", auxiliary)
            loss = loss + auxiliary
        return (loss, {}) if return_outputs else loss

    @property
    def has_router(self) -> bool:
        """Whether the adapter has a router."""
        return self.run_config.adapter.router != "lora"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.base.device

    def routing_statistics(self) -> dict[str, Any] | None:
        """Statistics of the routing in the last optimizer step; None without a router."""
        return layer_statistics(self.peft_model) if self.has_router else None

    def summed_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Cross-entropy summed over the labelled tokens of a batch → scalar.

        Rows of similar length share a forward pass, so that little time is spent on padding.
        """
        overhead = PASS_OVERHEAD.get(inputs["input_ids"].device.type, PASS_OVERHEAD_GPU)
        return torch.stack([self.one_pass_loss(model, part) for part in split_by_length(inputs, overhead)]).sum()

    def one_pass_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Summed cross-entropy of one forward pass, with logits of labelled tokens only → scalar."""
        # logits at position i predict token i + 1: shift labels left, and drop the last position of each row
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100).flatten()
        positions = (labels != -100).nonzero()[:, 0]
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return summed_loss_at(model, self.head, positions, labels[positions], **given)

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's part to one of the step's losses."""
        self.losses[name] = self.losses.get(name, torch.zeros_like(value)) + value.detach()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the held-out loss and write the `eval` event, at most once per step → `{"eval_loss": …}`."""
        if self.last_eval is None or self.last_eval[0] != self.state.global_step:
            metrics = {"eval_loss": self.held_out_loss()}
            self.last_eval = self.state.global_step, metrics
            self.run.append_event("eval", self.state.global_step, **metrics)
        return self.last_eval[1]

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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        settings = self.run_config.training
        if settings.lr_restarts and self.lr_scheduler is None:
            self.lr_scheduler = restarting_schedule(optimizer or self.optimizer, settings, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints: atomic, and without pickle

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        def writer(folder: Path) -> None:
            self.write_adapter(folder)
            save_training_state(folder, self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        settings = self.run_config.training
        step = self.state.global_step
        folder = checkpoint.write(
            self.run.checkpoints_dir, step, writer, self.identity, limit=settings.save_total_limit
        )
        self.run.append_event("checkpoint", step, path=folder.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        outcome: Any = set_peft_model_state_dict(self.peft_model, load_file(Path(resume_from_checkpoint) / WEIGHTS))
        if outcome.unexpected_keys:
            unexpected = ", ".join(outcome.unexpected_keys[:3])
            raise CheckpointError(f"{resume_from_checkpoint} has weights that are not in this adapter: {unexpected}.")

    def _load_optimizer_and_scheduler(self, resume_from: str | None) -> None:
        if resume_from is not None:
            restore_optimizer(Path(resume_from), self.optimizer, self.lr_scheduler, self.accelerator.scaler)
            set_rate(self.optimizer, self.lr_scheduler)

    def _load_scaler(self, resume_from: str | None) -> None:
        """Does nothing: the scaler is restored with the optimizer."""

    def _load_rng_state(self, resume_from: str | None) -> None:
        if resume_from is not None:
            restore_random(Path(resume_from))
