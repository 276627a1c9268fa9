"""Speed tables: SIGReg and the training step beside what one would run instead. Every row is a ratio inside one run.

    python bench.py                              all tables (about 6 minutes on 2 cores, more with --size base)
    python bench.py --tables sigreg step         some of them; --out FOLDER also writes them as bench.md and bench.json

Cases of a table take turns; a figure is the median over the rounds, with the least and the most. Run it on an otherwise idle machine.

    N samples   D embedding width   M directions   T knots   W windows of a step
"""
import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import arc_data
import eval as evaluation
import lejepa
from arc_data import Batch, Grids, TaskSet

# ---------------------------------------------------------------------------------------------- measuring


BATCHES = 4                                            # that a case takes in turn
PER_WAIT = 10 if torch.cuda.is_available() else 1      # calls of a case between two waits for the device: a run does not wait at each step


class Times(list):
    """Seconds of one case over the rounds."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    def against(self, other: "Times") -> str:
        """How many times faster than `other`: median over the rounds, with the least and the most."""
        ratios = sorted(b / a for a, b in zip(self, other))
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def take_turns(cases: dict, rounds: int, warm: int = 2) -> dict[str, Times]:
    """Runs each case `warm` times, then all of them in turn, `rounds` times."""
    for case in cases.values():
        for _ in range(warm):
            case()
    times = {name: Times() for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / PER_WAIT)
    return times


def peak_bytes(case) -> int:
    """The most that `case` has allocated at once above what was there before: of a step, above weights and optimizer state."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        case()
    moves = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return int(max(np.cumsum([size for _, size in moves]), default=0))


class Table:
    """Rows for the screen, as Markdown, and for bench.json."""

    def __init__(self, title: str, columns: list[str]):
        self.title, self.columns, self.rows = title, columns, []
        print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)

    def add(self, *cells):
        cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
        self.rows.append(cells)
        print(f"| {' | '.join(cells)} |", flush=True)

    def markdown(self) -> str:
        return "\n".join([f"### {self.title}", "", f"| {' | '.join(self.columns)} |", f"|{' --- |' * len(self.columns)}", *(f"| {' | '.join(row)} |" for row in self.rows)])


# ---------------------------------------------------------------------------------------------- SIGReg


def plain_sigreg(z, directions, frequency=None):
    """The published formula as one writes it down, or the same at one t; z (V, N, D) or (N, D); materialises (N, M, T)."""
    if z.ndim == 3:
        return torch.stack([plain_sigreg(view, directions, frequency) for view in z]).mean()
    with torch.autocast(z.device.type, enabled=False):
        t = torch.linspace(0, 3, 17, device=z.device) if frequency is None else torch.tensor([frequency], device=z.device)
        phi = torch.exp(-t ** 2 / 2)
        if frequency is None:
            weights = 2 * 3 / 16 * phi
            weights[[0, -1]] /= 2
        else:
            weights = lejepa.SIGREG_NULL / (1 - phi ** 2)
        x = (z.float() @ directions).unsqueeze(-1) * t                                  # (N, M, T)
        error = (x.cos().mean(0) - phi) ** 2 + x.sin().mean(0) ** 2                     # (M, T)
        return (error @ weights).mean() * len(z)


class Projections(torch.autograd.Function):
    """Only the two matrix products that any SIGReg needs: z A, and the gradient's way back."""

    @staticmethod
    def forward(ctx, z, directions):
        x = z @ directions
        ctx.save_for_backward(x, directions)
        return x[0, 0] * 1

    @staticmethod
    def backward(ctx, grad):
        x, directions = ctx.saved_tensors
        return x @ directions.T, None


def both_ways(function, z, directions):
    def case():
        z.grad = None
        function(z, directions).backward()
    return case


def sigreg_table(args, device, allocator: str, compiled: bool) -> Table:
    table = Table(f"SIGReg, forward + backward, fp32, {args.directions} directions, {allocator}",
                  ["N x D", "case", "ms", "over its projections", "times as fast as the plain form, eager", "... compiled", "memory, N M floats"])
    for samples, width in ((1024, 128), (4096, 384)):
        z = torch.randn(samples, width, device=device, requires_grad=True)
        directions = F.normalize(torch.randn(width, args.directions, device=device), dim=0)
        functions = {"projections": Projections.apply, "plain, eager": plain_sigreg, "closed form, eager": lejepa.sigreg,
                     "at one frequency, eager": lambda z, directions: lejepa.sigreg(z, directions, lejepa.FREQUENCY)}
        if compiled:
            functions |= {"plain, compiled": torch.compile(plain_sigreg, dynamic=False), "closed form, compiled": torch.compile(lejepa.sigreg, dynamic=False)}
        cases = {name: both_ways(function, z, directions) for name, function in functions.items()}
        times = take_turns(cases, args.rounds)
        for name, spent in times.items():
            z.grad = None                              # what is freed in the case would count against it
            table.add(f"{samples} x {width}", name, 1e3 * spent.median, times["projections"].against(spent), spent.against(times["plain, eager"]),
                      spent.against(times["plain, compiled"]) if compiled else "—", f"{(peak_bytes(cases[name]) - z.nbytes) / (4 * samples * args.directions):.2f}")
    return table


# ---------------------------------------------------------------------------------------------- the step


def prepare(size: str, dtype: str, windows: int, device: str, compiled: bool = False):
    cfg = lejepa.Config(size=size, dtype=dtype, batch_size=windows, lr=1e-3, device=device, compile=compiled)
    model = lejepa.build(cfg).to(device).train()
    if compiled and not lejepa.compile_parts(model):
        return None
    return cfg, model, lejepa.make_optimizers(model, cfg)


def step_case(setting, draw):
    """A training step on the next batch; on a GPU ten, for which `take_turns` waits once. draw(step) -> Batch."""
    cfg, model, optimizers = setting
    steps = iter(range(10 ** 9))

    def case():
        for _ in range(PER_WAIT):
            step = next(steps)
            lejepa.train_step(model, optimizers, draw(step), step, cfg)
    return case


def step_table(args, data: TaskSet, device: str) -> Table:
    table = Table("The training step", ["size", "windows", "type", "", "ms", "windows/s", "times as fast as fp32 eager", "utilisation", "peak memory, GB", "first steps, s", "break-even, steps"])
    for size in args.size:
        windows = args.windows if size == "small" else max(12, args.windows // 8)
        cases, settings, cost = {}, {}, {}
        for dtype in ("fp32", "bf16"):
            for compiled in (False, True)[:1 + args.compile]:
                name = dtype, "compiled" if compiled else "eager"
                setting = prepare(size, dtype, windows, device, compiled)
                if setting is None:
                    continue
                settings[name], cases[name] = setting, step_case(setting, lambda step: data.batch(windows, 0, step % BATCHES))
                begin = time.perf_counter()
                for _ in range(BATCHES):               # every batch that the rounds will see: nothing compiles later
                    cases[name]()
                cost[name] = time.perf_counter() - begin
        times = take_turns(cases, args.rounds, warm=1)
        for name, spent in times.items():
            cfg, model, _ = settings[name]
            used = lejepa.utilisation(model, data, cfg, spent.median, BATCHES)
            gain = times[name[0], "eager"].median - spent.median
            even = "—" if name[1] == "eager" else f"{cost[name] / gain:.0f}" if gain > 0 else "never"
            table.add(size, windows, *name, 1e3 * spent.median, windows / spent.median, spent.against(times["fp32", "eager"]), f"{used:.0%}",
                      f"{peak_bytes(cases[name]) / 1e9:.2f}", f"{cost[name]:.0f}", even)
    return table


def parts_table(args, data: TaskSet, device: str) -> Table:
    table = Table("Share of a step by part, forward and backward, eager, bf16", ["size", "windows", *lejepa.PARTS, "other"])
    for size in args.size:
        windows = args.windows if size == "small" else max(12, args.windows // 8)
        cfg, model, optimizers = prepare(size, "bf16", windows, device)
        profiler, _ = lejepa.traced(model, optimizers, data, cfg, 2, 3)
        times = lejepa.part_times(profiler.events(), device)
        table.add(size, windows, *(f"{value / sum(times.values()):.1%}" for value in times.values()))
    return table


def batch_table(args, data: TaskSet, device: str) -> Table:
    table = Table("Time against batch size, small, bf16, eager", ["windows", "ms", "windows/s", "slots that hold a token", "peak memory, GB"])
    sizes = [args.windows // 4 * 2 ** i for i in range(5)]
    settings = {windows: prepare("small", "bf16", windows, device) for windows in sizes}
    cases = {windows: step_case(settings[windows], lambda step, windows=windows: data.batch(windows, 0, step)) for windows in sizes}
    for windows, spent in take_turns(cases, args.rounds).items():
        grids = [data.batch(windows, 0, step).grids for step in range(8)]
        filled = sum(float((g.grid < len(g.first)).sum()) for g in grids) / sum(g.grid.numel() for g in grids)
        table.add(windows, 1e3 * spent.median, windows / spent.median, f"{filled:.1%}", f"{peak_bytes(cases[windows]) / 1e9:.2f}")
    return table


# ---------------------------------------------------------------------------------------------- the naive step


def independent_windows(data: TaskSet, count: int, seed: int, step: int):
    """`count` windows drawn one by one, each with its own augmentation: the arguments of TokenTable.gather for 4 grids each."""
    random = np.random.default_rng([seed, step])
    tasks = random.choice(len(data.sizes), count)
    pairs = np.array([random.choice(data.sizes[task], 2, replace=False) for task in tasks])     # (W, 2)
    grids = (data.starts[tasks, None, None] + 2 * pairs[:, :, None] + [0, 1]).reshape(-1)       # in1, out1, in2, out2
    symmetry = random.integers(0, 8, count).repeat(4)
    colours = random.permuted(np.tile(np.arange(10), (count, 1)), axis=1).repeat(4, 0)
    return grids, symmetry, colours


def as_batch(grids: Grids) -> Batch:
    """Windows of four grids each, and as many objects for SIGReg as there are grids, of those that are in a slot."""
    count = len(grids.first)
    real = grids.kind[grids.grid < count].unique()
    return Batch(grids, torch.arange(count, device=real.device).view(-1, 4), real[torch.randperm(len(real), device=real.device)[:count]])


def padded(grids: Grids, slots: int = arc_data.OBJECTS + 1) -> Grids:
    """The same grids as one writes it down: a row a grid, padded to the cut, every slot with a bitmap of its own."""
    count, device = len(grids.first), grids.kind.device
    place = (grids.first[:, None] + torch.arange(slots, device=device)).clamp(max=grids.kind.numel() - 1)      # (G, slots)
    empty = torch.arange(slots, device=device) >= grids.count[:, None]
    kind = grids.kind.flatten()[place].masked_fill(empty, 0).flatten()
    box = grids.box.flatten(0, 1)[place].masked_fill(empty[..., None], 0)
    owner = torch.arange(count, device=device)[:, None].expand_as(place).masked_fill(empty, count)
    return Grids(grids.bits[kind], grids.colour[kind], grids.whole[kind], torch.arange(count * slots, device=device).view(count, slots),
                 box, owner, torch.arange(count, device=device) * slots, grids.count)


@contextlib.contextmanager
def plainly():
    """SIGReg by the plain form, for a while."""
    closed, lejepa.sigreg = lejepa.sigreg, plain_sigreg
    try:
        yield
    finally:
        lejepa.sigreg = closed


def naive_cases(args, data: TaskSet, device: str) -> dict:
    """The same model from the naive step to ours; each row adds one change to the row above."""
    windows = args.naive_windows
    gather = lambda step: data.table.gather(*independent_windows(data, windows, 0, step))
    draw, pad_draw = lambda step: as_batch(gather(step)), lambda step: as_batch(padded(gather(step)))

    def plain(case):
        def run():
            with plainly():
                return case()
        return run
    new = lambda dtype, draw: step_case(prepare("small", dtype, windows, device), draw)
    return {"naive: windows one by one, padded to the cut, fp32, plain SIGReg": plain(new("fp32", pad_draw)),
            "+ grids packed, each distinct object once": plain(new("fp32", draw)),
            "+ SIGReg in closed form": new("fp32", draw),
            "+ bf16": new("bf16", draw),
            "+ windows share the grids of a task": new("bf16", lambda step: data.batch(windows, 0, step))}


def naive_table(args, data: TaskSet, device: str, before: Times) -> Table:
    table = Table(f"From the naive step to ours, small, {args.naive_windows} windows", ["step", "ms", "windows/s", "gain of this change", "times as fast as naive"])
    cases = naive_cases(args, data, device)
    if args.compile and (setting := prepare("small", "bf16", args.naive_windows, device, True)):
        cases["+ torch.compile"] = step_case(setting, lambda step: data.batch(args.naive_windows, 0, step % BATCHES))
    names = list(cases)
    times = take_turns(cases, args.rounds)
    blocks = Times([statistics.median(times[names[0]])] * len(before))
    table.add(names[0] + ", glibc's allocator as it is", 1e3 * before.median, args.naive_windows / before.median, "", "1")
    table.add("+ large blocks kept", 1e3 * times[names[0]].median, args.naive_windows / times[names[0]].median, blocks.against(before), blocks.against(before))
    for above, name in zip(names, names[1:]):
        spent = times[name]
        table.add(name, 1e3 * spent.median, args.naive_windows / spent.median, spent.against(times[above]), f"{before.median / spent.median:.1f}")
    return table


# ---------------------------------------------------------------------------------------------- the command

TABLES = ("sigreg", "step", "parts", "batch", "naive")


def parse(argv=None):
    parser = evaluation.Parser(prog="bench.py", description="Speed tables of SIGReg and the training step.", allow_abbrev=False)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which (default: all)")
    parser.add_argument("--size", nargs="+", choices=tuple(lejepa.SIZES), default=["small"], help="sizes of the step (default: small)")
    parser.add_argument("--rounds", type=int, default=7, help="how often the cases of a table take turns (default: 7)")
    parser.add_argument("--windows", type=int, default=384, help="windows of a step; base and large take an eighth (default: 384)")
    parser.add_argument("--naive-windows", type=int, default=96, help="windows of a step in the naive table (default: 96)")
    parser.add_argument("--directions", type=int, default=1024, help="directions of SIGReg in its own table (default: 1024)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also measure torch.compile")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (default: auto)")
    parser.add_argument("--out", metavar="FOLDER", help="write bench.md and bench.json there, anew after each table")
    args = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("windows", 24), ("naive_windows", 6), ("directions", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: needs at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu or auto")
    try:
        Path(args.out or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def write(args, tables: list[Table]):
    if args.out:
        Path(args.out, "bench.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n")
        Path(args.out, "bench.json").write_text(json.dumps([{"title": t.title, "columns": t.columns, "rows": t.rows} for t in tables], indent=1))


def main():
    args = parse()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    torch._dynamo.config.recompile_limit = 64          # each size and type compiles the same functions once more
    print(f"{lejepa.describe_device(device)}, torch {torch.__version__}, commit {lejepa.commit() or 'unknown'}: python {' '.join(sys.argv)}")
    data = None
    if set(args.tables) - {"sigreg"}:
        data = TaskSet(arc_data.split("arcagi2:training", None)[0], device)
    tables = []

    def add(table):
        tables.append(table)
        write(args, tables)
    if "sigreg" in args.tables and device == "cpu":    # these two before the allocator is told: it cannot be untold
        add(sigreg_table(args, device, "glibc's allocator as it is", compiled=False))
    if "naive" in args.tables:
        first = next(iter(naive_cases(args, data, device).items()))
        before = take_turns(dict([first]), args.rounds)[first[0]]
    lejepa.keep_large_blocks()
    if "sigreg" in args.tables:
        add(sigreg_table(args, device, "large blocks kept", args.compile))
    for name, make in (("step", step_table), ("parts", parts_table), ("batch", batch_table)):
        if name in args.tables:
            add(make(args, data, device))
    if "naive" in args.tables:
        add(naive_table(args, data, device, before))


if __name__ == "__main__":
    main()
