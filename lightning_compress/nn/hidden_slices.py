"""The hidden width: the residual stream, and everything that writes to it or reads from it, kept in some channels only.

Norms run over the kept channels alone afterwards. The function of the model stays the same where norms did so before
and the other channels held zeros. The next chapter is :mod:`lightning_compress.nn.width_surgery`.

Shape legend: D hidden size.

Departs from the paper: COST-EFF never prunes the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.bottleneck_token_dropping import TokenSampler
from lightning_compress.nn.contribution_token_dropping import ContributionPredictor
from lightning_compress.nn.exit_rules import LearnedRule
from lightning_compress.nn.factored_embedding import FactoredEmbedding, TiedHead
from lightning_compress.nn.linear_slices import check_sliceable, keep_rows, slice_at, slice_linear
from lightning_compress.nn.multi_exit import ExitHead
from lightning_compress.nn.surgery import Ledger, get_module, names_of, tie

__all__ = ["check_hidden", "slice_hidden"]

_READERS = ("query", "key", "value", "query_key_value", "ffn_in", "ffn_gate")
_WRITERS = ("attention_output", "ffn_out")


def slice_hidden(model: nn.Module, keep: Sequence[int], ledger: Ledger | None = None) -> None:
    """Keep these channels of the residual stream: in tables, norms, all layers' linears, poolers, heads and exits.

    What poolers and heads put out keeps its width.

    Args:
        model: A transformers model of a known family.
        keep: Indices of the channels kept, ascending, at least one.
        ledger: Where the change is noted; None notes it nowhere.

    Raises:
        ValueError: If indices are out of range or not ascending, or the model cannot be sliced this way.
    """
    check_hidden(model, keep)
    anatomy, kept = describe(model), list(keep)
    ledger = Ledger(model) if ledger is None else ledger
    shared = _shared_with_a_head(model, anatomy)
    if shared:
        ledger.on_revert(partial(tie, names=shared))
    for path in anatomy.residual_writers:
        _slice_writer(ledger, path, kept)
    for layer in anatomy.layers:
        for slot in layer.linears:
            if slot.role in _READERS:
                slice_at(ledger, slot.path, inputs=kept)
            elif slot.role in _WRITERS:
                slice_at(ledger, slot.path, outputs=kept)
        for path in layer.norms:
            ledger.alter(path, partial(_slice_norm, keep=kept))
    for path in anatomy.residual_readers:
        if not isinstance(get_module(model, path), TiedHead):  # that follows the embeddings
            slice_at(ledger, path, inputs=kept)
    if shared:
        tie(model, shared)
    _slice_installed(ledger, kept)


def check_hidden(model: nn.Module, keep: Sequence[int] | None = None) -> None:
    """Refuse channels that are not there, and models in which something reads hidden states in another way.

    Args:
        model: A transformers model of a known family, and what methods have put into it so far.
        keep: The channels that are to be kept; None looks at the model alone.

    Raises:
        ValueError: With the reason and the remedy.
        TypeError: If there is something in the place of a linear that cannot be sliced.
    """
    anatomy, kept = describe(model), range(1) if keep is None else list(keep)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= anatomy.hidden_size:
        raise ValueError(
            f"hidden channels must be ascending, at least one, from 0 to {anatomy.hidden_size - 1}; got "
            f"{list(kept[:8])}{' and more' if len(kept) > 8 else ''}"
        )
    reason = _obstacle(model, anatomy)
    if reason is not None:
        raise ValueError(
            f"the hidden width of this {type(model).__name__} cannot change: {reason}. Leave hidden at None"
        )
    for path in (*(slot.path for slot in anatomy.linears), *anatomy.residual_readers):
        if not isinstance(get_module(model, path), TiedHead):
            check_sliceable(model, path)


def _obstacle(model: nn.Module, anatomy: Anatomy) -> str | None:
    modules = list(model.modules())
    if not anatomy.residual_writers:
        return f"of the family {anatomy.model_type!r} it is not known what writes to the residual stream"
    if any(isinstance(module, TokenSampler) for module in modules):
        return "the samplers of bottleneck_token_dropping normalise over all channels"
    if any(isinstance(module, ExitHead) and module.pooler is not None for module in modules):
        return "the poolers of exits put out as much as they read; or give multi_exit pooler=False"
    shared = sorted(_shared_beyond_the_stream(model, anatomy))
    if shared:
        return f"the word embeddings share their weights with {shared}, which read something else"
    return None


def _shared_with_a_head(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    """Return the names that the word embeddings' weights have, where they have more than one."""
    embedding = get_module(model, anatomy.word_embeddings)
    names = () if isinstance(embedding, FactoredEmbedding) else names_of(model, embedding.weight)
    return names if len(names) > 1 else ()


def _shared_beyond_the_stream(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Return the names of weights that would have to change with the word embeddings, but read something else."""
    if anatomy.word_embeddings not in anatomy.residual_writers:
        return set()
    known = {f"{path}.weight" for path in (anatomy.word_embeddings, *anatomy.residual_readers)}
    tied = {
        name
        for name, module in model.named_modules()
        if isinstance(module, TiedHead) and name not in anatomy.residual_readers
    }
    return (set(_shared_with_a_head(model, anatomy)) - known) | tied


def _slice_writer(ledger: Ledger, path: str, keep: Sequence[int]) -> None:
    module = get_module(ledger.root, path)
    if isinstance(module, FactoredEmbedding):
        slice_at(ledger, f"{path}.projection", outputs=keep)
    elif isinstance(module, nn.Embedding):
        ledger.alter(path, partial(_slice_table, keep=keep))
    elif getattr(module, "weight", None) is not None and module.weight.dim() == 1:  # type: ignore[union-attr,operator]
        ledger.alter(path, partial(_slice_norm, keep=keep))
    else:
        slice_at(ledger, path, outputs=keep)


def _slice_table(table: nn.Module, keep: Sequence[int]) -> None:
    table.weight = keep_rows(table.weight, keep, dim=1)  # type: ignore[arg-type]
    table.embedding_dim = len(keep)  # type: ignore[assignment]


def _slice_norm(norm: nn.Module, keep: Sequence[int]) -> None:
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, keep_rows(parameter, keep))
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (len(keep),)


def _slice_installed(ledger: Ledger, keep: Sequence[int]) -> None:
    """Slice what other methods put into the model, which they take out themselves when the model is reverted."""
    for name, module in list(ledger.root.named_modules()):
        for path, linear in _installed_readers(name, module):
            before = list(linear.parameters())
            slice_linear(linear, inputs=keep)
            ledger.inherit(path, before)


def _installed_readers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears by which such a module reads hidden states, with their paths."""
    if isinstance(module, ExitHead):
        yield f"{name}.classifier", module.classifier
    elif isinstance(module, ContributionPredictor):
        yield f"{name}.0", module[0]
    elif isinstance(module, LearnedRule):
        yield f"{name}.guess", module.guess
