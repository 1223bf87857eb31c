"""The page of a reproduced table, in Markdown: tables from the records, plots, and notes that a person wrote."""

import json
import os
import statistics
from typing import Any, Dict, Iterable, List

from benchmarks.reproduce.records import Record
from benchmarks.reproduce.research_curve import RESEARCH_NDCG10

METRICS = ("ndcg@10", "ndcg@50", "hr@10", "hr@50", "mrr")
SHOWN = {"ndcg@10": "NDCG@10", "ndcg@50": "NDCG@50", "hr@10": "HR@10", "hr@50": "HR@50", "mrr": "MRR"}
# NDCG@10 on leave-one-out as the papers give it. HSTU and SASRec: HSTU's README; α and β: their papers.
PAPERS = {
    "ml-1m": {
        "sasrec": 0.1603,
        "hstu": 0.1720,
        "hstu-large": 0.1893,
        "fuxi-alpha": 0.1835,
        "fuxi-alpha-large": 0.1934,
        "fuxi-beta": 0.1848,
    },
    "ml-20m": {
        "sasrec": 0.1621,
        "hstu": 0.1895,
        "hstu-large": 0.2098,
        "fuxi-alpha": 0.1954,
        "fuxi-alpha-large": 0.2086,
        "fuxi-beta": 0.2117,
    },
}
RUNS = {
    "fuxi-beta": "FuXi-β",
    "fuxi-beta-tuned": "FuXi-β, tuned",
    "fuxi-beta-semantic": "FuXi-β + semantic channel (= FuXi-α with a functional bias)",
    "fuxi-beta-no-temporal": "FuXi-β − temporal channel",
    "fuxi-beta-no-positional": "FuXi-β − positional channel",
    "fuxi-beta-single-stage": "FuXi-β, single-stage feed-forward layer",
    "fuxi-alpha": "FuXi-α",
    "hstu": "HSTU",
    "sasrec": "SASRec",
    "flash": "FLASH",
    "hstu-beta": "HSTU-β",
    "sasrec-beta": "SASRec-β",
}


def page(
    data: str,
    records: List[Record],
    floor: Dict[str, Any],
    steps: Dict[str, float],
    plots: Dict[str, str],
    notes: str = "",
) -> str:
    """The page's text.

    Args:
        records: all runs.
        floor: {data split: {split: {baseline: metrics}}}.
        steps: median seconds of a training step of each model, under equal load.
        plots: {title: file name} in the folder of the records.
        notes: what a person has to say about all this, before the plots.
    """
    dataset = records[0].dataset
    parts = [
        f"# {data}, reproduced",
        f"Made by `python -m benchmarks.reproduce {data}` from [the runs' own records]({data}/), each run's `metrics.jsonl` "
        f"among them. {dataset['users']:,} users, {dataset['items']:,} items (catalogue: {dataset['catalogue']}), "
        f"{dataset['events']:,} events. Every user is ranked against the whole catalogue minus the items of the visible "
        "history; ties count half. A row's values are means over its seeds; what the seeds gave each stands behind "
        "NDCG@10.",
    ]
    tested = [record for record in records if record.split == "leave_one_out"]
    ends = {record.max_epochs for record in tested if record.finished} or {min(r.epochs for r in tested)} if tested else {}
    for epochs in sorted(ends, reverse=True):
        parts += _at_epochs(data, tested, floor, steps, epochs)
    if data == "ml-1m":
        parts += _beside_research([record for record in tested if record.model == "fuxi-beta"])
    validated = [record for record in records if record.split == "leave_two_out" and record.finished]
    if validated:
        parts += _validated(validated, floor)
    if "fuxi-beta" in steps:
        parts += _step_times(steps)
    cut_off = [record for record in records if not record.finished]
    if cut_off:
        names = ", ".join(f"{record.name} ({record.epochs} of {record.max_epochs} epochs)" for record in cut_off)
        parts.append(f"Not finished, and shown as far as they have come: {names}.")
    parts += [notes.strip()] if notes else []
    for what, name in plots.items():
        parts += [f"## {what}", f"![{what}]({data}/{name})"]
    return "\n\n".join(parts) + "\n"


def _step_times(steps: Dict[str, float]) -> List[str]:
    rows = [["run", "seconds a step", "over FuXi-β's"], ["---"] * 3]
    for model, seconds in sorted(steps.items(), key=lambda pair: pair[1]):
        rows.append([title(model), f"{seconds:.3f}", f"{seconds / steps['fuxi-beta']:.2f}"])
    return [
        "## Training steps",
        "Median seconds of a whole training step, all models in turns in one process (benchmarks/reproduce/step_seconds.py). "
        "They are there for models that have no row above, too.",
        "\n".join("| " + " | ".join(row) + " |" for row in rows),
    ]


def _beside_research(records: List[Record]) -> List[str]:
    """FuXi-β's curve beside the research code's; that counts epochs from 0, its epoch 5 has seen the data six times."""
    head = ["passes over the data", "research code", *(f"seed {record.seed}" for record in records)]
    curves = [{line["epoch"]: line["ndcg@10"] for line in record.curve("test")} for record in records]
    rows = []
    for epoch, theirs in RESEARCH_NDCG10.items():
        ours = [f"{curve[epoch + 1]:.4f} ({curve[epoch + 1] - theirs:+.4f})" if epoch + 1 in curve else "" for curve in curves]
        if any(ours):
            rows.append([str(epoch + 1), f"{theirs:.4f}", *ours])
    if not rows:
        return []
    return [
        "## FuXi-β beside the authors' research code",
        "NDCG@10 on test of the research code's own training loop on the same archive (one seed, its best 0.2009), and "
        "here; in brackets the difference.",
        "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
    ]


def _at_epochs(
    data: str, records: List[Record], floor: Dict[str, Any], steps: Dict[str, float], epochs: int
) -> List[str]:
    """Two tables of all runs that have so many epochs, none of which is looked at beyond them."""
    reached = [record for record in records if record.epochs >= epochs]
    if not reached:
        return []
    words = (
        f"leave-one-out: the target is each user's last event. All runs after the same {epochs} epochs; a run that went on "
        "is cut off there, so these numbers are comparable with each other"
    )
    words += "." if epochs >= 100 else ", and not with those of the papers, which train for 101."
    best = {record.name: max(record.curve("test", epochs), key=lambda line: line["ndcg@10"]) for record in reached}
    last = {record.name: record.curve("test", epochs)[-1] for record in reached}
    floors = floor.get("leave_one_out", {}).get("test", {})
    return [
        f"## {epochs} epochs",
        words,
        "**The papers' way**: the epoch that was best *on test*, which flatters every row, the noisier ones more.",
        _table(data, reached, best, steps, floors, ("best epoch",)),
        f"**The last epoch** ({epochs}): nothing was chosen.",
        _table(data, reached, last, {}, {}, ()),
    ]


def _table(
    data: str,
    records: List[Record],
    lines: Dict[str, Dict[str, Any]],
    steps: Dict[str, float],
    floors: Dict[str, Any],
    extra: Iterable[str],
) -> str:
    """A row a model, in order of NDCG@10. lines: the evaluation of each run that counts, by the record's name."""
    extra, papers = list(extra), PAPERS.get(data, {})
    with_papers = bool(extra) and any(record.model in papers for record in records)
    head = ["run", *SHOWN.values(), *extra, *(["papers' NDCG@10"] if with_papers else []), "seeds", "parameters (blocks)"]
    head += ["step time / FuXi-β's"] if steps else []
    rows = []
    for model in dict.fromkeys(record.model for record in records):
        of_model = [record for record in records if record.model == model]
        own = [lines[record.name] for record in of_model]
        row = [title(model), *(_mean(own, metric) for metric in METRICS)]
        row += [", ".join(str(line["epoch"]) for line in own)] if extra else []
        row += [f"{papers[model]:.4f}" if model in papers else ""] if with_papers else []
        row += [str(len(own)), f"{of_model[0].parameters:,} ({of_model[0].encoder_parameters:,})"]
        if steps:
            known = model in steps and "fuxi-beta" in steps
            row.append(f"{steps[model] / steps['fuxi-beta']:.2f}" if known else "")
        rows.append((statistics.mean(line["ndcg@10"] for line in own), row))
    for name, metrics in floors.items():
        rows.append((metrics["ndcg@10"], [f"*{name}*", *(_mean([metrics], m) for m in METRICS)]))
    ordered = [row + [""] * (len(head) - len(row)) for _, row in sorted(rows, key=lambda pair: -pair[0])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *ordered])


def _validated(records: List[Record], floor: Dict[str, Any]) -> List[str]:
    """What came out where the epoch was chosen on validation, and test was looked at once."""
    head = ["run", "epochs", "best epoch on validation", "NDCG@10 on validation", *(f"{n} on test" for n in SHOWN.values())]
    rows = []
    for record in records:
        best, test = record.chosen("validation"), record.chosen("test")
        if best and test:
            run = f"{title(record.model)}, seed {record.seed}"
            chosen = [run, str(record.epochs), str(best["epoch"]), f"{best['ndcg@10']:.4f}"]
            rows.append([*chosen, *(_mean([test], m) for m in METRICS)])
    splits = floor.get("leave_two_out", {})
    for name, metrics in splits.get("test", {}).items():
        validation = splits.get("validation", {}).get(name)
        row = [f"*{name}*", "", "", f"{validation['ndcg@10']:.4f}" if validation else ""]
        rows.append([*row, *(_mean([metrics], m) for m in METRICS)])
    return [
        "## Chosen on validation",
        "leave-two-out: validation is each user's last event but one, training sees neither. The epoch is chosen on "
        "validation, and that checkpoint is tested once: the numbers to trust. Training has one event less of each user, "
        "and the last event is predicted from a history whose newest event the model was not trained on.",
        "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
    ]


def title(model: str) -> str:
    """A run's name for a reader."""
    if model in RUNS:
        return RUNS[model]
    if model.endswith("-large") and model.removesuffix("-large") in RUNS:
        return f"{RUNS[model.removesuffix('-large')]} large"
    form = model.removeprefix("fuxi-beta-")
    return f"FuXi-β, f: {form}" if form != model else model


def _mean(lines: List[Dict[str, Any]], metric: str) -> str:
    values = [line[metric] for line in lines]
    seeds = f" ({', '.join(f'{value:.4f}' for value in values)})" if metric == "ndcg@10" and len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{seeds}"


def read_steps(path: str, models: Dict[str, str]) -> Dict[str, float]:
    """Median seconds of a step by model, from what benchmarks.reproduce.step_seconds wrote; {} where it wrote nothing.

    models: {model: path of its config}.
    """
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        seconds = json.load(file)["seconds"]
    return {model: statistics.median(seconds[config]) for model, config in models.items() if config in seconds}
