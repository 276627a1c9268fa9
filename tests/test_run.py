"""Whole commands, as a user types them, at a few steps: what they leave, print, repeat and refuse."""
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import synthetic_tasks, write_tasks
from forked import (TIMES, assert_same_bits, child, fork, go, log_rows, read_log, read_result, read_tensors,
                    refused, small_model, start, whole)

import arc_data
import eval as evaluation
import harness.run
import lejepa
from harness import profiling

ROOT = Path(__file__).parent.parent
STEPS = 20
METRICS = ["ndcg10", "ndcg10_without_out1", "r1", "mrr", "within_task", "all_demonstrations"]
RESULT = [*METRICS, "shuffled_ndcg10_without_out1", "hard_r1", "codes_usage", "codes_perplexity",
          "codes_ceiling", "codes_n", "effective_rank_context", "effective_rank_target", "sigreg_over_null",
          "sigreg_n", "loss", "prediction", "steps", "windows", "epochs", "grad_norm_mean", "grad_norm_max",
          "seconds", "samples_per_s", "parameters", "device", "validation_windows", "baselines", "intervals",
          "baseline_ndcg10_without_out1", "baseline_within_task", "lead"]
BASELINES = ["copy in2, raw", "copy out1, raw", "analogy, raw", "analogy, 31 features",
             "copy in2, untrained", "copy out1, untrained", "analogy, untrained", "analogy, trained"]


def command(program, *flags):
    return [sys.executable, str(ROOT / program), *map(str, flags)]


def python(program, *flags, cwd=None, status=0):
    done = subprocess.run(command(program, *flags), cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stderr + done.stdout
    return done


def small(folder, run, *flags, steps=STEPS):
    """Flags of a run of some seconds."""
    return ["--data", folder, "--run", run, "--steps", steps, "--batch-size", 24, "--size", "small",
            "--device", "cpu", *flags]


@pytest.fixture(scope="session")
def run(tmp_path_factory, task_folder):
    """A short run to its end by the command itself, and what it printed; no test may write into it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, python("lejepa.py", *small(task_folder, folder)).stdout


# --------------------------------------------------------------------------------------------------- flags


def test_help_is_the_text_that_was_agreed_on(capsys, monkeypatch):
    """A new flag is a decision: it needs a new tests/help.txt, by `COLUMNS=100 python lejepa.py --help`."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        harness.run.parse_flags(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.split() == (ROOT / "tests" / "help.txt").read_text().split()


def test_every_field_of_config_is_a_flag_of_its_type_and_nothing_else_is():
    flags = {action.dest: action for action in harness.run.make_parser()._actions if action.dest != "help"}
    assert list(flags) == [field.name for field in dataclasses.fields(lejepa.Config)]
    words = "--steps 7 --lr 0.5 --run x --data y --no-compile --lam 0 --seed 3"
    given = harness.run.parse_flags(words.split())
    assert (given.steps, given.lr, given.run, given.data, given.compile, given.lam, given.seed) == (
        7, 0.5, "x", "y", False, 0.0, 3)
    nothing = harness.run.parse_flags([])
    size = lejepa.SIZES[nothing.size]
    assert (nothing.steps, nothing.batch_size, nothing.lr) == (size.steps, size.batch_size, size.lr)
    assert nothing.run is None and nothing.validate is None and not nothing.resume


BAD_FLAGS = [("--steps 0", "--steps 0"), ("--steps -3", "--steps"), ("--steps many", "--steps"),
             ("--steps 1.5", "--steps"), ("--lam 1.5", "--lam 1.5"), ("--lam nan", "--lam nan"),
             ("--lam -0.1", "--lam"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
             ("--lr 1e39", "--lr 1e+39: needs 0 to 100"), ("--weight-decay 1e39", "--weight-decay"),
             ("--batch-size 0", "--batch-size"), ("--batch-size 1", "--batch-size 1: needs at least 2"),
             ("--weight-decay -1", "--weight-decay"), ("--seed -1", "--seed"), ("--size huge", "huge"),
             ("--seed 99999999999999999999", "--seed"), ("--device tpu", "tpu"), ("--dtype fp8", "fp8"),
             ("--code kmeans", "kmeans"), ("--objective byol", "byol"), ("--queue 100", "--queue"),
             ("--context 5", "--context"), ("--resume", "--run"), ("--step 20", "--step"),
             ("--data", "--data"), ("--code ema --lam 0", "--lam 0"),
             ("--code none --objective infonce --lam 0.2", "--lam"),
             ("--run x --resume --profile", "--resume"), ("surplus", "surplus")]


@pytest.mark.parametrize("device, backend", [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_device_that_torch_does_not_find_is_refused_and_mps_takes_fp32(
        capsys, monkeypatch, device, backend):
    monkeypatch.setattr(backend, "is_available", lambda: False)
    assert f"--device {device}: torch finds no" in refused(capsys, monkeypatch, "--device", device)
    monkeypatch.setattr(backend, "is_available", lambda: True)
    assert harness.run.parse_flags(["--device", device]).dtype == ("bf16" if device == "cuda" else "fp32")


@pytest.mark.parametrize("flags, said", BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_status_2(capsys, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, monkeypatch, *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    assert "--device cuda" in refused(capsys, monkeypatch, "--device", "cuda")


def test_default_folders_of_runs_that_begin_in_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness.run.time, "strftime", lambda form: "20300101-000000")
    cfg = lejepa.resolve_defaults(lejepa.Config(size="small", device="cpu"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: harness.run.make_default_folder(cfg), range(24)))
    assert len(set(names)) == 24 and all(Path(name).is_dir() for name in names)
    assert all(name.startswith("runs/20300101-000000-small-lejepa") for name in names)


def test_training_tasks_are_evaluated_though_the_first_hundred_have_one_pair_each(tmp_path):
    good = synthetic_tasks(4, tasks=6)
    single = {f"single{i}": arc_data.Task(task.train[:1], [])
              for i, task in enumerate(synthetic_tasks(5, tasks=100).values())}
    state = {"seconds": 0.0, "grad_sum": 0.0, "grad_max": 0.0, "windows": 0, "tasks_sha256": ""}
    cfg = lejepa.resolve_defaults(lejepa.Config(run=str(tmp_path), size="small", device="cpu"))
    log = harness.run.RunLog(cfg, None, [], single | good, good, 0, state, 0.0)
    log.close()
    assert set(log.seen.task_ids) == set(good)


# ---------------------------------------------------------------------------------------------------- data

def test_test_pairs_without_an_output_are_counted_in_a_line():
    tasks = synthetic_tasks(4, tasks=6)
    data, cfg = arc_data.TaskSet(tasks), lejepa.Config(run="x")
    assert "no output" not in harness.run.describe_data(cfg, tasks, tasks, [], data)
    hidden = {name: task._replace(test=[(task.test[0][0], None)]) for name, task in tasks.items()}
    said = harness.run.describe_data(cfg, tasks, hidden, [], data)
    assert "; 6 test pairs have no output and are not used" in said


MALFORMED = '{"train": [{"input": [[1]], "output": [[1, 2], [3]]}], "test": []}'


def test_missing_or_malformed_data_gets_one_line_and_leaves_no_folder(
        capsys, monkeypatch, tmp_path, task_folder):
    run, nowhere = tmp_path / "run", tmp_path / "nowhere"
    for name in ("bad", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "abc.json").write_text(MALFORMED)
    for flags, words in ((["--data", nowhere], ["nowhere"]), (["--data", tmp_path / "none"], ["none"]),
                         (["--data", tmp_path / "bad"], ["abc.json", "train pair 0", "output", "row 1"]),
                         (["--data", task_folder, "--validate", nowhere], ["nowhere"]),
                         (["--data", task_folder, "--validate", task_folder], ["no training task"])):
        error = refused(capsys, monkeypatch, *flags, "--run", run)
        assert all(word in error for word in words), error
        assert not run.exists()                        # so that the corrected command may name it


def test_a_folder_with_a_link_is_refused_and_its_target_stays(capsys, monkeypatch, tmp_path, task_folder):
    (tmp_path / "victim").write_text("kept")
    for name in ("lock", "result.json"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / "last.safetensors").touch()
        (run / name).symlink_to(tmp_path / "victim")
        assert f"holds links ({name})" in refused(capsys, monkeypatch, "--data", task_folder, "--run", run,
                                                  "--resume", "--device", "cpu")
        assert (tmp_path / "victim").read_text() == "kept"


@pytest.mark.whole
@pytest.mark.parametrize("program", ["lejepa.py", "eval.py"])
def test_a_refusal_is_one_line_and_status_2_at_the_shell_too(tmp_path, program):
    done = python(program, *(["--data"] if program == "lejepa.py" else []), "nowhere", cwd=tmp_path, status=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert not list(tmp_path.glob("**/result.json"))


@pytest.mark.parametrize("program", ["lejepa.py", "eval.py"])
def test_ctrl_c_during_the_imports_prints_nothing_and_leaves_with_130(tmp_path, program):
    """In place of torch, a module that says that it is being imported and never ends."""
    (tmp_path / "torch").mkdir()
    endless = "import time\nprint('now', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "torch" / "__init__.py").write_text(endless)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command(program, "--help"), env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "")


@pytest.mark.whole
def test_arc_data_prints_the_counts_of_a_folder(task_folder):
    tasks = arc_data.load_tasks(str(task_folder))
    pairs = [len(arc_data.pairs_of(task)) for task in tasks.values()]
    windows = sum(count * (count - 1) for count in pairs)
    expected = f"{task_folder}: 24 tasks, {sum(pairs)} pairs, {windows} windows; 0 test pairs have no output\n"
    assert python("arc_data.py", str(task_folder)).stdout == expected


@pytest.mark.slow
@pytest.mark.whole
def test_arc_data_prints_the_counts():
    text = python("arc_data.py").stdout
    for count in (6128, 6612, 15350, 1912):
        assert re.search(rf"\b{count}\b", text.replace(",", "")), count


# --------------------------------------------------------------------------------------------------- a run


@pytest.mark.whole
def test_a_run_leaves_its_whole_record(run):
    folder, text = run
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "log.jsonl", "last.safetensors", "result.json", "result.png"} <= names
    assert not [path for path in folder.glob("**/*") if re.search(r"\.part$|\.p(ic)?kle?$|\.pt$", path.name)]
    config = json.loads((folder / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(lejepa.Config)} <= set(config)
    assert config["steps"] == STEPS and config["torch"] == torch.__version__ and config["device"] == "cpu"
    assert {"commit", "command", "python", "numpy", "device_name", "compiled"} <= set(config)
    log = log_rows(folder)
    assert [row["step"] for row in log] == [10, 20]
    terms = {"loss", "prediction", "sigreg_z", "sigreg_y", "lr", "grad_norm", "samples_per_s"}
    assert all(terms <= set(row) for row in log)
    evaluated = {"ndcg10_without_out1", "codes_usage", "codes_perplexity", "effective_rank_target"}
    assert evaluated | {"validation_loss", "train_within_task"} <= set(log[-1])
    assert text.count(f"/{STEPS}  loss") == len(log)   # one line a logged step
    assert read_tensors(folder)[1] == STEPS


def refuse_constant(word):
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.whole
def test_result_json_holds_the_contract_and_the_screen_shows_it(run, task_folder):
    folder, text = run
    result = json.loads((folder / "result.json").read_text(), parse_constant=refuse_constant)
    assert set(RESULT) <= set(result) and set(BASELINES) <= set(result["baselines"])
    assert all(set(METRICS) - {"all_demonstrations"} <= set(row) for row in result["baselines"].values())
    _, held_out, _ = arc_data.split(str(task_folder), None)
    assert result["steps"] == STEPS and result["sigreg_n"] == min(192, result["validation_windows"])
    assert result["validation_windows"] == len(arc_data.make_windows(held_out).index)
    unlearned = [row["within_task"] for name, row in result["baselines"].items()
                 if not re.search("trained$|code", name) or name.endswith("untrained")]
    assert result["baseline_within_task"] == pytest.approx(max(unlearned))
    assert 0 < result["effective_rank_target"] <= lejepa.SIZES["small"].dim and result["parameters"] > 10**5
    shown = dict(re.findall(r"^(\w+): (.*)$", text, re.M))
    for name, value in result.items():
        if isinstance(value, (int, float)):
            assert float(shown[name]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.whole
def test_a_run_names_its_folder_first_and_ends_in_its_result_its_picture_and_the_next_command(run):
    folder, text = run
    result, lines = read_result(folder), text.strip().splitlines()
    assert lines[0] == f"run folder: {folder}"
    value, best = result["ndcg10_without_out1"], result["baseline_ndcg10_without_out1"]
    assert f"{value:.3f}" in lines[-3] and lines[-3].endswith(f"best baseline {best:.3f}")
    assert lines[-2] == f"picture: {folder / 'result.png'}" and lines[-1].endswith(f"python eval.py {folder}")


@pytest.mark.whole
def test_tensorboard_shows_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(run[0]))
    board.Reload()
    log = log_rows(run[0])
    for name in ("loss", "prediction", "sigreg_z", "sigreg_y", "grad_norm", "lr"):
        points = [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)]
        assert points == [(row["step"], row[name]) for row in log]
    assert board.Tags()["histograms"] and board.Tags()["images"]


@pytest.mark.whole
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(go, whole, tmp_path):
    go(tmp_path / "again")
    assert_same_bits(whole, tmp_path / "again")
    go(tmp_path / "other", "--seed", 1, steps=2)
    assert read_log(tmp_path / "other")[0]["loss"] != read_log(whole)[0]["loss"]


@pytest.mark.whole
def test_a_command_stopped_by_ctrl_c_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
        run, task_folder, fork, tmp_path):
    folder = tmp_path / "cut"
    flags = small(task_folder, folder)
    process = subprocess.Popen(command("lejepa.py", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    step = read_tensors(folder)[1]
    assert 10 <= step < STEPS and not (folder / "result.json").exists()
    threads = partial(torch.set_num_threads, torch.get_num_threads())
    process = fork(child, [*flags, "--resume"], [threads], f"{folder}.txt")
    process.join(300)
    resumed = Path(f"{folder}.txt").read_text()
    assert f"step 20/{STEPS}" in resumed and f"step 10/{STEPS}" not in resumed
    assert_same_bits(run[0], folder)


@pytest.mark.whole
def test_a_run_is_not_resumed_to_fewer_steps(run, task_folder, capsys, monkeypatch):
    flags = small(task_folder, run[0], "--resume", steps=STEPS - 1)
    assert f"step {STEPS}" in refused(capsys, monkeypatch, *flags)


@pytest.mark.whole
def test_load_run_gives_the_frozen_trained_model(run):
    model, cfg = lejepa.load_run(run[0])
    assert cfg.steps == STEPS and not model.training and not any(p.requires_grad for p in model.parameters())
    tensors, _ = read_tensors(run[0])
    weights = model.averaged.state_dict(prefix="model.averaged.")      # all that evaluation reads
    assert len(weights) > 30
    assert all(torch.equal(value, tensors[name]) for name, value in weights.items())
    fresh, grids = lejepa.build(cfg).eval(), [np.eye(4, dtype=np.int8), np.ones((2, 3), np.int8)]
    z, untrained = model.embed(grids), fresh.embed(grids)
    assert z.shape == untrained.shape and not torch.equal(z, untrained)
    assert lejepa.load_run(str(run[0]))[1] == cfg and cfg.run == str(run[0])


@pytest.mark.whole
def test_eval_of_a_run_repeats_its_figures(run, task_folder, tmp_path):
    _, held_out, _ = arc_data.split(str(task_folder), None)
    folder = write_tasks(tmp_path / "held", held_out)
    evaluation.main([str(run[0]), "--data", str(folder), "--out", str(tmp_path)])
    figures, result = json.loads((tmp_path / "eval.json").read_text()), read_result(run[0])
    for name in ("ndcg10", "ndcg10_without_out1", "within_task"):
        assert figures[name]["model"] == pytest.approx(result[name], abs=1e-6)


@pytest.mark.whole
def test_a_run_is_not_overwritten_and_not_resumed_with_other_flags(
        run, task_folder, tmp_path, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    flags, other = small(task_folder, run[0]), tmp_path / "tasks"
    shutil.copytree(task_folder, other)
    assert "--resume" in refused(capsys, monkeypatch, *flags)
    for flag, value in (("--seed", 1), ("--lr", 0.5), ("--lam", 0.7), ("--batch-size", 12),
                        ("--code", "none"), ("--objective", "infonce"), ("--dtype", "fp32"),
                        ("--data", other), ("--weight-decay", 0.7), ("--validate", "dev")):
        error = refused(capsys, monkeypatch, *flags, flag, value, "--resume")
        assert f"{flag} is {value} now" in error and "None" not in error
    assert {path.name: path.read_bytes() for path in run[0].iterdir() if path.name in before} == before


def test_a_folder_that_is_not_a_runs_own_is_left_alone(task_folder, tmp_path, capsys, monkeypatch):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused(capsys, monkeypatch, *small(task_folder, nowhere, "--resume"))
    assert not nowhere.exists()
    for name in ("notes.txt", "config.json", "log.jsonl", "lock2"):
        mine = tmp_path / name
        mine.mkdir()
        (mine / name).write_text("kept")
        assert f"{mine} is not empty" in refused(capsys, monkeypatch, *small(task_folder, mine))
        assert [path.read_text() for path in mine.iterdir()] == ["kept"]


@pytest.mark.whole
def test_every_code_with_every_objective_leaves_a_result_and_a_model(go, small_model, tmp_path):
    losses = set()
    for code in ("gaussian", "ema", "none"):
        for objective in ("lejepa", "infonce"):
            folder = tmp_path / f"{code}-{objective}"
            go(folder, "--code", code, "--objective", objective, steps=3, evaluates=True)
            result = read_result(folder)
            assert set(RESULT) - TIMES <= set(result) and (result["codes_usage"] is None) == (code == "none")
            assert result["sigreg_over_null"] > 0
            losses.add(result["loss"])
            assert lejepa.load_run(folder)[0].embed([np.ones((2, 2), np.int8)]).isfinite().all()
    assert len(losses) == 6


# ------------------------------------------------------------------------------------------------- profile


def measure_products_once():
    profiling.matmul_rate.__defaults__ = (1,)


@pytest.fixture(scope="session")
def profiled(run, go, tmp_path_factory):
    """A copy of the run with a trace of a toy in it, what it held before, and what the command printed."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    shutil.copytree(run[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    return folder, before, go(folder, "--profile", changes=[measure_products_once])


@pytest.mark.whole
def test_profile_writes_into_the_folder_of_a_trained_run_and_changes_nothing_else_in_it(profiled):
    folder, before, _ = profiled
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "lock"]
    assert {path.name: path.read_bytes() for path in files} == before
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"profile"}
    assert lejepa.load_run(folder)[1].steps == STEPS


@pytest.mark.whole
def test_profile_leaves_a_trace_of_the_training_step_and_says_where_its_time_goes(profiled):
    folder, _, text = profiled
    traces = list((folder / "profile").glob("*.pt.trace.json"))
    assert len(traces) == 1 and "Self CPU" in text
    assert (folder / "profile" / "parts.png").stat().st_size > 1000
    events = json.loads(traces[0].read_text())["traceEvents"]
    names = " ".join({event.get("name") or "" for event in events})
    for name in ("ProfilerStep", "EppsPulley", "EppsPulleyBackward", "Optimizer.step"):
        assert name in names
    assert {"code", "encoder", "predictor", "sigreg", "optimizer"} <= set(names.split())
    shares = dict(re.findall(r"^ *(\w+) +([\d.]+)% +[\d.]+ ms a step", text, re.M))
    assert set(shares) == {*profiling.PARTS, "other"}
    assert sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    figures = r"peak memory \d+\.\d\d GB .*; \d+ windows/s; utilisation \d+\.\d% of a bf16 matrix product"
    assert re.search(figures, text)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.whole
def test_tensorboard_shows_the_trace_with_the_step_taken_apart(profiled, tmp_path):
    port, logs = free_port(), tmp_path / "logs"
    shutil.copytree(profiled[0] / "profile", logs)     # alone: TensorBoard has less to read
    words = ["-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)]
    board = subprocess.Popen([sys.executable, *words], text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def get(page, until):
        """The page once it holds what is waited for: the server and its reading of the trace take time."""
        for _ in range(600):
            try:
                address = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{page}"
                with urllib.request.urlopen(address, timeout=20) as answer:
                    found = json.loads(answer.read())
                if until(found):
                    return found
            except OSError:
                assert board.poll() is None, board.stderr.read()
            time.sleep(0.3)
        raise AssertionError(f"{page} never came")
    try:
        name = urllib.parse.quote(get("runs", lambda found: found["runs"])["runs"][0])
        assert "Overview" in get(f"views?run={name}", bool)
        worker = urllib.parse.quote(get(f"workers?run={name}&view=Overview", bool)[0])
        span = get(f"spans?run={name}&worker={worker}", bool)[0]
        overview = get(f"overview?run={name}&worker={worker}&span={span}&view=Overview", bool)
    finally:
        board.terminate()
        board.communicate(timeout=30)
    costs = {row["name"]: row["value"] for row in overview["performance"][0]["children"]}
    assert len(overview["steps"]["rows"]) == profiling.TRACED
    assert float(costs["DataLoader"]) > 0 and float(costs["CPU Exec"]) > 0


# ------------------------------------------------------------------------------------------------ it learns

RULES = [np.fliplr, np.flipud, np.transpose, np.rot90,
         lambda grid: np.kron(grid, np.ones((2, 2), np.int8)),
         lambda grid: np.concatenate([grid, np.fliplr(grid)], 1),
         lambda grid: np.pad(grid, 1, constant_values=5)]


def ruled_tasks(seed, tasks=120):
    """Tasks that each apply one of seven rules to sparse grids: unseen ones can be learned from seen ones."""
    rng = np.random.default_rng(seed)

    def pair(rule):
        grid = rng.integers(1, 4, rng.integers(3, 9, 2)).astype(np.int8)
        grid[rng.random(grid.shape) > 0.35] = 0
        return grid, np.ascontiguousarray(rule(grid)).astype(np.int8)
    rules = [RULES[i] for i in rng.integers(len(RULES), size=tasks)]
    return {f"rule{i:03d}": arc_data.Task([pair(rule) for _ in range(3)], [pair(rule)])
            for i, rule in enumerate(rules)}


def make_narrow():
    lejepa.SIZES["small"] = lejepa.Size(64, 4, 2, 1, 128, 128, 64, 256, 1000, 48, 3e-3)


@pytest.mark.whole
def test_in_a_short_run_the_loss_falls_and_unseen_tasks_beat_the_untrained_encoder(fork, tmp_path):
    data, run = write_tasks(tmp_path / "tasks", ruled_tasks(0)), tmp_path / "run"
    process = fork(child, small(data, run, "--batch-size", 48, steps=80), [make_narrow], f"{run}.txt")
    process.join(900)
    assert process.exitcode == 0, Path(f"{run}.txt").read_text()
    log, result = read_log(run), read_result(run)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["sigreg_y"] < 0.8 * log[0]["sigreg_y"]
    low, _ = result["intervals"]["ndcg10_without_out1"]
    for query in ("copy in2", "copy out1", "analogy"):
        assert low > result["baselines"][f"{query}, untrained"]["ndcg10_without_out1"], (query, result)
    shuffled = result["shuffled_ndcg10_without_out1"]
    assert shuffled < result["ndcg10_without_out1"] - 0.1          # the prediction depends on its context


@pytest.mark.slow
@pytest.mark.whole
def test_the_default_command_runs_on_real_arc(tmp_path):
    text = python("lejepa.py", "--steps", 20, cwd=tmp_path).stdout
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-lejepa") and text.startswith(f"run folder: runs/{folder.name}\n")
    assert "623" in text.splitlines()[1] and "377" in text.splitlines()[1]
    result = read_result(folder)
    assert set(RESULT) - TIMES <= set(result) and set(BASELINES) <= set(result["baselines"])
    assert result["validation_windows"] == 6612 and result["codes_n"] >= 10_000
    assert result["baseline_ndcg10_without_out1"] == pytest.approx(0.776, abs=0.005)
    assert result["baseline_within_task"] == pytest.approx(0.782, abs=0.005)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == "arcagi2:training" and config["steps"] == 20
    assert config["lam"] == lejepa.Config.lam
