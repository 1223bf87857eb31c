"""Which events each split shows: docs/data.md's three splits, on users of every length."""

import numpy as np
import pytest

from fuxi_torchrec.config import DataConfig
from fuxi_torchrec.data.dataset import UserRows, ranges
from fuxi_torchrec.data.splits import windows


def rows_of(*times_per_user):
    lengths = [len(times) for times in times_per_user]
    events = sum(lengths)
    return UserRows(
        user_ids_U=np.arange(len(lengths)) + 100,
        offsets_U1=np.cumsum([0, *lengths]),
        item_ids_E=np.arange(events),
        timestamps_E=np.array([time for times in times_per_user for time in times], dtype=np.int64),
    )


def shown(rows, config, split):
    kept = windows(rows, config, split)
    return {
        int(user): rows.item_ids_E[start:stop].tolist()
        for user, start, stop in zip(kept.user_ids_U, kept.start_U, kept.stop_U)
    }


def test_leave_one_out_tests_on_the_last_event_and_trains_on_the_rest():
    rows = rows_of([1, 2, 3, 4], [1], [1, 2])  # items 0-3, 4, 5-6
    config = DataConfig(split="leave_one_out")
    assert shown(rows, config, "train") == {100: [0, 1, 2]}
    assert shown(rows, config, "test") == {100: [0, 1, 2, 3], 102: [5, 6]}  # a single event predicts nothing


def test_leave_two_out_keeps_the_event_before_last_for_validation():
    rows = rows_of([1, 2, 3, 4], [1], [1, 2], [])
    config = DataConfig(split="leave_two_out")
    assert shown(rows, config, "train") == {100: [0, 1]}
    assert shown(rows, config, "validation") == {100: [0, 1, 2]}
    assert shown(rows, config, "test") == {100: [0, 1, 2, 3], 102: [5, 6]}


def test_temporal_split_lets_no_training_event_reach_the_cut_off():
    rows = rows_of([1, 2, 10, 11, 20, 21], [1, 2, 3], [20, 21], [1, 20])  # items 0-5, 6-8, 9-10, 11-12
    config = DataConfig(split="temporal", temporal_cutoffs=[10, 20])
    assert shown(rows, config, "train") == {100: [0, 1], 101: [6, 7, 8]}
    assert shown(rows, config, "validation") == {100: [0, 1, 2]}
    # The target is the first event of the period; user 102 has no history before it.
    assert shown(rows, config, "test") == {100: [0, 1, 2, 3, 4], 103: [11, 12]}


def test_windows_hold_the_newest_events_and_their_target():
    rows = rows_of(range(300))
    config = DataConfig(max_sequence_length=200)
    assert shown(rows, config, "train")[100] == list(range(98, 299))  # 201 events: 200 supervised positions
    assert shown(rows, config, "test")[100] == list(range(99, 300))  # 200 of history and the target


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [1, 1]])
def test_ranges_lays_intervals_end_to_end(lengths):
    starts = np.arange(len(lengths)) * 10
    expected = [start + i for start, length in zip(starts, lengths) for i in range(length)]
    assert ranges(starts, starts + np.array(lengths, dtype=np.int64)).tolist() == expected
