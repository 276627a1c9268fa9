"""What z holds of a grid: a small decoder reads size, colours and cells from frozen z.

    D width of z   n grids   H hidden width

It is no part of the method. It is trained on grids of the training tasks, each as it is and once more turned
and recoloured, and read on unseen tasks: from z of the answer, from z_hat, and beside both the given grid
taken as the answer.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arc_data
from arc_data import PAD, SIDE
from eval import summarise

STEPS, BATCH, HIDDEN, LR = 300, 128, 512, 3e-3
GRIDS = 4000                                   # training grids read at most
METRICS = {"decoded_size": "size", "decoded_colours": "colours", "decoded_cells": "cells"}


class Decoded(NamedTuple):
    """Grids read from embeddings, and how right they are; values are between 0 and 1, one a window."""
    grids: list
    size: np.ndarray           # height and width are right
    colours: np.ndarray        # shared colours over all colours of both grids
    cells: np.ndarray          # cells of the answer whose colour is right; cells outside count as wrong


class Decoder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.size, self.colours = nn.Linear(HIDDEN, 2 * SIDE), nn.Linear(HIDDEN, 10)
        self.cells = nn.Linear(HIDDEN, 10 * SIDE * SIDE)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (n, D) -> logits of height and width (n, 2, 30), colours (n, 10) and cells (n, 10, 30, 30)."""
        x = self.trunk(z)
        cells = self.cells(x).unflatten(1, (10, SIDE, SIDE))
        return self.size(x).unflatten(1, (2, SIDE)), self.colours(x), cells

    @torch.no_grad()
    def read(self, z: Tensor) -> list[np.ndarray]:
        """Grids of embeddings z (n, D): of the likeliest size, and of colours that are likely at all."""
        size, colours, cells = self.eval()(z)
        height, width = (size.argmax(2) + 1).unbind(1)
        present = colours >= torch.minimum(colours.max(1, True).values, torch.zeros(1))        # (n, 10)
        chosen = cells.masked_fill(~present[:, :, None, None], -np.inf).argmax(1)              # (n, 30, 30)
        return [grid[:h, :w].numpy().astype(np.int8) for grid, h, w in zip(chosen, height, width)]


def train_decoder(model, grids: list, seed: int = 0) -> Decoder:
    """A decoder of frozen z, trained on a sample of `grids` and of their turned and recoloured copies."""
    rng = np.random.default_rng(seed)
    chosen = [grids[i] for i in rng.permutation(len(grids))[:GRIDS]]
    changed = [rng.permutation(10).astype(np.int8)[arc_data.turn(grid, rng.integers(8))] for grid in chosen]
    chosen += [np.ascontiguousarray(grid) for grid in changed]
    z = model.embed(chosen).float().cpu()                                                      # (n, D)
    cells = torch.from_numpy(arc_data.pad(chosen)).long()                                      # (n, 30, 30)
    size = torch.tensor([grid.shape for grid in chosen]) - 1                                   # (n, 2)
    present = (cells[:, None] == torch.arange(10)[:, None, None]).flatten(2).any(2).float()    # (n, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(z.shape[1])
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=LR, weight_decay=0.05, fused=True)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
            rows = torch.from_numpy(rng.integers(0, len(z), BATCH))
            sizes, colours, logits = decoder(z[rows])
            loss = F.cross_entropy(sizes.flatten(0, 1), size[rows].flatten())
            loss = loss + F.binary_cross_entropy_with_logits(colours, present[rows])
            loss = loss + F.cross_entropy(logits, cells[rows], ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return decoder.eval()


def compare(found: list, truth: list) -> Decoded:
    """How much of the true grids the found ones hold."""
    size, colours, cells = [], [], []
    for grid, answer in zip(found, truth):
        height, width = np.minimum(grid.shape, answer.shape)
        right = (grid[:height, :width] == answer[:height, :width]).sum()
        a, b = set(grid.ravel().tolist()), set(answer.ravel().tolist())
        size.append(grid.shape == answer.shape)
        colours.append(len(a & b) / len(a | b))
        cells.append(right / answer.size)
    return Decoded(found, *(np.array(values, dtype=float) for values in (size, colours, cells)))


def decode(model, training_grids: list, windows, z: Tensor, z_hat: Tensor) -> dict[str, Decoded]:
    """What the decoder reads from z_hat and from z of the answers; and the given grid as the answer."""
    decoder = train_decoder(model, training_grids)
    given, answer = ([windows.grids[i] for i in windows.index[:, side]] for side in (2, 3))
    of_output = dict(zip(windows.outputs, decoder.read(z[windows.outputs])))
    found = {"model": decoder.read(z_hat), "z of the answer": [of_output[i] for i in windows.index[:, 3]],
             "copy of in2": given}
    return {name: compare(grids, answer) for name, grids in found.items()}


def decoded_metrics(decoded: dict[str, Decoded], task: np.ndarray) -> dict[str, dict]:
    """Entries of eval.json; "z of the answer" bounds what any prediction can reach."""
    rows = {name: {metric: (getattr(found, field), task) for metric, field in METRICS.items()}
            for name, found in decoded.items()}
    return {metric: summarise(rows, metric) for metric in METRICS}
