"""What a training tells while it runs: an event for every logged step, the progress bar, and the request to stop."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from mole.core.errors import TrainingError
from mole.mixture.routing_log import layer_statistics

if TYPE_CHECKING:
    from mole.training.trainer import MoleTrainer


CALMER = (
    "Start a new run with a lower training.learning_rate, a larger training.warmup_steps, or model.dtype float32; "
    "the last good checkpoint is kept."
)


class EventLog(TrainerCallback):
    """Writes a `step` event for every logged step, draws the progress bar, and carries the request to stop."""

    def __init__(self, trainer: MoleTrainer, progress: bool) -> None:
        self.trainer, self.progress = trainer, progress
        self.bar: Any = None
        self.began = self.last = time.monotonic()
        self.first_step = 0
        self.tokens = 0
        self.all_tokens = 0
        self.last_loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last = time.monotonic()
        self.first_step = state.global_step
        if self.progress:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc=self.trainer.run.name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens += int(self.trainer.batch_tokens)
        loss = float(self.trainer.losses["loss"])
        if not math.isfinite(loss):
            raise TrainingError(f"The loss became {loss} at step {state.global_step}. {CALMER}")
        self.last_loss = loss
        if self.bar is not None:
            self.bar.update()
        if self.trainer.run.stop_requested() and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "learning_rate" not in logs:
            return
        now = time.monotonic()
        speed = self.tokens / max(now - self.last, 1e-9)
        steps = state.global_step - self.first_step
        eta = (now - self.began) / max(steps, 1) * (state.max_steps - state.global_step)
        self.all_tokens += self.tokens
        self.tokens, self.last = 0, now
        losses = {name: round(float(value), 6) for name, value in self.trainer.losses.items()}
        self.trainer.run.append_event(
            "step",
            state.global_step,
            **losses,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round(speed, 1),
            memory_mb=round(memory_mb(self.trainer.base.device), 1),
            eta_s=round(eta, 1),
            routing=layer_statistics(self.trainer.peft_model) if self.trainer.has_router else None,
        )
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {losses['loss']:.3f}, {speed:,.0f} tokens/s")

    def summary(self) -> dict[str, float | None]:
        """The last loss, the seconds of training and the mean speed."""
        seconds = time.monotonic() - self.began
        speed = round(self.all_tokens / max(seconds, 1e-9), 1)
        return {"loss": self.last_loss, "seconds": round(seconds, 1), "tokens_per_second": speed}

    def close(self) -> None:
        """Finish the progress bar."""
        if self.bar is not None:
            self.bar.close()


def memory_mb(device: torch.device) -> float:
    """Memory the training holds, in MiB: the GPU's peak, or this process's resident size on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
