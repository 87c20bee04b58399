"""What a training run writes while it runs: an event per logged step and the progress bar; and how it is stopped."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mole.core.errors import TrainingError
from mole.runs.run import Run

DIVERGENCE_ADVICE = (
    "Start a new run with a lower training.learning_rate, a larger training.warmup_steps, or model.dtype float32; "
    "the last good checkpoint is kept."
)


class ObservedTrainer(Protocol):
    """What the event log reads of a trainer.

    Attributes:
        run: the run, whose events are written.
        device: where the model is.
        losses: scalars of the last optimizer step, `loss` among them.
        batch_tokens: tokens of the last optimizer step, without padding.
    """

    run: Run
    losses: dict[str, Tensor]
    batch_tokens: Tensor | int

    @property
    def device(self) -> torch.device: ...

    def routing_statistics(self) -> dict[str, Any] | None:
        """Statistics of the routing in the last optimizer step; None without a router."""


class EventLog(TrainerCallback):
    """Writes a `step` event per logged step, draws the progress bar, and stops the training on request."""

    def __init__(self, trainer: ObservedTrainer, progress: bool) -> None:
        self.trainer, self.progress = trainer, progress
        self.bar: Any = None
        self.began = self.last_log = time.monotonic()
        self.first_step = 0
        self.tokens = 0
        """Tokens since the last log."""
        self.all_tokens = 0
        self.last_loss: float | None = None
        self.steps_of_this_process = 0
        self.lowest_loss, self.highest_loss = math.inf, -math.inf
        self.until = math.inf
        """When a lent device is given back, by `time.monotonic`; see `mole.training.lent`."""

    @property
    def is_lent(self) -> bool:
        """Whether the device is lent."""
        return self.until < math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last_log = time.monotonic()
        self.first_step = state.global_step
        if self.progress:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc=self.trainer.run.name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the loss, the request to stop and the time. Raises `TrainingError` when the loss is not finite."""
        self.tokens += int(self.trainer.batch_tokens)
        loss = float(self.trainer.losses["loss"])  # waits for the device: the step has really ended
        if not math.isfinite(loss):
            raise TrainingError(f"The loss became {loss} at step {state.global_step}. {DIVERGENCE_ADVICE}")
        self.last_loss = loss
        self.steps_of_this_process += 1
        self.lowest_loss, self.highest_loss = min(self.lowest_loss, loss), max(self.highest_loss, loss)
        if self.bar is not None:
            self.bar.update()
        ends = self.trainer.run.stop_requested() or time.monotonic() >= self.until
        if ends and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = not self.is_lent  # there the adapter is written instead of a checkpoint

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "learning_rate" not in logs:  # the summary that Trainer logs at the end
            return
        now = time.monotonic()
        speed = self.tokens / max(now - self.last_log, 1e-9)
        steps = state.global_step - self.first_step
        eta = (now - self.began) / max(steps, 1) * (state.max_steps - state.global_step)
        self.all_tokens += self.tokens
        self.tokens, self.last_log = 0, now
        losses = {name: round(float(value), 6) for name, value in self.trainer.losses.items()}
        self.trainer.run.append_event(
            "step",
            state.global_step,
            **losses,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(speed, 1),
            memory_mb=round(memory_mb(self.trainer.device), 1),
            eta_s=round(eta, 1),
            routing=self.trainer.routing_statistics(),
        )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {losses['loss']:.3f}, {speed:,.0f} tokens/s")

    def summary(self) -> dict[str, float]:
        """The last loss if a step was taken, the seconds of training, and the mean tokens/s."""
        seconds = time.monotonic() - self.began
        loss = {} if self.last_loss is None else {"loss": self.last_loss}
        speed = self.all_tokens / max(seconds, 1e-9)
        return {**loss, "seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}

    @property
    def loss_never_moved(self) -> bool:
        """Whether several steps were taken, and all had the same loss to within the rounding of float32."""
        spread = self.highest_loss - self.lowest_loss
        return self.steps_of_this_process > 1 and spread <= 1e-6 * max(abs(self.highest_loss), 1e-6)

    def close(self) -> None:
        """Finish the progress bar."""
        if self.bar is not None:
            self.bar.close()


def memory_mb(device: torch.device) -> float:
    """Memory of the training in MiB: the GPU's peak, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
