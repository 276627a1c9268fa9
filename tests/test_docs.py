"""The pages against the records, and every file against the sizes and imports that the project promises.

Run as a program, this file prints the row of a finished run, to be appended to the history:

    python tests/test_docs.py runs/NAME >> runs/history.jsonl
"""
import ast
import datetime
import fnmatch
import functools
import graphlib
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs"
PAGES = ("README.md", "runs/README.md", "runs/LOG.md")
MAX_COLUMNS = 110

# Headings of tables in plain words, and the figure of a row of history.jsonl that each stands for.
LABELS = {
    "nDCG@10": "ndcg10", "nDCG@10 without out1": "ndcg10_without_out1", "R@1": "r1", "MRR": "mrr",
    "within-task": "within_task", "shuffled context": "shuffled_ndcg10_without_out1",
    "analogy": "analogy_ndcg10_without_out1",
    "lead over the analogy": "lead_over_analogy_ndcg10_without_out1",
    "rank of z": "effective_rank_target", "rank of z_hat": "effective_rank_context",
    "code usage": "codes_usage", "code perplexity": "codes_perplexity", "SIGReg / null": "sigreg_over_null",
    "grad norm, mean": "grad_norm_mean", "grad norm, max": "grad_norm_max", "windows/s": "samples_per_s",
    "hard R@1": "hard_r1", "hard nDCG@10": "hard_ndcg10", "nearest pair": "task_1nn",
    "linear probe": "probe_linear", "k-NN probe": "probe_knn", "cross-entropy": "cross_entropy",
    "training nDCG@10 without out1": "train_ndcg10_without_out1",
    "all demonstrations": "all_demonstrations", "all demonstrations, R@1": "all_demonstrations_r1",
    "size": "decoded_size", "colours": "decoded_colours", "cells": "decoded_cells",
}
LABELS |= {f"ARC-AGI-2 {label}": f"arcagi2_{name}" for label, name in LABELS.items()}
WORDS = ("what", "target")                                    # columns of text
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}           # 97.5 % quantile for that many seeds
RETRIEVAL = ("ndcg10", "ndcg10_without_out1", "within_task")
NO_FLAGS = ("run", "resume", "profile", "stop_on_alert", "device", "command", "commit", "device_name",
            "python", "torch", "numpy")


# ---- records ---------------------------------------------------------------------------------------------

def read(path):
    return json.loads(path.read_text())


def baselines(record):
    """The baselines of a result or of a metric; the oldest records call them floors."""
    return record["baselines"] if "baselines" in record else record["floors"]


def history_row(folder):
    """What history.jsonl keeps of a run: its command, settings and scalar figures."""
    config, result = read(folder / "config.json"), read(folder / "result.json")
    row = {"run": folder.name, "command": config["command"], "commit": config["commit"]}
    row["device"] = config["device_name"]
    for name in ("python", "torch", "numpy"):
        row[name] = config[name]
    row["flags"] = {name: value for name, value in config.items() if name not in NO_FLAGS}
    for name, value in result.items():
        if isinstance(value, (dict, list)) or name == "device" or name.startswith(("cosine_", "whitened_")):
            continue
        row[name.replace("floor_", "baseline_")] = value
    for metric in RETRIEVAL:
        row[f"interval_{metric}"] = result["intervals"][metric]
        row[f"analogy_{metric}"] = baselines(result)["analogy, trained"][metric]
        row[f"lead_over_analogy_{metric}"] = result["lead"]["analogy, trained"][metric]
    if (folder / "eval.json").exists():
        for metric, entry in read(folder / "eval.json").items():
            if "model" in entry and metric not in row:
                row[metric] = entry["model"]
    if (folder / "health.json").exists():
        row["cross_entropy"] = read(folder / "health.json")["cross_entropy"]["model"]
    second = folder / "eval-arcagi2-evaluation" / "eval.json"
    for metric, entry in (read(second) if second.exists() else {}).items():
        if "model" in entry:
            row[f"arcagi2_{metric}"] = entry["model"]
    return row


def history():
    """{run: row} of history.jsonl."""
    rows = [json.loads(line) for line in (RUNS / "history.jsonl").read_text().splitlines()]
    return {row["run"]: row for row in rows}


def tracked_folders():
    """The run folders that are part of the project; what a reader's own runs leave is not."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "runs"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return {name.split("/")[1] for name in names if name.count("/") > 1 and (ROOT / name).exists()}


# ---- tables ----------------------------------------------------------------------------------------------

def tables(page):
    """(heading cells, rows of cells) of each table of a page."""
    lines = (ROOT / page).read_text().splitlines()
    found, names = [], None
    for line in lines:
        if not line.startswith("|"):
            names = None
            continue
        cells = [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]
        cells[0] = re.sub(r"^\[(.*)\]\(.*\)$", r"\1", cells[0])           # a link stands for its text
        if names is None:
            names = cells
            found.append((names, []))
        elif not cells[0].startswith("---"):
            found[-1][1].append(cells)
    return found


def numbers(cell):
    """The numbers of a cell, each with its count of decimals."""
    texts = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", cell)
    return [(float(text.replace(",", "")), len(text.partition(".")[2])) for text in texts]


def agree(cell, values, where):
    """Each number of a cell is the value of its place, rounded; a share may be printed as a percentage."""
    printed = numbers(cell)
    scale = 100 if cell.endswith("%") else 1
    assert len(printed) == len(values), (*where, cell, values)
    for (number, digits), value in zip(printed, values):
        assert abs(number - scale * value) <= 0.500001 * 10**-digits, (*where, cell, values)
    return len(printed)


def expected(rows, name):
    """The value of one run, or mean and half-width of the 95 % interval over seeds."""
    values = [row.get(name) for row in rows]
    if values == [None] * len(values):
        return None
    if len(values) == 1:
        return values[0] if isinstance(values[0], list) else values
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values), STUDENT[len(values)] * spread]


def check_run(page, names, cells, known):
    """A row that begins with a run, or with several or a pattern that stand for the seeds of one."""
    patterns = [name.strip("` ") for name in cells[0].split(",")]
    rows = [known[run] for pattern in patterns for run in fnmatch.filter(known, pattern)]
    pattern = patterns[0]
    assert rows, (page, pattern, "is no run of history.jsonl")
    values = dict(zip(names, cells))
    if "step" in values:
        step = int(values.pop("step"))
        lines = (RUNS / pattern / "log.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["step"] == step][-1:]
    checked = 0
    for name, cell in list(values.items())[1:]:
        if name.startswith(WORDS):
            continue
        if (RUNS / pattern / "bench.json").exists():
            checked += check_bench(page, pattern, cell)
            continue
        value = expected(rows, LABELS.get(name, name))
        if cell in ("—", ""):
            assert value is None, (page, pattern, name)
            continue
        assert value is not None, (page, pattern, name, "is no figure of this run")
        checked += agree(cell, value, (page, pattern, name))
    return checked


def check_bench(page, run, cell):
    """Each number of a cell stands in the tables of that measurement."""
    measured = [value for value, _ in numbers((RUNS / run / "bench.json").read_text())]
    for number, digits in numbers(cell):
        assert any(abs(number - value) <= 0.500001 * 10**-digits for value in measured), (page, run, cell)
    return len(numbers(cell))


def check_lead(page, names, cells):
    """A row of a table of leads: a baseline, then the lead of each run with its interval."""
    checked = 0
    for run, cell in zip(names[1:], cells[1:]):
        lead = read(RUNS / run.strip("`") / "result.json")["lead"][cells[0]]["ndcg10_without_out1"]
        checked += agree(cell, lead, (page, run, cells[0]))
    return checked


def check_metric(page, names, cells):
    """A row of a table about one run: a metric, the model's value with its interval, and baselines."""
    folder, metric = RUNS / names[0].strip("`"), LABELS[cells[0]]
    entry = read(folder / "eval.json")[metric]
    values = {name: value for name, value in entry["baselines"].items() if not name.startswith("copy in2,")}
    values = {name.removeprefix("analogy, "): value for name, value in values.items()}
    checked = agree(cells[1], [entry["model"], *entry["interval"]], (page, metric))
    for name, cell in zip(names[2:], cells[2:]):
        if cell != "—":
            checked += agree(cell, [values[name]], (page, metric, name))
    return checked


def test_every_figure_in_the_tables_equals_the_record_of_its_run():
    known, checked = history(), 0
    for page in PAGES:
        for names, rows in tables(page):
            for cells in rows:
                if names[0] == "lead over":
                    checked += check_lead(page, names, cells)
                elif (RUNS / names[0].strip("`") / "eval.json").exists():
                    checked += check_metric(page, names, cells)
                elif names[0] == "run" or fnmatch.filter(known, cells[0].strip("`")):
                    checked += check_run(page, names, cells, known)
    assert checked > 150


def test_the_rule_without_labels_has_the_rank_correlations_of_its_runs():
    rows = [row for name, row in history().items() if name.startswith("rule-")]
    y, other = ([row[key] for row in rows] for key in ("ndcg10_without_out1", "arcagi2_ndcg10_without_out1"))
    scores, others = ([-row[key] for row in rows] for key in ("label_free", "arcagi2_label_free"))
    loss = [-row["training_loss"] / row["flags"]["lam"] ** 0.4 for row in rows]
    found = [f"{spearmanr(a, b)[0]:.2f}" for a, b in (
        (scores, y), (others, other), (scores, other), (loss, y), (loss, other))]
    text = " ".join((RUNS / "LOG.md").read_text().split())
    assert len(rows) == 24
    assert "rule) {3}; {4}. Prediction".format(*found) in text
    assert "at equal weights {0}; {1}, measured on dev against ARC-AGI-2 {2}.".format(*found) in text
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "is {0} on dev, and {2} between".format(*found) in text
    assert "authors, is {3} (".format(*found) in text


def test_the_figures_of_longer_runs_in_the_readme_are_recorded():
    rows = [history()[name] for name in ("default", *(f"longer-{n}" for n in (1000, 2000, 4000, 6000)))]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "is " + ", ".join(f"{row['ndcg10_without_out1']:.3f}" for row in rows) + ". On training" in text
    for name in ("train_without_out1", "train_shuffled_without_out1"):
        assert f"from {rows[0][name]:.3f} to {rows[-1][name]:.3f}" in text


def test_the_figures_of_three_seeds_on_dev_in_the_readme_are_recorded():
    means = [statistics.mean([history()[f"dev-{name}-seed{seed}"]["ndcg10_without_out1"] for seed in range(3)])
             for name in ("lejepa", "infonce")]
    assert "{:.3f}, {:.3f} on the development split".format(*means) in " ".join(
        (ROOT / "README.md").read_text().split())


def test_the_tables_of_the_autopsy_equal_the_records():
    known, checked = history(), 0
    pattern = r"^\| `([\w-]+)` \| (\S+) \| (\S+) \| (\S+) \| (\d+) / (\d+) \|"
    for name, *cells in re.findall(pattern, (RUNS / "autopsy.md").read_text(), re.MULTILINE):
        row = known["autopsy-" + name]
        assert cells[:3] == [f"{row[key]:.3f}" for key in (
            "ndcg10_without_out1", "within_task", "all_demonstrations")], name
        ranks = [row[f"effective_rank_{role}"] for role in ("context", "target")]
        assert cells[3:] == [f"{rank:.0f}" for rank in ranks], name
        checked += 1
    assert checked > 50


# ---- the history and the folders -------------------------------------------------------------------------

def test_each_line_of_the_history_names_run_commit_and_flags_and_uses_the_words_of_now():
    lines = (RUNS / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["run"] for row in rows}) == len(rows)
    for row in rows:
        assert re.match(r"[0-9a-f]{7,40}\b", row["commit"]), row["run"]
        assert "command" in row or "flags" in row, row["run"]
        assert not [name for name in row if re.match("floor|cosine_|whitened_", name)], row["run"]
        assert not row.get("sketch") or row["note"], row["run"]


def test_the_row_of_a_kept_run_equals_its_config_and_result():
    known = history()
    folders = [RUNS / name for name in tracked_folders() if (RUNS / name / "result.json").exists()]
    for folder in folders:
        row = history_row(folder)
        assert row == {name: known[folder.name][name] for name in row}, folder.name
    assert len(folders) > 5


def test_no_kept_record_names_a_path_of_a_machine():
    kept = [path for name in tracked_folders() for path in (RUNS / name).rglob("*.json*")]
    for path in [*kept, RUNS / "history.jsonl", *RUNS.glob("*.md")]:
        assert not re.search("/(root|home|tmp|work)/", path.read_text()), path
    assert len(kept) > 10


def test_the_page_of_results_has_at_most_150_lines_and_links_every_run_folder():
    text = (RUNS / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    linked = {link.split("/")[0] for link in re.findall(r"\]\(([^)#:]+/[^)#:]*)\)", text)} - {".."}
    assert linked == tracked_folders()


def test_an_experiment_of_the_log_takes_a_heading_and_five_lines_and_the_newest_stand_first():
    text = (RUNS / "LOG.md").read_text()
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    dates = [re.match(r"(\d{4}-\d\d-\d\d) · \S", entry)[1] for entry in entries]
    assert len(entries) > 40 and dates == sorted(dates, reverse=True)
    for entry in entries:
        assert 3 <= len(entry.strip().splitlines()) <= 6, entry
    named = re.findall(r"`(sketch\d-\d+)`", text)
    assert named and set(named) <= set(history())


# ---- pages and files -------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES[:2])
def test_every_file_that_a_page_links_is_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    links = [link for link in links if "://" not in link]
    assert links
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "\n    pip install -r requirements.txt && python lejepa.py\n" in text
    assert "\n    pip install -r requirements.txt && pytest\n" in text


def sources(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def length(path):
    return len(path.read_text().splitlines())


CODE = ("*.py", "harness/*.py", "examples/*.py")


@pytest.mark.parametrize("path", sources(*CODE), ids=module_name)
def test_no_line_is_longer_than_110_columns(path):
    lines = path.read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]


def test_lejepa_has_at_most_650_lines_of_method_and_150_below_the_line():
    lines = (ROOT / "lejepa.py").read_text().splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("# The method ends here")]
    assert len(ends) == 1, "one line of lejepa.py reads '# The method ends here'"
    assert ends[0] <= 650 and len(lines) - ends[0] - 1 <= 150


@pytest.mark.parametrize("pattern, most", [("arc_data.py", 486), ("eval.py", 550), ("legacy.py", 495),
                                           ("examples/*.py", 250)])
def test_a_file_keeps_to_its_lines(pattern, most):
    too_long = {path.name: length(path) for path in sources(pattern) if length(path) > most}
    assert not too_long


def test_the_harness_has_at_most_3160_lines_in_all():
    assert sum(length(path) for path in sources("harness/*.py")) <= 3160


def test_a_slow_test_is_marked_whole_too_so_that_a_quick_run_leaves_it_out():
    for path in sources("tests/*.py"):
        lines = path.read_text().splitlines()
        slow = [number for number, line in enumerate(lines) if line == "@pytest.mark.slow"]
        assert all(lines[number + 1] == "@pytest.mark.whole" for number in slow), path.name


# ---- imports ---------------------------------------------------------------------------------------------

ARROWS = {
    "arc_data": set(),
    "lejepa": {"arc_data"},
    "eval": {"lejepa", "arc_data"},
    "legacy": {"lejepa", "arc_data"},
    "examples": {"lejepa", "arc_data"},
    "harness": {"harness", "eval", "lejepa", "arc_data"},
}
PACKAGES = {"torch", "numpy", "safetensors"}        # all that the method needs to be imported


def imports(body, package):
    """(imported module, in the body of which function or None) of a list of statements."""
    for node in body:
        yield from imports_of(node, package, None)


def imports_of(node, package, function):
    if isinstance(node, ast.Import):
        yield from ((alias.name, function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(part for part in (package if node.level else "", node.module) if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            is_module = (ROOT / (inner.replace(".", "/") + ".py")).exists()
            yield (inner if is_module else base), function
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        function = function or node.name
    for child in ast.iter_child_nodes(node):
        yield from imports_of(child, package, function)


@functools.cache
def graph():
    """{module: [(imported module, function or None)]} of the project's code."""
    found = {}
    for path in sources(*CODE):
        package = path.parent.name if path.parent != ROOT else ""
        found[module_name(path)] = list(imports(ast.parse(path.read_text()).body, package))
    return found


def test_module_level_imports_have_no_circle():
    modules = graph()
    arrows = {name: {other for other, function in found if function is None and other in modules}
              for name, found in modules.items()}
    graphlib.TopologicalSorter(arrows).prepare()       # raises CycleError


def test_imports_run_along_the_arrows_and_lejepa_and_eval_reach_the_harness_in_main_alone():
    modules = graph()
    for name, found in modules.items():
        top = name.split(".")[0]
        for other, function in found:
            if other.split(".")[0] not in {module.split(".")[0] for module in modules}:
                continue
            in_main = top in ("lejepa", "eval") and function == "main"
            looked_up = name == "lejepa" and other == "legacy" and function == "__missing__"
            assert in_main or looked_up or other.split(".")[0] in ARROWS.get(top, ()), (name, other, function)


@pytest.mark.parametrize("name", ["lejepa", "arc_data"])
def test_the_method_imports_torch_numpy_and_safetensors_alone(name):
    outside = {other.split(".")[0] for other, function in graph()[name] if function is None}
    assert outside - set(sys.stdlib_module_names) - {"arc_data"} <= PACKAGES


if __name__ == "__main__":
    new = history_row(Path(sys.argv[1]).resolve())
    print(json.dumps({**new, "date": datetime.date.today().isoformat()}))
