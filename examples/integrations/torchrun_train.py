"""A training script for ``torchrun``, with one process for each rank; see ``torchrun_script.py``.

Rank 0 prints the loss as lines of JSON. It runs on the CPU (gloo).
"""

from __future__ import annotations

import argparse
import json
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


parser = argparse.ArgumentParser()
parser.add_argument("--rate", type=float, default=0.1)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(dist.get_rank())
x = torch.randn(64, 8)
y = x.sum(dim=1, keepdim=True)
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=arguments.rate)
loss = torch.zeros(())
for step in range(arguments.steps):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(json.dumps({"step": step, "value": loss.item()}))
if dist.get_rank() == 0:
    print(json.dumps({"value": loss.item(), "ranks": dist.get_world_size()}), flush=True)
dist.barrier()
# Now and then torch aborts as its threads are taken down, and torchrun fails with a rank.
os._exit(0)
