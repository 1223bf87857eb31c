"""`fuxi-torchrec evaluate`."""

import json
import sys
from typing import TYPE_CHECKING, Any, List

from fuxi_torchrec.cli.output import print_splits, write_output
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject, write_aside

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from fuxi_torchrec.config.schema import DataConfig


def parse(arguments: List[str]) -> "Namespace":
    """Parses the command's arguments into a namespace; ends the program by one line and exit code 2 for a mistake."""
    from fuxi_torchrec.cli.options import add_model_options
    from fuxi_torchrec.config.parsing import OneLineParser

    parser = OneLineParser(prog="fuxi-torchrec evaluate", description="Ranks every user's target by a saved model.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--split", type=str, default="test", help="test, or validation where the run's split has one.")
    add_model_options(parser)
    parser.add_argument("--output", type=str, default=None, help="Also write the metrics to this JSON file.")
    return parser.parse_args(arguments)


def evaluate_command(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec evaluate`; returns its exit code."""
    from fuxi_torchrec.cli.options import saved_model

    options = parse(arguments)
    with saved_model(options) as saved:
        from fuxi_torchrec.evaluation.evaluate import evaluate
        from fuxi_torchrec.evaluation.popularity import popularity

        check_split(options.split, saved.config.data)
        metrics = evaluate(saved.model, saved.dataset, saved.config, options.split, saved.world)
        line = {"split": options.split, "step": saved.step, "epoch": saved.epoch, "checkpoint": options.checkpoint}
        if saved.world.is_main:
            _keep(saved, {**line, **metrics}, options)
        popular = popularity(saved.dataset, saved.config, options.split, saved.world)
        if saved.world.is_main:
            results = {options.split: metrics, f"popularity {options.split}": popular}
            print_splits(results, saved.dataset, saved.config, options.run)
    return 0


def check_split(split: str, data: "DataConfig") -> None:
    """Checks that a run's data has a split to be evaluated. Raises UserError."""
    from fuxi_torchrec.config import evaluation_splits

    splits = evaluation_splits(data)
    if split not in splits:
        raise UserError(f"--split {split}: this run's data.split has {' and '.join(splits)}")


def _keep(saved: Any, line: JsonObject, options: Any) -> None:
    """Writes the metrics into the run's folder, and where --output says: before they are shown, which may fail."""
    try:
        saved.run.append({**line, "command": "evaluate"})
    except OSError as error:  # somebody else's run may be evaluated
        print(f"not added to {options.run}'s metrics.jsonl: {error.strerror}", file=sys.stderr)
    if options.output:
        write_output(options.output, lambda: write_aside(options.output, json.dumps(line, indent=2) + "\n"))
