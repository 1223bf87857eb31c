"""The folder of a run: config.yaml, dataset.json, metrics.jsonl, tensorboard/, checkpoints/.

Only rank 0 writes here; whole files are written aside and renamed, metrics.jsonl grows line by line.
"""

import json
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from fuxi_torchrec.config import Config
from fuxi_torchrec.config_io import load_config, to_yaml
from fuxi_torchrec.data_format import IDENTITY_FILE, DatasetIdentity, read_identity
from fuxi_torchrec.errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


class RunFolder:
    """Paths and files of one run. Makes nothing by itself: see `create` and `open`."""

    def __init__(self, path: str):
        self.path = path
        self.checkpoints = os.path.join(path, "checkpoints")
        self.tensorboard = os.path.join(path, "tensorboard")

    @classmethod
    def create(cls, path: str, config: Config, identity: DatasetIdentity, resume: bool) -> "RunFolder":
        """Starts a run's folder, or goes on in it with `resume`. Raises UserError where a run is already there."""
        run = cls(path)
        existing = run._file(CONFIG_FILE)
        if os.path.exists(existing) and not resume:
            raise UserError(f"{path}: a run is already here; go on with it by --resume, or name another --output")
        try:
            os.makedirs(path, exist_ok=True)
            write_aside(existing, to_yaml(config))
            write_aside(run._file(IDENTITY_FILE), identity.to_json())
        except OSError as error:
            raise UserError(f"{path}: cannot write the run folder ({error.strerror})") from None
        return run

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
        with open(self._file(METRICS_FILE), "a", encoding="utf-8") as file:
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

    def forget_after(self, step: int) -> None:
        """Drops metrics of steps behind `step`: a resumed run takes them again."""
        kept = [line for line in self.metrics() if line.get("step", 0) <= step]
        write_aside(self._file(METRICS_FILE), "".join(json.dumps(line) + "\n" for line in kept))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


@contextmanager
def file_aside(path: str) -> Iterator[str]:
    """A temporary path beside `path`, renamed onto it at the end, or removed if anything went wrong."""
    aside = f"{path}.tmp-{os.getpid()}"
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def write_aside(path: str, text: str) -> None:
    """Writes a whole file or nothing."""
    with file_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(text)
