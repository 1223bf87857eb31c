"""The plots of a reproduced table, one PNG each, from the records alone."""

import os
from typing import Any, Callable, Dict, List, Optional

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.reproduce.records import Record  # noqa: E402
from benchmarks.reproduce.research_curve import RESEARCH_NDCG10  # noqa: E402
from fuxi_torchrec.ops.token_mixing.time_gaps import gap_feature
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS  # noqa: E402

METRIC = "ndcg@10"
TIMES = {"1 s": 1, "1 min": 60, "1 h": 3600, "1 day": 86400, "30 days": 30 * 86400, "1 y": 365 * 86400}
LONGEST_GAP = 1e8  # seconds; three years, longer than any gap of MovieLens-1M


def draw_all(records: List[Record], steps: Dict[str, float], folder: str) -> Dict[str, str]:
    """{title: file name} of the plots, written into `folder`.

    steps: median seconds of a training step of each model, all measured under equal load.
    """
    tested = [record for record in records if record.split == "leave_one_out"]
    # Of models with several seeds the first one that has finished.
    learned: Dict[str, Record] = {}
    for record in tested:
        if record.blocks:
            learned.setdefault(record.model, record)
    plots: Dict[str, Optional[str]] = {
        "The time functions that were learned": _save(folder, "time-functions.png", _time_functions(learned)),
        "The weights of the lags that were learned": _save(folder, "lags.png", _lags(learned)),
        "NDCG@10 against the epoch": _save(folder, "epochs.png", _curves(tested, "epoch", lambda record: 1.0)),
    }
    timed = [record for record in tested if record.model in steps]
    plots["NDCG@10 against training time"] = _save(folder, "time.png", _against_time(timed, steps))
    return {title: name for title, name in plots.items() if name}


def _save(folder: str, name: str, figure: Any) -> Optional[str]:
    if figure is None:
        return None
    figure.savefig(os.path.join(folder, name), dpi=110, bbox_inches="tight")
    plt.close(figure)
    return name


def _against_time(records: List[Record], steps: Dict[str, float]) -> Any:
    """Time in steps of equal load: the runs themselves shared their machine, more or less of it."""

    def minutes(record: Record) -> float:
        last = max(line["step"] for line in record.curve("test"))
        return last / record.epochs * steps[record.model] / 60

    return _curves(records, "minutes of training steps", minutes)


def _curves(records: List[Record], label: str, scale: Callable[[Record], float]) -> Any:
    """Two panels: the towers, and FuXi-β's ablations."""
    if not records:
        return None
    ablations = {record.model for record in records if record.model.startswith("fuxi-beta") and "large" not in record.model}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True)
    towers = [record for record in records if record.model not in ablations - {"fuxi-beta"}]
    for axis, title, shown in (
        (axes[0], "towers", towers),
        (axes[1], "FuXi-β and its ablations", [record for record in records if record.model in ablations]),
    ):
        for number, model in enumerate(dict.fromkeys(record.model for record in shown)):
            for record in (record for record in shown if record.model == model):
                curve, unit = record.curve("test"), scale(record)
                x, y = [line["epoch"] * unit for line in curve], [line[METRIC] for line in curve]
                first = record.seed == min(other.seed for other in shown if other.model == model)
                style = "-" if first else "--"
                axis.plot(x, y, style, color=f"C{number % 10}", linewidth=1.2, label=model if first else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    if label == "epoch" and any(record.dataset["name"] == "ml-1m" for record in records):
        # The research code counts epochs from 0.
        theirs = {epoch + 1: value for epoch, value in RESEARCH_NDCG10.items()}
        axes[1].plot(list(theirs), list(theirs.values()), "k.", label="research code, FuXi-β")
    for axis in axes:
        axis.legend(fontsize=8)
    axes[0].set_ylabel("NDCG@10 on test")
    return figure


def time_map(channel: Dict[str, Any], seconds: np.ndarray) -> np.ndarray:
    """A recorded channel's A as a function of the time gap in seconds."""
    kind = channel["kind"]
    if kind == "zero":
        return np.zeros_like(seconds)
    # By way of float32, of which the record has all digits: sines of long gaps need them.
    weights = [torch.tensor(value, dtype=torch.float32).double() for name, value in channel.items() if name != "kind"]
    feature = gap_feature(torch.tensor(seconds), 1.0, TIME_MAPS[kind].feature, torch.float64)
    return TIME_MAPS[kind].evaluate(feature, *weights).numpy()


def _time_functions(learned: Dict[str, Record]) -> Any:
    """A panel a model that knows time; a line a block. FuXi-β first, FuXi-α's buckets beside it."""
    shown = {model: _of_kind(record, "temporal", "bucketed_temporal") for model, record in learned.items()}
    shown = {model: blocks for model, blocks in shown.items() if blocks}
    return _panels(_beta_and_alpha_first(shown), _draw_time, "time gap", "weight of an event so long ago")


def _draw_time(axis: Any, channel: Dict[str, Any], **style: Any) -> None:
    seconds = np.geomspace(1, LONGEST_GAP, 400)
    axis.plot(seconds, time_map(channel, seconds), **style)
    axis.set_xscale("log")
    axis.set_xticks(list(TIMES.values()), list(TIMES), fontsize=7)
    axis.minorticks_off()


def _lags(learned: Dict[str, Record]) -> Any:
    shown = {model: _of_kind(record, "positional") for model, record in learned.items()}
    shown = {model: blocks for model, blocks in shown.items() if blocks}
    return _panels(_beta_and_alpha_first(shown), _draw_lags, "lag + 1, events", "weight")


def _draw_lags(axis: Any, channel: Dict[str, Any], **style: Any) -> None:
    weights = channel["weight_N"]
    axis.plot(np.arange(1, len(weights) + 1), weights, **style)
    axis.set_xscale("log")


def _of_kind(record: Record, *names: str) -> List[Dict[str, Any]]:
    """The channel of each block that has one of these names."""
    return [channel for block in record.blocks or [] for name, channel in block.items() if name in names]


def _beta_and_alpha_first(shown: Dict[str, Any]) -> Dict[str, Any]:
    first = [model for model in ("fuxi-beta", "fuxi-alpha") if model in shown]
    return {model: shown[model] for model in (*first, *shown) if model in shown}


def _panels(shown: Dict[str, List[Dict[str, Any]]], draw: Callable[..., None], x: str, y: str) -> Any:
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.6 * rows), squeeze=False)
    for axis, (model, channels) in zip(axes.flat, shown.items()):
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(channels)))
        for number, (channel, colour) in enumerate(zip(channels, colours), 1):
            draw(axis, channel, color=colour, linewidth=1.2, label=f"block {number}")
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(f"{model} ({channels[0]['kind']})", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(y, fontsize=8)
    for axis in list(axes.flat)[len(shown) :]:
        axis.axis("off")
    figure.tight_layout()
    return figure
