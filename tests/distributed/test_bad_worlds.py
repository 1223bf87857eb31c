"""Worlds that cannot work, as real ranks that nobody else ends: one clear error on rank 0, exit code 2 everywhere."""

import json
import shutil
import socket

import pytest

from data_pipelines.events import prepare_events
from fuxi_torchrec.distributed.world import start_world
from fuxi_torchrec.errors import LostProcess
from fuxi_torchrec.run.outcome import read_outcome
from tests.conftest import write_events
from tests.helpers.launches import Launch, Ranks

pytestmark = pytest.mark.thorough

RANK_1 = "if os.environ['RANK'] == '1': "
CANNOT_READ = f"""
from fuxi_torchrec.data.dataset import SequenceDataset
read = SequenceDataset.read
def fail(self, group, **more):
    {RANK_1}group = type(group)('/nowhere/part.parquet', 0, 1)
    return read(self, group, **more)
SequenceDataset.read = fail
"""


@pytest.fixture(scope="module")
def trained(small_dataset, tmp_path_factory):
    """A run with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    launch = Launch(folder, small_dataset, folder / "run", "--trainer.max_steps", "2", processes=0)
    assert launch.wait() == 0, launch.errors.read_text()
    return folder / "run"


def test_a_rank_that_was_started_with_another_config(small_dataset, tmp_path):
    before = RANK_1 + "sys.argv += ['--optimizer.learning_rate', '0.5']\n"
    check(Ranks(tmp_path, small_dataset, tmp_path / "run", before=before), "rank 1: optimizer.learning_rate: 0.5 here")


def test_a_rank_that_would_write_its_shards_elsewhere(small_dataset, tmp_path):
    before = RANK_1 + f"sys.argv += ['--output', '{tmp_path}/other']\n"
    check(Ranks(tmp_path, small_dataset, tmp_path / "run", before=before), f"rank 1: --output: {tmp_path}/other here")


def test_a_data_set_smaller_than_the_world(tmp_path):
    write_events(tmp_path / "log.csv", 1)
    prepare_events([str(tmp_path / "log.csv")], "user", "item", "time", str(tmp_path / "tiny"))
    ranks = Ranks(tmp_path, tmp_path / "tiny", tmp_path / "run")
    check(ranks, "1 users are too few for 2 processes; use at most 1")


def test_a_rank_that_cannot_read_its_shard(small_dataset, tmp_path):
    ranks = Ranks(tmp_path, small_dataset, tmp_path / "run", before=CANNOT_READ)
    check(ranks, "rank 1: /nowhere/part.parquet, row group 0: cannot be read")


@pytest.mark.parametrize("what", ["model", "schema"])
def test_a_checkpoint_of_another_model_or_schema(small_dataset, trained, tmp_path, what):
    shutil.copytree(trained, tmp_path / "run")
    marker = tmp_path / "run" / "checkpoints" / "step-00000002" / "complete.json"
    options, says = ("--model.num_blocks", "3"), "checkpoint of another model; model.num_blocks is 2 there and 3 here"
    if what == "schema":
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 1}))
        options, says = (), "a checkpoint of format 1, this version reads"
    check(Ranks(tmp_path, small_dataset, tmp_path / "run", "--resume", *options), says)
    # A refused start leaves the run as it was.
    assert (tmp_path / "run" / "config.yaml").read_text() == (trained / "config.yaml").read_text()


STUCK = f"""
import time
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.training import Trainer
def fail(self, batch):
    {RANK_1}raise UserError('a mistake in the middle')
    time.sleep(600)
Trainer.step = fail
"""


def test_the_outcome_tells_why_another_rank_failed_while_rank_0_is_stuck(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run = tmp_path / "run"
    check(Ranks(tmp_path, small_dataset, run, before=STUCK), "rank 1: a mistake in the middle")
    assert read_outcome(str(run)) == {"status": "failed", "reason": "rank 1: a mistake in the middle"}
    assert "a mistake in the middle" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def check(ranks, says):
    codes, complaints = ranks.wait(), ranks.complaints()
    shown = [errors.read_text() for errors in ranks.errors]
    assert codes == [2, 2], shown
    assert len(complaints[0]) == 1 and says in complaints[0][0] and complaints[1:] == [[]], shown


def test_a_rank_that_waits_for_the_others_in_vain_says_so(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(LostProcess, match=f"rank 0 of 2: the processes did not meet at 127.0.0.1:{port} .*start every"):
        with start_world("cpu", timeout_minutes=0.01):
            pass
