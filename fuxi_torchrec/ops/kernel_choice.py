"""The C kernels or PyTorch's operators, for each family of operations: decided by timing both on this machine.

Which is faster depends on the processor, on the compiler and on the sizes of a run. So both are timed at a run's sizes, in
turns, for about a second in all, and what was found is kept beside the compiled kernels.
"""

import dataclasses
import json
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping

import torch
from torch import Tensor

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import cache
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise.dispatch import gated_rms_norm, silu_split, swiglu
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax
from fuxi_torchrec.ops.token_mixing.dispatch import LINEAR_FROM, Implementation, mix_tokens
from fuxi_torchrec.ops.token_mixing.native import supports
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

LOSES = 1.1
"""PyTorch computes a family where the kernels take more than this many times its time."""
TURNS = 5
SECONDS = 0.15
"""A family is timed for so long, or TURNS turns of both; the first turn of each warms up."""
MOST_TOKENS = 4096
MOST_LOGITS = 2**18

Step = Callable[[], object]


@dataclass(frozen=True)
class StepSizes:
    """What the time of a process's training step depends on.

    Attributes:
        tokens: of a step.
        longest: events of the longest user.
        channels: of query-free token mixing, by name; none for encoders without it.
        negatives: for each token; 0 where the loss is another one.
    """

    tokens: int
    longest: int
    width: int
    hidden: int
    heads: int
    value_dim: int
    channels: tuple[str, ...]
    dropout: float
    negatives: int
    items: int


def time_families(sizes: StepSizes) -> Dict[str, float]:
    """Times PyTorch's operators against the C kernels, forward and backward, at a step's sizes or the largest that takes
    no longer than a moment.

    Returns:
        The seconds of PyTorch over those of the kernels, for every family that the step has and the kernels know; empty
        where there are no kernels.
    """
    if native.library() is None:
        return {}
    kept = _kept_name(sizes)
    known = _read(kept)
    if known is not None:
        return known
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors' being in beta
        torch.manual_seed(0)
        ratios = {family: round(_ratio(family, step), 3) for family, step in _steps(sizes).items()}
    cache.keep_text(kept, json.dumps(ratios))
    return ratios


def losing(ratios: Mapping[str, float]) -> List[str]:
    """Lists the families in which the kernels lose by more than a tenth."""
    return sorted(family for family, ratio in ratios.items() if ratio * LOSES < 1)


def kept_ratios() -> List[Dict[str, float]]:
    """Reads what has been measured with the kernels of this machine, for whatever sizes."""
    folder = cache.own_folder()
    if native.library() is None or folder is None:
        return []
    found = [_read(path.name) for path in sorted(folder.glob(f"{native.name()}-*.json"))]
    return [ratios for ratios in found if ratios is not None]


def _kept_name(sizes: StepSizes) -> str:
    place = [dataclasses.astuple(sizes), torch.get_num_threads(), torch.__version__, torch.backends.cpu.get_cpu_capability()]
    return f"{native.name()}-{cache.digest(json.dumps(place))}.json"


def _read(name: str) -> Dict[str, float] | None:
    try:
        ratios = json.loads(cache.kept_text(name) or "")
        return {str(family): float(ratio) for family, ratio in ratios.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _ratio(family: str, step: Step) -> float:
    seconds: Dict[bool, List[float]] = {True: [], False: []}
    left, end = native.left_to_pytorch(), time.perf_counter() + SECONDS
    try:
        for turn in range(TURNS + 1):
            for in_c in (True, False):
                native.leave_to_pytorch(() if in_c else (family,))
                start = time.perf_counter()
                step()
                seconds[in_c].append(time.perf_counter() - start)
            if turn and time.perf_counter() > end:
                break
    finally:
        native.leave_to_pytorch(left)
    by_c, by_pytorch = (statistics.median(seconds[in_c][1:]) for in_c in (True, False))
    return by_pytorch / by_c


def _steps(sizes: StepSizes) -> Dict[str, Step]:
    steps: Dict[str, Step] = {"row_wise": _rows(sizes)}
    if sizes.channels and supports(torch.empty(1, sizes.heads, sizes.value_dim), [(name, []) for name in sizes.channels]):
        steps["token_mixing"] = _mixing(sizes, min(sizes.longest, LINEAR_FROM), "exact")
        if sizes.longest > LINEAR_FROM:
            steps["linear_mixing"] = _mixing(sizes, min(sizes.longest, MOST_TOKENS), "linear")
    if sizes.negatives:
        steps["sampled_softmax"] = _softmax(sizes)
    return steps


def _backward(outputs: List[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _rows(sizes: StepSizes) -> Step:
    T = min(sizes.tokens, MOST_TOKENS)
    both_TW, hidden_TF = torch.randn(T, 2 * sizes.width), torch.randn(T, 2 * max(1, sizes.hidden))

    def step() -> None:
        leaves = [x.clone().requires_grad_() for x in (both_TW, hidden_TF)]
        gate_TW, x_TW = silu_split(leaves[0], (sizes.width, sizes.width))
        _backward([gated_rms_norm(gate_TW, x_TW, sizes.dropout, True), swiglu(leaves[1])])

    return step


def _mixing(sizes: StepSizes, length: int, implementation: Implementation) -> Step:
    users = max(1, min(sizes.tokens, MOST_TOKENS) // length)
    layout = JaggedLayout.from_lengths([length] * users)
    values_THd = torch.randn(layout.num_tokens, sizes.heads, sizes.value_dim)
    times_T = torch.randint(0, 1000, values_THd.shape[:1]).view(users, length).cumsum(1).flatten()
    gaps = TimeGaps(times_T, times_T + 1, layout)
    channels = [(name, _parameters(name, length)) for name in sizes.channels]

    def step() -> None:
        _backward([mix_tokens(values_THd.clone().requires_grad_(), layout, channels, gaps, implementation)])

    return step


def _parameters(channel: str, length: int) -> List[Tensor]:
    parameters = [torch.empty(p.shape_for(length)) for p in CHANNELS[channel].parameters]
    for tensor, parameter in zip(parameters, CHANNELS[channel].parameters):
        parameter.init(tensor)
    return [tensor.requires_grad_() for tensor in parameters]


def _softmax(sizes: StepSizes) -> Step:
    T = max(1, min(sizes.tokens, MOST_LOGITS // sizes.negatives))
    U = min(sizes.items, T * sizes.negatives)
    rows = [torch.nn.functional.normalize(torch.randn(n, sizes.width)) for n in (T, T, U)]
    index_TK, positive_T = torch.randint(0, U, (T, sizes.negatives)), torch.randint(0, U, (T,))

    def step() -> None:
        outputs_TD, positives_TD, candidates_UD = (x.clone().requires_grad_() for x in rows)
        _backward([per_token_sampled_softmax(outputs_TD, positives_TD, candidates_UD, index_TK, positive_T, 0.05)])

    return step
