"""Training curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Panel(NamedTuple):
    """One plot: its title, the unit on its axis, and the metrics drawn in it with their labels."""

    title: str
    unit: str
    series: dict[str, str]


PANELS = (
    Panel("Loss", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    Panel(
        "Rewards",
        "reward (nats)",
        {
            "rewards/chosen": "chosen",
            "rewards/rejected": "rejected",
            "rewards/margins": "margin",
            "rewards/best": "best response",
        },
    ),
    Panel(
        "Preference accuracy",
        "share of prompts",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
    ),
    Panel(
        "Response log-probability",
        "nats per response",
        {
            "logps/chosen": "chosen",
            "logps/rejected": "rejected",
            "logps/response": "response",
            "logps/best": "best response",
        },
    ),
    Panel(
        "Distance from the reference",
        "nats per response",
        {"kl": "mismatched responses", "list/log_ratio": "the list's responses"},
    ),
    Panel("Choice among a list", "entropy (nats)", {"list/entropy": "policy", "list/target_entropy": "target"}),
    Panel(
        "Pull on chosen over rejected",
        "log of gradient ratio",
        {"gradients/log_ratio_logp": "this loss", "gradients/log_ratio_logp_before": "without its correction"},
    ),
    Panel(
        "Token accuracy",
        "share of tokens",
        {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"},
    ),
    Panel("Entropy", "nats per token", {"entropy": "training", "eval_entropy": "evaluation"}),
    Panel("Gradient norm", "norm", {"grad_norm": "before clipping"}),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
)
_COLOURS = ("#2f6db3", "#d1603d", "#3c8d5a", "#7a5aa6")


def draw_curves(metrics: Sequence[dict], path: Path, title: str = "") -> Path | None:
    """Draw the panels that the metrics have numbers for.

    Args:
        metrics: logged lines, each with its `step`, as `callbacks.read_metrics` reads them.
        path: the PNG to write.
        title: above all panels.
    Returns:
        The path, or None where there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    panels = [p for p in PANELS if any(name in line for line in metrics for name in p.series)]
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.4), layout="constrained")
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, i + 1), panel, metrics)
    if title:
        figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=140)
    return Path(path)


def _draw(axes, panel: Panel, metrics: Sequence[dict]) -> None:
    for colour, (name, label) in zip(_COLOURS, panel.series.items()):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points), color=colour, label=label, linewidth=1.6, marker=marker, markersize=3.5)
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=9)
