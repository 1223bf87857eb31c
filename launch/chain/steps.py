"""The steps of a chain: each is a component of launch/components.py that knows whether it was done before."""

import argparse
import json
import os
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Dict, Iterator, List, Optional, Tuple, Type

from torchx.specs import AppDef

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.parsing import load_config
from fuxi_torchrec.data.format import IDENTITY_FILE, read_identity
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import absolute, join, path_manager
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.outcome import read_outcome
from launch import checks, components, jobs
from launch.chain.prepare import kept_data
from launch.place import Place

# What a finished training's result depends on: to change it under the same run folder is a mistake.
DECIDING = ("data", "model", "loss", "optimizer", "table.optimizer", "table.learning_rate", "trainer.seed")
NOT_DECIDING = ("data.path", "data.prefetch")
INDEX_FILE = "index.json"  # that of checkpoint.manager, which takes seconds to import
LENGTHS = ("max_epochs", "max_steps")


@dataclass
class Step:
    """A step with its arguments, as its component takes them.

    Attributes:
        options: the component's named arguments.
        words: those that come last or behind the double dash.
        after: the earlier steps of the chain that have to run (again) before this one does.
    """

    options: Dict[str, Any]
    words: List[str]
    after: List[str] = field(default_factory=list)
    name: ClassVar[str]
    component: ClassVar[Any]

    def __post_init__(self) -> None:
        known = {part.name for part in fields(Place)}
        self.place = Place(**{key: value for key, value in self.options.items() if key in known})

    def kept(self) -> Optional[str]:
        """Tells in a line what is there already, so that nothing is left to do; None: the step has to run. Raises
        UserError where something else is there."""
        raise NotImplementedError

    def app(self) -> AppDef:
        """Makes the step's job, with its arguments checked; what an earlier step makes is not looked for. Raises
        UserError."""
        raise NotImplementedError


class Prepare(Step):
    """Makes the data set."""

    name, component = "prepare", components.prepare

    def kept(self) -> Optional[str]:
        """Tells of the data set that these arguments have made."""
        return kept_data(checks.preparation(self.words, self.place))

    def app(self) -> AppDef:
        """Makes the job, which looks once more whether the data set is there."""
        return jobs.prepare(self.words, self.place, ["launch.chain.prepare"])


class Train(Step):
    """Trains the config, from its last checkpoint if there is one."""

    name, component = "train", components.train

    def kept(self) -> Optional[str]:
        """Tells of a training that has finished, with this config and for as long."""
        output = absolute(self.options["output"])
        if "prepare" in self.after or (read_outcome(output) or {}).get("status") != "finished":
            return None
        run, wanted = RunFolder.open(output), load_config(self.options["config"], self.words)
        done = run.config()
        if path_manager().isfile(join(wanted.data.path, IDENTITY_FILE)):  # it may be gone since
            run.check_same(wanted, read_identity(wanted.data.path))
        for key, before, now in _differences(done, wanted):
            raise UserError(
                f"train: {output}: a training has finished here with {key} {before}, not {now}; name another --output, or "
                "leave the key as it was"
            )
        if any(_longer(getattr(wanted.trainer, name), getattr(done.trainer, name)) for name in LENGTHS):
            return None
        return f"{self.options['output']}: finished"

    def app(self) -> AppDef:
        """Makes the job."""
        given = self.options
        if self.place.nodes.is_elastic:  # on Slurm an array, some of whose elements may be cancelled when all is well
            raise UserError(f"train: --nnodes {self.place.nodes}: a chain's next step waits for a fixed number; give one")
        return jobs.train(given["config"], self.words, given["output"], True, self.place, later="prepare" in self.after)


class Evaluate(Step):
    """Evaluates the run's saved model."""

    name, component = "evaluate", components.evaluate

    def kept(self) -> Optional[str]:
        """Tells of an evaluation of this split by this checkpoint in the run's metrics.jsonl."""
        if self.after:
            return None
        run = RunFolder.open(self.options["run"])
        options = evaluation_options(self.words)
        step = _step_of(run, options.checkpoint)
        wanted = {"command": "evaluate", "split": options.split, "step": step}
        if step is None or (options.output and not os.path.exists(options.output)):
            return None
        if not any(wanted.items() <= line.items() for line in run.metrics()):
            return None
        return f"{self.options['run']}: {options.split} was evaluated at step {step}, the {options.checkpoint} checkpoint"

    def app(self) -> AppDef:
        """Makes the job."""
        return jobs.evaluate(self.options["run"], self.words, self.place, later="train" in self.after)


STEPS: Tuple[Type[Step], ...] = (Prepare, Train, Evaluate)
"""Every step that a chain may have, in their order. A new one (an export) joins by a class and a place here."""


def left_to_do(steps: List[Step]) -> Iterator[Tuple[Step, Optional[str]]]:
    """Yields (step, what is kept) of every step, None for one that has to run; `after` is set to the earlier ones that
    have to. Raises UserError."""
    running: List[str] = []
    for step in steps:
        step.after = list(running)
        kept = step.kept()
        if kept is None:
            running.append(step.name)
        yield step, kept


def evaluation_options(words: List[str]) -> argparse.Namespace:
    """Parses what decides an evaluation's line; other options of 'fuxi-torchrec evaluate' are that command's to check."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("split", "test"), ("checkpoint", "best"), ("output", None)):
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args(words)[0]


def _differences(done: Config, wanted: Config) -> List[Tuple[str, Any, Any]]:
    """(key, value of the run, value asked for) of what decides a training and differs."""
    before, now = done.to_dict(), wanted.to_dict()
    keys = [(f"{section}.{name}", before[section][name], now[section][name]) for section in now for name in now[section]]
    wanted_keys = [item for item in keys if item[0] in DECIDING or item[0].partition(".")[0] in DECIDING]
    return [(key, was, asked) for key, was, asked in wanted_keys if key not in NOT_DECIDING and was != asked]


def _longer(wanted: Optional[int], done: Optional[int]) -> bool:
    return done is not None and (wanted is None or wanted > done)


def _step_of(run: RunFolder, checkpoint: str) -> Optional[int]:
    """The step at which a checkpoint was saved; None where it cannot be told."""
    name = checkpoint
    if checkpoint in ("last", "best"):
        index = join(run.config().trainer.checkpoint_folder or run.checkpoints, INDEX_FILE)
        try:
            with path_manager().open(index, "rb") as file:
                name = str(json.load(file)[checkpoint])
        except (OSError, ValueError, KeyError):
            return None
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else None
