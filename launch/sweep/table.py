"""A sweep's results as one table, on disk and in the terminal. Everything in it comes from the runs' own files of results."""

import csv
import json
import os
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fuxi_torchrec.files import JsonObject, file_aside
from fuxi_torchrec.run.folder import METRICS_FILE, RunFolder
from fuxi_torchrec.run.outcome import read_outcome

PARQUET, CSV = "results.parquet", "results.csv"
SHOWN_METRICS = ("test/cross_entropy", "test/ndcg@10")
MOST_ROWS = 30  # of the live table
TAIL_BYTES = 4096


def result_row(folder: str) -> JsonObject:
    """Summarises the run in `folder`: of outcome.json all but status and reason, the last training loss, the median
    rate, and the metrics of the kept model by "split/metric"."""
    facts = {key: value for key, value in (read_outcome(folder) or {}).items() if key not in ("status", "reason")}
    lines = RunFolder(folder).metrics()
    training = [line for line in lines if "loss" in line]
    if training:
        rates = sorted(line["tokens_per_second"] for line in training)
        facts.update(loss=training[-1]["loss"], tokens_per_second=rates[len(rates) // 2])
    kept = ("split", "step", "epoch", "checkpoint", "seconds")
    for line in lines:
        if line.get("checkpoint") == "best" and "command" not in line:
            facts.update({f"{line['split']}/{name}": value for name, value in line.items() if name not in kept})
    return facts


def last_line(folder: str) -> JsonObject:
    """Reads the newest whole line of a run's metrics.jsonl, from the end of the file; {} where there is none."""
    try:
        with open(os.path.join(folder, METRICS_FILE), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - TAIL_BYTES))
            texts = file.read().splitlines()
    except OSError:
        return {}
    for text in reversed(texts):
        try:
            return json.loads(text)
        except ValueError:
            continue  # being written, or cut off at the front
    return {}


def write_results(folder: str, rows: List[JsonObject]) -> None:
    """Writes results.parquet and results.csv, each whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    with file_aside(os.path.join(folder, PARQUET)) as aside:
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), aside)
    with file_aside(os.path.join(folder, CSV)) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*columns.values()))


def _column(values: List[Any]) -> List[Any]:
    """Values of one type: numbers, or text (JSON of whatever is neither, and of mixtures)."""
    types = {type(value) for value in values if value is not None}
    if len(types) <= 1 and not types & {list, dict, tuple}:
        return values
    if types <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


@contextmanager
def live_view(rows: Callable[[], List[JsonObject]], title: str) -> Iterator[Callable[[Optional[str]], None]]:
    """Shows the table while a sweep runs. Yields show(message): a terminal has the table redrawn, anything else gets the
    message as a line, if there is any."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: print(message, file=sys.stderr, flush=True) if message else None
        return
    with Live(render(rows(), title), console=console, auto_refresh=False) as live:
        yield lambda message: live.update(render(rows(), title), refresh=True)


def render(rows: List[JsonObject], title: str) -> Table:
    """Makes the table that is shown: running and failed runs first, as many of the others as fit."""
    order = {"running": 0, "failed": 1, "finished": 2, "waiting": 3}
    counts = {status: sum(row["status"] == status for row in rows) for status in order}
    caption = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in ("run", "status", "epoch", "step", "loss", "cross-entropy", "NDCG@10", ""):
        table.add_column(name, justify="left" if name in ("run", "status", "") else "right", overflow="fold")
    shown = sorted(rows, key=lambda row: order[row["status"]])[:MOST_ROWS]
    for row in shown:
        newest = last_line(row["folder"]) if row["status"] == "running" else {}
        numbers = [newest.get("epoch"), newest.get("step", row.get("step")), newest.get("loss", row.get("loss"))]
        cells = [_text(value) for value in (*numbers, *(row.get(name) for name in SHOWN_METRICS))]
        table.add_row(row["run"], row["status"], *cells, row["reason"])
    return table


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
