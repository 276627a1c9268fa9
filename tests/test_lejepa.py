"""Claims of lejepa.py: the objective against closed forms and numpy, the code, the encoder and the variants."""
import ast
import copy
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_tasks

import arc_data
import lejepa
from lejepa import CODE_SIZE, CODES, LEVELS, load_run, sigreg

ROOT = Path(__file__).parent.parent
HEADS = CODES * len(LEVELS)                            # m: the numbers behind the codes of a token


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(dim, count, seed=1, dtype=torch.float32):
    return F.normalize(normal(dim, count, seed=seed, dtype=torch.float64), dim=0).to(dtype)


def quadrature(z, directions, knots=17):
    """The statistic of one view by numpy in float64: 2 N times the integral over [0, 3] of phi |psi - phi|^2, by trapezoids."""
    x = np.asarray(z, np.float64) @ np.asarray(directions, np.float64)                         # (N, M)
    t = np.linspace(0, 3, knots)
    phi = np.exp(-t**2 / 2)
    psi = np.array([np.exp(1j * s * x).mean(0) for s in t])                                    # (T, M)
    weights = np.full(knots, 6 / (knots - 1))
    weights[[0, -1]] /= 2
    return float(len(x) * ((weights * phi) @ np.abs(psi - phi[:, None]) ** 2).mean())


def plain(z, directions, frequency=None):
    """The same in plain torch, for autograd; or at one frequency, scaled to the same mean for N(0, I)."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype) if frequency is None else torch.tensor([frequency], dtype=z.dtype)
    phi = torch.exp(-t**2 / 2)
    weights = torch.full_like(t, 3 / 8)
    weights[[0, -1]] = 3 / 16
    weights = weights if frequency is None else 1.05246 / (phi - phi**3)
    x = (z @ directions)[..., None] * t                                                        # (V, N, M, T)
    error = (x.cos().mean(-3) - phi) ** 2 + x.sin().mean(-3) ** 2
    return z.shape[-2] * (error @ (weights * phi)).mean()


def at(t, z, directions):
    """The statistic of one view at one t, scaled to the mean that the published grid has for N(0, I)."""
    error = np.exp(1j * t * (np.asarray(z, np.float64) @ np.asarray(directions, np.float64))).mean(0) - np.exp(-t**2 / 2)
    return float(1.05246 / (1 - np.exp(-t**2)) * len(z) * (np.abs(error) ** 2).mean())


CLOUDS = {"gaussian": lambda z: z, "shifted": lambda z: z + 0.7, "narrow": lambda z: 0.1 * z, "wide": lambda z: 3 * z,
          "uniform": lambda z: 2 * torch.rand(z.shape, generator=torch.Generator().manual_seed(5)).to(z.dtype), "skew": lambda z: z.exp() / 2}

# ------------------------------------------------------------------------------------------------ sigreg


@pytest.mark.parametrize("samples, dim", [(2, 4), (3, 1), (16, 4), (64, 32), (512, 8)])
def test_sigreg_of_gaussian_samples_averages_1_05_whatever_the_batch_size(samples, dim):
    t = np.linspace(0, 3, 17)
    weights = np.r_[3 / 16, np.full(15, 3 / 8), 3 / 16] * np.exp(-t**2 / 2)
    null = float(weights @ (1 - np.exp(-t**2)))                                                # N |psi - phi|^2 averages 1 - phi^2
    assert null == pytest.approx(1.05246, abs=1e-5) == lejepa.SIGREG_NULL
    views = max(200, 6000 // dim)                                                              # 6000 or more independent numbers
    got = [float(sigreg(normal(views // 4, samples, dim, seed=seed), unit(dim, 4 * dim, seed=seed))) for seed in range(4)]
    assert np.mean(got) == pytest.approx(null, abs=0.06)
    got = [float(sigreg(normal(views // 4, samples, dim, seed=seed), unit(dim, 4 * dim, seed=seed), 0.5)) for seed in range(4)]
    assert np.mean(got) == pytest.approx(null, abs=0.12)                                       # so it is at one frequency; unscaled, 0.22


@pytest.mark.parametrize("frequency, share", [(None, 0.40205), (2.0, 0.80155)])
@pytest.mark.parametrize("samples", [2, 7, 64])
def test_sigreg_of_a_collapsed_encoder_is_a_share_of_n_and_its_gradient_exactly_0(samples, frequency, share):
    z = torch.zeros(samples, 16, requires_grad=True)
    value = sigreg(z, unit(16, 32), frequency)
    value.backward()
    assert float(value.detach()) / samples == pytest.approx(share, abs=1e-5)
    assert z.grad.abs().max() == 0


@pytest.mark.parametrize("dim, share", [(64, 0.3786), (128, 0.3902), (256, 0.3961), (512, 0.3990)])
def test_normalised_embeddings_score_near_a_collapse_however_isotropic(dim, share):
    z = F.normalize(normal(4096, dim), dim=1)
    assert float(sigreg(z, unit(dim, 64))) / 4096 == pytest.approx(share, abs=3e-4)


def test_each_view_is_tested_on_its_own_samples():
    views = torch.stack([normal(33, 8) + 1.5, 2 * normal(33, 8, seed=1) + 1])
    directions = unit(8, 16)
    alone = [quadrature(view, directions) for view in views]
    assert float(sigreg(views, directions)) == pytest.approx(np.mean(alone), rel=1e-5)
    assert quadrature(views.flatten(0, 1), directions) > 1.5 * np.mean(alone)                  # pooled would be another number


@pytest.mark.parametrize("cloud", CLOUDS)
def test_17_knots_are_the_integral_of_2001_within_1_percent(cloud):
    """The integrand is even at 0, so the trapezoid errs by its slope at 3 alone, dt^2 / 6 of it, while |x| < 2 pi / dt = 33."""
    z, directions = CLOUDS[cloud](normal(257, 8)), unit(8, 64)
    value = float(sigreg(z, directions))
    assert value == pytest.approx(quadrature(z, directions), rel=1e-4)
    assert value == pytest.approx(quadrature(z, directions, knots=2001), rel=0.01)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("frequency", [None, 2.0])
@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("views, samples, dim, count", [(2, 65, 16, 32), (1, 2, 8, 1), (3, 7, 1, 5), (1, 1024, 32, 64)])
def test_sigreg_and_its_gradient_are_those_of_the_plain_formula(monkeypatch, cloud, views, samples, dim, count, frequency, compiling):
    """Both forms, the one that runs eagerly, over several blocks, and the one that a compiler is given."""
    monkeypatch.setattr(lejepa, "BLOCK", 3 * samples)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    z = CLOUDS[cloud](normal(views, samples, dim, dtype=torch.float64)).requires_grad_()
    directions = unit(dim, count, dtype=torch.float64)
    expected = plain(z, directions, frequency)
    slope, = torch.autograd.grad(expected, z)
    torch.testing.assert_close(sigreg(z, directions, frequency), expected, rtol=1e-11, atol=1e-12)
    assert float((torch.autograd.grad(sigreg(z, directions, frequency), z)[0] - slope).norm()) < 1e-11 * float(slope.norm())
    z32 = z.detach().float().requires_grad_()
    expected32, directions32 = plain(z32.double(), directions.float().double(), frequency), directions.float()
    slope, = torch.autograd.grad(expected32, z32)
    got, = torch.autograd.grad(sigreg(z32, directions32, frequency), z32)
    assert float(sigreg(z32, directions32, frequency).detach()) == pytest.approx(float(expected32.detach()), rel=1e-5)
    assert float((got - slope).norm()) < 1e-5 * float(slope.norm())


@pytest.mark.parametrize("frequency", [None, 2.0])
@pytest.mark.parametrize("views, samples, count", [(1, 2, 1), (2, 5, 3)])
def test_the_gradient_passes_gradcheck(views, samples, count, frequency):
    z = normal(views, samples, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sigreg(z, unit(4, count, dtype=torch.float64), frequency), z)


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("frequency", [0.5, 2.0, 3.0])
def test_at_one_frequency_it_compares_the_characteristic_function_there_alone(cloud, frequency):
    z, directions = CLOUDS[cloud](normal(65, 8)), unit(8, 32)
    assert float(sigreg(z, directions, frequency)) == pytest.approx(at(frequency, z, directions), rel=1e-5)


def test_over_all_directions_one_frequency_is_a_repulsion_of_pairs_that_falls_with_their_distance():
    """exp(-t^2 d^2 / 2 D) of each pair, as the docstring says, up to what no pair has a part in."""
    dim, count, t = 256, 24, 2.0
    z = (normal(count, 1) * 0.3 + normal(count, dim, seed=2) * torch.linspace(0.2, 1.5, count)[:, None]).double()
    phi, kernel = math.exp(-t**2 / 2), lambda square: np.exp(-t**2 * square.numpy() / (2 * dim))
    pairs = kernel(torch.cdist(z, z).square()).mean() - 2 * phi * kernel(z.square().sum(1)).mean() + phi**2
    expected = count * pairs * 1.05246 / (1 - math.exp(-t**2))
    assert float(sigreg(z, unit(dim, 20000, dtype=torch.float64), t)) == pytest.approx(expected, rel=0.02)


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
    assert got.dtype == torch.float64 and float(got) == pytest.approx(quadrature(z, directions), rel=1e-12)


@pytest.mark.parametrize("z, directions", [((1, 4), (4, 2)), ((3, 1, 4), (4, 2)), ((0, 4), (4, 2)), ((4,), (4, 2)), ((2, 2, 8, 4), (4, 2)),
                                           ((8, 4), (5, 2)), ((8, 4), (2, 4)), ((8, 4), (4,))])
def test_sigreg_refuses_one_sample_and_other_shapes(z, directions):
    with pytest.raises(ValueError, match="sigreg"):
        sigreg(torch.zeros(z), torch.ones(directions))


@pytest.mark.parametrize("frequency", [0.0, -1.0, math.inf, math.nan])
def test_sigreg_refuses_a_frequency_that_tests_nothing(frequency):
    with pytest.raises(ValueError, match="frequency"):
        sigreg(torch.zeros(8, 4), torch.ones(4, 2), frequency)


def test_directions_are_unit_columns_a_function_of_seed_and_step_alone():
    draw = lambda seed, step: lejepa.draw_directions(12, 7, lejepa.Config(seed=seed, device="cpu"), step)
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), draw(1, 5)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(7))
    assert first.shape == (12, 7) and torch.equal(first, draw(1, 5))
    assert not torch.equal(first, draw(1, 6)) and not torch.equal(first, draw(2, 5))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ code


@pytest.fixture(scope="module")
def code():
    return lejepa.GaussianCode()


def perplexity(column):
    share = np.bincount(column, minlength=CODE_SIZE) / len(column)
    return math.exp(-sum(p * math.log(p) for p in share if p)) / CODE_SIZE


def test_codes_of_gaussian_numbers_are_as_uniform_as_uniform_draws(code):
    n = 20_000
    indices = code.indices(normal(n, HEADS)).numpy()
    expected = np.mean([perplexity(np.random.default_rng(seed).integers(0, CODE_SIZE, n)) for seed in range(4)])
    for column in indices.T:
        assert perplexity(column) == pytest.approx(expected, abs=0.003) and len(np.unique(column)) == CODE_SIZE


def test_a_code_is_read_back_as_the_mean_of_its_bin(code):
    x = np.linspace(-9, 9, 180_001)
    density = np.exp(-x**2 / 2)
    y = torch.from_numpy(x).float()[:, None].expand(-1, HEADS)
    read = code(y).double().numpy()
    for column in range(HEADS):
        level = np.round(read[:, column], 4)
        assert len(np.unique(level)) == (LEVELS * CODES)[column]
        for value in np.unique(level):
            inside = level == value
            assert (density[inside] @ x[inside]) / density[inside].sum() == pytest.approx(value, abs=2e-4)
            assert density[inside].sum() / density.sum() == pytest.approx(1 / len(np.unique(level)), abs=2e-4)


def test_the_gradient_goes_straight_through_the_code(code):
    y, weight = normal(50, HEADS).requires_grad_(), normal(50, HEADS, seed=1)
    (code(y) * weight).sum().backward()
    assert torch.equal(y.grad, weight)


def test_what_is_read_back_depends_on_the_bin_alone_bit_for_bit(code):
    y = torch.cat([normal(4000, HEADS), 20 * normal(4000, HEADS, seed=1)])
    read = code(y)
    for j in range(HEADS):
        assert len(torch.unique(read[:, j])) == (LEVELS * CODES)[j]


def test_equal_codes_are_equal_symbols_and_other_codes_other_symbols(code):
    y = normal(3000, HEADS)
    indices, read = code.indices(y), code(y).round(decimals=4)
    for i in range(CODES):
        symbols = [tuple(row) for row in read[:, i * len(LEVELS):(i + 1) * len(LEVELS)].tolist()]
        assert len(set(symbols)) == len(set(zip(symbols, indices[:, i].tolist()))) == len(torch.unique(indices[:, i]))


@pytest.mark.parametrize("scale", [1, 8, 1e4, 1e30, math.inf])
def test_indices_are_int64_from_0_to_767_however_large_the_number(code, scale):
    y = normal(500, HEADS) * scale
    indices = code.indices(y)
    assert indices.shape == (500, CODES) and indices.dtype == torch.int64
    assert 0 <= int(indices.min()) and int(indices.max()) < CODE_SIZE == 768
    edge = torch.where(y.abs() > 6, y.sign() * 6, y)   # already in the first or the last bin
    assert torch.equal(indices, code.indices(edge))


# ------------------------------------------------------------------------------------------------ encoder


def make(**flags):
    """A small model whose parameters and batch statistics are none of the special values of a fresh one."""
    cfg = lejepa.parse_flags(["--device", "cpu", "--size", "small", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    model = lejepa.build(cfg)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        model(arc_data.TaskSet(synthetic_tasks(20)).batch(48, 0, 0))
        model.average(0)
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


def gather(grids):
    return arc_data.TokenTable(grids, turned=False).gather(np.arange(len(grids)))


def test_padding_does_not_reach_an_embedding(model, grids):
    gathered = gather(grids)
    empty = gathered.grid == len(grids)
    assert empty.sum() > 10
    generator = torch.Generator().manual_seed(0)
    kind = torch.where(empty, torch.randint(0, len(gathered.colour), gathered.kind.shape, generator=generator), gathered.kind)
    box = torch.where(empty[..., None], torch.randint(0, 15, gathered.box.shape, generator=generator), gathered.box)
    for got, expected in zip(model.encoder(gathered._replace(kind=kind, box=box)), model.encoder(gathered), strict=True):
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
    assert all(torch.equal(a, b) for one, other in zip(model.codes(grids), codes, strict=True) for a, b in zip(one, other))


def test_everything_after_the_code_depends_on_symbols_alone(model, grids):
    contexts = [tuple(grids[i:i + 3]) for i in range(20)]
    z, z_hat, ys = model.embed(grids), model.predict(contexts), []

    def move(module, inputs, y):                       # each number to one at random in its bin
        drawn = torch.randn(400, *y.shape, generator=torch.Generator().manual_seed(0))
        same = model.encoder.code.level(drawn) == model.encoder.code.level(y)
        moved = torch.where(same.any(0), drawn.gather(0, same.float().argmax(0)[None])[0], y)
        ys.append((y, moved))
        return moved
    hook = model.weights.encoder.objects.register_forward_hook(move)
    try:
        inside, predicted = model.embed(grids), model.predict(contexts)
    finally:
        hook.remove()
    for y, moved in ys:
        assert torch.equal(model.encoder.code.indices(y), model.encoder.code.indices(moved)) and float((y - moved).abs().mean()) > 0.05
    assert torch.equal(inside, z) and torch.equal(predicted, z_hat)
    across = model.weights.encoder.objects.register_forward_hook(lambda module, inputs, y: -y)
    try:
        assert not torch.equal(model.embed(grids), z)  # another bin is another symbol
    finally:
        across.remove()


def one_object(shape, colour=3, top=2, left=1):
    grid = np.zeros((9, 8), np.int8)
    grid[top:top + 3, left:left + 3] = colour * np.array(shape)
    return grid


PLUS, CROSS, FLAG = [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[1, 0, 1], [0, 1, 0], [1, 0, 1]], [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_objects_of_equal_box_and_area_but_other_shape_differ(model):
    tokens = arc_data.tokenise([one_object(shape) for shape in (PLUS, CROSS, FLAG)])
    assert tokens.area.tolist() == [5] * 6 and len(np.unique(tokens.box[1::2], axis=0)) == 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shapes = [one_object((PLUS, CROSS, FLAG)[k]) for k in (i, j)]
        gathered = gather(shapes)
        y = model.encoder.objects(gathered)[gathered.kind].flatten(0, 1)
        one, other = (y[gathered.first[g] + 1] for g in range(2))
        assert float((one - other).abs().max()) > 1e-2


def test_y_says_what_an_object_is_and_the_symbol_where(model):
    here, there, red = one_object(PLUS), one_object(PLUS, top=5, left=4), one_object(PLUS, colour=2)
    (codes, boxes), (codes2, boxes2), (codes3, boxes3) = model.codes([here, there, red])
    assert torch.equal(codes[1], codes2[1]) and boxes[1].tolist() == [2, 1, 3, 3] and boxes2[1].tolist() == [5, 4, 3, 3]
    assert not torch.equal(codes, codes3) and torch.equal(boxes, boxes3)
    z = model.embed([here, there, red])
    assert min(float((z[i] - z[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_embed_codes_and_predict_keep_their_contract(model, grids):
    z = model.embed(grids)
    assert z.shape == (60, lejepa.SIZES["small"].dim) and z.dtype == torch.float32 and not z.requires_grad and z.isfinite().all()
    codes = model.codes(grids)
    assert len(codes) == 60
    tokens = arc_data.tokenise(grids)
    for (code, box), grid, first, last in zip(codes, grids, tokens.start[:-1], tokens.start[1:], strict=True):
        assert code.dtype == box.dtype == torch.int64 and code.shape == (len(box), CODES) and box.shape == (last - first, 4)
        assert box[0].tolist() == [0, 0, *grid.shape]
        assert box.tolist() == tokens.box[first:last].tolist()
        assert 0 <= int(code.min()) and int(code.max()) < CODE_SIZE
    assert len({tuple(row) for code, _ in codes for row in code.tolist()}) > 20
    contexts = [tuple(grids[i:i + 3]) for i in range(20)]
    z_hat = model.predict(contexts)
    assert z_hat.shape == (20, z.shape[1]) and z_hat.dtype == torch.float32 and not z_hat.requires_grad
    close(z_hat, torch.cat([model.predict([context]) for context in contexts]))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_any_integer_type_of_grid_gives_the_same_embedding(model, grids, dtype):
    cast = [grid.astype(dtype) for grid in grids[:12]]
    assert torch.equal(model.embed(cast), model.embed(grids[:12]))
    assert torch.equal(model.predict([tuple(cast[:3])]), model.predict([tuple(grids[:3])]))


def test_a_prediction_depends_on_each_grid_of_its_context_and_on_their_roles(model, grids):
    a, b, c, d = grids[:4]
    z_hat = model.predict([(a, b, c), (d, b, c), (a, d, c), (a, b, d), (a, c, b), (b, a, c)])
    assert float((z_hat[1:] - z_hat[0]).abs().amax(1).min()) > 1e-3


def test_evaluation_changes_nothing_in_the_model(grids):
    for flags in ({}, {"code": "ema"}, {"objective": "infonce"}):
        model, _ = make(**flags)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.embed(grids), model.codes(grids), model.predict([tuple(grids[:3])])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embeddings_lie_on_the_sphere_of_radius_sqrt_d_where_sigreg_still_acts(model, grids):
    z = model.embed(grids)
    torch.testing.assert_close(z.square().sum(1), torch.full((len(z),), float(z.shape[1])), rtol=1e-4, atol=0)
    directions = unit(z.shape[1], 200)
    cloud = normal(300, z.shape[1])
    flat = torch.cat([normal(300, 2, seed=3), torch.zeros(300, z.shape[1] - 2)], 1)            # rank 2
    for radius, apart in ((z.shape[1] ** 0.5, True), (1.0, False)):                            # of radius 1 both look the same
        isotropic, collapsed = (float(sigreg(radius * F.normalize(x, dim=1), directions)) for x in (cloud, flat))
        assert (collapsed > 5 * isotropic) == apart


# ------------------------------------------------------------------------------------------------ shape comments


def size_of(term, sizes):
    """The value of an entry of a shape comment: `D`, `6`, `8 BYTES`, `R L`, `W / heads`, `T - 1`; None if it is no such thing."""
    try:
        return eval(re.sub(r"(?<=\w)\s+(?=\w)", "*", term.strip()), {"__builtins__": {}}, sizes)
    except (NameError, SyntaxError, TypeError):
        return None


def claims(function):
    """{last line of a statement: (names it assigns, its shape comment)} of assignments and returns whose comment is a shape."""
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(inspect.cleandoc("\n" + "".join(lines)) if not lines[0].startswith(" ") else "class _:\n" + "".join(lines))
    shift = first - 1 - (1 if lines[0].startswith(" ") else 0)
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.Return)):
            comment = re.search(r"# \(([^()]+)\)", lines[node.end_lineno + shift - first])
            names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            if comment and (names or isinstance(node, ast.Return)):
                found[node.lineno + shift] = (node.end_lineno + shift, names, comment[1].split(","))
    return found


class Shapes:
    """Runs functions with every shape comment compared to what its line gave; `checked` counts them by function."""

    def __init__(self, functions, sizes):
        self.claims = {f.__code__: claims(f) for f in functions}
        self.sizes, self.checked, self.waiting = sizes, {}, {}

    def compare(self, frame, value, terms):
        sizes = [size_of(term, self.sizes) for term in terms]
        if isinstance(value, torch.Tensor) and None not in sizes:
            assert tuple(value.shape) == tuple(sizes), f"{frame.f_code.co_qualname}: the comment says ({', '.join(terms)}), the shape is {tuple(value.shape)}"
            self.checked[frame.f_code.co_qualname] = self.checked.get(frame.f_code.co_qualname, 0) + 1

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
    return [f for cls in classes for f in vars(cls).values() if inspect.isfunction(f)]


def test_shape_comments_of_sigreg_code_encoder_and_predictor_hold(monkeypatch):
    size = lejepa.SIZES["small"]._replace(width=24, heads=3, hidden=40, dim=18, directions=14)
    monkeypatch.setitem(lejepa.SIZES, "small", size)
    model, cfg = make()
    batch = arc_data.TaskSet(synthetic_tasks(21)).batch(30, 0, 0)
    grids = batch.grids
    sizes = dict(G=len(grids.first), U=len(grids.colour), R=grids.grid.shape[0], L=arc_data.SLOTS, W=size.width, D=size.dim, B=len(batch.index),
                 heads=size.heads, m=HEADS, n_codes=CODES, T=lejepa.KNOTS - 1, BYTES=arc_data.BYTES, P=getattr(size, "pooled", 0))
    assert len({v for k, v in sizes.items() if k in "GURLWDB"}) == 7       # else a wrong letter could pass
    encoding = Shapes(methods(lejepa.ObjectHead, lejepa.GaussianCode, lejepa.Block, lejepa.Encoder), sizes)
    with encoding, torch.no_grad():
        y = model.encoder(grids)[-1]
        code, indices = model.encoder.code(y), model.encoder.code.indices(y)
    predicting = Shapes(methods(lejepa.Predictor), sizes)
    with predicting, torch.no_grad():
        z, z_hat, _ = model(batch)
    assert z.shape == (sizes["G"], size.dim) and z_hat.shape == (sizes["B"], size.dim)
    assert y.shape == code.shape == (sizes["U"], HEADS) and indices.shape == (sizes["U"], CODES)
    penalty = Shapes([*methods(lejepa.GaussianCode), sigreg, lejepa.EppsPulley.forward], sizes | dict(V=CODES, N=len(y), M=13))
    with penalty:
        value = model.encoder.code.penalty(y, unit(len(LEVELS), 13))
    loose = Shapes([sigreg, lejepa.EppsPulley.forward], dict(V=2, N=11, M=13, D=6, T=lejepa.KNOTS - 1))
    with loose:
        alone = sigreg(normal(2, 11, 6), unit(6, 13))
    assert value.shape == alone.shape == ()
    for watch, names in ((encoding, {"ObjectHead.forward", "Block.forward", "Encoder.relate"}), (predicting, {"Predictor.forward"}),
                         (penalty, {"sigreg"}), (loose, {"sigreg", "EppsPulley.forward"})):
        assert names <= set(watch.checked), (names, watch.checked)


def test_a_wrong_shape_comment_is_noticed(tmp_path):
    source, namespace = tmp_path / "wrong.py", {}
    source.write_text("def f(x):\n    y = x.T  # (A, B)\n    return y\n")
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    with pytest.raises(AssertionError, match="comment says"), Shapes([namespace["f"]], dict(A=2, B=3)):
        namespace["f"](torch.zeros(2, 3))


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_is_1_minus_lam_prediction_plus_lam_sigreg_and_nothing_else(monkeypatch):
    model, cfg = make(lam=0.3, dtype="fp32")
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    drawn, draw = {}, lejepa.draw_directions
    monkeypatch.setattr(lejepa, "draw_directions", lambda dim, *rest: drawn.setdefault(dim, draw(dim, *rest)))
    with torch.no_grad():
        loss, terms = lejepa.losses(model, batch, 5, cfg)
        z, z_hat, y = model(batch)
    prediction = np.mean((z_hat.double().numpy() - z[batch.index[:, 3]].double().numpy()) ** 2)
    of_z = np.mean([at(2.0, z[side::2], drawn[z.shape[1]]) for side in (0, 1)])                # inputs, outputs
    of_codes = np.mean([quadrature(y[batch.objects, i * 5:i * 5 + 5], drawn[5]) for i in range(CODES)])
    assert float(terms["prediction"]) == pytest.approx(prediction, rel=1e-4)
    expected = (of_z + of_codes) / 2
    assert float(terms["sigreg"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(0.7 * prediction + 0.3 * expected, rel=1e-4)


def test_gradient_of_the_prediction_flows_into_both_sides():
    model, cfg = make(lam=0, dtype="fp32")
    batch = arc_data.TaskSet(synthetic_tasks(22)).batch(30, 0, 0)
    kept, forward = {}, model.forward

    def watched(batch):
        z, z_hat, y = forward(batch)
        kept.update(z=z.requires_grad_(), z_hat=z_hat.requires_grad_())
        return z, z_hat, y
    model.forward = watched
    lejepa.losses(model, batch, 0, cfg)[0].backward()
    error = 2 * (kept["z_hat"] - kept["z"][batch.index[:, 3]]) / kept["z_hat"].numel()
    torch.testing.assert_close(kept["z_hat"].grad, error.detach())
    torch.testing.assert_close(kept["z"].grad, torch.zeros_like(kept["z"]).index_add(0, batch.index[:, 3], -error).detach())


def test_a_step_repeated_on_two_threads_gives_the_same_bits():
    model, cfg = make(dtype="fp32")
    model.train().requires_grad_()
    batch = arc_data.TaskSet(synthetic_tasks(24, side=(2, 4))).batch(60, 0, 0)    # enough for torch to share the work out
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = None
        for _ in range(6):
            model.zero_grad()
            torch.manual_seed(0)                       # the same dropout
            lejepa.losses(model, batch, 0, cfg)[0].backward()
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if not name.startswith("mean.")}
            first = first or grads
            assert not [name for name in grads if not torch.equal(grads[name], first[name])]
    finally:
        torch.set_num_threads(threads)


def test_a_step_depends_on_seed_and_step_alone_not_on_what_was_drawn_before():
    batch, found = arc_data.TaskSet(synthetic_tasks(24)).batch(24, 0, 3), []
    for drawn in (0, 7):
        model, cfg = make(dtype="fp32")
        model.train().requires_grad_()
        torch.rand(drawn + 1)
        metrics = lejepa.train_step(model, lejepa.make_optimizers(model, cfg), batch, 3, cfg)
        found.append([*(value.item() for value in metrics.values()), *(p.sum().item() for p in model.parameters())])
    assert found[0] == found[1]


@pytest.mark.parametrize("code", ["gaussian", "ema"])
def test_the_mean_of_the_weights_is_weighted_towards_the_last_tenth_of_the_steps(code):
    model, _ = make(code=code)
    names = ["predictor.head.0.weight", "encoder.projector.1.running_mean"] + ["encoder.code.vectors"] * (code == "ema")
    state, seen = model.state_dict(), {name: [] for name in names}
    for step in range(200):
        for i, name in enumerate(names):
            state[name].copy_(normal(*state[name].shape, seed=3 * step + i))
            seen[name].append(state[name].double())
        state["encoder.projector.1.num_batches_tracked"].fill_(step)
        model.average(step)
    share = np.array([math.prod(1 - 10 / (10 + later) for later in range(step + 1, 200)) * 10 / (10 + step) for step in range(200)])
    assert share.sum() == pytest.approx(1) and share[-20:].sum() == pytest.approx(2 / 3, abs=0.05)
    for name in names:
        assert torch.allclose(state["mean." + name].double(), sum(c * w for c, w in zip(share, seen[name])), atol=1e-5), name
    assert int(state["mean.encoder.projector.1.num_batches_tracked"]) == 199


@pytest.mark.parametrize("code", ["gaussian", "ema"])
def test_evaluation_sees_the_mean_of_the_weights_and_training_the_weights(code):
    model, cfg = make(dtype="fp32", code=code)
    data, grid = arc_data.TaskSet(synthetic_tasks(9)), np.array([[1, 0, 0], [0, 0, 2]])
    batch, saved = data.batch(24, 0, 0), copy.deepcopy(model.state_dict())

    def figures():
        torch.manual_seed(0)
        training = lejepa.losses(model.train(), batch, 0, cfg)[1]
        model.load_state_dict({name: value for name, value in saved.items() if name not in changed}, strict=False)    # a codebook follows
        unseen = lejepa.losses(model.eval(), batch, 0, cfg)[1]
        return [terms[name].item() for terms in (training, unseen) for name in ("prediction", "sigreg_codes")] + [
            float(model.embed([grid]).sum()), float(model.predict([[grid] * 3]).sum()), model.codes([grid])[0][0].tolist()]
    changed = set()
    first = figures()
    for part, differ in (("mean.", [False, False, True, True, True, True, True]), ("", [True, True, False, False, False, False, False])):
        model.load_state_dict(saved)
        changed = {part + "encoder.objects.mlp.3.weight"} | {part + "encoder.code.vectors"} & saved.keys()
        for name in changed:
            model.state_dict()[name].add_(normal(*saved[name].shape, seed=1))
        assert [a != b for a, b in zip(figures(), first)] == differ, part


# ------------------------------------------------------------------------------------------------ variants


def test_the_ema_codebook_follows_its_members_as_ten_plain_lines_do():
    code, decay = lejepa.EMACode(lam=0.5), 0.99
    width, first = len(LEVELS), normal(900, HEADS)
    code.train()
    code(first)
    start = first[torch.linspace(0, 899, CODE_SIZE).long()]                # data start
    for part in range(CODES):
        vectors, members = start[:, part * width:(part + 1) * width].double().numpy(), np.ones(CODE_SIZE)
        total = vectors.copy()
        for y in (first,):
            y = y[:, part * width:(part + 1) * width].double().numpy()
            nearest = ((y[:, None] - vectors) ** 2).sum(2).argmin(1)
            members = decay * members + (1 - decay) * np.bincount(nearest, minlength=CODE_SIZE)
            total *= decay
            np.add.at(total, nearest, (1 - decay) * y)
            vectors = total / members[:, None]
        np.testing.assert_allclose(code.vectors[part], vectors, atol=1e-4)


def test_the_ema_codebook_stands_still_in_evaluation_and_is_no_parameter():
    code = lejepa.EMACode(lam=0.5)
    assert not list(code.parameters())
    code.train()(normal(900, HEADS))
    before, y = code.vectors.clone(), normal(100, HEADS, seed=1).requires_grad_()
    read = code.eval()(y)
    assert torch.equal(code.vectors, before)
    for part in range(CODES):
        mine = slice(part * len(LEVELS), (part + 1) * len(LEVELS))
        nearest = ((y.detach()[:, None, mine] - before[part]) ** 2).sum(2).argmin(1)
        torch.testing.assert_close(read[:, mine], before[part][nearest])
        assert torch.equal(code.indices(y)[:, part], nearest)
    read.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    expected = 0.25 * (y - read.detach()).square().mean()                  # commitment pulls y, not the codebook
    torch.testing.assert_close(0.5 / 2 * code.penalty(y, None), expected)  # `losses` weighs it by lam / 2


def test_infonce_is_the_cross_entropy_over_the_batch_and_the_queue():
    model, cfg = make(objective="infonce", dtype="fp32")
    objective, data = model.objective, arc_data.TaskSet(synthetic_tasks(23))
    assert [part.p for part in objective.target.modules() if isinstance(part, torch.nn.Dropout)] == [0.0] * 2   # keys are not noised
    model.train()                                      # batch statistics too: the average and the queue move in training alone
    kept = []
    for step in range(3):
        batch = data.batch(30, 0, step)
        with torch.no_grad():
            z, z_hat, _ = model(batch)
            loss, regulariser = objective(model, z, z_hat, batch, None)
            targets = F.normalize(objective.target(batch.grids)[0], dim=-1)
        temperature = float(objective.log_temperature.exp())
        keys, query = targets[batch.index[:, 3].unique()], F.normalize(z_hat, dim=-1) / temperature
        logits = query @ torch.cat([keys, *kept]).T
        expected = (logits.logsumexp(1) - (query * targets[batch.index[:, 3]]).sum(1)).mean()
        assert 0.05 <= temperature <= 0.20 and float(loss) == pytest.approx(float(expected), rel=1e-3) and float(regulariser) == 0
        kept.append(keys)
    assert int(objective.filled) == sum(map(len, kept))


def test_no_code_passes_y_on_as_it_is():
    code, y = lejepa.NoCode(), normal(9, HEADS)
    assert code(y) is y and code.indices(y).shape == (9, 0) and float(code.penalty(y, None)) == 0


@pytest.mark.parametrize("grid", [np.full((2, 2), 10), np.full((2, 2), -1), np.zeros((31, 1), int), np.zeros(4, int), np.zeros((0, 3), int), np.full((2, 2), 0.7), [[1, 2], [3]]])
def test_embed_refuses_what_is_no_grid(grid):
    model, _ = make()
    with pytest.raises(ValueError, match="grid 1,"):
        model.embed([np.ones((2, 2), int), grid])


def test_grids_may_be_nested_lists_and_none_at_all():
    model, cfg = make()
    rows = [[0, 1], [2, 3]]
    assert torch.equal(model.embed([rows]), model.embed([np.array(rows)]))
    assert torch.equal(model.predict([(rows, rows, rows)]), model.predict([(np.array(rows),) * 3]))
    assert torch.equal(model.predict(zip([rows], [rows], [rows])), model.predict([[rows] * 3])) and torch.equal(model.embed(iter([rows])), model.embed([rows]))
    assert model.embed([]).shape == model.predict([]).shape == (0, lejepa.SIZES[cfg.size].dim) and model.codes([]) == []


@pytest.mark.parametrize("count", [2, 4])
def test_predict_refuses_what_is_no_triple_and_names_a_bad_grid_by_its_place(count):
    model, _ = make()
    grid = np.ones((2, 2), int)
    with pytest.raises(ValueError, match="context 1 has"):
        model.predict([[grid] * 3, [grid] * count])
    with pytest.raises(ValueError, match="context 1, out1,"):
        model.predict([[grid] * 3, [grid, grid + 9, grid]])


# ------------------------------------------------------------------------------------------------ the process


def test_importing_a_module_changes_nothing_in_the_process():
    script = """
import json, os, random, signal, sys, warnings, locale, threading
import numpy as np, torch
def state():
    return [torch.get_num_threads(), torch.get_num_interop_threads(), [str(signal.getsignal(s)) for s in signal.valid_signals()], dict(os.environ), os.getcwd(),
            torch.get_rng_state().tolist(), [str(x) for x in np.random.get_state()], str(random.getstate()), torch.get_default_dtype().__str__(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), threading.active_count(),
            str(warnings.filters), np.geterr(), sys.getrecursionlimit(), locale.setlocale(locale.LC_ALL), os.listdir()]
before = state()
import arc_data, eval, lejepa
assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


@pytest.mark.parametrize("content", [None, {}, {"last.safetensors": b"", "previous.safetensors": b"x" * 99}, {"config.json": b"{}"}])
def test_load_run_of_a_folder_without_a_run_is_a_value_error(tmp_path, content):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        load_run(folder)
    assert "\n" not in str(error.value)
