"""What is particular to Kubernetes: TorchX's scheduler with its answers told, its restarts counted and its names checked."""
