"""A chain's steps out of its file and the command line. No job is made here: mistakes are told at once.

    all: --image registry.example.com/fuxi:0.1              # options of every step that takes them
    prepare: -h cpu movielens --source ml-1m.zip --output data/ml-1m
    train: -h h100x8 --config configs/ml-1m/fuxi-beta-tuned.yaml --output runs/ml-1m -- --trainer.max_epochs 20
    evaluate: -- --split validation

A step's words are those that `torchx run launch/components.py:STEP` takes, and steps may be left out. What one step makes
the next one takes: train's --data.path is prepare's --output, evaluate's --run is train's --output.
"""

import contextlib
import inspect
import io
import os
import shlex
from typing import Any, Dict, List, Optional, Type

from torchx.runner.config import load_sections
from torchx.specs.builders import component_args_from_str

from fuxi_torchrec.config.parsing import read_yaml
from fuxi_torchrec.errors import UserError, one_line
from fuxi_torchrec.paths import absolute
from launch.chain.steps import STEPS, Step

ALL = "all"
NAMES = tuple(step.name for step in STEPS)
DATA = "--data.path"


def read_chain(path: Optional[str], given: Dict[str, List[str]], shared: List[str]) -> List[Step]:
    """Reads a chain's steps, in their order.

    Args:
        path: YAML file of the chain; None: `given` has all of it.
        given: words of steps, which go before the file's.
        shared: options of every step that takes them, which go before the file's `all`.

    Raises:
        UserError: a file, step, option or value that cannot be.
    """
    written = {**(_read(path) if path else {}), **given}
    shared = [*shared, *_without(written.pop(ALL, []), shared)]
    _check_shared(shared)
    if not written:
        raise UserError(f"no steps; name a chain's file, or give some of {', '.join('--' + name for name in NAMES)}")
    stem = os.path.splitext(os.path.basename(path))[0] if path else ""
    steps: List[Step] = []
    for kind in STEPS:
        if kind.name in written:
            words = _with_shared(kind, written[kind.name], shared)
            steps.append(_step(kind, words, stem, {step.name: step for step in steps}))
    return steps


def _read(path: str) -> Dict[str, List[str]]:
    values = read_yaml(path, "chain", "name one like configs/chains/")
    if not isinstance(values, dict):
        raise UserError(f"{path}: a chain has the keys {', '.join((ALL, *NAMES))}")
    for key, value in values.items():
        if key not in (ALL, *NAMES):
            raise UserError(f"{path}: unknown key {key}; a chain has {', '.join((ALL, *NAMES))}")
        if not isinstance(value, str):
            raise UserError(f"{path}: {key}: must be the words of one command line, not {value!r}")
    return {key: split(f"{path}: {key}", value) for key, value in values.items()}


def split(where: str, text: str) -> List[str]:
    """Splits a command line into its words. Raises UserError for a quote that does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}: {one_line(error)}; close the quote") from None


def _step(kind: Type[Step], words: List[str], stem: str, before: Dict[str, Step]) -> Step:
    """Makes a step, with what it takes from the chain's earlier ones."""
    if kind.name == "evaluate" and "train" in before and not _has(words, "run"):
        words = ["--run", before["train"].options["output"], *words]
    options, rest = _parse(kind, words)
    if kind.name == "train":
        # The same at every call, unlike that of `torchx run`: the chain finds its run again.
        name = stem or os.path.splitext(os.path.basename(options["config"]))[0]
        options["output"] = options["output"] or os.path.join("runs", name)
        rest = _with_data(rest, before.get("prepare"))
    step = kind(options, rest)
    if kind.name == "evaluate" and "train" in before and step.place.image is None:
        if absolute(options["run"]) != absolute(before["train"].options["output"]):
            raise UserError(f"evaluate: --run {options['run']} is not what train makes; leave it out, or make two chains")
    return step


def _with_data(words: List[str], prepare: Optional[Step]) -> List[str]:
    if prepare is None:
        return words
    from data_pipelines.cli import COMMANDS, parse

    if not prepare.words or prepare.words[0] not in COMMANDS:
        raise UserError(f"prepare: name a pipeline first: {', '.join(COMMANDS)}")
    output = parse(prepare.words).output
    named = [after for word, after in zip(words, words[1:]) if word == DATA]
    named += [word.partition("=")[2] for word in words if word.startswith(f"{DATA}=")]
    if named and absolute(named[-1]) != absolute(output):
        raise UserError(f"train: {DATA} {named[-1]} is not what prepare makes ({output}); leave it out, or make two chains")
    return words if named else [DATA, output, *words]


def _parse(kind: Type[Step], words: List[str]) -> "tuple[Dict[str, Any], List[str]]":
    """The component's named arguments and the rest, as `torchx run` reads them, with the defaults of .torchxconfig."""
    defaults = load_sections(prefix="component").get(f"launch/components.py:{kind.name}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = component_args_from_str(kind.component, words, defaults)
    except SystemExit as ended:
        if not ended.code:
            raise
        reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{kind.name}: {reason}; see torchx run launch/components.py:{kind.name} --help") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{kind.name}: {one_line(error)}") from None
    return parsed.kwargs, list(parsed.var_args)


def _pairs(words: List[str]) -> Dict[str, List[str]]:
    """Options as {name: its words}."""
    found, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or not name or not (equals or rest):
            raise UserError(f"{word}: an option of every step is --name value; a step's own words belong to the step")
        found[name] = [word] if equals else [word, rest.pop(0)]
    return found


def _takes(kind: Type[Step], name: str) -> bool:
    return name in inspect.signature(kind.component).parameters


def _check_shared(shared: List[str]) -> None:
    for name in _pairs(shared):
        if name == "output" or not any(_takes(kind, name) for kind in STEPS):
            raise UserError(f"--{name}: no option that steps share; see torchx run launch/components.py:train --help")


def _has(words: List[str], name: str) -> bool:
    own = words[: words.index("--")] if "--" in words else words
    return any(word.lstrip("-").partition("=")[0] == name for word in own if word.startswith("-"))


def _with_shared(kind: Type[Step], words: List[str], shared: List[str]) -> List[str]:
    pairs = {name: pair for name, pair in _pairs(shared).items() if _takes(kind, name) and not _has(words, name)}
    return [*(word for pair in pairs.values() for word in pair), *words]


def _without(words: List[str], others: List[str]) -> List[str]:
    return [word for name, pair in _pairs(words).items() if name not in _pairs(others) for word in pair]
