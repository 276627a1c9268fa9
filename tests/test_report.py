"""Claims about the report page, charts, alerts and criteria, on made-up figures of real ARC tasks."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import arc_data
import eval as evaluation
from harness import charts, decoder, health, report

NASTY = '<script>alert("x")</script>$\\frac{_'
LEAD = {metric: (0.01, -0.02, 0.04) for metric in evaluation.COMPARED}


def entry(model, rows, spread=0.03, n=60):
    return {"model": model, "baselines": rows, "interval": (model - spread, model + spread), "n": n}


def make_evaluation(tasks, seed=0, labels=None, codes=2, **data):
    """An Evaluation whose embeddings and figures are random."""
    windows, rng = arc_data.make_windows(tasks), np.random.default_rng(seed)
    z = torch.randn(len(windows.grids), 16, generator=torch.Generator().manual_seed(seed))
    index = torch.from_numpy(windows.index)
    z_hat = z[index[:, 3]] + 2 * torch.randn(
        len(index), 16, generator=torch.Generator().manual_seed(seed + 1)
    )
    ids, tokens = health.object_ids(windows.grids)
    drawn = torch.from_numpy(rng.integers(0, 5, (len(ids), codes)))
    parts = [(drawn[a:b], torch.zeros(b - a, 4)) for a, b in zip(tokens.start[:-1], tokens.start[1:])]
    rows = [
        f"{query}, {name}"
        for query in ("copy in2", "analogy")
        for name in ("raw", "31 features", "untrained", "trained", "bag of codes")
    ]
    metrics = {name: entry(0.5, {row: float(rng.random()) for row in rows}) for name in evaluation.METRICS}
    role = {"effective_rank": 40.0, "n": len(index)}
    figures = {
        "lead": dict.fromkeys(rows, LEAD),
        "probes": {},
        "context": role,
        "target": role,
        "codes": {},
        "shuffled_ndcg10_without_out1": 0.1,
        "prediction": 0.3,
        "cross_entropy": {"model": 1.5},
    }
    data = {
        "source": "arcagi1:evaluation",
        "tasks": len(tasks),
        "windows": len(index),
        "notes": [],
        "candidates": len(windows.outputs),
        "shared_with_training": 0,
    } | data
    pairs = evaluation.find_pairs(windows, labels)
    return evaluation.Evaluation(data, metrics, figures, windows, z, z_hat, parts, pairs, labels, {})


def make_log(steps=12):
    return [
        {
            "step": 10 * i,
            "loss": 2 / i,
            "prediction": 1 / i,
            "sigreg_z": 1 / i,
            "sigreg_y": 2 / i,
            "grad_norm": 4.0,
            "validation_loss": 3 / i,
            "ndcg10_without_out1": 0.5 + i / 100,
            "train_ndcg10_without_out1": 0.6,
            "within_task": 0.5,
            "effective_rank_context": 20.0,
            "isotropy": 1e-3,
            "effective_rank_target": 30.0,
            "codes_usage": 0.9,
            "codes_perplexity": 0.3,
            "codes_ceiling": 0.4,
        }
        for i in range(1, steps + 1)
    ]


RESULT = {
    "epochs": 42.0,
    "grad_norm_mean": 5.0,
    "grad_norm_max": 30.0,
    "baseline_ndcg10_without_out1": 0.7,
    "ndcg10_without_out1": 0.6,
    "intervals": {"ndcg10_without_out1": (0.5, 0.7)},
    "baselines": {
        "analogy, raw": {"ndcg10_without_out1": 0.7},
        "analogy, trained": {"ndcg10_without_out1": 0.5},
    },
}
FACTS = {
    "run": "run-a",
    "trained on": "arcagi2:training",
    "steps": 1000,
    "seed": 3,
    "commit": "abc123",
    "minutes": 7.5,
    "lam": 0.35,
}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)

    def all(self, tag, **wanted):
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]

    def __contains__(self, text):
        return text in " ".join(" ".join(self.text).split())


def pixels(uri):
    return (
        (matplotlib.image.imread(io.BytesIO(base64.b64decode(uri.split(",")[1])))[..., :3] * 255)
        .round()
        .astype(int)
    )


@pytest.fixture(scope="module")
def tasks(arc):
    return dict(list(arc("arcagi1:evaluation").items())[:12])


@pytest.fixture(scope="module")
def done(tasks):
    return make_evaluation(tasks)


@pytest.fixture(scope="module")
def path(done, tmp_path_factory):
    """The page of a healthy run that trained for fewer than 100 epochs."""
    return report.write_report(tmp_path_factory.mktemp("report"), done, FACTS, make_log(), RESULT)


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of pictures, which take time."""
    figures = []

    def png(figure, dpi=0):
        figures.append(figure)
        figure.draw_without_rendering()
        return b""

    monkeypatch.setattr(charts, "png", png)
    return figures


# ------------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_that_needs_nothing_else(path):
    page = Page(path)
    links = [
        value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "srcset")
    ]
    assert len(links) > 100 and all(link.startswith("data:image/png;base64,") for link in links)
    assert not page.all("script") and not page.all("link") and "url(" not in path.read_text()
    assert all(pixels(link).size for link in links[:40]) and all(image["alt"] for image in page.all("img"))
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


def test_the_page_opens_with_result_health_and_leaks_and_then_the_facts_of_the_run(path, done):
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", path.read_text(), flags=re.S))
    best = charts.best_baseline(done.metrics[charts.METRIC])
    order = [
        f"The model is level with the best baseline ({best})",
        "No health alert stands",
        "None of the 12 tasks shares a pair",
        "arcagi2:training",
        "abc123",
        "7.5",
        "Every row answers",
        "100 epochs",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_a_criterion_that_is_not_met_stands_in_its_table_only(path):
    text = path.read_text()
    start = text.index("Criteria of a recorded assessment")
    assert "FAIL" not in text and "not met" not in text[:start] and "42" in text[start:]
    assert re.search(r"100 epochs</td><td>not met</td><td>42<", text) and "arc-jepa-rl" in text[start:]


@pytest.mark.parametrize(
    "interval, verdict",
    [((0.01, 0.02, 0.03), "beats"), ((-0.2, -0.3, -0.1), "is behind"), ((0.0, -0.1, 0.1), "is level with")],
)
def test_the_verdict_on_the_best_baseline_follows_the_paired_interval(interval, verdict):
    figures = entry(0.7, {"analogy, trained": 0.99, "analogy, raw": 0.6, "copy in2, untrained": 0.5})
    sentence = report.result_sentence(figures, {"analogy, raw": {charts.METRIC: interval}})
    assert sentence.startswith(f"The model {verdict} the best baseline (analogy, raw)")


def test_every_metric_and_every_row_of_the_tables_is_explained(path):
    text = re.sub(r"\s+", " ", path.read_text())
    terms = re.search(r'<dl class="terms">(.*?)</dl>', text)[1]
    names = [*evaluation.METRICS, *decoder.METRICS]
    named = [name for name in names if name.removesuffix("_r1") not in terms]
    assert not named
    rows = [*evaluation.QUERIES, "raw", "31 features", "colour histogram", "bag of codes", "codes with boxes",
            "untrained", "trained", "pooled", "chance", "majority", "z of the answer", "copy of in2"]
    assert not [row for row in rows if row not in terms]


def test_figures_are_rounded_for_the_eye_and_never_up_to_all(done):
    assert report.show((1.31047605, 1.7387)) == "[1.310, 1.739]" and report.show(None) == "–"
    log = [row | {"codes_usage": 0.9987} for row in make_log()]
    assert "99.9 % of the codes are in use" in report.health_sentence(done, log)


@pytest.mark.parametrize(
    "shared, said",
    [
        (None, "could not be checked"),
        (0, "None of the 5 tasks"),
        (3, "3 of the 5 tasks share a pair with the training tasks: these are not"),
    ],
)
def test_the_page_says_what_is_known_of_leaks(shared, said):
    assert said in report.leaks_sentence({"shared_with_training": shared, "tasks": 5})


def test_a_collapsed_model_is_not_called_healthy(done):
    windows = done.windows._replace(task=np.zeros(report.FEW, int))
    sick = done._replace(windows=windows, health=done.health | {"context": {"effective_rank": 1.4}})
    assert "needs attention (effective rank of the context below 3)" in report.health_sentence(sick, [])
    low = [row | {"codes_usage": 0.04} for row in make_log()]
    assert "code usage below 5 %" in report.health_sentence(done._replace(windows=windows), low)
    few = done._replace(windows=windows._replace(task=np.zeros(6, int)))
    assert "On 6 windows health cannot be judged" in report.health_sentence(few, [])


def test_names_from_outside_are_shown_as_text_and_never_as_markup_or_formula(
    tasks, tmp_path, drawn, monkeypatch
):
    for name in ("plot_bars", "plot_training"):  # they show no such name
        monkeypatch.setattr(report, name, lambda *_: [])
    three = {f"{NASTY}{i}": task for i, task in enumerate(list(tasks.values())[:3])}
    labels = {name: f"_${NASTY}{i % 2}" for i, name in enumerate(three)}
    nasty = make_evaluation(three, labels=labels, source=NASTY, notes=[NASTY])
    facts = FACTS | {"run": NASTY, NASTY: NASTY, "device": None}
    page = Page(report.write_report(tmp_path, nasty, facts, make_log(), RESULT))
    assert not page.all("script")
    assert f"{NASTY} on {NASTY}" in page and "device" not in page  # what is not known is left out
    assert f"{NASTY[:15]}…: the truth" in page  # ids are shortened
    chart = next(figure for figure in drawn if "label" in figure.get_suptitle())
    _, *names = chart.axes[0].get_legend_handles_labels()[1]
    assert len(names) == 2
    assert all(name.startswith(" _") and "$" not in name.replace(r"\$", "") for name in names)


def test_a_single_task_without_codes_and_log_still_has_a_page(tasks, tmp_path, drawn):
    one = make_evaluation(dict([next(iter(tasks.items()))]), codes=0)
    slip = {name: entry(0.3, {"analogy, raw": 0.2}, spread=-1e-16) for name in evaluation.METRICS}
    slip["probe_vote"] = {"model": None, "baselines": {}, "interval": None, "n": 0}
    one = one._replace(metrics=slip, health=one.health | {"shuffled_ndcg10_without_out1": None})
    page = Page(report.write_report(tmp_path, one, FACTS, [], {"epochs": "many"}))
    assert "There is nothing to show" in page and "not recorded" in page and len(drawn) > 5


# ------------------------------------------------------------------------------------- grids of the page


def cards(text, heading):
    part = text[text.index(f"<h2>{heading}") :]
    return re.findall(
        r'<div class="card"><h3>(.*?)</h3>(.*?)\n</div>\n(?=<div class="card">|</div>)', part, re.S
    )


def test_neighbours_give_the_rank_of_the_truth_and_frame_it_where_it_is_shown(done):
    ids = done.windows.task_ids
    found = report.neighbours(done)
    assert len(found) == 8 and len({card["title"].split(":")[0] for card in found}) == 8  # a task each
    framed = 0
    for card in found:
        task, rank = re.fullmatch(r"(\w+): the truth has rank ([\d,]+) of [\d,]+", card["title"]).groups()
        rows = [row for row, t in enumerate(done.windows.task) if ids[t] == task]
        distances = [
            sorted(float((done.z[o] - done.z_hat[row]).norm()) for o in done.windows.outputs) for row in rows
        ]
        own = [float((done.z[done.windows.index[row, 3]] - done.z_hat[row]).norm()) for row in rows]
        assert int(rank) in [1 + sum(d < x - 1e-4 for d in line) for line, x in zip(distances, own)]
        places = [grid["caption"] for grid in card["lines"][1] if grid["truth"]]
        assert places == ([rank] if int(rank) <= 5 else [])
        framed += len(places)
    assert 0 < framed < 8


def test_long_ids_are_shortened(done):
    windows = done.windows._replace(task_ids=["x" * 500] * len(done.windows.task_ids))
    assert all(
        card["title"].startswith("x" * 15 + "…:")
        for card in report.neighbours(done._replace(windows=windows))
    )


def test_grids_are_drawn_cell_for_cell_in_the_colours_of_the_key(path, done):
    shown = report.picture(np.array([[0, 1], [2, 3], [4, 5]]), "")
    assert pixels(shown["uri"]).tolist() == [
        [[0, 0, 0], [0, 116, 217]],
        [[255, 65, 54], [46, 204, 64]],
        [[255, 220, 0], [170, 170, 170]],
    ]
    assert shown["height"] == shown["width"] * 3 / 2
    assert all(shown["width"] / 30 == 2 for shown in [report.picture(np.zeros((30, 30), int), "")])
    key = [item["style"] for item in Page(path).all("i")]
    assert all(f"background:rgb({r}, {g}, {b})" in key for r, g, b in charts.PALETTE)


def test_symbols_show_each_code_with_its_objects_and_nothing_in_white(done):
    ids, tokens = health.object_ids(done.windows.grids)
    codes = torch.cat([codes for codes, _ in done.codes]).numpy()
    found = report.symbols(codes, ids, tokens)
    for card in found:
        position, code, count, kinds = map(int, re.findall(r"\d+", card["title"].replace(",", "")))
        having = codes[:, position] == code
        assert (count, kinds) == (having.sum(), len(set(ids[having])))
        often = [int(grid["caption"][2:].replace(",", "")) for grid in card["lines"][0]]
        assert often == sorted(np.unique(ids[having], return_counts=True)[1], reverse=True)[:8]
        for grid in card["lines"][0]:
            assert not (pixels(grid["uri"]) == 255).all(2).any() and min(grid["width"], grid["height"]) > 0
    assert len(found) == 10


# ------------------------------------------------------------------------------------- charts


def bars_of(figures):
    axis = charts.plot_bars({"m": figures})[0].axes[0]
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    return axis, names, [bar.get_width() for bar in axis.patches]


def test_bars_are_sorted_by_value_and_the_model_is_kept_where_twenty_rows_beat_it():
    rows = {f"analogy, trained {i}": 0.3 + i / 100 for i in range(20)}
    rows = {name.replace("trained ", "") + ", trained": value for name, value in rows.items()} | {
        "analogy, raw": 0.1
    }
    axis, names, values = bars_of(entry(0.2, rows))
    assert len(names) == 8 and values == sorted(values, reverse=True)
    assert names[-2:] == ["model", "analogy, raw"] and values[-2:] == [0.2, 0.1]
    bottom, top = axis.get_ylim()
    assert bottom > top  # the first row is the uppermost


def test_the_value_stands_right_of_its_bar_and_the_best_baseline_is_marked():
    axis, names, values = bars_of(
        entry(0.9, {"analogy, trained": 0.95, "analogy, raw": 0.5, "copy in2, raw": 0.4})
    )
    assert [text.get_text() for text in axis.texts] == ["0.950", "0.900", "0.500  best baseline", "0.400"]
    ends = [value if name != "model" else 0.93 for name, value in zip(names, values)]
    assert [text.xy[0] for text in axis.texts] == pytest.approx(ends)  # of the model: the end of its interval
    assert all(text.xyann[0] > 0 for text in axis.texts)


def test_the_longest_label_stays_inside_the_chart():
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "font.size": 8}):
        axis, *_ = bars_of(entry(0.5, {"analogy, raw + 31 features": 0.95, "copy in2, trained": 0.9}))
        axis.figure.draw_without_rendering()
    assert max(text.get_window_extent().x1 for text in axis.texts) <= axis.figure.bbox.x1


def test_bars_of_trained_untrained_and_features_have_colours_of_their_own():
    rows = {
        "analogy, trained": 0.6,
        "bag of codes": 0.5,
        "analogy, untrained": 0.4,
        "analogy, raw": 0.3,
        "chance": 0.0,
    }
    axis, *_ = bars_of(entry(0.9, rows))
    model, a, b, untrained, raw, chance = (to_hex(bar.get_facecolor()) for bar in axis.patches)
    assert a == b and raw == chance and len({model, a, untrained, raw}) == 4
    assert [model, a, untrained, raw] == list(charts.KINDS.values())


def test_an_interval_that_misses_its_mean_by_rounding_is_drawn():
    axis, *_ = bars_of({"model": 0.3, "baselines": {}, "interval": (0.3 + 1e-16, 0.3 - 1e-16), "n": 1})
    assert axis.containers


def test_training_shows_the_baseline_the_ceiling_and_a_marker_for_a_single_evaluation():
    figures = {
        figure.get_suptitle(): figure.axes[0] for figure in charts.plot_training({"": make_log(1)}, 0.7)
    }
    lines = {line.get_label(): line for line in figures["retrieval on unseen tasks"].lines}
    assert set(lines["best baseline, ndcg10_without_out1"].get_ydata()) == {0.7}
    assert (
        lines["ndcg10_without_out1"].get_marker() == "o"
        and len(lines["ndcg10_without_out1"].get_xdata()) == 1
    )
    codes = [line.get_label() for line in figures["use of the codes"].lines]
    assert codes == ["codes_usage", "codes_perplexity", "codes_ceiling"]
    several = charts.plot_training({"": make_log()})[0].axes[0]
    assert several.lines[0].get_marker() == "" and len(several.lines) == 2  # no baseline is known


def test_a_logarithmic_axis_of_less_than_a_decade_has_plain_numbers():
    @charts.styled
    def labels():
        figure = charts.plot_training({"": make_log(3)})[2]  # validation_loss: 3, 1.5 and 1
        figure.draw_without_rendering()
        return [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]

    shown = [text for text in labels() if text]
    assert len(shown) > 2 and all(re.fullmatch(r"\$\\mathdefault\{[\d.]+\}\$", text) for text in shown), shown


def test_steps_have_no_decimals(drawn):
    two = [row | {"step": step} for row, step in zip(make_log(2), (30, 31))]
    for figure in charts.plot_training({"": two}):
        assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_a_log_with_missing_and_malformed_values_is_drawn_without_them():
    log = [
        {"step": 1},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": None},
        {"loss": 2.0},
        {"step": 4, "loss": "x"},
        {"step": 5, "loss": 10**400},
        {"step": 6, "loss": True},
        {"step": 7, "loss": 1.5},
    ]
    assert charts.points(log, "loss") == [(7, 1.5)]


def test_the_map_states_the_variance_that_its_axes_explain():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    axis = charts.plot_map(x, np.arange(200) % 20, ["_hidden", "$x$", *map(str, range(18))], "task").axes[0]
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    share = [100 * value / values.sum() for value in values[:2]]
    stated = [float(re.search(r"([\d.]+)%", text)[1]) for text in (axis.get_xlabel(), axis.get_ylabel())]
    assert stated == pytest.approx(share, abs=0.1)
    labels = axis.get_legend_handles_labels()[1]
    assert labels[:3] == ["another task", " _hidden", r" \$x\$"] and len(labels) == 9


def test_result_png_is_written_for_a_long_run_and_for_one_evaluation(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(charts, "write_file", lambda path, content: path.write_bytes(content))
    for log in (make_log(), make_log(1), []):
        charts.write_result_picture(tmp_path, RESULT, log)
    bars, curves, ranks, usage = drawn[0].axes
    assert [tick.get_text() for tick in bars.get_yticklabels()] == [
        "analogy, raw",
        "model",
        "analogy, trained",
    ]
    assert 0.7 in curves.lines[-1].get_ydata() and "best baseline" in curves.lines[-1].get_label()
    recorded = [line for line in ranks.lines if "arc-jepa-rl" in line.get_label()]
    assert [tuple(line.get_ydata()) for line in recorded] == [charts.RECORDED[key] for key in charts.RANKS]
    assert (
        tuple(usage.lines[-1].get_ydata()) == charts.RECORDED["codes_usage"]
        and (tmp_path / "result.png").exists()
    )


def test_charts_leave_the_settings_of_matplotlib_as_they_were(tmp_path):
    before = dict(matplotlib.rcParams)
    charts.plot_parts(tmp_path / "parts.png", {"encoder": 2.0, "loss": 1.0})
    assert (
        dict(matplotlib.rcParams) == before
        and pixels("," + base64.b64encode((tmp_path / "parts.png").read_bytes()).decode()).std() > 0
    )


def test_neighbours_image_has_a_line_a_window_with_the_nearest_outputs_last(done):
    class Model:
        def predict(self, contexts):
            return done.z_hat[chosen]

    windows, pool = done.windows, done.z[done.windows.outputs]
    chosen = np.sort(np.random.default_rng(0).permutation(len(windows.index))[:6])
    image = charts.neighbours_image(Model(), windows, pool)
    assert image.shape == (6 * 96, 7 * 96, 3) and image.dtype == np.uint8
    nearest = windows.grids[windows.outputs[int((pool - done.z_hat[chosen[2]]).norm(dim=1).argmin())]]
    cell = 90 // max(nearest.shape)
    tile = image[2 * 96 : 3 * 96, 4 * 96 : 5 * 96][
        : nearest.shape[0] * cell : cell, : nearest.shape[1] * cell : cell
    ]
    assert (tile == charts.PALETTE[nearest]).all()


# ------------------------------------------------------------------------------------- alerts and criteria


def test_alerts_trip_once_and_clear_once():
    alerts = report.Alerts()
    norms = [40] * 10 + [40, 40, 40, 40, 29, 31, 32, 33, 34, 35, 36, 10, 11]   # the first ten do not count
    lines = [alerts.feed({"step": step, "grad_norm": norm}) for step, norm in enumerate(norms)]
    assert [bool(line) for line in lines] == [False] * 19 + [True, False, True, False]
    assert re.fullmatch(r"alert at step 19: gradient norm .*: grad_norm 35", lines[19][0])
    assert lines[21][0].startswith("clear at step 21: gradient norm")
    assert alerts.lines == [*lines[19], *lines[21]] and not alerts.tripped


@pytest.mark.parametrize(
    "name, key, values, at",
    [
        ("below 8 %", "codes_usage", [0.07, 0.07, 0.09, 0.07, 0.07, 0.07, 0.3], (5, 6)),
        ("below 5 %", "codes_usage", [0.5, 0.04, 0.06], (1, 2)),
        ("below 15 %", "codes_usage", [0.5, 0.14, 0.16], (1, 2)),
        ("below 1e-5", "isotropy", [2e-5, 9e-6, 2e-5], (1, 2)),
        ("below 3", "effective_rank_context", [3.1, 2.9, 3.1], (1, 2)),
        ("below 5", "effective_rank_target", [4.9, 5.1], (0, 1)),
        ("above twice", "validation_loss", [4.0, 7.9, 16.0, 15.0], (2, 3)),
        ("no better", "ndcg10_without_out1", [0.5] + [0.4] * 10 + [0.6], (10, 11)),
    ],
)
def test_each_alert_trips_and_clears_where_it_should_and_a_resumed_run_goes_on(name, key, values, at):
    alerts = report.Alerts()
    rows = [{"step": step, key: value, "codes_perplexity": None} for step, value in enumerate(values)]
    lines = [[line for line in alerts.feed(row) if name in line] for row in rows]
    assert [(step, line[0].split()[0]) for step, line in enumerate(lines) if line] == [
        (at[0], "alert"),
        (at[1], "clear"),
    ]
    resumed = report.Alerts(rows[: at[0] + 1])
    assert [line for line in resumed.feed(rows[at[0] + 1]) if name in line] == lines[at[0] + 1]


def test_a_good_run_meets_all_criteria_and_a_bad_one_fails_each(done):
    good = {name: met for name, met, _ in report.criteria(make_log(), RESULT | {"epochs": 120}, 0.35, done)}
    assert set(good.values()) == {True} and len(good) == 19
    log = make_log()
    for row in log[4:]:
        row |= {
            "codes_usage": 0.02,
            "effective_rank_context": 1.0,
            "effective_rank_target": 1.0,
            "isotropy": 1e-6,
            "grad_norm": 99.0,
            "ndcg10_without_out1": 0.1,
            "prediction": 1000.0,
        }
    log[5]["validation_loss"] = 99.0
    role = {"effective_rank": 1.0}
    sick = done._replace(
        health=done.health | {"context": role, "target": role, "shuffled_ndcg10_without_out1": 2.0}
    )
    bad = report.criteria(log * 2, {"epochs": 99, "grad_norm_mean": 51, "grad_norm_max": 151}, 0.35, sick)
    assert [name for name, met, _ in bad if met is not False] == []


def test_what_a_run_did_not_record_is_unknown_and_the_two_empty_criteria_are_gone(done):
    found = report.criteria(
        [], {}, 0.35, done._replace(health=done.health | {"shuffled_ndcg10_without_out1": None})
    )
    assert [name for name, met, _ in found if met is not None] == [
        "effective rank of the context at least 15",
        "effective rank of the target at least 20",
    ]
    assert not [name for name, *_ in found if "hyper-parameters" in name or "programs" in name]


# ------------------------------------------------------------------------------------- comparison, browser


def test_the_comparison_names_every_run_and_the_difference_from_the_first(tmp_path):
    figure = {"value": 0.5, "interval": (0.4, 0.6), "difference": (0.0, 0.0, 0.0)}
    other = figure | {"value": 0.7, "difference": (0.2, 0.1, 0.3)}
    runs = {"first": {"ndcg10": figure}, NASTY: {"ndcg10": other, "codes": {"agreement": 0.25}}}
    page = Page(
        report.compare_page(tmp_path, {"data": "x", "runs": runs}, {"first": make_log(), NASTY: make_log(3)})
    )
    assert "0.700 [0.400, 0.600]" in page and "+0.200 [+0.100, +0.300]" in page and "agreement 0.250" in page
    assert not page.all("script") and len(page.all("img")) == 6 and NASTY in page


@pytest.mark.whole
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_every_picture_and_nothing_is_wider_than_a_desktop_or_a_phone(path, tmp_path):
    script = """<body><script>
      addEventListener("load", () => {
        const frames = [...document.querySelectorAll("iframe")];
        document.title = JSON.stringify(frames.map(f => {
        const d = f.contentDocument; return {width: f.clientWidth, needed: d.documentElement.scrollWidth,
        images: d.images.length, broken: [...d.images].filter(i => !i.naturalWidth).length,
        narrow: Math.min(...[...d.querySelectorAll(".chart")].map(i => i.clientWidth / f.clientWidth))}}))})
      </script>"""
    frame = '<iframe style="border:0" width="{}" height="800" srcdoc="{}"></iframe>'
    page = path.read_text().replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frames.html").write_text(
        script + "".join(frame.format(width, page) for width in (1280, 390))
    )
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    shown = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frames.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    frames = json.loads(re.search(r"<title>(.*?)</title>", shown, re.S)[1])
    assert [frame["width"] for frame in frames] == [1280, 390]
    for frame in frames:
        assert frame["needed"] <= frame["width"] and frame["images"] > 100 and frame["broken"] == 0
    assert frames[0]["narrow"] > 0.3 and frames[1]["narrow"] > 0.8  # two columns, and one
