"""Data sets on disk, splits, and the batches that are made of them."""
