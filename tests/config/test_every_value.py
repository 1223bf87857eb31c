"""Any value that a key can be given starts a run, or is refused by one line that names the key: tried through the command
line, one key at a time and in pairs, at the ends of its bounds, beyond them, and in between."""

import math
import os
from itertools import count
from typing import List, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_pipelines.events import prepare_events
from fuxi_torchrec.cli import main
from fuxi_torchrec.config import config_keys
from tests.conftest import write_events

pytestmark = pytest.mark.thorough

KEYS = config_keys()
BASE = {
    "data": {},
    "model": {"embedding_dim": 8, "value_dim": 4, "qk_dim": 4},
    "loss": {"num_negatives": 4},
    "table": {},
    "optimizer": {},
    "evaluation": {"every_epochs": None},  # only at the end
    "trainer": {"max_epochs": 1, "max_steps": 1},
}
# What fits into memory, and how long a step takes, is the machine's to say: large values of these are tried elsewhere
# (test_memory_check.py).
SIZES = {
    **{f"model.{name}": 12 for name in ("embedding_dim", "value_dim", "qk_dim", "num_heads", "num_blocks", "ffn_multiply")},
    **{"model.padded_length": 5000, "data.max_sequence_length": 5000},
    **{"loss.num_negatives": 5000, "loss.uniform_negatives": 5000},
}
TEXTS = {
    "data.path": ["", "nowhere", "no\nwhere", "file://nowhere"],
    "trainer.metric": ["mrr", "hr@1", "ndcg@1000", "cross_entropy", "", "ndcg@11"],
    "trainer.checkpoint_folder": ["kept", "ü", "with space", "http://nowhere/kept", "/dev/null/kept", "a" * 300],
}
EACH = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def numbers(name: str, is_whole: bool):
    """Values around the ends of a key's bounds."""
    bounds = KEYS[name].metadata["bounds"]
    step = 1 if is_whole else 1e-9
    tried = {0, -1, 1, 2, 3, 7, 10**23, *([] if is_whole else [0.5, 5e-324, 1e-30, 1e-6, 1e6, 1e300, math.inf, math.nan])}
    for end in (bounds.at_least, bounds.above, bounds.at_most, bounds.below):
        if end is not None and end < SIZES.get(name, math.inf):
            tried |= {end, end + step, end - step}
    return st.sampled_from(sorted((int(x) if is_whole else float(x) for x in tried), key=str))


def values(name: str):
    """Values of a key's type, allowed and not."""
    kind = KEYS[name].type
    is_optional = type(None) in get_args(kind)
    kind = get_args(kind)[0] if is_optional else kind
    if name in TEXTS:
        tried = st.sampled_from(TEXTS[name])
    elif get_origin(kind) is Literal:
        tried = st.sampled_from(get_args(kind))
    elif kind is bool:
        tried = st.just(False) if name == "trainer.compile" else st.booleans()  # compiling has tests of its own
    elif name == "model.channels":
        tried = st.lists(st.sampled_from(get_args(get_args(kind)[0])), max_size=3)
    elif kind == List[int]:
        tried = st.lists(st.one_of(numbers(name, True), st.integers(10**9, 10**9 + 10**6)), max_size=3)
    elif get_origin(kind) is tuple:
        tried = st.lists(numbers(name, False), min_size=2, max_size=2)
    else:
        tried = numbers(name, kind is int)
    return st.one_of(st.none(), tried) if is_optional else tried


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Trains the base run with some keys changed, on 12 users; asserts that it starts or is refused as it should be."""
    folder, runs = tmp_path_factory.mktemp("values"), count()
    write_events(folder / "log.csv", 12)
    prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "data"))

    def start(capsys, changes):
        config = {section: dict(keys) for section, keys in BASE.items()}
        config["data"]["path"] = str(folder / "data")
        for name, value in changes.items():
            section, key = name.split(".")
            config[section][key] = value
        number = next(runs)
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump(config))
        before = os.getcwd()
        os.chdir(folder)  # relative folders are made here
        try:
            code = main(["train", str(path), "--output", str(folder / f"run{number}")])
        except SystemExit as refused:  # by the parser
            code = refused.code
        finally:
            os.chdir(before)
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        said = [line for line in lines if line.startswith("error: ")]
        assert code in (0, 2) and said == (lines[-1:] if code else []), (changes, code, lines)
        assert code == 0 or any(name in said[0] for name in changes), (changes, said)

    return start


@pytest.mark.parametrize("name", KEYS)
def test_every_value_of_a_key_starts_a_run_or_is_refused_by_name(started, capsys, name):
    @settings(EACH, max_examples=2)
    @given(values(name))
    def holds(value):
        started(capsys, {name: value})

    holds()


def test_pairs_of_keys_start_a_run_or_are_refused_by_name(started, capsys):
    @settings(EACH, max_examples=15)
    @given(st.data())
    def holds(data):
        names = data.draw(st.lists(st.sampled_from(list(KEYS)), min_size=2, max_size=2, unique=True))
        started(capsys, {name: data.draw(values(name)) for name in names})

    holds()
