"""legacy.py: formulas against plain lines, faults and settings by what they change, presets by steps."""
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import synthetic_tasks
from forked import TOY, assert_same_bits, at, fork, go, refused, start, stop  # noqa: F401

import arc_data
import harness.run
import legacy
import lejepa
from harness import autopsy, gpu

ROOT = Path(__file__).parent.parent
TASKS = synthetic_tasks(1)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(lejepa.SIZES, "small", TOY)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(**flags):
    flags = {"steps": 6, "batch_size": 12, "dtype": "fp32"} | flags
    return lejepa.resolve_defaults(lejepa.Config(size="small", device="cpu", **flags))


def build(**flags):
    cfg = config(**flags)
    make_data, make_optimizers, _ = legacy.recipe(cfg)
    model = lejepa.build(cfg)
    return model, make_optimizers(model, cfg), make_data(TASKS, "cpu", cfg.demonstrations), cfg


def steps(count, model, optimizers, data, cfg):
    """The metrics of the first steps."""
    found = []
    lejepa.train(model, optimizers, data, cfg, after_step=lambda done, terms, batch: found.append(terms)
                 or done == count)
    return found


def legacy_of(name):
    return legacy.VARIANTS["presets"][name]


# ---- formulas --------------------------------------------------------------------------------------------


def test_relational_is_the_mean_square_difference_of_squared_distances_and_quartic_in_scale():
    a, b = normal(2, 5, 3).double(), normal(2, 5, 3, seed=1).double()
    x, y = a.numpy(), b.numpy()
    total = sum((((x[n, i] - x[n, j]) ** 2).sum() - ((y[n, i] - y[n, j]) ** 2).sum()) ** 2
                for n in range(2) for i in range(5) for j in range(5))
    assert float(lejepa.relational(a, b)) == pytest.approx(total / 50)
    assert float(lejepa.relational(3 * a, 3 * b)) == pytest.approx(81 * total / 50)
    every = torch.ones(2, 5, dtype=torch.bool)
    assert float(legacy.relation(a, b, every, False)) == pytest.approx(total / 50)


def test_the_normalised_relational_term_does_not_grow_with_scale_and_reads_shared_slots_alone():
    a, b = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    both = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    one, scaled = (float(legacy.relation(s * a, s * b, both, True)) for s in (1, 5))
    assert one == pytest.approx(scaled, rel=1e-3)
    kept = []
    for n, count in ((0, 3), (1, 2)):
        apart = [torch.cdist(x[n, :count], x[n, :count]).square() for x in (a, b)]
        kept.append(torch.stack([x.flatten() for x in apart]))
    p, q = torch.cat(kept, 1)
    expected = (p - q).square().mean() / (p.var(correction=0) + q.var(correction=0) + 1e-6)
    assert one == pytest.approx(float(expected), rel=1e-4)


def test_the_relational_term_compares_the_largest_objects_slot_by_slot_or_with_the_nearest():
    found = {}
    for matching in ("slot", "set"):
        flags = f"relational=1,matching={matching}"
        model, _, data, cfg = build(objective="sum", legacy=flags)
        batch, objective = data.batch(12, 0, 0), model.objective
        model(batch)
        sides = batch.index[:, -2:]
        found[matching] = objective.between(batch.grids, sides)
        if matching == "slot":
            total, pairs = 0.0, 0
            for a, b in sides.tolist():
                count = min(int(batch.grids.count[a]), int(batch.grids.count[b]), objective.SLOTS + 1) - 1
                tokens = objective.tokens.detach().flatten(0, 1)
                p, q = (tokens[int(batch.grids.first[g]) + 1:][:count] for g in (a, b))
                total += float((torch.cdist(p, p).square() - torch.cdist(q, q).square()).square().sum())
                pairs += count ** 2
            assert found["slot"].item() == pytest.approx(total / pairs, rel=1e-3)
        same = objective.between(batch.grids, batch.index[:, [-1, -1]])
        assert float(same.detach()) == pytest.approx(0, abs=1e-6)
    assert found["set"] != found["slot"]


def test_gradnorm_moves_a_share_against_the_sign_of_its_excess_and_keeps_their_sum():
    shares, ratios, norms = [0.35 / 3, 1.65, 0.5], [0.2, 0.9, 0.7], [3.0, 1.0, 2.0]  # alpha 1 differs
    weighted = [s * n for s, n in zip(shares, norms)]
    pull = [(r / np.mean(ratios)) ** 1.5 for r in ratios]
    new = [s - 0.025 * n / np.mean(norms) * np.sign(w - np.mean(weighted) * p)
           for s, n, w, p in zip(shares, norms, weighted, pull)]
    expected = np.array(new) * 3 / sum(new)
    got = legacy.gradnorm(*map(torch.tensor, (shares, ratios, norms)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradnorm_and_uncertainty_weigh_the_terms_of_the_sum():
    flags = "relational=0.1,normalised=yes,balance="
    for balance in ("gradnorm", "uncertainty"):
        model, *others = build(objective="sum", legacy=flags + balance, code="none")
        terms = steps(3, model, *others)[-1]
        parts = torch.stack([w * terms[name] for name, w in model.objective.weights.items()])
        if balance == "gradnorm":
            total = float((model.objective.shares * parts).sum())
            assert total == pytest.approx(float(terms["loss"]), rel=1e-5)
            assert not torch.equal(model.objective.shares, torch.ones(3)) and model.objective.first.min() > 0
        else:
            model.objective.log_variance.data = torch.tensor([0.3, -0.2, 0.5])
            s = model.objective.log_variance.detach()
            got = sum(model.objective.balanced(list(parts), model))
            assert got.item() == pytest.approx((torch.exp(-s) * parts + s).sum().item(), rel=1e-5)


# ---- codes -----------------------------------------------------------------------------------------------


def test_a_refresh_replaces_unused_entries_when_too_few_were_used_at_every_interval():
    settings = "refresh=3800,size=256"                 # 3800 of 7600 steps are 3 of 6
    for threshold, refreshed in ((1, True), (0.01, False)):
        book = legacy.Codebook(config(code="vq", legacy=f"{settings},threshold={threshold}"))
        y, used = normal(40, 20), set()
        for step in range(3):
            assert set(book.used[0].nonzero()[:, 0].tolist()) == used
            if step:
                used |= set(book.indices(y)[:, 0].tolist())
            else:
                used |= set(torch.cdist(y, y[torch.linspace(0, 39, 256).long()]).argmin(1).tolist())
            book.train()(y)
        is_row = (book.vectors[0, :, None] == y).all(-1).any(-1)
        unused = [entry for entry in range(256) if entry not in used]
        assert 0 < len(unused) and 0.01 < len(used) / 256 < 1
        assert is_row[unused].all() == refreshed and not book.used.any()
        assert (book.members[0, unused] == 1).all() == refreshed


@pytest.mark.parametrize("refresh, steps_, interval", [(500, 7600, 500), (3000, 400, 158), (0, 400, 0)])
def test_the_interval_of_a_refresh_scales_with_the_run(refresh, steps_, interval):
    given = f"refresh={refresh}" + ",threshold=0.05" * (refresh > 0)
    assert legacy.Codebook(config(steps=steps_, legacy=given)).interval == interval


def test_a_cold_codebook_starts_near_0_and_one_from_data_with_members_of_the_batch():
    cold, warm = (legacy.Codebook(config(legacy=f"start={start}")) for start in ("cold", "data"))
    assert 0 < float(cold.vectors.abs().max()) <= 1 / 768
    warm.train()(normal(900, 20))
    assert float(warm.vectors.std()) > 0.5 and int((cold.indices(normal(900, 20))).unique().numel()) < 768


def test_the_loss_of_each_codebook_is_that_of_vq_vae_or_as_its_fault_says():
    y = normal(50, 20).requires_grad_()
    for fault, (beta, codebook) in {"used": (0.3, 1), "none": (0, 0), "swapped": (1, 0.3)}.items():
        cfg = config(lam=0.5, legacy=f"commitment=0.3,vq_loss={fault}")
        book = legacy.GradientCodebook(cfg)
        book.train()(y)
        book.vectors.data += 0.1
        vectors = book.read(book.indices(y))
        loss = 0.5 * book.regulariser(y, None)         # the objective multiplies by lam
        error = (y - vectors).square().mean()
        assert loss.item() == pytest.approx(((beta + codebook) * error).item(), rel=1e-5)
        by_y, by_vectors = torch.autograd.grad(loss, (y, book.vectors), retain_graph=True)
        own = torch.autograd.grad(error, (y, book.vectors))
        torch.testing.assert_close(by_y, beta * own[0])
        torch.testing.assert_close(by_vectors, codebook * own[1])
        ema = legacy.Codebook(cfg)
        ema.train()(y)
        error = (y - ema.read(ema.indices(y))).square().mean()
        assert (0.5 * ema.regulariser(y, None)).item() == pytest.approx((beta * error).item(), rel=1e-5)


def test_the_entropy_of_gumbel_has_a_gradient_where_a_code_is_out_of_reach():
    book = legacy.Gumbel(config(steps=10, legacy="size=256"))
    book.train()(torch.cat([normal(150, 20), 100 + normal(150, 20)]))      # codes near 0 and near 100
    y = normal(50, 20, seed=1).requires_grad_()
    book.regulariser(y, None).backward()
    assert y.grad.isfinite().all() and y.grad.abs().sum() > 0


def test_gumbel_anneals_from_1_to_a_tenth_and_is_hard_in_evaluation():
    book = legacy.Gumbel(config(steps=10, legacy="size=256"))
    y, seen = normal(300, 20).requires_grad_(), []
    for _ in range(12):
        seen.append(book.temperature())
        soft = book.train()(y)
    assert seen == pytest.approx([0.1 ** (min(step, 10) / 10) for step in range(12)])
    distance = (y.detach()[:, None] - book.vectors[0].detach()).square().sum(2)
    hard = book.eval()(y)
    torch.testing.assert_close(hard, book.vectors[0][distance.argmin(1)], rtol=0, atol=1e-5)
    assert not torch.allclose(soft, hard, atol=1e-2)
    mean = F.softmax(-distance, 1).mean(0)
    expected = 0.25 * (math.log(256) + float((mean * mean.log()).sum()))
    loss = 0.5 * book.regulariser(y, None)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    assert all(float(grad.abs().sum()) > 0 for grad in torch.autograd.grad(loss, (y, book.vectors)))


def test_fsq_cuts_tanh_into_equal_bins_and_reads_their_middles_back():
    fsq, y = legacy.FSQ(config()), normal(200, 20) * 2
    for part in range(4):
        code = np.zeros(200, int)
        for i, levels in enumerate((8, 6, 4, 4, 1)):
            column = 5 * part + i
            level = np.minimum(((np.tanh(y[:, column].numpy()) + 1) * levels / 2).astype(int), levels - 1)
            np.testing.assert_allclose(fsq(y)[:, column], (level + 0.5) * 2 / levels - 1, atol=1e-5)
            code = code * levels + level
        assert (fsq.indices(y)[:, part].numpy() == code).all() and code.max() < 768
    y.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(fsq(y).sum(), y)[0], 1 - torch.tanh(y).square())


@pytest.mark.parametrize("code", ["ema", "vq"])
def test_the_averaged_target_of_infonce_averages_its_codebook_too(code):
    model, optimizers, data, cfg = build(objective="infonce", code=code)
    expected = None
    for step in range(4):
        batch = data.batch(12, 0, step)
        lejepa.train_step(model.train(), optimizers, batch, step, cfg)
        now = model.encoder.quantizer.vectors.clone()
        expected = now if expected is None else expected.lerp(now, 0.01)
    torch.testing.assert_close(model.objective.target.quantizer.vectors, expected)


# ---- contexts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "last", "attention", "gru", "transformer"])
def test_a_context_takes_windows_of_3_5_and_7_grids_and_no_hidden_demonstration_reaches_it(name):
    torch.manual_seed(0)
    predictor = legacy.VARIANTS[name](TOY).eval()
    for count in (1, 2, 3):
        z = normal(4, 2 * count + 1, TOY.dim)
        z_hat = predictor(z)
        assert z_hat.shape == (4, TOY.dim)
        torch.testing.assert_close(predictor(z, torch.ones(4, count, dtype=torch.bool)), z_hat)
        reads = []
        for i in range(2 * count + 1):
            other = z.clone()
            other[:, i] += 1
            reads.append(not torch.allclose(predictor(other), z_hat))
        assert reads == ([False] * 2 * count + [True] if name == "last" else [True] * (2 * count + 1))
    z, shown = normal(4, 5, TOY.dim), torch.tensor([[True, False]] * 4)
    torch.testing.assert_close(predictor(z, shown), predictor(z[:, [0, 1, 4]]))


def test_gru_and_attention_pool_as_plain_lines_do():
    x, here = normal(2, 3, 16), torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    gru, attention = legacy.GRU(TOY), legacy.Attention(TOY)
    state = torch.zeros(1, 16)
    for i in (0, 2):
        state = gru.part(x[1:, i], state)
    torch.testing.assert_close(gru.pool(x, here)[1:], state)
    score = [float(attention.part(x[1, i])) for i in (0, 2)]
    first, last = (np.exp(score) / np.exp(score).sum()).tolist()
    torch.testing.assert_close(attention.pool(x, here)[1], first * x[1, 0] + last * x[1, 2])


# ---- schedules -------------------------------------------------------------------------------------------


def test_early_stopping_ends_a_made_series_and_keeps_its_best():
    losses = [5.0, 4.0, 3.999, 3.9, 4.2, 3.8995, 4.0, 3.95, 3.899]
    stopping, best = harness.run.EarlyStopping(30, 0.003), []
    for i, loss in enumerate(losses):
        if stopping.feed(10 * (i + 1), loss):
            best.append(10 * (i + 1))
        if stopping.is_over:
            break
    assert best == [10, 20, 40] and i == 7 and stopping.best == 3.9
    rows = [{"step": 10 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses[:5])]
    again = harness.run.EarlyStopping(30, 0.003, [*rows, {"step": 51}])
    assert (again.best, again.best_step, again.is_over) == (3.9, 40, False)
    never = harness.run.EarlyStopping(math.inf, 0.0)
    assert not any(never.feed(i, 1 / (i + 1)) or never.is_over for i in range(100))


def test_patience_is_counted_in_the_80_epochs_of_the_recorded_runs():
    assert legacy.recipe(config(steps=800, legacy="patience=15,min_delta=0.01"))[2] == (150, 0.01)
    assert legacy.recipe(config())[2] == (math.inf, 0.0)


def test_the_curriculum_begins_with_the_easiest_third_and_ends_with_all_tasks():
    rng = np.random.default_rng(0)

    def task(side, colours):
        grids = [rng.integers(0, colours, (side, side)).astype(np.int8) for _ in range(6)]
        return arc_data.Task([(grids[0], grids[1]), (grids[2], grids[3])], [(grids[4], grids[5])])
    tasks = {f"{side}": task(side, side) for side in (9, 2, 7, 3, 5, 4)}
    make_data, _, _ = legacy.recipe(config(steps=80, legacy="curriculum=yes"))
    data = make_data(tasks, "cpu", 1)
    for step, most in ((0, 3), (19, 3), (20, 5), (49, 5), (50, 9), (79, 9)):
        sides = set()
        for seed in range(12):
            sides |= set(data.batch(24, seed, step).grids.box[..., 2:].flatten().tolist())
        assert max(sides) == most, step
    for hard in ("7", "9"):                            # then a task of the first third has two pairs of three
        tasks[hard] = tasks[hard]._replace(train=tasks[hard].train * 3)
    assert len(make_data(tasks, "cpu", 4).batch(24, 0, 0).index)
    ahead = make_data(tasks, "cpu", 1)
    gpu.prepare([], ahead, "cuda")                     # draws the next step in advance
    for step in range(80):
        found, expected = (one.draw(24, 0, step)[0] for one in (ahead, make_data(tasks, "cpu", 1)))
        assert np.array_equal(found, expected), step
    ahead.draw.pool.shutdown()
    hardness = [legacy.difficulty(tasks[str(side)]) for side in (2, 3, 4, 5, 7, 9)]
    assert hardness == sorted(hardness)


def test_adam_warms_up_falls_by_a_cosine_to_a_tenth_and_clips():
    model, (adam,), data, cfg = build(steps=76, lr=1e-3, legacy="optimizer=adam")
    rates, p = [], adam.param_groups[0]["params"][0]
    for step in range(76):
        for q in adam.param_groups[0]["params"]:
            q.grad = torch.full_like(q, 7.0)
        adam.step()
        norm = sum(float(q.grad.square().sum()) for q in adam.param_groups[0]["params"]) ** 0.5
        assert norm == pytest.approx(0.5, rel=1e-3)
        rates.append(adam.param_groups[0]["lr"])
    expected = [1e-3 * min(1, (i + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * i / 76)) for i in range(76)]
    assert rates == pytest.approx(expected) and p.grad is not None


# ---- views and the losses that use them -------------------------------------------------------------------


def view_grids():
    """Grids of few colours with a margin, so that objects can move."""
    rng = np.random.default_rng(3)
    sides = rng.integers(2, 8, (40, 2))
    return [np.pad(rng.integers(0, 4, side).astype(np.int8), ((2, 1), (0, 3))) for side in sides]


def drawn(grids):
    """Each grid as an array again, from its tokens; its whole-grid bitmap shows what is not background."""
    bits = np.unpackbits(grids.bits.numpy(), axis=1, count=900).reshape(-1, 30, 30)
    flat = {name: value.flatten(0, 1).numpy() for name, value in grids._asdict().items()
            if name in ("object_id", "colour", "box")}
    found = []
    for first, count in zip(grids.first.tolist(), grids.count.tolist()):
        height, width = flat["box"][first, 2:]
        cells = np.full((height, width), flat["colour"][first])
        for slot in range(first + 1, first + count):
            top, left, h, w = flat["box"][slot]
            shape = bits[flat["object_id"][slot]]
            assert not shape[h:].any() and not shape[:, w:].any()
            part = cells[top:top + h, left:left + w]   # a view; an object outside of the grid does not fit
            part[shape[:h, :w].astype(bool)] = flat["colour"][slot]
        whole = bits[flat["object_id"][first]]
        assert (whole[:height, :width] == (cells != flat["colour"][first])).all() and whole.sum() == (
            cells != flat["colour"][first]).sum()
        found.append(cells)
    return found


def pack(grids):
    return arc_data.TokenTable(grids).pack_grids(np.arange(len(grids)))


def test_turned_grids_are_the_tokens_of_turned_grids():
    grids = view_grids()
    packed = pack(grids)
    assert all(map(np.array_equal, drawn(packed), grids))
    torch.manual_seed(0)
    symmetries = set()
    for before, after in zip(grids, drawn(legacy.turned(packed))):
        fits = [i for i in range(8) if np.array_equal(arc_data.turn(before, i), after)]
        assert fits
        symmetries |= set(fits)
    assert symmetries == set(range(8))


def test_translated_grids_have_all_objects_moved_by_one_offset_and_stay_inside():
    grids, offsets = view_grids(), set()
    torch.manual_seed(0)
    for before, after in zip(grids, drawn(legacy.translated(pack(grids)))):
        background = arc_data.most_common_colour(arc_data.pad([before]))[0]
        old, new = (np.argwhere(grid != background) for grid in (before, after))
        offset = (new - old)[0]
        assert before.shape == after.shape and (new - old == offset).all()
        assert (before[tuple(old.T)] == after[tuple(new.T)]).all()
        offsets.add(tuple(offset.tolist()))
    crowded = np.zeros((20, 20), dtype=np.int8)        # 100 objects, 40 of which have no token
    crowded[::2, ::2] = 1
    for view in (legacy.translated(pack([crowded])), legacy.turned(pack([crowded]))):
        assert int(legacy.images(view)[view.object_id[0, 0]].sum()) == 100
        assert not legacy.images(view)[view.object_id[0, 0], 20:].any()
    empty = pack([np.full((3, 4), 2, dtype=np.int8)])
    assert drawn(legacy.translated(empty))[0].tolist() == drawn(empty)[0].tolist()
    assert {row for row, _ in offsets} >= {-2, -1, 0, 1} and {column for _, column in offsets} >= {0, 1, 2, 3}


def test_masked_grids_lack_some_objects_and_nothing_else():
    packed = pack(view_grids())
    torch.manual_seed(0)
    fewer = legacy.masked(packed)
    hidden = (fewer.grid != packed.grid).flatten()
    kept = len(packed.first)
    assert (fewer.grid.flatten()[hidden] == kept).all() and not hidden[packed.first].any()
    objects = int(packed.count.sum()) - kept
    assert 0.08 < int(hidden.sum()) / objects < 0.22
    assert fewer.count.tolist() == [int((fewer.grid == i).sum()) for i in range(kept)]


@pytest.mark.parametrize("name, view", [("colour", "recoloured"), ("translation", "translated"),
                                        ("symmetry", "turned"), ("masked", "masked")])
def test_an_invariance_is_the_distance_between_a_grid_and_its_view(name, view, monkeypatch):
    model, _, data, cfg = build(objective="sum", code="none", legacy=f"{name}=0.5")
    batch = data.batch(12, 0, 0)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0                               # so that the embeddings of a view are always the same
    model.train()
    z, z_hat, y = model(batch)
    fixed = getattr(legacy, view)(batch.grids)
    monkeypatch.setitem(legacy.VIEWS, name, lambda grids: fixed)
    expected = (model.encoder(fixed)[0] - z).square().mean()
    draws = [lejepa.draw_directions(size, 8, cfg, 0) for size in (TOY.dim, 5)]
    loss, terms = model.objective.compute_loss(model, batch, z, z_hat, y, *draws, cfg.lam)
    assert terms[name].item() == pytest.approx(expected.item(), rel=1e-4) and expected > 0
    others = terms["prediction"] + 0.1 * terms["sigreg_z"]
    assert loss.item() == pytest.approx((others + 0.5 * expected).item(), rel=1e-4)


def test_the_next_frame_of_an_input_is_its_output():
    model, _, data, cfg = build(objective="sum", code="none", legacy="next_frame=1")
    batch = data.batch(12, 0, 0)
    z, z_hat, y = model.train()(batch)
    draws = [lejepa.draw_directions(size, 8, cfg, 0) for size in (TOY.dim, 5)]
    terms = model.objective.compute_loss(model, batch, z, z_hat, y, *draws, cfg.lam)[1]
    pairs = {tuple(sorted(pair)) for row in batch.index.tolist() for pair in zip(row[0::2], row[1::2])}
    assert pairs <= {(2 * i, 2 * i + 1) for i in range(len(z) // 2)}       # what the loss relies on
    errors = [(model.objective.next_frame(z[i]) - z[i + 1]).square().mean().item()
              for i in range(0, len(z), 2)]
    assert terms["next_frame"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_margin_compares_each_error_with_that_against_another_tasks_target():
    model, _, data, cfg = build(objective="broken", legacy="margin=0.05")
    batch = data.batch(24, 0, 0)
    tasks = batch.index[:, -1] // (2 * data.pairs)
    assert (tasks != tasks.roll(len(tasks) // 2)).all()
    with torch.no_grad():
        z, _, y = model.train()(batch)
    z_hat = normal(len(batch.index), TOY.dim)
    draws = [lejepa.draw_directions(size, 8, cfg, 0) for size in (TOY.dim, 5)]
    loss, terms = model.objective.compute_loss(model, batch, z, z_hat, y, *draws, cfg.lam)
    targets = batch.index[:, -1].tolist()
    half = len(targets) // 2
    values = []
    for i, own in enumerate(targets):
        errors = [float((z_hat[i] - z[j]).square().mean()) for j in (own, targets[i - half])]
        values.append(max(0.0, 0.1 + errors[0] - errors[1]))
    expected = sum(values) / len(values)
    assert float(terms["margin"]) == pytest.approx(expected, rel=1e-4) and expected > 0
    plain = (1 - cfg.lam) * terms["prediction"] + cfg.lam * (terms["sigreg_z"] + terms["sigreg_y"])
    assert float(loss) == pytest.approx(float(plain) + 0.05 * expected, rel=1e-4)


def test_scaling_adds_tasks_at_twice_the_size_where_they_fit():
    small, large = (np.arange(side * side).reshape(side, side) % 3 for side in (15, 16))
    tasks = {"small": arc_data.Task([(small, small.T)] * 2, [(small, None)]),
             "large": arc_data.Task([(large, large.T)] * 2, [])}
    make_data, _, _ = legacy.recipe(config(legacy="scaling=yes"))
    plain, scaled = arc_data.TaskSet(tasks), make_data(tasks, "cpu", 2)
    assert len(plain.sizes) == 2 and len(scaled.sizes) == 3
    again = legacy.doubled(tasks["small"]).train[0]
    assert all(np.array_equal(side, np.kron(before, np.ones((2, 2))))
               for side, before in zip(again, tasks["small"].train[0]))


# ---- faults ----------------------------------------------------------------------------------------------


def test_unit_radius_makes_sigreg_a_constant_whatever_the_rank():
    directions = F.normalize(normal(64, 512), dim=0)
    clouds = {rank: F.pad(normal(256, rank), (0, 64 - rank)) for rank in (2, 64)}
    clouds = {rank: F.normalize(x, dim=1) * 8 for rank, x in clouds.items()}
    values = {}
    for unit in ("no", "yes"):
        cfg = config(objective="broken", memory=0, legacy=f"unit={unit}")
        loss = legacy.Broken(lejepa.build(cfg), cfg)
        values[unit] = [float(loss.regularise_embeddings(z, z, directions)) / 128 for z in clouds.values()]
    assert values["yes"] == pytest.approx([0.38, 0.38], abs=0.003)         # 0.3786 where it is isotropic
    assert values["no"][0] > 5 * values["no"][1]


def test_relu_puts_all_embeddings_into_the_positive_orthant():
    grids = [side for task in list(TASKS.values())[:4] for pair in task.train for side in pair]
    for relu in ("no", "yes"):
        model = build(objective="broken", legacy=f"relu={relu}")[0].eval()
        assert (float(model.embed(grids).min()) >= 0) == (relu == "yes")


def test_shapeless_tokens_of_equal_area_are_equal():
    shapes = [np.pad(shape, 1) for shape in ([[1, 1], [1, 0]], [[1, 1, 1]], [[1, 1]])]
    table = arc_data.TokenTable(shapes)
    first, second, third = table.pack_grids(np.arange(3)).object_id.flatten()[[1, 3, 5]]
    for shapeless in ("yes", "no"):
        y = build(objective="broken", legacy=f"shapeless={shapeless}")[0].encoder.objects(
            table.pack_grids(np.arange(3)))
        assert torch.equal(y[first], y[second]) == (shapeless == "yes")
        assert not torch.equal(y[first], y[third])


def test_padding_counts_every_slot_of_a_batch():
    counts = {}
    for padding in ("no", "yes"):
        model, _, data, cfg = build(objective="broken", code="vq", legacy=f"padding={padding}")
        batch = data.batch(12, 0, 0)
        with torch.no_grad():
            model.train()(batch)
        quantizer = model.encoder.quantizer
        counts[padding] = float(((quantizer.members - 0.99) / 0.01).sum())
    assert counts["no"] == pytest.approx(len(batch.grids.bits), rel=1e-2)
    assert counts["yes"] == pytest.approx(batch.grids.object_id.numel(), rel=1e-2)


def test_training_mode_keeps_dropout_and_the_codebook_moving_in_evaluation():
    grids = [side for task in list(TASKS.values())[:4] for pair in task.train for side in pair]
    for fault in ("no", "yes"):
        model = build(objective="broken", code="vq", legacy=f"training_mode={fault}")[0].eval()
        model.embed(grids)
        before = model.averaged.encoder.quantizer.vectors.clone()
        same = torch.equal(model.embed(grids), model.embed(grids))
        moved = not torch.equal(before, model.averaged.encoder.quantizer.vectors)
        assert (same, moved) == ((True, False) if fault == "no" else (False, True))


def test_the_same_grid_stands_at_every_place_of_a_window():
    index = build(legacy="same_grid=yes")[2].batch(12, 0, 0).index
    assert (index == index[:, -1:]).all() and len(index.unique()) > 1


def test_recolouring_changes_colours_grid_by_grid_and_nothing_else():
    plain, fault = (build(legacy=f"recolour={word}")[2].batch(12, 0, 3).grids for word in ("no", "yes"))
    for name, before in plain._asdict().items():
        assert torch.equal(before, getattr(fault, name)) == (name != "colour"), name
    maps = []
    for grid in range(len(plain.first)):
        mine = plain.grid == grid
        pairs = set(zip(plain.colour[mine].tolist(), fault.colour[mine].tolist()))
        assert len(dict(pairs)) == len(pairs) == len({b for _, b in pairs})
        maps.append(pairs)
    together = set().union(*maps)
    assert len(together) > len(dict(together))         # no one permutation explains all grids


def test_faithful_turns_all_faults_on_and_each_can_be_turned_off():
    cfg = config(objective="broken", code="vq", faithful=True, legacy="unit=no")
    found = {name: legacy.setting(cfg, name) for name in legacy.FAULTS}
    assert found == dict.fromkeys(legacy.FAULTS, True) | {"vq_loss": "none", "unit": False}
    clean = {name: legacy.setting(config(), name) for name in legacy.FAULTS}
    assert clean == dict.fromkeys(legacy.FAULTS, False) | {"vq_loss": "used"}


@pytest.mark.parametrize("target", ["averaged", "stopped"])
@pytest.mark.parametrize("margin", [0, 0.5])
def test_a_broken_target_sends_no_gradient_into_the_target(target, margin):
    settings = f"target={target},margin={margin}"
    model, _, data, cfg = build(objective="broken", lam=0.0, code="none", legacy=settings)
    batch = data.batch(12, 0, 0)
    model.predictor.requires_grad_(False)
    z, z_hat, y = model.train()(batch)
    z, z_hat = z.detach().requires_grad_(), z_hat.detach().requires_grad_()
    directions = F.normalize(normal(TOY.dim, 8), dim=0)
    loss, terms = model.objective.compute_loss(model, batch, z, z_hat, y, directions, directions[:5], 0.0)
    loss.backward()
    assert float(z.grad.abs().max()) < 1e-6 and float(z_hat.grad.abs().max()) > 1e-3
    if target == "stopped":
        error = (z_hat - z[batch.index[:, -1]]).square().mean()
        assert float(terms["prediction"]) == pytest.approx(float(error))


# ---- presets and flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", legacy.PRESETS)
def test_every_preset_builds_is_fully_read_and_takes_steps(name, faithful):
    cfg = config(**legacy_of(name), faithful=faithful)
    legacy.check(cfg, cfg.legacy)
    model, optimizers, data, _ = build(**legacy_of(name), faithful=faithful)
    before = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
    terms = steps(2, model, optimizers, data, cfg)[-1]
    assert all(bool(value.isfinite()) for value in terms.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)      # else no exact resume
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[key], value) for key, value in before.items())


def test_what_the_flags_offer_is_what_the_tables_hold():
    own = lejepa.QUANTIZERS | lejepa.OBJECTIVES | lejepa.PREDICTORS
    actions = {action.dest: action.choices for action in harness.run.make_parser()._actions}
    offered = {*actions["code"], *actions["objective"], *actions["context"]}
    assert offered == {*own, *legacy.VARIANTS} - {"legacy", "check", "presets"}


def test_a_preset_gives_defaults_and_flags_go_before_it():
    words = ["--size", "small", "--preset", "gentle", "--lr", "0.002", "--legacy", "commitment=0.2"]
    cfg = harness.run.parse_flags(words)
    assert (cfg.objective, cfg.code, cfg.lr, cfg.weight_decay) == ("sum", "vq", 0.002, 1e-6)
    assert legacy.setting(cfg, "commitment") == 0.2 and legacy.setting(cfg, "refresh") == 3000
    other = harness.run.parse_flags([*words[:4], "--code", "gumbel", "--legacy", "optimizer=muon"])
    assert (other.code, legacy.setting(other, "optimizer")) == ("gumbel", "muon")


UNREAD = [("--legacy commitment=0.3", "commitment"), ("--code vq --legacy threshold=0.1", "threshold"),
          ("--legacy temperature=0.1", "temperature"), ("--legacy unit=yes", "unit"),
          ("--objective infonce --legacy coldest=0.1", "coldest"), ("--legacy min_delta=1", "min_delta"),
          ("--objective sum --legacy normalised=yes", "normalised"), ("--legacy clip=1", "clip"),
          ("--objective sum --legacy target=stopped", "target"), ("--legacy padding=yes", "padding"),
          ("--objective sum --memory 5", "--memory"), ("--objective sum --code vq --lam 0.2", "--lam 0.2"),
          ("--code vq --lam 0", "--lam 0"), ("--legacy nothing=1", "nothing"), ("--legacy unit", "unit"),
          ("--preset seventh", "seventh"), ("--code vq --legacy size=512", "size"),
          ("--legacy patience=-1", "-1"),
          ("--code vq --legacy commitment=nan", "nan"), ("--legacy curriculum=maybe", "maybe")]


@pytest.mark.parametrize("flags, said", UNREAD)
def test_a_setting_that_nothing_reads_gets_one_line_and_status_2(capsys, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, monkeypatch, "--size", "small", *flags.split())
    assert not list(tmp_path.iterdir())


def test_every_setting_has_one_reader_and_a_default_that_its_own_parser_takes():
    for name, default in legacy.DEFAULTS.items():
        word = default[0] if isinstance(default, tuple) else default
        assert legacy.parse(f"{name}={word}") == {name: word}, name
    assert sum(map(len, legacy.SETTINGS.values())) == len(legacy.DEFAULTS)
    assert set(legacy.FAULTS) <= legacy.DEFAULTS.keys()


# ---- runs ------------------------------------------------------------------------------------------------

STATEFUL = [("--preset", "sixth", "--faithful", "--legacy", "refresh=1500,threshold=1,balance=gradnorm"),
            ("--preset", "gumbel", "--legacy", "target=averaged,curriculum=yes,margin=0.1,scaling=yes"),
            ("--preset", "no-vq", "--legacy", "masked=0.1,next_frame=0.1,balance=uncertainty")]


@pytest.mark.parametrize("flags", STATEFUL)
def test_a_resumed_run_of_a_preset_equals_the_uninterrupted_one_bit_for_bit(go, tmp_path, flags):
    go(tmp_path / "whole", *flags)
    go(tmp_path / "run", *flags, status=130, changes=[partial(at, 7, stop)])
    go(tmp_path / "run", *flags, "--resume")
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_early_stopping_ends_the_run_with_its_best_weights(go, tmp_path):
    flags = "--legacy", "patience=40,min_delta=1000"   # no loss is better than the first by so much
    said = go(tmp_path / "run", *flags, steps=40)
    rows = [row for row in harness.run.checkpoint.read_log(tmp_path / "run") if "validation_loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28] and "nDCG" in said
    assert lejepa.read_checkpoint(tmp_path / "run")[1]["step"] == 4
    assert harness.run.checkpoint.read_json(tmp_path / "run" / "result.json")["best_step"] == 4


@pytest.mark.slow
@pytest.mark.whole
def test_the_autopsy_runs_what_is_missing_and_writes_a_table_and_a_plot_an_experiment(
        go, tmp_path, monkeypatch, capsys):
    toy_run, out, taken = tmp_path / "toy", tmp_path / "autopsy", []
    go(toy_run, steps=2, evaluates=True)

    def run(flags, folder):
        taken.append((folder.name, flags))
        harness.run.parse_flags([*flags, "--run", str(folder), "--size", "small"])     # which refuses nothing
        shutil.copytree(toy_run, folder)
        config = json.loads((folder / "config.json").read_text())
        config["command"] = " ".join(["python lejepa.py", *flags, "--run", str(folder)])
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(autopsy, "run", run)
    words = ["--out", str(out), "--steps", "2", "--seeds", "2", "--batch-size", "12"]
    autopsy.main(words)
    assert len({name for name, _ in taken}) == len(taken) and ("default-1", "--batch-size") == (
        taken[1][0], taken[1][1][2])
    page = (out / "autopsy.md").read_text()
    for number, (title, runs) in autopsy.EXPERIMENTS.items():
        assert f"## {number}. {title}" in page and (out / f"experiment{number}.png").stat().st_size > 10_000
        assert all(f"| {name} (2 seeds) |" in page for name in runs)
    first = len(taken)
    shutil.rmtree(out / "infonce-1")
    autopsy.main([*words, "--only", "6"])
    assert [name for name, _ in taken[first:]] == ["infonce-1"]
    for wrong, said in ((["--lam", "0.1"], "other flags"), (["--seed=3"], "--seed would be overwritten"),
                        (["--step", "2"], "other flags")):         # no flag is guessed from a part of its name
        with pytest.raises(ValueError, match=said):
            autopsy.main([*words, *wrong])


def test_runs_of_the_autopsy_with_one_name_have_one_set_of_flags_and_its_faults_are_those_of_legacy():
    named = {}
    for _, runs in autopsy.EXPERIMENTS.values():
        for name, flags in runs.items():
            assert named.setdefault(name, flags) == flags
    assert len(set(named.values())) == len(named) and set(autopsy.FAULTS) == set(legacy.FAULTS)


def test_presets_differ_from_each_other_and_scale_by_their_own_epochs():
    texts = [str(preset) for preset in legacy.VARIANTS["presets"].values()]
    assert len(set(texts)) == len(texts)
    cfgs = {epochs: config(steps=950, legacy=f"epochs={epochs}") for epochs in (20, 80)}
    warm = {epochs: legacy.RecordedAdam(torch.nn.Linear(2, 2), cfg).warmup for epochs, cfg in cfgs.items()}
    assert warm == {20: 500, 80: 125}                  # 1000 of their 1900 and 7600 steps


@pytest.mark.parametrize("flags, said", [
    ("--legacy epochs=0", "epochs takes a number from 1e-06 to"),
    ("--objective sum --legacy temperature=0", "temperature takes a number from 1e-06 to"),
    ("--objective sum --legacy relational=1e9", "relational takes a number from 0 to"),
    ("--code vq --legacy decay=5", "decay takes a number from 0 to 1"),
    ("--objective sum --legacy coldest=0.5,warmest=0.2", "coldest: it is above warmest"),
    ("--faithful", "--faithful would be ignored by --objective lejepa"),
    ("--objective broken --legacy unit=yes", "needs --memory 0"),
    ("--objective broken --memory -1", "--memory -1: needs 0"),
    ("--code vq --lam 0", "--code vq")])
def test_what_would_be_ignored_or_cannot_be_is_refused_in_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        harness.run.parse_flags(flags.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["relu", "shapeless"])
def test_an_averaged_target_has_the_faults_of_its_encoder(fault):
    model, *_ = build(objective="broken", memory=0, legacy=f"target=averaged,{fault}=yes")
    target = model.objective.average.target
    if fault == "relu":
        assert isinstance(target.projector[-1], torch.nn.ReLU)
    else:
        assert target.objects.mlp._forward_pre_hooks


def test_a_quantizer_that_cannot_leave_training_mode_does_not_follow_the_average(monkeypatch):
    model, *others = build(objective="sum", code="vq", legacy="training_mode=yes")
    steps(1, model, *others)
    assert not model.objective.infonce.target.quantizer.training
    assert model.averaged.encoder.quantizer.started    # evaluation does not begin the codebook anew


@pytest.mark.slow
@pytest.mark.whole
def test_the_autopsy_takes_2_steps_of_a_preset_by_the_command_and_says_where_one_fails(task_folder, tmp_path):
    flags = ["--preset", "gentle", "--faithful", "--data", str(task_folder), "--batch-size", "12",
             "--size", "small", "--device", "cpu", "--steps", "2"]
    autopsy.run(flags, tmp_path / "run")
    result = harness.run.checkpoint.read_json(tmp_path / "run" / "result.json")
    assert result["steps"] == 2 and result["codes_usage"] is not None
    with pytest.raises(RuntimeError, match="run ended early"):
        autopsy.run(["--steps", "0"], tmp_path / "run")


@pytest.mark.whole
def test_without_legacy_py_the_default_run_is_unchanged_and_its_names_are_refused(task_folder, tmp_path):
    for name in ("lejepa.py", "arc_data.py", "eval.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "harness", tmp_path / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""
import sys, lejepa, harness.run
lejepa.SIZES["small"] = lejepa.Size{tuple(TOY)}
for flags in ("", "--objective infonce", "--objective relational", "--code ema", "--code none"):
    cfg = harness.run.parse_flags(["--size", "small", *flags.split()])
    lejepa.build(cfg)
    lejepa.RECIPES["method"](cfg)
assert "legacy" not in sys.modules
harness.run.parse_flags(["--preset", "gentle"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": "", "PYTHONPATH": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "legacy.py" in done.stderr, done.stderr


