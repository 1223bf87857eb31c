"""Chains: prepare, train and evaluate by one command, on this machine or as a cluster's jobs, taken up where they ended."""
