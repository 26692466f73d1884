"""Single gates: drawn, idle and projecting, and the norm over kept dimensions against a norm of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.nn.hard_concrete import expected_gate
from lightning_compress.nn.width_gate import RankGate, StructureGate, masked_norm


def test_what_a_rank_loses_is_the_tail_of_the_singular_values() -> None:
    torch.manual_seed(0)
    table, gate = torch.randn(30, 8), RankGate(8)
    sigma = torch.linalg.svdvals(table)
    for rank in (6, 3):
        gate.close(table, rank)
        assert (gate(table) - table).norm().item() == pytest.approx(sigma[rank:].norm().item(), rel=1e-4)
    gate.close(table, 8)
    assert gate.is_open


def test_learned_gates_are_drawn_while_training_and_stand_still_in_evaluation() -> None:
    gate = StructureGate(40, 2, learned=True)
    gate.is_sampled = True
    assert gate.log_alpha_K is not None
    with torch.no_grad():
        gate.log_alpha_K.zero_()
    x = torch.ones(1, 80)
    assert not torch.equal(gate(x), gate(x))
    gate.eval()
    assert torch.allclose(gate(x), torch.full((1, 80), 0.5))
    with torch.no_grad():
        gate.log_alpha_K[:10] = -9.0
    assert gate.kept == tuple(range(10, 40))
    assert torch.equal(gate(x)[0, ::2], expected_gate(gate.log_alpha_K))


def test_an_idle_learned_gate_stays_in_the_graph() -> None:
    gate = StructureGate(4, 1, learned=True)
    gate(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert gate.log_alpha_K is not None and gate.log_alpha_K.grad is not None
    assert not gate.log_alpha_K.grad.any()


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_over_kept_dimensions_is_a_norm_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    index = keep.nonzero().flatten()
    x = torch.randn(2, 3, 6)
    wide, narrow = (nn.LayerNorm(6), nn.LayerNorm(4)) if kind == "layer" else (nn.RMSNorm(6), nn.RMSNorm(4))
    for parameter, part in zip(wide.parameters(), narrow.parameters(), strict=True):
        nn.init.normal_(parameter)
        part.data = parameter.detach()[index]
    if kind == "rms":
        wide.eps = narrow.eps = 1e-5
    out = masked_norm(wide, x, keep)
    assert torch.allclose(out[..., index], narrow(x[..., index]), atol=1e-5)
    assert not out[..., keep == 0].any()
