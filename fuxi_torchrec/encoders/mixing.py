"""What towers with query-free token mixing share (FuXi, and FuXi-β's framework on HSTU and SASRec): channels per block,
and the batch's time gaps, made once for all blocks.

Shapes: T tokens, H heads, d value size per head, C channels.
"""

from dataclasses import dataclass
from typing import Any, List, Sequence

from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import SequenceEncoder
from fuxi_torchrec.encoders.channels import BucketedTemporalChannel, FunctionalTemporalChannel, PositionalChannel
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens, prepare
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.ops.token_mixing.time_maps import Channel


@dataclass
class MixingContext:
    layout: JaggedLayout
    gaps: TimeGaps


class MixingBlock(nn.Module):
    """A block with channels in `mixers`, by name; subclasses add the rest."""

    def __init__(self, config: ModelConfig, channels: Sequence[str], padded_length: int) -> None:
        super().__init__()
        self.asked_mixing = self.token_mixing = config.token_mixing
        self.mixers = nn.ModuleDict(
            {name: _make_mixer(name, config.bias_function, padded_length) for name in channels}
        )

    def reset_mixers(self) -> None:
        for mixer in self.mixers.values():
            mixer.reset_parameters()

    def mixing_channels(self) -> List[Channel]:
        """For `mix_tokens`."""
        return [mixer.channel() for mixer in self.mixers.values()]

    def check_mixing(self) -> None:
        """Looks whether `linear` token mixing is good for the temporal channel's parameters as they are."""
        within = all(mixer.suits_linear() for mixer in self.mixers.values())
        if self.asked_mixing in ("auto", "linear"):
            self.token_mixing = self.asked_mixing if within else "exact"

    def mix_channels(self, v_THd: Tensor, context: MixingContext) -> Tensor:
        """[T, H, C, d], the channels side by side."""
        return mix_tokens(v_THd, context.layout, self.mixing_channels(), context.gaps, self.token_mixing)


def _make_mixer(name: str, bias_function: str, padded_length: int) -> nn.Module:
    if name == "positional":
        return PositionalChannel(padded_length)
    if name == "bucketed_temporal":
        return BucketedTemporalChannel()
    return FunctionalTemporalChannel(bias_function)


class MixingEncoder(SequenceEncoder):
    """A stack of `blocks`, MixingBlocks all."""

    def __init__(self, config: ModelConfig, blocks: Sequence[MixingBlock], padded_length: int, time_unit: float) -> None:
        super().__init__(config.embedding_dim, padded_length, config.input_dropout, time_unit)
        self.blocks.extend(blocks)
        self.mixing_tolerance = config.mixing_tolerance
        self.reset_parameters()
        self.register_load_state_dict_post_hook(lambda module, _: module.check_mixing())

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.check_mixing()

    def train(self, mode: bool = True) -> "MixingEncoder":
        self.check_mixing()
        return super().train(mode)

    def check_mixing(self) -> None:
        """Looks whether linear token mixing is as exact as promised for the parameters' present values; what isn't is
        computed exactly until the next look. It reads values from the device, so a trainer calls it when it logs."""
        for block in self.blocks:
            block.check_mixing()

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> Any:
        gaps = TimeGaps(timestamps_T, next_timestamps_T, layout, self.time_unit, self.mixing_tolerance)
        for block in self.blocks:
            prepare(layout, block.mixing_channels(), gaps, block.token_mixing)
        return MixingContext(layout, gaps)
