"""A chain's file of a data set and a training that take a second each."""

import json

import yaml

from tests.helpers.dryrun import ROOT

PREPARE = "synthetic --users 60 --items 40 --events-per-user 8 --output data/made"
TINY = (
    "--data.max_sequence_length 10 --data.batch_size 8 --data.shuffle_buffer 20 --model.embedding_dim 8 --model.value_dim 8 "
    "--loss.num_negatives 5 --trainer.device cpu --trainer.log_every_steps 1 --evaluation.every_epochs 100 "
    "--trainer.max_epochs 2"
)
CONFIG = f"{ROOT}/configs/smoke/fuxi-beta.yaml"


def write_chain(folder, prepare=PREPARE, before="", after="", run="runs/made", evaluate="-- --checkpoint last", **more):
    """The chain's file in `folder`; before, after: further words of train, of its place and of its config."""
    train = f"--config {CONFIG} --output {run} {before} -- {TINY} {after}"
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"prepare": prepare, "train": train, "evaluate": evaluate, **more}))
    return path


def lines(run):
    """The lines of a run's metrics.jsonl: those of training with a loss, and those of evaluations asked for."""
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if "loss" in line], [line for line in found if line.get("command") == "evaluate"]
