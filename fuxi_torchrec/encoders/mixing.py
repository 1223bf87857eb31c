"""What encoders with query-free token mixing share (FuXi, and FuXi-β's framework on HSTU and SASRec): channels per block,
and the batch's mixing plan, made once for all blocks.

Shapes: T tokens, H heads, d value size per head, C channels.
"""

from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders.base import EncoderBlock, SequenceEncoder
from fuxi_torchrec.encoders.channels import ChannelParameters
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing.dispatch import MixingPlan, mix_by_plan, plan_mixing
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.ops.token_mixing.time_maps import Channel

PlanKey = Tuple[str, ...]


@dataclass
class MixingContext:
    """The context that the blocks of one forward share. plans: by `MixingBlock.plan_key`, one where all blocks are
    alike."""

    layout: JaggedLayout
    gaps: TimeGaps
    plans: Dict[PlanKey, MixingPlan]


class MixingBlock(EncoderBlock):
    """A block with channels in `mixers`, by name; subclasses add the rest."""

    def __init__(self, config: ModelConfig, channels: Sequence[str], padded_length: int) -> None:
        super().__init__()
        self.asked_mixing = self.token_mixing = config.token_mixing
        kinds = {"bucketed_temporal": "bucketed", "temporal": config.bias_function}
        self.mixers = nn.ModuleDict(
            {name: ChannelParameters(kinds.get(name, name), padded_length) for name in channels}
        )

    def channel_parameters(self) -> Dict[str, ChannelParameters]:
        """Returns the channels' parameters by name."""
        return {name: mixer for name, mixer in self.mixers.items() if isinstance(mixer, ChannelParameters)}

    def reset_mixers(self) -> None:
        """Draws the channels' parameters anew."""
        for mixer in self.channel_parameters().values():
            mixer.reset_parameters()

    def mixing_channels(self) -> List[Channel]:
        """Returns what `mix_by_plan` takes."""
        return [mixer.channel() for mixer in self.channel_parameters().values()]

    @property
    def plan_key(self) -> PlanKey:
        """Key that tells this block's mixing plan from another block's."""
        return (self.token_mixing, *(mixer.kind for mixer in self.channel_parameters().values()))

    def check_mixing(self) -> None:
        """Checks whether `linear` token mixing is good for the temporal channel's parameters as they are."""
        within = all(mixer.suits_linear() for mixer in self.channel_parameters().values())
        if self.asked_mixing in ("auto", "linear"):
            self.token_mixing = self.asked_mixing if within else "exact"

    @torch.compiler.disable
    def mix_channels(self, v_THd: Tensor, context: MixingContext) -> Tensor:
        """Mixes the values by every channel: [T, H, C, d], the channels side by side."""
        return mix_by_plan(v_THd, self.mixing_channels(), context.plans[self.plan_key])


class MixingEncoder(SequenceEncoder):
    """A stack of `blocks`, MixingBlocks all."""

    def __init__(self, config: ModelConfig, blocks: Sequence[MixingBlock], padded_length: int, time_unit: float) -> None:
        super().__init__(config.embedding_dim, padded_length, config.input_dropout, time_unit)
        self.blocks.extend(blocks)
        self.mixing_tolerance = config.mixing_tolerance
        self.reset_parameters()
        self.register_load_state_dict_post_hook(lambda module, _: module.check_mixing())

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        super().reset_parameters()
        self.check_mixing()

    def train(self, mode: bool = True) -> "MixingEncoder":
        """Sets training or evaluation mode, and checks the mixing."""
        self.check_mixing()
        return super().train(mode)

    def check_mixing(self) -> None:
        """Checks whether linear token mixing is as exact as promised for the parameters' present values; what isn't
        is computed exactly until the next look. It reads values from the device, so a trainer calls it when it logs."""
        for block in self.mixing_blocks():
            block.check_mixing()

    def mixing_blocks(self) -> List[MixingBlock]:
        """Returns the blocks, as what they are."""
        return [block for block in self.blocks if isinstance(block, MixingBlock)]

    def batch_context(self, timestamps_T: Tensor, next_timestamps_T: Tensor, layout: JaggedLayout) -> MixingContext:
        """Plans the batch's mixing, once for all blocks that mix alike."""
        gaps = TimeGaps(timestamps_T, next_timestamps_T, layout, self.time_unit, self.mixing_tolerance)
        like = self._values_like()
        plans: Dict[PlanKey, MixingPlan] = {}
        for block in self.mixing_blocks():
            if block.mixers and block.plan_key not in plans:
                channels = block.mixing_channels()
                plans[block.plan_key] = plan_mixing(like, layout, channels, gaps, block.token_mixing)
        return MixingContext(layout, gaps, plans)

    def _values_like(self) -> Tensor:
        """An empty tensor of the type that the blocks' values will have: products are in autocast's type."""
        parameter = self.position_embedding_ND
        kind = parameter.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
        return torch.empty(0, dtype=dtype, device=parameter.device)
