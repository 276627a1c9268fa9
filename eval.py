"""What frozen weights are worth: next-grid retrieval on unseen tasks, beside what no learning scores on the same pool.

    python eval.py runs/NAME                      the table of a run, and NAME/eval.json
    python eval.py runs/NAME --data SOURCE        the same on other tasks

A window is (in1, out1, in2) -> out2. A query stands for out2; every distinct output of the split is ranked by its nearness
to the query. The model's query is z_hat; a row of the floors asks with a copy of a grid, or with the analogy
out1 + in2 - in1, in an embedding that was not trained for it. All rows go through `rank`: same windows, same pool, same ties.

    W windows   P distinct outputs: the pool   G distinct grids   T tasks   D embedding width   R training windows   K codes
"""

import argparse
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import arc_data
from arc_data import PAD, Windows

METRICS = ("ndcg10", "r1", "mrr", "ndcg10_without_out1", "r1_without_out1", "mrr_without_out1", "within_task")
COMPARED = ("ndcg10", "ndcg10_without_out1", "within_task")  # the metrics of eval.json
QUERIES = {"copy in2": (0, 0, 1), "copy out1": (0, 1, 0), "analogy": (-1, 1, 1)}  # weights of in1, out1, in2
SAMPLE = 4096  # windows behind an effective rank
CHUNK = 1024  # windows ranked at once: CHUNK x P scores in memory
TIE = 1e-5  # scores nearer than this are equal; rounding in fp32 stays ten times below it
RIDGE = 1e-4  # of the mean variance, added to each when whitening

PerWindow = dict[str, np.ndarray]  # metric -> (W,)
Score = Callable[[Tensor], Tensor]  # numbers of queries (n,) -> scores of the pool (n, P), higher is nearer


# ---------------------------------------------------------------------------------------------- ranks


class Targets(NamedTuple):
    """Where the grids of the windows stand in the pool."""

    out1: Tensor  # (W,) column of the context's own output
    out2: Tensor  # (W,) column of the target
    task: Tensor  # (W,)
    members: Tensor  # (T, P) bool: the distinct outputs of each task


def find_targets(windows: Windows) -> Targets:
    column = np.full(len(windows.grids), -1)
    column[windows.outputs] = np.arange(len(windows.outputs))
    out1, out2 = torch.from_numpy(column[windows.index[:, [1, 3]]].T.copy())
    task = torch.from_numpy(np.asarray(windows.task, np.int64))
    members = torch.zeros(len(windows.task_ids), len(windows.outputs), dtype=torch.bool)
    members[task, out2] = True  # each output of a task is the target of some window
    return Targets(out1, out2, task, members)


def rank(score: Score, windows: Windows, rows: Tensor | None = None) -> PerWindow:
    """Every retrieval metric of every window, from the scores of the whole pool.

    score    numbers of queries (n,) -> (n, P); query i asks for the target of window rows[i]
    rows     (n,)  the windows to rank; all of them by default
    returns  each of METRICS -> (n,) in [0, 1]

    Scores nearer than TIE are equal, so that two grids with one embedding tie however their scores were rounded; a metric
    is then its mean over the orders of the tied grids. 'Without out1': the context's own output leaves the pool, unless it
    is the target. Within-task: among the distinct outputs of the task, without out1 likewise, the target is strictly first.
    """
    where = find_targets(windows)
    if rows is not None:
        where = Targets(where.out1[rows], where.out2[rows], where.task[rows], where.members)
    chunks = torch.arange(len(where.task)).split(CHUNK)
    parts = [_rank_chunk(score(i), where.out1[i], where.out2[i], where.members[where.task[i]]) for i in chunks]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in METRICS}


def _rank_chunk(scores: Tensor, out1: Tensor, out2: Tensor, rivals: Tensor) -> dict[str, Tensor]:
    lines = torch.arange(len(scores))
    margin = scores - scores[lines, out2, None]  # (n, P) over the target
    above, tied = margin > TIE, margin.abs() <= TIE
    rivals[lines, out1] = rivals[lines, out2] = False
    result = rank_metrics(above.sum(1), tied.sum(1)) | {"within_task": (~(rivals & (above | tied)).any(1)).double()}
    for counted in (above, tied):
        counted[lines, out1] &= out1 == out2  # out1 leaves the pool, unless it is the target
    without = rank_metrics(above.sum(1), tied.sum(1))
    return result | {f"{name}_without_out1": value for name, value in without.items()}


def rank_metrics(above: Tensor, tied: Tensor) -> dict[str, Tensor]:
    """nDCG@10, R@1 and MRR of one relevant item, averaged exactly over the orders of its ties.

    above  (n,)  items that score higher      tied  (n,)  items that score the same, the relevant one included
    """
    ranks = torch.arange(1, int((above + tied).max()) + 1, dtype=torch.float64)
    gains = {"ndcg10": (ranks <= 10) / torch.log2(ranks + 1), "r1": (ranks == 1).double(), "mrr": 1 / ranks}
    sums = {name: torch.cat([gain.new_zeros(1), gain.cumsum(0)]) for name, gain in gains.items()}
    return {name: (total[above + tied] - total[above]) / tied for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------- scores


def euclidean(query: Tensor, pool: Tensor) -> Score:
    """Scores in the order of the negative squared distance, scaled so that TIE means the same in every embedding.

    query (W, D), pool (P, D). The part that all pool items share, |query|^2, is left out; the mean of the pool is taken off
    first, for the digits. Embeddings are rounded at the scale of their norm before that, so the norm has a part in the scale:
    a pool whose spread is under 1e-4 of its norm is one point, and all its items tie.
    """
    middle, norm = pool.mean(0), pool.square().sum(1).mean()
    query, pool = query - middle, pool - middle
    lengths = pool.square().sum(1)  # (P,)
    unit = lengths.mean() + 1e-3 * norm + 1e-30
    scale = (query.square().sum(1) * unit).sqrt() + unit  # (W,)
    return lambda rows: (query[rows] @ pool.T - lengths / 2) / scale[rows, None]


def cosine(query: Tensor, pool: Tensor) -> Score:
    """Cosines of queries (W, D) and pool (P, D). A zero vector scores 0."""
    query, pool = (torch.nn.functional.normalize(x, dim=1, eps=1e-30) for x in (query, pool))
    return lambda rows: query[rows] @ pool.T


def retrieval(query: Tensor, pool: Tensor, windows: Windows, score: Callable = euclidean, rows: Tensor | None = None) -> PerWindow:
    """`rank` for queries (n, D) against the embeddings of `windows.outputs` (P, D), by `euclidean` distance or `cosine`."""
    query, pool = query.float(), pool.float()
    if not (query.isfinite().all() and pool.isfinite().all()):
        raise ValueError("embeddings hold nan or inf: there is nothing to rank")
    return rank(score(query, pool), windows, rows)


def queries(z: Tensor, windows: Windows, weights: tuple[int, int, int]) -> Tensor:
    """The sum of in1, out1 and in2 under `weights`, for embeddings z (G, D) of the distinct grids -> (W, D)."""
    index = torch.from_numpy(windows.index)
    return sum(w * z[index[:, role]] for role, w in enumerate(weights) if w)


def whitening(residuals: Tensor) -> Tensor:
    """The symmetric map (D, D) after which training residuals z - z_hat (R, D) have unit covariance."""
    variances, axes = torch.linalg.eigh(torch.cov(residuals.double().T))
    scale = (variances.clamp_min(0) + RIDGE * variances.mean() + 1e-30).rsqrt()
    return ((axes * scale) @ axes.T).float()


# ---------------------------------------------------------------------------------------------- floors: what no learning scores


def raw_scores(windows: Windows, weights: tuple[int, int, int], overlap: Tensor) -> Score:
    """Cosines of raw grids, one-hot 30 x 30 x 11 minus the mean of the pool, without building a query.

    overlap (G, P) counts the cells in which two grids agree: the product of their one-hot vectors. As the weights of a query
    sum to 1, every centred product is a weighted sum of rows of `overlap` and of its means.
    """
    index, w = torch.from_numpy(windows.index[:, :3]), torch.tensor(weights, dtype=torch.float64)
    cells = torch.from_numpy(arc_data.pad(windows.grids)).flatten(1)[index]  # (W, 3, 900)
    agree = torch.stack([(cells == cells[:, [role]]).sum(2) for role in range(3)], 1).double()  # (W, 3, 3)
    mean = overlap.mean(1)  # (G,) product with the mean of the pool
    pool_mean, total = mean[windows.outputs], mean[windows.outputs].mean()
    pool_norm = (cells.shape[2] - 2 * pool_mean + total).clamp_min(1e-30).sqrt()  # (P,)
    query_mean = mean[index] @ w  # (W,)
    query_norm = (torch.einsum("wij,i,j->w", agree, w, w) - 2 * query_mean + total).clamp_min(1e-30).sqrt()

    def score(rows: Tensor) -> Tensor:
        product = sum(w[role] * overlap[index[rows, role]] for role in range(3) if w[role])  # (n, P)
        return (product - query_mean[rows, None] - pool_mean + total) / (query_norm[rows, None] * pool_norm)

    return score


def cell_overlap(windows: Windows) -> Tensor:
    """In how many of the 900 padded cells each grid agrees with each output: (G, P), exact."""
    cells = torch.from_numpy(arc_data.pad(windows.grids)).flatten(1)
    pool = cells[windows.outputs]
    return sum((cells == c).float() @ (pool == c).float().T for c in range(PAD + 1)).double()  # as sums of rows cancel


def features(grids: list[np.ndarray]) -> np.ndarray:
    """31 hand-made numbers a grid, (G, 31): size, colours, components (4-connected), symmetry."""
    cells = arc_data.pad(grids)
    labels = arc_data.components(cells, connectivity=4)
    first = labels.reshape(-1) == np.arange(labels.size)  # the cell that a component is named after
    first = first.reshape(cells.shape)
    pieces = np.stack([(first & (cells == c)).sum((1, 2)) for c in range(10)], 1)  # (G, 10)
    shares = np.stack([(cells == c).sum((1, 2)) for c in range(10)], 1)
    shares = shares / shares.sum(1, keepdims=True)
    common = arc_data.most_common_colour(cells)
    rest = np.arange(len(grids)), common
    height, width = np.array([grid.shape for grid in grids]).T
    columns = [height / 30, width / 30, height * width / 900, np.log(height * width) / 7, (shares > 0).sum(1) / 10,
               np.log1p(pieces.sum(1)) / 7, np.log1p(pieces.sum(1) - pieces[rest]) / 7, 1 - shares[rest]]
    return np.column_stack([*columns, [symmetries(grid) for grid in grids], shares, np.log1p(pieces) / 5])


def symmetries(grid: np.ndarray) -> tuple[float, float, float]:
    """Share of cells equal under up-down flip, left-right flip and transpose (0 if not square)."""
    square = grid.shape[0] == grid.shape[1]
    return (grid == grid[::-1]).mean(), (grid == grid[:, ::-1]).mean(), (grid == grid.T).mean() if square else 0.0


def standardised_features(windows: Windows) -> Tensor:
    x = features(windows.grids)
    pool = x[windows.outputs]
    return torch.from_numpy((x - pool.mean(0)) / np.maximum(pool.std(0), 1e-9)).float()  # (G, 31)


def floor_rows(windows: Windows) -> dict[str, PerWindow]:
    """What no learning scores: raw grids and 31 features, by cosine. Depends on the data alone; a few seconds a split."""
    overlap, x = cell_overlap(windows), standardised_features(windows)
    raw = {name: raw_scores(windows, weights, overlap) for name, weights in QUERIES.items()}
    described = cosine(queries(x, windows, QUERIES["analogy"]), x[windows.outputs])
    scores = {f"{name}, raw": score for name, score in raw.items()}
    scores["analogy, 31 features"] = described
    scores["analogy, raw + 31 features"] = lambda rows: raw["analogy"](rows) + described(rows)
    return {name: rank(score, windows) for name, score in scores.items()}


def embedding_rows(z: Tensor, windows: Windows, name: str) -> dict[str, PerWindow]:
    """Copy and analogy in an embedding z (G, D) of the distinct grids, by Euclidean distance."""
    return {f"{query}, {name}": retrieval(queries(z, windows, weights), z[windows.outputs], windows) for query, weights in QUERIES.items()}


# ---------------------------------------------------------------------------------------------- intervals


def interval(values: np.ndarray, task: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (W,), drawing whole tasks (W,) with replacement.

    Windows of one task are not independent; a draw's mean is a ratio of sums, as tasks have different numbers of windows.
    """
    _, task = np.unique(task, return_inverse=True)
    sums, counts = np.bincount(task, values), np.bincount(task)  # (T,)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)  # (draws, T)
    low, high = np.percentile(times @ sums / (times @ counts), [2.5, 97.5])
    return float(low), float(high)


def difference(a: np.ndarray, b: np.ndarray, task: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over windows (W,), and its interval: both are drawn on the same tasks, so what is hard for both cancels."""
    return float(np.mean(a - b)), *interval(a - b, task, draws, seed)


# ---------------------------------------------------------------------------------------------- a model


def shuffle_context(windows: Windows, seed: int = 0) -> np.ndarray:
    """For each window (W,), the number of a window of another task whose (in1, out1) it is to be shown instead.

    Tasks stand in one seeded ring and each takes from the next, so none keeps its own. Raises ValueError for a single task.
    """
    rng = np.random.default_rng(seed)
    names, task = np.unique(windows.task, return_inverse=True)
    if len(names) < 2:
        raise ValueError("a shuffled context needs windows of two tasks or more")
    ring = rng.permutation(len(names))
    donor = np.empty_like(ring)
    donor[ring] = np.roll(ring, 1)
    order, counts = np.argsort(task, kind="stable"), np.bincount(task)
    start = np.cumsum(counts) - counts
    taken = donor[task]  # (W,)
    return order[start[taken] + rng.integers(counts[taken])]


def contexts(windows: Windows, rows: np.ndarray, pair_from: np.ndarray | None = None) -> list[tuple[np.ndarray, ...]]:
    """(in1, out1, in2) of the windows `rows` (n,); (in1, out1) of the windows `pair_from` (n,), if given."""
    index = windows.index[rows, :3].copy()
    if pair_from is not None:
        index[:, :2] = windows.index[pair_from, :2]
    return [tuple(windows.grids[i] for i in context) for context in index]


def effective_rank(z: Tensor) -> float:
    """How many directions embeddings z (N, D) use: exp of the entropy of the covariance's eigenvalues, 1 to D."""
    z = z.double()
    values = torch.linalg.eigvalsh(torch.cov(z.T) + 1e-6 * torch.eye(z.shape[1], dtype=z.dtype)).clamp_min(0)
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def effective_ranks(z_hat: Tensor, target: Tensor, seed: int = 0) -> dict[str, float]:
    """Of context and target (W, D) over SAMPLE seeded windows. Fewer windows than a few times D bias it low."""
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(z_hat))[:SAMPLE])
    return {"effective_rank_context": effective_rank(z_hat[rows]), "effective_rank_target": effective_rank(target[rows])}


@torch.no_grad()
def quick(model, windows: Windows, pool: Tensor | None = None, limit: int = 1024, seed: int = 0) -> dict[str, float]:
    """Retrieval on a seeded sample of `limit` windows, against the whole pool (P, D), if at hand; for a look during training."""
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(windows.task))[:limit]))
    if pool is None:
        pool = model.embed([windows.grids[i] for i in windows.outputs]).float().cpu()  # (P, D)
    z_hat = model.predict(contexts(windows, rows.numpy())).float().cpu()  # (limit, D)
    target = pool[find_targets(windows).out2[rows]]
    values = retrieval(z_hat, pool, windows, rows=rows)
    result = {name: float(values[name].mean()) for name in ("ndcg10", "ndcg10_without_out1", "r1", "within_task")}
    return result | {"prediction": float((z_hat - target).square().mean())} | effective_ranks(z_hat, target, seed)


@torch.no_grad()
def evaluate(model, windows: Windows, *, untrained=None, residuals: Tensor | None = None,
             floors: dict[str, PerWindow] | None = None) -> tuple[dict, dict[str, PerWindow]]:
    """All figures of a frozen model on unseen windows, beside the rows that did not learn to predict.

    model      has embed(grids) -> (n, D) and predict([(in1, out1, in2)]) -> (n, D)
    untrained  the same model before training; its copy and analogy then count as floors
    residuals  (R, D)  z - z_hat on training windows; adds the metrics by whitened distance, prefixed `whitened_`
               (those by cosine, prefixed `cosine_`, are always there; the ones without a prefix are by Euclidean distance)
    floors     what `floor_rows` gave for these windows, where the caller kept it
    returns    the figures, ready for JSON, and row -> metric -> (W,) behind them

    The shuffled control shows the model (in1, out1) of another task. The output left out of the pool stays the window's
    own out1, so that the figure and the one it is compared with rank the same pool.
    """
    if not len(windows.task):
        raise ValueError("there is no window to evaluate: a task needs two pairs with outputs")
    z = model.embed(windows.grids).float().cpu()  # (G, D)
    pool, target = z[windows.outputs], z[windows.index[:, 3]]
    every = np.arange(len(windows.task))
    z_hat = model.predict(contexts(windows, every)).float().cpu()  # (W, D)

    rows = {"model": retrieval(z_hat, pool, windows), "cosine": retrieval(z_hat, pool, windows, cosine)}
    if residuals is not None:
        white = whitening(residuals.cpu())
        rows["whitened"] = retrieval(z_hat @ white, pool @ white, windows)
    if len(np.unique(windows.task)) > 1:
        shuffled = model.predict(contexts(windows, every, shuffle_context(windows))).float().cpu()
        rows["shuffled"] = retrieval(shuffled, pool, windows)
    rows |= floor_rows(windows) if floors is None else floors
    if untrained is not None:
        rows |= embedding_rows(untrained.embed(windows.grids).float().cpu(), windows, "untrained")
    rows |= embedding_rows(z, windows, "trained")

    result = summary(rows, windows.task) | effective_ranks(z_hat, target)
    return result | {"prediction": float((z_hat - target).square().mean()), "windows": len(every)}, rows


def summary(rows: dict[str, PerWindow], task: np.ndarray) -> dict:
    """Means, intervals, floors and the model's lead over each floor, of row -> metric -> (W,); keys as in result.json.

    The best no-learning row is the highest of all floors but those in the trained embedding.
    """
    mean = {row: {metric: float(values[metric].mean()) for metric in METRICS} for row, values in rows.items()}
    floors = {row: means for row, means in mean.items() if row not in ("model", "cosine", "whitened", "shuffled")}
    unlearned = [means for row, means in floors.items() if not row.endswith(", trained")]
    result = dict(mean["model"])
    result |= {f"{row}_{metric}": value for row in ("cosine", "whitened") for metric, value in mean.get(row, {}).items()}
    result["shuffled_ndcg10_without_out1"] = mean["shuffled"]["ndcg10_without_out1"] if "shuffled" in mean else None
    result |= {f"floor_{metric}": max(means[metric] for means in unlearned) for metric in ("ndcg10_without_out1", "within_task")}
    result["floors"] = floors
    result["intervals"] = {metric: interval(rows["model"][metric], task) for metric in METRICS}
    result["lead"] = {row: {metric: difference(rows["model"][metric], rows[row][metric], task) for metric in COMPARED} for row in floors}
    return result


def code_statistics(codes: np.ndarray, size: int, inputs: np.ndarray) -> dict[str, float]:
    """How evenly a code is used, and how evenly it could be.

    codes    (n, n_codes)  int64 in [0, size)
    inputs   (n,)          int64 identity of what each row's codes were computed from
    returns  codes_usage       lowest share of the codes in use, over code positions
             codes_perplexity  exp(entropy) / size, mean over code positions: 1 is uniform, 0.96 a uniform draw of 12.5 size
             codes_ceiling     the highest exp(entropy) / size that any function of the input could reach
             codes_n           n
    """
    codes = np.asarray(codes)
    if codes.shape[1] == 0:  # a model without codes
        return dict.fromkeys(("codes_usage", "codes_perplexity", "codes_ceiling"), None) | {"codes_n": len(codes)}
    if len(codes) == 0 or codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes must be at least one row of numbers from 0 to {size - 1}")
    counts = [np.bincount(column, minlength=size) for column in codes.T]
    return {"codes_usage": min(float((c > 0).mean()) for c in counts),
            "codes_perplexity": float(np.mean([np.exp(entropy(c / c.sum())) for c in counts]) / size),
            "codes_ceiling": code_ceiling(np.unique(inputs, return_counts=True)[1], size), "codes_n": len(codes)}


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def code_ceiling(counts: np.ndarray, size: int) -> float:
    """Highest exp(entropy) / size of a code with `size` values, for inputs that occur `counts` times.

    A function gives all occurrences of an input one code. While the heaviest input left outweighs an even share of the codes
    left, it takes a code of its own; the others are spread evenly over the rest, as if they could be cut at will.
    """
    heaviest, left, own = np.sort(counts)[::-1], int(np.sum(counts)), 0
    while own < len(heaviest) and heaviest[own] * (size - own) > left:  # in whole numbers: no rounding decides
        left -= int(heaviest[own])
        own += 1
    even = np.full(size - own, left / max(size - own, 1))
    return math.exp(entropy(np.concatenate([heaviest[:own], even]) / np.sum(counts))) / size


# ---------------------------------------------------------------------------------------------- pictures

PALETTE = np.array([[0, 0, 0], [0, 116, 217], [255, 65, 54], [46, 204, 64], [255, 220, 0], [170, 170, 170], [240, 18, 190],
                    [255, 133, 27], [127, 219, 255], [135, 12, 37], [255, 255, 255]], np.uint8)  # ARC's colours; 10 is no cell


def draw(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid as a (side, side, 3) picture in ARC's colours, its cells as large as they fit."""
    cell = side // max(grid.shape)
    picture = np.full((side, side), PAD)
    large = np.kron(grid, np.ones((cell, cell), grid.dtype))
    picture[:large.shape[0], :large.shape[1]] = large
    return PALETTE[picture]


@torch.no_grad()
def picture(model, windows: Windows, pool: Tensor, rows: int = 6, top: int = 3, side: int = 90, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: a line a window, with in1, out1, in2, a gap, the truth, a gap, and the `top` of pool (P, D) nearest to z_hat."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(windows.index))[:rows])
    near = windows.outputs[torch.cdist(model.predict(contexts(windows, chosen)).float().cpu(), pool).argsort(1)[:, :top].numpy()]
    lines = []
    for row, best in zip(chosen, near):
        in1, out1, in2, truth = (draw(windows.grids[i], side) for i in windows.index[row])
        gap = np.full((side, side // 6, 3), 200, np.uint8)
        thin = gap[:, :4]
        cells = [in1, thin, out1, thin, in2, gap, truth, gap] + [part for i in best for part in (draw(windows.grids[i], side), thin)]
        lines += [np.concatenate(cells, 1), np.full((4, sum(cell.shape[1] for cell in cells), 3), 200, np.uint8)]
    return np.concatenate(lines)


# The recorded `production` run of arc-jepa-rl (2025-12; InfoNCE, VQ codebook, 20+ hyper-parameters): step, rank of context
# and of target, share of codes used.
RECORDED = {"step": (100, 1000, 3000, 5000, 7600), "effective_rank_context": (3.73, 3.91, 7.25, 14.56, 15.53),
            "effective_rank_target": (5.22, 6.55, 8.63, 16.06, 19.34), "codes_usage": (0.268, 0.164, 0.302, 0.211, 0.336)}


def plot_run(folder: Path) -> Path:
    """result.png of a run's folder: retrieval against the floors, loss, and health over training beside a recorded failure."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    result = json.loads((folder / "result.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    looks = [row for row in log if row.get("effective_rank_target") is not None]
    figure, (bars, curves, ranks, usage) = pyplot.subplots(1, 4, figsize=(19, 4.6), width_ratios=(1.5, 1, 1, 1), layout="constrained")
    _plot_retrieval(bars, result)
    for name, label in (("ndcg10_without_out1", "unseen tasks"), ("train_ndcg10_without_out1", "training tasks")):
        curves.plot([row["step"] for row in looks], [row[name] for row in looks], label=label)
    curves.axhline(result["floor_ndcg10_without_out1"], color="grey", linestyle=":", label="best no-learning row, unseen")
    curves.set(xlabel="step", ylabel="nDCG@10 without out1", title="retrieval by z_hat over training")
    for axis, names, title in ((ranks, ("effective_rank_context", "effective_rank_target"), "effective rank"), (usage, ("codes_usage",), "share of codes used")):
        for name, colour in zip(names, ("tab:blue", "tab:orange")):
            label = name.replace("effective_rank_", "").replace("codes_usage", "codes")
            if looks[-1][name] is not None:
                axis.plot(np.array([row["step"] for row in looks]) / looks[-1]["step"], [row[name] for row in looks], color=colour, label=label)
            axis.plot(np.array(RECORDED["step"]) / RECORDED["step"][-1], RECORDED[name], color=colour, linestyle=":", marker="o", markersize=3,
                      label=f"{label}, arc-jepa-rl 'production'")
        axis.set(xlabel="share of the run", title=title, ylabel=title, ylim=(0, 1.05 if axis is usage else None))
    for axis in (curves, ranks, usage):
        axis.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    pyplot.close(figure)
    write_whole(folder / "result.png", drawn.getvalue())
    return folder / "result.png"


def _plot_retrieval(axis, result: dict):
    """Bars of nDCG@10 without out1, the model's with its interval, the floors below it."""
    metric = "ndcg10_without_out1"
    rows = {"z_hat": result[metric]} | {name: values[metric] for name, values in result["floors"].items()}
    names = list(rows)[::-1]
    low, high = result["intervals"][metric]
    axis.barh(names, [rows[name] for name in names], color=["tab:blue" if name == "z_hat" else "lightgrey" for name in names])
    axis.errorbar(rows["z_hat"], "z_hat", xerr=[[rows["z_hat"] - low], [high - rows["z_hat"]]], color="black", capsize=3)
    for name, value in rows.items():
        axis.text(0.01, name, f"{value:.3f}", va="center", fontsize=8)
    axis.set(xlabel="nDCG@10 without out1, unseen tasks", title=f"next-grid retrieval, {result['validation_windows']} windows", xlim=(0, 1))


# ---------------------------------------------------------------------------------------------- the command


def table(result: dict) -> str:
    """The model with its intervals, and every floor with the model's lead over it."""
    def line(name: str, cells: list[str]) -> str:
        return f"{name:28}" + "  ".join(f"{cell:34}" for cell in cells).rstrip()

    lines = [line("", list(COMPARED)),
             line("z_hat [95 %]", ["{:.3f} [{:.3f}, {:.3f}]".format(result[metric], *result["intervals"][metric]) for metric in COMPARED])]
    for row, means in result["floors"].items():
        lines.append(line(row, ["{:.3f} lead {:+.3f} [{:+.3f}, {:+.3f}]".format(means[metric], *result["lead"][row][metric]) for metric in COMPARED]))
    return "\n".join(lines)


def eval_json(result: dict) -> dict:
    return {metric: {"model": result[metric], "floors": {row: means[metric] for row, means in result["floors"].items()},
                     "interval": result["intervals"][metric], "n": result["windows"]} for metric in COMPARED}


def write_whole(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Writes a file so that at every moment either the old or the new one is there, whole; the old one stays under the name `keep`.

    What was there is not touched before the new bytes are on the disk. OSError names the file.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renaming too
        os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)  # it is there only if something went wrong


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def warn_of_leaks(cfg, source: str, tasks: dict):
    """Says on stderr how many tasks the run was trained on, up to symmetry and colour."""
    try:
        trained, _, _ = arc_data.split(cfg.data, cfg.validate)
    except (ValueError, OSError) as error:
        print(f"not checked whether the tasks are unseen: {error}", file=sys.stderr)
        return
    shared = arc_data.without_leaks(tasks, trained)[1]
    if shared:
        print(f"{len(shared)} of the {len(tasks)} tasks of {source} share a pair with the training tasks: not unseen", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="eval.py", description="Next-grid retrieval of a run's frozen encoder, beside what no learning scores.", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder that lejepa.py wrote")
    parser.add_argument("--data", metavar="SOURCE", default=arc_data.REPORTED, help="tasks to evaluate on (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where eval.json goes (default: RUN)")
    args = parser.parse_args(argv)
    from lejepa import build, load_run
    out = args.out or args.run
    try:
        model, cfg = load_run(args.run)
        tasks = arc_data.load_tasks(args.data)
        windows = arc_data.make_windows(tasks)
        warn_of_leaks(cfg, args.data, tasks)
        out.mkdir(parents=True, exist_ok=True)
        result, _ = evaluate(model, windows, untrained=build(cfg).eval())
        write_whole(out / "eval.json", json.dumps(eval_json(result), indent=1).encode() + b"\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
