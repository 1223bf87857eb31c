"""What is kept of a reproduced run, small enough to be committed: its metrics.jsonl, and beside it a JSON file with what the
run was made of and the weights its token-mixing channels learned.

The page and the plots are made from these alone, so they can be made again where the runs are not.
"""

import glob
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional

import torch

from fuxi_torchrec.config import Config
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.encoders.channels import ChannelParameters
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import write_aside
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.outcome import read_outcome

DIGITS = 9  # what float32 has

Blocks = List[Dict[str, Dict[str, Any]]]
"""For each block {channel's name: {"kind": …, parameter's name: nested list of values}}."""


@dataclass
class Record:
    """One run. parameters: all that are trained; encoder_parameters: those of the tower's blocks. blocks: of the best
    checkpoint; None where it could not be read. lines: of metrics.jsonl, in a file of their own."""

    model: str
    seed: int
    split: str
    max_epochs: int
    finished: bool
    dataset: Dict[str, Any]
    parameters: int
    encoder_parameters: int
    blocks: Optional[Blocks] = None
    lines: List[Dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its files."""
        split = "" if self.split == "leave_one_out" else f"{self.split.replace('_', '-')}-"
        return f"{self.model}-{split}seed-{self.seed}"

    def curve(self, split: str, epochs: Optional[int] = None) -> List[Dict[str, Any]]:
        """The evaluations of a split after each epoch, in order: up to `epochs`, if given."""
        lines = [line for line in self.lines if line.get("split") == split and "checkpoint" not in line]
        return [line for line in lines if epochs is None or line["epoch"] <= epochs]

    def chosen(self, split: str) -> Optional[Dict[str, Any]]:
        """The evaluation of the best checkpoint at the end of training."""
        lines = [line for line in self.lines if line.get("split") == split and line.get("checkpoint") == "best"]
        return next((line for line in reversed(lines) if "command" not in line), None)

    @property
    def epochs(self) -> int:
        """Epochs that have been evaluated."""
        return max((line["epoch"] for line in self.lines if "split" in line and "checkpoint" not in line), default=0)

    def write(self, folder: str) -> None:
        """Writes the record into the folder, as JSON."""
        os.makedirs(folder, exist_ok=True)
        facts = asdict(self)
        lines = facts.pop("lines")
        path = os.path.join(folder, self.name)
        write_aside(f"{path}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_aside(f"{path}.json", json.dumps(facts) + "\n")


def read_records(folder: str) -> List[Record]:
    """All that `write` has left in a folder, by name and seed."""
    records = []
    for path in sorted(glob.glob(os.path.join(folder, "*-seed-*.json"))):
        with open(path, encoding="utf-8") as facts, open(f"{path}l", encoding="utf-8") as lines:
            records.append(Record(**json.load(facts), lines=[json.loads(line) for line in lines]))
    return sorted(records, key=lambda record: (record.model, record.seed))


def record_of(path: str, model: str, known: Optional[Record] = None) -> Optional[Record]:
    """A run's record as far as it has come; None before its first evaluation.

    known: an earlier record of the run; its weights are taken where training has not gone on, else they are read from
    the best checkpoint, which needs the data set.
    """
    try:
        run = RunFolder.open(path)
    except UserError:
        return None
    config, identity, lines = run.config(), run.identity(), run.metrics()
    finished = (read_outcome(path) or {}).get("status") == "finished"
    record = _described(model, config, identity, finished, lines)
    if not record.epochs:
        return None
    is_same = known is not None and known.blocks is not None and known.lines == lines
    record.blocks = known.blocks if is_same else _learned(run, config)
    return record


def _described(
    model: str, config: Config, identity: DatasetIdentity, finished: bool, lines: List[Dict[str, Any]]
) -> Record:
    with torch.device("meta"):
        encoder = build_encoder(config.model, padded_length=config.padded_length)
    dataset = {
        "name": identity.name,
        "users": identity.num_users,
        "items": identity.num_items,
        "events": identity.num_events,
        "catalogue": identity.catalogue,
    }
    table = identity.num_items * config.model.embedding_dim
    return Record(
        model=model,
        seed=config.trainer.seed,
        split=config.data.split,
        max_epochs=config.trainer.max_epochs,
        finished=finished,
        dataset=dataset,
        parameters=table + sum(parameter.numel() for parameter in encoder.parameters()),
        encoder_parameters=sum(parameter.numel() for parameter in encoder.blocks.parameters()),
        lines=lines,
    )


def _learned(run: RunFolder, config: Config) -> Optional[Blocks]:
    from fuxi_torchrec.evaluation.load_model import open_model

    try:
        with open_model(run, config, "best") as saved:
            return channel_weights(saved.model.module.tower.encoder)
    except UserError as error:  # a run in progress may just replace its checkpoint
        print(f"{run.path}: no weights read ({error})", file=sys.stderr)
        return None


def channel_weights(encoder: torch.nn.Module) -> Blocks:
    """What the channels of each block have learned."""
    blocks = []
    for block in encoder.blocks:
        channels = {name.split(".")[-1]: part for name, part in block.named_modules() if isinstance(part, ChannelParameters)}
        blocks.append(
            {
                name: {"kind": part.kind, **{key: _rounded(value.tolist()) for key, value in part.named_parameters()}}
                for name, part in channels.items()
            }
        )
    return blocks


def _rounded(values: Any) -> Any:
    return [_rounded(value) for value in values] if isinstance(values, list) else float(f"{values:.{DIGITS}g}")
