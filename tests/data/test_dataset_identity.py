"""dataset.json: schema 1 is read for good, newer minor versions too, and the generator's log p is named, not guessed."""

import json

import pytest

from data_pipelines.events import prepare_events
from data_pipelines.synthetic import prepare_synthetic
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.format import SCHEMA_MINOR, read_identity
from fuxi_torchrec.errors import UserError

# As the first release wrote it.
SCHEMA_1_0 = """{
  "name": "synthetic-3-9",
  "num_users": 3,
  "num_items": 9,
  "num_events": 8,
  "catalogue": "all",
  "time_unit": 1.0,
  "min_timestamp": 1010836627,
  "max_timestamp": 1025995969,
  "max_events_per_user": 3,
  "source": "synthetic",
  "source_checksum": "",
  "content_checksum": "sha256:824c33cf8daeb728cd69cefe0f0be215afe923df2d17e62bea38bde79e2b0d53",
  "columns": ["log_probs"],
  "report": {"single_event_users": 0},
  "generator": {"kind": "clustered_power_law", "items": 9, "events_per_user": 4, "clusters": 3, "seed": 0},
  "schema_version": 1
}
"""


def identity_of(tmp_path, text=SCHEMA_1_0, drop=(), **changes):
    values = {key: value for key, value in {**json.loads(text), **changes}.items() if key not in drop}
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    return read_identity(str(tmp_path))


def test_a_data_set_of_schema_1_is_read_for_good(tmp_path):
    (tmp_path / "dataset.json").write_text(SCHEMA_1_0)
    identity = read_identity(str(tmp_path))
    assert (identity.num_users, identity.num_items, identity.num_events) == (3, 9, 8)
    assert identity.content_checksum.startswith("sha256:824c33cf")


def test_keys_with_a_default_may_be_missing(tmp_path):
    identity = identity_of(tmp_path, drop=("columns", "report", "generator"))
    assert (identity.columns, identity.report, identity.generator) == ([], {}, {})


def test_unknown_keys_of_a_newer_minor_version_are_passed_over(tmp_path):
    identity = identity_of(tmp_path, schema_minor=SCHEMA_MINOR + 1, holidays={"1": "New Year"})
    assert identity.num_users == 3
    (tmp_path / "dataset.json").write_text(identity.to_json())  # as a run folder keeps it
    assert read_identity(str(tmp_path)) == identity


@pytest.mark.parametrize(
    "drop, changes, words",
    [
        ((), {"schema_version": 2, "holidays": 3}, ["schema version 2", "reads version 1", "update fuxi_torchrec"]),
        ((), {"schema_version": 0}, ["schema version 0", "prepare the data set again"]),
        (("num_items",), {}, ["num_items is missing"]),
        ((), {"colums": []}, ["unknown key colums"]),
        ((), {"num_items": "9"}, ["num_items cannot be '9'"]),
        ((), {"time_unit": None}, ["time_unit cannot be None"]),
        ((), {"schema_minor": "new"}, ["schema_minor cannot be 'new'"]),
    ],
)
def test_a_newer_major_version_and_wrong_keys_are_refused_in_one_line(tmp_path, drop, changes, words):
    with pytest.raises(UserError) as caught:
        identity_of(tmp_path, drop=drop, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ["dataset.json", *words]), message


def test_a_file_that_is_no_identity_is_refused(tmp_path):
    for text in ("[]", "3", "{", ""):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="not a data set's identity"):
            read_identity(str(tmp_path))


def test_synthetic_data_name_the_column_of_their_log_probabilities(tmp_path):
    identity = prepare_synthetic(str(tmp_path / "new"), users=20, items=30, events_per_user=5, clusters=4)
    assert identity.log_prob_column == "log_probs"
    dataset = SequenceDataset(str(tmp_path / "new"))
    assert dataset.has_log_probs
    assert dataset.read(dataset.row_groups[0], log_probs=True).log_probs_E.max() < 0


def test_synthetic_data_of_schema_1_0_keep_their_floor(tmp_path):
    prepare_synthetic(str(tmp_path / "old"), users=20, items=30, events_per_user=5, clusters=4)
    path = tmp_path / "old" / "dataset.json"
    values = json.loads(path.read_text())
    kept = {key: values[key] for key in json.loads(SCHEMA_1_0)}  # the keys of then
    path.write_text(json.dumps(kept))
    dataset = SequenceDataset(str(tmp_path / "old"))
    assert dataset.has_log_probs
    assert dataset.read(dataset.row_groups[0], log_probs=True).log_probs_E is not None


def test_a_users_own_column_called_log_probs_is_a_column_like_any_other(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time,log_probs\n1,1,1,abc\n1,2,2,de\n")
    columns = ("user", "item", "time")
    identity = prepare_events([str(tmp_path / "log.csv")], *columns, str(tmp_path / "out"), extra_columns=["log_probs"])
    assert identity.columns == ["log_probs"]
    dataset = SequenceDataset(str(tmp_path / "out"))
    assert not dataset.has_log_probs
    assert dataset.read(dataset.row_groups[0], log_probs=dataset.has_log_probs).log_probs_E is None
    old = json.loads((tmp_path / "out" / "dataset.json").read_text())
    old.pop("schema_minor"), old.pop("log_prob_column")
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(old))
    assert not SequenceDataset(str(tmp_path / "out")).has_log_probs
