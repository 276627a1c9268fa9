"""Whole commands, as a user types them, at a few steps: what they leave, that they can be repeated and resumed, and how they refuse."""
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import synthetic_tasks, write_tasks
from safetensors import safe_open
from safetensors.torch import load_file

import arc_data
import lejepa

ROOT = Path(__file__).parent.parent
STEPS = 40
TIMES = {"seconds", "samples_per_s"}                   # the only figures in which two equal runs may differ
RESULT = """ndcg10 ndcg10_without_out1 r1 mrr within_task shuffled_ndcg10_without_out1 codes_usage codes_perplexity codes_ceiling codes_n
    effective_rank_context effective_rank_target sigreg_over_null sigreg_n loss prediction steps windows seconds samples_per_s parameters device
    floor_ndcg10_without_out1 floor_within_task floors""".split()
ROWS = ["copy in2, raw", "copy out1, raw", "analogy, raw", "analogy, 31 features", "analogy, raw + 31 features"]
ROWS += [f"{query}, {where}" for where in ("untrained", "trained") for query in ("copy in2", "copy out1", "analogy")]
FLAGS = """help data validate run size steps batch-size lr weight-decay lam seed device dtype compile no-compile resume profile stop-on-alert code objective""".split()


def command(program, *flags):
    return [sys.executable, str(ROOT / program), *map(str, flags)]


def python(program, *flags, cwd=None, status=0):
    done = subprocess.run(command(program, *flags), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr + done.stdout
    return done


def small(folder, run, *flags, steps=STEPS):
    """Flags of a run of some seconds."""
    return ["--data", folder, "--run", run, "--steps", steps, "--batch-size", 24, "--size", "small", "--device", "cpu", *flags]


def read_log(run):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in (run / "log.jsonl").read_text().splitlines()]


def read_result(run):
    return {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in TIMES}


def checkpoint(run):
    """Tensors of last.safetensors, and its step."""
    with safe_open(run / "last.safetensors", "pt") as file:
        return load_file(run / "last.safetensors"), int(file.metadata()["step"])


def assert_same_bits(run, other):
    (tensors, step), (others, other_step) = checkpoint(run), checkpoint(other)
    assert step == other_step and tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different and len(tensors) > 50
    assert read_log(run) == read_log(other)
    assert read_result(run) == read_result(other)


@pytest.fixture(scope="module")
def run(tmp_path_factory, task_folder):
    """A short run to its end on small tasks; and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, python("lejepa.py", *small(task_folder, folder)).stdout


# ------------------------------------------------------------------------------------------------ flags


def test_training_tasks_are_looked_at_though_the_first_hundred_have_one_pair_each(tmp_path):
    good = synthetic_tasks(4, tasks=6)
    tasks = {f"single{i}": arc_data.Task(task.train[:1], []) for i, task in enumerate(synthetic_tasks(5, tasks=100).values())} | good
    log = lejepa.RunLog(lejepa.Config(run=str(tmp_path), size="small", device="cpu"), tasks, good, 1, 0, None, 0.0)
    log.close()
    assert set(log.seen.task_ids) == set(good)


def test_help_lists_these_flags_and_no_other(capsys):
    with pytest.raises(SystemExit) as stopped:
        lejepa.parse_flags(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.findall(r"^  (?:-h, )?--([\w-]+)(?:, --([\w-]+))?", text, re.M) == [(name, "no-compile" if name == "compile" else "") for name in FLAGS if name != "no-compile"]
    for name, values in (("size", "small,base,large"), ("device", "auto,cpu,cuda"), ("dtype", "bf16,fp32"), ("code", "gaussian,ema,none"), ("objective", "lejepa,infonce")):
        assert f"--{name} {{{values}}}" in text


BAD_FLAGS = [("--steps 0", "--steps 0"), ("--steps -3", "--steps"), ("--steps many", "--steps"), ("--steps 1.5", "--steps"), ("--lam 1.5", "--lam 1.5"),
             ("--lam nan", "--lam nan"), ("--lam -0.1", "--lam"), ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--batch-size 0", "--batch-size"),
             ("--weight-decay -1", "--weight-decay"), ("--seed -1", "--seed"), ("--seed 99999999999999999999", "--seed"), ("--size huge", "huge"), ("--device tpu", "tpu"),
             ("--dtype fp8", "fp8"), ("--code fsq", "fsq"), ("--objective byol", "byol"), ("--queue 100", "--queue"), ("--context 5", "--context"),
             ("--resume", "--run"), ("--step 20", "--step"), ("--code none --objective infonce --lam 0.2", "--lam"), ("--code ema --lam 0", "--lam 0"), ("--data", "--data"), ("surplus", "surplus")]


def refused(capsys, monkeypatch, *flags):
    """What `lejepa.py FLAGS` says when it refuses: one line, exit status 2."""
    monkeypatch.setattr(sys, "argv", ["lejepa.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        lejepa.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.startswith("lejepa.py: "), error
    return error


@pytest.mark.parametrize("flags, said", BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_status_2(capsys, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, monkeypatch, *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    assert "--device cuda" in refused(capsys, monkeypatch, "--device", "cuda")


# ------------------------------------------------------------------------------------------------ data


def test_missing_or_malformed_data_gets_one_line_and_leaves_no_folder(capsys, monkeypatch, tmp_path, task_folder):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "abc.json").write_text('{"train": [{"input": [[1]], "output": [[1, 2], [3]]}], "test": []}')
    (tmp_path / "none").mkdir()
    run = tmp_path / "run"
    for flags, words in ((["--data", tmp_path / "nowhere"], ["nowhere"]), (["--data", tmp_path / "none"], ["none"]),
                         (["--data", tmp_path / "bad"], ["abc.json", "train pair 0", "output", "row 1"]),
                         (["--data", task_folder, "--validate", tmp_path / "nowhere"], ["nowhere"]),
                         (["--data", task_folder, "--validate", task_folder], ["no training task"])):
        error = refused(capsys, monkeypatch, *flags, "--run", run)
        assert all(word in error for word in words)
        assert not run.exists()                        # so that the corrected command may name it


@pytest.mark.whole
def test_a_refusal_is_one_line_and_status_2_at_the_shell_too(tmp_path):
    for program in ("lejepa.py", "eval.py"):
        done = python(program, *(["--data"] if program == "lejepa.py" else []), "nowhere", cwd=tmp_path, status=2)
        assert done.stdout == "" and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert not list(tmp_path.glob("**/result.json"))


@pytest.mark.whole
def test_arc_data_prints_the_counts():
    text = python("arc_data.py").stdout
    for count in (6128, 6612, 15350, 1912, 377, 623):
        assert re.search(rf"\b{count}\b", text.replace(",", "")), count


# ------------------------------------------------------------------------------------------------ a run


@pytest.mark.whole
def test_a_run_leaves_its_whole_record(run):
    folder, text = run
    assert {"config.json", "log.jsonl", "last.safetensors", "result.json", "result.png"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.part")) and not list(folder.glob("**/*.p*kl*"))
    config = json.loads((folder / "config.json").read_text())
    assert {name.replace("-", "_") for name in FLAGS if name not in ("help", "no-compile")} <= set(config)
    assert config["steps"] == STEPS and config["torch"] == torch.__version__ and config["device"] == "cpu" and {"commit", "python", "numpy"} <= set(config)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == sorted({row["step"] for row in log}) and log[-1]["step"] == STEPS
    assert all({"step", "loss", "prediction", "sigreg", "lr", "grad_norm", "samples_per_s"} <= set(row) for row in log)
    assert {"ndcg10_without_out1", "codes_usage", "codes_perplexity", "effective_rank_target"} <= set(log[-1])
    assert text.count(f"/{STEPS}  loss") == len(log)   # one line a logged step
    assert checkpoint(folder)[1] == STEPS


@pytest.mark.whole
def test_result_json_holds_the_contract_and_the_screen_ends_in_it(run, task_folder):
    folder, text = run
    result = json.loads((folder / "result.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(RESULT) <= set(result) and set(result["floors"]) == set(ROWS)
    assert all({"ndcg10", "ndcg10_without_out1", "r1", "mrr", "within_task"} <= set(row) for row in result["floors"].values())
    _, held_out, _ = arc_data.split(str(task_folder), None)
    assert result["steps"] == STEPS and result["sigreg_n"] == 12
    assert len(arc_data.make_windows(held_out).index) in (result["windows"], result.get("validation_windows"))
    best = max(row["within_task"] for name, row in result["floors"].items() if not name.endswith(" trained"))
    assert result["floor_within_task"] == pytest.approx(best)
    assert 0 < result["effective_rank_target"] <= lejepa.SIZES["small"].dim and result["parameters"] > 10**5
    lines = dict(re.findall(r"^(\w+): (.*)$", text, re.M))
    assert set(RESULT) - {"floors"} <= set(lines)
    for name in set(RESULT) - {"floors", "device"}:
        assert float(lines[name]) == pytest.approx(result[name], rel=1e-4)


@pytest.mark.whole
def test_tensorboard_shows_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(run[0]))
    board.Reload()
    log = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "prediction", "sigreg", "grad_norm", "lr"):
        assert [(event.step, pytest.approx(event.value, rel=1e-5)) for event in board.Scalars(name)] == [(row["step"], row[name]) for row in log]
    assert board.Tags()["histograms"] and board.Tags()["images"]


@pytest.mark.whole
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run, task_folder, tmp_path):
    python("lejepa.py", *small(task_folder, tmp_path / "again"))
    assert_same_bits(run[0], tmp_path / "again")
    python("lejepa.py", *small(task_folder, tmp_path / "other", "--seed", 1, steps=1))
    assert read_log(tmp_path / "other")[0]["loss"] != read_log(run[0])[0]["loss"]


@pytest.mark.whole
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, task_folder, tmp_path):
    folder = tmp_path / "cut"
    flags = small(task_folder, folder)
    process = subprocess.Popen(command("lejepa.py", *flags), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    step = checkpoint(folder)[1]
    assert 10 <= step < STEPS and not (folder / "result.json").exists()
    resumed = python("lejepa.py", *flags, "--resume").stdout
    assert f"step {step // 10 * 10 + 10}/{STEPS}" in resumed and f"step {step // 10 * 10}/{STEPS}" not in resumed
    assert_same_bits(run[0], folder)


@pytest.mark.whole
def test_a_finished_run_resumed_is_the_same_run(run, task_folder, tmp_path):
    subprocess.run(["cp", "-r", str(run[0]), str(tmp_path / "copy")], check=True)
    python("lejepa.py", *small(task_folder, tmp_path / "copy", "--resume"))
    assert_same_bits(run[0], tmp_path / "copy")


@pytest.mark.whole
def test_a_damaged_last_checkpoint_falls_back_to_previous_and_a_cut_log_line_is_dropped(run, task_folder, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run[0]), str(folder)], check=True)
    (folder / "previous.safetensors").write_bytes((folder / "last.safetensors").read_bytes())
    (folder / "last.safetensors").write_bytes(b"no checkpoint")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 50, "lo')
    done = python("lejepa.py", *small(task_folder, folder, "--resume"))
    assert "last.safetensors" in done.stderr and "previous.safetensors" in done.stderr and done.stderr.count("\n") == 1
    assert read_log(folder) == read_log(run[0]) and read_result(folder) == read_result(run[0])


@pytest.mark.whole
def test_a_run_is_not_resumed_to_fewer_steps(run, task_folder, capsys, monkeypatch):
    assert f"step {STEPS}" in refused(capsys, monkeypatch, *small(task_folder, run[0], "--resume", steps=STEPS - 1))


@pytest.mark.whole
def test_a_loss_that_is_not_a_number_ends_the_run_with_its_step_and_saves_nothing(task_folder, tmp_path):
    done = python("lejepa.py", *small(task_folder, tmp_path / "run", "--lr", "1e30"), status=1)
    assert re.match(r"loss is nan at step 2 \(prediction nan, .*; there is no checkpoint yet\n$", done.stderr), done.stderr
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.whole
def test_load_run_gives_the_frozen_trained_model(run, task_folder):
    model, cfg = lejepa.load_run(run[0])
    assert cfg.steps == STEPS and not model.training and not any(p.requires_grad for p in model.parameters())
    tensors, _ = checkpoint(run[0])
    weights = {name: value for name, value in model.state_dict().items() if f"model.{name}" in tensors}
    assert len(weights) > 30 and all(torch.equal(value, tensors[f"model.{name}"]) for name, value in weights.items())
    fresh = lejepa.build(cfg).eval()
    grids = [np.eye(4, dtype=np.int8), np.ones((2, 3), np.int8)]
    assert model.embed(grids).shape == fresh.embed(grids).shape and not torch.equal(model.embed(grids), fresh.embed(grids))
    assert str(lejepa.load_run(str(run[0]))[1].run) == str(cfg.run)


@pytest.mark.whole
def test_eval_of_a_run_repeats_its_figures(run, task_folder, tmp_path):
    _, held_out, _ = arc_data.split(str(task_folder), None)
    folder = write_tasks(tmp_path / "held", held_out)
    python("eval.py", run[0], "--data", folder, "--out", tmp_path)
    figures = json.loads((tmp_path / "eval.json").read_text())
    result = read_result(run[0])
    for name in ("ndcg10", "ndcg10_without_out1", "within_task"):
        assert figures[name]["model"] == pytest.approx(result[name], abs=1e-6)


@pytest.mark.whole
def test_a_run_is_not_overwritten_and_not_resumed_with_other_flags(run, task_folder, tmp_path, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in run[0].iterdir()}
    flags = small(task_folder, run[0])
    assert "--resume" in refused(capsys, monkeypatch, *flags)
    for flag, value in (("--seed", 1), ("--lr", 0.5), ("--lam", 0.7), ("--batch-size", 12), ("--code", "none"), ("--objective", "infonce"), ("--dtype", "fp32"),
                        ("--data", "arcagi1:training"), ("--weight-decay", 0.7)):
        assert flag in refused(capsys, monkeypatch, *flags, flag, value, "--resume")
    assert {path.name: path.read_bytes() for path in run[0].iterdir() if path.name in before} == before
    assert str(tmp_path / "nowhere") in refused(capsys, monkeypatch, *flags, "--run", tmp_path / "nowhere", "--resume")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "mine" in refused(capsys, monkeypatch, *flags, "--run", tmp_path / "mine")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["kept"]


@pytest.mark.whole
def test_every_code_with_every_objective_runs(task_folder, tmp_path):
    script = """
import sys, lejepa
for flags in {}:
    sys.argv = ['lejepa.py', *flags]
    try:
        lejepa.main()
    except SystemExit as stopped:
        assert stopped.code == 0, flags
"""
    names = [(code, objective) for code in ("gaussian", "ema", "none") for objective in ("lejepa", "infonce")]
    runs = [[str(word) for word in small(task_folder, tmp_path / f"{code}-{objective}", "--code", code, "--objective", objective, steps=3)] for code, objective in names]
    done = subprocess.run([sys.executable, "-c", script.format(runs)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = set()
    for code, objective in names:
        result = read_result(tmp_path / f"{code}-{objective}")
        assert set(RESULT) - TIMES <= set(result) and (result["codes_usage"] is None) == (code == "none")
        assert (result["sigreg_over_null"] is None) == (objective == "infonce")
        losses.add(result["loss"])
        assert lejepa.load_run(tmp_path / f"{code}-{objective}")[0].embed([np.ones((2, 2), np.int8)]).isfinite().all()
    assert len(losses) == 6


@pytest.fixture(scope="module")
def profiled(task_folder, tmp_path_factory):
    """A run's folder with a trace in it, and what the command printed."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    return run, python("lejepa.py", *small(task_folder, run, "--profile")).stdout


@pytest.mark.whole
def test_profile_leaves_a_trace_of_the_training_step_and_says_where_its_time_goes(profiled):
    run, text = profiled
    traces = list((run / "profile").glob("*.pt.trace.json"))
    assert len(traces) == 1 and "Self CPU" in text and (run / "profile" / "parts.png").stat().st_size > 1000
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert any(name and name.startswith("ProfilerStep") for name in names) and "EppsPulley" in names and "EppsPulleyBackward" in names
    assert any(name and name.startswith("Optimizer.step") for name in names) and {"code", "encoder", "predictor", "sigreg", "optimizer"} <= names
    shares = dict(re.findall(r"^ *(\w+) +([\d.]+)% +[\d.]+ ms a step", text, re.M))
    assert set(shares) == {*lejepa.PARTS, "other"} and sum(map(float, shares.values())) == pytest.approx(100, abs=0.5)
    assert re.search(r"peak memory \d+\.\d\d GB .*; \d+ windows/s; utilisation \d+\.\d% of a bf16 matrix product", text)


@pytest.mark.whole
def test_tensorboard_shows_the_trace_with_the_step_taken_apart(profiled):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(profiled[0]), "--host", "127.0.0.1", "--port", str(port)]
    board = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def ask(page, until):
        """The page once it holds what is waited for: the server and its reading of the trace take their time."""
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{page}", timeout=20) as answer:
                    found = json.loads(answer.read())
                if until(found):
                    return found
            except OSError:
                assert board.poll() is None, board.stderr.read()
            time.sleep(0.3)
        raise AssertionError(f"{page} never came")
    try:
        name = urllib.parse.quote(ask("runs", lambda found: found["runs"])["runs"][0])
        assert "Overview" in ask(f"views?run={name}", bool)
        worker = urllib.parse.quote(ask(f"workers?run={name}&view=Overview", bool)[0])
        span = ask(f"spans?run={name}&worker={worker}", bool)[0]
        overview = ask(f"overview?run={name}&worker={worker}&span={span}&view=Overview", bool)
    finally:
        board.terminate()
        board.communicate(timeout=30)
    costs = {row["name"]: row["value"] for row in overview["performance"][0]["children"]}
    assert len(overview["steps"]["rows"]) == 3 and float(costs["DataLoader"]) > 0 and float(costs["CPU Exec"]) > 0


RULES = [np.fliplr, np.flipud, np.transpose, np.rot90, lambda grid: np.kron(grid, np.ones((2, 2), np.int8)),
         lambda grid: np.concatenate([grid, np.fliplr(grid)], 1), lambda grid: np.pad(grid, 1, constant_values=5)]


def ruled_tasks(seed, tasks=120):
    """Tasks that each apply one of seven rules to sparse random grids: unseen ones can be learned from seen ones."""
    rng = np.random.default_rng(seed)

    def pair(rule):
        grid = rng.integers(1, 4, rng.integers(3, 9, 2)).astype(np.int8)
        grid[rng.random(grid.shape) > 0.35] = 0
        return grid, np.ascontiguousarray(rule(grid)).astype(np.int8)
    rules = [RULES[i] for i in rng.integers(len(RULES), size=tasks)]
    return {f"rule{i:03d}": arc_data.Task([pair(rule) for _ in range(3)], [pair(rule)]) for i, rule in enumerate(rules)}


@pytest.mark.whole
def test_in_a_short_run_the_loss_falls_and_unseen_tasks_beat_the_untrained_encoder(tmp_path):
    folder = write_tasks(tmp_path / "tasks", ruled_tasks(0))
    python("lejepa.py", "--data", folder, "--run", tmp_path / "run", "--steps", 80, "--batch-size", 48, "--size", "small", "--device", "cpu")
    log, result = read_log(tmp_path / "run"), read_result(tmp_path / "run")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["sigreg"] < 0.8 * log[0]["sigreg"]
    low, _ = result["intervals"]["ndcg10_without_out1"]
    for query in ("copy in2", "copy out1", "analogy"):
        assert low > result["floors"][f"{query}, untrained"]["ndcg10_without_out1"], (query, result)
    assert result["shuffled_ndcg10_without_out1"] < result["ndcg10_without_out1"] - 0.1     # it reads its context


@pytest.mark.whole
def test_the_default_command_runs_on_real_arc(tmp_path):
    text = python("lejepa.py", "--steps", 20, cwd=tmp_path).stdout
    folder, = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-lejepa") and "623" in text.splitlines()[0] and "377" in text.splitlines()[0]
    result = read_result(folder)
    assert set(RESULT) - TIMES <= set(result) and set(result["floors"]) == set(ROWS)
    assert 6612 in (result["windows"], result.get("validation_windows")) and result["codes_n"] >= 10_000
    assert result["floor_ndcg10_without_out1"] == pytest.approx(0.776, abs=0.005) and result["floor_within_task"] == pytest.approx(0.782, abs=0.005)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == "arcagi2:training" and config["steps"] == 20 and config["lam"] == lejepa.Config.lam
