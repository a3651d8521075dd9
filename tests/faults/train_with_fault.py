"""`dist_dml.train` with a fault: gradients become nan in given steps, from 1, whenever they come.

    python train_with_fault.py STEP,STEP,... ARGUMENTS

As a batch that no numeric range holds would do it; everything else is the program as it is.
"""

from __future__ import annotations

import sys

import torch

from dist_dml import train
from dist_dml.engine import TorchEngine

STEPS = {int(text) for text in sys.argv[1].split(",")}
genuine_step, genuine_backward = train.train_step, TorchEngine.backward
current = 0


def step(batch, *arguments):
    global current
    current = batch.step + 1
    return genuine_step(batch, *arguments)


def backward(self, loss):
    genuine_backward(self, loss)
    if current in STEPS:
        parameter = dict(self.embedder.named_parameters())["backbone.stages.1.conv.weight"]
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = torch.nan


train.train_step = step
TorchEngine.backward = backward
sys.exit(train.main(sys.argv[2:]))
