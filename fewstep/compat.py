"""One repair that must run before anything imports torchvision, clean-fid, torchmetrics or a diffusers model.

A package index may pair CPU-only torch with a torchvision built for CUDA. Its binary then does not load, and
``import torchvision`` dies with "operator torchvision::nms does not exist", because torchvision attaches fake kernels
to two operators that only the binary declares. Declaring their schemas is enough: everything imports, and the two
operators, which no metric calls, stay without a kernel.
"""

import sys
from functools import cache
from importlib import machinery, util

import torch


def prepare_torchvision() -> str:
    """Make ``import torchvision`` work on CPU-only torch. Cheap, safe to call often; says in a few words what it did.

    Call it before every import of torchvision or of a package that imports torchvision, and never import one of those
    at module level.
    """
    return _prepare()[0]


@cache  # also keeps the library alive: a collected Library takes its operators with it
def _prepare() -> tuple[str, torch.library.Library | None]:
    if "torchvision" in sys.modules:
        return "torchvision already imported, nothing to do", None
    if torch.version.cuda is not None:  # the real operators exist and would clash with ours
        return "CUDA build of torch, nothing to do", None
    spec = util.find_spec("torchvision")  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        return "torchvision not installed", None
    # Load first, declare second. A binary that fits this torch (a CPU build) declares the same schemas when it loads,
    # and a duplicate declaration inside dlopen aborts the process. Loading it twice is harmless.
    finder = machinery.FileFinder(
        spec.submodule_search_locations[0], (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES)
    )
    binary = finder.find_spec("_C")
    if binary is not None and binary.origin is not None:
        try:
            torch.ops.load_library(binary.origin)
            return "torchvision's own operators loaded", None
        except OSError:
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return "torchvision's operators do not load here; nms and qnms declared without kernels", library
