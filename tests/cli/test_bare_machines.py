"""A container as it may be: a user that no one knows, no home, an ASCII locale, a narrow terminal. Real processes."""

import json
import os
import subprocess
import sys

import pytest
from rich.table import Table

from fuxi_torchrec.cli.main import main
from fuxi_torchrec.cli.streams import READER_GONE
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.reporting import print_table
from tests.helpers.command_line import ROOT, SMOKE, mistake

pytestmark = pytest.mark.thorough

SMALL = ("--data.max_sequence_length", "20", "--trainer.max_epochs", "1", "--trainer.device", "cpu")
NOBODY = """
import pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from fuxi_torchrec.cli.main import main
sys.exit(main())
"""


def on_a_bare_machine(folder, *words, **streams):
    """Runs the command line with next to no environment. EncodingWarning tells of a file opened in the locale's encoding."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", NOBODY, *map(str, words)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=200, env=environment, cwd=ROOT, **streams)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run, what its training said) of a data set whose titles are not ASCII."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "log.csv").write_text("user,item,time\n1,2,3\n1,3,4\n2,2,3\n2,3,9\n1,4,5\n")
    (folder / "titles.csv").write_text("item,title\n2,Amélie\n3,“Heat”\n4,東京\n", encoding="utf-8")
    columns = ("--user-column", "user", "--item-column", "item", "--time-column", "time")
    titles = ("--item-titles", str(folder / "titles.csv"))
    made = ("prepare", "events", "--source", str(folder / "log.csv"), *columns, *titles, "--output", str(folder / "data"))
    assert main(list(made)) == 0
    words = ("train", SMOKE, "--data.path", folder / "data", "--output", folder / "run", *SMALL)
    return folder / "run", on_a_bare_machine(folder, *words, stdout=subprocess.PIPE)


def test_training_needs_no_home_no_known_user_and_no_utf_8_locale(trained):
    run, done = trained
    said = done.stderr.decode()
    assert done.returncode == 0 and b"popularity" in done.stdout, said
    ours = [line for line in said.splitlines() if "EncodingWarning" in line and ROOT in line and "site-packages" not in line]
    assert not ours


def test_metrics_are_kept_before_they_are_shown(trained, tmp_path):
    """Nobody reads the table."""
    run, _ = trained
    here, there = os.pipe()
    os.close(here)
    done = on_a_bare_machine(tmp_path, "evaluate", run, "--output", tmp_path / "metrics.json", stdout=there)
    os.close(there)
    assert done.returncode == READER_GONE and b"Traceback" not in done.stderr, done.stderr.decode()
    kept = RunFolder.open(str(run)).metrics()[-1]
    assert kept["command"] == "evaluate" and kept["mrr"] == json.loads((tmp_path / "metrics.json").read_text())["mrr"]


@pytest.mark.parametrize("columns", [20, 30, 40])
def test_a_narrow_terminal_cuts_no_number_short(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = Table()
    for name in ("model", "ndcg@10", "ndcg@50", "cross_entropy", "title"):
        table.add_column(name)
    table.add_row("popularity", "0.1234", "0.5678", "12.3456", "a title of many words")
    print_table(table)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("popularity", "ndcg@50", "0.1234", "0.5678", "12.3456", "cross_entropy"))
    assert "…" not in shown and "a title of many words" not in shown  # words wrap


def test_bench_without_a_word_starts_nothing(capsys):
    assert "say what to time, as in 'fuxi-torchrec bench --encoders" in mistake(capsys, "bench")


def test_an_option_is_taken_with_underscores_too(capsys):
    assert main(["train", SMOKE, "--print_config"]) == main(["train", SMOKE, "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--print_config" not in capsys.readouterr().out
