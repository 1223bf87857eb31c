"""The parameters of the FuXi block's channels and of HSTU's biases, one small module a channel.

Parameters are float32 and are evaluated in float32 whatever the autocast. Source: docs/models.md, "FuXi block".
"""

import math
from typing import List, Tuple

import torch
from torch import Tensor, nn

from fuxi_torchrec.ops.token_mixing.exponential_sums import B_RANGE
from fuxi_torchrec.ops.token_mixing.time_maps import NUM_BUCKETS

_BOUNDS = {
    "pow": {"a": (-0.2, 0.2), "b": (0.4, 0.8)},
    "exp": {"a": (-0.2, 0.2), "b": (-2.0, 0.0)},
    "log": {"a": (-0.01, 0.01), "b": (0.5, 1.0), "c": (-0.05, 0.05)},
    "linear": {"a": (-0.01, 0.01), "b": (-0.2, 0.2)},
    "sin": {"a": (-0.02, 0.02), "b": (-math.pi, math.pi), "c": (-2.0, 2.0), "d": (0.0, 0.0)},
}
_NN_LAYERS = ((1, 5), (5, 5), (5, 1))


class PositionalChannel(nn.Module):
    """A[i,j] = weight_N[i - j]: a weight per lag, a set per block."""

    kind = "positional"

    def __init__(self, padded_length: int) -> None:
        super().__init__()
        self.weight_N = nn.Parameter(torch.empty(padded_length))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_N, std=0.02)

    def channel(self) -> Tuple[str, List[Tensor]]:
        """For `ops.token_mixing.mix_tokens`."""
        return self.kind, [self.weight_N]

    def suits_linear(self) -> bool:
        """Whether `linear` token mixing keeps its tolerance for the parameters' present values."""
        return True


class BucketedTemporalChannel(nn.Module):
    """A[i,j] = weight[bucket(t_{i+1} - t_j)] (FuXi-α, HSTU)."""

    kind = "bucketed"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(NUM_BUCKETS + 1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def channel(self) -> Tuple[str, List[Tensor]]:
        return self.kind, [self.weight]

    def suits_linear(self) -> bool:
        return True


class FunctionalTemporalChannel(nn.Module):
    """A[i,j] = f(t_{i+1} - t_j), f one of the eight forms (FuXi-β, section 3). Its scalars are named as in the model
    page (`a`, `b`, …; `pow_a`, … for mixed; `weight_1`, `bias_1`, … for nn)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.kind = form
        for name, shape in self._shapes(form):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @staticmethod
    def _shapes(form: str):
        if form == "zero":
            return []
        if form == "nn":
            weights = [(f"weight_{k}", (out, into)) for k, (into, out) in enumerate(_NN_LAYERS, 1)]
            biases = [(f"bias_{k}", (out,)) for k, (_, out) in enumerate(_NN_LAYERS, 1)]
            return [pair for both in zip(weights, biases) for pair in both]
        if form == "mixed":
            return [(f"{part}_{name}", (1,)) for part, bounds in _BOUNDS.items() for name in bounds]
        return [(name, (1,)) for name in _BOUNDS[form]]

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if self.kind == "nn":
                fan_in = _NN_LAYERS[int(name[-1]) - 1][0]
                low, high = -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in)
            else:
                form, scalar = name.split("_") if self.kind == "mixed" else (self.kind, name)
                low, high = _BOUNDS[form][scalar]
            nn.init.uniform_(parameter, low, high)

    def channel(self) -> Tuple[str, List[Tensor]]:
        return self.kind, list(self.parameters())

    def suits_linear(self) -> bool:
        """Only `pow` is approximated; reads b from the device."""
        if self.kind != "pow" or self.b.is_meta:
            return True
        return B_RANGE[0] <= self.b.item() <= B_RANGE[1]
