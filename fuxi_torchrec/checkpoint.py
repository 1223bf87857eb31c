"""Checkpoints by torch.distributed.checkpoint: model, optimizer, and where training stands. Complete or absent.

    checkpoints/step-00000048/   the shards, and trainer.json (written last, then the folder takes its name)
    checkpoints/index.json       {"last": folder, "best": folder, "best_value": …}

Only the last and the best are kept.
"""

import dataclasses
import json
import os
import shutil
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from fuxi_torchrec.config import Config
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.run_folder import write_aside
from fuxi_torchrec.sharding import World

STATE_FILE = "trainer.json"
INDEX_FILE = "index.json"


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
        folder: the run's checkpoints/.
        config, num_items: what makes a model; a checkpoint of another one is refused by name of the differing key.
    """

    def __init__(self, folder: str, config: Config, num_items: int, world: World):
        self.folder, self.world = folder, world
        self.identity = {
            **{f"model.{key}": value for key, value in dataclasses.asdict(config.model).items() if "dropout" not in key},
            "model.padded_length": config.padded_length,
            "num_items": num_items,
        }

    def index(self) -> Dict[str, Any]:
        path = os.path.join(self.folder, INDEX_FILE)
        if not os.path.exists(path):
            return {}
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
        except ValueError:
            raise UserError(f"{path}: not readable as JSON; restore it or train again") from None

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: Any,
        state: Dict[str, Any],
        best_value: Optional[float],
        is_best: bool,
    ) -> None:
        """Saves everything; every rank calls it. `state` must hold "step". Raises UserError where the disk is full."""
        name = f"step-{state['step']:08d}"
        path = os.path.join(self.folder, name)
        aside = f"{path}.incomplete"
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(self.folder, exist_ok=True)
        self._barrier()
        try:
            dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=aside)
            if self.world.is_main:
                self._finish(aside, path, {**state, "identity": self.identity}, best_value, is_best)
        except (OSError, dcp.CheckpointException, RuntimeError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{path}: checkpoint not saved ({_reason(error)}); the ones before are untouched") from error
        self._barrier()

    def load(self, which: str, model: nn.Module, optimizer: Optional[Any] = None) -> Dict[str, Any]:
        """Loads "last", "best" or a folder's name in place; returns the state that was saved with it.

        Raises UserError for a checkpoint that is missing, damaged, or of another model.
        """
        index = self.index()
        if which == "best" and "last" in index and "best" not in index:
            raise UserError(f"{self.folder}: no evaluation has chosen a best checkpoint yet; take --checkpoint last")
        name = index.get(which, which)
        path = os.path.join(self.folder, name)
        try:
            with open(os.path.join(path, STATE_FILE), encoding="utf-8") as file:
                state = json.load(file)
        except FileNotFoundError:
            raise UserError(f"{path}: no checkpoint here; train first, or name another one") from None
        except ValueError:
            raise UserError(f"{path}: {STATE_FILE} is damaged; use another checkpoint") from None
        self._check_identity(path, state.get("identity", {}))
        target: Dict[str, Any] = {"model": model.state_dict()}
        if optimizer is not None:
            target["optimizer"] = optimizer.state_dict()
        try:
            dcp.load(target, checkpoint_id=path)
        except (OSError, dcp.CheckpointException, RuntimeError, ValueError, EOFError) as error:
            raise UserError(f"{path}: damaged checkpoint ({_reason(error)}); use another one") from error
        model.load_state_dict(target["model"])
        if optimizer is not None:
            optimizer.load_state_dict(target["optimizer"])
        return state

    def _finish(
        self, aside: str, path: str, state: Dict[str, Any], best_value: Optional[float], is_best: bool
    ) -> None:
        write_aside(os.path.join(aside, STATE_FILE), json.dumps(state, indent=2))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(aside, path)
        name = os.path.basename(path)
        index = {**self.index(), "last": name, "best_value": best_value}
        if is_best:
            index["best"] = name
        write_aside(os.path.join(self.folder, INDEX_FILE), json.dumps(index, indent=2))
        kept = {index["last"], index.get("best")}
        for other in os.listdir(self.folder):
            if other.startswith("step-") and other not in kept:
                shutil.rmtree(os.path.join(self.folder, other), ignore_errors=True)

    def _check_identity(self, path: str, saved: Dict[str, Any]) -> None:
        for key in sorted(set(saved) | set(self.identity)):
            if saved.get(key) != self.identity.get(key):
                raise UserError(
                    f"{path}: a checkpoint of another model; {key} is {saved.get(key)} there and "
                    f"{self.identity.get(key)} here"
                )

    def _barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()


def create_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's state exist, so that loading can fill it: state that is absent is skipped in silence.

    A step on zero gradients; it leaves no trace, since loading overwrites parameters and state.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _reason(error: BaseException) -> str:
    causes: List[BaseException] = [error]
    failures = getattr(error, "failures", None)
    if failures:  # CheckpointException: rank -> (exception, traceback)
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in failures.values()]
    text = str(causes[0]) or type(causes[0]).__name__
    return text.strip().splitlines()[-1][:200]
