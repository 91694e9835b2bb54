"""What a run tells while it goes on: metrics as JSON lines, and a progress bar with one short line a log."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

_SHOWN = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "rewards/margins": "margin",
    "eval_rewards/margins": "margin",
    "rewards/best": "best",
    "eval_rewards/best": "best",
    "rewards/accuracies": "accuracy",
    "eval_rewards/accuracies": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "eval_mean_token_accuracy": "token accuracy",
    "entropy": "entropy",
    "grad_norm": "grad norm",
    "learning_rate": "lr",
}


class JsonlMetrics(TrainerCallback):
    """Appends every log to a file, one JSON object a line with its `step`.

    A resumed run first drops what was logged after its checkpoint, so that no step is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept if state.global_step > 0))
        os.replace(rewritten, self.path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The lines that `JsonlMetrics` wrote; a last line cut short by a kill is left out."""
    lines = []
    if Path(path).exists():
        for text in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def log_line(state, logs: dict | None) -> str | None:
    """The step and the few numbers worth watching, or None where there are none."""
    parts = [f"{label} {logs[name]:.4g}" for name, label in _SHOWN.items() if name in (logs or {})]
    width = len(str(state.max_steps))
    return f"step {state.global_step:>{width}}/{state.max_steps}  " + "  ".join(parts) if parts else None


class ProgressBar(ProgressCallback):
    """transformers' progress bar, with a short line in place of the whole dictionary of metrics."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(state, logs)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


class LinePrinter(TrainerCallback):
    """The same lines where progress bars are switched off."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(state, logs)
        if state.is_local_process_zero and line:
            print(line, flush=True)
