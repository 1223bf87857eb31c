"""`fuxi-torchrec train`."""

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, List, Tuple

from fuxi_torchrec.cli.options import add_verify_option
from fuxi_torchrec.cli.output import print_splits
from fuxi_torchrec.errors import UserError

if TYPE_CHECKING:
    from fuxi_torchrec.config import Config
    from fuxi_torchrec.data.dataset import SequenceDataset
    from fuxi_torchrec.distributed.world import World
    from fuxi_torchrec.run.folder import RunFolder

LESS_MEMORY = (
    "lower data.batch_size, data.max_sequence_length, loss.num_negatives, loss.chunk_logits or the model's sizes, or set "
    "trainer.activation_checkpointing"
)


def train_command(arguments: List[str]) -> int:
    """Runs `fuxi-torchrec train`; returns its exit code."""
    from fuxi_torchrec.config.parsing import OneLineParser, add_config_arguments, parse_config, to_yaml

    parser = OneLineParser(
        prog="fuxi-torchrec train",
        usage="fuxi-torchrec train CONFIG.yaml [--data.path DIR] [--output RUN_DIR] [--section.key value …]",
        description="Trains the run that CONFIG.yaml describes; every key can be overridden by a dotted option.",
    )
    parser.add_argument("--output", type=str, default=None, help="Run folder; default runs/<config's name>.")
    parser.add_argument("--resume", action="store_true", help="Go on from the run folder's last checkpoint, if any.")
    parser.add_argument("--profile", action="store_true", help="Write a trace of some early steps to RUN_DIR/profile/.")
    add_verify_option(parser)
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
    return _run_training(config, output, namespace.resume, namespace.profile, namespace.verify)


def _run_training(config: "Config", output: str, resume: bool, profile: bool, verify: bool) -> int:
    from fuxi_torchrec.config.parsing import make_paths_absolute
    from fuxi_torchrec.config.rules import check_table
    from fuxi_torchrec.data.format import read_identity

    make_paths_absolute(config)
    read_identity(config.data.path)  # before the seconds that importing torch takes
    from fuxi_torchrec.versions import check_environment

    check_environment(config.trainer.device)
    from torch.distributed.elastic.multiprocessing.errors import record

    from fuxi_torchrec.distributed.world import device_type
    from fuxi_torchrec.training.compile import check_compiler

    trainer = config.trainer
    check_table(config, device_type(trainer.device))
    if trainer.compile:
        check_compiler(device_type(trainer.device))
    return record(_train_together)(config, output, resume, profile, verify) or 0


def _train_together(config: "Config", output: str, resume: bool, profile: bool, verify: bool) -> int:
    """Trains among all processes; whatever escapes is recorded in the run's outcome, and for torchrun by `record`."""
    from fuxi_torchrec.data.dataset import SequenceDataset, check_enough_data
    from fuxi_torchrec.data.splits import check_splits
    from fuxi_torchrec.distributed.failures import Interrupted, check_same_start, fail_together
    from fuxi_torchrec.distributed.world import start_world
    from fuxi_torchrec.profiling.flight_recorder import FlightRecorder
    from fuxi_torchrec.profiling.memory import keep_freed_memory, out_of_memory_as_user_error
    from fuxi_torchrec.profiling.memory_snapshot import MemorySnapshot
    from fuxi_torchrec.run.outcome import recorded_outcome
    from fuxi_torchrec.sharding.memory_check import check_training_memory
    from fuxi_torchrec.training.build import build_trainer

    recorder = FlightRecorder(config.trainer.flight_recorder, output)
    snapshot = MemorySnapshot(config.trainer.memory_snapshot, output)
    world_of_all = start_world(config.trainer.device, config.trainer.timeout_minutes)
    # The folder is given back last: until then its outcome is this run's.
    with (
        ExitStack() as owned,
        recorded_outcome() as outcome,
        world_of_all as world,
        recorder.written_when_lost(world),
        fail_together(world, outcome.fail),
        out_of_memory_as_user_error("training", LESS_MEMORY, lambda: snapshot.path),
    ):
        if world.device.type == "cpu":
            keep_freed_memory()
        dataset = SequenceDataset(config.data.path)
        check_same_start(world, config.to_dict(), output, dataset.identity.content_checksum)
        dataset.check_files(world.rank, world.size, verify)
        check_enough_data(dataset, world.size)
        check_splits(dataset, config.data)
        check_training_memory(config, dataset.identity, world)
        run, resume = _start_run(output, config, dataset, resume, world, owned)
        if world.is_main:
            outcome.begin(run)
        for tool in (recorder, snapshot):
            tool.begin(world)
        training = build_trainer(config, dataset, run, world, resume, profile)
        try:
            results = training.fit()
        except Interrupted as stopped:
            outcome.end("interrupted", str(stopped))
            if world.is_main:
                print(f"{stopped} (saved in {output})", file=sys.stderr)
            return stopped.code
        if world.is_main:
            outcome.end("finished", **training.counted())
            print_splits(results, dataset, config, output)
    return 0


def _start_run(
    output: str, config: "Config", dataset: "SequenceDataset", resume: bool, world: "World", owned: ExitStack
) -> "Tuple[RunFolder, bool]":
    """The run's folder, which rank 0 makes and owns until `owned` is closed, and whether the run is resumed."""
    from fuxi_torchrec.run.folder import RunFolder

    run = RunFolder(output)
    if world.is_main:
        run, resume = RunFolder.start(output, config, dataset.identity, resume, owned)
    return run, world.from_main(resume)
