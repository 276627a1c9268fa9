"""LeJEPA for ARC: a world model of grids with discrete codes, in one file.

Each object of a grid is quantised to a few codes; a grid is the set of its symbols (codes, box), which a transformer embeds
as z, on the sphere of radius sqrt(D). From the embeddings of (in1, out1, in2) a predictor says z of out2. Both are trained at
once, by gradients into both:

    loss = (1 - lam) * mean |z_hat - z|^2 / D  +  lam * (SIGReg(z) + SIGReg(y)) / 2

SIGReg tests a batch against N(0, I). SIGReg(z), the mean over the roles input and output, at one frequency, spreads embeddings over
their sphere, so that nothing collapses. SIGReg(y), on the published grid of frequencies, makes the numbers behind the codes Gaussian,
so that their quantiles, the codes, are equally likely. There is no teacher, stop-gradient, queue, schedule of weights or codebook.
After a short warm-up the learning rate stays; what is evaluated is the mean of the weights over the last steps, which no loss sees.

    B windows in a batch   G grids   U distinct objects   R rows of L token slots   W width   D embedding width
    V views   N samples of a view   M directions   T frequencies: 16, for the grid's first one adds nothing, or 1

    python lejepa.py                              the default run: trains, evaluates on unseen tasks, leaves runs/<name>/
    python lejepa.py --run runs/NAME --resume     with the same flags: goes on with a run that was interrupted; with more --steps, also with a finished one
    python lejepa.py --profile                    the training step under the profiler

The default run takes about five minutes on two CPU cores. Among the outputs of 400 unseen tasks, the context's own left out, it
finds the right one with nDCG@10 0.79; the best row without learning has 0.776.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import record_function

import arc_data
import eval as evaluation
import report
from arc_data import BYTES, SIDE, Batch, Grids, TaskSet, TokenTable, make_windows

# ------------------------------------------------------------------------------------------------------------ 1 Config


class Size(NamedTuple):
    """What grows with the machine; the method is the same in all."""
    width: int
    heads: int
    encoder_layers: int
    predictor_layers: int
    pooled: int            # width of a token when it is pooled
    hidden: int            # of projector and predictor head
    dim: int               # D
    directions: int        # M
    steps: int
    batch_size: int
    lr: float


SIZES = {"small": Size(128, 4, 2, 2, 512, 512, 256, 1024, 1000, 384, 3e-3),
         "base": Size(384, 6, 6, 4, 1536, 2048, 512, 1024, 1000, 1536, 2e-3),
         "large": Size(768, 12, 12, 6, 3072, 4096, 1024, 1024, 600, 3072, 1e-3)}


@dataclass(frozen=True)
class Config:
    data: str = "arcagi2:training"     # SOURCE of training tasks: arcagi1:training, arcagi1:evaluation, arcagi2:training, arcagi2:evaluation, a folder of ID.json files or a JSON file {id: task}; several joined by commas
    validate: str = None               # SOURCE of validation tasks, or dev: the training tasks whose sha1(id) mod 5 is 0 (default: arcagi1:evaluation; dev when --data is a path)
    run: str = None                    # folder of the run's record (default: runs/<time>-<size>-<objective>)
    size: str = None                   # small, base or large (default: base on a GPU, small without one)
    steps: int = None                  # training steps (default: the size's own)
    batch_size: int = None             # windows a step; three pairs of a task give six (default: the size's own)
    lr: float = None                   # learning rate after a short warm-up (default: the size's own)
    weight_decay: float = 0.5          # decoupled weight decay of matrices
    lam: float = 0.35                  # weight of SIGReg; 1 - lam is the weight of the prediction
    seed: int = 0                      # of weights, batches and directions
    device: str = "auto"               # auto, cpu or cuda
    dtype: str = "bf16"                # bf16 (autocast, fp32 weights) or fp32
    compile: bool = None               # torch.compile the model's forward and backward (default: on a GPU only)
    resume: bool = False               # continue the run in --run
    profile: bool = False              # trace the training step into <run>/profile/ and stop
    stop_on_alert: bool = False        # end the run, its checkpoint kept, with exit status 3 when an alert of eval.py trips
    code: str = "gaussian"             # gaussian; for comparison: ema (the VQ-VAE codebook), none
    objective: str = "lejepa"          # lejepa; for comparison: infonce


CHOICES = {"size": ("small", "base", "large"), "device": ("auto", "cpu", "cuda"), "dtype": ("bf16", "fp32"),
           "code": ("gaussian", "ema", "none"), "objective": ("lejepa", "infonce")}
LIMITS = {"steps": (1, None), "batch_size": (2, None), "lr": (0, None), "weight_decay": (0, None), "lam": (0, 1), "seed": (0, 2**31 - 1)}
FREE_TO_CHANGE = ("run", "resume", "steps", "stop_on_alert")       # flags that a resumed run may give anew


def parse_flags(argv: list[str] | None = None) -> Config:
    """Config from the command line. A field's comment is its help text; what is not given falls to the size's default."""
    helps = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = evaluation.Parser(prog="lejepa.py", description="Train LeJEPA with discrete codes on ARC and evaluate it on unseen tasks.", allow_abbrev=False)
    for field in dataclasses.fields(Config):
        flag, text = "--" + field.name.replace("_", "-"), helps[field.name]
        if field.type is bool:
            action = argparse.BooleanOptionalAction if field.name == "compile" else "store_true"
            parser.add_argument(flag, action=action, default=field.default, help=text)
        else:
            shown = "" if field.default is None else f" (default: {field.default})"
            parser.add_argument(flag, type=field.type, default=field.default, choices=CHOICES.get(field.name), help=text + shown,
                                metavar=None if field.name in CHOICES else field.type.__name__.upper())
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not (low <= value < math.inf and (high is None or value <= high)):    # also refuses nan
            parser.error(f"--{name.replace('_', '-')} {value}: needs {'at least ' + str(low) if high is None else f'{low} to {high}'}")
    if args.resume and args.run is None:
        parser.error("--resume needs --run FOLDER, the run to continue")
    if args.resume and args.profile:
        parser.error("--profile would be ignored: with --resume the run goes on; profile in a folder of its own")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if args.code == "none" and args.objective == "infonce" and args.lam != Config.lam:
        parser.error(f"--lam {args.lam} would do nothing: neither --code none nor --objective infonce has a second term")
    if args.code == "ema" and args.lam == 0:
        parser.error("--lam 0: the commitment of --code ema is scaled by lam; give a small one instead")
    return settle(args)


def settle(args) -> Config:
    """What `auto` and the defaults of the size stand for on this machine."""
    values = dict(vars(args))
    values["device"] = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    values["size"] = args.size or ("base" if values["device"] == "cuda" else "small")
    for name in ("steps", "batch_size", "lr"):
        if values[name] is None:
            values[name] = getattr(SIZES[values["size"]], name)
    if values["compile"] is None:
        values["compile"] = values["device"] == "cuda"
    if values["run"] is None:
        values["run"] = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{values['size']}-{values['objective']}"
    return Config(**values)


# --------------------------------------------------------------------------------------------------------- 2 Objective

KNOTS = 17                                             # t_k = k dt on [0, 3]: the published grid
DT = 3 / (KNOTS - 1)
FREQUENCY = 2.0                                        # at which z is tested: 3 costs half of its rank, less parts too little (`sigreg`)
SIGREG_NULL = 1.05246                                  # what SIGReg is on average for samples of N(0, I)


def frequencies(like: Tensor, frequency: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """t_k (T,), the characteristic function phi_k of N(0, 1) there, and the weights: of the published grid, or of one frequency.

    Both have the same mean under N(0, I). The grid's t_0 is left out: it adds nothing, for cos 0 = phi_0 = 1.
    """
    count, t_1 = (KNOTS - 1, DT) if frequency is None else (1, frequency)
    t = torch.arange(1, count + 1, dtype=like.dtype, device=like.device) * t_1
    phi = torch.exp(-t.square() / 2)
    if frequency is not None:
        return t, phi, SIGREG_NULL / (1 - phi.square())
    weight = 2 * DT * phi
    weight[-1] /= 2                                    # the trapezoid rule
    return t, phi, weight


BLOCK = 1 << 18                                        # projections that stay in a CPU's cache while up to 30 passes go over them


def blocks(*tensors: Tensor):
    """The same rows of each tensor, some at a time; a GPU wants large kernels."""
    return [tensors] if tensors[0].is_cuda else zip(*(x.split(max(1, BLOCK // tensors[0].shape[1])) for x in tensors))


def multiples(x: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """cos(t_k x) and sin(t_k x) of each k, for a compiler: in steps of four, so each is so few operations from x that all fuse."""
    cos, sin = [torch.ones_like(x), torch.cos(t[0] * x)], [torch.zeros_like(x), torch.sin(t[0] * x)]
    for k in range(2, min(5, len(t) + 1)):
        cos.append(cos[k - 1] * cos[1] - sin[k - 1] * sin[1])
        sin.append(sin[k - 1] * cos[1] + cos[k - 1] * sin[1])
    for k in range(5, len(t) + 1):                     # f(k) = 2 cos(t_4 x) f(k - 4) - f(k - 8)
        cos.append(2 * cos[4] * cos[k - 4] - cos[abs(k - 8)])
        sin.append(2 * cos[4] * sin[k - 4] - (sin[k - 8] if k >= 8 else -sin[8 - k]))
    return cos[1:], sin[1:]


def wave(x: Tensor, t: Tensor) -> Tensor:
    """exp(i t_1 x): its powers are cos(t_k x) + i sin(t_k x)."""
    return torch.complex(torch.cos(t[0] * x), torch.sin(t[0] * x))


class EppsPulley(torch.autograd.Function):
    """N * sum_k w_k [(mean cos t_k x - phi_k)^2 + (mean sin t_k x)^2] of samples x (V M, N) -> (V M,), for knots t_k = k t_1.

    The knots are equally spaced, so all cosines and sines follow from one of each by angle addition, and so does the gradient,
    2 sum_k w_k t_k [S_k cos t_k x - (C_k - phi_k) sin t_k x] with C and S the two means: O(N M) memory instead of O(T N M).
    Eagerly that is a product of complex numbers in place; compilers know no complex numbers, and fuse `multiples` into one pass.
    """

    @staticmethod
    def forward(ctx, x, t, phi, weight):
        if torch.compiler.is_compiling():
            means = torch.stack([torch.stack([f.mean(1) for f in fs], 1) for fs in multiples(x, t)], 2)
        else:
            means = []
            for (rows,) in blocks(x):
                step = wave(rows, t)
                power, found = step.clone(), [step.mean(1)]
                for _ in range(1, len(t)):
                    found.append(power.mul_(step).mean(1))
                means.append(torch.stack(found, 1))
            means = torch.view_as_real(torch.cat(means))
        error = means - torch.stack([phi, torch.zeros_like(phi)], 1)                                # (V M, T, 2): C - phi, S
        ctx.save_for_backward(x, t, (weight * t)[:, None] * error)     # the cosine's error is the sine's factor, and the other way round
        return x.shape[1] * (weight[:, None] * error.square()).sum((1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, t, factors = ctx.saved_tensors
        of_sin, of_cos = factors.unbind(2)
        if torch.compiler.is_compiling():
            dx = sum(of_cos[:, k, None] * cos - of_sin[:, k, None] * sin for k, (cos, sin) in enumerate(zip(*multiples(x, t))))
            return 2 * grad[:, None] * dx, None, None, None
        dx = torch.empty_like(x)
        for rows, factor, result in blocks(x, 2 * grad[:, None] * torch.complex(of_cos, of_sin), dx):
            step = wave(rows, t)
            total = factor[:, -1, None] * step
            for k in reversed(range(len(t) - 1)):      # Horner's rule
                total.add_(factor[:, k, None]).mul_(step)
            result.copy_(total.real)
        return dx, None, None, None


def sigreg(z: Tensor, directions: Tensor, frequency: float | None = None) -> Tensor:
    """How far embeddings are from N(0, I): the Epps-Pulley statistic, averaged over random directions.

    z           (V, N, D) or (N, D)  embeddings; each of the V views is tested on its own N samples
    directions  (D, M)               unit columns, drawn anew at every step
    frequency   t > 0: the characteristic function is compared there alone; by default on the published grid of 17, [0, 3]
    returns     scalar               1.0525 on average for N(0, I), whatever N and D; 0.402 N for a collapsed encoder, 0.802 N at t = 2

    Averaged over all directions, for large D and |z|^2 = D, the test is a repulsion of pairs at distance d, exp(-t^2 d^2 / 2 D) at t: the
    frequency is its range. From a close pair to one at the mean distance, d^2 = 2 D, its slope in d^2 falls to 20 % on the
    published grid, where t < 1 weighs most, and to 2 % at t = 2, which parts what is near and leaves alone what is far.

    Half types are raised to fp32, whatever autocast says. Raises ValueError for a view of one sample, other shapes or frequencies.
    Source: arXiv:2511.08544 on the grid of its authors' code, mean over V and M; one frequency, closed form and backward are ours.
    """
    if z.ndim not in (2, 3) or directions.ndim != 2 or z.shape[-1] != directions.shape[0]:
        raise ValueError(f"sigreg takes z (V, N, D) or (N, D) and directions (D, M), not {tuple(z.shape)} and {tuple(directions.shape)}")
    if frequency is not None and not 0 < frequency < math.inf:
        raise ValueError(f"sigreg tests at a frequency t > 0, not {frequency}")
    if z.shape[-2] < 2:
        raise ValueError(f"sigreg tests a distribution: a view needs at least 2 samples, not {z.shape[-2]}")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        x = directions.to(z.dtype).T @ z.view(-1, *z.shape[-2:]).transpose(1, 2)                    # (V, M, N)
        return EppsPulley.apply(x.flatten(0, 1), *frequencies(x, frequency)).mean()


def draw_directions(dim: int, count: int, cfg: Config, step: int) -> Tensor:
    """(dim, count) unit columns, a function of seed and step alone on each kind of device."""
    generator = torch.Generator(cfg.device).manual_seed((cfg.seed * 1_000_003 + step) ^ (dim << 40))                # a stream of its own
    return F.normalize(torch.randn(dim, count, generator=generator, device=cfg.device), dim=0)


class SquaredError(nn.Module):
    """LeJEPA's objective: the mean squared error of z_hat, gradient into both sides, and SIGReg of z by role."""

    def __init__(self, model):
        super().__init__()

    def forward(self, model, z, z_hat, batch: Batch, directions) -> tuple[Tensor, Tensor]:
        """The prediction error, and SIGReg of z, the mean of inputs' and outputs'."""
        prediction = (z_hat - F.embedding(batch.index[:, 3], z)).square().mean()
        views = torch.stack([z[0::2], z[1::2]])        # (2, G / 2, D): inputs and outputs
        return prediction, sigreg(views, directions, FREQUENCY)

    def readout(self, z: Tensor) -> Tensor:
        """What is compared at evaluation, by Euclidean distance."""
        return z


# ------------------------------------------------------------------------------------------------------------- 3 Model

LEVELS = (4, 4, 4, 4, 3)                               # of the numbers behind one code
CODE_SIZE = math.prod(LEVELS)                          # 768
CODES = 4                                              # codes of a token: 38 bits


def bin_means(levels: int) -> Tensor:
    """(levels,) the mean of N(0, 1) inside each of `levels` equally likely bins."""
    normal = torch.distributions.Normal(0.0, 1.0)
    edges = normal.icdf(torch.linspace(0, 1, levels + 1, dtype=torch.float64))
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return ((density[:-1] - density[1:]) * levels).float()


class GaussianCode(nn.Module):
    """Gaussian quantiles: with y ~ N(0, I), which SIGReg sees to, every code is equally likely. Nothing to learn or collapse.

    A number y becomes level floor(L * Phi(y)), read back as the mean of its bin; the gradient goes straight through to y.
    Five numbers make one of 4 * 4 * 4 * 4 * 3 = 768 codes.
    """

    def __init__(self):
        super().__init__()
        means = torch.zeros(len(LEVELS), max(LEVELS))
        for row, levels in zip(means, LEVELS):
            row[:levels] = bin_means(levels)
        self.register_buffer("means", means.repeat(CODES, 1), persistent=False)                     # (m, levels)
        self.register_buffer("levels", torch.tensor(LEVELS).repeat(CODES), persistent=False)        # (m,)
        place = [math.prod(LEVELS[i + 1:]) for i in range(len(LEVELS))]
        self.register_buffer("place", torch.tensor(place), persistent=False)

    def level(self, y: Tensor) -> Tensor:
        """(..., m) int64: the bin of each number. The level is clamped, not the probability: Phi may round to 1."""
        return torch.minimum((self.levels * torch.special.ndtr(y)).long().clamp(min=0), self.levels - 1)

    def forward(self, y: Tensor) -> Tensor:
        """(U, m) -> (U, m): the bin means, with the gradient of y."""
        mean = self.means[torch.arange(len(self.levels), device=y.device), self.level(y)]
        return mean + (y - y.detach())

    def indices(self, y: Tensor) -> Tensor:
        """(U, m) -> (U, n_codes) int64 in [0, 768)."""
        return (self.level(y).unflatten(-1, (CODES, len(LEVELS))) * self.place).sum(-1)

    def penalty(self, y: Tensor, directions: Tensor) -> Tensor:
        """SIGReg of the numbers behind each code; y (N, m) of distinct objects, directions (5, M)."""
        return sigreg(y.unflatten(-1, (CODES, len(LEVELS))).transpose(0, 1), directions)            # views (n_codes, N, 5)


DROPOUT = 0.1                                          # of what a block adds; there are 600 tasks to learn from


class Block(nn.Module):
    """Pre-norm attention and MLP. Rows are short, so attention is spelled out: in bf16 on a CPU that is 4 x the fused kernel's speed."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (R, L, W); bias (R, 1, L, L), 0 where a slot may look and -inf where not."""
        rows, slots, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, slots, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                                      # (R, heads, L, L)
        attended = (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v          # (R, heads, L, W / heads)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(rows, slots, width)))
        return x + self.drop(self.mlp(self.norm2(x)))


def head(inputs: int, size: Size) -> nn.Sequential:
    """To an embedding: hidden BatchNorm, plain linear last, no ReLU after it."""
    return nn.Sequential(nn.Linear(inputs, size.hidden), nn.BatchNorm1d(size.hidden), nn.GELU(), nn.Linear(size.hidden, size.dim))


class ObjectHead(nn.Module):
    """y: what an object is (bitmap, colour), as the numbers behind its codes. It sees no position and no other object."""

    def __init__(self, width: int):
        super().__init__()
        self.bitmap = nn.Linear(8 * BYTES, width)
        self.colour = nn.Embedding(10, width)
        self.area = nn.Linear(1, width, bias=False)
        self.whole = nn.Parameter(torch.zeros(width))
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, CODES * len(LEVELS)))
        nn.init.normal_(self.colour.weight, std=0.5)
        self.register_buffer("shifts", torch.arange(7, -1, -1, dtype=torch.uint8), persistent=False)

    def forward(self, grids: Grids) -> Tensor:
        bits = ((grids.bits[:, :, None] >> self.shifts) & 1).flatten(1).float()                     # (U, 8 BYTES)
        area = torch.log1p(bits.sum(1, keepdim=True)) / 3
        x = self.bitmap(bits) + self.colour(grids.colour) + self.area(area) + grids.whole[:, None] * self.whole
        return self.mlp(x).float()                                                                  # (U, m)


class Encoder(nn.Module):
    """Symbols (codes, box) of each grid, related by a transformer, pooled and projected to z.

    z lies on the sphere of radius sqrt(D), as N(0, I) does but for 1 part in sqrt(2 D). Left free, a length buys a smaller
    error: grids that are hard to predict move to the middle, and random projections hardly see it. This radius leaves
    each coordinate a variance of 1, so SIGReg acts; at radius 1 it is inert.
    """

    def __init__(self, size: Size, code: nn.Module):
        super().__init__()
        self.objects, self.code = ObjectHead(size.width), code
        self.symbol = nn.Linear(CODES * len(LEVELS), size.width)
        self.box = nn.Embedding(6 * (SIDE + 1), size.width)            # top, left, height, width, bottom, right
        self.whole = nn.Parameter(torch.randn(size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.encoder_layers))
        self.widen = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, size.pooled), nn.GELU())
        self.projector = head(4 * size.pooled, size)
        nn.init.normal_(self.box.weight, std=0.1)
        self.register_buffer("tables", torch.arange(6) * (SIDE + 1), persistent=False)

    def forward(self, grids: Grids) -> tuple[Tensor, Tensor]:
        """z (G, D) of grids, and y (U, m), the numbers behind the codes of their distinct objects."""
        with record_function("code"):
            y = self.objects(grids)
            code = self.code(y)
        with record_function("encoder"):
            return self.relate(code, grids), y

    def relate(self, code: Tensor, grids: Grids) -> Tensor:
        """Everything after the code: a function of the symbols, code (U, m) and box, alone."""
        edges = torch.cat([grids.box, grids.box[..., :2] + grids.box[..., 2:]], -1)                 # (R, L, 6)
        x = F.embedding(grids.kind, self.symbol(code)) + self.box(edges + self.tables).sum(-2) + grids.whole[grids.kind][..., None] * self.whole
        same = grids.grid[:, None, :, None] == grids.grid[:, None, None, :]                         # (R, 1, L, L)
        bias = torch.zeros(same.shape, dtype=x.dtype, device=x.device).masked_fill(~same, -math.inf)
        for block in self.blocks:
            x = block(x, bias)                                                                      # (R, L, W)
        z = self.projector(self.pool(self.widen(x).float().flatten(0, 1), grids)).float()
        return F.rms_norm(z, z.shape[-1:], eps=1e-6)                                                # (G, D), |z|^2 = D

    def pool(self, x: Tensor, grids: Grids) -> Tensor:
        """x (R L, P) -> (G, 4 P): the whole-grid token, the mean, the sum over sqrt(count), the maximum of a grid's tokens."""
        count, owner = len(grids.first), grids.grid.flatten()
        total = x.new_zeros(count + 1, x.shape[1]).index_add(0, owner, x)[:count]                   # row G takes the empty slots
        highest = x.new_full((count + 1, x.shape[1]), -1e4).scatter_reduce(0, owner[:, None].expand_as(x), x, "amax")[:count]
        tokens = grids.count[:, None].float()
        return torch.cat([x[grids.first], total / tokens, total / tokens.sqrt() / 2, highest], 1)


class Predictor(nn.Module):
    """z_hat of the fourth grid from z of three: the analogy out1 + in2 - in1, corrected by a transformer over the three."""

    def __init__(self, size: Size):
        super().__init__()
        self.role = nn.Parameter(torch.randn(3, size.width) * 0.1)
        self.token, self.query = nn.Linear(size.dim, size.width), nn.Linear(3 * size.dim, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.predictor_layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = head(size.width, size)
        nn.init.zeros_(self.head[-1].weight)                           # training starts from the analogy
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, 3, D) of in1, out1, in2 -> z_hat (B, D)."""
        x = torch.cat([self.query(z.flatten(1))[:, None], self.token(z) + self.role], 1)            # (B, 4, W)
        for block in self.blocks:
            x = block(x)
        in1, out1, in2 = z.unbind(1)
        return out1 + in2 - in1 + self.head(self.norm(x[:, 0])).float()


def checked(grids, name="grid {}".format) -> list[np.ndarray]:
    """The grids as arrays. ValueError names the first that is no grid, by name(its place)."""
    arrays = []
    for i, grid in enumerate(grids):
        try:
            array = np.asarray(grid)
        except ValueError:                             # rows of different lengths
            array = np.asarray(grid, dtype=object)
        if array.dtype.kind not in "iu" or array.ndim != 2 or not 1 <= min(array.shape) <= max(array.shape) <= SIDE or not 0 <= array.min() <= array.max() <= 9:
            raise ValueError(f"{name(i)}, {array.dtype} of shape {array.shape}, is not 2-D, at most {SIDE} x {SIDE}, of integers 0-9")
        arrays.append(array)
    return arrays


class LeJEPA(nn.Module):
    """Encoder and predictor. In training: forward. Frozen: embed, codes and predict, on lists of grids, in fp32.

    In evaluation `mean` takes the place of encoder and predictor: the running mean of their weights, as BatchNorm has one of its
    statistics. The training loss never sees it.
    """

    CHUNK = 512                                        # grids encoded, and windows predicted, at a time

    def __init__(self, size: Size, code: nn.Module, objective):
        super().__init__()
        self.encoder, self.predictor = Encoder(size, code), Predictor(size)
        self.objective = objective(self)
        self.mean = nn.Module()
        self.mean.encoder, self.mean.predictor = copy.deepcopy(self.encoder), copy.deepcopy(self.predictor)
        self.mean.requires_grad_(False)

    @property
    def weights(self) -> nn.Module:
        """Whose encoder and predictor are used: the trained ones in training, their mean in evaluation."""
        return self if self.training else self.mean

    @torch.no_grad()
    def average(self, step: int):
        """Moves the mean towards the weights after `step`, all the way after step 0; two thirds of it are of the last tenth of the steps.

        Source: polynomial-decay averaging, arXiv:1212.1824, with eta = 9; here buffers (BatchNorm's, a codebook) are averaged too.
        """
        share = 1 / (1 + HORIZON * step)
        for part in ("encoder", "predictor"):
            for mean, now in zip(getattr(self.mean, part).state_dict().values(), getattr(self, part).state_dict().values()):
                if mean.is_floating_point():
                    mean.lerp_(now, share)
                else:
                    mean.copy_(now)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """z (G, D) of the batch's grids, z_hat (B, D) of its windows, y (U, m) of its distinct objects."""
        z, y = self.weights.encoder(batch.grids)
        with record_function("predictor"):
            return z, self.weights.predictor(F.embedding(batch.index[:, :3], z)), y

    def weigh(self, z, z_hat, y, batch: Batch, directions: Tensor, five: Tensor, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms. directions (D, M) for embeddings, five (5, M') for the numbers behind a code."""
        prediction, of_z = self.objective(self, z, z_hat, batch, directions)
        of_codes = self.weights.encoder.code.penalty(y[batch.objects], five)
        regulariser = (of_z + of_codes) / 2
        loss = (1 - lam) * prediction + lam * regulariser
        return loss, {"prediction": prediction, "sigreg": regulariser, "sigreg_z": of_z, "sigreg_codes": of_codes}

    @property
    def device(self):
        return self.predictor.role.device

    def _chunks(self, grids: list[np.ndarray]):
        table = TokenTable(grids, self.device, turned=False) if grids else None
        for first in range(0, len(grids), self.CHUNK):
            yield table.gather(np.arange(first, min(first + self.CHUNK, len(grids))))

    def _encode(self, grids: list[np.ndarray]) -> Tensor:
        nothing = torch.empty(0, self.predictor.token.in_features, device=self.device)
        return torch.cat([nothing, *(self.weights.encoder(chunk)[0] for chunk in self._chunks(grids))])

    @torch.no_grad()
    def embed(self, grids: list) -> Tensor:
        """z (len(grids), D) of 2-D integer arrays or nested lists."""
        return self.objective.readout(self._encode(checked(grids)))

    def indices(self, grids: Grids) -> Tensor:
        """(U, n_codes) int64: the codes of the distinct objects."""
        encoder = self.weights.encoder
        return encoder.code.indices(encoder.objects(grids))

    @torch.no_grad()
    def codes(self, grids: list) -> list[tuple[Tensor, Tensor]]:
        """For each grid codes (n, n_codes) int64 and boxes (n, 4) int64: top, left, height, width; item 0 is the whole grid."""
        found = []
        for chunk in self._chunks(checked(grids)):
            codes = self.indices(chunk)[chunk.kind].flatten(0, 1).cpu()
            boxes = chunk.box.flatten(0, 1).cpu()
            for first, count in zip(chunk.first.tolist(), chunk.count.tolist()):
                found.append((codes[first:first + count], boxes[first:first + count]))
        return found

    @torch.no_grad()
    def predict(self, contexts: list) -> Tensor:
        """z_hat (len(contexts), D) of (in1, out1, in2) triples. Each distinct grid is encoded once."""
        contexts, roles = list(contexts), ("in1", "out1", "in2")
        for i, context in enumerate(contexts):
            if len(context) != 3:
                raise ValueError(f"context {i} has {len(context)} grids; it takes three: {', '.join(roles)}")
        place, grids, index = {}, [], []
        for grid in checked((grid for context in contexts for grid in context), lambda i: f"context {i // 3}, {roles[i % 3]}"):
            index.append(place.setdefault((grid.shape, grid.tobytes()), len(grids)))
            if index[-1] == len(grids):
                grids.append(grid)
        z = self._encode(grids)
        index = torch.tensor(index, dtype=torch.int64, device=self.device).view(-1, 3)
        z_hat = [self.weights.predictor(z[index[first:first + self.CHUNK]]) for first in range(0, len(index), self.CHUNK)]
        return self.objective.readout(torch.cat([z[:0], *z_hat]))


# --------------------------------------------------------------------------------------------------------- 4 Optimizer

WARMUP = 50                                            # steps to the learning rate, which stays: the mean of the weights does what a decay would
HORIZON = 0.1                                          # share of the steps so far over which the weights are averaged
CLIP = 10.0                                            # gradient norm above which a step is scaled down


def make_optimizers(model: nn.Module, cfg: Config) -> list:
    """Muon for the matrices, AdamW for embeddings, biases and gains, at one learning rate: Muon's is scaled to AdamW's RMS."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_matrix = lambda name, p: p.ndim == 2 and not re.search(r"colour|box|role", name)
    matrices = [p for name, p in trained if is_matrix(name, p)]
    others = [p for name, p in trained if not is_matrix(name, p)]
    return [torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def learning_rate(cfg: Config, step: int) -> float:
    return cfg.lr * min(1, (step + 1) / WARMUP)


# ---------------------------------------------------------------------------------------------------------- 5 Training


def losses(model, batch: Batch, step: int, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its terms. Directions are drawn anew at each step; SIGReg stays outside autocast."""
    size = SIZES[cfg.size]
    with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bf16"):
        z, z_hat, y = model(batch)
    with record_function("sigreg"):
        directions = draw_directions(size.dim, size.directions, cfg, step)
        five = draw_directions(len(LEVELS), size.directions // 4, cfg, step)                        # fewer cover five dimensions
        return model.weigh(z, z_hat, y, batch, directions, five, cfg.lam)


def state_of(model, optimizers) -> dict[str, Tensor]:
    """All that a step changes, by name: weights, running means, what a variant keeps, the optimizers' state."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for p, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{p}.{name}": value for name, value in values.items()}
    return state


def train_step(model, optimizers, batch: Batch, step: int, cfg: Config) -> dict[str, Tensor]:
    """One step: forward, loss, backward, clip, optimizers, mean of the weights. Returns 0-d tensors; the method's own parts wait for nothing.

    A step whose loss or gradient norm is not finite changes nothing.
    """
    with record_function("optimizer"):
        before = {name: value.clone() for name, value in state_of(model, optimizers).items()}
    torch.manual_seed(cfg.seed * 1_000_003 + step)                     # dropout too is a function of seed and step
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
    loss, terms = losses(model, batch, step, cfg)
    loss.backward()
    with record_function("optimizer"):
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)                              # as it was before clipping
        for optimizer in optimizers:
            optimizer.step()
        model.average(step)
        finite = loss.isfinite() & grad_norm.isfinite()
        if finite.is_cuda or not finite:                               # to ask a GPU would be to wait for it
            for name, value in state_of(model, optimizers).items():
                torch.where(finite, value, before[name] if name in before else torch.zeros_like(value), out=value)  # optimizers start at 0
    return {name: value.detach() for name, value in {"loss": loss, **terms, "grad_norm": grad_norm}.items()}


def compile_parts(model) -> bool:
    """Has torch.compile fuse what a step spends its time in, each part with dynamic sizes. False, with a line, where nothing compiles.

    The parts are compiled one by one, so that a profile still tells them apart.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=model.device))
    except Exception as error:                         # no C compiler, no headers: whatever is missing, a run goes on without
        print(f"--compile: nothing compiles here, the run goes on eagerly ({str(error).strip().splitlines()[0][:200]})", file=sys.stderr)
        return False
    for owner, name in ((model.encoder.objects, "forward"), (model.encoder, "relate"), (model.predictor, "forward"), (model, "weigh")):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))
    return True


def eagerly(cfg: Config):
    """Inside it nothing that is compiled runs: for other sizes than training has, and for counting operations."""
    return torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()


def train(model, optimizers, data: TaskSet, log: "RunLog", cfg: Config, start: int = 0) -> int:
    """Trains to cfg.steps, or to the step in which a signal asked for the end. Returns the number of steps taken."""
    model.train()
    for step in range(start, cfg.steps):
        with record_function("data"):
            batch = data.batch(cfg.batch_size, cfg.seed, step)         # a function of seed and step alone, so a run can resume
        metrics = train_step(model, optimizers, batch, step, cfg)
        done = step + 1
        log.count(done, metrics, batch)
        look, stop = done % look_every(cfg) == 0 or done == cfg.steps, log.stop
        due = look or done % LOG_EVERY == 0
        if due or stop:
            values = log.read(metrics)                 # the only line that waits for the device
        if due:
            log.write(done, values, log.look(done, model) if look else {})
            stop = stop or log.stop                    # an alert has just tripped
        if look or stop:
            save(Path(cfg.run), model, optimizers, done, cfg, log.state())
            log.saved = done
        if stop:
            return done
    return cfg.steps


# ------------------------------------------------------------------------------------------------------------ 6 Record

LOG_EVERY = 10
NULL_STEPS = 100                                       # training SIGReg is averaged over the last of these
TRAINING_LOOK = 100                                    # training tasks that each look is also taken at, beside the unseen ones
DIFFERENT = "--{} is {} now, and the run in {} was made with {}; give the same to go on with it, or train in another --run folder"


def look_every(cfg: Config) -> int:
    """Steps between two looks at unseen tasks, with a checkpoint each: 100, or a twentieth of the run."""
    return max(100, cfg.steps // 20)


class RunLog:
    """The record of a run: one line for the eye, the same in log.jsonl and TensorBoard, figures on unseen tasks, result.json.

    A step's terms are those of the weights in training; all figures on tasks, and validation_loss, of their mean.
    """

    def __init__(self, cfg: Config, tasks: dict, held_out: dict, windows: int, start: int, state: dict | None, begin: float):
        from torch.utils.tensorboard import SummaryWriter              # slow to import, and only a run needs it
        self.cfg, self.folder, self.start, self.saved, self.stop, self.trained = cfg, Path(cfg.run), start, start, 0, False
        self.unseen, self.epoch = make_windows(held_out), windows
        self.seen = make_windows(dict([item for item in tasks.items() if len(arc_data.pairs_of(item[1])) > 1][:TRAINING_LOOK]))
        self.held_out = TaskSet(held_out, cfg.device, augment=False)
        self.objects = TokenTable(self.unseen.grids, cfg.device, turned=False).gather(np.arange(len(self.unseen.grids)))
        self.last = {"windows": 0, "seconds": 0.0, "sigregs": [], "grad_sum": 0.0, "grad_max": 0.0, "samples": 0} | (state or {})
        self.grad_sum, self.grad_max = (torch.tensor(self.last[name], device=cfg.device) for name in ("grad_sum", "grad_max"))
        self.sigregs, self.looking, self.begin = deque(self.last["sigregs"], maxlen=NULL_STEPS), 0.0, begin
        self.samples, self.windows, self.mark = self.last["samples"], self.last["windows"], (self.last["windows"], time.monotonic())
        self.first_bad = torch.zeros(1, device=cfg.device)             # the first step that is not a number, and its terms
        self.alerts = report.Alerts(map(json.loads, (self.folder / "log.jsonl").read_text().splitlines() if start else ()))
        self.lines = open(self.folder / "log.jsonl", "a", buffering=1)
        self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)

    def state(self) -> dict:
        """What a resumed run needs to count on from here. What is logged so far is on the disk first."""
        self.board.flush()
        os.fsync(self.lines.fileno())
        log = (self.folder / "log.jsonl").read_bytes()
        return {"log_bytes": len(log), "log_sha256": hashlib.sha256(log).hexdigest(), "windows": self.windows, "seconds": round(self.seconds(), 3),
                "sigregs": [float(x) for x in self.sigregs], "grad_sum": float(self.grad_sum), "grad_max": float(self.grad_max), "samples": self.samples}

    def seconds(self) -> float:
        return self.last["seconds"] + time.monotonic() - self.begin

    def close(self):
        self.board.close()
        self.lines.close()

    def count(self, step: int, metrics: dict, batch: Batch):
        """Adds up what is reported at the end, and keeps the first step that is not a number; waits for nothing."""
        row = torch.stack([torch.full_like(metrics["loss"], step), *metrics.values()])
        self.first_bad = torch.where((self.first_bad[0] > 0) | row.isfinite().all(), self.first_bad, row)
        self.sigregs.append(metrics["sigreg_z"])
        self.grad_sum = self.grad_sum + metrics["grad_norm"]
        self.grad_max = torch.maximum(self.grad_max, metrics["grad_norm"])
        self.windows += len(batch.index)
        self.samples = len(batch.grids.first) // 2     # a view's

    def read(self, metrics: dict) -> dict[str, float]:
        """The terms of a step as numbers. Ends the run if one was not a number in this step or one before."""
        step, *terms = self.first_bad.tolist()
        if step:
            terms = {name: f"{value:.4g}" for name, value in zip(metrics, terms)}
            culprit = next(name for name in ("loss", "grad_norm", *terms) if not math.isfinite(float(terms[name])))
            others = ", ".join(f"{name} {value}" for name, value in terms.items() if name != culprit)
            raise SystemExit(f"{culprit} is {terms[culprit]} at step {step:.0f} ({others}); {self.checkpoint()}")
        return {name: float(value) for name, value in metrics.items()}

    def checkpoint(self) -> str:
        return f"the last good checkpoint is step {self.saved}" if self.saved else "there is no checkpoint yet"

    def write(self, step: int, values: dict, figures: dict):
        """One line for the eye, and one for programs."""
        windows, since = self.mark
        rate = (self.windows - windows) / (time.monotonic() - since - self.looking)
        self.mark, self.looking = (self.windows, time.monotonic()), 0.0
        row = {"step": step, **values, "lr": learning_rate(self.cfg, step - 1), "samples_per_s": rate, "seconds": self.seconds(), **figures}
        self.lines.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
        left = (time.monotonic() - self.begin) * (self.cfg.steps - step) / (step - self.start)
        print(f"step {step:>{len(str(self.cfg.steps))}}/{self.cfg.steps}  loss {values['loss']:.4f}  prediction {values['prediction']:.4f}"
              f"  sigreg {values['sigreg']:.3f}  |grad| {values['grad_norm']:.2f}  {rate:.0f} windows/s  {left / 60:.1f} min left", flush=True)
        if figures:
            print("      unseen tasks:", "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None), flush=True)
        for line in self.alerts.feed(row):
            print(f"      {line}", flush=True)
            if self.cfg.stop_on_alert and line.startswith("alert") and step < self.cfg.steps:
                self.stop = -report.ALERT_STATUS   # no signal has such a number

    @torch.no_grad()
    def look(self, step: int, model) -> dict:
        """Figures on unseen tasks, and on some training tasks beside them (prefixed train_)."""
        begin = time.monotonic()
        model.eval()
        pool = model.embed([self.unseen.grids[i] for i in self.unseen.outputs]).cpu()
        figures = evaluation.quick(model, self.unseen, pool)
        figures = {("validation_" if name == "prediction" else "") + name: value for name, value in figures.items()}
        figures |= {"train_" + name: value for name, value in evaluation.quick(model, self.seen).items() if name in ("ndcg10_without_out1", "within_task")}
        figures["validation_loss"] = float(self.validation_loss(model))
        codes, kind = self.code_indices(model)
        figures |= evaluation.code_statistics(codes.numpy(), CODE_SIZE, kind.numpy())
        for position, column in enumerate(codes.T):
            self.board.add_histogram(f"codes/{position}", column, step, bins=64)
        self.board.add_image("unseen windows", evaluation.picture(model, self.unseen, pool), step, dataformats="HWC")
        model.train()
        self.looking += time.monotonic() - begin
        return figures

    def validation_loss(self, model) -> Tensor:
        """Mean training loss of four fixed batches of unseen tasks."""
        batches = [self.held_out.batch(self.cfg.batch_size, 0, i) for i in range(4)]
        with eagerly(self.cfg):
            return torch.stack([losses(model, batch, i, self.cfg)[0] for i, batch in enumerate(batches)]).mean()

    def code_indices(self, model) -> tuple[Tensor, Tensor]:
        """Codes (n, n_codes) of every object of the validation grids, and which distinct object (n,) it is."""
        kind = self.objects.kind[self.objects.grid < len(self.objects.first)]
        return model.indices(self.objects)[kind].cpu(), kind.cpu()

    @torch.no_grad()
    def finish(self, model, untrained, steps: int) -> dict:
        """The evaluation of the run's end, as result.json and as a block of lines."""
        model.eval()
        index = np.random.default_rng(0).permutation(len(self.seen.index))[:2048]
        z_hat = model.predict(evaluation.contexts(self.seen, index))
        residuals = model.embed([self.seen.grids[i] for i in self.seen.index[index, 3]]) - z_hat
        result, _ = evaluation.evaluate(model, self.unseen, untrained=untrained, residuals=residuals)
        codes, kind = self.code_indices(model)
        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        result |= evaluation.code_statistics(codes.numpy(), CODE_SIZE, kind.numpy())
        tested = float(np.mean([float(x) for x in self.sigregs])) / SIGREG_NULL                     # 0 where the objective does not test z
        result |= {"sigreg_over_null": tested or None,
                   "sigreg_n": self.samples, "loss": float(self.validation_loss(model)),
                   "validation_windows": len(self.unseen.index), "steps": steps, "windows": self.windows, "epochs": self.windows / self.epoch,
                   "grad_norm_mean": float(self.grad_sum) / steps, "grad_norm_max": float(self.grad_max),
                   "seconds": self.seconds(), "samples_per_s": float(np.median([row["samples_per_s"] for row in rows])),
                   "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "device": describe_device(self.cfg.device)}
        report.write_whole(self.folder / "result.json", json.dumps(result, indent=1).encode())
        report.plot_run(self.folder)
        print(evaluation.table(result) + "\n")
        for name, value in result.items():
            if not isinstance(value, dict):
                print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
        return result


def describe_device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


ZEROS = "0" * 64                                       # where a checkpoint's SHA-256 will stand


def checksum(content: bytes) -> tuple[slice, bytes]:
    """Where a checkpoint's SHA-256 stands in its metadata, and the SHA-256 of the whole file with zeros there: any changed byte shows."""
    place = content.find(b'"sha256":"') + len(b'"sha256":"')
    digest = hashlib.sha256(memoryview(content)[:place])
    digest.update(ZEROS.encode())
    digest.update(memoryview(content)[place + len(ZEROS):])
    return slice(place, place + len(ZEROS)), digest.hexdigest().encode()


def save(folder: Path, model, optimizers, step: int, cfg: Config, state: dict):
    """last.safetensors: weights, optimizer, random state, step. The one before it stays as previous.safetensors."""
    tensors = state_of(model, optimizers) | {"random": torch.get_rng_state()}
    metadata = {"sha256": ZEROS, "commit": commit(), "step": str(step), "config": json.dumps(dataclasses.asdict(cfg)), "state": json.dumps(state)}
    content = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    place, digest = checksum(content)
    report.write_whole(folder / "last.safetensors", content[:place.start] + digest + content[place.stop:], keep=folder / "previous.safetensors")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of last.safetensors; of previous.safetensors, with a line, if that is not what was written."""
    problems = []
    for name in ("last", "previous"):
        path = folder / f"{name}.safetensors"
        try:
            content = path.read_bytes()
            place, digest = checksum(content)
            if b'"sha256":"' not in content:
                raise ValueError("no SHA-256 in it: empty, or written by another version of lejepa.py")
            if content[place] != digest:
                raise ValueError("damaged: its SHA-256 is not the one it was written with")
            metadata = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            tensors = safetensors.torch.load(content)
            for key, value in tensors.items():
                if not value.isfinite().all():
                    raise ValueError(f"{key} holds what is not a number")
            found = {"path": path, "commit": metadata.get("commit", ""), "step": int(metadata["step"]), "config": json.loads(metadata["config"]), "state": json.loads(metadata["state"])}
            if problems:
                print(f"{problems[0]}; going on from {path}, step {found['step']}", file=sys.stderr)
            return tensors, found
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            problems.append(f"{path}: {error}")
    raise ValueError(f"no checkpoint that can be read ({'; '.join(problems)}); train again in another --run folder")


def resume(model, optimizers, cfg: Config) -> tuple[int, dict]:
    """Loads the run's checkpoint and cuts its log back to it. Returns its step and what its log counted.

    ValueError names a flag that has changed; nothing on the disk is touched before all is checked.
    """
    folder = Path(cfg.run)
    tensors, found = read_checkpoint(folder)
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    for name, value in found["config"].items():
        if name not in FREE_TO_CHANGE and now.get(name) != value:
            raise ValueError(DIFFERENT.format(name.replace("_", "-"), now.get(name), cfg.run, value))
    if found["step"] > cfg.steps:
        raise ValueError(f"--steps {cfg.steps}: the run in {cfg.run} is at step {found['step']} already")
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers:                       # a step makes its state, which is overwritten like all else
        optimizer.step()
    fill(state_of(model, optimizers) | {"random": torch.get_rng_state()}, tensors)
    torch.set_rng_state(tensors["random"])
    log = (folder / "log.jsonl").read_bytes()[:found["state"]["log_bytes"]]
    if hashlib.sha256(log).hexdigest() != found["state"]["log_sha256"]:
        raise ValueError(f"{folder / 'log.jsonl'} is not what step {found['step']} was logged into; put it back, or train in another --run folder")
    if found["config"]["steps"] != cfg.steps:
        print(f"--steps {cfg.steps}, where the run was made with {found['config']['steps']}: it goes on from step {found['step']} to there", file=sys.stderr)
    if found["commit"] != commit():
        print(f"the checkpoint was written by commit {found['commit'] or 'unknown'}, this is {commit() or 'unknown'}: "
              "where they differ, the run no longer equals an uninterrupted one", file=sys.stderr)
    report.write_whole(folder / "log.jsonl", log)
    if found["path"].name != "last.safetensors":
        found["path"].replace(folder / "last.safetensors")             # so that a damaged one never becomes the previous
    return found["step"], found["state"]


@torch.no_grad()
def fill(own: dict[str, Tensor], tensors: dict[str, Tensor]):
    """Copies a checkpoint's tensors into ours. ValueError names the first that differs in name, shape or type."""
    for name in sorted(own.keys() | tensors.keys()):
        given, needed = (f"{value.dtype} {tuple(value.shape)}" if value is not None else "not there" for value in (tensors.get(name), own.get(name)))
        if given != needed:
            raise ValueError(f"the checkpoint does not fit this model: {name} is {given}, here it is {needed}")
    for name, value in tensors.items():
        own[name].copy_(value)


def load_run(path) -> tuple["LeJEPA", Config]:
    """The model of a run's folder with the weights of last.safetensors, frozen, in eval mode, on the CPU; and its Config."""
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder; give the folder of a run that lejepa.py wrote")
    tensors, found = read_checkpoint(Path(path))
    try:
        cfg = Config(**found["config"])
        model = build(cfg)
        fill(state_of(model, []), {name: value for name, value in tensors.items() if name.startswith("model.")})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: made by another version of lejepa.py: {error}") from None
    return model.eval().requires_grad_(False), cfg


# ---------------------------------------------------------------------------------------------------------------------
# The method ends here. What follows is kept for comparison.
# ---------------------------------------------------------------------------------------------------------- 7 Variants


class NoCode(nn.Module):
    """No bottleneck: y goes on as it is, and is not regularised."""

    def forward(self, y: Tensor) -> Tensor:
        return y

    def indices(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), 0, dtype=torch.int64, device=y.device)

    def penalty(self, y: Tensor, directions: Tensor) -> Tensor:
        return y.new_zeros(())


class EMACode(nn.Module):
    """The ordinary VQ-VAE codebook: nearest of 768 vectors, which follow their members by a moving average.

    As many codes a token as the method's own, each with a codebook over five numbers. The first batch supplies the vectors
    (data start). It sees distinct objects only, so no padding; it stands still in evaluation and is no parameter.
    Source: van den Oord et al., arXiv:1711.00937, appendix A.1. Commitment 0.25, EMA 0.99.
    """
    COMMITMENT, DECAY = 0.25, 0.99

    def __init__(self, lam: float):
        super().__init__()
        self.weight = 2 * self.COMMITMENT / max(lam, 1e-6)             # `weigh` multiplies by lam / 2
        self.register_buffer("vectors", torch.zeros(CODES, CODE_SIZE, len(LEVELS)))
        self.register_buffer("members", torch.ones(CODES, CODE_SIZE))
        self.register_buffer("total", torch.zeros(CODES, CODE_SIZE, len(LEVELS)))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @staticmethod
    def split(y: Tensor) -> Tensor:
        return y.detach().float().unflatten(-1, (CODES, len(LEVELS))).transpose(0, 1)               # (n_codes, U, 5)

    def nearest(self, y: Tensor) -> Tensor:
        return torch.cdist(self.split(y), self.vectors).argmin(-1)                                  # (n_codes, U)

    def read(self, chosen: Tensor) -> Tensor:
        """(n_codes, U) -> (U, m): the vectors chosen."""
        return self.vectors.gather(1, chosen[..., None].expand(-1, -1, len(LEVELS))).transpose(0, 1).flatten(1)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and not self.started:
            rows = torch.linspace(0, len(y) - 1, CODE_SIZE, device=y.device).long()
            self.vectors.copy_(self.split(y)[:, rows])
            self.total.copy_(self.vectors)
            self.started.fill_(True)
        chosen = self.nearest(y)
        mean = self.read(chosen)
        if self.training:
            self.follow(y, chosen)
        return mean + (y - y.detach())

    @torch.no_grad()
    def follow(self, y: Tensor, chosen: Tensor):
        one_hot = F.one_hot(chosen, CODE_SIZE).float().transpose(1, 2)                              # (n_codes, 768, U)
        self.members.lerp_(one_hot.sum(-1), 1 - self.DECAY)
        with torch.autocast(y.device.type, enabled=False):
            self.total.lerp_(one_hot @ self.split(y), 1 - self.DECAY)
        self.vectors.copy_(self.total / self.members.clamp(min=1e-5)[..., None])

    def indices(self, y: Tensor) -> Tensor:
        return self.nearest(y).T

    def penalty(self, y: Tensor, directions: Tensor) -> Tensor:
        """Commitment: the squared distance of y to its vector, 0.25 of it in the loss whatever lam is."""
        return self.weight * (y - self.read(self.nearest(y))).square().mean()


class InfoNCE(nn.Module):
    """Contrastive prediction: z_hat must pick its target among the batch's outputs and a queue of 8192 earlier ones.

    Targets come from a moving average (0.99) of the encoder; the temperature is learned inside [0.05, 0.20]; embeddings are
    compared by cosine, so they are normalised at evaluation too. Sources: arXiv:1807.03748 (loss), 1911.05722 (queue, average).
    """
    QUEUE, DECAY, COLDEST, WARMEST = 8192, 0.99, 0.05, 0.20

    def __init__(self, model):
        super().__init__()
        self.target = copy.deepcopy(model.encoder).requires_grad_(False)
        for part in self.target.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0                           # keys are not noised
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.1)))
        self.register_buffer("queue", torch.zeros(self.QUEUE, model.encoder.projector[-1].out_features))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def targets(self, batch: Batch, model) -> tuple[Tensor, Tensor]:
        """Normalised embeddings (n, D) of the batch's target grids by the averaged encoder, and which (B,) is each window's."""
        if self.training:
            for mean, now in zip(self.target.parameters(), model.encoder.parameters()):
                mean.lerp_(now, 1 - self.DECAY)
        grids, own = batch.index[:, 3].unique(return_inverse=True)
        return F.normalize(self.target(batch.grids)[0][grids].float(), dim=-1), own

    def forward(self, model, z, z_hat, batch: Batch, directions) -> tuple[Tensor, Tensor]:
        keys, own = self.targets(batch, model)
        count = int(self.filled.clamp(max=self.QUEUE))
        temperature = self.log_temperature.exp().clamp(self.COLDEST, self.WARMEST)
        logits = F.normalize(z_hat, dim=-1) @ torch.cat([keys, self.queue[:count]]).T / temperature
        if self.training:
            places = (self.filled + torch.arange(len(keys), device=keys.device)) % self.QUEUE
            self.queue[places] = keys
            self.filled += len(keys)
        return F.cross_entropy(logits, own), z.new_zeros(())

    def readout(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


METHODS = {"gaussian": lambda cfg: GaussianCode(), "ema": lambda cfg: EMACode(cfg.lam), "none": lambda cfg: NoCode(),
           "lejepa": SquaredError, "infonce": InfoNCE}


def build(cfg: Config) -> LeJEPA:
    """The model of a Config with its seed's weights, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return LeJEPA(SIZES[cfg.size], METHODS[cfg.code](cfg), METHODS[cfg.objective])


# ------------------------------------------------------------------------------------------------------------- 8 Entry


def keep_large_blocks():
    """Tells glibc to keep freed blocks: the kernel would zero fresh pages at every step. Elsewhere it does nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-1, 1 << 30)                               # M_TRIM_THRESHOLD
    mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)       # M_MMAP_THRESHOLD; older versions take 32 MB at most


@functools.cache
def commit() -> str:
    """The commit of this folder, marked -dirty if a tracked file differs from it; empty without git."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def open_folder(cfg: Config):
    """Makes the run's folder and takes its lock, a file that the kernel unlocks when its owner ends, however it ends.

    A folder with anything else in it is never used again without --resume.
    """
    folder = Path(cfg.run)
    if cfg.resume and not folder.is_dir():
        raise ValueError(f"--resume: there is no folder {cfg.run}")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_used(cfg, folder)                           # before a lock is put there
    lock = open(folder / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run {cfg.run}: another run is at work in this folder; wait for its end, or name another folder") from None
    refuse_used(cfg, folder)                           # and after: one that began and ended meanwhile
    return lock


def refuse_used(cfg: Config, folder: Path):
    if not cfg.resume and any(path.name != "lock" for path in folder.iterdir()):
        way_out = "add --resume to go on with it, or name another folder" if any(folder.glob("*.safetensors")) else "name another folder"
        raise ValueError(f"--run {cfg.run} is not empty; {way_out}")


def write_config(cfg: Config, compiled: bool):
    """config.json: every flag, what came of --compile, and the machine; of a resumed run, what may have changed."""
    path = Path(cfg.run) / "config.json"
    record = SIZES[cfg.size]._asdict() | dataclasses.asdict(cfg)
    record |= {"compiled": compiled, "command": " ".join(["python", *sys.argv]), "commit": commit(), "device_name": describe_device(cfg.device),
               "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if cfg.resume and path.exists():
        try:
            record = json.loads(path.read_bytes()) | {name: getattr(cfg, name) for name in FREE_TO_CHANGE if name != "resume"} | {"compiled": compiled}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not the JSON object it was written as ({error}); put it back or remove it") from None
    report.write_whole(path, json.dumps(record, indent=1).encode())


PARTS = ("data", "code", "encoder", "predictor", "sigreg", "optimizer")                            # ranges named in the trace


def part_times(events, device: str) -> dict[str, float]:
    """Microseconds by part, and of the rest of the steps as `other`. A backward function counts where its forward ran.

    On a GPU they are those of its kernels. A part inside another counts once, as itself.
    """
    spent = lambda event: event.cpu_time_total if device == "cpu" else event.device_time_total

    def part_above(event):
        while event is not None and event.name not in PARTS:
            event = event.cpu_parent
        return event

    events = [event for event in events if event.device_type == DeviceType.CPU]                     # a GPU mirrors the ranges
    times, owner = dict.fromkeys(PARTS, 0.0), {}
    for event in events:
        above = part_above(event)
        if above is event:
            times[event.name] += spent(event)
            outer = part_above(event.cpu_parent)
            if outer is not None:
                times[outer.name] -= spent(event)
        elif above is not None and above.name not in ("data", "optimizer") and event.sequence_nr >= 0:
            owner[event.sequence_nr] = above.name      # operations without a gradient bear the next one's number: the last is it
    for event in events:                               # the engine's own event stands above the function that bears the number
        if event.scope == 1 and event.cpu_parent is not None and event.cpu_parent.name.startswith("autograd::engine") and event.sequence_nr in owner:
            times[owner[event.sequence_nr]] += spent(event.cpu_parent)
    whole = sum(spent(event) for event in events if event.name.startswith("ProfilerStep"))
    return times | {"other": max(0.0, whole - sum(times.values()))}


def repair(trace: dict) -> dict:
    """The trace as torch-tb-profiler 0.4.3 knows it: it has no cuda_runtime, drops named ranges, and knows data by one name."""
    kinds = {"cuda_runtime": "Runtime", "cuda_driver": "Runtime", "user_annotation": "cpu_op"}
    for event in trace["traceEvents"]:
        event["cat"] = kinds.get(event.get("cat"), event.get("cat", ""))
        if event.get("name") == "data" and event["cat"] == "cpu_op":
            event["name"] = "enumerate(DataLoader)#TaskSet.__next__"
    return trace


def traced(model, optimizers, data: TaskSet, cfg: Config, warm: int, steps: int):
    """Runs the training step under torch.profiler. Returns the profiler, and windows a second without it."""
    def take(step):
        with record_function("data"):
            batch = data.batch(cfg.batch_size, cfg.seed, step)
        float(train_step(model, optimizers, batch, step, cfg)["loss"])                              # float: a step ends with its device work
        return len(batch.index)

    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (cfg.device == "cuda")
    schedule = torch.profiler.schedule(wait=0, warmup=warm, active=steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=True, profile_memory=True, acc_events=True) as profiler:
        for step in range(warm + steps):
            take(step)
            profiler.step()
    begin = time.monotonic()
    windows = sum(take(step) for step in range(steps))
    return profiler, windows / (time.monotonic() - begin)


def profile(model, optimizers, data: TaskSet, cfg: Config, warm: int = 3, steps: int = 3):
    """A trace of the training step for TensorBoard and Perfetto in <run>/profile/, tables on the screen."""
    model.train()
    profiler, rate = traced(model, optimizers, data, cfg, warm, steps)
    path = Path(cfg.run) / "profile" / f"lejepa.{time.time_ns() // 1_000_000}.pt.trace.json"
    path.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path))
    trace = repair(json.loads(path.read_text()))
    report.write_whole(path, json.dumps(trace).encode())
    times = part_times(profiler.events(), cfg.device)
    report.plot_parts(path.parent / "parts.png", {name: value / steps / 1000 for name, value in times.items()})
    print(profiler.key_averages().table(sort_by="self_cpu_time_total" if cfg.device == "cpu" else "self_device_time_total", row_limit=15, max_name_column_width=50))
    for name, value in times.items():
        print(f"{name:>12} {value / sum(times.values()):6.1%}  {value / steps / 1000:8.1f} ms a step, backward included")
    memory = max((event["args"].get("Total Allocated", 0) for event in trace["traceEvents"] if event.get("name") == "[memory]"), default=0)
    share = utilisation(model, data, cfg, cfg.batch_size / rate, steps)
    print(f"peak memory {memory / 1e9:.2f} GB (allocated, of the traced steps); {rate:.0f} windows/s; utilisation {share:.1%} of a {cfg.dtype} matrix product\n"
          f"trace: {path}; open it in Perfetto, or with: tensorboard --logdir {cfg.run}")


def matmul_rate(cfg: Config, repeats: int = 5) -> float:
    """Floating-point operations a second of large square matrix products in the run's type, one wait for many on a GPU."""
    size, many = (8192, 20) if cfg.device == "cuda" else (2048, 1)
    a = torch.randn(size, size, device=cfg.device, dtype=torch.bfloat16 if cfg.dtype == "bf16" else torch.float32)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(many):
            product = a @ a
        float(product[0, 0])
        seconds.append(time.perf_counter() - begin)
    return many * 2 * size ** 3 / min(seconds[1:])


def model_flops(model, batch: Batch, cfg: Config) -> int:
    """Floating-point operations of the matrix products of one forward and backward; the optimizer's are not the model's."""
    from torch.utils.flop_counter import FlopCounterMode
    with eagerly(cfg), FlopCounterMode(display=False) as counter:
        losses(model, batch, 0, cfg)[0].backward()
    return counter.get_total_flops()


def utilisation(model, data: TaskSet, cfg: Config, seconds: float, steps: int) -> float:
    """Model FLOPs utilisation of the run's first `steps` steps, which take `seconds` each."""
    flops = np.mean([model_flops(model, data.batch(cfg.batch_size, cfg.seed, step), cfg) for step in range(steps)])
    return flops / seconds / matmul_rate(cfg)


def prepare(cfg: Config, tasks: dict, held_out: dict, leaks: list, begin: float):
    """Everything else that can go wrong by what the user gave, before a step is taken. ValueError or OSError says what."""
    data = TaskSet(tasks, cfg.device)
    cut = data.table.cut
    print(f"{len(tasks)} training tasks, {data.windows} windows ({len(leaks)} tasks left out: they share a pair with what is held out); "
          f"{len(held_out)} validation tasks; {(cut > 0).sum()} of {len(cut)} training grids cut at {arc_data.OBJECTS} objects ({cut.sum()} objects)", flush=True)
    model = build(cfg).to(cfg.device)
    compiled = cfg.compile and compile_parts(model)
    optimizers = make_optimizers(model, cfg)
    start, state = resume(model, optimizers, cfg) if cfg.resume else (0, None)
    write_config(cfg, compiled)
    log = None if cfg.profile else RunLog(cfg, tasks, held_out, data.windows, start, state, begin)
    return data, model, optimizers, log, start


def run(cfg: Config, data: TaskSet, model, optimizers, log: RunLog, start: int) -> int:
    """Trains, evaluates and records. Returns the exit status."""
    def ask_to_stop(number, frame):                    # the step in hand is finished; a second signal leaves at once
        log.stop = number
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_DFL)
        if log.trained:                                # in the evaluation there is nothing to finish
            raise KeyboardInterrupt
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, ask_to_stop)
    way_out = f"the same command with --run {cfg.run} --resume"
    try:
        try:
            steps = train(model, optimizers, data, log, cfg, start)
            log.trained = True
            if not log.stop:
                log.finish(model, build(cfg).to(cfg.device).eval(), steps)
        finally:
            log.close()
    except KeyboardInterrupt:
        way_out += ", which evaluates again"
    except OSError as error:                           # no room, or no permission
        print(f"lejepa.py: {error}; {log.checkpoint()}" + (f"; once that is mended, go on with {way_out}" if log.saved else ""), file=sys.stderr)
        return 1
    if log.stop == -report.ALERT_STATUS:
        print(f"stopped by an alert after step {log.saved}; to go on all the same: {way_out}, without --stop-on-alert", flush=True)
        return report.ALERT_STATUS
    if log.stop:
        print(f"stopped by a signal after step {log.saved}; to go on: {way_out}", flush=True)
        return 128 + log.stop
    return 0


def say_no_more(failed):
    """What TensorBoard's thread could not write is raised again in ours, which says it in one line."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def main():
    begin = time.monotonic()
    keep_large_blocks()
    threading.excepthook = say_no_more
    cfg = parse_flags()
    lock = None
    try:
        try:
            tasks = arc_data.split(cfg.data, cfg.validate)
            lock = open_folder(cfg)
            data, model, optimizers, log, start = prepare(cfg, *tasks, begin)
        except (ValueError, OSError) as error:
            print(f"lejepa.py: {error}", file=sys.stderr)
            sys.exit(2)
        sys.exit(profile(model, optimizers, data, cfg) if cfg.profile else run(cfg, data, model, optimizers, log, start))
    except OSError as error:                           # a trace that finds no room; a run says it itself
        print(f"lejepa.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:                          # before the first step
        sys.exit(130)
    finally:
        if lock is not None:
            lock.close()


if __name__ == "__main__":
    main()
