"""Synthetic data sets of any size with a known floor (generator.py), streamed to disk."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Deque, Iterator

import numpy as np
import pyarrow as pa

from data_pipelines.generator import Block, Catalogue, Generator, generate_block
from data_pipelines.output import OutputFolder
from data_pipelines.writer import Sequences, SequenceWriter
from fuxi_torchrec.data.format import LOG_PROBS_COLUMN, DatasetIdentity
from fuxi_torchrec.errors import UserError


def prepare_synthetic(
    output: str, users: int, items: int, events_per_user: int, overwrite: bool = False, **parameters: Any
) -> DatasetIdentity:
    """Makes the data set `output` of `users` generated users. `parameters`: further fields of `Generator`.

    Each event's natural-log probability is in the aligned float64 column `log_probs`; items.parquet has two further
    int64 columns, `cluster` and `popularity_rank` (0: the most popular; the rank within the cluster is
    popularity_rank // clusters); dataset.json's `generator` has every parameter. The files depend on the parameters
    alone, and the first users are the same whatever `users` is.

    Raises UserError for parameters that don't fit together.
    """
    law = Generator(items=items, events_per_user=events_per_user, **parameters)
    if users < 1:
        raise UserError("--users: must be at least 1")
    catalogue = Catalogue(law)
    first_user = 0
    with OutputFolder(output, overwrite) as folder, SequenceWriter(folder, users, items) as writer:
        for block in blocks(law, catalogue, users):
            writer.write(_to_sequences(block, catalogue, first_user))
            first_user += len(block.lengths)
        columns = {
            "cluster": pa.array(catalogue.rank_of_item % law.clusters),
            "popularity_rank": pa.array(catalogue.rank_of_item),
        }
        writer.write_items(pa.array(np.arange(items)), extras=columns)
        return writer.finish(
            {},
            name=f"synthetic-{users}-{items}",
            catalogue="all",
            time_unit=1.0,
            source="synthetic",
            source_checksum="",
            generator=law.to_dict(),
            log_prob_column=LOG_PROBS_COLUMN,
        )


def blocks(law: Generator, catalogue: Catalogue, users: int) -> Iterator[Block]:
    """Yields the blocks of the first `users` users, in order, made by a thread per core: numpy lets go of Python's
    lock."""
    workers = os.cpu_count() or 1
    sizes = [min(law.block_users, users - first) for first in range(0, users, law.block_users)]
    with ThreadPoolExecutor(workers) as pool:
        pending: Deque[Future[Block]] = deque()
        try:
            for index, size in enumerate(sizes):
                pending.append(pool.submit(generate_block, law, catalogue, index, size))
                if len(pending) > workers:  # no further ahead than that, for memory's sake
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _to_sequences(block: Block, catalogue: Catalogue, first_user: int) -> Sequences:
    return Sequences(
        np.arange(first_user, first_user + len(block.lengths)),
        np.concatenate([[0], np.cumsum(block.lengths)]),
        catalogue.item_of_rank[block.ranks],
        block.timestamps,
        {LOG_PROBS_COLUMN: pa.array(block.log_probs)},
    )
