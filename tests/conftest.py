"""One torch thread per test process: the fits are small, and pytest runs two processes."""

import torch

torch.set_num_threads(1)
