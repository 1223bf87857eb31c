"""FuXi-β one event at a time: a user's state instead of the user's history.

Without a query-key product, all that a block's past contributes to a later row is, per channel,

    temporal    Σ_j f(t - t_j) v_j = a Σ_k w_k S_k,  S_k = Σ_j e^(-λ_k (τ - t_j)) v_j, moved on from time τ to t
    positional  Σ_j weight_N[n - j] v_j over the past values v_j

so that a request costs the same after ten events and after ten thousand, up to the positional sum. v_j itself depends on
t_{j+1} from the second block on: an event is *pending* until the time of the next one is known, and only then enters
S and the past values. Source: docs/models.md, "FuXi block"; `ops.exponential_sums` for w and λ.

Shapes: B users, D embedding, H heads, d value size per head, E = H * d, K exponentials, N rows of the position table, L
blocks.
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.token_mixing.exponential_sums import B_RANGE, power_law_sum
from fuxi_torchrec.ops.token_mixing.registry import CHANNELS, STREAMING

if TYPE_CHECKING:
    from fuxi_torchrec.encoders.fuxi_beta import FuXiBlock, FuXiEncoder


class StateFull(ValueError):
    """Raised for users whose position table is used up; `users` are their indices. The state is as it was: build it
    anew from each user's newest events (`FuXiEncoder.state_of`)."""

    def __init__(self, users: List[int], padded_length: int) -> None:
        self.users = users
        super().__init__(
            f"{len(users)} user(s) hold {padded_length} events already, all that the position table has rows for; build "
            f"their state anew from their newest events (first user: index {users[0]})"
        )


@dataclass
class StreamingState:
    """An encoder's memory of B users, batch dimension first: a store may keep each user's part by itself.

    count_B: int64, events that are final. has_pending_B: bool. pending_BD: the pending events' embeddings as given.
    pending_time_B, anchor_B: int64 ticks, the time of the pending and of the newest final event. values_BLNE: v of the
    final events, per block; sums_BLKE: S at time anchor; past_BLE: the positional sum over them for the pending row.
    """

    count_B: Tensor
    has_pending_B: Tensor
    pending_BD: Tensor
    pending_time_B: Tensor
    anchor_B: Tensor
    values_BLNE: Tensor
    sums_BLKE: Tensor
    past_BLE: Tensor

    @property
    def num_users(self) -> int:
        """Number of users, B."""
        return len(self.count_B)

    def tensors(self) -> Dict[str, Tensor]:
        """Returns the tensors by name, to be stored by torch.save (and loaded with weights_only) or any store of
        arrays."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Dict[str, Tensor]) -> "StreamingState":
        """Makes a state of stored tensors."""
        return cls(**tensors)

    def select(self, users: Sequence[int]) -> "StreamingState":
        """Copies some users' state."""
        index = torch.as_tensor(users, dtype=torch.int64, device=self.count_B.device)
        return StreamingState(**{name: x.index_select(0, index) for name, x in self.tensors().items()})

    @classmethod
    def join(cls, states: Sequence["StreamingState"]) -> "StreamingState":
        """Joins several users' states to one batch."""
        parts = [state.tensors() for state in states]
        return cls(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def clone(self) -> "StreamingState":
        """Copies the state."""
        return replace(self, **{name: x.clone() for name, x in self.tensors().items()})


@dataclass(frozen=True)
class _Temporal:
    """A block's f: its amplitude, exp's rate or pow's exponent, and the weights of its sums."""

    amplitude: Tensor
    form: str
    scalar: Tensor
    rates_K: Tensor
    weights_K: Optional[Tensor]

    def at(self, seconds_B: Tensor) -> Tensor:
        """f, float32 [B]."""
        if self.form == "exp":
            return self.amplitude * torch.exp(-self.scalar.exp() * seconds_B.float())
        return self.amplitude * torch.exp(-self.scalar * seconds_B.log1p().float())


def _temporal(encoder: "FuXiEncoder", block: "FuXiBlock") -> Optional[_Temporal]:
    """None for a block without a temporal channel, or whose function is zero."""
    mixer = block.channel_parameters().get("temporal")
    if mixer is None or mixer.kind == "zero":
        return None
    a, b = mixer.get_parameter("a"), mixer.get_parameter("b")
    if mixer.kind == "exp":
        return _Temporal(a, "exp", b, b.detach().double().exp(), None)
    power = power_law_sum(encoder.mixing_tolerance)
    weights_K, _ = power.weights_K(b)
    return _Temporal(a, "pow", b, power.rates_K(b.device), weights_K.float())


def _sums(encoder: "FuXiEncoder") -> int:
    """K: how many sums a block keeps, the same for all blocks of an encoder."""
    kinds = {
        block.channel_parameters()["temporal"].kind for block in encoder.fuxi_blocks() if "temporal" in block.mixers
    }
    return {"pow": power_law_sum(encoder.mixing_tolerance).terms, "exp": 1}.get(kinds.pop() if kinds else "zero", 0)


def check_streamable(encoder: "FuXiEncoder") -> None:
    """Checks that a state of fixed size can stand for the past, and that dropout is off. Raises UserError."""
    if encoder.training:
        raise UserError("streaming needs the encoder in eval mode: dropout would make every answer another one")
    known = ", ".join(name for name, record in CHANNELS.items() if STREAMING in record.versions)
    if "semantic" in encoder.channels:
        raise UserError(f"model.channels: semantic has no state of fixed size; streaming knows {known}")
    for number, block in enumerate(encoder.fuxi_blocks()):
        for name, mixer in block.channel_parameters().items():
            if STREAMING not in mixer.record.versions:
                key = "model.bias_function" if name == "temporal" else "model.channels"
                raise UserError(f"{key}: {mixer.kind} has no state of fixed size; streaming knows {known}")
            if not mixer.suits_linear():
                b = mixer.get_parameter("b").item()
                raise UserError(
                    f"blocks.{number}.mixers.{name}.b: {b:.4g} is outside {B_RANGE}, where the power law is a sum "
                    "of exponentials"
                )


def empty_state(encoder: "FuXiEncoder", batch: int) -> StreamingState:
    """Makes the state of `batch` users without events."""
    check_streamable(encoder)
    parameter = encoder.position_embedding_ND
    L, N, E, K = len(encoder.blocks), encoder.padded_length, encoder.value_width, _sums(encoder)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=parameter.device)

    return StreamingState(
        count_B=zeros(dtype=torch.int64),
        has_pending_B=zeros(dtype=torch.bool),
        pending_BD=zeros(encoder.embedding_dim),
        pending_time_B=zeros(dtype=torch.int64),
        anchor_B=zeros(dtype=torch.int64),
        values_BLNE=zeros(L, N if "positional" in encoder.channels else 0, E),
        sums_BLKE=zeros(L, K, E),
        past_BLE=zeros(L, E),
    )


@torch.no_grad()
def observe(encoder: "FuXiEncoder", state: StreamingState, item_embedding_BD: Tensor, timestamp_B: Tensor) -> None:
    """Takes an event of every user, in place; see `FuXiEncoder.observe`."""
    check_streamable(encoder)
    _check_event(encoder, state, item_embedding_BD)
    full_B = state.count_B + state.has_pending_B >= encoder.padded_length
    if full_B.any():
        raise StateFull(full_B.nonzero()[:, 0].tolist(), encoder.padded_length)
    timestamp_B = _times(state, timestamp_B)
    if state.has_pending_B.any():
        _, values_BLE = _run(encoder, state, timestamp_B)
        _finalise(encoder, state, values_BLE)
    state.pending_BD, state.pending_time_B = item_embedding_BD.detach().float().clone(), timestamp_B.clone()
    state.has_pending_B = torch.ones_like(state.has_pending_B)
    _sum_positions(encoder, state)


@torch.no_grad()
def query(encoder: "FuXiEncoder", state: StreamingState, at_B: Tensor) -> Tensor:
    """Computes the output of every user's newest event for a request at a time; see `FuXiEncoder.query`."""
    check_streamable(encoder)
    if not bool(state.has_pending_B.all()):
        missing = (~state.has_pending_B).nonzero()[:, 0].tolist()
        raise ValueError(f"user {missing[0]} has no event yet: observe one before a query")
    return _run(encoder, state, _times(state, at_B))[0]


@torch.no_grad()
def state_of(
    encoder: "FuXiEncoder", embeddings_TD: Tensor, timestamps_T: Tensor, layout: JaggedLayout
) -> StreamingState:
    """Computes the state after whole histories, by one full pass; see `FuXiEncoder.state_of`."""
    check_streamable(encoder)
    state = empty_state(encoder, layout.num_users)
    last_B = layout.offsets_B1[1:] - 1
    if layout.num_tokens == 0:
        return state
    next_T = torch.cat([timestamps_T[1:], timestamps_T[-1:]])
    next_T[last_B[layout.lengths_B > 0]] = timestamps_T[last_B[layout.lengths_B > 0]]
    values_TLE = encoder.block_values(embeddings_TD, timestamps_T, next_T, layout)
    has_B = layout.lengths_B > 0
    state.has_pending_B, state.count_B = has_B, (layout.lengths_B - 1).clamp(min=0)
    state.pending_BD[has_B] = embeddings_TD[last_B[has_B]].float()
    state.pending_time_B[has_B] = timestamps_T[last_B[has_B]]
    more_B = layout.lengths_B > 1
    state.anchor_B[more_B] = timestamps_T[last_B[more_B] - 1]
    _fill(encoder, state, values_TLE, timestamps_T, layout)
    _sum_positions(encoder, state)
    return state


def _fill(
    encoder: "FuXiEncoder", state: StreamingState, values_TLE: Tensor, timestamps_T: Tensor, layout: JaggedLayout
) -> None:
    """Values and sums of all events but each user's last."""
    final_T = layout.position_T < (layout.lengths_B - 1)[layout.user_T]
    user_F, position_F = layout.user_T[final_T], layout.position_T[final_T]
    seconds_F = (state.anchor_B[user_F] - timestamps_T[final_T]).clamp(min=0).double() * encoder.time_unit
    for level, block in enumerate(encoder.fuxi_blocks()):
        values_FE = values_TLE[final_T, level]
        if state.values_BLNE.shape[2]:
            state.values_BLNE[user_F, level, position_F] = values_FE
        temporal = _temporal(encoder, block)
        if temporal is not None:
            for k, rate in enumerate(temporal.rates_K):  # [events, K, E] would not fit
                decayed_FE = torch.exp(-rate * seconds_F).float()[:, None] * values_FE
                state.sums_BLKE[:, level, k].index_add_(0, user_F, decayed_FE)


def _run(encoder: "FuXiEncoder", state: StreamingState, next_B: Tensor) -> Tuple[Tensor, Tensor]:
    """The pending row through all blocks with next_B as its next time: output [B, D] and v of every block [B, L, E]."""
    since_B, own_B = (
        (next_B - before_B).clamp(min=0).double() * encoder.time_unit
        for before_B in (state.anchor_B, state.pending_time_B)
    )
    x_BD = encoder.input_step(state.pending_BD, state.count_B)
    values = []
    for level, block in enumerate(encoder.fuxi_blocks()):
        u, v_BE, _ = block.project(x_BD)
        parts = [
            _mixed(encoder, block, name, state, level, v_BE, since_B, own_B).unflatten(1, (block.num_heads, block.value_dim))
            for name in block.mixers
        ]
        x_BD = block.residual_stages(x_BD, u, torch.stack(parts, 2).flatten(1))
        values.append(v_BE)
    return x_BD, torch.stack(values, 1)


def _mixed(
    encoder: "FuXiEncoder",
    block: "FuXiBlock",
    name: str,
    state: StreamingState,
    level: int,
    v_BE: Tensor,
    since_B: Tensor,
    own_B: Tensor,
) -> Tensor:
    """One channel's output, [B, E]."""
    if name == "positional":
        return state.past_BLE[:, level] + block.channel_parameters()[name].get_parameter("weight_N")[0] * v_BE
    temporal = _temporal(encoder, block)
    if temporal is None:
        return torch.zeros_like(v_BE)
    moved_BK = torch.exp(-since_B[:, None] * temporal.rates_K).float()
    if temporal.weights_K is not None:
        moved_BK = moved_BK * temporal.weights_K
    past_BE = torch.bmm((temporal.amplitude * moved_BK)[:, None], state.sums_BLKE[:, level])[:, 0]
    return past_BE + temporal.at(own_B)[:, None] * v_BE


def _finalise(encoder: "FuXiEncoder", state: StreamingState, values_BLE: Tensor) -> None:
    """The pending events of those users who have one enter values and sums; the anchor moves to their time."""
    users = state.has_pending_B.nonzero()[:, 0]
    whole = len(users) == state.num_users
    if state.values_BLNE.shape[2]:
        state.values_BLNE[users, :, state.count_B[users]] = values_BLE[users]
    moved_B = torch.where(state.count_B > 0, state.pending_time_B - state.anchor_B, 0)
    seconds_B = moved_B.clamp(min=0).double() * encoder.time_unit
    for level, block in enumerate(encoder.fuxi_blocks()):
        temporal = _temporal(encoder, block)
        if temporal is None:
            continue
        decay_BK1 = torch.exp(-seconds_B[:, None] * temporal.rates_K).float()[..., None]
        sums_BKE = torch.addcmul(values_BLE[:, level, None], decay_BK1, state.sums_BLKE[:, level])
        state.sums_BLKE[:, level] = (
            sums_BKE if whole else torch.where(state.has_pending_B[:, None, None], sums_BKE, state.sums_BLKE[:, level])
        )
    state.anchor_B = torch.where(state.has_pending_B, state.pending_time_B, state.anchor_B)
    state.count_B = state.count_B + state.has_pending_B


def _sum_positions(encoder: "FuXiEncoder", state: StreamingState) -> None:
    """past[b] = Σ_{j < n_b} weight_N[n_b - j] v_j: it depends on nothing that is still to come."""
    if not state.values_BLNE.shape[2]:
        return
    n = int(state.count_B.max())
    lag_Bn = state.count_B[:, None] - torch.arange(n, device=state.count_B.device)
    for level, block in enumerate(encoder.fuxi_blocks()):
        weight_N = block.channel_parameters()["positional"].get_parameter("weight_N")
        weight_Bn = weight_N[lag_Bn.clamp(min=0)].masked_fill(lag_Bn <= 0, 0)
        state.past_BLE[:, level] = torch.bmm(weight_Bn[:, None], state.values_BLNE[:, level, :n])[:, 0]


def _times(state: StreamingState, times_B: Tensor) -> Tensor:
    times_B = torch.as_tensor(times_B, device=state.count_B.device)
    if times_B.dtype != torch.int64:
        raise ValueError(f"times are {times_B.dtype}: they must be int64 ticks")
    times_B = times_B.expand(state.num_users)
    early_B = state.has_pending_B & (times_B < state.pending_time_B)
    if early_B.any():
        user = int(early_B.nonzero()[0, 0])
        raise ValueError(
            f"user {user}: time {int(times_B[user])} is before the newest event's, {int(state.pending_time_B[user])}"
        )
    return times_B


def _check_event(encoder: "FuXiEncoder", state: StreamingState, item_embedding_BD: Tensor) -> None:
    if item_embedding_BD.shape != (state.num_users, encoder.embedding_dim):
        raise ValueError(
            f"embeddings of shape {tuple(item_embedding_BD.shape)}: the state holds {state.num_users} users of width "
            f"{encoder.embedding_dim}"
        )
