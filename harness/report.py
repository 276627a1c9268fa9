"""Alerts, criteria and the report pages, from figures that eval.py or a run worked out.

The template report.html holds markup and prose; it escapes all text. A log or a result in which a value is
missing, or is no number, loses that value and nothing more.

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
from harness import charts, health
from harness.charts import METRIC, PALETTE, best_baseline, number, plot_bars, plot_ranked, plot_training
from harness.charts import points, short, styled
from harness.checkpoint import write_file
from harness.decoder import METRICS
from lejepa import CODE_SIZE

RETRIEVAL = (METRIC, "ndcg10", "all_demonstrations", "within_task", "hard_ndcg10", "hard_r1")
FEW = 100  # windows; health is not judged on fewer
# ------------------------------------------------------------------------------------------------ alerts
STALL = 10  # evaluations
ALERTS = {  # why the recorded runs should have been stopped: figure, are its values bad, the worst of them
    "code usage below 8 % at three evaluations in a row":
        ("codes_usage", lambda v: len(v) > 2 and max(v[-3:]) < 0.08, min),
    "code usage below 15 %": ("codes_usage", lambda v: v[-1] < 0.15, min),
    "code usage below 5 %": ("codes_usage", lambda v: v[-1] < 0.05, min),
    "effective rank of the context below 3": ("effective_rank_context", lambda v: v[-1] < 3, min),
    "effective rank of the target below 5": ("effective_rank_target", lambda v: v[-1] < 5, min),
    "isotropy of the target below 1e-5": ("isotropy", lambda v: v[-1] < 1e-5, min),
    "gradient norm above 30 at five logged steps in a row, the first ten left out":
        ("grad_norm", lambda v: len(v) > 14 and min(v[-5:]) > 30, max),
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
    """What the recorded assessment asked of a run, and each alert: name, is it met (None: unknown), text."""
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
        ("code usage above 25 % after a quarter of it", min(usage, default=None), 0.25, 1, "lowest {:.1%}"),
        ("code usage never falls by over 10 points", max(falls, default=None), 0, 0.1, "largest fall {:.1%}"),
        ("effective rank of the context at least 15", rank["context"], 15, np.inf, "{:.1f}"),
        ("effective rank of the target at least 20", rank["target"], 20, np.inf, "{:.1f}"),
        ("gradient norm: mean below 50", result.get("grad_norm_mean"), 0, 50, "{:.1f}"),
        ("gradient norm: maximum below 150", result.get("grad_norm_max"), 0, 150, "{:.1f}"),
        ("no term above 90 % of the loss", largest_share(log[-10:], lam), 0, 0.9, "{:.0%} at the end"),
        ("with another task's demonstration, retrieval is no better than a copy of in2",
         None if None in (shuffled, copy) else shuffled - copy, -1, 0, "nDCG@10 differs by {:+.3f}")]
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
    """The largest of the shares that prediction and both SIGRegs have in the loss: means over the rows."""
    rows = [[number(row.get(key)) for key in ("prediction", "sigreg_z", "sigreg_y", "loss")] for row in log]
    rows = np.array([row for row in rows if None not in row and row[3]]).reshape(-1, 4)
    return float(((1 - lam, lam, lam) * rows[:, :3] / rows[:, 3:]).mean(0).max()) if len(rows) else None

# ------------------------------------------------------------------------------------------------ sections
def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()

def picture(grid: np.ndarray, caption: str, side: int = 60, is_truth: bool = False) -> dict:
    """A grid as an image of one pixel a cell, which the browser enlarges to at most `side` pixels."""
    drawn, cell = io.BytesIO(), min(side // max(grid.shape), 12)
    matplotlib.image.imsave(drawn, PALETTE[grid], format="png", metadata={"Software": None})
    size = {"height": cell * grid.shape[0], "width": cell * grid.shape[1]}
    return size | {"uri": data_uri(drawn.getvalue()), "caption": caption, "truth": is_truth}

def neighbours(done, rows: int = 8, top: int = 5) -> list[dict]:
    """Windows of as many tasks: context and truth, its rank, and the candidates nearest to z_hat."""
    windows, pool, cards = done.windows, done.z[done.windows.outputs], []
    order = np.random.default_rng(0).permutation(len(windows.task))
    one_a_task = np.sort(np.unique(windows.task[order], return_index=True)[1])[:rows]
    for row in np.sort(order[one_a_task]):
        distance = (pool - done.z_hat[row]).square().sum(1).numpy()
        near, truth = windows.outputs[np.argsort(distance, kind="stable")[:top]], windows.index[row, 3]
        rank = 1 + int((distance < distance[windows.outputs == truth]).sum())
        task, names = short(windows.task_ids[windows.task[row]], 16), ("in1", "out1", "in2", "truth")
        given = [picture(windows.grids[i], name) for i, name in zip(windows.index[row], names)]
        found = [picture(windows.grids[i], str(n), is_truth=i == truth) for n, i in enumerate(near, 1)]
        title = f"{task}: the truth has rank {rank:,} of {len(pool):,}"
        cards.append({"title": title, "lines": [given, found]})
    return cards

def drawn(done, decoded: dict, rows: int = 6) -> list[dict]:
    """Windows of as many tasks, with what a decoder reads from z of the answer and from z_hat."""
    cards, windows = [], done.windows
    order = np.random.default_rng(1).permutation(len(windows.task))
    chosen = np.sort(order[np.unique(windows.task[order], return_index=True)[1]])
    for row in np.random.default_rng(1).permutation(chosen)[:rows] if decoded else ():
        names = ("in1", "out1", "in2", "truth")
        line = [picture(windows.grids[i], name) for i, name in zip(windows.index[row], names)]
        line += [picture(decoded[key].grids[row], name)
                 for key, name in (("z of the answer", "from z"), ("model", "from z_hat"))]
        cards.append({"title": short(windows.task_ids[windows.task[row]], 16), "lines": [line]})
    return cards

def symbols(codes: np.ndarray, ids: np.ndarray, tokens, examples: int = 8) -> list[dict]:
    """The most used codes (n, K) of each position and the objects that have them, the most frequent first."""
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
    bits = np.unpackbits(tokens.bitmaps[tokens.shape[i]], count=side * side).reshape(side, side)
    inside, outside = (11, tokens.colour[i]) if i in tokens.start else (tokens.colour[i], arc_data.PAD)
    return np.where(bits[:height, :width], inside, outside)

def result_sentence(entry: dict, lead: dict) -> str:
    best = best_baseline(entry)
    if best is None:
        return "No baseline was evaluated beside the model."
    gap, low, high = lead[best][METRIC]
    verdict = "beats" if low > 0 else "is behind" if high < 0 else "is level with"
    return (f"The model {verdict} the best baseline ({best}): nDCG@10 without out1 is {entry['model']:.3f} "
            f"for the model, {entry['baselines'][best]:.3f} for the baseline; they differ by {gap:+.3f}, "
            f"95 % interval {low:+.3f} to {high:+.3f}.")

def health_sentence(done, log: list[dict]) -> str:
    count = len(done.windows.task)
    context, target = (done.health[role]["effective_rank"] for role in ("context", "target"))
    bad = [name for name in Alerts(log).tripped if ALERTS[name][0] != METRIC]
    if count >= FEW:
        bad += ["effective rank of the context below 3"] * (context < 3)
        bad += ["effective rank of the target below 5"] * (target < 5)
    state = "No health alert stands" if count >= FEW else f"On {count} windows health cannot be judged"
    if bad:
        state = f"Health needs attention ({'; '.join(dict.fromkeys(bad))})"
    usage = [f"; {100 * value:.1f} % of the codes are in use" for _, value in points(log, "codes_usage")[-1:]]
    return (f"{state}: the effective rank is {context:.1f} for the context and {target:.1f} for the target, "
            f"of {done.z.shape[1]} dimensions{''.join(usage)}.")

def leaks_sentence(data: dict) -> str:
    shared, tasks = data["shared_with_training"], f"{data['tasks']:,} tasks"
    if shared is None:
        return "Whether the tasks share pairs with the training tasks could not be checked."
    if shared:
        return f"{shared:,} of the {tasks} share a pair with the training tasks: these are not unseen."
    return f"None of the {tasks} shares a pair with the training tasks."

def summary(done) -> list[list]:
    """Cells of the first table: each metric, its best baseline, and their difference where it is known."""
    cells = [["metric", "model", "best baseline", "its value", "difference", "n"]]
    for name, entry in done.metrics.items():
        best = best_baseline(entry)
        if entry["model"] is not None:
            lead = done.health["lead"].get(best, {}).get(name)
            model, gap = with_interval(entry["model"], entry["interval"]), with_sign(lead) if lead else None
            cells.append([name, model, best, entry["baselines"].get(best), gap, entry["n"]])
    return cells

def compare_runs(runs: dict) -> list[list]:
    """Cells of a table of runs: the values of every metric, and the differences from the first run."""
    first, *others = runs.values()
    cells = [["metric", *runs]]
    for name in [name for name in first if name != "codes"]:
        values = [with_interval(run[name]["value"], run[name]["interval"]) for run in runs.values()]
        gaps = ["", *(", " + with_sign(run[name]["difference"]) for run in others)]
        cells.append([name, *map("".join, zip(values, gaps))])
    return cells

def with_interval(value: float, ends) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(value, *ends)

def with_sign(difference) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)

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
    rows = np.random.default_rng(0).permutation(len(done.z_hat))[:health.SAMPLE]
    if len(rows) > 2:
        normal = torch.randn(len(rows), done.z.shape[1], generator=torch.Generator().manual_seed(0))
        x = {"context": done.z_hat[rows], "target": done.z[windows.index[rows, 3]], "N(0, I)": normal}
        spectra = {name: health.spectrum(values).numpy() for name, values in x.items()}
        figures.append(plot_ranked(f"eigenvalues of the covariance, n = {len(rows):,}", spectra))
    if len(pairs.task) > 2:
        group, names, what = pairs.task, windows.task_ids, "task"
        if done.labels:
            group, names, what = pairs.y[:, 0], sorted(set(done.labels.values())), "label"
        figures.append(charts.plot_map(evaluation.pair_features(done.z, pairs), group, names, what))
    distinct = np.unique(ids, return_index=True)[1]
    for name, chosen in (("objects", codes), ("distinct objects", codes[distinct])):
        counts = {f"position {i}": np.bincount(x, minlength=CODE_SIZE) for i, x in enumerate(chosen.T)}
        if counts:
            counts["uniform"] = np.full(CODE_SIZE, len(chosen) / CODE_SIZE)
            figures.append(plot_ranked(f"{name} with each code, n = {len(chosen):,}", counts))
    return figures
# ------------------------------------------------------------------------------------------------ pages
def show(value) -> str:
    """A value of a table: a dash for None, three digits of a fraction, a comma between thousands."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, float):
        return f"{value:.3f}" if 0.01 <= abs(value) < 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else short(value, 200)

def write_page(path: Path, **values) -> Path:
    """A page of the template, which takes charts as figures and tables as lists of lines."""
    pages = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    pages.filters["png"] = lambda figure: data_uri(charts.png(figure))
    pages.filters |= {"show": show, "short": lambda text: short(text, 200)}
    template = Path(__file__).with_name("report.html").read_text()
    values |= {"kinds": charts.KINDS, "series": charts.SERIES}
    values["colours"] = ["rgb({}, {}, {})".format(*rgb) for rgb in PALETTE]
    write_file(path, pages.from_string(template).render(values).encode())
    return path

@styled
def write_report(folder: Path, done, facts: dict, log: list[dict], result: dict,
                 decoded: dict | None = None) -> Path:
    """report.html of the evaluation `done`, self-contained. All `facts` are shown, "run" and "lam" needed."""
    codes = torch.cat([codes for codes, _ in done.codes]).numpy()
    ids, tokens = health.object_ids(done.windows.grids)
    entries, pairwise = {name: done.metrics[name] for name in evaluation.METRICS}, evaluation.PAIRWISE
    sentences = [result_sentence(entries[METRIC], done.health["lead"])]
    sentences += [health_sentence(done, log), leaks_sentence(done.data)]
    tables = {"Retrieval, every row": every_row(entries, [name for name in entries if name not in pairwise]),
              "Pairs, every row": every_row(entries, pairwise),
              "Decoded from z, every row": every_row(done.metrics, tuple(METRICS) if decoded else ()),
              "Health and probes": [["figure", "value"], *flat(done.health | {"lead": {}})]}
    return write_page(
        Path(folder) / "report.html", title=f"{facts['run']} on {done.data['source']}", runs=None,
        decoded=drawn(done, decoded or {}),
        facts=facts, data=done.data, opening=sentences, summary=summary(done), neighbours=neighbours(done),
        retrieval=plot_bars({name: entries[name] for name in RETRIEVAL}), symbols=symbols(codes, ids, tokens),
        pairs=plot_bars({name: entries[name] for name in pairwise}), health=health_figures(done, codes, ids),
        training=plot_training({"": log}, number(result.get(f"baseline_{METRIC}"))), tables=tables,
        criteria=criteria(log, result, facts["lam"], done))

@styled
def compare_page(folder: Path, result: dict, logs: dict[str, list[dict]]) -> Path:
    """compare.html: runs side by side.

    result  {"data": source, "runs": {name: {metric: entry, ..., "codes": {figure: value}}}}, and an entry is
            {"value": x, "interval": [low, high], "difference": [x, low, high]}; the difference from the first
            run, and the agreement of codes with it
    logs    {name: rows of log.jsonl}
    """
    return write_page(Path(folder) / "compare.html", title=f"Runs on {result['data']}", runs=result["runs"],
                      summary=compare_runs(result["runs"]), training=plot_training(logs))
