"""LeJEPA on images with a hierarchy: each level of a feature pyramid has its own prediction and SIGReg.

A small ViT embeds an image as 8 x 8 tokens. Average pooling makes cells of 8 x 8, 4 x 4 and 2 x 2 of them, a
pyramid adds each coarse level to the finer one, and a head embeds cells as z. With `--task crops` the mean
cell of a crop predicts that of another; with `--task masks` an image without four blocks predicts theirs.
    loss = sum over levels of w [(1 - lam) * mean |z_hat - z|^2 / D + lam * SIGReg(z)],   w = 1.0, 0.8, 0.6
    B images   V = 2 views   S cells on a side   W width of a token   C channels of a level   D width of z
"""
import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import datasets, linear_model, neighbors
from torch import Tensor, nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lejepa import Block, sigreg  # noqa: E402

WEIGHTS, CHANNELS, DIM, DIRECTIONS = (1.0, 0.8, 0.6), 128, 64, 256         # w, C, D, directions of SIGReg
FLAGS = {"data": ("digits", "digits (scikit-learn's), cifar10, or a folder of CLASS/*.png"),
         "root": (".", "folder of cifar10.npz or of torchvision's files, for cifar10"),
         "run": ("examples/runs/images", "folder of the record"), "resume": (False, "continue --run"),
         "method": ("lejepa", "the last two are baselines", ("lejepa", "vicreg", "supervised")),
         "task": ("crops", "what is predicted", ("crops", "masks")),
         "target": ("gradient", "ema: z of an averaged network", ("gradient", "ema")),
         "levels": (3, "of the pyramid", (1, 2, 3)), "width": (64, "of a token", (64, 128, 192, 256)),
         "depth": (2, "transformer blocks"), "area": (0.6, "least share of an image in a crop"),
         "lam": (0.2, "weight of SIGReg; 1 - lam is the weight of the prediction"),
         "lr": (1e-2, "learning rate after the warm-up; falls to 0"), "batch_size": (64, "images"),
         "steps": (200, "0 evaluates the untrained network"), "seed": (0, "of weights and batches")}

def load_data(cfg) -> list[Tensor]:
    """Training images (N, 3, 32, 32) uint8, their labels (N,), test images, test labels."""
    if cfg.data == "digits":
        x, y = datasets.load_digits(return_X_y=True)
        x = np.kron(x.reshape(-1, 8, 8) * 15.9, np.ones((4, 4))).astype(np.uint8)[..., None].repeat(3, 3)
    elif cfg.data == "cifar10" and Path(cfg.root, "cifar10.npz").exists():
        file = np.load(Path(cfg.root, "cifar10.npz"))
        arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    elif cfg.data == "cifar10":
        from torchvision.datasets import CIFAR10
        parts = [CIFAR10(cfg.root, train) for train in (True, False)]
        arrays = [array for part in parts for array in (part.data, np.array(part.targets))]
    else:
        files = sorted(file for file in Path(cfg.data).glob("*/*") if file.suffix in (".png", ".jpg"))
        classes, y = np.unique([path.parent.name for path in files], return_inverse=True)
        if len(classes) < 2 or len(files) < 100:
            raise ValueError("not digits, not cifar10, no folder of 100 images in 2 classes, CLASS/*.png")
        x = np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in files])
    if cfg.data != "cifar10":                          # every fifth image is for the test
        test = np.arange(len(x)) % 5 == 0
        arrays = x[~test], y[~test], x[test], y[test]
    return [part.permute(0, 3, 1, 2) if part.ndim == 4 else part for part in map(torch.as_tensor, arrays)]

def crop(x: Tensor, side: int, cfg) -> Tensor:
    """Of each image a square of at least `--area`, in other colours: (B, 3, side, side)."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(x), *shape) * (high - low) + low
    size, flip = uniform(cfg.area, 1).sqrt(), (uniform(0, 1) < 0.5) & (cfg.data != "digits")
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(flip, -size, size), size
    theta[:, :, 2] = uniform(-1, 1, 2) * (1 - size[:, None])
    grid = F.affine_grid(theta, (len(x), 3, side, side), align_corners=False)
    x = F.grid_sample(x.float() / 127.5 - 1, grid, align_corners=False) * uniform(0.9, 1.1, 3, 1, 1)
    grey = x.mean(1, keepdim=True)                     # a fifth of the crops is grey
    x = grey + (x - grey) * uniform(0.6, 1.4, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) > 0.2)
    return x * uniform(0.6, 1.4, 1, 1, 1) + uniform(-0.4, 0.4, 1, 1, 1)

def block_masks(count: int) -> Tensor:
    """(count, 8, 8) bool: four target blocks of area 0.15-0.4 and aspect 0.5-2; the context is the rest."""
    area, aspect, inside = torch.rand(count, 4) * 0.25 + 0.15, 2 ** (torch.rand(count, 4) * 2 - 1), []
    for length in ((area * aspect).sqrt(), (area / aspect).sqrt()):
        length = (length * 8).round().clamp(1, 8)
        start = (torch.rand(count, 4) * (9 - length)).floor()[..., None]
        inside.append((torch.arange(8) >= start) & (torch.arange(8) < start + length[..., None]))
    masks = (inside[0][..., :, None] & inside[1][..., None, :]).any(1)         # (count, 8, 8)
    masks[masks.all(2).all(1), 0, 0] = False           # no context is empty
    return masks

class Network(nn.Module):
    """The ViT and the pyramid; for each level a head for z and a predictor for the z of masked cells."""
    def __init__(self, w: int, depth: int, levels: int, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, w // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(w // 2, w, 3, 2, 1))
        self.position = nn.Parameter(torch.randn(w, 8, 8) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(w, 1, 1) * 0.02)
        self.blocks = nn.Sequential(*[Block(w, w // 64) for _ in range(depth)], nn.LayerNorm(w))
        self.laterals, self.heads, self.predictors = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(levels):
            self.laterals.append(nn.Sequential(nn.Linear(w, CHANNELS), nn.LayerNorm(CHANNELS)))
            for heads in (self.heads, self.predictors):
                hidden = nn.Linear(CHANNELS, 512), nn.BatchNorm1d(512), nn.GELU()
                heads.append(nn.Sequential(*hidden, nn.Linear(512, DIM)))
        self.classifier = nn.Linear(w, classes)        # of the supervised baseline

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, W, S, S), levels (B, C, S, S), (B, C, S / 2, S / 2), ... of images (B, 3, 4 S, 4 S)."""
        x = self.stem(x)                                                       # (B, W, S, S)
        if mask is not None:                                                   # (B, S, S)
            x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        x, side = x + F.adaptive_avg_pool2d(self.position, x.shape[2]), x.shape[2]
        tokens = self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (side, side))
        levels = []
        for i in reversed(range(len(self.laterals))):
            pooled = F.adaptive_avg_pool2d(tokens, max(1, side >> i))
            level = self.laterals[i](pooled.movedim(1, 3)).movedim(3, 1)
            levels.insert(0, level + F.interpolate(levels[0], level.shape[2:]) if levels else level)
        return tokens, levels

def embed(heads: nn.ModuleList, levels: list[Tensor], count: int) -> list[Tensor]:
    """z (S S, B, D) of the cells of each level; (V, B, D) if V views of `count` images have one cell."""
    cells = [level.flatten(2).permute(2, 0, 1).flatten(0, 1) for level in levels]              # (S S B, C)
    return [head(x).float().view(-1, count, DIM) for head, x in zip(heads, cells)]

def compute_loss(net: Network, target: Network, x: Tensor, y: Tensor, cfg) -> dict[str, Tensor]:
    """The loss and its terms. `target` is the network, or its averaged copy, which takes no gradient."""
    def embed_crops(net: Network) -> list[Tensor]:                             # (V, B, D) of each level
        return embed(net.heads, [level.mean((2, 3), keepdim=True) for level in net(views)[1]], len(x))
    with torch.autocast(x.device.type, torch.bfloat16):
        if cfg.task == "masks":
            view, mask = crop(x, 32, cfg), block_masks(len(x))
            z_hat = embed(net.predictors, net(view, mask)[1], len(x))
            aims = embed(target.heads, target(view)[1], len(x))
            masks = [F.adaptive_avg_pool2d(mask.float(), math.isqrt(len(z))).flatten(1).T for z in aims]
            z = [level[torch.randperm(len(level))[:8]] for level in (aims if target is net else z_hat)]
        else:
            views = torch.cat([crop(x, 24, cfg), crop(x, 24, cfg)])
            if cfg.method == "supervised":
                loss = F.cross_entropy(net.classifier(net(views)[0].mean((2, 3))).float(), y.repeat(2))
                return {"loss": loss, "prediction": loss, "spread": torch.zeros(())}
            z = z_hat = embed_crops(net)
            aims = [level.flip(0) for level in (z if target is net else embed_crops(target))]
            masks = [torch.ones(2, len(x))] * len(z)
    errors = [(m * (a - b).square().mean(2)).sum() / m.sum() for a, b, m in zip(z_hat, aims, masks)]
    prediction = sum(w * error for w, error in zip(WEIGHTS, errors))
    directions = F.normalize(torch.randn(DIM, DIRECTIONS), dim=0)
    spread = sum(w * sigreg(level, directions) for w, level in zip(WEIGHTS, z))
    loss = (1 - cfg.lam) * prediction + cfg.lam * spread
    if cfg.method == "vicreg":
        from lightly.loss import VICRegLoss
        loss = sum(w * VICRegLoss()(*level) for w, level in zip(WEIGHTS, z))
    return {"loss": loss, "prediction": prediction, "spread": spread}

@torch.no_grad()
def features(net: Network, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean token (N, W); it, quadrants and levels, for the linear probe; z (N, D) of the finest level."""
    net.eval()
    found = []
    for part in x.split(500):
        with torch.autocast(x.device.type, torch.bfloat16):
            tokens, levels = net(part / 127.5 - 1)
            token, cells = tokens.mean((2, 3)), [level.mean((2, 3)) for level in levels]
            wide = torch.cat([token, F.avg_pool2d(tokens, 4).flatten(1), *cells], 1)
            found.append((token, wide, net.heads[0](cells[0])))
    net.train()
    return tuple(torch.cat(parts).float() for parts in zip(*found))

def picture(x: Tensor, y: Tensor, token: Tensor, z: Tensor, history: list[dict], path: Path):
    figure, ((curves, cosines), (plane, blocks)) = plt.subplots(2, 2, figsize=(10, 8))
    figure.suptitle("training; cosines of z; principal components of the mean token; images and contexts")
    for key in ("prediction", "spread", "rank", "variance"):
        curves.semilogy([row["step"] for row in history], [row[key] for row in history], label=key)
    curves.legend()
    cosines.hist((1 - F.pdist(F.normalize(z, dim=1)).square() / 2).numpy(), 50)
    plane.scatter(*(token @ torch.pca_lowrank(token, 2)[2]).T.numpy(), c=y.numpy(), s=4, cmap="tab10")
    hidden = block_masks(4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    rows = torch.stack([x[:4], torch.where(hidden, 128, x[:4])])               # (2, 4, 3, 32, 32)
    blocks.imshow(rows.permute(0, 3, 1, 4, 2).reshape(64, 128, 3).numpy())
    figure.savefig(path, dpi=70)

def train(net: Network, x: Tensor, y: Tensor, x_val: Tensor, saved: list, folder: Path, cfg) -> list[dict]:
    """The log. A batch is a function of seed and step, so a resumed run equals an uninterrupted one."""
    target = copy.deepcopy(net).requires_grad_(False) if cfg.target == "ema" else net
    matrices = [p for p in net.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, cfg.lr, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in net.parameters() if p.ndim != 2], cfg.lr)
    (first, history, *states), parts = saved, (net, target, muon, adamw)
    for part, state in zip(parts, states):
        part.load_state_dict(state)
    for step in range(first, cfg.steps):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        rows = torch.randint(len(x), (cfg.batch_size,))
        cosine = (1 + math.cos(math.pi * step / cfg.steps)) / 2
        for group in muon.param_groups + adamw.param_groups:                   # a warm-up of a twentieth
            group["lr"] = cfg.lr * cosine * min(1, 20 * (step + 1) / cfg.steps)
        terms = compute_loss(net, target, x[rows], y[rows], cfg)
        net.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        muon.step()
        adamw.step()
        for average, p in zip(target.parameters(), net.parameters()) if target is not net else ():
            average.lerp_(p.detach(), 0.004 * cosine)                          # momentum 0.996 to 1.0
        done = step + 1
        if done % max(1, cfg.steps // 20) == 0 or done == cfg.steps:
            z = features(net, x_val[:500])[2]
            share = F.normalize(torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=1e-12), p=1, dim=0)
            terms |= {"rank": torch.exp(-(share * share.log()).sum()), "variance": z.var(0).mean()}
            history.append({"step": done} | {key: value.item() for key, value in terms.items()})
            print(f"of {cfg.steps}:", *[f"{key} {value:.4g} " for key, value in history[-1].items()])
            torch.save([done, history, *[part.state_dict() for part in parts]], folder / "last.part")
            (folder / "last.part").replace(folder / "last.pt")
    return history

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for key, (value, text, *choices) in FLAGS.items():
        kind = {"type": type(value), "choices": choices[0] if choices else None}
        kind = {"action": "store_true"} if value is False else kind
        parser.add_argument("--" + key.replace("_", "-"), default=value, help=text, **kind)
    cfg = parser.parse_args(argv)
    folder, settings = Path(cfg.run), vars(cfg) | {"resume": False}
    record, last = folder / "config.json", folder / "last.pt"
    try:
        if cfg.method != "lejepa" and (cfg.task, cfg.target) != ("crops", "gradient"):
            raise ValueError(f"--task masks and --target ema need --method lejepa, not {cfg.method}")
        if cfg.resume != record.exists() or cfg.resume and json.loads(record.read_text()) != settings:
            raise ValueError(f"a record in --run {folder} goes on with --resume and the flags of config.json")
        x, y, x_test, y_test = load_data(cfg)
        saved = torch.load(last, weights_only=True) if last.exists() else [0, []]
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1) + "\n")
    except Exception as error:                         # whatever a malformed file leads to
        parser.error(f"--data {cfg.data}: {type(error).__name__}: {error}".splitlines()[0])
    val, fit = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tensor_split([len(x) // 10])
    torch.manual_seed(cfg.seed)
    net, begin = Network(cfg.width, cfg.depth, cfg.levels, int(y.max()) + 1), time.time()
    history = train(net, x[fit], y[fit], x[val], saved, folder, cfg)
    result = {"settings": settings, "seconds": time.time() - begin, "history": history}
    (token, f, _), (token_val, f_val, _), (token_test, f_test, z) = (
        features(net, images) for images in (x[fit], x[val], x_test))
    probes = [linear_model.RidgeClassifier(penalty).fit(f, y[fit]) for penalty in (1, 10, 100, 1000)]
    probe = max(probes, key=lambda probe: probe.score(f_val, y[val]))          # never chosen on the test set
    knn = neighbors.KNeighborsClassifier(20, metric="cosine").fit(token, y[fit])
    result |= {"linear": probe.score(f_test, y_test), "linear_validation": probe.score(f_val, y[val]),
               "knn": knn.score(token_test, y_test), "knn_validation": knn.score(token_val, y[val])}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(x_test, y_test[:1000], token_test[:1000], z[:1000], history, folder / "result.png")
    print(f"linear: {result['linear']:.4f}\nknn: {result['knn']:.4f}")

if __name__ == "__main__":
    main()
