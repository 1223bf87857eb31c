"""FuXi-α (arXiv 2502.03036): the FuXi block with a positional, a bucketed temporal and a semantic channel."""

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders.fuxi_beta import FuXiEncoder


def build_fuxi_alpha(config: ModelConfig, padded_length: int, time_unit: float) -> FuXiEncoder:
    """FuXi-α: positional, bucketed temporal and semantic channels, unless config.channels says otherwise."""
    channels = CHANNEL_PRESETS["fuxi_alpha"] if config.channels is None else config.channels
    return FuXiEncoder(config, channels, padded_length, time_unit)
