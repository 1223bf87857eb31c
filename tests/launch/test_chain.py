"""Chains on this machine: what is done stays, what was cut off goes on, and mistakes are one line before anything starts."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuxi_torchrec.checkpoint import manager
from launch.chain import steps
from launch.chain.__main__ import main
from launch.chain.prepare import kept_data
from launch.chain.prepare import main as prepare
from tests.helpers.chains import CONFIG, PREPARE, lines, write_chain
from tests.helpers.command_line import fuxi
from tests.helpers.dryrun import ROOT

SYNTHETIC = PREPARE.split()


def start(folder, path, **environment):
    """`python -m launch.chain` in a group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "launch.chain", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def end_of(process, timeout=500):
    """Its exit code and what it said; one that hangs is ended."""
    try:
        return process.communicate(timeout=timeout), process.returncode
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()


@pytest.mark.thorough
def test_a_chain_that_was_stopped_in_the_middle_goes_on_and_does_nothing_twice(tmp_path):
    """Ctrl-C in training: it saves, the chain says so and ends as a shell expects. The same command goes on from the
    saved step, and a third one finds nothing to do."""
    path = write_chain(tmp_path, after="--trainer.checkpoint_every_epochs 100000 --trainer.max_epochs 100000")
    run = tmp_path / "runs/made"
    first = start(tmp_path, path)
    end = time.monotonic() + 300
    while len(lines(run)[0]) < 5:
        assert time.monotonic() < end and first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    (_, said), code = end_of(first)
    assert code == 128 + signal.SIGINT, said
    assert said.splitlines()[-1] == f"train: ended with exit code {code}; the same command goes on from here", said
    stopped = lines(run)[0][-1]["step"]
    made = (tmp_path / "data/made/dataset.json").stat().st_mtime_ns

    path = write_chain(tmp_path, after=f"--trainer.max_epochs 100000 --trainer.max_steps {stopped + 3}")
    (out, said), code = end_of(start(tmp_path, path))
    assert code == 0, said
    assert out.splitlines()[0].endswith("made before") and (tmp_path / "data/made/dataset.json").stat().st_mtime_ns == made
    assert [line["step"] for line in lines(run)[0]] == list(range(1, stopped + 4))
    assert [line["step"] for line in lines(run)[1]] == [stopped + 3]

    before = (run / "metrics.jsonl").read_bytes()
    (out, said), code = end_of(start(tmp_path, path))
    assert (code, said) == (0, "") and len(out.splitlines()) == 3 and (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_no_process(tmp_path):
    """Not even torchrun's workers, which are in groups of their own; here they do not hear the first one."""
    path = write_chain(tmp_path, after="--trainer.max_epochs 100000")
    chain = start(tmp_path, path, FUXI_TEST_OF_CHAIN=str(tmp_path))
    marked = f"FUXI_TEST_OF_CHAIN={tmp_path}".encode()
    alive = lambda: processes_with(marked)  # noqa: E731
    try:
        end = time.monotonic() + 300
        while len(lines(tmp_path / "runs/made")[0]) < 3:
            assert time.monotonic() < end and chain.poll() is None
            time.sleep(0.05)
        started = alive()
        assert len(started) >= 3  # the chain, torchrun and a worker
        for process in set(started) - {chain.pid}:
            os.kill(process, signal.SIGSTOP)
        chain.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert chain.poll() is None
        chain.send_signal(signal.SIGINT)
        assert end_of(chain, 60)[1] == 128 + signal.SIGINT
        assert alive() == []
    finally:
        for process in alive():
            os.kill(process, signal.SIGKILL)


def processes_with(mark):
    """Processes that have this entry in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.thorough
def test_the_chain_ends_with_the_code_of_the_step_that_fails(tmp_path):
    """A step's own: prepare's 2, and of training that of the worker for whose sake torchrun ended, which says 1."""
    (tmp_path / "log.csv").write_text("user,item,time\n1,2,not a number\n")
    events = "events --source log.csv --user-column user --item-column item --time-column time --output data/made"
    (_, said), code = end_of(start(tmp_path, write_chain(tmp_path, prepare=events)))
    assert code == 2 and said.splitlines()[-1].startswith("prepare: ended with exit code 2") and "log.csv" in said
    assert not (tmp_path / "runs").exists()
    assert prepare(["synthetic", *SYNTHETIC[1:-1], str(tmp_path / "data/made")]) == 0
    diverging = "--optimizer.learning_rate 1e30 --optimizer.clip_grad_norm 1e30"
    path = write_chain(tmp_path, before="--max_restarts 0", after=diverging)
    (_, said), code = end_of(start(tmp_path, path))
    assert code == 2 and said.splitlines()[-1].startswith("train: ended with exit code 2"), said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys, *words):
    """The one line by which the command line refuses."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("error: "), said
    return said.err


def finished(folder, words=""):
    """A run that has finished, as far as its folder tells, and the data set that its chain has made."""
    assert prepare(SYNTHETIC) == 0
    run = folder / "runs/made"
    run.mkdir(parents=True)
    from fuxi_torchrec.config.parsing import load_config, to_yaml
    from tests.helpers.chains import TINY

    config = load_config(CONFIG, [*TINY.split(), *words.split(), "--data.path", str(folder / "data/made")])
    (run / "config.yaml").write_text(to_yaml(config))
    shutil.copy(folder / "data/made/dataset.json", run)
    (run / "outcome.json").write_text('{"status": "finished", "reason": ""}')
    (run / "checkpoints" / "step-00000012").mkdir(parents=True)
    (run / "checkpoints" / "index.json").write_text('{"last": "step-00000012", "best": "step-00000008"}')
    return run


def shown(capsys, path):
    """What a dry run says of each step, {step: text}."""
    capsys.readouterr()
    assert main(["--dryrun", str(path)]) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.thorough
def test_what_is_done_is_kept_and_what_is_asked_for_besides_is_done(folder, capsys):
    run, path = finished(folder), write_chain(folder)
    said = shown(capsys, path)
    assert said["prepare"].endswith("made before") and said["train"].endswith("finished") and " evaluate " in said["evaluate"]
    for command, split, step, kept in (
        ("evaluate", "test", 12, True),
        ("evaluate", "test", 8, False),
        ("evaluate", "validation", 12, False),
        ("", "test", 12, False),
    ):
        line = {"split": split, "step": step, "checkpoint": "last", "command": command}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert ("was evaluated" in shown(capsys, path)["evaluate"]) == kept, line
    (run / "metrics.jsonl").write_text('{"split": "test", "step": 8, "checkpoint": "best", "command": "evaluate"}\n')
    assert "was evaluated at step 8" in shown(capsys, write_chain(folder, evaluate=""))["evaluate"]
    # Longer than before goes on; a training that goes on is evaluated again.
    said = shown(capsys, write_chain(folder, after="--trainer.max_epochs 3", evaluate=""))
    assert " train " in said["train"] and " evaluate " in said["evaluate"]
    # One that was cut off goes on as well.
    (run / "outcome.json").unlink()
    assert " train " in shown(capsys, path)["train"]
    assert sorted(os.listdir(folder)) == ["chain.yaml", "data", "runs"]


def test_the_name_of_the_list_of_checkpoints_is_that_of_the_checkpoints():
    assert steps.INDEX_FILE == manager.INDEX_FILE


@pytest.mark.thorough
def test_another_result_in_the_same_place_is_refused(folder, capsys):
    finished(folder)
    for after in ("--optimizer.learning_rate 0.5", "--trainer.seed 7"):
        assert "finished here with" in told(capsys, write_chain(folder, after=after))
    for words in (PREPARE.replace("60", "61", 1), f"{PREPARE} --epsilon 0.5", f"{PREPARE} --seed 3"):
        line = told(capsys, write_chain(folder, prepare=words))
        assert "made by other arguments" in line and "--overwrite" in line
    again = shown(capsys, write_chain(folder, prepare=f"{PREPARE} --seed 3 --overwrite"))
    assert "launch.chain.prepare" in again["prepare"] and " train " in again["train"]


def test_a_data_set_is_known_by_what_it_keeps_of_its_arguments(folder, capsys):
    (folder / "log.csv").write_text("user,item,time,rating\n1,2,3,4\n1,3,4,5\n2,2,5,1\n2,4,6,1\n")
    words = "events --source log.csv --user-column user --item-column item --time-column time --output made".split()
    assert kept_data(words) is None and prepare(words) == 0 and "made before" in kept_data(words)
    for more in (["--time-unit", "ms"], ["--extra-columns", "rating:float"], ["--name", "other"]):
        assert main(["--dryrun", f"--prepare={' '.join([*words, *more])}"]) == 2
    capsys.readouterr()
    os.utime(folder / "log.csv", (time.time() + 100, time.time() + 100))
    assert "made before" in kept_data(words) and "log.csv is newer than made" in capsys.readouterr().err


@pytest.mark.thorough
def test_two_chains_that_want_the_same_data_set_make_it_once(folder):
    """The second one waits for the first one's lock, and keeps what that one has made."""
    words = f"{PREPARE} --clusters 4".replace("--users 60", "--users 40000").split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.chain.prepare", *words]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [end_of(process) for process in both]
    assert [code for _, code in ended] == [0, 0]
    assert fuxi("prepare", *words[:-1], str(folder / words[-1])).returncode == 2  # as it is without the chain


MISTAKES = {
    "no file": (("none.yaml",), "none.yaml: cannot read this chain"),
    "no step": ((), "no steps"),
    "a step that is none": (({"exprt": "x"},), "unknown key exprt"),
    "words that are a list": (({"prepare": ["a"]},), "prepare: must be the words"),
    "an open quote": (({"prepare": "events 'a"},), "close the quote"),
    "no such pipeline": (({"prepare": "parquet"},), "name a pipeline first"),
    "an archive": (({"prepare": f"{PREPARE} --format ml-1m"},), "makes an archive"),
    "no such option of a component": (({"train": "--confg x"},), "train: "),
    "no such key": (({"after": "--model.width 3"},), "model.width"),
    "another data set": (({"after": "--data.path elsewhere"},), "is not what prepare makes"),
    "another run": (({"evaluate": "--run elsewhere"},), "is not what train makes"),
    "a data set that nobody makes": ((f"--train=--config {CONFIG} -- --data.path none",), "no data set here"),
    "a run that is not there": (("--evaluate=--run none",), "no run here"),
    "several nodes": (({}, "--nnodes", "2"), "train: --nnodes 2: this machine is one node"),
    "nodes that come and go": (({}, "--nnodes", "1:2"), "train: --nnodes 1:2: a chain's next step"),
    "an option that no step has": (({}, "--nodes", "2"), "--nodes: no option that steps share"),
    "a word that is no option": (({}, "nnodes"), "nnodes: an option of every step is --name value"),
    "an image": (({}, "--image", "i:1"), "prepare: --image"),
    "a scheduler": (("-s", "local_docker", {}), "a chain runs on one of local_cwd, slurm, kubernetes"),
    "no such Slurm": (("-s", "slurm", {}), "no Slurm here"),
    "options that this machine has not": (("-cfg", "log_dir=logs", {}), "-cfg log_dir=logs"),
    "an option of the scheduler": (("-s", "slurm", "-cfg", "priority=9", {}), "Unknown run option `priority`"),
    "no image": (("-s", "kubernetes", "-cfg", "queue=a,validate_spec=False", {}), "prepare: --image: name the image"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(folder, capsys, monkeypatch, mistake):
    monkeypatch.setenv("PATH", "/nowhere")
    words, says = MISTAKES[mistake]
    made = [write_chain(folder, **word) if isinstance(word, dict) else word for word in words]
    assert says in told(capsys, *made)
    assert set(os.listdir(folder)) <= {"chain.yaml"}
