"""Timing training steps by stage, encoder and length, on random data."""
