"""Extractors on an accelerator: the same features as on the CPU, up to rounding, in true float32."""

import pytest
import torch

from fewstep.evaluation.features import build_extractor, extract, fitted
from fewstep.evaluation.inception_features import PREPROCESSINGS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]


@pytest.mark.parametrize("name", ["pixels", "digits", "random_conv", "pca"])
def test_the_same_features_as_on_the_cpu(name: str) -> None:
    images = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = [build_extractor(name, device) for device in ("cpu", "cuda")]
    cpu, gpu = (fitted(each, extract(each, images)) for each in made)
    assert cpu.digest == gpu.digest
    found = extract(gpu, images.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), extract(cpu, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("size", [32, 400])
def test_the_same_input_of_inception(name: str, size: int) -> None:
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = PREPROCESSINGS[name]
    torch.testing.assert_close(prepared(images.cuda()).cpu(), prepared(images), rtol=0, atol=1e-4)
