"""Where a training step's time goes: traces, shares by part, utilisation; torch.compile of a step's parts."""
import contextlib
import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from arc_data import Batch, TaskSet, need
from harness import charts, distributed
from harness.checkpoint import write_file
from lejepa import Config, batch_loss, train_step

PARTS = ("data", "code", "encoder", "predictor", "sigreg", "optimizer")        # ranges named in the trace
WARM, TRACED = 3, 3                                    # steps before the trace, and in it
# ------------------------------------------------------------------------------------------------- compile
def compile_parts(trained, data: TaskSet, cfg: Config) -> bool:
    """Runs torch.compile on the parts of a step, with dynamic sizes. False, with a line, where that fails.

    The parts are compiled one by one, so that a profile still tells them apart. One loss and its gradient are
    computed here, so that a missing compiler or a broken cache shows now; the weights stay as they are.
    """
    warnings.filterwarnings("ignore", "Error detected in")     # what torch says when Ctrl-C ends a backward
    print("compiling the model: this takes minutes the first time; Ctrl-C ends it", flush=True)
    model = getattr(trained, "module", trained)        # of several processes
    parts = ((model.encoder.objects, "forward"), (model.encoder, "encode_symbols"),
             (model.predictor, "forward"), (model.objective, "compute_loss"))
    try:
        for owner, name in parts:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))
        model.predictor.forward = with_fixed_length(model.predictor.forward)
        try_loss(trained, data, cfg)
        return True
    except Exception as error:  # whatever is missing or broken, the run goes on without
        for owner, name in parts:
            vars(owner).pop(name, None)
        line = " ".join(str(error).split())[:200] or type(error).__name__
        if distributed.ranks() > 1:                    # the others wait for this one inside the loss
            distributed.report(f"compiling failed in one process ({line}); start with --no-compile")
            sys.exit(1)
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        print(f"--compile: compiling failed, the run continues without ({line}); if it worked before, remove "
              f"the cache {cache_dir()}", file=sys.stderr)
        return False

def with_fixed_length(predict):
    """The compiled predictor for one number of demonstrations, with any number of windows.

    A dynamic number of demonstrations takes the compiler to an error in bf16 (torch 2.13).
    """
    def fixed(z, shown):
        for x in (z, shown):
            torch._dynamo.mark_static(x, 1)
        return predict(z, shown)
    return fixed

def try_loss(model, data: TaskSet, cfg: Config, step: int = 0, size: int | None = None):
    """Computes one loss, of `size` windows, and its gradient. Weights and buffers stay as they are."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.train()
        batch = data.batch(size or cfg.batch_size, cfg.seed, step)
        batch_loss(model, batch, step, cfg)[0].backward()
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)

def check_memory(model, data: TaskSet, cfg: Config):
    """ValueError where a step on the CPU needs more memory than is free, before the system kills the process.

    Measured on a few windows: what is kept for the gradient grows with the batch. To this come the gradients
    and at least one number of the optimizer for each weight.
    """
    sizes, kept, few = [p.numel() for p in model.parameters()], {}, min(cfg.batch_size, 48)

    def keep(x):
        if x.numel() not in sizes:                     # neither a weight nor its copy in bf16
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        try_loss(model, data, cfg, cfg.steps, few)     # a step that no run takes
    needed, free = sum(kept.values()) * cfg.batch_size / few + 8 * sum(sizes), free_memory()
    need(needed < free, f"--batch-size {cfg.batch_size} with --size {cfg.size}: a step needs at least "
         f"{needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free; give a smaller batch or size")

def free_memory() -> float:
    """Bytes that a process can still get on Linux, or in a container with a limit; inf on other systems."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError):     # "max" where there is no limit
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(lines["MemAvailable"].split()[0]))
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        free.append(limit - int(dict(line.split() for line in used)["anon"]))  # files in memory can give way
    return min(free)

def eager(cfg: Config):
    """Runs eagerly what stands inside: for other sizes than training has, and for counting operations."""
    return torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()
# --------------------------------------------------------------------------------------------------- trace
def profile(model, optimizers, data: TaskSet, cfg: Config):
    """Writes a trace of the step into <run>/profile/, for TensorBoard and Perfetto; prints tables."""
    model.train()
    profiler, rate = trace_steps(model, optimizers, data, cfg)
    path = Path(cfg.run) / "profile" / f"lejepa.{time.time_ns() // 1_000_000}.pt.trace.json"
    path.parent.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(path))
    trace = repair(json.loads(path.read_text()))
    write_file(path, json.dumps(trace).encode())
    times = part_times(profiler.events(), cfg.device)
    times = {name: value / TRACED / 1000 for name, value in times.items()}     # ms a step
    charts.plot_parts(path.parent / "parts.png", times)
    order = "self_cpu_time_total" if cfg.device == "cpu" else "self_device_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))
    for name, value in times.items():
        print(f"{name:>12} {value / sum(times.values()):6.1%}  {value:8.1f} ms a step, backward included")
    memory = [event["args"] for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    peak = max((args.get("Total Allocated", 0) for args in memory), default=0)
    share = utilisation(model, data, cfg, cfg.batch_size / rate)
    print(f"peak memory {peak / 1e9:.2f} GB (allocated in the traced steps); {rate:.0f} windows/s; "
          f"utilisation {share:.1%} of a {cfg.dtype} matrix product")
    print(f"trace: {path}; open it in Perfetto, or with: tensorboard --logdir {cfg.run}")

def trace_steps(model, optimizers, data: TaskSet, cfg: Config):
    """Runs the training step under torch.profiler. Returns the profiler, and windows a second without it."""
    def take(step):
        with record_function("data"):
            batch = data.batch(cfg.batch_size, cfg.seed, step)
        return train_step(model, optimizers, batch, step, cfg)["loss"], len(batch.index)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if cfg.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=WARM, active=TRACED, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=True,
                                profile_memory=True, acc_events=True) as profiler:
        for step in range(WARM + TRACED):
            float(take(step)[0])                       # a wait, so that a step's kernels end inside the step
            profiler.step()
    begin = time.monotonic()
    taken = [take(step) for step in range(TRACED)]
    float(taken[-1][0])                                # one wait for all
    return profiler, sum(windows for _, windows in taken) / (time.monotonic() - begin)

def part_times(events, device: str) -> dict[str, float]:
    """Microseconds by part, and of the rest of the steps as `other`. On a GPU they are the times of kernels.

    A backward function counts where its forward ran. A part inside another counts once, as itself.
    """
    spent = lambda event: event.cpu_time_total if device == "cpu" else event.device_time_total

    def part_above(event):
        while event is not None and event.name not in PARTS:
            event = event.cpu_parent
        return event

    events = [event for event in events if event.device_type == DeviceType.CPU]  # a GPU mirrors the ranges
    times, owner = dict.fromkeys(PARTS, 0.0), {}
    for event in events:
        above = part_above(event)
        if above is event:
            times[event.name] += spent(event)
            outer = part_above(event.cpu_parent)
            if outer is not None:
                times[outer.name] -= spent(event)
        elif above is not None and above.name not in ("data", "optimizer") and event.sequence_nr >= 0:
            owner[event.sequence_nr] = above.name  # operations without a gradient share the next one's number
    for event in events:                               # the engine's event stands above the numbered function
        parent = event.cpu_parent
        is_backward = event.scope == 1 and parent is not None and parent.name.startswith("autograd::engine")
        if is_backward and event.sequence_nr in owner:
            times[owner[event.sequence_nr]] += spent(parent)
    whole = sum(spent(event) for event in events if event.name.startswith("ProfilerStep"))
    return times | {"other": max(0.0, whole - sum(times.values()))}

def repair(trace: dict) -> dict:
    """The trace in the words of torch-tb-profiler 0.4.3, which lacks cuda_runtime and named ranges."""
    kinds = {"cuda_runtime": "Runtime", "cuda_driver": "Runtime", "user_annotation": "cpu_op"}
    for event in trace["traceEvents"]:
        event["cat"] = kinds.get(event.get("cat"), event.get("cat", ""))
        if event.get("name") == "data" and event["cat"] == "cpu_op":
            event["name"] = "enumerate(DataLoader)#TaskSet.__next__"
    return trace
# --------------------------------------------------------------------------------------------- utilisation
def matmul_rate(cfg: Config, repeats: int = 5) -> float:
    """Floating-point operations a second of large square matrix products in the run's type."""
    size, many = (8192, 20) if cfg.device == "cuda" else (2048, 1)             # `many` products between waits
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    a = torch.randn(size, size, device=cfg.device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for _ in range(many):
            product = a @ a
        float(product[0, 0])
        seconds.append(time.perf_counter() - begin)
    return many * 2 * size ** 3 / min(seconds[1:])

def model_flops(model, batch: Batch, cfg: Config) -> int:
    """Floating-point operations of the matrix products of a forward and backward, without the optimizer's."""
    from torch.utils.flop_counter import FlopCounterMode
    with eager(cfg), FlopCounterMode(display=False) as counter:
        batch_loss(model, batch, 0, cfg)[0].backward()
    return counter.get_total_flops()

def utilisation(model, data: TaskSet, cfg: Config, seconds: float) -> float:
    """Model FLOPs utilisation of the run's first steps, which take `seconds` each."""
    batches = [data.batch(cfg.batch_size, cfg.seed, step) for step in range(TRACED)]
    return np.mean([model_flops(model, batch, cfg) for batch in batches]) / seconds / matmul_rate(cfg)
