"""A run's trainer, put together: every rank calls it."""

import sys
from typing import Optional

import torch

from fuxi_torchrec.checkpoint.manager import Checkpoints
from fuxi_torchrec.config import Config
from fuxi_torchrec.config.unused import Resolved, unused_keys
from fuxi_torchrec.data.dataset import SequenceDataset
from fuxi_torchrec.data.loader import TrainingStream, check_same_order, cursor_after
from fuxi_torchrec.data.negative_sampler import NegativeSampler, training_frequency
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.profiling.peak_flops import peak_flops
from fuxi_torchrec.profiling.trace import StepProfile
from fuxi_torchrec.run.folder import KERNELS_FILE, RunFolder, kernels_text
from fuxi_torchrec.run.kernels import choose_kernels
from fuxi_torchrec.run.reporting import Progression
from fuxi_torchrec.sharding.model_parallel import build_distributed
from fuxi_torchrec.sharding.plan import PLAN_FILE, optimizer_identity, plan_record
from fuxi_torchrec.training.compile import compile_blocks
from fuxi_torchrec.training.optimizer import build_optimizer
from fuxi_torchrec.training.step_meter import StepRecord
from fuxi_torchrec.training.train_pipeline import build_pipeline
from fuxi_torchrec.training.train_state import RunState
from fuxi_torchrec.training.trainer import Trainer, TrainingParts


def build_trainer(
    config: Config, dataset: SequenceDataset, run: RunFolder, world: World, resume: bool = False, profile: bool = False
) -> Trainer:
    """Builds a run's trainer, at its first step or where its newest checkpoint stands.

    Args:
        config: a checked Config.
        dataset: the prepared data set.
        run: the run's folder.
        world: this process's place.
        resume: go on from the last checkpoint, if there is one.
        profile: record some early steps for a trace viewer.

    Raises:
        UserError: the table fits no plan, checkpoints of another run are in the way, or those of this one cannot be gone on
            with.
    """
    seed, num_items = config.trainer.seed, dataset.identity.num_items
    kernels = choose_kernels(config, dataset.identity, run, world, resume, lambda text: _report(text, world))
    torch.manual_seed(seed)
    model, table = build_distributed(config, dataset.identity, world)
    if table.note:
        _report(table.note, world)
    _report_unused(config, Resolved(table.is_sharded, world.device.type, world.size), world)
    if config.trainer.compile:
        compile_blocks(model.module.tower.encoder)
    frequency_V = training_frequency(config.loss, config.data, dataset, world)
    sampler = NegativeSampler(config.loss, num_items, seed, world.rank, frequency_V)
    stream = TrainingStream(dataset, config.data, sampler, seed, world.rank, world.size)
    optimizer = build_optimizer(model, config.optimizer, table.rate_ratio)
    plan = plan_record(model.plan, table, num_items, config.model.embedding_dim, world.size)
    extra_files = {PLAN_FILE: plan, KERNELS_FILE: kernels_text(kernels)}
    trained_as = optimizer_identity(model.plan, table)
    checkpoints = Checkpoints(run.checkpoints, config, num_items, world, extra_files, trained_as, run)
    state = RunState(config, dataset.identity.num_users)
    if resume:
        saved = checkpoints.load_newest(model, optimizer, lambda text: _report(text, world))
        _check_resumable(saved, config, dataset, run, world, checkpoints.folder)
        if saved is not None:
            cursor, stream.earlier_cursors = cursor_after(saved, world.rank, world.size)
            state.restore(saved, cursor)
    else:
        checkpoints.refuse_others()
    if world.is_main:
        run.describe(config, dataset.identity)
        run.note_kernels(kernels)
    progression = Progression(run, state.done, state.step, world.is_main)
    parts = TrainingParts(
        model=model,
        optimizer=optimizer,
        pipeline=build_pipeline(config.trainer, model, world.device),
        stream=stream,
        checkpoints=checkpoints,
        record=StepRecord(world, peak_flops(config.trainer, world.device)),
        state=state,
        progression=progression,
        profile=StepProfile(run, progression.report) if profile and world.is_main else None,
    )
    return Trainer(config, dataset, run, world, parts)


def _check_resumable(
    saved: Optional[JsonObject], config: Config, dataset: SequenceDataset, run: RunFolder, world: World, folder: str
) -> None:
    """Raises UserError where a checkpoint's state cannot be gone on with, or checkpoints are lost; forgets on rank 0 what
    the run's records say of later steps. saved: the state, None where no checkpoint was ever completed in `folder`."""
    if saved and saved["dataset"] != dataset.identity.content_checksum:
        raise UserError(f"{run.path}: its checkpoints were made on another data set; name that by --data.path")
    if saved:
        check_same_order(run.path, saved, config)
    if world.is_main:
        if saved is None:
            run.refuse_lost_checkpoints(folder)
        run.forget_after(saved["metrics_bytes"] if saved else 0)


def _report_unused(config: Config, resolved: Resolved, world: World) -> None:
    """Names the keys that were set without any effect, in one line."""
    keys = unused_keys(config, resolved)
    if keys:
        _report(f"not used by this run: {', '.join(keys)}", world)


def _report(text: str, world: World) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)
