"""Write ``tests/golden/*.txt`` anew: ``python tests/distill/rewrite_golden.py [OBJECTIVE ...]``.

For a change of numerics that is meant; the commit that makes it says what changed and why.
"""

import sys

import tiny
import torch
from test_golden import FOLDER, as_text, losses

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or tiny.OBJECTIVES:
        (FOLDER / f"{name}.txt").write_text(as_text(losses(name)))
        print(f"wrote {FOLDER / name}.txt")
