"""The help of a config's keys: one place, beside the key, in words that need no knowledge of Python."""

import re

import pytest

from fuxi_torchrec.cli.main import main
from fuxi_torchrec.config import METRIC_CUTOFFS, config_keys


@pytest.fixture(scope="module")
def shown():
    """`train --help`, each option's lines as one, by its name."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["train", "--help"])
    options = re.split(r"\n  (?=-)|\n\n", out.getvalue())
    return {text.split()[0]: " ".join(text.split()) for text in options if text.startswith("--")}


def test_every_key_has_one_option_with_its_meaning(shown):
    keys = {f"--{name}" for name in config_keys()}
    assert keys == {name for name in shown if "." in name}
    for name in keys:
        assert len(re.sub(r"\(default.*", "", shown[name]).split()) > 4, shown[name]


def test_no_option_is_shown_that_appends_to_a_list_or_reads_a_section(shown):
    assert shown["--data.temporal_cutoffs"].startswith("--data.temporal_cutoffs [N,...] The times")
    assert not [name for name in shown if name.endswith("+")]
    assert not {"--data", "--model", "--trainer"} & set(shown)


def test_defaults_and_bounds_are_shown_and_types_of_python_are_not(shown):
    assert shown["--model.dropout"].endswith("(default: 0.2; at least 0, less than 1)")
    assert shown["--loss.log_q"].endswith("(default: false)")
    assert shown["--evaluation.split"].startswith("--evaluation.split {validation,test,null}")
    assert not [text for text in shown.values() if re.search(r"type:|Optional|Literal|List\[|9007199254740992", text)]


def test_the_metrics_that_can_be_watched_are_named(shown):
    assert all(re.search(rf"\b{k}\b", shown["--trainer.metric"]) for k in METRIC_CUTOFFS)
    assert all(name in shown["--trainer.metric"] for name in ("ndcg@K", "hr@K", "mrr", "cross_entropy"))
