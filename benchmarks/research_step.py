"""One FuXi-β training step as research code spells it: the yardstick that this project's own step is measured against.

Padded [B, N, N] maps rebuilt in every block, every negative gathered as its own vector, dense AdamW on everything; the
same mathematics, shapes and hyperparameters as configs/. Data are random, in MovieLens' shape. Not part of the product.

Shape suffixes: B users, N padded length, T tokens, D embedding, H heads, K negatives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 200  # events a user, the target included
PADDED = 211
NEGATIVES = 128
TEMPERATURE = 0.05
DROPOUT = 0.2


@dataclass(frozen=True)
class Shape:
    """Sizes of a training step; `value_dim` is per head."""

    users: int
    items: int
    embedding_dim: int
    heads: int
    value_dim: int
    blocks: int
    ffn_multiply: int


SHAPES = {
    "ml-1m-base": Shape(128, 3706, 50, 1, 50, 2, 1),
    "ml-1m-large": Shape(128, 3706, 50, 2, 25, 8, 1),
    "ml-20m-large": Shape(16, 26744, 256, 8, 32, 8, 3),
}


@dataclass
class PaddedUsers:
    """ids_BN: 1 … V (0 would be padding); timestamps_BN: seconds, ascending; lengths_B: inputs of each user, whose
    targets stand one to the right. Every row is filled to PADDED, so that there is always an event behind the last."""

    ids_BN: Tensor
    timestamps_BN: Tensor
    lengths_B: Tensor

    @property
    def tokens(self) -> int:
        """Number of input tokens."""
        return int(self.lengths_B.sum())


def draw_users(shape: Shape, seed: int = 0) -> PaddedUsers:
    """Random users: log-normal lengths between 20 and LONGEST − 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = (torch.randn(shape.users, generator=generator) + 4.6).exp().long().clamp(20, LONGEST - 1)
    ids_BN = torch.randint(1, shape.items + 1, (shape.users, PADDED), generator=generator)
    gaps_BN = torch.randint(0, 5000, (shape.users, PADDED), generator=generator)
    return PaddedUsers(ids_BN, 978_300_000 + gaps_BN.cumsum(1), lengths_B)


class ResearchStep:
    """`step()` trains on the users once and returns the loss."""

    def __init__(self, shape: Shape, users: PaddedUsers, seed: int = 0):
        torch.manual_seed(seed)
        self.shape = shape
        self.use(users)
        self.causal_NN = torch.ones(PADDED, PADDED).tril()
        self.table = nn.Embedding(shape.items + 1, shape.embedding_dim)
        nn.init.trunc_normal_(self.table.weight, std=0.02)
        self.position = nn.Embedding(PADDED, shape.embedding_dim)
        nn.init.trunc_normal_(self.position.weight, std=shape.embedding_dim**-0.5)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.blocks))
        modules = nn.ModuleList([self.table, self.position, self.blocks])
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def use(self, users: PaddedUsers) -> None:
        """Takes these users for the next steps."""
        self.users = users
        self.keep_BN = torch.arange(PADDED)[None] < users.lengths_B[:, None]
        self.positives_T = users.ids_BN.roll(-1, 1)[self.keep_BN]

    def step(self) -> float:
        """Trains on all users once; returns the loss."""
        self.optimizer.zero_grad()
        loss = self._loss(self._outputs())
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _outputs(self) -> Tensor:
        x_BND = self.table(self.users.ids_BN) * self.shape.embedding_dim**0.5 + self.position(torch.arange(PADDED))
        h_TD = F.dropout(x_BND, DROPOUT)[self.keep_BN]
        for block in self.blocks:
            h_TD = block(h_TD, self.keep_BN, self.users.timestamps_BN, self.causal_NN)
        return _unit(h_TD)

    def _loss(self, out_TD: Tensor) -> Tensor:
        negatives_TK = torch.randint(1, self.shape.items + 1, (len(self.positives_T), NEGATIVES))
        score_TK = torch.einsum("td,tkd->tk", out_TD, _unit(self.table(negatives_TK))) / TEMPERATURE
        score_TK = torch.where(negatives_TK == self.positives_T[:, None], -5e4, score_TK)
        score_T1 = (out_TD * _unit(self.table(self.positives_T))).sum(-1, keepdim=True) / TEMPERATURE
        return -torch.log_softmax(torch.cat([score_T1, score_TK], 1), 1)[:, 0].mean()


class _Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D, width, hidden = shape.embedding_dim, shape.heads * shape.value_dim, shape.embedding_dim * shape.ffn_multiply
        self.heads, self.value_dim = shape.heads, shape.value_dim
        self.w_in = nn.Parameter(torch.randn(D, 3 * width) * 0.02)
        self.w_position = nn.Parameter(torch.randn(2 * PADDED - 1) * 0.02)
        self.a = nn.Parameter(torch.empty(1).uniform_(-0.2, 0.2))
        self.b = nn.Parameter(torch.empty(1).uniform_(0.4, 0.8))
        self.w0 = nn.Linear(2 * width, D)
        self.w1, self.w3 = (nn.Linear(D, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, D, bias=False)
        for linear in (self.w0, self.w1, self.w2, self.w3):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, h_TD: Tensor, keep_BN: Tensor, t_BN: Tensor, causal_NN: Tensor) -> Tensor:
        users, width = len(t_BN), self.heads * self.value_dim
        u, v = F.silu(_rms(h_TD) @ self.w_in).split([2 * width, width], dim=-1)
        next_BN = torch.cat([t_BN, t_BN[:, -1:]], 1)
        gap_BNN = next_BN[:, 1:, None] - next_BN[:, None, :-1]
        time_BNN = self.a * (gap_BNN.relu() + 1).pow(-self.b) * causal_NN
        i = torch.arange(PADDED)
        position_BNN = (self.w_position[PADDED - 1 + i[None, :] - i[:, None]] * causal_NN)[None].expand(users, -1, -1)
        v_BNHd = torch.zeros(users, PADDED, width).masked_scatter(keep_BN[..., None], v)
        v_BNHd = v_BNHd.view(users, PADDED, self.heads, self.value_dim)
        mixed = torch.cat([torch.einsum("bnm,bmhd->bnhd", a_BNN, v_BNHd) for a_BNN in (position_BNN, time_BNN)], -1)
        mixed = mixed.reshape(users, PADDED, -1)[keep_BN]
        h_TD = self.w0(F.dropout(u * _rms(mixed), DROPOUT)) + h_TD
        g_TD = F.dropout(_rms(h_TD), DROPOUT)
        return self.w2(F.silu(self.w1(g_TD)) * self.w3(g_TD)) + h_TD


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, [x.shape[-1]], eps=1e-6)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.norm(x, dim=-1, keepdim=True).clamp(min=1e-6)
