"""Claims of speed that can be tested without a clock: the fast step is the plain one, nothing recompiles, bench.py's rows are what they say."""
import copy
import dataclasses
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_tasks

import bench
import lejepa
from arc_data import Batch, Task, TaskSet

ROOT = Path(__file__).parent.parent


def setting(windows=30, dtype="fp32"):
    cfg = lejepa.Config(size="small", dtype=dtype, batch_size=windows, lr=2e-3, device="cpu", compile=False)
    model = lejepa.build(cfg).train()
    return cfg, model, lejepa.make_optimizers(model, cfg)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setitem(lejepa.SIZES, "small", lejepa.SIZES["small"]._replace(width=32, heads=2, pooled=32, hidden=32, dim=32, directions=64))


@pytest.fixture
def no_dropout(monkeypatch):
    """Dropout draws by layout, so it would tell two layouts of one batch apart."""
    monkeypatch.setattr(lejepa, "DROPOUT", 0.0)


@pytest.mark.parametrize("frequency", [None, lejepa.FREQUENCY])
def test_the_plain_sigreg_of_the_tables_is_the_same_statistic(frequency):
    z = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=0)
    values, grads = [], []
    for function in (bench.plain_sigreg, lejepa.sigreg):
        leaf = z.clone().requires_grad_()
        values.append(function(leaf, directions, frequency))
        values[-1].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 1e-5


def unpacked(batch):
    """The batch as the naive step takes it, with the same objects for SIGReg."""
    grids = batch.grids
    kinds, places = grids.kind.flatten().tolist(), zip(grids.first.tolist(), grids.count.tolist())
    slot = {kinds[first + i]: number * 61 + i for number, (first, count) in enumerate(places) for i in range(count)}
    return Batch(bench.padded(grids), batch.index, torch.tensor([slot[kind] for kind in batch.objects.tolist()]))


def test_the_fast_step_equals_the_naive_one_over_20_steps(no_dropout):
    """Step by step from the same weights, within fp32 rounding; left alone, rounding moves a code over its edge some time and grows."""
    data = TaskSet(synthetic_tasks(31))
    cfg, fast, optimizers = setting()
    naive, alone = copy.deepcopy(fast), copy.deepcopy(fast)
    its_own = lejepa.make_optimizers(alone, cfg)
    for step in range(20):
        batch = data.batch(30, 0, step)
        naive.load_state_dict(fast.state_dict())
        ours = lejepa.train_step(fast, optimizers, batch, step, cfg)
        with bench.plainly():
            theirs = lejepa.train_step(naive, lejepa.make_optimizers(naive, cfg), unpacked(batch), step, cfg)
            drifted = lejepa.train_step(alone, its_own, unpacked(batch), step, cfg)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=2e-4, atol=1e-6, msg=lambda text: f"step {step}, {name}: {text}")
        torch.testing.assert_close(ours["loss"], drifted["loss"], rtol=0.05, atol=0)


def test_windows_drawn_one_by_one_are_windows_of_one_task_with_one_augmentation_each():
    data = TaskSet(synthetic_tasks(32))
    grids, symmetry, colours = bench.independent_windows(data, 40, 0, 3)
    owner = np.searchsorted(data.starts, grids, side="right") - 1
    for each in range(40):
        four = slice(4 * each, 4 * each + 4)
        assert len(set(owner[four])) == 1 and len(set(symmetry[four])) == 1 and len({tuple(row) for row in colours[four]}) == 1
        a, b, c, d = grids[four]
        assert a != c and (a - data.starts[owner[4 * each]]) % 2 == 0 and b == a + 1 and d == c + 1


def test_nothing_recompiles_after_warm_up_and_no_graph_breaks(monkeypatch):
    """By the tracer alone, which decides both; the code that it hands on is run as it is."""
    import torch._dynamo
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    data = TaskSet(synthetic_tasks(33))
    cfg, model, optimizers = setting()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert lejepa.compile_parts(model)
    counts = []
    for step in range(8):
        lejepa.train_step(model, optimizers, data.batch(30, 0, step), step, cfg)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 3 and counts[2] == counts[-1], counts
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["code", "predictor"])
def test_the_backward_of_a_part_counts_as_that_part(part):
    data = TaskSet(synthetic_tasks(34))
    cfg, model, optimizers = setting()
    owner = model.encoder.objects if part == "code" else model.predictor
    forward = owner.forward

    def slow(x):
        y = forward(x)
        y.register_hook(lambda grad: time.sleep(0.3))
        return y
    owner.forward = slow
    profiler, rate = lejepa.traced(model, optimizers, data, cfg, 1, 2)
    events = profiler.events()
    times = lejepa.part_times(events, "cpu")
    steps = sum(event.cpu_time_total for event in events if event.name.startswith("ProfilerStep"))
    assert 0.6e6 < times[part] and all(0 < value < 0.5e6 for name, value in times.items() if name != part), times
    assert sum(times.values()) == pytest.approx(steps, rel=0.05) and rate > 0


def test_without_a_compiler_the_run_goes_on_eagerly_with_one_line_and_its_record_says_so(capsys, monkeypatch, tmp_path):
    def broken(function, **options):
        def run(*args):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")
        return run
    monkeypatch.setattr(torch, "compile", broken)
    pair = (np.eye(3, dtype=np.int8), np.ones((3, 3), np.int8))
    cfg = dataclasses.replace(setting()[0], compile=True, profile=True, run=str(tmp_path))
    _, model, *_ = lejepa.prepare(cfg, {"a": Task([pair, pair[::-1]], [])}, {}, [], 0.0)
    assert "forward" not in vars(model.predictor)
    assert capsys.readouterr().err.count("\n") == 1
    assert json.loads((tmp_path / "config.json").read_text())["compiled"] is False


@pytest.mark.whole
def test_bench_prints_its_tables_and_writes_them(tmp_path):
    words = [sys.executable, "bench.py", "--no-compile", "--rounds", "1", "--windows", "24", "--naive-windows", "6", "--directions", "32", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(tables) == 6 and all(row for table in tables for row in table["rows"])
    assert all(len(row) == len(table["columns"]) for table in tables for row in table["rows"])
    assert all(table["title"] in (tmp_path / "out" / "bench.md").read_text() and table["title"] in done.stdout for table in tables)
