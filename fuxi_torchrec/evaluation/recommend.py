"""Top-k recommendations for users of the data set, or for a history given by hand, at a request time.

Shape suffixes: B users, k recommendations.
"""

import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from fuxi_torchrec.config import DataConfig, LossConfig
from fuxi_torchrec.data.batch import collate
from fuxi_torchrec.data.dataset import SequenceDataset, UserRows, concatenate
from fuxi_torchrec.data.splits import Windows
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.evaluation import full_ranking
from fuxi_torchrec.ops.ranking import Seen


@dataclass
class Request:
    """A user whose next items are wanted: a label to print, and the events so far (dense item ids, int64 ticks)."""

    label: str
    item_ids: np.ndarray
    timestamps: np.ndarray


class Catalogue:
    """The catalogue's two numberings: dense item ids to the source's ids and titles, and back. Each answer is a pass
    over items.parquet: what is held is what was asked for."""

    def __init__(self, dataset: SequenceDataset):
        self.dataset = dataset

    def dense_ids(self, source_ids: Sequence[str]) -> Dict[str, int]:
        """Finds items by the source's ids, numbers as text: {source id: dense id} of those that there are."""
        asked = pc.field("source_id").cast(pa.string()).isin(pa.array(source_ids, pa.string()))
        found = self.dataset.items(["source_id"], where=asked)
        return dict(zip(map(str, found["source_id"].to_pylist()), found["item_id"].to_pylist()))

    def describe(self, dense_ids: np.ndarray) -> pa.Table:
        """Reads source_id and title of some items, a row for each of dense_ids (int64), in their order."""
        asked, row_of_asked = np.unique(dense_ids, return_inverse=True)
        found = self.dataset.items(["source_id", "title"], where=pc.field("item_id").isin(pa.array(asked, pa.int64())))
        return found.take(row_of_asked)


def to_int64(text: str, what: str) -> int:
    """Parses an integer in plain digits. Raises UserError, naming `what`, for text that is no int64."""
    if not re.fullmatch(r"\s*-?[0-9]{1,19}\s*", text) or not -(2**63) <= int(text) < 2**63:
        raise UserError(f"{what}: {text!r} is not an integer of 64 bits")
    return int(text)


def history_request(asked: Sequence[str], catalogue: Catalogue, at: int) -> Request:
    """A history of the source's item ids, "item" or "item@time", oldest first; items without a time happen at `at`."""
    names, events = [part.rpartition("@")[0] for part in asked], []
    dense_ids = catalogue.dense_ids([*asked, *names, *(name.strip() for name in names)])
    for part in asked:
        item, mark, when = (part, "", "") if part in dense_ids else part.rpartition("@")
        if not mark:
            item = part
        elif item not in dense_ids:
            item = item.strip()
        if item not in dense_ids:
            items = catalogue.dataset.identity.num_items
            raise UserError(f"item {item!r} is not in the catalogue of {items} items")
        time = to_int64(when, f"--history: the time of item {item!r}") if mark else at
        events.append((dense_ids[item], time))
    events.sort(key=lambda event: event[1])  # stable
    return Request("history", np.array([e[0] for e in events]), np.array([e[1] for e in events]))


def user_requests(dataset: SequenceDataset, users: Sequence[str]) -> List[Request]:
    """Reads requests of users of the data set, in the order asked for, by the source's user ids, with all their
    events. Raises UserError for an unknown user."""
    ids = _user_ids(dataset, users)
    wanted = np.array(sorted(set(ids.values())))
    found: Dict[int, Tuple[np.ndarray, np.ndarray]] = {}
    for group in dataset.row_groups:
        if len(found) == len(wanted):
            break
        rows = dataset.read(group)
        for row in np.flatnonzero(np.isin(rows.user_ids_U, wanted)):
            events = slice(rows.offsets_U1[row], rows.offsets_U1[row + 1])
            found[int(rows.user_ids_U[row])] = (rows.item_ids_E[events].copy(), rows.timestamps_E[events].copy())
    missing = [user for user in users if ids[user] not in found]
    if missing:
        raise UserError(f"user {missing[0]!r} is not among the {dataset.identity.num_users} users of {dataset.folder}")
    return [Request(user, *found[ids[user]]) for user in users]


def _user_ids(dataset: SequenceDataset, users: Sequence[str]) -> Dict[str, int]:
    ids = dataset.user_ids(users)
    if ids is None:
        ids = {user: to_int64(user, "--users") for user in users}
    for user in users:
        if user not in ids:
            raise UserError(f"user {user!r} is not among the {dataset.identity.num_users} users of {dataset.folder}")
    return ids


def recommend(
    model: nn.Module,
    dataset: SequenceDataset,
    data: DataConfig,
    loss: LossConfig,
    world: World,
    requests: Sequence[Request],
    k: int,
    at: Optional[int] = None,
    include_seen: bool = False,
) -> Tuple[np.ndarray, np.ndarray]:
    """Recommends items: returns scores (float32 [B, k], logits) and dense item ids (int64 [B, k], −1 where the
    catalogue has no more items).

    Args:
        requests: at least one event each; the encoder sees the last max_sequence_length of them, but all of them count
            as seen.
        at: request time in ticks; None: the data set's newest timestamp (or a request's own newest, if later).
        include_seen: recommend items of the history too.
    """
    rows, ends_B = _rows_with_request(requests, dataset.identity.max_timestamp if at is None else at, explicit=at is not None)
    starts_B = np.maximum(rows.offsets_U1[:-1], ends_B - data.max_sequence_length - 1)
    batch = collate(rows, Windows(rows.user_ids_U, starts_B, ends_B)).to(world.device)
    model.eval()
    with torch.no_grad():  # fbgemm's fused tables know no inference mode
        query_BD = model(batch)
        seen = _seen(requests, world.device) if not include_seen else Seen(*torch.empty(2, 0, dtype=torch.int64))
        k = min(k, dataset.identity.num_items)
        scores_Bk, items_Bk = full_ranking.top_items(model, world, query_BD, seen, k, loss.l2_eps)
    items_Bk = torch.where(torch.isneginf(scores_Bk), -1, items_Bk)
    return (scores_Bk / loss.temperature).cpu().numpy(), items_Bk.cpu().numpy()


def _rows_with_request(requests: Sequence[Request], at: int, explicit: bool) -> Tuple[UserRows, np.ndarray]:
    """Each history with one more event: the request, at its time; its item is never looked at."""
    parts = []
    for index, request in enumerate(requests):
        newest = int(request.timestamps.max())
        if explicit and at < newest:
            raise UserError(f"--at: {at} lies before the newest event of {request.label}, {newest}")
        times = np.concatenate([request.timestamps, [max(at, newest)]]).astype(np.int64)
        items = np.concatenate([request.item_ids, [0]]).astype(np.int64)
        parts.append(UserRows(np.array([index]), np.array([0, len(items)]), items, times))
    rows = concatenate(parts)
    return rows, rows.offsets_U1[1:]


def _seen(requests: Sequence[Request], device: torch.device) -> Seen:
    queries = np.repeat(np.arange(len(requests)), [len(request.item_ids) for request in requests])
    items = np.concatenate([request.item_ids for request in requests]).astype(np.int64)
    return Seen(torch.from_numpy(queries).to(device), torch.from_numpy(items).to(device))


def to_table(requests: Sequence[Request], scores_Bk: np.ndarray, items_Bk: np.ndarray, catalogue: Catalogue) -> pa.Table:
    """Makes a table of recommendations: columns user (string), rank (int32, from 1), item_id (the source's), dense_id
    int64, title, score float32."""
    found = items_Bk >= 0
    user_index, rank = np.nonzero(found)
    described = catalogue.describe(items_Bk[found])
    return pa.table(
        {
            "user": pa.array([requests[i].label for i in user_index.tolist()], pa.string()),
            "rank": pa.array(rank + 1, pa.int32()),
            "item_id": described["source_id"],
            "dense_id": described["item_id"],
            "title": described["title"].fill_null(""),
            "score": pa.array(scores_Bk[found], pa.float32()),
        }
    )
