"""Why the recorded runs failed, by runs on this project's data: runs, tables, plots and a page.

    python -m harness.autopsy --out FOLDER [--steps 200] [--seeds 1] [--only 1 4] [flags of lejepa.py ...]

Runs go one after the other into FOLDER. One that has a result is not repeated; one that was interrupted is
resumed. autopsy.md takes the figures of all that are there: means over seeds, ± half the range.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness import charts, checkpoint
from arc_data import need
from harness.checkpoint import write_file
from harness.run import Parser

ROOT = Path(__file__).parent.parent
FAULTS = dict.fromkeys(("unit", "relu", "shapeless", "training_mode", "padding", "same_grid", "recolour"),
                       ("no", "yes")) | {"vq_loss": ("used", "none")}
ALIGNED = "--preset lejepa-aligned --faithful --lr 0.003 --legacy optimizer=muon"
CLEAN = ALIGNED.replace("--faithful ", "")             # no fault at all
GENTLE = "--preset gentle --lr 0.003 --weight-decay 0.5 --legacy optimizer=muon"
PLAIN = "--objective sum --code none"
SUM = f"{PLAIN} --legacy relational=0.025"
EXPERIMENTS = {  # number: (title, {name of a run: its flags})
    1: ("SIGReg of embeddings of length 1", {
        "default": "", "published": "--memory 0", "unit": "--memory 0 --objective broken --legacy unit=yes"}),
    2: ("The relational loss and the spread of embeddings", {
        "raw": SUM, "normalised": f"{SUM},normalised=yes", "sum": PLAIN}),
    3: ("Codebooks and refreshes", {
        "default": "", "vq-cold": "--code vq --legacy start=cold",
        "vq-500": "--code vq --legacy start=cold,refresh=500,threshold=0.05",
        "vq-3000": "--code vq --legacy start=cold,refresh=3000,threshold=0.01"}),
    4: ("Which fault makes lejepa-aligned collapse", {
        "faithful": ALIGNED, "faithful-averaged": f"{ALIGNED},target=averaged",
        "clean": CLEAN} | {
        f"without-{fault}": f"{ALIGNED},{fault}={off}" for fault, (off, _) in FAULTS.items()} | {
        f"only-{fault}": f"{CLEAN},{fault}={on}" for fault, (_, on) in FAULTS.items()}),
    5: ("What a discrete bottleneck costs", {
        "none": "--code none", "default": ""} | {
        f"code-{code}": f"--code {code}" + " --legacy codes=4" * (code in ("vq", "gradient", "gumbel"))
        for code in ("fsq", "ema", "vq", "gradient", "gumbel")}),
    6: ("Presets and objectives", {
        "default": "", "infonce": "--objective infonce", "relational": "--objective relational",
        "averaged": "--objective broken --legacy target=averaged",
        "stopped": "--objective broken --legacy target=stopped",
        "unit": "--memory 0 --objective broken --legacy unit=yes",
        "relu": "--objective broken --legacy relu=yes"} | {
        name: f"--preset {name}" for name in (
            "sixth", "no-vq", "no-refresh", "gentle", "optimized", "production", "v2", "stable-production",
            "lejepa-aligned", "gumbel", "combined")} | {
        "gentle-muon": GENTLE, "gentle-muon-analogy": f"{GENTLE} --context analogy",
        "margin": "--objective broken --legacy margin=0.1", "scaling": "--legacy scaling=yes",
        "sum": PLAIN, "masked": f"{PLAIN} --legacy masked=0.1",
        "next-frame": f"{PLAIN} --legacy next_frame=0.1"})}
COLUMNS = {  # of the tables: heading -> figure of result.json
    "nDCG@10 without out1": "ndcg10_without_out1", "within-task": "within_task",
    "all demonstrations": "all_demonstrations", "rank context": "effective_rank_context",
    "rank target": "effective_rank_target", "usage": "codes_usage", "perplexity": "codes_perplexity",
    "gradient norm, most": "grad_norm_max", "windows/s": "samples_per_s"}
CURVES = {  # of the plot of an experiment; 4 and 6 have too many runs and get bars
    1: ("sigreg_z", "effective_rank_target"), 2: ("relational", "grad_norm"), 3: ("codes_usage", "sigreg_y"),
    5: ("codes_usage", "prediction")}
BARS = ("ndcg10_without_out1", "effective_rank_target")

def run(flags: list[str], folder: Path):
    """One run of lejepa.py to its end. RuntimeError if it fails."""
    resume = ["--resume"] if (folder / "last.safetensors").exists() else []
    command = [sys.executable, str(ROOT / "lejepa.py"), *flags, "--run", str(folder), *resume]
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode:
        raise RuntimeError(f"{folder.name} ended early; the same command continues it")

def folders(out: Path, name: str, seeds: int) -> list[Path]:
    """The folders of a run's seeds. Equal names have equal flags in all experiments."""
    return [out / f"{name}-{seed}" for seed in range(seeds)]

def mean(values: list) -> str:
    """The mean of what is known, and half the range."""
    known = [value for value in values if charts.number(value) is not None]
    if not known:
        return "–"
    spread = f" ± {(max(known) - min(known)) / 2:.3g}" if len(known) > 1 else ""
    return f"{np.mean(known):.4g}{spread}"

def table(out: Path, runs: dict, seeds: int) -> str:
    """A markdown table of the runs of an experiment, a row a run."""
    lines = ["| run | flags | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, flags in runs.items():
        done = [path / "result.json" for path in folders(out, name, seeds)]
        results = [checkpoint.read_json(path) for path in done if path.exists()]
        cells = [mean([result.get(key) for result in results]) for key in COLUMNS.values()]
        lines.append(f"| {name} ({len(results)} seeds) | `{flags or 'default'}` | {' | '.join(cells)} |")
    return "\n".join(lines)

@charts.styled
def plot(out: Path, number: int, runs: dict) -> str:
    """Seed 0: bars of results, or curves over training beside those of the recorded `production`."""
    keys, is_bars = CURVES.get(number, BARS), number not in CURVES
    figure = Figure(figsize=(4.6 * len(keys), 0.7 + 0.2 * len(runs) if is_bars else 3.2))
    for axis, key in zip(figure.subplots(1, len(keys), sharey=is_bars), keys):
        if is_bars:
            done = {name: folders(out, name, 1)[0] / "result.json" for name in runs}
            values = {name: checkpoint.read_json(path)[key] for name, path in done.items() if path.exists()}
            axis.barh(list(values), list(values.values()), color=charts.SERIES[0])
            axis.set(title=key, ylim=(len(values) - 0.5, -0.5))
            continue
        for name, colour in zip(runs, charts.SERIES):
            path = folders(out, name, 1)[0]
            points = charts.points(checkpoint.read_log(path) if path.exists() else [], key)
            axis.plot(*zip(*points), label=name, color=colour) if points else None
        recorded = charts.RECORDED.get(key)
        if recorded and axis.lines:
            last = max(line.get_xdata()[-1] for line in axis.lines)
            steps = np.array(charts.RECORDED["step"]) * last / charts.RECORDED["step"][-1]
            axis.plot(steps, recorded, "k:", label="recorded, of 7600 steps")
        axis.set(title=key, xlabel="step")
        axis.legend() if axis.lines else None
    write_file(out / f"experiment{number}.png", charts.png(figure))
    return f"![{', '.join(keys)}](experiment{number}.png)"

def main(argv=None):
    parser = Parser(prog="python -m harness.autopsy", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the page")
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--seeds", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--only", type=int, nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    args, more = parser.parse_known_args(argv)
    set_here = {"--seed", "--run", "--resume"} & {word.partition("=")[0] for word in more}
    need(not set_here, f"{' '.join(sorted(set_here))} would be overwritten: each run gets its own")
    args.out.mkdir(parents=True, exist_ok=True)
    more = more if any(word.startswith("--validate") for word in more) else ["--validate", "dev", *more]
    page = ["# Why the recorded runs failed",
            f"`python -m harness.autopsy --steps {args.steps} --seeds {args.seeds} {' '.join(more)}`"]
    for number, (title, runs) in EXPERIMENTS.items():
        for name, flags in runs.items() if number in args.only else ():
            for seed, folder in enumerate(folders(args.out, name, args.seeds)):
                wanted = [*flags.split(), *more, "--steps", str(args.steps), "--seed", str(seed)]
                if (folder / "result.json").exists():
                    command = checkpoint.read_json(folder / "config.json")["command"]
                    need(f" {' '.join(wanted)} " in command,
                         f"{folder} holds a run with other flags; give another --out folder")
                else:
                    run(wanted, folder)
        page += [f"## {number}. {title}", table(args.out, runs, args.seeds), plot(args.out, number, runs)]
        write_file(args.out / "autopsy.md", ("\n\n".join(page) + "\n").encode())
    print(f"page: {args.out / 'autopsy.md'}")

if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, ValueError) as error:
        print(f"autopsy: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
