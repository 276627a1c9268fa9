"""Claims of what the symbols and a decoder of z tell, each against a small case worked by hand."""
import types

import numpy as np
import pytest
import torch
from test_eval import Toy, random_tasks

import arc_data
import eval as evaluation
from harness import decoder, symbols

L = np.array([[1, 0], [1, 0], [1, 1]], dtype=bool)
RING = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)
LINE, CELL, SQUARE = np.ones((1, 3), bool), np.ones((1, 1), bool), np.ones((2, 2), bool)


# ---- symbols ---------------------------------------------------------------------------------------------

def test_the_shapes_of_grids_are_their_distinct_objects_whatever_their_colour_and_place():
    one, two = np.zeros((2, 8, 8), np.int8)
    one[:3, :2][L], one[5, 4:7] = 3, 7
    two[4:7, 5:7][L], two[0, 0] = 8, 8
    found = {(shape.shape, shape.tobytes()) for shape in symbols.shapes_of([one, two])}
    assert found == {(shape.shape, shape.tobytes()) for shape in (L, LINE, CELL)}


def test_a_shape_is_one_connected_object_that_touches_all_sides_of_its_box():
    assert all(map(symbols.is_shape, (L, RING, LINE, CELL, np.eye(3, dtype=bool))))
    assert not symbols.is_shape(np.array([[1, 0, 1]], bool))                    # two objects
    assert not symbols.is_shape(np.pad(L, ((0, 1), (0, 0))))                    # an empty row
    assert not symbols.is_shape(np.pad(L, ((0, 0), (1, 0))))                    # an empty column
    assert not symbols.is_shape(np.ones((31, 1), bool))                         # fits in no grid


def test_properties_of_shapes_counted_by_hand():
    names = "height", "width", "area", "symmetric", "holes", "single cell", "line", "rectangle"
    expected = {(3, 2, 2, 0, 0, 0, 0, 0): L, (3, 3, 3, 1, 1, 0, 0, 0): RING, (1, 3, 1, 1, 0, 0, 1, 0): LINE,
                (1, 1, 0, 1, 0, 1, 0, 0): CELL, (2, 2, 2, 1, 0, 0, 0, 1): SQUARE}
    for values, shape in expected.items():
        assert symbols.properties(shape) == dict(zip(names, values))


def test_entropy_and_information_of_known_counts():
    assert symbols.entropy(np.array([5, 5, 7, 9])) == pytest.approx(1.5)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 4000))
    assert symbols.information(a, a) == pytest.approx(2, abs=0.02)
    assert symbols.information(a, a // 2) == pytest.approx(1, abs=0.01)         # half of what a holds
    assert symbols.information(a, b) == pytest.approx(0, abs=0.005)
    few = np.arange(40)                                # each value once: told is all bias
    assert symbols.information(few, few % 2) == pytest.approx(0, abs=1e-9)


def grids_of(*shapes):
    return [np.pad(shape, ((0, 5), (0, 5))).astype(np.int8) * 4 for shape in shapes]


def test_a_first_code_that_counts_cells_is_kept_by_what_keeps_the_count_and_tells_the_area():
    figures = symbols.first_code_figures(Toy(sees=("area",)), grids_of(L, RING, LINE, CELL, SQUARE))
    kept, bits = figures["first code is kept when"], figures["bits of the first code"]
    assert figures["n"] == 5
    assert kept["mirrored"] == kept["a quarter turn"] == 1
    assert kept["one cell differs"] == kept["one row longer"] == 0
    assert kept["by chance"] == pytest.approx((1 + 1 + 1 + 4) / 25)             # areas 8, 3, 1 and 4 twice
    assert bits["area"]["of"] == pytest.approx(symbols.entropy(np.array([2, 3, 1, 0, 2])))


def test_a_first_code_that_names_the_shape_is_kept_by_nothing_that_changes_it():
    kept = symbols.first_code_figures(Toy(sees=("shape",)), grids_of(L, RING, LINE))["first code is kept when"]
    assert [kept[name] for name in ("one cell differs", "mirrored", "a quarter turn")] == [0, 0, 0]
    assert kept["by chance"] == pytest.approx(1 / 3)


def test_a_shape_that_fills_half_a_grid_has_no_code_of_its_own():
    codes = symbols.codes_of(Toy(sees=("area",)), [np.ones((15, 30), bool), np.ones((14, 30), bool)])
    assert (codes[0] == -1).all() and (codes[1] >= 0).all()


def test_retrieval_by_codes_is_that_of_the_model_at_each_number_of_codes_which_is_then_as_before():
    windows = arc_data.make_windows(random_tasks(0))

    class Counted(Toy):
        """Knows nothing of a grid if it reads no code, and its cells if it reads one."""
        def embed(self, grids, layer="z"):
            return super().embed(grids) * (self.in_use[0].codes_kept > 0)
    model = Counted()
    model.in_use = types.SimpleNamespace(codes_kept=2), None
    found = symbols.retrieval_by_codes(model, windows)
    assert list(found) == ["0 codes", "1 codes"] and model.in_use[0].codes_kept == 2
    z = model.embed(windows.grids)                     # the model is the analogy
    for name, x in (("0 codes", 0 * z), ("1 codes", z)):
        score = evaluation.Space(windows.outputs, x, measure=evaluation.euclidean).by_weights((-1, 1, 1))
        ranks = evaluation.rank(score, evaluation.window_queries(windows))
        assert found[name] == pytest.approx(ranks["ndcg10_without_out1"].mean())
    assert found["0 codes"] != pytest.approx(found["1 codes"], abs=0.001)


# ---- decoder ---------------------------------------------------------------------------------------------

def test_found_grids_are_compared_with_the_truth_cell_by_cell():
    truth = [np.array([[1, 2], [3, 4]])] * 4
    found = [truth[0], np.array([[1, 2], [3, 5]]), np.array([[1, 2, 9]]), np.array([[6]])]
    right = decoder.compare(found, truth)
    assert right.size.tolist() == [1, 1, 0, 0]
    assert right.colours == pytest.approx([1, 3 / 5, 2 / 5, 0])
    assert right.cells == pytest.approx([1, 3 / 4, 2 / 4, 0])                   # of the four of the answer


def test_a_decoder_reads_the_likeliest_size_and_the_likeliest_of_the_colours_that_are_present():
    one = decoder.Decoder(2)
    for layer in (one.size, one.colours, one.cells):
        torch.nn.init.zeros_(layer.weight)
    height, width = one.size.bias.data.view(2, 30).zero_()
    height[1], width[2] = 1, 1                         # 2 x 3
    one.colours.bias.data.copy_(torch.tensor([-1., 1, -1, 1, -1, -1, -1, -1, -1, -1]))
    cells = one.cells.bias.data.view(10, 30, 30).zero_()
    cells[1], cells[7], cells[3, 0, 2] = 1, 9, 2       # 7 is likeliest everywhere, but not present
    assert [grid.tolist() for grid in one.read(torch.zeros(1, 2))] == [[[1, 1, 3], [1, 1, 1]]]
    one.colours.bias.data.copy_(-torch.arange(10.) - 1)                         # none is: the likeliest is
    assert one.read(torch.zeros(1, 2))[0].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_decoder_learns_what_an_embedding_holds_and_is_seeded(monkeypatch):
    rng = np.random.default_rng(0)
    grids = [np.full(rng.integers(1, 4, 2), colour, np.int8) for colour in rng.integers(0, 4, 200)]

    class Plain:
        def embed(self, grids):                        # size and colour, one number each of them
            return torch.tensor([[*np.eye(4)[list(grid.shape)].ravel(), *np.eye(10)[grid[0, 0]]]
                                 for grid in grids], dtype=torch.float)
    monkeypatch.setattr(decoder, "STEPS", 100)
    learned = decoder.train_decoder(Plain(), grids)
    found = decoder.compare(learned.read(Plain().embed(grids)), grids)
    assert min(found.size.mean(), found.colours.mean(), found.cells.mean()) > 0.99
    monkeypatch.setattr(decoder, "STEPS", 3)
    weights = [decoder.train_decoder(Plain(), grids, seed).size.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_entries_of_decoded_metrics_are_means_and_count_windows():
    answers = [np.array([[1, 2]]), np.array([[3]])]
    decoded = {"model": decoder.compare([answers[0], answers[0]], answers),
               "copy of in2": decoder.compare(answers, answers)}
    entries = decoder.decoded_metrics(decoded, np.array([0, 1]))
    assert {name: (entry["model"], entry["n"]) for name, entry in entries.items()} == {
        "decoded_size": (0.5, 2), "decoded_colours": (0.5, 2), "decoded_cells": (0.5, 2)}
    assert all(entry["baselines"] == {"copy of in2": 1} for entry in entries.values())
    assert entries["decoded_size"]["interval"] == (0, 1)
