"""Does a model that knows time beat one that only knows positions? On data whose floor is known exactly.

    python -m benchmarks.time_matters [--folder runs/time-matters] [--epochs 12]

Generates synthetic sequences (docs/data.md), trains FuXi-β with and without its temporal channel, same everything else,
by the commands a user would type, and prints a Markdown table of the full-softmax cross-entropy on test above the floor,
paired by event.
"""

import argparse
import json
import os
import shutil

from benchmarks.smoke import command
from fuxi_torchrec.run.folder import RunFolder

CONFIG = os.path.join("configs", "smoke", "fuxi-beta.yaml")
MODELS = {"positions and time": "[positional,temporal]", "positions only": "[positional]"}


def main() -> None:
    """Runs the study from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=os.path.join("runs", "time-matters"), help="emptied first")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    data = os.path.join(options.folder, "data")
    command("prepare", "synthetic", "--users", 8000, "--items", 500, "--events-per-user", 50, "--clusters", 10,
            "--epsilon", 0.1, "--max-sequence-length", 100, "--output", data)  # fmt: skip
    results = {}
    for name, channels in MODELS.items():
        run = os.path.join(options.folder, name.replace(" ", "-"))
        command("train", CONFIG, "--data.path", data, "--output", run, "--model.channels", channels,
                "--trainer.metric", "cross_entropy", "--trainer.max_epochs", options.epochs,
                "--optimizer.schedule", "cosine", "--data.split", "leave_two_out")  # fmt: skip
        lines = RunFolder.open(run).metrics()
        results[name] = next(line for line in reversed(lines) if line.get("checkpoint") and line["split"] == "test")
    print("\n| model | cross-entropy | above the floor | NDCG@10 |\n|---|---|---|---|")
    for name, line in results.items():
        above, error = line["cross_entropy_minus_floor"], line["cross_entropy_minus_floor_stderr"]
        print(f"| {name} | {line['cross_entropy']:.4f} | {above:.4f} ± {error:.4f} | {line['ndcg@10']:.4f} |")
    print(f"| floor | {line['cross_entropy_floor']:.4f} | 0 | |")
    with open(os.path.join(options.folder, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
