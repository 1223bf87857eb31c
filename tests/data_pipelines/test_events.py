"""`prepare events`: any CSV or Parquet log, exactly, out of core; a bad value is named by file, row and column."""

import datetime
import gzip
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import tables
from data_pipelines.events import prepare_events
from fuxi_torchrec.errors import UserError
from tests.helpers.pipeline_cases import items_of, tree, users_of

LOG = "user,item,time\n7,30,5\n7,20,5\n7,10,1\n8,20,7\n8,20,7\n9,30,8\n"


def prepare(tmp_path, log, name="log.csv", **options):
    """Writes a CSV text or a Parquet table and prepares it."""
    if isinstance(log, pa.Table):
        pq.write_table(log, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(log if isinstance(log, bytes) else log.encode())
    columns = {"user_column": "user", "item_column": "item", "time_column": "time", "output": str(tmp_path / "out")}
    return prepare_events([str(tmp_path / name)], **{**columns, **options})


def assert_refused(tmp_path, log, words, name="log.csv", **options):
    """A one-line UserError holding the words; nothing but the log is in the folder."""
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, log, name, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert set(tree(tmp_path)) <= {name}


def test_events_are_sorted_stably_and_counted(tmp_path):
    identity = prepare(tmp_path, LOG)
    assert users_of(tmp_path / "out") == [
        {"user_id": 7, "item_ids": [0, 2, 1], "timestamps": [1, 5, 5]},
        {"user_id": 8, "item_ids": [1, 1], "timestamps": [7, 7]},
        {"user_id": 9, "item_ids": [2], "timestamps": [8]},
    ]
    assert identity.report == {"unsorted_events": 1, "duplicate_events": 1, "single_event_users": 1}
    assert [row["frequency"] for row in items_of(tmp_path / "out")] == [1, 1, 1]
    assert (identity.name, identity.source, identity.time_unit) == ("out", "log.csv", 1.0)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "crlf", "bom", "no header", "parquet"])
def test_every_kind_of_file_gives_the_same_sequences(tmp_path, kind):
    prepare(tmp_path, LOG, output=str(tmp_path / "expected"))
    rows = [line.split(",") for line in LOG.split()[1:]]
    if kind == "csv.gz":
        prepare(tmp_path, gzip.compress(LOG.encode()), "a.csv.gz")
    elif kind == "tsv":
        prepare(tmp_path, LOG.replace(",", "\t"), "a.tsv")
    elif kind == "crlf":
        prepare(tmp_path, LOG.replace("\n", "\r\n\r\n"))
    elif kind == "bom":
        prepare(tmp_path, b"\xef\xbb\xbf" + LOG.encode())
    elif kind == "no header":
        prepare(tmp_path, LOG.partition("\n")[2], column_names=["user", "item", "time"])
    elif kind == "parquet":
        columns = {name: [int(row[k]) for row in rows] for k, name in enumerate(("user", "item", "time"))}
        prepare(tmp_path, pa.table(columns), "a.parquet")
    else:
        prepare(tmp_path, LOG)
    assert users_of(tmp_path / "out") == users_of(tmp_path / "expected")
    assert items_of(tmp_path / "out") == items_of(tmp_path / "expected")


def test_several_files_are_one_log_and_their_order_settles_ties(tmp_path):
    for name, item in (("b.csv", 2), ("a.csv", 1), ("c.csv", 3)):
        (tmp_path / name).write_text(f"user,item,time\n1,{item},5\n")
    options = dict(user_column="user", item_column="item", time_column="time")
    prepare_events([str(tmp_path / "*.csv")], output=str(tmp_path / "sorted"), **options)
    prepare_events([str(tmp_path / f"{n}.csv") for n in "cba"], output=str(tmp_path / "given"), **options)
    assert users_of(tmp_path / "sorted")[0]["item_ids"] == [0, 1, 2]
    assert users_of(tmp_path / "given")[0]["item_ids"] == [2, 1, 0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_above_2_to_the_53_survive_exactly(tmp_path, kind):
    ids = [2**53 + 1, 2**53 + 2, 2**63 - 1]
    if kind == "csv":
        log = "user,item,time\n" + "".join(f"{u},{i},{2**53 + 1}\n" for u in ids for i in ids)
    else:
        log = pa.table({"user": np.repeat(ids, 3), "item": np.tile(ids, 3), "time": [2**53 + 1] * 9})
    prepare(tmp_path, log, f"log.{kind}")
    assert [row["user_id"] for row in users_of(tmp_path / "out")] == ids
    assert users_of(tmp_path / "out")[0]["timestamps"] == [2**53 + 1] * 3
    assert [row["source_id"] for row in items_of(tmp_path / "out")] == ids


def test_text_ids_are_numbered_in_sorted_order_and_mapped_back(tmp_path):
    prepare(tmp_path, "user,item,time\nzoë,b-1,1\nann,a,2\nzoë,a,3\nann,b-1,1\n")
    assert pq.read_table(tmp_path / "out" / "users.parquet").to_pylist() == [
        {"user_id": 0, "source_id": "ann"},
        {"user_id": 1, "source_id": "zoë"},
    ]
    assert [row["source_id"] for row in items_of(tmp_path / "out")] == ["a", "b-1"]
    assert [(row["user_id"], row["item_ids"]) for row in users_of(tmp_path / "out")] == [(0, [1, 0]), (1, [1, 0])]


def test_digits_can_be_read_as_text_so_that_leading_zeros_stay(tmp_path):
    log = "user,item,time\n1,007,1\n1,7,2\n"
    assert_refused(tmp_path, log, ["line 2", "'item'", "'007'", "--item-type text"])
    prepare(tmp_path, log, item_type="text")
    assert [row["source_id"] for row in items_of(tmp_path / "out")] == ["007", "7"]
    assert "users.parquet" not in tree(tmp_path / "out")


@pytest.mark.parametrize("unit, ticks", [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9), (60, Fraction(1, 60))])
def test_datetimes_become_ticks_of_the_unit_without_a_float(tmp_path, unit, ticks):
    times = ["2024-03-01 12:00:00.250", "2024-03-01 12:00:00.750"]
    log = "user,item,time\n" + "".join(f"1,{k},{t}\n" for k, t in reversed(list(enumerate(times))))
    identity = prepare(tmp_path, log, time_unit=unit)
    midday = 1_709_294_400  # 2024-03-01 12:00 UTC
    whole = [int((midday + Fraction(quarters, 4)) * ticks) for quarters in (1, 3)]
    row = users_of(tmp_path / "out")[0]
    assert row["timestamps"] == whole
    assert row["item_ids"] == [0, 1]  # in the order of the full times, even where the ticks are equal
    assert identity.time_unit == pytest.approx(float(1 / Fraction(ticks)))
    typed = pa.table({"user": [1, 1], "item": [0, 1], "time": [datetime.datetime.fromisoformat(t) for t in times]})
    prepare(tmp_path, typed, "a.parquet", time_unit=unit, overwrite=True)
    assert users_of(tmp_path / "out")[0]["timestamps"] == whole


def test_zones_are_converted_to_utc(tmp_path):
    prepare(tmp_path, "user,item,time\n1,1,2024-03-01T12:00:00Z\n1,2,2024-03-01T12:00:00+02:00\n")
    assert users_of(tmp_path / "out")[0] == {
        "user_id": 1, "item_ids": [1, 0], "timestamps": [1709294400 - 7200, 1709294400],
    }  # fmt: skip


def test_extra_columns_are_aligned_lists_of_their_own_type(tmp_path):
    log = "user,item,time,stars,action,n\n1,5,9,4,buy,-1\n1,6,3,2.5,,2\n"
    identity = prepare(tmp_path, log, extra_columns=["stars", "action", "n", "item:text"])
    row = users_of(tmp_path / "out")[0]
    assert (row["stars"], row["action"], row["n"], row["item"]) == ([2.5, 4.0], ["", "buy"], [2, -1], ["6", "5"])
    assert identity.columns == ["stars", "action", "n", "item"]
    with pytest.raises(UserError, match="item_ids"):
        prepare(tmp_path, log, extra_columns=["item_ids"])


def test_titles_come_from_a_file_of_their_own(tmp_path):
    (tmp_path / "titles.csv").write_text('sku,label\n20,"Plain, with ""quotes"""\n10,Ten\n20,Second\n99,Unused\n')
    options = dict(item_titles=str(tmp_path / "titles.csv"), titles_item_column="sku", title_column="label")
    identity = prepare(tmp_path, LOG, **options)
    assert [row["title"] for row in items_of(tmp_path / "out")] == ["Ten", 'Plain, with "quotes"', None]
    assert identity.report["items_without_title"] == 1


@pytest.mark.parametrize("kind", ["integer", "text"])
def test_the_out_of_core_path_gives_the_in_memory_answer(tmp_path, monkeypatch, kind):
    """Many small blocks and batches, so that users straddle them, under a small memory limit."""
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr("data_pipelines.sorting.BATCH_ROWS", 500)
    rng = np.random.default_rng(0)
    n = 30_000
    users, items, times = rng.integers(0, 97, n), rng.integers(0, 1000, n), rng.integers(0, 5000, n)
    users[rng.random(n) < 0.2] = 50  # one user longer than several batches
    mark = "u" if kind == "text" else ""
    lines = [f"{mark}{u:02d},{i},{t}" if mark else f"{u},{i},{t}" for u, i, t in zip(users, items, times)]
    identity = prepare(tmp_path, "user,item,time\n" + "\n".join(lines), memory_limit="100MB")
    order = np.lexsort((np.arange(n), times, users))
    catalogue = np.unique(items)
    rows = users_of(tmp_path / "out")
    assert [row["user_id"] for row in rows] == list(range(97))
    assert np.array_equal(np.concatenate([row["item_ids"] for row in rows]), np.searchsorted(catalogue, items[order]))
    assert np.array_equal(np.concatenate([row["timestamps"] for row in rows]), times[order])
    assert identity.report["duplicate_events"] == n - len(np.unique(np.stack([users, items, times]), axis=1).T)
    late = sum(int((np.maximum.accumulate(t := times[users == u]) > t).sum()) for u in range(97))
    assert identity.report["unsorted_events"] == late


BAD_ROWS = [
    ("7,20,nan", ["line 4", "'time'", "'nan' is not a number"]),
    ("7,20,-5", ["line 4", "timestamp -5 is negative"]),
    ("7,20,5.0", ["line 4", "'5.0' is not a plain integer"]),
    ("7,20,2024-01-01", ["line 4", "'2024-01-01' is not a plain integer"]),
    ("7,20", ["line 4", "too few fields (2, expected 3)"]),
    ("7,20,1,1", ["line 4", "too many fields (4, expected 3)"]),
    (",20,1", ["line 4", "'user'", "user id is empty"]),
    ("7,,1", ["line 4", "'item'", "item id is empty"]),
    ("7.5,20,1", ["line 4", "'7.5' is not a plain integer"]),
    ("7e3,20,1", ["line 4", "'7e3' is not a plain integer"]),
    ("7,9223372036854775808,1", ["line 4", "beyond int64"]),
    ("-7,20,1", ["line 4", "user id -7 is negative"]),
    ("bob,20,1", ["line 4", "'bob' is not a plain integer", "--user-type text"]),
]


@pytest.mark.parametrize("row, words", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, words):
    lines = LOG.splitlines()
    lines[2] = "\n" + row  # after an empty line, which counts
    assert_refused(tmp_path, "\n".join(lines), ["log.csv", *words])


def test_the_line_is_right_far_into_a_large_file_with_line_ends_inside_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 1 << 14)
    lines = ["user,item,time,note"] + [f'{k},1,1,"two\nlines, {k}"' for k in range(20_000)] + ["1,x,1,"]
    assert_refused(tmp_path, "\n".join(lines), ["log.csv, line 40002", "'item'", "'x'"])


BAD_TABLES = [
    ({"user": [1.0], "item": [1], "time": [1]}, ["column 'user'", "holds double", "never rounded"]),
    ({"user": [1], "item": [1], "time": [1.5]}, ["column 'time'", "holds double"]),
    ({"user": [1, None], "item": [1, 1], "time": [1, 1]}, ["row 2", "'user'", "missing (null)"]),
    ({"user": ["a", ""], "item": [1, 1], "time": [1, 1]}, ["row 2", "'user'", "empty"]),
    ({"user": [1, 1], "item": [1, 1], "time": [1, None]}, ["row 2", "'time'", "missing (null)"]),
    ({"user": [1, -1], "item": [1, 1], "time": [1, 1]}, ["row 2", "'user'", "-1 is negative"]),
    ({"user": pa.array([2**63], pa.uint64()), "item": [1], "time": [1]}, ["row 1", "'user'", "beyond int64"]),
    ({"user": [1], "item": [[1]], "time": [1]}, ["column 'item'", "holds list"]),
    ({"user": [1], "item": [1], "time": [datetime.datetime(1969, 1, 1)]}, ["row 1", "before 1970"]),
    ({"user": [1], "item": [1]}, ["no column 'time'", "'user', 'item'"]),
]


@pytest.mark.parametrize("columns, words", BAD_TABLES)
def test_a_bad_parquet_value_is_named_by_its_row(tmp_path, columns, words):
    assert_refused(tmp_path, pa.table(columns), ["log.parquet", *words], "log.parquet")


def test_files_that_cannot_be_read(tmp_path):
    assert_refused(tmp_path, b"PAR1 and no more", ["log.parquet", "not a readable Parquet file"], "log.parquet")
    (tmp_path / "log.parquet").unlink()
    assert_refused(tmp_path, b"user,item,time\n1,\xff,3\n", ["log.csv, line 2", "UTF-8"])
    assert_refused(tmp_path, "", ["log.csv", "empty"])
    assert_refused(tmp_path, "user,item,time\n", ["log.csv", "no events"])
    assert_refused(tmp_path, LOG, ["no column 'who'", "'user', 'item', 'time'"], user_column="who")
    (tmp_path / "log.csv").unlink()
    damaged = gzip.compress(LOG.encode() * 1000)[:-40]
    assert_refused(tmp_path, damaged, ["log.csv.gz", "damaged"], "log.csv.gz")
    (tmp_path / "log.csv.gz").unlink()
    with pytest.raises(UserError, match="nothing.*no such file"):
        prepare_events([str(tmp_path / "nothing*.csv")], "user", "item", "time", str(tmp_path / "out"))
    with pytest.raises(UserError, match="a folder"):
        prepare_events([str(tmp_path)], "user", "item", "time", str(tmp_path / "out"))
    assert tree(tmp_path) == {}


def test_options_that_make_no_sense(tmp_path):
    assert_refused(tmp_path, LOG, ["--time-unit days"], time_unit="days")
    assert_refused(tmp_path, LOG, ["--memory-limit lots"], memory_limit="lots")
    assert_refused(tmp_path, LOG, ["--user-type"], user_type="float")
    dates = "user,item,time\n1,1,2024-01-01\n"
    assert_refused(tmp_path, dates, ["--time-unit 1.5e-06"], time_unit=1.5e-6)
