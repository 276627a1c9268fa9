"""Several processes train as one: loss, gradient, weights and the run are those of one process."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import synthetic_tasks
from forked import (TOY, assert_same_bits, at, child, fork, make_small, poison, read_tensors, refused, stop,
                    toy_flags)

import arc_data
import lejepa
from harness import checkpoint, distributed

ROOT = Path(__file__).parent.parent
FLAGS = {"size": "small", "device": "cpu", "dtype": "fp32", "compile": False, "steps": 2, "batch_size": 40,
         "lr": 6e-3}
MEMORIES = (50, 0)                             # SIGReg(z): local, with a memory that overflows; as published
# What a BatchNorm or a softmax (the keys' bias) subtracts has a gradient of 0 up to rounding; AdamW makes a
# step of it.
CANCELLED = ("projector.0.bias", "head.0.bias", "projector.1.running_mean", "head.1.running_mean")
PRIME = 7                                      # tasks in a batch: no number of ranks divides it


@contextlib.contextmanager
def toy_size():
    """The toy size, without what differs by rank: dropout, and codes that are dropped at random."""
    with mock.patch.dict(lejepa.SIZES, small=TOY), mock.patch.object(lejepa, "DROPOUT", 0.0), \
            mock.patch.object(lejepa.Encoder, "NESTED", 0.0):
        yield


def tasks():
    return synthetic_tasks(0, pairs=(2, 6), side=(1, 5), colours=3)            # ranks share many shapes


def as_rank(number, count, folder):
    """Makes this process a rank as torchrun does, with a file in place of a port."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    url = f"file://{folder}/store?rank={number}&world_size={count}"
    distributed.start = partial(distributed.start, url=url)


# ----------------------------------------------------------------------------------------- loss and weights


def random_loss(model, data, cfg):
    """Values and gradients of the loss in float64, for random embeddings and linear numbers of the shapes."""
    batch = data.batch(cfg.batch_size, 0, 0)
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    z, weight = draw(2 * data.pairs * PRIME, TOY.dim), draw(arc_data.BYTES, 20)
    before = sum(part_sizes(len(batch.grids.first))[:distributed.rank()])      # grids on earlier ranks
    z = z[before:before + len(batch.grids.first)].clone().requires_grad_()
    weight.requires_grad_()
    y = batch.grids.bits.double() @ weight / 256
    z_hat = z[batch.index[:, 0]] + z[batch.index[:, -2]]
    directions = [lejepa.draw_directions(dim, 32, cfg, 0).double() for dim in (TOY.dim, 5)]
    loss, terms = model.objective.compute_loss(model, batch, z, z_hat, y, *directions, 0.4)
    loss.backward()
    values = torch.stack([loss, *terms.values()]).detach()
    return {"values": values, "z": z.grad, "weight": weight.grad}


def part_sizes(own):
    if distributed.ranks() == 1:
        return [own]
    sizes = [None] * distributed.ranks()
    dist.all_gather_object(sizes, own)
    return sizes


def two_steps(cfg):
    """Everything that two training steps changed, with their terms."""
    data = (arc_data.TaskSet if distributed.ranks() == 1 else distributed.RankTasks)(tasks())
    model = lejepa.build(cfg)
    optimizers, terms = lejepa.make_optimizers(model, cfg), []
    trained = distributed.replicate(model, data, cfg)
    lejepa.train(trained, optimizers, data, cfg, after_step=lambda _, found, __: terms.append(found))
    return {"state": checkpoint.state_of(model, optimizers), "terms": terms}


def measure():
    """What one process, or one rank, finds."""
    found = {}
    for memory in MEMORIES:
        cfg = lejepa.Config(**FLAGS, memory=memory)
        data = (arc_data.TaskSet if distributed.ranks() == 1 else distributed.RankTasks)(tasks())
        model = distributed.replicate(lejepa.build(cfg).double(), data, cfg)
        found["loss", memory] = [random_loss(model, data, cfg) for _ in range(2)]  # then with a memory
        found["steps", memory] = two_steps(cfg)
    return found


def discard(tensor, *args, **kwargs):
    """An all-reduce that leaves what it was given, for the use of a result that is not there."""
    return tensor.clone()


def measure_rank(number, count, folder):
    torch.set_num_threads(1)
    as_rank(number, count, folder)
    distributed.start(lejepa.Config(**FLAGS))
    with toy_size():
        found = measure()
        cfg = lejepa.Config(**FLAGS, memory=0)
        data = distributed.RankTasks(tasks())
        model = distributed.replicate(lejepa.build(cfg).double(), data, cfg)
        with mock.patch.object(dist, "all_reduce", discard):
            found["discarded"] = random_loss(model, data, cfg)
    with mock.patch.dict(lejepa.SIZES, small=TOY):
        found["dropout"] = two_steps(lejepa.Config(**FLAGS))
        found["seed"] = torch.initial_seed()
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with toy_size():
        yield measure()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, 4])
def many(request, fork, tmp_path_factory):
    """What each of several ranks finds."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [fork(measure_rank, number, request.param, folder) for number in range(request.param)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * request.param
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in range(request.param)]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("memory", MEMORIES)
def test_loss_and_gradient_of_any_ranks_are_those_of_one_process(one, many, memory):
    for i in range(2):
        expected, found = one["loss", memory][i], [rank["loss", memory][i] for rank in many]
        for rank in found:
            torch.testing.assert_close(rank["values"], expected["values"], rtol=1e-6, atol=1e-6)
        z = torch.cat([rank["z"] for rank in found]) / len(many)               # as DDP averages
        weight = sum(rank["weight"] for rank in found) / len(many)
        assert error(z, expected["z"]) < 1e-6 and error(weight, expected["weight"]) < 1e-6


def test_a_sum_over_ranks_that_is_not_used_would_be_seen(one, many):
    expected, found = one["loss", 0][0], [rank["discarded"] for rank in many]
    assert not error(found[0]["values"], expected["values"]) < 0.01            # nan is seen as well
    assert not error(sum(rank["weight"] for rank in found) / len(many), expected["weight"]) < 0.01


@pytest.mark.parametrize("memory", MEMORIES)
def test_two_steps_of_any_ranks_end_at_the_weights_of_one_process(one, many, memory):
    expected, found = one["steps", memory], many[0]["steps", memory]
    assert found["state"].keys() == expected["state"].keys() and len(expected["state"]) > 100
    for name, value in expected["state"].items():
        other = found["state"][name]
        if name.endswith("qkv.bias"):
            value, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (value, other))
        if not name.endswith(CANCELLED):
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4, msg=name)
    for terms, others in zip(found["terms"], expected["terms"], strict=True):
        for name, value in others.items():
            torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("which", [("steps", 50), ("steps", 0), "dropout"])
def test_all_ranks_hold_the_same_bits(many, which):
    for rank in many[1:]:
        different = [name for name, value in rank[which]["state"].items()
                     if not torch.equal(value, many[0][which]["state"][name])]
        assert not different


def test_dropout_differs_by_rank(many):
    assert len({rank["seed"] for rank in many}) == len(many)


# --------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def go_ranks(fork, task_folder):
    """go_ranks(run, count, ...): a toy run of `count` ranks to its end. Returns what each of them printed."""
    def to_the_end(run, *flags, count=2, status=0, changes=lambda number: ()):
        folder = run.parent / f"{run.name}-{time.time_ns()}"
        folder.mkdir()
        flags = toy_flags(task_folder, run, *flags)
        processes = []
        for number in range(count):
            before = (partial(make_small, False), partial(as_rank, number, count, folder), *changes(number))
            processes.append(fork(child, flags, before, f"{folder}/{number}.txt"))
        for process in processes:
            process.join(120)
        said = [(folder / f"{number}.txt").read_text() for number in range(count)]
        assert [process.exitcode for process in processes] == [status] * count, said
        assert not any("Traceback" in text for text in said) and not any(said[1:]), said
        return said[0]
    return to_the_end


@pytest.mark.whole
def test_a_run_of_two_ranks_stopped_by_a_signal_to_one_resumes_bit_for_bit_or_on_one_process(
        go_ranks, tmp_path):
    go_ranks(tmp_path / "whole")
    stop_one = lambda number: [partial(at, 4, stop)] if number else []
    said = go_ranks(tmp_path / "cut", status=130, changes=stop_one)
    assert read_tensors(tmp_path / "cut")[1] == 5 and "stopped by a signal after step 5" in said
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    go_ranks(tmp_path / "cut", "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    said = go_ranks(tmp_path / "alone", "--resume", count=1)
    assert "written by 2 processes, this run has 1" in said and read_tensors(tmp_path / "alone")[1] == 12


@pytest.mark.whole
def test_a_loss_of_one_rank_that_is_not_finite_ends_all_with_one_line(go_ranks, tmp_path):
    said = go_ranks(tmp_path / "run", status=1, changes=lambda number: [partial(poison, 2)] if number else [])
    line = said.splitlines()[-1]
    assert line.startswith("grad_norm is nan at step 3 ") and line.endswith("checkpoint is step 0")


def compile_nothing(number):
    """torch.compile as it is where one rank has no compiler."""
    def fail(*args):
        raise RuntimeError("no compiler")
    torch.compile = lambda function, dynamic: function if number else fail


@pytest.mark.whole
def test_a_rank_that_cannot_compile_ends_all_with_one_line(go_ranks, tmp_path):
    compiling = lambda number: [partial(compile_nothing, number)]
    said = go_ranks(tmp_path / "run", "--compile", status=1, changes=compiling)
    line = said.splitlines()[-1]
    assert line.endswith("compiling failed in one process (no compiler); start with --no-compile")


@pytest.mark.parametrize("flags, way_out", [(["--objective", "infonce"], "leave torchrun out"),
                                            (["--code", "ema"], "leave torchrun out"),
                                            (["--profile"], "leave torchrun out"),
                                            (["--batch-size", "6"], "give at least 7")])
def test_what_ranks_cannot_do_is_refused_in_one_line(
        monkeypatch, capsys, tmp_path, task_folder, flags, way_out):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed, "end_when_stuck", lambda: None)
    monkeypatch.setattr(distributed, "store", None)
    line = refused(capsys, monkeypatch, *toy_flags(task_folder, tmp_path / "run", *flags))
    assert way_out in line


def test_torchrun_with_one_process_is_a_plain_run(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = lejepa.Config(**FLAGS, objective="infonce")
    distributed.start(cfg)
    model = torch.nn.BatchNorm1d(4)
    assert distributed.replicate(model, None, cfg) is model and type(model) is torch.nn.BatchNorm1d
    assert (distributed.rank(), distributed.ranks()) == (0, 1) and not dist.is_initialized()


def wait_forever(folder):
    """A wait outside of Python for a rank that never comes, as in an all-reduce."""
    sys.stderr = open(f"{folder}/said.txt", "w")
    signal.signal(signal.SIGTERM, lambda *_: None)
    distributed.PATIENCE = 1
    distributed.end_when_stuck()
    Path(f"{folder}/ready").touch()
    dist.FileStore(f"{folder}/store", 2).wait(["never"])


def test_a_rank_that_waits_for_a_lost_one_ends_after_a_signal(fork, tmp_path):
    process = fork(wait_forever, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.terminate()
    process.join(10)
    assert process.exitcode == 1 and (tmp_path / "said.txt").read_text().count("\n") == 1


@pytest.mark.whole
def test_a_rank_that_is_killed_ends_the_others_with_one_line_and_the_checkpoint_kept(tmp_path, task_folder):
    run = tmp_path / "run"
    flags = toy_flags(task_folder, run, "--memory", "64", steps=100_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    with open(tmp_path / "said.txt", "w") as said:
        process = subprocess.Popen([*command, "lejepa.py", *map(str, flags)], cwd=ROOT, stdout=said,
                                   stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
                assert process.poll() is None, (tmp_path / "said.txt").read_text()
                time.sleep(0.1)
            os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
            process.wait(30)
        finally:
            process.kill()
    lines = [line for line in (tmp_path / "said.txt").read_text().splitlines() if "lejepa.py: " in line]
    assert process.returncode == 1 and len(lines) == 1 and "another process ended" in lines[0]
    assert f"step 0; continue with the same command with --run {run} --resume" in lines[0]
    assert lejepa.read_checkpoint(run)[1]["step"] == 0


def rank_processes(launcher):
    """The processes that torchrun began, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
            if parent == launcher:
                numbers = [entry[5:] for entry in environment if entry.startswith(b"RANK=")]
                found |= {int(number): int(folder.name) for number in numbers}
    return found
