"""The folder of a run: config.yaml, dataset.json, kernels.json, metrics.jsonl, saved.json, tensorboard/, checkpoints/,
profile/.

Only rank 0 of the one job that owns the folder (lock/) writes here; whole files are written aside and renamed,
metrics.jsonl grows line by line.
"""

import json
import os
from contextlib import ExitStack
from typing import List, Optional, Tuple

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config, to_yaml
from fuxi_torchrec.data.format import IDENTITY_FILE, DatasetIdentity, read_identity, same_data
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject, file_aside, naming, write_aside
from fuxi_torchrec.paths import absolute, is_address, join
from fuxi_torchrec.run.lock import Lock

CONFIG_FILE = "config.yaml"
KERNELS_FILE = "kernels.json"
METRICS_FILE = "metrics.jsonl"
SAVED_FILE = "saved.json"  # the last checkpoint that was completed; it stays when checkpoints/ is moved away
LOCK_FOLDER = "lock"
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
        self._locks: List[Lock] = []

    @classmethod
    def create(cls, path: str, config: Config, identity: DatasetIdentity, resume: bool) -> "RunFolder":
        """Starts a run's folder, or goes on in it with `resume`, which leaves config and identity as they were.

        Raises UserError where a run is already there."""
        run = cls(path)
        run._check_start(config, identity, resume)
        try:
            os.makedirs(path, exist_ok=True)
            launch = launch_id()
            if launch is not None:
                write_aside(run._file(LAUNCH_FILE), launch)
            if not run._exists():  # else the trainer does, once a checkpoint has been found to fit
                run.note_saved(None)
                run.describe(config, identity)
        except OSError as error:
            raise UserError(f"{path}: cannot write the run folder ({error.strerror})") from None
        return run

    @classmethod
    def start(
        cls, path: str, config: Config, identity: DatasetIdentity, resume: bool, owned: Optional[ExitStack] = None
    ) -> Tuple["RunFolder", bool]:
        """Does as `create`, where a restart of the launch that made the run (by torchrun after a lost worker, by Slurm
        after a requeue) goes on without being told to. Returns the run, and whether it is resumed.

        owned: holds the locks of all that the run writes, from here until it is closed; None takes none.
        """
        run = cls(path)
        locks: List[Lock] = []
        if owned is not None:
            run._check_start(config, identity, run._resumes(resume))  # a mistake is told before anybody is waited for
            locks = run._lock(config)
            for lock in locks:
                try:
                    owned.enter_context(lock)
                except OSError as error:
                    key = "" if lock.what == path else "trainer.checkpoint_folder: "
                    raise UserError(f"{key}{lock.what}: cannot be written ({error.strerror or error})") from None
        resume = run._resumes(resume)
        run = cls.create(path, config, identity, resume)
        run._locks = locks
        return run, resume

    def _lock(self, config: Config) -> List[Lock]:
        """The locks of this folder, and of the checkpoints' where that is another."""
        folders = filter(None, (self.path, config.trainer.checkpoint_folder))
        by_place = {folder if is_address(folder) else os.path.realpath(folder): folder for folder in folders}
        return [Lock(join(folder, LOCK_FOLDER), folder) for folder in by_place.values()]

    def _check_start(self, config: Config, identity: DatasetIdentity, resume: bool) -> None:
        if self._exists() and not resume:
            raise UserError(f"{self.path}: a run is already here; go on with it by --resume, or name another --output")
        if self._exists():
            self.check_same(config, identity)

    def _resumes(self, asked: bool) -> bool:
        file = self._file(LAUNCH_FILE)
        if asked or not is_restart() or not os.path.exists(file):
            return asked
        with open(file, encoding="utf-8") as text:
            return text.read() == launch_id()

    def _exists(self) -> bool:
        return os.path.isfile(self._file(CONFIG_FILE))

    def confirm(self) -> None:
        """Ends the process if another one has taken over what it writes (Lock.confirm)."""
        for lock in self._locks:
            lock.confirm()

    def check_same(self, config: Config, identity: DatasetIdentity) -> None:
        """Checks that going on with this run would not mix two data sets, splits or metrics under one name. Raises
        UserError where it would."""
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
    def open(cls, path: str) -> "RunFolder":
        """Opens an existing run's folder. Raises UserError where there is none."""
        run = cls(path)
        if not run._exists():
            raise UserError(f"{path}: no run here ({CONFIG_FILE} is missing); name the --output of a 'train'")
        return run

    def config(self, overrides: Optional[List[str]] = None) -> Config:
        """Reads the run's config, with dotted options on top."""
        config = load_config(self._file(CONFIG_FILE), overrides)
        kept = config.trainer.checkpoint_folder
        if kept and absolute(kept) != kept:
            config.trainer.checkpoint_folder = self._found(kept)
        return config

    def _found(self, relative: str) -> str:
        """Resolves a relative folder of checkpoints, as older runs have it: it lies beside the run or above it, since both
        were named from one folder, or where the user is now."""
        above = os.path.abspath(self.path)
        while not os.path.isdir(os.path.join(above, relative)):
            if os.path.dirname(above) == above:
                return absolute(relative)
            above = os.path.dirname(above)
        return os.path.join(above, relative)

    def note_saved(self, checkpoint: Optional[str]) -> None:
        """Records the last completed checkpoint outside of the folder of checkpoints; None: there was none yet."""
        kept = checkpoint
        if checkpoint is not None and not is_address(checkpoint):
            inside = os.path.relpath(checkpoint, self.path)
            kept = absolute(checkpoint) if inside.startswith("..") else inside
        write_aside(self._file(SAVED_FILE), json.dumps({"checkpoint": kept}) + "\n")

    def refuse_lost_checkpoints(self, folder: str) -> None:
        """Checks that no completed checkpoint was lost. Raises UserError where one was completed once, of which
        nothing is left in `folder`: to begin again would throw the run away. A run that was killed before its first
        save begins again."""
        lost = self.last_saved()
        if lost:
            raise UserError(
                f"{folder}: no checkpoint here, but this run has saved one ({lost}); put its checkpoints back, mount or "
                "name their folder (trainer.checkpoint_folder), or train to another --output"
            )
        self.note_saved(None)

    def last_saved(self) -> Optional[str]:
        """Names the last completed checkpoint; None: there was none yet. Raises UserError for a record that cannot be
        read."""
        try:
            with open(self._file(SAVED_FILE), encoding="utf-8") as file:
                return json.load(file)["checkpoint"]
        except FileNotFoundError:  # an older run: it saved what it had evaluated
            evaluated = [line for line in self.metrics() if "split" in line and "command" not in line]
            return f"after its evaluation at step {evaluated[-1].get('step')}" if evaluated else None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._file(SAVED_FILE)}: cannot be read; remove it to start again from nothing") from None

    def note_kernels(self, record: JsonObject) -> None:
        """Records the CPU kernels that the run computes with."""
        write_aside(self._file(KERNELS_FILE), kernels_text(record))

    def kernels(self) -> Optional[JsonObject]:
        """Reads the record of the run's CPU kernels; None where there is none, as in older runs. Raises UserError where
        it cannot be read."""
        path = self._file(KERNELS_FILE)
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
            if not all(isinstance(family, str) for family in record["left_to_pytorch"]):
                raise TypeError("left_to_pytorch is a list of names")
            return {**record, "processor": str(record["processor"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: cannot be read; remove it: the run then goes on with all kernels") from None

    def identity(self) -> DatasetIdentity:
        """Reads the identity of the data set that the run was trained on."""
        return read_identity(self.path)

    def append(self, line: JsonObject) -> None:
        """Adds one JSON object to metrics.jsonl, by one write: an evaluation may add its line while the run goes on."""
        self.confirm()
        path = self._file(METRICS_FILE)
        with naming(path), open(path, "ab", buffering=0) as file:
            file.write(f"{json.dumps(line)}\n".encode())

    def metrics(self) -> List[JsonObject]:
        """Reads the lines of metrics.jsonl; one that is damaged, as a killed process may leave its last, is skipped."""
        path = self._file(METRICS_FILE)
        if not os.path.exists(path):
            return []
        lines = []
        with open(path, "rb") as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue
        return lines

    def metrics_size(self) -> int:
        """Returns the size of metrics.jsonl in bytes."""
        path = self._file(METRICS_FILE)
        return os.path.getsize(path) if os.path.exists(path) else 0

    def forget_after(self, size: int) -> None:
        """Drops what training wrote behind the first `size` bytes of metrics.jsonl: a resumed run takes it again."""
        path = self._file(METRICS_FILE)
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            kept, rest = file.read(size), file.read()
        commands = [line for line in rest.splitlines() if b'"command"' in line]  # evaluations asked for by hand
        with file_aside(path) as aside, open(aside, "wb") as file:
            file.write(kept + b"".join(line + b"\n" for line in commands))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


def kernels_text(record: JsonObject) -> str:
    """Returns the text of kernels.json, in the run's folder and in each checkpoint."""
    return json.dumps(record, indent=2) + "\n"


def is_restart() -> bool:
    """Tells whether torchrun or Slurm started this process again after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch_id() -> Optional[str]:
    """Names this process's launch: the same for all its restarts, and for no other launch; None outside torchrun and
    Slurm."""
    environment = os.environ
    if environment.get("SLURM_JOB_ID"):
        return f"slurm {environment['SLURM_JOB_ID']}"
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    # torchrun's default id says nothing; the agent, which outlives the workers, is their parent then.
    return f"torchrun {run_id}" if run_id not in (None, "none") else f"agent {os.getppid()}" if run_id else None
