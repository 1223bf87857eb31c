"""FuXi-β (arXiv 2508.10615): the FuXi block with a positional and a functional temporal channel, no query-key map."""

from fuxi_torchrec.config import CHANNEL_PRESETS, ModelConfig
from fuxi_torchrec.encoders.fuxi import FuXiEncoder


def build_fuxi_beta(config: ModelConfig, padded_length: int, time_unit: float) -> FuXiEncoder:
    """FuXi-β with config.bias_function as f; config.channels makes the paper's ablations of it."""
    channels = CHANNEL_PRESETS["fuxi_beta"] if config.channels is None else config.channels
    return FuXiEncoder(config, channels, padded_length, time_unit)
