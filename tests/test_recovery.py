"""Interrupted, filled up, fed rubbish: nothing is lost, and it says what happened. Whole runs here are forked, with a model of toy size."""
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import as_json, synthetic_tasks
from test_run import assert_same_bits, checkpoint, read_log, read_result, refused

import arc_data
import lejepa
from arc_data import TaskSet

METHODS = [(code, objective) for code in ("gaussian", "ema", "none") for objective in ("lejepa", "infonce")]
STEPS, LOOK = 12, 5                                    # of a run here; a checkpoint every 5 steps

# ------------------------------------------------------------------------------------------------ runs in children


TOY = lejepa.Size(16, 2, 1, 1, 32, 32, 16, 32, 1000, 24, 6e-3)


def toy():
    lejepa.SIZES["small"] = TOY
    lejepa.look_every, lejepa.LOG_EVERY = lambda cfg: LOOK, 2
    lejepa.report.plot_run = lambda folder: None   # a picture takes longer than all the rest


@pytest.fixture
def small_model(monkeypatch):
    monkeypatch.setitem(lejepa.SIZES, "small", TOY)
    monkeypatch.setattr(lejepa, "look_every", lambda cfg: LOOK)


def at(step, action):
    """Before batch `step` is drawn, counted from 0, calls action()."""
    draw = TaskSet.batch

    def batch(self, size, seed, number):
        if self.augment and number == step:            # validation draws batches too, without augmentation
            action()
        return draw(self, size, seed, number)
    TaskSet.batch = batch


def in_evaluation(action):
    evaluate = lejepa.evaluation.evaluate
    lejepa.evaluation.evaluate = lambda *args, **kwargs: action() or evaluate(*args, **kwargs)


def in_save(number, action):
    """Before the checkpoint `number`, counted from 1, is saved, calls action()."""
    save, calls = lejepa.save, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            action()
        save(*args)
    lejepa.save = counted


def while_preparing(action):
    split = arc_data.split
    arc_data.split = lambda *args: action() or split(*args)


def at_the_folder(action):
    open_folder = lejepa.open_folder
    lejepa.open_folder = lambda cfg: action() or open_folder(cfg)


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def poison(step, value=float("nan"), of_gradient=False):
    """Makes the loss of a step, counted from 0, or its gradient alone, `value`."""
    honest = lejepa.losses

    def losses(model, batch, number, cfg):
        loss, terms = honest(model, batch, number, cfg)
        if model.training and number == step:
            if of_gradient:
                loss.register_hook(lambda grad: grad * value)
            else:
                loss, terms = loss * value, {**terms, "prediction": terms["prediction"] * value}
        return loss, terms
    lejepa.losses = losses


def child(flags, changes, output):
    torch.set_num_threads(1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1), os.dup2(written, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    sys.argv = ["lejepa.py", *map(str, flags)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    toy()
    for change in changes:
        change()
    lejepa.main()


@pytest.fixture(scope="session")
def fork():
    """A server that has imported everything once and forks a child for each run."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_recovery", "torch._dynamo", "torch.utils.tensorboard"])

    def process(target, *args):
        begun = context.Process(target=target, args=args)
        begun.start()
        return begun
    return process


@pytest.fixture
def start(fork, task_folder, tmp_path):
    """start(run, ...): begins a run in a child; its output goes to run.txt."""
    def begin(run, *flags, changes=(), steps=STEPS):
        flags = ["--data", task_folder, "--run", run, "--steps", steps, "--batch-size", 12, "--size", "small", "--device", "cpu", *flags]
        return fork(child, flags, changes, f"{run}.txt")
    return begin


@pytest.fixture
def go(start):
    """go(run, ...): a run in a child to its end, which must have this status. Returns what it said."""
    def to_the_end(run, *flags, status=0, **kwargs):
        process = start(run, *flags, **kwargs)
        process.join(900)
        said = Path(f"{run}.txt").read_text()
        assert process.exitcode == status, said
        assert "Traceback" not in said and not list(run.glob("*.part"))
        return said
    return to_the_end


def last_line(said):
    return said.splitlines()[-1]


def bytes_of(run):
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(fork, task_folder, tmp_path_factory):
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    flags = ["--data", task_folder, "--run", run, "--steps", STEPS, "--batch-size", 12, "--size", "small", "--device", "cpu"]
    process = fork(child, flags, (), f"{run}.txt")
    process.join()
    assert process.exitcode == 0, Path(f"{run}.txt").read_text()
    return run


# ------------------------------------------------------------------------------------------------ exact resume

STOP = partial(signal.raise_signal, signal.SIGINT)


@pytest.mark.whole
@pytest.mark.parametrize("code, objective", METHODS)
def test_a_run_cut_at_any_step_and_resumed_equals_the_uninterrupted_one_bit_for_bit(go, tmp_path, code, objective):
    flags = ["--code", code, "--objective", objective]
    cut = METHODS.index((code, objective)) * 2 + 1     # 1, 3, 5 (with a checkpoint of its own), ... 11: a step done
    go(tmp_path / "whole", *flags)
    go(tmp_path / "cut", *flags, status=130, changes=[partial(at, cut - 1, STOP)])
    assert checkpoint(tmp_path / "cut")[1] == cut and not (tmp_path / "cut" / "result.json").exists()
    go(tmp_path / "cut", *flags, "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("code, objective", METHODS)
def test_a_compiled_run_resumes_bit_for_bit_too(go, tmp_path, code, objective):
    flags = ["--compile", "--code", code, "--objective", objective]
    go(tmp_path / "whole", *flags)
    go(tmp_path / "cut", *flags, status=130, changes=[partial(at, 6, STOP)])
    go(tmp_path / "cut", *flags, "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def flush_at_once():
    """Every point of a curve is in its file before the next, so that a kill leaves points after the checkpoint."""
    from torch.utils.tensorboard import SummaryWriter
    add = SummaryWriter.add_scalar
    SummaryWriter.add_scalar = lambda self, *args: (add(self, *args), self.flush())


def slow_board():
    """Points of a curve reach their file late, so that a kill loses those that were not waited for."""
    from tensorboard.summary.writer.record_writer import RecordWriter
    write = RecordWriter.write
    RecordWriter.write = lambda self, data: (time.sleep(0.08), write(self, data))


@pytest.mark.whole
@pytest.mark.parametrize("board, killed", [(flush_at_once, 9), (slow_board, 5)])
def test_after_a_kill_log_and_curves_go_on_from_the_checkpoint_without_overlap_or_gap(go, whole, tmp_path, board, killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path / "run"
    go(run, status=-9, changes=[board, partial(at, killed, at_own_pid)])
    assert read_log(run)[-1]["step"] == (8 if killed == 9 else 5) and checkpoint(run)[1] == 5
    with open(run / "log.jsonl", "a") as file:         # as if it had gone on, and been cut within a line
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    (run / "last.safetensors.part").write_bytes(b"left by the kill")
    go(run, "--resume")
    assert_same_bits(whole, run)
    board = EventAccumulator(str(run))
    board.Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for name in set(log[-1]) - {"step"}:
        assert [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)] == [(row["step"], row[name]) for row in log if name in row]


def at_own_pid():
    os.kill(os.getpid(), signal.SIGKILL)


def other_commit():
    lejepa.commit = lambda: "another"


@pytest.mark.whole
def test_a_checkpoint_of_another_commit_is_said_to_be_one(go, tmp_path):
    go(tmp_path / "run", status=130, changes=[partial(at, 3, STOP)])
    assert "written by commit" not in go(tmp_path / "run", "--resume", status=130, changes=[partial(at, 5, STOP)])
    assert "this is another: where they differ, the run no longer equals an uninterrupted one" in go(tmp_path / "run", "--resume", changes=[other_commit])


@pytest.mark.whole
def test_a_finished_run_goes_on_to_more_steps_as_if_they_had_been_asked_for_at_once(go, small_model, tmp_path):
    go(tmp_path / "run")
    assert f"--steps {STEPS + 3}, where the run was made with {STEPS}: it goes on from step {STEPS} to there" in go(tmp_path / "run", "--resume", steps=STEPS + 3)
    go(tmp_path / "long", steps=STEPS + 3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == STEPS + 3 == read_result(tmp_path / "run")["steps"]
    assert lejepa.load_run(tmp_path / "run")[1].steps == STEPS + 3
    one, other = (checkpoint(tmp_path / name)[0] for name in ("run", "long"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.whole
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves_with_its_status(go, whole, tmp_path, number, status):
    said = go(tmp_path / "run", status=status, changes=[partial(at, 2, partial(signal.raise_signal, number))])
    assert last_line(said).startswith("stopped by a signal after step 3") and "--resume" in last_line(said)
    assert checkpoint(tmp_path / "run")[1] == 3


@pytest.mark.whole
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_evaluation_leaves_with_its_status_and_resume_evaluates_again(go, whole, tmp_path, number, status):
    said = go(tmp_path / "run", status=status, changes=[partial(in_evaluation, partial(signal.raise_signal, number))])
    assert f"after step {STEPS}" in last_line(said) and "evaluates again" in last_line(said) and not (tmp_path / "run" / "result.json").exists()
    go(tmp_path / "run", "--resume")
    assert_same_bits(whole, tmp_path / "run")


def twice(number):
    signal.raise_signal(number)
    signal.raise_signal(number)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(go, tmp_path, number):
    go(tmp_path / "run", status=-number, changes=[partial(at, 2, partial(twice, number))])
    assert not bytes_of(tmp_path / "run")


@pytest.mark.whole
def test_ctrl_c_before_the_first_step_says_nothing_and_leaves_with_130(go, tmp_path):
    assert go(tmp_path / "run", status=130, changes=[partial(while_preparing, STOP)]) == ""


# ------------------------------------------------------------------------------------------------ not a number


@pytest.mark.parametrize("code, objective", METHODS)
@pytest.mark.parametrize("step, value, of_gradient", [(0, float("nan"), False), (2, float("inf"), False), (2, float("nan"), True)])
def test_a_step_that_is_not_a_number_changes_nothing(small_model, monkeypatch, task_folder, code, objective, step, value, of_gradient):
    monkeypatch.setattr(lejepa, "losses", lejepa.losses)               # given back at the end
    poison(step, value, of_gradient)
    cfg = lejepa.parse_flags(["--data", str(task_folder), "--size", "small", "--device", "cpu", "--code", code, "--objective", objective])
    data = TaskSet(arc_data.load_tasks(str(task_folder)))
    model = lejepa.build(cfg).train()
    optimizers = lejepa.make_optimizers(model, cfg)
    for number in range(step + 2):
        before = {name: value.clone() for name, value in lejepa.state_of(model, optimizers).items()}
        metrics = lejepa.train_step(model, optimizers, data.batch(12, 0, number), number, cfg)
        after = lejepa.state_of(model, optimizers)
        same = [torch.equal(value, before.get(name, torch.zeros_like(value))) for name, value in after.items()]
        assert len(same) > 50 and all(same) == (number == step)
        assert bool(metrics["grad_norm"].isfinite()) == (number != step)
        assert all(value.isfinite().all() for value in after.values())


@pytest.mark.whole
def test_the_first_step_that_is_not_a_number_ends_the_run_at_the_next_log_line_and_is_named(go, whole, tmp_path):
    run = tmp_path / "run"
    said = go(run, status=1, changes=[partial(poison, 6), partial(poison, 7, float("inf"))])
    assert re.fullmatch(r"loss is nan at step 7 \(prediction nan, sigreg [\d.]+, .*grad_norm nan\); the last good checkpoint is step 5", last_line(said)), said
    assert checkpoint(run)[1] == 5 and read_log(run)[-1]["step"] == 6 and not (run / "result.json").exists()
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_gradient_that_is_not_a_number_is_named_even_when_a_signal_comes(go, tmp_path):
    said = go(tmp_path / "run", status=1, changes=[partial(poison, 2, float("inf"), True), partial(at, 2, STOP)])
    assert re.match(r"grad_norm is (inf|nan) at step 3 \(loss [\d.]+, .*; there is no checkpoint yet", last_line(said)), said
    assert not bytes_of(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ full disk, unwritable folder, two runs


@pytest.mark.whole
def test_a_disk_that_fills_up_in_a_save_leaves_the_old_files_and_the_run_goes_on_later(go, whole, tmp_path):
    run = tmp_path / "run"
    go(run, status=143, changes=[partial(at, 6, partial(signal.raise_signal, signal.SIGTERM))])       # checkpoints of steps 5 and 7
    before = bytes_of(run)
    said = go(run, "--resume", status=1, changes=[partial(in_save, 1, partial(limit_file_size, 100_000))])
    assert "last.safetensors" in last_line(said) and "the last good checkpoint is step 7" in last_line(said) and "--resume" in last_line(said)
    assert bytes_of(run) == before and len(before) == 2 and len(before["last.safetensors"]) > 100_000
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_disk_that_fills_up_between_saves_gets_one_line_too(go, whole, tmp_path):
    run = tmp_path / "run"
    said = go(run, status=1, changes=[partial(at, 7, partial(limit_file_size, 6000))])
    assert "File too large" in last_line(said) and "step 5" in last_line(said) and said.count("lejepa.py:") == 1
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_disk_that_is_full_from_the_start_is_status_2(go, tmp_path):
    said = go(tmp_path / "run", status=2, changes=[partial(limit_file_size, 500)])
    assert "config.json" in last_line(said) and "File too large" in last_line(said)


def as_nobody():
    os.seteuid(65534)


@pytest.mark.whole
def test_a_folder_that_cannot_be_written_is_status_2_before_the_run_and_1_in_it(go, task_folder, capsys, monkeypatch, tmp_path):
    root = os.geteuid() == 0
    for folder in {tmp_path, *tmp_path.parents, task_folder.parent}:
        if stat.S_IMODE(folder.stat().st_mode) == 0o700:
            folder.chmod(0o755)                        # so that another user reaches the data
    (tmp_path / "closed").mkdir(mode=0o555)
    said = go(tmp_path / "closed", status=2, changes=[partial(at_the_folder, as_nobody)] * root)
    assert "Permission denied" in last_line(said) and "closed" in last_line(said) and not list((tmp_path / "closed").iterdir())
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(capsys, monkeypatch, "--data", task_folder, "--device", "cpu", "--run", tmp_path / "file" / "run")
    close = as_nobody if root else partial(os.chmod, tmp_path / "run", 0o555)
    said = go(tmp_path / "run", status=1, changes=[partial(at, 7, close)])
    assert "Permission denied" in last_line(said) and "the last good checkpoint is step 5" in last_line(said)
    assert checkpoint(tmp_path / "run")[1] == 5


@pytest.mark.whole
def test_two_runs_do_not_share_a_folder_and_the_lock_goes_with_its_owner(start, go, whole, small_model, task_folder, capsys, monkeypatch, tmp_path):
    run = tmp_path / "run"
    process = start(run, changes=[partial(at, 6, partial(time.sleep, 60))])
    while not (run / "last.safetensors").exists():
        time.sleep(0.01)
    flags = ["--data", task_folder, "--run", run, "--steps", STEPS, "--batch-size", 12, "--size", "small", "--device", "cpu"]
    assert "another run" in refused(capsys, monkeypatch, *flags, "--resume")
    assert "--resume" in refused(capsys, monkeypatch, *flags)
    process.kill()
    process.join()
    go(run, "--resume")
    assert_same_bits(whole, run)


# ------------------------------------------------------------------------------------------------ checkpoints


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)


def save_toy(folder, step=1, size=3):
    """A checkpoint as small as can be, and its bytes."""
    torch.manual_seed(step)
    model = Toy()
    model.layer = torch.nn.Linear(size, 2)
    lejepa.save(folder, model, [], step, lejepa.Config(), {"windows": step})
    return (folder / "last.safetensors").read_bytes()


def unreadable(folder, content, *said):
    (folder / "last.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        lejepa.read_checkpoint(folder)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in said), error.value


def test_a_checkpoint_is_safetensors_with_text_and_a_sum_and_ordinary_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        save_toy(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "last.safetensors").stat().st_mode) == 0o640
    with safetensors.safe_open(tmp_path / "last.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {"model.layer.weight", "model.norm.running_mean", "random"} <= set(file.keys())
    assert metadata["step"] == "1" and json.loads(metadata["config"])["lam"] == lejepa.Config.lam and re.fullmatch("[0-9a-f]{64}", metadata["sha256"])


def test_a_checkpoint_with_any_one_byte_changed_added_or_lost_is_refused(tmp_path):
    content, rng = save_toy(tmp_path), np.random.default_rng(0)
    lejepa.read_checkpoint(tmp_path)
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(header), *rng.integers(header, len(content), 300)]:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256)) if place % 2 else 32                # 32: upper and lower case, spaces
        unreadable(tmp_path, bytes(changed), "last.safetensors")
    for place in rng.integers(0, len(content), 50):
        unreadable(tmp_path, content[:place])
        unreadable(tmp_path, content[:place] + content[place + 1:])
        unreadable(tmp_path, content[:place] + b" " + content[place:])
    unreadable(tmp_path, content + b"\0")
    unreadable(tmp_path, b"")


def sealed(tensors, metadata):
    """A checkpoint whose sum is right, whatever it holds."""
    content = safetensors.torch.save(tensors, {"sha256": lejepa.ZEROS, **metadata})
    place, digest = lejepa.checksum(content)
    return content[:place.start] + digest + content[place.stop:]


def test_what_is_not_finite_or_does_not_fit_is_refused_by_name_though_its_sum_is_right(small_model, tmp_path):
    cfg = lejepa.parse_flags(["--size", "small", "--device", "cpu", "--run", str(tmp_path)])
    model = lejepa.build(cfg)
    lejepa.save(tmp_path, model, [], 1, cfg, {})
    tensors, _ = lejepa.read_checkpoint(tmp_path)
    with safetensors.safe_open(tmp_path / "last.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
    name = "model.predictor.head.3.bias"
    unreadable(tmp_path, sealed(tensors | {name: tensors[name] * float("nan")}, metadata), name)
    for wrong in ({name: tensors[name].double()}, {name: tensors[name][:-1].clone()}, {"model.surplus": torch.zeros(1)}):
        (tmp_path / "last.safetensors").write_bytes(sealed(tensors | wrong, metadata))
        with pytest.raises(ValueError, match=next(iter(wrong))):
            lejepa.load_run(tmp_path)
    (tmp_path / "last.safetensors").write_bytes(sealed({key: value for key, value in tensors.items() if key != name}, metadata))
    with pytest.raises(ValueError, match=name):
        lejepa.load_run(tmp_path)
    (tmp_path / "last.safetensors").write_bytes(sealed(tensors, metadata))
    assert lejepa.load_run(tmp_path)[1] == cfg


def test_with_last_damaged_previous_is_taken_with_one_line_and_with_both_damaged_both_are_named(tmp_path, capsys):
    save_toy(tmp_path, 1), save_toy(tmp_path, 2)
    assert lejepa.read_checkpoint(tmp_path)[1]["step"] == 2 and capsys.readouterr().err == ""
    (tmp_path / "last.safetensors").unlink()
    for damage in (lambda: None, lambda: (tmp_path / "last.safetensors").write_bytes(b"rubbish")):
        damage()
        assert lejepa.read_checkpoint(tmp_path)[1]["step"] == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "last.safetensors" in error and "previous.safetensors" in error
    (tmp_path / "previous.safetensors").write_bytes(b"rubbish")
    unreadable(tmp_path, b"rubbish", "last.safetensors", "previous.safetensors", "--run")


@pytest.mark.whole
def test_with_both_damaged_resume_and_eval_say_so_in_one_line_with_status_2(whole, small_model, task_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last", "previous"):
        (run / f"{name}.safetensors").write_bytes((whole / "last.safetensors").read_bytes()[:-1])
    assert "previous.safetensors" in refused(capsys, monkeypatch, "--data", task_folder, "--run", run, "--resume", "--device", "cpu")
    with pytest.raises(SystemExit) as stopped:
        lejepa.evaluation.main([str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "previous.safetensors" in error


@pytest.mark.whole
def test_a_changed_log_config_or_flag_is_refused_by_name_and_nothing_is_touched(whole, small_model, task_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flags = ["--data", task_folder, "--run", run, "--steps", STEPS, "--batch-size", 12, "--size", "small", "--device", "cpu", "--resume"]
    for name, change in (("log.jsonl", lambda old: old.replace(b"loss", b"lost", 1)), ("log.jsonl", lambda old: old[:-1]), ("config.json", lambda old: old[:-1])):
        old = (run / name).read_bytes()
        (run / name).write_bytes(change(old))
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert name in refused(capsys, monkeypatch, *flags)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        (run / name).write_bytes(old)
    assert "--seed" in refused(capsys, monkeypatch, *flags, "--seed", 5)


@pytest.mark.whole
def test_a_damaged_checkpoint_is_never_kept_as_the_previous_one(go, whole, tmp_path):
    run = tmp_path / "run"
    go(run, status=130, changes=[partial(at, 6, STOP)])
    (run / "last.safetensors").write_bytes(b"rubbish")
    go(run, "--resume", status=-9, changes=[partial(in_save, 2, at_own_pid)])           # after the first save, which moved a checkpoint
    for name in ("last", "previous"):
        (run / f"{name}.safetensors").rename(run / "aside")
        assert lejepa.read_checkpoint(run)[1]["step"] in (5, 10)
        (run / "aside").rename(run / f"{name}.safetensors")


def save_for_ever(folder, started):
    torch.set_num_threads(1)
    for step in range(1, 10**6):
        save_toy(folder, step, size=300_000)
        started.send(step)


def kill_in_saves(fork, folder, kills, seed):
    """Kills a process that does nothing but save, at random moments; each time the last checkpoint it told of, or a later one, is there."""
    rng = random.Random(seed)
    for _ in range(kills):
        told, telling = multiprocessing.Pipe(duplex=False)
        process = fork(save_for_ever, folder, telling)
        telling.close()
        seen = told.recv()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        while told.poll():
            try:
                seen = told.recv()
            except EOFError:
                break
        assert lejepa.read_checkpoint(folder)[1]["step"] >= seen
    save_toy(folder)
    assert not list(folder.glob("*.part"))


def test_five_kills_in_saves_leave_a_checkpoint_each(fork, tmp_path):
    kill_in_saves(fork, tmp_path, 5, seed=0)


# ------------------------------------------------------------------------------------------------ rubbish

TOKEN = re.compile(r'''[ \t\n\r]*(?:([][{},:])|("(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")
                       |(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)|(true|false|null|NaN|-?Infinity))'''.replace("\n                       ", ""))


class Refused(Exception):
    pass


def need(condition):
    if not condition:
        raise Refused


class Strict:
    """A parser of task files by the letter: a value is an int, or a str, list, dict, or the text of any other word, as bytes."""

    def __init__(self, text):
        self.text, self.place = text, 0
        self.value = self.read()
        need(self.place is not None and not self.text[self.place:].strip(" \t\n\r"))

    def token(self):
        found = TOKEN.match(self.text, self.place)
        need(found)
        self.place = found.end()
        return found.groups()

    def peek(self, sign):
        place = self.place
        found = TOKEN.match(self.text, place)
        return found is not None and found.group(1) == sign

    def read(self):
        sign, string, number, word = self.token()
        if string is not None:
            return json.loads(string)                  # escapes only; its form is that of the pattern
        if number is not None:
            need(len(number) <= 4300)
            return int(number) if re.fullmatch("-?[0-9]+", number) else number.encode()
        if word is not None:
            return word.encode()
        need(sign in "[{")
        return self.items("]", list) if sign == "[" else self.items("}", dict)

    def items(self, end, kind):
        found = kind()
        if self.peek(end):
            self.token()
            return found
        while True:
            if kind is list:
                found.append(self.read())
            else:
                key = self.read()
                need(isinstance(key, str) and key not in found and self.token()[0] == ":")
                found[key] = self.read()
            sign = self.token()[0]
            need(sign in (",", end))
            if sign == end:
                return found


def strict_grid(grid):
    need(isinstance(grid, list) and 1 <= len(grid) <= 30)
    need(all(isinstance(row, list) and 1 <= len(row) <= 30 and len(row) == len(grid[0]) for row in grid))
    need(all(type(cell) is int and cell in range(10) for row in grid for cell in row))
    return grid


def strict_task(task):
    need(isinstance(task, dict) and all(isinstance(task.get(part), list) for part in ("train", "test")) and task["train"])
    need(all(isinstance(pair, dict) and "input" in pair for part in ("train", "test") for pair in task[part]))
    need(all("output" in pair for pair in task["train"]))
    test = [(strict_grid(pair["input"]), None if pair.get("output", b"null") == b"null" else strict_grid(pair["output"])) for pair in task["test"]]
    return [(strict_grid(pair["input"]), strict_grid(pair["output"])) for pair in task["train"]], test


def strict(content, many):
    """What load_tasks must make of a file of one task, named x, or of many by id; None if it must refuse."""
    try:
        value = Strict(content.decode("utf-8").removeprefix("\ufeff")).value
        need(not many or (isinstance(value, dict) and value))
        tasks = value if many else {"x": value}
        need(not any("\ud800" <= letter <= "\udfff" for name in tasks for letter in name))
        return {name: strict_task(task) for name, task in tasks.items()}
    except (Refused, UnicodeDecodeError, RecursionError):
        return None


PIECES = [b"true", b"3.0", b'"3"', b"NaN", b"-0", b"1e0", b"10", b"-1", b"0", b"9" * 5000, b"null", b"[]", b"[[1]]", b"[[" + b"1," * 30 + b"1]]", b"[", b"]", b"{", b"}",
          b",", b":", b'"', b"\\", b" ", b"\n", b"\x00", b"\xff", b"\xc2\xa0", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 100_000]
MEMBERS = [b'"input": [[1]],', b'"output": null,', b'"test": [],', b'"\\u0074est": [],', b'"x": {"y": [NaN, 1.5]},', b'"\\ud800":0,', b'"x": 0, "x": 1,']


def mutated(content, rng):
    """One to four changes: a byte, a cut, a copy, a piece of JSON somewhere, in place of a cell or in an object, a cut end."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 5, 20, 100))
        change, cells = rng.randrange(13), [found.start() for found in re.finditer(rb"(?<=[\[, ])\d(?=[\],])", content)]
        if change < 2 and place < len(content):
            content[place] = rng.randrange(256)
        elif change < 3:
            del content[place:place + length]
        elif change < 5:
            content[place:place] = content[(other := rng.randrange(len(content) + 1)):other + length]
        elif change < 7:
            content[place:place] = rng.choice(PIECES)
        elif change < 9 and b"{" in content[place:]:
            inside = content.index(b"{", place) + 1
            content[inside:inside] = rng.choice(MEMBERS)
        elif change < 12 and cells:
            cell = rng.choice(cells)
            content[cell:cell + 1] = rng.choice(PIECES) if change < 10 else b"%d" % rng.randrange(-1, 12)
        elif rng.random() < 0.2:
            del content[place:]
    return bytes(content)


def good_files():
    """(bytes, whether it is a file of many tasks): what real files look like."""
    tasks = {name: as_json(task) for name, task in synthetic_tasks(5, tasks=6).items()}
    del tasks["task01"]["test"][0]["output"]
    tasks["task02"] |= {"name": "\u00e9", "origin": {"by": [1.5, None, True]}}
    tasks["task03"]["test"] = []
    files = [(json.dumps(task).encode(), False) for task in tasks.values()]
    files += [(b"\xef\xbb\xbf" + json.dumps(tasks["task02"], indent=1, ensure_ascii=False).encode(), False)]
    return files + [(json.dumps(dict(list(tasks.items())[i:i + 3])).encode(), True) for i in range(3)]


def mutate_tasks(folder, count, seed):
    """Loads mutated task files and compares with the strict parser. Returns how many loaded, and the seconds of the slowest."""
    rng, files, loaded, slowest = random.Random(seed), good_files(), 0, 0.0
    path = folder / "x.json"
    for i in range(count):
        content, many = rng.choice(files)
        content = mutated(content, rng) if i >= len(files) else files[i][0]
        many = many if i >= len(files) else files[i][1]
        path.write_bytes(content)
        begin = time.monotonic()
        try:
            tasks = {name: tuple([(a.tolist(), b if b is None else b.tolist()) for a, b in part] for part in task)
                     for name, task in arc_data.load_tasks(str(path if many else folder)).items()}
        except ValueError as error:
            tasks = None
            assert type(error) is ValueError and "x.json" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        slowest = max(slowest, time.monotonic() - begin)
        assert tasks == strict(content, many), (i, content[:2000])
        loaded += tasks is not None
    return loaded, slowest


def mutate_checkpoints(folder, content, count, seed):
    """Refusals of mutated checkpoints, each of them different from the true one; all must be refused."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = mutated(content, rng)
        if changed != content:
            unreadable(folder, changed, "last.safetensors")


def mutate_logs(run, folder, count, seed):
    """Resumes from a mutated log: it is cut back to just what it was at the checkpoint, or refused and left as it is. Returns how many resumed."""
    (folder / "last.safetensors").write_bytes((run / "last.safetensors").read_bytes())
    _, found = lejepa.read_checkpoint(folder)
    cfg = lejepa.Config(**{**found["config"], "run": str(folder)})
    model = lejepa.build(cfg)
    optimizers = lejepa.make_optimizers(model, cfg)
    log, rng, resumed = (run / "log.jsonl").read_bytes(), random.Random(seed), 0
    more = log + b'{"step": 13, "loss": 1.0}\n{"st'
    for _ in range(count):
        changed = mutated(more, rng)
        (folder / "log.jsonl").write_bytes(changed)
        try:
            assert lejepa.resume(model, optimizers, cfg)[0] == found["step"]
            assert (folder / "log.jsonl").read_bytes() == log
            resumed += 1
        except ValueError as error:
            assert "log.jsonl" in str(error) and "\n" not in str(error) and (folder / "log.jsonl").read_bytes() == changed
            assert changed[:len(log)] != log
    return resumed


def mutate(run, folder, counts, seed, answer):
    toy()
    (folder / "tasks").mkdir()
    loaded, slowest = mutate_tasks(folder / "tasks", counts[0], seed)
    resumed = mutate_logs(run, folder, counts[2], seed)
    mutate_checkpoints(folder, (run / "last.safetensors").read_bytes(), counts[1], seed)
    answer.send((loaded, resumed, slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def mutated_inputs(fork, whole, folder, counts, seed):
    answer, other = multiprocessing.Pipe()
    process = fork(mutate, whole, folder, counts, seed, other)
    other.close()
    try:
        loaded, resumed, slowest, megabytes = answer.recv()
    except EOFError:
        pytest.fail(f"seed {seed}: see the traceback of the child above")
    process.join()
    print(f"{sum(counts)} inputs: {loaded} task files loaded, {resumed} logs resumed, slowest {slowest:.2f} s, {megabytes} MB")
    assert 0 < loaded < counts[0] and 0 < resumed < counts[2] and slowest < 10 and megabytes < 1000


@pytest.mark.whole
def test_500_mutated_task_files_checkpoints_and_logs_are_read_exactly_or_refused(fork, whole, tmp_path):
    mutated_inputs(fork, whole, tmp_path, (340, 80, 80), seed=0)


@pytest.mark.slow
@pytest.mark.whole
def test_20_000_mutated_task_files_checkpoints_and_logs_are_read_exactly_or_refused(fork, whole, tmp_path):
    mutated_inputs(fork, whole, tmp_path, (16_000, 2000, 2000), seed=1)


def load_once(path, answer):
    begin = time.monotonic()
    try:
        arc_data.load_tasks(str(path))
    except ValueError as error:
        answer.send((str(error), time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10))


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("unit", ["[],", "{},", "[[[[[[[[[]]]]]]]]],", '{"a":{"a":{"a":0}}},', '"\U0001f600",[[]],', "-1e5,", "1,", '"%d":0,'])
def test_the_largest_file_of_whatever_takes_most_memory_takes_less_than_1_gb(fork, tmp_path, unit):
    content = "".join(unit % i for i in range(10**6)) if "%" in unit else unit * (arc_data.LARGEST // len(unit.encode()) - 20)
    (tmp_path / "x.json").write_text(('{"a": {%s"z": 0}}' if "%" in unit else '{"a": [%s0]}') % content[:arc_data.LARGEST - 20 if "%" in unit else None])
    answer, other = multiprocessing.Pipe()
    fork(load_once, tmp_path / "x.json", other)
    said, seconds, megabytes = answer.recv()
    print(unit, said[-80:], f"{seconds:.1f} s {megabytes} MB")
    assert seconds < 60 and megabytes < 1000


def test_a_larger_file_is_refused_unread(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(100 << 30)                       # it takes no space on the disk
    with pytest.raises(ValueError, match="x.json.*12 MB"):
        arc_data.load_tasks(str(tmp_path / "x.json"))


# ------------------------------------------------------------------------------------------------ security


def watch(folder, report):
    """Lets the interpreter report what is opened for writing outside the run's folder, unpickled, bound to a port or started."""
    def audit(event, args):
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, writes = os.path.abspath(os.fsdecode(args[0])), (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not path.startswith((f"{folder}/", "/dev/")):
                report(f"writes {path}")
        elif event in ("os.rename", "os.remove", "os.mkdir") and not os.path.abspath(os.fsdecode(args[0])).startswith(str(folder)):
            report(f"{event} {args[0]}")
        elif event in ("pickle.find_class", "socket.bind", "socket.listen", "os.system", "os.exec", "os.posix_spawn") \
                or (event == "subprocess.Popen" and args[1][:2] != ["git", "describe"]):
            report(f"{event} {args}")
    sys.addaudithook(audit)


def report_to(path, text):
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode() + b"\n")


def silently(path, inside, text):
    if not inside:                                     # the report itself opens a file for writing
        inside.append(1)
        report_to(path, text)
        inside.clear()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.whole
def test_a_run_writes_in_its_folder_only_unpickles_nothing_and_listens_nowhere_whatever_the_data_is_called(go, tmp_path):
    names = ["../../escape", "/tmp/escape", "..", "a\nb", "$(touch escape)", "__import__('os').mkdir('escape')", "{0.__class__}", "é" * 300]
    names += [f"plain{i}" for i in range(12)]          # so that both sides of the split have some
    tasks = dict(zip(names, synthetic_tasks(3, tasks=20).values(), strict=True))
    (tmp_path / "tasks.json").write_text(json.dumps({name: as_json(task) for name, task in tasks.items()}))
    report = partial(silently, tmp_path / "report.txt", [])
    flags = ["--data", tmp_path / "tasks.json"]
    go(tmp_path / "run", *flags, status=130, changes=[partial(watch, tmp_path / "run", report), partial(at, 6, STOP)])
    go(tmp_path / "run", *flags, "--resume", changes=[partial(watch, tmp_path / "run", report)])
    assert not (tmp_path / "report.txt").exists(), (tmp_path / "report.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"tasks.json", "run", "run.txt"}
    assert {re.sub(r"tfevents.*", "", path.name) for path in (tmp_path / "run").iterdir()} == {
        "config.json", "events.out.", "last.safetensors", "lock", "log.jsonl", "previous.safetensors", "result.json"}


@pytest.mark.parametrize("write", [lambda path, bomb: torch.save(bomb, path), lambda path, bomb: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_in_place_of_a_checkpoint_or_data_is_refused_and_not_run(tmp_path, write):
    for name in ("last.safetensors", "previous.safetensors", "x.json"):
        write(tmp_path / name, Bomb(tmp_path / "escape"))
    with pytest.raises(ValueError, match="previous.safetensors"):
        lejepa.load_run(tmp_path)
    with pytest.raises(ValueError, match="x.json"):
        arc_data.load_tasks(str(tmp_path))
    assert not (tmp_path / "escape").exists()


# ------------------------------------------------------------------------------------------------ kills


def tell(telling):
    telling.send(1)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("chain", range(10))
def test_a_run_killed_ten_times_mostly_in_saves_ends_as_the_uninterrupted_one(start, go, long, tmp_path, chain):
    run, rng, kills, in_saves = tmp_path / "run", random.Random(chain), 0, 0
    while kills < 10:
        told, telling = multiprocessing.Pipe(duplex=False)
        in_a_save = rng.random() < 0.7
        when = partial(in_save if in_a_save else at_any, rng.randint(1, 2) if in_a_save else rng.randint(0, 9), partial(tell, telling))
        resumed = ["--resume"] if list(run.glob("*.safetensors")) else []
        if run.exists() and not resumed:               # killed before there was a checkpoint
            run.rename(tmp_path / f"run{kills}")
        process = start(run, *resumed, changes=[when], steps=LONG)
        telling.close()
        try:
            told.recv()
            time.sleep(rng.uniform(0, 0.03 if in_a_save else 0.1))
        except EOFError:                               # it came to its end
            pass
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills, in_saves = kills + 1, in_saves + in_a_save
        if list(run.glob("*.safetensors")):
            lejepa.read_checkpoint(run)
    go(run, "--resume", steps=LONG)
    print(f"{kills} kills, {in_saves} in saves")
    assert_same_bits(long, run)
    assert kills == 10


def at_any(steps, action):
    """Calls action() `steps` batches after the first one drawn."""
    draw, calls = TaskSet.batch, []

    def batch(self, size, seed, number):
        if self.augment:
            calls.append(1)
            if len(calls) == steps + 1:
                action()
        return draw(self, size, seed, number)
    TaskSet.batch = batch


LONG = 80


@pytest.fixture(scope="module")
def long(fork, task_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("long") / "run"
    flags = ["--data", task_folder, "--run", run, "--steps", LONG, "--batch-size", 12, "--size", "small", "--device", "cpu"]
    process = fork(child, flags, (), f"{run}.txt")
    process.join()
    assert process.exitcode == 0, Path(f"{run}.txt").read_text()
    return run
