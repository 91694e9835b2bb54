"""Options of the benchmarks."""

from argparse import ArgumentTypeError
from pathlib import Path

from bench.shapes import MODELS, TOKENS, Shape
from bench.suites import SUITES

USUAL_SUITES = ("dpo", "head", "tail", "scaling", "trainer")


def shape(text: str) -> Shape:
    """N,D,V of an option."""
    try:
        n, d, v = map(int, text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} should be three numbers: N,D,V") from None
    return Shape(n, d, v)


def listed(known, convert=str):
    """The parser of an option that lists values, of those known."""

    def parse(text: str) -> list:
        values = [convert(part) for part in text.split(",")]
        unknown = [str(value) for value in values if known is not None and value not in known]
        if unknown:
            raise ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(map(str, known))}")
        return values

    return parse


def add_options(add) -> None:
    """The options, by `add_argument` of a parser or `addoption` of pytest's."""
    known = (*SUITES, "trainer")
    passes = dict.fromkeys(kind for suite in SUITES.values() for kind in suite.flops)
    providers = dict.fromkeys(name for suite in SUITES.values() for name in suite.providers)
    add("--suite", type=listed(known), default=list(USUAL_SUITES), help=f"of {', '.join(known)}; models when asked for")
    add("--shape", type=shape, action="append", help="N,D,V of the suites without shapes of their own; repeatable")
    add("--model", type=listed(MODELS), default=list(MODELS), help=f"of {', '.join(MODELS)}, for the models suite")
    add("--tokens", type=listed(None, int), default=list(TOKENS), help="N of the models suite")
    add("--dtype", type=listed(("bf16", "fp32")), default=[], help="bf16,fp32; the suites' own unless set")
    add("--passes", type=listed(passes), default=[], help=f"of {', '.join(passes)}; the suites' own unless set")
    add("--providers", type=listed(providers), default=[], help=f"of {', '.join(providers)}; some only run by name")
    add("--rounds", type=int, default=0, help="times that each provider is run, the suites' own unless set")
    add("--left-out", type=Path, default=None, help="file to append to what was not timed and why, as JSON lines")


def pytest_addoption(parser) -> None:
    add_options(parser.getgroup("bench").addoption)
