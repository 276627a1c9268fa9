"""One run from its flags to its exit status: folder, lock, log, evaluations, signals. `python lejepa.py`.

    0 finished   1 full disk, no memory or a loss that is not finite   2 bad input   3 alert   130, 143 signal
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from pathlib import Path

import filelock
import numpy as np
import torch

import arc_data
import eval as evaluation
import lejepa
from arc_data import TaskSet, TokenTable, make_windows, need
from harness import charts, checkpoint, distributed, gpu, profiling, report
from harness.checkpoint import write_file
from harness.health import add_health, code_statistics, effective_rank, embedding_health
from lejepa import Config

LOG_EVERY = 10                                 # steps between two log lines
SAMPLED = ("ndcg10", "ndcg10_without_out1", "r1", "within_task")               # evaluated during training
TRAINING_TASKS = 100  # training tasks in each evaluation, beside the unseen ones
LIMITS = {"steps": (1, math.inf), "batch_size": (2, math.inf), "lr": (0, 100), "weight_decay": (0, 100),
          "demonstrations": (1, 16), "lam": (0, 1), "memory": (0, 2**20), "seed": (0, 2**31 - 1)}
# --------------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")

def make_parser() -> Parser:
    """A flag for each field of Config, with its type, choices and help text."""
    about = "Train LeJEPA with discrete codes on ARC tasks and evaluate it on unseen tasks."
    parser = Parser(prog="lejepa.py", description=about, allow_abbrev=False)
    for name, hint in typing.get_type_hints(Config, include_extras=True).items():
        hint, text = typing.get_args(hint)
        default = getattr(Config, name)
        kinds = [part for part in (hint, *typing.get_args(hint)) if part is not types.NoneType]
        literal = [part for part in kinds if typing.get_origin(part) is typing.Literal]
        choices = typing.get_args(literal[0]) if literal else None
        kind = str if choices else kinds[-1]           # str of `str`, and of `str | None`
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            action = argparse.BooleanOptionalAction if default is None else "store_true"
            parser.add_argument(flag, action=action, default=default, help=text)
        else:
            text += "" if default is None else f" (default: {default})"
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(flag, type=kind, default=default, help=text, choices=choices, metavar=metavar)
    return parser

def add_preset(parser: Parser, flags, argv: list[str] | None):
    """The flags with those of --preset as defaults; its --legacy stands before the one that is given.

    Where a flag puts another part in the place of the preset's, the settings of that part are not read.
    """
    if flags.preset is None:
        return flags
    presets = lejepa.Variants()["presets"]
    if flags.preset not in presets:
        raise ValueError(f"--preset {flags.preset}: choose from {', '.join(presets)}")
    parser.set_defaults(**presets[flags.preset])
    whole = parser.parse_args(argv)
    if flags.legacy is not None:
        whole.legacy = f"{presets[flags.preset]['legacy']},{flags.legacy}"
    return whole

def uses_legacy(cfg: Config) -> bool:
    tables = lejepa.QUANTIZERS | lejepa.OBJECTIVES | lejepa.PREDICTORS
    return bool(cfg.legacy or cfg.faithful or {cfg.code, cfg.objective, cfg.context} - tables.keys())

def check_limits(cfg: Config):
    for name, (low, high) in LIMITS.items():
        value = getattr(cfg, name)
        needed = f"at least {low}" if high == math.inf else f"{low} to {high}"
        need(value is None or low <= value <= high and value < math.inf,           # which refuses nan too
             f"--{name.replace('_', '-')} {value}: needs {needed}")

def parse_flags(argv: list[str] | None = None) -> Config:
    """The Config of a command line. Exits with status 2 and one line for a flag that is wrong or ignored."""
    parser = make_parser()
    try:
        flags = parser.parse_args(argv)
        cfg = Config(**vars(add_preset(parser, flags, argv)))
        check_limits(cfg)
        need(not cfg.faithful or cfg.objective in ("sum", "broken"),
             f"--faithful would be ignored by --objective {cfg.objective}: give a preset, sum or broken")
        if uses_legacy(cfg):
            lejepa.Variants()["check"](lejepa.resolve_defaults(cfg), flags.legacy)
    except ValueError as error:
        parser.error(str(error))
    except ModuleNotFoundError:
        parser.error("there is no legacy.py; leave out --preset, --legacy, --faithful and its choices")
    if cfg.resume and cfg.run is None:
        parser.error("--resume needs --run FOLDER, the run to continue")
    if cfg.resume and cfg.profile:
        parser.error("--resume would be ignored: --profile traces the first steps of a run; leave one out")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu or auto")
    if cfg.device == "mps":
        if not torch.backends.mps.is_available():
            parser.error("--device mps: torch finds no Apple GPU here; use --device cpu or auto")
        cfg = dataclasses.replace(cfg, dtype="fp32")   # where bf16 has not been tried
    codebooks = ("ema", "vq", "gradient", "gumbel")    # whose weight in the loss does not change with lam
    without_lam = {"infonce": ("none", "fsq"), "sum": ("none", "fsq", *codebooks)}
    if cfg.code in without_lam.get(cfg.objective, ()) and cfg.lam != Config.lam:
        parser.error(f"--lam {cfg.lam} would be ignored: --code {cfg.code} with --objective {cfg.objective} "
                     "has no SIGReg at that weight")
    if cfg.objective in ("infonce", "sum") and cfg.memory != Config.memory:
        parser.error(f"--memory {cfg.memory} would be ignored: --objective {cfg.objective} has a queue")
    if cfg.code in codebooks and cfg.lam == 0:
        parser.error(f"--lam 0: lam scales the commitment of --code {cfg.code}; give a small lam instead")
    return lejepa.resolve_defaults(cfg)
# -------------------------------------------------------------------------------------------------- folder
@functools.cache
def commit() -> str:
    """The commit of this checkout, marked -dirty if a tracked file differs from it; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except OSError:
        return ""

def describe_device(device: str) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return name if distributed.ranks() == 1 else f"{distributed.ranks()} processes, each on: {name}"

def open_folder(cfg: Config) -> tuple[Config, filelock.FileLock]:
    """Makes and locks the run's folder. A folder with other content is used with --resume or --profile only.

    The system releases the lock when the process ends, however it ends. A default name in use gets a number.
    """
    if cfg.run is None:
        cfg = dataclasses.replace(cfg, run=make_default_folder(cfg))
    folder = Path(cfg.run)
    need(folder.is_dir() or not cfg.resume, f"--resume: there is no folder {cfg.run}")
    folder.mkdir(parents=True, exist_ok=True)
    refuse_used(cfg, folder)
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"--run {cfg.run}: another run is active in this folder; wait for its end, "
                         "or name another folder") from None
    refuse_used(cfg, folder)                           # again: another run may have begun and ended meanwhile
    checkpoint.remove_parts(folder)
    if is_unused(folder) and (folder / "config.json").exists():
        print(f"the run in {cfg.run} ended before its first checkpoint; it begins again", file=sys.stderr)
    return cfg, lock

def make_default_folder(cfg: Config) -> str:
    name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{cfg.size}-{cfg.objective}"
    for suffix in ["", *(f"-{i}" for i in range(2, 1000))]:
        with contextlib.suppress(FileExistsError):
            Path(name + suffix).mkdir(parents=True)
            return name + suffix
    raise ValueError(f"{name} and 998 numbered names after it exist; name a folder with --run")

def refuse_used(cfg: Config, folder: Path):
    """ValueError for a folder that this run cannot use, as it is or without --resume."""
    links = arc_data.printable(", ".join(path.name for path in folder.iterdir() if path.is_symlink()))
    need(not links, f"--run {cfg.run} holds links ({links}), and a run writes through none; put copies there")
    unused, can_resume = is_unused(folder), any(folder.glob("*.safetensors"))
    need(not (cfg.resume and unused),
         f"--resume: {cfg.run} holds no checkpoint; leave --resume out to begin a run there")
    way_out = "add --resume to continue it, or name another folder" if can_resume else "name another folder"
    need(unused or cfg.resume or cfg.profile, f"--run {cfg.run} is not empty; {way_out}")

def is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a run leaves that ended before its first checkpoint."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".part")}
    log, early = folder / "log.jsonl", {"lock", "config.json"}
    early |= {name for name in names if name.startswith("events.out.tfevents")}
    early |= {log.name} if log.is_file() and not log.stat().st_size else set()
    return not names or ("lock" in names and names <= early)

def write_config(cfg: Config, compiled: bool):
    """config.json: every flag, whether the model is compiled, the machine; when resumed, what may change."""
    path = Path(cfg.run) / "config.json"
    if cfg.profile and path.exists():
        return                                         # a profile of a run that is there; its record stays
    record = lejepa.SIZES[cfg.size]._asdict() | dataclasses.asdict(cfg)
    record |= {"compiled": compiled, "command": " ".join(["python", *sys.argv]), "commit": commit(),
               "device_name": describe_device(cfg.device), "python": platform.python_version(),
               "torch": torch.__version__, "numpy": np.__version__}
    if cfg.resume and path.exists():
        changed = {name: getattr(cfg, name) for name in checkpoint.FREE_TO_CHANGE if name != "resume"}
        record = checkpoint.read_json(path) | changed | {"compiled": compiled}
    write_file(path, json.dumps(record, indent=1).encode())
# ----------------------------------------------------------------------------------------------------- log
def eval_interval(cfg: Config) -> int:
    """Steps between two evaluations on unseen tasks, each with a checkpoint: 100, or a 20th of the run.

    On a GPU a quarter of the run: there steps are faster, and evaluations are not.
    """
    return max(100, cfg.steps // (4 if cfg.device == "cuda" else 20))

class EarlyStopping:
    """is_over: for more than `patience` steps no validation loss was better than the best by `least`."""

    def __init__(self, patience: float, least: float, rows=()):
        self.patience, self.least = patience, least
        self.best, self.best_step, self.is_over = math.inf, 0, False
        for row in rows:
            self.feed(row["step"], row.get("validation_loss"))

    def feed(self, step: int, loss: float | None) -> bool:
        """Whether this loss is the best so far. Without patience none is."""
        if loss is None or self.patience == math.inf:
            return False
        is_best = loss < self.best - self.least
        if is_best:
            self.best, self.best_step = loss, step
        self.is_over = step - self.best_step > self.patience
        return is_best

class RunLog:
    """The record of a run: lines on the screen, in log.jsonl and TensorBoard; evaluations; checkpoints.

    A step's terms belong to the trained weights; figures on tasks, and validation_loss, to the averaged ones.
    """
    signal, received, alerted, trained = 0, 0, False, False

    def __init__(self, cfg: Config, model, optimizers, tasks, held_out, start: int, state: dict, begin,
                 stopping=(math.inf, 0.0)):
        from torch.utils.tensorboard import SummaryWriter      # slow to import, and only a run needs it
        self.cfg, self.folder, self.model, self.optimizers = cfg, Path(cfg.run), model, optimizers
        self.start, self.saved, self.begin = start, start, begin
        self.held_out, self.unseen = held_out, make_windows(held_out)
        complete = [item for item in tasks.items() if len(arc_data.pairs_of(item[1])) > 1]
        self.seen = make_windows(dict(complete[:TRAINING_TASKS]))
        self.digest = state["tasks_sha256"]
        self.validation = TaskSet(held_out, cfg.device, cfg.demonstrations, augment=False)
        table = TokenTable(self.unseen.grids, cfg.device, turned=False)
        self.objects = table.pack_grids(np.arange(len(self.unseen.grids)))
        self.earlier = state["seconds"]
        self.grad_sum = torch.tensor(state["grad_sum"], device=cfg.device)
        self.grad_max = torch.tensor(state["grad_max"], device=cfg.device)
        self.windows = state["windows"]
        self.mark, self.evaluating = (self.windows, time.monotonic()), 0.0
        self.first_bad = torch.zeros(1, device=cfg.device)  # the first step that is not finite, and its terms
        rows = checkpoint.read_log(self.folder) if start else ()
        self.alerts, self.stopping = report.Alerts(rows), EarlyStopping(*stopping, rows)
        self.lines = open(self.folder / "log.jsonl", "a", buffering=1)
        self.board = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)

    def after_step(self, done: int, metrics: dict, batch) -> bool:
        """Logs, evaluates and saves where it is due. True when the run is to end."""
        self.count(done, metrics, batch)
        interval = max(1, int(min(eval_interval(self.cfg), self.stopping.patience / 5)))
        evaluate = done % interval == 0 or done == self.cfg.steps
        due = evaluate or done % LOG_EVERY == 0
        if due or (self.received and distributed.ranks() == 1):
            values = self.read(metrics)                # the only line that waits for the device
            figures = self.evaluate(done) if evaluate else {}
            if due:
                self.write(done, values, figures)
            is_best = self.stopping.feed(done, figures.get("validation_loss"))
            self.signal, self.alerted = distributed.agree(self.received, self.alerted, self.cfg.device)
            if evaluate or self.signal or self.alerted:
                self.save(done, is_best)
        return bool(self.signal or self.alerted or self.stopping.is_over)

    def count(self, step: int, metrics: dict, batch):
        """Adds up what the end reports and keeps the first step that is not finite. Waits for nothing."""
        row = torch.stack([torch.full_like(metrics["loss"], step), *metrics.values()])
        self.first_bad = torch.where((self.first_bad[0] > 0) | row.isfinite().all(), self.first_bad, row)
        self.grad_sum = self.grad_sum + metrics["grad_norm"]
        self.grad_max = torch.maximum(self.grad_max, metrics["grad_norm"])
        self.windows += getattr(batch, "windows", len(batch.index))

    def read(self, metrics: dict) -> dict[str, float]:
        """The terms of a step as numbers. Ends the run if they, or those of a step before, are not finite."""
        step, *terms = self.first_bad.tolist()
        if step:
            terms = {name: f"{value:.4g}" for name, value in zip(metrics, terms)}
            names = ("loss", "grad_norm", *terms)
            bad = next(name for name in names if not math.isfinite(float(terms[name])))
            others = ", ".join(f"{name} {value}" for name, value in terms.items() if name != bad)
            last = f"the last good checkpoint is step {self.saved}"
            raise SystemExit(f"{bad} is {terms[bad]} at step {step:.0f} ({others}); {last}")
        return {name: float(value) for name, value in metrics.items()}

    def write(self, step: int, values: dict, figures: dict):
        """Writes one line for the eye and one for programs."""
        windows, since = self.mark
        rate = (self.windows - windows) / (time.monotonic() - since - self.evaluating)
        self.mark, self.evaluating = (self.windows, time.monotonic()), 0.0
        row = {"step": step, **values, "lr": self.optimizers[0].param_groups[0]["lr"], "samples_per_s": rate,
               "seconds": self.seconds(), **figures}
        self.lines.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
        left = (time.monotonic() - self.begin) * (self.cfg.steps - step) / (step - self.start)
        print(f"step {step:>{len(str(self.cfg.steps))}}/{self.cfg.steps}  loss {values['loss']:.4f}"
              f"  prediction {values['prediction']:.4f}  sigreg z {values['sigreg_z']:.3f}"
              f" y {values['sigreg_y']:.2f}  |grad| {values['grad_norm']:.2f}  {rate:.0f} windows/s"
              f"  {left / 60:.1f} min left",
              flush=True)
        if figures:
            shown = [f"{name} {value:.3f}" for name, value in figures.items() if value is not None]
            print("      unseen tasks:", "  ".join(shown), flush=True)
        for line in self.alerts.feed(row):
            print(f"      {line}", flush=True)
            if self.cfg.stop_on_alert and line.startswith("alert") and step < self.cfg.steps:
                self.alerted = True

    @torch.no_grad()
    def evaluate(self, step: int) -> dict:
        """Figures on a sample of the unseen tasks, and on some training tasks (prefixed train_)."""
        begin, model = time.monotonic(), self.model.eval()
        pool, seen_pool = (model.embed([windows.grids[i] for i in windows.outputs]).float().cpu()
                           for windows in (self.unseen, self.seen))
        figures = evaluate_sample(model, self.unseen, pool)
        figures["validation_prediction"] = figures.pop("prediction")
        seen = evaluate_sample(model, self.seen, seen_pool)
        figures |= {"train_" + name: seen[name] for name in ("ndcg10_without_out1", "within_task")}
        figures["validation_loss"] = self.validation_loss()
        is_filled = self.objects.grid < len(self.objects.first)
        ids = self.objects.object_id[is_filled].cpu()          # (n,) of every object
        encoder, _ = model.in_use
        codes = encoder.quantizer.indices(encoder.objects(self.objects)).cpu()[ids]
        size = getattr(model.encoder.quantizer, "size", lejepa.CODE_SIZE)
        figures |= code_statistics(codes.numpy(), size, ids.numpy())
        for position, column in enumerate(codes.T):
            self.board.add_histogram(f"codes/{position}", column, step, bins=64)
        image = charts.neighbours_image(model, self.unseen, pool)
        self.board.add_image("unseen windows", image, step, dataformats="HWC")
        model.train()
        self.evaluating += time.monotonic() - begin
        return figures

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of four fixed batches of unseen tasks."""
        batches = [self.validation.batch(self.cfg.batch_size, 0, i) for i in range(4)]
        torch.manual_seed(0)                           # legacy.py has losses that draw
        with profiling.eager(self.cfg):
            losses = [lejepa.batch_loss(self.model, batch, i, self.cfg)[0] for i, batch in enumerate(batches)]
        return float(torch.stack(losses).mean())

    def save(self, step: int, is_best: bool = False):
        """Writes a checkpoint. What is logged so far is on the disk before it."""
        self.board.flush()
        os.fsync(self.lines.fileno())
        log = (self.folder / "log.jsonl").read_bytes()
        state = {"log_bytes": len(log), "log_sha256": hashlib.sha256(log).hexdigest(),
                 "tasks_sha256": self.digest, "threads": torch.get_num_threads(), "windows": self.windows,
                 "ranks": distributed.ranks(), "seconds": round(self.seconds(), 3),
                 "grad_sum": float(self.grad_sum), "grad_max": float(self.grad_max)}
        checkpoint.save(self.folder, self.model, self.optimizers, step, self.cfg, commit(), state, is_best)
        self.saved = step

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.begin

    def close(self):
        self.board.close()
        self.lines.close()

    @torch.no_grad()
    def finish(self, untrained, epoch: int, steps: int) -> dict:
        """The full evaluation at the end of the run: result.json, result.png, and the closing lines."""
        if self.stopping.best_step:
            checkpoint.take_best(self.folder, self.model)
        model = self.model.eval()
        result = result_figures(add_health(model, evaluation.evaluate(model, untrained, self.held_out)))
        rows = checkpoint.read_log(self.folder)
        if self.stopping.best_step:
            result["best_step"] = self.stopping.best_step
        result |= {"loss": self.validation_loss(), "steps": steps, "windows": self.windows,
                   "epochs": self.windows / epoch,
                   "grad_norm_mean": float(self.grad_sum) / steps, "grad_norm_max": float(self.grad_max),
                   "seconds": self.seconds(),
                   "samples_per_s": float(np.median([row["samples_per_s"] for row in rows])),
                   "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                   "device": describe_device(self.cfg.device)}
        write_file(self.folder / "result.json", json.dumps(result, indent=1).encode())
        charts.write_result_picture(self.folder, result, rows)
        for name, value in result.items():
            if not isinstance(value, dict):
                print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
        value, best = result["ndcg10_without_out1"], result["baseline_ndcg10_without_out1"]
        line = "the unseen tasks are too few for nDCG@10 without out1"
        if value is not None and best is not None:
            line = f"nDCG@10 without out1 {value:.3f} on unseen tasks; best baseline {best:.3f}"
        print(f"\n{line}\npicture: {self.folder / 'result.png'}")
        print(f"full report: python eval.py {self.folder}", flush=True)
        return result

@torch.no_grad()
def evaluate_sample(model, windows, pool: torch.Tensor, limit: int = 1024, seed: int = 0) -> dict:
    """Figures of a seeded sample of `limit` windows in the whole pool (P, D), for use during training."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(windows.task))[:limit])
    z_hat = model.predict(evaluation.contexts(windows, rows)).float().cpu()
    every = torch.zeros(len(windows.task), z_hat.shape[1])
    every[rows] = z_hat
    space = evaluation.Space(torch.arange(len(pool)), pool, measure=evaluation.euclidean)
    queries = evaluation.window_queries(windows, torch.from_numpy(rows))
    values = evaluation.rank(space.by_embedding(every), queries)
    result = {name: float(values[name].mean()) for name in SAMPLED}
    target = pool[np.searchsorted(windows.outputs, windows.index[rows, 3])]
    health = embedding_health(target)
    return result | {"prediction": float((z_hat - target).square().mean()),
                     "effective_rank_context": effective_rank(z_hat),
                     "effective_rank_target": health["effective_rank"]} | {
                     name: health[name] for name in ("variance", "isotropy", "gaussian_score")}

class FollowerLog(RunLog):
    """The log of a rank other than the first, which ends with the others and writes nothing."""

    def __init__(self, cfg: Config, start: int):
        self.cfg, self.saved, self.stopping = cfg, start, EarlyStopping(math.inf, 0.0)
        self.first_bad = torch.zeros(1, device=cfg.device)

    def count(self, step: int, metrics: dict, batch):
        values = torch.stack(list(metrics.values()))
        self.first_bad = torch.maximum(self.first_bad, (~values.isfinite().all()).float())

    def read(self, metrics: dict) -> dict:
        if self.first_bad:
            raise SystemExit(1)                        # the first rank says why
        return {}

    def save(self, step: int, is_best: bool = False):
        self.saved = step

    evaluate = lambda self, step: {}
    write = close = lambda self, *_: None

def result_figures(done: evaluation.Evaluation) -> dict:
    """What result.json takes from an evaluation, flat."""
    names = (*evaluation.RETRIEVAL, *evaluation.DEMONSTRATIONS, *evaluation.HARD)
    entries, health = {name: done.metrics[name] for name in names}, done.health
    result = {name: entry["model"] for name, entry in entries.items()}
    result |= {name: health[name] for name in ("shuffled_ndcg10_without_out1", "prediction")}
    for name in ("codes_usage", "codes_perplexity", "codes_ceiling", "codes_n"):
        result[name] = health["codes"].get(f"{name}_by_occurrence")
    for role in ("context", "target"):
        result[f"effective_rank_{role}"] = health[role]["effective_rank"]
    result |= {name: health["target"][name] for name in ("sigreg_over_null", "sigreg_n")}
    for name in ("ndcg10_without_out1", "within_task"):
        result[f"baseline_{name}"] = entries[name]["baselines"].get(charts.best_baseline(entries[name]))
    result["baselines"] = {row: {name: entry["baselines"][row] for name, entry in entries.items()
                                 if row in entry["baselines"]} for row in entries["ndcg10"]["baselines"]}
    result["intervals"] = {name: entry["interval"] for name, entry in entries.items()}
    return result | {"lead": health["lead"], "validation_windows": done.data["windows"]}
# ----------------------------------------------------------------------------------------------------- run
def prepare(cfg: Config, tasks: dict, held_out: dict, begin: float):
    """Everything else that can fail by what was given, before the first step. Errors say what."""
    recipe = "legacy" if cfg.legacy or cfg.faithful else "method"
    make_data, make_optimizers, stopping = lejepa.RECIPES[recipe](cfg)
    if distributed.ranks() > 1:
        need(not uses_legacy(cfg), "what stands in legacy.py trains in one process, without torchrun")
        make_data = distributed.RankTasks
    data = make_data(tasks, cfg.device, cfg.demonstrations)
    model = lejepa.build(cfg).to(cfg.device)
    optimizers = make_optimizers(model, cfg)
    gpu.prepare(optimizers, data, cfg.device)
    if cfg.device == "cpu" and distributed.ranks() == 1:
        profiling.check_memory(model, data, cfg)
    digest = checkpoint.tasks_digest(tasks) + checkpoint.tasks_digest(held_out)
    start, state = 0, {"seconds": 0.0, "grad_sum": 0.0, "grad_max": 0.0, "windows": 0, "tasks_sha256": digest}
    if cfg.resume:
        with distributed.first_rank_first():
            start, state = checkpoint.resume(model, optimizers, cfg, commit(), digest)
    trained = distributed.replicate(model, data, cfg)
    compiled = cfg.compile and profiling.compile_parts(trained, data, cfg)
    if trained is not model:  # after its first gradient DDP sums in another order, and so in a resumed run
        profiling.try_loss(trained, data, cfg)
    if distributed.rank():
        return data, trained, optimizers, FollowerLog(cfg, start), start
    write_config(cfg, compiled)
    if cfg.profile:
        return data, model, optimizers, None, 0
    log = RunLog(cfg, model, optimizers, tasks, held_out, start, state, begin, stopping)
    if not start:
        log.save(0)                                    # so that a run that is killed early can be resumed
    return data, trained, optimizers, log, start

def describe_data(cfg: Config, tasks: dict, held_out: dict, leaks: list, data: TaskSet) -> str:
    cut, every = data.table.tokens.cut, [*tasks.values(), *held_out.values()]
    missing = sum(output is None for task in every for _, output in task.test)
    return (f"run folder: {cfg.run}\n{len(tasks)} training tasks, {data.windows} windows; {len(leaks)} tasks "
            f"left out, because they share a pair with a validation task; {len(held_out)} validation tasks\n"
            f"{(cut > 0).sum()} of {len(cut)} training grids cut at {arc_data.OBJECTS} objects"
            + f"; {missing} test pairs have no output and are not used" * bool(missing))

def run(cfg: Config, data: TaskSet, model, optimizers, log: RunLog, start: int) -> int:
    """Trains, evaluates and records. Returns the exit status."""
    def end_after_step(number, frame):  # the step is finished and saved; a second signal ends at once
        log.received = number
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_DFL)
        if log.trained:                                # during the evaluation there is nothing to save
            raise KeyboardInterrupt
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, end_after_step)
    way_out = f"the same command with --run {cfg.run} --resume"
    try:
        try:
            steps = lejepa.train(model, optimizers, data, cfg, start, log.after_step)
            log.trained = True
            log.signal = log.signal or log.received
            if not log.signal and not log.alerted and not distributed.rank():
                log.finish(lejepa.build(cfg).to(cfg.device).eval(), data.windows, steps)
        finally:
            log.close()
    except KeyboardInterrupt:
        way_out += ", which evaluates again"
        log.signal = log.received
    except (OSError, ValueError) as error:             # no room, no permission, embeddings that are nan
        distributed.report(f"{error}; the last good checkpoint is step {log.saved}; once that is mended, "
                           f"continue with {way_out}")
        return 1
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        distributed.report(f"another process ended or cannot be reached; the last good checkpoint is step "
                           f"{log.saved}; continue with {way_out}")
        return 1
    if log.alerted:
        print(f"stopped by an alert after step {log.saved}; to continue: {way_out}, without --stop-on-alert")
        return report.ALERT_STATUS
    if log.signal:
        print(f"stopped by a signal after step {log.saved}; to continue: {way_out}")
        return 128 + log.signal
    return 0

def keep_large_blocks():
    """Makes glibc keep freed blocks, which the kernel would zero again at every step. No effect elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)                           # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)   # M_MMAP_THRESHOLD; older versions take at most 32 MB

def quiet_disk_errors(failed):
    """Hides the traceback of TensorBoard's thread on a full disk; the main thread reports it in one line."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)

def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

def main():
    begin = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_large_blocks()
    threading.excepthook = quiet_disk_errors
    lock = None
    try:
        with distributed.one_voice():
            cfg = parse_flags()
            try:
                distributed.start(cfg)
                tasks, held_out, leaks = arc_data.split(cfg.data, cfg.validate)
                if not distributed.rank():
                    cfg, lock = open_folder(cfg)
                cfg = distributed.share_folder(cfg)
                data, model, optimizers, log, start = prepare(cfg, tasks, held_out, begin)
            except (ValueError, OSError) as error:
                print(f"lejepa.py: {error}", file=sys.stderr)
                sys.exit(2)
        print(describe_data(cfg, tasks, held_out, leaks, data), flush=True)
        if cfg.profile:
            sys.exit(profiling.profile(model, optimizers, data, cfg))
        sys.exit(run(cfg, data, model, optimizers, log, start))
    except OSError as error:                           # a trace that finds no room
        print(f"lejepa.py: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:200]
        distributed.report(f"out of memory ({reason}); use a smaller --batch-size or --size")
        sys.exit(1)
    except KeyboardInterrupt:                          # before the first step
        sys.exit(130)
    finally:
        if lock is not None:
            lock.release()
