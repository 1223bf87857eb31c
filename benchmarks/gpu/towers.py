"""Part: every encoder's tower, and the loss, forward and backward, at each length."""

from itertools import product
from typing import Any, Callable, List, Optional, Sequence

import torch

from benchmarks.gpu.cases import DTYPES, Case, Place, Row, Step, interleaved_seconds, times_of, wait
from benchmarks.gpu.least import loss_bytes, tower_bytes
from benchmarks.gpu.sizes import jagged_lengths
from fuxi_torchrec.encoders import ENCODERS, SequenceEncoder, build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.profiling.flops import FORWARD_AND_BACKWARD, encoder_flops, loss_flops
from fuxi_torchrec.profiling.memory import PeakMemory

TAU = 0.05


def cases(place: Place) -> List[Case]:
    """Lists losses and encoders at each length, in both precisions."""
    found = []
    for length in place.sizes.lengths:
        found += [Case(f"loss {k}, {length}", lambda k=k, n=length: loss(place, k, n)) for k in ("shared", "per_token")]
        for name, precision in product(ENCODERS, DTYPES):
            case = (name, length, precision)
            found.append(Case(f"{name}, {length}, {precision}", lambda case=case: tower(place, *case)))
    return found


def tower(place: Place, encoder: str, length: int, precision: str) -> Row:
    """Times one tower."""
    model, lengths = place.sizes.model(encoder), jagged_lengths(length, place.sizes.tokens)
    memory = PeakMemory(place.device)
    step = tower_step(place, build(place, encoder, length), lengths, precision)
    flops = FORWARD_AND_BACKWARD * encoder_flops(model, lengths)
    moved = tower_bytes(model, sum(lengths), DTYPES[precision].itemsize)
    return timed(place, step, memory, sum(lengths), flops, moved) | {
        "encoder": encoder,
        "length": length,
        "precision": precision,
        "users": len(lengths),
    }


def build(place: Place, encoder: str, length: int, token_mixing: str = "auto") -> SequenceEncoder:
    """Builds a tower that trains on users of up to `length`."""
    torch.manual_seed(0)
    model = place.sizes.model(encoder, token_mixing)
    return build_encoder(model, padded_length=length).to(place.device).train()


def tower_step(place: Place, encoder: SequenceEncoder, lengths: Sequence[int], precision: str) -> Step:
    """Makes a step: the batch's layout, forward in autocast as training has it, and backward."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    x_TD, grad_TD = (torch.randn(tokens, place.sizes.width).to(place.device) for _ in range(2))
    x_TD.requires_grad_()
    times_T1 = times_of(tokens, place.device)
    leaves = [x_TD, *encoder.parameters()]

    def step() -> None:
        layout = JaggedLayout.from_lengths(lengths, place.device)
        with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out_TD = encoder(x_TD, times_T1[:-1], times_T1[1:], layout)
        torch.autograd.grad(out_TD, leaves, grad_TD.to(out_TD.dtype), allow_unused=True)

    return step


def loss(place: Place, kind: str, length: int) -> Row:
    """Times one loss on a batch of that length's tokens; a loss knows nothing of lengths."""
    sizes, tokens = place.sizes, sum(jagged_lengths(length, place.sizes.tokens))
    memory = PeakMemory(place.device)
    step = loss_step(place, kind, tokens, LOSSES[kind])
    shared = kind == "shared"
    flops = FORWARD_AND_BACKWARD * loss_flops(tokens, sizes.pool if shared else sizes.negatives, sizes.width)
    counts = (sizes.pool, sizes.width, 0) if shared else (sizes.items, sizes.width, sizes.negatives)
    row = timed(place, step, memory, tokens, flops, loss_bytes(tokens, *counts))
    return row | {"loss": kind, "length": length, "precision": "fp32"}


LOSSES = {"shared": shared_sampled_softmax, "per_token": per_token_sampled_softmax}


def loss_step(place: Place, kind: str, tokens: int, function: Callable[..., Any]) -> Step:
    """Makes a step of a loss that takes what those of LOSSES take."""
    torch.manual_seed(0)
    sizes, device = place.sizes, place.device
    rows = sizes.pool if kind == "shared" else sizes.items
    inputs = [l2_normalize(torch.randn(n, sizes.width)).to(device).requires_grad_() for n in (tokens, tokens, rows)]
    own_T = torch.randint(0, rows, (tokens,)).to(device)
    drawn: Optional[torch.Tensor] = torch.arange(rows)
    if kind == "per_token":
        drawn = torch.randint(0, rows, (tokens, sizes.negatives), dtype=torch.int32)
    drawn = drawn.to(device)

    def step() -> None:
        torch.autograd.grad(function(*inputs, drawn, own_T, TAU), inputs)

    return step


def timed(place: Place, step: Step, memory: PeakMemory, tokens: int, flops: int, moved: int) -> Row:
    """Times a step and measures its peak memory, weights and inputs included."""
    seconds = interleaved_seconds({"step": step}, place)["step"]
    memory.restart()
    step()
    wait(place)
    peak = memory.peak()
    return {"seconds": seconds, "tokens": tokens, "flops": flops, "least_bytes": moved, "peak_bytes": peak}
