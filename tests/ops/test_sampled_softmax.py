"""The fused losses equal the plain spelling: value and every gradient, at any shape, with collisions masked."""

import pytest
import torch

from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference

pytestmark = pytest.mark.usefixtures("kernels")

LARGE = pytest.param(5000, 1024, 4, marks=pytest.mark.thorough)

TAU = 0.05


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return l2_normalize(torch.randn(count, width, generator=generator)).requires_grad_()


def assert_same(loss, inputs, reference_of):
    """Compares with the reference in float64: loss to 1e-6, gradients to 1e-5 (norm-wise)."""
    (2.5 * loss).backward()  # an upstream factor must scale the gradients
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference_of(*doubles)
    (2.5 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-9)
    for x, y in zip(inputs, doubles):
        error = torch.linalg.vector_norm(x.grad - y.grad) / y.grad.norm().clamp(min=1e-12)
        assert error < 1e-5, error


@pytest.mark.parametrize(
    "tokens, unique, negatives, width",
    [(300, 40, 7, 12), (1, 2, 1, 3), (0, 4, 3, 3), (257, 40000, 5, 8), (64, 33, 128, 50)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_per_token_loss_equals_plain_spelling(tokens, unique, negatives, width, biased):
    inputs = unit_rows(tokens, width, 0), unit_rows(tokens, width, 1), unit_rows(unique, width, 2)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, unique, (tokens, negatives), generator=generator)
    positive = torch.randint(-1, min(unique, 5), (tokens,), generator=generator)
    bias = 3 * torch.randn(unique, generator=generator) if biased else None
    loss = per_token_sampled_softmax(*inputs, index, positive, TAU, bias, chunk_logits=50 * negatives)

    def plain(o, p, c):
        bias_TK = bias[index] if biased else None
        return sampled_softmax_reference(o, p, c[index], index == positive[:, None], TAU, bias_TK)

    assert_same(loss, inputs, plain)


@pytest.mark.parametrize("tokens, pool, width", [(300, 40, 12), (1, 1, 3), (0, 4, 3), LARGE])
@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "bias and mask"])
def test_shared_loss_equals_plain_spelling(tokens, pool, width, hooked):
    inputs = unit_rows(tokens, width, 0), unit_rows(tokens, width, 1), unit_rows(pool, width, 2)
    generator = torch.Generator().manual_seed(3)
    pool_ids = torch.randint(0, 2**40, (pool,), generator=generator)
    positive_ids = pool_ids[torch.randint(0, pool, (tokens,), generator=generator)]
    positive_ids[::2] = -1
    bias = 3 * torch.randn(pool, generator=generator) if hooked else None
    hidden = torch.rand(tokens, pool, generator=generator) < 0.3
    hook = (lambda rows: hidden[rows]) if hooked else None
    loss = shared_sampled_softmax(*inputs, pool_ids, positive_ids, TAU, bias, hook)

    def plain(o, p, c):
        masked = pool_ids[None] == positive_ids[:, None]
        masked = masked | hidden if hooked else masked
        bias_TK = bias[None].expand(tokens, -1) if hooked else None
        return sampled_softmax_reference(o, p, c[None].expand(tokens, -1, -1), masked, TAU, bias_TK)

    assert_same(loss, inputs, plain)


def test_masked_negatives_leave_no_trace():
    """A token whose negatives all equal its positive has loss 0 and gradient 0."""
    outputs, positives, candidates = unit_rows(2, 4, 0), unit_rows(2, 4, 1), unit_rows(1, 4, 2)
    index, positive = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    loss = per_token_sampled_softmax(outputs, positives, candidates, index, positive, TAU)
    loss.backward()
    assert loss == 0
    assert outputs.grad.abs().max() == 0 and candidates.grad.abs().max() == 0


def test_same_input_gives_the_same_bits():
    outputs, positives, candidates = unit_rows(3000, 8, 0), unit_rows(3000, 8, 1), unit_rows(50, 8, 2)
    index = torch.randint(0, 50, (3000, 16), generator=torch.Generator().manual_seed(3))
    positive = torch.full((3000,), -1)
    runs = []
    for _ in range(2):
        candidates.grad = None
        per_token_sampled_softmax(outputs, positives, candidates, index, positive, TAU).backward()
        runs.append(candidates.grad.clone())
    assert torch.equal(*runs)
