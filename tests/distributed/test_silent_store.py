"""A rank that fails while rank 0, where the store is, does not answer at all: it ends in time, and says what it knows."""

import threading
import time

import pytest
import torch

from fuxi_torchrec.distributed import failures
from fuxi_torchrec.distributed.failures import fail_together
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import LostProcess, UserError


class Store:
    """A store that answers until it is silenced; then whoever asks waits, as for a host that is cut off."""

    def __init__(self, hosts=()):
        self.kept = {f"{failures.HOST}/{rank}": host.encode() for rank, host in hosts}
        self.silent = threading.Event()

    def __getattr__(self, name):
        if self.silent.is_set():
            time.sleep(60)
        return {"set_timeout": lambda seconds: None, "set": self.kept.__setitem__, "get": self.kept.get}[name]

    def check(self, keys):
        return self.__getattr__("set") and all(key in self.kept for key in keys)


@pytest.fixture(autouse=True)
def place(monkeypatch):
    monkeypatch.setattr(failures, "SILENCE", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("LOCAL_RANK", "0")


def failed(monkeypatch, store, world, error, silent=True):
    """What comes of an error in a rank."""
    monkeypatch.setattr(failures, "own_store", lambda: store)
    started = time.monotonic()
    with pytest.raises(Exception) as raised, fail_together(world):
        if silent:
            store.silent.set()
        raise error
    assert time.monotonic() - started < 50  # the silence lasts for 60
    return raised.value


def rank(number, size=8):
    return World(number, size, torch.device("cpu"))


LOST = "Timed out waiting 3000ms for recv operation to complete"


def test_a_rank_that_is_cut_off_names_rank_0_and_what_to_look_at(monkeypatch):
    error = failed(monkeypatch, Store(), rank(4), RuntimeError(LOST))
    assert isinstance(error, LostProcess) and not error.reported
    assert str(error) == (
        f"rank 0 at node-0 died, hangs or cannot be reached, seen by rank 4 ({LOST}); look at its log, its host and the "
        "network between"
    )


@pytest.mark.parametrize("number, local, tells", [(4, 0, True), (5, 1, False), (1, 1, True), (2, 2, False)])
def test_one_rank_of_each_host_tells_it(monkeypatch, number, local, tells):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert failed(monkeypatch, Store(), rank(number), RuntimeError(LOST)).reported is not tells


@pytest.mark.parametrize("error", [UserError("a mistake"), KeyError("a defect")])
def test_an_error_of_its_own_stays_what_it_is(monkeypatch, error):
    assert failed(monkeypatch, Store(), rank(1), error) is error and not getattr(error, "reported", False)


def test_a_store_that_answers_tells_which_hosts_are_lost_and_names_the_first_few(monkeypatch):
    monkeypatch.setattr(failures, "SILENCE", 30.0)
    monkeypatch.setattr(failures, "SHOWN", 2)
    store = Store([(1, "node-0"), (2, "node-1"), (3, "node-1")])
    error = failed(monkeypatch, store, rank(0, 5), RuntimeError(LOST), silent=False)
    assert str(error).startswith("rank 1 on node-0, 2 on node-1, … (4 in all) died, hangs or cannot be reached, seen by rank 0")
