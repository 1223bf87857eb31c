"""The lock of what is written: one owner at a time, taken over from an owner that is gone and from no other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from fuxi_torchrec.errors import FolderInUse
from fuxi_torchrec.run import lock as locks
from fuxi_torchrec.run.lock import Lock
from fuxi_torchrec.run.owner import this_process

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short times; a patience too short to see an owner miss its heartbeats."""
    for name, seconds in (("PERIOD", 0.2), ("POLL", 0.02), ("PATIENCE", 0.4), ("SETTLE", 0.1)):
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "lock")


def written_by(folder, number=1, **changed):
    """A lock's file as another process would have left it."""
    os.makedirs(folder, exist_ok=True)
    record = {"token": "another", **vars(replace(this_process(), **changed))}
    with open(os.path.join(folder, str(number)), "w") as file:
        file.write(f"{json.dumps(record)}\n{0:012d}\n")


def beat(folder, number=1):
    """Another process's next heartbeat."""
    with open(os.path.join(folder, str(number)), "r+") as file:
        text = file.read().splitlines()
        file.seek(0)
        file.write(f"{text[0]}\n{int(text[1]) + 1:012d}\n")


def looks_before_taking(folder, monkeypatch, meanwhile=lambda look: None):
    """How often a patient waiter looked in vain before it had the lock; `meanwhile` happens after each look."""
    looks = []
    monkeypatch.setattr(locks, "PATIENCE", 60.0)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: (looks.append(seconds), meanwhile(len(looks))))
    with Lock(folder, "run"):
        return len(looks)


def test_a_lock_is_given_back_and_leaves_nothing(folder):
    with Lock(folder, "run"):
        assert os.listdir(folder) == ["1"]
    assert not os.path.exists(folder)
    with pytest.raises(KeyError):
        with Lock(folder, "run"):
            raise KeyError
    assert not os.path.exists(folder)


def test_a_second_process_waits_for_the_end_of_the_first(folder, capsys, monkeypatch):
    monkeypatch.setattr(locks, "PERIOD", 10.0)
    monkeypatch.setattr(locks, "PATIENCE", 20.0)
    first, order = Lock(folder, "runs/a"), []
    first.acquire()

    def follow():
        with Lock(folder, "runs/a"):
            order.append("second")

    second = threading.Thread(target=follow)
    second.start()
    time.sleep(0.1)
    order.append("first")
    first.release()
    second.join()
    assert order == ["first", "second"]
    says = f"runs/a: in use by process {os.getpid()} on {first.owner.host}; waiting for it to end\n"
    assert capsys.readouterr().err == says


def test_a_second_process_ends_with_a_line_and_a_code_of_its_own_when_its_patience_does(folder):
    with Lock(folder, "runs/a"), pytest.raises(FolderInUse, match="runs/a: still in use by process .*; stop") as error:
        Lock(folder, "runs/a").acquire()
    assert error.value.code == 75


def test_a_killed_process_of_this_machine_is_followed_at_once(folder, monkeypatch):
    code = f"from fuxi_torchrec.run.lock import Lock; Lock({folder!r}, 'run').acquire(); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has asked after
    assert looks_before_taking(folder, monkeypatch) == 0
    process.wait()


def test_a_process_number_used_again_is_not_the_owner(folder, monkeypatch):
    written_by(folder, started="1")
    assert looks_before_taking(folder, monkeypatch) == 0


ELSEWHERE = {"host": "another", "boot": "another boot"}


@pytest.mark.parametrize(
    "owner, environment, at_once",
    [
        ({"launches": ["torchrun a"]}, {"TORCHELASTIC_RUN_ID": "a"}, True),
        ({"launches": ["torchrun none"]}, {"TORCHELASTIC_RUN_ID": "none"}, False),
        ({"launches": ["torchrun a"]}, {"TORCHELASTIC_RUN_ID": "b"}, False),
        ({"launches": ["kubernetes://fuxi/run-x"]}, {"TORCHX_JOB_ID": "kubernetes://fuxi/run-x"}, True),  # Volcano's
        ({"slurm_job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"slurm_job": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two steps of one allocation
        ({}, {}, False),
    ],
)
def test_only_the_same_launch_follows_at_once_on_another_machine(folder, monkeypatch, owner, environment, at_once):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHX_JOB_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    written_by(folder, **ELSEWHERE, **owner)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    looks = looks_before_taking(folder, monkeypatch)
    assert looks == 0 if at_once else looks == round(locks.MISSED * locks.PERIOD / locks.POLL)


def test_two_starts_of_one_launch_name_on_one_machine_do_not_follow_each_other(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "chosen-by-hand")
    with Lock(folder, "run"), pytest.raises(FolderInUse):
        Lock(folder, "run").acquire()


def test_a_heartbeat_that_changes_keeps_the_lock_whatever_its_files_time(folder, monkeypatch):
    written_by(folder, **ELSEWHERE)

    def meanwhile(look):
        if look <= 200 and look % 20 == 0:  # a heartbeat every two periods
            beat(folder)
        os.utime(os.path.join(folder, "1"), (0, 0))

    assert looks_before_taking(folder, monkeypatch, meanwhile) == 200 + round(locks.MISSED * locks.PERIOD / locks.POLL)


def test_no_wall_clock_is_asked(folder, monkeypatch):
    """Clocks of two hosts differ: a lock that is free, held or abandoned is told without one."""

    def asked():
        raise AssertionError("a wall clock was asked")

    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, asked)
    with Lock(folder, "run") as first, pytest.raises(FolderInUse):
        first.confirm()
        Lock(folder, "run").acquire()
    written_by(folder, **ELSEWHERE)
    assert looks_before_taking(folder, monkeypatch) == round(locks.MISSED * locks.PERIOD / locks.POLL)


def test_of_many_that_wait_for_an_abandoned_lock_one_gets_it(folder):
    written_by(folder, started="1")
    got, refused = [], []

    def wait():
        lock = Lock(folder, "run")
        try:
            lock.acquire()
            got.append(lock)
        except FolderInUse:
            refused.append(lock)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got[0].release()
    assert len(got) == 1 and len(refused) == 7


def test_an_owner_that_was_replaced_is_told_and_leaves_the_others_lock_alone(folder):
    said = []
    first = Lock(folder, "runs/a", said.append)
    first.acquire()
    written_by(folder, number=2, host="other")
    first.confirm()  # its heartbeats were in time
    first._seen -= 100  # it stood still
    first.confirm()
    first.release()
    assert said[0].startswith("runs/a: taken over by process ") and "on other" in said[0]
    assert os.path.exists(os.path.join(folder, "2"))


def test_a_replaced_process_ends_with_one_line_whatever_it_is_doing(folder):
    code = f"""
import time
from fuxi_torchrec.run import lock
lock.PERIOD = 0.05
lock.Lock({folder!r}, 'runs/a').acquire()
open({folder!r} + '/2', 'w').write('another')
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=50)
    assert done.returncode == 75
    assert done.stderr == "error: runs/a: taken over by another process; nothing more is written here\n"


def test_a_file_system_that_fails_for_a_while_costs_nothing(folder, monkeypatch):
    said = []
    lock = Lock(folder, "run", said.append)
    lock.acquire()
    write = lock._write
    monkeypatch.setattr(lock, "_write", lambda *arguments: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    time.sleep(0.3)
    monkeypatch.setattr(lock, "_write", write)
    beats = lock.beats
    while lock.beats < beats + 2:
        time.sleep(0.02)
    lock.release()
    assert not said and not os.path.exists(folder)


def test_a_bucket_has_one_owner_as_well(bucket):
    locks_ = [Lock("bucket://a/lock", "bucket://a") for _ in range(3)]
    held, refused = [], []

    def wait(lock):
        try:
            lock.acquire()
            held.append(lock)
        except FolderInUse:
            refused.append(lock)

    threads = [threading.Thread(target=wait, args=(lock,)) for lock in locks_]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 2
    held[0].release()
    with Lock("bucket://a/lock", "bucket://a"):
        pass
    assert not list((bucket / "a" / "lock").iterdir())
