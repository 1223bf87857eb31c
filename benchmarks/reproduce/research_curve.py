"""FuXi-β base on the ml-1m archive, beside the curve of the authors' public research code on the same archive.

    fuxi-torchrec prepare movielens --source ml-1m.zip --output data/ml-1m
    fuxi-torchrec train configs/ml-1m/fuxi-beta-sampled-softmax-n128-final.yaml --data.path data/ml-1m \\
        --output runs/ml-1m-fuxi-beta --evaluation.every_epochs 5
    python -m benchmarks.reproduce.research_curve runs/ml-1m-fuxi-beta [RUN …]

Prints a Markdown table: NDCG@10 after each epoch that both have, a column a run. The research code's numbers: its own
training loop, seed 0, catalogue `rated`, one seed, so about 0.006 at epoch 25 is a seed's noise.
"""

import argparse
from typing import Dict

from fuxi_torchrec.run.folder import RunFolder

RESEARCH_NDCG10 = {5: 0.0871, 10: 0.1332, 15: 0.1589, 25: 0.1770, 35: 0.1858, 45: 0.1904, 55: 0.1978, 80: 0.1999}


def curve(path: str) -> Dict[int, float]:
    """NDCG@10 on test by epoch, from a run's metrics.jsonl; without the evaluation of the best at the end."""
    lines = [line for line in RunFolder.open(path).metrics() if line.get("split") == "test"]
    return {line["epoch"]: line["ndcg@10"] for line in lines if "checkpoint" not in line}


def main() -> None:
    """Runs the program from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders")
    runs = parser.parse_args().runs
    curves = [curve(run) for run in runs]
    print("| epoch | research code | " + " | ".join(runs) + " |")
    print("|---" * (2 + len(runs)) + "|")
    for epoch, theirs in RESEARCH_NDCG10.items():
        ours = [f"{c[epoch]:.4f} ({c[epoch] - theirs:+.4f})" if epoch in c else "" for c in curves]
        if any(ours):
            print(f"| {epoch} | {theirs:.4f} | " + " | ".join(ours) + " |")
    best = [max(c.items(), key=lambda item: item[1]) for c in curves]
    print("| best | 0.2009 | " + " | ".join(f"{value:.4f} (epoch {epoch})" for epoch, value in best) + " |")


if __name__ == "__main__":
    main()
