"""Fits scaling laws to a sweep's results: `python -m launch.scaling_law RESULTS`. See docs/scaling_law.md.

One law for each catalogue (and each encoder, where the sweep varies it). Everything is read from the results table; the loss
is the full-softmax cross-entropy on held-out events.
"""

import csv
import json
import os
import sys
from dataclasses import asdict
from typing import Any, Dict, List, Optional, Tuple

from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.files import JsonObject, write_aside
from launch.scaling_law.fit import PARAMETERS
from launch.scaling_law.study import FLOPS, NEEDED, PLACES, Study


def read_results(path: str) -> List[JsonObject]:
    """Reads the finished runs of a results table: a sweep's folder, or a .parquet or .csv file of one. Raises
    UserError."""
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


def _read_table(path: str) -> List[JsonObject]:
    try:
        if path.endswith(".csv"):
            with open(path, newline="", encoding="utf-8") as file:
                return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no results table here; name the folder of a sweep") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a table ({one_line(error)})") from None


def _value(text: Optional[str]) -> Any:
    if not text:
        return None
    try:
        return float(text) if any(c in text for c in ".en") else int(text)
    except ValueError:
        return text


def studies_of(rows: List[JsonObject]) -> List[Study]:
    """Groups the runs to one study for each catalogue size and encoder."""
    groups: Dict[Tuple[int, str], List[JsonObject]] = {}
    for row in rows:
        groups.setdefault((int(row["items"]), row.get("model.encoder") or ""), []).append(row)
    return [Study(*key, groups[key]) for key in sorted(groups)]


def write_report(studies: List[Study], source: str, folder: str) -> str:
    """Writes report.md, points.csv, fits.json, the plots and tensorboard/; returns the report's path."""
    from launch.scaling_law import plots, report

    try:
        os.makedirs(folder, exist_ok=True)
        drawn = plots.draw_all(studies, folder)
        text = report.report(studies, drawn, source)
        rows = [row for study in studies for row in study.rows]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in PLACES))
        with open(os.path.join(folder, "points.csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        write_aside(os.path.join(folder, "fits.json"), json.dumps(_fits(studies), indent=2) + "\n")
        write_aside(os.path.join(folder, "report.md"), text)
        plots.to_tensorboard(drawn, folder, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another --output") from None
    return os.path.join(folder, "report.md")


def _fits(studies: List[Study]) -> JsonObject:
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
    """Fits and reports. Exit codes: 0 done, 2 a mistake (one line)."""
    from fuxi_torchrec.config.parsing import OneLineParser

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
    sys.exit(run_on_streams(main))
