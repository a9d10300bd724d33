"""Metrics that other packages compute too, on the same features: clean-fid, torchmetrics, torch-fidelity, prdc."""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.inception_score import inception_score
from fewstep.evaluation.kernel import kernel_distance
from fewstep.evaluation.neighbours import manifold_metrics


def optional(name: str) -> ModuleType:
    """A package that may be missing or broken in any way: where it does not import, there is nothing to compare."""
    prepare_torchvision()
    try:
        return importlib.import_module(name)
    except Exception as reason:
        pytest.skip(f"{name} does not import: {reason}")


def features(n: int, seed: int, scale: float = 1.0, shift: float = 0.0, dim: int = 24) -> Tensor:
    """Non-negative, correlated, with a decaying spectrum; float64 that float32 holds exactly."""
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / dim**0.5
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.7
    z = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spectrum
    return ((z @ mixing * 3 * scale + 0.2).relu() + shift).float().double()


REF, GEN = features(600, seed=0), features(500, seed=1, scale=1.2, shift=0.05)
EQUAL = features(600, seed=2, scale=1.2, shift=0.05)


# --- Fréchet distance, to 1e-6


@pytest.mark.filterwarnings("ignore:.*disp:DeprecationWarning")
def test_frechet_against_clean_fid():
    theirs = optional("cleanfid.fid")
    ref, gen = moments(REF), moments(GEN)
    arguments = (each.numpy() for each in (ref.mean, ref.cov, gen.mean, gen.cov))
    try:
        expected = float(theirs.frechet_distance(*arguments))
    except TypeError as reason:  # scipy 1.18 took an argument away
        pytest.skip(f"clean-fid's distance does not run: {reason}")
    assert frechet_distance(ref, gen) == pytest.approx(expected, rel=1e-6)


def test_frechet_against_torchmetrics():
    theirs = optional("torchmetrics.image.fid")

    class Features(torch.nn.Identity):
        num_features = REF.shape[1]

    metric = theirs.FrechetInceptionDistance(feature=Features(), input_img_size=(1, 1, REF.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(REF, real=True)
    metric.update(GEN, real=False)
    assert frechet_distance(moments(REF), moments(GEN)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_against_torch_fidelity():
    theirs = optional("torch_fidelity.metric_fid")
    statistics = [theirs.fid_features_to_statistics(each) for each in (REF, GEN)]
    expected = theirs.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(REF), moments(GEN)) == pytest.approx(float(expected), rel=1e-6)


# --- kernel distance, to 1e-8: subsets as large as the sets make the packages' value the full U-statistic


def test_kernel_against_clean_fid():
    theirs = optional("cleanfid.fid")
    expected = theirs.kernel_distance(REF.numpy(), EQUAL.numpy(), num_subsets=1, max_subset_size=600)
    assert kernel_distance(REF, EQUAL) == pytest.approx(float(expected), abs=1e-8)


def test_kernel_against_torchmetrics():
    theirs = optional("torchmetrics.image.kid")
    assert kernel_distance(REF, EQUAL) == pytest.approx(float(theirs.poly_mmd(REF, EQUAL)), abs=1e-8)


def test_kernel_against_torch_fidelity():
    theirs = optional("torch_fidelity.metric_kid")
    found = theirs.kid_features_to_metric(
        REF, EQUAL, kid_subsets=1, kid_subset_size=600, kid_kernel_poly_degree=3, verbose=False
    )
    expected = found["kernel_inception_distance_mean"]
    assert expected > 1e-3
    assert kernel_distance(REF, EQUAL) == pytest.approx(float(expected), abs=1e-8)


# --- precision, recall, density, coverage: the same rows


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("dim", [4, 24])
def test_manifolds_against_prdc(k, dim):
    """Open balls there, closed ones here: no difference without ties."""
    theirs = optional("prdc")
    ref, gen = features(600, 3, dim=dim), features(500, 4, scale=0.9, shift=0.05, dim=dim)
    expected = theirs.compute_prdc(ref.numpy(), gen.numpy(), nearest_k=k)
    ours = manifold_metrics(ref, gen, k_pr=k, k_dc=k)
    for name, denominator in (("precision", 500), ("recall", 600), ("density", 500 * k), ("coverage", 600)):
        assert round(getattr(ours, name) * denominator) == round(float(expected[name]) * denominator), name
    assert 0.05 < ours.precision < 0.999
    assert 0.05 < ours.recall < 0.999


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_against_torch_fidelity(k):
    theirs = optional("torch_fidelity.metric_prc")
    found = theirs.prc_features_to_metric(
        GEN, REF, prc_neighborhood=k, prc_batch_size=10000, save_cpu_ram=False, verbose=False
    )
    ours = manifold_metrics(REF, GEN, k_pr=k)
    assert round(ours.precision * 500) == round(found["precision"] * 500)
    assert round(ours.recall * 600) == round(found["recall"] * 600)


def test_with_ties_balls_are_closed_as_in_torch_fidelity_and_not_as_in_prdc():
    """Features on a coarse grid are all ties: closed balls hold what lies on their edge, and open ones do not."""
    generator = torch.Generator().manual_seed(5)
    ref = torch.randint(0, 2, (300, 8), generator=generator).double()
    gen = torch.randint(0, 2, (200, 8), generator=generator).double()
    ours = manifold_metrics(ref, gen, k_pr=3, k_dc=3)
    closed = optional("torch_fidelity.metric_prc").calculate_precision_recall_full(gen, ref, neighborhood=3)
    assert (ours.precision, ours.recall) == pytest.approx(closed, abs=1e-6)
    opened = optional("prdc").compute_prdc(ref.numpy(), gen.numpy(), nearest_k=3)
    assert ours.precision > float(opened["precision"]) + 0.2
    assert ours.density > float(opened["density"]) + 0.2


# --- Inception score


@pytest.mark.parametrize(("n", "parts"), [(500, 10), (503, 10), (40, 1)])
def test_inception_score_against_torch_fidelity(n, parts):
    """Its formula on samples in order; its standard deviation has ddof = 0."""
    theirs = optional("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(n, 50, generator=torch.Generator().manual_seed(6))
    found = theirs.isc_features_to_metric(logits, splits=parts, shuffle=False)
    mean, sd = inception_score(logits, parts)
    assert mean == pytest.approx(found["inception_score_mean"], rel=1e-12)
    if parts > 1:
        assert sd * ((parts - 1) / parts) ** 0.5 == pytest.approx(found["inception_score_std"], rel=1e-10)
