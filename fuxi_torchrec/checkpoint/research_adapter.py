"""Weights and conventions of the public research code of FuXi and HSTU: bring them here, take them back.

The names are the research code's own (`_fuxi._attention_layers.0._uvqk`, …). Item ids are 1-based there: row 0 of
its item table is padding. Works with torch alone.

Shapes: T tokens, B users, K negatives, V items, D embedding, N padded length.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Type, Union

import numpy as np
import torch
from torch import Tensor, nn

from fuxi_torchrec.config import ModelConfig
from fuxi_torchrec.encoders import ENCODERS, build_encoder
from fuxi_torchrec.encoders.base import SequenceEncoder
from fuxi_torchrec.encoders.fuxi_beta import FuXiBlock, FuXiEncoder
from fuxi_torchrec.encoders.hstu import HSTUBlock, HSTUEncoder
from fuxi_torchrec.encoders.sasrec import SASRecBlock, SASRecEncoder
from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.reference import sampled_softmax_reference

_REQUIRED = ("model", "num_items", "padded_length", "embedding_dim", "num_heads", "num_blocks")


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Entry:
    """One reference array and the part of one of our parameters that it corresponds to.

    `ours(parameter)` and `theirs(array)` are views of equal shape; with `flip` one runs against the other.
    """

    name: str
    shape: tuple
    parameter: Tensor
    ours: Callable[[Tensor], Tensor] = _same
    theirs: Callable[[Tensor], Tensor] = _same
    flip: bool = False

    def read(self, source: Tensor, base: Optional[np.ndarray]) -> np.ndarray:
        """The reference array of our parameter's values or gradient; `base` fills what we do not hold."""
        array = torch.zeros(self.shape, dtype=torch.float32)
        if base is not None:
            array.copy_(torch.as_tensor(base))
        ours = self.ours(source.detach()).cpu().float()
        self.theirs(array).copy_(ours.flip(0) if self.flip else ours)
        return array.numpy()

    def write(self, array: np.ndarray) -> None:
        theirs = self.theirs(torch.tensor(array))
        self.ours(self.parameter.data).copy_(theirs.flip(0) if self.flip else theirs)


def _direct(name: str, parameter: Tensor) -> _Entry:
    return _Entry(name, tuple(parameter.shape), parameter)


def _lags(name: str, weight_N: Tensor) -> _Entry:
    """Their Toeplitz weights hold the future too: index N - 1 - lag, 2 N - 1 entries."""
    N = len(weight_N)
    return _Entry(name, (2 * N - 1,), weight_N, theirs=lambda array: array[:N], flip=True)


def _entries(encoder: SequenceEncoder, item_table_VD: Tensor) -> List[_Entry]:
    V, D = item_table_VD.shape
    table_name = "_embedding_module._item_emb.weight"
    entries = [
        _Entry(table_name, (V + 1, D), item_table_VD, theirs=lambda array: array[1:]),
        _direct("_input_features_preproc._pos_emb.weight", encoder.position_embedding_ND),
    ]
    for tower, block_entries in _BLOCK_ENTRIES.items():
        if isinstance(encoder, tower):
            for index, block in enumerate(encoder.blocks):
                entries += block_entries(block, index)
            return entries
    raise UserError(f"the research code has no counterpart of {type(encoder).__name__}")


def _fuxi_entries(block: FuXiBlock, index: int) -> List[_Entry]:
    prefix = f"_fuxi._attention_layers.{index}."
    hidden, D = block.ffn_width, len(block.output_bias)
    entries = [
        _direct(prefix + "_uvqk", block.input_weight),
        _direct(prefix + "_mffn.lin0.weight", block.output_weight),
        _direct(prefix + "_mffn.lin0.bias", block.output_bias),
    ]
    if hidden:
        entries += [
            _Entry(prefix + "_mffn.lin1.weight", (hidden, D), block.ffn_in_weight, ours=lambda w: w[:hidden]),
            _direct(prefix + "_mffn.lin2.weight", block.ffn_out_weight),
            _Entry(prefix + "_mffn.lin3.weight", (hidden, D), block.ffn_in_weight, ours=lambda w: w[hidden:]),
        ]
    bias = prefix + "_rel_attn_bias."
    for name, mixer in block.channel_parameters().items():
        if name == "positional":
            entries.append(_lags(bias + "_pos_w", mixer.get_parameter("weight_N")))
        elif name == "bucketed_temporal":
            entries.append(_direct(bias + "_ts_w", mixer.get_parameter("weight")))
        else:
            entries += [_direct(bias + _form_name(mixer.kind, ours), p) for ours, p in mixer.named_parameters()]
    return entries


def _form_name(form: str, ours: str) -> str:
    """The reference's name of a functional form's parameter: pow's a is _pow_a, nn's weight_1 is _nn_a.weight."""
    if form == "nn":
        kind, layer = ours.split("_")
        return f"_nn_{'abc'[int(layer) - 1]}.{kind}"
    name = ours if form == "mixed" else f"{form}_{ours}"
    return "_" + name.replace("linear_", "lin_")


def _hstu_entries(block: HSTUBlock, index: int) -> List[_Entry]:
    prefix = f"_hstu._attention_layers.{index}."
    return [
        _direct(prefix + "_uvqk", block.input_weight),
        _direct(prefix + "_rel_attn_bias._ts_w", block.bucketed_temporal.get_parameter("weight")),
        _lags(prefix + "_rel_attn_bias._pos_w", block.positional.get_parameter("weight_N")),
        _direct(prefix + "_o.weight", block.output_weight),
        _direct(prefix + "_o.bias", block.output_bias),
    ]


def _sasrec_entries(block: SASRecBlock, index: int) -> List[_Entry]:
    attention, forward = f"attention_layers.{index}.", f"forward_layers.{index}._conv1d."

    def convolution(name: str, weight: Tensor) -> _Entry:
        return _Entry(name, (*weight.shape, 1), weight, theirs=lambda array: array[..., 0])

    return [
        _direct(attention + "in_proj_weight", block.attention_in_weight),
        _direct(attention + "in_proj_bias", block.attention_in_bias),
        _direct(attention + "out_proj.weight", block.attention_out_weight),
        _direct(attention + "out_proj.bias", block.attention_out_bias),
        convolution(forward + "0.weight", block.ffn.in_weight),
        _direct(forward + "0.bias", block.ffn.in_bias),
        convolution(forward + "3.weight", block.ffn.out_weight),
        _direct(forward + "3.bias", block.ffn.out_bias),
    ]


_BLOCK_ENTRIES: Dict[Type[SequenceEncoder], Callable[[Any, int], List[_Entry]]] = {
    FuXiEncoder: _fuxi_entries,
    HSTUEncoder: _hstu_entries,
    SASRecEncoder: _sasrec_entries,
}


def load_research_params(encoder: SequenceEncoder, item_table_VD: Tensor, params: Mapping[str, np.ndarray]) -> None:
    """Copies the research code's parameters into an encoder and an item table [V, D] (0-based items).

    Raises:
        UserError: a parameter is missing, unexpected or of the wrong shape; nothing has been copied then.
    """
    entries = _entries(encoder, item_table_VD)
    unexpected = sorted(set(params) - {entry.name for entry in entries})
    if unexpected:
        raise UserError(f"parameter {unexpected[0]}: not one of this model's; check the model's name and sizes")
    for entry in entries:
        if entry.name not in params:
            raise UserError(f"parameter {entry.name}: missing; check the model's name, number of blocks and form")
        shape = tuple(np.shape(params[entry.name]))
        if shape != entry.shape:
            raise UserError(f"parameter {entry.name}: has shape {shape}, the config asks for {entry.shape}")
    for entry in entries:
        entry.write(np.asarray(params[entry.name]))


def export_research_params(
    encoder: SequenceEncoder, item_table_VD: Tensor, base: Optional[Mapping[str, np.ndarray]] = None
) -> Dict[str, np.ndarray]:
    """Returns the research code's parameters (float32) of an encoder and an item table.

    `base` gives the entries that no computation reads (the padding item, Toeplitz weights of the future); zero without.
    """
    entries = _entries(encoder, item_table_VD)
    return {entry.name: entry.read(entry.parameter, base[entry.name] if base else None) for entry in entries}


def export_research_grads(encoder: SequenceEncoder, item_table_VD: Tensor) -> Dict[str, np.ndarray]:
    """Returns the gradients under the research code's names and in its full shapes; zero where there is none."""

    def grad(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    return {entry.name: entry.read(grad(entry.parameter), None) for entry in _entries(encoder, item_table_VD)}


def model_config_from_research(config: JsonObject) -> ModelConfig:
    """Translates the hyperparameters of a golden file's `config` into a ModelConfig.

    Raises:
        UserError: a key is missing or the model unknown.
    """
    for key in _REQUIRED:
        if key not in config:
            raise UserError(f"reference config: key {key!r} is missing")
    if config["model"] not in ENCODERS:
        raise UserError(f"reference config: unknown model {config['model']!r}, choose from {', '.join(ENCODERS)}")
    width = int(config["embedding_dim"])
    return ModelConfig(
        encoder=config["model"],
        embedding_dim=width,
        num_blocks=int(config["num_blocks"]),
        num_heads=int(config["num_heads"]),
        value_dim=int(config.get("value_dim", width)),
        qk_dim=int(config.get("qk_dim", width)),
        ffn_multiply=config.get("ffn_multiply", 1),
        bias_function=config.get("bias_function", "pow"),
        padded_length=int(config["padded_length"]),
    )


Integers = Union[Tensor, np.ndarray, Sequence[int]]


class ResearchModel(nn.Module):
    """Item table and encoder behind the research code's interface: 1-based ids, normalised outputs, no dropout."""

    def __init__(self, config: JsonObject, params: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        model_config = model_config_from_research(config)
        self.temperature = float(config.get("temperature", 0.05))
        self.l2_eps = float(config.get("l2_eps", 1e-6))
        self.encoder = build_encoder(model_config, padded_length=int(config["padded_length"]))
        self.item_table_VD = nn.Parameter(torch.zeros(int(config["num_items"]), model_config.embedding_dim))
        load_research_params(self.encoder, self.item_table_VD, params)
        self.given = {name: np.array(array) for name, array in params.items()}
        self.eval()

    def forward(
        self, item_ids: Integers, timestamps: Integers, next_timestamps: Integers, lengths: Integers
    ) -> Tensor:
        """Encodes a jagged batch; L2-normalised outputs [T, D].

        Args:
            item_ids: [T] 1-based ids of the jagged events, users one after another.
            timestamps, next_timestamps: [T] int64 ticks.
            lengths: [B] events of each user, summing to T.
        """
        ids_T, times_T, next_T, lengths_B = (
            torch.as_tensor(x).to(torch.int64) for x in (item_ids, timestamps, next_timestamps, lengths)
        )
        device = self.item_table_VD.device
        layout = JaggedLayout.from_lengths(lengths_B.tolist(), device)
        if not len(ids_T) == len(times_T) == len(next_T) == layout.num_tokens:
            raise UserError(f"lengths sum to {layout.num_tokens}, but there are {len(ids_T)} item ids")
        x_TD = self._items(ids_T)
        outputs_TD = self.encoder(x_TD, times_T.to(device), next_T.to(device), layout)
        return l2_normalize(outputs_TD, self.l2_eps)

    def loss(self, outputs_TD: Tensor, target_ids: Integers, negative_ids: Integers) -> Tensor:
        """Computes the mean sampled softmax of [T] targets against [T, K] negatives; a negative equal to its target
        is masked."""
        targets_T, negatives_TK = (torch.as_tensor(x).to(torch.int64) for x in (target_ids, negative_ids))
        positives_TD = l2_normalize(self._items(targets_T), self.l2_eps)
        negatives_TKD = l2_normalize(self._items(negatives_TK), self.l2_eps)
        collision_TK = (negatives_TK == targets_T[:, None]).to(outputs_TD.device)
        total = sampled_softmax_reference(outputs_TD, positives_TD, negatives_TKD, collision_TK, self.temperature)
        return total / max(len(targets_T), 1)

    def _items(self, ids: Tensor) -> Tensor:
        lowest, highest = (int(ids.min()), int(ids.max())) if ids.numel() else (1, 1)
        if lowest < 1 or highest > len(self.item_table_VD):
            raise UserError(f"item ids must lie in 1 … {len(self.item_table_VD)}: got {lowest} … {highest}")
        return nn.functional.embedding((ids - 1).to(self.item_table_VD.device), self.item_table_VD)


def encoder_from_research(config: JsonObject, params: Mapping[str, np.ndarray]) -> ResearchModel:
    """Builds the model of a golden file's `config` with its `param/…` arrays (prefix removed), in evaluation mode.

    Raises:
        UserError: naming the config key or the parameter that does not fit.
    """
    return ResearchModel(config, params)


def research_params(model: ResearchModel) -> Dict[str, np.ndarray]:
    """Returns the parameters under the research code's names, entries that nothing reads as they were given."""
    return export_research_params(model.encoder, model.item_table_VD, model.given)


def research_grads(model: ResearchModel) -> Dict[str, np.ndarray]:
    """Returns the gradients after `loss.backward()`, full shapes; zero for the padding item."""
    return export_research_grads(model.encoder, model.item_table_VD)
