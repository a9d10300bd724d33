"""Where benchmarks make the objectives that they measure: from configs, as training makes them."""

import contextlib
import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.bench.measure import Precision
from fewstep.bench.textbook import Textbook
from fewstep.bench.variants import REFERENCE, TEXTBOOK, Variant, variants
from fewstep.checkpoint import RunDirectory
from fewstep.config import TRAINS, RunConfig, check_config
from fewstep.data.dataset import BatchSource, Dataset
from fewstep.data.prepare import write_shards
from fewstep.data.stream import stream_of
from fewstep.distill.flow_maps.config import MeanFlowConfig
from fewstep.distill.objective import Objective
from fewstep.distill.run import check_training, run_training
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.networks.config import SIZES


class Workshop:
    """Random data and a teacher of one step in a folder, and the objectives that train on them."""

    def __init__(
        self,
        folder: Path,
        size: str,
        shape: tuple[int, ...],
        classes: int,
        batch_size: int,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        self._folder, self._size, self._batch_size, self._device = folder, size, batch_size, device
        self._precision = precision
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (2 * batch_size, *shape), dtype=torch.uint8, generator=generator)
        label = torch.arange(len(images)) % classes if classes else None
        data = Dataset("bench", images, label, classes, kind="image")
        write_shards(stream_of(data, "bench"), folder / "data", "bench", shard_size=len(images))
        teacher = RunDirectory(folder / "teacher")
        for _ in run_training(self.config(variants()[REFERENCE]), teacher, resume=False, overwrite=False):
            pass

    def config(self, variant: Variant) -> RunConfig:
        """A checked config of one step, with the teacher unless the objective takes none."""
        whole = {"nodes": math.gcd(16, self._batch_size)} if variant.kind == "trajectory" else {}
        tree: dict[str, Any] = {
            "name": variant.name,
            "data": {"kind": "shards", "path": str(self._folder / "data")},
            "objective": {"kind": variant.kind, **whole, **variant.settings},
            "train": {"steps": 1, "batch_size": self._batch_size, "warmup_steps": 0, "precision": self._precision},
        }
        kind = TRAINS[variant.kind]
        alone = {**tree, "student": {"kind": kind, "init": "scratch", "network": SIZES[self._size].model_dump()}}
        if variant.kind == REFERENCE:
            return check_config(alone, variant.name)
        taught = {
            **tree,
            "teacher": {"kind": "run", "path": str(self._folder / "teacher")},
            "student": {"kind": kind, "init": "teacher"},
        }
        try:
            return check_config(taught, variant.name)
        except UsageError:
            with contextlib.suppress(UsageError):
                return check_config(alone, variant.name)
            raise

    def objective(self, variant: Variant, dtype: torch.dtype = torch.float32) -> Objective:
        """That of the first stage, with a student all of whose weights count: those that start at zero are drawn."""
        config = self.config(variant)
        run = RunDirectory(self._folder / "run")  # nothing is written there
        request = check_training(config, run, self._device, processes=1, resume=False, overwrite=False)
        student = copy.deepcopy(request.student)
        generator = torch.Generator().manual_seed(0)
        for parameter in student.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02, generator=generator)
        student.to(dtype)
        if variant.name == TEXTBOOK:
            assert isinstance(config.objective, MeanFlowConfig)
            return Textbook(student, config.objective)
        return request.stages[0].build(student, None)

    def source(self, *, pairs: bool = False) -> BatchSource:
        """Batches of the data; as ``pairs`` they come with noise of their own."""
        config = self.config(variants()[REFERENCE])
        run = RunDirectory(self._folder / "run")
        request = check_training(config, run, self._device, processes=1, resume=False, overwrite=False)
        data = request.data
        if pairs:
            data = replace(data, noise=Key(0).normal("pairs", torch.arange(len(data.x)), data.shape))
        return BatchSource(data, self._batch_size, 0, device=self._device)
