"""What several test files use: small tasks, and grids turned and recoloured by definitions of their own."""
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the commands that tests start

import numpy as np
import pytest

import arc_data


def turns(grid):
    """The 8 symmetries of a grid, by numpy alone."""
    return [np.rot90(side, k) for side in (grid, np.fliplr(grid)) for k in range(4)]


def synthetic_tasks(seed, tasks=24, pairs=(2, 5), side=(2, 7), colours=10):
    """Tasks of random grids; the output is the input with one row more, of its most common colour."""
    rng = np.random.default_rng(seed)

    def pair():
        grid = rng.integers(0, colours, rng.integers(*side, size=2))
        extra = np.full((1, grid.shape[1]), np.bincount(grid.ravel()).argmax())
        return grid.astype(np.int8), np.concatenate([grid, extra]).astype(np.int8)
    sizes = (rng.integers(*pairs) for _ in range(tasks))
    return {f"task{i:02d}": arc_data.Task([pair() for _ in range(size - 1)], [pair()])
            for i, size in enumerate(sizes)}


def as_json(task):
    return {part: [{"input": a.tolist(), "output": b.tolist()} for a, b in pairs]
            for part, pairs in task._asdict().items()}


def write_tasks(folder, tasks):
    folder.mkdir()
    for name, task in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(as_json(task)))
    return folder


@pytest.fixture(scope="session")
def arc():
    """load_tasks of a named source, read once."""
    known = {}

    def load(source):
        if source not in known:
            known[source] = arc_data.load_tasks(source)
        return known[source]
    return load


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """A folder of 24 small tasks; sha1(id) mod 5 is 0 for some of them."""
    return write_tasks(tmp_path_factory.mktemp("data") / "tasks", synthetic_tasks(0))
