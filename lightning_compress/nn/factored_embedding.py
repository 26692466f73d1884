"""Word embeddings of low rank: a narrow table and one linear that widens what is looked up.

The decomposition is the truncated singular value decomposition of the present table, W ≈ (W V_r) V_r^T, unweighted.
A language model's head that shares the table shares both factors. The next chapter is
:mod:`lightning_compress.nn.width_surgery`.

Shape legend: V vocabulary, D embedding width, R rank, B any leading dimensions.

Paper: COST-EFF (arXiv 2210.15523), Figure 2 and official code: W_t1 = U_r Sigma_r, W_t2 = V_r^T, no bias.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import Ledger, get_module, is_linear, names_of, tie

__all__ = ["FactoredEmbedding", "TiedHead", "check_embedding_rank", "factor_embedding", "leading_basis"]

_CHUNK = 4096


class FactoredEmbedding(nn.Module):
    """Looks up R numbers per token and widens them to D.

    Args:
        table: The narrow table ``[V, R]``.
        projection: ``Linear(R, D, bias=False)`` with the weight V_r.
    """

    table: nn.Embedding
    projection: nn.Linear

    def __init__(self, table: nn.Embedding, projection: nn.Linear) -> None:
        super().__init__()
        self.table, self.projection = table, projection

    @classmethod
    def of(cls, embedding: Any, rank: int) -> FactoredEmbedding:
        """Decompose a table ``[V, D]``: the rows that its leading directions leave, and those directions.

        Raises:
            ValueError: If the table holds infinities or NaN.
        """
        factored = _empty(embedding, rank)
        _fill(factored, embedding.weight)
        return factored

    @property
    def weight(self) -> Tensor:
        """The dense product, shape ``[V, D]``, for host code that reads weights directly."""
        return self.table.weight @ self.projection.weight.T

    @property
    def rank(self) -> int:
        """Columns of the table."""
        return self.table.embedding_dim

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Width D of what comes out."""
        return self.projection.out_features

    @property
    def padding_idx(self) -> int | None:
        """Row that gets no gradient."""
        return self.table.padding_idx

    def forward(self, ids_B: Tensor) -> Tensor:
        """Return the embeddings ``[..., D]`` of token ids ``[...]``."""
        return self.projection(self.table(ids_B))


class TiedHead(nn.Module):
    """The last linear of a language model, with the factors of its word embeddings for weights.

    Args:
        embedding: The factored embeddings; they stay the only owner of their weights.
        bias: The head's bias, shape ``[V]``.
    """

    bias: nn.Parameter | None

    def __init__(self, embedding: FactoredEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not a sub-module
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> FactoredEmbedding:
        """Whose factors are used."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """The dense product, shape ``[V, D]``."""
        return self.embedding.weight

    @property
    def in_features(self) -> int:
        """Width D of what comes in."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """Entries V of the vocabulary."""
        return self.embedding.num_embeddings

    @property
    def flops_per_token(self) -> int:
        """FLOPs (2 MACs) per token."""
        return 2 * self.embedding.rank * (self.in_features + self.out_features)

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Return the scores ``[..., V]`` of hidden states ``[..., D]``."""
        narrow_BR = F.linear(hidden_BD, self.embedding.projection.weight.T)
        return F.linear(narrow_BR, self.embedding.table.weight, self.bias)


@torch.no_grad()
def leading_basis(weight_VD: Tensor, rank: int) -> Tensor:
    """Return V_r ``[D, R]``: the right singular vectors with the largest singular values, largest first.

    They come from the eigenvectors of the Gram matrix W^T W in float64, which is D by D: V is never squared.

    Args:
        weight_VD: The table.
        rank: Number R of vectors, from 1 to D.

    Raises:
        ValueError: If the table holds infinities or NaN.

    Departs from the paper: the official code decomposes the whole table with its left vectors, V by V numbers.

    Example:
        >>> leading_basis(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), rank=1).abs()
        tensor([[1.],
                [0.]])
    """
    worker = torch.device("cpu") if weight_VD.device.type == "mps" else weight_VD.device  # MPS has no float64
    width = weight_VD.shape[1]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=worker)
    for rows_ND in weight_VD.split(_CHUNK):
        rows_ND = rows_ND.to(worker, torch.float64)
        gram_DD.addmm_(rows_ND.T, rows_ND)
    if not bool(gram_DD.isfinite().all()):
        raise ValueError(
            "the word embeddings are not finite, so they cannot be decomposed: training has diverged. Lower the "
            "learning rate, clip gradients, or use bf16 in place of fp16"
        )
    vectors_DD = torch.linalg.eigh(gram_DD).eigenvectors  # ascending
    return vectors_DD[:, -rank:].flip(1).to(weight_VD)


def factor_embedding(
    model: nn.Module, rank: int, ledger: Ledger | None = None, *, decompose: bool = True
) -> FactoredEmbedding | None:
    """Replace the word embeddings by a table of this rank and a linear; full rank leaves them as they are.

    A head that shares the weights gets a :class:`TiedHead`.

    Args:
        model: A transformers model of a known family, on any device. Factored embeddings are multiplied back first.
        rank: Columns R of the table, from 1 to the embedding width.
        ledger: Where the change is noted; None notes it nowhere.
        decompose: Whether the factors get weights; False leaves them uninitialised, to be loaded next.

    Returns:
        What took the place of the embeddings; None at full rank.

    Raises:
        ValueError: If the rank is out of range, or something other than linears shares the weights.

    Paper: COST-EFF official code; later steps multiply the factors back and decompose the product. Tied heads are
    not in the paper.
    """
    check_embedding_rank(model, rank)
    ledger = Ledger(model) if ledger is None else ledger
    path = describe(model).word_embeddings
    embedding: Any = get_module(model, path)
    if rank == embedding.weight.shape[1]:
        return None
    heads = _tied_heads(model, path)
    is_filled = decompose and not embedding.weight.is_meta
    factored = FactoredEmbedding.of(embedding, rank) if is_filled else _empty(embedding, rank)
    if heads and not isinstance(embedding, FactoredEmbedding):
        names = [f"{owner}.weight" for owner in (path, *heads)]
        for shared in (names, *(names_of(model, bias) for bias in _biases(model, heads))):
            ledger.on_revert(partial(tie, names=shared))
        _forget_tie(ledger, names)
    ledger.replace(path, factored)
    for head in heads:
        bias = next(iter(_biases(model, [head])), None)
        ledger.replace(head, TiedHead(factored, bias))
    return factored


def check_embedding_rank(model: nn.Module, rank: int) -> None:
    """Refuse ranks that the word embeddings cannot have.

    Raises:
        ValueError: If the rank is out of range, or something other than linears shares the weights.
    """
    path = describe(model).word_embeddings
    embedding: Any = get_module(model, path)
    width = embedding.weight.shape[1]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= width:
        raise ValueError(f"embedding_rank={rank} is outside 1 to {width}, the width of {path}")
    for head in _tied_heads(model, path):
        module = get_module(model, head)
        if not isinstance(module, TiedHead) and not (is_linear(module) and isinstance(module, nn.Linear)):
            raise ValueError(
                f"the word embeddings share their weights with {head}, a {type(module).__name__}, which cannot be "
                "factorised with them: leave embedding_rank at None, or untie the two"
            )


def _tied_heads(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the modules that share the word embeddings' weights, or will once weights are loaded."""
    embedding = get_module(model, path)
    if isinstance(embedding, FactoredEmbedding):
        modules = model.named_modules()
        return [name for name, m in modules if isinstance(m, TiedHead) and m.embedding is embedding]
    source = f"{path}.weight"
    announced = getattr(model, "all_tied_weights_keys", {}).items()
    names = {
        *names_of(model, embedding.weight),
        *(target for target, origin in announced if origin == source),
    }
    return sorted(name.removesuffix(".weight") for name in names - {source})


def _biases(model: nn.Module, heads: list[str]) -> list[nn.Parameter]:
    biases = [get_module(model, head).bias for head in heads]
    return [bias for bias in biases if isinstance(bias, nn.Parameter)]


def _forget_tie(ledger: Ledger, names: list[str]) -> None:
    """Let transformers tie these parameters no more: one of the two is not a parameter now."""
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(ledger.root, table, None) or {}
        left = {target: source for target, source in ties.items() if not {target, source} <= set(names)}
        if left != ties:
            ledger.set_attributes("", **{table: left})


def _empty(embedding: Any, rank: int) -> FactoredEmbedding:
    """Return the factored form without weights, on the same device and of the same dtype."""
    weight_VD = embedding.weight
    entries, width = weight_VD.shape
    meta = torch.empty(entries, rank, device="meta", dtype=weight_VD.dtype)
    table = nn.Embedding(entries, rank, padding_idx=embedding.padding_idx, _weight=meta)
    projection = nn.Linear(rank, width, bias=False, device="meta", dtype=weight_VD.dtype)
    factored = FactoredEmbedding(table, projection).to_empty(device=weight_VD.device)
    return factored.requires_grad_(weight_VD.requires_grad)


@torch.no_grad()
def _fill(factored: FactoredEmbedding, weight_VD: Tensor) -> None:
    basis_DR = leading_basis(weight_VD, factored.rank)
    exact = torch.promote_types(weight_VD.dtype, torch.float32)
    factored.projection.weight.copy_(basis_DR)
    pieces = zip(weight_VD.split(_CHUNK), factored.table.weight.split(_CHUNK), strict=True)
    for rows_ND, narrow_NR in pieces:
        narrow_NR.copy_(rows_ND.to(exact) @ basis_DR.to(exact))
