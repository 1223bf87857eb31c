"""The page of a comparison: a table, a picture of quality against time, and the numbers."""

import json
import platform
from typing import Any, Dict, List

import torch

from fuxi_torchrec.ops.native import library as native

RESEARCH = "the research code's way"


def table(found: Dict[str, List[Dict[str, float]]], research_epoch: float) -> str:
    """Makes the Markdown table: seconds of an epoch, and the quality at the last minute."""
    lines = ["| who | s an epoch | epochs | NDCG@10 | HR@10 |", "|---|---|---|---|---|"]
    for name, rows in found.items():
        last = rows[-1]
        seconds = last["seconds"] / last["epochs"]
        lines.append(f"| {name} | {seconds:.1f} | {last['epochs']:.1f} | {last['ndcg@10']:.4f} | {last['hr@10']:.4f} |")
    lines.append(f"| {RESEARCH} | {research_epoch:.1f} | – | – | – |")
    return "\n".join(lines)


def minutes(found: Dict[str, List[Dict[str, float]]]) -> str:
    """Makes the Markdown table of NDCG@10 after each evaluation."""
    count = min(len(rows) for rows in found.values())
    first = next(iter(found.values()))
    head = " | ".join(f"{first[i]['seconds']:.0f} s" for i in range(count))
    lines = [f"| who | {head} |", "|---|" + "---|" * count]
    for name, rows in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{rows[i]['ndcg@10']:.4f}" for i in range(count)) + " |")
    return "\n".join(lines)


def write_page(folder: str, found: Dict[str, List[Dict[str, float]]], research_epoch: float, negatives: int) -> None:
    """Writes peers.json, peers.md and peers.png, and prints the table."""
    machine = {"processor": native.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    values: Dict[str, Any] = {"machine": machine, "research_epoch_seconds": research_epoch, "runs": found}
    with open(f"{folder}/peers.json", "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
    about = f"{machine['processor']}, {machine['threads']} threads, {platform.platform()}; {negatives} negatives a position."
    text = f"{table(found, research_epoch)}\n\n{minutes(found)}\n\n{about}\n"
    with open(f"{folder}/peers.md", "w", encoding="utf-8") as file:
        file.write(text)
    draw(f"{folder}/peers.png", found)
    print(text)


def draw(path: str, found: Dict[str, List[Dict[str, float]]]) -> None:
    """Draws NDCG@10 over the seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, rows in found.items():
        axes.plot([row["seconds"] for row in rows], [row["ndcg@10"] for row in rows], marker="o", label=name)
    axes.set(xlabel="seconds of training", ylabel="NDCG@10", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
