"""The towers, by name. An encoder maps jagged item embeddings and times to jagged outputs (see `SequenceEncoder`)."""

from typing import Callable, Dict

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders.base import SequenceEncoder
from fuxi_torchrec.encoders.flash import FLASHEncoder
from fuxi_torchrec.encoders.fuxi_alpha import build_fuxi_alpha
from fuxi_torchrec.encoders.fuxi_beta import build_fuxi_beta
from fuxi_torchrec.encoders.hstu import HSTUEncoder
from fuxi_torchrec.encoders.hstu_beta import build_hstu_beta
from fuxi_torchrec.encoders.sasrec import SASRecEncoder
from fuxi_torchrec.encoders.sasrec_beta import SASRecBetaEncoder
from fuxi_torchrec.errors import UserError

ENCODERS: Dict[str, Callable[[ModelConfig, int, float], SequenceEncoder]] = {
    "fuxi_beta": build_fuxi_beta,
    "fuxi_alpha": build_fuxi_alpha,
    "hstu": HSTUEncoder,
    "sasrec": SASRecEncoder,
    "flash": FLASHEncoder,
    "hstu_beta": build_hstu_beta,
    "sasrec_beta": SASRecBetaEncoder,
}
"""config.encoder -> builder(config, padded_length, time_unit). A new tower is one file and one line here, its cost in
`flops.BLOCK_COSTS`, and its name in config.EncoderName."""

_AT_LEAST_ONE = ("embedding_dim", "num_blocks", "num_heads", "value_dim", "qk_dim")


def build_encoder(config: ModelConfig, *, padded_length: int, time_unit: float = 1.0) -> SequenceEncoder:
    """The tower that config names, freshly initialised.

    Args:
        config: hyperparameters.
        padded_length: rows of the position tables, and so the longest sequence.
        time_unit: seconds per tick of the data set's timestamps (0.001 for milliseconds).

    Raises:
        UserError: an unknown name, or sizes that do not fit.
    """
    if config.encoder not in ENCODERS:
        raise UserError(f"model.encoder: unknown {config.encoder!r}, choose from {', '.join(ENCODERS)}")
    for key in _AT_LEAST_ONE:
        if getattr(config, key) < 1:
            raise UserError(f"model.{key}: {getattr(config, key)} must be at least 1")
    for key in ("input_dropout", "dropout", "attention_dropout"):
        if not 0 <= getattr(config, key) < 1:
            raise UserError(f"model.{key}: {getattr(config, key)} must be at least 0 and below 1")
    is_single_stage = config.ffn_multiply == 0 and config.encoder in CHANNEL_PRESETS
    if int(config.embedding_dim * config.ffn_multiply) < 1 and not is_single_stage:
        raise UserError(f"model.ffn_multiply: {config.ffn_multiply} leaves no feed-forward layer")
    if padded_length < 1 or time_unit <= 0:
        raise UserError(f"padded length {padded_length} and time unit {time_unit} must be positive")
    return ENCODERS[config.encoder](config, padded_length, time_unit)
