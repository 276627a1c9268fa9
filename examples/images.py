"""LeJEPA on images with a hierarchy: each level of a feature pyramid has its own prediction and SIGReg.
A small ViT embeds an image as 8 x 8 tokens. Average pooling makes cells of 8 x 8, 4 x 4 and 2 x 2 of them, a
pyramid adds each level to the finer, and a head embeds each level as z. `--task crops`: each crop predicts
the mean z of the large crops. `--task masks`: an image without four blocks predicts z of their cells.
    loss = sum over levels of w [(1 - lam) * mean |z_hat - z|^2 / D + lam * SIGReg(z)],   w = 1.0, 0.8, 0.6
    B images   V views   S cells on a side   W width   C channels of a level   D width of z   F features
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
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lejepa import sigreg  # noqa: E402

FLAGS = {"data": ("digits", "digits (scikit-learn's), cifar10, or a folder of CLASS/*.png"),
         "root": (".", "of cifar10.npz or torchvision's files"), "run": ("examples/runs/images", "folder"),
         "method": ("lejepa", "or a baseline on the same crops", ("lejepa", "vicreg", "supervised")),
         "task": ("crops", "what is predicted", ("crops", "masks")), "levels": (3, "", (1, 2, 3)),
         "target": ("gradient", "ema: of an averaged network", ("gradient", "ema")),
         "width": (64, "of the ViT"), "depth": (2, "its blocks"), "lam": (0.05, "weight of SIGReg"),
         "steps": (150, "0: untrained"), "batch_size": (64, "images"), "lr": (3e-3, "at its peak"),
         "probe_images": (100_000, "at most so many training images are read by the probes"),
         "seed": (0, ""), "resume": (False, "continue the run in --run")}
WEIGHTS, CHANNELS, WIDE, LARGE, SMALL = (1.0, 0.8, 0.6), 128, 64, 2, 4    # w, C, D, crops of 24 and of 16

def load_data(name: str, root: str) -> list[Tensor]:
    """Training images (N, 3, 32, 32) uint8 and labels (N,), test images and labels."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        x = np.kron(x.reshape(-1, 8, 8) * 15.9, np.ones((4, 4)))[..., None].repeat(3, 3).astype(np.uint8)
    elif name == "cifar10" and Path(root, "cifar10.npz").exists():
        with np.load(Path(root, "cifar10.npz")) as file:
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    elif name == "cifar10":
        from torchvision.datasets import CIFAR10
        parts = [CIFAR10(root, train) for train in (True, False)]
        arrays = [array for part in parts for array in (part.data, np.array(part.targets))]
    else:
        files = sorted(path for path in Path(name).glob("*/*") if path.suffix in (".png", ".jpg", ".jpeg"))
        classes, y = np.unique([path.parent.name for path in files], return_inverse=True)
        if len(classes) < 2:
            raise ValueError("not digits, not cifar10, and no folder with two classes of images, CLASS/*.png")
        x = np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in files])
    if name != "cifar10":                              # every fifth image is for the test
        test = np.arange(len(x)) % 5 == 0
        arrays = x[~test], y[~test], x[test], y[test]
    x, y, x_test, y_test = map(torch.from_numpy, arrays)
    return [x.permute(0, 3, 1, 2), y, x_test.permute(0, 3, 1, 2), y_test]

def crops(x: Tensor, side: int, low: float, high: float, flip: bool) -> Tensor:
    """Of each image a square of between low and high of its area, in other colours: (B, 3, side, side)."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(x), *shape) * (high - low) + low
    size = uniform(low, high).sqrt()
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = size * torch.where(uniform(0, 1) < 0.5 * flip, -1, 1)
    theta[:, 1, 1] = size
    theta[:, :, 2] = uniform(-1, 1, 2) * (1 - size[:, None])
    grid = F.affine_grid(theta, (len(x), 3, side, side), align_corners=False)
    x = F.grid_sample(x.float() / 127.5 - 1, grid, align_corners=False) * uniform(0.9, 1.1, 3, 1, 1)
    grey = x.mean(1, keepdim=True)                     # a fifth of the crops is grey
    x = grey + (x - grey) * uniform(0.6, 1.4, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) > 0.2)
    return x * uniform(0.6, 1.4, 1, 1, 1) + uniform(-0.4, 0.4, 1, 1, 1)

def block_masks(count: int) -> Tensor:
    """(count, 8, 8) bool: four target blocks of area 0.15-0.4 and aspect 0.5-2; the context is the rest."""
    area, aspect = torch.rand(count, 4) * 0.25 + 0.15, 2 ** (torch.rand(count, 4) * 2 - 1)
    inside = []
    for length in ((area * aspect).sqrt(), (area / aspect).sqrt()):
        length = (length * 8).round().clamp(1, 8)
        start = (torch.rand(count, 4) * (9 - length)).floor()[..., None]
        cell = torch.arange(8)
        inside.append((cell >= start) & (cell < start + length[..., None]))      # (count, 4, 8)
    masks = (inside[0][..., :, None] & inside[1][..., None, :]).any(1)
    masks[masks.all(2).all(1), 0, 0] = False           # no context is empty
    return masks

class Network(nn.Module):
    """The ViT and the pyramid; for each level a head for z and a predictor for z_hat of masked cells."""
    def __init__(self, width: int, depth: int, levels: int, classes: int):
        super().__init__()
        strided = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, width // 2), (width // 2, width))]
        self.stem = nn.Sequential(strided[0], nn.GELU(), strided[1])             # overlapping patches
        self.position = nn.Parameter(torch.randn(width, 8, 8) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(width, 1, 1) * 0.02)
        options = {"dropout": 0, "activation": "gelu", "batch_first": True, "norm_first": True}
        blocks = [nn.TransformerEncoderLayer(width, width // 64, 4 * width, **options) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))
        lateral = nn.Sequential(nn.Linear(width, CHANNELS), nn.LayerNorm(CHANNELS))
        self.laterals = nn.ModuleList(copy.deepcopy(lateral) for _ in range(levels))
        inner = [nn.Linear(CHANNELS, 512), nn.BatchNorm1d(512), nn.GELU(), nn.Linear(512, WIDE)]
        heads = [nn.Sequential(*copy.deepcopy(inner)) for _ in range(2 * levels)]
        self.heads, self.predictors = nn.ModuleList(heads[:levels]), nn.ModuleList(heads[levels:])
        self.classifier = nn.Linear(width, classes)    # of the supervised baseline

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, W, S, S), levels (B, C, S, S), (B, C, S / 2, S / 2), ... of images (B, 3, 4 S, 4 S)."""
        x = self.stem(x)
        if mask is not None:                           # (B, S, S)
            x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        x, side = x + F.adaptive_avg_pool2d(self.position, x.shape[2]), x.shape[2]
        tokens = self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (side, side))
        levels = []
        for i in reversed(range(len(self.laterals))):
            pooled = F.adaptive_avg_pool2d(tokens, max(1, side >> i)).movedim(1, 3)
            level = self.laterals[i](pooled).movedim(3, 1)
            levels.insert(0, level + F.interpolate(levels[0], level.shape[2:]) if levels else level)
        return tokens, levels

def embed_crops(net: Network, views: list[list[Tensor]]) -> list[Tensor]:
    """z of each level, (V, B, D), of its mean cell; crops of one size share their batch statistics."""
    parts = []
    for same in views:
        z = [embed(level.mean((2, 3))).float() for embed, level in zip(net.heads, net(torch.cat(same))[1])]
        parts.append([level.unflatten(0, (len(same), -1)) for level in z])
    return [torch.cat(level) for level in zip(*parts)]

def embed_cells(heads: nn.ModuleList, levels: list[Tensor]) -> list[Tensor]:
    """z of each cell, (S S, B, D), of each level."""
    cells = [level.flatten(2).permute(2, 0, 1) for level in levels]              # (S S, B, C)
    return [embed(x.flatten(0, 1)).float().unflatten(0, x.shape[:2]) for embed, x in zip(heads, cells)]

def vicreg_spread(z: Tensor) -> Tensor:
    """The variance and covariance terms of VICReg (arXiv:2105.04906), weights 25 and 1, of z (V, B, D)."""
    z = z - z.mean(1, keepdim=True)
    covariance = z.transpose(1, 2) @ z / (z.shape[1] - 1)                                          # (V, D, D)
    variance = covariance.diagonal(dim1=1, dim2=2)
    off_diagonal = covariance.square().sum() - variance.square().sum()
    return 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean() + off_diagonal / variance.numel()

def losses(net: Network, target: Network, x: Tensor, y: Tensor, args) -> dict[str, Tensor]:
    """`target` is the network itself, or its averaged copy, which takes no gradient."""
    flip, pairs = args.data != "digits", []            # of each level the squared error, and what is spread
    with torch.autocast("cpu", torch.bfloat16):
        if args.task == "masks":
            view, mask = crops(x, 32, 0.35, 1.0, flip), block_masks(len(x))
            z_hat = embed_cells(net.predictors, net(view, mask)[1])
            for a, b in zip(z_hat, embed_cells(target.heads, target(view)[1])):
                hidden = F.adaptive_avg_pool2d(mask.float(), math.isqrt(len(b))).flatten(1).T
                error = (hidden * (a - b).square().mean(2)).sum() / hidden.sum()
                pairs.append((error, (b if target is net else a)[torch.randperm(len(b))[:8]]))
        else:
            views = [[crops(x, 24, 0.3, 1.0, flip) for _ in range(LARGE)]]
            views.append([crops(x, 16, 0.1, 0.35, flip) for _ in range(SMALL)])
            if args.method == "supervised":
                logits = [net.classifier(net(torch.cat(same))[0].mean((2, 3))) for same in views]
                loss = F.cross_entropy(torch.cat(logits).float(), y.repeat(LARGE + SMALL))
                return {"loss": loss, "prediction": loss, "spread": torch.zeros(())}
            z = embed_crops(net, views)
            aims = z if target is net else embed_crops(target, views[:1])
            pairs = [((a - b[:LARGE].mean(0)).square().mean(), a) for a, b in zip(z, aims)]
    directions, vicreg = F.normalize(torch.randn(WIDE, 256), dim=0), args.method == "vicreg"
    spreads = [vicreg_spread(z) if vicreg else sigreg(z, directions) for _, z in pairs]
    spread = sum(w * each for w, each in zip(WEIGHTS, spreads))
    prediction = sum(w * error for w, (error, _) in zip(WEIGHTS, pairs))
    a, b = (100, 1) if vicreg else (1 - args.lam, args.lam)    # VICReg's 25 |z_1 - z_2|^2 is 100 |z - mean|^2
    return {"loss": a * prediction + b * spread, "prediction": prediction, "spread": spread}

@torch.no_grad()
def features(net: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """For probes, (B, F): the mean token, those of quadrants, the mean cell of each level; and z of level 1."""
    net.eval()
    found = []
    for part in x.split(500):
        tokens, levels = net(part / 127.5 - 1)
        cells = [level.mean((2, 3)) for level in levels]
        f = torch.cat([tokens.mean((2, 3)), F.avg_pool2d(tokens, 4).flatten(1), *cells], 1)
        found.append((f, net.heads[0](cells[0])))
    net.train()
    return tuple(map(torch.cat, zip(*found)))

def picture(x: Tensor, y: Tensor, f: Tensor, z: Tensor, history: list[dict], path: Path):
    figure, ((curves, cosines), (plane, blocks)) = plt.subplots(2, 2, figsize=(10, 8))
    figure.suptitle("training; cosines of z; principal components of the mean token; images and contexts")
    for key in ("prediction", "spread", "rank", "variance"):
        curves.semilogy([row["step"] for row in history], [row[key] for row in history], label=key)
    curves.legend()
    cosines.hist((F.normalize(z, dim=1) @ F.normalize(z, dim=1).T)[~torch.eye(len(z), dtype=torch.bool)], 50)
    u, s, _ = torch.pca_lowrank(f, 2)
    plane.scatter(*(u * s).T, c=y, s=4, cmap="tab10")
    masks = block_masks(4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    rows = [torch.cat(list(images), 2) for images in (x[:4], torch.where(masks, 128, x[:4]))]
    blocks.imshow(torch.cat(rows, 1).permute(1, 2, 0))
    figure.savefig(path, dpi=70)

def train(net: Network, x: Tensor, y: Tensor, x_val: Tensor, folder: Path, args) -> list[dict]:
    """The log. A batch is a function of seed and step, so a resumed run equals an uninterrupted one."""
    target = copy.deepcopy(net).requires_grad_(False) if args.target == "ema" else net
    matrices = [p for p in net.blocks.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, args.lr, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in net.parameters() if p not in {*matrices}], args.lr)
    modules, start, history, begin = [net, target, muon, adamw], 0, [], time.time()
    if args.resume:
        start, history, *states = torch.load(folder / "last.pt", weights_only=True)
        for module, state in zip(modules, states):
            module.load_state_dict(state)
    for step in range(start, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(x), (args.batch_size,))
        cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in muon.param_groups + adamw.param_groups:                     # warm-up of a twentieth
            group["lr"] = args.lr * min(1, 20 * (step + 1) / args.steps) * cosine
        parts = losses(net, target, x[rows], y[rows], args)
        net.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        muon.step()
        adamw.step()
        for average, p in zip(target.parameters(), net.parameters()) if target is not net else ():
            average.lerp_(p.detach(), 0.004 * cosine)                            # momentum 0.996 to 1.0
        done = step + 1
        if done % max(1, args.steps // 20) == 0 or done == args.steps:
            z = features(net, x_val[:500])[1]
            p = F.normalize(torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=1e-12), p=1, dim=0)
            parts |= {"rank": torch.exp(-(p * p.log()).sum()), "variance": z.var(0).mean()}
            history.append({"step": done} | {key: value.item() for key, value in parts.items()})
            left = (time.time() - begin) / (done - start) * (args.steps - done)
            print(*[f"{key} {value:.4g} " for key, value in history[-1].items()], f"{left:.0f} s left")
            torch.save([done, history, *[module.state_dict() for module in modules]], folder / "last.part")
            (folder / "last.part").replace(folder / "last.pt")
    return history

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for key, (value, text, *choices) in FLAGS.items():
        kind = {"type": type(value), "default": value, "choices": choices[0] if choices else None}
        kind = {"action": "store_true"} if value is False else kind
        parser.add_argument("--" + key.replace("_", "-"), help=f"{text} (default: {value})", **kind)
    args = parser.parse_args(argv)
    folder, settings = Path(args.run), vars(args) | {"resume": False}
    known = json.loads((folder / "config.json").read_text()) if (folder / "last.pt").exists() else None
    if known and not args.resume or args.resume and known != settings:
        parser.error(f"--run {folder}: a run goes on with --resume and the flags of its config.json")
    if args.width % 64 or args.method != "lejepa" and (args.task, args.target) != ("crops", "gradient"):
        parser.error("--width is a multiple of 64; --task masks and --target ema are for --method lejepa")
    try:
        x, y, x_test, y_test = load_data(args.data, args.root)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        parser.error(f"--data {args.data}: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    val, rest = order.tensor_split([len(x) // 10])
    torch.manual_seed(args.seed)
    net, begin = Network(args.width, args.depth, args.levels, int(y.max()) + 1), time.time()
    history = train(net, x[rest], y[rest], x[val], folder, args)
    result = {"settings": settings, "seconds": time.time() - begin, "history": history}
    rest = rest[:args.probe_images]
    f, f_val, (f_test, z) = features(net, x[rest])[0], features(net, x[val])[0], features(net, x_test)
    ridge = RidgeClassifierCV((1, 10, 100, 1000)).fit(f, y[rest])         # its penalty: leave-one-out
    near = KNeighborsClassifier(20, weights="distance", metric="cosine").fit(f[:, :args.width], y[rest])
    result |= {"linear": ridge.score(f_test, y_test), "linear_validation": ridge.score(f_val, y[val])}
    result["knn"] = near.score(f_test[:, :args.width], y_test)                   # of the mean token
    result["knn_validation"] = near.score(f_val[:, :args.width], y[val])
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    picture(x_test, y_test[:1000], f_test[:1000, :args.width], z[:1000], history, folder / "result.png")
    print(f"linear: {result['linear']:.4f}\nknn: {result['knn']:.4f}")

if __name__ == "__main__":
    main()
