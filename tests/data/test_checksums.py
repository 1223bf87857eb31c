"""dataset.json's record of its files: sizes and rows are compared at every start, bytes where that is asked for."""

import dataclasses
import hashlib
import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from data_pipelines.events import prepare_events
from fuxi_torchrec.data.checksums import check_start, verify_files
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.format import read_identity
from fuxi_torchrec.errors import UserError

NAMES = ["items.parquet", "train/part-00000.parquet", "users.parquet"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checksums")
    rows = [f"u{k % 50},{k * 7 % 31},{k}\n" for k in range(1000)]
    (folder / "log.csv").write_text("user,item,time\n" + "".join(rows))
    prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "out"))
    return folder / "out"


@pytest.fixture
def data(prepared, tmp_path):
    """A copy that a test may damage."""
    return str(shutil.copytree(prepared, tmp_path / "data"))


def start(folder):
    """What every command that opens a data set does first."""
    dataset = SequenceDataset(folder)
    check_start(folder, dataset.identity)


def rewrite(path, change):
    """Writes a Parquet file's rows again after `change`."""
    pq.write_table(change(pq.read_table(path)), path)


def without_record(folder):
    """dataset.json as the first release wrote it."""
    path = os.path.join(folder, "dataset.json")
    values = json.load(open(path))
    for key in ("files", "schema_minor", "log_prob_column"):
        values.pop(key)
    json.dump(values, open(path, "w"))


def test_bytes_rows_and_checksum_of_every_file_are_recorded(prepared):
    files = read_identity(str(prepared)).files
    assert sorted(files) == NAMES
    for name, facts in files.items():
        content = (prepared / name).read_bytes()
        rows = pq.read_metadata(prepared / name).num_rows
        assert facts == {"bytes": len(content), "rows": rows, "sha256": hashlib.sha256(content).hexdigest()}


def test_a_whole_data_set_starts_and_verifies(data):
    start(data)
    verify_files(data, read_identity(data))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["replaced", "shorter", "truncated", "missing"])
def test_another_file_under_the_same_name_is_refused_at_the_start(data, name, fault):
    path = os.path.join(data, name)
    if fault == "replaced":
        rewrite(path, lambda table: table.select(table.column_names[::-1]))
    elif fault == "shorter":
        rewrite(path, lambda table: table.slice(1))
    elif fault == "truncated":
        os.truncate(path, os.path.getsize(path) - 100)
    else:
        os.remove(path)
    with pytest.raises(UserError) as caught:
        start(data)
    message = str(caught.value)
    assert path in message and "\n" not in message
    assert "prepare" in message  # what to do
    if fault in ("replaced", "shorter"):
        assert "bytes" in message and "dataset.json says" in message
    if fault == "missing":
        assert "missing" in message


def test_a_part_file_that_is_not_recorded_is_refused(data):
    shutil.copy(os.path.join(data, NAMES[1]), os.path.join(data, "train", "part-00001.parquet"))
    with pytest.raises(UserError, match=r"train/part-00001.parquet: not a file that dataset.json lists"):
        start(data)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_changed_in_place_are_found_by_verify_on_the_rank_that_has_the_file(data, name):
    path = os.path.join(data, name)
    with open(path, "r+b") as file:
        file.seek(40)
        byte = file.read(1)
        file.seek(40)
        file.write(bytes([byte[0] ^ 1]))
    start(data)  # sizes and rows are as before
    identity, found = read_identity(data), []
    for rank in range(2):
        try:
            verify_files(data, identity, rank, world_size=2)
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1
    assert f"{path}: not the file that prepare wrote (sha256 " in found[0]
    assert identity.files[name]["sha256"] in found[0]


def test_a_data_set_without_a_record_is_taken_as_it_is_and_verified_as_a_whole(data):
    without_record(data)
    start(data)
    verify_files(data, read_identity(data))
    rewrite(os.path.join(data, NAMES[1]), lambda table: table.select(table.column_names[::-1]))
    start(data)
    with pytest.raises(UserError, match="content_checksum sha256:.*dataset.json says sha256:"):
        verify_files(data, read_identity(data))


def test_a_missing_items_file_is_noticed_at_the_start_without_a_record_too(data):
    without_record(data)
    os.remove(os.path.join(data, "items.parquet"))
    with pytest.raises(UserError, match="items.parquet: missing"):
        start(data)


def test_the_content_checksum_means_what_it_meant(prepared):
    """A model trained on the same files prepared by the first release knows its data again."""
    whole = hashlib.sha256(b"".join((prepared / name).read_bytes() for name in NAMES))
    assert read_identity(str(prepared)).content_checksum == f"sha256:{whole.hexdigest()}"


def test_a_record_of_a_file_is_kept_through_a_run_folders_copy(prepared, tmp_path):
    identity = read_identity(str(prepared))
    (tmp_path / "dataset.json").write_text(identity.to_json())
    assert read_identity(str(tmp_path)) == dataclasses.replace(identity)
