"""What a person and a program see of a run: a progress bar or plain lines, metrics.jsonl, TensorBoard, tables."""

import sys
from typing import TYPE_CHECKING, Dict, List, Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.tensorboard import ScalarWriter

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_METRICS = ("ndcg@10", "ndcg@50", "hr@10", "hr@50", "mrr", "cross_entropy")
WIDEST = 200


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # the command line ends quietly, with a code that says so; rich would exit with 1


class Progression:
    """Reports a training run; silent on every rank but 0.

    Args:
        run: where metrics.jsonl and tensorboard/ are.
        done: part of the run that is already done, 0 … 1.
        first_step: steps already done when the run is resumed.
    """

    def __init__(self, run: RunFolder, done: float, first_step: int, is_main: bool):
        self.run, self.is_main = run, is_main
        self.console = _Console(stderr=True)
        self.bar: Optional[Progress] = None
        self.curves = ScalarWriter(run.tensorboard, first_step, self.report) if is_main else None
        if is_main and self.console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
            self.task = self.bar.add_task("starting", total=1.0)
            self.bar.update(self.task, completed=done)
            self.bar.start()

    def training(self, line: JsonObject) -> None:
        """Reports a training line: step, epoch, loss, tokens_per_second, mfu where it is known, learning_rate."""
        if self.curves is None:  # not rank 0
            return
        self.run.append(line)
        shown = ("loss", "tokens_per_second", "mfu", "learning_rate")
        self.curves.add({f"train/{name}": line[name] for name in shown if name in line}, line["step"])
        text = f"epoch {line['epoch']}  loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in line:
            text += f"  MFU {line['mfu']:.1%}"
        if self.bar:
            self.bar.update(self.task, description=text)
        else:
            self.report(f"step {line['step']}  {text}  lr {line['learning_rate']:.3g}")

    def step(self, done: float) -> None:
        """Moves the progress bar. done: part of the run that is done, 0 … 1."""
        if self.bar:
            self.bar.update(self.task, completed=done)

    def evaluation(self, line: JsonObject) -> None:
        """Reports an evaluation line: split, step, epoch and every metric by name."""
        if self.curves is None:  # not rank 0
            return
        self.run.append(line)
        metrics = {f"{line['split']}/{name}": value for name, value in line.items() if isinstance(value, float)}
        self.curves.add(metrics, line["step"])
        shown = "  ".join(f"{name} {line[name]:.4f}" for name in TABLE_METRICS if name in line)
        which = f"{line['checkpoint']} checkpoint, " if "checkpoint" in line else ""
        self.report(f"{which}epoch {line['epoch']}, {line['split']}:  {shown}")

    def report(self, text: str) -> None:
        """Prints a line for the person watching, on standard error."""
        if not self.is_main:
            return
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the progress bar and the event file."""
        if self.bar:
            self.bar.stop()
            self.bar = None
        if self.curves:
            self.curves.close()


def print_results(rows: Dict[str, JsonObject], title: str) -> None:
    """Prints a titled table on standard output: a row a model, a column a metric; below it, how far from the floor the
    models are, where the data have one."""
    first = next(iter(rows.values()))
    names: List[str] = [name for name in TABLE_METRICS if name in first]
    table = Table()
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for model, metrics in rows.items():
        table.add_row(model, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names))
    print(f"\n{title}")
    print_table(table)
    for model, metrics in rows.items():
        if "cross_entropy_floor" in metrics:
            above, error = metrics["cross_entropy_minus_floor"], metrics["cross_entropy_minus_floor_stderr"]
            floor = metrics["cross_entropy_floor"]
            print(f"{model}'s cross-entropy is {above:.4f} ± {error:.4f} above the data's floor of {floor:.4f}")


def print_recommendations(recommendations: "pa.Table") -> None:
    """Prints a table a user on standard output, of recommend.to_table's columns."""
    by_user: Dict[str, List[JsonObject]] = {}
    for row in recommendations.to_pylist():
        by_user.setdefault(row["user"], []).append(row)
    for user, rows in by_user.items():
        table = Table()
        for name in ("rank", "item", "title", "score"):
            table.add_column(name, justify="left" if name == "title" else "right")
        for row in rows:
            table.add_row(str(row["rank"]), str(row["item_id"]), row["title"], f"{row['score']:.3f}")
        print(f"\nuser {user}" if user != "history" else "\nhistory")
        print_table(table)


def print_table(table: Table) -> None:
    """Prints a table on standard output. Titles alone are wrapped: on a narrow terminal a line goes on below, and no
    number is cut short."""
    for column in table.columns:
        column.no_wrap = column.header != "title"
    console = _Console()
    needed = console.measure(table, options=console.options.update(width=WIDEST)).minimum
    # A pipe has no width: leave tables whole there.
    _Console(width=max(console.width if sys.stdout.isatty() else WIDEST, needed)).print(table)
