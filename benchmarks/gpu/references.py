"""Part: what there is against torch.compile of the plain reference, in turns.

A reference is padded and has whole [B, N, N] maps (SASRec's: `scaled_dot_product_attention` on the padded batch). Where
such maps do not fit into memory, that is the answer.

Shapes: T tokens, B users, N padded length, H heads, C channels, d value and q query/key size per head; D embedding, P pool,
K negatives.
"""

import types
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from typing import Any, Dict, Iterator, List, Optional
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import DTYPES, Case, Place, Row, Step, free, interleaved_seconds, times_of
from benchmarks.gpu.sizes import jagged_lengths
from benchmarks.gpu.towers import LOSSES, build, loss_step, tower_step
from fuxi_torchrec.encoders import ENCODERS, SequenceEncoder, flash, fuxi_beta, hstu, sasrec
from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, to_padded
from fuxi_torchrec.ops.pointwise_attention import silu_attention_reference
from fuxi_torchrec.ops.sampled_softmax.common import MASKED_LOGIT
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.reference import mix_reference
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps


def cases(place: Place) -> List[Case]:
    """Lists token mixing, losses and towers; each length's batch in turn."""
    found = []
    for length in place.sizes.lengths:
        for precision in DTYPES:
            found.append(Case(f"mixing, {length}, {precision}", lambda a=(length, precision): mixing(place, *a)))
        found += [Case(f"loss {k}, {length}", lambda k=k, n=length: loss(place, k, n)) for k in LOSSES]
        for name, precision in product(ENCODERS, DTYPES):
            case = (name, length, precision)
            found.append(Case(f"{name}, {length}, {precision}", lambda case=case: tower(place, *case)))
    return found


def against(place: Place, own: Step, reference: Step, **known: Any) -> Row:
    """Times both in turns. A reference that does not fit into memory leaves the other's time."""
    seconds: Dict[str, float] = {}
    with suppress(torch.OutOfMemoryError):
        seconds = interleaved_seconds({"own": own, "reference": reference}, place)
    if not seconds:
        free(place)
        seconds = interleaved_seconds({"own": own}, place)
    return {**known, "seconds": seconds["own"], "reference_seconds": seconds.get("reference")}


def mixing(place: Place, length: int, precision: str) -> Row:
    """Times the mixing of a block of FuXi-β's."""
    torch.manual_seed(0)
    sizes, device, lengths = place.sizes, place.device, jagged_lengths(length, place.sizes.tokens)
    T, H, d = sum(lengths), sizes.heads, sizes.width // sizes.heads
    times_T1 = times_of(T, device)
    values_THd = torch.randn(T, H, d).to(device, DTYPES[precision]).requires_grad_()
    grad_THCd = torch.randn(T, H, 2, d).to(device, DTYPES[precision])
    shapes = {"positional": [(length,)], "pow": [parameter.shape for parameter in CHANNELS["pow"].parameters]}
    channels = [(name, [torch.rand(s).to(device).requires_grad_() for s in shapes[name]]) for name in shapes]
    leaves = [values_THd, *(p for _, params in channels for p in params)]
    compiled = torch.compile(mix_reference, dynamic=False)

    def step(mix: Any) -> None:
        layout = JaggedLayout.from_lengths(lengths, device)
        gaps = TimeGaps(times_T1[:-1], times_T1[1:], layout)
        torch.autograd.grad(mix(values_THd, layout, channels, gaps), leaves, grad_THCd)

    return against(place, lambda: step(mix_tokens), lambda: step(compiled), length=length, precision=precision)


def loss(place: Place, kind: str, length: int) -> Row:
    """Times one loss."""
    tokens = sum(jagged_lengths(length, place.sizes.tokens))
    plain = torch.compile({"shared": shared_reference, "per_token": per_token_reference}[kind], dynamic=False)
    steps = (loss_step(place, kind, tokens, function) for function in (LOSSES[kind], plain))
    return against(place, *steps, length=length, loss=kind, precision="fp32")


def per_token_reference(
    outputs_TD: Tensor, positives_TD: Tensor, candidates_UD: Tensor, index_TK: Tensor, own_T: Tensor, temperature: float
) -> Tensor:
    """Gathers every token's negatives."""
    masked_TK = index_TK == own_T[:, None]
    return sampled_softmax_reference(outputs_TD, positives_TD, candidates_UD[index_TK], masked_TK, temperature)


def shared_reference(
    outputs_TD: Tensor, positives_TD: Tensor, pool_PD: Tensor, ids_P: Tensor, own_T: Tensor, temperature: float
) -> Tensor:
    """Makes all logits of the pool at once."""
    positive_T1 = (outputs_TD * positives_TD).sum(-1, keepdim=True) / temperature
    logits_TP = (outputs_TD @ pool_PD.T / temperature).masked_fill(ids_P == own_T[:, None], MASKED_LOGIT)
    return -torch.log_softmax(torch.cat([positive_T1, logits_TP], 1), 1)[:, 0].sum()


def tower(place: Place, encoder: str, length: int, precision: str) -> Row:
    """Times one tower; its reference has the same weights."""
    lengths = jagged_lengths(length, place.sizes.tokens)
    own = tower_step(place, build(place, encoder, length), lengths, precision)
    plain = reference_tower(place, encoder, length)
    step = tower_step(place, plain, lengths, precision)

    def reference() -> None:
        with plain_attention():
            step()

    return against(place, own, reference, encoder=encoder, length=length, precision=precision)


def reference_tower(place: Place, encoder: str, length: int) -> SequenceEncoder:
    """Builds a tower on the references, its blocks compiled whole: what mixes rows too, which the product's own
    compilation leaves out."""
    tower = build(place, encoder, length, "reference")
    for block in tower.blocks:
        for name in ("mix", "mix_channels"):
            method = getattr(type(block), name, None)
            if method is not None:
                setattr(block, name, types.MethodType(_undisabled(method), block))
        block.compile(dynamic=False)
    tower.is_compiled = True
    return tower


def _undisabled(method: Any) -> Any:
    """What `torch.compiler.disable` was given."""
    return getattr(method, "_torchdynamo_orig_callable", method)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Puts padded attention with whole maps in the place of the encoders' own."""
    with ExitStack() as stack:
        for module in (fuxi_beta, hstu):
            stack.enter_context(mock.patch.object(module, "silu_attention", silu_attention_reference))
        stack.enter_context(mock.patch.object(flash, "squared_relu_attention", squared_relu_reference))
        stack.enter_context(mock.patch.object(sasrec, "causal_softmax_attention", softmax_reference))
        yield


def squared_relu_reference(
    queries_THq: Tensor, keys_THq: Tensor, values_THd: Tensor, layout: JaggedLayout, lag_weights_N: Tensor
) -> Tensor:
    """Computes `squared_relu_attention` padded and with whole maps."""
    q_BHNq, k_BHNq, v_BHNd = (to_padded(x, layout).transpose(1, 2) for x in (queries_THq, keys_THq, values_THd))
    position_N = torch.arange(layout.max_length, device=layout.device)
    lag_NN = position_N[:, None] - position_N
    scores_BHNN = q_BHNq @ k_BHNq.mT + lag_weights_N[lag_NN.clamp(min=0)]
    map_BHNN = F.relu(scores_BHNN).square().masked_fill(lag_NN < 0, 0).to(v_BHNd.dtype)
    return from_padded((map_BHNN @ v_BHNd).transpose(1, 2), layout)


def softmax_reference(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: JaggedLayout, dropout_p: Optional[float] = None
) -> Tensor:
    """Computes `causal_softmax_attention` on the padded batch."""
    qkv = (to_padded(x, layout).transpose(1, 2) for x in (query_THd, key_THd, value_THd))
    return from_padded(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2), layout)
