"""Checkpoints by torch.distributed.checkpoint: model, optimizer, and where training stands. Complete or absent.

    checkpoints/step-00000048/   DCP's shards, config.yaml, sharding_plan.json, and complete.json: the marker, written
                                 last, with the state of training and the size and checksum of every file
    checkpoints/index.json       {"last": folder, "best": folder, "best_value": …} for readers; the markers decide

The newest `trainer.keep_checkpoints` and the best are kept.
"""

import json
import threading
from datetime import timedelta
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torchrec.distributed.model_parallel import DistributedModelParallel

from fuxi_torchrec.checkpoint import storage
from fuxi_torchrec.checkpoint.reader import Reader
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import to_yaml
from fuxi_torchrec.distributed.failures import is_lost
from fuxi_torchrec.distributed.private_api import is_trained_in_backward
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.paths import join, make_folder, names_in, path_manager
from fuxi_torchrec.run.folder import CONFIG_FILE, RunFolder

FORMAT = 3
READABLE = (2, FORMAT)  # format 2 had one checksum a file
INDEX_FILE = "index.json"
FAILURES = (OSError, dcp.CheckpointException, RuntimeError, ValueError, EOFError)


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
        folder: the run's checkpoints/; trainer.checkpoint_folder goes before it.
        config, num_items: what makes a model; a checkpoint of another one is refused by name of the differing key.
        extra_files: file name -> text, kept in every checkpoint beside config.yaml.
        optimizer_identity: what decides the optimizer state's shapes, by key; going on with another is refused by that key.
        run: where the last completed checkpoint is recorded, and what must still be this process's; None to read only.
    """

    def __init__(
        self,
        folder: str,
        config: Config,
        num_items: int,
        world: World,
        extra_files: Optional[Dict[str, str]] = None,
        optimizer_identity: Optional[JsonObject] = None,
        run: Optional[RunFolder] = None,
    ):
        self.folder, self.world = config.trainer.checkpoint_folder or folder, world
        self.keep = config.trainer.keep_checkpoints
        self.extra_files = {CONFIG_FILE: to_yaml(config), **(extra_files or {})}
        self.identity = {
            **{f"model.{key}": value for key, value in vars(config.model).items()},
            "model.padded_length": config.padded_length,
            "num_items": num_items,
        }
        self.optimizer_identity, self.run = optimizer_identity or {}, run
        wanted = config.trainer.async_checkpoint
        self.in_background = wanted if wanted is not None else world.device.type == "cuda"
        self.timeout = timedelta(minutes=config.trainer.timeout_minutes)
        self.best: Optional[str] = None
        self._group: Optional[dist.ProcessGroup] = None  # of the background's own, so that it meets no other collective
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[Exception] = None

    def refuse_others(self) -> None:
        """Checks that no other run keeps its checkpoints here: a new run would remove them. Raises UserError where
        one does."""
        found = self._agreed(storage.folders, self.folder)
        if found:
            raise UserError(
                f"{self.folder}: checkpoints of a run are already here; go on by --resume, or name another "
                "trainer.checkpoint_folder"
            )

    def save(self, model: DistributedModelParallel, optimizer: torch.optim.Optimizer, state: JsonObject, is_best: bool) -> None:
        """Saves everything; every rank calls it. `state` must hold "step" and "best_value".

        In the background, the tensors are copied to the CPU first, and an error (a full disk) is raised by the next
        `save` or `wait`. Raises UserError; the checkpoints before are untouched.
        """
        self.wait()
        name = f"step-{state['step']:08d}"
        self.best = name if is_best else self.best
        identities = {"identity": self.identity, "trained_by": self.optimizer_identity}
        marker = {**state, "best": self.best, "format": FORMAT, **identities}
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if not self.in_background:
            return self._write(name, tensors, marker)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        staged = BlockingAsyncStager().stage(tensors)
        self._thread = threading.Thread(target=self._write_later, args=(name, staged, marker), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete. Raises UserError where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def load(self, which: str, model: nn.Module, optimizer: Optional[torch.optim.Optimizer] = None) -> JsonObject:
        """Loads "last", "best" or a folder's name in place; returns the state that was saved with it.

        Raises UserError, on every rank, for a checkpoint that is missing, of another model, or damaged where a rank had
        to read it; after the last the model's values are good for nothing.
        """
        self.wait()
        name, problem = self._agreed(self._named, which)
        if problem:
            raise UserError(problem)
        marker, problem = self._read(name, model, optimizer)
        if problem:
            raise UserError(f"{join(self.folder, name)}: {problem}; use another checkpoint")
        return marker

    def load_newest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, report: Callable[[str], None]
    ) -> Optional[JsonObject]:
        """Loads the newest checkpoint that is whole, and reports every one that isn't, a line each.

        Nothing of a damaged one is left: what its reading has overwritten the one before overwrites again, all of it.
        Returns its state, with its "config" as plain values; None where no checkpoint was ever completed. Raises UserError
        where all of them are damaged.
        """
        damaged = 0
        for name in self._agreed(storage.folders, self.folder):
            marker, problem = self._read(name, model, optimizer)
            if not problem:
                self.best = marker["best"]
                if self.run and self.world.is_main:
                    self.run.note_saved(join(self.folder, name))
                return {**marker, "config": self._agreed(storage.read_config, join(self.folder, name))}
            report(f"{join(self.folder, name)}: {problem}; the one before is used")
            damaged += not problem.startswith("not complete")
        if damaged:
            raise UserError(f"{self.folder}: every checkpoint is damaged; restore one, or train to another --output")
        return None

    def _write_later(self, name: str, tensors: JsonObject, marker: JsonObject) -> None:
        try:
            self._write(name, tensors, marker)
        except Exception as error:  # raised by `wait`
            self._error = error

    def _write(self, name: str, tensors: JsonObject, marker: JsonObject) -> None:
        path = join(self.folder, name)
        try:
            if self.world.is_main:
                self._confirm()
                storage.remove(path)
                make_folder(path)
            self._barrier()
            writer = storage.Writer(path)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            files = {file: size for part in self._gather(writer.written) for file, size in part.items()}
            if self.world.is_main:
                self._finish(name, {**marker, "files": files})
        except FAILURES as error:
            if is_lost(error):
                raise
            raise UserError(
                f"{path}: checkpoint not saved ({_reason(error, self.world)}); the ones before are untouched; once that is "
                "mended, go on by --resume"
            ) from error
        self._barrier()

    def _finish(self, name: str, marker: JsonObject) -> None:
        path = join(self.folder, name)
        unseen = storage.unseen(path, marker["files"])
        if unseen:
            raise UserError(
                f"{path}: checkpoint not complete, since {unseen}, which another rank wrote, cannot be seen from rank 0; "
                "keep checkpoints in a folder that all ranks share (--output, trainer.checkpoint_folder)"
            )
        self._confirm()
        for file, text in self.extra_files.items():
            marker["files"][file] = storage.write_text(join(path, file), text)
        storage.write_text(join(path, storage.MARKER), json.dumps(marker, indent=2))
        index = {"last": name, "best": marker["best"], "best_value": marker["best_value"]}
        storage.write_text(join(self.folder, INDEX_FILE), json.dumps(index, indent=2))
        if self.run:
            self.run.note_saved(path)
        self._prune(name, marker["best"])

    def _confirm(self) -> None:
        if self.run:
            self.run.confirm()

    def _prune(self, newest: str, best: Optional[str]) -> None:
        """Leaves the newest few and the best. What is later than the newest is of a future that was given up."""
        complete = []
        for name in storage.folders(self.folder):
            if name <= newest and path_manager().exists(join(self.folder, name, storage.MARKER)):
                complete.append(name)
        for name in set(storage.folders(self.folder)) - {best, *complete[: self.keep]}:
            storage.remove(join(self.folder, name))

    def _named(self, which: str) -> Any:
        """(folder's name, None) or (None, problem)."""
        if which not in ("last", "best"):
            return which, None
        for name in storage.folders(self.folder):
            try:
                marker = storage.read_marker(join(self.folder, name))
            except (OSError, ValueError):
                return name, None  # damaged, which `load` will say
            if marker is None:
                continue
            if which == "best" and marker.get("best") is None:
                return None, f"{self.folder}: no evaluation has chosen a best checkpoint yet; take --checkpoint last"
            return (name if which == "last" else marker["best"]), None
        return None, f"{self.folder}: no checkpoint here; train first"

    def _read(self, name: str, model: nn.Module, optimizer: Optional[Any]) -> Any:
        """(marker, None) of a checkpoint that was loaded, or (None, what is wrong) on every rank. Each rank reads and
        checks what it needs; nothing counts unless all ranks found theirs right."""
        path = join(self.folder, name)
        marker, problem = self._agreed(_marker, path)
        if marker is None:
            return None, problem
        self._check_identity(path, marker)
        target: JsonObject = {"model": model.state_dict()}
        if optimizer is not None:
            self._check_optimizer_identity(path, marker)
            create_optimizer_state(model, optimizer)
            target["optimizer"] = optimizer.state_dict()
        try:
            dcp.load(target, storage_reader=Reader(path, marker["files"]))
        except FAILURES as error:
            if is_lost(error):
                raise
            return None, f"damaged checkpoint ({_reason(error, self.world)})"
        model.load_state_dict(target["model"])
        if optimizer is not None:
            optimizer.load_state_dict(target["optimizer"])
        return marker, None

    def _check_identity(self, path: str, marker: JsonObject) -> None:
        if marker.get("format") not in READABLE:
            raise UserError(
                f"{path}: a checkpoint of format {marker.get('format')}, this version reads {FORMAT}; train again"
            )
        saved = marker["identity"]
        for key in sorted(filter(_is_identity, set(saved) | set(self.identity))):
            if saved.get(key) != self.identity.get(key):
                raise UserError(
                    f"{path}: a checkpoint of another model; {key} is {saved.get(key)} there and "
                    f"{self.identity.get(key)} here"
                )

    def _check_optimizer_identity(self, path: str, marker: JsonObject) -> None:
        saved = marker.get("trained_by", self.optimizer_identity)
        for key, value in self.optimizer_identity.items():
            if saved[key] != value:
                raise UserError(
                    f"{path}: {key} was {saved[key]} when this was saved and is {value} now, and the optimizer's state "
                    "would not fit; go on with table.sharding and table.optimizer as they were"
                )

    def _agreed(self, function: Any, *arguments: Any) -> Any:
        """What rank 0 sees: a file system may show different things to different machines for a while."""
        return self.world.from_main(function(*arguments) if self.world.is_main else None)

    def _gather(self, value: Any) -> List[Any]:
        values = [value] * self.world.size
        if self.world.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier(group=self._group)


def _is_identity(key: str) -> bool:
    """Whether models that differ in it are different: not in how they are computed, nor in what training alone drops."""
    return "dropout" not in key and "mixing" not in key


def create_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's state exist, so that loading can fill it: state that is absent is skipped in silence.

    A step on zero gradients; it leaves no trace, since loading overwrites parameters and state.
    """
    for parameter in model.parameters():
        is_fused = is_trained_in_backward(parameter)  # its state has existed since the table was made
        if parameter.requires_grad and parameter.grad is None and not is_fused:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _marker(path: str) -> Any:
    """(marker, None), or (None, what is wrong)."""
    try:
        marker = storage.read_marker(path)
    except (OSError, ValueError):
        return None, f"damaged checkpoint ({storage.MARKER} cannot be read)"
    if marker is None and names_in(path):
        return None, f"not complete ({storage.MARKER} is missing: saving was cut off)"
    return marker, None if marker is not None else "no checkpoint here"


def _reason(error: BaseException, world: World) -> str:
    """What went wrong, in a line; among several ranks, with those where it did."""
    failures = getattr(error, "failures", None)
    if not failures:
        return _reason_of(error)
    first = failures[min(failures)]  # CheckpointException: rank -> (exception, traceback)
    reason = _reason_of(first[0] if isinstance(first, tuple) else first)
    return f"rank {', '.join(map(str, sorted(failures)))}: {reason}" if world.size > 1 else reason


def _reason_of(cause: BaseException) -> str:
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror if cause.filename is None else f"{cause.strerror}: {cause.filename}"
    text = str(cause) or type(cause).__name__
    return text.strip().splitlines()[-1][:200]
