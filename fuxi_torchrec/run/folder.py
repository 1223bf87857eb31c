"""The folder of a run: config.yaml, dataset.json, metrics.jsonl, tensorboard/, checkpoints/, profile/.

Only rank 0 writes here; whole files are written aside and renamed, metrics.jsonl grows line by line.
"""

import json
import os
from typing import Any, Dict, List, Optional, Tuple

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config, to_yaml
from fuxi_torchrec.data.format import IDENTITY_FILE, DatasetIdentity, read_identity, same_data
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import naming, write_aside

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
# What a resumed run must not change: its best so far was found under these.
KEPT_ON_RESUME = (
    ("data", "split"),
    ("data", "temporal_cutoffs"),
    ("data", "max_sequence_length"),
    ("evaluation", "split"),
    ("trainer", "metric"),
)
LAUNCH_FILE = "launch.txt"  # what started the run last, so that its restarts are known from another run's start


class RunFolder:
    """Paths and files of one run. Makes nothing by itself: see `create` and `open`."""

    def __init__(self, path: str):
        self.path = path
        self.checkpoints = os.path.join(path, "checkpoints")
        self.tensorboard = os.path.join(path, "tensorboard")
        self.profile = os.path.join(path, "profile")

    @classmethod
    def create(cls, path: str, config: Config, identity: DatasetIdentity, resume: bool) -> "RunFolder":
        """Starts a run's folder, or goes on in it with `resume`, which leaves config and identity as they were.

        Raises UserError where a run is already there."""
        run = cls(path)
        existing = run._file(CONFIG_FILE)
        if os.path.exists(existing) and not resume:
            raise UserError(f"{path}: a run is already here; go on with it by --resume, or name another --output")
        if os.path.exists(existing):
            run.check_same(config, identity)
        try:
            os.makedirs(path, exist_ok=True)
            if launch_id() is not None:
                write_aside(run._file(LAUNCH_FILE), launch_id())
            if not os.path.exists(existing):  # else the trainer does, once a checkpoint has been found to fit
                run.describe(config, identity)
        except OSError as error:
            raise UserError(f"{path}: cannot write the run folder ({error.strerror})") from None
        return run

    def check_same(self, config: Config, identity: DatasetIdentity) -> None:
        """Raises UserError where going on with this run would mix two data sets, splits or metrics under one name."""
        if not same_data(identity, self.identity()):
            raise UserError(f"{self.path}: this run was trained on another data set; name its own with --data.path")
        before, now = self.config(), config
        for section, key in KEPT_ON_RESUME:
            was, wanted = getattr(getattr(before, section), key), getattr(getattr(now, section), key)
            if was != wanted:
                raise UserError(
                    f"{self.path}: {section}.{key} is {was} in this run, not {wanted}; its best and its new metrics "
                    "could not be compared; leave it, or name another --output"
                )

    def describe(self, config: Config, identity: DatasetIdentity) -> None:
        """Writes the config and the data set's identity."""
        write_aside(self._file(CONFIG_FILE), to_yaml(config))
        write_aside(self._file(IDENTITY_FILE), identity.to_json())

    @classmethod
    def start(cls, path: str, config: Config, identity: DatasetIdentity, resume: bool) -> Tuple["RunFolder", bool]:
        """`create`, where a restart of the launch that made the run (by torchrun after a lost worker, by Slurm after a
        requeue) goes on without being told to. Returns the run, and whether it is resumed."""
        file = cls(path)._file(LAUNCH_FILE)
        if is_restart() and os.path.exists(file):
            with open(file, encoding="utf-8") as text:
                resume = resume or text.read() == launch_id()
        return cls.create(path, config, identity, resume), resume

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """An existing run's folder. Raises UserError where there is none."""
        run = cls(path)
        if not os.path.isfile(run._file(CONFIG_FILE)):
            raise UserError(f"{path}: no run here ({CONFIG_FILE} is missing); name the --output of a 'train'")
        return run

    def config(self, overrides: Optional[List[str]] = None) -> Config:
        return load_config(self._file(CONFIG_FILE), overrides)

    def identity(self) -> DatasetIdentity:
        """Identity of the data set that the run was trained on."""
        return read_identity(self.path)

    def append(self, line: Dict[str, Any]) -> None:
        """Adds one JSON object to metrics.jsonl."""
        path = self._file(METRICS_FILE)
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> List[Dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a killed process left incomplete is skipped."""
        path = self._file(METRICS_FILE)
        if not os.path.exists(path):
            return []
        lines = []
        with open(path, encoding="utf-8") as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        path = self._file(METRICS_FILE)
        return os.path.getsize(path) if os.path.exists(path) else 0

    def forget_after(self, size: int) -> None:
        """Drops what training wrote behind the first `size` bytes of metrics.jsonl: a resumed run takes it again."""
        path = self._file(METRICS_FILE)
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            kept, rest = file.read(size).decode(), file.read()
        commands = [line for line in rest.splitlines() if b'"command"' in line]  # evaluations asked for by hand
        write_aside(path, kept + "".join(line.decode() + "\n" for line in commands))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


def is_restart() -> bool:
    """Whether torchrun or Slurm started this process again after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch_id() -> Optional[str]:
    """The same for all restarts of one launch, and for no other; None outside torchrun and Slurm."""
    environment = os.environ
    if environment.get("SLURM_JOB_ID"):
        return f"slurm {environment['SLURM_JOB_ID']}"
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    # torchrun's default id says nothing; the agent, which outlives the workers, is their parent then.
    return f"torchrun {run_id}" if run_id not in (None, "none") else f"agent {os.getppid()}" if run_id else None
