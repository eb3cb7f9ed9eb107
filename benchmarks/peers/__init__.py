"""Penstock and its peers on one machine, by turns: `python -m benchmarks.peers`."""
