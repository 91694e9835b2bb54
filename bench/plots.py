"""Pictures of JSON lines: time and memory against N and V, fraction of the roof, the logits path's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

from bench.record import Record, beyond_results  # noqa: E402
from bench.report import ROOF_NAMES, machine, milliseconds  # noqa: E402
from bench.shapes import Shape  # noqa: E402

# Okabe and Ito's colours, told apart by everybody; ours is the one that stands out.
OURS, GREY = "#D55E00", "#777777"
PEERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
PASSES = {
    "forward": ("no gradient", "o", ":"),
    "frozen": ("frozen head", "s", "-"),
    "trained": ("trained head", "^", "--"),
}
FLOPS = {"forward": 2, "frozen": 4, "trained": 6}  # of NDV
LEAST_MIB = 0.1  # a logarithmic axis has no 0
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
         "font.size": 10, "legend.frameon": False, "axes.axisbelow": True, "figure.dpi": 150}  # fmt: skip


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """The pictures that the records have the figures for, a set for each device."""
    folder.mkdir(exist_ok=True)
    drawn = []
    for device in dict.fromkeys(r["device"] for r in records):
        timed = [r for r in records if r["device"] == device and "p50_s" in r]
        against = {
            f"scaling-{dtype}": [r for r in timed if r["suite"] == "scaling" and r["dtype"] == dtype]
            for dtype in dict.fromkeys(r["dtype"] for r in timed)
        }
        heads: dict[str, list[Record]] = {}
        for r in (r for r in timed if r["suite"] in ("head", "dpo") and r["provider"] not in ROOF_NAMES):
            heads.setdefault("roof-n{}-d{}-v{}".format(*r["shape"]), []).append(r)
        wanted = [
            *((name, scaling, part) for name, part in against.items()),
            *((name, of_roof, part) for name, part in heads.items()),
            ("logits", bandwidth, timed),
        ]
        for name, picture, part in wanted:
            with plt.rc_context(STYLE):
                figure = picture(part)
            if figure is not None:
                path = folder / f"{_slug(device)}-{name}.png"
                figure.savefig(path, bbox_inches="tight")
                plt.close(figure)
                drawn.append(path)
    return drawn


def _slug(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def scaling(records: Sequence[Record]):
    """Time and memory of one dtype against N and against V, both axes logarithmic: linear is as steep as the floors."""
    records = [r for r in records if r["provider"] not in ROOF_NAMES]
    if not records:
        return None
    usual = Shape()
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.4), sharex="col", layout="constrained")
    columns = (("N, response tokens", 0, lambda r: r["shape"][2] == usual.v),
               ("V, vocabulary entries", 2, lambda r: r["shape"][0] == usual.n))  # fmt: skip
    for column, (label, axis, belongs) in enumerate(columns):
        chosen = [r for r in records if belongs(r)]
        _lines(axes[0, column], chosen, axis, lambda r: 1000 * r["p50_s"])
        _lines(axes[1, column], chosen, axis, lambda r: max(beyond_results(r), LEAST_MIB))
        _floors(axes[0, column], chosen, axis)
        axes[1, column].set_xlabel(label)
        ticks = sorted({r["shape"][axis] for r in chosen})
        for ax in axes[:, column]:
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.3g}" if y < 1 else f"{y:,.0f}")
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("peak beyond inputs and results, MiB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    d = records[0]["shape"][1]
    dtype = records[0]["dtype"]
    figure.suptitle(f"D {d:,}, {dtype}; left V {usual.v:,}, right N {usual.n:,}; {machine(records[0])}", fontsize=11)
    return figure


def _lines(ax: Axes, records: Sequence[Record], axis: int, value: Callable[[Record], float]) -> None:
    peers = dict.fromkeys(r["provider"] for r in records if not r["ours"])
    colours = dict(zip(peers, PEERS)) | {r["provider"]: OURS for r in records if r["ours"]}
    for provider in (*peers, *dict.fromkeys(r["provider"] for r in records if r["ours"])):
        for kind, (name, marker, line) in PASSES.items():
            part = [r for r in records if (r["provider"], r["pass"]) == (provider, kind)]
            if part:
                x, y = zip(*sorted((r["shape"][axis], value(r)) for r in part))
                ax.plot(x, y, line, marker=marker, ms=5, lw=1.6, color=colours[provider], label=f"{provider}, {name}")


def _floors(ax: Axes, records: Sequence[Record], axis: int) -> None:
    """What each pass needs (2, 4 or 6 NDV) at the rate of the matrix product in the same rounds."""
    for kind, (_, _, line) in PASSES.items():
        found = {
            r["shape"][axis]: 1000 * r["p50_s"] * r["of_roof"] for r in records if r["pass"] == kind and r["of_roof"]
        }
        if found:
            x, y = zip(*sorted(found.items()))
            ax.plot(x, y, line, color=GREY, lw=1, label=f"{FLOPS[kind]}NDV at the matmul's rate")


def of_roof(records: Sequence[Record]):
    """How near to the roof each provider comes at one shape, a panel for each pass and dtype."""
    records = [r for r in records if r.get("of_roof")]
    if not records:
        return None
    keys = list(dict.fromkeys((r["suite"], r["pass"], r["dtype"]) for r in records))
    keys = [k for k in keys if k[0] == "dpo" or ("dpo", *k[1:]) not in keys]
    passes, dtypes = list(dict.fromkeys(k[1] for k in keys)), list(dict.fromkeys(k[2] for k in keys))
    passes.sort(key=list(PASSES).index)
    size = (3.4 * len(passes) + 1, 2.9 * len(dtypes))
    figure, axes = plt.subplots(
        len(dtypes), len(passes), figsize=size, squeeze=False, layout="constrained", sharex=True
    )  # fmt: skip
    most = max(len({r["provider"] for r in records if r["suite"] == suite}) for suite in {k[0] for k in keys})
    for suite, kind, dtype in keys:
        ax = axes[dtypes.index(dtype), passes.index(kind)]
        part = [r for r in records if (r["suite"], r["pass"], r["dtype"]) == (suite, kind, dtype)]
        part.sort(key=lambda r: r["of_roof"])
        colours = [OURS if r["ours"] else PEERS[0] for r in part]
        names, shares = [r["provider"] for r in part], [100 * r["of_roof"] for r in part]
        ax.barh(names, shares, color=colours, height=0.62)
        for y, (share, r) in enumerate(zip(shares, part)):
            label = f"{share:.0f} %, {milliseconds(r['p50_s'])} ms"
            ax.text(share + 1.5, y, label, va="center", fontsize=7.5, bbox={"fc": "w", "ec": "none", "pad": 0.8})
        ax.axvline(100, color=GREY, lw=1)
        ax.set_ylim(-0.6, most - 0.4)  # bars of one height in every panel
        ax.set_title(f"{PASSES[kind][0]}, {dtype}", fontsize=10)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0, labelsize=8.5)
    for ax in axes[-1]:
        ax.set_xlabel("% of the matmul's rate")
    longest = max(100, *(100 * r["of_roof"] for r in records))
    axes[0, 0].set_xlim(0, longest + 50)  # room for the words beside the longest bar
    axes[0, 0].set_xticks(range(0, int(longest) + 1, 25 if longest < 160 else 50))  # closer, their words touch
    n, d, v = records[0]["shape"]
    figure.suptitle(f"N {n:,}, D {d:,}, V {v:,}; {machine(records[0])}", fontsize=11)
    return figure


def bandwidth(records: Sequence[Record]):
    """The logits path against the device's copy bandwidth: forward and backward, N from few rows to many."""
    records = [r for r in records if r["suite"] == "logits" and r.get("of_roof") and r["provider"] not in ROOF_NAMES]
    if not records:
        return None
    passes = list(dict.fromkeys(r["pass"] for r in records))
    figure, axes = plt.subplots(
        1, len(passes), figsize=(4.6 * len(passes), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, kind in zip(axes[0], passes):
        part = [r for r in records if r["pass"] == kind]
        providers = sorted({r["provider"] for r in part}, key=lambda p: (p.startswith("prefkern"), p))
        colours = dict(zip([p for p in providers if not p.startswith("prefkern")], PEERS))
        for provider in providers:
            for v, line in zip(sorted({r["shape"][2] for r in part}), (":", "-.", "--", "-")):
                points = sorted(
                    (r["shape"][0], 100 * r["of_roof"])
                    for r in part
                    if r["provider"] == provider and r["shape"][2] == v
                )
                if points:
                    x, y = zip(*points)
                    ax.plot(
                        x, y, line, marker="o", ms=4, color=colours.get(provider, OURS), label=f"{provider}, V {v:,}"
                    )
        ax.set_xscale("log", base=2)
        ticks = sorted({r["shape"][0] for r in part})
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xlabel("N, rows of logits")
        ax.set_title(kind, fontsize=10)
        ax.axhline(100, color=GREY, lw=1)
    axes[0, 0].set_ylabel("% of device-copy bandwidth")
    axes[0, 0].set_ylim(0, None)
    axes[0, -1].legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.02, 0.5))
    dtypes = ", ".join(dict.fromkeys(r["dtype"] for r in records))
    figure.suptitle(f"From logits to log-probabilities and back, {dtypes}; {records[0]['device']}", fontsize=11)
    return figure
