"""Standard streams that are closed, that lack letters, or whose reader went away: real processes, and no traceback."""

import os
import subprocess
import sys

import pytest

from fuxi_torchrec.cli.streams import READER_GONE, run_on_streams
from tests.helpers.command_line import ROOT

pytestmark = pytest.mark.thorough

IMPORT = "from fuxi_torchrec.cli.streams import run_on_streams\n"


def started(*words, redirect="", **environment):
    """Runs the command line, or with -c some code, under a shell's redirection."""
    words = ("-m", "fuxi_torchrec", *words) if words[0] != "-c" else words
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, *words],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_is_shown_whatever_letters_the_terminal_has(encoding):
    done = started("--help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage: fuxi-torchrec COMMAND ?" in done.stdout and b"FuXi-? generative" in done.stdout


@pytest.mark.parametrize("words", [("--help",), ("no-command",)])
def test_a_reader_who_leaves_ends_a_command_without_a_word(words):
    here, there = os.pipe()
    os.close(here)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-m", "fuxi_torchrec", *words]
    try:
        stderr = there if words == ("no-command",) else subprocess.PIPE
        done = subprocess.run(command, stdout=there, stderr=stderr, timeout=60, env=environment)
    finally:
        os.close(there)
    assert done.returncode == READER_GONE and not done.stderr


@pytest.mark.parametrize("redirect, code", [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0)])
def test_closed_streams_swallow_what_is_written(redirect, code):
    done = started("train", "--help", redirect=redirect)
    assert (done.returncode, done.stderr) == (code, b"")
    assert (b"usage:" in done.stdout) == (">&-" not in redirect.replace("2>&-", ""))


def test_no_file_of_a_run_gets_a_closed_streams_number():
    """Or a library that prints would write into it."""
    code = IMPORT + "import os, sys\nsys.exit(run_on_streams(lambda: os.open(os.devnull, os.O_WRONLY)))"
    assert started("-c", code, redirect=">&- 2>&-").returncode > 2


def test_another_pipe_that_breaks_stays_an_error(capfd):
    def broken():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_on_streams(broken)
