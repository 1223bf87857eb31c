"""Fits scaling laws to a sweep's results: `python -m launch.scaling_law RESULTS`. See docs/scaling_law.md.

One law for each catalogue (and each encoder, where the sweep varies it). Everything is read from the results table; the loss
is the full-softmax cross-entropy on held-out events.
"""

import csv
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.run_folder import write_aside
from launch.scaling_fit import PARAMETERS, Cost, Fit, fit, frontier

LOSS, NDCG = "test/cross_entropy", "test/ndcg@10"
FLOOR, ABOVE_FLOOR = "test/cross_entropy_floor", "test/cross_entropy_minus_floor"
SIZE, TOKENS, FLOPS = "non_embedding_parameters", "tokens", "flops"
NEEDED = ("run", "status", "items", SIZE, "width", TOKENS, FLOPS, LOSS)
PLACES = ("folder", "handle")  # where the runs were made: no part of a report that others read
LEAST_VALUES = 3  # distinct N, and distinct D: a term has a coefficient and an exponent beside E


class Line(NamedTuple):
    """value = intercept + slope · log10(FLOPs)"""

    intercept: float
    slope: float

    def at(self, flops: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * np.log10(flops)


@dataclass
class Study:
    """The points of one catalogue, and their law. Arrays are float64, a value a run."""

    items: int
    encoder: str  # empty where the sweep does not vary it
    rows: List[Dict[str, Any]]
    fit: Fit = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.items:,} items" + (f", {self.encoder}" if self.encoder else "")
        self.slug = "".join(c if c.isalnum() else "-" for c in self.label).strip("-")
        self.N, self.D, self.flops = self._column(SIZE), self._column(TOKENS), self._column(FLOPS)
        self.ndcg = self._column(NDCG)
        floors = self._column(FLOOR)
        self.floor: Optional[float] = None if np.isnan(floors).any() else float(floors.mean())
        # Paired: what the events of one run's held-out set happen to cost more than another's is not the model's.
        self.L = self._column(LOSS) if self.floor is None else self.floor + self._column(ABOVE_FLOOR)

    def solve(self, resamples: int) -> None:
        if len(self.rows) < len(PARAMETERS):
            count = f"{len(self.rows)} finished runs are fewer than the law's {len(PARAMETERS)} parameters"
            raise UserError(f"{self.label}: {count}; run more sizes and tokens")
        for name, values in ((SIZE, self.N), (TOKENS, self.D)):
            distinct = len(np.unique(np.round(np.log(values), 2)))
            if distinct < LEAST_VALUES:
                few = f"{distinct} different values of {name} do not tell its exponent"
                raise UserError(f"{self.label}: {few}; run at least {LEAST_VALUES}")
        self.fit = fit(self.N, self.D, self.L, resamples)
        self.cost = Cost.of(self.N, self.D, self.flops)

    def frontier(self, flops: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute-optimal (N, D, L), N from a tenth of the smallest to a thousand times the largest that was run."""
        return frontier(self.fit.law, self.cost, flops, (self.N.min() / 10, self.N.max() * 1000))

    def ndcg_line(self) -> Optional[Line]:
        """Through the runs that no cheaper run beats in NDCG@10."""
        order = np.argsort(self.flops)
        best = [i for at, i in enumerate(order) if at == 0 or self.ndcg[i] > self.ndcg[order[:at]].max()]
        if len(best) < 2 or not np.isfinite(self.ndcg).all():
            return None
        slope, intercept = np.polyfit(np.log10(self.flops[best]), self.ndcg[best], 1)
        return Line(float(intercept), float(slope))

    def best_within(self, flops: float) -> int:
        """The run of the lowest loss among those that cost at most so much."""
        return min(np.flatnonzero(self.flops <= flops), key=lambda run: self.L[run])

    def _column(self, name: str) -> np.ndarray:
        return np.array([float("nan") if row.get(name) is None else row[name] for row in self.rows], dtype=float)


def read_results(path: str) -> List[Dict[str, Any]]:
    """The finished runs of a results table: a sweep's folder, or a .parquet or .csv file of one."""
    if os.path.isdir(path):
        path = os.path.join(path, "results.parquet")
    rows = _read_table(path)
    if not rows:
        raise UserError(f"{path}: the table is empty; run the sweep first: python -m launch.sweep")
    missing = [name for name in NEEDED if not any(name in row for row in rows)]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; is this a sweep's results table, with a finished run?"
        )
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise UserError(f"{path}: none of its {len(rows)} runs has finished; go on with python -m launch.sweep")
    for row in finished:
        wrong = [name for name in NEEDED[2:] if not isinstance(row.get(name), (int, float)) or not row[name] > 0]
        if wrong:
            why = "; the FLOPs of in_batch and mixed negatives are not counted" if wrong == [FLOPS] else ""
            raise UserError(f"{path}: run {row['run']}: {wrong[0]} is {row.get(wrong[0])!r}, not a number above 0{why}")
    return finished


def _read_table(path: str) -> List[Dict[str, Any]]:
    try:
        if path.endswith(".csv"):
            with open(path, newline="", encoding="utf-8") as file:
                return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no results table here; name the folder of a sweep") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a table ({' '.join(str(error).split())[:200]})") from None


def _value(text: Optional[str]) -> Any:
    if not text:
        return None
    try:
        return float(text) if any(c in text for c in ".en") else int(text)
    except ValueError:
        return text


def studies_of(rows: List[Dict[str, Any]]) -> List[Study]:
    """One study for each catalogue size and encoder."""
    groups: Dict[Tuple[int, str], List[Dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((int(row["items"]), row.get("model.encoder") or ""), []).append(row)
    return [Study(*key, groups[key]) for key in sorted(groups)]


def write_report(studies: List[Study], source: str, folder: str) -> str:
    """Writes report.md, points.csv, fits.json, the plots and tensorboard/; returns the report's path."""
    from launch import scaling_plots, scaling_report

    try:
        os.makedirs(folder, exist_ok=True)
        plots = scaling_plots.draw_all(studies, folder)
        text = scaling_report.report(studies, plots, source)
        rows = [row for study in studies for row in study.rows]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in PLACES))
        with open(os.path.join(folder, "points.csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        write_aside(os.path.join(folder, "fits.json"), json.dumps(_fits(studies), indent=2) + "\n")
        write_aside(os.path.join(folder, "report.md"), text)
        scaling_plots.to_tensorboard(plots, folder, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another --output") from None
    return os.path.join(folder, "report.md")


def _fits(studies: List[Study]) -> Dict[str, Any]:
    return {
        study.label: {
            **asdict(study.fit.law),
            "intervals_90": {name: study.fit.parameter_interval(name) for name in PARAMETERS},
            "residual": study.fit.residual,
            "floor": study.floor,
            "runs": len(study.rows),
        }
        for study in studies
    }


def main(arguments: Optional[List[str]] = None) -> int:
    """Exit codes: 0 done, 2 a mistake (one line)."""
    from fuxi_torchrec.config_io import OneLineParser

    parser = OneLineParser(prog="python -m launch.scaling_law", description="Fits scaling laws to a sweep's results.")
    parser.add_argument("results", type=str, help="A sweep's folder, or its results.parquet or results.csv.")
    parser.add_argument(
        "--output", type=Optional[str], help="Folder of the report; default: scaling-law beside the table."
    )
    parser.add_argument("--resamples", type=int, default=300, help="Resampled tables behind the intervals.")
    options = parser.parse_args(arguments)
    try:
        if options.resamples < 1:
            raise UserError(f"--resamples: {options.resamples} is too small; it must be at least 1")
        studies = studies_of(read_results(options.results))
        for study in studies:
            study.solve(options.resamples)
        beside = options.results if os.path.isdir(options.results) else os.path.dirname(options.results)
        path = write_report(studies, options.results, options.output or os.path.join(beside, "scaling-law"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for study in studies:
        low, high = study.fit.parameter_interval("E")
        law = study.fit.law
        print(f"{study.label}: E {law.E:.4f} [{low:.4f}, {high:.4f}]  α {law.alpha:.3f}  β {law.beta:.3f}")
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
