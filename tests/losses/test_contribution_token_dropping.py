"""Distance to saliency and length against slow forms, and which term's gradient reaches what."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.losses import contribution_token_dropping as module
from lightning_compress.losses.contribution_token_dropping import (
    ContributionTokenDroppingLossMixin,
    cost_pressure,
    expected_length,
    saliency_divergence,
    saliency_target,
    terms,
)
from lightning_compress.methods.contribution_token_dropping import (
    ContributionTokenDroppingHandle,
    update,
)
from lightning_compress.nn.contribution_token_dropping import ContributionShares, ExpectedTokens
from tests.toys_contribution import classifier, dropping, texts


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Saliency, survival and predicted shares; a padded text, and one of which only the first token is left."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.rand(3, 5, generator=generator)
    survival = torch.rand(3, 5, generator=generator)
    survival[:, 0] = 1.0
    survival[1, 3:] = 0.0
    survival[2, 1:] = 0.0
    share = torch.rand(3, 5, generator=generator) * survival
    return saliency, survival, share / share.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "theta", [1.0, 0.4, torch.tensor(3.0, requires_grad=True)], ids=["1", "0.4", "tensor"]
)
def test_the_target_equals_a_slow_form_and_is_a_constant(theta: Any) -> None:
    saliency, survival, _ = distributions()
    survival.requires_grad_()
    target = saliency_target(saliency, survival, theta)
    for row in range(3):
        mass = [float(s * m) for s, m in zip(saliency[row], survival[row].detach(), strict=True)]
        total = sum(mass)
        mass = [m / total for m in mass]
        mass[0] *= theta if isinstance(theta, float) else theta.item()
        assert target[row].tolist() == pytest.approx([m / sum(mass) for m in mass])
    assert not target.requires_grad and torch.allclose(target.sum(1), torch.ones(3))


def test_padding_on_the_left_moves_the_target_and_changes_nothing_else() -> None:
    saliency, survival, share = distributions()
    flipped = [torch.nn.functional.pad(part, (2, 0)) for part in (saliency, survival, share)]
    target = saliency_target(saliency, survival, 0.3)
    assert torch.allclose(saliency_target(*flipped[:2], 0.3)[:, 2:], target)
    moved = saliency_divergence(torch.nn.functional.pad(target, (2, 0)), flipped[2], flipped[1])
    assert torch.allclose(moved, saliency_divergence(target, share, survival))


def test_a_text_without_any_saliency_gives_no_nan() -> None:
    _, survival, share = distributions()
    target = saliency_target(torch.zeros(3, 5), survival)
    assert (target == 0).all() and saliency_divergence(target, share, survival).isfinite()


def test_the_divergence_equals_a_slow_form() -> None:
    saliency, survival, share = distributions()
    target = saliency_target(saliency, survival)
    expected = 0.0
    for row in range(3):
        kl = sum(
            float(q) * (math.log(max(float(q), 1e-7)) - math.log(max(float(p), 1e-7)))
            for q, p, m in zip(target[row], share[row], survival[row], strict=True)
            if m > 0
        )
        expected += float(survival[row, 1:].max()) * kl / 3
    assert expected > 0
    assert float(saliency_divergence(target, share, survival)) == pytest.approx(expected, rel=1e-5)


def test_the_divergence_is_zero_for_a_perfect_predictor_and_for_first_tokens_alone() -> None:
    saliency, survival, share = distributions()
    target = saliency_target(saliency, survival)
    assert float(saliency_divergence(target, target, survival)) == pytest.approx(0.0, abs=1e-7)
    alone = torch.zeros_like(survival)
    alone[:, 0] = 1.0
    assert float(saliency_divergence(saliency_target(saliency, alone), share, alone)) == 0.0
    one = torch.ones(2, 1)
    assert float(saliency_divergence(one, one, one)) == 0.0


def test_the_gradient_of_the_divergence_is_finite_where_a_share_vanishes() -> None:
    saliency, survival, share = distributions()
    share[0, 1] = 0.0
    share.requires_grad_()
    saliency_divergence(saliency_target(saliency, survival), share, survival).backward()
    assert share.grad.isfinite().all()


def test_the_expected_length_is_the_sum_over_layers_averaged_over_texts() -> None:
    assert float(expected_length([torch.tensor([4.0, 2.0]), torch.tensor([3.0, 1.0])])) == 5.0


@pytest.mark.parametrize(
    ("ratio", "excess", "value"), [(0.5, 0.0, 0.0), (1.0, 0.0, 2.0), (1.0, 0.2, 3.0), (0.25, -0.5, -1.0)]
)
def test_the_pressure_grows_with_the_ratio_and_with_past_excess(
    ratio: float, excess: float, value: float
) -> None:
    assert float(cost_pressure(torch.tensor(ratio), 0.5, 2.0, excess)) == pytest.approx(value)


def test_there_is_no_term_while_the_model_only_fine_tunes() -> None:
    assert terms(SimpleNamespace(phase="warmup")) == {}


LABELS = torch.tensor([0, 1, 2, 0])


def test_validation_has_no_terms_and_measures_nothing() -> None:
    handle, _ = ramp()
    handle.model.eval()
    with torch.no_grad():
        handle.model(**texts())
        assert terms(handle) == {}
    handle.end_pass()
    assert handle.goal.latest == []


def ramp(**settings: Any) -> tuple[ContributionTokenDroppingHandle, Tensor]:
    """A model in its ramp after one training pass, and its task loss."""
    handle = dropping(classifier(), eta=0.8, **{"saliency_weight": 1.0, **settings})
    handle.model.train()
    for dropout in handle.model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    return handle, handle.model(**texts(), labels=LABELS).loss


def gradients(handle: ContributionTokenDroppingHandle, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss with respect to each group of parameters, flattened; zeros where there is none."""
    groups: dict[str, list[Tensor]] = {"encoder": [], "predictors": [], "eta": [], "theta": []}
    for name, parameter in handle.model.named_parameters():
        if ".policy." not in name:
            groups["encoder"].append(parameter)
        elif ".predictors." in name:
            groups["predictors"].append(parameter)
    groups["eta"], groups["theta"] = [handle.policy.eta_K], [handle.policy.theta_K]
    found = {}
    for group, parameters in groups.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        found[group] = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    return found


def reached(found: dict[str, Tensor]) -> set[str]:
    return {group for group, grad in found.items() if bool((grad != 0).any())}


LAYERS = [None, (0, 2), (1,)]


@pytest.mark.parametrize(
    "goal", [{"target_flops": 0.5}, {"target_tokens": 0.5}, {"length_weight": 0.1}], ids=str
)
@pytest.mark.parametrize("layers", LAYERS)
def test_the_task_reaches_everything_and_the_length_the_thresholds_alone(
    layers: tuple[int, ...] | None, goal: dict[str, float]
) -> None:
    handle, task = ramp(layers=layers, **goal)
    assert reached(gradients(handle, task)) == {"encoder", "predictors", "eta", "theta"}
    length = terms(handle)["length"]
    assert reached(gradients(handle, length)) == {"eta", "theta"}
    assert (gradients(handle, length)["eta"] <= 0).all()


@pytest.mark.parametrize("layers", LAYERS)
def test_the_distance_to_saliency_reaches_the_predictors_alone(layers: tuple[int, ...] | None) -> None:
    handle, _ = ramp(layers=layers)
    assert reached(gradients(handle, terms(handle)["saliency"])) == {"predictors"}


@pytest.mark.parametrize("layers", [None, (0, 2), (0,)])
def test_the_distance_reaches_the_encoder_too_if_wanted_and_the_thresholds_never(
    layers: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, _ = ramp(saliency_to_encoder=True, layers=layers)
    found = gradients(handle, terms(handle)["saliency"])
    monkeypatch.setattr(module, "_leak", lambda distance, biases: distance.new_zeros(()))
    leaking = gradients(handle, terms(handle)["saliency"])
    assert {"encoder", "predictors"} <= reached(found)
    for group in ("encoder", "predictors"):
        assert torch.equal(found[group], leaking[group])
    for group in ("eta", "theta"):
        scale = float(leaking[group].abs().max())
        assert float(found[group].abs().max()) <= 1e-4 * scale
    if layers != (0,):  # where a later predictor reads what the first thresholds let through
        assert float(leaking["eta"].abs().max()) > 1e-6


@pytest.mark.parametrize("saliency_to_encoder", [False, True])
def test_one_backward_pass_of_the_sum_gives_each_group_what_it_is_due(saliency_to_encoder: bool) -> None:
    handle, task = ramp(saliency_to_encoder=saliency_to_encoder)
    both = terms(handle)
    parts = {name: gradients(handle, loss) for name, loss in {"task": task, **both}.items()}
    total = gradients(handle, task + sum(both.values()))
    due = {
        "encoder": ("task", "saliency") if saliency_to_encoder else ("task",),
        "predictors": ("task", "saliency"),
        "eta": ("task", "length"),
        "theta": ("task", "length"),
    }
    for group, names in due.items():
        expected = sum(parts[name][group] for name in names)
        assert torch.allclose(total[group], expected, rtol=1e-4, atol=1e-6)


def test_early_layers_weigh_more_and_the_weight_scales_the_sum() -> None:
    handle, _ = ramp(saliency_weight=0.5)
    got = terms(handle)["saliency"].detach()
    saliency = handle.look_up_saliency()
    expected = 0.0
    for record in handle.tape.read(ContributionShares):
        target = saliency_target(saliency, record.survival_BT)
        expected += (3 - record.layer) * saliency_divergence(target, record.share_BT, record.survival_BT)
    total = float(torch.as_tensor(expected).detach())
    assert float(got.detach()) == pytest.approx(0.5 * total, rel=1e-5) and float(got.detach()) > 0


def test_the_length_term_is_what_the_goal_says() -> None:
    handle, _ = ramp(length_weight=0.25)
    counts = [record.count_B for record in handle.tape.read(ExpectedTokens)]
    assert float(terms(handle)["length"].detach()) == pytest.approx(
        0.25 * float(expected_length(counts).detach())
    )
    handle, _ = ramp(target_tokens=0.5)
    handle.multiplier = 2.0
    counts = torch.stack([record.count_B for record in handle.tape.read(ExpectedTokens)])
    ratio = float(counts.sum().detach()) / (3 * int(texts()["attention_mask"].sum()))
    assert float(terms(handle)["length"].detach()) == pytest.approx(
        2.0 * (ratio / handle.goal.scheduled(handle.progress) - 1.0), rel=1e-4
    )


def test_thresholds_rest_in_recovery_and_predictors_go_on_learning() -> None:
    handle, _ = ramp()
    update(handle, 0.95)
    assert handle.phase == "recovery"
    handle.model(**texts())
    both = terms(handle)
    assert float(both["length"].detach()) == 0.0 and reached(gradients(handle, both["length"])) == set()
    assert handle.auxiliary_groups()[0].lr == 0.0 and handle.auxiliary_groups()[1].lr > 0.0
    assert float(both["saliency"].detach()) > 0


def test_the_mixin_takes_this_methods_terms() -> None:
    class Module(ContributionTokenDroppingLossMixin):
        def __init__(self) -> None:
            source = SimpleNamespace(take_loss_terms=lambda stem: {f"{stem}/a": torch.tensor(1.0)})
            self._compression = SimpleNamespace(compressor=source)

    assert float(Module().contribution_loss()) == 1.0
    with pytest.raises(RuntimeError, match="no compression callback is active"):
        ContributionTokenDroppingLossMixin().contribution_loss()
