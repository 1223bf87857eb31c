"""What a step costs: time by stage, FLOPs, memory, traces."""
