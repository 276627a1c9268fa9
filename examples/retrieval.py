"""LeJEPA for retrieval: a predictor from the embedding of a query to the embedding of a relevant document.

A frozen sentence encoder embeds texts. A projection and a predictor, the identity at the start, are trained
on (query, relevant document) pairs; the untrained model ranks exactly as the encoder's cosine does.

    loss = (1 - lam) * mean |predictor(z_q) - z_d|^2 / D  +  lam * SIGReg(z),   gradients into both sides
    B pairs in a batch   Q queries   N documents   P pairs   E width of the encoder   D width of z
"""
import argparse
import importlib
import inspect
import json
import sys
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

FLAGS = {"data": ("docstrings", "docstrings of installed libraries, or a BEIR folder"),
         "encoder": ("lsa", "lsa (TF-IDF and truncated SVD), or a sentence-transformers model"),
         "embeddings": ("", "no encoder: an .npz of doc_ids, docs, query_ids, queries"),
         "pairs": ("", "train on this folder's pairs.jsonl (and minilm.npz, with --embeddings)"),
         "export": ("", "write what is compared to FILE.npz or to an index FILE.faiss"),
         "run": ("examples/runs/retrieval", "folder of the record"), "resume": (False, "continue --run"),
         "mix": (0.5, "share of the learned cosine in a score; 0: plain cosine"),
         "lam": (0.02, "weight of --spread; 1 - lam is the weight of the prediction"),
         "spread": ("sigreg", "the term against collapse", ("sigreg", "covariance", "none")),
         "projection": ("residual", "residual: its input is added", ("residual", "plain")),
         "predictor": ("residual", "from z_q to z_d", ("residual", "plain", "none")),
         "asymmetric": (False, "two projections"), "contrastive": (0.0, "weight of a margin loss"),
         "dropout": (0.3, "share of the encoder's numbers that a step leaves out"),
         "width": (0, "D; 0: E"), "hidden": (0, "hidden width of projection and predictor; 0: linear"),
         "steps": (100, ""), "batch_size": (256, "pairs"), "lr": (1e-3, "falls to 0"), "seed": (0, "")}
MODULES = """numpy numpy.fft numpy.random scipy.fft scipy.linalg scipy.optimize scipy.sparse torch
    | scipy.signal torch.nn.functional | numpy.linalg scipy.stats sklearn.metrics torch.nn"""
METRICS = {"ndcg10": "ndcg_cut_10", "recall100": "recall_100", "mrr": "recip_rank"}

def read_docstrings() -> tuple[dict, dict]:
    """Texts by kind and id, judgements by split: a docstring's summary is a query, its rest a document."""
    texts, judgements = {"docs": {}, "queries": {}}, {"train": {}, "dev": {}, "test": {}}
    for split, modules in zip(judgements, MODULES.split("|")):
        for module in modules.split():
            for key, value in sorted(vars(importlib.import_module(module)).items()):
                name = f"{module}.{key}"
                summary, _, rest = (callable(value) and inspect.getdoc(value) or "").partition("\n\n")
                if len(summary) >= 20 and len(rest) >= 200 and rest not in texts["docs"].values():
                    texts["queries"][name], texts["docs"][name] = summary, rest
                    judgements[split][name] = {name: 1}
    return texts, judgements

def read_lines(path: Path, *needed: str) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if not all(str(row.get(key, "")).strip() for key in needed):
            raise ValueError(f"{path}, line {number}: {' or '.join(needed)} is missing or empty")
    return rows

def read_beir(folder: Path) -> tuple[dict, dict]:
    """As read_docstrings. Without qrels/dev.tsv, a fifth of the training queries, by document, is for dev."""
    corpus = read_lines(folder / "corpus.jsonl", "_id")
    documents = {row["_id"]: f"{row.get('title', '')} {row.get('text', '')}" for row in corpus}
    queries = {row["_id"]: row["text"] for row in read_lines(folder / "queries.jsonl", "_id", "text")}
    judgements = {"train": {}, "dev": {}, "test": {}}
    for path in (folder / "qrels").glob("*.tsv"):
        for number, line in enumerate(path.read_text().splitlines()[1:], 2):
            query, document, grade = (line.split("\t") + ["", ""])[:3]
            if query not in queries or document not in documents or not grade.isdigit():
                raise ValueError(f"{path}, line {number}: unknown query or document, or no grade: {line!r}")
            if int(grade):
                judgements[path.stem].setdefault(query, {})[document] = int(grade)
    tested = {queries[q].lower() for q in judgements["test"]}                  # some texts are in both splits
    train = {q: judged for q, judged in judgements["train"].items() if queries[q].lower() not in tested}
    dev = judgements["dev"] or {q: train[q] for q in train if zlib.crc32(min(train[q]).encode()) % 5 == 0}
    train = {q: judged for q, judged in train.items() if q not in dev}
    return {"docs": documents, "queries": queries}, judgements | {"train": train, "dev": dev}

def encode(texts: dict[str, dict], cfg) -> dict[str, np.ndarray]:
    """Embeddings of each kind of text by the frozen encoder, in the order of the texts."""
    if not cfg.embeddings and cfg.encoder == "lsa":
        tf_idf = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        lsa = make_pipeline(tf_idf, TruncatedSVD(256, random_state=0)).fit(texts["docs"].values())
        return {kind: lsa.transform(found.values()) for kind, found in texts.items()}
    if not cfg.embeddings:
        from sentence_transformers import SentenceTransformer
        return {kind: SentenceTransformer(cfg.encoder).encode([*y.values()]) for kind, y in texts.items()}
    file, x = np.load(cfg.embeddings), {}
    for kind, key in (("docs", "doc_ids"), ("queries", "query_ids")):
        place = {text: row for row, text in enumerate(file[key].tolist())}
        missing = [text for text in texts[kind] if text not in place]
        if missing:
            raise ValueError(f"{cfg.embeddings}: {key} lacks {len(missing)} ids, first {missing[0]!r}")
        x[kind] = file[kind][[place[text] for text in texts[kind]]]
    pairs = np.load(Path(cfg.pairs, "minilm.npz")) if cfg.pairs else {}
    return x | {f"pair_{kind}": pairs[kind] for kind in pairs}

def load(cfg) -> tuple[dict, dict, dict, Tensor, Tensor]:
    """Embeddings of length sqrt(E), ids, judgements, training pairs as rows (P, 2), their weights (P,)."""
    texts, judgements = read_docstrings() if cfg.data == "docstrings" else read_beir(Path(cfg.data))
    place = {kind: {key: row for row, key in enumerate(found)} for kind, found in texts.items()}
    train = {place["queries"][q]: [place["docs"][d] for d in docs] for q, docs in judgements["train"].items()}
    if cfg.pairs:
        rows = read_lines(Path(cfg.pairs, "pairs.jsonl"), "query", "document")
        texts["pair_docs"] = {i: row["document"] for i, row in enumerate(rows)}
        texts["pair_queries"] = {i: row["query"] for i, row in enumerate(rows)}
        train = {i: [i] for i in range(len(rows))}
    x = {kind: torch.tensor(np.asarray(found, np.float32)) for kind, found in encode(texts, cfg).items()}
    x = {kind: F.normalize(found, dim=1) * found.shape[1] ** 0.5 for kind, found in x.items()}
    finite = all(found.isfinite().all() for found in x.values())
    if not (finite and judgements["test"] and train) or cfg.pairs and len(x["pair_docs"]) != len(rows):
        raise ValueError("needs finite embeddings, test judgements, and training ones or --pairs")
    pairs = torch.tensor([(query, document) for query, found in train.items() for document in found])
    weights = torch.tensor([len(found) ** -0.5 for found in train.values() for _ in found])
    x = {"pair_docs": x["docs"], "pair_queries": x["queries"]} | x
    return x, {kind: list(found) for kind, found in place.items()}, judgements, pairs, weights

def make_layers(inputs: int, outputs: int, hidden: int, zero: bool) -> nn.Module:
    """A linear layer, or an MLP where `hidden` is given; with `zero`, its output is 0 at the start."""
    last = nn.Linear(hidden or inputs, outputs)
    for parameter in last.parameters():
        parameter.data *= not zero
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), last) if hidden else last

class Model(nn.Module):
    def __init__(self, inputs: int, cfg):
        super().__init__()
        width, residual, self.kind = cfg.width or inputs, cfg.projection == "residual", cfg.predictor
        self.document = make_layers(inputs, width, cfg.hidden, residual)
        self.query = make_layers(inputs, width, cfg.hidden, residual) if cfg.asymmetric else self.document
        self.register_buffer("identity", torch.eye(inputs, width) * residual)  # cut, or padded by zeros
        self.predictor = make_layers(width, width, cfg.hidden, cfg.predictor == "residual")

    def forward(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_q (B, D), z_d (N, D) and the prediction (B, D) of queries (B, E) and documents (N, E)."""
        z_q = self.query(queries) + queries @ self.identity
        z_d = self.document(documents) + documents @ self.identity
        return z_q, z_d, z_q if self.kind == "none" else self.predictor(z_q) + z_q * (self.kind == "residual")

    @torch.no_grad()
    def embed(self, queries: Tensor, documents: Tensor, mix: float) -> list[Tensor]:
        """Unit vectors (Q, E + D), (N, E + D) of product (1 - mix) * frozen cosine + mix * learned cosine."""
        _, z_d, z_hat = self(queries, documents)
        sides = [[F.normalize(x, dim=1) for x in side] for side in ((queries, z_hat), (documents, z_d))]
        return [torch.cat([(1 - mix) ** 0.5 * frozen, mix**0.5 * learned], 1) for frozen, learned in sides]

def compute_loss(model: Model, queries: Tensor, documents: Tensor, cfg) -> dict[str, Tensor]:
    """The loss and its terms, for pairs (B, E), (B, E)."""
    z_q, z_d, z_hat = model(F.dropout(queries, cfg.dropout), F.dropout(documents, cfg.dropout))
    z, prediction, spread = torch.stack([z_q, z_d]), (z_hat - z_d).square().mean(), torch.zeros(())
    if cfg.spread == "sigreg":
        spread = sigreg(z, F.normalize(torch.randn(z.shape[2], 256), dim=0))
    if cfg.spread == "covariance":                     # its squared distance from the identity, per dimension
        spread = sum((torch.cov(side.T) - torch.eye(z.shape[2])).square().sum(1).mean() for side in z) / 2
    contrastive = F.triplet_margin_loss(*map(F.normalize, (z_hat, z_d, z_d.roll(1, 0))), margin=0.1)
    loss = (1 - cfg.lam) * prediction + cfg.lam * spread + cfg.contrastive * contrastive
    return {"loss": loss, "prediction": prediction, "spread": spread}

def evaluate(model: Model, data: tuple, split: str, mix: float) -> dict[str, np.ndarray]:
    """The metrics of each judged query, by pytrec_eval, with graded judgements; ties in the corpus' order."""
    x, ids, judgements, *_ = data
    queries, documents = model.embed(x["queries"], x["docs"], mix)
    rows = [row for row, query in enumerate(ids["queries"]) if query in judgements[split]]
    best = (queries[rows] @ documents.T).argsort(dim=1, descending=True, stable=True)[:, :100].tolist()
    run = {ids["queries"][row]: {ids["docs"][document]: 100.0 - place for place, document in enumerate(found)}
           for row, found in zip(rows, best)}
    found = pytrec_eval.RelevanceEvaluator(judgements[split], set(METRICS.values())).evaluate(run)
    return {name: np.array([found[query][key] for query in run]) for name, key in METRICS.items()}

def train(model: Model, data: tuple, saved: list, folder: Path, cfg) -> list[dict]:
    """The log. A batch is a function of seed and step, so a resumed run equals an uninterrupted one."""
    (x, _, judgements, pairs, weights), (first, history, *states) = data, saved
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr)
    for part, state in zip((model, optimizer), states):
        part.load_state_dict(state)
    for step in range(first, cfg.steps):
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        rows = pairs[torch.multinomial(weights, cfg.batch_size, replacement=True)]
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        terms = compute_loss(model, x["pair_queries"][rows[:, 0]], x["pair_docs"][rows[:, 1]], cfg)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        done = step + 1
        if done % max(1, cfg.steps // 10) == 0 or done == cfg.steps:
            history.append({"step": done} | {key: value.item() for key, value in terms.items()})
            if judgements["dev"]:
                history[-1]["dev_ndcg10"] = evaluate(model, data, "dev", cfg.mix)["ndcg10"].mean().item()
            print(f"of {cfg.steps}:", *[f"{key} {value:.4g} " for key, value in history[-1].items()])
            torch.save([done, history, model.state_dict(), optimizer.state_dict()], folder / "last.part")
            (folder / "last.part").replace(folder / "last.pt")
    return history

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for key, (value, text, *choices) in FLAGS.items():
        kind = {"type": type(value), "choices": choices[0] if choices else None}
        kind = {"action": "store_true"} if value is False else kind
        parser.add_argument("--" + key.replace("_", "-"), default=value, help=text, **kind)
    cfg = parser.parse_args(argv)
    folder, settings = Path(cfg.run), vars(cfg) | {"resume": False, "export": ""}
    record, last = folder / "config.json", folder / "last.pt"
    try:
        if cfg.resume != record.exists() or cfg.resume and json.loads(record.read_text()) != settings:
            raise ValueError(f"a record in --run {folder} goes on with --resume and the flags of config.json")
        data = load(cfg)
        saved = torch.load(last, weights_only=True) if last.exists() else [0, []]
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=1) + "\n")
    except Exception as error:                         # whatever a malformed file leads to
        parser.error(f"--data {cfg.data}: {type(error).__name__}: {error}".splitlines()[0])
    torch.manual_seed(cfg.seed)
    model = Model(data[0]["docs"].shape[1], cfg)
    history = train(model, data, saved, folder, cfg)
    result = {"settings": settings, "history": history}
    plain, learned = evaluate(model, data, "test", 0.0), evaluate(model, data, "test", cfg.mix)
    for name in METRICS:
        a, b, gain = learned[name].mean(), plain[name].mean(), learned[name] - plain[name]
        low, high = bootstrap([gain], np.mean, method="percentile", rng=0).confidence_interval
        result[name] = {"model": a, "plain": b, "interval": [low, high], "n": len(gain)}
        print(f"{name}: {a:.4f}, plain cosine {b:.4f}, {a - b:+.4f} [{low:+.4f}, {high:+.4f}]")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for key in ("prediction", "spread", "dev_ndcg10"):
        curves.semilogy([row["step"] for row in history], [row.get(key, 1) for row in history], label=key)
    gain = np.sort(learned["ndcg10"] - plain["ndcg10"])
    bars.bar(range(len(gain)), gain, width=1, label="nDCG@10 less plain cosine, a bar a test query")
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(folder / "result.png", dpi=70)
    x, ids, *_ = data
    queries, documents = model.embed(x["queries"], x["docs"], cfg.mix)
    if cfg.export.endswith(".faiss"):
        import faiss
        index = faiss.IndexFlatIP(documents.shape[1])
        index.add(documents.numpy())
        faiss.write_index(index, cfg.export)
    elif cfg.export:
        np.savez(cfg.export, doc_ids=ids["docs"], docs=documents, query_ids=ids["queries"], queries=queries)

if __name__ == "__main__":
    main()
