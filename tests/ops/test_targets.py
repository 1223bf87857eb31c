"""The C kernels compiled for other processors compute what they compute here, wherever the tests run."""

import platform
import shutil

import pytest
import torch
import torch.nn.functional as F

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise import dispatch as row_wise
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from tests.helpers import kernel_calls
from tests.helpers.mixing import parameters, times

pytestmark = [pytest.mark.thorough, pytest.mark.skipif(native.library() is None, reason="no C compiler here")]
# The last of -march counts.
NARROWER = {"AVX2, of 2013": "-march=x86-64-v3", "SSE2, of 2003": "-march=x86-64"}
ARM_LANES = 4
ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64 -L /usr/aarch64-linux-gnu")


def every_kernel():
    """Forward and backward of all that has kernels, at odd sizes; users of 3 to 1,100 events, with and without views."""
    torch.manual_seed(0)
    for lengths, heads, d, names, implementation in (
        ([37, 3, 130], 1, 50, ("positional", "pow"), "native"),
        ([61], 2, 5, ("exp", "positional"), "native"),
        ([1100, 5], 1, 21, ("positional", "pow"), "linear"),
    ):
        layout = JaggedLayout.from_lengths(lengths)
        values = torch.randn(layout.num_tokens, heads * d + 3)[:, 3:].unflatten(1, (heads, d)).requires_grad_()
        channels = [(name, parameters(name, max(lengths))) for name in names]
        mix_tokens(values, layout, channels, TimeGaps(*times(lengths), layout), implementation).sin().sum().backward()
    for T, K, U, D in ((50, 13, 40, 50), (9, 70, 300, 8), (20, 5, 11, 130)):
        rows = [F.normalize(torch.randn(n, D)).requires_grad_() for n in (T, T, U)]
        index, own = torch.randint(0, U, (T, K)), torch.randint(-1, U, (T,))
        per_token_sampled_softmax(*rows, index, own, 0.1, torch.randn(U), chunk_logits=K * 16).backward()
    x, table = torch.randn(33, 50).requires_grad_(), torch.randn(9, 50).requires_grad_()
    gate = torch.randn(33, 60)[:, 5:55].requires_grad_()
    row_wise.add_positions(x, table, torch.randint(0, 9, (33,)), 0.2, True).sum().backward()
    (row_wise.gated_rms_norm(gate, x, 0.3, True) + row_wise.rms_norm(x) + row_wise.dropout(x, 0.5, True)).sin().sum().backward()
    sum(part.sin().sum() for part in row_wise.silu_split(x, (20, 30))).backward()
    (row_wise.swiglu(x).sum() + row_wise.l2_normalize(x).sin().sum()).backward()


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = kernel_calls.record(every_kernel, monkeypatch)
    assert {call.name for call in found} == set(native._SIGNATURES) - {"lanes"}
    return found


def assert_same(calls, elsewhere):
    """Up to the rounding of sums in another order; the widest row has 1,100 terms."""
    for call, results in zip(calls, elsewhere):
        for expected, found in zip(call.results, results):
            if expected.dtype.is_floating_point:
                largest = expected[expected.isfinite()].abs().max().item() if expected.numel() else 0.0
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * largest, equal_nan=True, msg=call.name)
            else:
                assert torch.equal(found, expected), call.name


@pytest.mark.parametrize("target", NARROWER)
def test_kernels_for_narrower_vectors_compute_the_same(calls, target, tmp_path):
    if "x86_64" not in platform.machine():
        pytest.skip(f"these are targets of x86-64, not of {platform.machine()}")
    library = kernel_calls.build(tmp_path, native.find_compiler(), NARROWER[target])
    calls = [kernel_calls.padded_for(call, library.lanes(1)) for call in calls]
    assert_same(calls, [kernel_calls.replay(library, call) for call in calls])


@pytest.mark.arm
def test_kernels_for_arm_compute_the_same(calls, tmp_path):
    if shutil.which(ARM[0]) is None or shutil.which(ARM[1].split()[0]) is None:
        pytest.skip("no compiler or emulator for aarch64 here (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    calls = [kernel_calls.padded_for(call, ARM_LANES) for call in calls]
    assert_same(calls, kernel_calls.replay_elsewhere(tmp_path, *ARM, calls))
