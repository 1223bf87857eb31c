"""Data sets at addresses: the same bytes as in a folder, and complete or absent on a file system that fails at times."""

import io
import json
import os
import shutil

import numpy as np
import pytest

from data_pipelines.events import prepare_events
from data_pipelines.synthetic import prepare_synthetic
from data_pipelines.writer import SequenceWriter
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.format import read_identity
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.paths import path_manager
from fuxi_torchrec.run import lock as locks
from tests.helpers.bucket import Bucket
from tests.helpers.pipeline_cases import tree

ADDRESS = "bucket://data/out"
SIZES = dict(users=100, items=60, events_per_user=10)


class FailingBucket(Bucket):
    """A bucket where a file is there once it is closed. `before` is called ahead of every request, and may fail."""

    def __init__(self, folder):
        super().__init__(str(folder))
        self.before = lambda request: None

    def _open(self, path, mode="r", *args, **more):
        self.before("open")
        if "w" not in mode:
            return super()._open(path, mode)
        upload = Upload(self._local(path), self)
        return upload if "b" in mode else io.TextIOWrapper(upload, "utf-8")

    def _exists(self, path, **more):
        self.before("exists")
        return super()._exists(path)

    def _ls(self, path, **more):
        self.before("ls")
        return super()._ls(path)

    def _rm(self, path, **more):
        self.before("rm")
        return super()._rm(path)


class Upload(io.BytesIO):
    def __init__(self, path, bucket):
        super().__init__()
        self.path, self.bucket = path, bucket

    def write(self, data):
        self.bucket.before("write")
        return super().write(data)

    def close(self):
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        self.bucket.before("close")
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "wb") as file:
            file.write(content)


class Unreachable(Exception):
    """What a client of some file system raises: no OSError, and several lines."""

    def __str__(self):
        return "503 Slow Down\nrequest id 17"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SETTLE", 0.0)  # no other process starts in the same moment
    path_manager.cache_clear()  # handlers cannot be taken back, so this manager is thrown away afterwards
    bucket = FailingBucket(tmp_path / "bucket")
    path_manager().register_handler(bucket, allow_override=True)
    yield bucket
    path_manager.cache_clear()


def stored(bucket):
    found = tree(os.path.join(bucket.root, "data", "out"))
    return {name: content for name, content in found.items() if name.split("/")[0] != "lock"}


def forget_lock(bucket):
    """A release that failed leaves a lock that the next would wait for, as long as an owner may miss heartbeats."""
    shutil.rmtree(os.path.join(bucket.root, "data", "out", "lock"), ignore_errors=True)


def test_an_address_gets_the_same_data_set_in_place(tmp_path, bucket):
    local = prepare_synthetic(str(tmp_path / "out"), **SIZES)
    assert prepare_synthetic(ADDRESS, **SIZES) == local == read_identity(ADDRESS)
    assert stored(bucket) == tree(tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        prepare_synthetic(ADDRESS, **SIZES)
    with open(os.path.join(bucket.root, "data/out/train/part-00001.parquet"), "w") as file:
        file.write("of a larger data set that was here")
    prepare_synthetic(ADDRESS, **SIZES, overwrite=True)
    assert stored(bucket) == tree(tmp_path / "out")


def test_an_address_without_its_dataset_json_is_what_a_failure_leaves_at_most(bucket, monkeypatch):
    prepare_synthetic(ADDRESS, **SIZES)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SequenceWriter, "write_items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_synthetic(ADDRESS, **SIZES, overwrite=True)
    assert "dataset.json" not in stored(bucket)


def test_a_source_that_cannot_be_read_leaves_the_data_set_that_was_to_be_overwritten(tmp_path, bucket):
    prepare_synthetic(ADDRESS, **SIZES)
    before = stored(bucket)
    (tmp_path / "log.csv").write_text("user,item,time\n1,1,1\n1,one,2\n")
    with pytest.raises(UserError, match="line 3"):
        prepare_events([str(tmp_path / "log.csv")], "user", "item", "time", ADDRESS, overwrite=True)
    assert stored(bucket) == before


def refused(bucket):
    """Overwrites the data set; returns whether that was refused, and checks that the refusal is one line."""
    forget_lock(bucket)
    try:
        prepare_synthetic(ADDRESS, **SIZES, overwrite=True)
    except UserError as error:
        assert str(error).startswith(f"{ADDRESS}: cannot be written (503 Slow Down request id 17)")
        assert "\n" not in str(error)
        return True
    return False


def test_whichever_request_fails_it_ends_by_one_line_with_the_data_set_complete_or_absent(bucket):
    prepare_synthetic(ADDRESS, **SIZES)
    complete, requests = stored(bucket), []
    bucket.before = requests.append
    assert not refused(bucket)
    assert {"open", "write", "close", "exists", "ls", "rm"} == set(requests)
    kinds = set(requests)
    chosen = {requests.index(kind) for kind in kinds} | {len(requests) - 1 - requests[::-1].index(kind) for kind in kinds}
    for number in sorted(chosen | set(range(0, len(requests), len(requests) // 8))):
        countdown = iter(range(number, -1, -1))

        def fail_once(request, countdown=countdown):
            if next(countdown, None) == 0:
                raise Unreachable

        bucket.before = fail_once
        failed, found = refused(bucket), stored(bucket)
        # Only giving the lock back may fail unheard: the data set is complete then.
        assert found == complete or (failed and "dataset.json" not in found)
        bucket.before = lambda request: None
        assert not refused(bucket)
        assert stored(bucket) == complete


def test_a_file_system_that_fails_at_times_while_cleaning_up_too_never_has_half_a_data_set(bucket):
    prepare_synthetic(ADDRESS, **SIZES)
    complete, random = stored(bucket), np.random.default_rng(0)

    def fail_at_times(request):
        if request != "write" and random.random() < 0.1:  # there are very many small writes
            raise Unreachable

    bucket.before = fail_at_times
    outcomes = [(refused(bucket), stored(bucket)) for _ in range(40)]
    assert {True, False} == {failed for failed, _ in outcomes}
    for failed, found in outcomes:
        assert found == complete or (failed and not is_json(found.get("dataset.json", b"")))


def is_json(content):
    try:
        return bool(json.loads(content))
    except ValueError:
        return False


def test_a_data_set_at_an_address_is_opened_and_verified_there(bucket):
    """Listing there takes a folder by its '/' and answers with whole keys."""
    prepare_synthetic(ADDRESS, **SIZES)
    dataset = SequenceDataset(ADDRESS)
    dataset.check_files(rank=0, world_size=1, verify=True)
    assert sum(len(dataset.read(group).user_ids_U) for group in dataset.row_groups) == 100
    os.remove(os.path.join(bucket.root, "data/out/items.parquet"))
    with pytest.raises(UserError, match=f"{ADDRESS}/items.parquet: missing"):
        dataset.check_files(rank=0, world_size=1, verify=False)
