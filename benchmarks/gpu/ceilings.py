"""Part: the two ceilings of this device, measured: the bandwidth of a large copy, and the rate of a large product."""

from typing import List

import torch

from benchmarks.gpu.cases import Case, Place, Row, interleaved_seconds, products_in
from fuxi_torchrec.profiling.memory import available
from fuxi_torchrec.profiling.peak_flops import known_peak


def cases(place: Place) -> List[Case]:
    """Lists the copy, and a product in each precision."""
    products = [Case("product fp32", lambda: product(place, torch.float32, "highest"))]
    if place.is_gpu:  # a CPU has no TF32
        products.append(Case("product TF32", lambda: product(place, torch.float32, "high")))
    return [Case("copy", lambda: copy(place)), *products, Case("product bf16", lambda: product(place, torch.bfloat16))]


def copy(place: Place) -> Row:
    """Copies memory to memory: bytes a second, read and written."""
    free = available(place.device)
    size = place.sizes.copied if free is None else min(place.sizes.copied, free // 8)
    x = torch.ones(size, dtype=torch.uint8, device=place.device)
    y = torch.empty_like(x)
    seconds = interleaved_seconds({"copy": lambda: y.copy_(x)}, place)["copy"]
    return {"bytes_per_second": 2 * size / seconds, "rate": f"{2 * size / seconds / 1e9:,.1f} GB/s"}


def product(place: Place, dtype: torch.dtype, precision: str = "highest") -> Row:
    """Multiplies two large square matrices: FLOPs a second."""
    n = place.sizes.product
    a, b = (torch.randn(n, n, device=place.device).to(dtype) for _ in range(2))
    with products_in(precision):
        seconds = interleaved_seconds({"product": lambda: a @ b}, place)["product"]
    rate = 2 * n**3 / seconds
    row: Row = {"flops_per_second": rate, "rate": f"{rate / 1e12:,.2f} TFLOP/s"}
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    sheet = known_peak(torch.cuda.get_device_name(place.device), kind) if place.is_gpu else None
    if sheet is not None and precision == "highest":
        row |= {"sheet_flops_per_second": sheet * 1e12, "of_sheet": f"{rate / sheet / 1e12:.0%} of {sheet:g} TFLOP/s"}
    return row
