"""The README and runs/README.md against the records they speak of."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "runs/README.md")


def rows():
    """(page, run, metric, printed value) of every table whose first column is `run`."""
    for page in PAGES:
        names = None
        for line in (ROOT / page).read_text().splitlines():
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")] if line.startswith("|") else []
            if cells and cells[0] == "run":
                names = cells
            elif not cells:
                names = None
            elif names and not cells[0].startswith("---"):
                yield from ((page, cells[0], name, cell) for name, cell in zip(names[1:], cells[1:]))


def test_every_figure_in_the_tables_equals_the_record_of_its_run():
    checked = 0
    for page, run, name, cell in rows():
        result = json.loads((ROOT / "runs" / run / "result.json").read_text())
        value = result.get(name, result["floors"]["analogy, trained"]["ndcg10_without_out1"] if name == "analogy, trained" else None)
        if cell == "—":
            assert value is None, (page, run, name)
            continue
        digits = len(cell.partition(".")[2])
        assert abs(float(cell) - value) <= 0.500001 * 10**-digits, (page, run, name, cell, value)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_shows_is_there(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()) if "://" not in link]
    assert links and all(((ROOT / page).parent / link).exists() for link in links)


def test_the_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "\n    pip install -r requirements.txt && python lejepa.py\n" in text
    assert "\n    pip install -r requirements.txt && pytest\n" in text
