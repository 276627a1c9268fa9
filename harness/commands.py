"""The commands of eval.py: what they read, what they print and what they write.

    n rows   k demonstrations   P distinct outputs
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

import arc_data
import eval as evaluation
import lejepa
from harness import checkpoint, report
from harness.checkpoint import write_file

RANKED = {"accuracy@1": "r1", "accuracy@2": "r2", "nDCG@10": "ndcg10"}  # metrics of candidates, and their names in eval.py
RANKED_BASELINES = {"copy in2": ("raw",), "analogy": ("raw", "31 features", "raw + 31 features")}


# ---------------------------------------------------------------------------------------------- what is read


def say(line: str):
    print(line, file=sys.stderr, flush=True)


def read_tasks(cfg, source: str) -> tuple[dict, int | None]:
    """The tasks of --data, and how many share a pair with the run's training tasks: None where these cannot be read."""
    if source == "dev":
        return arc_data.split(cfg.data, cfg.validate)[1], 0
    tasks = arc_data.load_tasks(source)
    try:
        trained = arc_data.split(cfg.data, cfg.validate)[0]
    except (ValueError, OSError) as error:
        say(f"not checked whether the tasks are unseen: {error}")
        return tasks, None
    return tasks, len(arc_data.without_leaks(tasks, trained)[1])


def read_labels(path: Path, tasks: dict) -> dict[str, str]:
    """{task id: class name} of a JSON file. ValueError for another form, or for tasks that the data do not have."""
    labels = checkpoint.read_json(path)
    if not labels or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"--labels {path}: needs a JSON object {{task id: class name}}, its names strings")
    unknown = [name for name in labels if name not in tasks]
    if unknown:
        raise ValueError(f"--labels {path}: {len(unknown)} tasks are not in --data, {', '.join(unknown[:3])} among them")
    if len(set(labels.values())) < 2:
        raise ValueError(f"--labels {path}: all tasks have one class; a probe needs two")
    return labels


def read_candidates(path: Path, tasks: dict) -> dict[str, list]:
    """{task id: [for each test input, [candidate grids as arrays]]} of a JSON file. ValueError names what is wrong."""
    found = {}
    for task_id, inputs in checkpoint.read_json(path).items():
        where = f"--candidates {path}, task {arc_data.printable(task_id)}"
        if task_id not in tasks:
            raise ValueError(f"{where}: not in --data; give candidates of tasks that the data have")
        count = len(tasks[task_id].test)
        if not isinstance(inputs, list) or len(inputs) != count:
            raise ValueError(f"{where}: needs a list with an entry for each test input, {count} of them")
        for number, grids in enumerate(inputs):
            if not isinstance(grids, list) or not grids:
                raise ValueError(f"{where}, test input {number}: needs a list of one candidate grid or more")
            name = f"{where}, test input {number}, candidate {{}}".replace
            grids = lejepa.validate_grids(grids, lambda i: name("{}", str(i)))
            found.setdefault(task_id, []).append([grid.astype(np.int8) for grid in grids])
    if not found:
        raise ValueError(f"--candidates {path}: no task; needs {{task id: [for each test input, [grid, ...]]}}")
    return found


def check_writable(path: Path):
    """ValueError before any work where `path`, a folder or file that may not exist yet, cannot be written."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        raise ValueError(f"{path}: cannot be written; give another --out")


def choose_folder(run: Path, source: str) -> Path:
    """RUN, if it holds no evaluation of other data; else a folder in it that is named after the data."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", source).strip("-.")[-60:]
    for folder in (run, run / f"eval-{slug}"):
        try:
            known = checkpoint.read_json(folder / "eval.json")["data"]["source"]
        except FileNotFoundError:
            return folder
        except (ValueError, KeyError, TypeError):
            continue
        if known == source:
            return folder
    return run / f"eval-{slug}-{hashlib.sha1(source.encode()).hexdigest()[:6]}"


def to_json(value) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def table(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip() for line in cells)


# ---------------------------------------------------------------------------------------------- eval.py RUN


def evaluate_run(args):
    model, cfg = lejepa.load_run(args.run)
    tasks, shared = read_tasks(cfg, args.data)
    labels = read_labels(args.labels, tasks) if args.labels else None
    out = args.out or choose_folder(args.run, args.data)
    check_writable(out)
    log, result, config = checkpoint.read_log(args.run), *(read_record(args.run / f"{name}.json") for name in ("result", "config"))
    done = evaluation.evaluate(model, lejepa.build(cfg).eval(), tasks, source=args.data, labels=labels, shared=shared,
                               progress=say)
    out.mkdir(parents=True, exist_ok=True)
    seconds = report.number(result.get("seconds"))
    facts = {"run": args.run.absolute().name, "trained on": cfg.data, "validated on": cfg.validate, "objective": cfg.objective,
             "code": cfg.code, "size": cfg.size, "lam": cfg.lam, "seed": cfg.seed, "steps": result.get("steps"),
             "minutes": None if seconds is None else round(seconds / 60, 1), "device": result.get("device"),
             "commit": config.get("commit")}
    met = report.criteria(log, result, cfg.lam, done)
    record = {name: {"met": ok, "figure": text} for name, ok, text in met}
    write_file(out / "eval.json", to_json({"data": done.data} | done.metrics))
    write_file(out / "health.json", to_json({"data": done.data} | done.health | {"criteria": record}))
    page = report.write_report(out, done, facts, log, result)
    lines = [*done.data["notes"], "", *(metric_table(done.metrics, names) + "\n" for names in
                                        (evaluation.RETRIEVAL, evaluation.DEMONSTRATIONS | dict.fromkeys(evaluation.HARD),
                                         evaluation.PAIRWISE))]
    lines += [f"{'unknown' if ok is None else 'met' if ok else 'not met':8} {name}: {text}" for name, ok, text in met]
    print("\n".join([*lines, f"written: {out / 'eval.json'}, {out / 'health.json'}, {page}"]))


def read_record(path: Path) -> dict:
    return checkpoint.read_json(path) if path.exists() else {}


def metric_table(metrics: dict, names) -> str:
    """The model with its intervals, then every baseline that has one of the metrics."""
    show = lambda value: "" if value is None else f"{value:.3f}"
    entries = [metrics[name] for name in names]
    rows = list(dict.fromkeys(row for entry in entries for row in entry["baselines"]))
    intervals = ["[{:.3f}, {:.3f}]".format(*entry["interval"]) if entry["interval"] else "" for entry in entries]
    return table([["", *names], ["model", *(show(entry["model"]) for entry in entries)], ["95 %", *intervals],
                  *([row, *(show(entry["baselines"].get(row)) for entry in entries)] for row in rows),
                  ["n", *(str(entry["n"]) for entry in entries)]])


# ---------------------------------------------------------------------------------------------- eval.py codes


def write_codes(args):
    """A JSON line a grid: its objects with codes, box, colour and size, the whole grid first. README.md has the format."""
    check_writable(args.out)
    model, cfg = lejepa.load_run(args.run)
    where, grids = [], []
    for task_id, task in read_tasks(cfg, args.data)[0].items():
        for split, pairs in (("train", task.train), ("test", task.test)):
            for number, pair in enumerate(pairs):
                for side, grid in zip(("input", "output"), pair):
                    if grid is not None:
                        where.append({"task": task_id, "split": split, "pair": number, "side": side})
                        grids.append(grid)
    tokens, lines = arc_data.tokenise(grids), []
    for line, start, (codes, boxes) in zip(where, tokens.start, model.codes(grids)):
        rows = slice(start, start + len(codes))
        columns = codes.tolist(), boxes.tolist(), tokens.colour[rows].tolist(), tokens.area[rows].astype(int).tolist()
        objects = [dict(zip(("codes", "box", "colour", "size"), values)) for values in zip(*columns)]
        lines.append(json.dumps(line | {"objects": objects}))
    write_file(args.out, ("\n".join(lines) + "\n").encode())
    say(f"{args.out}: {len(lines)} grids, {len(tokens.colour)} objects, {tokens.cut.sum()} more were cut")


# ---------------------------------------------------------------------------------------------- eval.py rank


def rank_candidates(args):
    """Candidate answers of test inputs, the likeliest first; with the answers, how often the model finds them."""
    for path in (args.out, *([args.submission] if args.submission else [])):
        check_writable(path)
    model, cfg = lejepa.load_run(args.run)
    tasks, shared = read_tasks(cfg, args.data)
    candidates = read_candidates(args.candidates, tasks)
    ranked, attempts, asked = {}, {}, []
    for task_id, inputs in candidates.items():
        ranked[task_id], attempts[task_id] = [], []
        for (given, answer), grids in zip(tasks[task_id].test, inputs):
            distinct = list({(grid.shape, grid.tobytes()): grid for grid in grids}.values())
            scores = model.rank(tasks[task_id].train, given, distinct).float().cpu()
            score_of = {(grid.shape, grid.tobytes()): score for grid, score in zip(distinct, scores.tolist())}
            rows = [{"grid": grid.tolist(), "score": score_of[grid.shape, grid.tobytes()]} for grid in grids]
            ranked[task_id].append(sorted(rows, key=lambda row: -row["score"]))
            best = [distinct[i].tolist() for i in scores.argsort(descending=True, stable=True)[:2]]
            attempts[task_id].append({"attempt_1": best[0], "attempt_2": best[-1]})
            asked.append((task_id, given, answer, distinct, scores))
    write_file(args.out, to_json(ranked))
    if args.submission:
        write_file(args.submission, to_json(attempts))
        if len(candidates) < len(tasks):
            say(f"{args.submission}: {len(candidates)} of {len(tasks)} tasks, as --candidates has no more")
    known = [question for question in asked if question[2] is not None]
    if known:
        say(f"{args.data}: {shared if shared is not None else 'not known how many'} of the {len(tasks)} tasks are in the training data")
        print(ranking_table(tasks, known, lejepa.build(cfg).eval()))
    say(f"written: {args.out}" + (f", {args.submission}" if args.submission else ""))


def ranking_table(tasks: dict, asked: list, untrained) -> str:
    """Accuracy and nDCG@10 of the model and of baselines by the same candidates. An absent answer counts 0."""
    rows = {"model": [scores for *_, scores in asked]}
    rows["untrained"] = [untrained.rank(tasks[task_id].train, given, grids) for task_id, given, _, grids, _ in asked]
    rows |= candidate_baselines(tasks, asked)
    answers = [[np.array_equal(grid, answer) for grid in grids] for _, _, answer, grids, _ in asked]
    owner = np.unique([task_id for task_id, *_ in asked], return_inverse=True)[1]
    cells = [["", *RANKED]]
    for name, scores in rows.items():
        values = {metric: [] for metric in RANKED}
        for row, right in zip(scores, answers):
            tie = evaluation.TIE if name not in ("model", "untrained") else 0
            margin = row - row[right] if any(right) else None
            found = evaluation.rank_metrics((margin > tie).sum()[None], (margin.abs() <= tie).sum()[None]) if any(right) else {}
            for metric, key in RANKED.items():
                values[metric].append(float(found[key]) if found else 0.0)
        cells.append([name, *("{:.3f} [{:.3f}, {:.3f}]".format(np.mean(x), *evaluation.bootstrap_ci(np.array(x), owner))
                              for x in values.values())])
    there = sum(any(right) for right in answers)
    return table(cells) + f"\n{len(asked)} test inputs with known answers, which are among the candidates of {there}"


def candidate_baselines(tasks: dict, asked: list) -> dict[str, list]:
    """Scores of every question's candidates by copies and analogies in raw cells and 31 features."""
    place = {}
    find = lambda grid: place.setdefault((grid.shape, grid.tobytes()), (len(place), grid))[0]
    outputs = torch.tensor(sorted({find(out) for task in tasks.values() for _, out in task.train}))
    queries = []
    for task_id, given, _, grids, _ in asked:
        context = [find(grid) for pair in tasks[task_id].train for grid in pair] + [find(given)]
        queries.append((torch.tensor([context]), torch.tensor([[find(grid) for grid in grids]])))
    spaces = evaluation.raw_spaces([grid for _, grid in place.values()], outputs.numpy())
    rows = {}
    for query, names in RANKED_BASELINES.items():
        for name in names:
            score = spaces[name].by_weights(evaluation.QUERIES[query])
            rows[f"{query}, {name}"] = [score(evaluation.Queries(None, context, None, None, None, None, own))[0][0, len(outputs):]
                                        for context, own in queries]
    return rows


# ---------------------------------------------------------------------------------------------- eval.py compare


def compare_runs(args):
    """Runs side by side on the same queries: every metric, its paired difference from the first run, and codes."""
    short = len({path.name for path in args.runs}) == len(args.runs)
    names = [path.name if short else str(path) for path in args.runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{' '.join(names)}: a run is named twice; compare takes different ones")
    out = args.out or args.runs[0].absolute().parent / "compare"
    check_writable(out)
    loaded = {name: (*lejepa.load_run(path), checkpoint.read_log(path)) for name, path in zip(names, args.runs)}
    tasks = read_tasks(loaded[names[0]][1], args.data)[0]
    result, first, codes = {"data": args.data, "runs": {}}, None, {}
    for name, (model, _, _) in loaded.items():
        say(f"evaluating {name}")
        done = evaluation.evaluate(model, None, tasks, source=args.data)
        first = first or done
        entries = result["runs"][name] = {}
        for metric, (values, task) in done.values.items():
            entries[metric] = {"value": float(values.mean()), "interval": evaluation.bootstrap_ci(values, task),
                               "difference": evaluation.paired_ci(values, first.values[metric][0], task)}
        ids = np.unique(evaluation.object_ids(done.windows.grids)[0], return_index=True)[1]  # distinct objects
        codes[name] = torch.cat([found for found, _ in done.codes]).numpy()[ids]
        if name != names[0] and codes[name].shape[1] and codes[names[0]].shape[1]:
            entries["codes"] = {"agreement": evaluation.code_agreement(codes[names[0]], codes[name])}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "compare.json", to_json(result))
    page = report.compare_page(out, result, {name: log for name, (*_, log) in loaded.items()})
    metrics = [metric for metric in next(iter(result["runs"].values())) if metric != "codes"]
    for start in range(0, len(metrics), 4):
        chosen = metrics[start:start + 4]
        print(table([["", *chosen], *([name, *(compared(entries[metric], name == names[0]) for metric in chosen)]
                                      for name, entries in result["runs"].items())]) + "\n")
    print(f"in brackets: 95 % intervals over tasks, of the value for {names[0]}, of the paired difference from it for others")
    print(f"written: {out / 'compare.json'}, {page}")


def compared(entry: dict, is_first: bool) -> str:
    if is_first:
        return "{:.3f} [{:.3f}, {:.3f}]".format(entry["value"], *entry["interval"])
    return "{:.3f} {:+.3f} [{:+.3f}, {:+.3f}]".format(entry["value"], *entry["difference"])
