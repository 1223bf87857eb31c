"""The model: item table, encoder and loss."""

from fuxi_torchrec.model.recommender import TABLE, SequenceRecommender, build_model

__all__ = ["TABLE", "SequenceRecommender", "build_model"]
