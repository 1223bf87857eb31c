"""Where `prepare` writes: impossible places refused before any work, nobody else's files touched, nothing left behind."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from data_pipelines import output as output_module
from data_pipelines.cli import main
from data_pipelines.events import prepare_events
from data_pipelines.interrupts import ended_by_signals
from data_pipelines.movielens import prepare_movielens
from data_pipelines.output import OutputFolder
from data_pipelines.synthetic import prepare_synthetic
from fuxi_torchrec.errors import FolderInUse, UserError
from fuxi_torchrec.run import lock as locks
from tests.helpers.pipeline_cases import tree

SIZES = dict(users=20, items=40, events_per_user=5)


@pytest.mark.parametrize(
    "place, words",
    [
        (".", "name the folder to make, as in ./my-data"),
        ("..", "name the folder to make"),
        ("made/..", "name the folder to make"),
        ("", "name the folder to make"),
        ("/", "name the folder to make"),
        ("file", "exists and is not a data set"),
        ("foreign", "exists and is not a data set"),
        ("file/out", "cannot write there"),
        ("/proc", "a mount point.*--output /proc/data"),
        ("n" * 250, "cannot write there"),
        ("made", "a data set is there already; pass --overwrite"),
    ],
)
def test_an_impossible_output_is_refused_before_the_source_is_looked_at(tmp_path, monkeypatch, place, words):
    monkeypatch.chdir(tmp_path)
    prepare_synthetic("made", **SIZES)
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    for prepare in (
        lambda: prepare_movielens("no-such.zip", place),
        lambda: prepare_events(["no-such.csv"], "user", "item", "time", place),
    ):
        with pytest.raises(UserError, match=words) as caught:
            prepare()
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("target", ["a data set", "an empty folder", "nothing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_symbolic_link_is_refused_and_what_it_points_to_stays(tmp_path, target, overwrite):
    if target == "a data set":
        prepare_synthetic(str(tmp_path / "real"), **SIZES)
    elif target == "an empty folder":
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.listdir(tmp_path), tree(tmp_path / "real")
    for name in ("link", "link/"):
        with pytest.raises(UserError, match=f"symbolic link.*--output {tmp_path / 'real'}"):
            prepare_synthetic(f"{tmp_path}/{name}", **SIZES, overwrite=overwrite)
    assert (os.listdir(tmp_path), tree(tmp_path / "real")) == before
    assert (tmp_path / "link").is_symlink()


def test_a_temporary_folder_has_a_random_name_and_nobody_elses_is_touched(tmp_path):
    with pytest.raises(ZeroDivisionError), OutputFolder(str(tmp_path / "out")) as one:
        (tmp_path / f"out.tmp-{os.getpid()}").symlink_to("/etc")  # somebody who guesses names
        with OutputFolder(str(tmp_path / "other")) as two, two.open("file") as file:
            file.write(b"x")
        assert one.work != two.work
        assert stat.S_IMODE(os.stat(one.work).st_mode) == 0o700
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == [f"out.tmp-{os.getpid()}"]


def test_a_data_set_can_be_read_by_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        prepare_synthetic(str(tmp_path / "out"), **SIZES)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == 0o750
    assert stat.S_IMODE(os.stat(tmp_path / "out" / "items.parquet").st_mode) == 0o640


def signals_at_every_line(tmp_path, overwrite):
    """For every line that output.py executes in one `prepare`: the exit code when SIGTERM comes just before it."""
    number = 0
    while True:
        lines = 0

        def trace(frame, event, argument, number=number):
            nonlocal lines
            if frame.f_code.co_filename != output_module.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == number + 1:
                    signal.raise_signal(signal.SIGTERM)
            return trace

        with ended_by_signals() as stop:
            sys.settrace(trace)
            try:
                prepare_synthetic(str(tmp_path / "deep" / "out"), **SIZES, overwrite=overwrite)
            finally:
                sys.settrace(None)
        if lines <= number:
            return
        yield stop.code
        number += 1


@pytest.mark.thorough
def test_a_signal_at_any_line_leaves_nothing_or_a_complete_data_set(tmp_path, capsys):
    """Fresh, and over an older data set, which stays until the new one takes its place."""
    older = {}
    for overwrite in (False, True):
        codes = []
        for code in signals_at_every_line(tmp_path, overwrite):
            found = tree(tmp_path)
            complete = "deep/out/dataset.json" in found
            assert code == 128 + signal.SIGTERM
            assert found == {} or complete
            assert {name.split("/")[1] for name in found if "/" in name} <= {"out"}
            assert complete or not overwrite
            if complete and not overwrite:
                older = found
                subprocess.run(["rm", "-r", str(tmp_path / "deep")], check=True)
            codes.append(code)
        assert len(codes) > 50
    assert tree(tmp_path) == older
    assert capsys.readouterr().err.count("stopped by SIGTERM; nothing half-written is left\n") > 100


# What has been made in the temporary folder when the signal comes.
MOMENTS = {"reading": "raw", "sorting": "duckdb", "writing": "data/train/part-00000.parquet"}


@pytest.mark.thorough
@pytest.mark.parametrize("name, moment", [("SIGTERM", "reading"), ("SIGINT", "sorting"), ("SIGHUP", "writing")])
def test_a_stopped_prepare_ends_by_one_line_and_leaves_nothing(tmp_path, name, moment):
    log = tmp_path / "log.csv"
    with open(log, "w") as file:
        file.write("user,item,time\n")
        file.writelines(f"{k % 3001},{k % 997},{k}\n" for k in range(600_000))
    columns = ["--user-column", "user", "--item-column", "item", "--time-column", "time"]
    command = [sys.executable, "-m", "fuxi_torchrec", "prepare", "events", "--source", log, *columns]
    process = subprocess.Popen(
        [*map(str, command), "--output", tmp_path / "deep" / "out"], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not list(tmp_path.glob(f"deep/.out.tmp-*/{MOMENTS[moment]}")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(getattr(signal, name))
    printed, errors = process.communicate(timeout=60)
    assert (printed, errors.decode()) == (b"", f"stopped by {name}; nothing half-written is left\n")
    assert process.returncode == 128 + getattr(signal, name)
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_by_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.code == 0
        assert main(["synthetic", "--users", "9", "--items", "40", "--events-per-user", "3", "--output", f"{tmp_path}/o"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_prepare_waits_and_leaves_the_first_ones_work_alone(tmp_path, monkeypatch, capsys):
    output = str(tmp_path / "out")
    for name, seconds in (("PATIENCE", 0.2), ("POLL", 0.05)):
        monkeypatch.setattr(locks, name, seconds)
    with OutputFolder(output) as first:
        with first.open("file") as file:
            file.write(b"x")
        with pytest.raises(FolderInUse, match=f"{output}: still in use by process {os.getpid()}"):
            prepare_synthetic(output, **SIZES)
        assert os.listdir(first.folder) == ["file"]
    assert f"{output}: in use by process {os.getpid()}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_whoever_waited_for_a_data_set_does_not_replace_it_unasked(tmp_path, monkeypatch):
    """The first one is done in the moment in which the second gets the lock."""
    acquire = locks.Lock.acquire

    def acquire_after_another(lock):
        monkeypatch.setattr(locks.Lock, "acquire", acquire)
        prepare_synthetic(str(tmp_path / "out"), **SIZES)
        acquire(lock)

    monkeypatch.setattr(locks.Lock, "acquire", acquire_after_another)
    with pytest.raises(UserError, match="a data set is there already"):
        prepare_synthetic(str(tmp_path / "out"), **SIZES, seed=1)
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import os, signal
from data_pipelines.output import OutputFolder
with OutputFolder({!r}) as folder, folder.open("train/part") as file:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.thorough
def test_what_a_killed_prepare_left_is_removed_by_the_next_and_nothing_else_is(tmp_path):
    kept = [".out.tmp-notes", ".out.tmp-abcdefg9.txt", "out.tmp-17", ".other.tmp-abcdefg9"]
    for name in kept:
        (tmp_path / name).mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED.format(str(tmp_path / "out"))])
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == len(kept) + 2  # its temporary folder and its lock
    prepare_synthetic(str(tmp_path / "out"), **SIZES)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "out"])


def test_a_data_set_that_a_killed_prepare_had_put_aside_comes_back(tmp_path):
    prepare_synthetic(str(tmp_path / "out"), **SIZES)
    before = tree(tmp_path)
    (tmp_path / ".out.tmp-abcdefg9").mkdir()
    os.rename(tmp_path / "out", tmp_path / ".out.tmp-abcdefg9" / "old")
    with pytest.raises(UserError, match="a data set is there already"):
        prepare_synthetic(str(tmp_path / "out"), **SIZES)
    assert tree(tmp_path) == before
