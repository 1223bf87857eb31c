"""A mixing channel's parameters as a module; what they are and how they are drawn stands in the channels' registry.

Parameters are float32 and are evaluated in float32 whatever the autocast. Source: docs/models.md, "FuXi block".
"""

import torch
from torch import nn

from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_maps import Channel


class ChannelParameters(nn.Module):
    """The parameters of one mixing channel, by the names of its record (the state dict's names).

    Args:
        kind: a name of `registry.CHANNELS`.
        padded_length: rows of the encoder's position table.
    """

    def __init__(self, kind: str, padded_length: int) -> None:
        super().__init__()
        self.kind, self.record = kind, CHANNELS[kind]
        for parameter in self.record.parameters:
            empty = torch.empty(parameter.shape_for(padded_length))
            self.register_parameter(parameter.name, nn.Parameter(empty))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for parameter in self.record.parameters:
            parameter.init(self.get_parameter(parameter.name))

    def channel(self) -> Channel:
        """Returns what `ops.token_mixing.mix_tokens` takes."""
        return self.kind, list(self.parameters())

    def suits_linear(self) -> bool:
        """Tells whether linear mixing keeps its tolerance for the parameters' present values, read from the device."""
        values = {name: self.get_parameter(name) for name in self.record.linear_range}
        return all(
            value.is_meta or low <= value.item() <= high
            for (low, high), value in zip(self.record.linear_range.values(), values.values())
        )
