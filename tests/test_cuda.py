"""On the simulated GPU of simcuda.py: no mixed devices, no hidden wait, the weights of the CPU."""
import numpy as np
import pytest
import torch
from conftest import synthetic_tasks
from simcuda import GPUTensor, simulated_cuda
from torch.utils._python_dispatch import TorchDispatchMode

import lejepa
from arc_data import TaskSet
from harness import bench, checkpoint, gpu, run

WINDOWS = 24
MAY_WAIT = ("run.read", "run.evaluate", "run.save", "run.finish", "run.prepare")


@pytest.fixture(autouse=True)
def toy_width(monkeypatch):
    """Every size with its own heads and ratios, narrow and shallow."""
    for name, size in lejepa.SIZES.items():
        toy = size._replace(width=4 * size.heads, pooled=16 * size.heads, hidden=24, dim=16, directions=32,
                            encoder_layers=2, predictor_layers=2)
        monkeypatch.setitem(lejepa.SIZES, name, toy)


@pytest.fixture
def shallow(monkeypatch):
    one_layer = lejepa.SIZES["small"]._replace(encoder_layers=1, predictor_layers=1)
    monkeypatch.setitem(lejepa.SIZES, "small", one_layer)


def make(size, device, tasks, code="gaussian", objective="lejepa"):
    cfg = lejepa.resolve_defaults(lejepa.Config(size=size, device=device, dtype="fp32", batch_size=WINDOWS,
                                                steps=2, compile=False, code=code, objective=objective))
    model = lejepa.build(cfg).to(device).train()
    optimizers, data = lejepa.make_optimizers(model, cfg), TaskSet(tasks, device)
    gpu.prepare(optimizers, data, device)
    return model, optimizers, data, cfg


def test_on_a_gpu_the_next_batch_is_drawn_ahead_and_is_the_one_of_its_seed_and_step():
    data, calls = TaskSet(synthetic_tasks(12)), []

    def draw(*given):
        calls.append(given)
        return plain(*given)
    plain, data.draw = data.draw, draw
    gpu.prepare([], data, "cuda")
    for step in (0, 1, 2, 7, 8):
        found, expected = data.draw(12, 3, step), plain(12, 3, step)
        assert all(np.array_equal(a, b) for a, b in zip(found[:6], expected[:6]))
        assert all(np.array_equal(a, b) for a, b in zip(found[6], expected[6]))
    data.draw.pool.shutdown()
    assert calls == [(12, 3, step) for step in (0, 1, 2, 3, 7, 8, 9)]      # no step twice
    data.draw.draw = None                              # the next batch is there already
    data.draw.ahead[12, 3, 9].result()


class Launches(TorchDispatchMode):
    """Counts the operations that compute."""
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def test_muon_on_a_gpu_has_the_bits_of_the_librarys_and_no_more_launches_for_more_matrices():
    shapes, launches = [(6, 4), (4, 6), (5, 5)], {}
    for copies in (1, 4):
        both = [[torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
                 for i, shape in enumerate(shapes * copies)] for _ in range(2)]
        cfg, vector = lejepa.Config(lr=0.02), torch.nn.Parameter(torch.ones(3))
        library, batched = [lejepa.make_optimizers(torch.nn.ParameterList([*some, vector]), cfg)[0]
                            for some in both]
        batched.__class__ = gpu.BatchedMuon
        for step in range(4):
            for i, pair in enumerate(zip(*both)):
                gradient = torch.randn(pair[0].shape, generator=torch.Generator().manual_seed(100 * step + i))
                for p in pair:
                    p.grad = gradient.clone()
            library.step()
            with Launches() as counted:
                batched.step()
        launches[copies] = counted.count
        assert all(torch.equal(a, b) for a, b in zip(*both))
        found, expected = batched.state_dict()["state"], library.state_dict()["state"]
        assert found.keys() == expected.keys()         # so that a checkpoint of either fits the other
        assert all(torch.equal(found[i]["momentum_buffer"], expected[i]["momentum_buffer"]) for i in expected)
    assert launches[4] == launches[1] < 100


def values(model, optimizers):
    state = checkpoint.state_of(model, optimizers)
    return {name: value.held if isinstance(value, GPUTensor) else value for name, value in state.items()}


@pytest.mark.parametrize("size", list(lejepa.SIZES))
def test_training_on_a_gpu_never_waits_and_its_weights_are_those_of_the_cpu(size):
    tasks = synthetic_tasks(40)
    on_cpu = make(size, "cpu", tasks)
    lejepa.train(*on_cpu)
    with simulated_cuda() as waits:
        on_gpu = make(size, "cuda", tasks)
        waits.clear()                                  # the data and the model are moved once
        lejepa.train(*on_gpu)
        assert not waits
        assert all(isinstance(value, GPUTensor) for value in on_gpu[0].state_dict().values())
        found, expected = values(*on_gpu[:2]), values(*on_cpu[:2])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("code, objective", [("ema", "lejepa"), ("none", "infonce")])
def test_the_other_codes_and_objectives_mix_no_devices(code, objective):
    with simulated_cuda():
        model, optimizers, data, cfg = make("small", "cuda", synthetic_tasks(41), code, objective)
        assert lejepa.train(model, optimizers, data, cfg) == cfg.steps


def test_a_planted_wait_is_found_with_its_place(monkeypatch):
    clip, tasks = torch.nn.utils.clip_grad_norm_, synthetic_tasks(42)

    def clip_by_a_read_norm(parameters, most):
        parameters = list(parameters)
        return clip(parameters, float(clip(parameters, most)))
    with simulated_cuda() as waits:
        args = make("small", "cuda", tasks)
        waits.clear()
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_by_a_read_norm)
        lejepa.train(*args)
    assert len(waits) == 2 and all(names[-1] == "lejepa.train_step" for _, names in waits)


def test_a_cpu_tensor_among_gpu_tensors_is_an_error():
    with simulated_cuda():
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        assert (x + torch.tensor(1.0)).sum().item() == 6                       # a scalar is passed along


@pytest.mark.whole
def test_the_checks_of_the_bench_pass_and_name_a_planted_wait(shallow, monkeypatch):
    tasks, write = synthetic_tasks(43), lejepa.update_average
    with simulated_cuda():
        case = bench.Step(TaskSet(tasks, "cuda"), "small", "fp32", "eager", WINDOWS)
        case()
        assert list(bench.check(case, tasks)) == []
        waiting = lambda model, step: write(model, int(torch.ones(1, device="cuda")))
        monkeypatch.setattr(lejepa, "update_average", waiting)
        line = next(bench.check(case, tasks))
        assert "wait" in line and "lejepa.py" in line


@pytest.mark.whole
def test_the_checks_of_the_bench_find_results_other_than_the_cpus(shallow, monkeypatch):
    tasks = synthetic_tasks(44)
    with simulated_cuda():
        case = bench.Step(TaskSet(tasks, "cuda"), "small", "fp32", "eager", WINDOWS)
        assert bench.compare_with_cpu(case, tasks) == 0
        rms_norm = torch.nn.functional.rms_norm
        monkeypatch.setattr(torch.nn.functional, "rms_norm",
                            lambda z, *a, **k: rms_norm(z, *a, **k) * (1.01 if z.is_cuda else 1))
        assert 1e-3 < bench.compare_with_cpu(case, tasks) < 1


def a_run(folder, device, steps, resume=False):
    """A run without its final evaluation. Returns what a step changes, and what `finish` needs."""
    folder.mkdir(exist_ok=True)
    cfg = lejepa.Config(run=str(folder), size="small", device=device, dtype="fp32", steps=steps,
                        batch_size=WINDOWS, compile=False, resume=resume)
    tasks, held_out, cfg = synthetic_tasks(45), synthetic_tasks(46, tasks=6), lejepa.resolve_defaults(cfg)
    data, model, optimizers, log, start = run.prepare(cfg, tasks, held_out, 0.0)
    lejepa.train(model, optimizers, data, cfg, start, log.after_step)
    return values(model, optimizers), log, data


@pytest.mark.whole
def test_a_run_on_a_gpu_is_evaluated_saved_and_resumed_with_the_weights_of_the_cpu(
        shallow, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "eval_interval", lambda cfg: 2)
    expected, log, _ = a_run(tmp_path / "cpu", "cpu", 4)
    log.close()
    with simulated_cuda() as waits:
        _, log, _ = a_run(tmp_path / "cuda", "cuda", 2)
        log.close()
        found, log, data = a_run(tmp_path / "cuda", "cuda", 4, resume=True)
        assert not waits.outside(*MAY_WAIT)
        result = log.finish(lejepa.build(log.cfg).to("cuda").eval(), data.windows, 4)
        log.close()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 0 <= result["ndcg10_without_out1"] <= 1
    saved = lejepa.read_checkpoint(tmp_path / "cuda")[0]
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
