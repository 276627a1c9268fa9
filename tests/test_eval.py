"""Claims of eval.py, each against a slow definition, a closed form, or figures published elsewhere."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import arc_data
import eval as evaluation

PUBLISHED = {  # nDCG@10, R@1, nDCG@10 without out1, within-task, on arcagi1:evaluation
    "copy in2, raw": (0.483, 0.442, 0.484, 0.731),
    "copy out1, raw": (0.176, 0.009, 0.231, 0.287),
    "analogy, raw": (0.592, 0.422, 0.659, 0.712),
    "analogy, 31 features": (0.668, 0.498, 0.710, 0.730),
    "analogy, raw + 31 features": (0.705, None, 0.776, 0.782),
}


def random_tasks(seed, tasks=12, kinds=30):
    """Small tasks that share outputs among their pairs and with other tasks."""
    rng = np.random.default_rng(seed)
    known = [rng.integers(0, 4, rng.integers(1, 5, 2)).astype(np.int8) for _ in range(kinds)]
    pairs = lambda n: [(known[rng.integers(kinds)], known[rng.integers(kinds)]) for _ in range(n)]
    return {f"t{i}": arc_data.Task(pairs(rng.integers(2, 4)), pairs(1)) for i in range(tasks)}


@pytest.fixture(scope="module")
def windows():
    return arc_data.make_windows(random_tasks(0))


@pytest.fixture(scope="module")
def real():
    return arc_data.make_windows(arc_data.load_tasks("arcagi1:evaluation"))


class Model:
    """An embedding that differs for every grid, and a prediction given by the test."""

    def __init__(self, windows, predict=None, width=16, seed=0):
        z = torch.randn(len(windows.grids), width, generator=torch.Generator().manual_seed(seed))
        self.known = {(grid.shape, grid.tobytes()): row for grid, row in zip(windows.grids, z)}
        self.rule = predict or (lambda in1, out1, in2: out1 + in2 - in1)

    def embed(self, grids):
        return torch.stack([self.known[grid.shape, grid.tobytes()] for grid in grids])

    def predict(self, contexts):
        return self.rule(*(self.embed(list(side)) for side in zip(*contexts)))


class Truth(Model):
    """Knows the right answers, in the order of the windows."""

    def __init__(self, windows):
        super().__init__(windows)
        self.answers = self.embed([windows.grids[i] for i in windows.index[:, 3]])

    def predict(self, contexts):
        return self.answers[:len(contexts)]


def slow_metrics(scores, windows):
    """The definitions, window by window, in plain Python; scores (W, P) are compared exactly."""
    rows = []
    for w, (_, out1, _, out2) in enumerate(windows.index):
        pool = dict(zip(windows.outputs, scores[w]))
        without = {grid: s for grid, s in pool.items() if grid == out2 or grid != out1}
        row = {}
        for end, items in (("", pool), ("_without_out1", without)):
            above = sum(s > items[out2] for s in items.values())
            ranks = [above + 1 + i for i in range(sum(s == items[out2] for s in items.values()))]
            row["ndcg10" + end] = sum(1 / math.log2(r + 1) for r in ranks if r <= 10) / len(ranks)
            row["r1" + end] = sum(r == 1 for r in ranks) / len(ranks)
            row["mrr" + end] = sum(1 / r for r in ranks) / len(ranks)
        family = {o for i, o in zip(windows.task, windows.index[:, 3]) if i == windows.task[w]} - {out1, out2}
        row["within_task"] = float(all(pool[out2] > pool[o] for o in family))
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_same(got, expected):
    assert set(got) == set(expected) == set(evaluation.METRICS)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=1e-9, err_msg=name)


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_of_tied_scores_equal_their_slow_definitions(windows):
    scores = torch.randint(0, 5, (len(windows.task), len(windows.outputs)), generator=torch.Generator().manual_seed(0)).float()
    assert (windows.index[:, 1] == windows.index[:, 3]).any()  # out1 is the target of some windows, and stays
    assert_same(evaluation.rank(lambda rows: scores[rows], windows), slow_metrics(scores.numpy(), windows))


@pytest.mark.parametrize("score", [evaluation.euclidean, evaluation.cosine])
def test_distances_and_cosines_rank_as_in_float64_one_by_one(windows, score):
    generator = torch.Generator().manual_seed(1)
    query, pool = (3 + torch.randn(n, 8, generator=generator) for n in (len(windows.task), len(windows.outputs)))
    q, p = query.double().numpy()[:, None], pool.double().numpy()[None]
    cosines = (q * p).sum(2) / np.linalg.norm(q, axis=2) / np.linalg.norm(p, axis=2)
    expected = slow_metrics(-((q - p) ** 2).sum(2) if score is evaluation.euclidean else cosines, windows)
    assert_same(evaluation.retrieval(query, pool, windows, score), expected)


def test_chunks_do_not_change_a_metric(windows, monkeypatch):
    query, pool = torch.randn(len(windows.task), 8), torch.randn(len(windows.outputs), 8)
    whole = evaluation.retrieval(query, pool, windows)
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    assert_same(evaluation.retrieval(query, pool, windows), whole)


def test_grids_with_one_embedding_tie_however_their_scores_are_rounded(windows):
    generator = torch.Generator().manual_seed(2)
    middle = 10 * torch.randn(64, generator=generator)  # far from the origin, where fp32 is coarse
    kind = torch.arange(len(windows.outputs)) // 2  # two and two outputs share an embedding
    pool = middle + torch.randn(len(windows.outputs), 64, generator=generator)[kind]
    query = middle + torch.randn(len(windows.task), 64, generator=generator)
    exact = -((query.double()[:, None] - pool.double()) ** 2).sum(2)
    rounded = pool * (1 + 2e-7 * torch.randn(pool.shape, generator=generator))
    assert (rounded != pool).any()
    assert_same(evaluation.retrieval(query, rounded, windows), slow_metrics(exact.numpy(), windows))


@pytest.mark.parametrize("value, away", [(0.0, 0.0), (5.0, 0.0), (5.0, 3.0)])  # queries at the point, or away from it
def test_a_constant_embedding_scores_the_tie_averaged_chance(windows, value, away):
    items = len(windows.outputs)
    noise = torch.randn(len(windows.grids), 32, generator=torch.Generator().manual_seed(0))
    z = value * (1 + 2e-7 * noise)  # constant up to rounding
    got = evaluation.retrieval(z[windows.index[:, 2]] + away * noise[windows.index[:, 0]], z[windows.outputs], windows)
    np.testing.assert_allclose(got["ndcg10"], sum(1 / math.log2(r + 1) for r in range(1, 11)) / items)
    np.testing.assert_allclose(got["r1"], 1 / items)
    distractor = windows.index[:, 1] != windows.index[:, 3]
    np.testing.assert_allclose(got["r1_without_out1"], 1 / (items - distractor))


def test_within_task_choice_needs_the_target_strictly_first():
    grids = [np.full((1, 1), c, np.int8) for c in range(6)]
    windows = arc_data.make_windows({"a": arc_data.Task([(grids[0], grids[1]), (grids[2], grids[3])], [(grids[4], grids[5])])})
    column = {int(windows.grids[g][0, 0]): i for i, g in enumerate(windows.outputs)}
    scores = torch.zeros(6, 3)
    scores[:, column[1]], scores[:, column[3]], scores[:, column[5]] = 2.0, 1.0, 1.0
    right = {(int(windows.grids[w[1]][0, 0]), int(windows.grids[w[3]][0, 0])): bool(value)
             for w, value in zip(windows.index, evaluation.rank(lambda rows: scores[rows], windows)["within_task"])}
    # 3 against 5 is a tie, so neither is right where 1 is out of the way as out1; 1 beats both
    assert right == {(1, 3): False, (1, 5): False, (3, 1): True, (5, 1): True, (3, 5): False, (5, 3): False}


def test_a_random_query_chooses_within_the_task_by_chance_0_281(real):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(len(real.task), len(real.outputs), generator=generator)
    assert evaluation.rank(lambda rows: scores[rows], real)["within_task"].mean() == pytest.approx(0.281, abs=0.02)


def test_embeddings_with_nan_are_refused(windows):
    z = torch.randn(len(windows.grids), 4)
    z[0] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        evaluation.retrieval(z[windows.index[:, 0]], z[windows.outputs], windows)


# ------------------------------------------------------------------------------------------------ floors


def test_floors_of_agi_1_evaluation_are_the_published_ones_within_0_005(real):
    assert (len(real.task), len(real.outputs)) == (6612, 1755)
    rows = evaluation.floor_rows(real)
    assert set(rows) == set(PUBLISHED)
    for name, published in PUBLISHED.items():
        got = [rows[name][metric].mean() for metric in ("ndcg10", "r1", "ndcg10_without_out1", "within_task")]
        for value, expected in zip(got, published):
            assert expected is None or value == pytest.approx(expected, abs=0.005), (name, got)


@pytest.mark.parametrize("name", evaluation.QUERIES)
def test_raw_scores_are_cosines_of_centred_one_hot_grids(windows, name):
    weights = evaluation.QUERIES[name]
    x = np.eye(11)[arc_data.pad(windows.grids)].reshape(len(windows.grids), -1)  # (G, 9900)
    x = x - x[windows.outputs].mean(0)
    q, p = sum(w * x[windows.index[:, i]] for i, w in enumerate(weights)), x[windows.outputs]
    expected = q @ p.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(p, axis=1)
    rows = torch.arange(len(windows.task))
    got = evaluation.raw_scores(windows, weights, evaluation.cell_overlap(windows))(rows)
    np.testing.assert_allclose(got, expected, atol=1e-6)  # well below what counts as a tie


def test_the_31_features_of_a_grid_counted_by_hand():
    grid = np.array([[0, 0, 3], [0, 3, 0]], np.int8)  # 4-connected: one 3-cell 0, one single 0, two single 3
    colours, pieces = [4 / 6, 0, 0, 2 / 6] + [0] * 6, [2, 0, 0, 2] + [0] * 6
    expected = [2 / 30, 3 / 30, 6 / 900, math.log(6) / 7, 2 / 10, math.log1p(4) / 7, math.log1p(2) / 7, 2 / 6,
                2 / 6, 4 / 6, 0.0, *colours, *(math.log1p(n) / 5 for n in pieces)]
    np.testing.assert_allclose(evaluation.features([grid, grid[:, :2]])[0], expected)
    np.testing.assert_allclose(evaluation.symmetries(np.array([[1, 2], [3, 1]])), (0, 0, 0.5))


# ------------------------------------------------------------------------------------------------ intervals


def simulated(rng, tasks=60):
    """Values that share much within a task; their mean over all tasks there could be is 0."""
    task = np.repeat(np.arange(tasks), rng.integers(1, 30, tasks))
    return rng.normal(size=tasks)[task] + 0.3 * rng.normal(size=len(task)), task


def test_intervals_cover_the_mean_in_at_least_90_and_not_all_of_200_draws():
    inside = 0
    for seed in range(200):
        low, high = evaluation.interval(*simulated(np.random.default_rng(seed)), draws=500)
        inside += low <= 0 <= high
    assert 0.9 * 200 <= inside < 200


def test_an_interval_weighs_windows_and_draws_tasks():
    values, task = np.array([1.0, 1, 1, 0]), np.array([7, 7, 7, 9])  # two tasks: a draw gives 1, 3/4 or 0
    assert evaluation.interval(values, task) == (0.0, 1.0)
    assert evaluation.interval(values[:3], task[:3]) == (1.0, 1.0)
    values, task = np.tile(values, 100), np.arange(400) // 4 * 2 + (np.arange(400) % 4 == 3)  # 200 tasks of 3 windows or 1
    low, high = evaluation.interval(values, task)
    assert 0.6 < low < values.mean() == 0.75 < high < 0.9  # a mean of task means would be 0.5


def test_a_paired_difference_is_sure_where_two_intervals_overlap():
    rng = np.random.default_rng(0)
    a, task = simulated(rng)
    b = a - 0.1 + 0.01 * rng.normal(size=len(a))
    mean, low, high = evaluation.difference(a, b, task)
    assert mean == pytest.approx((a - b).mean()) and 0.09 < low < mean < high < 0.11
    assert evaluation.interval(a, task)[0] < evaluation.interval(b, task)[1]


# ------------------------------------------------------------------------------------------------ a model


def test_effective_rank_of_a_known_spectrum():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(500, 6))
    axes, _ = np.linalg.qr(samples - samples.mean(0))  # orthonormal, mean 0
    spectrum = np.array([5.0, 3, 1, 1, 0, 0])
    z = torch.from_numpy(4 + axes * np.sqrt(499 * spectrum))
    p = spectrum[:4] / 10
    assert evaluation.effective_rank(z) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert evaluation.effective_rank(torch.zeros(10, 6)) == pytest.approx(6)  # only the added 1e-6 I is left


def test_a_model_that_knows_the_truth_scores_1(windows):
    model = Truth(windows)
    result, rows = evaluation.evaluate(model, windows, residuals=torch.randn(100, 16))
    for metric in evaluation.METRICS:
        assert result[metric] == result[f"whitened_{metric}"] == 1, metric
        assert result["intervals"][metric] == (1, 1)
    assert result["prediction"] == 0
    assert rows["model"]["r1"].shape == (len(windows.task),)


def test_a_prediction_wrong_along_one_axis_is_right_after_whitening(windows):
    along = torch.zeros(16)
    along[3] = 30.0
    noise = lambda n: torch.randn(n, 1, generator=torch.Generator().manual_seed(n)) * along
    model = Truth(windows)
    model.answers = model.answers + noise(len(model.answers))
    result, _ = evaluation.evaluate(model, windows, residuals=noise(400) + 0.1 * torch.randn(400, 16))
    assert result["r1"] < 0.5 and result["whitened_r1"] > 0.9


def test_whitened_residuals_have_unit_covariance():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    residuals = 5 + torch.randn(1000, 8, generator=generator) * torch.linspace(0.3, 3, 8) @ turn
    white = residuals @ evaluation.whitening(residuals)
    np.testing.assert_allclose(torch.cov(white.T), np.eye(8), atol=0.005)


def test_a_shuffled_context_is_a_pair_of_another_task(windows):
    donors = evaluation.shuffle_context(windows)
    for seed, tasks in itertools.product(range(20), (2, 3, 5)):
        few = arc_data.make_windows(random_tasks(seed, tasks))
        assert (few.task[evaluation.shuffle_context(few, seed)] != few.task).all()
    assert (windows.task[donors] != windows.task).all()
    assert len(np.unique(windows.task[donors])) == len(windows.task_ids)  # every task lends
    every = np.arange(len(windows.task))
    for w, (in1, out1, in2) in enumerate(evaluation.contexts(windows, every, donors)):
        assert in1 is windows.grids[windows.index[donors[w], 0]] and out1 is windows.grids[windows.index[donors[w], 1]]
        assert in2 is windows.grids[windows.index[w, 2]]


def test_a_shuffled_context_costs_a_model_that_ignores_it_nothing(windows):
    result, _ = evaluation.evaluate(Model(windows, lambda in1, out1, in2: in2), windows)
    assert result["shuffled_ndcg10_without_out1"] == result["ndcg10_without_out1"]  # the same pools
    assert result["ndcg10_without_out1"] == result["floors"]["copy in2, trained"]["ndcg10_without_out1"]


def test_one_task_has_no_shuffled_control():
    windows = arc_data.make_windows(random_tasks(1, tasks=1))
    result, _ = evaluation.evaluate(Model(windows), windows)
    assert result["shuffled_ndcg10_without_out1"] is None
    with pytest.raises(ValueError, match="two tasks"):
        evaluation.shuffle_context(windows)


def test_the_analogy_of_a_model_that_is_the_analogy_has_no_lead(windows):
    result, _ = evaluation.evaluate(Model(windows), windows)
    assert result["lead"]["analogy, trained"]["within_task"] == (0, 0, 0)


def test_the_best_no_learning_row_leaves_the_trained_embedding_out(windows):
    floors = evaluation.floor_rows(windows)
    perfect = {metric: np.ones(len(windows.task)) for metric in evaluation.METRICS}
    rows = dict(model=floors["copy in2, raw"], **floors)
    for row, best in (("analogy, raw", 1.0), ("copy in2, untrained", 1.0), ("copy in2, trained", None)):
        result = evaluation.summary({**rows, row: perfect}, windows.task)
        for metric in ("ndcg10_without_out1", "within_task"):
            assert result[f"floor_{metric}"] == (best or max(values[metric].mean() for values in floors.values()))
    result, _ = evaluation.evaluate(Model(windows), windows, untrained=Model(windows, seed=1), floors=floors)
    names = [f"{query}, {where}" for where in ("untrained", "trained") for query in evaluation.QUERIES]
    assert list(result["floors"]) == [*PUBLISHED, *names]


def test_the_result_is_json_and_holds_the_contracts_keys(windows):
    result, _ = evaluation.evaluate(Model(windows), windows, untrained=Model(windows, seed=1))
    result = json.loads(json.dumps(result, allow_nan=False))
    assert {"ndcg10", "ndcg10_without_out1", "r1", "mrr", "within_task", "shuffled_ndcg10_without_out1", "effective_rank_context", "prediction",
            "effective_rank_target", "windows", "floor_ndcg10_without_out1", "floor_within_task", "floors"} <= set(result)


def test_the_quick_figures_of_all_windows_are_the_full_ones(windows):
    model = Model(windows)
    result, rows = evaluation.evaluate(model, windows)
    quick = evaluation.quick(model, windows, limit=10**6)
    assert {name: pytest.approx(result[name]) for name in quick} == quick
    some = evaluation.quick(model, windows, limit=20, seed=5)
    chosen = np.sort(np.random.default_rng(5).permutation(len(windows.task))[:20])
    assert some["within_task"] == pytest.approx(rows["model"]["within_task"][chosen].mean())
    assert some["r1"] == pytest.approx(rows["model"]["r1"][chosen].mean())


def test_data_without_a_window_is_refused(windows):
    empty = windows._replace(index=windows.index[:0], task=windows.task[:0])
    with pytest.raises(ValueError, match="two pairs"):
        evaluation.evaluate(Model(windows), empty)


# ------------------------------------------------------------------------------------------------ codes


def test_code_statistics_counted_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 2], [1, 3]])
    got = evaluation.code_statistics(codes, 4, np.array([5, 6, 7, 8]))
    assert got["codes_usage"] == 0.5 and got["codes_n"] == 4
    assert got["codes_perplexity"] == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert got["codes_ceiling"] == pytest.approx(1)
    with pytest.raises(ValueError, match="0 to 3"):
        evaluation.code_statistics(codes + 1, 4, np.arange(4))


def test_the_ceiling_of_a_heavy_input_worked_by_hand():
    # 6 of 10 are one input: 0.6 > 1/4, a code of its own; then 1 of the 4 left against 3 codes: 1 <= 4/3, spread evenly
    entropy = -0.6 * math.log(0.6) - 0.4 * math.log(0.4 / 3)
    assert evaluation.code_ceiling(np.array([1, 1, 6, 1, 1]), 4) == pytest.approx(math.exp(entropy) / 4)
    assert evaluation.code_ceiling(np.array([3, 3]), 4) == pytest.approx(0.5)  # two inputs fill two codes
    assert evaluation.code_ceiling(np.array([7]), 1) == pytest.approx(1)


@pytest.mark.parametrize("counts", [(8, 4, 2, 1, 1), (3, 3, 2, 2, 2), (9, 1, 1, 1, 4)])
def test_no_function_of_the_input_exceeds_the_ceiling(counts):
    best = 0.0
    for assigned in itertools.product(range(3), repeat=len(counts)):
        best = max(best, math.exp(evaluation.entropy(np.bincount(assigned, counts, 3) / sum(counts))) / 3)
    assert best <= evaluation.code_ceiling(np.array(counts), 3) + 1e-12
    assert best == pytest.approx(evaluation.code_ceiling(np.array(counts), 3), rel=0.03)  # and comes near
