"""What a device can do at most: the denominator of MFU."""

from typing import Dict, Optional, Tuple

import torch

from fuxi_torchrec.config import TrainerConfig

PEAK_TFLOPS: Dict[str, Tuple[float, Optional[float]]] = {
    "B200": (75.0, 2250.0),
    "H200 NVL": (60.0, 835.5),
    "H200": (66.9, 989.4),
    "H100 NVL": (60.0, 835.5),
    "H100 PCIe": (51.2, 756.0),
    "H100": (66.9, 989.4),
    "A100": (19.5, 312.0),
    "A10": (31.2, 125.0),
    "L40S": (91.6, 362.0),
    "L4": (30.3, 121.0),
    "V100": (15.7, None),
    "T4": (8.1, None),
}
"""Words of a GPU's name -> (float32 without tensor cores, dense bfloat16 on tensor cores), TFLOP/s, None where it has none.
As NVIDIA's data sheets are remembered, and not all looked up again (2:4 sparsity not counted): where the number matters, set
trainer.peak_tflops. Longer names first: the first one whose words all stand in the device's name counts. float32 products
run without TF32 here, PyTorch's default.
"""


def known_peak(device_name: str, precision: str) -> Optional[float]:
    """Looks up the TFLOP/s of a GPU by its name, as `torch.cuda.get_device_name` returns it; None for one that is not
    in the table."""
    words = set(device_name.replace("-", " ").split())
    for name, (fp32, bf16) in PEAK_TFLOPS.items():
        if set(name.split()) <= words:
            return bf16 if precision == "bf16" else fp32
    return None


def peak_flops(config: TrainerConfig, device: torch.device) -> Optional[float]:
    """Returns the FLOP/s of one device that MFU is taken against: trainer.peak_tflops, or a known GPU's. None: no
    MFU."""
    tflops = config.peak_tflops
    if tflops is None and device.type == "cuda":
        tflops = known_peak(torch.cuda.get_device_name(device), config.precision)
    return None if tflops is None else tflops * 1e12
