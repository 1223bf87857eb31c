"""`fuxi-torchrec prepare …`, as the library's command line hooks it up (data_pipelines.cli)."""

import subprocess
import sys

import pytest

from data_pipelines import cli
from fuxi_torchrec.data.format import read_identity
from tests.helpers.pipeline_cases import layout_files, users_of, write_zip

pytestmark = pytest.mark.thorough


def prepare(*words):
    assert cli.main([str(word) for word in words]) == 0


def test_prepare_movielens_prints_what_it_made(tmp_path, capsys):
    source = write_zip(tmp_path / "a.zip", layout_files("ml-1m"))
    prepare("movielens", "--source", source, "--output", tmp_path / "out", "--catalogue", "all")
    printed = capsys.readouterr().out
    for words in ("users      3", "items      5 (catalogue: all)", "events     7 (at most 3 a user)", "unsorted   1 ",
                  "duplicate  1 ", "single     1 users have a single event", "1970-01-01 to 1970-01-01"):  # fmt: skip
        assert words in printed


@pytest.mark.parametrize("dash", ["-", "_"])
def test_flags_are_taken_with_dashes_and_with_underscores(tmp_path, dash):
    (tmp_path / "log.csv").write_text("u,i,t,r\n1,2,3,4\n1,2,4,5\n")
    flags = {"user-column": "u", "item-column": "i", "time-column": "t", "time-unit": "ms", "memory-limit": "300MB",
             "extra-columns": "r", "output": tmp_path / "out"}  # fmt: skip
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('-', dash)}", value)]
    prepare("events", "--source", tmp_path / "log.csv", *words)
    assert read_identity(str(tmp_path / "out")).time_unit == 0.001
    assert users_of(tmp_path / "out")[0]["r"] == [4, 5]


def test_prepare_synthetic_makes_sequences_or_an_archive(tmp_path, capsys):
    sizes = ["--users", 20, "--items", 100, "--events-per-user", 5, "--clusters", 4, "--seed", 7]
    prepare("synthetic", *sizes, "--decay", 0.5, "--unique-items", "--max-sequence-length", 50,
                    "--output", tmp_path / "out")  # fmt: skip
    generator = read_identity(str(tmp_path / "out")).generator
    assert (generator["decay"], generator["unique_items"], generator["seed"]) == (0.5, True, 7)
    prepare("synthetic", *sizes, "--format", "ml-1m", "--output", tmp_path / "a.zip")
    assert f"prepare movielens --source {tmp_path / 'a.zip'}" in capsys.readouterr().out
    prepare("movielens", "--source", tmp_path / "a.zip", "--output", tmp_path / "ml")
    assert read_identity(str(tmp_path / "ml")).num_users == 20


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("movielens", "the following arguments are required: --source, --output"),
        ("events --source a --output b --user_column u", "required: --item-column, --time-column"),
        ("movielens --source a --out b", "required: --output"),
        ("movielens --source a --output b --catalogue most", "--catalogue: invalid choice: 'most'"),
        ("events --item_type number", "--item-type: invalid choice: 'number'"),
        ("synthetic --events-per-user many", "--events-per-user: invalid int value: 'many'"),
        ("synthetic --gap_median=long", "--gap-median: invalid float value: 'long'"),
        ("movielens --source", "--source: expected one argument"),
        ("movielens --source a --output b --frobnicate", "unrecognized arguments: --frobnicate"),
        ("films", "invalid choice: 'films'"),
    ],
)
def test_errors_name_an_option_as_it_is_typed(capsys, words, complaint):
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert complaint in printed


def test_help_needs_neither_torch_nor_pyarrow_nor_duckdb():
    code = (
        "import sys\nfrom data_pipelines import cli\ntry:\n    cli.main(['events', '--help'])\n"
        "finally:\n    print(sorted({'torch', 'pyarrow', 'duckdb', 'numpy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--user-column" in result.stdout
    assert result.stdout.strip().endswith("[]")


def test_the_options_that_hold_paths_are_known_by_their_names():
    """A job that runs elsewhere is given them in full."""
    assert cli.path_options() == {"--source", "--output", "--item-titles"}
