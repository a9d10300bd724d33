"""GPUs as their vendors' data sheets describe them: what a plan on paper counts with. Imports no torch."""

from dataclasses import dataclass, replace

from fewstep.errors import UsageError, nearest


@dataclass(frozen=True)
class Accelerator:
    """One GPU of a node. ``memory_gib`` is what it has; ``bf16``, ``tf32`` and ``fp32`` are peaks of dense products in
    TFLOP/s (a multiply-add is two operations), ``bandwidth`` that of its memory and ``link`` what it sends to the
    others of its node, both in GB/s (10^9 bytes; ``link`` in one direction, None: not known)."""

    name: str
    memory_gib: float
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float | None

    def peak(self, dtype: str, *, tf32: bool) -> float:
        """FLOP/s of products in a type by torch's name; what is neither float32 nor of 16 bits counts as float32."""
        if dtype in ("bfloat16", "float16"):
            return 1e12 * self.bf16
        return 1e12 * (self.tf32 if tf32 else self.fp32)


ACCELERATORS: dict[str, Accelerator] = {
    # NVIDIA's data sheets quote the peaks of sparse products: these are half of those, their dense ones.
    "h100": Accelerator("h100", 80, 989, 495, 67, 3350, 450),
    "h200": Accelerator("h200", 141, 989, 495, 67, 4800, 450),
    "b200": Accelerator("b200", 180, 2250, 1125, 75, 8000, 900),
    "a100": Accelerator("a100", 80, 312, 156, 19.5, 2039, 300),
    "a100-40gb": Accelerator("a100-40gb", 40, 312, 156, 19.5, 1555, 300),
    "l40s": Accelerator("l40s", 48, 362, 183, 91.6, 864, 32),
    "l4": Accelerator("l4", 24, 121, 60, 30.3, 300, 32),
    "rtx4090": Accelerator("rtx4090", 24, 165, 82.6, 82.6, 1008, 32),
    "mi300x": Accelerator("mi300x", 192, 1307, 654, 163, 5300, 448),
}
"""The vendors' data sheets: NVIDIA H100 (SXM5), H200 (SXM), DGX B200, A100 (SXM4), L40S, L4, the Ada GPU architecture
paper (RTX 4090, float32 accumulation), AMD Instinct MI300X. Links are NVLink, Infinity Fabric or PCIe 4.0 x16; the
sheets count both directions, here it is one."""


def accelerator(name: str, *, peak_tflops: float | None = None, link: float | None = None) -> Accelerator:
    """A GPU of the table; ``peak_tflops`` replaces all of its peaks, ``link`` its link. An unknown name is a
    ``UsageError``."""
    if name not in ACCELERATORS:
        raise UsageError(f"--gpu: no data sheet of '{name}'; {nearest(name, ACCELERATORS)}")
    return overridden(ACCELERATORS[name], peak_tflops=peak_tflops, link=link)


def overridden(gpu: Accelerator, *, peak_tflops: float | None, link: float | None) -> Accelerator:
    """The same with what is given in the place of its own."""
    if peak_tflops is not None:
        gpu = replace(gpu, bf16=peak_tflops, tf32=peak_tflops, fp32=peak_tflops)
    return gpu if link is None else replace(gpu, link=link)
