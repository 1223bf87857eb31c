"""The CPU's mixers as operators: torch's own checks of schema, fakes and autograd, tracing with dynamic shapes, and the same
numbers out of torch.compile and torch.export."""

import pytest
import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.token_mixing import dispatch as token_mixing
from fuxi_torchrec.ops.token_mixing import native as mixing_native
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.operator import mix_backward_op, mix_op
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps

LENGTHS = [3, 0, 9, 1]
CHANNELS = ("positional", "zero", "pow")
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
C_KERNELS = pytest.param(True, marks=needs_compiler)


def inputs():
    """values, layout, times, the channels' parameters."""
    generator = torch.Generator().manual_seed(0)
    layout = JaggedLayout.from_lengths(LENGTHS)
    times_T = 10**9 + torch.randint(0, 5000, (sum(LENGTHS) + 1,), generator=generator).cumsum(0)
    values_THd = torch.randn(sum(LENGTHS), 2, 3, generator=generator, requires_grad=True)
    params = [torch.randn(12, generator=generator), torch.tensor([0.3]), torch.tensor([0.6])]
    return values_THd, layout, [times_T[:-1], times_T[1:]], [p.requires_grad_() for p in params]


@pytest.mark.thorough
@pytest.mark.parametrize("in_c", [False, C_KERNELS])
@pytest.mark.parametrize("linear_from", [None, 4])
def test_torchs_checks_of_the_mixer(linear_from, in_c):
    values_THd, layout, times, params = inputs()
    slots = [layout.slots.users_B5, layout.slots.token_P, layout.slots.slot_T, layout.slots.padding_slots]
    lists = times, slots, [torch.empty(0)] * 3
    settings = " ".join(CHANNELS), linear_from, in_c, 1.0, 1e-6
    torch.library.opcheck(mix_op, (values_THd, *lists, params, *settings))
    grad_THCd, plain = torch.randn(len(values_THd), 2, 3, 3), [p.detach() for p in params]
    torch.library.opcheck(mix_backward_op, (grad_THCd, values_THd.detach(), *lists, plain, *settings))


@pytest.mark.thorough
@needs_compiler
def test_torchs_checks_of_the_mixer_in_c():
    values_THd, layout, times, params = inputs()
    where = layout.offsets_B1, layout.row_tasks(mixing_native.TASK_ROWS), times
    settings = " ".join(CHANNELS), layout.max_length, 1.0
    torch.library.opcheck(mixing_native._mix, (values_THd, *where, params, *settings))
    grad_THCd, plain = torch.randn(len(values_THd), 2, 3, 3), [p.detach() for p in params]
    torch.library.opcheck(mixing_native._mix_backward, (grad_THCd, values_THd.detach(), *where, plain, *settings))


class Mixer(torch.nn.Module):
    """Token mixing of one batch's users, whatever their values are."""

    def __init__(self, implementation):
        super().__init__()
        values_THd, self.layout, times, params = inputs()
        self.implementation, self.gaps = implementation, TimeGaps(*times, self.layout)
        self.params = torch.nn.ParameterList(params)
        self(values_THd)  # what a batch needs once is made before anything is traced

    def forward(self, values_THd):
        weight_N, a, b = self.params
        channels = [("positional", [weight_N]), ("zero", []), ("pow", [a, b])]
        return mix_tokens(values_THd, self.layout, channels, self.gaps, self.implementation)


@pytest.mark.thorough
@pytest.mark.parametrize("implementation", ["blocked", "linear", pytest.param("native", marks=needs_compiler)])
def test_compiled_and_exported_mixers_give_eagers_numbers(implementation, monkeypatch):
    monkeypatch.setattr(token_mixing, "LINEAR_FROM", 4)
    values_THd = inputs()[0]
    mixer = Mixer(implementation)
    program = torch.export.export(mixer, (values_THd,))
    operator = "mix_native" if implementation == "native" else "mix_tokens"
    assert f"fuxi_torchrec.{operator}.default" in {str(node.target) for node in program.graph.nodes}
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(values_THd), mixer(values_THd), rtol=0, atol=0)
    wanted = [values_THd, *mixer.params]
    gradients = [torch.autograd.grad(mix(values_THd).square().sum(), wanted) for mix in (mixer, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
