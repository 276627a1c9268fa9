"""The two examples: end to end on their embedded data, their shapes, their metric, resume and bad input."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples import images, retrieval

SHORT = {retrieval: ["--steps", "4", "--batch-size", "64"], images: ["--steps", "4", "--batch-size", "16"]}


def run(example, folder, *flags):
    example.main(["--run", str(folder), *SHORT[example], *flags])
    return json.loads((folder / "result.json").read_text())


def flags_of(example, **changes):
    return SimpleNamespace(**{key: value for key, (value, *_) in example.FLAGS.items()} | changes)


def leaves(state):
    """The tensors and values in nested lists and dicts."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for part in state:
            yield from leaves(part)
    else:
        yield state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{example: (folder, result)} of one short run each, the first with an export."""
    folders = {example: tmp_path_factory.mktemp("example") / "run" for example in SHORT}
    export = folders[retrieval].parent / "out.npz"
    return {retrieval: (folders[retrieval], run(retrieval, folders[retrieval], "--export", str(export))),
            images: (folders[images], run(images, folders[images]))}


@pytest.fixture
def refused(capsys):
    """The one line with which an example refuses its flags."""
    def refused(example, *flags):
        with pytest.raises(SystemExit) as status:
            example.main(list(map(str, flags)))
        assert status.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
        assert len(lines) == 1
        return lines[0]
    return refused


# ---- the runs --------------------------------------------------------------------------------------------

@pytest.mark.whole
@pytest.mark.parametrize("example", SHORT)
def test_a_run_needs_no_download_and_leaves_a_result_and_a_picture(whole, example):
    folder, result = whole[example]
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in result["history"]] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in result["history"] for value in row.values())


@pytest.mark.whole
def test_results_lie_in_their_ranges(whole):
    found = whole[retrieval][1]
    for metric in ("ndcg10", "recall100", "mrr"):
        assert 0 < found[metric]["plain"] <= 1
        low, high = found[metric]["interval"]
        assert low <= found[metric]["model"] - found[metric]["plain"] <= high
    assert 0.1 < whole[images][1]["knn"] <= 1 and 0.5 < whole[images][1]["linear"] <= 1


@pytest.mark.whole
@pytest.mark.parametrize("example", SHORT)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, example, tmp_path, monkeypatch):
    real, calls = example.compute_loss, []

    def fails_at_the_third_step(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)
    monkeypatch.setattr(example, "compute_loss", fails_at_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        run(example, tmp_path / "run")
    found = run(example, tmp_path / "run", "--resume")
    folder, wanted = whole[example]
    assert len(calls) == 5                             # 2 steps, the one that failed, 2 steps
    assert found["history"] == wanted["history"]
    ours, theirs = (list(leaves(torch.load(path / "last.pt", weights_only=True)))
                    for path in (tmp_path / "run", folder))
    assert len(ours) == len(theirs) > 20
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs))


@pytest.mark.whole
@pytest.mark.parametrize("flags", [["--task", "masks"], ["--target", "ema"], ["--method", "supervised"],
                                   ["--task", "masks", "--target", "ema", "--levels", "1"]])
def test_the_variants_of_images_train(flags, tmp_path):
    result = run(images, tmp_path / "run", "--steps", "2", *flags)
    assert all(math.isfinite(value) for value in result["history"][-1].values())


@pytest.mark.whole
def test_the_recorded_variants_of_retrieval_train(tmp_path):
    flags = ["--spread", "covariance", "--contrastive", "0.05", "--lam", "0.5", "--asymmetric", "--mix", "1",
             "--hidden", "32", "--width", "16", "--projection", "plain", "--predictor", "plain"]
    assert math.isfinite(run(retrieval, tmp_path / "run", *flags)["history"][-1]["loss"])


# ---- bad input -------------------------------------------------------------------------------------------

@pytest.mark.whole
@pytest.mark.parametrize("example", SHORT)
def test_a_record_is_not_overwritten_and_not_continued_with_other_flags(whole, example, refused):
    folder = whole[example][0]
    before = (folder / "result.json").read_bytes()
    assert "--resume" in refused(example, "--run", folder, *SHORT[example])
    assert "--resume" in refused(example, "--run", folder, "--resume", *SHORT[example], "--seed", 1)
    assert (folder / "result.json").read_bytes() == before


def beir(folder, query="what is a cat", judged="d0", corpus=None):
    """A BEIR folder of three documents and one query."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(("cat", "dog", "cow"))]
    (folder / "corpus.jsonl").write_text(corpus or "\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": query}))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{judged}\t1\n")
    return folder


@pytest.mark.parametrize("flaw, message", [
    ({"query": " "}, "queries.jsonl, line 1: _id or text is missing"),
    ({"judged": "d9"}, "test.tsv, line 2: unknown query or document"),
    ({"corpus": '{"text": "cat"}'}, "corpus.jsonl, line 1: _id is missing"),
    ({"corpus": "cat"}, "Expecting value"), ({"corpus": "[]"}, "list"), ({}, "--pairs")])
def test_a_malformed_beir_folder_gets_one_line(tmp_path, refused, flaw, message):
    embeddings = tmp_path / "e.npz"
    np.savez(embeddings, doc_ids=["d0", "d1", "d2"], docs=np.eye(3), query_ids=["q"], queries=np.ones((1, 3)))
    flags = "--data", beir(tmp_path / "data", **flaw), "--embeddings", embeddings, "--run", tmp_path / "run"
    assert message in refused(retrieval, *flags)
    assert not (tmp_path / "run").exists()


def test_embeddings_without_an_id_or_that_are_no_file_of_arrays_get_one_line(tmp_path, refused):
    flags = ["--data", beir(tmp_path / "data"), "--run", tmp_path / "run", "--embeddings", tmp_path / "e.npz"]
    np.savez(flags[-1], doc_ids=["d0", "d1"], docs=np.eye(2), query_ids=["q"], queries=np.ones((1, 2)))
    assert "doc_ids lacks 1 ids, first 'd2'" in refused(retrieval, *flags)
    flags[-1].write_bytes(b"PK\x03\x04 no archive")
    assert "--data" in refused(retrieval, *flags)


def test_images_that_are_not_there_get_one_line(tmp_path, refused):
    assert "CLASS/*.png" in refused(images, "--data", tmp_path, "--run", tmp_path / "run")
    flags = "--method", "vicreg", "--task", "masks", "--run", tmp_path / "run"
    assert "--method lejepa" in refused(images, *flags)


# ---- retrieval -------------------------------------------------------------------------------------------

def test_ndcg_equals_a_case_worked_by_hand():
    documents = torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, 1.0], [0.0, 1.0]])
    x = {"queries": torch.tensor([[1.0, 0.0]]), "docs": documents}
    judgements = {"test": {"q": {"b": 2, "c": 1, "d": 1}}}     # the ranking is a b c d, with grades 0 2 1 1
    data = x, {"queries": ["q"], "docs": ["a", "b", "c", "d"]}, judgements
    found = retrieval.evaluate(retrieval.Model(2, flags_of(retrieval)), data, "test", 0.0)
    gained = 2 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg10"] == pytest.approx([gained / ideal])
    assert found["mrr"] == pytest.approx([1 / 2])
    assert found["recall100"] == pytest.approx([1])


def test_equal_documents_rank_in_the_order_of_the_corpus():
    x = {"queries": torch.ones(1, 2), "docs": torch.ones(3, 2)}
    model = retrieval.Model(2, flags_of(retrieval))
    for relevant, rank in (("z", 1), ("a", 2), ("m", 3)):
        data = x, {"queries": ["q"], "docs": ["z", "a", "m"]}, {"test": {"q": {relevant: 1}}}
        assert retrieval.evaluate(model, data, "test", 0.5)["mrr"] == pytest.approx([1 / rank])


@pytest.mark.parametrize("changes", [{}, {"hidden": 4}, {"asymmetric": True}, {"predictor": "none"}])
def test_an_untrained_model_ranks_as_plain_cosine(changes):
    model = retrieval.Model(8, flags_of(retrieval, **changes))
    queries, documents = torch.randn(5, 8), torch.randn(7, 8)
    frozen, learned = (model.embed(queries, documents, mix) for mix in (0.0, 1.0))
    torch.testing.assert_close(frozen[0] @ frozen[1].T, learned[0] @ learned[1].T)


@pytest.mark.whole
def test_the_encoder_stays_frozen(whole):
    """The first half of what is exported is the encoder's embedding, untouched by training."""
    before = retrieval.load(flags_of(retrieval))[0]["docs"].numpy()
    with np.load(whole[retrieval][0].parent / "out.npz") as file:
        exported = file["docs"][:, :before.shape[1]]
    np.testing.assert_allclose(exported, before / math.sqrt(before.shape[1]) * math.sqrt(0.5), atol=1e-6)


def test_modules_of_the_docstrings_are_held_out_and_a_query_is_not_its_document():
    texts, judgements = retrieval.read_docstrings()
    assert all(len(judged) > 100 for judged in judgements.values())
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        found = [{texts["docs"][name] for name in judgements[split]} for split in (first, second)]
        assert not found[0] & found[1]


# ---- images ----------------------------------------------------------------------------------------------

def test_the_pyramid_has_cells_of_8_4_and_2():
    tokens, levels = images.Network(64, 1, 3, 10)(torch.zeros(2, 3, 32, 32))
    assert tokens.shape == (2, 64, 8, 8)
    assert [tuple(level.shape) for level in levels] == [(2, 128, 8, 8), (2, 128, 4, 4), (2, 128, 2, 2)]
    z = images.embed(images.Network(64, 1, 3, 10).heads, levels, 2)
    assert [tuple(level.shape) for level in z] == [(64, 2, 64), (16, 2, 64), (4, 2, 64)]


def test_a_coarse_level_reaches_the_finer_one():
    torch.manual_seed(0)
    net, x = images.Network(64, 1, 2, 10).eval(), torch.randn(1, 3, 32, 32)
    before = net(x)[1][0]
    net.laterals[1][1].bias.data += 1
    torch.testing.assert_close(net(x)[1][0], before + 1)


def test_masks_are_unions_of_four_blocks_and_leave_a_context():
    torch.manual_seed(0)
    masks = images.block_masks(500)
    assert masks.shape == (500, 8, 8) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2))
    assert share.min() >= 0.1 and share.max() < 1
    alone = 1 - (1 - (0.15 + 0.4) / 2) ** 4            # the share of four blocks that lie independently
    assert abs(share.mean() - alone) < 0.12


def test_masked_pixels_do_not_reach_the_embedding():
    torch.manual_seed(0)
    net, x = images.Network(64, 1, 1, 10).eval(), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    inside, outside = x.clone(), x.clone()
    inside[..., 13:18, 13:18] += 1                     # the stem reaches one cell further
    outside[..., :4, :4] += 1
    torch.testing.assert_close(net(x, mask)[0], net(inside, mask)[0])
    assert not torch.equal(net(x, mask)[0], net(outside, mask)[0])


def test_an_averaged_target_takes_no_gradient():
    torch.manual_seed(0)
    net, target = images.Network(64, 1, 1, 10), images.Network(64, 1, 1, 10).requires_grad_(False)
    x, y = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    for task in ("crops", "masks"):
        images.compute_loss(net, target, x, y, flags_of(images, task=task))["loss"].backward()
        assert all(parameter.grad is None for parameter in target.parameters())


# ---- the page --------------------------------------------------------------------------------------------

PAGE = Path(retrieval.__file__).with_name("README.md")
ROWS = [json.loads(line) for line in (PAGE.parent / "runs" / "runs.jsonl").read_text().splitlines()]


def page_rows(heading):
    """The cells of each row of the table of the page whose first heading is given."""
    lines = PAGE.read_text().split(f"\n| {heading} |", 1)[1].splitlines()[2:]
    lines = lines[:next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def span(values):
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def runs_of(name):
    return [row for row in ROWS if row["run"].rsplit("-", 1)[0] == name]


SETS = ["scifact", "nfcorpus", "scifact-pairs", "nfcorpus-pairs"]


def test_the_table_of_differences_equals_the_records():
    for name, (_, plain, *seeds) in zip(SETS, page_rows("trained on, test set"), strict=True):
        records = [row["ndcg10"] for row in runs_of(f"{name}-sigreg-residual")]
        assert {plain} == {f"{row['plain']:.4f}" for row in records}
        assert seeds == ["{:.4f}, {:+.4f} [{:+.4f}, {:+.4f}]".format(
            row["model"], row["model"] - row["plain"], *row["interval"]) for row in records]


def test_the_table_of_ablations_equals_the_records():
    spreads = {"SIGReg": "sigreg", "covariance": "covariance", "nothing": "none"}
    for spread, predictor, *cells in page_rows("against collapse"):
        kind = {"yes": "residual", "no": "none"}[predictor]
        found = [runs_of(f"{name}-{spreads[spread]}-{kind}") for name in SETS]
        assert all(len(rows) == 3 for rows in found)
        assert cells == [span([row["ndcg10"]["model"] for row in rows]) for rows in found]


def test_a_kept_result_equals_its_row():
    kept = sorted((PAGE.parent / "runs").glob("*/result.json"))
    assert kept
    for path in kept:
        result, row = json.loads(path.read_text()), next(row for row in ROWS if row["run"] == path.parent.name)
        assert all(result[key] == row[key] for key in result if key != "history")
        assert (path.parent / "result.png").exists()


IMAGES = {"digits": ["untrained", "levels3", "levels1", "ema", "masks", "vicreg", "supervised"],
          "cifar10": ["untrained", "levels3", "levels1", "vicreg", "supervised", "long"]}


@pytest.mark.parametrize("data", IMAGES)
def test_the_tables_of_images_equal_the_records(data):
    for (_, *cells), name in zip(page_rows(data), IMAGES[data], strict=True):
        records = [[row[figure] for row in runs_of(f"{data}-{name}")] for figure in ("linear", "knn")]
        assert cells == [span(values) if len(values) > 1 else f"{values[0]:.4f}" for values in records]
