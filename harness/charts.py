"""Charts and pictures of grids, from figures that eval.py or a run worked out.

    W windows   P candidates: the distinct outputs   D embedding width   n pairs
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot, so no back end is chosen for the process
from matplotlib.patches import Patch
from torch import Tensor

import eval as evaluation
from harness.checkpoint import write_file

METRIC = "ndcg10_without_out1"  # the one that opens the page
RANKS = ("effective_rank_context", "effective_rank_target")
CURVES = {"retrieval on unseen tasks": (METRIC, "within_task"), "loss of a step": ("loss",),
          "loss on unseen tasks, averaged weights": ("validation_loss",), "gradient norm": ("grad_norm",),
          "effective rank": RANKS, "use of the codes": ("codes_usage", "codes_perplexity", "codes_ceiling")}
RECORDED = {  # the `production` run of arc-jepa-rl (2025-12): InfoNCE, VQ codebook, over 20 hyper-parameters
    "step": (100, 1000, 3000, 5000, 7600), "codes_usage": (0.268, 0.164, 0.302, 0.211, 0.336),
    "effective_rank_context": (3.73, 3.91, 7.25, 14.56, 15.53),
    "effective_rank_target": (5.22, 6.55, 8.63, 16.06, 19.34)}
# Ends of the baselines that use trained weights.
LEARNED = (", trained", "bag of codes", "codes with boxes", "z of the answer")
KINDS = {  # of rows in a bar chart, and their colours
    "the model": "#2563eb", "trained embedding or codes, no predictor": "#93c5fd",
    "untrained network": "#fdba74", "raw cells, features, chance": "#cbd5e1"}
SERIES = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#ca8a04", "#0891b2", "#be123c", "#78716c")
INK, MUTED, LINE = "#1e293b", "#64748b", "#cbd5e1"
PALETTE = np.array([[0, 0, 0], [0, 116, 217], [255, 65, 54], [46, 204, 64], [255, 220, 0], [170, 170, 170],
                    [240, 18, 190], [255, 133, 27], [127, 219, 255], [135, 12, 37],  # the ten colours of ARC
                    [235, 235, 235], [196, 181, 253]], np.uint8)  # no cell; what is not background
styled = matplotlib.rc_context({  # a decorator: the settings hold while the decorated function draws
    "text.color": INK, "font.size": 8, "figure.titlesize": 9.5, "figure.titleweight": "bold",
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE, "axes.spines.top": False, "axes.spines.right": False, "xtick.color": LINE,
    "ytick.color": LINE, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "lines.linewidth": 1.4,
    "lines.markersize": 4, "axes.prop_cycle": matplotlib.cycler(color=SERIES), "legend.frameon": False,
    "legend.fontsize": 7.5, "axes.formatter.min_exponent": 3, "figure.constrained_layout.use": True})

def number(value) -> float | None:
    """The value where it is a finite number, else None."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None

def points(log: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of every row of a log that has both."""
    found = [(number(row.get("step")), number(row.get(key))) for row in log]
    return [point for point in found if None not in point]

def short(text, most: int = 20) -> str:
    """A name from outside on one line, in characters that can be printed, not without end."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[:most + 1])
    return text if len(text) <= most else text[:most - 1] + "…"
# ------------------------------------------------------------------------------------------------ bars
def row_colour(row: str) -> str:
    model, trained, untrained, features = KINDS.values()
    return model if row == "model" else trained if row.endswith(LEARNED) else \
        untrained if row.endswith("untrained") else features

def best_baseline(entry: dict) -> str | None:
    """The highest row that learned nothing; None where there is none."""
    rows = {row: value for row, value in entry["baselines"].items() if not row.endswith(LEARNED)}
    return max(rows, key=rows.get, default=None)

def chosen_rows(entry: dict, most: int = 8) -> dict[str, float]:
    """Bars of a chart, the highest first: the model, the best baseline, and the highest of the others."""
    rows = {"model": entry["model"]} | entry["baselines"]
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]))
    kept = {"model", best_baseline(entry) or "model"}
    kept.update([row for row in rows if row not in kept][:most - len(kept)])
    return {row: value for row, value in rows.items() if row in kept}

def draw_bars(axis, entry: dict):
    """The chosen rows with their values, and the model's 95 % interval. Model and best baseline are bold."""
    rows, best, model = chosen_rows(entry), best_baseline(entry), entry["model"]
    low, high = entry["interval"] or (model, model)
    axis.barh(range(len(rows)), list(rows.values()), height=0.74, color=[row_colour(row) for row in rows])
    error = [[max(model - low, 0)], [max(high - model, 0)]]  # rounding can move one task's interval
    axis.errorbar(model, list(rows).index("model"), xerr=error, color=INK, capsize=2.5, linewidth=1)
    axis.set_yticks(range(len(rows)), rows)
    for place, (row, value) in enumerate(rows.items()):
        text = f"{value:.3f}" + "  best baseline" * (row == best)
        end = max(value, high) if row == "model" else value
        bold = "bold" if row in ("model", best) else "normal"
        axis.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontweight=bold)
        axis.get_yticklabels()[place].set_fontweight(bold)
    axis.set(xlim=(0, max(*rows.values(), high, 1e-9) * 1.85), ylim=(len(rows) - 0.4, -0.6), xticks=[])
    axis.tick_params(length=0)
    axis.spines["bottom"].set_visible(False)

def plot_bars(metrics: dict) -> list[Figure]:
    """A chart a metric; none where the data allow no figure."""
    figures = []
    for name, entry in metrics.items():
        if entry["model"] is not None:
            figure, axis = panel(f"{name}, n = {entry['n']:,}", 0.5 + 0.25 * len(chosen_rows(entry)))
            draw_bars(axis, entry)
            figures.append(figure)
    return figures

@styled
def plot_parts(path: Path, times: dict[str, float]):
    """Where a training step's time goes: milliseconds by part."""
    figure, axis = panel("milliseconds of a training step, by part", 0.5 + 0.25 * len(times))
    bars, total = axis.barh(range(len(times)), list(times.values())), sum(times.values())
    axis.bar_label(bars, [f"{ms:.3g} ms, {ms / total:.0%}" for ms in times.values()], padding=4)
    axis.set_yticks(range(len(times)), times)
    axis.set(ylim=(len(times) - 0.4, -0.6), xlim=(0, max(times.values()) * 1.4), xticks=[])
    write_file(Path(path), png(figure))
# ------------------------------------------------------------------------------------------------ curves
def panel(title: str, height: float = 2.9, **properties):
    """A figure of one chart, as wide as a phone shows it."""
    figure = Figure(figsize=(4.6, height))
    figure.suptitle(title, x=0.01, ha="left")
    axis = figure.subplots()
    axis.set(**properties)
    return figure, axis

def png(figure: Figure, dpi: int = 160) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    return drawn.getvalue()

def draw_curves(axis, runs: dict[str, list[dict]], keys: tuple, baseline: float | None = None):
    """Figures over training: a colour a figure; of several runs, a colour a run and a line style a figure."""
    for i, log in enumerate(runs.values()):
        for j, key in enumerate(keys):
            if found := points(log, key):
                colour, line = (i, ("-", "--", ":")[j]) if len(runs) > 1 else (j, "-")
                marker = "o" if len(found) < 3 else ""
                axis.plot(*zip(*found), line, color=SERIES[colour % len(SERIES)], marker=marker, label=key)
    if baseline is not None:
        axis.axhline(baseline, color=MUTED, linestyle=":", label=f"best baseline, {keys[0]}")
    axis.set_xlabel("step")
    axis.locator_params("x", integer=True)
    entries = dict(zip(*axis.get_legend_handles_labels()[::-1]))  # one for each name
    legend = axis.legend(entries.values(), entries)
    if len(runs) > 1:  # colours name the runs, so the legend shows line styles alone
        for handle in legend.legend_handles:
            handle.set_color(INK)

def plot_training(runs: dict[str, list[dict]], baseline: float | None = None) -> list[Figure]:
    """Figures over training of one run or several; `baseline` is the best baseline's nDCG@10 without out1."""
    figures = []
    for title, keys in CURVES.items():
        if any(points(log, key) for log in runs.values() for key in keys):
            figure, axis = panel(title, yscale="log" if "loss" in title or "norm" in title else "linear")
            draw_curves(axis, runs, keys, baseline if METRIC in keys else None)
            figures.append(figure)
    return figures

@styled
def write_result_picture(folder: Path, result: dict, log: list[dict]):
    """result.png of a run: retrieval against the baselines, its course, health beside a recorded run."""
    figure = Figure(figsize=(10, 6.4))
    (bars, curves), (ranks, usage) = figure.subplots(2, 2)
    baselines = {row: values[METRIC] for row, values in result["baselines"].items()}
    interval = result["intervals"][METRIC]
    draw_bars(bars, {"model": result[METRIC], "interval": interval, "baselines": baselines})
    patches = [Patch(color=colour) for colour in KINDS.values()]
    bars.legend(patches, KINDS, loc="upper center", bbox_to_anchor=(0.3, 0), ncols=2)
    bars.set_title("nDCG@10 without out1 on unseen tasks")
    draw_curves(curves, {"": log}, (METRIC, f"train_{METRIC}"), result[f"baseline_{METRIC}"])
    curves.set_title("retrieval during training")
    for axis, title, keys in ((ranks, "effective rank", RANKS), (usage, "codes in use", ("codes_usage",))):
        draw_curves(axis, {"": log}, keys)
        end = max([step for key in keys for step, _ in points(log, key)], default=1)
        for key, colour in zip(keys, SERIES):
            steps = np.array(RECORDED["step"]) / RECORDED["step"][-1] * end
            axis.plot(steps, RECORDED[key], ":.", color=colour, label=f"{key}, arc-jepa-rl")
        axis.set(title=title, ylim=(0, 1.05 if axis is usage else None))
        axis.set_xlabel("step; the recorded run of arc-jepa-rl is rescaled to the same length")
        axis.legend()
    write_file(Path(folder) / "result.png", png(figure, 120))

def plot_ranked(title: str, lines: dict[str, np.ndarray]) -> Figure:
    """The values of each line, the largest first, on a logarithmic axis; a 0 is not shown."""
    figure, axis = panel(title, yscale="log", xlabel="rank")
    for name, values in lines.items():
        values = np.where(values > 0, values, np.nan)[np.argsort(-values)]
        axis.plot(np.arange(1, len(values) + 1), values, label=name)
    axis.legend()
    return figure

def plot_map(x: Tensor, group: np.ndarray, names: list[str], what: str, most: int = 8) -> Figure:
    """Pairs x (n, d) on two principal components, coloured by the `most` frequent groups (n,); -1 is none."""
    places = evaluation.principal(x, 2).numpy()
    share = places.var(0) / max(float(x.var(0, correction=0).sum()), 1e-12)
    figure, axis = panel(f"map of {len(x):,} pairs by {what}", 3.6)
    axis.set_xlabel(f"first principal component, {share[0]:.1%} of the variance")
    axis.set_ylabel(f"second, {share[1]:.1%}")
    found, counts = np.unique(group[group >= 0], return_counts=True)
    chosen = found[np.argsort(-counts, kind="stable")[:most]]
    axis.scatter(*places[~np.isin(group, chosen)].T, s=4, color=LINE, label=f"another {what}")
    for which in chosen:
        name = " " + short(names[which]).replace("$", r"\$")  # no formula; a leading underscore would hide it
        axis.scatter(*places[group == which].T, s=12, label=name)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
# ------------------------------------------------------------------------------------------------ grids
@torch.no_grad()
def neighbours_image(model, windows, pool: Tensor, rows: int = 6, top: int = 3, side: int = 90) -> np.ndarray:
    """(H, W, 3) uint8, a line a window: in1, out1, in2, truth, the `top` of pool (P, D) nearest to z_hat."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(windows.index))[:rows])
    distances = torch.cdist(model.predict(evaluation.contexts(windows, chosen)).float().cpu(), pool)
    lines = np.column_stack([windows.index[chosen], windows.outputs[distances.argsort(1)[:, :top].numpy()]])
    tiles = np.full((*lines.shape, side + 6, side + 6, 3), 200, np.uint8)
    for place in np.ndindex(lines.shape):
        grid = windows.grids[lines[place]]
        cell = side // max(grid.shape)
        drawn = PALETTE[np.kron(grid, np.ones((cell, cell), np.int8))]
        tiles[place][:len(drawn), :drawn.shape[1]] = drawn
    return tiles.transpose(0, 2, 1, 3, 4).reshape(len(lines) * (side + 6), -1, 3)
