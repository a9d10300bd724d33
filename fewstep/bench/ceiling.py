"""What the machine at hand can do at most: large products, and copies of memory."""

import functools
import os

import torch

from fewstep.bench.accelerators import ACCELERATORS, Accelerator
from fewstep.bench.measure import device_name, spread, timed

REPEATS = 7


def measured_accelerator(device: torch.device) -> Accelerator:
    """The device as an accelerator: medians of square products in every type, and of a copy. A GPU's link is that of
    the data sheet of its kind, where there is one."""
    gpu = device.type == "cuda"
    name = device_name(device)
    known = next((each for each in ACCELERATORS.values() if each.name in name.lower().replace(" ", "")), None)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else _host_memory()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        fp32 = product_tflops(torch.float32, device)
        torch.set_float32_matmul_precision("high")
        tf32 = product_tflops(torch.float32, device) if gpu else fp32
    finally:
        torch.set_float32_matmul_precision(before)
    return Accelerator(
        name=name,
        memory_gib=memory / 2**30,
        bf16=product_tflops(torch.bfloat16, device),
        tf32=tf32,
        fp32=fp32,
        bandwidth=copy_gb_per_s(device),
        link=None if known is None else known.link,
    )


def product_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a square product: of 8192 rows on a GPU, of 1024 on a CPU."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    work = functools.partial(torch.matmul, a, b)
    timed(work, device)
    return 2e-12 * side**3 / (1e-3 * spread([timed(work, device).wall for _ in range(REPEATS)]).median)


def copy_gb_per_s(device: torch.device) -> float:
    """GB/s read and written by a copy too large for any cache."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    work = functools.partial(target.copy_, source)
    timed(work, device)
    return 1e-9 * 2 * source.nbytes / (1e-3 * spread([timed(work, device).wall for _ in range(REPEATS)]).median)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
