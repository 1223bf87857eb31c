"""The Triton kernels against the references, in Triton's interpreter, and compiled for GPUs; none of it needs a GPU."""

import subprocess
import sys

import pytest
import torch

from fuxi_torchrec.ops import triton_common
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from tests.helpers import triton_jobs as jobs
from tests.helpers.closeness import assert_sums_close, rounding

pytestmark = pytest.mark.thorough

JAGGED = [0, 1, 5, 38, 16, 0, 33, 33]
LENGTHS = {"jagged": JAGGED, "one token": [1], "several tiles": [70]}
CHANNELS = [
    ("positional", "pow"),
    ("pow",),
    ("positional",),
    ("zero", "positional", "bucketed"),
    ("exp", "log", "linear"),
    ("positional", "sin", "mixed"),
]
LIMITS = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one block may have, bytes, by compute capability (CUDA C++ Programming Guide, table of technical
specifications)."""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    with jobs.process(interpret=True, cache=tmp_path_factory.mktemp("interpreted")) as pool:
        yield lambda job, *args, **kwargs: pool.submit(job, *args, **kwargs).result(timeout=120)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with jobs.process(interpret=False, cache=tmp_path_factory.mktemp("compiled")) as pool:
        yield lambda job, *args, **kwargs: pool.submit(job, *args, **kwargs).result(timeout=600)


@pytest.mark.parametrize("names", CHANNELS, ids="-".join)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_mixing_equals_reference_in_value_and_every_gradient(interpreter, lengths, names):
    # With phases of many turns a sine is what its argument's rounding makes of it: short gaps for it.
    unit = 1e-6 if "sin" in names else 1.0
    expected, sizes = (jobs.mixed(lengths, names, kind, time_unit=unit) for kind in ("reference", "sizes"))
    actual = interpreter(jobs.mixed, lengths, names, "triton", time_unit=unit)
    assert_sums_close(actual, expected, sizes, rounding(torch.float32, max(lengths) + 22))


@pytest.mark.parametrize("names, dtype", [(("positional", "pow"), torch.bfloat16), (("bucketed",), torch.float16)])
def test_mixing_in_half_precision_keeps_maps_and_sums_in_float32(interpreter, names, dtype):
    expected, sizes = (jobs.mixed(JAGGED, names, kind, dtype) for kind in ("reference", "sizes"))
    actual = interpreter(jobs.mixed, JAGGED, names, "triton", dtype)
    in_float32 = rounding(torch.float32, max(JAGGED) + 22)
    # A map's entries and the results are rounded to 8 bits.
    assert_sums_close(actual[:2], expected[:2], sizes[:2], 2 * torch.finfo(dtype).eps / 2 + in_float32)
    # Products of what is in half precision anyway, summed in float32.
    assert_sums_close(actual[2:], expected[2:], sizes[2:], in_float32)


def test_mixing_an_empty_batch(interpreter):
    out, *grads = interpreter(jobs.mixed, [0, 0], ("positional", "pow"), "triton")
    assert out.shape == (0, 2, 2, 11)
    assert all(not g.any() for g in grads)


def test_time_differences_are_taken_before_they_become_floats(interpreter):
    t = 1_700_000_000_123  # milliseconds; a float32 would round them to 131,072
    expected = torch.tensor([[1.0, 0, 0], [2.0, 1.0, 0], [5002.0, 5001.0, 5000.0]])
    assert torch.equal(interpreter(jobs.time_differences, [t, t + 1, t + 2], [t + 1, t + 2, t + 5002]), expected)


def test_rows_may_lie_beyond_two_billion_elements(interpreter, tmp_path):
    out, expected = interpreter(jobs.mixed_from_far_rows, str(tmp_path / "sparse"), 2**30 + 8)
    assert torch.equal(out, expected) and out.abs().sum() > 0


SOFTMAX_SHAPES = [(60, 40, 7, 12), (1, 2, 1, 3), (0, 4, 3, 3), (40, 300, 5, 8), (20, 3, 40, 50)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SOFTMAX_SHAPES, ids=str)
def test_per_token_loss_equals_plain_spelling(interpreter, shape, biased):
    actual, expected = interpreter(jobs.per_token, *shape, biased)
    assert_same(actual, expected)


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "bias and mask"])
@pytest.mark.parametrize("shape", [(100, 40, 12), (1, 1, 3), (0, 4, 3), (130, 70, 40)], ids=str)
def test_shared_loss_equals_plain_spelling(interpreter, shape, hooked):
    actual, expected = interpreter(jobs.shared, *shape, hooked)
    assert_same(actual, expected)


def assert_same(actual, expected):
    """Loss to 1e-6, gradients to 1e-5 (norm-wise)."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-9)
    for a, e in zip(actual[1:], expected[1:]):
        assert a.shape == e.shape and torch.linalg.vector_norm(a - e) <= 1e-5 * e.norm().clamp(min=1e-12)


def test_operators_pass_torchs_own_checks(interpreter):
    for results in interpreter(jobs.check_operators):
        assert set(results.values()) == {"SUCCESS"}


def test_operators_go_through_export_and_compile(interpreter):
    operators, losses, (eager, compiled) = interpreter(jobs.exported_and_compiled)
    expected = ["triton_mixing", "triton_per_token_softmax", "triton_shared_softmax"]
    assert operators == [f"fuxi_torchrec.{name}.default" for name in expected]
    assert losses[0].isfinite() and torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    # What is compiled normalises by plain formulas, whose last bits differ from the CPU kernels'.
    assert len(eager) == 4 and all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(eager, compiled))


# Every variant of a kernel in one type for one architecture; "pow" and the losses for all, some of them when asked for.
COMPILED = [
    *(("pow", "float32", 80), ("pow", "bfloat16", 90), ("shared", "float32", 90), ("per_token", "float32", 80)),
    *(pytest.param("pow", *others, marks=pytest.mark.slow) for others in (("float32", 90), ("bfloat16", 80))),
    *(pytest.param(*others, marks=pytest.mark.slow) for others in (("shared", "float32", 80), ("per_token", "float32", 90))),
    *((what, "float32", 80) for what in ("bucketed", "positional", "exp", "log")),
    *((what, "bfloat16", 90) for what in ("bucketed", "linear", "sin", "mixed")),
]
KERNELS = {
    "shared": {"shared_forward", "shared_backward_pool"},
    "per_token": {"per_token_forward", "per_token_backward_candidates", "add_extra_pieces"},
}


@pytest.mark.parametrize("what, dtype, capability", COMPILED, ids=lambda x: f"sm{x}" if x in LIMITS else str(x))
def test_every_launch_compiles_to_machine_code(compiler, what, dtype, capability):
    check_compiled(compiler(jobs.compiled, what, getattr(torch, dtype), capability), what, dtype, capability)


@pytest.mark.slow
@pytest.mark.parametrize("d", [11, 64])
@pytest.mark.parametrize("what", ["positional", *jobs.FORMS, "shared", "per_token"])
def test_every_tile_size_compiles_to_machine_code(compiler, what, d):
    for capability in LIMITS:
        for dtype in ("float32",) if what in KERNELS else ("float32", "bfloat16"):
            kernels = compiler(jobs.compiled, what, getattr(torch, dtype), capability, every_tile=True, d=d)
            check_compiled(kernels, what, dtype, capability)
            print(*(f"{dtype} sm{capability} {k[0]} {k[1]} shared {k[2]} stack {k[3]}" for k in kernels), sep="\n")


def check_compiled(kernels, what, dtype, capability):
    mixing = {"mix_forward", "mix_backward_values", "mix_backward_maps"}
    assert {name for name, *_ in kernels} == KERNELS.get(what, mixing)
    for name, tiles, shared_memory, _, has_tensor_cores in kernels:
        assert shared_memory <= LIMITS[capability], (name, tiles)
        assert has_tensor_cores == (dtype != "float32"), (name, tiles)


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch):
    layout, values = JaggedLayout.from_lengths([2]), torch.randn(2, 1, 4)
    channels, rows = [("positional", [torch.randn(2)])], values[:, 0]
    calls = [
        lambda: mix_tokens(values, layout, channels, implementation="triton"),
        lambda: shared_sampled_softmax(
            rows, rows, rows, torch.arange(2), torch.arange(2), 0.05, implementation="triton"
        ),
        lambda: per_token_sampled_softmax(
            rows, rows, rows, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2), 0.05, implementation="triton"
        ),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="need CUDA tensors, these are on cpu; choose another implementation"):
            call()
    monkeypatch.setattr(triton_common, "IS_INSTALLED", False)
    for call in calls:
        with pytest.raises(RuntimeError, match="triton package is not installed"):
            call()


def test_what_the_kernels_do_not_know_is_refused_by_name():
    layout, values = JaggedLayout.from_lengths([2]), torch.randn(2, 1, 4)
    with pytest.raises(ValueError, match="no kernel for the channels .'nn'."):
        mix_tokens(values, layout, [("nn", [])], implementation="triton")
    with pytest.raises(ValueError, match="float64"):
        mix_tokens(values.double(), layout, [("zero", [])], implementation="triton")
    rows = torch.randn(2, 257)
    with pytest.raises(ValueError, match="257 wide, the shared kernels take at most 256"):
        shared_sampled_softmax(rows, rows, rows, torch.arange(2), torch.arange(2), 0.05, implementation="triton")


def test_the_ops_import_without_triton():
    code = "import sys, fuxi_torchrec.ops.token_mixing.triton, fuxi_torchrec.ops.sampled_softmax.triton"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'triton' not in sys.modules"], check=True)
