"""``fewstep ARGUMENTS`` as one of several processes, of which the second alone fails at its third step."""

import os

from fewstep.cli import main
from fewstep.data.dataset import Batch
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import LossOutput
from fewstep.keys import Key

forward = FlowMatching.forward


def failing(self: FlowMatching, batch: Batch, key: Key) -> LossOutput:
    if key.step == 2 and os.environ["RANK"] == "1":
        raise MemoryError("cannot allocate memory for this rank")
    return forward(self, batch, key)


if __name__ == "__main__":
    FlowMatching.forward = failing
    main()
