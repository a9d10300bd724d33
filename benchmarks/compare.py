"""The small set of benchmarks at two commits, in turns: does the second one cost more?

    python benchmarks/compare.py HEAD~10 HEAD --rounds 5 [train objectives ...] [--max-ratio 1.05]

Each commit is checked out beside the other and measured by the Python that runs this, once a round and the other one
first in every second round. Compared are the figures of `benchmarks/speed.py`, pair by pair: what fewstep costs beside
its baseline of the same process, which other work on the machine hardly moves. Printed are the medians of the second
commit's figure over the first one's [quartiles]. Exit 4 if a figure is worse by more than --max-ratio with its better
quartile too: a regression, and not the machine.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from speed import SET, Figure, figures, rows_of, run

Ratios = dict[tuple[str, str], list[float]]


def checked_out(commit: str, folder: Path) -> Path:
    """The tree of a commit, without a branch."""
    subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(folder), commit], check=True)
    return folder


def costs(path: Path) -> dict[tuple[str, str], float]:
    """What each figure costs: less is better, whichever way it is told."""
    found: list[Figure] = [each for row in rows_of(path) for each in figures(row)] if path.exists() else []
    return {
        (each.name, each.beside): 1 / each.median if each.times == "faster" else each.median
        for each in found
        if each.ours
    }


def measure(trees: Sequence[Path], names: Sequence[str], rounds: int, folder: Path) -> Ratios:
    """Costs of the second tree over those of the first, by figure; of figures that both have."""
    ratios: Ratios = defaultdict(list)
    for round_ in range(rounds):
        outs = [folder / f"{round_}-{place}.jsonl" for place in range(2)]
        for place in (0, 1) if round_ % 2 == 0 else (1, 0):
            for failed in run(names, outs[place], tree=trees[place]):
                print(f"commit {place + 1}: {failed}", file=sys.stderr)
        first, second = map(costs, outs)
        for key in first.keys() & second.keys():
            ratios[key].append(second[key] / first[key])
    return ratios


def regressions(ratios: Mapping[tuple[str, str], Sequence[float]], bound: float) -> list[str]:
    """Print the table; the figures that are worse."""
    worse = []
    print("| fewstep | beside | second / first [quartiles] |\n|:--|:--|--:|")
    for (name, beside), found in sorted(ratios.items()):
        low, middle, high = (
            statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else (*found, *found, *found)
        )
        print(f"| {name} | {beside} | {middle:.3f} [{low:.3f}, {high:.3f}] |")
        if low > bound:
            worse.append(f"{name} beside {beside}: {middle:.3f} [{low:.3f}, {high:.3f}], above {bound:g}")
    return worse


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("names", nargs="*", metavar="BENCH", help=f"of the set (default: all): {', '.join(SET)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-ratio", type=float, default=1.05)
    given = parser.parse_args(arguments)
    if odd := [name for name in given.names if name not in SET]:
        parser.error(f"no benchmark '{odd[0]}' in the set: {', '.join(SET)}")
    with tempfile.TemporaryDirectory() as name:
        folder, trees = Path(name), []
        try:
            for place, commit in enumerate(given.commits):
                trees.append(checked_out(commit, folder / f"tree-{place}"))
            ratios = measure(trees, given.names or list(SET), given.rounds, folder)
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
    if not ratios:
        raise SystemExit("the two commits have no figure in common")
    if worse := regressions(ratios, given.max_ratio):
        print("\n".join(worse), file=sys.stderr)
        raise SystemExit(4)


if __name__ == "__main__":
    main()
