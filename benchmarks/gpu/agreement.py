"""Part: the Triton kernels against the references in float64, in value and every gradient, at real sizes.

Bounds are those of `fuxi_torchrec.ops.closeness`. Every result is made twice, and must be the same bit by bit.

Shapes: T tokens, H heads, C channels, d value size per head, E = H * d; D embedding, K negatives, U candidates, P pool.
"""

from itertools import product
from typing import Callable, List, Sequence, Tuple

import torch
from torch import Tensor

from benchmarks.gpu.cases import DTYPES, Case, Place, Row, times_of
from benchmarks.gpu.sizes import jagged_lengths
from fuxi_torchrec.ops.closeness import UNDERFLOW, mixing_sizes, rounding, softmax_rounding, softmax_sizes
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS, TRITON
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

TAU = 0.05
GATHERED = 2**26
"""Numbers of candidates' rows that the reference of a loss holds at a time."""
NEAR = 2e-5
"""How near to a bucket's boundary, in buckets, two logarithms may put a gap on different sides."""


def cases(place: Place) -> List[Case]:
    """Lists both losses, token mixing by the papers' maps at every length, and by the other ones."""
    forms = [name for name, channel in CHANNELS.items() if TRITON in channel.versions and channel.time_map is not None]
    lengths = place.sizes.checked_lengths
    made = [(form, length) for length in lengths for form in ("pow", "bucketed")]
    made += [(form, lengths[0]) for form in forms if form not in ("pow", "bucketed")]
    found = [
        Case(f"mixing positional, {form}, {longest}, {precision}", lambda a=(form, longest, precision): mixing(place, *a))
        for (form, longest), precision in product(made, DTYPES)
    ]
    kinds = list(product(("shared", "per_token"), DTYPES))
    return [Case(f"loss {k}, {p}", lambda k=k, p=p: loss(place, k, p)) for k, p in kinds] + found


def mixing(place: Place, form: str, longest: int, precision: str) -> Row:
    """Compares token mixing by the positional channel and one of time."""
    torch.manual_seed(0)
    sizes, device, dtype = place.sizes, place.device, DTYPES[precision]
    H, d = sizes.heads, sizes.width // sizes.heads
    layout = JaggedLayout.from_lengths(jagged_lengths(longest, max(longest + 1, sizes.checked_tokens)), device)
    T = layout.num_tokens
    # With phases of many turns a sine is what its argument's rounding makes of it: short gaps for it.
    unit = 1e-6 if form in ("sin", "mixed") else 1.0
    times_T1 = spaced_times(T).to(device) if form == "bucketed" else times_of(T, device)
    gaps = TimeGaps(times_T1[:-1], times_T1[1:], layout, unit)
    values_THd = torch.randn(T, H, d).to(device, dtype)
    grad_THCd = torch.randn(T, H, 2, d).to(device, dtype)
    channels = [(name, parameters(name, longest, device)) for name in ("positional", form)]

    def run(implementation: str, kind: torch.dtype, of_maps: torch.dtype) -> List[Tensor]:
        values = values_THd.to(kind).requires_grad_()
        own = [(name, [p.to(of_maps).requires_grad_() for p in params]) for name, params in channels]
        out = mix_tokens(values, layout, own, gaps, implementation)
        leaves = [values, *(p for _, params in own for p in params)]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_THCd.to(kind))]

    expected = run("reference", torch.float64, torch.float64)
    bounds = mixing_sizes(values_THd, layout, channels, gaps, grad_THCd)
    # An entry of a map's gradient adds up E products, a result a row of them, and those of all users.
    tolerance = rounding(torch.float32, longest + H * d + layout.num_users)
    # In half precision a map's entries and the results are rounded; parameters' gradients are not.
    halves = 0.0 if precision == "fp32" else torch.finfo(dtype).eps
    tolerances = [tolerance + halves] * 2 + [tolerance] * (len(expected) - 2)
    names = ["output", "values", *(f"{name} {i}" for name, params in channels for i in range(len(params)))]
    return compare(lambda: run("triton", dtype, torch.float32), expected, bounds, tolerances, names)


def parameters(name: str, longest: int, device: torch.device) -> List[Tensor]:
    """Draws a channel's parameters: weights of either sign, scalars in the range that the test of the kernels has."""
    if name == "positional":
        return [torch.randn(longest).to(device)]
    (*shapes,) = (parameter.shape for parameter in CHANNELS[name].parameters)
    draw = torch.randn if name == "bucketed" else lambda shape: torch.rand(shape) * 0.6 + 0.1
    return [draw(shape).to(device) for shape in shapes]


def spaced_times(tokens: int) -> Tensor:
    """Makes int64 times of gaps that no logarithm puts into another bucket: multiples, ties among them, of a spacing that
    keeps away from every boundary."""
    steps_T1 = torch.randint(0, 2, (tokens + 1,)).cumsum(0)
    multiples = torch.arange(1, tokens + 2, dtype=torch.float64)
    for spacing in range(1000, 2000):
        bucket = (multiples * spacing).log() / 0.301
        if ((bucket - bucket.round()).abs() > NEAR).all():
            return 978_300_000 + spacing * steps_T1
    raise AssertionError("no spacing keeps away from the buckets' boundaries")


def loss(place: Place, kind: str, precision: str) -> Row:
    """Compares a sampled softmax."""
    torch.manual_seed(0)
    sizes, device, dtype = place.sizes, place.device, DTYPES[precision]
    T, K = max(sizes.checked_tokens, 2), sizes.pool if kind == "shared" else sizes.negatives
    U = sizes.pool if kind == "shared" else sizes.items
    inputs = [l2_normalize(torch.randn(n, sizes.width)).to(device, dtype) for n in (T, T, U)]
    own_T = torch.randint(-1, U, (T,)).to(device)
    index_TK = torch.arange(K).expand(T, K) if kind == "shared" else torch.randint(0, U, (T, K), dtype=torch.int32)
    index_TK = index_TK.to(device)

    def run() -> List[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        if kind == "shared":
            made = shared_sampled_softmax(
                *leaves, torch.arange(U, device=device), own_T, TAU, implementation="triton"
            )
        else:
            made = per_token_sampled_softmax(*leaves, index_TK, own_T, TAU, implementation="triton")
        return [made.detach(), *torch.autograd.grad(made, leaves)]

    expected, bounds = exact_loss(inputs, index_TK, own_T)
    tolerance = softmax_rounding(inputs[0], torch.cat(inputs[1:]), TAU, max(T, K))
    rounded = tolerance + (0.0 if precision == "fp32" else torch.finfo(dtype).eps / 2)
    names = ["loss", "outputs", "positives", "candidates"]
    return compare(run, expected, bounds, [tolerance] + [rounded] * 3, names)


def exact_loss(inputs: Sequence[Tensor], index_TK: Tensor, own_T: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
    """Computes loss and gradients by the reference in float64, and the sizes of what they sum, some tokens at a time."""
    outputs_TD, positives_TD, candidates_UD = (x.double() for x in inputs)
    T, K = index_TK.shape
    results = [outputs_TD.new_zeros(()), *(torch.zeros_like(x) for x in (outputs_TD, positives_TD, candidates_UD))]
    sizes = [torch.zeros_like(x) for x in results]
    part = max(1, GATHERED // max(1, K * outputs_TD.shape[1]))
    for start in range(0, T, part):
        rows, index_CK = slice(start, start + part), index_TK[start : start + part].long()
        leaves = [x.requires_grad_() for x in (outputs_TD[rows].clone(), positives_TD[rows].clone(), candidates_UD[index_CK])]
        masked_CK = index_CK == own_T[rows, None]
        value = sampled_softmax_reference(*leaves, masked_CK, TAU)
        made = [value.detach(), *torch.autograd.grad(value, leaves)]
        for totals, parts in ((results, made), (sizes, softmax_sizes(*leaves, masked_CK, TAU))):
            totals[0] += parts[0]
            totals[1][rows], totals[2][rows] = parts[1], parts[2]
            totals[3].index_add_(0, index_CK.flatten(), parts[3].flatten(0, 1))
    return results, sizes


def compare(
    run: Callable[[], List[Tensor]],
    expected: Sequence[Tensor],
    bounds: Sequence[Tensor],
    tolerances: Sequence[float],
    names: Sequence[str],
) -> Row:
    """Runs twice; tells the largest difference from what is expected as a part of its bound, and whether both runs gave
    the same bits."""
    actual, again = run(), run()
    parts = []
    for a, e, size, tolerance in zip(actual, expected, bounds, tolerances, strict=True):
        assert a.shape == e.shape == size.shape, (a.shape, e.shape, size.shape)
        difference = (a.double() - e).abs().max() if a.numel() else e.new_zeros(())
        limit = tolerance * (size.max() if size.numel() else 0.0) + UNDERFLOW
        parts.append((difference / limit).item() if torch.isfinite(a).all() else float("inf"))
    worst = max(range(len(parts)), key=parts.__getitem__)
    return {
        "agrees": "yes" if parts[worst] <= 1 else "NO",
        "of_bound": f"{parts[worst]:.2g}",
        "worst": names[worst],
        "repeats": "yes" if all(torch.equal(a, b) for a, b in zip(actual, again)) else "NO",
        "by_tensor": dict(zip(names, map(str, parts))),
        "is_wrong": not (parts[worst] <= 1 and all(torch.equal(a, b) for a, b in zip(actual, again))),
    }
