"""The plots of the scaling-law report: one PNG each, and the same to TensorBoard."""

import os
from functools import partial
from typing import TYPE_CHECKING, Callable, Dict, List

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from launch.scaling_law.study import Study

SIZE = (11, 4.4)  # inches
DECADE = 10.0


def draw_all(studies: List["Study"], folder: str) -> Dict[str, str]:
    """Draws the plots into `folder`; returns {title: file name}."""
    plots: Dict[str, str] = {}
    for study in studies:
        plots[f"Loss and fit, {study.label}"] = _save(folder, f"loss-{study.slug}.png", partial(_losses, study))
    plots["Loss against compute"] = _save(folder, "compute.png", lambda: _compute(studies))
    if any(np.isfinite(study.ndcg).any() for study in studies):
        plots["NDCG@10 against compute"] = _save(folder, "ndcg.png", lambda: _ndcg(studies))
    return plots


def to_tensorboard(plots: Dict[str, str], folder: str, report: str) -> None:
    """Writes the plots as images and the report as text, into folder/tensorboard."""
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(os.path.join(folder, "tensorboard")) as writer:
        writer.add_text("scaling law", report)
        for title, name in plots.items():
            with Image.open(os.path.join(folder, name)) as image:
                writer.add_image(title, np.asarray(image.convert("RGB")), dataformats="HWC")


def _save(folder: str, name: str, draw: Callable[[], "Figure"]) -> str:
    figure = draw()
    figure.savefig(os.path.join(folder, name), dpi=130, bbox_inches="tight")
    plt.close(figure)
    return name


def _losses(study: "Study") -> "Figure":
    """Two panels: loss against N, a line for each D; and against D, a line for each N. Lines are the fit."""
    figure, axes = plt.subplots(1, 2, figsize=SIZE, sharey=True)
    law, N, D, L = study.fit.law, study.N, study.D, study.L
    _panel(axes[0], N, D, L, lambda n, d: law.loss(n, d), "non-embedding parameters N", "D = {} tokens")
    _panel(axes[1], D, N, L, lambda d, n: law.loss(n, d), "training tokens D", "N = {}")
    axes[0].set_ylabel("cross-entropy on held-out events, nats")
    for axis in axes:
        axis.axhline(law.E, color="black", linewidth=1, linestyle=":", label=f"fitted E = {law.E:.3f}")
        if study.floor is not None:
            floor = f"floor of the data = {study.floor:.3f}"
            axis.axhline(study.floor, color="tab:red", linewidth=1, linestyle="--", label=floor)
        # Below: a point may lie anywhere inside.
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(study.label)
    return figure


def _panel(
    axis: "Axes",
    x: np.ndarray,
    other: np.ndarray,
    L: np.ndarray,
    loss: Callable[[np.ndarray, float], np.ndarray],
    label: str,
    legend: str,
) -> None:
    values = _distinct(other)
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(values)))
    grid = np.geomspace(x.min() / 1.2, x.max() * 1.2, 100)
    for value, colour in zip(values, colours):
        near = np.abs(np.log(other / value)) < 0.05
        axis.plot(x[near], L[near], "o", color=colour, markersize=5)
        axis.plot(grid, loss(grid, value), color=colour, linewidth=1, label=legend.format(short(value)))
    axis.set_xscale("log")
    measured = _distinct(x)
    axis.set_xticks(measured, [short(value) for value in measured])
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def _compute(studies: List["Study"]) -> "Figure":
    figure, axis = plt.subplots(figsize=(7.5, 5))
    for number, study in enumerate(studies):
        colour = f"C{number}"
        axis.plot(study.flops, study.L, "o", color=colour, markersize=4, label=study.label)
        flops = np.geomspace(study.flops.min(), study.flops.max() * DECADE, 100)
        measured = flops <= study.flops.max()
        _, _, losses = study.frontier(flops)
        axis.plot(flops[measured], losses[measured], color=colour, linewidth=1.2)
        axis.plot(flops[~measured], losses[~measured], color=colour, linewidth=1.2, linestyle="--")
        if study.floor is not None:
            axis.axhline(study.floor, color=colour, linewidth=1, linestyle=":")
    axis.plot([], [], color="grey", label="compute-optimal by the fit")
    axis.plot([], [], color="grey", linestyle="--", label="the same, predicted")
    if any(study.floor is not None for study in studies):
        axis.plot([], [], color="grey", linestyle=":", label="floor of the data")
    _log_compute(axis, "cross-entropy on held-out events, nats")
    return figure


def _ndcg(studies: List["Study"]) -> "Figure":
    figure, axis = plt.subplots(figsize=(7.5, 5))
    for number, study in enumerate(studies):
        axis.plot(study.flops, study.ndcg, "o", color=f"C{number}", markersize=4, label=study.label)
        line = study.ndcg_line()
        if line is not None:
            flops = np.geomspace(study.flops.min(), study.flops.max(), 50)
            axis.plot(flops, line.at(flops), color=f"C{number}", linewidth=1.2)
    axis.plot([], [], color="grey", label="line through the best at each compute")
    _log_compute(axis, "NDCG@10 on held-out events")
    return figure


def _log_compute(axis: "Axes", label: str) -> None:
    axis.set_xscale("log")
    axis.set_xlabel("training FLOPs")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _distinct(values: np.ndarray) -> List[float]:
    """The values, those within 5 % taken for one."""
    kept: List[float] = []
    for value in np.sort(values):
        if not kept or value > kept[-1] * 1.05:
            kept.append(float(value))
    return kept


def short(value: float) -> str:
    """Shortens a number: 1234567 -> 1.23M"""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
