"""One thread: the suite's models are tiny, and threads that wait for each other cost ten times the work they share."""

import torch

torch.set_num_threads(1)
