"""`fuxi-torchrec evaluate`."""

import json
import sys
from typing import Any, List

from fuxi_torchrec.cli.output import print_splits, write_output
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject, write_aside


def evaluate_command(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec evaluate`; returns its exit code."""
    from fuxi_torchrec.cli.options import add_model_options, saved_model
    from fuxi_torchrec.config.parsing import OneLineParser

    parser = OneLineParser(prog="fuxi-torchrec evaluate", description="Ranks every user's target by a saved model.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--split", type=str, default="test", help="test, or validation where the run's split has one.")
    add_model_options(parser)
    parser.add_argument("--output", type=str, default=None, help="Also write the metrics to this JSON file.")
    options = parser.parse_args(arguments)
    with saved_model(options) as saved:
        from fuxi_torchrec.config import evaluation_splits
        from fuxi_torchrec.evaluation.evaluate import evaluate
        from fuxi_torchrec.evaluation.popularity import popularity

        splits = evaluation_splits(saved.config.data)
        if options.split not in splits:
            raise UserError(f"--split {options.split}: this run's data.split has {' and '.join(splits)}")
        metrics = evaluate(saved.model, saved.dataset, saved.config, options.split, saved.world)
        line = {"split": options.split, "step": saved.step, "epoch": saved.epoch, "checkpoint": options.checkpoint}
        if saved.world.is_main:
            _keep(saved, {**line, **metrics}, options)
        popular = popularity(saved.dataset, saved.config, options.split, saved.world)
        if saved.world.is_main:
            results = {options.split: metrics, f"popularity {options.split}": popular}
            print_splits(results, saved.dataset, saved.config, options.run)
    return 0


def _keep(saved: Any, line: JsonObject, options: Any) -> None:
    """Writes the metrics into the run's folder, and where --output says: before they are shown, which may fail."""
    try:
        saved.run.append({**line, "command": "evaluate"})
    except OSError as error:  # somebody else's run may be evaluated
        print(f"not added to {options.run}'s metrics.jsonl: {error.strerror}", file=sys.stderr)
    if options.output:
        write_output(options.output, lambda: write_aside(options.output, json.dumps(line, indent=2) + "\n"))
