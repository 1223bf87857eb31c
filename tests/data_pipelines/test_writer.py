"""What lands on disk: data/format's schema, row groups for every rank, complete or absent, same input same bytes."""

import errno
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import writer as writer_module
from data_pipelines.events import prepare_events
from data_pipelines.movielens import prepare_movielens
from data_pipelines.output import OutputFolder
from data_pipelines.synthetic import prepare_synthetic
from data_pipelines.writer import Sequences, SequenceWriter
from fuxi_torchrec.data.format import ITEM_COLUMNS, SEQUENCE_FIELDS, read_identity
from fuxi_torchrec.errors import UserError
from tests.helpers.pipeline_cases import layout_files, tree, users_of, write_zip


def random_sequences(users: int, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 9, users))])
    events = int(offsets[-1])
    marks = pa.array([f"m{k % 3}" for k in range(events)])
    return Sequences(np.arange(users), offsets, rng.integers(0, 50, events), np.arange(events), {"marks": marks})


def write(output, sequences, users, pieces=1, **options):
    """Writes the sequences in so many calls."""
    cuts = np.linspace(0, users, pieces + 1).astype(int)
    with OutputFolder(str(output), **options) as folder, SequenceWriter(folder, users, 50) as writer:
        for begin, end in zip(cuts, cuts[1:]):
            writer.write(sequences.part(begin, end))
        writer.write_items(pa.array(range(50)))
        texts = dict(name="n", source="s", source_checksum="")
        return writer.finish({}, catalogue="all", time_unit=1.0, **texts)


def test_the_schema_is_that_of_data_format(tmp_path):
    identity = write(tmp_path / "out", random_sequences(40), 40)
    schema = pq.read_schema(tmp_path / "out" / "train" / "part-00000.parquet")
    for found, wanted in zip(schema, SEQUENCE_FIELDS):
        assert (found.name, found.type, found.nullable) == (wanted.name, wanted.type, wanted.nullable)
    assert schema.field("marks").type == pa.list_(pa.string())
    items = pq.read_schema(tmp_path / "out" / "items.parquet")
    assert tuple(items.names) == ITEM_COLUMNS
    assert items.types == [pa.int64(), pa.int64(), pa.string(), pa.int64()]
    assert identity == read_identity(str(tmp_path / "out"))


@pytest.mark.parametrize("users, groups", [(1, 1), (100, 13), (3000, 16), (20_000, 20)])
def test_there_are_row_groups_for_16_readers_where_there_are_users_enough(tmp_path, users, groups):
    write(tmp_path / "out", random_sequences(users), users)
    metadata = pq.read_metadata(tmp_path / "out" / "train" / "part-00000.parquet")
    sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    assert (len(sizes), sum(sizes)) == (groups, users)
    assert max(sizes) <= 1024


def test_very_long_users_make_small_row_groups_and_large_sets_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_EVENTS_PER_GROUP", 20)
    monkeypatch.setattr(writer_module, "GROUPS_PER_PART", 5)
    sequences = random_sequences(100)
    identity = write(tmp_path / "out", sequences, 100)
    parts = sorted(os.listdir(tmp_path / "out" / "train"))
    assert len(parts) > 3
    assert parts[:2] == ["part-00000.parquet", "part-00001.parquet"]
    rows = users_of(tmp_path / "out")
    assert np.array_equal(np.concatenate([row["item_ids"] for row in rows]), sequences.item_ids)
    assert [row["marks"] for row in rows][3] == sequences.part(3, 4).extras["marks"].to_pylist()
    assert identity.num_events == len(sequences.item_ids)


def test_the_bytes_do_not_depend_on_how_the_sequences_come(tmp_path):
    one = write(tmp_path / "one", random_sequences(500), 500)
    many = write(tmp_path / "many", random_sequences(500), 500, pieces=41)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    assert one.content_checksum == many.content_checksum
    assert write(tmp_path / "other", random_sequences(500, seed=1), 500).content_checksum != one.content_checksum


def test_frequency_leaves_every_users_last_event_out(tmp_path):
    sequences = random_sequences(60)
    write(tmp_path / "out", sequences, 60)
    kept = [i for row in users_of(tmp_path / "out") for i in row["item_ids"][:-1]]
    frequency = pq.read_table(tmp_path / "out" / "items.parquet")["frequency"].to_pylist()
    assert frequency == np.bincount(kept, minlength=50).tolist()


def commands(tmp_path):
    """One call of each prepare function; a file of raw data is made first where there is none."""
    archive, log = tmp_path / "a.zip", tmp_path / "log.csv"
    if not archive.exists():
        write_zip(archive, layout_files("ml-1m"))
        log.write_text("user,item,time\n" + "".join(f"{k % 50},{k},{k}\n" for k in range(2000)))
    output = str(tmp_path / "deep" / "out")
    return {
        "movielens": lambda **more: prepare_movielens(str(archive), output, **more),
        "events": lambda **more: prepare_events([str(log)], "user", "item", "time", output, **more),
        "synthetic": lambda **more: prepare_synthetic(output, 200, 60, 10, **more),
    }


STAGES = {
    "opening": (OutputFolder, "open"),
    "a row group": (SequenceWriter, "_write_group"),
    "the items": (SequenceWriter, "write_items"),
    "dataset.json": (SequenceWriter, "finish"),
    "the rename": (os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", ["movielens", "events", "synthetic"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, command, stage):
    prepare = commands(tmp_path)[command]
    before = tree(tmp_path)
    monkeypatch.setattr(*STAGES[stage], raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"deep/out: .*(disk is full|No space left)"):
        prepare()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("command", ["movielens", "events", "synthetic"])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, command, stage):
    prepare = commands(tmp_path)[command]
    before = tree(tmp_path)
    monkeypatch.setattr(*STAGES[stage], raiser(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("method", ["write_batch", "write_table"])
def test_a_disk_that_fills_in_the_middle_of_a_file_leaves_nothing(tmp_path, monkeypatch, method):
    prepare = commands(tmp_path)["events"]
    before = tree(tmp_path)
    monkeypatch.setattr(pq.ParquetWriter, method, raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="disk is full"):
        prepare()
    assert tree(tmp_path) == before


def test_an_existing_data_set_stays_unless_overwritten_and_until_the_new_one_is_complete(tmp_path, monkeypatch):
    prepare = commands(tmp_path)["synthetic"]
    prepare()
    before = tree(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(SequenceWriter, "write_items", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(seed=1, overwrite=True)
    assert tree(tmp_path) == before
    prepare(seed=1, overwrite=True)
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]
    assert tree(tmp_path) != before


def test_what_is_not_a_data_set_is_never_overwritten(tmp_path):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    (tmp_path / "deep" / "out" / "thesis.tex").write_text("years of work")
    prepare = commands(tmp_path)["synthetic"]
    before = tree(tmp_path)
    with pytest.raises(UserError, match="not a data set"):
        prepare(overwrite=True)
    assert tree(tmp_path) == before
    (tmp_path / "deep" / "out" / "thesis.tex").unlink()
    prepare()  # an empty folder is as good as none


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", "/proc/nowhere/out", "http://127.0.0.1:9/out"):
        with pytest.raises(UserError, match="cannot (write there|be written)"):
            prepare_synthetic(str(output), 10, 40, 5)


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail
