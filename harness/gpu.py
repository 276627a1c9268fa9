"""What a run does on a GPU alone: Muon in fewer operations, and batches drawn ahead.

The library's Muon takes one matrix after the other: 1198 operations a step for `base`. With all matrices of
one shape together there are 360, with the same bits on a CPU. There it gains nothing, so it is not used.
"""
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from arc_data import TaskSet


class BatchedMuon(torch.optim.Muon):
    """Muon as lejepa.make_optimizers sets it: Nesterov momentum, steps scaled to AdamW's RMS, one group."""

    @torch.no_grad()
    def step(self, closure=None):
        group, = self.param_groups
        same_shape = defaultdict(list)
        for p in (p for p in group["params"] if p.grad is not None):
            same_shape[p.shape].append(p)
        for shape, params in same_shape.items():
            grads, momentum = [p.grad for p in params], [self.buffer(p) for p in params]
            torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
            update = torch.stack(torch._foreach_lerp(grads, momentum, group["momentum"]))      # (n, r, c)
            update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            step = 0.2 * max(shape) ** 0.5 * group["lr"]
            torch._foreach_add_(params, list(update.float().unbind()), alpha=-step)

    def buffer(self, p: Tensor) -> Tensor:
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return self.state[p]["momentum_buffer"]


def orthogonalise(x: Tensor, coefficients: tuple, steps: int, eps: float) -> Tensor:
    """Newton-Schulz in bf16, which brings all singular values of each matrix of x (n, r, c) near 1."""
    a, b, c = coefficients
    is_tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if is_tall else x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class DrawAhead:
    """TaskSet.draw with the next step's batch drawn in a thread, while the device works on this one."""

    def __init__(self, draw):
        self.draw, self.pool, self.ahead = draw, ThreadPoolExecutor(1), {}

    def __call__(self, size: int, seed: int, step: int) -> tuple:
        drawn = self.ahead.pop((size, seed, step), None) or self.pool.submit(self.draw, size, seed, step)
        self.ahead = {(size, seed, step + 1): self.pool.submit(self.draw, size, seed, step + 1)}
        return drawn.result()


def prepare(optimizers: list, data: TaskSet, device: str):
    """Changes optimizers and data in place if the device is a GPU."""
    if device == "cuda":
        data.draw = DrawAhead(data.draw)
        for optimizer in optimizers:
            if type(optimizer) is torch.optim.Muon:
                optimizer.__class__ = BatchedMuon
