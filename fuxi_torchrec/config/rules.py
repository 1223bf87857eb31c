"""What a configuration's values must be, alone and together: every rule that the types of its keys do not state.

No torch here, as in config.
"""

import dataclasses
from typing import Optional, get_args

from fuxi_torchrec.config.schema import CHANNEL_PRESETS, METRICS, Config, LossConfig, evaluation_splits
from fuxi_torchrec.errors import UserError


def check(config: Config) -> None:
    """Raises UserError, naming the key, for values that no run could have. Types were checked when they were read."""
    _check_nulls(config)
    for key, value, least in _bounded(config):
        if value is not None and value < least:
            raise UserError(f"{key}: {value} is too small; it must be at least {least}")
    for key in ("input_dropout", "dropout", "attention_dropout"):
        if not 0 <= getattr(config.model, key) < 1:
            raise UserError(f"model.{key}: {getattr(config.model, key)} is not in [0, 1)")
    positive = ("loss.temperature", "loss.l2_eps", "optimizer.learning_rate")
    for key in (*positive, "trainer.timeout_minutes", "trainer.peak_tflops"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not value > 0:
            raise UserError(f"{key}: {value} must be greater than 0")
    if any(not 0 <= beta < 1 for beta in config.optimizer.betas):
        raise UserError(f"optimizer.betas: {list(config.optimizer.betas)} are not in [0, 1)")
    clip = config.optimizer.clip_grad_norm
    if clip is not None and not clip > 0:
        raise UserError(f"optimizer.clip_grad_norm: {clip} must be greater than 0; null switches clipping off")
    if config.trainer.metric not in METRICS:
        raise UserError(f"trainer.metric: '{config.trainer.metric}' is none of {', '.join(METRICS)}")
    _check_model(config)
    _check_loss(config.loss)
    check_table(config)
    _check_split(config)


def _check_nulls(config: Config) -> None:
    """A YAML null gets past the parser for any key."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field_ in dataclasses.fields(values):
            if getattr(values, field_.name) is None and type(None) not in get_args(field_.type):
                raise UserError(f"{section.name}.{field_.name}: null is no value for this key; leave it out for the default")


def _bounded(config: Config):
    ones = {
        "data": ("max_sequence_length", "batch_size", "tokens_per_batch", "shuffle_buffer"),
        "model": ("embedding_dim", "num_blocks", "num_heads", "value_dim", "qk_dim", "padded_length"),
        "loss": ("num_negatives", "max_in_batch", "chunk_logits"),
        "evaluation": ("batch_size", "every_epochs", "every_steps"),
        "trainer": ("max_epochs", "max_steps", "log_every_steps", "patience"),
    }
    zeros = {
        "data": ("prefetch",),
        "loss": ("sampling_alpha", "uniform_negatives"),
        "optimizer": ("weight_decay", "warmup_steps", "min_learning_rate"),
        "trainer": ("seed",),
    }
    ones["trainer"] += ("checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints")
    for least, table in ((1, ones), (0, zeros)):
        for section, names in table.items():
            for name in names:
                yield f"{section}.{name}", getattr(getattr(config, section), name), least


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
    for key in ("learning_rate", "hbm_gb", "ddr_gb", "intra_host_gb_s", "inter_host_gb_s"):
        if getattr(table, key) is not None and not getattr(table, key) > 0:
            raise UserError(f"table.{key}: {getattr(table, key)} must be greater than 0; null takes the default")
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
