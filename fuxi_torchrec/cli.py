"""The command line. Each command builds only its own parser, and imports torch only once its arguments are right."""

import errno
import os
import sys
import time
from typing import Any, Callable, Dict, List, Optional

from fuxi_torchrec import __version__
from fuxi_torchrec.errors import LostProcess, UserError

COMMANDS = {
    "prepare": "raw data (MovieLens, event logs, synthetic) -> a data set folder",
    "train": "train a config on a data set, into a run folder",
    "plan": "how a table would be cut over a cluster: memory, traffic, and whether it fits",
    "bench": "time training steps by stage, encoder and length",
    "evaluate": "rank a split's targets with a run's saved model",
    "recommend": "top-k items for users, or for a history given by hand",
    "import-reference": "a checkpoint of the authors' research code -> a run folder",
    "export-reference": "a run's saved model -> a checkpoint that the research code can load",
}
# Errors of the place that is written to: the user's to mend, wherever they surface.
BEYOND_OUR_CONTROL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 another process was lost, 2 the user's mistake (one line, no traceback),
    128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Before torch is imported: its C++ side would warn on every rank of what is as it should be (a search for unused
    # parameters that found none). Set it to WARNING to see all.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fuxi-torchrec {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    handlers: Dict[str, Callable[[List[str]], int]] = {
        "prepare": _prepare,
        "train": _train,
        "plan": _plan,
        "bench": _bench,
        "evaluate": _evaluate,
        "recommend": _recommend,
        "import-reference": _import_reference,
        "export-reference": _export_reference,
    }
    try:
        if command not in handlers:
            raise UserError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        return handlers[command](rest)
    except UserError as error:
        return _complain(str(error), error.told)
    except LostProcess as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in BEYOND_OUR_CONTROL:
            raise
        return _complain(f"{error.filename or 'writing'}: {error.strerror}; make room or choose another --output")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _complain(message: str, told: bool = False) -> int:
    """One line on standard error, from one rank."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and not told:
        # Before the ranks are joined: torchrun ends this one meanwhile if rank 0 made the same mistake and said so.
        time.sleep(3)
        message = f"rank {rank}: {message}"
    if not told:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _overview() -> str:
    lines = [f"  {name:<16} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: fuxi-torchrec COMMAND …", "", "FuXi-β generative recommenders on sharded embedding tables.", ""]
        + [*lines, "", "fuxi-torchrec COMMAND --help tells a command's options."]
    )


def _prepare(arguments: List[str]) -> int:
    from data_pipelines.cli import add_subcommands, run
    from fuxi_torchrec.config_io import OneLineParser

    parser = OneLineParser(prog="fuxi-torchrec prepare", description="Raw data to a data set folder.")
    add_subcommands(parser)
    options = parser.parse_args(arguments)
    run(options.kind, options[options.kind])
    return 0


def _train(arguments: List[str]) -> int:
    from fuxi_torchrec.config_io import OneLineParser, add_config_arguments, parse_config, to_yaml

    parser = OneLineParser(
        prog="fuxi-torchrec train",
        usage="fuxi-torchrec train CONFIG.yaml [--data.path DIR] [--output RUN_DIR] [--section.key value …]",
        description="Trains the run that CONFIG.yaml describes; every key can be overridden by a dotted option.",
    )
    parser.add_argument("--output", type=str, default=None, help="Run folder; default runs/<config's name>.")
    parser.add_argument("--resume", action="store_true", help="Go on from the run folder's last checkpoint, if any.")
    parser.add_argument("--profile", action="store_true", help="Write a trace of some early steps to RUN_DIR/profile/.")
    parser.add_argument("--print-config", action="store_true", help="Print the resolved config as YAML and stop.")
    add_config_arguments(parser)
    if any(argument in ("-h", "--help") for argument in arguments):
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise UserError("train: name a config first, as in 'fuxi-torchrec train configs/smoke/fuxi-beta.yaml'")
    path, *options = arguments
    config, namespace = parse_config(parser, path, options)
    if namespace.print_config:
        print(to_yaml(config), end="")
        return 0
    if not config.data.path:
        raise UserError("data.path: no data set named; give --data.path DIR (made by 'fuxi-torchrec prepare')")
    output = namespace.output or os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
    return _run_training(config, output, namespace.resume, namespace.profile)


def _run_training(config: Any, output: str, resume: bool, profile: bool) -> int:
    from fuxi_torchrec.config_check import check_table
    from fuxi_torchrec.data_format import read_identity

    if "://" not in config.data.path:
        config.data.path = os.path.abspath(config.data.path)
    read_identity(config.data.path)  # before the seconds that importing torch takes
    from fuxi_torchrec.versions import check_environment

    check_environment(config.trainer.device)
    from fuxi_torchrec.compiling import check_compiler
    from fuxi_torchrec.dataset import SequenceDataset, check_enough_data, check_splits
    from fuxi_torchrec.faults import Interrupted, check_same_start, fail_together
    from fuxi_torchrec.outcome import recorded_outcome
    from fuxi_torchrec.sharding import device_type, start_world
    from fuxi_torchrec.training import Trainer

    trainer = config.trainer
    check_table(config, device_type(trainer.device))
    if trainer.compile:
        check_compiler(device_type(trainer.device))
    world_of_all = start_world(trainer.device, trainer.timeout_minutes)
    with recorded_outcome() as outcome, world_of_all as world, fail_together(world):
        dataset = SequenceDataset(config.data.path)
        check_same_start(world, config.to_dict(), output, dataset.identity.content_checksum)
        check_enough_data(dataset, world.size)
        check_splits(dataset, config.data)
        run, resume = _start_run(output, config, dataset, resume, world)
        if world.is_main:
            outcome.begin(run)
        training = Trainer(config, dataset, run, world, resume, profile)
        try:
            results = training.fit()
        except Interrupted as stopped:
            outcome.end("interrupted", str(stopped))
            if world.is_main:
                print(f"{stopped} (saved in {output})", file=sys.stderr)
            return stopped.code
        if world.is_main:
            outcome.end("finished", **training.counted())
            _print_splits(results, dataset, config, output)
    return 0


def _start_run(output: str, config: Any, dataset: Any, resume: bool, world: Any) -> Any:
    """The run's folder, which rank 0 makes, and whether the run is resumed."""
    from fuxi_torchrec.run_folder import RunFolder

    run = RunFolder(output)
    if world.is_main:
        run, resume = RunFolder.start(output, config, dataset.identity, resume)
    return run, world.from_main(resume)


def _plan(arguments: List[str]) -> int:
    from fuxi_torchrec.plan_command import plan

    return plan(arguments)


def _bench(arguments: List[str]) -> int:
    from fuxi_torchrec.bench_command import bench

    return bench(arguments)


def _import_reference(arguments: List[str]) -> int:
    from fuxi_torchrec.reference_command import import_reference

    return import_reference(arguments)


def _export_reference(arguments: List[str]) -> int:
    from fuxi_torchrec.reference_command import export_reference

    return export_reference(arguments)


def _evaluate(arguments: List[str]) -> int:
    from fuxi_torchrec.config_io import OneLineParser
    from fuxi_torchrec.saved_options import add_model_options, saved_model

    parser = OneLineParser(prog="fuxi-torchrec evaluate", description="Ranks every user's target by a saved model.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--split", type=str, default="test", help="test, or validation where the run's split has one.")
    add_model_options(parser)
    parser.add_argument("--output", type=str, default=None, help="Also write the metrics to this JSON file.")
    options = parser.parse_args(arguments)
    with saved_model(options) as saved:
        from fuxi_torchrec.config import evaluation_splits
        from fuxi_torchrec.evaluation import evaluate, popularity

        splits = evaluation_splits(saved.config.data)
        if options.split not in splits:
            raise UserError(f"--split {options.split}: this run's data.split has {' and '.join(splits)}")
        metrics = evaluate(saved.model, saved.dataset, saved.config, options.split, saved.world)
        if not saved.world.is_main:
            return 0
        line = {"split": options.split, "step": saved.step, "epoch": saved.epoch, "checkpoint": options.checkpoint}
        results = {options.split: metrics}
        results[f"popularity {options.split}"] = popularity(saved.dataset, saved.config, options.split)
        _print_splits(results, saved.dataset, saved.config, options.run)
        try:
            saved.run.append({**line, **metrics, "command": "evaluate"})
        except OSError as error:  # somebody else's run may be evaluated
            print(f"not added to {options.run}'s metrics.jsonl: {error.strerror}", file=sys.stderr)
        if options.output:
            import json

            from fuxi_torchrec.run_folder import write_aside

            _write(options.output, lambda: write_aside(options.output, json.dumps({**line, **metrics}, indent=2) + "\n"))
    return 0


def _recommend(arguments: List[str]) -> int:
    from fuxi_torchrec.config_io import OneLineParser
    from fuxi_torchrec.saved_options import add_model_options, saved_model

    parser = OneLineParser(prog="fuxi-torchrec recommend", description="Top-k items, seen ones left out.")
    parser.add_argument("run", type=str, help="Run folder.")
    parser.add_argument("--users", type=str, default=None, help="User ids of the data set, 1,2,3.")
    parser.add_argument("--history", type=str, default=None, help="Item ids, oldest first: item,item or item@time,….")
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
    with saved_model(options) as saved:
        from fuxi_torchrec import recommend as rec

        requested = None if options.at is None else rec.to_int64(options.at, "--at")
        catalogue = rec.Catalogue(saved.dataset)
        if options.users is not None:
            requests = rec.user_requests(saved.dataset, [user.strip() for user in options.users.split(",")])
        else:
            at = saved.dataset.identity.max_timestamp if requested is None else requested
            requests = [rec.history_request(options.history, catalogue, at)]
        scores, items = rec.recommend(
            saved.model, saved.dataset, saved.config, saved.world, requests, options.k, requested, options.include_seen
        )
        table = rec.to_table(requests, scores, items, catalogue)
        if not saved.world.is_main:
            return 0
    if options.output:
        import pyarrow.parquet as pq

        from fuxi_torchrec.run_folder import file_aside

        def write() -> None:
            with file_aside(options.output) as aside:
                pq.write_table(table, aside)

        _write(options.output, write)
        print(f"{table.num_rows} recommendations written to {options.output}")
    else:
        from fuxi_torchrec.progress import print_recommendations

        print_recommendations(table)
    return 0


def _write(path: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _print_splits(results: Dict[str, Any], dataset: Any, config: Any, run: str) -> None:
    from fuxi_torchrec.progress import print_results

    for split in [name for name in results if " " not in name]:
        rows = {config.model.encoder: results[split], "popularity": results[f"popularity {split}"]}
        identity = dataset.identity
        title = (
            f"{identity.name}: {split} of {config.data.split}, {results[split]['users']:,} users against all "
            f"{identity.num_items:,} items (catalogue: {identity.catalogue}), seen ones left out. Run: {run}"
        )
        print_results(rows, title)


if __name__ == "__main__":
    sys.exit(main())
