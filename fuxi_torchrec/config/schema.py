"""The configuration of a run: nested dataclasses, filled from YAML and dotted overrides by the command line.

A key's type, default, bounds (`within`) and help (the docstring below it) stand side by side here; which values go
together is in rules. No torch here: `--help` and config errors must answer at once.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Optional, Tuple, Type

from fuxi_torchrec.config.bounds import LARGEST_COUNT, LARGEST_INT32, LARGEST_INT64, Range, within
from fuxi_torchrec.files import JsonObject

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
    "config_keys",
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
METRIC_CUTOFFS = (1, 10, 50, 100, 200, 500, 1000)
METRICS = tuple(f"{kind}@{k}" for kind in ("hr", "ndcg") for k in METRIC_CUTOFFS) + ("mrr", "cross_entropy")

# Bounds that several keys share.
COUNT = Range(at_least=1, at_most=LARGEST_COUNT)
COUNT_OR_ZERO = Range(at_least=0, at_most=LARGEST_COUNT)
LENGTH = Range(at_least=1, at_most=LARGEST_INT32)
WIDTH = Range(at_least=1, at_most=2**16)
BLOCKS_OR_HEADS = Range(at_least=1, at_most=1024)
PROBABILITY = Range(at_least=0, below=1)
RATE = Range(at_least=1e-30, at_most=1e30)
GIBIBYTES = Range(above=0, at_most=2**20)
GIGABYTES_A_SECOND = Range(above=0, at_most=1e6)


@dataclass
class DataConfig:
    """Data: what is read, how it is split, and how it is batched."""

    path: str = ""
    """Folder of a prepared data set."""
    split: Literal["leave_one_out", "leave_two_out", "temporal"] = "leave_one_out"
    """leave_one_out tests on each user's last event, as the papers do. leave_two_out also takes the event before it, for
    validation. temporal splits all users at the times of temporal_cutoffs."""
    temporal_cutoffs: Optional[List[int]] = within(None, Range(at_least=-(2**63), at_most=LARGEST_INT64))
    """The times at which split=temporal cuts, in the data set's own unit of time: [TEST_START], or [VALIDATION_START,
    TEST_START]. Other splits take null."""
    max_sequence_length: int = within(200, LENGTH)
    """Longest history that the encoder sees, in events: a user's newest ones. Training reads one event more, the last
    target."""
    batch_size: int = within(128, COUNT)
    """Users in a training batch, per rank."""
    tokens_per_batch: Optional[int] = within(None, COUNT)
    """Most events to predict in a rank's batch, which ends before it exceeds them; batch_size bounds its users all the
    same. null: no bound."""
    shuffle_buffer: int = within(65536, COUNT)
    """Users that are shuffled together, in the memory of every rank; rounded up to whole row groups of the files. Every
    rank reads all of a data set that fits the buffer, and its own part of a larger one."""
    prefetch: Optional[int] = within(None, COUNT_OR_ZERO)
    """Batches that a background thread makes ahead. null: 2 with a GPU, 0 on a CPU, where the thread would slow down the
    training."""


@dataclass
class ModelConfig:
    """Model: the encoder of a user's history. The names are those of the papers' code; see docs/models.md."""

    encoder: EncoderName = "fuxi_beta"
    """Architecture. fuxi_beta and fuxi_alpha are one block with different channels."""
    embedding_dim: int = within(50, WIDTH)
    """Width of the item embeddings and of the encoder (D in the papers)."""
    num_blocks: int = within(2, BLOCKS_OR_HEADS)
    """Blocks of the encoder, one after the other."""
    num_heads: int = within(1, BLOCKS_OR_HEADS)
    """Heads of each block. SASRec's must divide embedding_dim."""
    value_dim: int = within(50, WIDTH)
    """Width of the values, per head (FuXi, HSTU, FLASH)."""
    qk_dim: int = within(50, WIDTH)
    """Width of queries and keys, per head (FuXi's semantic channel, HSTU, FLASH)."""
    ffn_multiply: float = within(1.0, Range(at_least=0, at_most=1024))
    """Width of the feed-forward layer, as a multiple of embedding_dim (FuXi, SASRec). 0, for FuXi alone: a block ends
    with its output projection."""
    channels: Optional[List[ChannelName]] = None
    """What FuXi mixes a user's events by, a list of positional, semantic, and temporal or bucketed_temporal. null: those
    of the paper of the encoder."""
    bias_function: BiasFunction = "pow"
    """Function of the time between two events that weighs them in the temporal channel (FuXi and the β variants)."""
    token_mixing: TokenMixing = "auto"
    """Algorithm of the positional and temporal channels (FuXi and the β variants). Results are the same up to rounding,
    and up to mixing_tolerance for linear. auto: the fastest one for the device, the lengths and bias_function; see
    docs/token_mixing.md."""
    mixing_tolerance: float = within(1e-6, Range(at_least=1e-12, at_most=1e-2))
    """Largest relative error of bias_function=pow with token_mixing=linear. A smaller one takes more time."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation of the feed-forward layer (SASRec)."""
    input_dropout: float = within(0.2, PROBABILITY)
    """Dropout on the encoder's input, the sum of item and position embeddings."""
    dropout: float = within(0.2, PROBABILITY)
    """Dropout inside the blocks."""
    attention_dropout: float = within(0.0, PROBABILITY)
    """Dropout on the attention weights (SASRec)."""
    padded_length: Optional[int] = within(None, LENGTH)
    """Longest history that the model has position embeddings for, at least data.max_sequence_length. HSTU, FLASH and
    FuXi-α divide their attention weights by it. null: data.max_sequence_length + 11, as in the papers' code."""


@dataclass
class LossConfig:
    """Loss: the sampled softmax."""

    negatives: Literal["per_token", "shared", "in_batch", "mixed", "full"] = "per_token"
    """Items that the item to be predicted is set against. per_token: num_negatives drawn anew for each prediction, as the
    papers do. shared: num_negatives drawn for each batch of a rank (large catalogues). in_batch: the items to be
    predicted elsewhere in the batch, each once. mixed: shared and in_batch together. full: all items, which is the exact
    softmax (small catalogues)."""
    num_negatives: int = within(128, COUNT)
    """Items drawn, with replacement: for each prediction (per_token), or for the batch (shared, mixed)."""
    sampling_alpha: float = within(0.0, Range(at_least=0, at_most=8))
    """Items are drawn in proportion to (frequency in training + 1)^sampling_alpha; 0: all alike."""
    uniform_negatives: int = within(0, COUNT_OR_ZERO)
    """Items drawn all alike, beside num_negatives that are drawn by frequency (shared, mixed)."""
    max_in_batch: Optional[int] = within(None, COUNT)
    """Most items of the batch that a rank offers, chosen at random (in_batch, mixed). null: all."""
    cross_rank: bool = False
    """Whether each rank's predictions are set against the items of all ranks (shared, in_batch, mixed)."""
    log_q: bool = False
    """Whether logits are corrected for how often an item is expected among the negatives, so that the loss estimates the
    full softmax; see docs/negatives.md."""
    mask_history: bool = False
    """Whether a user's own events in the batch, past or future, are left out of the negatives (shared, in_batch, mixed,
    full)."""
    temperature: float = within(0.05, Range(at_least=1e-6, at_most=1e6))
    """Divisor of the logits, which are cosines."""
    chunk_logits: int = within(2**22, COUNT)
    """Most logits in memory at a time, 4 bytes each."""
    l2_eps: float = within(1e-6, Range(above=0, at_most=1e6))
    """Smallest norm that outputs and item embeddings are divided by."""


@dataclass
class TableConfig:
    """Item table: how the ranks share it, and what trains it; see docs/sharding.md."""

    sharding: Literal["auto", "replicated", "row_wise", "table_wise", "column_wise"] = "auto"
    """replicated: each rank holds the whole table, trained by AdamW, as the papers do. row_wise, table_wise, column_wise:
    each rank holds a part. auto: replicated where the table, its gradient and AdamW's state take at most 2 % of a rank's
    memory, and passing over them at every step an estimated tenth of the step; else TorchRec's planner chooses."""
    optimizer: Optional[Literal["adamw", "rowwise_adagrad", "adagrad", "adam"]] = None
    """adamw trains replicated tables alone, the others sharded ones alone; adam needs a GPU. null: adamw for a replicated
    table, rowwise_adagrad for a sharded one."""
    learning_rate: Optional[float] = within(None, RATE)
    """Highest learning rate of a sharded table, which follows optimizer.schedule too. null: optimizer.learning_rate."""
    hbm_gb: Optional[float] = within(None, GIBIBYTES)
    """GPU memory of a rank that the planner counts with, in GiB. null: the GPU's."""
    ddr_gb: Optional[float] = within(None, GIBIBYTES)
    """Host memory of a rank that the planner counts with, in GiB. null: the machine's, divided by its ranks."""
    intra_host_gb_s: Optional[float] = within(None, GIGABYTES_A_SECOND)
    """Speed at which the planner expects ranks of one host to exchange data, in 10^9 bytes a second. null: TorchRec's
    default, 644 (NVLink)."""
    inter_host_gb_s: Optional[float] = within(None, GIGABYTES_A_SECOND)
    """The same between hosts. null: TorchRec's default, 13.4 (a 100 Gbit/s card for each rank)."""


@dataclass
class OptimizerConfig:
    """Optimizer: AdamW for all parameters but a sharded item table."""

    learning_rate: float = within(1e-3, RATE)
    """Highest learning rate."""
    betas: Tuple[float, float] = within((0.9, 0.98), PROBABILITY)
    """Decay rates of AdamW's first and second moment."""
    weight_decay: float = within(0.0, Range(at_least=0, at_most=1e30))
    """AdamW's decoupled weight decay."""
    warmup_steps: int = within(0, COUNT_OR_ZERO)
    """Steps in which the learning rate rises linearly to its highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine down to min_learning_rate at the last step."""
    min_learning_rate: float = within(0.0, Range(at_least=0, at_most=1e30))
    """Learning rate at the end of schedule=cosine."""
    clip_grad_norm: Optional[float] = within(None, Range(above=0))
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down. A sharded table is not clipped.
    null: no clipping."""


@dataclass
class EvaluationConfig:
    """Evaluation: a user's target ranked among all items."""

    batch_size: int = within(128, COUNT)
    """Users in an evaluation batch, per rank."""
    every_epochs: Optional[int] = within(1, COUNT)
    """Epochs between evaluations. null: only the model at the end of training is evaluated, and kept."""
    every_steps: Optional[int] = within(None, COUNT)
    """Steps between further evaluations. null: none."""
    split: Optional[Literal["validation", "test"]] = None
    """Split that is evaluated during training. null: validation where data.split has it, else test, as the papers do."""


@dataclass
class TrainerConfig:
    """Trainer: how long, on what, and which model is kept."""

    max_epochs: int = within(101, COUNT)
    """Passes over the training users."""
    max_steps: Optional[int] = within(None, COUNT)
    """Steps after which training ends, even inside an epoch. null: max_epochs alone decides."""
    seed: int = within(0, Range(at_least=0, at_most=2**64 - 1))
    """Decides initial values, order of the users, negatives and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the encoder computes in bfloat16; parameters, logits, time differences and the loss stay float32."""
    compile: bool = False
    """Whether torch.compile compiles the encoder's norms, gates, dropout and matrix products. It needs a C++ compiler on a
    CPU and Triton on a GPU; see docs/performance.md."""
    activation_checkpointing: bool = False
    """Whether backward computes each block's forward pass again instead of keeping it: less memory, more time."""
    peak_tflops: Optional[float] = within(None, Range(at_least=1e-6, at_most=1e9))
    """Highest speed of the device, in 10^12 operations a second; the utilisation (MFU) is reported as a part of it. null:
    what is known of the GPU for trainer.precision; on another device no utilisation is reported."""
    log_every_steps: int = within(10, COUNT)
    """Steps between lines on training; a line's loss is the mean since the last one. On a GPU, whether the loss is finite
    is looked at only then."""
    checkpoint_every_epochs: int = within(1, COUNT)
    """Epochs between checkpoints."""
    checkpoint_every_steps: Optional[int] = within(None, COUNT)
    """Steps between further checkpoints inside an epoch. null: none."""
    keep_checkpoints: int = within(2, COUNT)
    """Newest checkpoints that are kept, beside the best. With two, a damaged newest one loses little."""
    checkpoint_folder: Optional[str] = None
    """Where checkpoints are kept: a folder, or an address like s3://BUCKET/FOLDER. null: checkpoints/ in the run folder."""
    async_checkpoint: Optional[bool] = None
    """Whether checkpoints are written in the background, from a copy in CPU memory. null: only when training on a GPU."""
    timeout_minutes: float = within(30.0, Range(at_least=1e-3, at_most=60 * 24 * 365))
    """Longest time that processes wait for another one, before they take it for lost and end the run. 0.5 is 30 seconds."""
    flight_recorder: bool = False
    """Whether every rank that ends because another one was lost writes its last collectives to RUN/flight_recorder/; see
    docs/launch.md."""
    memory_snapshot: bool = False
    """Whether each rank writes what holds its GPU's memory to RUN/memory/ when an allocation fails; see docs/launch.md. It
    records every allocation with its stack, which takes host memory and some time."""
    train_pipeline: Optional[Literal["base", "sparse_dist"]] = None
    """sparse_dist: ranks exchange the item ids of the next batch while they compute this one. base: one after the other.
    null: sparse_dist on a GPU, else base."""
    metric: str = "ndcg@10"
    """Metric that decides the best checkpoint and early stopping: ndcg@K or hr@K with K one of 1, 10, 50, 100, 200, 500
    or 1000; mrr; or cross_entropy, of which less is better."""
    patience: Optional[int] = within(None, COUNT)
    """Evaluations without a better metric after which training stops. null: it does not stop early."""


@dataclass
class Config:
    """A run, as `fuxi-torchrec train CONFIG.yaml --section.key value` describes it."""

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

    def to_dict(self) -> JsonObject:
        """Returns the config as plain values, {section: {key: value}}."""
        return dataclasses.asdict(self)


def section_of(section: dataclasses.Field) -> Type[Any]:
    """Returns the class of a section, a field of Config."""
    assert isinstance(section.type, type)
    return section.type


def config_keys() -> Dict[str, dataclasses.Field]:
    """Lists every key of Config by its dotted name, as in trainer.seed."""
    return {
        f"{section.name}.{key.name}": key
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(section_of(section))
    }


def evaluation_splits(data: DataConfig) -> Tuple[str, ...]:
    """Names the splits that can be evaluated: ("test",) or ("validation", "test")."""
    if data.split == "leave_one_out" or (data.split == "temporal" and len(data.temporal_cutoffs or []) < 2):
        return ("test",)
    return ("validation", "test")
