"""Numbers made once with the authors' research code: every tower and functional form must give the same ones."""

import numpy as np
import pytest

from fuxi_torchrec.checkpoint.research_adapter import encoder_from_research, research_grads, research_params
from fuxi_torchrec.encoders import mixing
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.ops.token_mixing.dispatch import mix_by_plan
from tests.helpers.closeness import mixing_sizes
from tests.helpers.golden import FILES, load

pytestmark = pytest.mark.usefixtures("kernels")


def relative_error(actual, expected, size=None):
    """Largest difference over the largest expected value, or over the size of what it is the sum of."""
    scale = np.abs(expected if size is None else size).max()
    return np.abs(np.asarray(actual, dtype=np.float64) - expected).max() / (scale if scale > 0 else 1.0)


@pytest.fixture
def sizes_of_time_functions(monkeypatch):
    """Fills a dictionary, after backward, with the size of what each time function's gradient sums: scalars may cancel."""
    sizes = {}

    def mix_and_record(values_THd, channels, plan):
        def record(grad_THCd):
            of_params = mixing_sizes(values_THd, plan.layout, channels, plan.gaps, grad_THCd)[2:]
            named = [(name, p) for name, params in channels for p in params]
            sizes.update({p: size for (name, p), size in zip(named, of_params) if name != "positional"})

        mixed_THCd = mix_by_plan(values_THd, channels, plan)
        mixed_THCd.register_hook(record)
        return mixed_THCd

    monkeypatch.setattr(mixing, "mix_by_plan", mix_and_record)
    return sizes


def test_every_tower_and_form_is_covered():
    assert len(FILES) == 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_outputs_loss_and_every_gradient(path, sizes_of_time_functions):
    config, data, params = load(path)
    model = encoder_from_research(config, params)
    outputs = model(data["item_ids"], data["timestamps"], data["next_timestamps"], data["lengths"])
    assert relative_error(outputs.detach().numpy(), data["outputs"]) < 1e-5
    loss = model.loss(outputs, data["target_ids"], data["negative_ids"])
    assert abs(loss.item() - float(data["loss"])) < 1e-5 * abs(float(data["loss"]))
    loss.backward()
    grads = research_grads(model)
    for parameter, size in sizes_of_time_functions.items():
        parameter.grad = size.to(parameter.dtype)
    sizes = research_grads(model)
    assert set(grads) == set(params) == {name[len("grad/") :] for name in data if name.startswith("grad/")}
    for name, grad in grads.items():
        expected = data["grad/" + name]
        assert grad.shape == expected.shape
        assert relative_error(grad, expected, sizes[name] if "_rel_attn_bias._" in name else None) < 1e-4, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameters_come_back_as_they_went_in(path):
    config, _, params = load(path)
    back = research_params(encoder_from_research(config, params))
    assert set(back) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(back[name], array)


def test_a_wrong_parameter_is_named():
    config, _, params = load(FILES[0])
    name = "_input_features_preproc._pos_emb.weight"
    with pytest.raises(UserError, match=name):
        encoder_from_research(config, {k: v for k, v in params.items() if k != name})
    with pytest.raises(UserError, match="_nobody"):
        encoder_from_research(config, {**params, "_nobody": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=name):
        encoder_from_research(config, {**params, name: params[name][:-1]})
