"""The two examples: end to end on their embedded data, their shapes, their metric, and resume."""
import json
import math

import numpy as np
import pytest
import torch

from examples import images, retrieval


def run(example, folder, *flags):
    example.main(["--run", str(folder), *flags])
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    return folder, run(retrieval, folder, "--steps", "4", "--batch-size", "64", "--export", str(folder / "out.npz"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return folder, run(images, folder, "--steps", "4", "--batch-size", "16", "--probe-images", "400")


def beir(folder, query="what is a cat", judged="d0"):
    """A BEIR folder of three documents and one query, with given flaws."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(("cat", "dog", "cow"))]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": query}))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{judged}\t1\n")
    return str(folder)


def test_retrieval_runs_end_to_end_and_leaves_a_result_and_a_picture(retrieved):
    folder, result = retrieved
    assert (folder / "result.png").stat().st_size > 1000
    assert result["history"][-1]["step"] == 4
    for metric in ("ndcg10", "recall100", "mrr"):
        row = result[f"test_{metric}"]
        assert row["interval"][0] <= row["model"] - row["plain"] <= row["interval"][1]


def test_an_untrained_residual_model_ranks_as_plain_cosine():
    args = retrieval_args()
    queries, documents = torch.randn(5, 8), torch.randn(7, 8)
    frozen, learned = (retrieval.Model(8, args).embed(queries, documents, mix) for mix in (0.0, 1.0))
    torch.testing.assert_close(frozen[0] @ frozen[1].T, learned[0] @ learned[1].T)


def retrieval_args(**changes):
    values = {key: flag[0] for key, flag in retrieval.FLAGS.items()} | changes
    return type("Args", (), values)


def test_the_encoder_stays_frozen(retrieved):
    folder, _ = retrieved
    before = retrieval.load(retrieval_args())[0]["docs"]
    with np.load(folder / "out.npz") as file:
        exported = file["docs"][:, :before.shape[1]]
    np.testing.assert_allclose(exported, before.numpy() / math.sqrt(before.shape[1]) * math.sqrt(0.5), atol=1e-6)


def test_ndcg_equals_a_case_worked_by_hand():
    documents = torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, 1.0], [0.0, 1.0]])
    x = {"queries": torch.tensor([[1.0, 0.0]]), "docs": documents}
    judgements = {"test": {"q": {"b": 2, "c": 1, "d": 1}}}                 # the ranking is a b c d, the grades 0 2 1 1
    data = x, {"queries": ["q"], "docs": ["a", "b", "c", "d"]}, judgements
    found = retrieval.evaluate(retrieval.Model(2, retrieval_args()), data, "test", 0.0)
    gained = 2 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(5)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg10"] == pytest.approx([gained / ideal])
    assert found["mrr"] == pytest.approx([1 / 2])


@pytest.mark.parametrize("flaw, message", [
    ({"query": " "}, "queries.jsonl, line 1"), ({"judged": "d9"}, "unknown query or document")])
def test_bad_input_gets_one_line_and_status_2(tmp_path, capsys, flaw, message):
    with pytest.raises(SystemExit) as status:
        retrieval.main(["--run", str(tmp_path / "run"), "--data", beir(tmp_path / "data", **flaw)])
    assert status.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_embeddings_without_an_id_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "e.npz", doc_ids=["d0", "d1"], docs=np.eye(2), query_ids=["q"], queries=np.ones((1, 2)))
    flags = ["--data", beir(tmp_path / "data"), "--embeddings", str(tmp_path / "e.npz"), "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as status:
        retrieval.main(flags)
    assert status.value.code == 2
    assert "'d2'" in capsys.readouterr().err


def stop_at(monkeypatch, example, step):
    """Lets an example fail when it computes the losses for the given time."""
    real, calls = example.losses, []

    def losses(*given):
        calls.append(0)
        if len(calls) > step:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(example, "losses", losses)
    return lambda: monkeypatch.setattr(example, "losses", real)


@pytest.mark.parametrize("example, whole, flags", [
    (retrieval, "retrieved", ["--steps", "4", "--batch-size", "64"]),
    (images, "seen", ["--steps", "4", "--batch-size", "16", "--probe-images", "400"])])
def test_a_resumed_run_equals_the_uninterrupted_one(example, whole, flags, tmp_path, monkeypatch, request):
    settings = ["--run", str(tmp_path), *flags]
    restore = stop_at(monkeypatch, example, 2)
    with pytest.raises(KeyboardInterrupt):
        example.main(settings)
    restore()
    example.main([*settings, "--resume"])
    wanted = request.getfixturevalue(whole)[1]["history"]
    assert json.loads((tmp_path / "result.json").read_text())["history"] == wanted


def test_a_finished_folder_is_not_overwritten(seen, capsys):
    with pytest.raises(SystemExit) as status:
        images.main(["--run", str(seen[0])])
    assert status.value.code == 2
    assert "--resume" in capsys.readouterr().err


def test_images_run_end_to_end_and_leave_a_result_and_a_picture(seen):
    folder, result = seen
    assert (folder / "result.png").stat().st_size > 1000
    assert 0.1 < result["knn"] <= 1 and 0.1 < result["linear"] <= 1
    assert 1 <= result["history"][-1]["rank"] <= images.WIDE


def test_the_pyramid_has_cells_of_8_4_and_2():
    tokens, levels = images.Network(64, 1, 3, 10)(torch.zeros(2, 3, 32, 32))
    assert tokens.shape == (2, 64, 8, 8)
    assert [tuple(level.shape) for level in levels] == [(2, 128, 8, 8), (2, 128, 4, 4), (2, 128, 2, 2)]


def test_masks_are_unions_of_four_blocks_and_leave_a_context():
    torch.manual_seed(0)
    masks = images.block_masks(500)
    assert masks.shape == (500, 8, 8) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2))
    assert share.min() >= 0.1 and share.max() < 1
    alone = 1 - (1 - (0.15 + 0.4) / 2) ** 4                # four blocks that overlap as if independent
    assert abs(share.mean() - alone) < 0.12


def test_masked_pixels_do_not_reach_the_embedding():
    torch.manual_seed(0)
    net, x = images.Network(64, 1, 1, 10).eval(), torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    changed = x.clone()
    changed[..., 13:18, 13:18] += 1                        # three convolutions reach one cell further
    torch.testing.assert_close(net(x, mask)[0], net(changed, mask)[0])
