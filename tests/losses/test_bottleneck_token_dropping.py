"""The terms of BottleneckTokenDropping: which count when, with what weight, and that padding does not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.callbacks import BottleneckTokenDropping
from lightning_compress.compressor import Compressor
from lightning_compress.losses import BottleneckTokenDroppingLossMixin
from lightning_compress.losses.bottleneck_token_dropping import (
    entropy_penalty,
    norm_penalty,
    removal_weight,
    skim_penalty,
)
from lightning_compress.losses.information_bottleneck import (
    NORM_WEIGHTS,
    kept_ratio,
    masked_norm,
    negative_entropy,
)
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.nn.bottleneck_token_dropping import SampledTokens
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer

STEM = "bottleneck_token_dropping"
IDS_BT = torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(0))


def prepared(**settings: Any) -> tuple[Compressor, Any]:
    compressor = Compressor(tiny_bert(), [BottleneckTokenDroppingConfig(**settings)])
    compressor.prepare()
    compressor.model.train()
    return compressor, compressor.handles[STEM]


def terms_at(compressor: Compressor, progress: float, **inputs: Tensor) -> dict[str, Tensor]:
    compressor.update(progress)
    compressor.begin_step()
    torch.manual_seed(0)
    compressor.model(**(inputs or {"input_ids": IDS_BT}))
    return {name.partition("/")[2]: term for name, term in compressor.take_loss_terms().items()}


def records(layers: int = 2) -> list[SampledTokens]:
    generator = torch.Generator().manual_seed(2)
    real_BT = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    return [
        SampledTokens(
            layer,
            torch.randn(2, 3, 4, generator=generator).requires_grad_(),
            torch.rand(2, 3, generator=generator).requires_grad_(),
            real_BT,
        )
        for layer in range(layers)
    ]


def test_penalties_are_means_over_layers() -> None:
    first, second = records()
    for penalty, of in (
        (
            norm_penalty([first, second], "kl"),
            lambda r: masked_norm(r.hidden_BTD, r.keep_BT, r.real_BT, "kl"),
        ),
        (entropy_penalty([first, second]), lambda r: negative_entropy(r.keep_BT, r.real_BT)),
        (skim_penalty([first, second]), lambda r: kept_ratio(r.keep_BT, r.real_BT)),
    ):
        assert torch.allclose(penalty, (of(first) + of(second)) / 2)


@pytest.mark.parametrize("detach", [False, True])
def test_states_get_gradients_of_the_norm_unless_they_are_detached(detach: bool) -> None:
    samples = records()
    norm_penalty(samples, "rms", detach_hidden=detach).backward()
    assert all(float(record.keep_BT.grad.abs().sum()) > 0 for record in samples)
    assert all((record.hidden_BTD.grad is None) == detach for record in samples)


def test_the_norm_waits_for_the_warm_up_and_the_entropy_does_not_and_recovery_has_neither() -> None:
    compressor, _ = prepared(warmup=0.2, ramp_end=0.6)
    names = [set(terms_at(compressor, progress)) for progress in (0.0, 0.1, 0.2, 0.5, 0.6, 0.9)]
    assert names == [{"entropy"}, {"entropy"}, {"norm", "entropy"}, {"norm", "entropy"}, set(), set()]
    compressor, _ = prepared(warmup=0.2, entropy_from_start=False)
    assert [set(terms_at(compressor, progress)) for progress in (0.0, 0.3)] == [set(), {"norm", "entropy"}]


def test_terms_carry_their_weights() -> None:
    plain, _ = prepared(warmup=0.0, removal_weight=1.0, entropy_weight=1.0)
    weighted, _ = prepared(warmup=0.0, removal_weight=0.3, entropy_weight=0.0)
    one, other = terms_at(plain, 0.0), terms_at(weighted, 0.0)
    assert torch.allclose(other["norm"], 0.3 * one["norm"]) and float(one["norm"].detach()) > 0
    assert float(other["entropy"].detach()) == 0.0 and float(one["entropy"].detach()) < 0


def test_what_a_target_adds_to_the_weight_is_a_price_on_decisions_alone() -> None:
    grads = []
    for multiplier in (1.0, 5.0):
        compressor, handle = prepared(warmup=0.0, removal_weight=1.0, target_flops=0.5, entropy_weight=0.0)
        handle.multiplier = multiplier
        norm = terms_at(compressor, 0.0)["norm"]
        records = handle.tape.read(SampledTokens)
        wanted = [records[0].hidden_BTD, records[0].keep_BT]
        grads.append((norm.detach(), *torch.autograd.grad(norm, wanted)))
    (norm, to_hidden, to_keep), (dear, to_hidden_again, to_keep_more) = grads
    assert torch.allclose(dear, 5.0 * norm) and torch.allclose(to_keep_more, 5.0 * to_keep)
    through_keep = (to_hidden_again - to_hidden).abs().max()  # what decisions read of the states
    assert float(through_keep) < 0.05 * float(to_hidden.abs().max())


def test_the_skim_loss_takes_the_place_of_both_terms() -> None:
    compressor, handle = prepared(warmup=0.0, objective="skim")
    terms = terms_at(compressor, 0.0)
    assert list(terms) == ["skim"]
    assert torch.allclose(terms["skim"], 0.5 * skim_penalty(handle.tape.read(SampledTokens)))


def test_without_a_weight_of_the_users_the_published_one_counts() -> None:
    for form, weight in NORM_WEIGHTS.items():
        assert removal_weight(BottleneckTokenDroppingConfig(form=form)) == weight
    assert removal_weight(BottleneckTokenDroppingConfig(objective="skim")) == 0.5
    assert removal_weight(BottleneckTokenDroppingConfig(removal_weight=0.0)) == 0.0


@pytest.mark.parametrize(
    "settings", [{"form": "rms"}, {"form": "kl"}, {"form": "batch_fro"}, {"objective": "skim"}]
)
@pytest.mark.parametrize("penalize", ["probabilities", "samples"])
def test_terms_and_costs_do_not_change_when_padding_is_added(settings: dict[str, Any], penalize: str) -> None:
    compressor, handle = prepared(
        warmup=0.0, removal_weight=1.0, entropy_weight=1.0, target_flops=0.5, penalize=penalize, **settings
    )
    mask_BT = (torch.arange(6) < torch.tensor([6, 4, 5, 2])[:, None]).long()
    zeros = torch.zeros(4, 3, dtype=torch.long)
    wide = {"input_ids": torch.cat([IDS_BT, zeros], 1), "attention_mask": torch.cat([mask_BT, zeros], 1)}
    compressor.update(0.1)
    spread(handle.policy)
    results = []
    for inputs in ({"input_ids": IDS_BT, "attention_mask": mask_BT}, wide):
        handle.policy.noise = 0.0  # the same decisions
        compressor.begin_step()
        compressor.model(**inputs)
        terms = {name: float(term.detach()) for name, term in compressor.take_loss_terms().items()}
        handle.end_pass()
        results.append((terms, handle.goal.latest))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    assert 0.2 < results[0][1][2] / results[0][1][3] < 0.95


def spread(policy: Any) -> None:
    """Let some tokens leave."""
    with torch.no_grad():
        for sampler in policy.samplers.values():
            sampler[4].weight *= 60.0
        policy.threshold.fill_(10.0)


def test_terms_can_be_placed_by_the_module_itself() -> None:
    seen: list[Tensor] = []

    class Weighted(BottleneckTokenDroppingLossMixin, ToyModule):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            task_loss = self.model(**batch).loss
            seen.append(torch.as_tensor(self.bottleneck_loss()).detach())
            return task_loss

    method = BottleneckTokenDropping(removal_weight=0.1, warmup=0.0, ramp_end=0.5)
    toy_trainer(callbacks=[method], max_steps=4).fit(Weighted(), toy_loader())
    assert [float(value) > 0 for value in seen] == [True, True, False, False]


class SharedStep(BottleneckTokenDroppingLossMixin, ToyModule):
    """Uses one objective for training and validation."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss + self.bottleneck_loss()  # type: ignore[misc]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss + self.bottleneck_loss())  # type: ignore[misc]


def test_an_objective_shared_with_validation_has_no_terms_there_and_measures_nothing() -> None:
    compressor, handle = prepared(warmup=0.0)
    terms_at(compressor, 0.1)
    compressor.begin_step()
    measured = handle.goal.latest
    with torch.no_grad():
        compressor.model.eval()(IDS_BT)
        assert compressor.take_loss_terms() == {}
    compressor.begin_step()
    assert handle.goal.latest is measured
    callback = BottleneckTokenDropping(warmup=0.0, ramp_end=0.5)
    toy_trainer(callbacks=[callback], num_sanity_val_steps=1, limit_val_batches=1, val_check_interval=2).fit(
        SharedStep(), toy_loader(), toy_loader()
    )


def test_samplers_that_cannot_learn_are_named() -> None:
    compressor, _ = prepared()
    compressor.model.eval()
    with pytest.raises(ValueError, match="evaluation mode"):
        terms_at(compressor, 0.1)
