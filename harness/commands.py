"""The commands of eval.py: what they read, what they print and what they write.

    n rows   k demonstrations   P distinct outputs
"""
import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score

import arc_data
import eval as evaluation
import lejepa
from arc_data import need
from harness import checkpoint, decoder, report, symbols
from harness.checkpoint import write_file
from harness.health import add_health, label_free_score, object_ids
from harness.run import Parser, is_out_of_memory
from harness.views import Views

RANKED = {"accuracy@1": "r1", "accuracy@2": "r2", "nDCG@10": "ndcg10"}  # metrics, and their names in eval.py
RANKED_BASELINES = {"copy in2": ("raw",), "analogy": ("raw", "31 features", "raw + 31 features")}
# -------------------------------------------------------------------------------- what is read
def say(line: str):
    print(line, file=sys.stderr, flush=True)

def read_tasks(cfg, source: str) -> tuple[dict, dict | None]:
    """The tasks of --data, and those that the run was trained on (None: they cannot be read)."""
    need(isinstance(cfg.data, str) and report.number(cfg.lam) is not None,
         "the checkpoint's --data is no text, or its --lam no number: it is not one of lejepa.py")
    if source == "dev":
        trained, tasks, _ = arc_data.split(cfg.data, cfg.validate)
        return tasks, trained
    tasks = arc_data.load_tasks(source)
    try:
        return tasks, arc_data.split(cfg.data, cfg.validate)[0]
    except (ValueError, OSError) as error:
        say(f"not checked whether the tasks are unseen: {error}")
        return tasks, None

def count_shared(tasks: dict, trained: dict | None) -> int | None:
    """How many tasks share a pair with a training task; None where these are not known."""
    return None if trained is None else len(arc_data.without_leaks(tasks, trained)[1])

def read_labels(path: Path, tasks: dict) -> dict[str, str]:
    """{task id: class name} of a JSON file. ValueError for another form or for unknown tasks."""
    labels = checkpoint.read_json(path)
    need(labels and all(isinstance(name, str) for name in labels.values()),
         f"--labels {path}: needs a JSON object {{task id: class name}}, its names strings")
    unknown = [name for name in labels if name not in tasks]
    need(not unknown, f"--labels {path}: {len(unknown)} tasks are not in --data: {', '.join(unknown[:3])}")
    need(len(set(labels.values())) > 1, f"--labels {path}: all tasks have one class; a probe needs two")
    return labels

def read_candidates(path: Path, tasks: dict) -> dict[str, list]:
    """{task id: [for each test input, [grid, ...]]} of a JSON file. ValueError names what is wrong."""
    found = {}
    for task_id, inputs in checkpoint.read_json(path).items():
        where = f"--candidates {path}, task {arc_data.printable(task_id)}"
        need(task_id in tasks, f"{where}: not in --data; give candidates of tasks that the data have")
        count = len(tasks[task_id].test)
        need(isinstance(inputs, list) and len(inputs) == count,
             f"{where}: needs a list with an entry for each test input, {count} of them")
        for number, grids in enumerate(inputs):
            place = f"{where}, test input {number}"
            need(isinstance(grids, list) and grids, f"{place}: needs a list of one candidate grid or more")
            grids = arc_data.validate_grids(grids, lambda i: f"{place}, candidate {i}")
            found.setdefault(task_id, []).append([grid.astype(np.int8) for grid in grids])
    need(found, f"--candidates {path}: no task; needs {{task id: [[grid, ...] a test input]}}")
    return found

def check_writable(path: Path, *names: str):
    """ValueError before any work where the file `path`, or the files `names` of the folder `path`, cannot be
    written. The folder may not exist yet, and may come from elsewhere: no link in it is followed."""
    need(names or path.absolute().parent.is_dir(), f"{path}: there is no such folder")
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    need(os.access(place, os.W_OK), f"{path}: cannot be written; give another --out")
    for file in (path / name for name in names):
        need(not file.is_symlink() and file.is_file() == file.exists(),
             f"{file}: not a regular file; remove it, or give another --out")

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

def table(cells: list[list]) -> str:
    cells = [[report.show(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)
# -------------------------------------------------------------------------------- eval.py RUN
def evaluate_run(args):
    model, cfg = lejepa.load_run(args.run)
    tasks, trained = read_tasks(cfg, args.data)
    need(any(len(arc_data.pairs_of(task)) > 1 for task in tasks.values()),
         f"--data {args.data}: no task has two pairs with outputs")
    labels = read_labels(args.labels, tasks) if args.labels else None
    out = args.out or choose_folder(args.run, args.data)
    check_writable(out, "eval.json", "health.json", "report.html")
    log = checkpoint.read_log(args.run)
    result, config = (checkpoint.read_json(path) if path.exists() else {}
                      for path in (args.run / "result.json", args.run / "config.json"))
    say(f"evaluating {len(tasks)} tasks beside the baselines")
    seen = Views(model, args.views)
    untrained = Views(lejepa.build(cfg).eval(), args.views)
    done = add_health(seen, evaluation.evaluate(seen, untrained, tasks, labels))
    data = describe_data(done, args.data, tasks, count_shared(tasks, trained)) | {"views": args.views}
    done = done._replace(data=data)
    if torch.cat([codes for codes, _ in done.codes]).shape[1]:
        done.health["symbols"] = symbols.first_code_figures(model, done.windows.grids)
        done.health["symbols"]["ndcg10_without_out1"] = symbols.retrieval_by_codes(model, done.windows)
    decoded = {}
    if trained:
        say("training a decoder of frozen z")
        grids = arc_data.make_windows(trained).grids
        decoded = decoder.decode(seen, grids, done.windows, done.z, done.z_hat)
        done.metrics.update(decoder.decoded_metrics(decoded, done.windows.task))
    out.mkdir(parents=True, exist_ok=True)
    seconds = report.number(result.get("seconds"))
    facts = {"run": args.run.absolute().name, "trained on": cfg.data, "validated on": cfg.validate,
             "objective": cfg.objective, "code": cfg.code, "size": cfg.size, "lam": cfg.lam, "seed": cfg.seed,
             "views": args.views, "steps": result.get("steps"), "minutes": seconds and f"{seconds / 60:.1f}",
             "device": result.get("device"), "commit": config.get("commit")}
    criteria = report.criteria(log, result, cfg.lam, done)
    record = {name: {"met": met, "figure": text} for name, met, text in criteria}
    write_file(out / "eval.json", to_json({"data": done.data} | done.metrics))
    write_file(out / "health.json", to_json({"data": done.data} | done.health | {"criteria": record}))
    page = report.write_report(out, done, facts, log, result, decoded)
    print("\n".join([*done.data["notes"], "", table(report.summary(done)), ""]))
    print(f"written: {out / 'eval.json'}, {out / 'health.json'}, {page}")

def describe_data(done: evaluation.Evaluation, source: str, tasks: dict, shared: int | None) -> dict:
    """What was evaluated, and notes on what no figure uses and what is not unseen."""
    single = sum(len(arc_data.pairs_of(task)) < 2 for task in tasks.values())
    unlabelled = len(tasks) - len(done.labels) if done.labels else 0
    missing = sum(output is None for task in tasks.values() for _, output in task.test)
    capped = done.windows.capped
    lines = {f"{missing} test pairs have no output and are in no window": missing,
             f"{single} tasks with fewer than two complete pairs: in no window and no pair": single,
             f"{capped} windows of tasks with many pairs left out by a seeded sample": capped,
             f"{unlabelled} tasks without a label: not probed": unlabelled,
             f"{shared} of the {len(tasks)} tasks share a pair with the training tasks: not unseen": shared}
    notes = [line for line, count in lines.items() if count]
    return {"source": source} | done.data | {"shared_with_training": shared, "notes": notes}
# -------------------------------------------------------------------------------- eval.py codes
def write_codes(args):
    """A JSON line a grid, in the format that README.md describes: its objects, the whole grid first."""
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
        columns = codes, boxes, tokens.colour[rows], tokens.area[rows].astype(int)
        values = zip(*(column.tolist() for column in columns))
        objects = [dict(zip(("codes", "box", "colour", "size"), row)) for row in values]
        lines.append(json.dumps(line | {"objects": objects}))
    write_file(args.out, ("\n".join(lines) + "\n").encode())
    say(f"{args.out}: {len(lines)} grids, {len(tokens.colour)} objects, {tokens.cut.sum()} more were cut")
# -------------------------------------------------------------------------------- eval.py rank
def rank_candidates(args):
    """Candidate answers of test inputs, the likeliest first; how often they are right, where known."""
    for path in (args.out, *([args.submission] if args.submission else [])):
        check_writable(path)
    model, cfg = lejepa.load_run(args.run)
    model = Views(model, args.views)
    tasks, trained = read_tasks(cfg, args.data)
    candidates = read_candidates(args.candidates, tasks)
    ranked, attempts, asked = {}, {}, []
    for task_id, inputs in candidates.items():
        ranked[task_id], attempts[task_id] = [], []
        for (given, answer), grids in zip(tasks[task_id].test, inputs):
            distinct, place = arc_data.unique_grids(grids)
            scores = model.rank(tasks[task_id].train, given, distinct).float().cpu()
            rows = [{"grid": grid.tolist(), "score": float(scores[i])} for grid, i in zip(grids, place)]
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
        if shared := count_shared(tasks, trained):
            say(f"{shared} of the {len(tasks)} tasks share a pair with the training tasks: not unseen")
        print(ranking_table(tasks, known, lejepa.build(cfg).eval()))
    say(f"written: {args.out}" + (f", {args.submission}" if args.submission else ""))

def ranking_table(tasks: dict, asked: list, untrained) -> str:
    """Accuracy and nDCG@10 of model and baselines by the same candidates; 0 where the answer is not there."""
    rows = {"model": [scores for *_, scores in asked], "untrained": []}
    for task_id, given, _, grids, _ in asked:
        rows["untrained"].append(untrained.rank(tasks[task_id].train, given, grids))
    rows |= candidate_baselines(tasks, asked)
    right = [np.array([np.array_equal(grid, answer) for grid in grids]) for _, _, answer, grids, _ in asked]
    owner = np.array([task_id for task_id, *_ in asked])
    cells = [["", *RANKED]]
    for name, scores in rows.items():
        tie = 0 if name in ("model", "untrained") else evaluation.TIE
        found = [rank_answer(row, truth, tie) for row, truth in zip(scores, right)]
        columns = [np.array([values[key] for values in found]) for key in RANKED.values()]
        intervals = [evaluation.bootstrap_ci(x, owner) for x in columns]
        cells.append([name, *(report.with_interval(x.mean(), ends) for x, ends in zip(columns, intervals))])
    there = sum(truth.any() for truth in right)
    return f"{table(cells)}\n{len(asked)} known answers, {there} of them among the candidates"

def rank_answer(scores: torch.Tensor, truth: np.ndarray, tie: float) -> dict[str, float]:
    """The metrics of the candidate (n,) that is the truth; 0 where none is."""
    if not truth.any():
        return dict.fromkeys(RANKED.values(), 0.0)
    margin = (scores - scores[int(truth.argmax())])[None]
    return {key: float(value) for key, value in evaluation.rank_metrics(margin, tie).items()}

def candidate_baselines(tasks: dict, asked: list) -> dict[str, list]:
    """Scores of every question's candidates by copies and analogies in raw cells and 31 features."""
    place = {}
    find = lambda grid: place.setdefault((grid.shape, grid.tobytes()), (len(place), grid))[0]
    outputs = torch.tensor(sorted({find(out) for task in tasks.values() for _, out in task.train}))
    queries = []
    for task_id, given, _, grids, _ in asked:
        context = [find(grid) for pair in tasks[task_id].train for grid in pair] + [find(given)]
        own = torch.tensor([[find(grid) for grid in grids]])
        queries.append(evaluation.Queries(None, torch.tensor([context]), None, None, None, None, own))
    spaces = evaluation.raw_spaces([grid for _, grid in place.values()], outputs.numpy())
    rows = {}
    for query, names in RANKED_BASELINES.items():
        for name in names:
            score = spaces[name].by_weights(evaluation.QUERIES[query])
            rows[f"{query}, {name}"] = [score(asked)[0][0, len(outputs):] for asked in queries]
    return rows
# -------------------------------------------------------------------------------- eval.py compare
def compare_runs(args):
    """Runs side by side on the same queries: every metric, its difference from the first run, and codes."""
    short = len({path.name for path in args.runs}) == len(args.runs)
    names = [path.name if short else str(path) for path in args.runs]
    need(len(set(names)) == len(names), f"{' '.join(names)}: a run is named twice")
    out = args.out or args.runs[0].absolute().parent / "compare"
    check_writable(out, "compare.json", "compare.html")
    loaded = {name: lejepa.load_run(path) for name, path in zip(names, args.runs)}
    logs = {name: checkpoint.read_log(path) for name, path in zip(names, args.runs)}
    tasks, _ = read_tasks(loaded[names[0]][1], args.data)
    result, first, codes = {"data": args.data, "label_free": {}, "runs": {}}, None, {}
    for name, (model, _) in loaded.items():
        say(f"evaluating {name}")
        done = evaluation.evaluate(model, None, tasks)
        first = first or done
        result["label_free"][name] = label_free_score(done)
        entries = result["runs"][name] = {}
        for metric, (values, task) in done.values.items():
            entries[metric] = {"value": float(values.mean()),
                               "interval": evaluation.bootstrap_ci(values, task),
                               "difference": evaluation.paired_ci(values, first.values[metric][0], task)}
        _, distinct = np.unique(object_ids(done.windows.grids)[0], return_index=True)
        codes[name] = torch.cat([found for found, _ in done.codes]).numpy()[distinct]
        if name != names[0] and codes[name].shape[1] and codes[names[0]].shape[1]:
            entries["codes"] = {"agreement": code_agreement(codes[names[0]], codes[name])}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "compare.json", to_json(result))
    page = report.compare_page(out, result, logs)
    print(table(report.compare_runs(result["runs"])))
    print(f"in brackets: 95 % intervals over tasks; second figures: the paired difference from {names[0]}")
    scores = result["label_free"]
    print("prediction error + SIGReg(z), which reads no label:",
          ", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
    print(f"the rule's choice is the least: {min(scores, key=scores.get)}")
    print(f"written: {out / 'compare.json'}, {page}")

def code_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted mutual information of the codes (n, n_codes) of two models of the same objects; 0 is chance.

    The positions of one model are matched one to one with those of the other where they agree most; the mean
    of these.
    """
    shared = np.array([[adjusted_mutual_info_score(x, y) for y in b.T] for x in a.T])
    return float(shared[linear_sum_assignment(-shared)].mean())
# -------------------------------------------------------------------------------- arguments
def make_parser() -> Parser:
    parser = Parser(prog="eval.py", description="Evaluates a run; the default COMMAND is evaluate.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, out: str, **runs):
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(command=COMMANDS[name])
        command.add_argument(metavar="RUN", type=Path, help="a folder that lejepa.py wrote", **runs)
        needed = name in ("codes", "rank")
        default = None if needed else arc_data.REPORTED
        source = "SOURCE of tasks, or dev: the tasks that the run held out"
        source += "" if needed else " (default: %(default)s)"
        command.add_argument("--data", metavar="SOURCE", required=needed, default=default, help=source)
        kind = "FILE" if needed else "FOLDER"
        command.add_argument("--out", metavar=kind, type=Path, required=needed, help=out)
        return command

    run = add("evaluate", "Every metric of a run, beside baselines.",
              "where the record goes (default: RUN, or RUN/eval-SOURCE beside other data's)", dest="run")
    views = {"type": int, "default": 1, "choices": range(1, 9), "metavar": "V",
             "help": "symmetries, 1 to 8, over which distances are averaged; V times as slow (default: 1)"}
    run.add_argument("--views", **views)
    run.add_argument("--labels", metavar="FILE", type=Path,
                     help="JSON {task id: class name} to probe for (default: seven properties of a pair)")
    add("codes", "The codes of every grid, a line a grid.", "where the lines go", dest="run")
    about = "Candidate answers of test inputs, the likeliest first."
    ranking = add("rank", about, "where the ranking goes", dest="run")
    ranking.add_argument("--candidates", metavar="FILE", type=Path, required=True,
                         help="JSON {task id: [for each test input, [candidate grid, ...]]}")
    ranking.add_argument("--views", **views)
    ranking.add_argument("--submission", metavar="FILE", type=Path,
                         help="where the two likeliest go, in Kaggle's form")
    add("compare", "Runs side by side, paired by query.", "where the record goes (default: RUN/../compare)",
        dest="runs", nargs="+")
    return parser

COMMANDS = {"evaluate": evaluate_run, "codes": write_codes, "rank": rank_candidates, "compare": compare_runs}

def main(argv: list[str] | None = None):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv if argv and argv[0] in (*COMMANDS, "-h", "--help") else ["evaluate", *argv])
    try:
        args.command(args)
    except Exception as error:
        if not (isinstance(error, (ValueError, OSError)) or is_out_of_memory(error)):
            raise
        parser.error(" ".join(arc_data.printable(word) for word in str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)
