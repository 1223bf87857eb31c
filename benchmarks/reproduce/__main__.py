"""The papers' table on one data set: every tower and every ablation of FuXi-β, run (or gone on with), and its page.

    fuxi-torchrec prepare movielens --source ml-1m.zip --output data/ml-1m
    python -m benchmarks.reproduce ml-1m [--models fuxi-beta hstu …] [--epochs 26] [--seeds 0 1] [--jobs 2]
    python -m benchmarks.reproduce ml-1m --page-only     # docs/results/ml-1m.md again, from docs/results/ml-1m/

A run is a folder, runs/reproduce/ml-1m/MODEL/seed-S. One that has its epochs is left alone, one that was cut off or is to
have more epochs goes on from its checkpoint. What is kept of each goes to docs/results/ml-1m/, small files that can be
committed. The runs are a sweep of this machine (launch/sweep): its live table, logs/ and jobs.json lie in runs/reproduce/ml-1m;
runs beside each other get an equal share of the cores.
"""

import argparse
import json
import os
import re
import sys
from typing import Any, Dict, List, Optional

from fuxi_torchrec.cli.streams import run_on_streams
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.data.format import read_identity
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import write_aside
from launch.place import Place
from launch.sweep.plan import PlannedRun, SweepPlan
from launch.sweep.runner import run_plan

DATA_SETS = {"ml-1m": "ml-1m", "ml-100k": "ml-1m", "ml-20m": "ml-20m"}  # and the folder of its configs
SPLITS = ("leave_one_out", "leave_two_out")
CONFIGS = "configs"
RESULTS = os.path.join("docs", "results")
NOTES = "notes.md"  # what a person has to say about the results
STEPS = "step-seconds.json"  # what benchmarks.reproduce.step_seconds wrote, for the table's step times
PUBLISHED = re.compile(r"(.+)-sampled-softmax-n128-(large-)?final\.yaml")
# First the rows that the papers' claims stand on.
FIRST = ("fuxi-beta", "fuxi-beta-no-temporal", "fuxi-beta-semantic", "fuxi-alpha", "hstu", "sasrec", "flash")
# Configs of one model under two names; the first one's run stands for both.
SAME = {"fuxi-beta-pow": "fuxi-beta", "fuxi-alpha-functional": "fuxi-beta-semantic"}


def configs_of(data: str) -> Dict[str, str]:
    """{model: path of its config}: a data set's published runs, large ones as MODEL-large, and the ablations."""
    folder, found = os.path.join(CONFIGS, DATA_SETS[data]), {}
    for name in sorted(os.listdir(folder)):
        published = PUBLISHED.fullmatch(name)
        if published:
            found[published[1] + ("-large" if published[2] else "")] = os.path.join(folder, name)
        elif name.endswith(".yaml"):
            found[name[: -len(".yaml")]] = os.path.join(folder, name)
    ablations = os.path.join(folder, "ablations")
    for name in sorted(os.listdir(ablations)) if os.path.isdir(ablations) else []:
        found[name[: -len(".yaml")]] = os.path.join(ablations, name)
    rest = [model for model in found if model not in FIRST]
    return {model: found[model] for model in (*FIRST, *sorted(rest, key=lambda m: "large" in m)) if model in found}


def plan(options: argparse.Namespace) -> SweepPlan:
    """Plans the table's runs, in order. Raises UserError for an unknown model, and for data that is not prepared."""
    known = configs_of(options.data)
    if unknown := [model for model in options.models or [] if model not in known]:
        raise UserError(f"--models: {unknown[0]} is none of {', '.join(known)}")
    path = options.data_path or os.path.join("data", options.data)
    try:
        read_identity(path)
    except UserError:
        raise UserError(
            f"{path}: {options.data} is not prepared here; run 'fuxi-torchrec prepare movielens --source "
            f"{options.data}.zip --output {path}', or name its folder with --data-path"
        ) from None
    runs = []
    for model in options.models or [model for model in known if model not in SAME]:
        epochs = options.epochs or load_config(known[model]).trainer.max_epochs
        for seed in options.seeds or ([0, 1] if model == "fuxi-beta" else [0]):
            settings = {"data.path": path, "data.split": options.split, "trainer.seed": seed, "trainer.max_epochs": epochs}
            words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
            about = {"model": model, "trainer.seed": seed}
            runs.append(PlannedRun(f"{model}/seed-{seed}", about, known[model], words, least_epochs=epochs))
    return SweepPlan(runs, runs_folder="")


def _runs(options: argparse.Namespace) -> str:
    name = options.data if options.split == "leave_one_out" else f"{options.data}-{options.split}"
    return os.path.join(options.runs, name)


def run_all(options: argparse.Namespace) -> int:
    """Runs what is not done, as a sweep of this machine; returns the sweep's exit code."""
    planned = plan(options)
    beside = max(1, min(options.jobs, len(planned.runs)))
    return run_plan(planned, _runs(options), Place(), "local_cwd", "", beside, retry_failed=True).code


def write_page(options: argparse.Namespace) -> str:
    """Takes up what the runs have left, and writes tables and plots; the page's path."""
    from benchmarks.reproduce.page import page, read_steps
    from benchmarks.reproduce.plots import draw_all
    from benchmarks.reproduce.records import read_records, record_of

    folder = os.path.join(options.results, options.data)
    known = {record.name: record for record in read_records(folder)}
    for split in SPLITS:
        runs = _runs(argparse.Namespace(**{**vars(options), "split": split}))
        for model in (name for name in sorted(configs_of(options.data)) if os.path.isdir(os.path.join(runs, name))):
            for seed in sorted(os.listdir(os.path.join(runs, model))):
                suffix = "" if split == "leave_one_out" else f"{split.replace('_', '-')}-"
                record = record_of(os.path.join(runs, model, seed), model, known.get(f"{model}-{suffix}{seed}"))
                if record:
                    record.write(folder)
    records = read_records(folder)
    if not records:
        raise UserError(f"{folder}: no results yet; run the table first")
    steps = read_steps(os.path.join(folder, STEPS), configs_of(options.data))
    plots = draw_all(records, steps, folder)
    path = os.path.join(options.results, f"{options.data}.md")
    notes = os.path.join(folder, NOTES)
    if os.path.exists(notes):
        with open(notes, encoding="utf-8") as file:
            notes = file.read()
    else:
        notes = ""
    write_aside(path, page(options.data, records, _floor(options, folder), steps, plots, notes))
    return path


def _floor(options: argparse.Namespace, folder: str) -> Dict[str, Any]:
    """{split: {"test": {baseline: metrics}, …}}, counted once and kept beside the records."""
    kept = os.path.join(folder, "baselines.json")
    if os.path.exists(kept):
        with open(kept, encoding="utf-8") as file:
            return json.load(file)
    path = options.data_path or os.path.join("data", options.data)
    try:
        read_identity(path)
    except UserError:
        return {}
    from benchmarks.reproduce.baselines import baselines
    from fuxi_torchrec.config import Config, DataConfig, evaluation_splits
    from fuxi_torchrec.data.dataset import SequenceDataset

    floor: Dict[str, Any] = {}
    for split in SPLITS:
        config, dataset = Config(data=DataConfig(split=split)), SequenceDataset(path)
        floor[split] = {name: baselines(dataset, config, name) for name in evaluation_splits(config.data)}
    write_aside(kept, json.dumps(floor, indent=1) + "\n")
    return floor


def parse(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(DATA_SETS))
    parser.add_argument("--models", nargs="+", help="names of configs; default: all")
    parser.add_argument("--epochs", type=int, help="default: the config's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0, and 1 for fuxi-beta")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one a core")
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="leave_two_out chooses models on validation")
    parser.add_argument("--data-path", help="the prepared data set; default: data/NAME")
    parser.add_argument("--runs", default=os.path.join("runs", "reproduce"), help="where the run folders are")
    parser.add_argument("--results", default=RESULTS, help="where page, plots and records go")
    parser.add_argument("--page-only", action="store_true", help="run nothing: make the page from what there is")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    """Exit codes: 0 every run finished, 1 some failed, 2 a mistake (one line), 130 or 143 stopped."""
    options = parse(arguments)
    try:
        code = 0 if options.page_only else run_all(options)
        if code <= 1:
            print(f"written to {write_page(options)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(run_on_streams(main))
