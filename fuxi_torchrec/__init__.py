"""fuxi_torchrec: FuXi-β generative recommenders on sharded embedding tables."""

__version__ = "0.1.0"
