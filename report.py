"""Alerts, verdicts, pictures and pages of figures that eval.py or a run has worked out. Nothing here reads a model.

    n objects   K codes   D embedding width
"""

import io
import json
import os
from pathlib import Path
from typing import Callable

import numpy as np
from matplotlib.figure import Figure  # figures are made without pyplot, so no back end is chosen for the process

from arc_data import PAD, SIDE


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


def shown(name: str) -> str:
    """A name from outside as matplotlib shows it: a dollar opens no formula, and a leading underscore hides nothing."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"compress_level": 9})
    write_whole(path, drawn.getvalue())


PALETTE = np.array([[0, 0, 0], [0, 116, 217], [255, 65, 54], [46, 204, 64], [255, 220, 0], [170, 170, 170], [240, 18, 190],
                    [255, 133, 27], [127, 219, 255], [135, 12, 37], [255, 255, 255]], np.uint8)  # ARC's colours; 10 is no cell


def draw(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid as a (side, side, 3) picture in ARC's colours, its cells as large as they fit."""
    cell = side // max(grid.shape)
    picture = np.full((side, side), PAD)
    large = np.kron(grid, np.ones((cell, cell), grid.dtype))
    picture[:large.shape[0], :large.shape[1]] = large
    return PALETTE[picture]


# The recorded `production` run of arc-jepa-rl (2025-12; InfoNCE, VQ codebook, 20+ hyper-parameters): step, rank of context
# and of target, share of codes used.
RECORDED = {"step": (100, 1000, 3000, 5000, 7600), "effective_rank_context": (3.73, 3.91, 7.25, 14.56, 15.53),
            "effective_rank_target": (5.22, 6.55, 8.63, 16.06, 19.34), "codes_usage": (0.268, 0.164, 0.302, 0.211, 0.336)}


def plot_run(folder: Path) -> Path:
    """result.png of a run's folder: retrieval against the floors, loss, and health over training beside a recorded failure."""
    result = json.loads((folder / "result.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    looks = [row for row in log if row.get("effective_rank_target") is not None]
    figure = Figure(figsize=(19, 4.6), layout="constrained")
    bars, curves, ranks, usage = figure.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
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
    save_figure(figure, folder / "result.png", 80)
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


# ---------------------------------------------------------------------------------------------- pictures of an evaluation
# Each writes one PNG into a folder and returns its name and what it shows.


def plot_floors(folder: Path, name: str, figures: dict, metrics: tuple) -> tuple[str, str]:
    """A panel a metric: the model with its interval, then every floor, the highest first."""
    metrics = [metric for metric in metrics if figures[metric]["model"] is not None]
    columns = 2 if len(metrics) == 4 else 3
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5 * columns, 0.2 + 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(metrics):]:
        axis.remove()
    for axis, metric in zip(axes, metrics):
        entry = figures[metric]
        floors = sorted(entry["floors"].items(), key=lambda item: item[1])
        names, values = [*(row for row, _ in floors), "model"], [*(value for _, value in floors), entry["model"]]
        axis.barh(names, values, color=["lightgrey"] * len(floors) + ["tab:blue"])
        low, high = entry["interval"]
        axis.errorbar(entry["model"], "model", xerr=[[entry["model"] - low], [high - entry["model"]]], color="black", capsize=3)
        for row, value in zip(names, values):
            axis.text(0.01, row, f"{value:.3f}", va="center", fontsize=8, color="white" if row == "model" and value > 0.1 else "black")
        axis.tick_params(axis="y", labelsize=8)
        axis.set(xlim=(0, 1), xlabel=metric, ylabel="row", title=f"{metric}, n = {entry['n']}")
    return _save(figure, folder, f"{name}.png", f"Figures of {name} with their 95 % intervals over tasks, and what no learning scores by the same code", dpi=60)


def plot_parts(path: Path, times: dict[str, float]) -> None:
    """Where a training step's time goes: milliseconds by part."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    names, values = list(times)[::-1], list(times.values())[::-1]
    axis.bar_label(axis.barh(names, values), [f"{value / sum(values):.0%}" for value in values], padding=3)
    axis.set(xlabel="ms a step, forward and backward", ylabel="part", title="where a training step's time goes")
    axis.margins(x=0.1)
    save_figure(figure, path, 80)


def plot_spectrum(folder: Path, spectra: dict[str, np.ndarray]) -> tuple[str, str]:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, values), style in zip(spectra.items(), ("-", "-", ":")):
        axis.semilogy(np.arange(1, len(values) + 1), values, style, label=name)
    axis.set(xlabel="number of the eigenvalue, the largest first", ylabel="eigenvalue of the covariance", title="spectrum of the embeddings")
    axis.legend()
    return _save(figure, folder, "spectrum.png", "Eigenvalues of context and target beside those of as many samples of N(0, I)")


def plot_code_use(folder: Path, codes: np.ndarray, distinct: np.ndarray, size: int) -> tuple[str, str]:
    """Shares of the codes (n, n_codes), the most used first: of all objects, and of the rows `distinct`."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (name, chosen) in zip(figure.subplots(1, 2, sharey=True), (("all objects", codes), ("distinct objects", codes[distinct]))):
        for position, column in enumerate(chosen.T):
            share = np.sort(np.bincount(column, minlength=size))[::-1] / len(column)
            axis.semilogy(np.arange(1, size + 1), np.where(share > 0, share, np.nan), label=f"position {position}")
        axis.axhline(1 / size, color="grey", linestyle=":", label="uniform")
        axis.set(xlabel="rank of the code", ylabel=f"share of {name}", title=f"{name}, n = {len(chosen)}")
        axis.legend(fontsize=8)
    return _save(figure, folder, "codes.png", f"How often each of the {size} codes of a position is used")


def plot_neighbours(folder: Path, lines: list[list[np.ndarray]], names: list[str], side: int = 90) -> tuple[str, str]:
    """A line a window: in1, out1, in2, the truth, and the outputs nearest to z_hat; boxed in green where they are the truth."""
    count = len(lines[0])
    titles = ["in1", "out1", "in2", "truth out2", *(f"nearest {i + 1}" for i in range(count - 4))]
    figure = Figure(figsize=(1.25 * count + 0.9, 1.22 * len(lines) + 0.6), layout="constrained")
    for i, (row, line) in enumerate(zip(figure.subplots(len(lines), count, squeeze=False), lines)):
        for j, (axis, grid) in enumerate(zip(row, line)):
            axis.imshow(_outlined(grid, side), interpolation="nearest")
            right = j > 3 and np.array_equal(grid, line[3])
            for spine in axis.spines.values():
                spine.set(color="tab:green" if right else "none", linewidth=3)
            axis.set(xticks=[], yticks=[], title=titles[j] if i == 0 else None)
        row[0].set_ylabel(shown(names[i]), fontsize=8)
    return _save(figure, folder, "neighbours.png", "Windows of unseen tasks: context, truth, and the five outputs nearest to z_hat (green: the truth)", dpi=70)


def _outlined(grid: np.ndarray, side: int) -> np.ndarray:
    """`draw`, on light grey where there is no cell, so that black and white grids have an edge."""
    height, width = np.array(grid.shape) * (side // max(grid.shape))
    picture = np.full((side, side, 3), 235, np.uint8)
    picture[:height, :width] = draw(grid, side)[:height, :width]
    return picture


def plot_symbols(folder: Path, codes: np.ndarray, kind: np.ndarray, tokens, size: int, shown: int = 24, examples: int = 8) -> tuple[str, str]:
    """The most used codes (position, code) and the objects that bear them, the most frequent first."""
    places = [(np.bincount(column, minlength=size), position) for position, column in enumerate(codes.T)]
    ranked = sorted(((int(n), position, code) for counts, position in places for code, n in enumerate(counts)), reverse=True)[:shown]
    figure = Figure(figsize=(14, 0.62 * -(-shown // 2) + 0.6), layout="constrained")
    axes = figure.subplots(-(-shown // 2), 2 * examples)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for place, (count, position, code) in enumerate(ranked):
        bearers = np.flatnonzero(codes[:, position] == code)
        names, first, often = np.unique(kind[bearers], return_index=True, return_counts=True)
        row = axes[place % len(axes), place // len(axes) * examples:][:examples]
        row[0].set_ylabel(f"{position}:{code}\n{count} of\n{len(names)} kinds", rotation=0, ha="right", va="center", fontsize=7)
        for axis, i in zip(row, np.argsort(-often, kind="stable")):
            axis.imshow(_outlined(_object(tokens, bearers[first[i]]), 48), interpolation="nearest")
            axis.set_xlabel(f"x {often[i]}", fontsize=6, labelpad=1)
    figure.suptitle("code (position:code, objects, distinct objects) and its bearers, with how often each occurs", fontsize=10)
    return _save(figure, folder, "symbols.png", f"The {shown} most used codes and objects that bear them; a whole grid's token shows what is not background", dpi=90)


def _object(tokens, i: int) -> np.ndarray:
    """The cells of token i, in its colour; the cells of a whole grid that are not background, in grey."""
    height, width = tokens.box[i, 2:]
    bits = np.unpackbits(tokens.bitmaps[tokens.shape[i]], count=SIDE * SIDE).reshape(SIDE, SIDE)[:height, :width].astype(bool)
    return np.where(bits, 5 if i in tokens.start else tokens.colour[i], PAD)


def plot_map(folder: Path, x: np.ndarray, kinds: np.ndarray, names: list[str], what: str, most: int = 10) -> tuple[str, str]:
    """Two principal components x (n, 2) of pairs, in colours for the `most` frequent kinds (n,); -1 has no colour."""
    figure = Figure(figsize=(8.6, 6), layout="constrained")
    axis = figure.subplots()
    found, counts = np.unique(kinds[kinds >= 0], return_counts=True)
    chosen = found[np.argsort(-counts, kind="stable")[:most]]
    rest = ~np.isin(kinds, chosen)
    axis.scatter(*x[rest].T, s=6, color="lightgrey", label=f"another {what}, or none")
    for number, kind in enumerate(chosen):
        axis.scatter(*x[kinds == kind].T, s=14, color=f"C{number}", label=shown(names[kind]))
    axis.set(xlabel="first principal component", ylabel="second principal component", title=f"pairs by (z_in, z_out, z_out - z_in), {len(x)} of them")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title=f"{what} (the {len(chosen)} with most pairs)")
    return _save(figure, folder, "map.png", f"Pairs of unseen tasks on two axes, coloured by {what}")


CURVES = (("figures of unseen tasks", ("ndcg10_without_out1", "within_task")), ("loss of a step", ("loss",)), ("loss on unseen tasks (mean weights)", ("validation_loss",)),
          ("gradient norm", ("grad_norm",)), ("effective rank", ("effective_rank_context", "effective_rank_target")), ("share of codes", ("codes_usage", "codes_perplexity")))


def plot_training(folder: Path, runs: dict[str, list[dict]]) -> tuple[str, str]:
    """Figures over training, of one run or of several in one figure: a colour a run, a line style a figure."""
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).ravel(), CURVES):
        for number, log in enumerate(runs.values()):
            for key, style in zip(keys, ("-", "--")):
                points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
                axis.plot(*zip(*points or [(np.nan, np.nan)]), style, color=f"C{number}")
        axis.set(xlabel="step", ylabel=title, yscale="log" if "loss" in title or "norm" in title else "linear")
        lines = [axis.plot([], [], style, color="black", label=key)[0] for key, style in zip(keys, ("-", "--"))]
        axis.legend(handles=lines, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    figure.legend([figure.axes[0].plot([], [], color=f"C{number}")[0] for number in range(len(runs))], [shown(name) for name in runs], loc="outside lower center", ncols=6)
    return _save(figure, folder, "training.png", "Figures over training")


def _save(figure: Figure, folder: Path, name: str, about: str, dpi: int = 75) -> tuple[str, str]:
    save_figure(figure, folder / name, dpi)
    return name, about


# ---------------------------------------------------------------------------------------------- alerts and verdicts

STALL = 10  # looks
ALERTS = {  # what the recorded runs were to be stopped for: figure, when it is bad by its values so far, the worst of them
    "code usage below 8 % at three looks in a row": ("codes_usage", lambda v: len(v) > 2 and max(v[-3:]) < 0.08, min),
    "code usage below 5 %": ("codes_usage", lambda v: v[-1] < 0.05, min),
    "effective rank of the context below 3": ("effective_rank_context", lambda v: v[-1] < 3, min),
    "effective rank of the target below 5": ("effective_rank_target", lambda v: v[-1] < 5, min),
    "gradient norm above 30 at five logged steps in a row": ("grad_norm", lambda v: len(v) > 4 and min(v[-5:]) > 30, max),
    "validation loss above twice that of the look before": ("validation_loss", lambda v: len(v) > 1 and v[-1] > 2 * v[-2], max),
    f"no better nDCG@10 without out1 in {STALL} looks": ("ndcg10_without_out1", lambda v: len(v) > STALL and max(v[-STALL:]) <= max(v[:-STALL]), max)}
ALERT_STATUS = 3  # exit status of a run that --stop-on-alert ended
HYPER_PARAMETERS = ("lam", "learning rate", "weight decay", "batch size", "steps", "dropout", "objects a grid", "levels of the code",
                    "reach of the mean of the weights")  # every constant but sizes that other data might need changed


class Alerts:
    """Watches the figures of a run, whether it is under way or read from its log."""

    def __init__(self, rows=()):
        self.seen, self.tripped, self.lines = {}, {}, []  # figure -> values; alert -> step; every line so far
        for row in rows:
            self.feed(row)

    def feed(self, row: dict) -> list[str]:
        """A line for each alert that the figures of a log line trip or clear."""
        lines = []
        for key in {key for key, _, _ in ALERTS.values()}:
            if row.get(key) is not None:
                self.seen.setdefault(key, []).append(row[key])
        for name, (key, bad, _) in ALERTS.items():
            if row.get(key) is None or bad(self.seen[key]) == (name in self.tripped):
                continue
            if name in self.tripped:
                lines.append(f"clear at step {row['step']}: {name} since step {self.tripped.pop(name)}, now {key} {row[key]:.4g}")
            else:
                self.tripped[name] = row["step"]
                lines.append(f"alert at step {row['step']}: {name}: {key} {row[key]:.4g}")
        self.lines += lines
        return lines


def verdicts(log: list[dict], result: dict, lam: float, record: dict, figures: dict) -> list[tuple[str, bool | None, str]]:
    """Each criterion that the recorded runs were to meet, and each alert: name, whether it passes (None: not known), its figure."""
    found, alerts = [], Alerts(log)

    def judge(name: str, values, passes: Callable, text: str):
        known = all(value is not None for value in values)
        found.append((name, bool(passes(*values)) if known else None, text.format(*values) if known else "not recorded"))

    looks = [row["validation_loss"] for row in log if row.get("validation_loss")]
    usage = [row["codes_usage"] for row in log if row.get("codes_usage") is not None]
    usage = usage[len(usage) // 4:]
    ratio = max((b / a for a, b in zip(looks, looks[1:])), default=None)
    last = log[-10:]  # shares of the loss, as the mean of some lines
    share = {term: np.mean([weight * row[term] / row["loss"] for row in last]) if last else None
             for term, weight in (("prediction", 1 - lam), ("sigreg", lam))}
    codes = record["codes"]
    judge("100 epochs", [result.get("epochs")], lambda n: n >= 100, "{:.0f}")
    judge("no spike: no look's validation loss above 2 x the one before", [ratio], lambda r: r <= 2, "at most {:.2f} x")
    judge("code usage above 25 %, from a quarter of the run on", [min(usage, default=None)], lambda u: u > 0.25, "lowest {:.1%}")
    judge("code usage steady: falls by less than 10 points from any look to a later one", [_largest_fall(usage)], lambda d: d < 0.1, "{:.1%}")
    for role, low in (("context", 15), ("target", 20)):
        judge(f"effective rank of the {role} at least {low}", [record[role]["effective_rank"]], lambda r: r >= low, "{:.1f}")
    judge("gradient norm: mean below 50", [result.get("grad_norm_mean")], lambda g: g < 50, "{:.1f}")
    judge("gradient norm: maximum below 150", [result.get("grad_norm_max")], lambda g: g < 150, "{:.1f}")
    judge("no loss term above 90 % of the loss", share.values(), lambda *s: max(s) <= 0.9, "prediction {:.0%}, SIGReg {:.0%} at the end")
    judge("fewer than 10 hyper-parameters", [len(HYPER_PARAMETERS)], lambda n: n < 10, "{}: " + ", ".join(HYPER_PARAMETERS))
    judge("codes that other programs can read", [codes.get("codes_n_by_occurrence", 0)], lambda n: n > 0, "python eval.py codes: {} objects")
    judge("a shuffled context falls to or below the copy, nDCG@10 without out1",
          [record["shuffled_ndcg10_without_out1"], figures["ndcg10_without_out1"]["floors"]["copy in2, trained"]], lambda a, b: a <= b, "{:.3f}, copy {:.3f}")
    for name, (key, _, worst) in ALERTS.items():
        tripped = [line.split(":")[0] for line in alerts.lines if name in line]
        judge(f"no alert: {name}", [worst(alerts.seen[key]) if key in alerts.seen else None], lambda _: not tripped,
              f"{'; '.join(tripped) or 'never'}; {'lowest' if worst is min else 'highest'} {{:.3g}}")
    return found


def _largest_fall(values: list[float]) -> float | None:
    return max((a - b for i, a in enumerate(values) for b in values[i:]), default=None)


# ---------------------------------------------------------------------------------------------- pages


def table(figures: dict, metrics: tuple) -> list[list[str]]:
    """Cells of a table: a line for the model, its interval, and each floor that has one of the metrics."""
    show = lambda value: "" if value is None else f"{value:.3f}"
    entries = [figures[metric] for metric in metrics]
    lines = [["", *metrics], ["model", *(show(entry["model"]) for entry in entries)],
             ["95 %", *("[{:.3f}, {:.3f}]".format(*entry["interval"]) if entry["interval"] else "" for entry in entries)]]
    names = list(dict.fromkeys(name for entry in entries for name in entry["floors"]))
    return lines + [[name, *(show(entry["floors"].get(name)) for entry in entries)] for name in names] + [["n", *(str(entry["n"]) for entry in entries)]]


def plain(cells: list[list[str]]) -> str:
    """A table for the screen: the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip() for line in cells)


def markdown(cells: list[list[str]]) -> str:
    head, *lines = ("| " + " | ".join(line) + " |" for line in cells)
    return "\n".join([head, "|" + " --- |" * len(cells[0]), *lines])


def health_cells(health: dict) -> list[list[str]]:
    """Two columns, figure and value, of everything in health.json but the probes of each labeling."""
    show = lambda value: "not known" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    cells = [["figure", "value"], ["ndcg10_without_out1 of a shuffled context", show(health["shuffled_ndcg10_without_out1"])]]
    cells += [[f"cross-entropy in nats, {name}", show(value)] for name, value in
              {"z_hat": health["cross_entropy"]["model"], **health["cross_entropy"]["floors"], "ln(pool)": health["cross_entropy"]["ln_pool"]}.items()]
    for role in ("context", "target"):
        cells += [[f"{role}: {name}", show(value)] for name, value in health[role].items()]
    return cells + [[name, show(value)] for name, value in health["codes"].items()]


def probe_cells(probes: dict[str, dict]) -> list[list[str]]:
    """The linear probe, labeling by labeling, for the model and each floor."""
    names = list(probes["model"])
    return [["linear probe", *names], *([row, *(f"{means[name]['probe_linear']:.3f}" for name in names)] for row, means in probes.items())]


def page(title: str, notes: list[str], tables: list, verdicts: list[str], health: dict, pictures: list[tuple[str, str]]) -> str:
    """report.md: verdicts, tables, health and pictures."""
    parts = [f"# {title}", *(f"- {note}" for note in notes), "## Verdicts", "\n".join(f"    {line}" for line in verdicts), "## Figures",
             "The model answers retrieval with z_hat, and questions about pairs with (z_in, z_out, z_out - z_in). Intervals are bootstraps over tasks; "
             "probes are balanced accuracies in 10 folds grouped by task.", *(markdown(table) for table in tables)]
    if health["probes"]["model"]:
        parts.append(markdown(probe_cells(health["probes"])))
    parts += ["## Health", markdown(health_cells(health)), "## Pictures", *(f"{about}.\n\n![{about}]({name})" for name, about in pictures)]
    return "\n\n".join(parts) + "\n"


def compare_text(result: dict, first: str) -> str:
    """The page of a comparison: each run's figures, differences from the first with paired intervals, and agreement of codes."""
    runs = result["runs"]
    show = lambda entry: "{:.3f} [{:.3f}, {:.3f}]".format(entry["value"], *entry["interval"])
    lines = [f"Runs on {result['data']}; in brackets 95 % intervals over tasks, paired where they are of a difference from {first}.\n",
             markdown([["run", *runs[first]], *([name, *(show(values[metric]) for metric in runs[first])] for name, values in runs.items())]), ""]
    others = {name: values for name, values in runs.items() if name != first}
    if others:
        show = lambda entry: "{:+.3f} [{:+.3f}, {:+.3f}]".format(*entry["difference"])
        lines += [markdown([[f"minus {first}", *runs[first]], *([name, *(show(values[metric]) for metric in runs[first])] for name, values in others.items())]), ""]
    lines += ["Codes of distinct objects, {} and {}: {:.1%} agree up to a greedy matching of codes; {:.1%} by chance.\n".format(first, name, *values["codes"].values())
              for name, values in others.items() if "codes" in values]
    return "\n".join(lines)
