"""Raw data to the Parquet sequence format (fuxi_torchrec/data/format.py): MovieLens, event logs, synthetic data.

Runs once, offline, and without torch. The entry points are `movielens.prepare_movielens`, `events.prepare_events`,
`synthetic.prepare_synthetic` and, for the command line, `cli`.
"""
