"""What the symbols mean: what the first code of a shape tells, and how far fewer codes carry retrieval."""
import numpy as np
import torch
from scipy import ndimage

import arc_data
import eval as evaluation

SHAPES = 1500                                  # distinct shapes of unseen grids that are examined


def shapes_of(grids: list) -> list[np.ndarray]:
    """The distinct object bitmaps of grids (height, width) bool, a seeded sample of SHAPES of them."""
    tokens = arc_data.tokenise(grids)
    objects = np.setdiff1d(np.arange(len(tokens.shape)), tokens.start)
    kept = np.unique(tokens.shape[objects])
    kept = np.sort(np.random.default_rng(0).permutation(kept)[:SHAPES])
    bits = np.unpackbits(tokens.bitmaps[kept], axis=1, count=arc_data.SIDE ** 2).astype(bool)
    bits = bits.reshape(-1, arc_data.SIDE, arc_data.SIDE)
    return [image[:height, :width] for image, (height, width) in zip(bits, tokens.extent[kept])]


def codes_of(model, shapes: list) -> np.ndarray:
    """(n, C) codes of shapes, each drawn alone; -1 for one that would be the background of its grid."""
    drawn = [2 * shape.sum() < arc_data.SIDE ** 2 for shape in shapes]
    return np.array([codes[1].numpy() if is_drawn else np.full(codes.shape[1], -1)
                     for is_drawn, (codes, _) in zip(drawn, model.codes(arc_data.pad(shapes, 0)))])


def altered(shape: np.ndarray, rng) -> dict[str, np.ndarray]:
    """Variants of a shape: one cell fewer or more, one row larger, mirrored, turned by a quarter."""
    cell = shape.copy()
    row, column = (rng.integers(side) for side in shape.shape)
    cell[row, column] ^= True
    return {"one cell differs": cell, "one row longer": np.vstack([shape, shape[-1:]]),
            "mirrored": shape[:, ::-1], "a quarter turn": np.rot90(shape)}


def is_shape(image: np.ndarray) -> bool:
    """One 8-connected object that fills its box to all four sides."""
    fits = max(image.shape) <= arc_data.SIDE and image[0].any() and image[-1].any()
    fits = fits and image[:, 0].any() and image[:, -1].any()
    return bool(fits and ndimage.label(image, np.ones((3, 3)))[1] == 1)


def properties(shape: np.ndarray) -> dict[str, int]:
    holes = ndimage.label(np.pad(~shape, 1, constant_values=True))[1] - 1
    turned = [arc_data.turn(shape, i) for i in range(1, 8)]
    return {"height": shape.shape[0], "width": shape.shape[1], "area": int(np.log2(shape.sum())),
            "symmetric": int(any(t.shape == shape.shape and (t == shape).all() for t in turned)),
            "holes": min(int(holes), 3), "single cell": int(shape.size == 1),
            "line": int(shape.all() and min(shape.shape) == 1 < shape.size),
            "rectangle": int(shape.all() and min(shape.shape) > 1)}


def information(a: np.ndarray, b: np.ndarray) -> float:
    """Bits that a tells of b, above what a shuffled a tells (the bias of few samples)."""
    def told(a: np.ndarray) -> float:
        return entropy(a) + entropy(b) - entropy(np.stack([a, b], 1))
    rng = np.random.default_rng(0)
    return float(told(a) - np.mean([told(rng.permutation(a)) for _ in range(5)]))


def entropy(rows: np.ndarray) -> float:
    p = np.unique(rows, axis=0, return_counts=True)[1] / len(rows)
    return float(-(p * np.log2(p)).sum())


def first_code_figures(model, grids: list) -> dict:
    """What the first code of a shape tells: when it stays the same, and bits of a shape's properties."""
    shapes = [shape for shape in shapes_of(grids) if is_shape(shape)]
    codes, rng = codes_of(model, shapes)[:, 0], np.random.default_rng(0)
    changed, kept = [altered(shape, rng) for shape in shapes], {}
    for name in ("one cell differs", "one row longer", "mirrored", "a quarter turn"):
        rows = [i for i in range(len(shapes)) if is_shape(changed[i][name])]
        rows = [i for i in rows if not np.array_equal(changed[i][name], shapes[i])]
        if rows:
            other = codes_of(model, [changed[i][name] for i in rows])[:, 0]
            known = (other >= 0) & (codes[rows] >= 0)
            kept[name] = float((other == codes[rows])[known].mean()) if known.any() else None
    shapes, codes = [shape for shape, code in zip(shapes, codes) if code >= 0], codes[codes >= 0]
    if not len(codes):
        return {}
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    told = [properties(shape) for shape in shapes]
    columns = {name: np.array([row[name] for row in told]) for name in told[0]}
    bits = {name: {"told": information(codes, x), "of": entropy(x)} for name, x in columns.items()}
    return {"first code is kept when": kept | {"by chance": float((share ** 2).sum())},
            "bits of the first code": bits, "n": len(codes)}


@torch.no_grad()
def retrieval_by_codes(model, windows) -> dict[str, float]:
    """nDCG@10 without out1 where only the first 0, 1, 2, 3 codes of each object are read."""
    encoder, _ = model.in_use
    every, found, queries = encoder.codes_kept, {}, evaluation.window_queries(windows)
    for count in range(every):
        encoder.codes_kept = count
        pool = model.embed([windows.grids[i] for i in windows.outputs]).float().cpu()
        space = evaluation.Space(torch.arange(len(pool)), pool, measure=evaluation.euclidean)
        z_hat = model.predict(evaluation.contexts(windows)).float().cpu()
        values = evaluation.rank(space.by_embedding(z_hat), queries)["ndcg10_without_out1"]
        found[f"{count} codes"] = float(values.mean())
    encoder.codes_kept = every
    return found
