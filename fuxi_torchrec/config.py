"""The configuration of a run: nested dataclasses, filled from YAML and dotted overrides by the command line.

No torch here: `--help` and config errors must answer at once. `check` holds every rule that ties several keys together;
types and unknown keys are refused earlier, by jsonargparse.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Optional, Tuple, get_args

from fuxi_torchrec.errors import UserError

EncoderName = Literal["fuxi_beta", "fuxi_alpha", "hstu", "sasrec"]
ChannelName = Literal["positional", "temporal", "bucketed_temporal", "semantic"]
BiasFunction = Literal["pow", "exp", "log", "linear", "sin", "mixed", "nn", "zero"]
TokenMixing = Literal["auto", "reference", "blocked", "linear", "triton"]
SplitName = Literal["train", "validation", "test"]


@dataclass
class DataConfig:
    """What is read, how it is split, and how it is batched."""

    path: str = ""
    """Folder of a prepared data set."""
    split: Literal["leave_one_out", "leave_two_out", "temporal"] = "leave_one_out"
    """leave_one_out tests on each user's last event (the papers); leave_two_out adds a validation event before it;
    temporal splits all users at temporal_cutoffs."""
    temporal_cutoffs: Optional[List[int]] = None
    """For split=temporal: [test_start] or [validation_start, test_start], in the data set's own time ticks."""
    max_sequence_length: int = 200
    """Most history events that the encoder sees; training takes the last max_sequence_length + 1 events."""
    batch_size: int = 128
    """Users in a training batch, per rank."""
    tokens_per_batch: Optional[int] = None
    """If set, a batch ends before its supervised positions exceed this (batch_size still bounds its users)."""
    shuffle_buffer: int = 65536
    """Users that are shuffled together (whole row groups, at least one); memory grows with it."""
    prefetch: Optional[int] = None
    """Batches made ahead in a background thread; null: 2 beside a GPU, 0 on a CPU, where the thread would only take its
    time from the others."""


@dataclass
class ModelConfig:
    """The tower. The names are those of the papers' code; see docs/models.md."""

    encoder: EncoderName = "fuxi_beta"
    """Which tower; fuxi_beta and fuxi_alpha are one block with different channels."""
    embedding_dim: int = 50
    """D, also the width of the item table."""
    num_blocks: int = 2
    """L."""
    num_heads: int = 1
    """H."""
    value_dim: int = 50
    """d, per head (FuXi, HSTU)."""
    qk_dim: int = 50
    """d_qk, per head (FuXi's semantic channel, HSTU)."""
    ffn_multiply: float = 1.0
    """Width of the feed-forward layer over embedding_dim (FuXi, SASRec)."""
    channels: Optional[List[ChannelName]] = None
    """FuXi's token-mixing channels; null takes the preset of the encoder's name."""
    bias_function: BiasFunction = "pow"
    """f(x) of the functional temporal channel."""
    token_mixing: TokenMixing = "auto"
    """FuXi: how the channels are computed, with the same results up to rounding and mixing_tolerance; auto: the fastest
    for the device, the lengths and bias_function. docs/token_mixing.md."""
    mixing_tolerance: float = 1e-6
    """FuXi: largest relative error of a pow map where token_mixing is linear; a smaller one takes more terms."""
    activation: Literal["relu", "gelu"] = "relu"
    """SASRec's feed-forward activation."""
    input_dropout: float = 0.2
    """Dropout on the item embeddings plus positions."""
    dropout: float = 0.2
    """Dropout inside the blocks."""
    attention_dropout: float = 0.0
    """Dropout on attention weights (SASRec)."""
    padded_length: Optional[int] = None
    """Rows of the position tables (and HSTU's and FuXi-α's divisor); null: max_sequence_length + 11, as in the papers'
    code."""


@dataclass
class LossConfig:
    """Sampled softmax."""

    negatives: Literal["per_token", "shared", "in_batch", "mixed"] = "per_token"
    """per_token: num_negatives drawn for every position (the papers); shared: one pool of num_negatives per step and
    rank (large catalogues); in_batch: the batch's positives, each once; mixed: a pool and the batch's positives."""
    num_negatives: int = 128
    """Drawn with replacement: for every position (per_token), or for the pool (shared, mixed)."""
    sampling_alpha: float = 0.0
    """They are drawn in proportion to (training frequency + 1)^sampling_alpha; 0: uniformly from the catalogue."""
    uniform_negatives: int = 0
    """Drawn uniformly besides, into a pool that is otherwise drawn by frequency."""
    max_in_batch: Optional[int] = None
    """Most in-batch items a rank offers, chosen at random; null: all (their number is at most that of positions)."""
    cross_rank: bool = False
    """Every rank's positions see the pools and in-batch items of all ranks."""
    log_q: bool = False
    """Subtracts log(expected count) from candidates' logits, to estimate the full softmax (docs/negatives.md)."""
    mask_history: bool = False
    """Masks candidates that are among the user's own events in the batch, past or future."""
    temperature: float = 0.05
    """Divisor of the logits, which are cosines."""
    l2_eps: float = 1e-6
    """Least norm that outputs and item embeddings are divided by."""


@dataclass
class TableConfig:
    """The item table: how it is cut over the ranks, and what trains it. docs/sharding.md."""

    sharding: Literal["auto", "replicated", "row_wise", "table_wise", "column_wise"] = "auto"
    """replicated: every rank holds the whole table, trained by AdamW (the papers). row_wise, table_wise, column_wise:
    each rank holds a part. auto: replicated where table, gradient and AdamW's state take at most 2 % of a rank's
    memory, else the planner's choice."""
    optimizer: Optional[Literal["adamw", "rowwise_adagrad", "adagrad", "adam"]] = None
    """null: adamw for a replicated table, rowwise_adagrad for a sharded one. adamw trains only replicated tables, the
    others only sharded ones, inside backward; adam needs CUDA."""
    learning_rate: Optional[float] = None
    """Highest learning rate of a sharded table; follows the schedule of optimizer.learning_rate, which null takes."""
    hbm_gb: Optional[float] = None
    """GPU memory of a rank, GiB, that the planner counts with; null: the device's own."""
    ddr_gb: Optional[float] = None
    """Host memory of a rank, GiB; null: the machine's, shared by its ranks."""


@dataclass
class OptimizerConfig:
    """AdamW on everything that is dense."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    betas: Tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or cosine down to min_learning_rate at the last step."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    clip_grad_norm: Optional[float] = None
    """Largest global gradient norm; null: no clipping. A sharded table is updated inside backward, unclipped."""


@dataclass
class EvaluationConfig:
    """Full-ranking evaluation."""

    batch_size: int = 128
    """Users whose histories are encoded together."""
    every_epochs: Optional[int] = 1
    """Evaluate after every so many epochs; null: only at the end."""
    every_steps: Optional[int] = None
    """Evaluate after every so many steps as well."""
    split: Optional[Literal["validation", "test"]] = None
    """Split watched during training; null: validation where the data split has one, else test (as the papers do)."""


@dataclass
class TrainerConfig:
    """The loop: how long, on what, and which model is kept."""

    max_epochs: int = 101
    """Passes over the training users."""
    max_steps: Optional[int] = None
    """Stop after so many steps even inside an epoch."""
    seed: int = 0
    """Decides initial values, order, negatives and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch sees a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the tower; logits, norms, time differences and the loss stay float32."""
    log_every_steps: int = 10
    """Steps between training lines; a line's loss is the mean since the last one."""
    checkpoint_every_epochs: int = 1
    """Epochs between checkpoints."""
    checkpoint_every_steps: Optional[int] = None
    """Steps between checkpoints inside an epoch, as well."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best; with two, a damaged newest one loses little."""
    checkpoint_folder: Optional[str] = None
    """Where checkpoints are kept, a folder or an address that iopath knows; null: checkpoints/ in the run folder."""
    async_checkpoint: Optional[bool] = None
    """Write checkpoints in the background from a copy in CPU memory; null: where training is on a GPU."""
    timeout_minutes: float = 30.0
    """A process that keeps the others waiting longer than this is given up, and the run stops."""
    train_pipeline: Optional[Literal["base", "sparse_dist"]] = None
    """sparse_dist: the ids of the next batch are exchanged while this one computes; null: sparse_dist on CUDA where the
    table is sharded, else base."""
    metric: str = "ndcg@10"
    """Higher is better, except for cross_entropy. Decides the best checkpoint and early stopping."""
    patience: Optional[int] = None
    """Stop after so many evaluations without a better metric; null: never."""


@dataclass
class Config:
    """A run. `fuxi-torchrec train CONFIG.yaml --section.key value`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    table: TableConfig = field(default_factory=TableConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def padded_length(self) -> int:
        """Rows of the position tables. The 11 is the papers' code: 10 output slots and one for the target."""
        return self.model.padded_length or self.data.max_sequence_length + 11

    def to_dict(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)


METRIC_CUTOFFS = (1, 10, 50, 100, 200, 500, 1000)
METRICS = tuple(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in METRIC_CUTOFFS) + ("mrr", "cross_entropy")


def check(config: Config) -> None:
    """Raises UserError, naming the key, for values that no run could have. Types were checked when they were read."""
    _check_nulls(config)
    for key, value, least in _bounded(config):
        if value is not None and value < least:
            raise UserError(f"{key}: {value} is too small; it must be at least {least}")
    for key in ("input_dropout", "dropout", "attention_dropout"):
        if not 0 <= getattr(config.model, key) < 1:
            raise UserError(f"model.{key}: {getattr(config.model, key)} is not in [0, 1)")
    positive = ("loss.temperature", "loss.l2_eps", "optimizer.learning_rate", "model.ffn_multiply")
    for key in (*positive, "trainer.timeout_minutes"):
        section, name = key.split(".")
        if not getattr(getattr(config, section), name) > 0:
            raise UserError(f"{key}: {getattr(getattr(config, section), name)} must be greater than 0")
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
        "loss": ("num_negatives", "max_in_batch"),
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
    if model.encoder == "sasrec" and model.embedding_dim % model.num_heads:
        raise UserError(
            f"model.num_heads: {model.num_heads} heads do not divide model.embedding_dim {model.embedding_dim}, "
            "which SASRec's attention needs"
        )
    if int(model.embedding_dim * model.ffn_multiply) < 1:
        raise UserError(f"model.ffn_multiply: {model.ffn_multiply} leaves the feed-forward layer without a unit")
    if model.channels is not None:
        if model.encoder not in ("fuxi_beta", "fuxi_alpha"):
            raise UserError(f"model.channels: only the FuXi encoders have channels, not '{model.encoder}'; set null")
        if not model.channels or len(set(model.channels)) < len(model.channels):
            raise UserError(f"model.channels: {model.channels} must name at least one channel, each once")
        if {"temporal", "bucketed_temporal"} <= set(model.channels):
            raise UserError("model.channels: temporal and bucketed_temporal are two forms of one channel; keep one")


def _check_loss(loss: LossConfig) -> None:
    per_token, pool = loss.negatives == "per_token", loss.negatives in ("shared", "mixed")
    alone = "every position of per_token has negatives of its own; use shared, in_batch or mixed"
    refused = (
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
    for key in ("learning_rate", "hbm_gb", "ddr_gb"):
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
    if table.sharding == "replicated" and table.learning_rate is not None:
        raise UserError(
            "table.learning_rate: a replicated table is trained with the rest, by optimizer.learning_rate; set null"
        )
    if table.sharding not in ("auto", "replicated") and config.model.embedding_dim % 4:
        raise UserError(
            f"model.embedding_dim: fbgemm's sharded tables need a multiple of 4, not {config.model.embedding_dim}; "
            "change it, or take table.sharding=replicated"
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


def evaluation_splits(data: DataConfig) -> Tuple[str, ...]:
    """The splits that can be evaluated: ("test",) or ("validation", "test")."""
    if data.split == "leave_one_out" or (data.split == "temporal" and len(data.temporal_cutoffs or []) < 2):
        return ("test",)
    return ("validation", "test")
