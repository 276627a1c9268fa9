"""Claims of the commands of eval.py: what they write, where, and what bad input gets. The model is a toy."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_json, synthetic_tasks, write_tasks
from test_eval import Toy

import arc_data
import eval as evaluation
import lejepa
from harness import commands, decoder, health
from harness.views import Views

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tasks():
    return synthetic_tasks(0, tasks=10, side=(2, 6), colours=4)


@pytest.fixture
def run(tmp_path, monkeypatch, tasks):
    """A folder of task files and two runs' folders; a toy stands in for their models."""
    write_tasks(tmp_path / "tasks", tasks)
    cfg = lejepa.Config(data=str(tmp_path / "tasks"), validate="dev", size="small")

    def load_run(path):
        if not (path / "last.safetensors").exists():
            raise ValueError(f"{path}: no checkpoint\nthat can be read")  # two lines become one
        return Toy(seed=len(path.name)), cfg

    class Untrained(Toy):
        eval = lambda self: self
    monkeypatch.setattr(lejepa, "load_run", load_run)
    monkeypatch.setattr(decoder, "STEPS", 2)
    monkeypatch.setattr(lejepa, "build", lambda cfg: Untrained(seed=9))
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.safetensors").touch()
    return tmp_path


def call(*arguments):
    evaluation.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


# -------------------------------------------------------------------------------- eval.py RUN


@pytest.mark.whole
def test_the_command_writes_the_whole_record_and_says_where(run, tasks, capsys):
    out = run / "new" / "folder"
    call("run", "--data", "tasks", "--out", out)
    written, health = read(out / "eval.json"), read(out / "health.json")
    data = {"source": "tasks", "tasks": 10, "windows": sum(n * (n - 1) for n in pairs_of_each(tasks))}
    for record in (written, health):
        assert data.items() <= record["data"].items() and record["data"]["shared_with_training"] > 0
    assert tuple(written) == ("data", *evaluation.METRICS, *decoder.METRICS)
    assert {"cross_entropy", "probes", "context", "target", "codes", "lead", "criteria"} <= set(health)
    screen = capsys.readouterr().out
    assert f"{written['probe_knn']['model']:.3f}" in screen and str(out / "eval.json") in screen
    assert "share a pair with the training tasks: not unseen" in screen
    assert {path.name for path in out.iterdir()} == {"eval.json", "health.json", "report.html"}


def pairs_of_each(tasks):
    return [len(arc_data.pairs_of(task)) for task in tasks.values()]


def test_evaluations_of_different_data_are_kept_apart(run, tasks):
    (run / "half.json").write_text(json.dumps({name: as_json(tasks[name]) for name in list(tasks)[:5]}))
    half = "half.json", "run/eval-half.json"
    for source, folder in [("tasks", "run"), half, ("tasks", "run"), ("dev", "run/eval-dev"), half]:
        chosen = commands.choose_folder(Path("run"), source)
        assert chosen == Path(folder)
        chosen.mkdir(exist_ok=True)
        (chosen / "eval.json").write_text(json.dumps({"data": {"source": source}}))
    (run / "run" / "eval-a-b").mkdir()
    (run / "run" / "eval-a-b" / "eval.json").write_text(json.dumps({"data": {"source": "a/b"}}))
    assert commands.choose_folder(Path("run"), "a/b") == Path("run/eval-a-b")
    other = commands.choose_folder(Path("run"), "a,b").name  # other data of the same name
    assert re.fullmatch(r"eval-a-b-\w{6}", other)
    for text in ("kept", "{}", "[]", '{"data": 3}'):  # not known of which data: not overwritten
        (run / "run" / "eval.json").write_text(text)
        assert commands.choose_folder(Path("run"), "tasks") == Path("run/eval-tasks")


def test_data_dev_is_the_part_that_the_run_held_out(run, tasks):
    cfg = lejepa.load_run(run / "run")[1]
    found, trained = commands.read_tasks(cfg, "dev")
    assert 0 < len(found) < len(tasks) and commands.count_shared(found, trained) == 0
    assert set(found) == set(arc_data.split("tasks", "dev")[1])
    every, trained = commands.read_tasks(cfg, "tasks")
    assert commands.count_shared(every, trained) >= len(tasks) - len(found)  # all that it was trained on


def test_what_cannot_be_checked_for_leaks_is_said_and_recorded(run, capsys):
    cfg = lejepa.Config(data="gone", validate="dev")
    assert commands.read_tasks(cfg, "tasks")[1] is None
    assert "not checked whether the tasks are unseen" in capsys.readouterr().err


@pytest.mark.whole
def test_labels_are_probed_and_what_has_none_is_counted(run, capsys, tasks):
    rng = np.random.default_rng(0)
    everything = {name: as_json(task) for name, task in tasks.items()}
    everything["pairless"] = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1, 1]]}]}
    (run / "all.json").write_text(json.dumps(everything))
    labels = {name: str(rng.integers(3)) for name in list(tasks)[:8]}
    (run / "labels.json").write_text(json.dumps(labels))
    call("run", "--data", "all.json", "--labels", "labels.json", "--out", "out")
    written, screen = read(run / "out" / "eval.json"), capsys.readouterr().out
    assert written["probe_vote"]["n"] == 8 and written["probe_knn"]["n"] < written["task_1nn"]["n"] + 8
    assert written["probe_knn"]["baselines"]["majority"] == pytest.approx(1 / len(set(labels.values())))
    assert "1 test pairs" in screen and "1 tasks with fewer than two complete pairs" in screen
    assert "3 tasks without a label" in screen


@pytest.mark.whole
def test_one_task_gets_a_record_and_a_page(run, tasks):
    name = next(name for name, task in tasks.items() if len(arc_data.pairs_of(task)) > 2)
    (run / "one.json").write_text(json.dumps({name: as_json(tasks[name])}))
    call("run", "--data", "one.json", "--out", "out")
    assert read(run / "out" / "eval.json")["probe_vote"]["model"] is None
    assert (run / "out" / "report.html").stat().st_size > 10_000


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "cannot be written" in refused(capsys, "run", "--data", "tasks", "--out", "out/deep")
    assert "cannot be written" in refused(capsys, "codes", "run", "--data", "tasks", "--out", "codes.jsonl")
    assert not (run / "out").exists()


@pytest.mark.parametrize("plant", [lambda path: path.symlink_to("victim"), os.mkfifo])
def test_a_link_or_a_pipe_in_place_of_a_record_is_refused_and_never_followed(run, capsys, monkeypatch, plant):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("computed"))
    plant(run / "run" / "report.html")
    assert "report.html: not a regular file; remove it" in refused(capsys, "run", "--data", "tasks")
    (run / "compare").mkdir()
    plant(run / "compare" / "compare.json")
    assert "compare.json: not a regular" in refused(capsys, "compare", "run", "other", "--data", "tasks")
    assert not (run / "run" / "victim").exists() and not (run / "compare" / "victim").exists()


@pytest.mark.parametrize("settings", [{"data": 5}, {"data": None}, {"lam": "x"}, {"lam": float("nan")}])
def test_settings_that_are_none_of_this_program_get_one_line(run, capsys, monkeypatch, settings):
    model, cfg = lejepa.load_run(run / "run")
    changed = model, dataclasses.replace(cfg, **settings)
    monkeypatch.setattr(lejepa, "load_run", lambda _: changed)
    assert "not one of lejepa.py" in refused(capsys, "run", "--data", "tasks")


NO_MEMORY = [MemoryError("Unable to allocate 2 GiB"), RuntimeError("can't allocate memory")]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_is_one_line(run, capsys, monkeypatch, error):
    monkeypatch.setattr(commands, "read_tasks", lambda *_: (_ for _ in ()).throw(error))
    assert "allocate" in refused(capsys, "run", "--data", "tasks")


# -------------------------------------------------------------------------------- eval.py codes


def test_codes_are_written_object_by_object_with_the_whole_grid_first(run, tasks, tmp_path):
    hidden = arc_data.Task(tasks["task00"].train, [(np.ones((2, 2), np.int8), None)])
    tasks = tasks | {"hidden": hidden}
    form = {name: as_json(task) for name, task in tasks.items() if name != "hidden"}
    form["hidden"] = form["task00"] | {"test": [{"input": [[1, 1], [1, 1]]}]}
    (tmp_path / "all.json").write_text(json.dumps(form))
    call("codes", "run", "--data", "all.json", "--out", "codes.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "codes.jsonl").read_text().splitlines()]
    grids = {(line["task"], line["split"], line["pair"], line["side"]): line["objects"] for line in lines}
    expected = [out is not None for task in tasks.values() for _, out in [*task.train, *task.test]]
    assert len(grids) == len(lines) == len(expected) + sum(expected)
    model = Toy(seed=len("run"))
    for (name, split, number, side), objects in grids.items():
        grid = getattr(tasks[name], split)[number][side == "output"]
        (codes, boxes), = model.codes([grid])
        assert all(set(thing) == {"codes", "box", "colour", "size"} for thing in objects)
        assert [thing["codes"] for thing in objects] == codes.tolist()
        assert [thing["box"] for thing in objects] == boxes.tolist()
        for thing in objects[1:]:  # its box holds that many cells of its colour, at least
            top, left, height, width = thing["box"]
            cells = grid[top:top + height, left:left + width]
            assert (cells == thing["colour"]).sum() >= thing["size"] == int(thing["size"]) > 0
        assert objects[0]["box"] == [0, 0, *grid.shape]
        assert objects[0]["size"] == sum(thing["size"] for thing in objects[1:])


@pytest.mark.whole
def test_the_example_of_the_readme_finds_tasks_of_moved_objects_by_codes(run, tmp_path):
    rng, tasks, moved, still = np.random.default_rng(0), {}, [], []
    for number in range(6):  # an object that moves, and one that moves and changes its colour
        def pair(colour):
            given, out = np.zeros((2, 8, 8), np.int8)
            (a, b), (c, d) = rng.integers(0, 3, 2), rng.integers(3, 6, 2)
            given[a, b:b + 2], out[c, d:d + 2] = 3, colour
            return given, out
        (moved if number % 2 else still).append(f"new{number}")
        pairs = [pair(3 if number % 2 else 4) for _ in range(3)]
        tasks[f"new{number}"] = arc_data.Task(pairs[:2], pairs[2:])
    write_tasks(tmp_path / "new", tasks)
    call("codes", "run", "--data", "new", "--out", "codes.jsonl")
    example = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
                   if "codes.jsonl" in code)
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    found = {line.split(":")[0]: set(line.split()) for line in done.stdout.splitlines()}
    assert done.stderr == "" and found["moved"] >= set(moved) and not found["moved"] & set(still)


def test_codes_go_into_a_pipe_and_through_a_link(run, tasks):
    (run / "link").symlink_to(run / "target")
    call("codes", "run", "--data", "tasks", "--out", "link")
    assert (run / "link").is_symlink()
    assert (run / "target").read_text().count("\n") == 2 * sum(pairs_of_each(tasks))
    call("codes", "run", "--data", "tasks", "--out", "/dev/null")
    assert not Path("/dev/null").is_file()


# -------------------------------------------------------------------------------- eval.py rank


@pytest.fixture
def candidates(run, tasks):
    """For each test input: in2, the answer twice, two wrong ones. The answers of two tasks are left out."""
    found = {}
    for i, (name, task) in enumerate(tasks.items()):
        (given, answer), = task.test
        right = [] if i < 2 else [answer.tolist()] * 2
        larger = answer.tolist() + [[1] * answer.shape[1]]
        found[name] = [[given.tolist(), *right, (9 - answer).tolist(), larger]]
    (run / "candidates.json").write_text(json.dumps(found))
    return found


def test_candidates_come_back_with_the_models_scores_best_first(run, tasks, candidates):
    call("rank", "run", "--data", "tasks", "--candidates", "candidates.json", "--out", "ranked.json")
    ranked, model = read(run / "ranked.json"), Toy(seed=len("run"))
    assert list(ranked) == list(tasks)
    for name, (rows,) in ranked.items():
        grids = [np.array(row["grid"], np.int8) for row in rows]
        assert sorted(grid.tolist() for grid in grids) == sorted(candidates[name][0])
        scores = model.rank(tasks[name].train, tasks[name].test[0][0], grids).tolist()
        assert [row["score"] for row in rows] == pytest.approx(scores)
        assert scores == sorted(scores, reverse=True)


def test_a_submission_is_what_kaggle_takes(run, tasks, candidates):
    single = {name: [[grids[0][0]]] for name, grids in candidates.items() if name == "task00"}
    (run / "single.json").write_text(json.dumps(single))
    flags = "rank", "run", "--data", "tasks", "--candidates"
    call(*flags, "candidates.json", "--out", "ranked.json", "--submission", "sub.json")
    submission, ranked = read(run / "sub.json"), read(run / "ranked.json")
    assert set(submission) == set(tasks)
    for name, attempts in submission.items():
        assert len(attempts) == len(tasks[name].test)
        for attempt, rows in zip(attempts, ranked[name]):
            assert set(attempt) == {"attempt_1", "attempt_2"} and attempt["attempt_1"] == rows[0]["grid"]
            assert attempt["attempt_2"] == next(row["grid"] for row in rows if row["grid"] != rows[0]["grid"])
    call(*flags, "single.json", "--out", "/dev/null", "--submission", "one.json")
    only = candidates["task00"][0][0]
    assert read(run / "one.json") == {"task00": [{"attempt_1": only, "attempt_2": only}]}


def test_where_answers_are_known_accuracy_stands_beside_baselines(run, tasks, candidates, capsys):
    call("rank", "run", "--data", "tasks", "--candidates", "candidates.json", "--out", "ranked.json")
    lines = capsys.readouterr().out.splitlines()
    rows = {re.split(r"\s{2,}", line)[0]: re.findall(r"[\d.]+(?= \[)", line) for line in lines}
    names = {"copy in2, raw", "analogy, raw", "analogy, 31 features", "analogy, raw + 31 features"}
    assert {"model", "untrained", *names} <= set(rows)
    assert lines[-1].startswith("10 known answers, 8 of them among the candidates")
    ranked, hits, gains = read(run / "ranked.json"), {1: [], 2: []}, []
    for name, (found,) in ranked.items():
        distinct = []
        for row in found:
            distinct += [row["grid"]] * (row["grid"] not in distinct)
        answer = tasks[name].test[0][1].tolist()
        place = distinct.index(answer) + 1 if answer in distinct else 99
        gains.append(1 / np.log2(place + 1) if place <= 10 else 0)
        for k in hits:
            hits[k].append(place <= k)
    expected = [np.mean(hits[1]), np.mean(hits[2]), np.mean(gains)]
    assert [float(value) for value in rows["model"]] == pytest.approx(expected, abs=6e-4)


def test_candidate_baselines_are_cosines_of_the_candidates(run, tasks):
    task = tasks["task03"]
    given, answer = task.test[0]
    grids = [answer, given, (9 - answer).astype(np.int8)]
    rows = commands.candidate_baselines(tasks, [("task03", given, answer, grids, None)])
    known = {(out.shape, out.tobytes()): out for other in tasks.values() for _, out in other.train}
    one_hot = lambda grids: np.eye(11)[arc_data.pad(list(grids))].reshape(len(grids), -1)
    middle = one_hot(known.values()).mean(0)
    step = np.mean([one_hot([out])[0] - one_hot([given])[0] for given, out in task.train], 0)
    for name, query in (("copy in2, raw", one_hot([given])[0]), ("analogy, raw", one_hot([given])[0] + step)):
        a, b = query - middle, one_hot(grids) - middle
        expected = b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(rows[name][0], expected, atol=1e-5)


def test_a_tie_with_the_answer_counts_half():
    found = commands.rank_answer(torch.tensor([1.0, 1.0, 0.0]), np.array([True, False, False]), 0)
    assert (found["r1"], found["r2"]) == (0.5, 1.0)
    assert set(commands.rank_answer(torch.zeros(2), np.array([False, False]), 0).values()) == {0.0}


GRID = [[1, 2]]
BAD_CANDIDATES = [([], "object"), ({}, "no task"), ({"elsewhere": [[GRID]]}, "elsewhere: not in --data"),
                  ({"task01": [5]}, "task01, test input 0"), ({"task01": []}, "1 of them"),
                  ({"task01": [[]]}, "task01, test input 0: needs a list"),
                  ({"task01": [[GRID, [[1], [2, 3]]]]}, "task01, test input 0, candidate 1"),
                  ({"task01": [[GRID, GRID, [[17]]]]}, "task01, test input 0, candidate 2"),
                  ({"task01": [[GRID, [[0] * 31]]]}, "candidate 1"),
                  ({"task01": [[GRID, "grid"]]}, "candidate 1"),
                  ({"task01": [[None]]}, "candidate 0")]


@pytest.mark.parametrize("content, said", BAD_CANDIDATES)
def test_a_bad_file_of_candidates_gets_one_line_that_names_the_place(run, capsys, content, said):
    (run / "bad.json").write_text(json.dumps(content))
    flags = "--data", "tasks", "--candidates", "bad.json", "--out", "ranked.json"
    error = refused(capsys, "rank", "run", *flags)
    assert said in error and "bad.json" in error and not (run / "ranked.json").exists()


# --------------------------------------------------------------------------------------------- --views


def test_a_squared_distance_over_views_is_the_mean_of_those_of_the_turned_grids(run, tasks):
    model = Toy(seed=1)
    task = tasks["task03"]
    context, grids = [side for pair in task.train for side in pair] + [task.test[0][0]], [task.test[0][1]]
    seen, squared = Views(model, 8), []
    for i in range(8):
        z_hat = model.predict([[arc_data.turn(grid, i) for grid in context]])
        squared.append((z_hat - model.embed([arc_data.turn(grid, i) for grid in grids])).square().sum())
    expected = torch.stack(squared).mean()
    assert len({round(float(value), 4) for value in squared}) > 1
    torch.testing.assert_close((seen.predict([context]) - seen.embed(grids)).square().sum(), expected)
    torch.testing.assert_close(-seen.rank(task.train, context[-1], grids)[0], expected)
    assert seen.embed(grids, "pooled").shape == model.embed(grids, "pooled").shape
    one = Views(model, 1)
    torch.testing.assert_close(one.embed(grids), model.embed(grids))


def test_the_record_says_how_many_views_were_averaged(run):
    call("run", "--data", "tasks", "--views", "2", "--out", "two")
    assert read(run / "two" / "eval.json")["data"]["views"] == 2
    assert read(run / "two" / "eval.json")["ndcg10"]["model"] is not None


# -------------------------------------------------------------------------------- eval.py compare


@pytest.mark.whole
def test_compare_puts_runs_side_by_side_paired_with_the_first(run, capsys):
    call("compare", "run", "other", "--data", "tasks", "--out", "out")
    result, screen = read(run / "out" / "compare.json"), capsys.readouterr().out
    assert list(result["runs"]) == ["run", "other"]
    assert {path.name for path in (run / "out").iterdir()} == {"compare.json", "compare.html"}
    first, second = result["runs"]["run"], result["runs"]["other"]
    call("other", "--data", "tasks", "--out", "alone")
    alone = read(run / "alone" / "eval.json")
    for metric in evaluation.METRICS:
        assert first[metric]["difference"] == [0, 0, 0]
        difference = second[metric]["value"] - first[metric]["value"]
        assert second[metric]["difference"][0] == pytest.approx(difference, abs=1e-9)
        assert second[metric]["value"] == pytest.approx(alone[metric]["model"])
    assert "codes" not in first and -0.1 < second["codes"]["agreement"] <= 1
    assert f"{first['within_task']['value']:.3f}" in screen
    scores = result["label_free"]
    assert set(scores) == {"run", "other"}
    assert screen.count(f"the rule's choice is the least: {min(scores, key=scores.get)}\n") == 1


def test_the_rule_without_labels_is_the_error_plus_the_crowding_of_distinct_targets(tasks):
    z = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    z_hat = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    index = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [4, 5, 6, 7], [6, 7, 4, 8]])
    outputs = np.array([1, 3, 5, 7, 8])
    windows = types.SimpleNamespace(index=index, outputs=outputs)
    found = health.label_free_score(types.SimpleNamespace(z=z, z_hat=z_hat, windows=windows))
    error = ((z_hat - z[index[:, 3]]) ** 2).mean() * 6             # lengths become sqrt(6)
    logs = []
    for i in outputs:
        others = z[[j for j in outputs if j != i]]
        logs.append(np.log(np.exp(-10 * ((others - z[i]) ** 2).sum(1).numpy()).mean()))
    assert found == pytest.approx(float(error) + 2 + 0.1 * np.mean(logs), rel=1e-5)


def test_codes_agree_up_to_a_renaming_and_by_chance_not_at_all():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 50, (1000, 3))
    renamed = np.stack([rng.permutation(50)[column] for column in a.T], 1)[:, [2, 0, 1]]
    assert commands.code_agreement(a, renamed) == pytest.approx(1)
    assert 0.3 < commands.code_agreement(a, a // 2) < 0.95
    assert abs(commands.code_agreement(a, rng.integers(0, 50, (1000, 3)))) < 0.05


# -------------------------------------------------------------------------------- bad input, Ctrl-C

TASKS = "--data", "tasks"
BAD = [(["NOWHERE"], "NOWHERE"), ([], "RUN"), (["run", "--data", "NOWHERE.json"], "NOWHERE.json"),
       (["run", "--data", "EMPTY"], "outputs"), (["run", *TASKS, "--labels", "NOWHERE.json"], "NOWHERE.json"),
       (["run", *TASKS, "--labels", "BROKEN"], "JSON"), (["run", *TASKS, "--labels", "LIST"], "object"),
       (["run", *TASKS, "--labels", "NUMBERS"], "class name"), (["run", *TASKS, "--labels", "ONE"], "two"),
       (["run", *TASKS, "--labels", "UNKNOWN"], "not-there"),
       (["codes", "run"], "--data"), (["codes", "NOWHERE", *TASKS, "--out", "CODES"], "NOWHERE"),
       (["codes", "run", *TASKS, "--out", "NO/SUCH/FILE"], "NO/SUCH"), (["compare"], "RUN"),
       (["rank", "run", *TASKS, "--out", "x"], "--candidates"),
       (["compare", "run", "NOWHERE", *TASKS], "NOWHERE"), (["compare", "run", "run", *TASKS], "twice"),
       (["run", "--surplus"], "--surplus")]


@pytest.mark.parametrize("arguments, said", BAD)
def test_bad_input_gets_one_line_and_status_2_and_keeps_what_was_written(run, capsys, arguments, said):
    (run / "run" / "eval.json").write_text("kept")
    single = {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1]]}]}
    files = {"EMPTY": {"a": single}, "LIST": ["a"], "UNKNOWN": {"not-there": "a", "task00": "b"},
             "ONE": {"task00": "a", "task01": "a"}, "NUMBERS": {"task00": 1}}
    for name, value in files.items():
        (run / name).write_text(json.dumps(value))
    (run / "BROKEN").write_text("{")
    assert said in refused(capsys, *arguments)
    assert (run / "run" / "eval.json").read_text() == "kept" and not (run / "CODES").exists()


def test_help_lists_the_commands_and_each_has_its_own(capsys):
    expected = {"--help": "evaluate codes rank compare", "rank --help": "--submission --candidates",
                "evaluate --help": "--labels arcagi1:evaluation", "codes -h": "--out FILE"}
    for arguments, said in expected.items():
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(arguments.split())
        shown = capsys.readouterr().out
        assert stopped.value.code == 0 and all(word in shown for word in said.split())


@pytest.mark.whole
def test_importing_eval_brings_neither_the_harness_nor_matplotlib():
    script = "import sys, eval; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = set(done.stdout.split())
    assert "sklearn" in loaded and not loaded & {"harness", "matplotlib"}, done.stderr


@pytest.mark.whole
@pytest.mark.parametrize("seconds", [0.3, 1.5])  # while python starts or imports
def test_ctrl_c_ends_with_status_130_and_no_traceback(seconds, tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path / "fifo")]
    running = subprocess.Popen([*command, "--data", "arcagi1:evaluation"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "numpy" not in Path(f"/proc/{running.pid}/maps").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)  # the handler stands before numpy is imported
    time.sleep(seconds - 0.3)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode in (130, 2) and "Traceback" not in error  # 2: it was through before the signal
    assert running.returncode == 130 or seconds > 1
