"""Claims of the full evaluation: hard retrieval, pairs, probes, codes, health, alerts, the pages, and what bad input gets."""

import itertools
import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_json, synthetic_tasks, write_tasks
from matplotlib.figure import Figure
from test_eval import random_tasks

import arc_data
import eval as evaluation
import lejepa
import report

ROOT = Path(__file__).parent.parent
KEYS = "ndcg10 ndcg10_without_out1 hard_ndcg10 hard_r1 within_task task_1nn probe_linear probe_knn probe_vote".split()


class Toy:
    """Embeds any grid by a fixed map of its cells, predicts by analogy, and codes an object by what `sees` of it."""

    def __init__(self, seed=0, width=12, size=lejepa.CODE_SIZE, sees=("colour", "area", "shape")):
        self.map = torch.randn(900 * 11, width, generator=torch.Generator().manual_seed(seed)) / 30
        self.size, self.sees, self.seed = size, sees, seed

    def embed(self, grids):
        return evaluation.one_hot_cells(grids) @ self.map

    def predict(self, contexts):
        in1, out1, in2 = (self.embed(list(side)) for side in zip(*contexts))
        return out1 + in2 - in1

    def codes(self, grids):
        tokens, found = arc_data.tokenise(grids), []
        seen = {"colour": tokens.colour, "area": tokens.area.astype(int), "shape": np.array([zlib.crc32(tokens.bitmaps[i].tobytes()) % 1009 for i in tokens.shape])}
        codes = np.stack([sum(seen[name] * (7 + 3 * position + self.seed) for name in self.sees) % self.size for position in range(2)], 1)
        for a, b in zip(tokens.start[:-1], tokens.start[1:]):
            found.append((torch.from_numpy(codes[a:b]), torch.from_numpy(tokens.box[a:b].astype(np.int64))))
        return found


@pytest.fixture(scope="module")
def tasks():
    return synthetic_tasks(0, tasks=16, side=(2, 6), colours=4)


@pytest.fixture(scope="module")
def windows(tasks):
    return arc_data.make_windows(tasks | random_tasks(0))  # random tasks share outputs, have in2 = out2 and single-colour grids


@pytest.fixture(scope="module")
def hard(windows):
    return evaluation.distractors(windows)


# ------------------------------------------------------------------------------------------------ hard retrieval


def test_distractors_are_what_they_are_said_to_be(windows, hard):
    pool, kinds = {(windows.grids[i].shape, windows.grids[i].tobytes()) for i in windows.outputs}, [0] * 4
    for (_, _, in2, out2), own in zip(windows.index, hard.own.tolist()):
        target, given = windows.grids[out2], [None if i < 0 else hard.grids[i] for i in own]
        real = [grid for grid in given if grid is not None]
        assert len({(grid.shape, grid.tobytes()) for grid in real} | pool) == len(real) + len(pool)  # distinct, and not in the pool
        kinds = [count + (grid is not None) for count, grid in zip(kinds, given)]
        source, changed, swapped, mirrored = given
        assert source is None or np.array_equal(source, windows.grids[in2])
        assert changed is None or (changed != target).sum() == 1 and set(changed.flat) <= set(target.flat)
        assert mirrored is None or np.array_equal(mirrored, np.fliplr(target))
        if swapped is not None:
            counts = np.bincount(target.ravel(), minlength=10)
            a, b = sorted(range(10), key=lambda colour: -counts[colour])[:2]
            assert np.array_equal(swapped == a, target == b) and np.array_equal(swapped == b, target == a)
            assert (swapped == target)[~np.isin(target, [a, b])].all()
    assert min(kinds) > 20
    assert hard.rows.tolist() == [w for w, row in enumerate(windows.index) if row[2] != row[3]] and len(hard.rows) < len(windows.index)
    assert all(torch.equal(a, b) for a, b in zip(hard[1:], evaluation.distractors(windows)[1:]))  # seeded
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(hard.grids, evaluation.distractors(windows, seed=1).grids))


@pytest.mark.parametrize("measure", ["euclidean", "cosine"])
def test_hard_metrics_equal_their_slow_definition(windows, hard, measure):
    x = Toy().embed(hard.grids)
    x = x - x[windows.outputs].mean(0) + (0.5 if measure == "euclidean" else 0)
    query = evaluation.queries(x, windows, (-1, 1, 1)) + 0.05 * torch.randn(len(windows.task), x.shape[1], generator=torch.Generator().manual_seed(1))
    got = evaluation.ask(query, x, windows, hard, getattr(evaluation, measure))
    q, p = query.double().numpy(), x.double().numpy()
    near = (lambda a, b: -((a - b) ** 2).sum()) if measure == "euclidean" else (lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for i, w in enumerate(hard.rows.tolist()):
        candidates = [*windows.outputs, *(j for j in hard.own[w].tolist() if j >= 0)]
        own = near(q[w], p[windows.index[w, 3]])
        above = sum(near(q[w], p[j]) > own + 1e-9 for j in candidates)
        assert got["hard_r1"][i] == (above == 0)
        assert got["hard_ndcg10"][i] == pytest.approx(1 / math.log2(above + 2) if above < 10 else 0)
    assert got["hard_ndcg10"].mean() < got["ndcg10"].mean()
    assert {name: len(values) for name, values in got.items() if name not in evaluation.HARD} == dict.fromkeys(evaluation.METRICS, len(windows.task))


def test_copying_in2_is_never_right_in_the_hard_form(windows, hard):
    x = Toy().embed(hard.grids)
    assert evaluation.ask(x[windows.index[:, 2]], x, windows, hard)["hard_r1"].max() == 0
    scores = evaluation.floor_scores(windows, hard, evaluation.standardised_features(windows._replace(grids=hard.grids)))
    rows = {name: evaluation.rank(score, windows, hard=hard) for name, score in scores.items()}
    assert rows["copy in2, raw"]["hard_r1"].max() == 0 < rows["copy in2, raw"]["r1"].max() and rows["analogy, raw"]["hard_r1"].max() == 1
    plain = evaluation.floor_rows(windows)
    for name, values in plain.items():  # the hard form leaves the plain one as it is
        for metric in evaluation.METRICS:
            np.testing.assert_allclose(rows[name][metric], values[metric])


@pytest.mark.parametrize("name", evaluation.QUERIES)
def test_raw_scores_of_distractors_are_cosines_of_centred_one_hot_grids(windows, hard, name):
    weights = evaluation.QUERIES[name]
    x = np.eye(11)[arc_data.pad(hard.grids)].reshape(len(hard.grids), -1)
    x = x - x[windows.outputs].mean(0)
    q = sum(w * x[windows.index[:, i]] for i, w in enumerate(weights))
    own = x[hard.own]  # (W, 4, 9900); -1 is some grid, and is not ranked
    expected = (q[:, None] * own).sum(2) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(own, axis=2)
    got = evaluation.raw_scores(windows, weights, evaluation.cell_overlap(windows), hard)(torch.arange(len(q)))
    there = hard.own.numpy() >= 0
    np.testing.assert_allclose(got[:, len(windows.outputs):].numpy()[there], expected[there], atol=1e-6)


def test_cross_entropy_is_the_least_over_temperatures(windows):
    out2 = evaluation.find_targets(windows).out2
    scores = torch.randn(len(out2), len(windows.outputs), generator=torch.Generator().manual_seed(0))
    scores[torch.arange(len(out2)), out2] += 2
    best = min(-torch.log_softmax(scores.double() / t, 1)[torch.arange(len(out2)), out2].mean() for t in np.geomspace(0.05, 20, 2000))
    assert evaluation.cross_entropy(100 * scores - 7, out2).mean() == pytest.approx(float(best), abs=1e-3)  # whatever the scale of scores
    assert evaluation.cross_entropy(torch.zeros_like(scores), out2).mean() == pytest.approx(math.log(len(windows.outputs)), rel=1e-5)


# ------------------------------------------------------------------------------------------------ pairs and probes


def test_properties_of_pairs_worked_by_hand():
    grid = lambda *rows: np.array(rows, np.int8)
    for given, out, expected in [(grid([1, 2], [3, 4]), grid([2, 2], [2, 2]), [1, 1, 1, 1, 0, 0, 0]),
                                 (grid([1, 2], [3, 1]), grid([2, 5], [0, 2]), [0, 0, 0, 1, 0, 0, 1]),
                                 (grid([1, 2], [3, 1]), grid([2, 5], [5, 2]), [0, 0, 1, 1, 0, 0, 0]),  # two colours become one
                                 (grid([1, 2]), grid([1, 2]), [1, 0, 0, 1, 0, 0, 0]), (grid([1, 2], [1, 3]), grid([1, 3, 1]), [1, 1, 0, 0, 1, 0, 0]),
                                 (grid([1]), grid([1, 2], [1, 2]), [1, 0, 0, 0, 0, 1, 0])]:
        assert evaluation.properties(given, out) == [bool(x) for x in expected], (given, out)


def test_pairs_are_the_distinct_pairs_of_tasks_with_two(windows):
    pairs = evaluation.find_pairs(windows)
    expected = {(t, tuple(row[:2])) for t, row in zip(windows.task, windows.index)}
    assert {(t, tuple(row)) for t, row in zip(pairs.task, pairs.index)} == expected and len(expected) == len(pairs.task)
    labels = {windows.task_ids[0]: "b", windows.task_ids[2]: "a"}
    labelled = evaluation.find_pairs(windows, labels)
    assert [set(labelled.y[labelled.task == t, 0]) for t in range(3)] == [{1}, {-1}, {0}]


def test_the_nearest_task_equals_its_slow_definition(tasks):
    given, out, other = (np.full((9, 9), colour, np.int8) for colour in (1, 2, 3))
    shared = {"shared": arc_data.Task([(given, out)], [(given, other)])}  # each of its pairs leaves the other out
    pairs = evaluation.find_pairs(arc_data.make_windows(tasks | random_tasks(0) | shared))
    f = torch.randn(len(pairs.task), 5, generator=torch.Generator().manual_seed(0))
    f = f[torch.randint(0, 12, (len(f),), generator=torch.Generator().manual_seed(1))]  # ties
    unit = f.double().numpy() - f.double().numpy().mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected, names = [], []
    for i, own in enumerate(pairs.index):
        others = [j for j, pair in enumerate(pairs.index) if not set(pair) & set(own)]
        if not any(pairs.task[j] == pairs.task[i] for j in others):
            continue
        best = max(unit[i] @ unit[j] for j in others)
        tied = [pairs.task[j] == pairs.task[i] for j in others if unit[i] @ unit[j] > best - 1e-6]
        expected.append(sum(tied) / len(tied))
        names.append(pairs.task[i])
    got = evaluation.nearest_task(f, pairs)
    np.testing.assert_allclose(got[0], expected)
    assert got[1].tolist() == names and 0 < np.mean(expected) < 1 and any(0 < share < 1 for share in expected) and len(names) == len(pairs.task) - 2


def planted(seed, tasks=60, width=20, classes=3):
    """Features (n, width), task (n,) and class (n,) of pairs: the class is the task's, and stands in three of the features."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(tasks), rng.integers(2, 6, tasks))
    y = rng.choice(classes, tasks, p=[0.2, 0.5, 0.3] if classes == 3 else None)[task]
    return torch.from_numpy(rng.normal(size=(len(task), width)) * rng.uniform(0.01, 100, width) + rng.normal(size=width)).float(), task, y


def test_probes_read_a_planted_label_exactly():
    f, task, y = planted(0)
    scale = f.std(0)
    f = f / scale * 0.2
    f[:, :3] += 3 * torch.eye(3)[y]
    fold = evaluation.folds(task)
    assert (evaluation.linear_probe(f * scale, y[:, None], fold)[:, 0] == y).all()  # features of any scale
    assert (evaluation.knn(f, y[:, None], fold)[:, 0] == y).all()
    two = np.stack([y, (y == 1).astype(int)], 1)
    assert (evaluation.linear_probe(f, two, fold) == two).all() and (evaluation.knn(f, two, fold) == two).all()


def test_probes_stay_at_chance_on_noise_and_on_what_only_names_the_task():
    linear, near = [], []
    for seed in range(6):
        f, task, y = planted(seed)
        f[:, :8] += 50 * torch.randn(task.max() + 1, 8, generator=torch.Generator().manual_seed(seed))[task]  # a fold that split a task would leak its class
        fold = evaluation.folds(task)
        linear.append(evaluation.balanced(evaluation.linear_probe(f, y[:, None], fold)[:, 0], y).mean())
        near.append(evaluation.balanced(evaluation.knn(f, y[:, None], fold)[:, 0], y).mean())
    assert abs(np.mean(linear) - 1 / 3) < 0.06 and abs(np.mean(near) - 1 / 3) < 0.06, (linear, near)


def test_knn_equals_its_slow_definition():
    f, task, y = planted(3)
    f = f / f.std(0)
    fold, x = evaluation.folds(task), f.double().numpy()
    for i, chosen in enumerate(evaluation.knn(f, y[:, None], fold)[:, 0]):
        others = [j for j in range(len(x)) if fold[j] != fold[i]]
        middle = x[others].mean(0)
        cosines = sorted(((x[i] - middle) @ (x[j] - middle) / np.linalg.norm(x[i] - middle) / np.linalg.norm(x[j] - middle), y[j]) for j in others)[-20:]
        votes = [sum(math.exp(s / 0.07) for s, label in cosines if label == c) for c in range(3)]
        assert chosen == np.argmax(votes)


def test_ridge_equals_its_slow_definition():
    f, task, y = planted(1)
    f[:, 5] = 4.0  # a constant says nothing
    x, hot = f.double().numpy(), np.eye(3)[y]
    ones = torch.cat([f.double(), torch.ones(len(f), 1, dtype=torch.float64)], 1)
    got = evaluation.ridge(ones.T @ torch.cat([ones, torch.from_numpy(hot)], 1), ones, 3)
    scale = np.where(x.std(0) > 1e-6, x.std(0), 1)
    x = (x - x.mean(0)) / scale
    for strength, classes in zip(evaluation.STRENGTHS, got):
        score = x @ np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ (hot - hot.mean(0)))
        inside, outside = (np.array([score[(y == c) == side, c].mean() for c in range(3)]) for side in (True, False))
        assert (classes[:, 0] == ((score - (inside + outside) / 2) / (inside - outside)).argmax(1)).all(), strength


def test_balanced_accuracy_votes_and_folds_by_hand():
    chosen, y = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1])
    assert evaluation.balanced(chosen, y).mean() == pytest.approx((2 / 3 + 1 / 2) / 2)
    votes = np.array([[0, 1], [2, 1], [2, 0], [1, 1]])
    assert evaluation.majority(votes, np.array([0, 0, 0, 1])).tolist() == [[2, 1], [1, 1]]
    task = np.repeat(np.arange(37), 3)
    fold = evaluation.folds(task)
    assert len(np.unique(fold)) == 10 and all(len(np.unique(fold[task == t])) == 1 for t in task)


def test_intervals_of_balanced_accuracy_cover_it_in_at_least_90_of_100_draws():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        task = np.repeat(np.arange(80), rng.integers(2, 6, 80))
        y = (rng.random(80) < 0.2).astype(int)[task]  # a rare class
        right = rng.random(len(y)) < np.where(y == 1, 0.6, 0.9)
        low, high = evaluation.interval(evaluation.balanced(np.where(right, y, 1 - y), y), task, draws=500)
        inside += low <= 0.75 <= high
        assert evaluation.interval(evaluation.balanced(y, y), task, draws=50) == (1, 1)  # no class is drawn too often
    assert 90 <= inside < 100


def test_what_cannot_be_probed_is_left_out(windows):
    x = Toy().embed(windows.grids)
    names = dict(zip(windows.task_ids, "ab"))  # two labelled tasks are too few for folds
    values, by_label = evaluation.pair_answers(x, evaluation.find_pairs(windows, names))
    assert set(values) == {"task_1nn"} and by_label == {}
    names = {name: "ab"[i % 2] for i, name in enumerate(windows.task_ids[:9])}
    values, by_label = evaluation.pair_answers(x, evaluation.find_pairs(windows, names))
    pairs = evaluation.find_pairs(windows, names)
    assert len(values["probe_knn"]) == (pairs.y >= 0).sum() < len(pairs.y) and len(values["probe_vote"]) == 9 and list(by_label) == ["label"]


# ------------------------------------------------------------------------------------------------ symbols, codes, health


def test_a_bag_of_codes_forgets_places_and_one_with_boxes_does_not():
    here, there = np.zeros((9, 9), np.int8), np.zeros((9, 9), np.int8)
    here[1, 1], here[5:7, 5], there[8, 0], there[0:2, 8] = 3, 2, 3, 2
    other = np.zeros((9, 9), np.int8)
    other[1:3, 1:3] = 5
    found = Toy(sees=("colour", "area")).codes([here, there, other])
    bag, placed = (evaluation.symbol_bag(found, lejepa.CODE_SIZE, boxes, width=4096) for boxes in (False, True))
    torch.testing.assert_close(bag[0], bag[1])
    assert not torch.allclose(placed[0], placed[1])
    for x, boxes in ((bag, False), (placed, True)):
        for (a, b), value in zip(itertools.product(range(3), repeat=2), (x @ x.T).flatten().tolist()):
            product = sum(float((ca == cb).double().mean()) * (math.exp(-float((ba - bb).square().sum()) / 18) if boxes else 1)
                          for ca, ba in zip(*found[a]) for cb, bb in zip(*found[b]))
            assert value == pytest.approx(product, abs=0.35)  # random features: to their noise


@pytest.mark.parametrize("sees, kept", [(("shape",), {"recoloured": 1.0}), (("colour",), {"recoloured": 0.0, "mirrored": 1.0, "transposed": 1.0})])
def test_the_share_of_objects_that_keep_their_codes(sees, kept):
    rng = np.random.default_rng(0)
    grids = []
    for _ in range(40):
        grid = np.zeros((12, 12), np.int8)
        grid[rng.random(grid.shape) < 0.2] = 1  # one colour, much background
        grids.append(grid)
    model = Toy(sees=sees)
    got = evaluation.code_health(model, grids, model.codes(grids), model.size)
    assert {name: got[f"codes_kept_when_{name}"] for name in kept} == kept
    if sees == ("shape",):  # single cells and other symmetric objects keep theirs, many do not
        assert 0.2 < got["codes_kept_when_mirrored"] < 0.95 and 0.2 < got["codes_kept_when_transposed"] < 0.95


def test_use_of_codes_by_occurrence_and_by_distinct_object():
    grid = np.zeros((9, 9), np.int8)
    grid[::2, ::2] = 3  # 25 equal cells
    grid[1, 1:3] = 0
    model = Toy(sees=("colour",))
    got = evaluation.code_health(model, [grid], model.codes([grid]), model.size)
    assert (got["codes_n_by_occurrence"], got["codes_n_by_distinct"]) == (26, 2)
    assert got["codes_top_share_by_occurrence"] == pytest.approx(25 / 26) and got["codes_top_share_by_distinct"] == 0.5


def test_health_equals_its_slow_definition():
    rng = np.random.default_rng(0)
    z = rng.gamma(2.0, size=(300, 6)) * [1, 2, 3, 4, 5, 6]
    got = evaluation.health(torch.from_numpy(z))
    values = np.linalg.eigvalsh(np.cov(z.T) + 1e-6 * np.eye(6))
    centred = (z - z.mean(0)) / z.std(0)
    assert got["variance"] == pytest.approx(z.var(0).mean())
    assert got["isotropy"] == pytest.approx((values[0] + 1e-8) / (values[-1] + 1e-8))
    assert got["gaussian_score"] == pytest.approx(1 / (1 + np.abs((centred**3).mean(0)).mean() + np.abs((centred**4).mean(0) - 3).mean()))
    normal = torch.randn(192 * 20, 8, generator=torch.Generator().manual_seed(0))
    assert evaluation.sigreg_of(normal, lejepa.sigreg) == pytest.approx(1.05246, rel=0.1)
    assert evaluation.sigreg_of(torch.zeros(400, 8), lejepa.sigreg) == pytest.approx(0.40205 * 192, rel=1e-3)


def test_codes_agree_up_to_a_renaming_and_by_chance_only_as_shuffled_ones_do():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 50, (2000, 3))
    renamed = np.stack([rng.permutation(50)[column] for column in a.T], 1)[:, [2, 0, 1]]
    got = evaluation.compare_codes(a, renamed, 50)
    assert got["agreement"] == 1 and got["chance"] < 0.1
    assert evaluation.compare_codes(a, a // 2, 50)["agreement"] < 0.6  # one to one: of two codes that become one, one is matched
    other = evaluation.compare_codes(a, rng.integers(0, 50, (2000, 3)), 50)
    assert abs(other["agreement"] - other["chance"]) < 0.01


# ------------------------------------------------------------------------------------------------ alerts and verdicts


def test_alerts_trip_once_and_clear_once():
    alerts = report.Alerts()
    lines = [alerts.feed({"step": step, "grad_norm": norm}) for step, norm in enumerate([40, 40, 40, 40, 29, 31, 32, 33, 34, 35, 36, 10, 11])]
    assert [bool(line) for line in lines] == [False] * 9 + [True, False, True, False]
    assert re.fullmatch(r"alert at step 9: gradient norm .*: grad_norm 35", lines[9][0]) and lines[11][0].startswith("clear at step 11: gradient norm")
    assert alerts.lines == [*lines[9], *lines[11]] and not alerts.tripped


@pytest.mark.parametrize("key, values, at", [("codes_usage", [0.07, 0.07, 0.09, 0.07, 0.07, 0.07, 0.3], (5, 6)), ("codes_usage", [0.5, 0.04, 0.06], (1, 2)),
                                             ("effective_rank_context", [3.1, 2.9, 3.1], (1, 2)), ("effective_rank_target", [4.9, 5.1], (0, 1)),
                                             ("validation_loss", [4.0, 7.9, 16.0, 15.0], (2, 3)), ("ndcg10_without_out1", [0.5] + [0.4] * 10 + [0.6], (10, 11))])
def test_each_alert_trips_and_clears_where_it_should(key, values, at):
    alerts = report.Alerts()
    lines = [alerts.feed({"step": step, key: value, "codes_perplexity": None}) for step, value in enumerate(values)]
    assert [(step, line[0].split()[0]) for step, line in enumerate(lines) if line] == [(at[0], "alert"), (at[1], "clear")]
    rows = [{"step": step, key: value} for step, value in enumerate(values)]
    again = report.Alerts(rows[:at[0] + 1])  # a resumed run reads its log
    assert again.feed(rows[at[0] + 1]) == lines[at[0] + 1]


def recorded(run="default-mean-seed0"):
    """What report.verdicts judges, from the records of a run: log, result, lam, health, figures."""
    read = lambda name: (ROOT / "runs" / run / name).read_text()
    log = [json.loads(line) for line in read("log.jsonl").splitlines()]
    return log, json.loads(read("result.json")), json.loads(read("config.json"))["lam"], json.loads(read("health.json")), json.loads(read("eval.json"))


def judged(*record):
    return {name: (ok, text) for name, ok, text in report.verdicts(*record)}


def test_the_default_run_meets_every_criterion_but_the_number_of_epochs():
    found = judged(*recorded())
    assert [name for name, (ok, _) in found.items() if not ok] == ["100 epochs"]
    assert found["100 epochs"][1] == "42"


def test_each_verdict_fails_where_its_figure_is_bad():
    log, result, lam, health, figures = recorded()
    bad = [dict(row) for row in log]
    looks = [row for row in bad if row.get("validation_loss")]
    looks[3]["validation_loss"], looks[5]["codes_usage"], bad[-1]["prediction"] = 99.0, 0.2, 1000.0
    ill = health | {"context": {"effective_rank": 14}, "target": {"effective_rank": 19}, "codes": {"codes_n_by_occurrence": 0},
                    "shuffled_ndcg10_without_out1": figures["ndcg10_without_out1"]["floors"]["copy in2, trained"] + 0.001}
    found = judged(bad, result | {"epochs": 150, "grad_norm_mean": 51, "grad_norm_max": 151}, lam, ill, figures)
    failed = [name for name, (ok, _) in found.items() if not ok]
    for part in ("spike", "code usage above 25 %", "steady", "rank of the context at least", "rank of the target at least", "mean below 50", "maximum below 150",
                 "no loss term", "codes that other", "shuffled context", "no alert: validation loss"):
        assert any(part in name for name in failed), part
    assert len(failed) == 11 and "100 epochs" not in failed
    unknown = judged([], {}, lam, health | {"shuffled_ndcg10_without_out1": None}, figures)
    assert unknown["100 epochs"] == (None, "not recorded") and sum(ok is None for ok, _ in unknown.values()) == 15


@pytest.mark.whole
def test_stop_on_alert_ends_a_run_that_can_go_on(task_folder, tmp_path):
    flags = ["--data", str(task_folder), "--run", str(tmp_path / "run"), "--steps", "40", "--batch-size", "24", "--size", "small", "--device", "cpu"]
    script = "import sys, report, lejepa; report.ALERTS['late'] = ('loss', lambda v: len(v) == 2, max); sys.argv = ['lejepa.py', *sys.argv[1:]]; lejepa.main()"
    go = lambda *more: subprocess.run([sys.executable, "-c", script, *flags, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    stopped = go("--stop-on-alert")
    assert stopped.returncode == 3, stopped.stderr
    assert "alert at step 20: late: loss" in stopped.stdout and "stopped by an alert after step 20" in stopped.stdout and "--resume" in stopped.stdout
    assert (tmp_path / "run" / "last.safetensors").exists() and not (tmp_path / "run" / "result.json").exists()
    resumed = go("--resume")
    assert resumed.returncode == 0 and (tmp_path / "run" / "result.json").exists(), resumed.stderr
    assert "clear at step 30: late since step 20" in resumed.stdout and "alert at step 20" not in resumed.stdout


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def run(tmp_path, monkeypatch, tasks):
    """A folder of task files, a run's folder with a recorded log, and a stand-in for the part of lejepa that loads a run."""
    write_tasks(tmp_path / "tasks", tasks)

    def load_run(path):
        if not (path / "last.safetensors").exists():
            raise ValueError(f"{path}: no checkpoint\nthat can be read")  # two lines become one
        return Toy(seed=len(path.name)), SimpleNamespace(data="arcagi1:training", validate="arcagi2:evaluation", lam=0.3)

    stand_in = SimpleNamespace(load_run=load_run, build=lambda cfg: SimpleNamespace(eval=lambda: Toy(seed=9)), CODE_SIZE=lejepa.CODE_SIZE,
                               sigreg=lejepa.sigreg, SIGREG_NULL=lejepa.SIGREG_NULL)
    monkeypatch.setitem(sys.modules, "lejepa", stand_in)
    monkeypatch.setattr(evaluation, "warn_of_leaks", lambda *_: None)
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
        for file in ("log.jsonl", "result.json"):
            (tmp_path / name / file).write_text((ROOT / "runs" / "sphere-seed0" / file).read_text())
    return tmp_path


def test_the_command_writes_the_whole_report(run, capsys, monkeypatch):
    drawn, saved = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **more: (drawn.append(self), saved(self, *rest, **more))[1])
    out = run / "new" / "folder"
    evaluation.main([str(run / "run"), "--data", str(run / "tasks"), "--out", str(out)])
    written = json.loads((out / "eval.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert list(written) == KEYS
    for name, row in written.items():
        assert set(row) == {"model", "floors", "interval", "n"} and row["interval"][0] <= row["model"] <= row["interval"][1] and row["n"] > 0, name
        sources = ("raw", "31 features", "colour histogram", "untrained", "bag of codes", "codes with boxes")
        asked = [f"{query}, {source}" for source in sources for query in ("copy in2", "analogy")] if name in KEYS[:5] else sources
        assert {*asked, "majority" if "probe" in name else "chance"} <= set(row["floors"]), name
    health = json.loads((out / "health.json").read_text())
    assert {"effective_rank", "variance", "isotropy", "gaussian_score", "sigreg_over_null"} <= set(health["context"]) == set(health["target"])
    assert health["cross_entropy"]["model"] > 0 and health["cross_entropy"]["ln_pool"] == pytest.approx(math.log(len(arc_data.make_windows(arc_data.load_tasks(str(run / "tasks"))).outputs)))
    screen, page = capsys.readouterr().out, (out / "report.md").read_text()
    assert f"{written['probe_knn']['model']:.3f}" in screen and screen.count("\npass ") + screen.count("\nFAIL ") == len(health["verdicts"]) == 19
    links = re.findall(r"\]\((\S+\.png)\)", page)
    assert set(links) == {path.name for path in out.glob("*.png")} == {f"{name}.png" for name in "retrieval pairs spectrum neighbours map codes symbols training".split()}
    assert "FAIL     100 epochs: 42" in page and not list(out.glob("*.part"))
    for figure in drawn:
        for axis in figure.axes:
            assert not len(axis.get_xticks()) or axis.get_xlabel() and axis.get_ylabel()  # pictures of grids have no ticks
    assert len(drawn) == 8


def test_a_stopped_run_without_codes_and_one_task_still_get_a_report(run, monkeypatch, tasks):
    for file in ("log.jsonl", "result.json"):
        (run / "run" / file).unlink()
    monkeypatch.setattr(Toy, "codes", lambda self, grids: [(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)) for _ in grids])
    name = next(name for name, task in tasks.items() if len(arc_data.pairs_of(task)) > 2)
    (run / "one.json").write_text(json.dumps({name: as_json(tasks[name])}))
    evaluation.main([str(run / "run"), "--data", str(run / "one.json"), "--out", str(run / "out")])
    written = json.loads((run / "out" / "eval.json").read_text())
    assert list(written) == KEYS and written["probe_vote"] == {"model": None, "floors": {}, "interval": None, "n": 0}
    assert json.loads((run / "out" / "health.json").read_text())["shuffled_ndcg10_without_out1"] is None


def test_labels_are_probed_and_what_has_none_is_counted(run, capsys, tasks):
    rng = np.random.default_rng(0)
    extra = {"pairless": arc_data.Task([(np.ones((2, 2), np.int8), np.ones((1, 2), np.int8))], [(np.ones((3, 2), np.int8), None)])}
    everything = {name: as_json(task) for name, task in tasks.items()}
    everything["pairless"] = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1, 1]]}]}
    (run / "all.json").write_text(json.dumps(everything))
    labels = {name: str(rng.integers(3)) for name in list(tasks)[:12]}
    (run / "labels.json").write_text(json.dumps(labels))
    evaluation.main([str(run / "run"), "--data", str(run / "all.json"), "--labels", str(run / "labels.json"), "--out", str(run / "out")])
    written, screen = json.loads((run / "out" / "eval.json").read_text()), capsys.readouterr().out
    assert written["probe_vote"]["n"] == 12 and written["probe_knn"]["n"] < written["task_1nn"]["n"] and len(extra) == 1
    assert written["probe_knn"]["floors"]["majority"] == pytest.approx(1 / len(set(labels.values())))
    assert "left out: 1 test pairs without an output" in screen and "left out: 1 tasks with fewer than two" in screen
    assert f"left out: {len(tasks) + 1 - 12} tasks without a label" in screen


BAD = [(["NOWHERE"], "NOWHERE"), ([], "RUN"), (["RUN", "--data", "NOWHERE.json"], "NOWHERE.json"), (["RUN", "--data", "EMPTY"], "outputs"),
       (["RUN", "--labels", "NOWHERE.json"], "NOWHERE.json"), (["RUN", "--data", "TASKS", "--labels", "BROKEN"], "JSON"),
       (["RUN", "--data", "TASKS", "--labels", "LIST"], "class name"), (["RUN", "--data", "TASKS", "--labels", "UNKNOWN"], "not-there"),
       (["RUN", "--data", "TASKS", "--labels", "ONE"], "two"), (["codes", "RUN"], "--data"), (["codes", "NOWHERE", "--data", "TASKS", "--out", "CODES"], "NOWHERE"),
       (["codes", "RUN", "--data", "TASKS", "--out", "NO/SUCH/FILE"], "NO/SUCH"), (["compare"], "RUN"), (["compare", "RUN", "NOWHERE", "--data", "TASKS"], "NOWHERE"),
       (["compare", "RUN", "RUN", "--data", "TASKS"], "twice"), (["RUN", "--surplus"], "--surplus")]


@pytest.mark.parametrize("arguments, said", BAD)
def test_bad_input_gets_one_line_and_status_2_and_keeps_what_was_written(run, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(run)
    (run / "run" / "eval.json").write_text("kept")
    for name, value in (("EMPTY", {"a": {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1]]}]}}), ("LIST", ["a"]),
                        ("UNKNOWN", {"not-there": "a", "task00": "b"}), ("ONE", {"task00": "a", "task01": "a"})):
        (run / name).write_text(json.dumps(value))
    (run / "BROKEN").write_text("{")
    names = {"RUN": str(run / "run"), "TASKS": str(run / "tasks")}
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([names.get(a, a) for a in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error, error
    assert (run / "run" / "eval.json").read_text() == "kept" and not (run / "CODES").exists()


def test_a_checkpoint_of_another_version_gets_one_line_and_status_2(tmp_path, capsys):
    from safetensors.torch import save
    (tmp_path / "run").mkdir()
    for config, said in (({"size": "small", "seed": 0, "retired_flag": 1}, "retired_flag"), ({"size": "small", "seed": 0}, "does not fit")):
        content = save({"model.retired": torch.zeros(2)}, {"sha256": lejepa.ZEROS, "step": "1", "config": json.dumps(config), "state": "{}"})
        place, digest = lejepa.checksum(content)
        (tmp_path / "run" / "last.safetensors").write_bytes(content[:place.start] + digest + content[place.stop:])
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_compare_puts_runs_side_by_side(run, capsys):
    evaluation.main(["compare", str(run / "run"), str(run / "other"), "--data", str(run / "tasks"), "--out", str(run / "out")])
    result, text = json.loads((run / "out" / "compare.json").read_text()), capsys.readouterr().out
    assert list(result["runs"]) == ["run", "other"] and {path.name for path in (run / "out").iterdir()} == {"compare.json", "compare.md", "training.png"}
    first, second = result["runs"]["run"], result["runs"]["other"]
    for metric in KEYS:
        assert first[metric]["difference"] == [0, 0, 0]
        assert second[metric]["difference"][0] == pytest.approx(second[metric]["value"] - first[metric]["value"])
    evaluation.main([str(run / "other"), "--data", str(run / "tasks"), "--out", str(run / "alone")])
    alone = json.loads((run / "alone" / "eval.json").read_text())
    assert {metric: alone[metric]["model"] for metric in KEYS} == pytest.approx({metric: second[metric]["value"] for metric in KEYS})
    assert second["codes"]["agreement"] > second["codes"]["chance"] and "agree up to a greedy matching" in text


def test_codes_are_written_and_read_back_by_the_example_of_the_readme(run, tasks, tmp_path):
    rng, moved, still = np.random.default_rng(0), [], []
    for number in range(6):  # an object that moves, and one that moves and changes its colour
        def pair(colour):
            given, out = np.zeros((2, 8, 8), np.int8)
            (a, b), (c, d) = rng.integers(0, 3, 2), rng.integers(3, 6, 2)
            given[a, b:b + 2], out[c, d:d + 2] = 3, colour
            return given, out
        (moved if number % 2 else still).append(f"new{number}")
        tasks = tasks | {f"new{number}": arc_data.Task([pair(3 if number % 2 else 4) for _ in range(2)], [pair(3 if number % 2 else 4), (np.ones((2, 2), np.int8), None)])}
    (tmp_path / "all.json").write_text(json.dumps({name: {part: [{"input": a.tolist()} | ({"output": b.tolist()} if b is not None else {}) for a, b in getattr(task, part)]
                                                          for part in ("train", "test")} for name, task in tasks.items()}))
    evaluation.main(["codes", str(run / "run"), "--data", str(tmp_path / "all.json"), "--out", str(tmp_path / "codes.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "codes.jsonl").read_text().splitlines()]
    grids = {(line["task"], line["split"], line["pair"], line["side"]): line["objects"] for line in lines}
    assert len(grids) == len(lines) == sum(1 + (out is not None) for task in tasks.values() for _, out in [*task.train, *task.test])
    model = Toy(seed=len("run"))
    for (name, split, number, side), objects in grids.items():
        grid = getattr(tasks[name], split)[number][side == "output"]
        (codes, boxes), = model.codes([grid])
        assert all(set(thing) == {"codes", "box", "colour", "size"} for thing in objects)
        assert [thing["codes"] for thing in objects] == codes.tolist() and [thing["box"] for thing in objects] == boxes.tolist()
        for thing in objects[1:]:  # its box holds that many cells of its colour, at least
            top, left, height, width = thing["box"]
            assert (grid[top:top + height, left:left + width] == thing["colour"]).sum() >= thing["size"] == int(thing["size"]) > 0
        assert objects[0]["box"] == [0, 0, *grid.shape] and objects[0]["size"] == sum(thing["size"] for thing in objects[1:])
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert len(example.splitlines()) <= 20
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and set(done.stdout.split()) >= set(moved) and not set(done.stdout.split()) & set(still)
