"""What a benchmark run shows and leaves: a table, bench.json, bench.csv and bench.png."""

import csv
import dataclasses
import io
import json
import os
from typing import TYPE_CHECKING, Callable, List, Mapping, Optional, Sequence, TypedDict

from rich.table import Table

from fuxi_torchrec.bench.timing import BenchRow
from fuxi_torchrec.files import file_aside, write_aside
from fuxi_torchrec.profiling.stages import STAGES
from fuxi_torchrec.run.reporting import print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

JSON_FILE, CSV_FILE, PLOT_FILE = "bench.json", "bench.csv", "bench.png"
# A colour for every stage and for the rest, told apart in grey and by the colour-blind (Okabe and Ito's).
COLOURS = ("#56B4E9", "#009E73", "#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#BBBBBB")
OTHER = "other"


class BenchMachine(TypedDict):
    """The machine that a benchmark ran on, as bench.json keeps it; threads: of a CPU."""

    device: str
    ranks: int
    threads: Optional[int]
    precision: str
    peak_tflops: float
    peak_source: str
    items: int
    steps: int
    torch: str


def show(rows: Sequence[BenchRow], machine: BenchMachine) -> None:
    """Prints a line about the machine and a table of the rows, on standard output."""
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    print(f"\n{machine['device']}{threads}, {machine['precision']}; MFU against {machine['peak_tflops']:.4g} TFLOP/s ", end="")
    print(f"({machine['peak_source']}); milliseconds, medians of {machine['steps']} steps")
    table = Table()
    for name in ("encoder", "length", "users", "tokens", "step", *STAGES, OTHER, "tokens/s", "GFLOP", "MFU", "peak MB"):
        table.add_column(name, justify="left" if name == "encoder" else "right")
    for before, row in zip([None, *rows], rows):
        if before is not None and before.length != row.length:
            table.add_section()
        stages = (f"{1000 * seconds:,.1f}" for seconds in (*row.stages.values(), row.other))
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
        sizes = (f"{row.length:,}", f"{row.users:,}", f"{row.tokens:,}", f"{1000 * row.seconds:,.1f}")
        rates = (f"{row.tokens_per_second:,.0f}", f"{row.flops / 1e9:,.2f}", f"{row.mfu:.1%}", memory)
        table.add_row(row.encoder, *sizes, *stages, *rates)
    print_table(table)


def write(rows: Sequence[BenchRow], machine: BenchMachine, config: Mapping[str, object], folder: str) -> List[str]:
    """Writes bench.json, bench.csv and, where matplotlib is installed, bench.png; returns their paths."""
    os.makedirs(folder, exist_ok=True)
    whole = {"machine": machine, "config": config, "rows": [dataclasses.asdict(row) for row in rows]}
    write_aside(os.path.join(folder, JSON_FILE), json.dumps(whole, indent=2) + "\n")
    write_aside(os.path.join(folder, CSV_FILE), _csv(rows))
    written = [os.path.join(folder, JSON_FILE), os.path.join(folder, CSV_FILE)]
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError:
        return written
    with file_aside(os.path.join(folder, PLOT_FILE)) as aside:
        plot(rows, machine, aside)
    return [*written, os.path.join(folder, PLOT_FILE)]


def _csv(rows: Sequence[BenchRow]) -> str:
    text = io.StringIO()
    flat = [{**dataclasses.asdict(row), **{f"{name} seconds": row.stages[name] for name in STAGES}} for row in rows]
    names = [field.name for field in dataclasses.fields(BenchRow) if field.name != "stages"]
    writer = csv.DictWriter(text, [*names, *(f"{name} seconds" for name in STAGES)], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def plot(rows: Sequence[BenchRow], machine: BenchMachine, path: str) -> None:
    """Draws a PNG: tokens a second and peak memory by length, and below them, a panel an encoder, where a step's time
    goes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    encoders = list(dict.fromkeys(row.encoder for row in rows))
    lengths = sorted({row.length for row in rows})
    figure = plt.figure(figsize=(2.6 * max(len(encoders), 3) + 1.0, 7.4), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(1, 1))
    known = any(row.peak_bytes for row in rows)
    tops = halves[0].subgridspec(1, 2 if known else 1)
    rates = figure.add_subplot(tops[0])
    _plot_by_length(rates, rows, "tokens a second", "log", lambda row: row.tokens_per_second)
    rates.yaxis.set_major_locator(_log_ticks([row.tokens_per_second for row in rows]))
    rates.legend(frameon=False, fontsize=9)
    if known:
        memory = figure.add_subplot(tops[1])
        _plot_by_length(memory, rows, "peak memory, MB", "linear", lambda row: (row.peak_bytes or 0) / 1e6)
        memory.set_ylim(bottom=0)
    grid = halves[1].subgridspec(1, len(encoders))
    panels: List[Axes] = []
    for number, name in enumerate(encoders):
        axes = figure.add_subplot(grid[number], sharey=panels[0] if panels else None)
        panels.append(axes)
        _plot_stages(axes, [row for row in rows if row.encoder == name], lengths)
        axes.set_title(name, fontsize=10)
        if number == 0:
            axes.set_ylabel("share of a step's time")
        else:
            axes.tick_params(labelleft=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    place = f"{machine['device']}{threads}, {machine['precision']}"
    figure.suptitle(f"Training steps of {max(row.tokens for row in rows):,} tokens: {place}", fontsize=11)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _plot_by_length(
    axes: "Axes", rows: Sequence[BenchRow], label: str, scale: str, value: Callable[[BenchRow], float]
) -> None:
    """A line an encoder."""
    lengths = sorted({row.length for row in rows})
    encoders = dict.fromkeys(row.encoder for row in rows)
    for name, marker in zip(encoders, "osD^vPX"):
        mine = [row for row in rows if row.encoder == name]
        axes.plot([row.length for row in mine], [value(row) for row in mine], marker=marker, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale(scale)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("longest sequence")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _log_ticks(values: Sequence[float]) -> "Locator":
    """1, 2 and 5 times powers of ten; only powers where the values span many."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0) if max(values) < 200 * min(values) else (1.0,))


def _plot_stages(axes: "Axes", rows: Sequence[BenchRow], lengths: Sequence[int]) -> None:
    bottoms = [0.0] * len(rows)
    places = [lengths.index(row.length) for row in rows]
    for name, colour in zip((*STAGES, OTHER), COLOURS):
        shares = [_share(row, name) for row in rows]
        axes.bar(places, shares, bottom=bottoms, width=0.72, color=colour, label=name)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares)]
    for place, row in zip(places, rows):
        axes.text(place, 1.02, f"{1000 * row.seconds:,.0f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_xlabel("longest sequence (ms a step above)", fontsize=8)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.spines[["top", "right"]].set_visible(False)


def _share(row: BenchRow, name: str) -> float:
    """A stage's part of all of them; medians of parts need not add up to the median of the whole."""
    seconds = {**row.stages, OTHER: row.other}
    return seconds[name] / sum(seconds.values())
