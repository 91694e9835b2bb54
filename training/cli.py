"""The command line: `prefkern train | demo | losses | score-critical-tokens | doctor`.

Errors that the user can mend are one sentence on stderr and exit status 2; PREFKERN_DEBUG=1 shows where they arose.
Nothing but argparse is imported before a command is chosen.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words, those of the process unless given.
    Returns:
        Exit status: 0, 2 for an error that the user can mend, 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(with_demo="demo" in words[:1])
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    from prefkern.training.errors import UserError

    try:
        return args.run(args)
    except UserError as error:
        if os.environ.get("PREFKERN_DEBUG") == "1":
            raise
        print(f"prefkern: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("prefkern: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser(with_demo: bool = False) -> argparse.ArgumentParser:
    """The parser.

    Args:
        with_demo: fill in the options of `demo`, which imports it.
    """
    from prefkern import __version__

    parser = argparse.ArgumentParser(
        prog="prefkern", description="Preference losses for language models, without logits."
    )
    parser.add_argument("--version", action="version", version=f"prefkern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    train = commands.add_parser(
        "train",
        help="train a model as a YAML file says",
        description="Train a model as a YAML file says; any key can be set on the command line.",
        epilog="example: prefkern train dpo.yaml loss.beta=0.05 trainer.learning_rate=5e-7 run.resume=true",
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="sections run, model, data, loss, reference, trainer")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="tune a small model on arithmetic, offline, in minutes")
    if with_demo:
        from prefkern.training import demo as demo_module

        demo_module.add_arguments(demo)
    demo.set_defaults(run=_demo)

    table = commands.add_parser("losses", help="list the losses, or show all about one")
    table.add_argument("name", nargs="?", metavar="NAME", help="show this loss's formula, options and data columns")
    table.add_argument("--markdown", action="store_true", help="print all pages as the text of docs/losses.md")
    table.set_defaults(run=_losses)

    score = commands.add_parser(
        "score-critical-tokens",
        help="weigh the tokens of a dataset for critical_token_dpo",
        description="Weigh every token of a preference dataset by how differently two models see it, one tuned on right"
        " answers and one on wrong answers: adds columns chosen_token_weights and rejected_token_weights, which"
        " critical_token_dpo trains with. Give the limits that training will have.",
        epilog="example: prefkern score-critical-tokens pairs.jsonl --model Qwen/Qwen3-1.7B --positive lora/right"
        " --negative lora/wrong --output weighted.parquet",
    )
    _add_score_options(score)
    score.set_defaults(run=_score)

    doctor = commands.add_parser("doctor", help="show versions, devices, and which kernels would run and why")
    add = doctor.add_argument
    add(
        "--shape", type=int, nargs=3, metavar=("N", "D", "V"),
        help="response tokens of a batch, hidden size, vocabulary (1024 4096 128256)",
    )  # fmt: skip
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the head (%(default)s)")
    add("--rank", type=int, metavar="R", help="of a LoRA on the head")
    add("--group-rows", type=int, metavar="ROWS", help="response tokens of the loss's largest group, such as a pair")
    add("--workspace-bytes", type=int, metavar="BYTES", help="scratch memory for logits")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=".json, .jsonl or .parquet file, folder of save_to_disk, or hub name")
    add("--positive", required=True, metavar="MODEL", help="model, or with --model adapter, tuned on right answers")
    add("--negative", required=True, metavar="MODEL", help="the same, tuned on wrong answers")
    add("--model", metavar="MODEL", help="model that the two adapters belong to")
    add("--output", required=True, metavar="PATH", help=".jsonl or .parquet file, or a folder for load_from_disk")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only-rejected",
        dest="both",
        action="store_false",
        help="chosen tokens weigh 1, as in the authors' code; default",
    )
    which.add_argument("--both", action="store_true", help="a chosen token weighs 1 less its score")
    parser.set_defaults(both=False)
    add("--gamma", type=float, default=1.0, help="strength of the contrast (%(default)s)")
    data = parser.add_argument_group("data, as in the data section of a training file")
    data.add_argument("--split", default="train", help="split that is scored (%(default)s)")
    data.add_argument("--config", metavar="NAME", help="configuration of a hub dataset")
    data.add_argument(
        "--column", action="append", default=[], metavar="STANDARD=OWN",
        help="the data's own name of prompt, chosen or rejected; may be given several times",
    )  # fmt: skip
    data.add_argument("--limit", type=int, metavar="ROWS", help="the first rows only")
    for name in ("--max-prompt-length", "--max-response-length", "--max-length"):
        data.add_argument(name, type=int, metavar="TOKENS")
    data.add_argument("--no-append-eos", dest="append_eos", action="store_false", help="do not end responses with EOS")
    data.add_argument("--num-proc", type=int, metavar="N", help="processes that tokenise")
    how = parser.add_argument_group("models")
    how.add_argument("--tokenizer", metavar="NAME", help="that of --model or --positive unless set")
    how.add_argument("--eos-token", metavar="TOKEN", help="token that ends a response, the tokenizer's own unless set")
    how.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="weights (%(default)s)"
    )
    how.add_argument("--device", help="cuda where there is one, else cpu, unless set")
    how.add_argument("--batch-size", type=int, default=8, metavar="ROWS", help="rows at a time (%(default)s)")
    how.add_argument("--workspace-bytes", type=int, metavar="BYTES", help="scratch memory for logits")
    how.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def _train(args: argparse.Namespace) -> int:
    from prefkern.training.config import load_config

    logging.basicConfig(format="%(message)s")
    logging.getLogger("prefkern").setLevel(logging.INFO)
    config = load_config(args.config, args.overrides)
    from prefkern.training.resolve import resolve_loss

    resolve_loss(config.loss)  # a wrong loss is told before importing transformers takes its seconds
    import torch.distributed as dist

    from prefkern.training.run import run_training

    is_callers = dist.is_available() and dist.is_initialized()
    result = run_training(config)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        print(f"model    {result.model}\nmetrics  {result.output / 'metrics.jsonl'}\ncurves   {result.curves}")
    # Threads of gloo that outlive the interpreter abort it. Not after an error: others may still be in a collective.
    if dist.is_available() and dist.is_initialized() and not is_callers:
        dist.destroy_process_group()
    return 0


def _demo(args: argparse.Namespace) -> int:
    from prefkern.training import demo

    return demo.main(args)


def _losses(args: argparse.Namespace) -> int:
    from prefkern.training import registry_docs

    if args.markdown:
        sys.stdout.write(registry_docs.markdown())
    else:
        print(registry_docs.page(args.name) if args.name else registry_docs.table())
    return 0


def _score(args: argparse.Namespace) -> int:
    from prefkern.training import critical_tokens

    return critical_tokens.main(args)


def _doctor(args: argparse.Namespace) -> int:
    import torch

    from prefkern.training.doctor import report

    shape = {} if args.shape is None else {"shape": args.shape}
    options = {"rank": args.rank, "group_rows": args.group_rows, "workspace_bytes": args.workspace_bytes}
    print(report(dtype=getattr(torch, args.dtype), **shape, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
