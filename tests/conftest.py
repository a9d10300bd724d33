"""Settings of the whole suite."""

import torch

# The tensors are small: a second thread costs more than it gives, several times more on a busy machine.
torch.set_num_threads(1)
