"""The recommender: an item table looked up by TorchRec, an encoder that mixes a user's events, and the loss.

Shape suffixes: T positions, E events, B users, D embedding, U candidates.
"""

from typing import Dict

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from fuxi_torchrec.config import Config, LossConfig
from fuxi_torchrec.data.batch import EVENTS, NEGATIVES, SequenceBatch
from fuxi_torchrec.data.negative_sampler import Negatives, PerTokenNegatives
from fuxi_torchrec.encoders import build_encoder
from fuxi_torchrec.model.candidates import HistoryMask, shared_candidates
from fuxi_torchrec.model.table_init import init_rows
from fuxi_torchrec.ops.jagged import JaggedLayout
from fuxi_torchrec.ops.row_wise.dispatch import l2_normalize
from fuxi_torchrec.ops.sampled_softmax.dispatch import per_token_sampled_softmax, shared_sampled_softmax
from fuxi_torchrec.profiling.stages import stage

TABLE = "item"


class SequenceRecommender(nn.Module):
    """The item table and the encoder with its loss. `forward` is all that TorchRec has to trace; what lies below it
    is free in its control flow."""

    def __init__(self, embeddings: nn.Module, tower: nn.Module):
        super().__init__()
        self.embeddings = embeddings
        self.tower = tower  # the name of its parameters in every checkpoint

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Computes the summed loss (float32 scalar) of a batch with negatives, or each user's query vector [B, D] of
        one without: the L2-normalised output at the last input, whose next timestamp is the time of the target or
        request."""
        with stage("lookup and exchange"):
            embeddings = self.embeddings(batch.ids)
        return self.tower(embeddings, batch)


class EncoderWithLoss(nn.Module):
    """Encoder and loss on looked-up embeddings.

    Args:
        encoder: jagged item embeddings, timestamps, next timestamps and layout to jagged outputs.
        config: temperature, normalisation and kinds of negatives.
        precision: "fp32", or "bf16" for autocast inside the encoder; normalisation and loss stay float32.
    """

    def __init__(self, encoder: nn.Module, config: LossConfig, precision: str = "fp32"):
        super().__init__()
        self.encoder, self.config, self.precision = encoder, config, precision

    def forward(self, embeddings: Dict[str, JaggedTensor], batch: SequenceBatch) -> Tensor:
        """Computes the summed loss (float32 scalar), or the query vectors [B, D] of a batch without negatives.
        embeddings: looked-up rows of events [E, D] and negatives [U, D]."""
        with stage("lookup and exchange"):  # a sharded table's vectors are waited for here
            events_ED, negatives_UD = embeddings[EVENTS].values(), embeddings[NEGATIVES].values()
        with stage("encoder forward"):
            outputs_TD = self.encode(events_ED, batch)
        if batch.negatives is None:
            return outputs_TD[batch.offsets_B1[1:] - 1]
        with stage("loss"):
            return self._loss(outputs_TD, events_ED, negatives_UD, batch, batch.negatives)

    def _loss(
        self, outputs_TD: Tensor, events_ED: Tensor, negatives_UD: Tensor, batch: SequenceBatch, negatives: Negatives
    ) -> Tensor:
        """The summed sampled softmax of all positions."""
        positives_TD = l2_normalize(events_ED.index_select(0, batch.input_index_T + 1), self.config.l2_eps)
        candidates_UD = l2_normalize(negatives_UD, self.config.l2_eps)
        config, temperature = self.config, self.config.temperature
        if isinstance(negatives, PerTokenNegatives):
            bias_U = None if negatives.expected_draws_U is None else -negatives.expected_draws_U.log()
            rows = (negatives.index_TK, negatives.positive_index_T)
            return per_token_sampled_softmax(
                outputs_TD, positives_TD, candidates_UD, *rows, temperature, bias_U, config.chunk_logits
            )
        item_ids_E = batch.ids[EVENTS].values()
        shown = shared_candidates(candidates_UD, positives_TD, batch, negatives, config.cross_rank)
        mask = HistoryMask(item_ids_E, batch.host_lengths, shown.ids_P) if config.mask_history else None
        positive_ids_T = item_ids_E[batch.input_index_T + 1]
        pool = (shown.embeddings_PD, shown.ids_P)
        return shared_sampled_softmax(
            outputs_TD, positives_TD, *pool, positive_ids_T, temperature, shown.bias_P, mask, config.chunk_logits
        )

    def encode(self, events_ED: Tensor, batch: SequenceBatch) -> Tensor:
        """Encodes the batch's input positions: L2-normalised float32 outputs [T, D]. events_ED: looked-up item
        embeddings."""
        inputs_T, targets_T = batch.input_index_T, batch.input_index_T + 1
        layout = JaggedLayout(
            batch.offsets_B1, max(batch.host_lengths), batch.num_tokens, host_lengths=batch.host_lengths
        )
        with torch.autocast(events_ED.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs_TD = self.encoder(
                events_ED.index_select(0, inputs_T), batch.timestamps_E[inputs_T], batch.timestamps_E[targets_T], layout
            )
        return l2_normalize(outputs_TD, self.config.l2_eps)


def build_model(
    config: Config, num_items: int, time_unit: float, device: torch.device, on_meta: bool = False
) -> SequenceRecommender:
    """Builds the model of a run, unsharded, on `device`. Initial values depend on trainer.seed (the table's) and on
    torch's seed (the encoder's) alone.

    Args:
        num_items: V, rows of the item table.
        time_unit: seconds per tick of the data set's timestamps.
        on_meta: leave the table without storage, for a rank that will hold a part of it or none.
    """
    # The encoder first: a table that is made at once draws from torch's generator, one on the meta device doesn't.
    encoder = build_encoder(config.model, padded_length=config.padded_length, time_unit=time_unit).to(device)
    encoder.activation_checkpointing = config.trainer.activation_checkpointing
    width, seed = config.model.embedding_dim, config.trainer.seed
    table = EmbeddingConfig(
        name=TABLE,
        embedding_dim=width,
        num_embeddings=num_items,
        feature_names=[EVENTS, NEGATIVES],
        # A part of a table doesn't know where it begins: sharding/model_parallel.py fills it.
        init_fn=_leave if on_meta else lambda weight: init_rows(weight, seed, width),
    )
    embeddings = EmbeddingCollection(tables=[table], device=torch.device("meta") if on_meta else device)
    return SequenceRecommender(embeddings, EncoderWithLoss(encoder, config.loss, config.trainer.precision))


def _leave(weight: Tensor) -> Tensor:
    return weight
