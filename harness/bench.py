"""Speed of SIGReg and of the training step beside what one would write first; the record of a GPU.

    python -m harness.bench                                     tables of this CPU, about 8 minutes on 2 cores
    python -m harness.bench --tables sigreg step --out FOLDER   some of them, also as FOLDER/bench.md, .json
    python -m harness.bench --device cuda --out runs/gpu-NAME   machine, speed and checks of a GPU

The cases of a table take turns, on an otherwise idle machine. A figure is the median over the rounds, with
the least and the most. Exit status: 0; 1 if a check fails; 2 for a wrong flag; 130 after Ctrl-C.

    N samples   D embedding width   M directions   T frequencies   B windows in a batch   U distinct objects
"""
import os
import signal

if __name__ == "__main__":  # Ctrl-C ends without a traceback; every finished table is on the disk
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

import arc_data
import lejepa
from arc_data import SLOTS, Batch, TaskSet
from harness import gpu, profiling, run
from harness.checkpoint import write_file

FIRST = 20                                             # steps before the measured ones
MODES = {"cpu": ("naive", "eager", "compiled"), "cuda": ("eager", "compiled", "graphs")}
CALLS = {"cpu": 1, "cuda": 10}                         # calls between two waits; a run waits every LOG_EVERY
PEAKS = {"A6000": 155, "A100": 312, "H100": 989, "H200": 989, "4090": 165}     # dense bf16 TFLOP/s, on paper
SHAPES = ((1024, 128), (4096, 384))                    # N x D of SIGReg on a CPU
TOLERANCE = 1e-3                                       # relative difference from the CPU in five fp32 steps
# ----------------------------------------------------------------------------------------------- measuring
class Times(list):
    """Seconds of one call of a case, in each round."""

    def __str__(self) -> str:
        return f"{1e3 * statistics.median(self):.1f} ({1e3 * min(self):.1f}-{1e3 * max(self):.1f})"

    def against(self, other: "Times") -> str:
        """How many times as fast as `other`: the median over the rounds, with the least and the most."""
        ratios = sorted(b / a for a, b in zip(self, other))
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"

def timed(case, device: str, calls: int = 1, to_end: bool = True) -> float:
    """Seconds of a call on an idle device, to the end of its work there or only until the call returns."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        case()
    if to_end:
        wait()
    return (time.perf_counter() - begin) / calls

def take_turns(cases: dict, rounds: int, device: str, warm: int = 2) -> dict[str, Times]:
    """Calls each case `warm` times, then all of them in turn, each CALLS times between two waits."""
    for case in cases.values():
        timed(case, device, warm)
    times = {name: Times() for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(timed(case, device, CALLS[device]))
    return times

def peak_bytes(case, device: str) -> int:
    """The most that a call has allocated at once, above what was there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        case()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(sizes), default=0))
# ---------------------------------------- tables: generators of a title, the names of the columns, the rows
def machine_table(args):
    yield "Machine"
    yield "what", "value"
    yield "device", run.describe_device(args.device)
    if args.device == "cuda":
        card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = ["nvidia-smi", card, "--query-gpu=driver_version,power.limit,memory.total", "--format=csv"]
        try:
            found = subprocess.run(query, capture_output=True, text=True).stdout
            yield from zip(*(line.split(", ") for line in found.splitlines()), strict=True)
        except (OSError, ValueError):
            yield "nvidia-smi", "gives nothing"
    yield "torch, commit", f"{torch.__version__}, {run.commit() or 'unknown'}"
    for dtype, rate in args.product.items():
        yield f"matrix product, {dtype}, TFLOP/s", f"{rate / 1e12:.2f}"
    source = torch.zeros(1 << (28 if args.device == "cuda" else 25), device=args.device)
    spent = take_turns({"copy": source.clone}, args.rounds, args.device)["copy"]
    yield "copy, GB/s read and written", 2 * source.nbytes / min(spent) / 1e9

def plain_sigreg(z, directions):
    """The published formula as one writes it down. Keeps (N, M, T) numbers."""
    if z.ndim == 3:
        return torch.stack([plain_sigreg(view, directions) for view in z]).mean()
    t = torch.linspace(0, 3, 17, device=z.device)
    weights = 2 * 3 / 16 * torch.exp(-t ** 2 / 2)
    weights[[0, -1]] /= 2
    with torch.autocast(z.device.type, enabled=False):
        x = (z.float() @ directions).unsqueeze(-1) * t                         # (N, M, T)
        error = (x.cos().mean(0) - torch.exp(-t ** 2 / 2)) ** 2 + x.sin().mean(0) ** 2
        return (error @ weights).mean() * len(z)

def sigreg_table(args):
    """SIGReg beside the two matrix products that every form of it needs: z A, and the gradient's way back."""
    modes, M = [mode for mode in args.modes if mode in ("eager", "compiled")], 1024
    yield f"SIGReg, forward + backward, fp32, {M} directions"
    yield ("N x D", "case", "ms", "over its products",
           *(f"times as fast as the plain form, {mode}" for mode in modes), "memory, N M floats")
    sizes = [lejepa.SIZES[size] for size in args.size] if args.device == "cuda" else []
    for N, D in [(size.batch_size // 2, size.dim) for size in sizes] or SHAPES:
        z = torch.randn(N, D, device=args.device, requires_grad=True)
        directions = F.normalize(torch.randn(D, M, device=args.device), dim=0)
        memory, filled = torch.randn(M, D, device=args.device), torch.tensor(M, device=args.device)
        forms = {"plain": plain_sigreg, "closed form": lejepa.sigreg,
                 "local, memory": lambda z, _: lejepa.local_sigreg(z, memory, filled)}
        cases = {"products": lambda: (z.detach() @ directions) @ directions.T}
        for name, mode in [(name, mode) for mode in modes for name in forms]:
            form = forms[name] if mode == "eager" else torch.compile(forms[name], dynamic=False)
            cases[f"{name}, {mode}"] = lambda form=form: torch.autograd.grad(form(z, directions), z)
        times = take_turns(cases, args.rounds, args.device)
        for name, spent in times.items():
            floats = (peak_bytes(cases[name], args.device) - z.nbytes) / (4 * N * M)
            plain = [spent.against(times[f"plain, {mode}"]) for mode in modes]
            yield f"{N} x {D}", name, spent, times["products"].against(spent), *plain, f"{floats:.2f}"

class Step:
    """A training step of a fresh model, on the next batch at each call."""

    def __init__(self, data: TaskSet, size: str, dtype: str, mode: str, windows: int):
        cfg = lejepa.Config(size=size, dtype=dtype, batch_size=windows, device=data.table.device,
                            compile=mode in ("compiled", "graphs"))
        self.cfg, self.data, self.mode = lejepa.resolve_defaults(cfg), copy.copy(data), mode
        self.number = 0
        self.model = lejepa.build(self.cfg).to(cfg.device).train()
        self.optimizers = lejepa.make_optimizers(self.model, self.cfg)
        if mode != "naive":
            gpu.prepare(self.optimizers, self.data, self.cfg.device)
        if cfg.compile and not profiling.compile_parts(self.model, data, self.cfg):
            raise RuntimeError("torch.compile failed")

    def __call__(self) -> dict:
        draw, form = (draw_naive, plain_sigreg) if self.mode == "naive" else (TaskSet.batch, lejepa.sigreg)
        batch = draw(self.data, self.cfg.batch_size, 0, self.number)
        with mock.patch.object(lejepa, "sigreg", form):
            metrics = lejepa.train_step(self.model, self.optimizers, batch, self.number, self.cfg)
        self.number += 1
        return metrics

def draw_naive(data: TaskSet, windows: int, seed: int, step: int) -> Batch:
    """Windows as one draws them first: two pairs of a task, each grid in a row of its own, padded."""
    data = copy.copy(data)
    data.pairs = 2
    batch = padded(data, 2 * windows, seed, step)
    return batch._replace(index=batch.index[::2], shown=batch.shown[::2])

def padded(data: TaskSet, windows: int, seed: int, step: int) -> Batch:
    """A batch with a padded row for each grid and a bitmap for each slot."""
    with mock.patch.object(arc_data, "pack", lambda counts: (np.arange(len(counts)) * SLOTS, len(counts))):
        batch = data.batch(windows, seed, step)
    grids = batch.grids
    held = grids.object_id.flatten()
    own = torch.arange(len(held), device=held.device)
    slot = own.new_empty(len(grids.bits)).scatter(0, held, own)              # (U,) one that holds the object
    grids = grids._replace(bits=grids.bits[held], object_id=own.view_as(grids.object_id))
    return batch._replace(grids=grids, object_sample=slot[batch.object_sample])

def step_table(args):
    yield "The training step; in naive rows: windows one by one, padded rows, plain SIGReg"
    yield ("size", "B", "type", "mode", "ms", "windows/s", "times as fast as the first row",
           f"seconds to step {FIRST}", "of the product", "of peak", "busy ms", "launches", "issue ms",
           "memory, GB", "share by part")
    for size, windows in [(size, count) for size in args.size for count in args.windows or [None]]:
        windows, cases, seconds = windows or lejepa.SIZES[size].batch_size, {}, {}
        names = [(dtype, mode) for dtype in ("fp32", "bf16") for mode in args.modes]
        for name in [name for name in names if name != ("bf16", "naive")]:
            begin = time.perf_counter()
            try:
                with torch._inductor.config.patch({"triton.cudagraphs": name[1] == "graphs"}):
                    case = Step(args.data, size, *name, windows)
                    timed(case, args.device, FIRST)
                cases[name], seconds[name] = case, time.perf_counter() - begin
            except RuntimeError as error:              # out of memory, no compiler: the other cases go on
                args.failures.append(f"{size}, {' '.join(name)}: {str(error).splitlines()[0][:200]}")
        compiled = dict(torch._dynamo.utils.counters["stats"])
        times = take_turns(cases, args.rounds, args.device, warm=1)
        if compiled != torch._dynamo.utils.counters["stats"]:
            args.failures.append(f"{size}: torch.compile ran again after step {FIRST}")
        for name, spent in times.items():
            median, first = statistics.median(spent), next(iter(times.values()))
            rest = describe(cases[name], median, args.product) if name[1] != "naive" else ()
            yield size, windows, *name, spent, windows / median, spent.against(first), seconds[name], *rest
        if args.device == "cuda" and cases:
            case = cases.get(("bf16", "compiled"), next(iter(cases.values())))
            args.failures += [f"{size}: {line}" for line in check(case, args.tasks)]

def describe(case: Step, seconds: float, product: dict[str, float]):
    """The cells of a case from utilisation on. Issue time includes busy time where the launch queue fills."""
    device, dtype = case.cfg.device, case.cfg.dtype
    batches = [case.data.batch(case.cfg.batch_size, 0, step) for step in range(3)]
    rate = np.mean([profiling.model_flops(case.model, batch, case.cfg) for batch in batches]) / seconds
    yield f"{rate / product[dtype]:.1%}"
    peak = [peak for name, peak in PEAKS.items() if device == "cuda" and name in torch.cuda.get_device_name()]
    yield f"{rate / peak[0] / 1e12:.1%}" if peak and dtype == "bf16" else "-"
    profiler, _ = profiling.trace_steps(case.model, case.optimizers, case.data, case.cfg)
    kernels = [event.time_range.elapsed_us() for event in profiler.events()
               if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    yield sum(kernels) / profiling.TRACED / 1000
    yield len(kernels) // profiling.TRACED
    yield Times(timed(case, device, to_end=False) for _ in range(5))
    yield f"{peak_bytes(case, device) / 1e9:.2f}"
    times = profiling.part_times(profiler.events(), device)
    yield ", ".join(f"{name} {value / sum(times.values()):.1%}" for name, value in times.items())

def check(case: Step, tasks: dict):
    """Lines that say what is wrong on a GPU: a wait between two logs of a run, results unlike the CPU's."""
    no = torch.zeros(1, device=case.cfg.device)
    log = types.SimpleNamespace(first_bad=no, grad_sum=no, grad_max=no, windows=0)
    cfg = dataclasses.replace(case.cfg, steps=run.LOG_EVERY - 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        lejepa.train(case.model, case.optimizers, case.data, cfg, 0, functools.partial(run.RunLog.count, log))
    except RuntimeError as error:
        code = Path(lejepa.__file__).parent, Path(__file__).parent
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent in code]
        yield f"a wait between two logs: {error} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = compare_with_cpu(case, tasks)
    if not difference < TOLERANCE:
        yield f"five fp32 steps differ from the CPU's by {difference:.1e}, more than {TOLERANCE}"

def compare_with_cpu(case: Step, tasks: dict) -> float:
    """The largest relative difference of a term in five fp32 steps; the same directions, nothing dropped."""
    def draw_on_cpu(dim, count, cfg, step):
        return draw(dim, count, dataclasses.replace(cfg, device="cpu"), step).to(cfg.device)
    draw, terms = lejepa.draw_directions, []
    whole = mock.patch.object(lejepa.Encoder, "NESTED", 0.0)
    with whole, mock.patch.multiple(lejepa, draw_directions=draw_on_cpu, DROPOUT=0.0):
        for data in (TaskSet(tasks, "cpu"), case.data):
            other = Step(data, case.cfg.size, "fp32", "eager", 48)
            terms.append(np.array([[float(value) for value in other().values()] for _ in range(5)]))
    return float((abs(terms[1] - terms[0]) / abs(terms[0]).clip(1e-6)).max())
# --------------------------------------------------------------------------------------------- the command
TABLES = {"machine": machine_table, "sigreg": sigreg_table, "step": step_table}

def parse_flags(argv=None) -> argparse.Namespace:
    parser = run.Parser(prog="harness.bench", description="Speed tables and checks.", allow_abbrev=False)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which (default: all)")
    parser.add_argument("--size", nargs="+", choices=tuple(lejepa.SIZES),
                        help="sizes of the step (default: small on a CPU, base and large on a GPU)")
    parser.add_argument("--windows", nargs="+", type=int, metavar="B", default=[],
                        help="windows in a batch, or several numbers (default: the size's own)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a table (default: 7)")
    parser.add_argument("--modes", nargs="+", choices=("naive", "eager", "compiled", "graphs"),
                        help="modes of the step (default: all that make sense on the device)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    parser.add_argument("--out", metavar="FOLDER", help="write bench.md and bench.json there")
    args = parser.parse_args(argv)
    if min([args.rounds, *args.windows]) < 1:
        parser.error("--rounds and --windows need at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu or auto")
    args.device = lejepa.resolve_defaults(lejepa.Config(device=args.device)).device
    args.size = args.size or (["small"] if args.device == "cpu" else ["base", "large"])
    args.modes = args.modes or MODES[args.device]
    return args

def show(rows, lines: list[str]) -> dict:
    """Prints a table row by row, as Markdown, and adds the lines to `lines`. Returns it for bench.json."""
    def say(line):
        lines.append(line)
        print(line, flush=True)
    title, columns, cells = next(rows), next(rows), []
    say(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        cells.append([f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row])
        say(f"| {' | '.join(cells[-1])} |")
    return {"title": title, "columns": columns, "rows": cells}

def main():
    args = parse_flags()
    run.keep_large_blocks()
    torch._dynamo.config.recompile_limit = 64          # each size and type compiles the same functions anew
    tasks, _, _ = arc_data.split("arcagi2:training", None)
    args.tasks, args.data, args.failures = tasks, TaskSet(tasks, args.device), []
    args.product = {dtype: profiling.matmul_rate(lejepa.Config(device=args.device, dtype=dtype))
                    for dtype in ("fp32", "bf16")}
    tables, lines = [], []
    for name in args.tables:
        tables.append(show(TABLES[name](args), lines))
        if args.out:
            command = " ".join(["python -m harness.bench", *sys.argv[1:]])
            record = {"command": command, "failures": args.failures, "tables": tables}
            Path(args.out).mkdir(parents=True, exist_ok=True)
            write_file(Path(args.out, "bench.json"), json.dumps(record, indent=1).encode())
            write_file(Path(args.out, "bench.md"), "\n".join([*lines, "", *args.failures]).encode())
    for line in args.failures:
        print(f"FAIL  {line}", flush=True)
    sys.exit(bool(args.failures))

if __name__ == "__main__":
    main()
