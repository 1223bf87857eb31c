"""Which keys have no effect in a run that is otherwise right: told once at its start, since nothing else would show it.

What no run could use is refused (rules.py); here is what depends on what the run has found out: its device, its number of
processes, what became of the table. No torch.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

from fuxi_torchrec.config.schema import CHANNEL_PRESETS, Config, ModelConfig


@dataclass(frozen=True)
class Resolved:
    """What a run has found out. device_type: "cpu" or "cuda"; processes: of all nodes."""

    is_sharded: bool
    device_type: str
    processes: int


def _channels(model: ModelConfig) -> Tuple[str, ...]:
    """The model's token-mixing channels; those of the β variants and of HSTU go by the same names."""
    if model.encoder in CHANNEL_PRESETS:
        return tuple(model.channels or CHANNEL_PRESETS[model.encoder])
    own = {"hstu_beta": ("positional", "temporal"), "sasrec_beta": ("positional", "temporal")}
    return own.get(model.encoder, ())


def _evaluates(config: Config) -> bool:
    return config.evaluation.every_epochs is not None or config.evaluation.every_steps is not None


# key -> (when it is used, why it is not where it isn't). A key that is not here is always used, or refused.
Rule = Tuple[Callable[[Config, Resolved], bool], str]
RULES: Dict[str, Rule] = {
    "model.value_dim": (
        lambda config, run: config.model.encoder not in ("sasrec", "sasrec_beta"),
        "SASRec's values are as wide as the model",
    ),
    "model.qk_dim": (
        lambda config, run: config.model.encoder in ("hstu", "flash") or "semantic" in _channels(config.model),
        "there are no queries and keys",
    ),
    "model.ffn_multiply": (
        lambda config, run: config.model.encoder in (*CHANNEL_PRESETS, "sasrec", "sasrec_beta"),
        "this encoder has no feed-forward layer",
    ),
    "model.bias_function": (
        lambda config, run: "temporal" in _channels(config.model),
        "there is no functional temporal channel",
    ),
    "model.token_mixing": (lambda config, run: bool(_channels(config.model)), "this encoder mixes no channels"),
    "model.mixing_tolerance": (
        lambda config, run: (
            "temporal" in _channels(config.model)
            and config.model.bias_function == "pow"
            and config.model.token_mixing in ("auto", "linear")
        ),
        "only a pow map that is mixed linearly has an error to bound",
    ),
    "model.activation": (
        lambda config, run: config.model.encoder in ("sasrec", "sasrec_beta"),
        "only SASRec's feed-forward layer has a choice",
    ),
    "model.attention_dropout": (lambda config, run: config.model.encoder == "sasrec", "only SASRec has attention weights"),
    "loss.num_negatives": (
        lambda config, run: config.loss.negatives in ("per_token", "shared", "mixed"),
        "none are drawn",
    ),
    "loss.cross_rank": (lambda config, run: run.processes > 1, "there is one process"),
    "table.learning_rate": (
        lambda config, run: run.is_sharded,
        "the table is replicated, and trained by optimizer.learning_rate",
    ),
    "table.hbm_gb": (
        lambda config, run: run.device_type == "cuda" and config.table.sharding != "replicated",
        "no GPU memory is planned with",
    ),
    "table.ddr_gb": (
        lambda config, run: run.is_sharded or (run.device_type == "cpu" and config.table.sharding != "replicated"),
        "no host memory is planned with",
    ),
    "table.intra_host_gb_s": (lambda config, run: run.is_sharded, "the table is replicated"),
    "table.inter_host_gb_s": (lambda config, run: run.is_sharded, "the table is replicated"),
    "optimizer.min_learning_rate": (
        lambda config, run: config.optimizer.schedule == "cosine",
        "only schedule=cosine goes down to it",
    ),
    "trainer.timeout_minutes": (lambda config, run: run.processes > 1, "no other process is waited for"),
    "trainer.flight_recorder": (lambda config, run: run.processes > 1, "there is one process, and no collective to wait for"),
    "trainer.memory_snapshot": (lambda config, run: run.device_type == "cuda", "only a GPU's memory has snapshots"),
    "trainer.metric": (lambda config, run: _evaluates(config), "the last model is kept, without an evaluation before"),
    "trainer.patience": (lambda config, run: _evaluates(config), "there are no evaluations during training"),
}


def unused_keys(config: Config, run: Resolved) -> List[str]:
    """Names the keys that differ from their defaults and that this run does not use, each with the reason."""
    default = Config()
    return [
        f"{key} ({why})"
        for key, (is_used, why) in RULES.items()
        if _value(config, key) != _value(default, key) and not is_used(config, run)
    ]


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
