"""LeJEPA for retrieval: a predictor from the embedding of a query to the embedding of a relevant document.
A frozen sentence encoder embeds texts. A projection and a predictor, the identity at the start, are trained
on (query, relevant document) pairs; the untrained model ranks exactly as the encoder's cosine does.

    loss = (1 - lam) * mean |predictor(z_q) - z_d|^2 / D  +  lam * SIGReg(z),   gradients flow into both sides
    B pairs in a batch   Q queries   N documents   P pairs   E width of the encoder   D width of z
"""
import argparse
import importlib
import inspect
import json
import sys
import time
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytrec_eval
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lejepa import sigreg  # noqa: E402

FLAGS = {"data": ("docstrings", "docstrings of this machine's libraries, or a BEIR folder"),
         "encoder": ("lsa", "lsa: TF-IDF and truncated SVD; or a sentence-transformers model"),
         "embeddings": ("", "instead of an encoder: an .npz of doc_ids, docs, query_ids, queries"),
         "pairs": ("", "train on pairs.jsonl of this folder; with --embeddings, also reads its minilm.npz"),
         "export": ("", "write what is compared to FILE.npz, for --embeddings, or to the index FILE.faiss"),
         "run": ("examples/runs/retrieval", "folder"), "resume": (False, "continue the run in --run"),
         "mix": (0.5, "share of the learned cosine in a score"), "lam": (0.05, "weight of the spread"),
         "spread": ("sigreg", "the term against collapse", ("sigreg", "covariance", "none")),
         "projection": ("residual", "residual starts as the identity", ("residual", "plain")),
         "predictor": ("residual", "from z_q to z_d", ("residual", "plain", "none")),
         "asymmetric": (False, "two projections"), "contrastive": (0.0, "weight of a margin loss"),
         "width": (0, "D; 0: E"), "hidden": (0, "of MLPs; 0: linear"), "dropout": (0.3, "of embeddings"),
         "steps": (60, ""), "batch_size": (256, "pairs"), "lr": (1e-3, "falls to 0"), "seed": (0, "")}
MODULES = """numpy numpy.fft numpy.random scipy.fft scipy.linalg scipy.optimize scipy.sparse torch
    sklearn.ensemble | scipy.signal torch.nn.functional | numpy.linalg scipy.stats sklearn.metrics torch.nn"""

def docstrings() -> tuple[dict, dict]:
    """Texts by kind and id, judgements by split: a docstring's summary is a query, its rest a document."""
    texts, judgements = {"docs": {}, "queries": {}}, {"train": {}, "dev": {}, "test": {}}
    for split, modules in zip(judgements, MODULES.split("|")):
        for module in modules.split():
            for name, value in sorted(vars(importlib.import_module(module)).items()):
                summary, _, rest = (callable(value) and inspect.getdoc(value) or "").partition("\n\n")
                if len(summary) >= 20 and len(rest) >= 200 and rest not in texts["docs"].values():
                    key = f"{module}.{name}"
                    texts["queries"][key], texts["docs"][key] = summary, rest
                    judgements[split][key] = {key: 1}
    return texts, judgements

def read_lines(path: Path, *needed: str) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if not all(str(row.get(key, "")).strip() for key in needed):
            raise ValueError(f"{path}, line {number}: {' or '.join(needed)} is missing or empty")
    return rows

def read_beir(folder: Path) -> tuple[dict, dict]:
    """As docstrings(). Without qrels/dev.tsv, a fifth of the training queries, by document, is for dev."""
    corpus = read_lines(folder / "corpus.jsonl", "_id", "text")
    documents = {row["_id"]: f"{row.get('title', '')} {row['text']}" for row in corpus}
    queries = {row["_id"]: row["text"] for row in read_lines(folder / "queries.jsonl", "_id", "text")}
    judgements = {"train": {}, "dev": {}, "test": {}}
    for path in (folder / "qrels").glob("*.tsv"):
        for number, line in enumerate(path.read_text().splitlines()[1:], 2):
            query, document, grade = (line.split("\t") + ["", ""])[:3]
            if query not in queries or document not in documents or not grade.isdigit():
                raise ValueError(f"{path}, line {number}: unknown query or document, or no grade: {line!r}")
            if int(grade):
                judgements[path.stem].setdefault(query, {})[document] = int(grade)
    tested = {queries[q].lower() for q in judgements["test"]}        # a few texts are in train and in test
    train = {q: found for q, found in judgements["train"].items() if queries[q].lower() not in tested}
    dev = judgements["dev"] or {q: train[q] for q in train if zlib.crc32(min(train[q]).encode()) % 5 == 0}
    judgements |= {"train": {q: train[q] for q in train if q not in dev}, "dev": dev}
    return {"docs": documents, "queries": queries}, judgements

def encode(texts: dict[str, dict], args) -> dict[str, np.ndarray]:
    if not args.embeddings and args.encoder == "lsa":
        tf_idf = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        lsa = make_pipeline(tf_idf, TruncatedSVD(256, random_state=0)).fit(texts["docs"].values())
        return {kind: lsa.transform(found.values()) for kind, found in texts.items()}
    if not args.embeddings:
        from sentence_transformers import SentenceTransformer
        return {kind: SentenceTransformer(args.encoder).encode([*y.values()]) for kind, y in texts.items()}
    x, file = {}, np.load(args.embeddings)
    for kind, key in (("docs", "doc_ids"), ("queries", "query_ids")):
        place = {text: row for row, text in enumerate(file[key].tolist())}
        missing = [text for text in texts[kind] if text not in place]
        if missing:
            raise ValueError(f"{args.embeddings}: {key} lacks {len(missing)} ids, first {missing[0]!r}")
        x[kind] = file[kind][[place[text] for text in texts[kind]]]
    pairs = np.load(Path(args.pairs, "minilm.npz")) if args.pairs else {}
    return x | {f"pair_{kind}": pairs[kind] for kind in pairs}

def load(args) -> tuple[dict, dict, dict, Tensor, Tensor]:
    """Embeddings of length sqrt(E), ids, judgements, training pairs as rows (P, 2), their weights (P,)."""
    texts, judgements = docstrings() if args.data == "docstrings" else read_beir(Path(args.data))
    place = {kind: {key: row for row, key in enumerate(found)} for kind, found in texts.items()}
    train = {place["queries"][q]: [place["docs"][d] for d in docs] for q, docs in judgements["train"].items()}
    if args.pairs:
        rows = read_lines(Path(args.pairs, "pairs.jsonl"), "query", "document")
        texts["pair_docs"] = {i: row["document"] for i, row in enumerate(rows)}
        texts["pair_queries"] = {i: row["query"] for i, row in enumerate(rows)}
        train = {i: [i] for i in range(len(rows))}
    x = {kind: torch.tensor(np.asarray(found, np.float32)) for kind, found in encode(texts, args).items()}
    x = {kind: F.normalize(found, dim=1) * found.shape[1] ** 0.5 for kind, found in x.items()}
    if not train or not judgements["test"] or args.pairs and len(x["pair_docs"]) != len(rows):
        raise ValueError("needs qrels/test.tsv, and qrels/train.tsv or --pairs with an embedding a line")
    pairs = torch.tensor([(query, document) for query, found in train.items() for document in found])
    weights = torch.tensor([len(found) ** -0.5 for found in train.values() for _ in found])
    x = {"pair_docs": x["docs"], "pair_queries": x["queries"]} | x
    return x, {kind: list(found) for kind, found in place.items()}, judgements, pairs, weights

def layers(inputs: int, outputs: int, hidden: int, zero: bool) -> nn.Module:
    """A linear layer, or an MLP where `hidden` is given; its output is 0 at the start if `zero`."""
    last = nn.Linear(hidden or inputs, outputs)
    for parameter in last.parameters():
        parameter.data *= not zero
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), last) if hidden else last

class Model(nn.Module):
    def __init__(self, inputs: int, args):
        super().__init__()
        width, residual, self.kind = args.width or inputs, args.projection == "residual", args.predictor
        self.document = layers(inputs, width, args.hidden, residual)
        self.query = layers(inputs, width, args.hidden, residual) if args.asymmetric else self.document
        self.register_buffer("identity", torch.eye(inputs, width) * residual)    # cut, or padded by zeros
        self.predictor = layers(width, width, args.hidden, args.predictor == "residual")

    def forward(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_q, z_d and the prediction, each (B, D), of embeddings (B, E)."""
        z_q = self.query(queries) + queries @ self.identity
        z_d = self.document(documents) + documents @ self.identity
        return z_q, z_d, z_q if self.kind == "none" else self.predictor(z_q) + z_q * (self.kind == "residual")

    @torch.no_grad()
    def embed(self, queries: Tensor, documents: Tensor, mix: float) -> list[Tensor]:
        """Unit vectors (Q, E + D), (N, E + D) of product (1 - mix) * frozen cosine + mix * learned cosine."""
        _, z_d, z_hat = self(queries, documents)
        sides = [[F.normalize(x, dim=1) for x in side] for side in ((queries, z_hat), (documents, z_d))]
        return [torch.cat([(1 - mix) ** 0.5 * frozen, mix**0.5 * learned], 1) for frozen, learned in sides]

def losses(model: Model, queries: Tensor, documents: Tensor, args) -> dict[str, Tensor]:
    z_q, z_d, z_hat = model(F.dropout(queries, args.dropout), F.dropout(documents, args.dropout))
    prediction, spread = (z_hat - z_d).square().mean(), torch.zeros(())
    if args.spread == "sigreg":
        spread = sigreg(torch.stack([z_q, z_d]), F.normalize(torch.randn(z_q.shape[1], 256), dim=0))
    if args.spread == "covariance":                    # its squared distance from the identity, per dimension
        errors = [torch.cov(z.T) - torch.eye(z.shape[1]) for z in (z_q, z_d)]      # (D, D) each
        spread = torch.stack(errors).square().sum(2).mean()
    a, b = F.normalize(z_hat, dim=1), F.normalize(z_d, dim=1)
    contrastive = F.triplet_margin_loss(a, b, b.roll(1, 0), margin=0.1)        # another pair's document
    loss = (1 - args.lam) * prediction + args.lam * spread + args.contrastive * contrastive
    return {"loss": loss, "prediction": prediction, "spread": spread, "contrastive": contrastive}

def evaluate(model: Model, data: tuple, split: str, mix: float) -> dict[str, np.ndarray]:
    """nDCG@10 with graded judgements, recall@100 and reciprocal rank of each judged query, by pytrec_eval."""
    x, ids, judgements, *_ = data
    queries, documents = model.embed(x["queries"], x["docs"], mix)
    rows = [row for row, query in enumerate(ids["queries"]) if query in judgements[split]]
    scores, best = (queries[rows] @ documents.T).topk(min(100, len(documents)))
    run = {}
    for row, values, found in zip(rows, scores.tolist(), best.tolist()):
        run[ids["queries"][row]] = dict(zip([ids["docs"][document] for document in found], values))
    names = {"ndcg10": "ndcg_cut_10", "recall100": "recall_100", "mrr": "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(judgements[split], set(names.values())).evaluate(run)
    return {name: np.array([found[query][key] for query in run]) for name, key in names.items()}

def train(model: Model, data: tuple, folder: Path, args) -> list[dict]:
    """The log. A batch is a function of seed and step, so a resumed run equals an uninterrupted one."""
    (x, _, _, pairs, weights), start, history, begin = data, 0, [], time.time()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    if args.resume:
        start, history, *states = torch.load(folder / "last.pt", weights_only=True)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    for step in range(start, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rows = pairs[torch.multinomial(weights, args.batch_size, replacement=True)]
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        parts = losses(model, x["pair_queries"][rows[:, 0]], x["pair_docs"][rows[:, 1]], args)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        done = step + 1
        if done % max(1, args.steps // 10) == 0 or done == args.steps:
            dev = evaluate(model, data, "dev", args.mix)["ndcg10"].mean().item()
            history.append({"step": done, "dev": dev} | {key: value.item() for key, value in parts.items()})
            left = (time.time() - begin) / (done - start) * (args.steps - done)
            print(*[f"{key} {value:.4g} " for key, value in history[-1].items()], f"{left:.0f} s left")
            torch.save([done, history, model.state_dict(), optimizer.state_dict()], folder / "last.part")
            (folder / "last.part").replace(folder / "last.pt")
    return history

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for key, (value, text, *choices) in FLAGS.items():
        kind = {"type": type(value), "default": value, "choices": choices[0] if choices else None}
        kind = {"action": "store_true"} if value is False else kind
        parser.add_argument("--" + key.replace("_", "-"), help=f"{text} (default: {value})", **kind)
    args = parser.parse_args(argv)
    folder, settings = Path(args.run), vars(args) | {"resume": False, "export": ""}
    known = json.loads((folder / "config.json").read_text()) if (folder / "last.pt").exists() else None
    if known and not args.resume or args.resume and known != settings:
        parser.error(f"--run {folder}: a run goes on with --resume and the flags of its config.json")
    try:
        data = load(args)
    except (ValueError, KeyError, OSError, ImportError) as error:
        parser.error(f"--data {args.data}: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    torch.manual_seed(args.seed)
    model = Model(data[0]["docs"].shape[1], args)
    history = train(model, data, folder, args)
    result = {"settings": settings, "history": history}
    for split in ("dev", "test"):
        plain, learned = evaluate(model, data, split, 0.0), evaluate(model, data, split, args.mix)
        for name in plain:
            a, b, a_b = learned[name].mean(), plain[name].mean(), learned[name] - plain[name]
            low, high = bootstrap([a_b], np.mean, method="percentile", rng=0).confidence_interval
            result[f"{split}_{name}"] = {"model": a, "plain": b, "interval": [low, high], "n": len(a_b)}
            print(f"{split}_{name}: {a:.4f}, plain cosine {b:.4f}, {a - b:+.4f} [{low:+.4f}, {high:+.4f}]")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4))
    for key in ("prediction", "spread", "dev"):        # dev: nDCG@10
        curves.semilogy([row["step"] for row in history], [row[key] for row in history], label=key)
    curves.legend()
    bars.bar(range(len(plain["ndcg10"])), np.sort(learned["ndcg10"] - plain["ndcg10"]), width=1)
    bars.set(title="nDCG@10 less plain cosine, test queries")
    figure.savefig(folder / "result.png", dpi=70)
    x, ids, *_ = data
    queries, documents = model.embed(x["queries"], x["docs"], args.mix)
    if args.export.endswith(".faiss"):
        import faiss
        index = faiss.IndexFlatIP(documents.shape[1])
        index.add(documents.numpy())
        faiss.write_index(index, args.export)
    elif args.export:
        np.savez(args.export, doc_ids=ids["docs"], docs=documents, query_ids=ids["queries"], queries=queries)

if __name__ == "__main__":
    main()
