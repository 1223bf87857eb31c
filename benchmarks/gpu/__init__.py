"""What a GPU makes of this project: one command, `python -m benchmarks.gpu` (docs/gpu.md)."""
