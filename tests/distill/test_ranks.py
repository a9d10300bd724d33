"""Two gloo processes against one, under DDP and under FSDP2: the same gradients, losses and checkpoints.

The processes run ``ranks.py`` once for the whole file.
"""

import functools

import pytest
import ranks
import tiny
import torch
from forked import together
from safetensors.torch import load_file
from torch import Tensor

from fewstep.distill.train import make_accelerator

pytestmark = pytest.mark.slow
PARALLEL = pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What two processes found."""
    file = tmp_path_factory.mktemp("ranks") / "found.safetensors"
    together(2, ranks.main, file)
    found = load_file(file)
    assert int(found["world"]) == 2
    return found


def of(found: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    tensors = {name.removeprefix(f"{task}: "): value for name, value in found.items() if name.startswith(f"{task}: ")}
    assert tensors
    if ranks.MISSING in tensors:
        assert "fsdp2" in task
        pytest.skip(ranks.MISSING)
    return tensors


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


@functools.cache
def gradients_of_one(name: str) -> dict[str, Tensor]:
    return ranks.gradients(ranks.OBJECTIVES[name](), ranks.settings(), make_accelerator())


@functools.cache
def trained_by_one(name: str) -> dict[str, Tensor]:
    return ranks.trained(ranks.OBJECTIVES[name](), ranks.settings(), make_accelerator())


@PARALLEL
@pytest.mark.parametrize("name", ranks.OBJECTIVES)
def test_gradients_are_those_of_one_process(name: str, parallel: str, two: dict[str, Tensor]) -> None:
    """To 1e-6 relative to the whole gradient; of the network's Jacobian-vector product for MeanFlow. Measured: below
    2e-7."""
    one = gradients_of_one(name)
    found = of(two, f"gradients {name} {parallel}")
    assert found.keys() == one.keys()
    assert len(one) > 10
    difference = (flat(found) - flat(one)).norm() / flat(one).norm()
    assert float(difference) < 1e-6


@PARALLEL
@pytest.mark.parametrize("name", ranks.OBJECTIVES)
def test_steps_are_those_of_one_process(name: str, parallel: str, two: dict[str, Tensor]) -> None:
    """Losses to 1e-5; weights, averages, moments and target networks as near as Adam leaves them."""
    one = dict(trained_by_one(name))
    found = of(two, f"trained {name} {parallel}")
    assert found.keys() == one.keys()
    losses, wanted = found.pop("losses"), one.pop("losses")
    assert len(losses) == ranks.STEPS
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    for key, value in one.items():
        assert found[key].shape == value.shape, key
    assert float((flat(found) - flat(one)).norm() / flat(one).norm()) < 1e-5


def test_every_process_holds_its_share(two: dict[str, Tensor]) -> None:
    """A little over one half: a dimension that does not divide in two gives the first process more."""
    shares = of(two, "shares")
    assert int(shares.pop("unwanted")) == 0
    assert set(shares) == {"student", "target", "average"}
    for name, share in shares.items():
        assert 0.5 <= float(share) < 0.53, name


def test_a_sharded_run_resumes_to_the_same_bits(two: dict[str, Tensor]) -> None:
    whole = of(two, "trained consistency fsdp2")
    whole.pop("losses")
    again = of(two, "resumed consistency fsdp2")
    assert again.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


@PARALLEL
def test_accumulated_gradients_on_two_processes(parallel: str, two: dict[str, Tensor]) -> None:
    """Eight microbatches of four are one batch of 32."""
    one = ranks.trained(tiny.meanflow(), ranks.settings(), make_accelerator(), 3)
    found = of(two, f"accumulated meanflow {parallel}")
    torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-5, atol=0)
    assert float((flat(found) - flat(one)).norm() / flat(one).norm()) < 1e-5


@PARALLEL
def test_what_all_processes_see_is_what_one_sees(parallel: str, two: dict[str, Tensor]) -> None:
    """The curvature's sums, over eight steps in eight microbatches of a group each: counts are equal, being whole
    numbers before they decay; squares, weights and everything else to the order of summation."""
    one = ranks.trained(ranks.teaching(), ranks.settings(), make_accelerator(), 8)
    found = of(two, f"accumulated teaching {parallel}")
    assert {"objective.square", "objective.count"} < set(found)
    assert float(found["objective.count"].sum()) == pytest.approx(16 * (1 - 0.99**8), rel=1e-9)
    torch.testing.assert_close(found["objective.count"], one["objective.count"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["objective.square"], one["objective.square"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["losses"], one["losses"], rtol=1e-5, atol=0)
    assert float((flat(found) - flat(one)).norm() / flat(one).norm()) < 1e-5


def test_gradients_of_a_bare_network_are_caught(two: dict[str, Tensor]) -> None:
    """Wrapping the network instead of the objective trains every process by itself: noticed before the first step."""
    assert int(of(two, "unsynchronised")["caught_after"]) == 0


def test_a_sample_of_another_process_is_named(two: dict[str, Tensor]) -> None:
    """All processes stop before the same step, and the first tells of the row that only the second has seen."""
    for task, seen in (("non-finite", 1), ("deferred non-finite", 2)):
        found = of(two, task)
        assert int(found["caught_after"]) == seen
        assert bool(found["named"])


def test_steps_looked_at_later_are_the_same_on_two_processes(two: dict[str, Tensor]) -> None:
    now, later = of(two, "trained meanflow ddp"), of(two, "deferred meanflow ddp")
    assert now.keys() == later.keys()
    for name, value in now.items():
        assert torch.equal(later[name], value), name


def test_all_processes_stop_after_the_same_step(two: dict[str, Tensor]) -> None:
    """The third, at which the second process was asked, or the one after it; here is what the first one saw."""
    assert of(two, "asked")["stops"].tolist() == [False, False, True, False, False]
    assert of(two, "deferred asked")["stops"].tolist() == [False, False, False, True, False]
