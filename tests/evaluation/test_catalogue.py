"""`recommend` asks the catalogue for what a request names, and never holds it whole."""

import gc
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuxi_torchrec.cli.id_list import split_ids
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.recommend import Catalogue, history_request


def catalogue_of(source_ids, titles=None):
    """Over an items.parquet of four row groups."""

    def make(small_dataset, tmp_path):
        V = len(source_ids)
        columns = {"item_id": np.arange(V), "source_id": source_ids, "title": pa.array(titles or [None] * V, pa.string())}
        table = pa.table({**columns, "frequency": np.ones(V, np.int64)})
        pq.write_table(table, tmp_path / "items.parquet", row_group_size=-(-V // 4))
        dataset = SequenceDataset(small_dataset)
        dataset.folder = str(tmp_path)
        return Catalogue(dataset)

    return make


def test_items_are_found_by_the_sources_ids_as_the_source_writes_them(small_dataset, tmp_path):
    catalogue = catalogue_of([7, -3, 2**62 + 1, 40, 12])(small_dataset, tmp_path)
    asked = ["12", "-3", str(2**62 + 1), "012", "1e1", "", "99", str(2**70)]
    assert catalogue.dense_ids(asked) == {"12": 4, "-3": 1, str(2**62 + 1): 2}


def test_text_ids_with_an_at_sign_are_ids_before_they_are_times(small_dataset, tmp_path):
    catalogue = catalogue_of(["a@5", "a", "b", "c@d"])(small_dataset, tmp_path)
    request = history_request(split_ids("b@9, a@5,c@d@3"), catalogue, at=8)
    assert request.item_ids.tolist() == [3, 0, 2] and request.timestamps.tolist() == [3, 8, 9]
    with pytest.raises(UserError, match="item 'x' is not in the catalogue of"):
        history_request(split_ids("b,x@3"), catalogue, at=8)


def test_recommended_items_are_described_in_their_order_each_as_often_as_asked(small_dataset, tmp_path):
    catalogue = catalogue_of(["a", "b", "c", "d", "e"], ["A", None, "C", "D", "E"])(small_dataset, tmp_path)
    described = catalogue.describe(np.array([4, 0, 1, 4]))
    assert described["source_id"].to_pylist() == ["e", "a", "b", "e"]
    assert described["title"].to_pylist() == ["E", "A", None, "E"]
    assert catalogue.describe(np.array([], dtype=np.int64)).num_rows == 0


def settled(condition):
    """Whether it comes true once cycles are collected and Arrow's threads have let go of what they read."""
    for _ in range(50):
        gc.collect()
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_a_lookup_reads_the_catalogue_past_without_holding_it(small_dataset, tmp_path):
    V = 100_000
    catalogue = catalogue_of(np.arange(V) * 3, [f"a title of some length, number {i}" for i in range(V)])
    before = pa.total_allocated_bytes()
    made = catalogue(small_dataset, tmp_path)
    assert made.dense_ids(["3", "299997"]) == {"3": 1, "299997": V - 1}
    assert made.describe(np.array([V - 1, 5]))["title"].to_pylist()[1] == "a title of some length, number 5"
    assert settled(lambda: pa.total_allocated_bytes() - before < 1 << 19)
