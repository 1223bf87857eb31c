"""The CPU kernels in C: equal to PyTorch's spelling in value and gradient, and absent without harm."""


import pytest
import torch

from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise import dispatch as row_wise
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax
from fuxi_torchrec.ops.token_mixing.time_maps import TIME_MAPS
from tests.helpers.closeness import assert_sums_close, rounding
from tests.helpers.mixing import JAGGED, LENGTHS, assert_equals_reference, output_and_gradients

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


def in_both(function, shapes, monkeypatch):
    """[outputs and every gradient] with the kernels, and with PyTorch in their place."""
    results = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        generator = torch.Generator().manual_seed(0)
        inputs = [(3 * torch.randn(s, generator=generator)).requires_grad_() for s in shapes]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        slopes = [torch.randn(y.shape, generator=generator) for y in outputs]
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, slopes)])
    return results


ROW_FUNCTIONS = {
    "rms_norm": (row_wise.rms_norm, [50]),
    "gated_rms_norm": (row_wise.gated_rms_norm, [50, 50]),
    "swiglu": (row_wise.swiglu, [34]),
    "silu_split": (lambda x: row_wise.silu_split(x, (30, 7, 13)), [50]),
    "l2_normalize": (l2_normalize, [17]),
}


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 131])
@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows_equal_pytorchs(name, rows, monkeypatch):
    function, widths = ROW_FUNCTIONS[name]
    actual, expected = in_both(function, [(rows, w) for w in widths], monkeypatch)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=2e-6)


@needs_compiler
def test_a_gate_that_is_a_view_of_columns(monkeypatch):
    def gated(x):
        u, y, _ = row_wise.silu_split(x, (20, 20, 10))
        return row_wise.gated_rms_norm(u, y)

    actual, expected = in_both(gated, [(77, 50)], monkeypatch)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=5e-6, atol=5e-6)


@needs_compiler
def test_the_input_step_adds_rows_of_the_position_table(monkeypatch):
    position_T = torch.arange(90) % 11
    actual, expected = in_both(
        lambda x, table: row_wise.add_positions(x, table, position_T, 0.0, True), [(90, 23), (14, 23)], monkeypatch
    )
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("x", [-200.0, -88.0, -1e-9, 0.0, 1e-9, 20.0, 88.0, 300.0, float("inf"), float("nan")])
def test_extreme_values_saturate_and_nan_stays(x):
    value = torch.tensor([[x, 1.0]], requires_grad=True)
    (out,) = row_wise.silu_split(value, (2,))
    torch.testing.assert_close(out, torch.nn.functional.silu(value), rtol=1e-6, atol=1e-35, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (5000, 100), (4, 3, 6)])
def test_both_ways_drop_the_same_elements_and_draw_as_much(shape, monkeypatch):
    """So a run goes on alike by either; 5,000 rows are several of PyTorch's chunks."""
    x, found = torch.randn(shape).requires_grad_(), []
    for way in ("native", "torch"):
        if way == "torch":
            monkeypatch.setattr(native, "library", lambda: None)
        elif native.library() is None:
            pytest.skip("no C compiler here")
        torch.manual_seed(5)
        out = row_wise.dropout(x, 0.3, True)
        found.append((out, *torch.autograd.grad(out, x, torch.ones_like(out)), torch.rand(1)))
    for by_c, by_torch in zip(*found):
        assert torch.equal(by_c, by_torch)


def test_dropout_keeps_its_share_and_backward_its_mask():
    torch.manual_seed(0)
    x = torch.ones(3000, 200, requires_grad=True)
    out = row_wise.dropout(x, 0.2, True)
    dropped = (out == 0).double()
    assert abs(dropped.mean() - 0.2) < 4 * (0.16 / x.numel()) ** 0.5
    assert (dropped.mean(0) - 0.2).abs().max() < 5 * (0.16 / 3000) ** 0.5
    assert (dropped.mean(1) - 0.2).abs().max() < 5.5 * (0.16 / 200) ** 0.5
    centred = dropped - 0.2
    for shift in (1, 2, 16):  # neighbours in a row and in a column know nothing of each other
        assert abs((centred[:, :-shift] * centred[:, shift:]).mean()) < 1e-3
        assert abs((centred[:-shift] * centred[shift:]).mean()) < 1e-3
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert not torch.equal(out, row_wise.dropout(x, 0.2, True))
    torch.manual_seed(0)
    assert torch.equal(out, row_wise.dropout(x, 0.2, True))


@needs_compiler
@pytest.mark.parametrize("normalised", [row_wise.rms_norm, lambda x, p, on: row_wise.gated_rms_norm(2 * x, x, p, on)])
def test_dropout_after_a_norm_scales_what_it_keeps(normalised):
    x = torch.randn(400, 50, requires_grad=True)
    dropped, whole = normalised(x, 0.3, True), normalised(x, 0.3, False)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.7) < 0.02
    torch.testing.assert_close(dropped, whole * kept / 0.7, rtol=1e-5, atol=1e-6)
    slope = torch.randn(x.shape)
    (actual,) = torch.autograd.grad(dropped, x, slope)
    (expected,) = torch.autograd.grad(whole, x, slope * kept / 0.7)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("names", [("positional", "pow"), ("pow",), ("exp", "positional"), ("positional", "zero")])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}users")
@pytest.mark.parametrize("heads, d", [(1, 50), (8, 12), (1, 1)])
def test_mixing_equals_the_reference_in_float64(names, lengths, heads, d):
    assert_equals_reference(lengths, names, "native", torch.float32, heads, d)


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            mixed = output_and_gradients(JAGGED, ("positional", "pow"), "native", torch.float32)
            generator = torch.Generator().manual_seed(0)
            rows = [torch.randn(r, 20, generator=generator).requires_grad_() for r in (300, 300, 40)]
            index = torch.randint(0, 40, (300, 9), generator=generator)
            loss = per_token_sampled_softmax(*rows, index, index[:, 0] - 1, 0.05)
            runs.append([*mixed, loss.detach(), *torch.autograd.grad(loss, rows)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@needs_compiler
@pytest.mark.parametrize("place", ["outputs", "positives", "candidates"])
def test_what_is_not_finite_breaks_the_loss(place):
    rows = {name: torch.randn(5, 4) for name in ("outputs", "positives", "candidates")}
    rows[place][2, 1] = float("nan")
    index = torch.arange(5).repeat(5, 1)
    assert not torch.isfinite(per_token_sampled_softmax(*rows.values(), index, torch.full((5,), -1), 0.05))


@pytest.mark.usefixtures("kernels")
def test_forms_that_no_kernel_knows_are_mixed_all_the_same():
    for form in TIME_MAPS:
        kinds = [("auto", torch.float32), ("reference", torch.float32), ("sizes", torch.float64)]
        actual, expected, sizes = (output_and_gradients([3, 7], ("positional", form), *kind) for kind in kinds)
        assert_sums_close(actual, expected, sizes, 2 * rounding(torch.float32, 7 + 6))
