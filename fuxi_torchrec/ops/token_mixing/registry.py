"""The mixing channels: one record each of parameters, initial values, map, and the fast versions that know it.

A new functional form is one map in `time_maps.py` and one record here (and its name in `config.schema.BiasFunction`). The
exact PyTorch versions (reference, blocked) then have it; the others take what the record says that they know.
Source of maps and initial values: docs/models.md, "The equations".
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Dict, FrozenSet, Mapping, Optional, Tuple

from torch import Tensor, nn

from fuxi_torchrec.ops.token_mixing.exponential_sums import B_RANGE
from fuxi_torchrec.ops.token_mixing.time_maps import NUM_BUCKETS, TIME_MAPS, TimeMap

PADDED_LENGTH = -1
"""In a parameter's shape: rows of the encoder's position table."""
STREAMING, LINEAR, NATIVE, TRITON = "streaming", "linear", "native", "triton"
"""Versions that do not know every channel: a state of fixed size (`encoders/streaming.py`), linear time (`linear.py`), C
(`native.py`), CUDA (`triton.py`)."""


@dataclass(frozen=True)
class Parameter:
    """A channel's parameter: its name in the state dict, its shape, and what draws its initial values in place."""

    name: str
    shape: Tuple[int, ...]
    init: Callable[[Tensor], object]

    def shape_for(self, padded_length: int) -> Tuple[int, ...]:
        """Returns the shape in an encoder with that many positions."""
        return tuple(padded_length if size == PADDED_LENGTH else size for size in self.shape)


@dataclass(frozen=True)
class MixingChannel:
    """A channel's record: everything that is known of it.

    Attributes:
        parameters: in the order in which every version takes them.
        time_map: the map of time differences; None: the channel does not look at the times.
        versions: of STREAMING, LINEAR, NATIVE and TRITON those that know the channel.
        linear_range: for a parameter by name, the values between which linear mixing keeps its tolerance.
    """

    parameters: Tuple[Parameter, ...] = ()
    time_map: Optional[TimeMap] = None
    versions: FrozenSet[str] = frozenset()
    linear_range: Mapping[str, Tuple[float, float]] = field(default_factory=dict)

    @property
    def num_scalars(self) -> int:
        """Number of entries of all parameters, of a channel whose parameters have a size of their own."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)


def _uniform(low: float, high: float) -> Callable[[Tensor], object]:
    return partial(nn.init.uniform_, a=low, b=high)


def _scalars(**bounds: Tuple[float, float]) -> Tuple[Parameter, ...]:
    return tuple(Parameter(name, (1,), _uniform(*low_high)) for name, low_high in bounds.items())


def _layers(*sizes: Tuple[int, int]) -> Tuple[Parameter, ...]:
    """Weight and bias of linear layers (in, out), drawn as PyTorch draws them."""
    parameters = []
    for number, (fan_in, out) in enumerate(sizes, 1):
        draw = _uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        parameters += [Parameter(f"weight_{number}", (out, fan_in), draw), Parameter(f"bias_{number}", (out,), draw)]
    return tuple(parameters)


def _prefixed(forms: Mapping[str, Tuple[Parameter, ...]]) -> Tuple[Parameter, ...]:
    return tuple(Parameter(f"{form}_{p.name}", p.shape, p.init) for form, ps in forms.items() for p in ps)


_FORMS = {
    "pow": _scalars(a=(-0.2, 0.2), b=(0.4, 0.8)),
    "exp": _scalars(a=(-0.2, 0.2), b=(-2.0, 0.0)),
    "log": _scalars(a=(-0.01, 0.01), b=(0.5, 1.0), c=(-0.05, 0.05)),
    "linear": _scalars(a=(-0.01, 0.01), b=(-0.2, 0.2)),
    "sin": _scalars(a=(-0.02, 0.02), b=(-math.pi, math.pi), c=(-2.0, 2.0), d=(0.0, 0.0)),
}
_ALL = frozenset({STREAMING, LINEAR, NATIVE, TRITON})
_TRITON = frozenset({TRITON})
_normal = partial(nn.init.normal_, std=0.02)

CHANNELS: Dict[str, MixingChannel] = {
    "positional": MixingChannel((Parameter("weight_N", (PADDED_LENGTH,), _normal),), None, _ALL),
    "zero": MixingChannel((), None, _ALL),
    "pow": MixingChannel(_FORMS["pow"], TIME_MAPS["pow"], _ALL, {"b": B_RANGE}),
    "exp": MixingChannel(_FORMS["exp"], TIME_MAPS["exp"], _ALL),
    "log": MixingChannel(_FORMS["log"], TIME_MAPS["log"], _TRITON),
    "linear": MixingChannel(_FORMS["linear"], TIME_MAPS["linear"], _TRITON),
    "sin": MixingChannel(_FORMS["sin"], TIME_MAPS["sin"], _TRITON),
    "mixed": MixingChannel(_prefixed(_FORMS), TIME_MAPS["mixed"], _TRITON),
    "nn": MixingChannel(_layers((1, 5), (5, 5), (5, 1)), TIME_MAPS["nn"]),
    "bucketed": MixingChannel((Parameter("weight", (NUM_BUCKETS + 1,), _normal),), TIME_MAPS["bucketed"], _TRITON),
}
"""Channel's name -> record."""
