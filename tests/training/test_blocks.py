"""Ways to run a tower's blocks that change no result: activation checkpointing, bf16's float32 parts, torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import ENCODERS, build_encoder
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.native import library as native
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.training import compile as compiling
from tests.helpers.command_line import SMOKE, mistake
from tests.helpers.training_runs import losses, tiny, train

pytestmark = pytest.mark.thorough

D = 12


def tower_of(encoder, **changes):
    torch.manual_seed(0)
    sizes = dict(embedding_dim=D, num_heads=2, value_dim=5, qk_dim=3, num_blocks=3, ffn_multiply=1.5)
    return build_encoder(ModelConfig(encoder=encoder, **{**sizes, **changes}), padded_length=40).train()


def batch(number=0, users=9):
    """Users of up to 30 events, others for each number."""
    generator = torch.Generator().manual_seed(number)
    layout = JaggedLayout.from_lengths(torch.randint(0, 31, (users + number,), generator=generator).tolist())
    times_T1 = torch.randint(0, 5000, (layout.num_tokens + 1,), generator=generator).cumsum(0)
    embeddings_TD = torch.randn(layout.num_tokens, D, generator=generator).requires_grad_()
    return embeddings_TD, times_T1[:-1], times_T1[1:], layout


def outputs_and_gradients(tower, inputs):
    """Of a step with dropout drawn from a fixed seed."""
    tower.zero_grad()
    inputs[0].grad = None
    torch.manual_seed(3)
    outputs_TD = tower(*inputs)
    outputs_TD.square().sum().backward()
    return [outputs_TD.detach(), inputs[0].grad, *(p.grad.clone() for p in tower.parameters())]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_changes_no_bit(encoder, kernels):
    tower = tower_of(encoder, attention_dropout=0.2)
    plain = outputs_and_gradients(tower, batch())
    tower.activation_checkpointing = True
    again = outputs_and_gradients(tower, batch())
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def kept_bytes(tower, inputs):
    """What backward holds besides parameters: tensors that autograd was told to save, outside of checkpoints."""
    weights, kept = {p.untyped_storage().data_ptr() for p in tower.parameters()}, {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        tower(*inputs).sum().backward()
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_keeps_the_inputs_of_blocks_alone(encoder):
    tower, inputs = tower_of(encoder), batch(users=40)
    plain = kept_bytes(tower, inputs)
    tower.activation_checkpointing = True
    of_blocks = len(tower.blocks) * inputs[0].nbytes
    assert kept_bytes(tower, inputs) + of_blocks < 0.4 * plain


FLOAT32_ONLY = ("linalg_vector_norm", "native_layer_norm", "rsqrt", "exp", "log", "log1p", "sin", "_softmax")


class DTypes(TorchDispatchMode):
    """The types that operators see, by their name."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        floats = {x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()}
        self.seen.setdefault(function.overloadpacket.__name__.rstrip("_"), set()).update(floats)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_bf16_leaves_norms_maps_times_and_outputs_in_float32(encoder, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    tower, inputs = tower_of(encoder, attention_dropout=0.2), batch()
    with DTypes() as dtypes:
        with torch.autocast("cpu", torch.bfloat16):
            outputs_TD = tower(*inputs)
            context = tower.batch_context(*inputs[1:])
        unit_TD = l2_normalize(outputs_TD, 1e-6)
        unit_TD.sum().backward()
    seen = dtypes.seen
    assert any(torch.bfloat16 in seen.get(name, ()) for name in ("mm", "addmm"))
    for name in FLOAT32_ONLY:
        assert seen.get(name, set()) <= {torch.float32, torch.float64}, (name, seen[name])
    assert unit_TD.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tower.parameters())
    features = context.gaps.features.values() if hasattr(context, "gaps") else []
    assert all(x.dtype in (torch.float32, torch.int32) for x in features)


@pytest.mark.slow
@pytest.mark.parametrize("dropout, checkpointing", [(0.0, False), (0.0, True), (0.2, True)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_tower_compiled(encoder, dropout, checkpointing):
    """As eager without dropout, and with it, the same whether activations are kept; all blocks share their code, for all
    lengths."""
    torch._dynamo.reset()
    counters.clear()
    eager = tower_of(encoder, dropout=dropout, input_dropout=0.0)
    tower, graphs = copy.deepcopy(eager), []
    compiling.compile_blocks(tower)
    assert list(tower.state_dict()) == list(eager.state_dict())
    for number in range(5):
        tower.activation_checkpointing = False
        expected = outputs_and_gradients(eager if dropout == 0 else tower, batch(number))
        tower.activation_checkpointing = checkpointing
        actual = outputs_and_gradients(tower, batch(number))
        assert all((a - b).norm() <= 1e-4 * a.norm() for a, b in zip(expected, actual))
        graphs.append(counters["stats"]["unique_graphs"])
    tower.eval()(*batch(7))
    assert 0 < graphs[0] < 2 * len(tower.blocks) and graphs == graphs[:1] * 5
    assert counters["stats"]["unique_graphs"] == graphs[0]


def test_compiled_training_follows_eager_and_resumes_either_way(small_dataset, tmp_path, monkeypatch):
    """Without dropout, whose draws differ; with what torch.compile traces, run by PyTorch's operators instead of code."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    counters.clear()

    def run(name, *parts):
        for steps, compile in parts:
            config = tiny(small_dataset, max_steps=steps, compile=compile)
            config.model.dropout = config.model.input_dropout = 0.0
            train(config, tmp_path / name, resume=(tmp_path / name).exists())
        return losses(tmp_path / name)

    eager = run("eager", (7, False))
    assert counters["stats"]["unique_graphs"] == 0
    mixed = run("mixed", (2, False), (5, True), (7, False))
    assert [step for step, _ in mixed] == [step for step, _ in eager]
    assert [loss for _, loss in mixed] == pytest.approx([loss for _, loss in eager], rel=1e-4)
    # What lies before and after the mixer, once for both blocks and all lengths.
    assert counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_nothing_begins(small_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ("--data.path", small_dataset, "--output", tmp_path / "run", "--trainer.compile", "true")
    assert "trainer.compile: there is no C++ compiler 'no-such-compiler'" in mistake(capsys, "train", SMOKE, *words)
    assert not (tmp_path / "run").exists()
