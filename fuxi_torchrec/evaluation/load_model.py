"""A run's saved model, opened for evaluation or recommendation."""

import dataclasses
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator

from torchrec.distributed.model_parallel import DistributedModelParallel

from fuxi_torchrec.checkpoint.manager import Checkpoints
from fuxi_torchrec.config import Config
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.format import DatasetIdentity, same_data
from fuxi_torchrec.distributed.failures import fail_together
from fuxi_torchrec.distributed.world import World, start_world
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.run.folder import RunFolder
from fuxi_torchrec.run.kernels import use_kernels_of
from fuxi_torchrec.sharding.model_parallel import build_distributed


@dataclass
class SavedModel:
    """A run's saved model, loaded. step, epoch: of its checkpoint."""

    run: RunFolder
    config: Config
    dataset: SequenceDataset
    model: DistributedModelParallel
    world: World
    step: int
    epoch: int


@contextmanager
def open_model(run: RunFolder, config: Config, checkpoint: str, verify: bool = False) -> Iterator[SavedModel]:
    """Loads a checkpoint ("best", "last" or a folder's name) of a run beside the data set it was trained on, whose bytes
    are compared with their checksums first if `verify` is set.

    Raises UserError where the data set is another or a damaged one, or the checkpoint is missing, damaged or of another
    model.
    """
    dataset = SequenceDataset(config.data.path)
    trained_on = run.identity()
    if not same_data(dataset.identity, trained_on):
        raise UserError(
            f"{config.data.path}: not the data set that {run.path} was trained on ({_short(dataset.identity)}, "
            f"there {_short(trained_on)}); name the right one with --data.path"
        )
    if config.table.optimizer == "adam":
        # Nothing is trained here, and a CPU, which can evaluate the model, has no fused adam.
        config = dataclasses.replace(config, table=dataclasses.replace(config.table, optimizer="rowwise_adagrad"))
    with start_world(config.trainer.device, config.trainer.timeout_minutes) as world, fail_together(world):
        dataset.check_files(world.rank, world.size, verify)
        use_kernels_of(run, world, lambda text: print(text, file=sys.stderr, flush=True))
        model, _ = build_distributed(config, dataset.identity, world)
        state = Checkpoints(run.checkpoints, config, dataset.identity.num_items, world).load(checkpoint, model)
        model.eval()
        yield SavedModel(run, config, dataset, model, world, state["step"], state["epoch"])


def _short(identity: DatasetIdentity) -> str:
    return f"content {identity.content_checksum[:15]}, ticks of {identity.time_unit:g} s"
