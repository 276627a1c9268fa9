"""Interrupted at any moment, out of disk or memory: a run loses nothing, and one line names what happened."""
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import as_json, synthetic_tasks, write_tasks
from forked import (STEPS, assert_same_bits, at, at_the_folder, fork, go, in_build, in_evaluation, in_save,
                    kill, limit_file_size, limit_memory, log_rows, poison, read_log, read_result,
                    read_tensors, refused, small_model, start, stop, throw, toy_flags, twice,
                    unreadable_or_equal, while_preparing, whole)

import eval as evaluation
import harness.run
import lejepa
from arc_data import TaskSet, load_tasks
from harness import checkpoint, profiling, report

METHODS = [(code, objective) for code in ("gaussian", "ema", "none") for objective in ("lejepa", "infonce")]


def last_line(said):
    return said.splitlines()[-1]


def checkpoints(run):
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def newest(folder):
    tensors, found, _ = lejepa.read_checkpoint(folder)
    return tensors, found


# -------------------------------------------------------------------------------------------- exact resume


@pytest.mark.whole
@pytest.mark.parametrize("code, objective", METHODS)
def test_a_run_cut_at_any_step_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
        go, tmp_path, code, objective):
    flags = ["--code", code, "--objective", objective]
    cut = METHODS.index((code, objective)) * 2 + 1     # 1, 3, 5 (with an evaluation), ... 11 steps are done
    go(tmp_path / "whole", *flags)
    go(tmp_path / "cut", *flags, status=130, changes=[partial(at, cut - 1, stop)])
    assert read_tensors(tmp_path / "cut")[1] == cut and not (tmp_path / "cut" / "result.json").exists()
    go(tmp_path / "cut", *flags, "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("code, objective", METHODS)
def test_a_compiled_run_resumes_bit_for_bit_too(go, tmp_path, code, objective):
    flags = ["--compile", "--code", code, "--objective", objective]
    go(tmp_path / "whole", *flags)
    go(tmp_path / "cut", *flags, status=130, changes=[partial(at, 6, stop)])
    go(tmp_path / "cut", *flags, "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.whole
def test_a_finished_run_resumed_is_the_same_run(go, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    said = go(tmp_path / "copy", "--resume")
    assert not re.search("^step ", said, re.M)         # no step is taken again
    assert_same_bits(whole, tmp_path / "copy")


def flush_at_once():
    """Every point of a curve is in its file before the next, so that a kill leaves points after a save."""
    from torch.utils.tensorboard import SummaryWriter
    add = SummaryWriter.add_scalar
    SummaryWriter.add_scalar = lambda self, *args: (add(self, *args), self.flush())


def slow_board():
    """Points of a curve reach their file late, so that a kill loses those that were not waited for."""
    from tensorboard.summary.writer.record_writer import RecordWriter
    write = RecordWriter.write
    RecordWriter.write = lambda self, data: (time.sleep(0.03), write(self, data))


@pytest.mark.whole
@pytest.mark.parametrize("board, killed", [(flush_at_once, 9), (slow_board, 5)])
def test_after_a_kill_log_and_curves_continue_from_the_checkpoint_without_overlap_or_gap(
        go, whole, tmp_path, board, killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path / "run"
    go(run, status=-9, changes=[board, partial(at, killed, kill)])
    assert read_log(run)[-1]["step"] == (8 if killed == 9 else 5) and read_tensors(run)[1] == 5
    with open(run / "log.jsonl", "a") as file:         # as if it had gone on, and been cut within a line
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    (run / ".last.safetensors.0123456789abcdef.part").write_bytes(b"left by a kill in a save")
    go(run, "--resume")
    assert_same_bits(whole, run)
    board = EventAccumulator(str(run))
    board.Reload()
    log = log_rows(run)
    for name in set(log[-1]) - {"step"}:
        points = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)]
        assert points == [(row["step"], row[name]) for row in log if name in row]


@pytest.mark.whole
@pytest.mark.parametrize("moment", [partial(at, 0, kill), partial(in_save, 1, kill), partial(in_build, kill)])
def test_a_run_killed_before_its_first_step_is_resumed_or_begun_again_in_its_folder(
        go, whole, tmp_path, moment):
    run = tmp_path / "run"
    go(run, status=-9, changes=[moment])
    has_checkpoint = bool(checkpoints(run))
    assert has_checkpoint == (moment.func is at)
    said = go(run, *["--resume"] * has_checkpoint)
    began_again = (run / "config.json").exists() and moment.func is in_save
    assert ("before its first checkpoint" in said) == began_again
    assert_same_bits(whole, run)


def other_commit():
    harness.run.commit = lambda: "another"


def two_threads():
    torch.set_num_threads(2)


@pytest.mark.whole
def test_another_commit_or_number_of_threads_than_the_checkpoints_is_said(go, tmp_path):
    run = tmp_path / "run"
    go(run, status=130, changes=[partial(at, 3, stop)])
    said = go(run, "--resume", status=130, changes=[partial(at, 5, stop)])
    assert "written by commit" not in said and "threads, this run has" not in said
    said = go(run, "--resume", changes=[other_commit, two_threads])
    assert "this is another: where they differ, the run no longer equals an uninterrupted one" in said
    assert "the checkpoint was written with 1 threads, this run has 2" in said


@pytest.mark.whole
def test_a_finished_run_continues_to_more_steps_as_if_they_had_been_given_at_once(go, small_model, tmp_path):
    run, steps = tmp_path / "run", STEPS + 3
    go(run)
    said = go(run, "--resume", steps=steps)
    assert f"--steps {steps}: the run was made with {STEPS}; it continues from step {STEPS}" in said
    go(tmp_path / "long", steps=steps)
    assert json.loads((run / "config.json").read_text())["steps"] == steps == read_result(run)["steps"]
    assert lejepa.load_run(run)[1].steps == steps
    one, other = read_tensors(run)[0], read_tensors(tmp_path / "long")[0]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.whole
def test_a_run_is_not_resumed_on_data_that_changed(go, tmp_path):
    tasks = synthetic_tasks(0)
    data, run = write_tasks(tmp_path / "tasks", tasks), tmp_path / "run"
    go(run, "--data", data, status=130, changes=[partial(at, 6, stop)])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    changed = json.loads((data / "task03.json").read_text())
    changed["train"][0]["output"][0][0] = (changed["train"][0]["output"][0][0] + 1) % 10       # one cell
    (data / "task03.json").write_text(json.dumps(changed))
    said = go(run, "--data", data, "--resume", status=2)
    assert "the tasks of --data or --validate changed" in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (data / "task03.json").write_text(json.dumps(as_json(tasks["task03"]), indent=1))      # the same task
    go(run, "--data", data, "--resume")


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.whole
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_leaves_with_its_status(go, tmp_path, number, status):
    said = go(tmp_path / "run", status=status, changes=[partial(at, 2, partial(stop, number))])
    assert last_line(said).startswith("stopped by a signal after step 3") and "--resume" in last_line(said)
    assert read_tensors(tmp_path / "run")[1] == 3


@pytest.mark.whole
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_evaluation_leaves_with_its_status_and_resume_evaluates_again(
        go, whole, tmp_path, number, status):
    run = tmp_path / "run"
    said = go(run, status=status, changes=[partial(in_evaluation, partial(stop, number))])
    assert f"after step {STEPS}" in last_line(said) and "evaluates again" in last_line(said)
    assert not (run / "result.json").exists()
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(go, tmp_path, number):
    go(tmp_path / "run", status=-number, changes=[partial(at, 2, partial(twice, number))])
    assert read_tensors(tmp_path / "run")[1] == 0


@pytest.mark.whole
@pytest.mark.parametrize("moment", [while_preparing, in_build, partial(in_save, 1)])
def test_ctrl_c_before_the_first_step_prints_nothing_and_leaves_with_130(go, tmp_path, moment):
    assert go(tmp_path / "run", status=130, changes=[partial(moment, stop)]) == ""


def alert_at(step):
    """An alert trips at the log line of a step, and no other one does: those of a toy run are many."""
    report.Alerts.feed = lambda self, row: ["alert: x"] * (row["step"] == step)


@pytest.mark.whole
def test_an_alert_is_said_and_ends_the_run_with_status_3_only_where_asked(go, whole, tmp_path):
    said = go(tmp_path / "run", changes=[partial(alert_at, 6)])
    assert "alert: x" in said
    assert_same_bits(whole, tmp_path / "run")
    said = go(tmp_path / "cut", "--stop-on-alert", status=3, changes=[partial(alert_at, 6)])
    assert last_line(said).startswith("stopped by an alert after step 6") and "--resume" in last_line(said)
    go(tmp_path / "cut", "--resume")
    assert_same_bits(whole, tmp_path / "cut")


# --------------------------------------------------------------------------------------- no finite number

BAD = [(0, float("nan"), False), (4, float("inf"), False), (6, float("nan"), True)]


@pytest.mark.whole
@pytest.mark.parametrize("step, value, of_gradient", BAD)
def test_a_step_that_is_not_finite_ends_the_run_and_no_checkpoint_holds_it(
        go, tmp_path, step, value, of_gradient):
    """Steps 1, 5 (at which a checkpoint is due) and 7; one is found at the next log line, an even step."""
    run, good = tmp_path / "run", step // 5 * 5
    said = go(run, status=1, changes=[partial(poison, step, value, of_gradient)])
    named = "grad_norm" if of_gradient else "loss"
    last = f"the last good checkpoint is step {good}"
    assert re.fullmatch(rf"{named} is (nan|inf) at step {step + 1} \(.*\); {last}", last_line(said)), said
    tensors, kept = read_tensors(run)
    assert kept == good and all(value.isfinite().all() for value in tensors.values())
    assert all(row["step"] <= step for row in log_rows(run)) and not (run / "result.json").exists()


@pytest.mark.whole
def test_the_first_step_that_is_not_finite_is_named_and_the_run_resumes_from_before_it(go, whole, tmp_path):
    run = tmp_path / "run"
    said = go(run, status=1, changes=[partial(poison, 6), partial(poison, 7, float("inf"))])
    terms = r"\(prediction nan, sigreg_z [\d.]+, .*grad_norm nan\)"
    line = rf"loss is nan at step 7 {terms}; the last good checkpoint is step 5"
    assert re.fullmatch(line, last_line(said)), said
    assert read_tensors(run)[1] == 5 and read_log(run)[-1]["step"] == 6
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_gradient_that_is_not_finite_is_named_even_when_a_signal_comes(go, tmp_path):
    changes = [partial(poison, 2, float("inf"), True), partial(at, 2, stop)]
    said = go(tmp_path / "run", status=1, changes=changes)
    assert re.match(r"grad_norm is (inf|nan) at step 3 \(loss [\d.]+, .*; the last good checkpoint is step 0",
                    last_line(said)), said
    assert read_tensors(tmp_path / "run")[1] == 0


# ---------------------------------------------------------------- no memory, no compiler, full disk, two runs

NO_MEMORY = [MemoryError("Unable to allocate 2 GiB"), torch.OutOfMemoryError("CUDA out of memory"),
             RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto allocate 9 bytes")]


@pytest.mark.whole
@pytest.mark.parametrize("where", [in_build, partial(at, 3), in_evaluation])
@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line_with_a_way_out(go, tmp_path, where, error):
    said = go(tmp_path / "run", status=1, changes=[partial(where, partial(throw, error))])
    assert last_line(said).startswith("lejepa.py: out of memory (") and "--batch-size" in last_line(said)


def memory_without_end():
    profiling.free_memory = lambda: math.inf


@pytest.mark.whole
def test_a_batch_that_does_not_fit_into_the_memory_is_one_line(go, tmp_path):
    changes = [memory_without_end, partial(at, 0, partial(limit_memory, 100 << 20))]
    said = go(tmp_path / "run", "--batch-size", 1_000_000, status=1, changes=changes)
    assert last_line(said).startswith("lejepa.py: out of memory (") and "--batch-size" in last_line(said)


@pytest.mark.whole
def test_a_batch_that_cannot_fit_into_the_free_memory_is_refused_before_the_first_step(go, tmp_path):
    changes = [partial(limit_memory, 2 << 30)]         # without the refusal it would take much
    said = go(tmp_path / "run", "--batch-size", 10**10, status=2, changes=changes)
    assert said.count("\n") == 1 and "--batch-size 10000000000 with --size small: a step needs" in said


def test_the_memory_that_a_step_is_said_to_need_is_what_its_graph_keeps(monkeypatch, task_folder):
    """In fp32, where no copy of a weight is kept. The check measures 48 of the 480 windows."""
    cfg = lejepa.Config(size="small", device="cpu", dtype="fp32", steps=1, batch_size=480)
    data, model = TaskSet(load_tasks(str(task_folder))), lejepa.build(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(profiling, "free_memory", lambda: 0)
    with pytest.raises(ValueError, match="--batch-size 480") as error:
        profiling.check_memory(model, data, cfg)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(x):
        kept[x.data_ptr()] = 0 if x.data_ptr() in weights else x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = lejepa.batch_loss(model.train(), data.batch(480, 0, 0), 0, cfg)[0]
    needed = sum(kept.values()) + 2 * sum(4 * p.numel() for p in model.parameters())
    said = 1e9 * float(re.search(r"at least (\S+) GB", str(error.value))[1])
    assert loss.isfinite() and said == pytest.approx(needed, rel=0.2)


def test_free_memory_is_that_of_the_system_or_of_the_container(monkeypatch):
    limits = {"/proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  4000 kB\n",
              "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: limits[str(path)])
    assert profiling.free_memory() == 4_096_000
    limits |= {"/sys/fs/cgroup/memory.max": "1000\n", "/sys/fs/cgroup/memory.stat": "anon 300\nfile 600\n"}
    assert profiling.free_memory() == 700


def broken_compiler(action):
    """torch.compile as it is where a compiler is missing or its cache is broken: the first call fails."""
    def compile_function(function, **options):
        return lambda *args: action()
    torch.compile = compile_function


@pytest.mark.whole
def test_where_compiling_fails_a_line_names_the_cache_and_the_run_equals_one_without(go, whole, tmp_path):
    error = RuntimeError("g++: not found\nmore\nlines")
    changes = [partial(broken_compiler, partial(throw, error))]
    said = go(tmp_path / "run", "--compile", changes=changes)
    lines = [line for line in said.splitlines() if line.startswith(("compiling", "--compile"))]
    assert lines[0] == "compiling the model: this takes minutes the first time; Ctrl-C ends it"
    assert len(lines) == 2 and "g++: not found" in lines[1] and "remove the cache /" in lines[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compiled"] is False
    assert_same_bits(whole, tmp_path / "run")


@pytest.mark.whole
def test_ctrl_c_while_compiling_leaves_with_130_and_the_folder_can_be_used_again(go, tmp_path):
    changes = [partial(broken_compiler, stop)]
    said = go(tmp_path / "run", "--compile", status=130, changes=changes)
    assert said.count("\n") == 1 and said.startswith("compiling the model")
    go(tmp_path / "run", status=130, changes=[partial(at, 0, stop)])


def test_ctrl_c_in_a_gradient_that_compiles_prints_no_warning_of_torch(monkeypatch):
    def interrupted(*_):
        warnings.warn("Error detected in SliceBackward0. Traceback of forward call that caused the error:")
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "try_loss", interrupted)
    cfg = lejepa.resolve_defaults(lejepa.Config(size="small", device="cpu"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            profiling.compile_parts(lejepa.build(cfg), None, cfg)
    assert not [one for one in seen if "Error detected" in str(one.message)]


def no_compiler(folder):
    import torch._inductor.config
    torch._inductor.config.cpp.cxx = (None, str(folder / "nothing"))   # as read from CXX when it is imported
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")


@pytest.mark.slow
@pytest.mark.whole
def test_without_a_compiler_a_run_with_compile_continues_without(go, whole, tmp_path):
    said = go(tmp_path / "run", "--compile", changes=[partial(no_compiler, tmp_path)])
    assert "compiling failed, the run continues without" in said and str(tmp_path / "cache") in said
    assert_same_bits(whole, tmp_path / "run")


@pytest.mark.whole
def test_a_disk_that_fills_up_in_a_save_leaves_the_old_files_and_the_run_continues_later(go, whole, tmp_path):
    run = tmp_path / "run"
    go(run, status=143, changes=[partial(at, 6, partial(stop, signal.SIGTERM))])
    before = checkpoints(run)                          # of steps 5 and 7
    changes = [partial(in_save, 1, partial(limit_file_size, 100_000))]
    said = last_line(go(run, "--resume", status=1, changes=changes))
    assert "last.safetensors" in said and "the last good checkpoint is step 7" in said and "--resume" in said
    assert checkpoints(run) == before and len(before) == 2 and len(before["last.safetensors"]) > 100_000
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_disk_that_fills_up_between_saves_gets_one_line_too(go, whole, tmp_path):
    run = tmp_path / "run"
    said = go(run, status=1, changes=[partial(at, 7, partial(limit_file_size, 6000))])
    assert "File too large" in last_line(said) and "step 5" in last_line(said)
    assert said.count("lejepa.py:") == 1
    go(run, "--resume")
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_a_disk_that_is_full_from_the_start_is_status_2(go, tmp_path):
    said = go(tmp_path / "run", status=2, changes=[partial(limit_file_size, 500)])
    assert "config.json" in last_line(said) and "File too large" in last_line(said)


def as_nobody():
    os.seteuid(65534)


@pytest.mark.whole
def test_a_folder_that_cannot_be_written_is_status_2_before_the_run_and_1_in_it(
        go, task_folder, capsys, monkeypatch, tmp_path):
    root = os.geteuid() == 0
    for folder in {tmp_path, *tmp_path.parents, task_folder.parent}:
        if stat.S_IMODE(folder.stat().st_mode) == 0o700:
            folder.chmod(0o755)                        # so that another user reaches the data
    (tmp_path / "closed").mkdir(mode=0o555)
    said = last_line(go(tmp_path / "closed", status=2, changes=[partial(at_the_folder, as_nobody)] * root))
    assert "Permission denied" in said and "closed" in said and not list((tmp_path / "closed").iterdir())
    (tmp_path / "file").write_text("")
    flags = toy_flags(task_folder, tmp_path / "file" / "run")
    assert str(tmp_path / "file") in refused(capsys, monkeypatch, *flags)
    close = as_nobody if root else partial(os.chmod, tmp_path / "run", 0o555)
    said = last_line(go(tmp_path / "run", status=1, changes=[partial(at, 7, close)]))
    assert "Permission denied" in said and "the last good checkpoint is step 5" in said
    assert read_tensors(tmp_path / "run")[1] == 5


@pytest.mark.whole
def test_two_runs_do_not_share_a_folder_and_the_lock_ends_with_its_owner(
        start, go, whole, small_model, task_folder, capsys, monkeypatch, tmp_path):
    run = tmp_path / "run"
    process = start(run, changes=[partial(at, 6, partial(time.sleep, 60))])
    while not (run / "last.safetensors").exists():
        time.sleep(0.01)
    flags = toy_flags(task_folder, run)
    assert "another run" in refused(capsys, monkeypatch, *flags, "--resume")
    assert "--resume" in refused(capsys, monkeypatch, *flags)
    process.kill()
    process.join()
    go(run, "--resume")
    assert_same_bits(whole, run)


# --------------------------------------------------------------------------------------------- checkpoints


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)


def save_toy(folder, step=1, size=3):
    """A checkpoint as small as can be, and its bytes."""
    torch.manual_seed(step)
    model = Toy()
    model.layer = torch.nn.Linear(size, 2)
    checkpoint.save(folder, model, [], step, lejepa.Config(), "a commit", {"windows": step})
    return (folder / "last.safetensors").read_bytes()


def unreadable(folder, content, *said):
    """`content` as last.safetensors, with no other checkpoint beside it, is refused in one line."""
    (folder / "last.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        lejepa.read_checkpoint(folder)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in said), error.value


def test_a_checkpoint_is_safetensors_with_text_a_digest_and_ordinary_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        save_toy(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "last.safetensors").stat().st_mode) == 0o640
    with safetensors.safe_open(tmp_path / "last.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {"model.layer.weight", "model.norm.running_mean", "random"} <= set(file.keys())
    assert metadata["step"] == "1" and json.loads(metadata["config"])["lam"] == lejepa.Config.lam
    assert re.fullmatch("[0-9a-f]{64}", metadata["sha256"])


def test_a_checkpoint_with_one_byte_changed_added_or_lost_is_refused_or_holds_the_same(tmp_path):
    content, rng = save_toy(tmp_path), np.random.default_rng(0)
    expected = lejepa.read_checkpoint(tmp_path)
    header = 8 + int.from_bytes(content[:8], "little")
    refusals = 0
    for place in [*range(header), *rng.integers(header, len(content), 300)]:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256)) if place % 2 else 32       # 32: other case, spaces
        refusals += unreadable_or_equal(tmp_path, bytes(changed), expected)
        assert refusals or place < header
    for place in rng.integers(0, len(content), 50):
        for changed in (content[:place], content[:place] + content[place + 1:],
                        content[:place] + b" " + content[place:]):
            refusals += unreadable_or_equal(tmp_path, changed, expected)
    assert refusals > 0.97 * (header + 300 + 150)      # the rest are spaces between words of the header
    assert unreadable_or_equal(tmp_path, content + b"\0", expected)
    assert unreadable_or_equal(tmp_path, b"", expected)


def test_every_changed_bit_of_a_tensor_and_every_changed_word_of_the_metadata_is_refused(tmp_path):
    save_toy(tmp_path)
    with safetensors.safe_open(tmp_path / "last.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # they mapped the file
        metadata = file.metadata()
    expected = lejepa.read_checkpoint(tmp_path)
    for name, value in tensors.items():
        flat = value.clone().reshape(-1)
        flat.view(torch.uint8)[0] ^= 1
        other_bit = tensors | {name: flat.reshape(value.shape)}
        other_shape = tensors | {name: value.clone().reshape(1, *value.shape)}
        other_name = {key if key != name else key + "_": item for key, item in tensors.items()}
        for changed in (other_bit, other_shape, other_name, {k: v for k, v in tensors.items() if k != name}):
            assert unreadable_or_equal(tmp_path, safetensors.torch.save(changed, metadata), expected), name
    for name in metadata:
        for changed in (metadata | {name: metadata[name] + " "}, metadata | {name + "_": ""}):
            assert unreadable_or_equal(tmp_path, safetensors.torch.save(tensors, changed), expected), name


def sealed(tensors, metadata):
    """A checkpoint whose digest is right, whatever it holds."""
    digest = lejepa.checkpoint_digest(tensors, metadata)
    return safetensors.torch.save(tensors, metadata | {"sha256": digest})


def resume(folder):
    cfg = lejepa.resolve_defaults(lejepa.Config(size="small", device="cpu", run=str(folder)))
    return checkpoint.resume(lejepa.build(cfg), [], cfg, "", "")


def test_tensors_that_are_not_finite_or_do_not_fit_are_refused_by_name_though_the_digest_is_right(
        small_model, tmp_path):
    cfg = lejepa.resolve_defaults(lejepa.Config(size="small", device="cpu", run=str(tmp_path)))
    checkpoint.save(tmp_path, lejepa.build(cfg), [], 1, cfg, "", {"tasks_sha256": ""})
    tensors, _ = newest(tmp_path)
    with safetensors.safe_open(tmp_path / "last.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
    name = "model.predictor.head.3.bias"
    value, last = tensors[name], tmp_path / "last.safetensors"
    bad = tensors | {name: value * float("nan")}
    unreadable(tmp_path, sealed(bad, metadata), "last.safetensors", f"{name} holds nan or inf")
    eighth = tensors | {name: value.to(torch.float8_e4m3fn)}
    unreadable(tmp_path, sealed(eighth, metadata), "last.safetensors")
    missing = {key: value for key, value in tensors.items() if key != name}
    others = [{name: value[:-1].clone()}, {name: value.double()}, {name: value.half()},
              {"model.surplus": torch.zeros(1)}]
    for wrong in (missing, *(tensors | other for other in others)):
        last.write_bytes(sealed(wrong, metadata))
        with pytest.raises(ValueError, match="surplus" if "model.surplus" in wrong else "head.3.bias"):
            resume(tmp_path)
        if "model.surplus" not in wrong:               # load_run reads the averaged weights alone
            wrong = {key: value for key, value in wrong.items() if not key.startswith("model.averaged.")}
            averaged = {f"model.averaged.{key.removeprefix('model.')}": value for key, value in wrong.items()}
            last.write_bytes(sealed(averaged, metadata))
            with pytest.raises(ValueError, match="head.3.bias"):
                lejepa.load_run(tmp_path)
    for config in ({}, {"size": "huge"}, {"surplus": 1}, {"code": "fsq"}, [], None):
        last.write_bytes(sealed(tensors, metadata | {"config": json.dumps(config)}))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
            lejepa.load_run(tmp_path)
        assert "\n" not in str(error.value)
    last.write_bytes(sealed(tensors, metadata))
    assert lejepa.load_run(tmp_path)[1] == cfg


def test_what_was_read_from_a_checkpoint_does_not_change_with_the_file(tmp_path):
    content = save_toy(tmp_path)
    tensors, _ = newest(tmp_path)
    before = {name: value.clone() for name, value in tensors.items()}
    with open(tmp_path / "last.safetensors", "r+b") as file:
        file.write(bytes(len(content)))                # in place, at the same length
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_a_previous_checkpoint_without_a_step_is_read_and_its_flags_are_refused_by_name(tmp_path, capsys):
    save_toy(tmp_path)
    (tmp_path / "last.safetensors").rename(tmp_path / "previous.safetensors")
    content = sealed(newest(tmp_path)[0], {"config": "{}"})
    (tmp_path / "previous.safetensors").write_bytes(content)
    capsys.readouterr()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        lejepa.load_run(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="step|state"):
        resume(tmp_path)


def test_with_last_damaged_previous_is_taken_with_one_line_and_with_both_damaged_both_are_named(
        tmp_path, capsys):
    save_toy(tmp_path, 1)
    save_toy(tmp_path, 2)
    last, previous = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"
    assert newest(tmp_path)[1]["step"] == 2 and capsys.readouterr().err == ""
    last.unlink()
    for damage in (lambda: None, lambda: last.write_bytes(b"rubbish")):
        damage()
        assert newest(tmp_path)[1]["step"] == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "last.safetensors" in error and "previous.safetensors" in error
    previous.write_bytes(b"rubbish")
    unreadable(tmp_path, b"rubbish", "last.safetensors", "previous.safetensors", "--run")


@pytest.mark.whole
def test_a_damaged_last_checkpoint_is_replaced_by_the_previous_and_a_cut_log_line_is_dropped(
        go, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "last.safetensors").write_bytes(b"no checkpoint")
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 50, "lo')
    said = go(run, "--resume")
    lines = [line for line in said.splitlines() if "safetensors" in line]
    assert len(lines) == 1 and "last.safetensors" in lines[0] and "previous.safetensors" in lines[0]
    assert_same_bits(whole, run)


@pytest.mark.whole
def test_with_both_damaged_resume_and_eval_name_them_in_one_line_with_status_2(
        whole, small_model, task_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last", "previous"):
        content = (whole / "last.safetensors").read_bytes()
        (run / f"{name}.safetensors").write_bytes(content[:-1])
    flags = toy_flags(task_folder, run, "--resume")
    assert "previous.safetensors" in refused(capsys, monkeypatch, *flags)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "previous.safetensors" in error


@pytest.mark.whole
def test_a_changed_log_config_or_flag_is_refused_by_name_and_nothing_is_touched(
        whole, small_model, task_folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flags = toy_flags(task_folder, run, "--resume")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)      # a refused run says nothing of this

    def contents():
        return {path.name: path.read_bytes() for path in run.iterdir() if path.name != "lock"}
    for name, change in (("log.jsonl", lambda old: old.replace(b"loss", b"lost", 1)),
                         ("log.jsonl", lambda old: old[:-1]), ("config.json", lambda old: old[:-1])):
        old = (run / name).read_bytes()
        (run / name).write_bytes(change(old))
        before = contents()
        assert name in refused(capsys, monkeypatch, *flags)
        assert contents() == before
        (run / name).write_bytes(old)
    assert "--seed" in refused(capsys, monkeypatch, *flags, "--seed", 5)


@pytest.mark.whole
def test_a_damaged_checkpoint_is_never_kept_as_the_previous_one(go, tmp_path):
    run = tmp_path / "run"
    go(run, status=130, changes=[partial(at, 6, stop)])
    (run / "last.safetensors").write_bytes(b"rubbish")
    go(run, "--resume", status=-9, changes=[partial(in_save, 2, kill)])        # the first save moved a file
    steps = [newest(run)[1]["step"]]
    (run / "last.safetensors").unlink()
    assert [*steps, newest(run)[1]["step"]] == [10, 5]


def save_for_ever(folder, started):
    torch.set_num_threads(1)
    for step in range(1, 10**6):
        save_toy(folder, step, size=300_000)
        started.send(step)


def kill_in_saves(fork, folder, kills, seed):
    """Kills a process that only saves; the last checkpoint it told of, or a later one, is there."""
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
        assert newest(folder)[1]["step"] >= seen
    checkpoint.remove_parts(folder)
    assert {path.name for path in folder.iterdir()} <= {"last.safetensors", "previous.safetensors"}


@pytest.mark.whole
def test_five_kills_in_saves_leave_a_checkpoint_each(fork, tmp_path):
    kill_in_saves(fork, tmp_path, 5, seed=0)


# --------------------------------------------------------------------------------------------------- kills

LONG = 80                                      # steps of a run that is killed again and again


def tell(telling):
    telling.send(1)


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


@pytest.fixture(scope="module")
def long(go, tmp_path_factory):
    run = tmp_path_factory.mktemp("long") / "run"
    go(run, steps=LONG)
    return run


def kill_once(start, run, rng):
    """Begins the run or continues it, and kills it in a save or anywhere. False if it had ended before."""
    told, telling = multiprocessing.Pipe(duplex=False)
    in_a_save = rng.random() < 0.7
    place = (in_save, rng.randint(1, 2)) if in_a_save else (at_any, rng.randint(0, 9))
    moment = partial(*place, partial(tell, telling))
    resumed = ["--resume"] if checkpoints(run) else []
    process = start(run, *resumed, changes=[moment], steps=LONG)
    telling.close()
    try:
        told.recv()
        time.sleep(rng.uniform(0, 0.03 if in_a_save else 0.1))
    except EOFError:                                   # it came to its end
        pass
    process.kill()
    process.join()
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("chain", range(10))
def test_a_run_killed_ten_times_mostly_in_saves_ends_as_the_uninterrupted_one(
        start, go, long, tmp_path, chain):
    run, rng = tmp_path / "run", random.Random(chain)
    for _ in range(10):
        assert kill_once(start, run, rng)
        if checkpoints(run):
            newest(run)
    go(run, *["--resume"] * bool(checkpoints(run)), steps=LONG)
    assert_same_bits(long, run)
