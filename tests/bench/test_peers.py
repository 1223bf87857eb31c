"""The comparison with other libraries: the events that all of them get, and the page."""

import csv
import json

from benchmarks.peers.__main__ import padded, training_histories, write_events
from benchmarks.peers.page import write_page
from fuxi_torchrec.data.dataset import SequenceDataset


def test_all_train_on_the_same_events_and_are_asked_for_the_last_one(small_dataset, tmp_path):
    dataset = SequenceDataset(small_dataset)
    write_events(dataset, str(tmp_path))
    events, targets = (list(csv.DictReader(open(tmp_path / name))) for name in ("events.csv", "targets.csv"))
    assert len(targets) == len({row["user"] for row in targets})
    newest = {row["user"]: int(row["time"]) for row in events}  # a user's events come in order
    asked = [row for row in targets if row["user"] in newest]
    assert all(int(row["time"]) >= newest[row["user"]] for row in asked)
    counted = sum(len(events) - 1 for events in (h[0] for h in training_histories(dataset)))
    users = padded(training_histories(dataset)[:5])
    assert counted > 0 and users.ids_BN.min() == 0 and int(users.lengths_B.max()) < 200
    # One event before the last one is nothing to be trained on, and one event of all nothing to be asked for.
    untrained = len(targets) - len(asked) + dataset.identity.num_users - len(targets)
    assert dataset.identity.num_events == len(targets) + len(events) + untrained


def test_the_page_has_seconds_of_an_epoch_and_quality_by_the_minute(tmp_path, capsys):
    found = {
        "FuXi-β": [{"seconds": 60.0, "epochs": 6.0, "ndcg@10": 0.1, "hr@10": 0.2}],
        "other": [{"seconds": 60.0, "epochs": 0.5, "ndcg@10": 0.01, "hr@10": 0.02}],
    }
    write_page(str(tmp_path), found, 170.0, 128)
    page = (tmp_path / "peers.md").read_text()
    assert "| FuXi-β | 10.0 | 6.0 | 0.1000 | 0.2000 |" in page and "| other | 120.0 |" in page and "170.0" in page
    assert json.loads((tmp_path / "peers.json").read_text())["runs"] == found and (tmp_path / "peers.png").stat().st_size
    assert "FuXi-β" in capsys.readouterr().out
