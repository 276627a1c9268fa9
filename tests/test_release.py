"""The model in runs/default: its figures are those of its record, and its symbols find what README says."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import arc_data
import eval as evaluation
import lejepa
from harness import commands

ROOT = Path(__file__).parent.parent
RELEASE = ROOT / "runs" / "default"
pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def model():
    return lejepa.load_run(RELEASE)[0]


def test_the_released_model_has_at_most_12_mb_and_retrieves_as_its_record_says(model, arc):
    assert (RELEASE / "last.safetensors").stat().st_size <= 12e6
    windows = arc_data.make_windows(arc("arcagi1:evaluation"))
    pool = model.embed([windows.grids[i] for i in windows.outputs])
    distance = torch.cdist(model.predict(evaluation.contexts(windows)), pool)
    out1, target = np.searchsorted(windows.outputs, windows.index[:, [1, 3]]).T
    rows = np.flatnonzero(out1 != target)
    distance[rows, out1[rows]] = torch.inf                         # the demonstration's output is no candidate
    own = distance[np.arange(len(target)), target]
    rank = 1 + (distance < own[:, None]).sum(1).numpy()
    found = np.where(rank <= 10, 1 / np.log2(1 + rank), 0)
    recorded = json.loads((RELEASE / "result.json").read_text())["ndcg10_without_out1"]
    assert found.mean() == pytest.approx(recorded, abs=0.003)


def find_tasks(folder) -> dict[str, set]:
    """What README's program prints in a folder that holds codes.jsonl."""
    program = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    lines = [line.split(":") for line in done.stdout.splitlines()]
    return {rule: set(ids.split()) for rule, _, ids in lines}


def test_the_program_of_the_readme_finds_by_symbols_the_tasks_that_it_finds_by_exact_shapes(tmp_path, arc):
    tasks = arc("arcagi1:evaluation")
    path = tmp_path / "codes.jsonl"
    commands.main(["codes", str(RELEASE), "--data", "arcagi1:evaluation", "--out", str(path)])
    by_symbols = find_tasks(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [getattr(tasks[line["task"]], line["split"])[line["pair"]] for line in lines]
    grids = [pair[line["side"] == "output"] for pair, line in zip(pairs, lines)]
    tokens = arc_data.tokenise(grids)
    for line, start in zip(lines, tokens.start):
        for i, thing in enumerate(line["objects"]):
            thing["codes"] = tokens.bitmaps[tokens.shape[start + i]].tobytes().hex()
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    by_shapes = find_tasks(tmp_path)
    assert by_symbols == by_shapes
    found = [len(ids) for ids in by_symbols.values()]              # moved, recoloured, removed, largest_kept
    said = re.search(r"(\d+) tasks move objects, (\d+) recolour them, (\d+) remove some and (\d+) keep the largest",
                     " ".join((ROOT / "README.md").read_text().split()))
    assert [int(number) for number in said.groups()] == found
