"""Evaluates frozen weights: retrieval, probes and codes on given tasks, beside baselines that learn nothing.

    python eval.py RUN [--data SOURCE] [--labels FILE]           eval.json, health.json, report.html
    python eval.py codes RUN --data SOURCE --out FILE            the codes of every grid, a line a grid
    python eval.py rank RUN --data SOURCE --candidates FILE --out FILE     candidates, the likeliest first
    python eval.py compare RUN RUN ...                           runs side by side, paired by query

A query stands for the unknown output of a given grid, after one or more demonstrations of its task. The pool
is every distinct output of the tasks, ranked by its nearness to the query. The model's query is z_hat. A
baseline's query is a copy of a grid, or the analogy given + out - in (the mean over the demonstrations), in
an embedding that was not trained for it. Model and baselines share queries, pool and treatment of ties.
Metrics of pairs (the task that a pair belongs to, its properties) read (z_in, z_out, z_out - z_in).

    W windows   P distinct outputs: the pool   G distinct grids   H hard negatives   T tasks   D width of z
    n rows      k demonstrations               d width of any embedding       L labelings of pairs   C classes
"""
import os
import signal

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them at once, without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import solve
from scipy.optimize import minimize_scalar
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import arc_data
from arc_data import Windows
from lejepa import CODE_SIZE

RETRIEVAL = ("ndcg10", "r1", "mrr", "ndcg10_without_out1", "within_task")
DEMONSTRATIONS = {"all_demonstrations": "ndcg10_without_out1", "all_demonstrations_r1": "r1_without_out1"}
HARD = ("hard_ndcg10", "hard_r1")
PAIRWISE = ("task_1nn", "probe_linear", "probe_knn", "probe_vote")
METRICS = (*RETRIEVAL, *DEMONSTRATIONS, *HARD, *PAIRWISE)  # of eval.json
COMPARED = ("ndcg10", "ndcg10_without_out1", "within_task", "all_demonstrations")  # those of the model's lead
QUERIES = {"copy in2": (0, 0, 1), "copy out1": (0, 1, 0), "analogy": (-1, 1, 1)}  # weights of in, out, given
CHUNK = 256    # queries ranked at once: CHUNK x P scores in memory
TIE = 1e-5     # scores nearer than this are equal; rounding in fp32 stays ten times below it
# ------------------------------------------------------------------------------------------------- 1 ranks
class Queries(NamedTuple):
    """A chunk of queries with equally many demonstrations."""
    number: Tensor             # (n,) place among all queries
    context: Tensor            # (n, 2 k + 1) in1, out1, ..., ink, outk, given: positions in the grids
    shown: Tensor              # (n, k) columns of the demonstrations' outputs in the pool
    target: Tensor             # (n,) column of the target
    task: Tensor               # (n,)
    members: Tensor            # (T, P) bool: the distinct outputs of each task
    own: Tensor | None = None  # (n, 4) hard negatives of each query in the grids; -1 where there is none

def make_queries(number: Tensor, table: Tensor, windows: Windows, own: Tensor | None = None) -> list[Queries]:
    """Chunks of a table (n, 2 k + 3): the context, the target (positions in the grids) and the task."""
    column = lambda output: torch.from_numpy(np.searchsorted(windows.outputs, np.asarray(output)))
    members = torch.zeros(len(windows.task_ids), len(windows.outputs), dtype=torch.bool)
    for i, pairs in enumerate(windows.pairs):
        members[i, column(pairs[:, 1])] = True
    chunks = []
    for i, rows in zip(number.split(CHUNK), table.split(CHUNK)):
        context, target, task = rows[:, :-2], rows[:, -2], rows[:, -1]
        extra = None if own is None else own[i]
        chunks.append(Queries(i, context, column(context[:, 1::2]), column(target), task, members, extra))
    return chunks

def window_queries(windows: Windows, rows: Tensor | None = None, own: Tensor | None = None) -> list[Queries]:
    """The windows (n,) named by `rows`, all by default, as queries with one demonstration."""
    table = torch.from_numpy(np.column_stack([windows.index, windows.task]))
    rows = torch.arange(len(table)) if rows is None else rows
    return make_queries(rows, table[rows], windows, own)

def demonstration_queries(tasks: dict, windows: Windows) -> list[Queries]:
    """Every test pair with an output, after all train pairs of its task; a chunk has one number of them."""
    rows, chunks = [], []
    for number, (task, pairs) in enumerate(zip(tasks.values(), windows.pairs)):
        shown, tested = np.split(pairs, [len(task.train)])
        rows += [[*shown.flat, *pair, number] for pair in tested]
    for length in dict.fromkeys(map(len, rows)):
        table = torch.tensor([row for row in rows if len(row) == length])
        first = sum(len(chunk.number) for chunk in chunks)
        chunks += make_queries(torch.arange(first, first + len(table)), table, windows)
    return chunks

def rank(score: Callable, queries: list[Queries], temperature: float | None = None) -> dict[str, np.ndarray]:
    """Every retrieval metric of every query: metric -> (number of queries,).

    score        gives the scores of a chunk, (n, P) or with hard negatives (n, P + 4), and the width of a tie
    temperature  adds nats: the cross-entropy of the target under softmax(scores / temperature)

    A metric is its mean over the orders of the grids that tie. 'Without out1': the demonstrations' outputs
    leave the pool, unless one is the target. Within-task: among the distinct outputs of the task, without
    out1 likewise, the target is strictly first.
    """
    parts = [rank_chunk(*score(chunk), chunk, temperature) for chunk in queries]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in (parts[0] if parts else ())}

def rank_chunk(scores: Tensor, tie, q: Queries, temperature: float | None) -> dict[str, Tensor]:
    rows, pool, result = torch.arange(len(scores)), q.members.shape[1], {}
    margin = scores - scores[rows, q.target, None]  # (n, P + 4); what leaves the pool gets -inf
    if q.own is not None:
        margin[:, pool:][q.own < 0] = -math.inf
        hard = rank_metrics(margin, tie)
        result, margin = {name: hard[name.removeprefix("hard_")] for name in HARD}, margin[:, :pool]
    if temperature is not None:
        result["nats"] = torch.logsumexp(margin / temperature, 1).double()
    result |= rank_metrics(margin, tie)
    margin[rows[:, None], q.shown] = -math.inf
    margin[rows, q.target] = 0
    result |= {f"{name}_without_out1": value for name, value in rank_metrics(margin, tie).items()}
    margin[rows, q.target] = -math.inf
    return result | {"within_task": (~(q.members[q.task] & (margin >= -tie)).any(1)).double()}

def rank_metrics(margin: Tensor, tie: Tensor | float) -> dict[str, Tensor]:
    """nDCG@10, R@1, R@2 and MRR of one relevant item, averaged exactly over the orders of its ties.

    margin  (n, items)  by how much an item scores higher than the relevant one; `tie` or less is a tie
    """
    above, tied = (margin > tie).sum(1), (margin.abs() <= tie).sum(1)  # tied: the relevant one included
    ranks = torch.arange(1, int((above + tied).max()) + 1, dtype=torch.float64)
    discounts = (ranks <= 10) / torch.log2(ranks + 1)
    gains = {"ndcg10": discounts, "r1": ranks == 1, "r2": ranks <= 2, "mrr": 1 / ranks}
    sums = {name: F.pad(gain.double().cumsum(0), (1, 0)) for name, gain in gains.items()}
    return {name: (total[above + tied] - total[above]) / tied for name, total in sums.items()}

def best_temperature(score: Callable, windows: Windows) -> float:
    """The t of the least cross-entropy of the targets under softmax(scores / t), on about 4 CHUNK windows."""
    every = math.ceil(len(windows.task) / (4 * CHUNK))
    samples = window_queries(windows, torch.arange(0, len(windows.task), every))
    scores, target = torch.cat([score(q)[0] for q in samples]), torch.cat([q.target for q in samples])
    margin = scores - scores.gather(1, target[:, None])
    unit = float(margin.abs().mean().clamp_min(1e-12))
    nats = lambda log_t: float(torch.logsumexp(margin / (unit * math.exp(log_t)), 1).mean())
    found = minimize_scalar(nats, bounds=(-10, 5), method="bounded", options={"xatol": 0.01})
    return unit * math.exp(found.x)
# ------------------------------------------------------------------------------------------------ 2 scores
def cosine(pool: Tensor) -> tuple[Callable, Callable, Callable]:
    """Cosines after the mean of pool (P, d) is taken off, as `Space` reads them. A zero vector scores 0."""
    middle = pool.mean(0)
    direction = lambda x: F.normalize(x - middle, dim=-1, eps=1e-30)
    return direction, direction, lambda query: TIE

def euclidean(pool: Tensor) -> tuple[Callable, Callable, Callable]:
    """Scores in the order of the negative squared distance; a tie means the same in every embedding.

    -|q - p|^2 / 2 is q . p - |p|^2 / 2 and a part that all items share. Embeddings are rounded at the scale
    of their norm, so the norm widens a tie: if the spread of pool (P, d) is below 1e-4 of it, all items tie.
    """
    middle, norm = pool.mean(0), pool.square().sum(1).mean()  # the mean is taken off for the digits
    unit = (pool - middle).square().sum(1).mean() + 1e-3 * norm + 1e-30
    query = lambda x: torch.cat([x - middle, torch.ones_like(x[..., :1])], -1)
    item = lambda x: torch.cat([x - middle, (x - middle).square().sum(-1, keepdim=True) / -2], -1)
    tie = lambda q: TIE * ((q[:, :-1].square().sum(1, keepdim=True) * unit).sqrt() + unit)
    return query, item, tie

class Space:
    """Embeddings (G, d) of all grids and how they are compared; the scores of several embeddings are summed.

    `measure` gives three functions: query(x) @ item(y) is a score, tie(query) the width of a tie.
    """
    def __init__(self, outputs, *embeddings, measure: Callable = cosine):
        self.parts = [(x, *measure(x[outputs])) for x in embeddings]
        self.pool = self.items(outputs)  # (P, d)

    def items(self, index) -> Tensor:
        return torch.cat([item(x[index]) for x, _, item, _ in self.parts], -1)

    def by_weights(self, weights: tuple[int, int, int]) -> Callable:
        """Scores of queries that sum mean input, mean output and given grid under `weights`."""
        def combine(x, context: Tensor) -> Tensor:
            roles = context[:, :-1:2], context[:, 1::2], context[:, -1:]
            return sum(w * x[role].mean(1) for w, role in zip(weights, roles) if w)
        queries = lambda q: torch.cat([query(combine(x, q.context)) for x, query, *_ in self.parts], 1)
        return lambda q: self.compare(queries(q), q)

    def by_embedding(self, z_hat: Tensor) -> Callable:
        """Scores of the queries z_hat (number of queries, d)."""
        if not (z_hat.isfinite().all() and self.pool.isfinite().all()):
            raise ValueError("embeddings hold nan or inf: there is nothing to rank")
        return lambda q: self.compare(self.parts[0][1](z_hat[q.number]), q)

    def compare(self, query: Tensor, q: Queries) -> tuple[Tensor, Tensor | float]:
        scores = query @ self.pool.T
        if q.own is not None:
            distinct, place = q.own.unique(return_inverse=True)  # neighbouring windows share most of theirs
            scores = torch.cat([scores, (query @ self.items(distinct).T).gather(1, place)], 1)
        return scores, self.parts[0][3](query)
# ---------------------------------------------------------------------------------------- 3 hard negatives
class HardNegatives(NamedTuple):
    """What is added to the pool of each window, and of no other."""
    grids: list   # the grids of the windows, then H more
    own: Tensor   # (W, 4) in2, the target with a cell changed, with colours swapped, mirrored; -1 for none
    rows: Tensor  # the windows that count: those with in2 other than out2

def altered(grid: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The grid with a cell in another of its colours, its two most frequent colours swapped, and mirrored."""
    counts = np.bincount(grid.ravel(), minlength=10)
    if np.count_nonzero(counts) < 2:
        return [grid] * 3  # no such grid differs
    a, b = np.argsort(-counts, kind="stable")[:2]
    one, colours, cell = grid.copy(), np.flatnonzero(counts), rng.integers(grid.size)
    one.flat[cell] = rng.choice(colours[colours != grid.flat[cell]])
    swapped = np.where(grid == a, b, np.where(grid == b, a, grid)).astype(grid.dtype)
    return [one, swapped, grid[:, ::-1]]

def hard_negatives(windows: Windows, seed: int = 0) -> HardNegatives:
    """Those of each window. What is in the pool already, or twice in a window, is dropped."""
    rng, count = np.random.default_rng(seed), len(windows.grids)
    made = [grid for target in windows.outputs for grid in altered(windows.grids[target], rng)]
    grids, place = arc_data.unique_grids([*windows.grids, *made])
    of_target = np.full((count, 3), -1)
    of_target[windows.outputs] = np.reshape(place[count:], (-1, 3))
    own = np.column_stack([windows.index[:, 2], of_target[windows.index[:, 3]]])
    own[np.isin(own, windows.outputs)] = -1  # the target is in the pool as well
    for i in range(1, 4):
        own[(own[:, :i] == own[:, [i]]).any(1), i] = -1
    rows = np.flatnonzero(windows.index[:, 2] != windows.index[:, 3])
    return HardNegatives(grids, torch.from_numpy(own), torch.from_numpy(rows))
# --------------------------------------------------------------------------------------------- 4 baselines
class OneHot:
    """Raw grids as an embedding (G, 9900): 30 x 30 cells of 11 colours, only for the grids in use."""
    def __init__(self, grids: list):
        self.cells = torch.from_numpy(arc_data.pad(grids)).flatten(1)

    def __getitem__(self, index) -> Tensor:
        return (self.cells[index][..., None] == torch.arange(arc_data.PAD + 1)).flatten(-2).float()

def features(grids: list[np.ndarray]) -> np.ndarray:
    """31 hand-made numbers a grid, (G, 31): size, colours, components (4-connected), symmetry."""
    cells = arc_data.pad(grids)
    labels = arc_data.components(cells, connectivity=4)
    first = labels == np.arange(labels.size).reshape(labels.shape)  # the cells that name components
    height, width = np.array([grid.shape for grid in grids]).T
    pieces = np.stack([(first & (cells == c)).sum((1, 2)) for c in range(10)], 1)  # (G, 10)
    shares = np.stack([(cells == c).sum((1, 2)) for c in range(10)], 1) / (height * width)[:, None]
    background = np.arange(len(grids)), arc_data.most_common_colour(cells)
    sizes = [height / 30, width / 30, height * width / 900, np.log(height * width) / 7]
    colours = [(shares > 0).sum(1) / 10, np.log1p(pieces.sum(1)) / 7,
               np.log1p(pieces.sum(1) - pieces[background]) / 7, 1 - shares[background]]
    symmetric = [symmetries(grid) for grid in grids]
    return np.column_stack([*sizes, *colours, symmetric, shares, np.log1p(pieces) / 5])

def symmetries(grid: np.ndarray) -> tuple[float, float, float]:
    """Share of cells equal under up-down flip, left-right flip and transpose (0 if not square)."""
    transpose = (grid == grid.T).mean() if grid.shape[0] == grid.shape[1] else 0.0
    return (grid == grid[::-1]).mean(), (grid == grid[:, ::-1]).mean(), transpose

def symbol_bag(codes: list, boxes: bool, width: int = 1024) -> Tensor:
    """The symbols of each grid, (G, width), from model.codes: a sum over its objects of random features.

    The product of two objects' features averages the share of codes that they have in common, times, with
    `boxes`, exp(-|box - box'|^2 / 2 (3 cells)^2).
    """
    random, positions = torch.Generator().manual_seed(0), codes[0][0].shape[1]
    tables = torch.randn(positions, CODE_SIZE, width, generator=random) / (positions * width) ** 0.5
    waves = torch.randn(4, width, generator=random) / 3
    phase = 2 * math.pi * torch.rand(width, generator=random)
    bags = []
    for code, box in codes:
        x = sum(table[column] for table, column in zip(tables, code.T))
        bags.append((x * 2**0.5 * torch.cos(box.float() @ waves + phase) if boxes else x).sum(0))
    return torch.stack(bags)

def principal(x: Tensor, width: int) -> Tensor:
    """The first `width` principal components of x (n, d); x itself where it is no wider."""
    if x.shape[1] <= width:
        return x
    x = x - x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x @ torch.svd_lowrank(x, min(width, len(x)), niter=2)[2]

def raw_spaces(grids: list, outputs: np.ndarray) -> dict[str, Space]:
    """The embeddings that need no model."""
    raw, x = OneHot(grids), features(grids)
    x = torch.from_numpy((x - x[outputs].mean(0)) / np.maximum(x[outputs].std(0), 1e-9)).float()
    histogram = np.array([np.bincount(grid.ravel(), minlength=10) / grid.size for grid in grids])
    return {"raw": Space(outputs, raw), "31 features": Space(outputs, x),
            "raw + 31 features": Space(outputs, raw, x),
            "colour histogram": Space(outputs, torch.from_numpy(histogram).float())}

def baseline_spaces(untrained, grids: list, outputs: np.ndarray, codes: list) -> dict[str, Space]:
    """Every embedding that is compared without a predictor, but the trained one."""
    spaces = raw_spaces(grids, outputs)
    if codes[0][0].shape[1]:  # the model has codes
        spaces["bag of codes"] = Space(outputs, symbol_bag(codes, boxes=False))
        spaces["codes with boxes"] = Space(outputs, symbol_bag(codes, boxes=True))
    return spaces | {"untrained": Space(outputs, untrained.embed(grids).float().cpu(), measure=euclidean)}
# -------------------------------------------------------------------------------------- 5 pairs and probes
FOLDS, NEIGHBOURS, WARMTH = 10, 20, 0.07  # of whole tasks; k-NN: cosine, weights exp(s / 0.07)
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the ridge, in units of a standardised feature's variance
PROPERTIES = ("output symmetric up-down", "output symmetric left-right", "output symmetric over its diagonal",
              "same shape", "output smaller", "output larger", "output recoloured")

class Pairs(NamedTuple):
    """The distinct pairs of tasks that have two, and their classes."""
    index: np.ndarray  # (n, 2) positions of input and output in the grids
    task: np.ndarray   # (n,)
    y: np.ndarray      # (n, L) class of each pair in each labeling; -1 for none
    names: list        # (L,) of the labelings

def properties(given: np.ndarray, out: np.ndarray) -> list[bool]:
    """PROPERTIES of a pair. Recoloured: another grid, equal to the input up to a renaming of colours."""
    same, renamed = given.shape == out.shape, False
    if same and (given != out).any():
        renamed = len(set(zip(given.flat, out.flat))) == len(np.unique(given)) == len(np.unique(out))
    symmetric = (share == 1 for share in symmetries(out))
    return [*symmetric, same, out.size < given.size, out.size > given.size, renamed]

def find_pairs(windows: Windows, labels: dict[str, str] | None = None) -> Pairs:
    """The pairs of the windows with their PROPERTIES, or with the label of their task."""
    rows = [np.column_stack([windows.task, windows.index[:, i:i + 2]]) for i in (0, 2)]
    task, *index = np.unique(np.concatenate(rows), axis=0).T
    index = np.stack(index, 1)
    if labels is None:
        y = np.array([properties(windows.grids[i], windows.grids[j]) for i, j in index], dtype=int)
        return Pairs(index, task, y, list(PROPERTIES))
    names = sorted(set(labels.values()))
    y = np.array([names.index(labels[i]) if i in labels else -1 for i in windows.task_ids])
    return Pairs(index, task, y[task, None], ["label"])

def probed(pairs: Pairs) -> Pairs:
    """The pairs with a class and the labelings of more than one class; nothing for fewer than three tasks."""
    rows = (pairs.y >= 0).all(1)
    enough = len(np.unique(pairs.task[rows])) > 2
    used = [j for j, column in enumerate(pairs.y.T) if enough and len(np.unique(column[rows])) > 1]
    return Pairs(pairs.index[rows], pairs.task[rows], pairs.y[rows][:, used], [pairs.names[j] for j in used])

def pair_features(x: Tensor, pairs: Pairs) -> Tensor:
    given, out = x[pairs.index[:, 0]], x[pairs.index[:, 1]]
    return torch.cat([given, out, out - given], 1)  # (n, 3 d)

def nearest_task(f: Tensor, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Whether the nearest pair by cosine of f (n, d) is of the same task (or the share of ties); the tasks.

    The neighbours of a pair share no grid with it. A pair without a neighbour in its task is left out.
    """
    f = F.normalize(f - f.mean(0), dim=1, eps=1e-30)
    given, out, task = (torch.from_numpy(x.copy()) for x in (*pairs.index.T, pairs.task))
    found = []
    for i in torch.arange(len(f)).split(CHUNK):
        apart = torch.stack([a[i, None] != b for a in (given, out) for b in (given, out)]).all(0)
        near = (f[i] @ f.T).masked_fill(~apart, -math.inf)
        tied = (near >= near.max(1, keepdim=True).values - TIE) & apart
        same = (task[i, None] == task) & apart
        right = (tied & same).sum(1) / tied.sum(1).clamp_min(1)
        found.append(right.masked_fill(~same.any(1), math.nan))
    found = torch.cat(found).double().numpy()
    return found[~np.isnan(found)], pairs.task[~np.isnan(found)]

def ridge(f: np.ndarray, y: np.ndarray, asked: np.ndarray):
    """Yields classes (n', L) of `asked` (n', d) for each strength: ridge regression of y (n, L) on f (n, d).

    Features are standardised. A score's threshold lies halfway between the mean training scores of a class
    and of the others, so that rare classes count as much as common ones.
    """
    hot = (y[:, :, None] == np.arange(y.max() + 1)).astype(float)  # (n, L, C)
    members, scaler = hot.sum(0), StandardScaler().fit(f)  # (L, C)
    f, asked = scaler.transform(f), scaler.transform(asked)
    product, wanted = f.T @ f, f.T @ hot.reshape(len(f), -1)  # the same for all strengths
    for strength in STRENGTHS:
        weights = solve(product + strength * len(f) * np.eye(f.shape[1]), wanted, assume_a="pos")
        trained, scores = ((x @ weights).reshape(len(x), *hot.shape[1:]) for x in (f, asked))
        inside = (trained * hot).sum(0) / np.maximum(members, 1)
        outside = (trained * (1 - hot)).sum(0) / np.maximum(len(f) - members, 1)
        scores = (scores - (inside + outside) / 2) / np.maximum(inside - outside, 1e-12)
        yield np.where(members > 0, scores, -np.inf).argmax(2)

def linear_probe(f: np.ndarray, y: np.ndarray, asked: np.ndarray, task: np.ndarray) -> np.ndarray:
    """`ridge` with the strength that is best, for each labeling, on a fifth of the training tasks."""
    check = np.isin(task, np.unique(task)[::5])
    tried = ridge(f[~check], y[~check], f[check])
    best = np.argmax([[balanced(a, b).mean() for a, b in zip(t.T, y[check].T)] for t in tried], 0)  # (L,)
    answers = list(ridge(f, y, asked))
    return np.stack([answers[i][:, j] for j, i in enumerate(best)], 1)

def knn_probe(f: np.ndarray, y: np.ndarray, asked: np.ndarray, task: np.ndarray) -> np.ndarray:
    weights = lambda distance: np.exp((1 - distance) / WARMTH)
    votes = KNeighborsClassifier(min(NEIGHBOURS, len(y)), metric="cosine", weights=weights)
    votes.fit(f - f.mean(0), y.squeeze(1) if y.shape[1] == 1 else y)
    return votes.predict(asked - f.mean(0)).reshape(len(asked), -1)

def cross_predict(probe: Callable, f: np.ndarray, y: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Classes (n, L) of pairs with features f (n, d), by a probe fitted to other folds of whole tasks."""
    chosen = np.empty_like(y)
    folds = GroupKFold(min(FOLDS, len(np.unique(task))), shuffle=True, random_state=0)
    for train, test in folds.split(f, groups=task):
        chosen[test] = probe(f[train], y[train], f[test], task[train])
    return chosen

def balanced(chosen: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n,) values whose mean is the balanced accuracy: each is that accuracy and what the row adds to it.

    So a bootstrap of the values varies as the balanced accuracy does, to first order.
    """
    names, y, counts = np.unique(y, return_inverse=True, return_counts=True)
    right = chosen == names[y]
    recall = np.bincount(y, right) / counts  # (C,)
    return recall.mean() + (right - recall[y]) * len(y) / (len(names) * counts[y])

def majority(y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(T, L) the most frequent class among the rows (n, L) of each group; the lowest of equals."""
    return np.array([[np.bincount(row).argmax() for row in y[group == one].T] for one in np.unique(group)])

def pair_metrics(x: Tensor, pairs: Pairs) -> tuple[dict, dict]:
    """PAIRWISE metrics of x (G, d) as {metric: (values, tasks)}, and {labeling: {probe: accuracy}}.

    A probe has a value a pair, the vote one a task: its `balanced` accuracy, averaged over the labelings.
    """
    values = {"task_1nn": nearest_task(pair_features(x, pairs), pairs)}
    pairs = probed(pairs)
    if not pairs.names:
        return values, {}
    f, y, task = pair_features(x, pairs).double().numpy(), pairs.y, pairs.task
    linear, votes = (cross_predict(probe, f, y, task) for probe in (linear_probe, knn_probe))
    answers = {"probe_linear": (linear, y, task), "probe_knn": (votes, y, task),
               "probe_vote": (majority(votes, task), majority(y, task), np.unique(task))}
    by_label = {label: {} for label in pairs.names}
    for name, (chosen, truth, tasks) in answers.items():
        each = np.stack([balanced(a, b) for a, b in zip(chosen.T, truth.T)])  # (L, n)
        values[name] = each.mean(0), tasks
        for label, row in zip(pairs.names, each):
            by_label[label][name] = float(row.mean())
    return values, by_label
# --------------------------------------------------------------------------------------------- 6 intervals
def bootstrap_ci(values: np.ndarray, task: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple:
    """95 % bootstrap interval of the mean of values (n,), drawing whole tasks (n,) with replacement.

    Windows of one task are not independent. The mean of a draw is a ratio of sums, as tasks differ in size.
    """
    _, task = np.unique(task, return_inverse=True)
    sums, counts = np.bincount(task, values), np.bincount(task)  # (T,)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    return tuple(np.percentile(times @ sums / (times @ counts), [2.5, 97.5]).tolist())

def paired_ci(a: np.ndarray, b: np.ndarray, task: np.ndarray) -> tuple:
    """Mean of a - b (n,) and its interval. Draws are of the same tasks: what is hard for both cancels."""
    return float(np.mean(a - b)), *bootstrap_ci(a - b, task)
# -------------------------------------------------------------------------------------------- 7 evaluation
class Evaluation(NamedTuple):
    """The record of an evaluation: eval.json and health.json hold parts of it, result.json is a selection."""
    data: dict     # tasks, windows, candidates; harness/commands.py adds source, leaks and notes
    metrics: dict  # {metric: {"model": x, "baselines": {row: x}, "interval": [low, high], "n": count}}
    health: dict   # cross_entropy, probes, lead, shuffled context; harness/health.py adds the rest
    windows: Windows
    z: Tensor      # (G, D)
    z_hat: Tensor  # (W, D)
    codes: list    # what model.codes gives for the grids
    pairs: Pairs
    labels: dict | None
    values: dict   # the model's value of every query, and the task of each: {metric: (values, tasks)}

@torch.no_grad()
def evaluate(model, untrained, tasks: dict, labels: dict | None = None) -> Evaluation:
    """Every metric of a frozen model and of every baseline by the same code, and controls.

    untrained  the same model before training; None leaves all baselines out
    labels     {task id: class name} to probe for instead of PROPERTIES
    """
    windows = arc_data.make_windows(tasks)
    arc_data.need(len(windows.task), "no task of the data has two pairs with outputs")
    hard, pairs = hard_negatives(windows), find_pairs(windows, labels)
    queries, tests = window_queries(windows, own=hard.own), demonstration_queries(tasks, windows)
    outputs, count = windows.outputs, len(windows.grids)
    z, codes = model.embed(hard.grids).float().cpu(), model.codes(hard.grids)
    shown = [tuple(windows.grids[i] for i in context) for q in tests for context in q.context.tolist()]
    shuffled = contexts(windows, pair_from=shuffle_context(windows)) if len(set(windows.task)) > 1 else []
    asked = contexts(windows), shown, shuffled  # at once, so that each grid is encoded once
    z_hat, z_tests, z_shuffled = model.predict(sum(asked, [])).float().cpu().split([*map(len, asked)])

    def answer(score: Callable, of_tests: Callable | None = None, nats: bool = True) -> dict:
        found = rank(score, queries, best_temperature(score, windows) if nats else None)
        values = {metric: (x, windows.task) for metric, x in found.items()}
        values |= {metric: (found[metric][hard.rows], windows.task[hard.rows]) for metric in HARD}
        found, task = rank(of_tests or score, tests), [int(i) for q in tests for i in q.task]
        return values | {metric: (found[name], task) for metric, name in DEMONSTRATIONS.items() if found}

    own, rows, probes = Space(outputs, z, measure=euclidean), {}, {}
    rows["model"], probes["model"] = pair_metrics(z, pairs)
    rows["model"] |= answer(own.by_embedding(z_hat), own.by_embedding(z_tests))
    spaces = baseline_spaces(untrained, hard.grids, outputs, codes) | {"trained": own} if untrained else {}
    for name, space in spaces.items():
        for query, weights in QUERIES.items():
            if query == "analogy" or len(space.parts) == 1:
                rows[f"{query}, {name}"] = answer(space.by_weights(weights), nats=query == "analogy")
        if len(space.parts) == 1 and space is not own:  # pairs in z itself are the model's row
            x = principal(space.parts[0][0][torch.arange(count)], z.shape[1])  # no wider than z
            rows[name], probes[name] = pair_metrics(x, pairs)
    for name, other in (("pooled, untrained", untrained), ("pooled, trained", model)) if spaces else ():
        x = principal(other.embed(windows.grids, layer="pooled").float().cpu(), z.shape[1])
        rows[name], probes[name] = pair_metrics(x, pairs)
    if spaces:
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        rows["chance"] = answer(Space(outputs, noise, measure=euclidean).by_weights((1, 0, 0)), nats=False)
        rows["chance"]["task_1nn"] = nearest_task(pair_features(noise, pairs), pairs)
        right = [1 / len(np.unique(column)) for column in probed(pairs).y.T]  # of the most frequent class
        rows["majority"] = dict.fromkeys(PAIRWISE[1:], (np.mean(right, keepdims=True), None)) if right else {}

    metrics = {metric: summarise(rows, metric) for metric in METRICS}
    lead = {row: {metric: paired_ci(rows["model"][metric][0], *values[metric])
                  for metric in COMPARED if metric in values}
            for row, values in rows.items() if row != "model" and "ndcg10" in values}
    nats = summarise(rows, "nats") | {"ln_pool": math.log(len(outputs))}
    health = {"cross_entropy": nats, "probes": probes, "lead": lead, "shuffled_ndcg10_without_out1": None}
    if shuffled:
        found = rank(own.by_embedding(z_shuffled), queries)
        health["shuffled_ndcg10_without_out1"] = float(found["ndcg10_without_out1"].mean())
    data = {"tasks": len(tasks), "windows": len(windows.task), "candidates": len(outputs)}
    values = {metric: rows["model"][metric] for metric in METRICS if metrics[metric]["n"]}
    return Evaluation(data, metrics, health, windows, z[:count], z_hat, codes[:count], pairs, labels, values)

def contexts(windows: Windows, rows: np.ndarray | None = None, pair_from: np.ndarray | None = None) -> list:
    """(in1, out1, in2) of the windows `rows`, all by default; (in1, out1) of the windows `pair_from`."""
    index = windows.index[slice(None) if rows is None else rows, :3].copy()
    if pair_from is not None:
        index[:, :2] = windows.index[pair_from, :2]
    return [tuple(windows.grids[i] for i in context) for context in index]

def shuffle_context(windows: Windows, seed: int = 0) -> np.ndarray:
    """(W,) for each window one of another task that lends its (in1, out1): the next task of a seeded ring."""
    rng = np.random.default_rng(seed)
    _, task, counts = np.unique(windows.task, return_inverse=True, return_counts=True)
    arc_data.need(len(counts) > 1, "a shuffled context needs windows of two tasks or more")
    ring = rng.permutation(len(counts))
    taken = np.roll(ring, 1)[ring.argsort()][task]  # the task from which each window takes
    start = np.cumsum(counts) - counts  # windows stand task by task
    return start[taken] + rng.integers(counts[taken])

def summarise(rows: dict[str, dict], metric: str) -> dict:
    """An entry of eval.json; empty where the data allow no such metric."""
    values, task = rows["model"].get(metric, ((), ()))
    if not len(values):
        return {"model": None, "baselines": {}, "interval": None, "n": 0}
    mean = {row: float(found[metric][0].mean()) for row, found in rows.items() if metric in found}
    return {"model": mean.pop("model"), "baselines": mean, "interval": bootstrap_ci(values, task),
            "n": len(values)}

def main(argv: list[str] | None = None):
    import harness.commands  # arguments, files, pages
    harness.commands.main(argv)

if __name__ == "__main__":
    main()
