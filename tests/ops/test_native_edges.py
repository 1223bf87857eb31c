"""What the C kernels are given: any layout is exact, what doesn't fit is refused, and numbers at the end of their range."""

import pytest
import torch
from torch.nn import functional as F

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise import dispatch as row_wise
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax
from fuxi_torchrec.ops.token_mixing import native as mixing_native
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from fuxi_torchrec.ops.token_mixing.toeplitz import toeplitz_backward, toeplitz_forward
from tests.helpers import native_cases
from tests.helpers.closeness import assert_sums_close, mixing_sizes, rounding
from tests.helpers.mixing import parameters, times
from tests.helpers.native_cases import LAYOUTS

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")

@pytest.mark.parametrize("implementation", ["linear", "native"])
@pytest.mark.parametrize("layout_of_values", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_values_is_mixed_exactly(layout_of_values, implementation, kernels):
    if implementation == "native" and kernels == "torch":
        return  # which cannot be asked for then
    torch.manual_seed(0)
    lengths = [1100, 3, 40]  # the first is mixed in linear time
    layout = JaggedLayout.from_lengths(lengths)
    values = layout_of_values(layout.num_tokens, 2, 8).requires_grad_()
    gaps = TimeGaps(*times(lengths), layout)
    channels = [("positional", [p.requires_grad_() for p in parameters("positional", 1100)])]
    grad = torch.randn(1, 8, 2, layout.num_tokens).permute(3, 2, 0, 1)
    results = []
    for kind, dtype in ((implementation, torch.float32), ("reference", torch.float64)):
        leaves = [values.to(dtype), channels[0][1][0].to(dtype)]
        out = mix_tokens(leaves[0], layout, [("positional", leaves[1:])], gaps, kind)
        results.append([x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))])
    sizes = mixing_sizes(values, layout, channels, gaps, grad)
    assert_sums_close(*results, sizes, rounding(torch.float32, 1100 + 16))


@pytest.mark.parametrize("layout_of_gradient", LAYOUTS.values(), ids=LAYOUTS)
def test_a_toeplitz_product_adds_to_a_gradient_of_any_layout(layout_of_gradient, kernels):
    torch.manual_seed(0)
    v, grad, weight, users = torch.randn(70, 2, 8), torch.randn(70, 2, 8), torch.randn(70), [(0, 30), (30, 40)]
    grad_v = layout_of_gradient(70, 2, 8)
    if grad_v.stride(0) == 0:
        return  # nothing can be written there
    around = grad_v._base.clone()
    expected = grad_v.contiguous()
    expected_weight = toeplitz_backward(expected, grad, v, users, weight)
    found_weight = toeplitz_backward(grad_v, grad, v, users, weight)
    assert torch.equal(found_weight, expected_weight) and torch.equal(grad_v, expected)
    grad_v.zero_()
    untouched = grad_v._base != 0
    assert torch.equal(grad_v._base[untouched], around[untouched])  # nothing was written beside it


@needs_compiler
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_type_and_device_change_nothing(default):
    def outputs_and_gradients():
        torch.manual_seed(0)
        f32 = dict(dtype=torch.float32, device="cpu")
        x, table, gate = torch.randn(50, 24, **f32), torch.randn(9, 24, **f32), torch.randn(50, 24, **f32)
        weight, leaves = torch.randn(50, **f32), [x.requires_grad_(), table.requires_grad_(), gate.requires_grad_()]
        layout = JaggedLayout.from_lengths([20, 30])
        position = torch.arange(50, device="cpu") % 9
        y = row_wise.add_positions(x, table, position, 0.0, True)
        y = row_wise.gated_rms_norm(gate, y)
        mixed = mix_tokens(y.view(50, 2, 12), layout, [("positional", [weight])], implementation="native")
        unit = row_wise.l2_normalize(mixed.flatten(1))
        index = torch.arange(200, device="cpu").view(50, 4) % 50
        loss = per_token_sampled_softmax(unit, unit, unit, index, index[:, 0] - 1, 0.5)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = outputs_and_gradients()
    try:
        torch.set_default_dtype(default)
        torch.set_default_device("meta")
        found = outputs_and_gradients()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


SOFTMAX = {
    "a row that is not there": (dict(index=(2, 3, 5)), IndexError, "negatives 0 … 5 of 5 candidates"),
    "a negative row": (dict(index=(2, 3, -1)), IndexError, "negatives -1 … 4 of 5 candidates"),
    "a row that int32 takes for another": (dict(index=(2, 3, 2**32 + 1)), IndexError, "4294967297 of 5 candidates"),
    "a positive that int32 takes for another": (dict(positive=2**32 + 1), IndexError, "positives .* 4294967297"),
    "wider candidates": (dict(candidates=(5, 6)), ValueError, "shapes"),
    "fewer positives": (dict(positives=(4, 4)), ValueError, "shapes"),
    "a short bias": (dict(bias=(4,)), ValueError, "shapes"),
}


@pytest.mark.parametrize("change, error, message", SOFTMAX.values(), ids=SOFTMAX)
def test_a_loss_of_what_does_not_fit_is_refused(change, error, message, kernels):
    shapes = {"outputs": (5, 4), "positives": (5, 4), "candidates": (5, 4), "bias": (5,)}
    tensors = {name: torch.randn(change.get(name, shape)) for name, shape in shapes.items()}
    index, positive = torch.arange(5).repeat(5, 1), torch.full((5,), -1)
    if "index" in change:
        index[change["index"][:2]] = change["index"][2]
    positive[0] = change.get("positive", 0)
    with pytest.raises(error, match=message):
        per_token_sampled_softmax(
            tensors["outputs"], tensors["positives"], tensors["candidates"], index, positive, 0.05, tensors["bias"]
        )


def test_rows_of_what_does_not_fit_are_refused(kernels):
    x, table, position = torch.randn(5, 4), torch.randn(3, 4), torch.zeros(5, dtype=torch.int64)
    refused = (ValueError, IndexError, RuntimeError)
    for wrong in (3, -1):
        with pytest.raises(IndexError):
            row_wise.add_positions(x, table, position + wrong, 0.0, True)
    with pytest.raises(refused):
        row_wise.add_positions(x, torch.randn(3, 5), position, 0.0, True)
    with pytest.raises(refused):
        row_wise.add_positions(x, table, position[:4], 0.0, True)
    with pytest.raises(refused):
        row_wise.gated_rms_norm(torch.randn(5, 3), x)
    with pytest.raises(refused):
        row_wise.swiglu(torch.randn(5, 3))
    with pytest.raises(refused):
        row_wise.silu_split(x, (1, 2))


OFFSETS = {
    "fall": ([0, 6, 3, 9], None),
    "end beyond the rows": ([0, 4, 12], None),
    "end before the rows": ([0, 4, 8], None),
    "start before the rows": ([-3, 4, 9], None),
    "tell other lengths than the host's": ([0, 4, 9], [5, 4]),
    "have a longer user than is said": ([0, 0, 9], None),
}


@needs_compiler
@pytest.mark.parametrize("offsets, lengths", OFFSETS.values(), ids=OFFSETS)
def test_offsets_that_lead_elsewhere_are_refused(offsets, lengths):
    layout = JaggedLayout(torch.tensor(offsets), 8, 9, lengths)
    with pytest.raises((ValueError, RuntimeError)):
        mix_tokens(torch.randn(9, 1, 4), layout, [("positional", [torch.randn(20)])], implementation="native")


@needs_compiler
def test_mixing_of_what_does_not_fit_is_refused():
    layout, v = JaggedLayout.from_lengths([9]), torch.randn(9, 1, 4)
    with pytest.raises(ValueError, match=r"lag weights of shape \(3,\) for a sequence of 9"):
        mix_tokens(v, layout, [("positional", [torch.randn(3)])], implementation="native")
    short = TimeGaps(torch.arange(8), torch.arange(8), layout)
    with pytest.raises(ValueError, match="for 9 rows"):
        mix_tokens(v, layout, [("pow", [torch.ones(1), torch.ones(1)])], short, "native")
    with pytest.raises(ValueError, match="are not the 10 rows"):
        mix_tokens(torch.randn(10, 1, 4), layout, [("positional", [torch.randn(9)])], implementation="native")
    settings = (layout.offsets_B1, layout.row_tasks(96), [], [torch.randn(9)], "positional", 9, 1.0)
    with pytest.raises(ValueError, match="gradient of shape"):
        mixing_native._mix_backward(torch.randn(9, 1, 1, 3), v, *settings)


def test_toeplitz_products_of_what_does_not_fit_are_refused(kernels):
    v, y, weight = torch.randn(9, 2, 4), torch.empty(9, 2, 4), torch.randn(9)
    for users in ([(0, 10)], [(5, 5)], [(-1, 3)], [(0, 0)]):
        with pytest.raises(ValueError, match="a user's rows"):
            toeplitz_forward(y, v, users, weight)
    with pytest.raises(ValueError, match="lag weights"):
        toeplitz_forward(y, v, [(0, 9)], weight[:8])
    with pytest.raises(ValueError, match="shapes"):
        toeplitz_backward(torch.zeros(9, 2, 3), y, v, [(0, 9)], weight)


@needs_compiler
def test_a_call_that_the_kernel_would_misread_is_refused():
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match="takes 4 arguments, not 5"):
        native.call("silu_rows", x, x, 3, 4, 1)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        native.call("silu_rows", x, x, 3)
    for wrong in (x.double(), x.bfloat16(), x.long(), x.to("meta")):
        with pytest.raises(TypeError, match="takes torch.float32 on the CPU"):
            native.call("silu_rows", x, wrong, 3, 4)


@needs_compiler
def test_memory_that_cannot_be_had_is_an_error():
    """The lags of 2**50 rows would take four petabytes."""
    layout, v, weight = JaggedLayout.from_lengths([9]), torch.randn(9, 1, 4), torch.randn(9)
    where, _, sizes, scalars = mixing_native._arguments(
        v, layout.offsets_B1, layout.row_tasks(96), [], [weight], ["positional"], 9, 1.0
    )
    sizes = (*sizes[:2], 2**50, *sizes[3:])
    grad, grad_v, sums = torch.randn(9, 1, 1, 4), torch.empty(9, 1, 4), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(MemoryError, match="mix_backward"):
        native.call("mix_backward", *where, weight, grad, grad_v, weight.clone(), sums, *sizes, *scalars)


@needs_compiler
@pytest.mark.parametrize("x", [-3e38, -1e38, -1000.0, -200.0, -100.0, 100.0, 1000.0, 1e38, 3e38])
def test_silu_at_the_ends_of_float32(x):
    values = torch.tensor([[x] * 2 + [1.0] * 2], requires_grad=True)
    reference = values.detach().clone().requires_grad_()
    for actual, expected in (
        (row_wise.silu_split(values, (4,))[0], F.silu(reference)),
        (row_wise.swiglu(values), F.silu(reference[:, :2]) * reference[:, 2:]),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-37)
        assert torch.equal(actual.signbit(), expected.signbit())
        for a, e in zip(torch.autograd.grad(actual.sum(), values), torch.autograd.grad(expected.sum(), reference)):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-35)


@needs_compiler
@pytest.mark.parametrize("seed", range(8))
def test_random_cases_of_any_shape_and_layout(seed):
    native_cases.check(seed)
