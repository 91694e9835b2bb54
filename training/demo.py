"""`prefkern demo`: a small language model learns arithmetic from flawed solutions, and preferences mend it.

1. `demo_data` writes word problems with right and slipped solutions.
2. A Llama-architecture model made from nothing is fine-tuned (`nll`) on solutions of mixed quality: most have a slip.
3. From that one checkpoint it is tuned on pairs of a right and a slipped solution, with `dpo` and with
   `autoregressive_dpo`: same pairs, same order, same steps, same learning rate, same beta.
4. All three models answer held-out problems, with numbers that no training problem gives (see `demo_data`).

Every stage is an ordinary run of `prefkern.training.run`: what `prefkern train` does, with nothing added.

**How the settings were chosen.** On 240 validation problems, whose numbers are neither those of training nor those of
the test, and for both methods together; exact answers with dpo / autoregressive_dpo:

    start 28 % (shorter nll), 120 steps, learning rate 3e-4    beta 0.3: 31 / 28    1: 50 / 43    3: 51 / 48 %
    start 64 %, 80 steps, learning rate 1e-4                   beta 1: 89 / 89      3: 83 / 82 %

The last row's better beta was taken. (At 3e-4 the probability of right solutions falls with that of the slipped ones,
and some kind of problem is answered worse than before.) `adaptive: 4`, about one part a line, was the first choice and
was not searched. The sizes are what five minutes on two CPU cores allow: 0.7 million parameters.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefkern.training.demo_data import (
    Example,
    draw_examples,
    mixed_solutions,
    preference_pairs,
    read_answer,
    write_jsonl,
)
from prefkern.training.demo_report import Outcome, draw, table, write_json
from prefkern.training.errors import ConfigError

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "autoregressive_dpo": {"name": "autoregressive_dpo", "granularity": {"adaptive": 4}},
}
MAX_NEW_TOKENS = 64  # the longest solution has 55


@dataclass(frozen=True)
class Settings:
    """Sizes of one demo. Counts are of problems; a step sees `batch` solutions (nll) or pairs."""

    seed: int = 0
    hidden_size: int = 128
    layers: int = 3
    slipped_share: float = 0.7  # of the solutions that nll sees
    pitfall_share: float = 0.85  # of the slips that are the family's typical one
    nll_steps: int = 1200
    nll_learning_rate: float = 4e-3
    pair_steps: int = 80
    pair_learning_rate: float = 1e-4
    beta: float = 1.0
    batch: int = 16
    micro_batch: int = 8  # sequences packed together; attention over a pack costs their number squared
    test: int = 480


QUICK = Settings(hidden_size=32, layers=2, nll_steps=30, pair_steps=5, test=24)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefkern demo`."""
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where all is written (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in that folder")
    parser.add_argument("--seed", type=int, default=0, help="of data, model and training (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the same road in seconds, too short to learn anything")


def main(args: argparse.Namespace) -> int:
    """Run the demo and print its report.

    Returns:
        Exit status 0.
    Raises:
        ConfigError: the folder holds something already.
    """
    started = time.perf_counter()
    sizes = asdict(QUICK if args.quick else Settings())
    settings = Settings(**{**sizes, "seed": args.seed})
    out = _empty_folder(Path(args.out), args.overwrite)
    _quiet()
    data, test = _write_data(settings, out)
    _make_start(settings, out / "untrained", data["nll"])

    from prefkern.training.config import Config
    from prefkern.training.run import run_training

    outcomes, runs = [], {}
    for name in ("start", *METHODS):
        _say(f"{name}: training")
        runs[name] = run_training(Config.from_dict(stage(name, settings, out, data)))
        _say(f"{name}: {len(test)} held-out problems")
        outcomes.append(_evaluate(name, runs[name].model, test, data["test"]))
    seconds = time.perf_counter() - started
    about = {"settings": asdict(settings), "methods": METHODS, "seconds": round(seconds, 1)}
    write_json(out / "report.json", outcomes, about)
    draw(out / "report.png", outcomes, f"Preference tuning of a small Llama on {len(test)} held-out word problems")
    _print_report(outcomes, test, out, seconds)
    return 0


def stage(name: str, settings: Settings, out: Path, data: dict[str, Path]) -> dict[str, Any]:
    """The configuration of one training stage as nested mappings, as a YAML file would hold it.

    Args:
        name: "start" for the fine-tuning that both methods begin from, or one of METHODS.
        settings: sizes.
        out: the demo's folder; the stage runs in `out / name`.
        data: files by what they are for.
    """
    first = name == "start"
    sequences = 1 if first else 2
    steps = settings.nll_steps if first else settings.pair_steps
    return {
        "run": {"output": str(out / name)},
        "model": {"name": str(out / "untrained" if first else out / "start" / "model")},
        "data": {"train": str(data["nll" if first else "pairs"])},
        "loss": {"name": "nll"} if first else {**METHODS[name], "beta": settings.beta},
        # They depend on the start model and the pairs alone: computed once, and used by both methods.
        "reference": {"mode": "none"}
        if first
        else {"mode": "precomputed", "batch_size": settings.micro_batch // sequences},
        "trainer": {
            "max_steps": steps,
            "learning_rate": settings.nll_learning_rate if first else settings.pair_learning_rate,
            "per_device_train_batch_size": settings.micro_batch // sequences,
            "gradient_accumulation_steps": settings.batch * sequences // settings.micro_batch,
            "warmup_steps": max(1, steps // 10),
            "adam_beta2": 0.98,
            "weight_decay": 0.1 if first else 0.0,
            "logging_steps": max(1, steps // 10),
            "save_strategy": "no",
            "seed": settings.seed,
        },
    }


def _empty_folder(out: Path, overwrite: bool) -> Path:
    """The demo's folder, empty. Only what a demo made is ever removed.

    Raises:
        ConfigError: there is something in it, and either it is no demo or `overwrite` is off.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file: choose another folder")
    if out.exists() and any(out.iterdir()):
        if not (out / "data" / "pairs.jsonl").exists():
            raise ConfigError(f"--out {str(out)!r} holds something that is no demo: choose another folder")
        if not overwrite:
            raise ConfigError(f"--out {str(out)!r} already holds a demo: add --overwrite, or choose another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write_data(settings: Settings, out: Path) -> tuple[dict[str, Path], list[Example]]:
    """Write the training and test files; the problems of the three are all different."""
    _say(f"writing word problems to {out / 'data'}")
    share, taken = settings.pitfall_share, set()
    nll = draw_examples(settings.nll_steps * settings.batch, "train", settings.seed, share, taken)
    pairs = draw_examples(settings.pair_steps * settings.batch, "train", settings.seed + 1, share, taken)
    test = draw_examples(settings.test, "test", settings.seed, share)
    folder = out / "data"
    folder.mkdir()
    rows = {
        "nll": mixed_solutions(nll, settings.slipped_share, settings.seed),
        "pairs": preference_pairs(pairs),
        "test": preference_pairs(test),
    }
    return {name: write_jsonl(row, folder / f"{name}.jsonl") for name, row in rows.items()}, test


def _make_start(settings: Settings, folder: Path, nll: Path) -> None:
    """Save a tokenizer trained on the fine-tuning file, and a freshly initialised model."""
    from prefkern.training.demo_model import make_model, make_tokenizer

    tokenizer = make_tokenizer(nll)
    model = make_model(tokenizer, settings.hidden_size, settings.layers, settings.seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    _say(f"model: Llama architecture, {millions:.2f} million parameters, untrained")


def _evaluate(name: str, folder: Path, test: Sequence[Example], pairs: Path) -> Outcome:
    from prefkern.training.demo_model import greedy, load, pair_logps

    model, tokenizer = load(folder)
    texts = greedy(model, tokenizer, [e.prompt for e in test], MAX_NEW_TOKENS)
    chosen, rejected = pair_logps(model, tokenizer, pairs)
    return Outcome(
        name,
        [e.problem.family for e in test],
        [read_answer(text) == read_answer(e.chosen) for text, e in zip(texts, test)],
        [w > x for w, x in zip(chosen, rejected)],
        texts,
    )


def _print_report(outcomes: Sequence[Outcome], test: Sequence[Example], out: Path, seconds: float) -> None:
    start, *tuned = outcomes
    # The first problem that the start answers wrongly and a tuned model rightly; the first of all where there is none.
    mended = [(i, o) for i in range(len(test)) for o in tuned if o.exact[i] and not start.exact[i]]
    i, shown = mended[0] if mended else (0, tuned[0])
    print(f"\nOne held-out problem\n\n{_indent(test[i].prompt)}")
    for outcome in (start, shown):
        mark = "right" if outcome.exact[i] else "wrong"
        print(f"{'before' if outcome is start else f'after {outcome.name}'} ({mark})\n{_indent(outcome.texts[i])}\n")
    print(f"{len(test)} held-out problems; no training problem gives any of their two-digit numbers\n")
    print(table(outcomes))
    print(
        "\nexact answer: the greedily decoded solution ends in the right number"
        "\npreference accuracy: the model itself finds the right solution likelier than the slipped one"
        " (sums of token log-probabilities, end token included)"
    )
    print(f"\npicture  {out / 'report.png'}\nnumbers  {out / 'report.json'}\ncurves   {out / '*' / 'curves.png'}")
    print("\nEach stage again by hand, for example:")
    for name in ("start", *METHODS):
        print(f"  prefkern train {out / name / 'config.yaml'} run.output={out.with_name(out.name + '-again') / name}")
    print(f"\nDone in {seconds:.0f} s.")


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())


def _quiet() -> None:
    """Keep the libraries' chatter out of the demo's output; progress bars stay."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch.utils.data")


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)
