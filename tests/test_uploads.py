"""Constants on a device: uploaded once, and never those of a context that holds no numbers."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fewstep.networks.foreign.edm_parts import filter_of
from fewstep.uploads import numbers, on_device

CPU = torch.device("cpu")


def made(count: int) -> torch.Tensor:
    return torch.arange(count)


def test_the_same_tensor_at_every_call() -> None:
    assert on_device(made, (3,), CPU) is on_device(made, (3,), CPU)
    assert torch.equal(on_device(made, (4,), CPU), torch.arange(4))
    assert torch.equal(numbers((0.25, 0.5), CPU, torch.float64), torch.tensor([0.25, 0.5], dtype=torch.float64))


def test_contexts_leave_nothing_behind() -> None:
    """What was first asked for on the meta device, among fake tensors or in inference serves training afterwards."""
    with torch.device("meta"):
        assert on_device(made, (5,), CPU).tolist() == [0, 1, 2, 3, 4]
    with FakeTensorMode():
        assert isinstance(on_device(made, (6,), CPU), FakeTensor)
        assert isinstance(on_device(made, (5,), CPU), FakeTensor)
    assert on_device(made, (6,), CPU).tolist() == [0, 1, 2, 3, 4, 5]
    with torch.inference_mode():
        kept = numbers((1.0, 7.0), CPU)
    weight = torch.ones(2, requires_grad=True)
    (weight * numbers((1.0, 7.0), CPU)).sum().backward()
    assert torch.equal(weight.grad, kept)  # type: ignore[arg-type]


def test_a_filter_is_made_where_its_module_is() -> None:
    with torch.device("meta"):
        assert filter_of((1, 3, 3, 1)).device.type == "meta"
    assert torch.equal(filter_of((1, 3, 3, 1)), filter_of((1.0, 3.0, 3.0, 1.0), CPU))
