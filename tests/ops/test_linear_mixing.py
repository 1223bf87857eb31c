"""Token mixing in linear time: its approximation keeps its promise, and everything else is exact."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.token_mixing import (
    dispatch as token_mixing,
)
from fuxi_torchrec.ops.token_mixing import (
    exponential_scan,
    toeplitz,
)
from fuxi_torchrec.ops.token_mixing import (
    linear as mixing_linear,
)
from fuxi_torchrec.ops.token_mixing.dispatch import mix_by_plan, mix_tokens, plan_mixing
from fuxi_torchrec.ops.token_mixing.exponential_scan import gap_seconds
from fuxi_torchrec.ops.token_mixing.exponential_sums import B_RANGE, DEFAULT_TOLERANCE, LONGEST_GAP, power_law_sum
from fuxi_torchrec.ops.token_mixing.linear import LinearGaps, linear_backward, linear_forward
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps, Times, gap_feature
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS
from tests.helpers.closeness import assert_sums_close, rounding
from tests.helpers.mixing import JAGGED, LENGTHS, assert_equals_reference, output_and_gradients, parameters, times

YEAR = 365.25 * 86400
APPROXIMATION = 3 * DEFAULT_TOLERANCE
"""Of a power law's entries and their derivatives (the first test here)."""
EXPONENTS = [B_RANGE[0], 0.2, 0.6, 1.0, 2.0, B_RANGE[1]]


@pytest.fixture(params=["C", "torch"])
def toeplitz_kernel(request, monkeypatch):
    """The Toeplitz product in C (where there is a compiler), and PyTorch's."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture
def everyone_linear(monkeypatch):
    """Short users too, in small chunks."""
    monkeypatch.setattr(token_mixing, "LINEAR_FROM", 0)
    monkeypatch.setattr(exponential_scan, "CHUNK", 16)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, DEFAULT_TOLERANCE, 1e-9])
def test_a_sum_of_exponentials_is_within_its_tolerance_of_the_power_law(tolerance):
    power = power_law_sum(tolerance)
    gaps = torch.cat([torch.zeros(1), torch.logspace(-3, math.log10(LONGEST_GAP), 3000)]).double()
    terms_XK = torch.exp(-gaps[:, None] * power.rates_K("cpu"))
    for b in torch.linspace(*B_RANGE, 40, dtype=torch.float64):
        weights_K, slopes_K = power.weights_K(b)
        exact = (1 + gaps) ** -b
        assert ((terms_XK @ weights_K) / exact - 1).abs().max() <= tolerance
        slope_error = terms_XK @ slopes_K + torch.log1p(gaps) * exact
        assert (slope_error / exact / (1 + torch.log1p(gaps))).abs().max() <= 3 * tolerance


def test_a_smaller_tolerance_takes_more_terms():
    counts = [power_law_sum(tolerance).terms for tolerance in (1e-2, 1e-4, 1e-6, 1e-8)]
    assert counts == sorted(set(counts)) and counts[0] <= 32 and counts[2] <= 72


EXACT = [("positional", "exp"), ("positional", "log"), ("bucketed", "positional", "zero")]


@pytest.mark.parametrize("names", EXACT, ids="-".join)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}users")
def test_what_is_not_a_power_law_is_exact_in_value_and_every_gradient(lengths, names, everyone_linear):
    assert_equals_reference(lengths, names, "linear", torch.float64)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}users")
def test_power_laws_in_value_and_every_gradient(lengths, everyone_linear, toeplitz_kernel):
    for dtype in (torch.float64, torch.float32):
        assert_equals_reference(lengths, ("positional", "pow"), "linear", dtype, approximation=APPROXIMATION)


def test_long_and_short_users_of_one_batch(monkeypatch, toeplitz_kernel):
    monkeypatch.setattr(token_mixing, "LINEAR_FROM", 100)
    monkeypatch.setattr(exponential_scan, "CHUNK", 16)
    for names in (("positional", "pow"), ("exp", "log", "positional")):
        assert_equals_reference(JAGGED, names, "linear", torch.float64, approximation=APPROXIMATION)


@pytest.mark.parametrize("names", [("positional", "pow"), ("exp", "zero", "positional"), ("pow",)], ids="-".join)
def test_short_users_beside_long_ones_are_mixed_in_c_where_that_can_be_had(names, monkeypatch, kernels):
    monkeypatch.setattr(token_mixing, "LINEAR_FROM", 100)
    monkeypatch.setattr(exponential_scan, "CHUNK", 16)
    in_c, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (in_c.append(name), call(name, *arguments)))
    assert_equals_reference(JAGGED, names, "linear", torch.float32, approximation=APPROXIMATION)
    assert ({"mix_forward", "mix_backward"} <= set(in_c)) == (kernels == "native")


@pytest.mark.parametrize("names", [("positional", "pow", "bucketed"), ("bucketed", "pow", "log")], ids="-".join)
def test_what_is_prepared_once_is_what_every_block_takes(names, monkeypatch):
    """Channels that are mixed apart, in C and not, beside each other."""
    monkeypatch.setattr(token_mixing, "LINEAR_FROM", 100)
    layout = JaggedLayout.from_lengths(JAGGED)
    channels = [(name, parameters(name, layout.max_length)) for name in names]
    gaps = TimeGaps(*times(JAGGED), layout)
    values = torch.randn(layout.num_tokens, 1, 4)
    plan = plan_mixing(values, layout, channels, gaps, "linear")
    prepared, taken, mix_op = set(map(id, gaps.features.values())), [], token_mixing.mix_op
    monkeypatch.setattr(token_mixing, "mix_op", lambda *a: (taken.extend(zip(a[5].split(), a[3])), mix_op(*a))[1])
    mix_by_plan(values, channels, plan)
    assert len(taken) == len(names) and all(id(x) in prepared for name, x in taken if name != "positional")


def test_the_same_input_gives_the_same_bits(everyone_linear):
    first = output_and_gradients(JAGGED, ("positional", "pow"), "linear", torch.float32)
    second = output_and_gradients(JAGGED, ("positional", "pow"), "linear", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def rows_of_the_reference(rows, v_NE, times_N, next_N, weight_N, a, b, time_unit=1.0):
    """Rows of y_pos and y_time of one user, float64, side by side."""
    lag_RN = rows[:, None] - torch.arange(len(v_NE))
    gap_RN = gap_feature(next_N[rows][:, None] - times_N, time_unit, "log1p", torch.float64)
    time_RN = TIME_MAPS["pow"].evaluate(gap_RN, a, b)
    return torch.stack([m.masked_fill(lag_RN < 0, 0) @ v_NE for m in (weight_N[lag_RN.clamp(min=0)], time_RN)], 1)


@pytest.mark.parametrize("length", [2047, 8192])
def test_long_sequences_in_value_and_every_gradient(length, toeplitz_kernel):
    """Against rows of the dense map, since the whole of it is half a gigabyte."""
    torch.manual_seed(0)
    rows = torch.randint(length, (40,)).unique()
    times_N, next_N = times([length])
    leaves = [torch.randn(length, 8), 0.1 * torch.randn(length), torch.tensor([0.3]), torch.tensor([0.6])]
    leaves = [x.double().requires_grad_() for x in leaves]
    grad = torch.zeros(length, 2, 8, dtype=torch.float64)
    grad[rows] = torch.randn(len(rows), 2, 8, dtype=torch.float64)
    expected = rows_of_the_reference(rows, leaves[0], times_N, next_N, *leaves[1:])
    expected_grads = torch.autograd.grad(expected, leaves, grad[rows])
    absolute = [x.detach().abs().requires_grad_() for x in leaves]  # the maps and their slopes have one sign then
    size = rows_of_the_reference(rows, absolute[0], times_N, next_N, *absolute[1:])
    sizes = [x.detach().abs() for x in (size, *torch.autograd.grad(size, absolute, grad[rows].abs()))]

    layout = JaggedLayout.from_lengths([length])
    v, weight, a, b = (x.detach().float().requires_grad_() for x in leaves)
    channels, gaps = [("positional", [weight]), ("pow", [a, b])], TimeGaps(times_N, next_N, layout)
    plan = plan_mixing(v, layout, channels, gaps, "linear")
    y = mix_by_plan(v.view(length, 1, 8), channels, plan)[:, 0]
    grads = torch.autograd.grad(y, [v, weight, a, b], grad.float())
    actual = [y.detach()[rows].double(), *(g.double() for g in grads)]
    # Rows are added up in chunks, then chunks.
    tolerance = APPROXIMATION + rounding(torch.float32, exponential_scan.CHUNK + length // exponential_scan.CHUNK + 8)
    assert_sums_close(actual, [expected.detach(), *expected_grads], sizes, tolerance)


GAPS = {
    "equal times": lambda n: torch.zeros(n),
    "seconds": lambda n: torch.randint(0, 3, (n,)),
    "sessions": lambda n: (torch.rand(n) < 0.02) * torch.rand(n) * 30 * 86400,
    "log-uniform": lambda n: torch.exp(torch.rand(n) * math.log(YEAR)),
    "thirty years at once": lambda n: (torch.arange(n) == n // 2) * 30 * YEAR,
    "thirty years": lambda n: torch.full((n,), 30 * YEAR / n),
}


@pytest.mark.parametrize("time_unit", [1.0, 0.001], ids=["seconds", "milliseconds"])
@pytest.mark.parametrize("kind", GAPS)
def test_the_error_of_the_output_is_below_1e_5_and_everything_is_finite(kind, time_unit):
    """Norm-wise, float32 against float64, for every b of the range, gaps from 0 to 30 years."""
    length = 1500
    torch.manual_seed(1)
    ticks = (GAPS[kind](length + 1).double() / time_unit).long().cumsum(0) + int(1e9 / time_unit)
    times_N, next_N = ticks[:-1], ticks[1:]
    layout, rows = JaggedLayout.from_lengths([length]), torch.arange(0, length, 7)
    gaps = TimeGaps(times_N, next_N, layout, time_unit)
    v = torch.randn(length, 8, dtype=torch.float64)
    for exponent in EXPONENTS:
        a, b = (torch.tensor([x], dtype=torch.float64) for x in (0.2, exponent))
        expected = rows_of_the_reference(rows, v, times_N, next_N, torch.zeros(length).double(), a, b, time_unit)[:, 1]
        leaves = [x.float().requires_grad_() for x in (v, a, b)]
        y = mix_tokens(leaves[0].view(length, 1, 8), layout, [("pow", leaves[1:])], gaps, "linear")
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert (y.detach()[rows, 0, 0] - expected).norm() < 1e-5 * expected.norm()
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("exponent", [-50.0, -3.0, 20.0, 500.0])
def test_exponential_maps_of_any_rate_stay_finite(exponent):
    layout = JaggedLayout.from_lengths([1100])
    gaps = TimeGaps(*times([1100], largest_gap=10**9), layout)
    a, b = torch.tensor([0.2], requires_grad=True), torch.tensor([exponent], requires_grad=True)
    v = torch.randn(1100, 1, 4, requires_grad=True)
    y = mix_tokens(v, layout, [("exp", [a, b])], gaps, "linear")
    assert all(torch.isfinite(x).all() for x in (y, *torch.autograd.grad(y.sum(), [v, a, b])))


def test_times_that_run_backwards_are_mixed_exactly(everyone_linear):
    torch.manual_seed(0)
    layout, steps = JaggedLayout.from_lengths([70]), torch.randint(-500, 1000, (71,)).cumsum(0) + 10**9
    gaps = TimeGaps(steps[:-1], steps[1:], layout)
    v = torch.randn(70, 1, 3, dtype=torch.float64)
    channels = [("pow", [torch.tensor([x], dtype=torch.float64) for x in (0.2, 0.6)])]
    expected, actual = (mix_tokens(v, layout, channels, gaps, kind) for kind in ("reference", "linear"))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and not x.is_meta:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_grows_with_length_not_with_its_square():
    """At twice the length nothing is more than twice as large, forward and backward."""
    largest = []
    for length in (2048, 4096):
        v, users = torch.randn(length, 2, 16), [(0, length)]
        channels = [("positional", parameters("positional", length)), ("pow", parameters("pow", length))]
        gaps = {1: LinearGaps("pow", users, Times(*times([length])), torch.float32)}
        y, grad_v = torch.empty(length, 2, 2, 16), torch.zeros(length, 2, 16)
        with LargestTensor() as mode:
            linear_forward(y, v, users, channels, gaps)
            linear_backward(grad_v, y, v, users, channels, gaps)
        largest.append(mode.elements)
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("length", [1, 2, 3, 10, 130, 2049])
def test_a_transform_is_long_enough_and_not_much_longer(length):
    size = toeplitz.transform_length(length)
    assert length <= size <= max(length, 4 / 3 * length)


def test_gaps_are_differences_of_ticks_and_never_negative():
    times_n = torch.tensor([1_700_000_000_000, 1_700_000_000_001, 1_700_000_000_000])
    near, *_ = gap_seconds(times_n, times_n + 1, 0.001, torch.float64)
    assert near[0, :2, :2].tolist() == [[0.001, 0.0], [0.002, 0.001]] and near.min() == 0


def encoder(token_mixing, **settings):
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=8, value_dim=8, num_blocks=2, token_mixing=token_mixing, **settings)
    return build_encoder(config, padded_length=64).eval()


def encoded(model):
    torch.manual_seed(2)
    layout = JaggedLayout.from_lengths([40, 3])
    past, future = times([40, 3])
    return model(torch.randn(43, 8, generator=torch.Generator().manual_seed(1)), past, future, layout)


def test_an_encoder_gives_the_same_with_every_token_mixing(everyone_linear):
    expected = encoded(encoder("reference"))
    for kind in ("auto", "blocked", "linear"):
        torch.testing.assert_close(encoded(encoder(kind)), expected, rtol=1e-5, atol=1e-5)


def test_an_exponent_outside_the_range_is_mixed_exactly_until_it_comes_back(everyone_linear, monkeypatch):
    model, calls = encoder("linear"), []
    forward = mixing_linear.scan_forward
    monkeypatch.setattr(mixing_linear, "scan_forward", lambda *args: calls.append(1) or forward(*args))
    for exponent, linear_blocks in ((0.6, 2), (3.5, 1), (0.01, 1), (1.0, 2)):
        with torch.no_grad():
            model.blocks[0].mixers["temporal"].b.fill_(exponent)
        model.check_mixing()
        calls.clear()
        out = encoded(model)
        assert len(calls) == 2 * linear_blocks  # two users
        reference = encoder("reference")
        reference.load_state_dict(model.state_dict())
        torch.testing.assert_close(out, encoded(reference), rtol=1e-5, atol=1e-5)


def test_loaded_weights_are_looked_at(everyone_linear):
    model, other = encoder("linear"), encoder("linear")
    with torch.no_grad():
        other.blocks[1].mixers["temporal"].b.fill_(5.0)
    model.load_state_dict(other.state_dict())
    assert [block.token_mixing for block in model.blocks] == ["linear", "exact"]
