"""`fuxi-torchrec recommend`."""

from typing import TYPE_CHECKING, List, Optional

from fuxi_torchrec.cli.id_list import split_ids
from fuxi_torchrec.cli.output import write_output
from fuxi_torchrec.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from pyarrow import Table


def recommend_command(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec recommend`; returns its exit code."""
    from fuxi_torchrec.cli.options import saved_model

    options = _parse(arguments)
    with saved_model(options) as saved:
        from fuxi_torchrec.evaluation import recommend as rec

        requested = None if options.at is None else rec.to_int64(options.at, "--at")
        catalogue = rec.Catalogue(saved.dataset)
        if options.users is not None:
            requests = rec.user_requests(saved.dataset, split_ids(options.users))
        else:
            at = saved.dataset.identity.max_timestamp if requested is None else requested
            requests = [rec.history_request(split_ids(options.history), catalogue, at)]
        scores, items = rec.recommend(
            saved.model,
            saved.dataset,
            saved.config.data,
            saved.config.loss,
            saved.world,
            requests,
            options.k,
            requested,
            options.include_seen,
        )
        if not saved.world.is_main:
            return 0
        table = rec.to_table(requests, scores, items, catalogue)
    _show(table, options.output)
    return 0


def _parse(arguments: List[str]) -> "Namespace":
    from fuxi_torchrec.cli.options import add_model_options
    from fuxi_torchrec.config.parsing import OneLineParser

    parser = OneLineParser(prog="fuxi-torchrec recommend", description="Top-k items, seen ones left out.")
    parser.add_argument("run", type=str, help="Run folder.")
    quoted = "an id with a comma or with spaces around it in double quotes, as in CSV."
    parser.add_argument("--users", type=str, default=None, help=f"User ids of the data set, 1,2,3; {quoted}")
    history = f"Item ids, oldest first: item,item or item@time,…; {quoted}"
    parser.add_argument("--history", type=str, default=None, help=history)
    parser.add_argument("--k", type=int, default=10, help="Items a user.")
    parser.add_argument("--at", type=str, default=None, help="Request time in ticks; default: the data set's newest.")
    parser.add_argument("--include-seen", action="store_true", help="Recommend items of the history too.")
    add_model_options(parser)
    parser.add_argument("--output", type=str, default=None, help="Write to this Parquet file instead of printing.")
    options = parser.parse_args(arguments)
    if (options.users is None) == (options.history is None):
        raise UserError("recommend: give either --users or --history")
    if options.k < 1:
        raise UserError(f"--k: {options.k} must be at least 1")
    return options


def _show(table: "Table", output: Optional[str]) -> None:
    """Writes the recommendations to a Parquet file, or prints them."""
    if not output:
        from fuxi_torchrec.run.reporting import print_recommendations

        return print_recommendations(table)
    import pyarrow.parquet as pq

    from fuxi_torchrec.files import file_aside

    def write() -> None:
        with file_aside(output) as aside:
            pq.write_table(table, aside)

    write_output(output, write)
    print(f"{table.num_rows} recommendations written to {output}")
