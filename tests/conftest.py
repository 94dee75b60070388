"""One thread a process: tests share cores with the servers they start, and bits depend on how many threads run."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
