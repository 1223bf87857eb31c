"""What test_triton.py does in processes of their own: kernels in Triton's interpreter, or compiled for a GPU that is not
there. Triton decides at its first import whether it interprets, so one process cannot do both."""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch

from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference
from fuxi_torchrec.ops.token_mixing.dispatch import mix_tokens
from fuxi_torchrec.ops.token_mixing.time_gaps import TimeGaps
from tests.helpers.closeness import mixing_sizes
from tests.helpers.mixing import parameters, times

TAU = 0.05
FORMS = ("pow", "exp", "log", "linear", "sin", "mixed", "bucketed")


def process(interpret, cache):
    """A process to submit the jobs to."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(interpret, str(cache)))


def _prepare(interpret, cache):
    assert "triton" not in sys.modules
    os.environ.update(TRITON_INTERPRET="1" if interpret else "0", TRITON_CACHE_DIR=cache)
    torch.set_num_threads(1)
    if not interpret:
        _compile_instead_of_launching()


# Token mixing


def mixed(lengths, names, implementation, dtype=torch.float32, exact=torch.float64, heads=2, d=11, time_unit=1.0):
    """[output, gradients of values and of every parameter] in float64. Values of `dtype`; the reference computes with the
    same numbers in `exact`. The values are some columns of a wider matrix. "sizes": of what the reference sums."""
    torch.manual_seed(5)
    layout = JaggedLayout.from_lengths(lengths)
    gaps = TimeGaps(*times(lengths), layout, time_unit)
    wide = torch.randn(layout.num_tokens, heads * d + 5).to(dtype)
    grad = torch.randn(layout.num_tokens, heads, len(names), d).to(dtype)
    channels = [(n, parameters(n, layout.max_length)) for n in names]
    if implementation == "reference":
        wide, grad = wide.to(exact), grad.to(exact)
        channels = [(n, [p.to(exact) for p in params]) for n, params in channels]
    values = wide[:, 3 : 3 + heads * d].unflatten(1, (heads, d)).requires_grad_()
    if implementation == "sizes":
        return mixing_sizes(values, layout, channels, gaps, grad)
    leaves = [values] + [p.requires_grad_() for _, params in channels for p in params]
    out = mix_tokens(values, layout, channels, gaps, implementation)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def mixed_from_far_rows(path, row_stride):
    """Three rows so far apart in memory that the last one begins beyond 2³¹ elements: output and its reference."""
    import numpy as np

    file = np.memmap(
        path, dtype=np.int16, mode="w+", shape=(2 * row_stride + 2,)
    )  # sparse: only what is written exists
    values = torch.from_numpy(file).view(torch.bfloat16).as_strided((3, 1, 2), (row_stride, 2, 1))
    values.copy_(torch.arange(1.0, 7.0).view(3, 1, 2))
    layout = JaggedLayout.from_lengths([3])
    channels = [("positional", [torch.tensor([1.0, 10.0, 100.0])])]
    out = mix_tokens(values, layout, channels, implementation="triton")
    return out, mix_tokens(values.contiguous(), layout, channels, implementation="reference")


def time_differences(timestamps, next_timestamps):
    """[i, j]: the time gap in ticks that the kernels' maps read, for one user."""
    n = len(timestamps)
    layout = JaggedLayout.from_lengths([n])
    gaps = TimeGaps(torch.tensor(timestamps), torch.tensor(next_timestamps), layout)
    identity = torch.eye(n).view(n, 1, n)
    channels = [("linear", [torch.tensor([1.0]), torch.tensor([0.0])])]
    return mix_tokens(identity, layout, channels, gaps, "triton")[:, 0, 0]


# Sampled softmax


def _unit_rows(count, width, seed):
    return l2_normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def _loss_and_gradients(loss, inputs):
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(2.5 * loss, inputs))]


def per_token(tokens, unique, negatives, width, biased, piece=32):
    """(loss and gradients, their reference in float64); `piece` as triton_softmax.PIECE."""
    from fuxi_torchrec.ops.sampled_softmax import triton as triton_softmax

    triton_softmax.PIECE = piece
    inputs = _unit_rows(tokens, width, 0), _unit_rows(tokens, width, 1), _unit_rows(unique, width, 2)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, unique, (tokens, negatives), generator=generator, dtype=torch.int32)
    index[:, 0] = 0  # a popular one, with several pieces
    positive = torch.randint(-1, min(unique, 5), (tokens,), generator=generator)
    bias = 3 * torch.randn(unique, generator=generator) if biased else None
    loss = per_token_sampled_softmax(*inputs, index, positive, TAU, bias, implementation="triton")
    with torch.no_grad():  # the loss alone is another variant of the kernel
        alone = per_token_sampled_softmax(*inputs, index, positive, TAU, bias, implementation="triton")
    assert alone == loss
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    rows = doubles[2][index.long()]
    bias_TK = bias[index.long()] if biased else None
    plain = sampled_softmax_reference(doubles[0], doubles[1], rows, index == positive[:, None], TAU, bias_TK)
    return _loss_and_gradients(loss, inputs), _loss_and_gradients(plain, doubles)


def shared(tokens, pool, width, hooked, chunk_elements=2000):
    """(loss and gradients, their reference in float64); with `hooked` a bias and a mask, used in chunks."""
    from fuxi_torchrec.ops.sampled_softmax import triton as triton_softmax

    triton_softmax.CHUNK_LOGITS = chunk_elements
    inputs = _unit_rows(tokens, width, 0), _unit_rows(tokens, width, 1), _unit_rows(pool, width, 2)
    generator = torch.Generator().manual_seed(3)
    pool_ids = torch.randint(0, 2**40, (pool,), generator=generator)
    positive_ids = pool_ids[torch.randint(0, pool, (tokens,), generator=generator)]
    positive_ids[::2] = 2**41
    bias = 3 * torch.randn(pool, generator=generator) if hooked else None
    hidden = torch.rand(tokens, pool, generator=generator) < (0.3 if hooked else 0)
    hook = hidden.__getitem__ if hooked else None
    arguments = *inputs, pool_ids, positive_ids, TAU, bias, hook
    loss = shared_sampled_softmax(*arguments, implementation="triton")
    with torch.no_grad():
        assert torch.allclose(shared_sampled_softmax(*arguments, implementation="triton"), loss)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    masked = (pool_ids[None] == positive_ids[:, None]) | hidden
    rows, bias_TK = doubles[2].expand(tokens, -1, -1), bias.expand(tokens, -1) if hooked else None
    plain = sampled_softmax_reference(doubles[0], doubles[1], rows, masked, TAU, bias_TK)
    return _loss_and_gradients(loss, inputs), _loss_and_gradients(plain, doubles)


# As operators


def _operator_inputs():
    layout = JaggedLayout.from_lengths([3, 0, 5])
    t, ids, own = torch.arange(8) * 100, torch.arange(5), torch.tensor([0, 1, 2, 3, 4, -1, 0, 1])
    rows = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True), torch.randn(5, 4)
    params = torch.randn(7 + 2 + 129, requires_grad=True)
    values = torch.randn(8, 2, 3, requires_grad=True)
    mixing = values, params, layout.offsets_B1, t, t + 50, "positional,pow,zero,bucketed", [7, 2, 0, 129], 5, 1.0
    return mixing, (*rows, ids, own, TAU), (*rows, own[:, None].clamp(min=0) + torch.tensor([0, -0, 0]), own, TAU)


def check_operators():
    """torch's own checks: schema, autograd registration, fake implementations, tracing with dynamic shapes."""
    from fuxi_torchrec.ops.sampled_softmax import triton as triton_softmax
    from fuxi_torchrec.ops.token_mixing import triton as triton_mixing

    mixing, shared_, per_token_ = _operator_inputs()
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in mixing]
    calls = [
        (triton_mixing._mix, mixing),
        (triton_mixing._mix_backward, (torch.randn(8, 2, 4, 3), *plain)),
        (triton_softmax._shared, (*shared_, None, None, True)),
        (triton_softmax._shared, (*shared_, torch.randn(5), torch.rand(8, 5) < 0.3, True)),
        (triton_softmax._per_token, (*per_token_, None, True)),
    ]
    return [torch.library.opcheck(operator, arguments) for operator, arguments in calls]


class Tower(torch.nn.Module):
    """All operators in one module, on a batch of users of up to 5 tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"weight_N": (9,), "a": (1,), "b": (1,), "pool_PD": (5, 6)}
        self.p = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.rand(s)) for name, s in shapes.items()})

    def forward(self, values_THd, offsets_B1, past_T, next_T, positive_T):
        layout = JaggedLayout(offsets_B1, 5, values_THd.shape[0])
        channels = [("positional", [self.p["weight_N"]]), ("pow", [self.p["a"], self.p["b"]])]
        y = mix_tokens(values_THd, layout, channels, TimeGaps(past_T, next_T, layout), "triton")
        rows = l2_normalize(y[:, :, 1].flatten(1)), l2_normalize(y[:, :, 0].flatten(1)), l2_normalize(self.p["pool_PD"])
        ids, index = torch.arange(5), positive_T[:, None].expand(-1, 3)
        pooled = shared_sampled_softmax(*rows, ids, positive_T, TAU, implementation="triton")
        return pooled + per_token_sampled_softmax(*rows, index + 1, positive_T, TAU, implementation="triton")


def exported_and_compiled():
    """(operators in the exported graph, losses eager, exported, compiled; gradients eager, compiled)."""
    tower, layout = Tower(), JaggedLayout.from_lengths([3, 0, 5])
    t = torch.arange(8) * 100
    batch = torch.randn(8, 2, 3), layout.offsets_B1, t, t + 50, torch.arange(8) % 4
    program = torch.export.export(tower, batch)
    operators = sorted({str(n.target) for n in program.graph.nodes if "fuxi_torchrec" in str(n.target)})
    compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
    losses = tower(*batch), program.module()(*batch), compiled(*batch)
    gradients = [torch.autograd.grad(loss, list(tower.parameters())) for loss in (losses[0], losses[2])]
    return operators, [loss.detach() for loss in losses], gradients


# Compiled for a GPU that is not there


_compiled, _every_tile, _capability = [], False, 0


def _compile_instead_of_launching():
    """Every launch becomes the compilation that it would begin with: its real arguments' types, down to machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    from fuxi_torchrec.ops import triton_common
    from fuxi_torchrec.ops.sampled_softmax import triton as triton_softmax
    from fuxi_torchrec.ops.token_mixing import triton as triton_mixing

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", _capability, 32),
            get_current_device=lambda: _capability,
            get_current_stream=lambda device: 0,
        )
    )
    for module in (triton_common, triton_mixing, triton_softmax):
        module.check_can_run = lambda x, what: None

    def compile_all(tuner, *args, grid, warmup, **kwargs):
        for config in tuner.configs if _every_tile else tuner.configs[:1]:
            sizes = grid(config.kwargs) if callable(grid) else grid
            assert all(size > 0 for size in sizes) and all(size < 2**16 for size in sizes[1:])
            kernel = tuner.fn.warmup(*args, grid=sizes, **kwargs, **config.all_kwargs())
            resources = kernel.metadata.shared, _stack_bytes(kernel.asm["cubin"]), "mma" in kernel.asm["ptx"]
            _compiled.append((tuner.fn.__name__, config.kwargs, *resources))

    Autotuner.run = compile_all


def _stack_bytes(cubin):
    """Bytes of a thread's stack: spilled registers (and what a sine needs for large arguments)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compiled(what, dtype, capability, every_tile=False, heads=4, d=16):
    """Runs a forward and backward whose launches are compiled; what is a form of the temporal map, "positional",
    "shared" or "per_token". Returns [(kernel, tiles, bytes of shared memory, of stack, whether on tensor cores)]."""
    global _every_tile, _capability
    _every_tile, _capability = every_tile, capability
    _compiled.clear()
    layout = JaggedLayout.from_lengths([100, 0, 30])
    t, D = torch.arange(130), heads * d
    if what == "shared":
        rows = [torch.randn(n, D, requires_grad=True) for n in (130, 130, 70)]
        for hook in (None, lambda part: torch.zeros(130, 70, dtype=torch.bool)[part]):
            bias = None if hook is None else torch.zeros(70)
            shared_sampled_softmax(*rows, t[:70], t, TAU, bias, hook, implementation="triton")
    elif what == "per_token":
        rows = [torch.randn(n, D, requires_grad=True) for n in (130, 130, 70)]
        index = torch.zeros(130, 5, dtype=torch.int32)
        for bias in (None, torch.zeros(70)):
            per_token_sampled_softmax(*rows, index, t % 70, TAU, bias, implementation="triton")
    else:
        values = torch.randn(130, heads, d).to(dtype).requires_grad_()
        names = ("positional", what) if what != "positional" else (what,)
        channels = [(n, [p.requires_grad_() for p in parameters(n, 100)]) for n in names]
        out = mix_tokens(values, layout, channels, TimeGaps(t, t + 1, layout), "triton")
        out.backward(torch.ones_like(out))
    return list(_compiled)
