"""What frozen weights are worth on unseen tasks, beside what no learning scores; whether they are healthy; what their codes say.

    python eval.py runs/NAME [--data SOURCE] [--labels labels.json]    table, verdicts, NAME/eval.json, NAME/report.md with plots
    python eval.py codes runs/NAME --data SOURCE --out codes.jsonl     the symbols of every grid, a line a grid
    python eval.py compare runs/A runs/B ...                           runs side by side, paired

A window is (in1, out1, in2) -> out2. A query stands for out2; every distinct output of the split is ranked by its nearness
to the query. The model's query is z_hat; a row of the floors asks with a copy of a grid, or with the analogy
out1 + in2 - in1, in an embedding that was not trained for it. All rows go through `rank`: same windows, same pool, same ties.

Tasks that need no predictor (which task is a pair of, what is a pair like) take (z_in, z_out, z_out - z_in) of a pair.

    W windows   P distinct outputs: the pool   G distinct grids   H distractors   T tasks   D embedding width   R training windows
    n pairs     L labelings of pairs           C classes          F folds         K codes
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import arc_data
import report
from arc_data import PAD, Windows
from report import draw, write_whole

METRICS = ("ndcg10", "r1", "mrr", "ndcg10_without_out1", "r1_without_out1", "mrr_without_out1", "within_task")
COMPARED = ("ndcg10", "ndcg10_without_out1", "within_task")  # the metrics of a run's own table
HARD = ("hard_ndcg10", "hard_r1")
RETRIEVAL = ("ndcg10", "ndcg10_without_out1", "hard_ndcg10", "hard_r1", "within_task")
PAIRWISE = ("task_1nn", "probe_linear", "probe_knn", "probe_vote")  # with RETRIEVAL, the metrics of eval.json
QUERIES = {"copy in2": (0, 0, 1), "copy out1": (0, 1, 0), "analogy": (-1, 1, 1)}  # weights of in1, out1, in2
SAMPLE = 4096  # windows behind an effective rank
SIGREG_N = 192  # of a sample that SIGReg is measured on: a step of the default run
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


def rank(score: Score, windows: Windows, rows: Tensor | None = None, hard: "Hard | None" = None) -> PerWindow:
    """Every retrieval metric of every window, from the scores of the whole pool.

    score    numbers of queries (n,) -> (n, P); query i asks for the target of window rows[i]
    rows     (n,)  the windows to rank; all of them by default
    hard     `score` then gives (n, P + 4), each window's own distractors last; adds hard_ndcg10 and hard_r1 of hard.rows
    returns  each of METRICS -> (n,) in [0, 1]

    Scores nearer than TIE are equal, so that two grids with one embedding tie however their scores were rounded; a metric
    is then its mean over the orders of the tied grids. 'Without out1': the context's own output leaves the pool, unless it
    is the target. Within-task: among the distinct outputs of the task, without out1 likewise, the target is strictly first.
    """
    where = find_targets(windows)
    if rows is not None:
        where = Targets(where.out1[rows], where.out2[rows], where.task[rows], where.members)
    parts = []
    for i in torch.arange(len(where.task)).split(CHUNK):
        scores = score(i)
        parts.append(_rank_chunk(scores[:, :len(windows.outputs)], where.out1[i], where.out2[i], where.members[where.task[i]]))
        if hard is not None:
            parts[-1] |= _rank_hard(scores, where.out2[i], hard.own[i])
    values = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return values if hard is None else values | {name: values[name][hard.rows] for name in HARD}


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


def _rank_hard(scores: Tensor, out2: Tensor, own: Tensor) -> dict[str, Tensor]:
    margin = scores - scores.gather(1, out2[:, None])
    margin[:, -own.shape[1]:][own < 0] = -math.inf  # there is no such distractor
    result = rank_metrics((margin > TIE).sum(1), (margin.abs() <= TIE).sum(1))
    return {name: result[name.removeprefix("hard_")] for name in HARD}


def rank_metrics(above: Tensor, tied: Tensor) -> dict[str, Tensor]:
    """nDCG@10, R@1 and MRR of one relevant item, averaged exactly over the orders of its ties.

    above  (n,)  items that score higher      tied  (n,)  items that score the same, the relevant one included
    """
    ranks = torch.arange(1, int((above + tied).max()) + 1, dtype=torch.float64)
    gains = {"ndcg10": (ranks <= 10) / torch.log2(ranks + 1), "r1": (ranks == 1).double(), "mrr": 1 / ranks}
    sums = {name: torch.cat([gain.new_zeros(1), gain.cumsum(0)]) for name, gain in gains.items()}
    return {name: (total[above + tied] - total[above]) / tied for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------- scores


def euclidean(query: Tensor, pool: Tensor, near: Callable | None = None) -> Score:
    """Scores in the order of the negative squared distance, scaled so that TIE means the same in every embedding.

    query (W, D), pool (P, D). The part that all pool items share, |query|^2, is left out; the mean of the pool is taken off
    first, for the digits. Embeddings are rounded at the scale of their norm before that, so the norm has a part in the scale:
    a pool whose spread is under 1e-4 of its norm is one point, and all its items tie. `near` gives items of each query's own,
    numbers of queries (n,) -> (n, 4, D), which are scored after the pool.
    """
    middle, norm = pool.mean(0), pool.square().sum(1).mean()
    query, pool = query - middle, pool - middle
    lengths = pool.square().sum(1)  # (P,)
    unit = lengths.mean() + 1e-3 * norm + 1e-30
    scale = (query.square().sum(1) * unit).sqrt() + unit  # (W,)

    def score(rows: Tensor) -> Tensor:
        scores = query[rows] @ pool.T - lengths / 2
        if near is not None:
            own = near(rows) - middle
            scores = torch.cat([scores, (query[rows, None] * own).sum(2) - own.square().sum(2) / 2], 1)
        return scores / scale[rows, None]

    return score


def cosine(query: Tensor, pool: Tensor, near: Callable | None = None) -> Score:
    """Cosines of queries (W, D) and pool (P, D), and of each query's own items as in `euclidean`. A zero vector scores 0."""
    query, pool = unit_length(query), unit_length(pool)

    def score(rows: Tensor) -> Tensor:
        scores = query[rows] @ pool.T
        return scores if near is None else torch.cat([scores, (query[rows, None] * unit_length(near(rows))).sum(2)], 1)

    return score


def unit_length(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-30)


def check_finite(*embeddings: Tensor) -> None:
    if not all(bool(x.isfinite().all()) for x in embeddings):
        raise ValueError("embeddings hold nan or inf: there is nothing to rank")


def retrieval(query: Tensor, pool: Tensor, windows: Windows, score: Callable = euclidean, rows: Tensor | None = None) -> PerWindow:
    """`rank` for queries (n, D) against the embeddings of `windows.outputs` (P, D), by `euclidean` distance or `cosine`."""
    query, pool = query.float(), pool.float()
    check_finite(query, pool)
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


# ---------------------------------------------------------------------------------------------- hard retrieval


class Hard(NamedTuple):
    """What is added to the pool of each query, and to no other."""

    grids: list  # the grids of the windows, then H more
    own: Tensor  # (W, 4) in grids: in2, the target with a cell changed, two colours swapped, mirrored; -1 where there is none
    rows: Tensor  # the windows that are asked: those with in2 other than out2


def altered(grid: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The grid with one cell set to another of its colours, with its two most frequent colours swapped, and mirrored left-right."""
    counts = np.bincount(grid.ravel(), minlength=10)
    if np.count_nonzero(counts) < 2:
        return [grid] * 3  # no such grid differs
    a, b = np.argsort(-counts, kind="stable")[:2]
    one, colours, cell = grid.copy(), np.flatnonzero(counts), rng.integers(grid.size)
    one.flat[cell] = rng.choice(colours[colours != grid.flat[cell]])
    return [one, np.where(grid == a, b, np.where(grid == b, a, grid)).astype(grid.dtype), grid[:, ::-1]]


def distractors(windows: Windows, seed: int = 0) -> Hard:
    """Those of each window. What equals the target, another distractor of the window, or what is in the pool already, is dropped."""
    rng, grids = np.random.default_rng(seed), list(windows.grids)
    place = {(grid.shape, grid.tobytes()): i for i, grid in enumerate(grids)}
    of_target = np.full((len(grids), 3), -1)
    for target in windows.outputs:
        for i, grid in enumerate(altered(windows.grids[target], rng)):
            if place.setdefault((grid.shape, grid.tobytes()), len(grids)) == len(grids):
                grids.append(grid)
            of_target[target, i] = place[grid.shape, grid.tobytes()]
    own = np.column_stack([windows.index[:, 2], of_target[windows.index[:, 3]]])
    own[np.isin(own, windows.outputs)] = -1  # the target is in the pool as well
    for i in range(1, 4):
        own[(own[:, :i] == own[:, [i]]).any(1), i] = -1
    return Hard(grids, torch.from_numpy(own), torch.from_numpy(np.flatnonzero(windows.index[:, 2] != windows.index[:, 3])))


def ask(query: Tensor, x: Tensor, windows: Windows, hard: Hard, score: Callable = euclidean) -> PerWindow:
    """Retrieval, plain and hard, for queries (W, D) against embeddings x (G + H, D) of hard.grids."""
    return rank(score(query, x[windows.outputs], lambda rows: x[hard.own[rows]]), windows, hard=hard)


def logits(query: Tensor, pool: Tensor, score: Callable) -> Tensor:
    """(W, P) negative squared distances or cosines, without the scale of each query that `euclidean` has."""
    return -torch.cdist(query, pool).square() if score is euclidean else score(query, pool)(torch.arange(len(query)))


def cross_entropy(scores: Tensor, out2: Tensor) -> np.ndarray:
    """Nats of the right output among the pool, softmax(scores (W, P) / t), at the one temperature t that is best for all windows."""
    margin = (scores - scores.gather(1, out2[:, None])).float()
    margin /= margin.abs().mean().clamp_min(1e-30)
    some = margin[::math.ceil(len(margin) / CHUNK)]  # about as many windows as make a chunk find t
    nats = lambda margin, log_t: torch.logsumexp(margin * math.exp(-log_t), 1)
    low, high, golden = -10.0, 5.0, (5**0.5 - 1) / 2
    while high - low > 0.02:  # the mean has one minimum; 0.02 of log t is less than 1e-3 nats
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if nats(some, a).mean() < nats(some, b).mean() else (a, high)
    return nats(margin, (low + high) / 2).double().numpy()


# ---------------------------------------------------------------------------------------------- floors: what no learning scores


def raw_scores(windows: Windows, weights: tuple[int, int, int], overlap: Tensor, hard: "Hard | None" = None) -> Score:
    """Cosines of raw grids, one-hot 30 x 30 x 11 minus the mean of the pool, without building a query.

    overlap (G, P) counts the cells in which two grids agree: the product of their one-hot vectors. As the weights of a query
    sum to 1, every centred product is a weighted sum of rows of `overlap` and of its means. With `hard`, each window's own
    distractors are four columns more.
    """
    index, w = torch.from_numpy(windows.index[:, :3]), torch.tensor(weights, dtype=torch.float64)
    grids = torch.from_numpy(arc_data.pad(hard.grids if hard else windows.grids)).flatten(1)
    cells = grids[index]  # (W, 3, 900)
    agree = torch.stack([(cells == cells[:, [role]]).sum(2) for role in range(3)], 1).double()  # (W, 3, 3)
    mean = overlap.mean(1)  # (G,) product with the mean of the pool
    pool_mean, total = mean[windows.outputs], mean[windows.outputs].mean()
    pool_norm = (cells.shape[2] - 2 * pool_mean + total).clamp_min(1e-30).sqrt()  # (P,)
    query_mean = mean[index] @ w  # (W,)
    query_norm = (torch.einsum("wij,i,j->w", agree, w, w) - 2 * query_mean + total).clamp_min(1e-30).sqrt()

    def score(rows: Tensor) -> Tensor:
        product = sum(w[role] * overlap[index[rows, role]] for role in range(3) if w[role])  # (n, P)
        return (product - query_mean[rows, None] - pool_mean + total) / (query_norm[rows, None] * pool_norm)

    if hard is None:
        return score
    pool = torch.nn.functional.one_hot(grids[windows.outputs].long(), PAD + 1).double().mean(0)  # (900, 11)
    every_mean = pool[torch.arange(len(pool)), grids.long()].sum(1)  # (G + H,)
    every_norm = (cells.shape[2] - 2 * every_mean + total).clamp_min(1e-30).sqrt()

    def score_hard(rows: Tensor) -> Tensor:
        own = hard.own[rows]  # (n, 4)
        product = sum(w[role] * (cells[rows, role, None] == grids[own]).sum(2) for role in range(3) if w[role])
        product = (product - query_mean[rows, None] - every_mean[own] + total) / (query_norm[rows, None] * every_norm[own])
        return torch.cat([score(rows), product], 1)  # (n, P + 4)

    return score_hard


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


def floor_scores(windows: Windows, hard: Hard | None = None, x: Tensor | None = None) -> dict[str, Score]:
    """Scores by the cosine of raw grids and of 31 features; with `hard`, whose grids have the features x (G + H, 31), of distractors too."""
    overlap, x = cell_overlap(windows), standardised_features(windows) if x is None else x
    raw = {name: raw_scores(windows, weights, overlap, hard) for name, weights in QUERIES.items()}
    described = cosine(queries(x, windows, QUERIES["analogy"]), x[windows.outputs], hard and (lambda rows: x[hard.own[rows]]))
    scores = {f"{name}, raw": score for name, score in raw.items()}
    scores["analogy, 31 features"] = described
    return scores | {"analogy, raw + 31 features": lambda rows: raw["analogy"](rows) + described(rows)}


def floor_rows(windows: Windows) -> dict[str, PerWindow]:
    """What no learning scores: raw grids and 31 features, by cosine. Depends on the data alone; a few seconds a split."""
    return {name: rank(score, windows) for name, score in floor_scores(windows).items()}


def embedding_rows(z: Tensor, windows: Windows, name: str) -> dict[str, PerWindow]:
    """Copy and analogy in an embedding z (G, D) of the distinct grids, by Euclidean distance."""
    return {f"{query}, {name}": retrieval(queries(z, windows, weights), z[windows.outputs], windows) for query, weights in QUERIES.items()}


def symbol_bag(found: list, size: int, boxes: bool, width: int = 1024) -> Tensor:
    """The symbols of each grid, (G, width): a sum over its objects of random features, from `found`, what model.codes gave.

    The product of two objects' features averages the share of codes that they have in common, times, with `boxes`,
    exp(-|box - box'|^2 / 2 (3 cells)^2).
    """
    random = torch.Generator().manual_seed(0)
    positions = found[0][0].shape[1]
    tables = torch.randn(positions, size, width, generator=random) / (positions * width) ** 0.5
    waves, phase = torch.randn(4, width, generator=random) / 3, 2 * math.pi * torch.rand(width, generator=random)

    def features(codes: Tensor, box: Tensor) -> Tensor:
        x = sum(table[column] for table, column in zip(tables, codes.T))
        return (x * 2**0.5 * torch.cos(box.float() @ waves + phase) if boxes else x).sum(0)

    return torch.stack([features(*grid) for grid in found])


def one_hot_cells(grids: list[np.ndarray]) -> Tensor:
    """(G, 9900) the 30 x 30 cells of each grid, padding as an 11th colour."""
    return torch.nn.functional.one_hot(torch.from_numpy(arc_data.pad(grids)).flatten(1).long(), PAD + 1).flatten(1).float()


def principal(x: Tensor, width: int) -> Tensor:
    """The first `width` principal components of x (G, d); x itself where it is no wider. So no floor is wider than z."""
    if x.shape[1] <= width:
        return x
    x = x - x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x @ torch.svd_lowrank(x, min(width, len(x)), niter=2)[2]


def embeddings(untrained, every: Windows, z: Tensor, x: Tensor, found: list, size: int) -> dict[str, tuple[Tensor, Callable]]:
    """The embeddings (G + H, d) that are asked by copy and by analogy, and how each is compared."""
    shares = torch.tensor(np.array([np.bincount(grid.ravel(), minlength=10) / grid.size for grid in every.grids])).float()
    result = {"31 features": (x, cosine), "colour histogram": (shares, cosine)}
    if found[0][0].shape[1]:  # there is a code
        result |= {name: (symbol_bag(found, size, boxes), cosine) for name, boxes in (("bag of codes", False), ("codes with boxes", True))}
    return result | {"untrained": (untrained.embed(every.grids).float().cpu(), euclidean), "trained": (z, euclidean)}


# ---------------------------------------------------------------------------------------------- pairs and probes

FOLDS = 10
NEIGHBOURS, WARMTH = 20, 0.07  # k-NN: cosine, weights exp(s / 0.07)
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the ridge, in units of a standardised feature's variance
PROPERTIES = ("output symmetric up-down", "output symmetric left-right", "output symmetric over its diagonal", "same shape", "output smaller",
              "output larger", "output recoloured")


class Pairs(NamedTuple):
    """The distinct pairs of the tasks, and what is asked of each."""

    index: np.ndarray  # (n, 2) positions of input and output in the grids
    task: np.ndarray  # (n,)
    y: np.ndarray  # (n, L) class of each pair in each labeling; -1 is none
    names: list  # (L,) of the labelings


def properties(given: np.ndarray, out: np.ndarray) -> list[bool]:
    """PROPERTIES of a pair. Recoloured: another grid, equal to the input up to a renaming of colours."""
    same = given.shape == out.shape
    renamed = same and (given != out).any() and len(set(zip(given.flat, out.flat))) == len(np.unique(given)) == len(np.unique(out))
    return [*(share == 1 for share in symmetries(out)), same, out.size < given.size, out.size > given.size, bool(renamed)]


def find_pairs(windows: Windows, labels: dict[str, str] | None = None) -> Pairs:
    """The distinct pairs of each task that has two, with their PROPERTIES, or with the label of their task."""
    task, *index = np.unique(np.column_stack([windows.task, windows.index[:, 2:]]), axis=0).T
    index = np.stack(index, 1)
    if labels is None:
        y = np.array([properties(windows.grids[i], windows.grids[j]) for i, j in index], dtype=int)
        return Pairs(index, task, y, list(PROPERTIES))
    number = {name: i for i, name in enumerate(sorted(set(labels.values())))}
    y = np.array([number[labels[i]] if i in labels else -1 for i in windows.task_ids])
    return Pairs(index, task, y[task, None], ["label"])


def pair_features(x: Tensor, pairs: Pairs) -> Tensor:
    given, out = x[pairs.index[:, 0]], x[pairs.index[:, 1]]
    return torch.cat([given, out, out - given], 1)  # (n, 3 D)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(n, n') cosines of a (n, d) and b (n', d), both minus the mean of b."""
    return unit_length(a - b.mean(0)) @ unit_length(b - b.mean(0)).T


def nearest_task(f: Tensor, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Whether the pair nearest by cosine of f (n, d) is of the same task (1, 0, or the share of those tied), and each pair's task.

    Pairs that hold one of the pair's own two grids are no candidates; a pair to which none of its task is left is not asked.
    """
    given, out = pairs.index.T
    apart = torch.from_numpy(np.all([a[:, None] != b for a in (given, out) for b in (given, out)], axis=0))  # (n, n)
    same = torch.from_numpy(pairs.task[:, None] == pairs.task)
    near = cosines(f, f).masked_fill(~apart, -math.inf)
    tied = (near >= near.max(1, keepdim=True).values - TIE) & apart
    asked = (same & apart).any(1)
    right = (tied & same).sum(1) / tied.sum(1).clamp_min(1)
    return right[asked].double().numpy(), pairs.task[asked.numpy()]


def folds(task: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n,) the fold of each pair: whole tasks, FOLDS of them, or as many as there are tasks."""
    names, task = np.unique(task, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[task]


def knn(f: Tensor, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Classes (n, L) of pairs with features f (n, d), by votes of the NEIGHBOURS nearest in other folds."""
    y, chosen = torch.from_numpy(y), np.empty_like(y)
    for k in np.unique(fold):
        test, train = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        near, which = cosines(f[test], f[train]).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = torch.zeros(len(test), y.shape[1], int(y.max()) + 1)
        votes.scatter_add_(2, y[train][which].transpose(1, 2), (near / WARMTH).exp()[:, None].repeat(1, y.shape[1], 1))
        chosen[test] = votes.argmax(2).numpy()
    return chosen


def linear_probe(f: Tensor, y: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Classes (n, L) of pairs with features f (n, d), by ridge regression on the classes of the pairs in other folds.

    Each labeling takes the strength that is best on the next fold, in a fit without both. All fits come from sums of products
    by fold, so none passes over the data.
    """
    classes = int(y.max()) + 1
    hot = torch.nn.functional.one_hot(torch.from_numpy(y), classes).flatten(1).double()  # (n, L C)
    f = torch.cat([f.double(), torch.ones(len(f), 1, dtype=torch.float64)], 1)
    names, chosen = np.unique(fold), np.empty_like(y)
    sums = [f[fold == k].T @ torch.cat([f, hot], 1)[fold == k] for k in names]  # (d + 1, d + 1 + L C) each
    total = sum(sums)
    for i, k in enumerate(names):
        following = (i + 1) % len(names)
        test, check = fold == k, fold == names[following]
        tried = ridge(total - sums[i] - sums[following], f[check], classes)  # (strengths, n, L)
        best = [np.argmax([balanced(t[:, j], y[check, j]).mean() for t in tried]) for j in range(y.shape[1])]
        chosen[test] = ridge(total - sums[i], f[test], classes)[best, :, np.arange(y.shape[1])].T
    return chosen


def ridge(sums: Tensor, f: Tensor, classes: int) -> np.ndarray:
    """Classes (strengths, n, L) of f (n, d + 1), from the sums (d + 1, d + 1 + L C) of [f 1]' [f 1 one-hot classes] in training.

    Features are standardised with training statistics. A score's threshold lies halfway between the mean training scores of the
    members of its class and of the others, so that rare classes count as much as common ones.
    """
    d = len(sums) - 1
    count, members, mean = sums[d, d], sums[d, d + 1:], sums[:d, d] / sums[d, d]
    away = sums[:d, d + 1:] / members.clamp_min(1) - mean[:, None]  # (d, L C) means of the classes, from that of all
    covariance = sums[:d, :d] / count - mean[:, None] * mean
    scale = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 1e-6 * (1 + mean.abs()), 1 / scale, 0.0)  # a constant feature says nothing
    covariance, away = scale[:, None] * covariance * scale, scale[:, None] * away
    f, result = (f[:, :d] - mean) * scale, []
    for strength in STRENGTHS:
        factor = torch.linalg.cholesky(covariance + strength * torch.eye(d, dtype=f.dtype))
        w = torch.cholesky_solve(away * members / count, factor)  # (d, L C)
        inside = (away * w).sum(0)  # mean score of the members; that of all is 0
        outside = -inside * members / (count - members).clamp_min(1)
        score = (f @ w - (inside + outside) / 2) / (inside - outside).clamp_min(1e-12)
        result.append(score.masked_fill(members == 0, -math.inf).unflatten(1, (-1, classes)).argmax(2).numpy())
    return np.stack(result)


def balanced(chosen: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,) values whose mean is the balanced accuracy: the mean over classes of the share of their members that is right.

    A value is that accuracy and what the row adds to it, so that drawing rows anew varies as the accuracy does, to first order.
    """
    names, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    share = np.bincount(y, chosen == names[y]) / counts  # (C,)
    return share.mean() + ((chosen == names[y]) - share[y]) * len(y) / (len(names) * counts[y])


def majority(y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(T, L) the most frequent class among the rows (n, L) of each group; the lowest of equals."""
    votes = np.zeros((group.max() + 1, y.shape[1], y.max() + 1))
    np.add.at(votes, (group[:, None], np.arange(y.shape[1]), y), 1)
    return votes.argmax(2)


def probed(pairs: Pairs) -> Pairs:
    """The pairs with a class, and the labelings of more than one class; nothing if these are of fewer than three tasks."""
    rows = (pairs.y >= 0).all(1)
    columns = [len(np.unique(column[rows])) > 1 for column in pairs.y.T]
    if len(np.unique(pairs.task[rows])) < 3:
        columns = [False] * len(columns)
    return Pairs(pairs.index[rows], pairs.task[rows], pairs.y[rows][:, columns], [name for name, use in zip(pairs.names, columns) if use])


def pair_answers(x: Tensor, pairs: Pairs) -> tuple[PerWindow, dict[str, dict[str, float]]]:
    """PAIRWISE metrics of embeddings x (G, D), a value a pair (a task, for the vote), and the probes' means by labeling.

    A probe's value is its `balanced` accuracy, averaged over the labelings.
    """
    values, x = {"task_1nn": nearest_task(pair_features(x, pairs), pairs)[0]}, x.float()
    pairs = probed(pairs)
    if not pairs.names:
        return values, {}
    f, y, fold, group = pair_features(x, pairs), pairs.y, folds(pairs.task), np.unique(pairs.task, return_inverse=True)[1]
    votes = knn(f, y, fold)
    chosen = {"probe_linear": (linear_probe(f, y, fold), y), "probe_knn": (votes, y), "probe_vote": (majority(votes, group), majority(y, group))}
    each = {probe: np.stack([balanced(a, b) for a, b in zip(answers.T, truth.T)]) for probe, (answers, truth) in chosen.items()}  # (L, n)
    by_name = {name: {probe: float(values[i].mean()) for probe, values in each.items()} for i, name in enumerate(pairs.names)}
    return values | {probe: value.mean(0) for probe, value in each.items()}, by_name


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


def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues (D,), rising, of the covariance of z (N, D) + 1e-6 I."""
    return torch.linalg.eigvalsh(torch.cov(z.double().T) + 1e-6 * torch.eye(z.shape[1], dtype=torch.float64)).clamp_min(0)


def effective_rank(z: Tensor) -> float:
    """How many directions embeddings z (N, D) use: exp of the entropy of the covariance's eigenvalues, 1 to D."""
    values = spectrum(z)
    return float(torch.special.entr(values / values.sum()).sum().exp())


def effective_ranks(z_hat: Tensor, target: Tensor, seed: int = 0) -> dict[str, float]:
    """Of context and target (W, D) over SAMPLE seeded windows. Fewer windows than a few times D bias it low."""
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(z_hat))[:SAMPLE])
    return {"effective_rank_context": effective_rank(z_hat[rows]), "effective_rank_target": effective_rank(target[rows])}


def health(z: Tensor) -> dict[str, float]:
    """Effective rank, variance, isotropy and Gaussian score of embeddings z (N, D), as the recorded runs defined them."""
    values, x = spectrum(z), z.double() - z.double().mean(0)
    x = x / x.square().mean(0).sqrt().clamp_min(1e-12)
    off = x.pow(3).mean(0).abs().mean() + (x.pow(4).mean(0) - 3).abs().mean()  # skew, and kurtosis away from a Gaussian's
    return {"effective_rank": effective_rank(z), "variance": float(z.double().var(0, correction=0).mean()),
            "isotropy": float((values[0] + 1e-8) / (values[-1] + 1e-8)), "gaussian_score": float(1 / (1 + off))}


def sigreg_of(z: Tensor, sigreg: Callable) -> float:
    """SIGReg of z (N, D), mean over samples of SIGREG_N rows; away from N(0, I) it grows with the size of a sample."""
    views = min(SIGREG_N, len(z))
    directions = unit_length(torch.randn(256, z.shape[1], generator=torch.Generator().manual_seed(0))).T
    return float(sigreg(z[:len(z) // views * views].view(-1, views, z.shape[1]), directions))


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


def kept_codes(model, grids: list, before: list, change: Callable, turn: Callable) -> float | None:
    """Share of objects that keep all their codes when their grids change; `before` is what model.codes gave for the grids.

    `change` alters a grid, `turn` the boxes (n, 4) of a grid (height, width) with it. Objects are found again by box; those that
    share a box, or come or go because another colour is the background now, are left out.
    """
    kept = count = 0
    for grid, (codes, boxes), (new_codes, new_boxes) in zip(grids, before, model.codes([change(grid) for grid in grids])):
        moved, again = turn(boxes[1:], *grid.shape).tolist(), new_boxes[1:].tolist()
        place = {tuple(box): i for i, box in enumerate(moved) if moved.count(box) == 1}
        found = [(place[tuple(box)], i) for i, box in enumerate(again) if tuple(box) in place and again.count(box) == 1]
        a, b = np.array(found, dtype=int).reshape(-1, 2).T
        kept, count = kept + int((codes[1:][a] == new_codes[1:][b]).all(1).sum()), count + len(found)
    return kept / count if count else None


def code_kinds(grids: list) -> tuple[np.ndarray, arc_data.Tokens]:
    """All that the code sees of each token (n,), as one number, and the tokens."""
    tokens = arc_data.tokenise(grids)
    return (tokens.shape * 10 + tokens.colour) * 2 + np.isin(np.arange(len(tokens.shape)), tokens.start), tokens


def code_health(model, grids: list, found: list, size: int) -> dict:
    """Usage, perplexity, ceiling and top share, by occurrence and by distinct object, and what leaves codes as they are."""
    kind, _ = code_kinds(grids)
    codes, result = torch.cat([codes for codes, _ in found]).numpy(), {}
    if not codes.shape[1]:
        return result
    for name, rows in (("occurrence", np.arange(len(kind))), ("distinct", np.unique(kind, return_index=True)[1])):
        result |= {f"{key}_by_{name}": value for key, value in code_statistics(codes[rows], size, kind[rows]).items()}
        result[f"codes_top_share_by_{name}"] = max(float(np.bincount(column).max() / len(column)) for column in codes[rows].T)
    colours = np.random.default_rng(0).permutation(10).astype(np.int8)
    changes = {"recoloured": (lambda grid: colours[grid], lambda box, height, width: box),
               "mirrored": (lambda grid: grid[:, ::-1].copy(), lambda box, height, width: torch.stack([box[:, 0], width - box[:, 1] - box[:, 3], *box.T[2:]], 1)),
               "transposed": (lambda grid: grid.T.copy(), lambda box, height, width: box[:, [1, 0, 3, 2]])}
    return result | {f"codes_kept_when_{name}": kept_codes(model, grids, found, *change) for name, change in changes.items()}


# ---------------------------------------------------------------------------------------------- the full evaluation


class Full(NamedTuple):
    """What the report is made of."""

    figures: dict  # eval.json
    health: dict  # health.json: what eval.json has no place for
    z: Tensor  # (G, D)
    z_hat: Tensor  # (W, D)
    found: list  # what model.codes gave for the grids
    pairs: Pairs


def groups(windows: Windows, hard: Hard, pairs: Pairs) -> dict[str, np.ndarray]:
    """The task of each value of each metric."""
    asked, named = nearest_task(torch.zeros(len(pairs.task), 1), pairs)[1], probed(pairs).task
    result = dict.fromkeys(METRICS, windows.task) | dict.fromkeys(HARD, windows.task[hard.rows])
    return result | {"task_1nn": asked, "probe_linear": named, "probe_knn": named, "probe_vote": np.unique(named)}


def figure(rows: dict[str, PerWindow], metric: str, task: np.ndarray) -> dict:
    """An entry of eval.json: the first row is the model, the others are floors; null where the data allow no such figure."""
    mean = {name: float(values[metric].mean()) for name, values in rows.items() if len(values.get(metric, ()))}
    first, *floors = rows
    if first not in mean:
        return {"model": None, "floors": {}, "interval": None, "n": 0}
    return {"model": mean[first], "floors": {name: mean[name] for name in floors if name in mean},
            "interval": interval(rows[first][metric], task), "n": len(rows[first][metric])}


@torch.no_grad()
def model_rows(model, windows: Windows, hard: Hard, pairs: Pairs) -> tuple[Tensor, Tensor, PerWindow, dict]:
    """Embeddings (G + H, D) of hard.grids, z_hat (W, D), the model's values of every metric, and its probes by labeling."""
    z = model.embed(hard.grids).float().cpu()
    z_hat = model.predict(contexts(windows, np.arange(len(windows.task)))).float().cpu()
    values, probes = pair_answers(z, pairs)
    return z, z_hat, ask(z_hat, z, windows, hard) | values, probes


@torch.no_grad()
def full(model, untrained, windows: Windows, labels: dict | None, size: int, sigreg: Callable, null: float) -> Full:
    """Every metric of the model and of every floor by the same code, and its health.

    size is the number of codes at a position; null is what sigreg is for samples of N(0, I).
    """
    hard, pairs, out2 = distractors(windows), find_pairs(windows, labels), find_targets(windows).out2
    z, z_hat, values, by_label = model_rows(model, windows, hard, pairs)
    rows, probes, nats = {"model": values}, {"model": by_label}, {"model": cross_entropy(logits(z_hat, z[windows.outputs], euclidean), out2)}
    found, every = model.codes(hard.grids), windows._replace(grids=hard.grids)
    x = standardised_features(every)
    for name, score in floor_scores(windows, hard, x).items():
        rows[name] = rank(score, windows, hard=hard)
        if name.startswith("analogy, raw"):
            nats[name] = cross_entropy(score(torch.arange(len(out2)))[:, :len(windows.outputs)], out2)
    for name, (x, score) in embeddings(untrained, every, z, x, found, size).items():
        x = x - x[windows.outputs].mean(0)
        asked = {f"{query}, {name}": queries(x, windows, weights) for query, weights in QUERIES.items()}
        rows |= {row: ask(query, x, windows, hard, score) for row, query in asked.items()}
        nats[f"analogy, {name}"] = cross_entropy(logits(asked[f"analogy, {name}"], x[windows.outputs], score), out2)
        if name != "trained":  # that one is the model's own
            rows[name], probes[name] = pair_answers(principal(x[:len(windows.grids)], z.shape[1]), pairs)
    rows["raw"], probes["raw"] = pair_answers(principal(one_hot_cells(windows.grids), z.shape[1]), pairs)
    x = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    rows["chance"] = ask(x[windows.index[:, 0]], x, windows, hard) | {"task_1nn": nearest_task(pair_features(x, pairs), pairs)[0]}
    rows["majority"] = majority_rows(pairs)

    task = groups(windows, hard, pairs)
    figures = {metric: figure(rows, metric, task[metric]) for metric in RETRIEVAL + PAIRWISE}
    record = {"cross_entropy": figure({row: {"nats": values} for row, values in nats.items()}, "nats", windows.task) | {"ln_pool": math.log(len(windows.outputs))},
              "probes": probes, "shuffled_ndcg10_without_out1": None}
    if len(np.unique(windows.task)) > 1:
        shuffled = model.predict(contexts(windows, np.arange(len(windows.task)), shuffle_context(windows))).float().cpu()
        record["shuffled_ndcg10_without_out1"] = float(retrieval(shuffled, z[windows.outputs], windows)["ndcg10_without_out1"].mean())
    sample = torch.from_numpy(np.random.default_rng(0).permutation(len(z_hat))[:SAMPLE])
    for role, x in (("context", z_hat[sample]), ("target", z[windows.index[sample, 3]])):
        record[role] = health(x) | {"sigreg_over_null": sigreg_of(x, sigreg) / null, "sigreg_n": min(SIGREG_N, len(x)), "n": len(x)}
    found = found[:len(windows.grids)]
    return Full(figures, record | {"codes": code_health(model, windows.grids, found, size)}, z[:len(windows.grids)], z_hat, found, pairs)


def majority_rows(pairs: Pairs) -> PerWindow:
    """The balanced accuracy of always saying the most frequent class: one of the classes is right."""
    classes = [len(np.unique(column)) for column in probed(pairs).y.T]
    return dict.fromkeys(PAIRWISE[1:], np.array([np.mean(1 / np.array(classes))])) if classes else {}


# ---------------------------------------------------------------------------------------------- pictures

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


def write_json(path: Path, value: dict) -> None:
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


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


def read_log(folder: Path) -> tuple[list[dict], dict]:
    """The lines of log.jsonl and result.json; nothing of a file that is not there. A line that was cut has no end."""
    log, result = folder / "log.jsonl", folder / "result.json"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")], json.loads(result.read_text()) if result.exists() else {}


def read_labels(path: Path, tasks: dict) -> dict[str, str]:
    """{task id: class name} of a JSON file. ValueError for another form, or for tasks that the data do not have."""
    try:
        labels = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--labels {path}: not readable as JSON: {error}") from None
    if not isinstance(labels, dict) or not labels or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"--labels {path}: needs a JSON object {{task id: class name}}, its names strings")
    unknown = [name for name in labels if name not in tasks]
    if unknown:
        raise ValueError(f"--labels {path}: {len(unknown)} tasks are not in --data, {', '.join(unknown[:3])} among them")
    if len(set(labels.values())) < 2:
        raise ValueError(f"--labels {path}: all tasks have one class; a probe needs two")
    return labels


def left_out(tasks: dict, labels: dict | None) -> list[str]:
    """What the data hold that some figure cannot use, counted."""
    counts = {"test pairs without an output: in no window and no pair": sum(out is None for task in tasks.values() for _, out in task.test),
              "tasks with fewer than two complete pairs: in no window and no pair": sum(len(arc_data.pairs_of(task)) < 2 for task in tasks.values()),
              "tasks without a label: not probed": len(tasks) - len(labels) if labels else 0}
    return [f"left out: {count} {what}" for what, count in counts.items() if count]


def open_run(path: Path, source: str) -> tuple:
    """Model, Config, tasks and windows. ValueError says what is not as it must be."""
    from lejepa import load_run
    model, cfg = load_run(path)
    tasks = arc_data.load_tasks(source)
    windows = arc_data.make_windows(tasks)
    if not len(windows.task):
        raise ValueError(f"--data {source}: no task has two pairs with outputs, and every figure needs them; give data with outputs")
    warn_of_leaks(cfg, source, tasks)
    return model, cfg, tasks, windows


def evaluate_run(args) -> None:
    import lejepa
    model, cfg, tasks, windows = open_run(args.run, args.data)
    labels = read_labels(args.labels, tasks) if args.labels else None
    notes = left_out(tasks, labels)
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    done = full(model, lejepa.build(cfg).eval(), windows, labels, lejepa.CODE_SIZE, lejepa.sigreg, lejepa.SIGREG_NULL)
    log, result = read_log(args.run)
    judged = report.verdicts(log, result, cfg.lam, done.health, done.figures)
    tables = [report.table(done.figures, metrics) for metrics in (RETRIEVAL, PAIRWISE)]
    lines = [f"{'unknown' if ok is None else 'pass' if ok else 'FAIL':8} {name}: {text}" for name, ok, text in judged]
    pictures = draw_report(out, args.run.name, done, windows, labels, log, lejepa.CODE_SIZE)
    write_json(out / "eval.json", done.figures)
    write_json(out / "health.json", done.health | {"verdicts": {name: {"pass": ok, "figure": text} for name, ok, text in judged}})
    write_whole(out / "report.md", report.page(f"{args.run} on {args.data}", notes, tables, lines, done.health, pictures).encode())
    print("\n".join([*notes, *(report.plain(table) + "\n" for table in tables), *lines, f"written: {out}/eval.json, health.json, report.md"]))


def draw_report(out: Path, name: str, done: Full, windows: Windows, labels: dict | None, log: list[dict], size: int) -> list[tuple[str, str]]:
    """The report's pictures, as (file, what it shows)."""
    sample = torch.from_numpy(np.random.default_rng(0).permutation(len(done.z_hat))[:SAMPLE])
    context, target = done.z_hat[sample], done.z[windows.index[sample, 3]]
    normal = torch.randn(context.shape, generator=torch.Generator().manual_seed(0))
    spectra = {name: spectrum(x).flip(0).numpy() for name, x in (("context (z_hat)", context), ("target (z)", target), (f"N(0, I), N = {len(context)}", normal))}
    chosen = np.sort(np.random.default_rng(0).permutation(len(windows.task))[:8])
    near = windows.outputs[torch.cdist(done.z_hat[chosen], done.z[windows.outputs]).argsort(1)[:, :5].numpy()]
    shown = [[windows.grids[i] for i in [*windows.index[row], *best]] for row, best in zip(chosen, near)]
    places = principal(pair_features(done.z, done.pairs), 2).numpy()
    kinds = done.pairs.y[:, 0] if labels else done.pairs.task
    names = sorted(set(labels.values())) if labels else windows.task_ids
    pictures = [report.plot_floors(out, "retrieval", done.figures, RETRIEVAL), report.plot_floors(out, "pairs", done.figures, PAIRWISE),
                report.plot_spectrum(out, spectra), report.plot_neighbours(out, shown, [windows.task_ids[i] for i in windows.task[chosen]]),
                report.plot_map(out, places, kinds, names, "label" if labels else "task")]
    kind, tokens = code_kinds(windows.grids)
    codes = torch.cat([codes for codes, _ in done.found]).numpy()
    if codes.shape[1]:
        pictures += [report.plot_code_use(out, codes, np.unique(kind, return_index=True)[1], size), report.plot_symbols(out, codes, kind, tokens, size)]
    return pictures + ([report.plot_training(out, {name: log})] if any(row.get("validation_loss") for row in log) else [])


def write_codes(args) -> None:
    """One JSON line a grid: what the model says of it, object by object, the whole grid first. The format is described in README.md."""
    from lejepa import load_run
    model, _ = load_run(args.run)
    where, grids = [], []
    for task_id, task in arc_data.load_tasks(args.data).items():
        for split, pairs in (("train", task.train), ("test", task.test)):
            for number, pair in enumerate(pairs):
                for side, grid in zip(("input", "output"), pair):
                    if grid is not None:
                        where.append({"task": task_id, "split": split, "pair": number, "side": side})
                        grids.append(grid)
    tokens, lines = arc_data.tokenise(grids), []
    for line, start, (codes, boxes) in zip(where, tokens.start, model.codes(grids)):
        rows = slice(start, start + len(codes))
        objects = zip(codes.tolist(), boxes.tolist(), tokens.colour[rows].tolist(), tokens.area[rows].astype(int).tolist())
        lines.append(json.dumps(line | {"objects": [dict(zip(("codes", "box", "colour", "size"), values)) for values in objects]}))
    write_whole(args.out, ("\n".join(lines) + "\n").encode())
    print(f"{args.out}: {len(lines)} grids, {len(tokens.colour)} objects, {tokens.cut.sum()} more were cut")


def code_agreement(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """Share of objects whose code in `a` (n,) is, up to the best greedy one-to-one matching of codes, the one in `b` (n,)."""
    pairs, counts = np.unique(a * size + b, return_counts=True)
    used_a, used_b, matched = set(), set(), 0
    for pair, count in sorted(zip(pairs.tolist(), counts.tolist()), key=lambda item: -item[1]):
        left, right = divmod(pair, size)
        if left not in used_a and right not in used_b:
            used_a.add(left)
            used_b.add(right)
            matched += count
    return matched / len(a)


def compare_codes(a: np.ndarray, b: np.ndarray, size: int) -> dict[str, float]:
    """Agreement of the codes (n, n_codes) of two models of the same objects, by position matched greedily too, and what chance gives.

    Chance is the same matching of objects that were shuffled: with few objects a code, a matching finds much to match.
    """
    shuffled = np.random.default_rng(0).permutation(len(a))
    result = {}
    for name, other in (("agreement", b), ("chance", b[shuffled])):
        table = np.array([[code_agreement(x, y, size) for y in other.T] for x in a.T])
        found = []
        while len(found) < min(table.shape):
            i, j = np.unravel_index(table.argmax(), table.shape)
            found.append(table[i, j])
            table[i], table[:, j] = -1, -1
        result[name] = float(np.mean(found))
    return result


def compare_runs(args) -> None:
    """Runs side by side on the same windows: every metric, its difference from the first run's with a paired interval, and codes."""
    from lejepa import CODE_SIZE
    names = [path.name if len({p.name for p in args.runs}) == len(args.runs) else str(path) for path in args.runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{' '.join(names)}: a run is named twice; compare takes different ones")
    rows, codes, logs = {}, {}, {}
    for name, path in zip(names, args.runs):
        model, _, _, windows = open_run(path, args.data)
        hard, pairs = distractors(windows), find_pairs(windows)
        _, _, rows[name], _ = model_rows(model, windows, hard, pairs)
        codes[name], logs[name] = torch.cat([found for found, _ in model.codes(windows.grids)]).numpy(), read_log(path)[0]
    task, first = groups(windows, hard, pairs), names[0]
    distinct = np.unique(code_kinds(windows.grids)[0], return_index=True)[1]
    result = {"data": args.data, "runs": {}}
    for name in names:
        result["runs"][name] = {}
        for metric in (metric for metric in RETRIEVAL + PAIRWISE if metric in rows[first]):
            a, b = rows[name][metric], rows[first][metric]
            result["runs"][name][metric] = {"value": float(a.mean()), "interval": interval(a, task[metric]), "difference": difference(a, b, task[metric])}
        if name != first and codes[name].shape[1] and codes[first].shape[1]:
            result["runs"][name]["codes"] = compare_codes(codes[first][distinct], codes[name][distinct], CODE_SIZE)
    out = args.out or args.runs[0].parent / "compare"
    out.mkdir(parents=True, exist_ok=True)
    text = report.compare_text(result, first)
    write_json(out / "compare.json", result)
    write_whole(out / "compare.md", (text + "\n![figures over training](training.png)\n").encode())
    report.plot_training(out, logs)
    print(text + f"written: {out}/compare.json, compare.md, training.png")


COMMANDS = {"codes": (write_codes, "The symbols of every grid, a line a grid."), "compare": (compare_runs, "Runs side by side, paired by window.")}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv and argv[0] in COMMANDS else None
    command, about = COMMANDS.get(name, (evaluate_run, "What a run's frozen encoder is worth, beside what no learning scores, and whether it is healthy. "
                                         "Also: eval.py codes --help, eval.py compare --help."))
    parser = Parser(prog=f"eval.py {name}" if name else "eval.py", description=about, allow_abbrev=False)
    runs = {"nargs": "+", "dest": "runs"} if name == "compare" else {"dest": "run"}
    parser.add_argument(metavar="RUN", type=Path, help="a folder that lejepa.py wrote", **runs)
    if name == "codes":
        parser.add_argument("--data", metavar="SOURCE", required=True, help="tasks whose grids are encoded")
        parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="where the lines go")
    else:
        parser.add_argument("--data", metavar="SOURCE", default=arc_data.REPORTED, help="tasks to evaluate on (default: %(default)s)")
        parser.add_argument("--out", metavar="FOLDER", type=Path, help=f"where the record goes (default: {'RUN/../compare' if name else 'RUN'})")
    if name is None:
        parser.add_argument("--labels", metavar="FILE", type=Path, help="JSON {task id: class name} to probe for (default: seven properties of a pair)")
    args = parser.parse_args(argv[1:] if name else argv)
    try:
        command(args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main(sys.argv[1:])
