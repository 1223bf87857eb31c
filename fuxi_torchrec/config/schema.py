"""The configuration of a run: nested dataclasses, filled from YAML and dotted overrides by the command line.

No torch here: `--help` and config errors must answer at once. Types and unknown keys are refused by jsonargparse; which
values go together is in rules.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Optional, Tuple

__all__ = [  # what fuxi_torchrec.config hands on
    "CHANNEL_PRESETS",
    "METRIC_CUTOFFS",
    "BiasFunction",
    "Config",
    "DataConfig",
    "EncoderName",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TableConfig",
    "TrainerConfig",
    "evaluation_splits",
]

EncoderName = Literal["fuxi_beta", "fuxi_alpha", "hstu", "sasrec", "flash", "hstu_beta", "sasrec_beta"]
ChannelName = Literal["positional", "temporal", "bucketed_temporal", "semantic"]
BiasFunction = Literal["pow", "exp", "log", "linear", "sin", "mixed", "nn", "zero"]
TokenMixing = Literal["auto", "reference", "exact", "blocked", "native", "linear", "triton"]
SplitName = Literal["train", "validation", "test"]
CHANNEL_PRESETS: Dict[str, Tuple[ChannelName, ...]] = {
    "fuxi_beta": ("positional", "temporal"),
    "fuxi_alpha": ("positional", "bucketed_temporal", "semantic"),
}
"""The channels of the FuXi encoders where model.channels is null."""


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
    """If set, a rank's batch ends before its supervised positions exceed this (batch_size still bounds its users)."""
    shuffle_buffer: int = 65536
    """Users that are shuffled together (whole row groups, at least one), in the memory of every rank. A data set no
    larger is read by all ranks and dealt user by user, of a larger one each rank reads a part."""
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
    """Width of the feed-forward layer over embedding_dim (FuXi, SASRec); 0 leaves FuXi's with its first stage alone, the
    output projection."""
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

    negatives: Literal["per_token", "shared", "in_batch", "mixed", "full"] = "per_token"
    """per_token: num_negatives drawn for every position (the papers); shared: one pool of num_negatives per step and
    rank (large catalogues); in_batch: the batch's positives, each once; mixed: a pool and the batch's positives; full: all
    items, the exact softmax (small catalogues)."""
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
    chunk_logits: int = 2**22
    """Most logits that exist at a time, float32 each: bounds the loss's memory, whatever the batch."""
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
    intra_host_gb_s: Optional[float] = None
    """What the planner takes a rank to exchange with ranks of its own host, 10^9 bytes a second; null: TorchRec's default
    (NVLink's 644)."""
    inter_host_gb_s: Optional[float] = None
    """The same with ranks of other hosts; null: TorchRec's default (13.4, a 100 Gbit/s card for every rank)."""


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
    """Evaluate after every so many epochs; null: only at the end, whose model is then the one that is
    kept."""
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
    compile: bool = False
    """torch.compile of what in the tower's blocks is row by row: norms, gates, dropout and products. Needs a C++ compiler on
    a CPU, where it takes the place of kernels in C; Triton on a GPU. docs/performance.md."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs for backward, and compute each block forward twice: less memory, more time."""
    peak_tflops: Optional[float] = None
    """What a device can do at most, in TFLOP/s, that MFU is taken against; null: a known GPU's at trainer.precision, and
    no MFU on another device."""
    log_every_steps: int = 10
    """Steps between training lines; a line's loss is the mean since the last one. On a GPU it is also looked at only then:
    whether it is finite, too."""
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
    """sparse_dist: the ids of the next batch are exchanged while this one computes; null: sparse_dist on CUDA, else base."""
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


def evaluation_splits(data: DataConfig) -> Tuple[str, ...]:
    """The splits that can be evaluated: ("test",) or ("validation", "test")."""
    if data.split == "leave_one_out" or (data.split == "temporal" and len(data.temporal_cutoffs or []) < 2):
        return ("test",)
    return ("validation", "test")
