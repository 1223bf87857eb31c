"""Streaming: after every event, a query answers what the full pass over the same events does."""

import io

import pytest
import torch

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.encoders.streaming import StateFull, StreamingState
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.jagged import JaggedLayout

D = 12


def encoder(padded_length=24, form="pow", channels=("positional", "temporal"), time_unit=1.0, name="fuxi_beta"):
    torch.manual_seed(0)
    config = ModelConfig(encoder=name, embedding_dim=D, num_blocks=3, num_heads=2, value_dim=5, qk_dim=4)
    config.bias_function, config.channels = form, list(channels)
    made = build_encoder(config, padded_length=padded_length, time_unit=time_unit).eval()
    with torch.no_grad():
        for block in made.blocks:  # large enough to matter
            block.input_weight.normal_(std=0.4)
            if "temporal" in block.mixers and form != "zero":
                block.mixers["temporal"].a.fill_(0.8)
            if "positional" in block.mixers:
                block.mixers["positional"].weight_N.normal_(std=0.4)
    return made


def events(users, count, largest_gap):
    """[B, n, D] embeddings and non-decreasing times with ties, [B, n + 1]: the last is a request's."""
    torch.manual_seed(1)
    gaps_Bn = torch.randint(0, largest_gap, (users, count + 1)) * torch.randint(0, 2, (users, count + 1))
    return torch.randn(users, count, D), 10**9 + gaps_Bn.cumsum(1)


def full_pass(made, embeddings_BnD, times_Bn, at_B):
    """The output of each user's last row, when the request comes at `at`."""
    B, n = times_Bn.shape
    layout = JaggedLayout.from_lengths([n] * B)
    next_Bn = torch.cat([times_Bn[:, 1:], at_B[:, None]], 1)
    with torch.no_grad():
        outputs = made(embeddings_BnD.flatten(0, 1), times_Bn.flatten(), next_Bn.flatten(), layout)
    return outputs.view(B, n, D)[:, -1]


def assert_equal(actual, expected):
    assert torch.linalg.vector_norm(actual - expected) < 1e-5 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("form", ["pow", "exp", "zero"])
@pytest.mark.parametrize("channels", [("positional", "temporal"), ("temporal",), ("positional",)], ids="-".join)
def test_every_query_equals_the_full_pass(form, channels):
    made, n = encoder(form=form, channels=channels), 24
    embeddings, times = events(3, n, 10**6)
    state = made.init_state(3)
    for i in range(n):
        made.observe(state, embeddings[:, i], times[:, i])
        for wait in (0, 5, 10**8):
            at_B = times[:, i] + wait
            assert_equal(made.query(state, at_B), full_pass(made, embeddings[:, : i + 1], times[:, : i + 1], at_B))


@pytest.mark.parametrize("largest_gap, time_unit", [(1, 1.0), (10**3, 0.001), (5 * 10**7, 1.0), (10**10, 0.001)])
def test_gaps_from_none_to_years_in_seconds_and_milliseconds(largest_gap, time_unit):
    made = encoder(40, time_unit=time_unit)
    embeddings, times = events(2, 40, largest_gap)
    state = made.init_state(2)
    for i in range(40):
        made.observe(state, embeddings[:, i], times[:, i])
    assert_equal(made.query(state, times[:, -1]), full_pass(made, embeddings, times[:, :-1], times[:, -1]))


def test_a_query_changes_nothing():
    made = encoder()
    embeddings, times = events(2, 5, 1000)
    state = made.init_state(2)
    for i in range(5):
        made.observe(state, embeddings[:, i], times[:, i])
    before = state.clone()
    first = made.query(state, times[:, -1])
    assert torch.equal(first, made.query(state, times[:, -1]))
    assert all(torch.equal(x, state.tensors()[name]) for name, x in before.tensors().items())


def test_whole_histories_give_the_state_of_their_events():
    """Users of unlike lengths, none among them, go on from one full pass as if each event had been observed."""
    made, lengths = encoder(), [4, 0, 1, 9]
    embeddings, times = events(4, 12, 10**5)
    rows = [(b, i) for b, n in enumerate(lengths) for i in range(n)]
    users, places = (torch.tensor(x) for x in zip(*rows))
    state = made.state_of(embeddings[users, places], times[users, places], JaggedLayout.from_lengths(lengths))
    assert state.has_pending_B.tolist() == [True, False, True, True]
    for extra in range(3):
        index = torch.tensor(lengths) + extra
        later = embeddings[torch.arange(4), index], times[torch.arange(4), index]
        made.observe(state, *later)
        at_B = times[:, -1]
        for b, n in enumerate(lengths):
            user, past = slice(b, b + 1), slice(n + extra + 1)
            expected = full_pass(made, embeddings[user, past], times[user, past], at_B[user])
            assert_equal(made.query(state, at_B)[user], expected)


def test_a_stored_user_comes_back_into_another_batch():
    made = encoder()
    embeddings, times = events(3, 6, 1000)
    state = made.init_state(3)
    for i in range(6):
        made.observe(state, embeddings[:, i], times[:, i])
    expected = made.query(state, times[:, -1])
    stored = []
    for user in range(3):
        file = io.BytesIO()
        torch.save(state.select([user]).tensors(), file)
        stored.append(file.getvalue())
    back = [StreamingState.from_tensors(torch.load(io.BytesIO(x), weights_only=True)) for x in reversed(stored)]
    torch.testing.assert_close(made.query(StreamingState.join(back), times[:, -1].flip(0)), expected.flip(0))


def test_a_full_state_says_so_and_stays_as_it_was():
    made = encoder(padded_length=3)
    embeddings, times = events(2, 4, 1000)
    state = made.init_state(2)
    for i in range(3):
        made.observe(state, embeddings[:, i], times[:, i])
    before = made.query(state, times[:, -1])
    with pytest.raises(StateFull, match="3 events") as error:
        made.observe(state, embeddings[:, 3], times[:, 3])
    assert error.value.users == [0, 1]
    assert torch.equal(before, made.query(state, times[:, -1]))
    with pytest.raises(UserError, match="4 events does not fit into model.padded_length = 3"):
        made.state_of(embeddings[0], times[0, :4], JaggedLayout.from_lengths([4]))
    # What a caller does then: the newest events alone.
    newest = made.state_of(embeddings[:, 2:4].flatten(0, 1), times[:, 2:4].flatten(), JaggedLayout.from_lengths([2, 2]))
    assert_equal(made.query(newest, times[:, -1]), full_pass(made, embeddings[:, 2:4], times[:, 2:4], times[:, -1]))


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: encoder().train(), "eval mode"),
        (lambda: encoder(form="sin"), "model.bias_function: sin"),
        (lambda: encoder(name="fuxi_alpha", channels=("positional", "semantic")), "model.channels: semantic"),
    ],
)
def test_what_has_no_state_is_refused(made, message):
    with pytest.raises(UserError, match=message):
        made().init_state(1)


def test_an_exponent_outside_the_range_is_refused_by_its_name():
    made = encoder()
    with torch.no_grad():
        made.blocks[1].mixers["temporal"].b.fill_(-0.2)
    with pytest.raises(UserError, match=r"blocks\.1\.mixers\.temporal\.b: -0\.2"):
        made.init_state(1)


def test_wrong_calls_are_named():
    made = encoder()
    state = made.init_state(2)
    with pytest.raises(ValueError, match="no event yet"):
        made.query(state, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="shape"):
        made.observe(state, torch.randn(3, D), torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="int64"):
        made.observe(state, torch.randn(2, D), torch.tensor([1.0, 1.0]))
    made.observe(state, torch.randn(2, D), torch.tensor([10, 20]))
    with pytest.raises(ValueError, match="user 1: time 15 is before"):
        made.observe(state, torch.randn(2, D), torch.tensor([15, 15]))
