"""Runs of lejepa.py in forked children, with a model of toy size: quick enough to interrupt and resume often.

A server imports everything once and forks a child for each run. A child runs the whole command, `main`, with
the flags that a user types; `changes` are functions that it calls before, to make something fail in the run.
"""
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

import arc_data
import harness.run
import lejepa
from arc_data import TaskSet
from harness import charts, checkpoint

TOY = lejepa.Size(16, 2, 1, 1, 32, 32, 16, 32, 1000, 24, 6e-3)
STEPS, EVAL = 12, 5                            # of a run; an evaluation and a checkpoint every 5 steps
TIMES = {"seconds", "samples_per_s"}           # the only figures in which two equal runs may differ

# ------------------------------------------------------------------------------------------ what a run left


def log_rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_log(run):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in log_rows(run)]


def read_result(run):
    result = json.loads((run / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in TIMES}


def read_tensors(run):
    """Tensors of last.safetensors, and its step, by safetensors alone."""
    with safe_open(run / "last.safetensors", "pt") as file:
        step = int(file.metadata()["step"])
    return load((run / "last.safetensors").read_bytes()), step


def assert_same_bits(run, other):
    (tensors, step), (others, other_step) = read_tensors(run), read_tensors(other)
    assert step == other_step and tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different and len(tensors) > 50
    assert read_log(run) == read_log(other)
    assert read_result(run) == read_result(other)


def equal(one, other):
    """Whether two results of read_checkpoint have the same tensors, by name, and the same metadata."""
    same = one[1] == other[1] and one[0].keys() == other[0].keys()
    return same and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def unreadable_or_equal(folder, content, expected):
    """`content` is refused in one line, or holds just the same. True if it is refused."""
    (folder / "last.safetensors").write_bytes(content)
    try:
        found = lejepa.read_checkpoint(folder)
    except ValueError as error:
        assert "\n" not in str(error) and "last.safetensors" in str(error)
        return True
    assert equal(found, expected)
    return False


def refused(capsys, monkeypatch, *flags):
    """The line that `lejepa.py FLAGS` prints when it refuses, with exit status 2. It runs in this process."""
    monkeypatch.setattr(sys, "argv", ["lejepa.py", *map(str, flags)])
    monkeypatch.setattr(harness.run, "keep_large_blocks", lambda: None)
    handler, hook = signal.getsignal(signal.SIGINT), threading.excepthook
    try:
        with pytest.raises(SystemExit) as stopped:
            lejepa.main()
    finally:
        signal.signal(signal.SIGINT, handler)
        threading.excepthook = hook
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("lejepa.py: "), error
    return error


# -------------------------------------------------------------------------------------------------- changes


def short_evaluation(model, untrained, tasks, **options):
    """Two figures of all weights, in place of the evaluation at the end, which takes longer than a run."""
    pairs = [pair for task in tasks.values() for pair in task.train]
    z, z_hat = model.embed([out for _, out in pairs]), model.predict([(*pair, pair[0]) for pair in pairs])
    error = float((z - z_hat).std())
    return {"ndcg10_without_out1": float(z_hat.std()), "baseline_ndcg10_without_out1": error}


def make_small(evaluates=False):
    if not evaluates:
        harness.run.evaluation.evaluate = short_evaluation
        harness.run.add_health = lambda model, done: done
        harness.run.result_figures = dict
    lejepa.SIZES["small"] = TOY
    harness.run.eval_interval = lambda cfg: EVAL
    harness.run.LOG_EVERY = 2
    charts.write_result_picture = lambda *args: None   # a picture takes longer than all the rest


def at(step, action):
    """Before batch `step` is drawn, counted from 0, calls action()."""
    draw = TaskSet.draw

    def drawn(self, size, seed, number):
        if self.augment and number == step:            # validation draws batches too, without augmentation
            action()
        return draw(self, size, seed, number)
    TaskSet.draw = drawn


def in_evaluation(action):
    """Before the full evaluation at the end of the run, calls action()."""
    evaluate = harness.run.evaluation.evaluate
    harness.run.evaluation.evaluate = lambda *args, **kwargs: action() or evaluate(*args, **kwargs)


def in_save(number, action):
    """Before the checkpoint `number`, counted from 1, is saved, calls action(). The first is of step 0."""
    save, calls = checkpoint.save, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            action()
        save(*args)
    checkpoint.save = counted


def while_preparing(action):
    split = arc_data.split
    arc_data.split = lambda *args: action() or split(*args)


def at_the_folder(action):
    open_folder = harness.run.open_folder
    harness.run.open_folder = lambda cfg: action() or open_folder(cfg)


def in_build(action):
    """When the folder is open and before anything is saved, calls action()."""
    build = lejepa.build
    lejepa.build = lambda cfg: action() or build(cfg)


def stop(number=signal.SIGINT):
    signal.raise_signal(number)


def twice(number):
    signal.raise_signal(number)
    signal.raise_signal(number)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def throw(error):
    raise error


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(more):
    """At most `more` bytes beyond what the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def poison(step, value=float("nan"), of_gradient=False):
    """Makes the loss of a step, counted from 0, or its gradient alone, `value`."""
    honest = lejepa.batch_loss

    def batch_loss(model, batch, number, cfg):
        loss, terms = honest(model, batch, number, cfg)
        if model.training and number == step and of_gradient:
            loss.register_hook(lambda grad: grad * value)
        elif model.training and number == step:
            loss, terms = loss * value, {**terms, "prediction": terms["prediction"] * value}
        return loss, terms
    lejepa.batch_loss = batch_loss


# ------------------------------------------------------------------------------------------------- children


def toy_flags(data, run, *flags, steps=STEPS):
    return ["--data", data, "--run", run, "--steps", steps, "--batch-size", 12, "--size", "small",
            "--device", "cpu", *flags]


def child(flags, changes, output):
    """The command in a forked process; what it prints goes to the file `output`."""
    torch.set_num_threads(1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["lejepa.py", *map(str, flags)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for change in changes:
        change()
    lejepa.main()


@pytest.fixture(scope="session")
def fork():
    """fork(function, *arguments): begins a process forked from a server that has imported everything once."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    slow_imports = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot"]
    context.set_forkserver_preload(["forked", "test_recovery", "test_hostile", "test_run", *slow_imports])

    def process(target, *args):
        begun = context.Process(target=target, args=args)
        begun.start()
        return begun
    return process


@pytest.fixture(scope="session")
def start(fork, task_folder):
    """start(run, ...): begins a toy run in a child; what it prints goes to run.txt."""
    def begin(run, *flags, changes=(), steps=STEPS, evaluates=False):
        flags = toy_flags(task_folder, run, *flags, steps=steps)
        return fork(child, flags, (partial(make_small, evaluates), *changes), f"{run}.txt")
    return begin


@pytest.fixture(scope="session")
def go(start):
    """go(run, ...): a toy run in a child to its end, which must have this status. Returns what it printed."""
    def to_the_end(run, *flags, status=0, **kwargs):
        process = start(run, *flags, **kwargs)
        process.join(900)
        said = Path(f"{run}.txt").read_text()
        assert process.exitcode == status, said
        assert "Traceback" not in said and not list(run.glob("*.part")) and not list(run.glob(".*.part"))
        return said
    return to_the_end


@pytest.fixture(scope="session")
def whole(go, tmp_path_factory):
    """The uninterrupted toy run, shared by all tests; none may write into it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go(run)
    return run


@pytest.fixture
def small_model(monkeypatch):
    """The toy sizes in this process."""
    monkeypatch.setitem(lejepa.SIZES, "small", TOY)
    monkeypatch.setattr(harness.run, "eval_interval", lambda cfg: EVAL)
