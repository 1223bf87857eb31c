"""Text ids with commas, outer spaces and @ can be asked for, as they stand."""

import pytest

from data_pipelines.events import prepare_events
from fuxi_torchrec.cli.id_list import split_ids
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation.recommend import Catalogue, history_request, user_requests


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rows = ['"Smith, J","a,b",1', '"Smith, J"," x ",2', '" ann",x@y,3', '" ann",plain,4', "ann,plain,5", "ann,x,6"]
    (folder / "log.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n")
    prepare_events([str(folder / "log.csv")], "user", "item", "time", str(folder / "out"))
    return SequenceDataset(str(folder / "out"))


def test_users_are_found_by_ids_in_quotes_and_without(dataset):
    requests = user_requests(dataset, split_ids('ann, "Smith, J"," ann"'))
    assert [request.label for request in requests] == ["ann", "Smith, J", " ann"]
    assert [request.timestamps.tolist() for request in requests] == [[5, 6], [1, 2], [3, 4]]
    with pytest.raises(UserError, match="user ' Smith, J' is not among"):
        user_requests(dataset, split_ids('" Smith, J"'))


def test_items_are_found_by_ids_in_quotes_and_without_and_with_times(dataset):
    source_ids = dataset.items(["source_id"])["source_id"].to_pylist()
    request = history_request(split_ids('"a,b"@10," x "@20, x @30 ,x@y@40,x@y, plain'), Catalogue(dataset), at=50)
    assert [source_ids[item] for item in request.item_ids] == ["a,b", " x ", "x", "x@y", "x@y", "plain"]
    assert request.timestamps.tolist() == [10, 20, 30, 40, 50, 50]
    with pytest.raises(UserError, match="item ' plain' is not in the catalogue"):
        history_request(split_ids('" plain"'), Catalogue(dataset), at=1)
