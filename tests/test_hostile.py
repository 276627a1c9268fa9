"""Rubbish and attacks: a file from outside is read exactly or refused in one line, and never executed."""
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import stat
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import as_json, synthetic_tasks
from forked import at, fork, go, make_small, start, stop, unreadable_or_equal, whole

import arc_data
import lejepa
from harness import checkpoint
from harness.checkpoint import write_file

# ------------------------------------------------------------------------------------------- files of a run


def test_a_file_is_replaced_whole_and_the_old_one_kept_where_asked(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, b"old")
    write_file(path, b"new", keep=tmp_path / "b.json")
    assert path.read_bytes() == b"new" and (tmp_path / "b.json").read_bytes() == b"old"
    assert {item.name for item in tmp_path.iterdir()} == {"a.json", "b.json"}


def test_a_link_is_followed_and_a_planted_temporary_file_is_not(tmp_path):
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "link.part").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_bytes(b"kept")
    write_file(tmp_path / "link", b"new")
    assert target.read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"kept" and list(target.parent.iterdir()) == [target]


def test_a_device_or_a_pipe_is_written_into_and_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)
    (tmp_path / "null").symlink_to("/dev/null")
    write_file(tmp_path / "null", b"nothing")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(Path("/dev/full"), b"much")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


NO_JSON = [b"", b"[1]", b"{", b"[" * 100_000, b'{"a": ', b"\xff\xfe", b"null", b'{"a": ' * 5000]


@pytest.mark.parametrize("content", NO_JSON, ids=lambda content: repr(content[:8]))
def test_a_record_that_is_no_json_object_is_a_value_error_of_one_line(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match="result.json") as error:
        checkpoint.read_json(tmp_path / "result.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def special_files(folder):
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    return [folder / name for name in ("pipe", "endless", "folder")]


def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch):
    for special in special_files(tmp_path):            # opening one, or reading another, would never end
        run = tmp_path / f"run-{special.name}"
        run.mkdir()
        for name in ("last.safetensors", "previous.safetensors", "result.json", "log.jsonl"):
            (run / name).symlink_to(special)
        for read, path in ((lejepa.load_run, run), (checkpoint.read_log, run),
                           (checkpoint.read_json, run / "result.json")):
            with pytest.raises(ValueError, match="not a regular file") as error:
                read(path)
            assert "JSON" not in str(error.value)
    monkeypatch.setattr(checkpoint.read_bytes, "__defaults__", (10,))
    (tmp_path / "large.json").write_text('{"a": "bcdefgh"}')
    with pytest.raises(ValueError, match="larger than"):
        checkpoint.read_json(tmp_path / "large.json")


NO_ROWS = [b"[]", b"{", b"\xff", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}',
           b'{"step": 1, "loss": []}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": ' + b"[" * 100_000]
GOOD_ROW = b'{"step": 1, "loss": 0.5, "mean": null}\n'


@pytest.mark.parametrize("row", NO_ROWS, ids=lambda row: repr(row[:24]))
def test_a_log_row_that_is_no_object_of_numbers_is_a_value_error_that_names_its_line(tmp_path, row):
    (tmp_path / "log.jsonl").write_bytes(GOOD_ROW + row + b"\n" + b'{"cut": ')
    with pytest.raises(ValueError, match="log.jsonl: line 2"):
        checkpoint.read_log(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(GOOD_ROW + b'{"cut": ')
    assert checkpoint.read_log(tmp_path) == [{"step": 1, "loss": 0.5, "mean": None}]


# ------------------------------------------------------------------------------------------------- rubbish

STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
TOKEN = re.compile(rf"[ \t\n\r]*(?:([][{{}},:])|({STRING})|({NUMBER})|(true|false|null|NaN|-?Infinity))")


class Refused(Exception):
    pass


def need(condition):
    if not condition:
        raise Refused


class Strict:
    """A parser of JSON by the letter. A value is an int, str, list or dict; any other word is its bytes."""

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


def strict_pair(pair, needs_output):
    need(isinstance(pair, dict) and "input" in pair)
    if needs_output:
        need("output" in pair)
    elif pair.get("output", b"null") == b"null":
        return strict_grid(pair["input"]), None
    return strict_grid(pair["input"]), strict_grid(pair["output"])


def strict_task(task):
    need(isinstance(task, dict) and all(isinstance(task.get(part), list) for part in ("train", "test")))
    need(task["train"])
    train = [strict_pair(pair, True) for pair in task["train"]]
    return train, [strict_pair(pair, False) for pair in task["test"]]


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


PIECES = [b"true", b"3.0", b'"3"', b"NaN", b"-0", b"1e0", b"10", b"-1", b"0", b"9" * 5000, b"null", b"[]",
          b"[[1]]", b"[[" + b"1," * 30 + b"1]]", b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b" ", b"\n",
          b"\x00", b"\xff", b"\xc2\xa0", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 100_000]
MEMBERS = [b'"input": [[1]],', b'"output": null,', b'"test": [],', b'"\\u0074est": [],', b'"\\ud800":0,',
           b'"x": {"y": [NaN, 1.5]},', b'"x": 0, "x": 1,']


def mutated(content, rng):
    """One to four changes: a byte, a cut, a copy, a piece of JSON somewhere or for a cell, a cut end."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 5, 20, 100))
        change = rng.randrange(13)
        cells = [found.start() for found in re.finditer(rb"(?<=[\[, ])\d(?=[\],])", content)]
        if change < 2 and place < len(content):
            content[place] = rng.randrange(256)
        elif change < 3:
            del content[place:place + length]
        elif change < 5:
            other = rng.randrange(len(content) + 1)
            content[place:place] = content[other:other + length]
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
    with_mark = json.dumps(tasks["task02"], indent=1, ensure_ascii=False).encode("utf-8-sig")
    files += [(with_mark, False)]
    return files + [(json.dumps(dict(list(tasks.items())[i:i + 3])).encode(), True) for i in range(3)]


def as_lists(tasks):
    """Tasks as the strict parser gives them."""
    found = {}
    for name, task in tasks.items():
        found[name] = tuple([tuple(map(side_as_list, pair)) for pair in part] for part in task)
    return found


def side_as_list(side):
    return None if side is None else side.tolist()


def load_exactly(folder, content, many):
    """Whether load_tasks takes this file. What it makes of it is compared with the strict parser."""
    path = folder / "x.json"
    path.write_bytes(content)
    try:
        tasks = as_lists(arc_data.load_tasks(str(path if many else folder)))
    except ValueError as error:
        tasks = None
        assert type(error) is ValueError and "x.json" in str(error)
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert tasks == strict(content, many), content[:2000]
    return tasks is not None


def mutate_tasks(folder, count, seed):
    """Loads mutated task files. Returns how many loaded, and the seconds of the slowest."""
    rng, files, loaded, slowest = random.Random(seed), good_files(), 0, 0.0
    for i in range(count):
        content, many = files[i] if i < len(files) else rng.choice(files)
        if i >= len(files):
            content = mutated(content, rng)
        begin = time.monotonic()
        loaded += load_exactly(folder, content, many)
        slowest = max(slowest, time.monotonic() - begin)
    return loaded, slowest


def mutate_checkpoints(folder, content, count, seed):
    """Mutated checkpoints are refused in one line, unless they hold just the same."""
    rng, expected = random.Random(seed), lejepa.read_checkpoint(folder)
    refusals = changes = 0
    for _ in range(count):
        changed = mutated(content, rng)
        if changed != content:
            refusals += unreadable_or_equal(folder, changed, expected)
            changes += 1
    assert refusals > 0.95 * changes


def mutate_logs(run, folder, count, seed):
    """Resumes from mutated logs, each cut back to the checkpoint or refused. Returns how many resumed."""
    (folder / "last.safetensors").write_bytes((run / "last.safetensors").read_bytes())
    _, found, _ = lejepa.read_checkpoint(folder)
    cfg = lejepa.Config(**{**found["config"], "run": str(folder)})
    model = lejepa.build(cfg)
    optimizers = lejepa.make_optimizers(model, cfg)
    log, rng, resumed = (run / "log.jsonl").read_bytes(), random.Random(seed), 0
    more = log + b'{"step": 13, "loss": 1.0}\n{"st'
    for _ in range(count):
        changed = mutated(more, rng)
        (folder / "log.jsonl").write_bytes(changed)
        try:
            state = checkpoint.resume(model, optimizers, cfg, found["commit"], found["state"]["tasks_sha256"])
            assert state[0] == found["step"] and (folder / "log.jsonl").read_bytes() == log
            resumed += 1
        except ValueError as error:
            assert "log.jsonl" in str(error) and "\n" not in str(error)
            assert (folder / "log.jsonl").read_bytes() == changed and changed[:len(log)] != log
    return resumed


def mutate(run, folder, counts, seed, answer):
    make_small()
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
    print(f"{sum(counts)} inputs: {loaded} task files loaded, {resumed} logs resumed, "
          f"slowest {slowest:.2f} s, {megabytes} MB")
    assert 0 < loaded < counts[0] and 0 < resumed < counts[2] and slowest < 30 and megabytes < 1000


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
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        answer.send((str(error), time.monotonic() - begin, megabytes))


UNITS = ["[],", "{},", "[[[[[[[[[]]]]]]]]],", '{"a":{"a":{"a":0}}},', '"\U0001f600",[[]],', "-1e5,", "1,",
         '"%d":0,']


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("unit", UNITS)
def test_the_largest_file_of_whatever_takes_most_memory_takes_less_than_1_gb(fork, tmp_path, unit):
    room = arc_data.LARGEST - 20
    if "%" in unit:
        content = '{"a": {%s"z": 0}}' % "".join(unit % i for i in range(10**6))
    else:
        content = '{"a": [%s0]}' % (unit * (room // len(unit.encode())))[:room]
    (tmp_path / "x.json").write_text(content)
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


# ------------------------------------------------------------------------------------------------- attacks


CODE = ("pickle.find_class", "socket.bind", "socket.listen", "os.system", "os.exec", "os.posix_spawn")
CHANGES = ("os.rename", "os.remove", "os.mkdir")


def watch(folder, report):
    """Reports what the run opens for writing outside its folder, unpickles, binds to a port or starts."""
    def audit(event, args):
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(args[0]))
            writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not path.startswith((f"{folder}/", "/dev/")):
                report(f"writes {path}")
        elif event in CHANGES and not os.path.abspath(os.fsdecode(args[0])).startswith(str(folder)):
            report(f"{event} {args[0]}")
        elif event in CODE or (event == "subprocess.Popen" and args[1][:2] != ["git", "describe"]):
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


NAMES = ["../../escape", "/tmp/escape", "..", "a\nb", "$(touch escape)", "__import__('os').mkdir('escape')",
         "{0.__class__}", "\u00e9" * 300]


@pytest.mark.whole
def test_a_run_writes_in_its_folder_only_and_executes_nothing_whatever_the_tasks_are_called(go, tmp_path):
    names = NAMES + [f"plain{i}" for i in range(12)]   # so that both sides of the split have some
    tasks = dict(zip(names, synthetic_tasks(3, tasks=20).values(), strict=True))
    content = json.dumps({name: as_json(task) for name, task in tasks.items()})
    (tmp_path / "tasks.json").write_text(content)
    report = partial(silently, tmp_path / "report.txt", [])
    watched, flags = partial(watch, tmp_path / "run", report), ["--data", tmp_path / "tasks.json"]
    go(tmp_path / "run", *flags, status=130, changes=[watched, partial(at, 6, stop)])
    go(tmp_path / "run", *flags, "--resume", changes=[watched])
    assert not (tmp_path / "report.txt").exists(), (tmp_path / "report.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"tasks.json", "run", "run.txt"}
    left = {re.sub(r"tfevents.*", "", path.name) for path in (tmp_path / "run").iterdir()} - {"lock"}
    assert left == {"config.json", "events.out.", "last.safetensors", "log.jsonl", "previous.safetensors",
                    "result.json"}


WRITERS = [lambda path, bomb: torch.save(bomb, path), lambda path, bomb: path.write_bytes(pickle.dumps(bomb))]


@pytest.mark.parametrize("write", WRITERS)
def test_a_pickle_in_place_of_a_checkpoint_or_data_is_refused_and_not_run(tmp_path, write):
    for name in ("last.safetensors", "previous.safetensors", "x.json"):
        write(tmp_path / name, Bomb(tmp_path / "escape"))
    with pytest.raises(ValueError, match="previous.safetensors"):
        lejepa.load_run(tmp_path)
    with pytest.raises(ValueError, match="x.json"):
        arc_data.load_tasks(str(tmp_path))
    assert not (tmp_path / "escape").exists()
