"""The blocked token mixer and the attention ops against their dense, obvious references."""

import pytest
import torch

from fuxi_torchrec.ops import jagged
from fuxi_torchrec.ops.jagged import JaggedLayout, from_padded, from_slots, to_padded, to_slots
from fuxi_torchrec.ops.token_mixing import dispatch as token_mixing
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import StripGaps, TimeGaps, gap_feature
from tests.helpers.mixing import JAGGED, LENGTHS, assert_equals_reference, output_and_gradients, times

CHANNELS = [
    ("positional", "pow"),
    ("pow",),
    ("positional",),
    ("positional", "bucketed"),
    ("positional", "zero"),
    ("exp", "log", "linear", "sin"),
    ("positional", "mixed"),
    ("nn",),
]


@pytest.mark.parametrize("names", CHANNELS, ids="-".join)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}users")
def test_blocked_equals_reference_in_value_and_every_gradient(lengths, names):
    assert_equals_reference(lengths, names, "blocked", torch.float64)


@pytest.mark.parametrize("names", [("positional", "pow"), ("positional", "bucketed")], ids="-".join)
def test_float32_is_close_to_float64(names):
    assert_equals_reference(JAGGED, names, "blocked", torch.float32)


def test_small_strips_groups_and_uncached_gaps_change_nothing(monkeypatch):
    monkeypatch.setattr(jagged, "STRIP_ROWS", 7)
    monkeypatch.setattr(token_mixing, "CACHED_ENTRIES", 0)
    monkeypatch.setattr("fuxi_torchrec.ops.jagged.SLOTS_PER_GROUP", 1)
    assert_equals_reference(JAGGED, ("positional", "pow"), "blocked", torch.float64)


def test_the_same_input_gives_the_same_bits():
    first = output_and_gradients(JAGGED, ("positional", "pow", "bucketed"), "blocked", torch.float32)
    second = output_and_gradients(JAGGED, ("positional", "pow", "bucketed"), "blocked", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_an_empty_batch_has_an_empty_output_and_zero_gradients():
    out, *grads = output_and_gradients([0, 0], ("positional", "pow"), "blocked", torch.float32)
    assert out.shape == (0, 2, 2, 3)
    assert all(not g.any() for g in grads)


def test_an_amplitude_of_zero_still_has_its_gradient():
    layout = JaggedLayout.from_lengths([9])
    gaps = TimeGaps(*times([9]), layout)
    values = torch.randn(9, 1, 2, dtype=torch.float64)
    a, b = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.0, 0.7))
    grads = [
        torch.autograd.grad(mix_tokens(values, layout, [("pow", [a, b])], gaps, kind).sum(), a)[0]
        for kind in ("blocked", "reference")
    ]
    assert grads[0].item() == pytest.approx(grads[1].item()) and grads[0].item() != 0


def test_milliseconds_and_seconds_give_the_same_map():
    ticks = torch.tensor([-5, 0, 1, 3600, 10**9])
    for feature in ("seconds", "log1p", "bucket"):
        seconds = gap_feature(ticks, 1.0, feature, torch.float32)
        assert torch.allclose(gap_feature(ticks * 1000, 0.001, feature, torch.float32).float(), seconds.float())


def test_a_unix_time_does_not_lose_its_seconds():
    layout = JaggedLayout.from_lengths([2])
    t = torch.tensor([1_700_000_000, 1_700_000_001])
    gaps = TimeGaps(t, t + 1, layout)
    strip = StripGaps(layout.slots, gaps.times, "seconds", torch.float32).strip(layout.groups[0], 0)
    assert strip[0].tolist() == [[1.0, 0.0], [2.0, 1.0]]


@pytest.mark.parametrize("lengths", [*LENGTHS, [], [0, 0]], ids=lambda lengths: f"{len(lengths)}users")
def test_padded_and_back(lengths):
    layout = JaggedLayout.from_lengths(lengths)
    values = torch.randn(layout.num_tokens, 2, requires_grad=True)
    assert torch.equal(from_padded(to_padded(values, layout), layout), values)
    assert torch.equal(from_slots(to_slots(values, layout), layout), values)
    (grad,) = torch.autograd.grad(from_slots(to_slots(values, layout) * 2, layout).sum(), values)
    assert torch.equal(grad, torch.full_like(values, 2.0))
    assert layout.lengths_B.tolist() == list(lengths)
    assert layout.position_T.tolist() == [i for n in lengths for i in range(n)]
    assert layout.user_T.tolist() == [u for u, n in enumerate(lengths) for _ in range(n)]
