"""A trained model that sees every grid in several positions: slower, and a little more accurate."""
import torch
from torch import Tensor

from arc_data import turn, validate_contexts, validate_grids
from lejepa import LeJEPA


class Views:
    """A model whose embeddings hold z of a grid under the first V of the 8 symmetries, side by side.

    z and z_hat are (n, V D), scaled so that a squared distance is the mean over the views. Pooled features
    (n, 5 P) are the mean of the views. All else is the model's own.
    """

    rank = LeJEPA.rank                                 # by the methods below

    def __init__(self, model: LeJEPA, views: int):
        self.model, self.views = model, views

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def embed(self, grids: list, layer: str = "z") -> Tensor:
        grids = validate_grids(grids)
        if layer == "pooled":
            views = range(self.views)
            return sum(self.model.embed([turn(grid, i) for grid in grids], layer) for i in views) / self.views
        return self.side_by_side(lambda i: self.model.embed([turn(grid, i) for grid in grids], layer))

    def predict(self, contexts: list) -> Tensor:
        contexts = validate_contexts(contexts)
        return self.side_by_side(
            lambda i: self.model.predict([[turn(grid, i) for grid in context] for context in contexts]))

    def side_by_side(self, view) -> Tensor:
        return torch.cat([view(i) for i in range(self.views)], 1) / self.views ** 0.5
