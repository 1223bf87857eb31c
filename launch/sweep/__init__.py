"""Sweeps: many runs of one config, on this machine or on a cluster."""
