"""Claims of arc_data.py, each against a slow loop, a search, or figures published elsewhere."""
import hashlib
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import as_json, synthetic_tasks, turns, write_tasks
from torch.utils._python_dispatch import TorchDispatchMode

import arc_data
from arc_data import Task, TaskSet, TokenTable
from harness import checkpoint

WINDOWS = {"arcagi1:training": 6128, "arcagi1:evaluation": 6612,
           "arcagi2:training": 15350, "arcagi2:evaluation": 1912}


def sides_of(tasks):
    return [side for task in tasks.values() for pair in [*task.train, *task.test] for side in pair]


def same_pair(one, other):
    """Whether a pair is the other after a symmetry and a renaming of colours, by search."""
    for turned in zip(*map(turns, one)):
        if all(a.shape == b.shape for a, b in zip(turned, other)):
            a, b = (np.concatenate([side.ravel() for side in pair]) for pair in (turned, other))
            if len(np.unique(a)) == len(np.unique(b)) == len(np.unique(a.astype(int) * 10 + b)):
                return True
    return False


def invariant(pair):
    """What neither symmetry nor recolouring changes: to search only where it agrees."""
    counts = [[(side == colour).sum() for side in pair] for colour in range(10)]
    return tuple(tuple(sorted(side.shape)) for side in pair), tuple(sorted(map(tuple, counts)))


def sharing(tasks, others):
    """Ids of tasks that share a pair with one of the others."""
    known = {}
    for task in others.values():
        for pair in arc_data.pairs_of(task):
            known.setdefault(invariant(pair), []).append(pair)
    return {i for i, task in tasks.items() for pair in arc_data.pairs_of(task)
            if any(same_pair(pair, other) for other in known.get(invariant(pair), []))}


def disguised(task, seed=0):
    """The task turned by a quarter, mirrored and recoloured."""
    names = np.random.default_rng(seed).permutation(10).astype(np.int8)
    change = lambda side: np.ascontiguousarray(names[np.fliplr(np.rot90(side))])
    return Task(*([tuple(map(change, pair)) for pair in part] for part in task))


def objects_of(grids, g):
    """Tokens of grid g of a Grids, the whole grid first: (bitmap, colour, box)."""
    slots = torch.nonzero(grids.grid.flatten() == g).flatten()
    assert grids.first[g] == slots[0] and grids.count[g] == len(slots)
    bits = grids.bits[grids.object_id.flatten()[slots]].numpy()
    colours, boxes = (part[slots].tolist() for part in (grids.colour.flatten(), grids.box.flatten(0, 1)))
    return [(image.tobytes(), colour, tuple(box)) for image, colour, box in zip(bits, colours, boxes)]


def draw(tokens):
    """The grid that a list of (bitmap, colour, box) describes."""
    _, colour, (_, _, height, width) = tokens[0]
    grid = np.full((height, width), colour)
    for bitmap, colour, (top, left, height, width) in tokens[1:]:
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=900).reshape(30, 30)
        assert bits.sum() == bits[:height, :width].sum()                   # nothing outside the box
        grid[top:top + height, left:left + width][bits[:height, :width] == 1] = colour
    return grid


def redraw(tokens):
    """The grids that Tokens describe."""
    described = [(tokens.bitmaps[shape].tobytes(), colour, tuple(box))
                 for shape, colour, box in zip(tokens.shape, tokens.colour, tokens.box.tolist())]
    return [draw(described[first:last]) for first, last in itertools.pairwise(tokens.start)]


# ----------------------------------------------------------------------------------------- tasks from files

GOOD = {"train": [{"input": [[1, 2], [3, 4]], "output": [[5]]}, {"input": [[6]], "output": [[7, 8]]}],
        "test": [{"input": [[9, 0]], "output": [[1]]}]}


def changed(*path, to=None, drop=False):
    task = json.loads(json.dumps(GOOD))
    inner = task
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return json.dumps(task)


PLACE = ("train", 1, "output")
CELLS = {"true": True, "float": 3.0, "text": "3", "nan": float("nan"), "infinity": float("inf"), "null": None,
         "minus": -1, "ten": 10, "list": [1]}
SHAPES = {"no row": [], "an empty row": [[]], "not rows": [1, 2], "a number": 3, "text": "12", "null": None,
          "an object": {"0": [1]}, "31 rows": [[1]] * 31, "31 columns": [[1] * 31],
          "ragged": [[1, 2], [3]], "a late empty row": [[1], []]}
BAD_GRIDS = {f"cell {name}": changed(*PLACE, to=[[1, 2], [3, cell]]) for name, cell in CELLS.items()}
BAD_GRIDS |= {f"grid {name}": changed(*PLACE, to=grid) for name, grid in SHAPES.items()}
BAD_PAIRS = {"no input": (changed("train", 1, "input", drop=True), "train pair 1"),
             "no output": (changed("train", 1, "output", drop=True), "train pair 1"),
             "no test input": (changed("test", 0, "input", drop=True), "test pair 0"),
             "a pair of text": (changed("train", 0, to="ab"), "train pair 0"),
             "a pair of grids": (changed("test", 0, to=[[[1]], [[2]]]), "test pair 0"),
             "a null pair": (changed("train", 1, to=None), "train pair 1")}
BAD_TASKS = {"no train": changed("train", drop=True), "no test": changed("test", drop=True),
             "no pairs": changed("train", to=[]),
             "train an object": changed("train", to={"0": GOOD["train"][0]}),
             "train null": changed("train", to=None), "a list": "[1]", "a number": "3", "null": "null"}
BAD_FILES = {"empty": b"", "cut": json.dumps(GOOD)[:-9].encode(), "latin-1": b'{"t\xe9"',
             "utf-16": json.dumps(GOOD).encode("utf-16"),
             "twice": json.dumps(GOOD)[:-1].encode() + b', "train": []}',
             "twice inside": json.dumps(GOOD).replace('"input"', '"input": [[1]], "input"').encode(),
             "nested": b"[" * 100_000, "two": b"{} {}",
             "a long number": changed(*PLACE, to=[["N"]]).replace('"N"', "9" * 5000).encode()}


@pytest.fixture(params=["folder", "file"])
def place(request, tmp_path):
    """Writes a task where load_tasks finds it, in a folder of tasks or a file of tasks, beside a good one."""
    def write(content):
        if request.param == "folder":
            good = [[tuple(map(np.array, pair.values())) for pair in part] for part in GOOD.values()]
            folder = write_tasks(tmp_path / "tasks", {"good": Task(*good)})
            (folder / "bad7.json").write_bytes(content)
            return folder
        content = b'{"good": %s, "bad7": %s}' % (json.dumps(GOOD).encode(), content)
        (tmp_path / "tasks.json").write_bytes(content)
        return tmp_path / "tasks.json"
    return write


def refused(source, *said):
    with pytest.raises(ValueError) as error:
        arc_data.load_tasks(str(source))
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for words in said:
        assert words in message
    return message


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_malformed_grid_is_refused_by_file_task_pair_and_side(place, name):
    source = place(BAD_GRIDS[name].encode())
    refused(source, str(source), "bad7", "train pair 1, output")


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_malformed_pair_is_refused_by_file_task_and_pair(place, name):
    content, where = BAD_PAIRS[name]
    source = place(content.encode())
    refused(source, str(source), "bad7", where)


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_malformed_task_is_refused_by_file_and_task(place, name):
    source = place(BAD_TASKS[name].encode())
    refused(source, str(source), "bad7")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_json_is_refused_by_name(place, name):
    source = place(BAD_FILES[name])
    refused(source, "bad7.json" if source.is_dir() else str(source))


@pytest.mark.parametrize("part, pair, side", [("train", 0, "input"), ("train", 1, "output"),
                                              ("test", 0, "input"), ("test", 0, "output")])
def test_part_pair_and_side_are_those_of_the_bad_cell(place, part, pair, side):
    refused(place(changed(part, pair, side, 0, 0, to=True).encode()), f"{part} pair {pair}, {side}", "true")


def test_one_task_id_twice_is_refused(tmp_path):
    text = json.dumps(GOOD)
    (tmp_path / "a.json").write_text('{"one": %s, "two": %s}' % (text, text))
    (tmp_path / "b.json").write_text('{"two": %s}' % text)
    (tmp_path / "c.json").write_text('{"one": %s, "one": %s}' % (text, text))
    refused(f"{tmp_path}/a.json,{tmp_path}/b.json", "two", "b.json")
    refused(tmp_path / "c.json", "one", "c.json")
    refused("arcagi1:evaluation,arcagi2:training", "arcagi2:training")


def test_a_source_that_is_not_there_is_refused_with_the_way_out(tmp_path):
    refused(tmp_path / "nothing", "nothing", "arcagi1:training", "folder")
    refused("arcagi3:training", "arcagi3:training", "arcagi1:training")
    refused(tmp_path, str(tmp_path), ".json")
    (tmp_path / "none.json").write_text("{}")
    refused(tmp_path / "none.json", "none.json")


def test_a_name_left_empty_or_a_folder_named_like_a_file_is_refused(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "x.json").mkdir()
    refused(tmp_path / "tasks", "x.json")
    refused("arcagi1:training,", "empty name")


def test_what_is_no_file_or_too_large_is_said_so_and_not_that_it_is_no_json(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "x.json").mkdir()
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "x.json").symlink_to(tmp_path / "nothing.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(arc_data.LARGEST + 1)            # it takes no space on the disk
    assert "not a regular file" in refused(tmp_path / "tasks", "x.json")
    assert "no such file" in refused(tmp_path / "dangling", "x.json")
    assert "larger than 12 MB" in refused(tmp_path / "large.json", "large.json")
    for source in ("tasks", "dangling", "large.json"):
        assert "JSON" not in refused(tmp_path / source).replace(str(tmp_path), "")
    (tmp_path / "text.json").write_text("{")
    refused(tmp_path / "text.json", "not readable as JSON")


@pytest.mark.parametrize("form", ["file", "folder", "solutions", "device"])
def test_a_pipe_or_a_device_is_refused_at_once_and_nothing_is_read_from_it(tmp_path, form):
    os.mkfifo(tmp_path / "x.json")                     # reading from it would wait for a writer for ever
    (tmp_path / "good_challenges.json").write_text(json.dumps({"t": GOOD}))
    source = {"file": tmp_path / "x.json", "folder": tmp_path, "device": "/dev/zero",
              "solutions": f"{tmp_path}/good_challenges.json+{tmp_path}/x.json"}[form]
    if form == "folder":
        (tmp_path / "good_challenges.json").unlink()
    refused(source, "zero" if form == "device" else "x.json", "not a regular file")


CONTROL = "a\x1b[2J\x07b\u202ec\nd"                     # clears a terminal, rings, turns the line round


def test_no_control_character_of_a_name_reaches_a_message(tmp_path):
    name = json.dumps(CONTROL)
    contents = {"id": '{%s: {"train": 3}}' % name, "key": "{%s: 0, %s: 1}" % (name, name),
                "cell": changed(*PLACE, to=[[CONTROL]])}
    for kind, content in contents.items():
        folder = tmp_path / kind
        folder.mkdir()
        path = folder / f"{CONTROL}.json"
        path.write_text(content)
        for source in (path, f"{path}/nothing", f"{path},{path}", f"{path}+{path}", folder):
            assert refused(source).isprintable()
    with pytest.raises(ValueError, match="task with two complete pairs is left") as error:
        arc_data.split(str(write_tasks(tmp_path / CONTROL, synthetic_tasks(0, tasks=1))), None)
    assert str(error.value).isprintable()


def changed_task(grid):
    return json.loads(changed(*PLACE, to=grid))


def challenges(folder, name="arc_challenges.json"):
    """A Kaggle pair of files, written to the folder: tasks without test outputs, and the outputs apart."""
    tasks = {"one": json.loads(json.dumps(GOOD)), "two": changed_task([[4]])}
    outputs = {}
    for task_id, task in tasks.items():
        task["test"] += [{"input": [[3]], "output": [[2, 2]]}]
        outputs[task_id] = [pair.pop("output") for pair in task["test"]]
    (folder / name).write_text(json.dumps(tasks))
    return folder / name, outputs


def test_challenges_take_their_test_outputs_from_the_solutions_beside_them_or_from_those_named(tmp_path):
    path, outputs = challenges(tmp_path)
    plain = arc_data.load_tasks(str(path))
    assert [pair[1] for task in plain.values() for pair in task.test] == [None] * 4
    (tmp_path / "elsewhere.json").write_text(json.dumps(outputs))
    named = arc_data.load_tasks(f"{path}+{tmp_path}/elsewhere.json")
    (tmp_path / "arc_solutions.json").write_text(json.dumps(outputs))
    beside = arc_data.load_tasks(str(path))
    for tasks in (named, beside):
        assert {i: [output.tolist() for _, output in task.test] for i, task in tasks.items()} == outputs
        assert [pair[0].tolist() for task in tasks.values() for pair in task.train + task.test] == \
            [pair[0].tolist() for task in plain.values() for pair in task.train + task.test]
    assert list(arc_data.load_tasks(f"{path},{task_file(tmp_path, 'more')}")) == ["one", "two", "more"]


def task_file(folder, name):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(GOOD))
    return path


@pytest.mark.parametrize("change", [lambda x: x.update(three=[[[1]], [[1]]]), lambda x: x["one"].pop(),
                                    lambda x: x.update(one=None), lambda x: x.update(one="abc"),
                                    lambda x: x["one"].append([[1]])])
def test_solutions_that_do_not_fit_the_challenges_are_refused_by_file_and_task(tmp_path, change):
    path, outputs = challenges(tmp_path)
    change(outputs)
    (tmp_path / "arc_solutions.json").write_text(json.dumps(outputs))
    refused(path, "arc_solutions.json", "three" if "three" in outputs else "one")


def test_a_bad_grid_in_the_solutions_and_solutions_that_are_no_object_are_refused(tmp_path):
    path, outputs = challenges(tmp_path)
    outputs["two"][1] = [[1, 10]]
    (tmp_path / "arc_solutions.json").write_text(json.dumps(outputs))
    refused(path, "arc_solutions.json", "task two, test pair 1, output", "10")
    (tmp_path / "arc_solutions.json").write_text("[1]")
    refused(path, "arc_solutions.json")


def test_an_output_that_differs_from_its_solution_is_refused_and_not_replaced(tmp_path):
    task_file(tmp_path, "t")
    (tmp_path / "same.json").write_text(json.dumps({"t": [GOOD["test"][0]["output"]]}))
    (tmp_path / "other.json").write_text(json.dumps({"t": [[[8]]]}))
    assert arc_data.load_tasks(f"{tmp_path}/t.json+{tmp_path}/same.json")["t"].test[0][1].tolist() == [[1]]
    refused(f"{tmp_path}/t.json+{tmp_path}/other.json", "other.json", "task t")


def test_a_folder_whose_folders_hold_the_tasks_is_refused_with_their_names(tmp_path):
    for name in ("training", "evaluation"):
        (tmp_path / "data" / name).mkdir(parents=True)
        task_file(tmp_path / "data" / name, "t")
    for folder in (tmp_path, tmp_path / "data"):
        refused(folder, "no .json file", f"{tmp_path}/data/evaluation or {tmp_path}/data/training")
    assert list(arc_data.load_tasks(f"{tmp_path}/data/training")) == ["t"]


def test_one_plain_task_file_is_a_task_named_by_its_file(tmp_path):
    tasks = arc_data.load_tasks(str(task_file(tmp_path, "007bbfb7")))
    assert list(tasks) == ["007bbfb7"] and tasks["007bbfb7"].train[1][1].tolist() == [[7, 8]]


@pytest.mark.parametrize("name", ["a,b.json", "a, b", "c+d.json", "c+d,e"])
def test_a_path_that_exists_is_taken_whole_though_it_has_a_comma_or_a_plus(tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        path.write_text(json.dumps({"t": GOOD}))
    else:
        path.mkdir()
        task_file(path, "t")
    assert list(arc_data.load_tasks(str(path))) == ["t"]


def test_the_digest_changes_with_an_id_a_cell_a_shape_an_order_or_a_missing_output_alone():
    tasks = synthetic_tasks(0, tasks=3)
    expected = checkpoint.tasks_digest(tasks)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert checkpoint.tasks_digest(synthetic_tasks(0, tasks=3)) == expected
    first = tasks["task00"]
    given, output = first.train[0]
    cell = given.copy()
    cell[0, 0] = (cell[0, 0] + 1) % 10
    rest = first.train[1:]
    changes = [Task([(cell, output), *rest], first.test),
               Task([(given.reshape(1, -1), output), *rest], first.test),
               Task([(output, given), *rest], first.test), Task(first.train, [(first.test[0][0], None)]),
               Task(first.train + first.test, []), Task(first.train, first.test * 2)]
    others = [tasks | {"task00": task} for task in changes]
    others += [dict(reversed(tasks.items())), {i + "x": task for i, task in tasks.items()}]
    assert len({expected, *map(checkpoint.tasks_digest, others)}) == len(others) + 1


def test_what_real_files_hold_is_accepted(place):
    text = changed("test", 0, "output", drop=True).replace('[[6]]', '[[6]], "note": [1.5, null]')
    text = text.replace('{"train"', '{"name": "a\\u00e9", "train"')
    tasks = arc_data.load_tasks(str(place(text.encode())))
    assert list(tasks["bad7"].test[0][0][0]) == [9, 0] and tasks["bad7"].test[0][1] is None
    sides = [side.tolist() for pair in tasks["bad7"].train for side in pair]
    assert sides == [side for pair in GOOD["train"] for side in pair.values()]
    assert len(arc_data.pairs_of(tasks["bad7"])) == 2 and len(arc_data.pairs_of(tasks["good"])) == 3


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_byte_order_mark_is_accepted(tmp_path, form):
    path = tmp_path / "t.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD if form == "folder" else {"t": GOOD}).encode())
    assert list(arc_data.load_tasks(str(tmp_path if form == "folder" else path))) == ["t"]


def test_sources_are_joined_by_commas_and_read_as_they_are(tmp_path):
    one = synthetic_tasks(1, tasks=2)
    two = {f"x{i}": task for i, task in enumerate(synthetic_tasks(2, tasks=2).values())}
    write_tasks(tmp_path / "one", one)
    (tmp_path / "two.json").write_text(json.dumps({i: as_json(task) for i, task in two.items()}))
    got = arc_data.load_tasks(f"{tmp_path}/one, {tmp_path}/two.json")
    assert set(got) == {*one, *two}
    for name, task in {**one, **two}.items():
        for pair, expected in zip(arc_data.pairs_of(got[name]), arc_data.pairs_of(task), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(pair, expected))


# --------------------------------------------------------------------------------------------------- splits


@pytest.mark.whole
def test_of_agi_2_training_377_tasks_leave_and_623_stay(arc):
    tasks, held_out, leaks = arc_data.split("arcagi2:training", None)
    assert (len(tasks), len(held_out), len(leaks), len(set(leaks))) == (623, 400, 377, 377)
    assert set(tasks) | set(leaks) == set(arc("arcagi2:training"))
    assert set(held_out) == set(arc("arcagi1:evaluation"))
    assert set(leaks) == sharing(arc("arcagi2:training"), held_out)        # nothing else is dropped
    assert len(set(leaks) & set(held_out)) == 376                          # one more by its content


@pytest.mark.whole
@pytest.mark.parametrize("data, validate", [("arcagi2:training", "dev"), ("arcagi1:training", None),
                                            ("arcagi1:training", "dev"),
                                            ("arcagi1:evaluation", "arcagi2:evaluation")])
def test_training_and_validation_share_no_task_even_up_to_symmetry_and_colour(arc, data, validate):
    tasks, held_out, leaks = arc_data.split(data, validate)
    assert not sharing(tasks, held_out) and not set(tasks) & set(held_out)
    if validate == "dev":                              # and neither shares a task with the reported split
        assert not sharing({**tasks, **held_out}, arc("arcagi1:evaluation"))
    assert leaks


@pytest.mark.whole
def test_a_planted_copy_of_a_validation_task_leaves_though_turned_and_recoloured(arc, tmp_path):
    planted = disguised(arc("arcagi1:evaluation")["00576224"])
    other = synthetic_tasks(3, tasks=1)["task00"]
    folder = write_tasks(tmp_path / "planted", {"planted": planted, "other": other})
    tasks, _, leaks = arc_data.split(str(folder), "arcagi1:evaluation")
    assert list(tasks) == ["other"] and leaks == ["planted"]
    tasks, _, leaks = arc_data.split(f"arcagi2:training,{folder}", "arcagi1:evaluation")
    assert len(tasks) == 624 and "planted" in leaks


def test_a_planted_copy_of_a_dev_task_leaves_too_even_with_one_pair_in_common(tmp_path):
    tasks = synthetic_tasks(4)
    held = next(i for i in tasks if int(hashlib.sha1(i.encode()).hexdigest(), 16) % 5 == 0)
    kept = [i for i in map("copy{}".format, range(20)) if int(hashlib.sha1(i.encode()).hexdigest(), 16) % 5]
    tasks[kept[0]] = disguised(tasks[held])
    tasks[kept[1]] = Task(synthetic_tasks(5)["task00"].train, disguised(tasks[held], seed=1).test)
    left, held_out, leaks = arc_data.split(str(write_tasks(tmp_path / "tasks", tasks)), None)
    assert held in held_out and set(leaks) == set(kept[:2]) and not set(left) & set(kept)


def test_a_canonical_pair_tells_pairs_apart_exactly_as_a_search_does():
    rng = np.random.default_rng(0)
    side = lambda: rng.integers(0, 3, rng.integers(1, 3, 2)).astype(np.int8)
    pairs = [(side(), side()) for _ in range(60)]
    forms = [arc_data.canonical_pair(pair) for pair in pairs]
    got = [[a == b for b in forms] for a in forms]
    assert got == [[same_pair(a, b) for b in pairs] for a in pairs]
    assert 60 < sum(map(sum, got)) < 3600
    assert forms[0] == arc_data.canonical_pair(disguised(Task([pairs[0]], [])).train[0])


def test_dev_is_the_tasks_whose_sha1_mod_5_is_0(task_folder):
    for validate in (None, "dev"):
        tasks, held_out, leaks = arc_data.split(str(task_folder), validate)
        names = {path.stem for path in task_folder.glob("*.json")}
        expected = {name for name in names if int(hashlib.sha1(name.encode()).hexdigest(), 16) % 5 == 0}
        assert set(held_out) == expected and len(tasks) == 24 - len(expected) and not leaks


def test_data_that_leaves_no_window_is_refused_with_the_number_of_leaks(tmp_path):
    tasks = synthetic_tasks(6, tasks=3)
    folder = write_tasks(tmp_path / "tasks", tasks)
    with pytest.raises(ValueError, match="no training task .* 3 training tasks share a pair with held-out"):
        arc_data.split(str(folder), str(folder))
    single = write_tasks(tmp_path / "single", {"one": Task(tasks["task00"].train[:1], [])})
    with pytest.raises(ValueError, match="no validation task"):
        arc_data.split(str(folder), str(single))


# -------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("source", WINDOWS)
def test_every_split_has_the_published_number_of_windows(arc, source):
    windows = arc_data.make_windows(arc(source))
    assert windows.index.shape == (WINDOWS[source], 4) and len(windows.task) == WINDOWS[source]
    assert len({(grid.shape, grid.tobytes()) for grid in windows.grids}) == len(windows.grids)
    if source == "arcagi1:evaluation":
        assert len(windows.outputs) == 1755


def test_windows_are_every_ordered_choice_of_two_complete_pairs_of_a_task():
    tasks = synthetic_tasks(7, tasks=6)
    tasks["task02"] = tasks["task02"]._replace(test=[(tasks["task02"].test[0][0], None)])   # output unknown
    windows = arc_data.make_windows(tasks)
    key = lambda *grids: tuple((grid.shape, grid.tobytes()) for grid in grids)
    complete = {i: [p for p in [*task.train, *task.test] if p[1] is not None] for i, task in tasks.items()}
    expected = [(i, key(*one, *other)) for i, pairs in complete.items()
                for one, other in itertools.permutations(pairs, 2)]
    got = [(windows.task_ids[task], key(*(windows.grids[place] for place in row)))
           for task, row in zip(windows.task, windows.index)]
    assert sorted(got) == sorted(expected)
    assert sorted(set(windows.index[:, [1, 3]].ravel())) == list(windows.outputs)


def test_the_windows_of_a_task_of_many_pairs_are_a_seeded_sample_and_the_others_are_counted():
    rng = np.random.default_rng(14)
    grid = lambda: rng.integers(0, 10, (3, 3)).astype(np.int8)
    tasks = synthetic_tasks(7, tasks=2) | {"many": Task([(grid(), grid()) for _ in range(2001)], [])}
    whole = arc_data.make_windows({i: tasks[i] for i in ("task00", "task01")})
    windows = arc_data.make_windows(tasks, most=500)   # of 4 million
    few = len(whole.index)
    assert whole.capped == 0 and windows.capped == 2001 * 2000 - 500 and len(windows.index) == few + 500
    assert np.array_equal(windows.index[:few], whole.index)
    assert windows.task.tolist() == [*whole.task, *[2] * 500]
    sample = windows.index[few:]
    complete = {tuple(row) for row in sample[:, :2].tolist()} | {tuple(row) for row in sample[:, 2:].tolist()}
    held = [tuple((side.shape, side.tobytes()) for side in pair) for pair in tasks["many"].train]
    key = lambda place: (windows.grids[place].shape, windows.grids[place].tobytes())
    assert {(key(a), key(b)) for a, b in complete} <= set(held)
    assert len(set(map(tuple, sample.tolist()))) == 500 and (sample[:, :2] != sample[:, 2:]).any(1).all()
    assert len(complete) > 700                         # of 1000 draws from 2001 pairs 787 differ on average
    assert np.array_equal(arc_data.make_windows(tasks, most=500).index, windows.index)
    assert not np.array_equal(arc_data.make_windows(tasks, most=500, seed=1).index[few:], sample)


def test_a_sample_of_windows_takes_each_ordered_choice_of_two_pairs_equally_often():
    grid = lambda value: np.full((1, 1), value, np.int8)
    task = {"t": Task([(grid(2 * i), grid(2 * i + 1)) for i in range(4)], [])}
    counts = np.zeros((4, 4))
    for seed in range(300):
        for in1, _, in2, _ in arc_data.make_windows(task, most=6, seed=seed).index:
            counts[in1 // 2, in2 // 2] += 1
    assert not counts.diagonal().any() and 100 < counts[~np.eye(4, dtype=bool)].min()      # 150 on average
    assert counts.max() < 200


# -------------------------------------------------------------------------------------------- object tokens


def flood_fill(grid, connectivity):
    """Name of each cell's component, its first cell in reading order, by a stack."""
    height, width = grid.shape
    far = 1 if connectivity == 4 else 2
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if 1 <= abs(a) + abs(b) <= far]
    name = np.full(grid.shape, -1)
    for start in itertools.product(range(height), range(width)):
        stack = [start] if name[start] < 0 else []
        while stack:
            cell = stack.pop()
            if name[cell] < 0:
                name[cell] = start[0] * 30 + start[1]
                near = [(cell[0] + a, cell[1] + b) for a, b in steps]
                inside = [(row, column) for row, column in near if 0 <= row < height and 0 <= column < width]
                stack += [place for place in inside if grid[place] == grid[start]]
    return name


@pytest.fixture(scope="module")
def noise():
    """Grids of every size and density, from one cell to 30 x 30."""
    rng = np.random.default_rng(8)
    grids = [rng.integers(0, rng.integers(1, 11), rng.integers(1, 31, 2)).astype(np.int8) for _ in range(40)]
    spiral = np.zeros((30, 30), np.int8)
    for ring in range(0, 15, 2):
        spiral[ring:30 - ring, ring:30 - ring] = 1
        spiral[ring + 1:29 - ring, ring + 1:29 - ring] = 0
        spiral[ring + 1, ring] = 0
    return [*grids, spiral, np.zeros((1, 1), np.int8), np.full((30, 30), 9, np.int8)]


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_are_those_of_a_flood_fill(noise, connectivity):
    labels = arc_data.components(arc_data.pad(noise), connectivity)
    for i, (grid, label) in enumerate(zip(noise, labels)):
        height, width = grid.shape
        assert np.array_equal(label[:height, :width] - 900 * i, flood_fill(grid, connectivity))
        assert (label[height:] == -1).all() and (label[:, width:] == -1).all()


@pytest.mark.parametrize("source, share", [("arcagi1:training", 0.976), ("arcagi1:evaluation", 0.941)])
def test_grids_are_redrawn_exactly_where_nothing_was_cut_and_most_are(arc, source, share):
    grids = sides_of(arc(source))
    tokens = arc_data.tokenise(grids)
    same = [np.array_equal(a, b) for a, b in zip(grids, redraw(tokens), strict=True)]
    assert same == (tokens.cut == 0).tolist()
    assert np.mean(same) == pytest.approx(share, abs=5e-4)         # as README says


def test_the_smallest_objects_are_cut_and_their_number_is_counted(noise):
    tokens = arc_data.tokenise(noise, objects=5)
    for i, grid in enumerate(noise):
        label = flood_fill(grid, 8)
        common = np.bincount(grid.ravel(), minlength=10).argmax()
        areas = sorted(np.unique(label[grid != common], return_counts=True)[1], reverse=True)
        first, last = tokens.start[i], tokens.start[i + 1]
        assert tokens.area[first + 1:last].tolist() == areas[:5]
        assert tokens.cut[i] == max(0, len(areas) - 5)
        assert tokens.area[first] == (grid != common).sum() and tokens.colour[first] == common
        assert tokens.box[first].tolist() == [0, 0, *grid.shape]


def test_a_list_of_grids_of_one_colour_has_one_token_each():
    grids = [np.full((2, 3), 4, np.int8), np.zeros((1, 1), np.int8)]
    tokens = arc_data.tokenise(grids)
    assert tokens.start.tolist() == [0, 1, 2]
    assert tokens.colour.tolist() == [4, 0] and tokens.area.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------ gathering


@pytest.fixture(scope="module")
def clear():
    """Grids whose background does not hang on the order of colours, and of which nothing is cut."""
    rng = np.random.default_rng(9)
    grids = [rng.choice(10, rng.integers(1, 14, 2), p=[.82] + [.02] * 9).astype(np.int8) for _ in range(30)]
    leads = lambda grid: np.diff(np.sort(np.bincount(grid.ravel(), minlength=10))[-2:]) > 0
    grids = [grid for grid in grids if leads(grid)]
    assert len(grids) > 20 and not arc_data.tokenise(grids).cut.any()
    return grids


def test_tokens_of_a_turned_and_recoloured_grid_are_the_tables_turned_and_recoloured_tokens(clear):
    table, rng = TokenTable(clear), np.random.default_rng(10)
    chosen = np.arange(len(clear))
    for symmetry in range(8):
        names = np.array([rng.permutation(10) for _ in clear])
        expected = [arc_data.turn(row[grid], symmetry).copy() for row, grid in zip(names, clear)]
        fresh = TokenTable(expected).pack_grids(chosen)
        turned = table.pack_grids(chosen, np.full(len(clear), symmetry), names)
        for g, grid in enumerate(expected):
            one, other = objects_of(turned, g), objects_of(fresh, g)
            assert one[0] == other[0] and sorted(one) == sorted(other)
            assert np.array_equal(draw(one), grid)


def test_turns_are_the_8_symmetries_each_once():
    grid = np.arange(6).reshape(2, 3)
    got = [arc_data.turn(grid, symmetry).tolist() for symmetry in range(8)]
    assert sorted(got) == sorted(side.tolist() for side in turns(grid)) and got[0] == grid.tolist()


def test_gathering_draws_any_uncut_grid_under_any_change_though_backgrounds_tie(noise):
    grids = [grid for grid, cut in zip(noise, arc_data.tokenise(noise).cut) if not cut]
    rng = np.random.default_rng(11)
    chosen, symmetry = rng.integers(0, len(grids), 60), rng.integers(0, 8, 60)
    colours = np.array([rng.permutation(10) for _ in chosen])
    gathered = TokenTable(grids).pack_grids(chosen, symmetry, colours)
    for g, (i, s, names) in enumerate(zip(chosen, symmetry, colours)):
        assert np.array_equal(draw(objects_of(gathered, g)), arc_data.turn(names[grids[i]], s))


def test_packing_loses_no_token_and_overfills_no_row():
    rng = np.random.default_rng(12)
    for _ in range(50):
        counts = rng.integers(1, rng.integers(2, arc_data.OBJECTS + 3), rng.integers(1, 80))
        slot, rows = arc_data.pack(counts)
        taken = np.concatenate([np.arange(s, s + n) for s, n in zip(slot, counts)])
        assert len(np.unique(taken)) == counts.sum()
        assert 0 <= taken.min() and taken.max() < rows * arc_data.SLOTS
        assert (slot // arc_data.SLOTS == (slot + counts - 1) // arc_data.SLOTS).all()     # one row a grid
        assert len(np.unique(slot // arc_data.SLOTS)) == rows


def test_empty_slots_belong_to_no_grid_and_a_shape_stands_once_whatever_its_colours(noise):
    table, count = TokenTable(noise), 2 * len(noise)
    recolourings = np.array([np.random.default_rng(i).permutation(10) for i in range(count)])
    gathered = table.pack_grids(np.arange(len(noise)).repeat(2), np.zeros(count, int), recolourings)
    real = int((gathered.grid < count).sum())
    assert real == int(gathered.count.sum()) == 2 * table.tokens.start[-1]
    assert set(gathered.grid.flatten().tolist()) <= set(range(count + 1))
    shapes = [bits.numpy().tobytes() for bits in gathered.bits]
    held = {image for g in range(count) for image, _, _ in objects_of(gathered, g)}
    assert len(set(shapes)) == len(shapes) and held == set(shapes)


# -------------------------------------------------------------------------------------------------- batches


def undo(grids, task):
    """(symmetry, colour map, pairs) that make these grids (in, out, in, out, ...) of the task, or None."""
    for symmetry in range(8):
        turned = [[turns(side)[symmetry] for side in pair] for pair in arc_data.pairs_of(task)]
        drawn = [grids[k:k + 2] for k in range(0, len(grids), 2)]
        fits = [[i for i, pair in enumerate(turned) if all(a.shape == b.shape for a, b in zip(pair, new))]
                for new in drawn]
        for places in itertools.product(*fits):
            sides = [both for place, pair in zip(places, drawn) for both in zip(turned[place], pair)]
            joined = {(int(a), int(b)) for old, new in sides for a, b in zip(old.ravel(), new.ravel())}
            if len(joined) == len({a for a, _ in joined}) == len({b for _, b in joined}):
                return symmetry, tuple(sorted(joined)), places
    return None


@pytest.fixture(scope="module")
def crowd():
    return synthetic_tasks(13, tasks=8, pairs=(2, 6), side=(3, 6))


def blocks(batch, each):
    drawn = [draw(objects_of(batch.grids, g)) for g in range(len(batch.grids.first))]
    return [drawn[first:first + each] for first in range(0, len(drawn), each)]


def test_a_window_and_its_whole_task_come_under_one_symmetry_and_one_recolouring(crowd):
    data, seen = TaskSet(crowd), []
    for step in range(4):
        batch = data.batch(48, 0, step)
        each = 2 * data.pairs
        for grids in blocks(batch, each):
            found = [(i, undone) for i, task in crowd.items() if (undone := undo(grids, task))]
            assert len(found) == 1
            seen.append(found[0])
        assert len(batch.grids.first) % each == 0
        assert (batch.index // each == batch.index[:, :1] // each).all()           # windows stay in a task
    assert len({i for i, _ in seen}) > 4
    assert len({symmetry for _, (symmetry, _, _) in seen}) > 4
    assert len({colours for _, (_, colours, _) in seen}) > 20


def test_without_augmentation_a_batch_holds_the_grids_as_they_are(crowd):
    known = {(grid.shape, grid.tobytes()) for grid in sides_of(crowd)}
    for grids in blocks(TaskSet(crowd, augment=False).batch(48, 0, 0), 6):
        assert all((grid.shape, grid.astype(np.int8).tobytes()) in known for grid in grids)


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_windows_are_all_choices_of_a_first_demonstration_and_a_given_pair_with_others_shown(crowd, most):
    """Each shown demonstration is another pair of the task, found by search, and never the given pair."""
    data, counts = TaskSet(crowd, demonstrations=most), set()
    batch = data.batch(240, most, 0)
    index, shown = batch.index.tolist(), batch.shown.tolist()
    assert batch.index.shape == (len(index), 2 * most + 2) and batch.shown.shape == (len(index), most)
    assert batch.shown.dtype == torch.bool
    each = 2 * data.pairs
    for first, grids in enumerate(blocks(batch, each)):
        task, places = next((task, undone[2]) for task in crowd.values() if (undone := undo(grids, task)))
        number = min(len(arc_data.pairs_of(task)), data.pairs)
        rows = [(row, mask) for row, mask in zip(index, shown) if row[0] // each == first]
        assert len({row[0] % 2 for row, _ in rows}) == 1       # one direction: in to out, or out to in
        choices = []
        for row, mask in rows:
            assert all(grid // each == first for grid in row)
            assert all(output == given ^ 1 for given, output in zip(row[::2], row[1::2]))
            pairs = [places[given % each // 2] for given in row[::2]]
            seen = [pair for pair, is_shown in zip(pairs, mask) if is_shown]
            assert mask[0] and 1 <= len(seen) <= min(most, number - 1)
            assert len(set(seen)) == len(seen) and pairs[-1] not in seen
            choices.append((pairs[0], pairs[-1]))
            counts.add(len(seen))
        assert sorted(choices) == list(itertools.permutations(sorted(set(places)), 2))
        assert len(set(places)) == number
    assert counts == set(range(1, most + 1))


def test_tasks_run_forwards_and_backwards_equally_often(crowd):
    data = TaskSet(crowd)
    first = torch.cat([data.batch(48, 0, step).index[:, 0] for step in range(200)])
    assert (first % 2).float().mean() == pytest.approx(0.5, abs=0.05)


def test_a_batch_depends_on_seed_and_step_alone(crowd):
    flat = lambda batch: [part.tolist() for part in (*batch.grids, *batch[1:])]
    data = TaskSet(crowd)
    expected = flat(data.batch(24, 3, 7))
    for seed, step in ((3, 6), (4, 7)):
        assert flat(data.batch(24, seed, step)) != expected
    np.random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert flat(data.batch(24, 3, 7)) == expected == flat(TaskSet(crowd).batch(24, 3, 7))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_a_batch_holds_as_many_windows_as_were_asked_for_and_names_their_targets():
    tasks = synthetic_tasks(3, pairs=(4, 6))
    for size in (2, 6, 7, 100):
        batch = TaskSet(tasks).batch(size, 0, 0)
        assert len(batch.index) == len(batch.shown) == size
        assert batch.targets.tolist() == sorted(set(batch.index[:, -1].tolist()))
    tasks = synthetic_tasks(3, pairs=(2, 3))           # two pairs each
    assert len(TaskSet(tasks).batch(10, 0, 0).index) == 10


def test_random_shapes_of_a_batch_are_distinct_shapes_of_it(crowd):
    batch = TaskSet(crowd).batch(48, 0, 0)
    assert len(set(batch.object_sample.tolist())) == len(batch.object_sample) <= len(batch.grids.first)
    assert 0 <= int(batch.object_sample.min()) and int(batch.object_sample.max()) < len(batch.grids.bits)


def test_a_task_set_counts_the_windows_of_its_tasks(arc):
    tasks = arc("arcagi2:evaluation")
    assert TaskSet(tasks).windows == WINDOWS["arcagi2:evaluation"]


# ----------------------------------------------------------------------------------------------- the device


class NoWait(TorchDispatchMode):
    """Refuses what a GPU waits for: values read on the host, sizes that depend on values, an index list."""
    WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
             torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default,
             torch.ops.aten.lift_fresh.default}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAITS, function
        if function is torch.ops.aten.index.Tensor:
            assert not any(index.dtype == torch.bool for index in args[1] if index is not None)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("wait", [lambda x: x[:, [1, 0]], lambda x: x[x > 1], lambda x: x.max().item(),
                                  lambda x: x.unique(), lambda x: int(x[0, 0])])
def test_a_planted_wait_is_noticed(wait):
    with pytest.raises(AssertionError), NoWait():
        wait(torch.ones(2, 2))


@pytest.mark.parametrize("augment", [True, False])
def test_a_batch_reaches_the_device_in_one_transfer_and_waits_for_nothing(crowd, augment, monkeypatch):
    data, moves, to = TaskSet(crowd, augment=augment), [], torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        moves.append((args, kwargs))
        return to(tensor, *args, **kwargs)
    monkeypatch.setattr(torch.Tensor, "to", counted)
    with NoWait():
        data.batch(48, 0, 0)
    assert moves == [(("cpu",), {"non_blocking": True})]


def test_what_the_model_reads_begins_at_a_multiple_of_16_bytes(crowd):
    data, counts = TaskSet(crowd), set()
    for step in range(9):
        grids, index, _, targets, object_sample = data.batch(48, 0, step)
        counts |= {len(targets) % 2, len(object_sample) % 2}
        for part in (index, targets, object_sample, grids.object_id, grids.colour, grids.grid, grids.first,
                     grids.count):
            assert part.is_contiguous() and part.storage_offset() * part.element_size() % 16 == 0
    assert counts == {0, 1}


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("cuda", True), (torch.device("cuda", 1), True)])
def test_indices_go_up_from_pinned_memory_to_a_gpu_only(monkeypatch, device, pinned):
    empty, asked = torch.empty, []

    def pinless(*sizes, pin_memory=False, **rest):     # torch without a GPU has no pinned memory
        asked.append(pin_memory)
        return empty(*sizes, **rest)
    monkeypatch.setattr(torch, "empty", pinless)

    def move(tensor, where, non_blocking):
        asked.append((where, non_blocking))
        return tensor
    monkeypatch.setattr(torch.Tensor, "to", move)
    arrays = [np.arange(6).reshape(2, 3), np.array([7], np.int8), np.zeros((0, 4), np.int64)]
    one, two, none = arc_data.upload(arrays, device)
    assert asked == [pinned, (device, True)]
    assert one.tolist() == [[0, 1, 2], [3, 4, 5]] and two.tolist() == [7] and none.shape == (0, 4)
    assert one.dtype == two.dtype == torch.int64
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def test_boxes_are_turned_as_grids_are():
    rng = np.random.default_rng(15)
    for symmetry in range(8):
        height, width = rng.integers(1, 31, 2)
        top, left = rng.integers(0, height), rng.integers(0, width)
        box = [top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)]
        grid = np.zeros((height, width), np.int8)
        grid[top:top + box[2], left:left + box[3]] = 1
        rows, columns = np.nonzero(arc_data.turn(grid, symmetry))
        expected = [rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1]
        inputs = [torch.tensor(x).view(1, 1, -1) for x in (box, [0, 0, height, width])]
        got = arc_data.turn_boxes(*inputs, torch.tensor([[symmetry]]))
        assert got.shape == (1, 1, 4) and got.flatten().tolist() == expected
