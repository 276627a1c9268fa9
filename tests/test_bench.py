"""Claims of speed that can be tested without a clock: the fast step equals the naive one, nothing recompiles,
and the rows of `python -m harness.bench` are what they say."""
import argparse
import copy
import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_tasks

import arc_data
import lejepa
from arc_data import Task, TaskSet
from harness import bench, profiling, run

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "harness.bench"]


def setting(windows=30, dtype="fp32"):
    cfg = lejepa.Config(size="small", dtype=dtype, batch_size=windows, lr=2e-3, device="cpu", compile=False)
    model = lejepa.build(cfg).train()
    return cfg, model, lejepa.make_optimizers(model, cfg)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    toy = lejepa.SIZES["small"]._replace(width=32, heads=2, pooled=32, hidden=32, dim=32, directions=64)
    monkeypatch.setitem(lejepa.SIZES, "small", toy)


def test_the_plain_sigreg_of_the_tables_is_the_same_statistic():
    z = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=0)
    values, grads = [], []
    for function in (bench.plain_sigreg, lejepa.sigreg):
        leaf = z.clone().requires_grad_()
        values.append(function(leaf, directions))
        values[-1].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 1e-5


def test_the_fast_step_equals_the_naive_one_over_10_steps(monkeypatch):
    """Step by step from the same weights, within fp32 rounding, which in time moves a code over its edge."""
    monkeypatch.setattr(lejepa, "DROPOUT", 0.0)        # drawn by layout, it would tell two layouts apart
    monkeypatch.setattr(lejepa.Encoder, "NESTED", 0.0)
    data = TaskSet(synthetic_tasks(31))
    cfg, fast, optimizers = setting(18)
    naive, alone = copy.deepcopy(fast), copy.deepcopy(fast)
    its_own = lejepa.make_optimizers(alone, cfg)
    for step in range(10):
        naive.load_state_dict(fast.state_dict())
        ours = lejepa.train_step(fast, optimizers, data.batch(18, 0, step), step, cfg)
        batch = bench.padded(data, 18, 0, step)
        with mock.patch.object(lejepa, "sigreg", bench.plain_sigreg):
            theirs = lejepa.train_step(naive, lejepa.make_optimizers(naive, cfg), batch, step, cfg)
            drifted = lejepa.train_step(alone, its_own, batch, step, cfg)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=2e-4, atol=1e-6, msg=f"step {step}, {name}")
        torch.testing.assert_close(ours["loss"], drifted["loss"], rtol=0.05, atol=0)


def test_a_naive_batch_has_a_window_a_task_and_a_padded_row_a_grid():
    data = TaskSet(synthetic_tasks(32))
    batch = bench.draw_naive(data, 40, 0, 3)
    assert batch.index.shape == (40, 6) and batch.grids.object_id.shape == (160, bench.SLOTS)
    assert batch.shown.tolist() == [[True, False]] * 40    # of the two pairs of a task, one is given
    used = batch.index[:, [0, 1, 4, 5]].sort(1).values
    assert used.tolist() == np.arange(160).reshape(40, 4).tolist()
    assert batch.grids.object_id.flatten().tolist() == list(range(160 * bench.SLOTS)) and data.pairs == 3
    assert (batch.grids.grid[torch.arange(160), 0] == torch.arange(160)).all()


class Device:
    """A GPU with a clock: a call takes 1 ms to issue and 10 ms to run; the wait lasts until all have run."""

    def __init__(self):
        self.now = self.busy_until = 0.0

    def call(self):
        self.now += 0.001
        self.busy_until = max(self.now, self.busy_until) + 0.010

    def synchronize(self):
        self.now = max(self.now, self.busy_until)


def test_a_time_is_that_of_one_call_however_many_are_made_between_two_waits(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    times = bench.take_turns({"a": device.call, "b": lambda: [device.call(), device.call()]}, 3, "cuda")
    assert times["a"] == pytest.approx([0.0101] * 3) and times["b"] == pytest.approx([0.0201] * 3)
    assert bench.timed(device.call, "cuda", to_end=False) == pytest.approx(0.001)
    assert str(times["a"]) == "10.1 (10.1-10.1)" and times["b"].against(times["a"]).startswith("0.50")
    assert bench.timed(device.call, "cpu") == pytest.approx(0.001)           # nothing waits for a GPU


def trace_one_step(monkeypatch):
    monkeypatch.setattr(profiling, "WARM", 1)
    monkeypatch.setattr(profiling, "TRACED", 1)


@pytest.mark.whole
def test_a_mode_that_fails_and_a_late_compilation_are_failures_and_the_other_rows_stay(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory\nmore")
    counters = torch._dynamo.utils.counters
    step = lejepa.train_step

    def compiling(*args):
        counters["stats"]["unique_graphs"] += 1
        return step(*args)
    monkeypatch.setattr(profiling, "compile_parts", fail)
    monkeypatch.setattr(lejepa, "train_step", compiling)
    monkeypatch.setattr(bench, "FIRST", 1)
    trace_one_step(monkeypatch)
    args = argparse.Namespace(size=["small"], windows=[12], modes=["eager", "compiled"], device="cpu",
                              rounds=1, data=TaskSet(synthetic_tasks(35)), failures=[],
                              product={"fp32": 1e9, "bf16": 1e9})
    _, columns, *rows = bench.step_table(args)
    assert [row[2:4] for row in rows] == [("fp32", "eager"), ("bf16", "eager")]
    assert all(len(row) == len(columns) for row in rows)
    assert args.failures == ["small, fp32 compiled: CUDA out of memory",
                             "small, bf16 compiled: CUDA out of memory",
                             "small: torch.compile ran again after step 1"]


@pytest.mark.whole
def test_nothing_recompiles_after_warm_up_and_no_graph_breaks(monkeypatch):
    """By the tracer alone, which decides both; the code that it hands on is run as it is."""
    import torch._dynamo
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    data = TaskSet(synthetic_tasks(33))
    cfg, model, optimizers = setting()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert profiling.compile_parts(model, data, cfg)
    counts = []
    for step in range(8):
        lejepa.train_step(model, optimizers, data.batch(30, 0, step), step, cfg)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 3 and counts[2] == counts[-1], counts
    assert not torch._dynamo.utils.counters["graph_break"]
    counts = []
    for windows, demonstrations in ((7, 2), (9, 2), (9, 3)):
        z = torch.randn(windows, 2 * demonstrations + 1, lejepa.SIZES["small"].dim)
        model.predictor(z, torch.ones(windows, demonstrations, dtype=torch.bool))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == counts[2] - 1     # only the number of demonstrations is fixed
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.whole
def test_the_step_compiles_in_bf16(capsys):
    """With a dynamic number of demonstrations torch 2.13 fails here, and in bf16 alone."""
    cfg, model, _ = setting(dtype="bf16")
    assert profiling.compile_parts(model, TaskSet(synthetic_tasks(33)), cfg) and not capsys.readouterr().err


@pytest.mark.parametrize("part", ["code", "predictor"])
def test_the_backward_of_a_part_counts_as_that_part(part, monkeypatch):
    data = TaskSet(synthetic_tasks(34))
    cfg, model, optimizers = setting()
    owner = model.encoder.objects if part == "code" else model.predictor
    forward = owner.forward

    def slow(*inputs):
        y = forward(*inputs)
        y.register_hook(lambda grad: time.sleep(0.6))
        return y
    owner.forward = slow
    trace_one_step(monkeypatch)
    profiler, rate = profiling.trace_steps(model, optimizers, data, cfg)
    events = profiler.events()
    times = profiling.part_times(events, "cpu")
    steps = sum(event.cpu_time_total for event in events if event.name.startswith("ProfilerStep"))
    others = [value for name, value in times.items() if name != part]
    assert 0.6e6 < times[part] and all(0 < value < 0.5e6 for value in others), times
    assert sum(times.values()) == pytest.approx(steps, rel=0.05) and rate > 0


def test_without_a_compiler_the_run_goes_on_eagerly_with_one_line_and_its_record_says_so(
        capsys, monkeypatch, tmp_path):
    def broken(function, **options):
        def fail(*args):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    pair = (np.eye(3, dtype=np.int8), np.ones((3, 3), np.int8))
    cfg = dataclasses.replace(setting()[0], steps=1, compile=True, profile=True, run=str(tmp_path))
    _, model, *_ = run.prepare(cfg, {"a": Task([pair, pair[::-1]], [])}, {}, 0.0)
    assert "forward" not in vars(model.predictor)
    assert capsys.readouterr().err.count("\n") == 1
    assert json.loads((tmp_path / "config.json").read_text())["compiled"] is False


@pytest.mark.parametrize("words, text", [
    (["--rounds", "0"], "at least 1"), (["--tables", "a"], "invalid"), (["--device", "cuda"], "no GPU")])
def test_a_wrong_flag_is_one_line_and_status_2(words, text, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_flags(words)
    message = capsys.readouterr().err
    assert end.value.code == 2 and text in message and message.count("\n") == 1


@pytest.mark.whole
def test_bench_prints_its_tables_and_writes_them(tmp_path, monkeypatch, capsys):
    """On small tasks, a small model and small samples; the next test runs the command itself."""
    monkeypatch.setattr(arc_data, "split", lambda *_: (synthetic_tasks(36), {}, []))
    monkeypatch.setattr(bench, "SHAPES", [(64, 8), (96, 16)])
    monkeypatch.setattr(bench, "FIRST", 2)
    monkeypatch.setattr(profiling.matmul_rate, "__defaults__", (1,))
    trace_one_step(monkeypatch)
    monkeypatch.setattr(run, "keep_large_blocks", lambda: None)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    words = ["--modes", "naive", "eager", "--rounds", "1", "--windows", "24", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as end:
        bench.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    tables = json.loads((tmp_path / "out" / "bench.json").read_text())["tables"]
    assert len(tables) == 3 and all(row for table in tables for row in table["rows"])
    assert (tmp_path / "out" / "bench.md").read_text().strip() == printed.strip()


@pytest.mark.whole
def test_ctrl_c_ends_with_status_130_and_no_traceback():
    process = subprocess.Popen(COMMAND + ["--tables", "sigreg"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while "SIGReg" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
