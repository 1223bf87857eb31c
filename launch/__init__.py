"""Running on clusters: TorchX components (components.py), sweeps, and the scaling-law fit. Uses the library; the library
never imports it."""
