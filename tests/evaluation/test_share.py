"""Several processes and any batch size find the rows of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import SERVER

from fewstep.data.dataset import Dataset
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.results import row_json
from fewstep.evaluation.share import Share
from fewstep.evaluation.sweep import Candidate, draw, sweep
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.sampling import MapSampler, OdeSampler
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.network import NetworkField, freeze

CPU = torch.device("cpu")
N = 333  # divides by none of the batch sizes, and by 2 processes not either
BATCHES = (7, 64, 500)
CLOCKS = ("latency_ms", "latency_p95_ms", "images_per_s", "batch", "samples_png")


def models() -> tuple[Dataset, list[Candidate]]:
    torch.manual_seed(0)
    index = torch.arange(400)
    x = Key(1).normal("data", index, (1, 8, 8)).clamp(-1, 1)
    data = Dataset("noise", x, index % 10, 10, kind="image")
    config = MLPConfig(width=64, depth=2)
    teacher = build_network(config, data.shape, 10, two_times=False)
    student = build_network(config, data.shape, 10, two_times=True)
    for net in (teacher, student):
        for weight in net.parameters():  # what begins at zero says nothing
            torch.nn.init.normal_(weight, std=0.1)
    return data, [
        Candidate("t", "teacher", "x", OdeSampler(NetworkField(freeze(teacher))), (4,), 1.0, "t", 0),
        Candidate(
            "s", "student", "x", MapSampler({0: AverageVelocityMap(freeze(student))}, "jumps"), (1, 2), 1.0, "", 0
        ),
    ]


def measured(share: Share) -> dict[int, list[dict[str, Any]]]:
    data, candidates = models()
    found = {}
    for batch_size in BATCHES:
        config = EvaluateConfig(n=N, batch_size=batch_size, features=("pixels", "digits"))
        extractors = [build_extractor(name) for name in config.features]
        rows, _ = sweep(candidates, data, extractors, config, seed=2, device=CPU, share=share)
        found[batch_size] = [{k: v for k, v in row_json(row).items() if k not in CLOCKS} for row in rows]
    return found


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=store)
    share = Share(rank, world)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured(share)))
    torch.distributed.destroy_process_group()


def together(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each of so many processes found."""
    folder.mkdir()
    processes = [SERVER.Process(target=process, args=(rank, world, str(folder))) for rank in range(world)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=100)
        assert each.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def numbers(document: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(document, dict):
        return {k: v for key, item in document.items() for k, v in numbers(item, f"{prefix}.{key}").items()}
    if isinstance(document, list):
        return {k: v for i, item in enumerate(document) for k, v in numbers(item, f"{prefix}.{i}").items()}
    return {prefix: float(document)} if isinstance(document, int | float) else {}


@pytest.mark.slow
def test_processes_and_batch_sizes_change_no_row(tmp_path: Path) -> None:
    """Identical at any one batch size; one size rounds otherwise than another, and no more than that."""
    alone = json.loads(json.dumps(measured(Share())))
    for world in (2, 3):
        every = together(world, tmp_path / str(world))
        assert all(found == every[0] for found in every)  # all processes get all rows
        for batch_size in BATCHES:
            assert every[0][str(batch_size)] == alone[str(batch_size)], (world, batch_size)
            ours, theirs = numbers(every[0][str(batch_size)]), numbers(alone["64"])
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (world, batch_size, name)


def test_samples_do_not_depend_on_batch_size_or_share() -> None:
    data, (_, student) = models()

    def of(share: Share, batch_size: int, tile: int) -> torch.Tensor:
        settings = {"n": N, "batch_size": batch_size, "seed": 2, "device": CPU, "share": share, "tile": tile}
        return draw(student.sampler, 2, data, **settings).x  # type: ignore[arg-type]

    whole = of(Share(), 64, 64)
    assert whole.shape == (N, 1, 8, 8)
    for batch_size in BATCHES:
        torch.testing.assert_close(of(Share(), batch_size, min(64, batch_size)), whole, rtol=1e-5, atol=1e-5)
    for world in (2, 3):
        for rank in range(world):
            assert torch.equal(of(Share(rank, world), 64, 64), whole[rank::world])


@pytest.mark.parametrize(("n", "world"), [(1, 1), (7, 2), (7, 3), (2, 3), (9, 3)])
def test_every_index_belongs_to_one_process(n: int, world: int) -> None:
    held = [Share(rank, world).own(n, tile=4) for rank in range(world)]
    assert sorted(int(i) for index, count in held for i in index[:count]) == list(range(n))
    assert all(len(index) % 4 == 0 and len(index) > 0 for index, _ in held)
    assert all((index[count:] >= n).all() for index, count in held)
