"""The page of `python -m launch.scaling_law`: laws, frontier, predictions, encoders at equal FLOPs, points."""

from typing import TYPE_CHECKING, Dict, List

import numpy as np

from launch.scaling_law.plots import short

if TYPE_CHECKING:
    from launch.scaling_law.study import Study

BEYOND = (1.0, 10**0.5, 10.0)  # of the largest N and D measured
FRONTIER_POINTS = 5
RAW = (
    *("run", "items", "width", "non_embedding_parameters", "tokens", "flops", "test/cross_entropy"),
    *("test/cross_entropy_minus_floor", "test/cross_entropy_minus_floor_stderr", "test/ndcg@10"),
)


def report(studies: List["Study"], plots: Dict[str, str], source: str) -> str:
    """Writes the report page, Markdown."""
    runs = sum(len(study.rows) for study in studies)
    lines = ["# Scaling law", "", f"L(N, D) = E + A / N^α + B / D^β on the {runs} finished runs of"]
    lines += [
        f"`{source}`. N: non-embedding parameters; D: training tokens; L: full-softmax cross-entropy on held-out events,"
    ]
    lines += ["nats. Brackets are 90 % intervals of resampled residuals.", ""]
    lines += ["| catalogue | runs | E | α | β | A | B | residual of log L |", "|---|---|---|---|---|---|---|---|"]
    lines += [_law_row(study) for study in studies]
    for title, name in plots.items():
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    for study in studies:
        lines += ["", f"## {study.label}", "", *_floor_lines(study), *_frontier_lines(study), *_prediction_lines(study)]
    lines += _equal_compute_lines(studies)
    lines += ["", "## The points", "", "Also in points.csv.", ""]
    names = [name for name in RAW if any(row.get(name) is not None for row in (r for s in studies for r in s.rows))]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for study in studies:
        for row in sorted(study.rows, key=lambda row: (row["non_embedding_parameters"], row["tokens"])):
            lines.append("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    return "\n".join(lines) + "\n"


def _law_row(study: "Study") -> str:
    def shown(name: str) -> str:
        low, high = study.fit.parameter_interval(name)
        return f"{getattr(study.fit.law, name):.4g} [{low:.4g}, {high:.4g}]"

    cells = [shown(name) for name in ("E", "alpha", "beta", "A", "B")]
    return f"| {study.label} | {len(study.rows)} | {' | '.join(cells)} | {study.fit.residual:.2g} |"


def _floor_lines(study: "Study") -> List[str]:
    if study.floor is None:
        return []
    off, best = study.fit.law.E - study.floor, float((study.L - study.floor).min())
    return [
        f"The data's own floor on the held-out events is {study.floor:.4f}: the fitted E is {off:+.4f} from it, and the best "
        f"run {best:.4f} above it.",
        "",
    ]


def _frontier_lines(study: "Study") -> List[str]:
    flops = np.geomspace(study.flops.min(), study.flops.max() * 10, FRONTIER_POINTS)
    N, D, losses = study.frontier(flops)
    law = study.fit.law
    growth = law.beta / max(law.alpha + study.cost.exponent * law.beta, 1e-9)
    lines = [
        "Compute-optimal by the fit (the last row beyond the measured compute): FLOPs of a token grow as "
        f"N^{study.cost.exponent:.2f} here, so N grows as C^{growth:.2f}.",
        "",
        "| FLOPs | N | D | L |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f:.2e} | {short(n)} | {short(d)} | {loss:.4f} |" for f, n, d, loss in zip(flops, N, D, losses)]
    line = study.ndcg_line()
    if line is not None:
        lines += ["", f"NDCG@10 grows by {line.slope:.4f} with every tenfold of compute, along the best runs."]
    return lines


def _prediction_lines(study: "Study") -> List[str]:
    lines = ["", "Predicted L up to ten times the largest N and D that were run:", ""]
    tokens = [study.D.max() * factor for factor in BEYOND]
    lines += ["| N \\ D | " + " | ".join(short(D) for D in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
    for factor in BEYOND:
        N = study.N.max() * factor
        cells = []
        for D in tokens:
            low, high = study.fit.loss_interval(N, D)
            cells.append(f"{float(study.fit.law.loss(N, D)):.4f} [{low:.4f}, {high:.4f}]")
        lines.append(f"| {short(N)} | {' | '.join(cells)} |")
    return lines


def _equal_compute_lines(studies: List["Study"]) -> List[str]:
    """Encoders beside each other, one table a catalogue; from what was measured, no fit in it."""
    lines: List[str] = []
    for items in sorted({study.items for study in studies}):
        beside = [study for study in studies if study.items == items]
        lowest, highest = max(s.flops.min() for s in beside), min(s.flops.max() for s in beside)
        if len(beside) < 2 or lowest >= highest:
            continue
        lines += ["", f"## Encoders at equal FLOPs, {items:,} items", ""]
        lines += ["The best measured run that costs at most so much: its loss (and NDCG@10), N and D.", ""]
        lines += ["| FLOPs | " + " | ".join(study.encoder for study in beside) + " |", "|---" * (len(beside) + 1) + "|"]
        for flops in np.geomspace(lowest, highest, FRONTIER_POINTS):
            cells = [_run_cell(study, study.best_within(flops * (1 + 1e-9))) for study in beside]
            lines.append(f"| {flops:.2e} | {' | '.join(cells)} |")
    return lines


def _run_cell(study: "Study", run: int) -> str:
    ndcg = f" ({study.ndcg[run]:.4f})" if np.isfinite(study.ndcg[run]) else ""
    return f"{study.L[run]:.4f}{ndcg}, {short(study.N[run])}, {short(study.D[run])}"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
