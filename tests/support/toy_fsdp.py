"""A small backbone and head with everything that sharding may trip over."""

import torch
from torch import nn


class ToyBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x):
        return x + self.gamma * torch.tanh(self.linear(x))


class ToyBackbone(nn.Module):
    """Tiny parameters, an integer one, a scalar one, buffers, a dict output with a scalar, a second entry point."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(ToyBlock(dim) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.ones(1))
        self.grid = nn.Parameter(torch.arange(4), requires_grad=False)
        self.fixed = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def shard_units(self):
        return list(self.blocks)

    def features(self, x):
        x = self.embed(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.norm(x) + self.centre

    def forward(self, x):
        features = self.features(x)
        return {"features": features, "penalty": features.square().mean() * 0.01}


class ToyHead(nn.Module):
    def __init__(self, dim=6, out=5):
        super().__init__()
        self.mlp = nn.Linear(dim, dim)
        self.last_layer = nn.Linear(dim, out, bias=False)

    def forward(self, x):
        return self.last_layer(torch.tanh(self.mlp(x)))


def make_toy(seed=0):
    """Backbone and head with the same values wherever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleDict({"backbone": ToyBackbone(), "head": ToyHead()})
