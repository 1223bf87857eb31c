"""Trains a model of RecTools for a time and tells its quality on the way, one JSON line a minute of training.

Runs in an environment that has RecTools and not this project: python rectools_runner.py MODEL FOLDER SECONDS. FOLDER holds
events.csv (what may be trained on) and targets.csv (what is asked for), both of user, item and time in seconds, as
benchmarks.peers writes them. The time of the evaluations is not counted.
"""

import json
import sys
import time
from typing import Any, Dict, List

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.hstu import HSTUModel

MODELS = {"sasrec": SASRecModel, "hstu": HSTUModel}
LENGTH, BATCH, NEGATIVES, WIDTH, BLOCKS, HEADS, DROPOUT, RATE = 200, 128, 128, 50, 2, 1, 0.2, 1e-3
TOP = 10


class Clock(Callback):
    """Stops training when its time is over; evaluates after each `every` seconds of training and at the end."""

    def __init__(self, evaluate: Any, seconds: float, every: float):
        self.evaluate, self.seconds, self.every = evaluate, seconds, every
        self.trained, self.due, self.epochs, self.since = 0.0, every, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Starts the clock."""
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        """Looks at the clock."""
        now = time.perf_counter()
        self.trained, self.since = self.trained + now - self.since, now
        self.epochs = trainer.current_epoch + (number + 1) / trainer.num_training_batches
        over = self.trained >= self.seconds
        if over or self.trained >= self.due:
            self.due += self.every
            tell(seconds=round(self.trained, 1), epochs=round(self.epochs, 3), **self.evaluate())
            self.since = time.perf_counter()
        trainer.should_stop = trainer.should_stop or over


def tell(**values: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps(values), flush=True)


def ndcg(model: Any, dataset: Dataset, targets: pd.DataFrame) -> Dict[str, float]:
    """NDCG@10 and HR@10 over all targets; the items of a user's history are left out, as this project does."""
    users = targets[Columns.User].to_numpy()
    asked: Dict[str, Any] = dict(users=users, dataset=dataset, k=TOP, filter_viewed=True)
    if model.require_recommend_context:  # HSTU's: when it is asked
        asked["context"] = targets[[Columns.User, Columns.Datetime]]
    found = model.recommend(**asked)
    hits = found.merge(targets, on=[Columns.User, Columns.Item])
    gain = (1.0 / np.log2(hits[Columns.Rank].to_numpy() + 1.0)).sum()
    return {"ndcg@10": gain / len(targets), "hr@10": len(hits) / len(targets)}


def read(path: str) -> pd.DataFrame:
    """Reads a CSV file of user, item and time under RecTools' names."""
    frame = pd.read_csv(path)
    frame["time"] = pd.to_datetime(frame["time"], unit="s")
    return frame.rename(columns={"user": Columns.User, "item": Columns.Item, "time": Columns.Datetime})


def main(arguments: List[str]) -> None:
    """Runs one model."""
    name, folder, seconds = arguments[0], arguments[1], float(arguments[2])
    every = float(arguments[3]) if len(arguments) > 3 else 60.0
    seed_everything(0)
    targets = read(f"{folder}/targets.csv")
    dataset = Dataset.construct(read(f"{folder}/events.csv").assign(**{Columns.Weight: 1.0}))
    settings: Dict[str, Any] = dict(
        n_blocks=BLOCKS, n_heads=HEADS, n_factors=WIDTH, dropout_rate=DROPOUT, session_max_len=LENGTH, loss="sampled_softmax",
        n_negatives=NEGATIVES, lr=RATE, batch_size=BATCH, item_net_block_types=(IdEmbeddingsItemNet,), verbose=0,
    )
    box: Dict[str, Any] = {}

    def evaluate() -> Dict[str, float]:
        model, training = box["model"], box["model"].lightning_model.training
        model.is_fitted = True
        with torch.no_grad():
            result = ndcg(model, dataset, targets)
        model.lightning_model.train(training)
        return result

    def trainer() -> Trainer:
        quiet: Dict[str, Any] = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
        clock = Clock(evaluate, seconds, every)
        return Trainer(max_epochs=10_000, enable_checkpointing=False, accelerator="cpu", devices=1, callbacks=[clock], **quiet)

    box["model"] = MODELS[name](get_trainer_func=trainer, **settings)
    box["model"].fit(dataset)


if __name__ == "__main__":
    main(sys.argv[1:])
