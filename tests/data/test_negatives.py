"""Negatives: draws are what they claim, collisions and history leave no trace, and with logQ every sampler estimates
the full softmax."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuxi_torchrec.config import Config, LossConfig
from fuxi_torchrec.config.rules import check
from fuxi_torchrec.data.batch import EVENTS, NEGATIVES, collate
from fuxi_torchrec.data.dataset import UserRows
from fuxi_torchrec.data.item_distribution import AliasTable, ItemDistribution
from fuxi_torchrec.data.negative_sampler import InBatchItems, NegativeSampler
from fuxi_torchrec.data.splits import Windows
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.model.candidates import (
    MASKED_LOGIT,
    HistoryMask,
    RankShare,
    _repeated_in_batch,
    expected_count,
    shared_candidates,
)
from fuxi_torchrec.model.recommender import build_model
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax

V, D, TAU, POSITIVE = 30, 6, 0.3, 7
FREQUENCY_V = np.random.default_rng(5).zipf(1.5, V).clip(max=300)
SHARE_V = (FREQUENCY_V + 1) / (FREQUENCY_V + 1).sum()


def users_batch(lengths, config, step=1, items=V, seed=2, rank=0):
    """A collated batch of users with so many random events each."""
    random, offsets = np.random.default_rng(seed), np.concatenate([[0], np.cumsum(lengths)])
    events = random.integers(0, items, offsets[-1])
    rows = UserRows(np.arange(len(lengths)), offsets, events, np.sort(random.integers(0, 10**6, offsets[-1])))
    sampler = NegativeSampler(config, items, seed=3, rank=rank, frequency_V=FREQUENCY_V if items == V else None)
    return collate(rows, Windows(rows.user_ids_U, offsets[:-1], offsets[1:]), sampler, step)


def test_full_is_the_exact_softmax_over_all_items():
    config = Config(loss=LossConfig(negatives="full", temperature=TAU))
    config.model.embedding_dim = config.model.value_dim = D
    batch = users_batch([4, 9, 2], config.loss)
    model = build_model(config, V, 1.0, torch.device("cpu")).eval()
    outputs_TD = model.tower.encode(model.embeddings(batch.ids)[EVENTS].values(), batch)
    table_VD = l2_normalize(next(model.embeddings.parameters()))
    targets_T = batch.ids[EVENTS].values()[batch.input_index_T + 1]
    wanted = torch.nn.functional.cross_entropy(outputs_TD @ table_VD.t() / TAU, targets_T, reduction="sum")
    torch.testing.assert_close(model(batch), wanted)
    assert batch.num_candidates == V


# --- drawing


@pytest.mark.parametrize(
    "weight",
    [np.ones(5), np.r_[1000.0, np.ones(50)], np.r_[np.zeros(5), 1.0], np.array([2.0]), FREQUENCY_V, FREQUENCY_V**3.0],
)
def test_alias_table_holds_exactly_the_distribution_it_was_made_of(weight):
    table = AliasTable(weight)
    mass = table.keep_V + np.bincount(table.alias_V, 1 - table.keep_V, minlength=len(weight))
    np.testing.assert_allclose(mass / len(weight), weight / weight.sum(), atol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_draws_follow_the_probabilities_that_logq_uses(alpha):
    distribution = ItemDistribution(V, FREQUENCY_V, alpha)
    probability = distribution.probability(np.arange(V))
    assert probability.sum() == pytest.approx(1) and probability.min() > 0
    np.testing.assert_allclose(probability * ((FREQUENCY_V + 1.0) ** alpha).sum(), (FREQUENCY_V + 1.0) ** alpha)
    draws = 400_000
    counts = np.bincount(distribution.draw(np.random.default_rng(0), draws, np.int64), minlength=V)
    deviation = (counts - draws * probability) / np.sqrt(draws * probability * (1 - probability))
    assert np.abs(deviation).max() < 4


@pytest.mark.parametrize("kind", ["per_token", "shared", "in_batch", "mixed"])
def test_draws_are_a_function_of_seed_rank_and_step(kind):
    config = LossConfig(negatives=kind, sampling_alpha=0.0 if kind == "in_batch" else 0.5, num_negatives=20)
    config.max_in_batch = 6 if kind in ("in_batch", "mixed") else None
    positives = np.random.default_rng(0).integers(0, V, 40)

    def drawn(seed, rank, step):
        ids_U, negatives = NegativeSampler(config, V, seed, rank, FREQUENCY_V).sample(positives, step)
        if kind == "per_token":
            return ids_U.tolist(), negatives.index_TK.tolist()
        return ids_U.tolist(), negatives.in_batch and negatives.in_batch.index_N.tolist()

    assert drawn(1, 0, 5) == drawn(1, 0, 5)
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        assert drawn(1, 0, 5) != drawn(*other)


def test_in_batch_items_are_the_distinct_positives_and_are_not_looked_up_twice():
    batch = users_batch([4, 9, 2], LossConfig(negatives="in_batch"))
    positives = batch.ids[EVENTS].values()[batch.input_index_T + 1]
    assert positives[batch.negatives.in_batch.index_N].tolist() == positives.unique().tolist()
    assert batch.ids[NEGATIVES].values().numel() == 0
    few = users_batch([4, 9, 2], LossConfig(negatives="in_batch", max_in_batch=3)).negatives.in_batch
    assert few.index_N.numel() == 3 and few.kept == 3 / positives.unique().numel()


@pytest.mark.parametrize(
    "values, key",
    [
        ({"cross_rank": True}, "cross_rank"),
        ({"mask_history": True}, "mask_history"),
        ({"negatives": "in_batch", "sampling_alpha": 0.5}, "sampling_alpha"),
        ({"negatives": "shared", "uniform_negatives": 5}, "uniform_negatives"),
        ({"negatives": "in_batch", "uniform_negatives": 5}, "uniform_negatives"),
        ({"negatives": "shared", "max_in_batch": 5}, "max_in_batch"),
        ({"negatives": "mixed", "max_in_batch": 0}, "max_in_batch"),
        ({"negatives": "full", "log_q": True}, "log_q"),
        ({"negatives": "full", "cross_rank": True}, "cross_rank"),
        ({"sampling_alpha": -1.0}, "sampling_alpha"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(values, key):
    config = Config(loss=LossConfig(**values))
    with pytest.raises(UserError, match=rf"^loss\.{key}: ") as error:
        check(config)
    assert "\n" not in str(error.value)


# --- what the loss masks


@pytest.mark.parametrize("kind", ["shared", "in_batch", "mixed"])
@pytest.mark.parametrize("mask_history", [False, True])
def test_collisions_and_history_leave_no_trace(kind, mask_history):
    """The model's loss is that of the plain softmax over each position's allowed candidates alone."""
    config = Config(loss=LossConfig(negatives=kind, num_negatives=20, mask_history=mask_history, log_q=True))
    config.loss.chunk_logits = 150  # chunks that cut users
    config.model.embedding_dim = config.model.value_dim = 8
    check(config)
    batch = users_batch([4, 12, 2, 7], config.loss)
    torch.manual_seed(0)
    model = build_model(config, V, 1.0, torch.device("cpu")).eval()
    loss = model(batch)
    with torch.no_grad():
        embeddings = model.embeddings(batch.ids)
        outputs, events = model.tower.encode(embeddings[EVENTS].values(), batch), batch.ids[EVENTS].values()
        unit_V = l2_normalize(model.embeddings.embeddings["item"].weight)
        positives = events[batch.input_index_T + 1]
        pool = l2_normalize(embeddings[NEGATIVES].values())
        shown = shared_candidates(pool, unit_V[positives], batch, batch.negatives, cross_rank=False)
        histories = events.split(batch.ids[EVENTS].lengths().tolist())
        expected = 0.0
        for user, history in enumerate(histories):
            for position in range(int(batch.offsets_B1[user]), int(batch.offsets_B1[user + 1])):
                hidden = shown.ids_P == positives[position]
                if mask_history:
                    hidden |= torch.isin(shown.ids_P, history)
                scores = outputs[position] @ unit_V[shown.ids_P].T / config.loss.temperature + shown.bias_P
                own = outputs[position] @ unit_V[positives[position]] / config.loss.temperature
                expected -= (own - torch.logsumexp(torch.cat([own[None], scores[~hidden]]), 0)).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_history_mask_never_makes_a_row_for_every_token_at_once():
    lengths = [3, 1, 5]
    events = torch.tensor([1, 2, 3, 4, 5, 6, 1, 1, 9, 8, 7, 9])  # four, two and six events
    mask = HistoryMask(events, lengths, torch.tensor([9, 1, 1, 50, 4]))
    whole = mask(slice(0, 9))
    by_user = [[False, True, True, False, True], [False] * 5, [True, True, True, False, False]]
    assert whole.tolist() == [by_user[0]] * 3 + [by_user[1]] + [by_user[2]] * 5
    for start in range(9):
        assert torch.equal(mask(slice(start, start + 4)), whole[start : start + 4])
    assert not HistoryMask(events, lengths, torch.tensor([50]))(slice(0, 9)).any()


# --- what the loss estimates


def catalogue():
    generator = torch.Generator().manual_seed(1)
    return l2_normalize(torch.randn(V, D, generator=generator)), l2_normalize(torch.randn(1, D, generator=generator))


def full_softmax():
    """exp(loss) of the full softmax at one position, and the gradients of its loss by output and table."""
    table, output = (x.requires_grad_() for x in catalogue())
    loss = -torch.log_softmax(output @ table.T / TAU, 1)[0, POSITIVE]
    loss.backward()
    return loss.exp().item(), torch.cat([output.grad, table.grad]).flatten()


def estimates(config, draws, others=60):
    """Losses [S] and gradients [S, (1 + V) · D] of the same position over `draws` batches. The other positions'
    positives are drawn from the training frequencies (so is a batch of one-event users). With cross_rank a third of
    them are on a second rank."""
    random = np.random.default_rng(12)
    table, output = (x.requires_grad_() for x in catalogue())
    sizes = [1 + others - others // 3, others // 3] if config.cross_rank else [1 + others]
    samplers = [NegativeSampler(config, V, 11, rank, FREQUENCY_V) for rank in range(len(sizes))]
    losses, gradients = [], []
    for step in range(draws):
        positives = [random.choice(V, size, p=SHARE_V) for size in sizes]
        positives[0][0] = POSITIVE
        drawn = [sampler.sample(ids, step) for sampler, ids in zip(samplers, positives)]
        own = torch.tensor([POSITIVE])
        if config.negatives == "per_token":
            ((ids_U, negatives),) = drawn
            index, where = negatives.index_TK[:1], negatives.positive_index_T[:1]
            bias = -negatives.expected_draws_U.log() if config.log_q else None
            loss = per_token_sampled_softmax(output, table[own], table[ids_U], index, where, TAU, bias)
        else:
            ids, bias = candidates_of(positives, drawn, config.log_q)
            loss = shared_sampled_softmax(output, table[own], table[ids], ids, own, TAU, bias)
        output.grad = table.grad = None
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([output.grad, table.grad]).flatten())
    return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients).double()


def candidates_of(positives, drawn, log_q):
    """The first rank's candidates and their bias, as candidates.shared_candidates gathers them from all ranks."""
    ids, shares = [], []
    for of_rank, (ids_U, negatives) in zip(positives, drawn):
        offered = negatives.in_batch or InBatchItems(torch.empty(0, dtype=torch.int64))
        in_batch = torch.from_numpy(of_rank)[offered.index_N]
        ids += [ids_U, in_batch]
        shares.append(RankShare(len(ids_U), len(in_batch), len(of_rank), offered.kept))
    ids, bias = torch.cat(ids), torch.zeros(sum(map(len, ids)))
    if log_q:
        records = [negatives for _, negatives in drawn]
        share_P = torch.cat([each.in_batch.item_share_P for each in records]) if records[0].in_batch else None
        bias = -expected_count(torch.cat([each.expected_draws_P for each in records]), share_P, shares).log()
    return ids, bias.masked_fill(_repeated_in_batch(ids, shares), MASKED_LOGIT)


SAMPLERS = {
    "per_token": LossConfig(num_negatives=12),
    "per_token by frequency": LossConfig(num_negatives=12, sampling_alpha=0.75),
    "uniform": LossConfig(negatives="shared", num_negatives=12),
    "by frequency": LossConfig(negatives="shared", num_negatives=12, sampling_alpha=0.75),
    "by frequency and uniform": LossConfig(
        negatives="shared", num_negatives=12, sampling_alpha=1.0, uniform_negatives=6
    ),
    "in_batch": LossConfig(negatives="in_batch"),
    "in_batch, some": LossConfig(negatives="in_batch", max_in_batch=8),
    "mixed": LossConfig(negatives="mixed", num_negatives=12),
    "mixed by frequency": LossConfig(negatives="mixed", num_negatives=12, sampling_alpha=0.5),
    "uniform, cross_rank": LossConfig(negatives="shared", num_negatives=6, cross_rank=True),
    "in_batch, cross_rank": LossConfig(negatives="in_batch", cross_rank=True),
    "mixed, cross_rank": LossConfig(negatives="mixed", num_negatives=6, sampling_alpha=0.5, cross_rank=True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_logq_partition_function_and_its_gradient_are_unbiased_with_a_dozen_negatives(name):
    """exp(loss) = Ẑ / e^{s⁺}, and exp(loss) · gradient is its gradient: sums over draws, so that their means are the full
    softmax's at any number of negatives. Held to four standard errors; 4.5 for 186 gradient entries, and a
    thousandth of those of items that are in nearly every batch, which leaves their mean no spread."""
    full_ratio, full_gradient = full_softmax()
    losses, gradients = estimates(replace(SAMPLERS[name], log_q=True), 1000)
    ratios = losses.exp()
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - full_ratio) < 4 * error
    assert error < 0.04 * full_ratio  # the test can see a few per cent
    weighted = ratios[:, None] * gradients
    error = weighted.std(0) / len(ratios) ** 0.5
    exact = full_ratio * full_gradient
    assert ((weighted.mean(0) - exact).abs() <= 4.5 * error + 1e-3 * exact.abs()).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_logq_the_expected_gradient_is_the_full_softmaxs(name):
    """The gradient of log Ẑ divides by Ẑ, which leaves a bias of about 1 / negatives (3 to 18 % with 16, measured); with
    256 what is left, noise of 300 draws included, is below 2.5 %. Without logQ there is more than half as much again,
    and up to 15 %."""
    config = replace(SAMPLERS[name], num_negatives=256)
    config.uniform_negatives *= 20
    config.max_in_batch = 24 if config.max_in_batch else None
    _, full = full_softmax()

    def deviation(log_q):
        gradients = estimates(replace(config, log_q=log_q), 300, others=256)[1]
        return ((gradients.mean(0) - full).norm() / full.norm()).item()

    corrected, plain = deviation(True), deviation(False)
    assert corrected < 0.025 and plain > 1.5 * corrected


def test_expected_count_is_how_often_two_ranks_offer_an_item():
    """Ranks that keep some of their distinct positives; the mean of (offered / expected) is 1 for every item but the
    position's own. Keeping some makes the expectation a little wrong (kept and item are not independent): 2 %."""
    random, draws = np.random.default_rng(4), 3000
    ratios = np.zeros((draws, V))
    for draw in range(draws):
        offered, shares = set(), []
        for rank, positions in enumerate((40, 25)):
            positives = random.choice(V, positions, p=SHARE_V)
            if rank == 0:
                positives[0] = POSITIVE
            distinct = np.unique(positives)
            some = random.choice(distinct, min(7, len(distinct)), replace=False)
            offered |= set(some.tolist())
            shares.append(RankShare(0, len(some), positions, len(some) / len(distinct)))
        expected = expected_count(torch.zeros(V), torch.from_numpy(SHARE_V), shares, here=0).numpy()
        ratios[draw] = np.isin(np.arange(V), list(offered)) / expected
    error = ratios.std(0) / draws**0.5
    others = np.arange(V) != POSITIVE
    assert (np.abs(ratios.mean(0) - 1) < 4 * error + 0.02)[others].all()
