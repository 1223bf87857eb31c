"""Which CPU kernels a run computes with: chosen once, by rank 0, and kept with the run.

Results by the C kernels and by PyTorch agree up to rounding, so a run that is to go on bit for bit, and whatever uses its
model later, goes on with the choice that it was begun with.
"""

import os
from typing import Callable, Optional

from fuxi_torchrec.config import CHANNEL_PRESETS, Config
from fuxi_torchrec.data.format import DatasetIdentity
from fuxi_torchrec.distributed.world import World
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.ops.kernel_choice import StepSizes, losing, time_families
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.run.folder import RunFolder

Report = Callable[[str], None]
NAMES = {
    "row_wise": "norms and gates",
    "token_mixing": "token mixing",
    "linear_mixing": "mixing of long histories",
    "sampled_softmax": "loss",
}
"""What users are told of a family of kernels."""


def choose_kernels(
    config: Config, identity: DatasetIdentity, run: RunFolder, world: World, resume: bool, report: Report
) -> JsonObject:
    """Chooses the kernels of a run that trains, on every rank alike, and makes this process compute with them.

    The environment variable FUXI_TORCHREC_NATIVE goes before all else: 0 leaves everything to PyTorch, 1 nothing. Else a
    resumed run keeps its choice, and a new one takes what was measured to be faster.

    Args:
        resume: the run goes on, if it has been begun; one that has saved and has no choice was computed by the kernels.
        report: is told, on rank 0, what was measured and what differs from before; one line each.

    Returns:
        The record for kernels.json.
    """
    record = _record([])
    if world.is_main:
        before = run.kernels() if resume else None
        # A job is told to resume at its first start too.
        begun = resume and run.last_saved() is not None
        record = _fixed() or before or (record if begun else _measured(config, identity, world, report))
        if before:
            _report_differences(before, record, report)
    return _used(world.from_main(record))


def use_kernels_of(run: RunFolder, world: World, report: Report) -> None:
    """Makes this process compute with the kernels that a run was trained with, as far as the environment does not say
    otherwise; tells rank 0's user where the processor is another one."""
    before = run.kernels() if world.is_main else None
    if before and world.device.type == "cpu":
        _report_differences(before, _fixed() or before, report)
    _used(world.from_main(_fixed() or before or _record([])))


def _used(record: JsonObject) -> JsonObject:
    # A family that a later version has is none of this one's.
    native.leave_to_pytorch(set(record["left_to_pytorch"]) & set(native.FAMILIES))
    return record


def _fixed() -> Optional[JsonObject]:
    """The record that the environment asks for."""
    switch = os.environ.get(native.SWITCH)
    return _record(list(native.FAMILIES) if switch == "0" else [], by=f"{native.SWITCH}={switch}") if switch else None


def _record(left: list[str], by: str = "default", **more: object) -> JsonObject:
    return {"left_to_pytorch": left, "chosen_by": by, "processor": native.processor(), **more}


def _measured(config: Config, identity: DatasetIdentity, world: World, report: Report) -> JsonObject:
    if world.device.type != "cpu":
        return _record([])
    ratios = time_families(step_sizes(config, identity))
    if not ratios:  # there are no kernels here; a warning has said why
        return _record(list(native.FAMILIES), by="no kernels")
    left = losing(ratios)
    told = ", ".join(f"{NAMES[family]} {ratio:.1f} ×" for family, ratio in ratios.items())
    leaving = f"; left to PyTorch: {', '.join(NAMES[family] for family in left)}" if left else ""
    report(f"CPU kernels, their speed over PyTorch's: {told}{leaving}")
    return _record(left, by="measurement", pytorch_seconds_over_kernels=ratios)


def _report_differences(before: JsonObject, now: JsonObject, report: Report) -> None:
    if sorted(before["left_to_pytorch"]) != sorted(now["left_to_pytorch"]):
        report(
            f"CPU kernels: this run was computed with {_told(before)}, and now by {now['chosen_by']} with {_told(now)}: "
            "results agree up to rounding, not bit for bit"
        )
    elif before["processor"] != native.processor():
        report(
            f"CPU kernels: chosen on another processor ({before['processor']}; here {native.processor()}) and kept; "
            "results agree up to rounding, not bit for bit"
        )


def _told(record: JsonObject) -> str:
    left = record["left_to_pytorch"]
    return f"{', '.join(NAMES.get(family, family) for family in left)} left to PyTorch" if left else "all kernels"


def step_sizes(config: Config, identity: DatasetIdentity) -> StepSizes:
    """Estimates the sizes of a training step of one process from the config and the data set's counts."""
    model, loss = config.model, config.loss
    longest = min(config.data.max_sequence_length, max(1, identity.max_events_per_user))
    mean = min(longest, max(1, identity.num_events // max(1, identity.num_users)))
    # HSTU's and SASRec's β variants mix by the channels of FuXi-β.
    preset = "fuxi_beta" if model.encoder.endswith("_beta") else model.encoder
    names = model.channels or CHANNEL_PRESETS.get(preset, ())
    forms = {"positional": "positional", "temporal": model.bias_function, "bucketed_temporal": "bucketed"}
    return StepSizes(
        tokens=config.data.batch_size * mean,
        longest=longest,
        width=model.embedding_dim,
        hidden=int(model.embedding_dim * model.ffn_multiply),
        heads=model.num_heads,
        value_dim=model.value_dim,
        channels=tuple(forms[name] for name in names if name in forms),
        dropout=model.dropout,
        negatives=loss.num_negatives if loss.negatives == "per_token" else 0,
        items=identity.num_items,
    )
