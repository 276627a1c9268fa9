"""Alerts, criteria and the report pages, from figures that eval.py or a run worked out.

The template report.html holds markup and prose; it escapes all text. A log or a result in which a value is missing, or
is no number, loses that value and nothing more.

    W windows   P candidates: the distinct outputs   K code positions   n objects or pairs
"""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib.image
import numpy as np
import torch

import arc_data
import eval as evaluation
from harness.charts import KINDS, METRIC, PALETTE, SERIES, best_baseline, number, plot_bars, plot_map, plot_ranked
from harness.charts import neighbours_image, plot_parts, write_result_picture  # noqa: F401, offered from here as well
from harness.charts import plot_training, png, points, short, styled
from harness.checkpoint import write_file
from lejepa import CODE_SIZE

RETRIEVAL = (METRIC, "ndcg10", "all_demonstrations", "within_task", "hard_ndcg10", "hard_r1")
FEW = 100  # windows; health is not judged on fewer

# ------------------------------------------------------------------------------------------------ alerts

STALL = 10  # evaluations
ALERTS = {  # why the recorded runs should have been stopped: figure, are its values so far bad, the worst of them
    "code usage below 8 % at three evaluations in a row":
        ("codes_usage", lambda v: len(v) > 2 and max(v[-3:]) < 0.08, min),
    "code usage below 5 %": ("codes_usage", lambda v: v[-1] < 0.05, min),
    "effective rank of the context below 3": ("effective_rank_context", lambda v: v[-1] < 3, min),
    "effective rank of the target below 5": ("effective_rank_target", lambda v: v[-1] < 5, min),
    "gradient norm above 30 at five logged steps in a row":
        ("grad_norm", lambda v: len(v) > 4 and min(v[-5:]) > 30, max),
    "validation loss above twice that of the evaluation before":
        ("validation_loss", lambda v: len(v) > 1 and v[-1] > 2 * v[-2], max),
    f"no better nDCG@10 without out1 in {STALL} evaluations":
        (METRIC, lambda v: len(v) > STALL and max(v[-STALL:]) <= max(v[:-STALL]), max)}
ALERT_STATUS = 3  # exit status of a run that --stop-on-alert ended


class Alerts:
    """Watches the figures of a run that is under way, or of one read from its log."""

    def __init__(self, rows=()):
        self.seen = {}  # figure -> its values
        self.tripped = {}  # alert -> the step at which it tripped
        self.lines = []  # every line so far
        for row in rows:
            self.feed(row)

    def feed(self, row: dict) -> list[str]:
        """A line for each alert that the figures of a log row trip or clear."""
        new = {key: number(row.get(key)) for key, _, _ in ALERTS.values()}
        for key, value in new.items():
            self.seen.setdefault(key, []).extend([] if value is None else [value])
        lines = []
        for name, (key, is_bad, _) in ALERTS.items():
            if new[key] is None or is_bad(self.seen[key]) == (name in self.tripped):
                continue
            figure = f"{key} {new[key]:.4g}"
            if name in self.tripped:
                since = self.tripped.pop(name)
                lines.append(f"clear at step {row['step']}: {name} since step {since}, now {figure}")
            else:
                self.tripped[name] = row["step"]
                lines.append(f"alert at step {row['step']}: {name}: {figure}")
        self.lines += lines
        return lines


def criteria(log: list[dict], result: dict, lam: float, done) -> list[tuple[str, bool | None, str]]:
    """What the recorded assessment asked of a run, and each alert: name, whether it is met (None: unknown), figure."""
    losses, usage = ([value for _, value in points(log, key)] for key in ("validation_loss", "codes_usage"))
    usage = usage[len(usage) // 4:]
    jumps = [after / before for before, after in zip(losses, losses[1:]) if before]
    falls = [before - after for i, before in enumerate(usage) for after in usage[i:]]
    shuffled = done.health[f"shuffled_{METRIC}"]
    copy = done.metrics[METRIC]["baselines"].get("copy in2, trained")
    rank = {role: done.health[role]["effective_rank"] for role in ("context", "target")}
    rows = [  # name, figure, the lowest and the highest that meet it, format
        ("100 epochs", result.get("epochs"), 100, np.inf, "{:.0f}"),
        ("no validation loss above 2 x the one before", max(jumps, default=None), 0, 2, "at most {:.2f} x"),
        ("code usage above 25 % after a quarter of the run", min(usage, default=None), 0.25, 1, "lowest {:.1%}"),
        ("code usage never falls by over 10 points", max(falls, default=None), 0, 0.1, "largest fall {:.1%}"),
        ("effective rank of the context at least 15", rank["context"], 15, np.inf, "{:.1f}"),
        ("effective rank of the target at least 20", rank["target"], 20, np.inf, "{:.1f}"),
        ("gradient norm: mean below 50", result.get("grad_norm_mean"), 0, 50, "{:.1f}"),
        ("gradient norm: maximum below 150", result.get("grad_norm_max"), 0, 150, "{:.1f}"),
        ("no term above 90 % of the loss", largest_share(log[-10:], lam), 0, 0.9, "{:.0%} at the end"),
        ("with another task's demonstration, retrieval is no better than a copy of in2",
         None if None in (shuffled, copy) else shuffled - copy, -1, 0, "nDCG@10 without out1 differs by {:+.3f}")]
    judged = []
    for name, value, low, high, text in rows:
        met = None if number(value) is None else bool(low <= value <= high)
        judged.append((name, met, "not recorded" if met is None else text.format(value)))
    alerts = Alerts(log)
    for name, (key, _, worst) in ALERTS.items():
        tripped = "; ".join(line.split(":")[0] for line in alerts.lines if name in line)
        met, text = None, "not recorded"
        if values := alerts.seen.get(key):
            met, text = not tripped, f"{tripped or 'never'}; {worst.__name__}imum {worst(values):.3g}"
        judged.append((f"no alert: {name}", met, text))
    return judged


def largest_share(log: list[dict], lam: float) -> float | None:
    """The larger of the shares that prediction and SIGReg have in the loss, each the mean over the rows."""
    rows = [[number(row.get(key)) for key in ("prediction", "sigreg", "loss")] for row in log]
    rows = np.array([row for row in rows if None not in row and row[2]]).reshape(-1, 3)
    return float(((1 - lam, lam) * rows[:, :2] / rows[:, 2:]).mean(0).max()) if len(rows) else None


# ------------------------------------------------------------------------------------------------ parts of the page


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def picture(grid: np.ndarray, caption: str, side: int = 60, is_truth: bool = False) -> dict:
    """A grid as an image of one pixel a cell, which the browser enlarges to at most `side` pixels."""
    drawn, cell = io.BytesIO(), min(side // max(grid.shape), 12)
    matplotlib.image.imsave(drawn, PALETTE[grid], format="png", metadata={"Software": None})
    height, width = (cell * length for length in grid.shape)
    return {"uri": data_uri(drawn.getvalue()), "width": width, "height": height, "caption": caption, "truth": is_truth}


def neighbours(done, rows: int = 8, top: int = 5) -> list[dict]:
    """Windows of as many tasks: context and truth, its rank, and the candidates nearest to z_hat."""
    windows, pool, cards = done.windows, done.z[done.windows.outputs], []
    order = np.random.default_rng(0).permutation(len(windows.task))
    one_a_task = np.sort(np.unique(windows.task[order], return_index=True)[1])[:rows]
    for row in np.sort(order[one_a_task]):
        distance = (pool - done.z_hat[row]).square().sum(1).numpy()
        near, truth = windows.outputs[np.argsort(distance, kind="stable")[:top]], windows.index[row, 3]
        rank = 1 + int((distance < distance[windows.outputs == truth]).sum())
        title = f"{short(windows.task_ids[windows.task[row]], 16)}: the truth has rank {rank:,} of {len(pool):,}"
        given = [picture(windows.grids[i], name) for i, name in zip(windows.index[row], ("in1", "out1", "in2", "truth"))]
        found = [picture(windows.grids[i], str(n), is_truth=i == truth) for n, i in enumerate(near, 1)]
        cards.append({"title": title, "lines": [given, found]})
    return cards


def symbols(codes: np.ndarray, ids: np.ndarray, tokens, examples: int = 8) -> list[dict]:
    """The most used codes (n, K) of each position, with the objects that have them, the most frequent first."""
    cards = []
    for position, column in enumerate(codes.T):
        used, counts = np.unique(column, return_counts=True)
        for code in used[np.argsort(-counts, kind="stable")[:max(4, 24 // codes.shape[1])]]:
            rows = np.flatnonzero(column == code)
            distinct, first, often = np.unique(ids[rows], return_index=True, return_counts=True)
            best = np.argsort(-often, kind="stable")[:examples]
            line = [picture(object_cells(tokens, rows[first[i]]), f"× {often[i]:,}", 36) for i in best]
            title = f"position {position}, code {code}: {len(rows):,} objects, {len(distinct):,} distinct"
            cards.append({"title": title, "lines": [line]})
    return cards


def object_cells(tokens, i: int) -> np.ndarray:
    """Token i as places in PALETTE: an object in its colour; of a whole grid, the background and the rest."""
    side, (height, width) = arc_data.SIDE, tokens.box[i, 2:]
    bits = np.unpackbits(tokens.bitmaps[tokens.shape[i]], count=side * side).reshape(side, side)[:height, :width]
    inside, outside = (11, tokens.colour[i]) if i in tokens.start else (tokens.colour[i], arc_data.PAD)
    return np.where(bits, inside, outside)


def opening(done, log: list[dict]) -> list[str]:
    """Three sentences: the model against the best baseline, health, leaks."""
    return [result_sentence(done.metrics[METRIC], done.health["lead"]), health_sentence(done, log), leaks_sentence(done.data)]


def result_sentence(entry: dict, lead: dict) -> str:
    best = best_baseline(entry)
    if best is None:
        return "No baseline was evaluated beside the model."
    gap, low, high = lead[best][METRIC]
    verdict = "beats" if low > 0 else "is behind" if high < 0 else "is level with"
    return (f"The model {verdict} the best baseline, {best}: nDCG@10 without out1 is {entry['model']:.3f} against "
            f"{entry['baselines'][best]:.3f}, a difference of {gap:+.3f} [{low:+.3f}, {high:+.3f}].")


def health_sentence(done, log: list[dict]) -> str:
    count, ranks = len(done.windows.task), [done.health[role]["effective_rank"] for role in ("context", "target")]
    bad = [name for name in Alerts(log).tripped if ALERTS[name][0] != METRIC]
    bad += [f"effective rank of the {role} below {low}" for role, low, rank in zip(("context", "target"), (3, 5), ranks)
            if rank < low and count >= FEW]
    state = f"Only {count} windows, too few to judge health" if count < FEW else "Health: no alert stands"
    if bad:
        state = f"Health needs attention: {'; '.join(dict.fromkeys(bad))}"
    usage = [f" and {value:.0%} of the codes are in use" for _, value in points(log, "codes_usage")[-1:]]
    ranks = "{:.1f} for the context and {:.1f} for the target".format(*ranks)
    return f"{state}; the effective rank of {done.z.shape[1]} dimensions is {ranks}{''.join(usage)}."


def leaks_sentence(data: dict) -> str:
    shared, tasks = data["shared_with_training"], f"{data['tasks']:,} tasks"
    if shared is None:
        return "Leaks: whether the tasks share pairs with the training tasks could not be checked."
    if shared:
        return f"Leaks: {shared:,} of the {tasks} share a pair with the training tasks; these are not unseen."
    return f"Leaks: none of the {tasks} shares a pair with the training tasks."


def summary(done) -> list[list]:
    """Cells of the first table: each metric, its best baseline, and their difference where it is known."""
    cells = [["metric", "model", "95 %", "best baseline", "value", "difference", "n"]]
    for name in evaluation.METRICS:
        entry, best = done.metrics[name], best_baseline(done.metrics[name])
        if entry["model"] is not None:
            lead, interval = done.health["lead"].get(best, {}).get(name), "[{:.3f}, {:.3f}]".format(*entry["interval"])
            gap = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*lead) if lead else None
            cells.append([name, entry["model"], interval, best, entry["baselines"].get(best), gap, entry["n"]])
    return cells


def every_row(metrics: dict, names: tuple) -> list[list]:
    """Cells of a table of all rows, the model first."""
    rows = dict.fromkeys(row for name in names for row in metrics[name]["baselines"])
    cells = [[row, *(metrics[name]["baselines"].get(row) for name in names)] for row in rows]
    return [["row", *names], ["model", *(metrics[name]["model"] for name in names)], *cells]


def flat(values: dict, prefix: str = "") -> list[list]:
    """[name, value] of every figure in nested dictionaries."""
    cells = []
    for name, value in values.items():
        cells += flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else [[f"{prefix}{name}", value]]
    return cells


def health_figures(done, codes: np.ndarray, ids: np.ndarray) -> list:
    """Spectrum, map, and use of the codes; what the data are too few for is left out."""
    figures, pairs, windows = [], done.pairs, done.windows
    rows = np.random.default_rng(0).permutation(len(done.z_hat))[:evaluation.SAMPLE]
    if len(rows) > 2:
        normal = torch.randn(len(rows), done.z.shape[1], generator=torch.Generator().manual_seed(0))
        x = {"context": done.z_hat[rows], "target": done.z[windows.index[rows, 3]], "N(0, I)": normal}
        spectra = {name: evaluation.spectrum(values).numpy() for name, values in x.items()}
        figures.append(plot_ranked(f"eigenvalues of the covariance, n = {len(rows):,}", spectra))
    if len(pairs.task) > 2:
        group, names, what = pairs.task, windows.task_ids, "task"
        if done.labels:
            group, names, what = pairs.y[:, 0], sorted(set(done.labels.values())), "label"
        figures.append(plot_map(evaluation.pair_features(done.z, pairs), group, names, what))
    distinct = np.unique(ids, return_index=True)[1]
    for name, column in ((name, x) for name, x in (("objects", codes), ("distinct objects", codes[distinct])) if x.size):
        shares = {f"position {i}": np.bincount(x, minlength=CODE_SIZE) / len(x) for i, x in enumerate(column.T)}
        uniform = {"uniform": np.full(CODE_SIZE, 1 / CODE_SIZE)}
        figures.append(plot_ranked(f"share of {name} with each code, n = {len(column):,}", shares | uniform))
    return figures


# ------------------------------------------------------------------------------------------------ pages


def write_page(path: Path, **values) -> Path:
    """A page of the template, which takes charts as figures and tables as lists of lines."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True)
    pages.filters |= {"png": lambda figure: data_uri(png(figure)), "short": lambda text: short(text, 200)}
    colours = ["rgb({}, {}, {})".format(*rgb) for rgb in PALETTE]
    page = pages.get_template("report.html").render(kinds=KINDS, colours=colours, series=SERIES, **values)
    write_file(path, page.encode())
    return path


@styled
def write_report(folder: Path, done, facts: dict, log: list[dict], result: dict) -> Path:
    """report.html of the evaluation `done`, self-contained. All `facts` are shown; "run" and "lam" must be there."""
    codes = torch.cat([codes for codes, _ in done.codes]).numpy()
    ids, tokens = evaluation.object_ids(done.windows.grids)
    health = {name: value for name, value in done.health.items() if name != "lead"}
    return write_page(
        Path(folder) / "report.html", title=f"{facts['run']} on {done.data['source']}", runs=None, data=done.data,
        facts=facts, opening=opening(done, log), summary=summary(done), neighbours=neighbours(done),
        retrieval=plot_bars({name: done.metrics[name] for name in RETRIEVAL}), symbols=symbols(codes, ids, tokens),
        pairs=plot_bars({name: done.metrics[name] for name in evaluation.PAIRWISE}),
        health=health_figures(done, codes, ids), criteria=criteria(log, result, facts["lam"], done),
        training=plot_training({"": log}, number(result.get(f"baseline_{METRIC}"))),
        tables={"Retrieval, every row": every_row(done.metrics, evaluation.METRICS[:-len(evaluation.PAIRWISE)]),
                "Pairs, every row": every_row(done.metrics, evaluation.PAIRWISE),
                "Health and probes": [["figure", "value"], *flat(health)]})


@styled
def compare_page(folder: Path, result: dict, logs: dict[str, list[dict]]) -> Path:
    """compare.html: runs side by side.

    result  {"data": source, "runs": {name: {metric: {"value": x, "interval": [low, high], "difference": [x, low, high]},
            "codes": {figure: x}}}}; differences and codes refer to the first run
    logs    {name: rows of log.jsonl}
    """
    return write_page(Path(folder) / "compare.html", title=f"Runs on {result['data']}", runs=result["runs"],
                      training=plot_training(logs))
