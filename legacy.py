"""The recorded runs that this project answers: their losses, codes, contexts and schedules, as presets.

    python lejepa.py --preset gentle --faithful --legacy unit=no          a recorded run, one fault turned off

Source: runs of arc-jepa-rl, 2025-12, by their logs and code, on this project's data and sizes. Their steps
(95 an epoch) and epochs are scaled to --steps. Their target offset is 1 here: pairs of a task have no order,
so a larger one means nothing. Letters as in lejepa.py; K entries of a codebook, S slots of objects.
"""
import dataclasses
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lejepa
from arc_data import BYTES, SIDE, Batch, Grids, Task, TaskSet, pairs_of, tokenise, turn_boxes
from lejepa import CODES, EMAQuantizer, GaussianQuantizer, InfoNCE, LeJEPALoss

EPOCH = 95                                             # steps of the recorded runs in an epoch
# ------------------------------------------------------------------------------------------------ settings
OFF = ("no", "yes")
SETTINGS = {  # of --legacy, by what reads them: name and default, which is the first of several words
    "--objective sum": {
        "sigreg_z": 0.1, "relational": 0.0, "context_self": 0.0, "next_frame": 0.0,   # weights of its terms
        "colour": 0.0, "translation": 0.0, "symmetry": 0.0, "masked": 0.0,            # of its invariances
        "balance": ("fixed", "gradnorm", "uncertainty"),
        "temperature": 0.07, "coldest": 0.05, "warmest": 0.2},
    "relational and context_self": {"normalised": OFF, "matching": ("slot", "set")},
    "--objective broken": {"target": ("trained", "averaged", "stopped"), "margin": 0.0},
    "--objective sum and broken": {"unit": OFF, "relu": OFF, "shapeless": OFF, "training_mode": OFF},
    "--objective sum and broken with --code vq": {"padding": OFF},
    "--code vq, gradient and gumbel": {"size": ("768", "384", "256"), "codes": ("1", "2", "4"),
                                       "commitment": 0.25, "vq_loss": ("used", "none", "swapped")},
    "--code vq": {"decay": 0.99, "start": ("data", "cold"), "refresh": 0}, "refresh": {"threshold": 0.01},
    "every run": {"optimizer": ("muon", "adam"), "curriculum": OFF, "patience": 0, "same_grid": OFF,
                  "recolour": OFF, "scaling": OFF, "epochs": 80},
    "patience": {"min_delta": 0.003}, "optimizer=adam": {"warmup": 1000, "clip": 0.5}}
DEFAULTS = {name: default for group in SETTINGS.values() for name, default in group.items()}
POSITIVE = ("temperature", "coldest", "warmest", "epochs", "clip")
READERS = {name: reader for reader, group in SETTINGS.items() for name in group}
FAULTS = ("unit", "relu", "shapeless", "training_mode", "padding", "vq_loss", "same_grid", "recolour")
READ = set()                                           # the settings that were read, for `check`

def parse(text: str | None) -> dict:
    """The values in NAME=VALUE,...; ValueError for one that is no setting."""
    values = {}
    for part in text.split(",") if text else ():
        name, _, word = part.partition("=")
        if name not in DEFAULTS:
            raise ValueError(f"--legacy {part}: there is no such setting; legacy.py lists them")
        default, words = DEFAULTS[name], DEFAULTS[name] if isinstance(DEFAULTS[name], tuple) else ()
        number = r"\d+" if isinstance(default, int) else r"\d*\.?\d+(e-?\d+)?"
        if not (word in words if words else re.fullmatch(number, word)):
            raise ValueError(f"--legacy {part}: {name} takes {' or '.join(words) or 'a number from 0'}")
        values[name] = word if words else type(default)(word)
        low, high = 1e-6 if name in POSITIVE else 0, 1 if name == "decay" else 1e6
        if not words and not low <= values[name] <= high:
            raise ValueError(f"--legacy {part}: {name} takes a number from {low} to {high}")
    return values

def setting(cfg, name: str):
    """A setting as --legacy gives it, else a fault as --faithful gives it, else the default."""
    READ.add(name)
    words = DEFAULTS[name] if isinstance(DEFAULTS[name], tuple) else (DEFAULTS[name],)
    value = parse(cfg.legacy).get(name, words[cfg.faithful and name in FAULTS])
    return value == "yes" if DEFAULTS[name] == OFF else value

def check(cfg, own: str | None):
    """ValueError for a setting in `own` that nothing reads; found by building what a run builds."""
    READ.clear()
    recipe(cfg)[1](lejepa.build(dataclasses.replace(cfg, size="small")), cfg)
    for name in (name for name in parse(own) if name not in READ):
        raise ValueError(f"--legacy {name} would be ignored: only {READERS[name]} reads it")

# --------------------------------------------------------------------------------------------------- codes
class Codebook(EMAQuantizer):
    """The recorded codebook, one code for all numbers of an object.

    A refresh replaces the unused entries if less than `threshold` of all are in use.
    """
    def __init__(self, cfg):
        read = partial(setting, cfg)
        weight = {"used": read("commitment"), "none": 0.0, "swapped": 1.0}[read("vq_loss")]
        super().__init__(cfg.lam, weight, read("decay"), int(read("size")), int(read("codes")))
        self.interval, self.rows = math.ceil(read("refresh") * cfg.steps / EPOCH / read("epochs")), None
        self.threshold = read("threshold") if self.interval else 0.0
        self.register_buffer("used", torch.zeros(self.vectors.shape[:2], dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if read("start") == "cold":
            self.total.copy_(self.vectors.uniform_(-1 / self.size, 1 / self.size))
            self.started.fill_(True)

    @torch.no_grad()
    def update_codebook(self, y: Tensor, chosen: Tensor):
        rows = slice(None) if self.rows is None else self.rows     # with `padding`, those of every slot
        super().update_codebook(y[rows], chosen[rows])
        self.used.scatter_(1, chosen.T, True)
        self.steps += 1
        if self.interval and self.steps % self.interval == 0:
            self.refresh(y)

    def refresh(self, y: Tensor):
        unused = ~self.used & (self.used.float().mean(1, keepdim=True) < self.threshold)       # (C, K)
        rows = torch.randint(len(y), unused.shape, device=y.device)
        fresh = torch.stack([part[row] for part, row in zip(self.split(y), rows)])             # (C, K, m / C)
        for old in (self.vectors, self.total):
            old.copy_(torch.where(unused[..., None], fresh, old))
        self.members.masked_fill_(unused, 1.0)
        self.used.zero_()

class GradientCodebook(EMAQuantizer):
    """The codebook of VQ-VAE (arXiv:1711.00937) as a parameter, which the gradient of its own loss moves."""
    def __init__(self, cfg):
        read = partial(setting, cfg)
        super().__init__(cfg.lam, 1.0, 0.0, int(read("size")), int(read("codes")))
        self.vectors, self.last = nn.Parameter(self._buffers.pop("vectors")), cfg.steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        beta = read("commitment")                      # the weights are of commitment and codebook's term
        self.weights = {"used": (beta, 1.0), "none": (0.0, 0.0), "swapped": (1.0, beta)}[read("vq_loss")]

    def update_codebook(self, y: Tensor, chosen: Tensor):
        self.steps += 1

    def regulariser(self, y: Tensor, directions: Tensor) -> Tensor:
        vectors, error = self.read(self.indices(y)), lambda a, b: (a - b.detach()).square().mean()
        return self.weight * (self.weights[0] * error(y, vectors) + self.weights[1] * error(vectors, y))

class Gumbel(GradientCodebook):
    """Gumbel-softmax (arXiv:1611.01144) over codes. Its loss: log K minus the entropy of the mean choice."""
    def temperature(self) -> float:
        return 0.1 ** min(1.0, int(self.steps) / self.last)

    def logits(self, y: Tensor) -> Tensor:
        y = y.float().unflatten(-1, (len(self.vectors), -1)).transpose(0, 1)
        return -torch.cdist(y, self.vectors).square()                                          # (C, U, K)

    def forward(self, y: Tensor) -> Tensor:
        temperature, hard = self.temperature(), super().forward(y)
        if not self.training:
            return hard
        return (F.gumbel_softmax(self.logits(y), temperature) @ self.vectors).transpose(0, 1).flatten(1)

    def regulariser(self, y: Tensor, directions: Tensor) -> Tensor:
        share = self.logits(y).softmax(-1).mean(1).clamp(min=1e-9)   # at 0 its gradient is inf
        entropy = torch.special.entr(share).sum(-1).mean()
        return self.weight * self.weights[0] * (math.log(self.size) - entropy)

class FSQ(GaussianQuantizer):
    """Finite scalar quantization as published (arXiv:2309.15505): equal bins of tanh y, not regularised."""
    def __init__(self, cfg):
        super().__init__()
        self.levels = torch.tensor([8, 6, 4, 4, 1]).repeat(CODES)  # 768 codes
        self.radix = torch.tensor([96, 16, 4, 1, 1])

    def level(self, y: Tensor) -> Tensor:
        return torch.minimum((self.levels * (torch.tanh(y) + 1) / 2).long(), self.levels - 1)

    def forward(self, y: Tensor) -> Tensor:
        return (2 * self.level(y) + 1) / self.levels - 1 + (torch.tanh(y) - torch.tanh(y).detach())

    regulariser = lejepa.NoQuantizer.regulariser
# ---------------------------------------------------------------------------------------------- objectives
class Broken(LeJEPALoss):
    """LeJEPA with what breaks it: an averaged or a stopped target, or a fault of the recorded runs.

    `margin` is the weight of max(0, 0.1 + error - error against the target half a batch away), which belongs
    to another task in batches of four tasks or more.
    """
    def __init__(self, model, cfg):
        super().__init__(model, cfg)
        self.target, self.margin, self.unit = "trained", 0.0, setting(cfg, "unit")
        if cfg.objective == "broken":
            self.target, self.margin = setting(cfg, "target"), setting(cfg, "margin")
        if self.unit and len(self.memory):
            raise ValueError("--legacy unit=yes needs --memory 0: the local SIGReg takes length sqrt(D)")
        if cfg.objective == "sum" or len(getattr(model.encoder.quantizer, "vectors", range(CODES))) < CODES:
            model.encoder.NESTED = 0.0                 # an object keeps its code whole
        if setting(cfg, "relu"):
            model.encoder.projector.append(nn.ReLU())
        if setting(cfg, "shapeless"):
            model.encoder.objects.mlp.register_forward_pre_hook(keep_area)
        if isinstance(model.encoder.quantizer, Codebook) and setting(cfg, "padding"):
            model.encoder.register_forward_pre_hook(count_slots)
        self.average = InfoNCE(model, cfg).requires_grad_(False) if self.target == "averaged" else None
        if setting(cfg, "training_mode"):
            for part in model.modules():
                if isinstance(part, (nn.Dropout, EMAQuantizer)):
                    part.train = lambda mode=True: None            # it stays as it is, in training mode

    def regularise_embeddings(self, z: Tensor, targets: Tensor, directions: Tensor) -> Tensor:
        scale = z.shape[1] ** -0.5 if self.unit else 1.0           # unit: embeddings of length 1
        return super().regularise_embeddings(z * scale, targets * scale, directions)

    def compute_loss(self, model, batch: Batch, z, z_hat, y, directions, code_directions, lam: float):
        loss, terms = super().compute_loss(model, batch, z, z_hat, y, directions, code_directions, lam)
        target = z[batch.index[:, -1]] if self.target == "trained" else z[batch.index[:, -1]].detach()
        if self.target == "averaged":
            keys, own = self.average.targets(batch, model)
            self.average.filled += self.training       # the first call copies the encoder, the others average
            target = keys[own] * z.shape[1] ** 0.5
        if self.target != "trained":
            prediction = (z_hat - target).square().mean()
            loss = loss + (1 - lam) * (prediction - terms["prediction"])
            terms["prediction"] = prediction
        if self.margin:
            others = target.roll(len(target) // 2, 0)
            error, other = ((z_hat - x).square().mean(1) for x in (target, others))
            terms["margin"] = F.relu(0.1 + error - other).mean()
            loss = loss + self.margin * terms["margin"]
        return loss, terms

def keep_area(part, bits):                             # of a shape the number of its cells is left
    return (torch.arange(bits[0].shape[1], device=bits[0].device) < bits[0].sum(1, keepdim=True)).float()

def count_slots(encoder, inputs):                      # an empty slot counts as object 0
    encoder.quantizer.rows = inputs[0].object_id.flatten()

class WeightedSum(Broken):
    """The recorded objective: InfoNCE, other terms with a weight each, and lam * the code's own loss."""
    SLOTS, ALPHA, RATE = 16, 1.5, 0.025
    def __init__(self, model, cfg):
        super().__init__(model, dataclasses.replace(cfg, memory=0))
        read = partial(setting, cfg)
        names = ("sigreg_z", "relational", "context_self", "next_frame", *VIEWS)
        weights = {name: read(name) for name in names}
        self.weights = {"prediction": 1.0} | {name: weight for name, weight in weights.items() if weight}
        if read("coldest") > read("warmest"):
            raise ValueError("--legacy coldest: it is above warmest")
        self.infonce = InfoNCE(model, cfg, read("temperature"), read("coldest"), read("warmest"))
        if weights["relational"] or weights["context_self"]:
            self.normalised, self.by_slot = read("normalised"), read("matching") == "slot"
            model.encoder.widen.register_forward_hook(lambda part, inputs, x: setattr(self, "tokens", x))
        if weights["next_frame"]:
            self.next_frame = nn.Linear(lejepa.SIZES[cfg.size].dim, lejepa.SIZES[cfg.size].dim)
        self.balance, self.readout = read("balance"), self.infonce.readout
        if self.balance == "uncertainty":
            self.log_variance = nn.Parameter(torch.zeros(len(self.weights)))
        self.register_buffer("shares", torch.ones(len(self.weights)))
        self.register_buffer("first", torch.zeros(len(self.weights)))

    def compute_loss(self, model, batch: Batch, z, z_hat, y, directions, code_directions, lam: float):
        terms = self.infonce.compute_loss(model, batch, z, z_hat, y, directions, code_directions, 0.0)[1]
        terms["sigreg_z"] = self.regularise_embeddings(z, z, directions) / (len(z) // 2)  # without N
        for name, sides in (("relational", [-2, -1]), ("context_self", [0, -2])):
            if name in self.weights:
                terms[name] = self.between(batch.grids, batch.index[:, sides])
        if "next_frame" in self.weights:               # an output from its input alone; z alternates in, out
            terms["next_frame"] = (self.next_frame(z[0::2]) - z[1::2]).square().mean()
        encoder, _ = model.in_use
        moves, encoder.quantizer.training = encoder.quantizer.training, False   # views move no codebook
        for name, view in VIEWS.items():
            if name in self.weights:
                terms[name] = (encoder(view(batch.grids))[0] - z).square().mean()
        encoder.quantizer.training = moves
        parts = [weight * terms[name] for name, weight in self.weights.items()]
        return sum(self.balanced(parts, model)) + lam * terms["sigreg_y"], terms

    def balanced(self, parts: list, model) -> list:
        if self.balance == "uncertainty":              # arXiv:1705.07115
            return [torch.exp(-s) * part + s for part, s in zip(parts, self.log_variance)]
        if self.balance == "gradnorm" and self.training:
            shared, losses = model.encoder.widen[1].weight, torch.stack(parts).detach()
            norms = [torch.autograd.grad(part, shared, retain_graph=True)[0].norm() for part in parts]
            self.first.copy_(torch.where(self.first > 0, self.first, losses))
            self.shares.copy_(gradnorm(self.shares, losses / self.first.clamp(min=1e-9), torch.stack(norms)))
        return [share * part for share, part in zip(self.shares, parts)]

    def between(self, grids: Grids, sides: Tensor) -> Tensor:
        """The relational term of the largest objects of two grids a window, sides (B, 2)."""
        x, slot = self.tokens.float().flatten(0, 1), torch.arange(1, self.SLOTS + 1, device=sides.device)
        objects = x[(grids.first[sides][..., None] + slot).clamp(max=len(x) - 1)]              # (B, 2, S, P)
        here = slot < grids.count[sides][..., None]                                            # (B, 2, S)
        (a, b), both = objects.unbind(1), here.all(1)
        if not self.by_slot:                           # each object against the nearest of the other grid
            nearest = torch.cdist(a, b).masked_fill(~here[:, 1, None], math.inf).argmin(2, keepdim=True)
            b, both = b.gather(1, nearest.expand_as(b)), here[:, 0] & here[:, 1].any(1, True)
        return relation(a, b, both, self.normalised)

def relation(a: Tensor, b: Tensor, both: Tensor, normalised: bool) -> Tensor:
    """lejepa.relational of the slots (B, S, P) that `both` (B, S) have; or over the distances' variances."""
    pairs = (both[:, :, None] & both[:, None]).float()
    pairs = pairs / pairs.sum().clamp(min=1)                                                   # (B, S, S)
    a, b = (torch.cdist(x, x).square() for x in (a, b))
    variance = sum((pairs * (x - (pairs * x).sum()).square()).sum() for x in (a, b))
    return (pairs * (a - b).square()).sum() / (variance + 1e-6 if normalised else 1.0)

def gradnorm(shares: Tensor, ratios: Tensor, norms: Tensor) -> Tensor:
    """GradNorm (arXiv:1711.02257): new shares (n,) of losses, by their ratios to the first and gradients."""
    goal = (shares * norms).mean() * (ratios / ratios.mean()) ** WeightedSum.ALPHA
    step = norms / norms.mean() * torch.sign(shares * norms - goal)
    shares = (shares - WeightedSum.RATE * step).clamp(min=1e-3)
    return shares * len(shares) / shares.sum()

# --------------------------------------------------------------------------------------------------- views
def recoloured(grids: Grids, generator=None) -> Grids:
    """Each grid under a permutation of the colours of its own."""
    count = len(grids.first)
    colours = torch.rand(count, 10, generator=generator).argsort(1).to(grids.first.device)
    return grids._replace(colour=colours[grids.grid.clamp(max=count - 1), grids.colour])

def masked(grids: Grids) -> Grids:
    """Each grid without the tokens of about a seventh of its objects; its whole-grid bitmap shows them."""
    count, hidden = len(grids.first), torch.rand(grids.grid.shape, device=grids.grid.device) < 0.15
    hidden.view(-1)[grids.first] = False
    owner = grids.grid.masked_fill(hidden, count)
    return grids._replace(grid=owner, count=owner.flatten().bincount(minlength=count + 1)[:count])

def translated(grids: Grids) -> Grids:
    """Each grid with its objects moved by one offset, drawn from those that keep them all inside."""
    count, box = len(grids.first), grids.box.flatten(0, 1)                                     # (n, 4)
    whole = images(grids)[grids.object_id.flatten()[grids.first]]      # (G, 30, 30): cut objects too
    shown = torch.stack([whole.any(2), whole.any(1)], 1).float()                               # (G, 2, 30)
    low, high = shown.argmax(2), SIDE - shown.flip(2).argmax(2)
    free = (low + box[grids.first, 2:] - high + 1).clamp(min=1) * shown.any(2)   # of an empty grid: none
    offset = (torch.rand(free.shape, device=box.device) * free).long() - low * (free > 0)      # (G, 2)
    owner = grids.grid.flatten().index_fill(0, grids.first, count)     # of objects alone
    bitmap = torch.zeros_like(box[:, :2]).index_copy(0, grids.first, offset)     # a whole grid's box stays
    moved = box + F.pad(offset, (0, 2, 0, 1))[owner]
    return redraw(grids, moved, torch.arange(SIDE, device=box.device) - bitmap[..., None])

def turned(grids: Grids) -> Grids:
    """Each grid under a symmetry of its own."""
    count, place = len(grids.first), torch.arange(SIDE, device=grids.box.device)
    owner = grids.grid.clamp(max=count - 1)
    symmetry = torch.randint(8, (count,), device=place.device)[owner]                          # (R, L)
    box = turn_boxes(grids.box, grids.box.flatten(0, 1)[grids.first][owner], symmetry)
    box = box.masked_fill((grids.grid == count)[..., None], 0).flatten(0, 1)
    flips = torch.stack([symmetry & 2, symmetry & 4], -1).bool().view(-1, 2, 1)
    return redraw(grids, box, torch.where(flips, box[:, 2:, None] - 1 - place, place), symmetry & 1)

def images(grids: Grids) -> Tensor:                     # (U, 30, 30) uint8 of the distinct shapes
    bits = (grids.bits[:, :, None] >> torch.arange(7, -1, -1, device=grids.bits.device)) & 1
    return bits.flatten(1)[:, :SIDE * SIDE].view(-1, SIDE, SIDE)

def redraw(grids: Grids, box: Tensor, cell: Tensor, transpose: Tensor | None = None) -> Grids:
    """New boxes (n, 4), and a bitmap a slot: cell (n, 2, 30) holds the old row and column of each new one."""
    image = images(grids)[grids.object_id.flatten()]                                           # (n, 30, 30)
    if transpose is not None:
        image = torch.where(transpose.view(-1, 1, 1).bool(), image.mT, image)
    inside, (row, column) = (cell >= 0) & (cell < SIDE), cell.clamp(0, SIDE - 1).unbind(1)
    image = image.gather(1, row[:, :, None].expand_as(image)).gather(2, column[:, None].expand_as(image))
    image = image * (inside[:, 0, :, None] & inside[:, 1, None])
    bits = F.pad(image.flatten(1), (0, 8 * BYTES - SIDE * SIDE)).unflatten(1, (BYTES, 8))
    bits = (bits << torch.arange(7, -1, -1, device=box.device)).sum(2).to(torch.uint8)
    slots = torch.arange(len(box), device=box.device).view_as(grids.object_id)
    return grids._replace(bits=bits, object_id=slots, box=box.view_as(grids.box))

VIEWS = {"colour": recoloured, "translation": translated, "symmetry": turned, "masked": masked}

# ------------------------------------------------------------------------------------------------ contexts
class Context(nn.Module):
    """z_hat from one vector that sums up the embeddings of a window, without an analogy: here their mean."""
    make = staticmethod(lambda size: None)

    def __init__(self, size):
        super().__init__()
        self.role = nn.Parameter(torch.randn(3, size.width) * 0.1)
        self.token = nn.Linear(size.dim, size.width)
        self.part, self.head = self.make(size), lejepa.embedding_head(size.width, size)

    def forward(self, z: Tensor, shown: Tensor | None = None) -> Tensor:
        """z (B, 2 K + 1, D) of in1, out1, ..., given; shown (B, K), by default all -> z_hat (B, D)."""
        count = z.shape[1] // 2
        shown = z.new_ones(len(z), count, dtype=torch.bool) if shown is None else shown
        x = self.token(z) + torch.cat([self.role[:2].repeat(count, 1), self.role[2:]])
        here = F.pad(shown.repeat_interleave(2, 1), (0, 1), value=True)                        # (B, 2 K + 1)
        return self.head(self.pool(x, here)).float()

    def pool(self, x: Tensor, here: Tensor) -> Tensor:
        return (x * here[..., None]).sum(1) / here.sum(1, keepdim=True)

class Last(Context):
    def pool(self, x: Tensor, here: Tensor) -> Tensor:
        return x[:, -1]

class Attention(Context):
    make = staticmethod(lambda size: nn.Linear(size.width, 1))
    def pool(self, x: Tensor, here: Tensor) -> Tensor:
        return (self.part(x).masked_fill(~here[..., None], -math.inf).softmax(1) * x).sum(1)

class GRU(Context):
    make = staticmethod(lambda size: nn.GRUCell(size.width, size.width))
    def pool(self, x: Tensor, here: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            state = torch.where(here[:, i, None], self.part(x[:, i], state).to(state.dtype), state)
        return state

class Transformer(Context):
    make = staticmethod(lambda size: lejepa.Block(size.width, size.heads))
    def pool(self, x: Tensor, here: Tensor) -> Tensor:
        return super().pool(self.part(x, torch.where(here, 0.0, -math.inf)[:, None, None]), here)

# ------------------------------------------------------------------------------------------------- recipes
class RecordedTasks(TaskSet):
    """Training tasks, the easiest first with `curriculum`, and the faults of the recorded data.

    `scaling` adds each task of small grids once more, with every cell as a square of four.
    """
    def __init__(self, tasks, device="cpu", demonstrations=2, *, steps, curriculum, same_grid, recolour,
                 scaling):
        if scaling:
            tasks = tasks | {f"{i} doubled": doubled(task) for i, task in tasks.items() if has_room(task)}
        tasks = dict(sorted(tasks.items(), key=lambda item: difficulty(item[1]))) if curriculum else tasks
        super().__init__(tasks, device, demonstrations)
        self.steps, self.same_grid, self.recolour = steps, same_grid, recolour
        self.curriculum, self.every = curriculum, self.sizes

    def draw(self, size: int, seed: int, step: int) -> tuple:
        if self.curriculum:                            # a third, from 1/4 of the run two, from 5/8 all
            phase = 1 + (4 * step >= self.steps) + (8 * step >= 5 * self.steps)
            self.sizes = self.every[:math.ceil(len(self.every) * phase / 3)]
        return super().draw(size, seed, step)

    def batch(self, size: int, seed: int, step: int) -> Batch:
        batch = super().batch(size, seed, step)
        if self.recolour:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            batch = batch._replace(grids=recoloured(batch.grids, generator))
        if self.same_grid:
            batch = batch._replace(index=batch.index[:, -1:].expand_as(batch.index).contiguous())
        return batch

def has_room(task) -> bool:                             # for its grids at twice the size
    return max((n for pair in pairs_of(task) for side in pair for n in side.shape), default=SIDE) <= SIDE // 2

def doubled(task) -> Task:
    return Task([tuple(side.repeat(2, 0).repeat(2, 1) for side in pair) for pair in pairs_of(task)], [])

def difficulty(task) -> float:
    """The mean over a task's grids of log(area * tokens * colours)."""
    grids = [side for pair in pairs_of(task) for side in pair]
    start = tokenise(grids).start.tolist() if grids else ()
    logs = [math.log(grid.size * (end - first) * len(set(grid.flat)))
            for grid, first, end in zip(grids, start, start[1:])]
    return sum(logs) / max(1, len(logs))

class RecordedAdam(torch.optim.Adam):
    """Adam with the recorded clipping, warm-up and cosine to a tenth, whatever the training step set."""
    def __init__(self, model, cfg):
        weights = [p for p in model.parameters() if p.requires_grad]
        super().__init__(weights, cfg.lr, weight_decay=cfg.weight_decay)
        self.peak, self.last, self.clip = cfg.lr, cfg.steps, setting(cfg, "clip")
        self.warmup = setting(cfg, "warmup") * cfg.steps / EPOCH / setting(cfg, "epochs")

    def step(self, closure=None):
        group, = self.param_groups
        nn.utils.clip_grad_norm_(group["params"], self.clip)
        done = max((int(state["step"]) for state in self.state.values()), default=0)
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(1.0, done / self.last))
        group["lr"] = self.peak * cosine * min(1.0, (done + 1) / max(1.0, self.warmup))
        return super().step(closure)

def recipe(cfg) -> tuple:
    """The maker of the data, the maker of the optimizers, and early stopping's (patience, min_delta)."""
    read = partial(setting, cfg)
    faults = {name: read(name) for name in ("curriculum", "same_grid", "recolour", "scaling")}
    optimizers = {"muon": lejepa.make_optimizers, "adam": lambda *given: [RecordedAdam(*given)]}
    patience = read("patience") * cfg.steps / read("epochs") or math.inf
    stopping = patience, read("min_delta") if read("patience") else 0.0
    return partial(RecordedTasks, steps=cfg.steps, **faults), optimizers[read("optimizer")], stopping

# ------------------------------------------------------------------------------------------------- presets
ADAM = "optimizer=adam"
VIEWED = ",colour=0.1,translation=0.05,symmetry=0.05"
SIXTH = ADAM + VIEWED + ",relational=0.05,context_self=0.025,coldest=0.07,warmest=0.15"
GENTLE = ADAM + VIEWED + ",commitment=0.15,decay=0.95"
STEADY = GENTLE + ",relational=0.025,context_self=0.01,refresh=3000,threshold=0.01"
# Their SIGReg lacks our factor N = 192, their L2 of unit vectors our D = 256: the two nearly cancel.
ALIGNED = {"objective": "broken", "lam": 0.05, "memory": 0}
PRESETS = {  # name: --legacy, other flags; each is the recorded run or plan of its name
    "sixth": (SIXTH + ",commitment=0.3,refresh=500,threshold=0.05", {}),           # run, 22 epochs
    "no-vq": (SIXTH + ",epochs=30", {"code": "none"}),                             # run
    "no-refresh": (SIXTH + ",commitment=0.3,epochs=30", {}),                       # run
    "gentle": (STEADY + ",epochs=30", {}),                                         # run
    "optimized": (STEADY + ",relational=0.02,context_self=0.005,epochs=30", {"context": "attention"}),   # run
    "production": (STEADY, {}),                                                    # run
    "v2": (GENTLE + ",patience=15,min_delta=0.01", {}),                            # plan
    "stable-production": (STEADY + ",relational=0.0025,context_self=0.001,refresh=10000,patience=30", {}),
    "lejepa-aligned": (ADAM + ",warmup=500,epochs=20", ALIGNED),                   # run
    "gumbel": (ADAM + ",warmup=500,size=256", ALIGNED | {"code": "gumbel"}),       # run
    "combined": (ADAM + ",warmup=500,size=256,epochs=100",                         # plan
                 ALIGNED | {"code": "gumbel", "context": "attention", "demonstrations": 2})}
COMMON = {"objective": "sum", "code": "vq", "context": "mean", "demonstrations": 1, "lr": 5e-5,
          "weight_decay": 1e-6}
VARIANTS = {"vq": Codebook, "gradient": GradientCodebook, "gumbel": Gumbel, "fsq": FSQ, "broken": Broken,
            "sum": WeightedSum, "mean": Context, "last": Last, "attention": Attention, "gru": GRU,
            "transformer": Transformer, "legacy": recipe, "check": check,
            "presets": {name: COMMON | flags | {"legacy": text} for name, (text, flags) in PRESETS.items()}}
