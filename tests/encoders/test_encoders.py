"""Every tower against a slow spelling of docs/models.md: one user at a time, dense, float64, no code shared."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import ENCODERS, build_encoder
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import dropout

pytestmark = pytest.mark.usefixtures("kernels")

FORMS = ("pow", "exp", "log", "linear", "sin", "mixed", "nn", "zero")
JAGGED = [0, 1, 7, 2, 0, 11, 12]


def config(**changes):
    base = dict(embedding_dim=12, num_heads=2, value_dim=5, qk_dim=3, num_blocks=2, ffn_multiply=1.5)
    return ModelConfig(**{**base, **changes})


def form(kind, p, x):
    y = x.clamp(min=0)
    if kind == "mixed":
        parts = [{n.split("_")[1]: v for n, v in p.items() if n.startswith(k + "_")} for k in FORMS[:5]]
        return sum(form(k, part, x) for k, part in zip(FORMS[:5], parts)) / 5
    if kind == "nn":
        hidden = torch.sin(x[..., None] @ p["weight_1"].T + p["bias_1"])
        return (nn.functional.silu(hidden @ p["weight_2"].T + p["bias_2"]) @ p["weight_3"].T + p["bias_3"])[..., 0]
    return {
        "pow": lambda: p["a"] * (y + 1) ** -p["b"],
        "exp": lambda: p["a"] * torch.exp(-math.e ** p["b"] * y),
        "log": lambda: p["a"] * torch.log(1 + p["b"] * y) + p["c"],
        "linear": lambda: p["a"] * x + p["b"],
        "sin": lambda: p["c"] * torch.sin(p["a"] * x + p["b"]) + p["d"],
        "zero": lambda: torch.zeros_like(x),
    }[kind]()


def silu(x):
    return x * torch.sigmoid(x)


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def standardise(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def lag_matrix(weight, n):
    return torch.stack([weight[[abs(i - j) for j in range(n)]] for i in range(n)])


def bucketed(weight, x):
    return weight[torch.clamp(torch.floor(torch.log(x.abs().clamp(min=1)) / 0.301), 0, 128).long()]


def fuxi_block(block, channels, h, x, padded_length):
    n, H, d, q = len(h), block.num_heads, block.value_dim, block.qk_dim
    C = len(channels)
    z = silu(rms(h) @ block.input_weight)
    u, v = z[:, : C * H * d], z[:, C * H * d : (C + 1) * H * d]
    queries, keys = z[:, (C + 1) * H * d :].chunk(2, 1) if "semantic" in channels else (None, None)
    causal = torch.ones(n, n, dtype=h.dtype).tril()
    parts = []
    for head in range(H):
        for name in channels:
            if name == "positional":
                A = lag_matrix(block.mixers[name].weight_N, n)
            elif name == "bucketed_temporal":
                A = bucketed(block.mixers[name].weight, x)
            elif name == "temporal":
                A = form(block.mixers[name].kind, dict(block.mixers[name].named_parameters()), x)
            else:
                columns = slice(head * q, (head + 1) * q)
                A = silu(queries[:, columns] @ keys[:, columns].T) / padded_length
            parts.append((A * causal) @ v[:, head * d : (head + 1) * d])
    h = (u * rms(torch.cat(parts, 1))) @ block.output_weight.T + block.output_bias + h
    if not block.ffn_width:
        return h
    g = rms(h)
    w1, w3 = block.ffn_in_weight.chunk(2)
    return (silu(g @ w1.T) * (g @ w3.T)) @ block.ffn_out_weight.T + h


def hstu_block(block, h, x, padded_length):
    n, H, d, q = len(h), block.num_heads, block.value_dim, block.qk_dim
    u, v, queries, keys = silu(standardise(h, 1e-6) @ block.input_weight).split([H * d, H * d, H * q, H * q], 1)
    bias = lag_matrix(block.positional.weight_N, n) + bucketed(block.bucketed_temporal.weight, x)
    parts = []
    for head in range(H):
        rows = slice(head * q, (head + 1) * q)
        A = silu(queries[:, rows] @ keys[:, rows].T + bias) / padded_length
        parts.append(A.tril() @ v[:, head * d : (head + 1) * d])
    y = standardise(torch.cat(parts, 1), 1e-6)
    return (u * y) @ block.output_weight.T + block.output_bias + h


def sasrec_block(block, h, activation):
    n, D = h.shape
    query = standardise(h, 1e-8)
    w, b = block.attention_in_weight, block.attention_in_bias
    q, k, v = query @ w[:D].T + b[:D], h @ w[D : 2 * D].T + b[D : 2 * D], h @ w[2 * D :].T + b[2 * D :]
    parts = []
    for head in torch.arange(D).chunk(block.num_heads):
        scores = q[:, head] @ k[:, head].T / math.sqrt(len(head))
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        parts.append(torch.softmax(scores, -1) @ v[:, head])
    a = torch.cat(parts, 1) @ block.attention_out_weight.T + block.attention_out_bias
    return sasrec_ffn(block.ffn, standardise(query + a, 1e-8), activation)


def sasrec_ffn(ffn, r, activation):
    return r + activation(r @ ffn.in_weight.T + ffn.in_bias) @ ffn.out_weight.T + ffn.out_bias


def beta_map(block, x):
    """A_pos + A_time, causal."""
    temporal = block.mixers["temporal"]
    A = lag_matrix(block.mixers["positional"].weight_N, len(x))
    return (A + form(temporal.kind, dict(temporal.named_parameters()), x)).tril()


def hstu_beta_block(block, h, x):
    u, v = silu(standardise(h, 1e-6) @ block.input_weight).chunk(2, 1)
    y = standardise(beta_map(block, x) @ v, 1e-6)  # every head has the same map
    return (u * y) @ block.output_weight.T + block.output_bias + h


def sasrec_beta_block(block, h, x, activation):
    v = h @ block.value_weight.T + block.value_bias
    a = (beta_map(block, x) @ v) @ block.output_weight.T + block.output_bias
    return sasrec_ffn(block.ffn, standardise(standardise(h, 1e-8) + a, 1e-8), activation)


def flash_block(block, h, padded_length):
    """FLASH's pseudocode (figure 2 (c) and section 3.2), quadratic."""
    e, s = block.value_width, block.qk_dim
    x = standardise(h, 1e-6) * block.norm_weight + block.norm_bias
    u, v, z = silu(x @ block.input_weight.T + block.input_bias).split([e, e, s], 1)
    q, k = z * block.scale_2q[0] + block.offset_2q[0], z * block.scale_2q[1] + block.offset_2q[1]
    A = torch.relu(q @ k.T / padded_length + lag_matrix(block.positional.weight_N, len(h))) ** 2
    return (u * (A.tril() @ v)) @ block.output_weight.T + block.output_bias + h


def slow(encoder, model_config, embeddings, past, future, lengths):
    """One user after another, straight from docs/models.md."""
    activation = {"relu": torch.relu, "gelu": nn.functional.gelu}[model_config.activation]
    outputs, start = [embeddings.new_zeros(0, embeddings.shape[1])], 0
    for n in [n for n in lengths if n]:
        rows = slice(start, start + n)
        start += n
        x = (future[rows, None] - past[None, rows]).double() * encoder.time_unit
        h = math.sqrt(model_config.embedding_dim) * embeddings[rows] + encoder.position_embedding_ND[:n]
        for block in encoder.blocks:
            if model_config.encoder == "hstu":
                h = hstu_block(block, h, x, encoder.padded_length)
            elif model_config.encoder == "sasrec":
                h = sasrec_block(block, h, activation)
            elif model_config.encoder == "hstu_beta":
                h = hstu_beta_block(block, h, x)
            elif model_config.encoder == "sasrec_beta":
                h = sasrec_beta_block(block, h, x, activation)
            elif model_config.encoder == "flash":
                h = flash_block(block, h, encoder.padded_length)
            else:
                h = fuxi_block(block, encoder.channels, h, x, encoder.padded_length)
        outputs.append(h)
    return torch.cat(outputs)


def inputs(lengths, D, ticks_per_second=1):
    """Embeddings, and int64 times with ties and gaps up to a month."""
    generator = torch.Generator().manual_seed(3)
    past, future = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for n in lengths:
        seconds = 10**9 + (torch.rand(n + 1, generator=generator) ** 6 * 2_500_000).long().cumsum(0)
        past.append(ticks_per_second * seconds[:n])
        future.append(ticks_per_second * seconds[1 : n + 1])
    return torch.randn(sum(lengths), D, dtype=torch.float64, generator=generator), torch.cat(past), torch.cat(future)


def sized_up(encoder):
    """float64, evaluation mode, every weight large enough to matter."""
    encoder.double().eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".temporal." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def compare(model_config, lengths=JAGGED, time_unit=1.0, padded_length=15):
    torch.manual_seed(2)
    encoder = sized_up(build_encoder(model_config, padded_length=padded_length, time_unit=time_unit))
    embeddings, past, future = inputs(lengths, model_config.embedding_dim, round(1 / time_unit))
    embeddings.requires_grad_()
    leaves = [embeddings, *encoder.parameters()]
    weights = torch.randn(len(past), model_config.embedding_dim, dtype=torch.float64)
    results = []
    for outputs in (
        encoder(embeddings, past, future, JaggedLayout.from_lengths(lengths)),
        slow(encoder, model_config, embeddings, past, future, lengths),
    ):
        loss = (outputs * weights).sum() + 0 * sum(leaf.sum() for leaf in leaves)
        results.append([outputs, *torch.autograd.grad(loss, leaves)])
    for name, actual, expected in zip(["outputs", "embeddings", *dict(encoder.named_parameters())], *results):
        assert actual.shape == expected.shape
        if actual.numel():
            assert (actual - expected).abs().max() <= 1e-8 * expected.abs().max() + 1e-12, name


@pytest.mark.parametrize("bias_function", FORMS)
@pytest.mark.parametrize("time_unit", [1.0, 0.001])
def test_fuxi_beta_with_every_functional_form(bias_function, time_unit):
    compare(config(encoder="fuxi_beta", bias_function=bias_function), time_unit=time_unit)


SUBSETS = [
    ["positional"],
    ["temporal"],
    ["semantic"],
    ["bucketed_temporal"],
    ["semantic", "positional"],
    ["temporal", "semantic"],
    ["semantic", "temporal", "positional"],
    ["positional", "temporal", "bucketed_temporal", "semantic"],
]


@pytest.mark.parametrize("channels", SUBSETS, ids="-".join)
def test_every_choice_of_channels_is_one_block(channels):
    compare(config(encoder="fuxi_beta", channels=channels, num_heads=3, value_dim=2))


@pytest.mark.parametrize("encoder", ["fuxi_beta", "fuxi_alpha"])
def test_fuxi_without_the_second_stage_of_its_feed_forward_layer(encoder):
    compare(config(encoder=encoder, ffn_multiply=0))


TOWERS = list(ENCODERS)


@pytest.mark.parametrize("encoder", TOWERS)
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_heads(encoder, heads):
    compare(config(encoder=encoder, num_heads=heads, value_dim=7 - heads, qk_dim=heads, num_blocks=1))


@pytest.mark.parametrize("encoder", TOWERS)
@pytest.mark.parametrize("lengths", [[6], [1], [0], [0, 0], [4, 4, 4], [15, 1], []], ids=str)
def test_lengths(encoder, lengths):
    compare(config(encoder=encoder, activation="gelu"), lengths=lengths)


@pytest.mark.parametrize("encoder", TOWERS)
def test_three_blocks_in_milliseconds_beyond_one_strip(encoder):
    compare(config(encoder=encoder, num_blocks=3, embedding_dim=8), [104, 3, 41], time_unit=0.001, padded_length=105)


def float32_batch(encoder, lengths=JAGGED):
    embeddings, past, future = inputs(lengths, 12)
    return encoder(embeddings.float(), past, future, JaggedLayout.from_lengths(lengths))


@pytest.mark.parametrize("encoder", TOWERS)
def test_other_users_in_the_batch_change_nothing(encoder):
    tower = build_encoder(config(encoder=encoder), padded_length=15).eval()
    embeddings, past, future = inputs(JAGGED, 12)
    together = tower(embeddings.float(), past, future, JaggedLayout.from_lengths(JAGGED))
    rows = slice(8, 10)
    alone = tower(embeddings[rows].float(), past[rows], future[rows], JaggedLayout.from_lengths([2]))
    torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("encoder", TOWERS)
def test_training_is_repeatable_and_each_step_drops_others(encoder):
    tower = build_encoder(config(encoder=encoder, attention_dropout=0.2), padded_length=15).train()
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        tower.zero_grad()
        out = float32_batch(tower)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in tower.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(float32_batch(tower), results[0][0])


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(1000, 301, requires_grad=True)
    y = dropout(x, 0.2, training=True)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.003)
    assert y.mean().item() == pytest.approx(1.0, abs=0.004)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert dropout(x, 0.2, training=False) is x


@pytest.mark.parametrize("encoder", TOWERS)
def test_bf16_autocast_trains_and_stays_near_float32(encoder):
    tower = build_encoder(config(encoder=encoder), padded_length=15).eval()
    expected = float32_batch(tower).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = float32_batch(tower)
    actual.float().square().sum().backward()
    assert (actual - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tower.parameters())


@pytest.mark.parametrize("encoder", TOWERS)
def test_meta_construction_then_real_parameters(encoder):
    with torch.device("meta"):
        tower = build_encoder(config(encoder=encoder), padded_length=15)
    tower = tower.to_empty(device="cpu")
    tower.reset_parameters()
    assert torch.isfinite(float32_batch(tower.eval())).all()


def test_a_sequence_longer_than_the_table_is_refused():
    tower = build_encoder(config(), padded_length=11)
    with pytest.raises(UserError, match="12 events.*padded_length = 11"):
        float32_batch(tower)


def test_initial_parameters_follow_the_model_page():
    torch.manual_seed(0)
    tower = build_encoder(ModelConfig(embedding_dim=64, value_dim=64), padded_length=500)
    block = tower.blocks[0]
    assert tower.position_embedding_ND.std().item() == pytest.approx(math.sqrt(2 / 564), rel=0.03)
    sasrec = build_encoder(ModelConfig(encoder="sasrec", embedding_dim=64), padded_length=500)
    assert sasrec.position_embedding_ND.abs().max() <= 2 / 8
    assert sasrec.position_embedding_ND.std().item() == pytest.approx(0.88 / 8, rel=0.03)
    assert block.input_weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mixers["positional"].weight_N.std().item() == pytest.approx(0.02, rel=0.15)
    assert block.ffn_in_weight.abs().max().item() == pytest.approx(math.sqrt(6 / 128), rel=0.01)
    assert 0.4 <= block.mixers["temporal"].b.item() <= 0.8


@pytest.mark.thorough
def test_towers_need_torch_alone():
    code = "import sys, fuxi_torchrec.encoders, fuxi_torchrec.ops.ranking; print({'torchrec', 'fbgemm_gpu'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_rank_without_users_trains_on_with_zero_gradients(encoder):
    """Every parameter gets a gradient from an empty batch, or data parallelism would wait for it forever."""
    tower = build_encoder(config(encoder=encoder), padded_length=15).train()
    nothing = torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, tower.embedding_dim, requires_grad=True)
    tower(x, nothing, nothing, JaggedLayout.from_lengths([0])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tower.parameters())
