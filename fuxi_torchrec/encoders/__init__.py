"""The encoders, by name. An encoder maps jagged item embeddings and times to jagged outputs (see `SequenceEncoder`)."""

from typing import Callable, Dict

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import SequenceEncoder
from fuxi_torchrec.encoders.flash import FLASHEncoder
from fuxi_torchrec.encoders.fuxi_alpha import build_fuxi_alpha
from fuxi_torchrec.encoders.fuxi_beta import build_fuxi_beta
from fuxi_torchrec.encoders.hstu import HSTUEncoder
from fuxi_torchrec.encoders.hstu_beta import build_hstu_beta
from fuxi_torchrec.encoders.sasrec import SASRecEncoder
from fuxi_torchrec.encoders.sasrec_beta import SASRecBetaEncoder

ENCODERS: Dict[str, Callable[[ModelConfig, int, float], SequenceEncoder]] = {
    "fuxi_beta": build_fuxi_beta,
    "fuxi_alpha": build_fuxi_alpha,
    "hstu": HSTUEncoder,
    "sasrec": SASRecEncoder,
    "flash": FLASHEncoder,
    "hstu_beta": build_hstu_beta,
    "sasrec_beta": SASRecBetaEncoder,
}
"""config.encoder -> builder(config, padded_length, time_unit). A new encoder is one file and one line here, its cost in
`flops.BLOCK_COSTS`, and its name in config.EncoderName."""


def build_encoder(config: ModelConfig, *, padded_length: int, time_unit: float = 1.0) -> SequenceEncoder:
    """Builds the encoder that config names, freshly initialised.

    Args:
        config: hyperparameters, checked by config.rules.
        padded_length: rows of the position tables, and so the longest sequence.
        time_unit: seconds per tick of the data set's timestamps (0.001 for milliseconds).
    """
    return ENCODERS[config.encoder](config, padded_length, time_unit)
