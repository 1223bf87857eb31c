"""The two options for looking into a failure: which files they leave, and that the error names them."""

import os
import pickle

import pytest
import torch

from fuxi_torchrec.config import Config
from fuxi_torchrec.config.unused import Resolved, unused_keys
from fuxi_torchrec.distributed import private_api
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import LostProcess, UserError
from fuxi_torchrec.profiling.flight_recorder import FlightRecorder
from fuxi_torchrec.profiling.memory import out_of_memory_as_user_error
from fuxi_torchrec.profiling.memory_snapshot import MemorySnapshot

TWO, GPU = World(1, 2, torch.device("cpu")), World(1, 2, torch.device("cuda", 0))
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")


@pytest.fixture
def variables(monkeypatch):
    """What the recorder sets is taken back after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def lose_a_process(recorder, begun=True):
    with pytest.raises(LostProcess) as raised, recorder.written_when_lost(TWO):
        if begun:
            recorder.begin(TWO)
        error = LostProcess("rank 0 is gone")
        error.reported = True
        raise error
    assert raised.value.reported
    return str(raised.value)


def test_nccls_recorder_is_told_where_the_run_is_and_what_the_user_has_set_stays(variables, tmp_path):
    FlightRecorder(False, str(tmp_path))
    assert not any(name in os.environ for name in VARIABLES)
    variables.setenv("TORCH_FR_BUFFER_SIZE", "7")
    FlightRecorder(True, str(tmp_path))
    assert [os.environ[name] for name in VARIABLES] == ["7", "1", f"{tmp_path}/flight_recorder/nccl_rank_"]


def test_a_lost_process_leaves_its_last_collectives_and_the_error_names_the_file(variables, tmp_path):
    says = lose_a_process(FlightRecorder(True, str(tmp_path)))
    file = tmp_path / "flight_recorder" / "gloo_rank_1"
    assert says == f"rank 0 is gone; its last collectives: {file}"
    assert "version" in pickle.loads(file.read_bytes())


def test_a_recorder_that_is_off_or_whose_run_has_not_begun_writes_nothing(variables, tmp_path):
    assert lose_a_process(FlightRecorder(False, str(tmp_path))) == "rank 0 is gone"
    assert lose_a_process(FlightRecorder(True, str(tmp_path)), begun=False) == "rank 0 is gone"
    assert not list(tmp_path.iterdir())


def test_a_recorder_that_finds_no_room_says_so_beside_the_error(variables, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fuxi_torchrec.profiling.flight_recorder.flight_recorder_trace", full)
    says = lose_a_process(FlightRecorder(True, str(tmp_path)))
    assert says == f"rank 0 is gone; {tmp_path}/flight_recorder/gloo_rank_1: not written (No space left on device)"


@pytest.fixture
def allocator(monkeypatch):
    """What a GPU's allocator was told, since there is none here: the number of entries, the observer."""
    told = []
    for name in ("record_memory_history", "on_out_of_memory"):
        monkeypatch.setattr(private_api, name, told.append)
    monkeypatch.setattr(private_api, "dump_memory_snapshot", lambda path: open(path, "wb").write(b"held"))
    return told


def run_out(snapshot, told):
    with pytest.raises(UserError) as raised, out_of_memory_as_user_error("training", "lower it", lambda: snapshot.path):
        for observer in told[1:]:
            observer(0, 2**40, 2**30, 2**20)
        raise torch.OutOfMemoryError("CUDA out of memory")
    return str(raised.value)


def test_a_gpu_without_memory_leaves_a_snapshot_and_the_error_names_it(allocator, tmp_path):
    snapshot = MemorySnapshot(True, str(tmp_path))
    snapshot.begin(GPU)
    file = tmp_path / "memory" / "rank_1.pickle"
    assert f"training: out of memory; lower it; what held it: {file} (" in run_out(snapshot, allocator)
    assert file.read_bytes() == b"held"


@pytest.mark.parametrize("wanted, world", [(False, GPU), (True, TWO)])
def test_nothing_is_recorded_unasked_or_without_a_gpu(allocator, tmp_path, wanted, world):
    snapshot = MemorySnapshot(wanted, str(tmp_path))
    snapshot.begin(world)
    assert allocator == [] and run_out(snapshot, allocator) == "training: out of memory; lower it"


def test_a_snapshot_that_finds_no_room_leaves_the_error_as_it_is(allocator, tmp_path, monkeypatch):
    monkeypatch.setattr(private_api, "dump_memory_snapshot", lambda path: open("/dev/full", "w").write("x" * 100_000))
    snapshot = MemorySnapshot(True, str(tmp_path))
    snapshot.begin(GPU)
    assert run_out(snapshot, allocator) == "training: out of memory; lower it"
    assert not list((tmp_path / "memory").iterdir())


@pytest.mark.parametrize(
    "key, used", [("flight_recorder", Resolved(False, "cpu", 2)), ("memory_snapshot", Resolved(False, "cuda", 1))]
)
def test_an_option_that_does_nothing_here_is_named(key, used):
    config = Config()
    setattr(config.trainer, key, True)
    assert unused_keys(config, used) == []
    assert [text.split(" ")[0] for text in unused_keys(config, Resolved(False, "cpu", 1))] == [f"trainer.{key}"]
