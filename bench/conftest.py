"""Options of the benchmarks."""

from bench.suites import Shape


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def pytest_addoption(parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--shape", type=_shape, default=Shape(), metavar="N,D,V", help="rows, hidden size, vocabulary")
    group.addoption("--rounds", type=int, default=0, help="times that each provider is run, suites' own unless set")
    group.addoption("--providers", type=lambda text: text.split(","), help="only these, separated by commas")
