"""`dist_dml.train` with a fault: gradients become nan in given steps, from 1, whenever they come.

    python train_with_fault.py STEP,STEP,... ARGUMENTS

As a batch that no numeric range holds would do it; everything else is the program as it is.
"""

from __future__ import annotations

import sys

import torch

from dist_dml import train
from dist_dml.engine import TorchEngine
from dist_dml.engine_deepspeed import DeepSpeedEngine

# A launcher puts its own word first.
WORDS = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
STEPS = {int(text) for text in WORDS[0].split(",")}
genuine_step, genuine_backward = train.train_step, TorchEngine.backward
genuine_deepspeed = DeepSpeedEngine.backward
current = 0


def step(batch, *arguments):
    global current
    current = batch.step + 1
    return genuine_step(batch, *arguments)


def backward(self, loss):
    genuine_backward(self, loss)
    if current in STEPS:
        parameter = dict(self.embedder.named_parameters())["backbone.layers.8.weight"]
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = torch.nan


def backward_of_deepspeed(self, loss):
    # Its gradients are sent away while they are made.
    genuine_deepspeed(self, loss * torch.nan if current in STEPS else loss)


train.train_step = step
DeepSpeedEngine.backward = backward_of_deepspeed
TorchEngine.backward = backward
sys.exit(train.main(WORDS[1:]))
