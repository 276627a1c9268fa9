"""Health of embeddings and codes: what health.json and result.json hold beside the ranks of an evaluation.

    D embedding width   n rows: embeddings or objects   G distinct grids
"""
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kurtosis, skew
from torch import Tensor

import arc_data
from eval import Evaluation
from lejepa import CODE_SIZE, local_sigreg, sigreg

SAMPLE = 4096   # windows behind an effective rank
SIGREG_NULL = 1.05246                          # expected SIGReg of samples from N(0, I)
SIGREG_N = 192  # size of a sample that SIGReg is measured on: a step of the default run

def add_health(model, done: Evaluation) -> Evaluation:
    """The evaluation with the prediction error and the health of context, target and codes."""
    target = done.z[done.windows.index[:, 3]]
    sample = np.random.default_rng(0).permutation(len(target))[:SAMPLE]
    health = {"prediction": float((done.z_hat - target).square().mean()),
              "context": embedding_health(done.z_hat[sample]), "target": embedding_health(target[sample]),
              "codes": code_health(model, done.windows.grids, done.codes)}
    return done._replace(health=done.health | health)
# -------------------------------------------------------------------------------------------- embeddings
def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues (D,), rising, of the covariance of z (n, D) + 1e-6 I."""
    z = z.double()
    return torch.linalg.eigvalsh(torch.cov(z.T) + 1e-6 * torch.eye(z.shape[1], dtype=z.dtype)).clamp_min(0)

def effective_rank(z: Tensor) -> float:
    """How many directions z (n, D) uses: exp of the entropy of the covariance's eigenvalues, 1 to D."""
    values = spectrum(z)
    return float(torch.special.entr(values / values.sum()).sum().exp())

def embedding_health(z: Tensor) -> dict[str, float]:
    """Effective rank, variance, isotropy and Gaussian score of z (n, D), as in the recorded runs; SIGReg.

    SIGReg is the mean over samples of SIGREG_N rows, as away from N(0, I) it grows with the size of a sample.
    """
    values, x, size = spectrum(z), z.double().numpy(), min(SIGREG_N, len(z))
    off = np.nan_to_num(np.abs([skew(x), kurtosis(x)]), nan=3.0).mean(1).sum()  # both are 0 for a Gaussian
    directions = torch.randn(256, z.shape[1], generator=torch.Generator().manual_seed(0))
    views = z[:len(z) // size * size].view(-1, size, z.shape[1])
    tested = float(sigreg(views, F.normalize(directions, dim=1).T))
    return {"effective_rank": effective_rank(z), "variance": float(x.var(0).mean()),
            "isotropy": float((values[0] + 1e-8) / (values[-1] + 1e-8)),
            "gaussian_score": float(1 / (1 + off)),
            "sigreg_over_null": tested / SIGREG_NULL, "sigreg_n": size, "n": len(z)}

def label_free_score(done: Evaluation) -> float:
    """Prediction error + SIGReg(z) of the distinct targets, at equal weights whatever lam is; low is good.

    It reads no label and no rank: the error falls where z collapses, and SIGReg(z) rises there.
    """
    scale = done.z.shape[1] ** 0.5 / done.z.norm(dim=1).mean()
    z, z_hat = done.z * scale, done.z_hat * scale
    error = (z_hat - z[done.windows.index[:, 3]]).square().mean()
    targets = z[done.windows.outputs]
    return float(error + local_sigreg(targets, targets[:0], torch.zeros((), dtype=torch.int64)))
# ------------------------------------------------------------------------------------------------- codes
def object_ids(grids: list) -> tuple[np.ndarray, arc_data.Tokens]:
    """The bitmap of each token (n,), which is all that the quantizer reads, as a number; and the tokens."""
    tokens = arc_data.tokenise(grids)
    _, bitmap = np.unique(tokens.bitmaps, axis=0, return_inverse=True)
    return bitmap.ravel()[tokens.shape], tokens

def code_statistics(codes: np.ndarray, size: int, inputs: np.ndarray) -> dict[str, float]:
    """How evenly codes (n, n_codes) below `size` are used; inputs (n,) identify what a row encodes.

    codes_usage       lowest share of the codes in use, over code positions
    codes_perplexity  exp(entropy) / size, mean over positions: 1 is uniform, 0.96 a uniform draw of 12.5 size
    codes_ceiling     the highest exp(entropy) / size that any function of the inputs could reach
    codes_n           n
    """
    codes = np.asarray(codes)
    if codes.shape[1] == 0:  # a model without codes
        return dict.fromkeys(("codes_usage", "codes_perplexity", "codes_ceiling")) | {"codes_n": len(codes)}
    if len(codes) == 0 or codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes must be at least one row of numbers from 0 to {size - 1}")
    counts = [np.bincount(column, minlength=size) for column in codes.T]
    return {"codes_usage": min(float((c > 0).mean()) for c in counts),
            "codes_perplexity": float(np.mean([perplexity(c) for c in counts]) / size),
            "codes_ceiling": code_ceiling(np.unique(inputs, return_counts=True)[1], size),
            "codes_n": len(codes)}

def perplexity(counts: np.ndarray) -> float:
    share = counts[counts > 0] / np.sum(counts)
    return math.exp(-(share * np.log(share)).sum())

def code_ceiling(counts: np.ndarray, size: int) -> float:
    """Highest exp(entropy) / size of a code with `size` values, for inputs that occur `counts` times.

    A function gives all occurrences of an input one code. While the heaviest input left outweighs an even
    share of the codes left, it takes a code of its own; the others are spread evenly over the rest, as if
    they could be cut.
    """
    heaviest, left, own = np.sort(counts)[::-1], int(np.sum(counts)), 0
    while own < len(heaviest) and heaviest[own] * (size - own) > left:  # integers: no rounding decides
        left -= int(heaviest[own])
        own += 1
    even = np.full(size - own, left / max(size - own, 1))
    return perplexity(np.concatenate([heaviest[:own], even])) / size

def code_health(model, grids: list, found: list) -> dict:
    """Use of the codes by occurrence and by distinct object, and which changes of a grid they survive."""
    ids, _ = object_ids(grids)
    codes, result = torch.cat([codes for codes, _ in found]).numpy(), {}
    if not codes.shape[1]:
        return result
    _, distinct = np.unique(ids, return_index=True)
    for name, rows in (("occurrence", np.arange(len(ids))), ("distinct", distinct)):
        size = getattr(model.encoder.quantizer, "size", CODE_SIZE)
        statistics = code_statistics(codes[rows], size, ids[rows])
        top = max(np.bincount(column).max() for column in codes[rows].T)
        statistics["codes_top_share"] = float(top / len(rows))
        result |= {f"{key}_by_{name}": value for key, value in statistics.items()}
    same, other = np.arange(10, dtype=np.int8), np.random.default_rng(0).permutation(10).astype(np.int8)
    for name, colours, symmetry in (("recoloured", other, 0), ("mirrored", same, 4), ("transposed", same, 1)):
        result[f"codes_kept_when_{name}"] = kept_codes(model, grids, found, colours, symmetry)
    return result

def kept_codes(model, grids: list, before: list, colours: np.ndarray, symmetry: int) -> float | None:
    """Share of objects that keep all codes when grids get `colours` (10,) and turn by `symmetry`.

    `before` is what model.codes gave for the grids. Objects are found again by their box; those that share a
    box, or come or go because another colour is the background now, are left out.
    """
    def by_box(codes: Tensor, boxes: Tensor) -> dict:
        boxes = [tuple(box) for box in boxes.tolist()]
        times = Counter(boxes)
        return {box: code for box, code in zip(boxes, codes.tolist()) if times[box] == 1}
    changed, kept = model.codes([arc_data.turn(colours[grid], symmetry) for grid in grids]), []
    for (codes, boxes), after in zip(before, changed):
        turned = arc_data.turn_boxes(boxes[1:], boxes[:1], torch.full((len(boxes) - 1,), symmetry))
        old, new = by_box(codes[1:], turned), by_box(after[0][1:], after[1][1:])
        kept += [old[box] == new[box] for box in old.keys() & new.keys()]
    return float(np.mean(kept)) if kept else None
