"""LeJEPA for ARC: a world model of grids with discrete codes, in one file.

1. A grid becomes tokens: the whole grid and each object. A small network maps a bitmap to 20 numbers y.
2. Each number is rounded to the median of its Gaussian quantile bin; five bins form a code, 20 form four.
3. A transformer embeds the symbols (codes, colour, box) of one grid as z, on the sphere of radius sqrt(D).
4. A predictor estimates z of the answer from z of the demonstrations (in, out) and of a given grid.
5. Both are trained together; gradients flow through both the prediction and the target:

    loss = (1 - lam) * mean |z_hat - z|^2 / D  +  lam * (SIGReg(z) + SIGReg(y))

SIGReg(y) tests the five numbers of each code against N(0, I), under which all codes are equally likely.
SIGReg(z) is its pairwise form at one high frequency, a uniformity loss: each answer repels its neighbours in
the batch and in a memory of earlier ones. No teacher, stop-gradient or codebook; averaged weights in eval.

    B windows (K demonstrations, given, answer)   G grids   U distinct shapes   R packed rows of L slots
    W width   D embedding width   P pooled width   m numbers behind an object's codes   C codes of an object
    V views   N samples of a view   Q embeddings in the memory   M directions   T frequencies   n items

    python lejepa.py [--run FOLDER] [--resume] [--profile]     train, evaluate on unseen tasks, leave a record

The default run takes minutes on two CPU cores; README.md has its results. As a library:

    from arc_data import TaskSet, load_tasks
    from lejepa import Config, build, make_optimizers, resolve_defaults, train
    tasks = load_tasks("tasks")                   # a folder of ARC tasks, ID.json
    cfg = resolve_defaults(Config(steps=20, batch_size=48))
    model = build(cfg).to(cfg.device)
    train(model, make_optimizers(model, cfg), TaskSet(tasks, cfg.device, cfg.demonstrations), cfg)
    (in1, out1), (in2, out2) = next(iter(tasks.values())).train[:2]
    z_hat = model.eval().predict([(in1, out1, in2)])              # (1, D)
    distance = (z_hat - model.embed([out2])).norm()
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C during the slow imports ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import copy
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from arc_data import BYTES, SIDE, Batch, Grids, TaskSet, TokenTable
from arc_data import flatten_pairs, unique_grids, validate_contexts, validate_grids

# ------------------------------------------------------------------------------------------------ 1 Config

class Size(NamedTuple):
    """The settings that depend on --size. The method is the same in all sizes."""
    width: int
    heads: int
    encoder_layers: int
    predictor_layers: int
    pooled: int                # width of a token before pooling
    hidden: int                # hidden width of the projector and of the predictor's head
    dim: int                   # D
    directions: int            # M
    steps: int
    batch_size: int
    lr: float


SIZES = {"small": Size(128, 4, 2, 2, 512, 512, 256, 1024, 500, 384, 3e-3),
         "base": Size(384, 6, 6, 4, 1536, 2048, 512, 1024, 1000, 1536, 2e-3),
         "large": Size(768, 12, 12, 6, 3072, 4096, 1024, 1024, 600, 3072, 1e-3)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of the command. None stands for a default that depends on the machine or on another flag."""
    data: Annotated[str, "SOURCE of training tasks: arcagi1:training, arcagi1:evaluation, arcagi2:training, "
                    "arcagi2:evaluation, a folder or file; several joined by commas"] = "arcagi2:training"
    validate: Annotated[str | None, "SOURCE of validation tasks, or dev: tasks with sha1(id) mod 5 = 0 "
                        "(default: arcagi1:evaluation; dev when --data is a path)"] = None
    run: Annotated[str | None, "folder of the run's record (default: runs/<time>-<size>-<objective>)"] = None
    size: Annotated[Literal["small", "base", "large"] | None, "size (default: base on a GPU)"] = None
    steps: Annotated[int | None, "training steps (default: the size's own)"] = None
    batch_size: Annotated[int | None, "windows in a batch, at least six of a task (default: by size)"] = None
    lr: Annotated[float | None, "learning rate after the warm-up (default: the size's own)"] = None
    weight_decay: Annotated[float, "decoupled weight decay of matrices"] = 0.5
    demonstrations: Annotated[int, "K: a training window shows 1 to K demonstrations"] = 2
    lam: Annotated[float, "weight of SIGReg; 1 - lam is the weight of the prediction"] = 0.5
    memory: Annotated[int, "earlier targets in SIGReg(z)'s sample; 0: SIGReg(z) as published"] = 1024
    seed: Annotated[int, "seed of weights, batches and directions"] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: cuda if there is one; mps: fp32"] = "auto"
    dtype: Annotated[Literal["bf16", "fp32"], "bf16 (autocast, fp32 weights) or fp32"] = "bf16"
    compile: Annotated[bool | None, "run torch.compile on the model (default: on a GPU only)"] = None
    resume: Annotated[bool, "continue the run in --run"] = False
    profile: Annotated[bool, "trace the training step into <run>/profile/ and stop"] = False
    stop_on_alert: Annotated[bool, "end the run with exit status 3 when an alert trips"] = False
    code: Annotated[Literal["gaussian", "ema", "none", "vq", "gradient", "gumbel", "fsq"],
                    "quantizer; the others are for comparison"] = "gaussian"
    objective: Annotated[Literal["lejepa", "infonce", "relational", "sum", "broken"], "loss"] = "lejepa"
    context: Annotated[Literal["analogy", "transformer", "mean", "last", "attention", "gru"],
                       "predictor of the answer's z"] = "analogy"
    preset: Annotated[str | None, "use the settings of a recorded run: sixth, no-vq, ... (legacy.py)"] = None
    legacy: Annotated[str | None, "NAME=VALUE,...: change settings of a recorded run (legacy.py)"] = None
    faithful: Annotated[bool, "turn on the faults of the recorded runs too"] = False


def resolve_defaults(cfg: Config) -> Config:
    """The Config for this machine: size, device, steps, batch size, rate and compilation are known."""
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = cfg.size or ("base" if device == "cuda" else "small")
    defaults = SIZES[size]._asdict() | {"compile": device == "cuda"}
    missing = [name for name in ("steps", "batch_size", "lr", "compile") if getattr(cfg, name) is None]
    return dataclasses.replace(cfg, device=device, size=size, **{name: defaults[name] for name in missing})

# --------------------------------------------------------------------------------------------- 2 Objective

KNOTS, DT = 17, 3 / 16                         # published: frequencies t_k = k DT on [0, 3]
LOCAL_T2 = 20.0                                # t^2 of SIGReg(z): the kernel of a pair is exp(-10 d^2 / D)


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """How far embeddings are from N(0, I): the Epps-Pulley statistic, averaged over random directions.

    z           (V, N, D) or (N, D)  embeddings; each of the V views is tested on its own N samples
    directions  (D, M)               unit columns, drawn anew at every step
    returns     scalar               1.0525 on average for N(0, I), whatever N and D; 0.402 N if all are 0

    Half types are raised to fp32. Raises ValueError for a view of one sample or shapes that do not match.
    Source: arXiv:2511.08544, at its authors' frequencies, mean over V and M. Its evaluation is ours.
    """
    if z.ndim not in (2, 3) or z.shape[-2] < 2 or directions.ndim != 2 or z.shape[-1] != directions.shape[0]:
        raise ValueError("sigreg takes z (V, N, D) or (N, D) of at least 2 samples and directions (D, M), "
                         f"not {tuple(z.shape)} and {tuple(directions.shape)}")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        x = directions.to(z.dtype).T @ z.view(-1, *z.shape[-2:]).transpose(1, 2)               # (V, M, N)
        t = torch.arange(1, KNOTS, dtype=z.dtype, device=z.device) * DT        # (T,); at t = 0 the error is 0
        phi = torch.exp(-t.square() / 2)               # the characteristic function of N(0, 1)
        weight = 2 * DT * phi                                                  # the window; 2: for -t as well
        weight[-1] /= 2                                                        # the trapezoid rule
        return EppsPulley.apply(x.flatten(0, 1), t, phi, weight).mean()


def local_sigreg(z: Tensor, memory: Tensor, filled: Tensor) -> Tensor:
    """SIGReg at one high frequency t, as a uniformity loss: the mean log density around each embedding.

    z        (N, D)  embeddings of length sqrt(D); gradients flow into both members of a pair
    memory   (Q, D)  earlier embeddings, without gradient; the first `filled` (0-d) rows are used
    returns  scalar  2 - a soft minimum of |z_i - z_j|^2 / D: 2 if collapsed, t^2 / D for a uniform sphere

        2 + (2 / t^2) mean_i log mean_j exp(-t^2 |z_i - z_j|^2 / 2 D),   j over batch and memory without i

    Averaged over all directions, the Epps-Pulley statistic at t tends to this kernel's mean over pairs, up to
    constants (large D, equal lengths). Dense regions dominate it; the logarithm weighs all samples alike.
    It is uniformity (arXiv:2005.10242) with the logarithm in the mean, or the denominator of InfoNCE for z.
    """
    column = torch.arange(len(z) + len(memory), device=z.device)
    squared = 2 - 2 * z @ torch.cat([z, memory]).T / z.shape[1]                # (N, N + Q): d^2 / D
    unused = (column >= len(z) + filled) | torch.eye(*squared.shape, dtype=torch.bool, device=z.device)
    kernel = (-LOCAL_T2 / 2 * squared).masked_fill(unused, -1e4)  # finite where nothing is left
    return 2 + 2 / LOCAL_T2 * (kernel.logsumexp(1) - torch.log((len(z) - 1 + filled).clamp(min=1))).mean()


def pool_means(means: Tensor, count: int) -> tuple[Tensor, int]:
    return means, count                                # of this process; harness/distributed.py replaces it


class EppsPulley(torch.autograd.Function):
    """N * sum_k w_k [(mean cos t_k x - phi_k)^2 + (mean sin t_k x)^2] of samples x (V M, N) -> (V M,).

    As t_k = k t_1, all cosines and sines follow from one of each by angle addition, and so does the gradient,
    2 sum_k w_k t_k [S_k cos t_k x - (C_k - phi_k) sin t_k x], C and S being the two means. Eager code
    multiplies complex numbers in place; the compiler does not support them and fuses `multiples` instead.
    """

    @staticmethod
    def forward(ctx, x, t, phi, weight):
        if torch.compiler.is_compiling():
            means = torch.stack([torch.stack([f.mean(1) for f in fs], 1) for fs in multiples(x, t)], 2)
        else:
            means = torch.cat([wave_means(rows, t) for rows in x.split(chunk_rows(x))])
        means, count = pool_means(means, x.shape[1])
        error = means - torch.stack([phi, torch.zeros_like(phi)], 1)           # (V M, T, 2): C - phi and S
        ctx.save_for_backward(x, t, (weight * t)[:, None] * error)
        return count * (weight[:, None] * error.square()).sum((1, 2))

    @staticmethod
    def backward(ctx, grad):
        x, t, factors = ctx.saved_tensors
        of_sin, of_cos = factors.unbind(2)  # (V M, T): the error C - phi multiplies sin, S multiplies cos
        if torch.compiler.is_compiling():
            waves = zip(of_cos.T[..., None], of_sin.T[..., None], *multiples(x, t))
            return 2 * grad[:, None] * sum(a * cos - b * sin for a, b, cos, sin in waves), None, None, None
        dx, factors = torch.empty_like(x), 2 * grad[:, None] * torch.complex(of_cos, of_sin)
        for rows, factor, result in zip(*(part.split(chunk_rows(x)) for part in (x, factors, dx))):
            wave = torch.complex(torch.cos(t[0] * rows), torch.sin(t[0] * rows))
            total = factor[:, -1, None] * wave
            for k in reversed(range(len(t) - 1)):      # Horner's rule
                total.add_(factor[:, k, None]).mul_(wave)
            result.copy_(total.real)
        return dx, None, None, None


def chunk_rows(x: Tensor) -> int:                      # as many as fit in a CPU's cache; all of them on a GPU
    return len(x) if x.is_cuda else max(1, (1 << 18) // x.shape[1])


def wave_means(x: Tensor, t: Tensor) -> Tensor:
    """Means of cos(t_k x) and sin(t_k x) over samples x (n, N) -> (n, T, 2), as powers of exp(i t_1 x)."""
    wave = torch.complex(torch.cos(t[0] * x), torch.sin(t[0] * x))
    power, means = wave.clone(), [wave.mean(1)]
    for _ in range(1, len(t)):
        means.append(power.mul_(wave).mean(1))
    return torch.view_as_real(torch.stack(means, 1))


def multiples(x: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """cos(t_k x) and sin(t_k x) of each k, for the compiler, by recurrence over k - 4: short chains fuse."""
    cos, sin = [torch.ones_like(x), torch.cos(t[0] * x)], [torch.zeros_like(x), torch.sin(t[0] * x)]
    for k in range(2, 5):
        cos.append(cos[k - 1] * cos[1] - sin[k - 1] * sin[1])
        sin.append(sin[k - 1] * cos[1] + cos[k - 1] * sin[1])
    for k in range(5, len(t) + 1):                     # f(k) = 2 cos(t_4 x) f(k - 4) - f(k - 8)
        cos.append(2 * cos[4] * cos[k - 4] - cos[abs(k - 8)])
        sin.append(2 * cos[4] * sin[k - 4] - (sin[k - 8] if k >= 8 else -sin[8 - k]))
    return cos[1:], sin[1:]


def draw_directions(dim: int, count: int, cfg: Config, step: int) -> Tensor:
    """(dim, count) unit columns, a function of seed and step alone on each kind of device."""
    generator = torch.Generator(cfg.device).manual_seed((cfg.seed * 1_000_003 + step) ^ (dim << 40))
    return F.normalize(torch.randn(dim, count, generator=generator, device=cfg.device), dim=0)


class LeJEPALoss(nn.Module):
    """The objective. Another objective is a module that has compute_loss and readout too."""
    def __init__(self, model, cfg: Config):
        super().__init__()
        self.register_buffer("memory", torch.zeros(cfg.memory, SIZES[cfg.size].dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def compute_loss(self, model, batch: Batch, z, z_hat, y, directions, code_directions, lam: float):
        """Loss, terms. code_directions (m / C, M / 4) are for y, directions (D, M) for z if memory is 0."""
        prediction = (z_hat - z[batch.index[:, -1]]).square().mean()  # gradient into prediction and target
        sigreg_z = self.regularise_embeddings(z, z[batch.targets], directions)
        sample = y[batch.object_sample]  # (N, m): a random sample of the batch's distinct shapes
        sigreg_y = model.in_use[0].quantizer.regulariser(sample, code_directions)
        loss = (1 - lam) * prediction + lam * (sigreg_z + sigreg_y)
        return loss, {"prediction": prediction, "sigreg_z": sigreg_z, "sigreg_y": sigreg_y}

    def regularise_embeddings(self, z: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        """SIGReg(z) of the targets (N, D), which then enter the memory; of all z (G, D) without a memory."""
        if len(self.memory) == 0:
            return sigreg(torch.stack([z[0::2], z[1::2]]), directions)  # two views: grids alternate in, out
        value = local_sigreg(targets, self.memory, self.filled)
        if self.training:
            self.memory.copy_(torch.cat([targets.detach(), self.memory])[:len(self.memory)])
            self.filled.add_(len(targets)).clamp_(max=len(self.memory))
        return value

    def readout(self, z: Tensor) -> Tensor:            # what evaluation compares, by Euclidean distance
        return z

# ------------------------------------------------------------------------------------------------- 3 Model

LEVELS = (4, 4, 4, 4, 3)                       # bins of each of a code's five numbers
CODE_SIZE = math.prod(LEVELS)                  # 768
CODES = 4                                      # C: codes of an object, 38 bits in all
DROPOUT = 0.1                                  # of what a transformer block adds


class GaussianQuantizer(nn.Module):
    """FSQ (arXiv:2309.15505) with bins that are equally likely under N(0, 1). Nothing is learned.

    Of n bins a number y is in bin floor(n * Phi(y)), and is read back as its median; y - y.detach() is 0 and
    carries the gradient (straight-through). Five numbers make one of 4 * 4 * 4 * 4 * 3 = 768 codes.
    """
    def __init__(self):
        super().__init__()
        radix = [math.prod(LEVELS[i + 1:]) for i in range(len(LEVELS))]
        self.register_buffer("levels", torch.tensor(LEVELS).repeat(CODES), persistent=False)   # (m,)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)                   # (m / C,)

    def forward(self, y: Tensor) -> Tensor:
        """y (U, m) -> (U, m): the median of each number's bin, with the gradient of y."""
        return torch.special.ndtri((self.level(y) + 0.5) / self.levels) + (y - y.detach())

    def level(self, y: Tensor) -> Tensor:
        """The bin of each number (..., m), int64. Clamped: Phi can round to 1, and nan has some bin too."""
        return torch.minimum((self.levels * torch.special.ndtr(y)).long().clamp(min=0), self.levels - 1)

    def indices(self, y: Tensor) -> Tensor:
        """y (U, m) -> codes (U, C), int64 in [0, 768)."""
        return (self.level(y).unflatten(-1, (CODES, len(LEVELS))) * self.radix).sum(-1)

    def regulariser(self, y: Tensor, directions: Tensor) -> Tensor:
        """SIGReg of y (N, m) as published; the numbers of each code (C, N, m / C) are one view."""
        return sigreg(y.unflatten(-1, (CODES, len(LEVELS))).transpose(0, 1), directions)


class Block(nn.Module):
    """Pre-norm attention and MLP; for short rows in bf16 on a CPU, 4 times as fast as torch's fused form."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """x (R, L, W) -> (R, L, W); bias (R, 1, L, L) is 0 where a slot attends to another, else -inf."""
        rows, slots, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, slots, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (R, heads, L, W / heads) each
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias          # (R, heads, L, L)
        attended = scores.softmax(-1).to(v.dtype) @ v                          # (R, heads, L, W / heads)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(rows, slots, width)))
        return x + self.drop(self.mlp(self.norm2(x)))                          # (R, L, W)


def embedding_head(inputs: int, size: Size) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, size.hidden), nn.BatchNorm1d(size.hidden), nn.GELU(),
                         nn.Linear(size.hidden, size.dim))


class ObjectHead(nn.Module):
    """Maps the bitmap of an object to y. It sees no colour, position or other object."""
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8 * BYTES, width), nn.GELU(), nn.Linear(width, 2 * width),
                                 nn.GELU(), nn.Linear(2 * width, CODES * len(LEVELS)))
        nn.init.normal_(self.mlp[0].weight, std=0.3)   # y starts near variance 1; SIGReg is flat far from it
        nn.init.normal_(self.mlp[-1].weight, std=3.2 * (2 * width) ** -0.5)
        self.register_buffer("shifts", torch.arange(7, -1, -1, dtype=torch.uint8), persistent=False)

    def forward(self, grids: Grids) -> Tensor:
        """y (U, m) of the distinct shapes."""
        bits = ((grids.bits[:, :, None] >> self.shifts) & 1).flatten(1).float()                # (U, 8 BYTES)
        return self.mlp(bits).float()                                                          # (U, m)


class Encoder(nn.Module):
    """Quantizes shapes, runs a transformer over the symbols (codes, colour, box) of a grid, pools, projects.

    z is normalised to length sqrt(D), as N(0, I) has it; at length 1 the published SIGReg is nearly constant.
    Without the normalisation the encoder lowers the error by shrinking the embeddings of hard grids.
    """
    NESTED = 0.25                              # nested dropout: share of shapes that lose their last codes

    def __init__(self, size: Size, quantizer: nn.Module):
        super().__init__()
        width = size.width
        self.codes_kept = CODES                        # codes read in eval mode, 1 to C
        self.objects, self.quantizer = ObjectHead(width), quantizer
        self.symbol, self.colour = nn.Linear(CODES * len(LEVELS), width), nn.Embedding(10, width)
        self.box = nn.Embedding(6 * (SIDE + 1), width)  # top, left, height, width, bottom, right
        self.whole = nn.Parameter(torch.randn(width) * 0.02)
        self.widen_symbols = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.pooled // 2), nn.GELU())
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.encoder_layers))
        self.widen = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size.pooled), nn.GELU())
        self.projector = embedding_head(5 * size.pooled, size)
        self.widths = {"pooled": 5 * size.pooled, "z": size.dim}
        nn.init.normal_(self.colour.weight, std=0.5)
        nn.init.normal_(self.box.weight, std=0.1)
        self.register_buffer("tables", torch.arange(6) * (SIDE + 1), persistent=False)

    def forward(self, grids: Grids, layer: str = "z") -> tuple[Tensor, Tensor]:
        """z (G, D) of the grids, or the projector's input (G, 5 P); y (U, m) of their distinct shapes."""
        with record_function("code"):
            y = self.objects(grids)
            code = self.drop_codes(self.quantizer(y))
        with record_function("encoder"):
            x = self.encode_symbols(code, grids)
            if layer == "z":
                z = self.projector(x).float()
                x = F.rms_norm(z, z.shape[-1:], eps=1e-6)                      # |z|^2 = D
            return x, y

    def drop_codes(self, code: Tensor) -> Tensor:
        """Zeroes the last codes of code (U, m), so that the first code alone is a coarse symbol."""
        kept, number = self.codes_kept, torch.arange(code.shape[1], device=code.device) // len(LEVELS)
        if self.training:
            draw = torch.rand(len(code), 2, device=code.device)
            fewer = 1 + ((CODES - 1) * draw[:, 1:]).long()                                     # (U, 1)
            kept = torch.where(draw[:, :1] < self.NESTED, fewer, CODES)
        return code * (number < kept)

    def encode_symbols(self, code: Tensor, grids: Grids) -> Tensor:
        """(G, 5 P) from codes (U, m), colours and boxes. Tokens attend to those of their own grid."""
        edges = torch.cat([grids.box, grids.box[..., :2] + grids.box[..., 2:]], -1)            # (R, L, 6)
        x = F.embedding(grids.object_id, self.symbol(code))                                    # (R, L, W)
        x = x + self.colour(grids.colour) + self.box(edges + self.tables).sum(-2)
        x.view(-1, x.shape[-1]).index_add_(0, grids.first, self.whole.expand(len(grids.first), -1))
        symbols = self.widen_symbols(x)                                                        # (R, L, P / 2)
        same_grid = grids.grid[:, None, :, None] == grids.grid[:, None, None, :]               # (R, 1, L, L)
        bias = torch.where(same_grid, 0.0, -math.inf)
        for block in self.blocks:
            x = block(x, bias)                                                                 # (R, L, W)
        return self.pool(self.widen(x).float().flatten(0, 1), symbols.float().flatten(0, 1), grids)

    def pool(self, x: Tensor, symbols: Tensor, grids: Grids) -> Tensor:
        """(G, 5 P): whole-grid token, maximum of x (R L, P); mean, sum / (2 sqrt(n)) of x and symbols."""
        count, owner = len(grids.first), grids.grid.flatten()          # an empty slot has owner G
        both = torch.cat([x, symbols], 1)
        total = both.new_zeros(count + 1, both.shape[1]).index_add(0, owner, both)[:count]
        owners = owner[:, None].expand_as(x)
        highest = x.new_full((count + 1, x.shape[1]), -1e4).scatter_reduce(0, owners, x, "amax")[:count]
        tokens = grids.count[:, None].float()
        return torch.cat([x[grids.first], highest, total / tokens, total / tokens.sqrt() / 2], 1)


class Predictor(nn.Module):
    """z_hat: the analogy z(given) + mean over demonstrations of z(out) - z(in), plus a learned correction."""
    def __init__(self, size: Size):
        super().__init__()
        self.role = nn.Parameter(torch.randn(3, size.width) * 0.1)
        self.token, self.query = nn.Linear(size.dim, size.width), nn.Linear(3 * size.dim, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.predictor_layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = embedding_head(size.width, size)
        nn.init.zeros_(self.head[-1].weight)                           # training starts from the analogy
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, z: Tensor, shown: Tensor | None = None) -> Tensor:
        """z (B, 2 K + 1, D) of in1, out1, ..., given; shown (B, K) bool, by default all -> z_hat (B, D)."""
        given, count = z[:, -1:], z.shape[1] // 2
        shown = z.new_ones(len(z), count, dtype=torch.bool) if shown is None else shown
        pairs = z[:, :-1].unflatten(1, (count, 2))                                     # (B, K, 2, D)
        triples = self.query(torch.cat([pairs.flatten(2), given.expand(-1, count, -1)], 2))  # (B, K, W)
        tokens = (self.token(pairs) + self.role[:2]).flatten(1, 2)                     # (B, 2 K, W)
        x = torch.cat([triples, tokens, self.token(given) + self.role[2]], 1)          # (B, 3 K + 1, W)
        seen = torch.cat([shown, shown.repeat_interleave(2, 1), shown.new_ones(len(z), 1)], 1)
        bias = torch.where(seen, 0.0, -math.inf)[:, None, None]
        for block in self.blocks:
            x = block(x, bias)
        share = shown[..., None] / shown.sum(1)[:, None, None]                         # (B, K, 1)
        change = (share * (pairs[:, :, 1] - pairs[:, :, 0])).sum(1)                    # (B, D)
        x = (share * self.norm(x[:, :count])).sum(1)                                   # (B, W)
        return given[:, 0] + change + self.head(x).float()


class LeJEPA(nn.Module):
    """Encoder and predictor: forward takes a batch, the rest lists of grids; averaged weights in eval."""
    CHUNK = 512                                # grids of an encoder call; a predictor call reads 3 CHUNK

    def __init__(self, cfg: Config):
        super().__init__()
        size = SIZES[cfg.size]
        self.encoder, self.predictor = Encoder(size, QUANTIZERS[cfg.code](cfg)), PREDICTORS[cfg.context](size)
        self.objective = OBJECTIVES[cfg.objective](self, cfg)
        parts = {"encoder": self.encoder, "predictor": self.predictor}
        self.averaged = nn.ModuleDict(copy.deepcopy(parts)).requires_grad_(False)

    @property
    def in_use(self) -> tuple[nn.Module, nn.Module]:   # trained parts in training, averaged ones in eval mode
        holder = self if self.training else self.averaged
        return holder.encoder, holder.predictor

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """z (G, D) of the grids, z_hat (B, D) of windows, y (U, m) of shapes; batch.index points into z."""
        encoder, predictor = self.in_use
        z, y = encoder(batch.grids)
        with record_function("predictor"):
            return z, predictor(F.embedding(batch.index[:, :-1], z), batch.shown), y

    @torch.no_grad()
    def embed(self, grids: list, layer: str = "z") -> Tensor:
        """z (n, D) of 2-D integer arrays or nested lists; layer="pooled": the projector's input, (n, 5 P)."""
        if layer not in self.encoder.widths:
            raise ValueError(f"embed gives layer z or pooled, not {layer!r}")
        x = self._encode(validate_grids(grids), layer)
        return self.objective.readout(x) if layer == "z" else x

    @torch.no_grad()
    def codes(self, grids: list) -> list[tuple[Tensor, Tensor]]:
        """Codes (n, C) and boxes (n, 4: top, left, height, width) of each grid; item 0 is the whole grid."""
        (encoder, _), found = self.in_use, []
        for chunk in self._chunks(validate_grids(grids)):
            codes = encoder.quantizer.indices(encoder.objects(chunk))                          # (U, C)
            codes = codes[chunk.object_id].flatten(0, 1).cpu()
            boxes = chunk.box.flatten(0, 1).cpu()
            for first, count in zip(chunk.first.tolist(), chunk.count.tolist()):
                found.append((codes[first:first + count], boxes[first:first + count]))
        return found

    @torch.no_grad()
    def predict(self, contexts: list) -> Tensor:
        """z_hat (n, D) of contexts (in1, out1, ..., ink, outk, given), each with its own k >= 1."""
        contexts = validate_contexts(contexts)
        grids, index = unique_grids([grid for context in contexts for grid in context])
        (_, predictor), lengths = self.in_use, [len(context) for context in contexts]
        z = self._encode(grids)
        rows = torch.tensor(index, device=z.device).split(lengths)
        z_hat = z.new_empty(len(contexts), z.shape[1])
        for length in set(lengths):                    # contexts of one length at a time
            where = [i for i in range(len(contexts)) if lengths[i] == length]
            step = max(1, 3 * self.CHUNK // length)
            for part in (where[i:i + step] for i in range(0, len(where), step)):
                z_hat[part] = predictor(z[torch.stack([rows[i] for i in part])])
        return self.objective.readout(z_hat)

    @torch.no_grad()
    def rank(self, demonstrations: list, given, candidates: list) -> Tensor:
        """Scores (n,) of candidate answers, higher is likelier: minus the squared distance to z_hat."""
        z_hat = self.predict([[*flatten_pairs(demonstrations), given]])                # (1, D)
        return -(self.embed(validate_grids(candidates, "candidate {}".format)) - z_hat).square().sum(1)

    def _encode(self, grids: list[np.ndarray], layer: str = "z") -> Tensor:
        encoder, predictor = self.in_use
        found = [encoder(chunk, layer)[0] for chunk in self._chunks(grids)]
        return torch.cat(found) if found else predictor.role.new_empty(0, encoder.widths[layer])

    def _chunks(self, grids: list[np.ndarray]):
        table = TokenTable(grids, self.predictor.role.device, turned=False) if grids else None
        for first in range(0, len(grids), self.CHUNK):
            yield table.pack_grids(np.arange(first, min(first + self.CHUNK, len(grids))))


def build(cfg: Config) -> LeJEPA:                      # with the weights of its seed, on the CPU
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return LeJEPA(cfg)

# --------------------------------------------------------------------------------------------- 4 Optimizer

WARMUP = 50                                    # steps to the full learning rate, which then stays constant
AVERAGING_FRACTION = 0.1  # the last tenth of the steps has two thirds of the weight in the averaged weights
CLIP = 10.0                                    # gradient norm above which a gradient is scaled down


def make_optimizers(model: nn.Module, cfg: Config) -> list:
    """Muon for matrices, AdamW for embeddings, biases and gains. Muon's step is scaled to AdamW's RMS."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_table = any(word in name for word in ("colour", "box", "role"))
            (matrices if p.ndim == 2 and not is_table else others).append(p)
    muon = torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


@torch.no_grad()
def update_average(model: LeJEPA, step: int):
    """Moves the averaged weights towards those after `step`: polynomial-decay averaging, arXiv:1212.1824."""
    share = 1 / (1 + AVERAGING_FRACTION * step)
    trained, averages = model.state_dict(), model.averaged.state_dict()
    numbers = [name for name, value in averages.items() if value.is_floating_point()]
    torch._foreach_lerp_([averages[name] for name in numbers], [trained[name] for name in numbers], share)
    for name in averages.keys() - numbers:             # counters
        averages[name].copy_(trained[name])

# ---------------------------------------------------------------------------------------------- 5 Training

def batch_loss(model, batch: Batch, step: int, cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its terms. SIGReg and the loss are computed in fp32, outside autocast."""
    size = SIZES[cfg.size]
    with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bf16"):
        z, z_hat, y = model(batch)
    with record_function("sigreg"):
        directions = draw_directions(size.dim, size.directions, cfg, step)
        code_directions = draw_directions(len(LEVELS), size.directions // 4, cfg, step)
        return model.objective.compute_loss(model, batch, z, z_hat, y, directions, code_directions, cfg.lam)


def train_step(model, optimizers, batch: Batch, step: int, cfg: Config) -> dict[str, Tensor]:
    """Forward, loss, backward, clip, optimizers, averaged weights. Returns 0-d tensors, without a wait."""
    torch.manual_seed(cfg.seed * 1_000_003 + step)  # dropout too is a function of seed and step
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / WARMUP)
    loss, terms = batch_loss(model, batch, step, cfg)
    loss.backward()
    with record_function("optimizer"):
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)  # the norm before clipping
        for optimizer in optimizers:
            optimizer.step()
        update_average(model, step)
    return {name: value.detach() for name, value in {"loss": loss, **terms, "grad_norm": grad_norm}.items()}


def train(model, optimizers, data: TaskSet, cfg: Config, start: int = 0, after_step=None) -> int:
    """Trains to cfg.steps, or until after_step(steps done, metrics, batch) is true. Returns steps done."""
    model.train()
    for step in range(start, cfg.steps):
        with record_function("data"):
            batch = data.batch(cfg.batch_size, cfg.seed, step)  # a function of (seed, step): a run can resume
        metrics = train_step(model, optimizers, batch, step, cfg)
        if after_step is not None and after_step(step + 1, metrics, batch):
            return step + 1
    return cfg.steps

# ----------------------------------------------------------------------------------------------- 6 Loading

def checkpoint_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict, Path]:
    """Tensors, metadata and path of last.safetensors; of previous.safetensors if the last one is damaged."""
    problems = []
    for path in (folder / "last.safetensors", folder / "previous.safetensors"):
        try:
            if not path.is_file():
                raise ValueError("not a regular file" if path.exists() else "no such file")
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # not the mapped file
                metadata = dict(file.metadata() or {})
            if metadata.pop("sha256", "") != checkpoint_digest(tensors, metadata):
                raise ValueError("damaged, or not written by this program: its SHA-256 does not match")
            if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
                raise ValueError(f"{bad[0]} holds nan or inf")
            metadata = {name: json.loads(text) for name, text in metadata.items()}
        except (OSError, RuntimeError, ValueError, TypeError, safetensors.SafetensorError) as error:
            problems.append(f"{path}: {error}")
            continue
        if problems:
            print(f"{problems[0]}; continuing from {path}, step {metadata.get('step')}", file=sys.stderr)
        return tensors, metadata, path
    raise ValueError(f"no readable checkpoint ({'; '.join(problems)}); train again in another --run folder")


def load_run(path) -> tuple[LeJEPA, Config]:
    """The model of a run's folder (averaged weights alone), frozen, in eval mode, on the CPU; its Config."""
    tensors, found, _ = read_checkpoint(Path(path))
    try:
        cfg = Config(**found["config"])
        model = build(cfg)
        for name, value in model.averaged.state_dict(prefix="model.averaged.").items():
            if (value.dtype, value.shape) != (tensors[name].dtype, tensors[name].shape):
                raise ValueError(f"{name} is not {value.dtype} {tuple(value.shape)}")
            value.copy_(tensors[name])
    except (ImportError, TypeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: of another version of lejepa.py: {error}") from None
    return model.eval().requires_grad_(False), cfg

# --------------------------------------------------------------------------------------------------------
# The method ends here. What follows is kept for comparison.
# ------------------------------------------------------------------------------------------------ 7 Legacy


class NoQuantizer(nn.Module):
    """No bottleneck: y is passed on unchanged and is not regularised."""
    def forward(self, y: Tensor) -> Tensor:
        return y

    def indices(self, y: Tensor) -> Tensor:
        return torch.zeros(len(y), 0, dtype=torch.int64, device=y.device)

    def regulariser(self, y: Tensor, directions: Tensor) -> Tensor:
        return y.new_zeros(())


class EMAQuantizer(nn.Module):
    """VQ-VAE codebooks, one for each code: moving averages of their members, started from the first batch.

    They see distinct objects only and do not move in evaluation. Source: arXiv:1711.00937, appendix A.1.
    """

    def __init__(self, lam: float, commitment=0.25, decay=0.99, size=CODE_SIZE, codes=CODES):
        super().__init__()
        self.weight, self.decay, self.size = commitment / max(lam, 1e-6), decay, size  # the loss has a lam
        self.register_buffer("vectors", torch.zeros(codes, size, CODES * len(LEVELS) // codes))
        self.register_buffer("members", torch.ones(codes, size))
        self.register_buffer("total", torch.zeros_like(self.vectors))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def split(self, y: Tensor) -> Tensor:
        return y.detach().float().unflatten(-1, (len(self.vectors), -1)).transpose(0, 1)       # (C, U, m / C)

    def indices(self, y: Tensor) -> Tensor:
        return torch.cdist(self.split(y), self.vectors.detach()).argmin(-1).T                  # (U, C)

    def read(self, chosen: Tensor) -> Tensor:
        return self.vectors[torch.arange(len(self.vectors), device=chosen.device), chosen].flatten(1)

    def forward(self, y: Tensor) -> Tensor:
        if self.training:
            rows = torch.linspace(0, len(y) - 1, self.size, device=y.device).long()
            for start in (self.vectors.data, self.total):
                start.copy_(torch.where(self.started, start, self.split(y)[:, rows]))
            self.started.fill_(True)
        chosen = self.indices(y)
        mean = self.read(chosen).detach()
        if self.training:
            self.update_codebook(y, chosen)
        return mean + (y - y.detach())

    @torch.no_grad()
    def update_codebook(self, y: Tensor, chosen: Tensor):
        entry = torch.arange(self.size, device=y.device)[:, None]
        one_hot = (chosen.T[:, None] == entry).float()                                         # (C, 768, U)
        self.members.lerp_(one_hot.sum(-1), 1 - self.decay)
        with torch.autocast(y.device.type, enabled=False):
            self.total.lerp_(one_hot @ self.split(y), 1 - self.decay)
        self.vectors.copy_(self.total / self.members.clamp(min=1e-5)[..., None])

    def regulariser(self, y: Tensor, directions: Tensor) -> Tensor:
        """Commitment: the squared distance of y to its vector, at weight 0.25 in the loss whatever lam is."""
        return self.weight * (y - self.read(self.indices(y)).detach()).square().mean()


class InfoNCE(nn.Module):
    """Contrastive prediction: z_hat is compared with the batch's outputs and a queue of earlier ones.

    Targets come from a moving average (0.99) of the encoder; the temperature is learned inside a range;
    embeddings are normalised. Sources: arXiv:1807.03748 (loss), arXiv:1911.05722 (queue, average).
    """
    QUEUE, DECAY = 8192, 0.99

    def __init__(self, model, cfg: Config, temperature=0.1, coldest=0.05, warmest=0.20):
        super().__init__()
        self.target = copy.deepcopy(model.encoder).requires_grad_(False)
        self.target.NESTED = 0.0                       # targets have all codes and no dropout noise
        for block in self.target.blocks:
            block.drop.p = 0.0
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.range = coldest, warmest
        self.register_buffer("queue", torch.zeros(self.QUEUE, SIZES[cfg.size].dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def targets(self, batch: Batch, model) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D) of the batch's targets by the averaged encoder; each window's target (B,)."""
        if self.training:
            self.target.quantizer.training = False     # its codebook is averaged too, and follows no input
            share = torch.where(self.filled > 0, 1 - self.DECAY, 1.0)
            parts = ([*part.parameters(), *part.quantizer.buffers()] for part in (self.target, model.encoder))
            for average, now in zip(*parts):
                average.lerp_(now, share) if now.is_floating_point() else average.copy_(now)
        own = torch.searchsorted(batch.targets, batch.index[:, -1].contiguous())
        return F.normalize(self.target(batch.grids)[0][batch.targets].float(), dim=-1), own

    def compute_loss(self, model, batch: Batch, z, z_hat, y, directions, code_directions, lam: float):
        keys, own = self.targets(batch, model)
        temperature = self.log_temperature.exp().clamp(*self.range)
        unused = torch.arange(len(keys) + self.QUEUE, device=keys.device) >= len(keys) + self.filled
        logits = F.normalize(z_hat, dim=-1) @ torch.cat([keys, self.queue]).T / temperature
        logits = logits.masked_fill(unused, -math.inf)
        if self.training:
            self.queue[(self.filled + torch.arange(len(keys), device=keys.device)) % self.QUEUE] = keys
            self.filled += len(keys)
        terms = {"prediction": F.cross_entropy(logits, own), "sigreg_z": z.new_zeros(())}
        terms["sigreg_y"] = model.in_use[0].quantizer.regulariser(y[batch.object_sample], code_directions)
        loss = (1 - lam) * terms["prediction"] + lam * terms["sigreg_y"]
        return loss, terms | {"temperature": temperature}

    def readout(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)


def relational(a: Tensor, b: Tensor) -> Tensor:
    """Mean square difference of the squared distances inside a (..., S, D) and inside b: grows as scale^4."""
    return (torch.cdist(a, a).square() - torch.cdist(b, b).square()).square().mean()


class Relational(LeJEPALoss):
    """LeJEPA plus 0.05 times `relational` of the batch's predictions and of their targets."""

    def compute_loss(self, model, batch: Batch, z, z_hat, y, directions, code_directions, lam: float):
        loss, terms = super().compute_loss(model, batch, z, z_hat, y, directions, code_directions, lam)
        term = relational(*(x / z.shape[1] ** 0.5 for x in (z_hat, z[batch.index[:, -1]])))
        return loss + 0.05 * term, terms | {"relational": term}


class Variants(dict):
    """A table by name. What is not in it stands in legacy.py, which nothing else imports."""

    def __missing__(self, name: str):
        import legacy
        return legacy.VARIANTS[name]


QUANTIZERS = Variants(gaussian=lambda cfg: GaussianQuantizer(), ema=lambda cfg: EMAQuantizer(cfg.lam),
                      none=lambda cfg: NoQuantizer())
OBJECTIVES = Variants(lejepa=LeJEPALoss, infonce=InfoNCE, relational=Relational)
PREDICTORS = Variants(analogy=Predictor)
RECIPES = Variants(method=lambda cfg: (TaskSet, make_optimizers, (math.inf, 0.0)))  # and early stopping

# -------------------------------------------------------------------------------------------------- 8 Main

def main():
    import harness.run                                 # flags, folders, checkpoints, logs and signals
    harness.run.main()


if __name__ == "__main__":
    main()
