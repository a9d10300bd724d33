"""What metrics cost, in turns with the packages that compute them too, on one thread and on the same features.

    python benchmarks/metrics_cost.py [frechet] [neighbours] [kernel] --pairs 5 --ledger benchmarks/ledger/NAME.jsonl

- frechet: the Fréchet distance of two sets of moments, the reference's factor kept, against clean-fid's.
- neighbours: precision, recall, density and coverage (k = 5 throughout), no radii kept, against prdc.
- kernel: the kernel distance over all pairs against clean-fid's default (100 random subsets of 1,000).

Processor seconds of the whole process, medians [quartiles] over pairs taken in turns, so that a busy machine slows both
alike; and the peak memory of one call beyond what was there before it, each in a process of its own. Features are
synthetic: non-negative and correlated with a decaying spectrum, as Inception's are. One JSON row per metric.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.environment import describe_environment
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.kernel import kernel_distance
from fewstep.evaluation.neighbours import manifold_metrics

Values = dict[str, float]
K = 5


def features(n: int, dim: int, seed: int) -> Tensor:
    spectrum = torch.arange(1, dim + 1) ** -0.7
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)) * (spectrum[:, None] * 3 / dim**0.5)
    return (torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) @ mixing + 0.02).relu()


def frechet(ref: Tensor, gen: Tensor) -> tuple[Callable[[], Values], Callable[[], Values]]:
    from cleanfid.fid import frechet_distance as theirs

    a, b = moments(ref), moments(gen)
    arrays = [each.numpy() for each in (a.mean, a.cov, b.mean, b.cov)]
    assert a.factor.shape  # computed here, as it is once for all rows of a sweep
    return lambda: {"fd": frechet_distance(a, b)}, lambda: {"fd": float(theirs(*arrays))}


def neighbours(ref: Tensor, gen: Tensor) -> tuple[Callable[[], Values], Callable[[], Values]]:
    from prdc import compute_prdc

    arrays = ref.numpy(), gen.numpy()

    def theirs() -> Values:
        with contextlib.redirect_stdout(io.StringIO()):
            return {name: float(value) for name, value in compute_prdc(*arrays, nearest_k=K).items()}

    return lambda: vars(manifold_metrics(ref, gen, k_pr=K, k_dc=K)), theirs


def kernel(ref: Tensor, gen: Tensor) -> tuple[Callable[[], Values], Callable[[], Values]]:
    from cleanfid.fid import kernel_distance as theirs

    arrays = ref.numpy(), gen.numpy()
    return lambda: {"kd": kernel_distance(ref, gen)}, lambda: {"kd": float(theirs(*arrays))}


METRICS: dict[str, Callable[[Tensor, Tensor], tuple[Callable[[], Values], Callable[[], Values]]]] = {
    "frechet": frechet,
    "neighbours": neighbours,
    "kernel": kernel,
}
PEERS = {"frechet": "clean-fid", "neighbours": "prdc", "kernel": "clean-fid"}


def measure(metric: str, files: tuple[Path, Path], pairs: int) -> dict[str, Any]:
    ref, gen = (torch.from_numpy(np.load(path)) for path in files)
    calls = METRICS[metric](ref, gen)
    spent: tuple[list[float], list[float]] = ([], [])
    values: list[Values] = [{}, {}]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            began = time.process_time()
            values[which] = calls[which]()
            spent[which].append(time.process_time() - began)
    return {
        "date": datetime.date.today().isoformat(),
        "bench": "metrics",
        "metric": metric,
        "peer": PEERS[metric],
        "n": len(ref),
        "dim": ref.shape[1],
        "pairs": pairs,
        "cpu_s": quartiles(spent[0]),
        "peer_cpu_s": quartiles(spent[1]),
        "times_faster": quartiles([theirs / ours for ours, theirs in zip(*spent, strict=True)]),
        "values": values[0],
        "peer_values": values[1],
        "peak_mib": peak_mib(metric, files, 0),
        "peer_peak_mib": peak_mib(metric, files, 1),
        "peers": {name: version(name) for name in ("clean-fid", "prdc", "scipy", "scikit-learn")},
        "environment": describe_environment(),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def peak_mib(metric: str, files: tuple[Path, Path], which: int) -> float:
    """Of one call in a process that holds the features (and the moments) and nothing else."""
    command = [sys.executable, __file__, "--child", metric, str(which), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def child(metric: str, which: int, files: Iterable[Path]) -> None:
    ref, gen = (torch.from_numpy(np.load(path)) for path in files)
    METRICS[metric](ref[:80, :16].contiguous(), gen[:80, :16].contiguous())[which]()  # what the first call loads
    call = METRICS[metric](ref, gen)[which]
    before = peak = anonymous_kib()
    done = threading.Event()

    def watch() -> None:  # without the pages of libraries, which the kernel takes and gives as it likes
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_kib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    print((peak - before) / 1024)


def anonymous_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", choices=[*METRICS, []], metavar="METRIC")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepare_torchvision()
    if given.child:
        metric, which, *files = given.child
        child(metric, int(which), map(Path, files))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder) / "ref.npy", Path(folder) / "gen.npy")
        for seed, path in enumerate(files, start=1):
            np.save(path, features(given.n, given.dim, seed).numpy())
        for metric in given.metrics or METRICS:
            row = measure(metric, files, given.pairs)
            if given.ledger:
                with given.ledger.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            ratio, ours, theirs = (row[name] for name in ("times_faster", "cpu_s", "peer_cpu_s"))
            print(
                f"{metric}, {given.n} x {given.dim}: {ours['median']:.2f} cpu s, {row['peer']} {theirs['median']:.2f}, "
                f"{ratio['median']:.1f} times faster [{ratio['low']:.1f}, {ratio['high']:.1f}]; "
                f"peak {row['peak_mib']:.0f} MiB, {row['peer_peak_mib']:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(name) != "1":
            os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, *sys.argv])  # read as the libraries load, which they have
    main()
