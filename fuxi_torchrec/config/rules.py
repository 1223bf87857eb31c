"""What a configuration's values must be, alone and together: every rule that the types of its keys do not state.

No torch here, as in config.
"""

import dataclasses
from typing import Any, Optional, get_args

from fuxi_torchrec.config.schema import CHANNEL_PRESETS, METRICS, Config, LossConfig, config_keys, evaluation_splits
from fuxi_torchrec.errors import UserError


def check(config: Config) -> None:
    """Raises UserError, naming the key, for values that no run could have. Types were checked when they were read."""
    for name, key in config_keys().items():
        section = getattr(config, name.split(".")[0])
        _check_value(name, getattr(section, key.name), key)
    if config.trainer.metric not in METRICS:
        raise UserError(f"trainer.metric: '{config.trainer.metric}' is none of {', '.join(METRICS)}")
    folder = config.trainer.checkpoint_folder
    if folder is not None and folder.startswith(("http://", "https://")):
        raise UserError(f"trainer.checkpoint_folder: {folder}: nothing can be written there; name a folder or a bucket")
    _check_model(config)
    _check_loss(config.loss)
    check_table(config)
    _check_split(config)


def _check_value(name: str, value: Any, key: dataclasses.Field) -> None:
    """A key's value by itself."""
    if value is None:
        if type(None) not in get_args(key.type):  # a YAML null gets past the parser for any key
            raise UserError(f"{name}: null is no value for this key; leave it out for the default")
        return
    if isinstance(value, str) and any(character < " " for character in value):
        raise UserError(f"{name}: {value!r} holds a character that cannot be printed; take it out")
    if "bounds" in key.metadata:
        for number in value if isinstance(value, (list, tuple)) else [value]:
            complaint = key.metadata["bounds"].complaint(number)
            if complaint:
                default = "; null takes the default" if key.default is None else ""
                raise UserError(f"{name}: {value} {complaint}{default}")


def _check_model(config: Config) -> None:
    model = config.model
    if config.padded_length < config.data.max_sequence_length:
        raise UserError(
            f"model.padded_length: {config.padded_length} is shorter than data.max_sequence_length "
            f"{config.data.max_sequence_length}; raise the one or lower the other"
        )
    if model.encoder in ("sasrec", "sasrec_beta") and model.embedding_dim % model.num_heads:
        raise UserError(
            f"model.num_heads: {model.num_heads} heads do not divide model.embedding_dim {model.embedding_dim}, "
            "which SASRec's attention needs"
        )
    is_single_stage = model.ffn_multiply == 0 and model.encoder in CHANNEL_PRESETS
    if not model.embedding_dim * model.ffn_multiply >= 1 and not is_single_stage:
        raise UserError(f"model.ffn_multiply: {model.ffn_multiply} leaves the feed-forward layer without a unit")
    if model.channels is not None:
        if model.encoder not in CHANNEL_PRESETS:
            raise UserError(f"model.channels: only the FuXi encoders have channels, not '{model.encoder}'; set null")
        if not model.channels or len(set(model.channels)) < len(model.channels):
            raise UserError(f"model.channels: {model.channels} must name at least one channel, each once")
        if {"temporal", "bucketed_temporal"} <= set(model.channels):
            raise UserError("model.channels: temporal and bucketed_temporal are two forms of one channel; keep one")


def _check_loss(loss: LossConfig) -> None:
    per_token, pool = loss.negatives == "per_token", loss.negatives in ("shared", "mixed")
    alone = "every position of per_token has negatives of its own; use shared, in_batch or mixed"
    full, every = loss.negatives == "full", "every position is set against all items already"
    refused = (
        ("log_q", full and loss.log_q, f"{every}; nothing is estimated"),
        ("cross_rank", full and loss.cross_rank, every),
        ("sampling_alpha", full and loss.sampling_alpha > 0, f"{every}; nothing is drawn"),
        ("cross_rank", per_token and loss.cross_rank, alone),
        ("mask_history", per_token and loss.mask_history, alone),
        ("sampling_alpha", not per_token and not pool and loss.sampling_alpha > 0, "in_batch draws nothing; use mixed"),
        ("uniform_negatives", not pool and loss.uniform_negatives > 0, "only a pool has them; use shared or mixed"),
        (
            "uniform_negatives",
            pool and loss.uniform_negatives > 0 and loss.sampling_alpha == 0,
            "with loss.sampling_alpha 0 all are uniform; raise loss.num_negatives instead",
        ),
        (
            "max_in_batch",
            loss.negatives not in ("in_batch", "mixed") and loss.max_in_batch is not None,
            "no in-batch items are used; use in_batch or mixed, or set null",
        ),
    )
    for key, wrong, why in refused:
        if wrong:
            value = getattr(loss, key)
            raise UserError(f"loss.{key}: {value} does not go with loss.negatives {loss.negatives}: {why}")


def check_table(config: Config, device_type: Optional[str] = None) -> None:
    """Refuses pairs of sharding, optimizer and device that cannot train. device_type: "cpu" or "cuda" where something is
    to be trained; a model can be evaluated on another device than trained it."""
    table = config.table
    if table.optimizer == "adamw" and table.sharding not in ("auto", "replicated"):
        raise UserError(
            f"table.optimizer: adamw trains only replicated tables, not table.sharding={table.sharding}; take "
            "rowwise_adagrad or adagrad (or adam on CUDA), or table.sharding=replicated"
        )
    if table.optimizer not in (None, "adamw") and table.sharding == "replicated":
        raise UserError(
            f"table.optimizer: {table.optimizer} runs inside backward and trains only sharded tables, not "
            "table.sharding=replicated; take adamw, or table.sharding=auto, row_wise, table_wise or column_wise"
        )
    if table.optimizer == "adam" and device_type == "cpu":
        raise UserError(
            "table.optimizer: fbgemm has no fused adam on a CPU; take rowwise_adagrad or adagrad, or trainer.device=cuda"
        )
    # What auto will do where the optimizer leaves it no choice.
    replicated = table.sharding == "replicated" or (table.sharding == "auto" and table.optimizer == "adamw")
    sharded = table.sharding not in ("auto", "replicated") or table.optimizer not in (None, "adamw")
    if replicated and table.learning_rate is not None:
        raise UserError(
            "table.learning_rate: a replicated table is trained with the rest, by optimizer.learning_rate; set null"
        )
    if sharded and config.model.embedding_dim % 4:
        raise UserError(
            f"model.embedding_dim: fbgemm's sharded tables need a multiple of 4, not {config.model.embedding_dim}; "
            "change it, or take table.sharding=replicated with table.optimizer=adamw"
        )


def _check_split(config: Config) -> None:
    data, cutoffs = config.data, config.data.temporal_cutoffs
    if data.split == "temporal":
        if not cutoffs or len(cutoffs) > 2 or list(cutoffs) != sorted(set(cutoffs)):
            raise UserError(
                "data.temporal_cutoffs: data.split=temporal needs [test_start] or [validation_start, test_start], "
                f"in ascending ticks of the data set's time, not {cutoffs}"
            )
    elif cutoffs is not None:
        raise UserError(f"data.temporal_cutoffs: only data.split=temporal uses cut-offs, not '{data.split}'")
    if config.evaluation.split not in (None, *evaluation_splits(data)):
        raise UserError(
            f"evaluation.split: data.split={data.split} has no {config.evaluation.split} split; "
            f"it has {' and '.join(evaluation_splits(data))}"
        )
