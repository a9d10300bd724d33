"""What other packages compute too, each as it offers it, on the same features: with what has to agree before times do.

A package that is missing or does not import is left out with its reason. Shapes: N reference rows, M generated rows, D
features, n images of H by W pixels.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.bench.measure import torch_threads
from fewstep.compat import prepare_torchvision
from fewstep.evaluation.extractor import as_colour
from fewstep.evaluation.features import extract
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.inception import SIZE, InceptionNetwork, inception_network
from fewstep.evaluation.inception_features import PREPROCESSINGS, Inception, resize_pytorch
from fewstep.evaluation.kernel import kernel_distance
from fewstep.evaluation.neighbours import manifold_metrics

Values = Mapping[str, float]
Computes = Callable[[], Values]

K = 5
SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance: what all three packages draw unless told otherwise."""


@dataclass(frozen=True)
class Contest:
    """A metric as fewstep computes it and as a package does.

    ``agree`` gives the values of both that have to be equal to ``tolerance``, relative or below 1 absolute, before
    times are compared: where it is None, of the very calls that are timed. ``said`` is what the package does otherwise.
    """

    own: Computes
    peer: Computes
    tolerance: float
    agree: Callable[[], tuple[Values, Values]] | None = None
    said: str = ""


def differ(own: Values, peer: Values) -> float:
    """The largest difference of what both name: relative, and absolute where the peer's value is below 1."""
    common = own.keys() & peer.keys()
    if not common:
        raise ValueError(f"nothing to compare: {', '.join(own)} and {', '.join(peer)}")
    return max(abs(own[name] - peer[name]) / max(1.0, abs(peer[name])) for name in common)


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@contextlib.contextmanager
def threads_of_all(count: int) -> Iterator[None]:
    """``count`` threads of torch inside and, where threadpoolctl is there to tell them, of numpy's and scipy's BLAS."""
    with torch_threads(count), contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(torch.get_num_threads()))
        yield


class Features(nn.Module):
    """Features as torchmetrics takes them: a module that says how many there are. Without a function they are fed as
    they are."""

    def __init__(self, count: int, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.num_features = count
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        return images if self._function is None else self._function(images)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed or warned of by others."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# The Fréchet distance of two sets of moments, the reference's factor kept as over the rows of a sweep -----------------


def _own_frechet(ref_ND: Tensor, gen_MD: Tensor) -> Computes:
    a, b = moments(ref_ND), moments(gen_MD)
    assert a.factor.shape  # computed here, as it is once for all rows of a sweep
    return lambda: {"fd": frechet_distance(a, b)}


def frechet_clean_fid(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from cleanfid.fid import frechet_distance as theirs

    arrays = [part.cpu().numpy() for each in (moments(ref_ND), moments(gen_MD)) for part in (each.mean, each.cov)]
    return Contest(_own_frechet(ref_ND, gen_MD), lambda: {"fd": float(theirs(*arrays))}, 1e-6)


def frechet_torch_fidelity(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    found = [moments(each) for each in (ref_ND, gen_MD)]
    statistics = [{"mu": each.mean.cpu().numpy(), "sigma": each.cov.cpu().numpy()} for each in found]

    def theirs() -> Values:
        return {"fd": float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])}

    return Contest(_own_frechet(ref_ND, gen_MD), theirs, 1e-6)


def frechet_torchmetrics(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance

    dim = ref_ND.shape[1]
    metric = FrechetInceptionDistance(feature=Features(dim), input_img_size=(1, 1, dim), compute_with_cache=False)
    metric.set_dtype(torch.float64).to(ref_ND.device)
    for features, real in ((ref_ND, True), (gen_MD, False)):
        for batch in features.split(1000):
            metric.update(batch, real=real)
    return Contest(_own_frechet(ref_ND, gen_MD), lambda: {"fd": float(metric.compute())}, 1e-5)


# Precision, recall, density and coverage, no radii kept ---------------------------------------------------------------


def _own_neighbours(ref_ND: Tensor, gen_MD: Tensor) -> Computes:
    return lambda: vars(manifold_metrics(ref_ND, gen_MD, k_pr=K, k_dc=K))


def neighbours_prdc(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    from prdc import compute_prdc

    arrays = ref_ND.cpu().numpy(), gen_MD.cpu().numpy()

    def theirs() -> Values:
        with quiet():
            return {name: float(value) for name, value in compute_prdc(*arrays, nearest_k=K).items()}

    return Contest(_own_neighbours(ref_ND, gen_MD), theirs, 1e-3, said="on 8 threads of its own")


def neighbours_torch_fidelity(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from torch_fidelity.metric_prc import prc_features_to_metric

    def theirs() -> Values:
        found = prc_features_to_metric(
            gen_MD, ref_ND, prc_neighborhood=K, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
        )
        return {name: float(found[name]) for name in ("precision", "recall")}

    own = _own_neighbours(ref_ND, gen_MD)
    return Contest(own, theirs, 1e-3, said="has no density and no coverage")


# The kernel distance --------------------------------------------------------------------------------------------------

_SAID = f"a mean over {SUBSETS} random subsets of {SUBSET}, ours over all pairs"


def _kernels(
    ref_ND: Tensor, gen_MD: Tensor, subsets: Computes, one_set: Callable[[Tensor, Tensor], float], tolerance: float
) -> Contest:
    """The package's default against all pairs. What has to agree is one subset, of the first rows of both."""
    size = min(SUBSET, len(ref_ND), len(gen_MD))
    few = ref_ND[:size], gen_MD[:size]
    return Contest(
        lambda: {"kd": kernel_distance(ref_ND, gen_MD)},
        subsets,
        tolerance,
        lambda: ({"kd": kernel_distance(*few)}, {"kd": one_set(*few)}),
        _SAID,
    )


def kernel_clean_fid(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from cleanfid.fid import kernel_distance as theirs

    arrays = ref_ND.cpu().numpy(), gen_MD.cpu().numpy()
    return _kernels(
        ref_ND,
        gen_MD,
        lambda: {"kd": float(theirs(*arrays, num_subsets=SUBSETS, max_subset_size=SUBSET))},
        lambda a, b: float(theirs(a.cpu().numpy(), b.cpu().numpy(), num_subsets=1, max_subset_size=len(a))),
        1e-5,
    )


def kernel_torch_fidelity(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from torch_fidelity.metric_kid import kid_features_to_metric

    def theirs(a: Tensor, b: Tensor, subsets: int, size: int) -> float:
        settings = {"kid_subsets": subsets, "kid_subset_size": size, "kid_kernel_poly_degree": 3, "verbose": False}
        return float(kid_features_to_metric(a, b, **settings)["kernel_inception_distance_mean"])

    size = min(SUBSET, len(ref_ND), len(gen_MD))
    return _kernels(
        ref_ND,
        gen_MD,
        lambda: {"kd": theirs(ref_ND, gen_MD, SUBSETS, size)},
        lambda a, b: theirs(a, b, 1, len(a)),
        1e-5,
    )


def kernel_torchmetrics(ref_ND: Tensor, gen_MD: Tensor) -> Contest:
    prepare_torchvision()
    from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

    size = min(SUBSET, len(ref_ND), len(gen_MD))
    with quiet():  # it warns that it keeps the features
        metric = KernelInceptionDistance(
            feature=Features(ref_ND.shape[1]), subsets=SUBSETS, subset_size=size, compute_with_cache=False
        ).to(ref_ND.device)
    metric.update(ref_ND, real=True)
    metric.update(gen_MD, real=False)
    return _kernels(
        ref_ND,
        gen_MD,
        lambda: {"kd": float(metric.compute()[0])},
        lambda a, b: float(poly_mmd(a, b)),
        1e-4,  # float32
    )


# Inception's features of the same images, with the same random weights ------------------------------------------------


def random_inception(seed: int = 1) -> dict[str, Tensor]:
    """A state dict under which activations neither vanish nor explode: the arithmetic is that of any other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = InceptionNetwork().state_dict()
    made = {}
    for name, like in shapes.items():
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
        elif like.ndim >= 2:
            made[name] = torch.randn(like.shape, generator=generator) * (2 / like[0].numel()) ** 0.5
        else:
            made[name] = torch.full(like.shape, float(name.endswith(("running_var", "bn.weight"))))
    return made


def _inceptions(
    images: Tensor, network: Callable[[str], Callable[[Tensor], Tensor]], preprocessing: str, said: str = ""
) -> Contest:
    """``network`` makes the package's extractor from a file of weights."""
    state = random_inception()
    made = PREPROCESSINGS[preprocessing]
    own = Inception(images.device, inception_network(state).to(images.device), made, preprocessing, "", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(state, path)
        peer = network(str(path))
    colour = as_colour(images, preprocessing)

    @torch.no_grad()
    def theirs() -> Tensor:
        return torch.cat([peer(batch) for batch in colour.split(64)])

    def summed(features: Tensor) -> Values:
        return {"mean": float(features.mean()), "root mean square": float(features.square().mean().sqrt())}

    def ours() -> Tensor:
        return extract(own, images, 64)

    def agree() -> tuple[Values, Values]:
        return {"difference": float((ours() - theirs()).abs().max())}, {"difference": 0.0}

    return Contest(lambda: summed(ours()), lambda: summed(theirs()), 1e-4, agree, said)


def inception_torch_fidelity(images: Tensor, _: Tensor) -> Contest:
    prepare_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def network(path: str) -> Callable[[Tensor], Tensor]:
        made = FeatureExtractorInceptionV3("bench", ["2048"], feature_extractor_weights_path=path).to(images.device)
        return lambda batch: made(batch)[0]

    return _inceptions(images, network, "inception_tensorflow")


def inception_torchmetrics(images: Tensor, _: Tensor) -> Contest:
    prepare_torchvision()
    from torchmetrics.image.fid import NoTrainInceptionV3

    def network(path: str) -> Callable[[Tensor], Tensor]:
        made = NoTrainInceptionV3("bench", ["2048"], feature_extractor_weights_path=path, antialias=False)
        return made.to(images.device)

    return _inceptions(images, network, "inception_tensorflow", "with antialias=False, its resize of the protocol")


def inception_clean_fid(images: Tensor, _: Tensor) -> Contest:
    """Its ``legacy_pytorch`` network, whose loader is given the weights that it would download."""
    prepare_torchvision()
    from cleanfid import inception_pytorch

    def network(path: str) -> Callable[[Tensor], Tensor]:
        downloads = inception_pytorch.load_state_dict_from_url
        inception_pytorch.load_state_dict_from_url = lambda *_, **__: torch.load(path, weights_only=True)
        try:
            with quiet():
                made = inception_pytorch.InceptionV3([3], resize_input=False).eval().to(images.device)
        finally:
            inception_pytorch.load_state_dict_from_url = downloads
        return lambda batch: made(resize_pytorch(batch, SIZE) / 255)[0].flatten(1)

    return _inceptions(images, network, "inception_pytorch", "its legacy_pytorch network behind our resize")


CONTESTS: Mapping[str, Mapping[str, Callable[[Tensor, Tensor], Contest]]] = {
    "frechet": {
        "clean-fid": frechet_clean_fid,
        "torch-fidelity": frechet_torch_fidelity,
        "torchmetrics": frechet_torchmetrics,
    },
    "neighbours": {"prdc": neighbours_prdc, "torch-fidelity": neighbours_torch_fidelity},
    "kernel": {
        "clean-fid": kernel_clean_fid,
        "torch-fidelity": kernel_torch_fidelity,
        "torchmetrics": kernel_torchmetrics,
    },
    "inception": {
        "clean-fid": inception_clean_fid,
        "torch-fidelity": inception_torch_fidelity,
        "torchmetrics": inception_torchmetrics,
    },
}
"""By metric and package. Makers take the features of both sides, those of ``inception`` images uint8."""
