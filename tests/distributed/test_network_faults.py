"""What a network, a host and a disk do to a run of several processes: it goes on, or ends by a line that names the rank.

The processes are real ones. A cut network is one of namespaces (tests/helpers/network.py), so the kernel's own silence.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.launches import Launch, Ranks
from tests.helpers.network import Network, lacks
from tests.helpers.training_runs import losses

pytestmark = pytest.mark.thorough

TIMEOUT = ("--trainer.timeout_minutes", "0.1")
SILENT = "died, hangs or cannot be reached, seen by"
# Ranks of the command line that exchange a number fifty times a second instead of training, which needs no seconds to start.
PULSE = """
import os, sys, time
import fuxi_torchrec.cli.main
from fuxi_torchrec.distributed.failures import fail_together
from fuxi_torchrec.distributed.world import start_world
def pulse(words):
    open(f"FOLDER/ready-{os.environ['RANK']}", "w").close()
    while not all(os.path.exists(f"FOLDER/ready-{rank}") for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)  # importing torch takes longer than these ranks wait for each other
    with start_world("cpu", 0.05) as world, fail_together(world):
        while True:
            world.sum_on_host([1])
            time.sleep(0.02)
            if world.is_main:
                with open("FOLDER/pulse", "ab") as file:
                    file.write(b".")
cli = sys.modules["fuxi_torchrec.cli.main"]
cli.train_command = pulse
sys.exit(cli.main(["train"]))
"""


@pytest.fixture
def network():
    missing = lacks()
    if missing:
        pytest.skip(f"this test needs {missing}")
    with Network() as network:
        yield network


@pytest.fixture
def pulse(tmp_path):
    """Starts ranks that exchange numbers; ends them after the test."""
    started = []

    def start(**place):
        ranks = Ranks(tmp_path, "", "", program=PULSE.replace("FOLDER", str(tmp_path)), **place)
        started.append(ranks)
        return ranks

    yield start
    for ranks in started:
        for process in ranks.processes:
            process.kill()


def go_on(ranks, count, more):
    """Waits until count() has grown by `more`."""
    wanted, end = count() + more, time.monotonic() + 240  # a loaded machine takes minutes to start
    while count() < wanted:
        codes = [process.poll() for process in ranks.processes]
        said = [path.read_text() for path in ranks.errors]
        assert time.monotonic() < end and codes == [None] * len(codes), (codes, said)
        time.sleep(0.02)


def exchanges(tmp_path):
    file = tmp_path / "pulse"
    return lambda: file.stat().st_size if file.exists() else 0


def test_a_short_cut_costs_nothing_and_a_long_one_is_named_on_both_sides(tmp_path, network, pulse):
    """The rank that is cut off ends as well: it has no answer of the store, which is on rank 0's host, nor a refusal."""
    ranks, count = pulse(hosts=network.hosts), exchanges(tmp_path)
    go_on(ranks, count, 3)
    network.cut(network.hosts[1])
    time.sleep(0.5)
    network.mend(network.hosts[1])
    go_on(ranks, count, 30)
    network.cut(network.hosts[1])
    codes, ((first,), (second,)) = ranks.wait(), ranks.complaints()
    assert codes == [1, 1]
    assert f"rank 1 on {network.hosts[1].name} {SILENT} rank 0 (" in first and "; look at its log, its host and" in first
    assert f"rank 0 at {network.hosts[0].address} {SILENT} rank 1 (" in second
    assert not any("Traceback" in errors.read_text() for errors in ranks.errors)


def test_a_rank_that_stands_still_is_waited_for_or_named_even_if_it_is_rank_0(tmp_path, pulse):
    ranks, count = pulse(), exchanges(tmp_path)
    go_on(ranks, count, 3)
    for slow in ranks.processes:
        slow.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        slow.send_signal(signal.SIGCONT)
        go_on(ranks, count, 5)
    ranks.processes[0].send_signal(signal.SIGSTOP)
    assert ranks.processes[1].wait(60) == 1
    ranks.processes[0].send_signal(signal.SIGCONT)
    codes, ((first,), (second,)) = ranks.wait(), ranks.complaints()
    assert codes == [1, 1]
    assert f"rank 0 at 127.0.0.1 {SILENT} rank 1 (" in second and f"rank 1 on {os.uname().nodename} {SILENT} rank 0" in first
    assert not any("Traceback" in errors.read_text() for errors in ranks.errors)


FULL_ON_RANK_1 = """
import builtins
from fuxi_torchrec.checkpoint import storage
from fuxi_torchrec.paths import path_manager
class Full:
    def __getattr__(self, name):
        return getattr(path_manager(), name)
    def open(self, path, mode):
        if os.environ["RANK"] == "1" and path.endswith(".distcp"):
            path = "/dev/full"
        return builtins.open(path, mode) if path == "/dev/full" else path_manager().open(path, mode)
storage.path_manager = Full
"""
SHARDED = ("--table.sharding", "row_wise")


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_a_disk_that_is_full_for_one_rank_is_told_once_with_the_rank(small_dataset, tmp_path, in_background):
    run = tmp_path / "run"
    options = (*SHARDED, "--trainer.async_checkpoint", in_background)
    ranks = Ranks(tmp_path, small_dataset, run, *options, before=FULL_ON_RANK_1)
    assert ranks.wait(240) == [2, 2]  # a loaded machine takes minutes to start
    (line,), others = ranks.complaints()
    assert "checkpoint not saved (rank 1: No space left on device" in line and not others
    assert not any("Traceback" in errors.read_text() for errors in ranks.errors)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.mark.slow
@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_a_clock_that_is_an_hour_off_on_one_host_changes_nothing(small_dataset, tmp_path, offset):
    if not FAKETIME.exists():
        pytest.skip(f"no {FAKETIME} here (Debian's package libfaketime)")
    short = ("--trainer.max_steps", "6", *TIMEOUT)
    for name, wrong in (("right", {}), ("wrong", {"LD_PRELOAD": FAKETIME, "FAKETIME": offset})):
        (tmp_path / name).mkdir()
        ranks = Ranks(tmp_path / name, small_dataset, tmp_path / name / "run", *short, environments=[{}, wrong])
        assert ranks.wait(120) == [0, 0], [errors.read_text() for errors in ranks.errors]
    assert losses(tmp_path / "wrong" / "run") == losses(tmp_path / "right" / "run") != []


def agents(network, folder, data, run, *options, restarts=2, **more):
    """torchrun on every host of the network, a process each."""
    found = []
    for number, host in enumerate(network.hosts):
        meeting = f"join_timeout=120,read_timeout=60,is_host={int(number == 0)}"
        words = ("--nnodes", len(network.hosts), "--local-addr", host.address, "--rdzv-backend", "c10d", "--rdzv-id", "job")
        words += ("--rdzv-endpoint", f"{network.hosts[0].address}:29500", "--rdzv-conf", meeting)
        launch = Launch(folder, data, run, *options, processes=1, restarts=restarts, torchrun=words, host=host, **more)
        found.append(launch)
    return found


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_once_a_cut_network_is_mended(small_dataset, tmp_path, network):
    plain = Launch(tmp_path, small_dataset, tmp_path / "plain")
    assert plain.wait() == 0, plain.errors.read_text()
    run = tmp_path / "run"
    both = agents(network, tmp_path, small_dataset, run, *TIMEOUT, slow=0.1)
    assert both[0].until(lambda: len(losses(run)) >= 5)
    network.cut(network.hosts[1])
    assert both[0].until(both[0].complaints, 60) and both[1].until(both[1].complaints, 60)
    network.mend(network.hosts[1])
    assert [agent.wait(300) for agent in both] == [0, 0], [agent.errors.read_text() for agent in both]
    assert losses(run) == losses(tmp_path / "plain")
    assert f"rank 1 on {network.hosts[1].name} {SILENT}" in both[0].complaints()[0]


@pytest.mark.slow
def test_a_minute_without_an_answer_is_waited_for_if_the_timeout_is_longer(small_dataset, tmp_path):
    run = tmp_path / "run"
    ranks = Ranks(tmp_path, small_dataset, run, "--trainer.timeout_minutes", "2", slow=0.05)
    go_on(ranks, lambda: len(losses(run)), 3)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(60)
    ranks.processes[1].send_signal(signal.SIGCONT)
    assert ranks.wait(120) == [0, 0] and ranks.complaints() == [[], []]
    assert [step for step, _ in losses(run)] == list(range(1, len(losses(run)) + 1))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_shared_disk_that_fills_up_ends_the_run_by_a_line_and_with_room_it_goes_on(small_dataset, tmp_path, small_disk):
    run, options = small_disk / "run", (*SHARDED, "--trainer.max_epochs", "2")
    first = Launch(tmp_path, small_dataset, run, *options, slow=0.1)
    assert first.until(lambda: len(losses(run)) >= 5)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    assert first.wait() == 1  # torchrun's own code
    assert len(first.complaints()) == 1 and "No space left on device" in first.complaints()[0]
    filler.unlink()
    again = Launch(tmp_path, small_dataset, run, *options, "--resume")
    assert again.wait() == 0, again.errors.read_text()
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, len(steps) + 1))
