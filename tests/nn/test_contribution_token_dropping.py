"""Shares, soft removal and the hard rule, against the numbers of the specification and against slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compress.nn import contribution_token_dropping as module
from lightning_compress.nn.contribution_token_dropping import (
    ContributionPolicy,
    ContributionPredictor,
    ContributionShares,
    ExpectedTokens,
    KeyBias,
    SoftContributionPolicy,
    masked_shares,
    soft_removal,
)
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.tape import Tape

DELTA = 0.0125
WIDTH, LAYERS = 8, 3


@pytest.mark.parametrize(
    ("slope", "share", "bias"),
    [
        (10.0, 0.0, -10.01),
        (10.0, DELTA / 2, -5.01),
        (10.0, 0.9 * DELTA, -1.01),
        (10.0, DELTA, -0.01),
        (10.0, 2 * DELTA, -0.00987),
        (1000.0, 0.0, -1000.0),
        (1000.0, DELTA / 2, -500.0),
        (1000.0, 0.9 * DELTA, -100.0),
        (1000.0, DELTA, -1e-4),
        (1000.0, 2 * DELTA, -1e-4),
        (10.0, 1.0, 0.0),
        (1e5, 0.0, -1e4),
    ],
)
def test_the_soft_removal_has_the_values_of_the_specification(
    slope: float, share: float, bias: float
) -> None:
    got = soft_removal(
        torch.tensor(share, dtype=torch.float64), torch.tensor(DELTA, dtype=torch.float64), slope
    )
    assert float(got) == pytest.approx(bias, rel=2e-2 if slope == 1000.0 else 1e-3, abs=1e-12)


@pytest.mark.parametrize("slope", [10.0, 300.0, 1e5])
@pytest.mark.parametrize("threshold", [1e-3, DELTA, 0.5, 0.99])
def test_the_soft_removal_is_continuous_and_rises_with_the_share(slope: float, threshold: float) -> None:
    delta = torch.tensor(threshold, dtype=torch.float64)
    below, above = soft_removal(delta - 1e-12, delta, slope), soft_removal(delta, delta, slope)
    assert 0.0 <= float(above - below) < 1.1e-12 * slope / threshold
    shares = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    biases = soft_removal(shares, delta, slope)
    assert (biases.diff() >= 0).all() and biases.max() <= 0 and biases.min() >= -1e4
    assert float(biases[-1]) == 0.0


def random_batch(batch: int = 4, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and survivals with padding (0), partly removed tokens, and a first token that is all there."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, width, generator=generator) * 3
    survival = torch.rand(batch, width, generator=generator).clamp_min(0.05)
    survival[:, 0] = 1.0
    survival[0, 4:] = 0.0
    survival[1, 1:] = 0.0
    survival[2, 3] = 1e-9
    return logits, survival


def test_shares_sum_to_one_over_the_survivors_and_the_others_have_none() -> None:
    logits, survival = random_batch()
    shares = masked_shares(logits, survival)
    assert torch.allclose(shares.sum(1), torch.ones(4))
    assert (shares[survival <= 1e-6] == 0).all() and (shares[survival > 1e-6] > 0).all()
    alive = survival * (survival > 1e-6)
    slow = logits.double().exp() * alive
    assert torch.allclose(shares.double(), slow / slow.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("pad_logit", [1e4, 6e4, -6e4, float("inf")])
def test_logits_of_padding_change_nothing_however_large(pad_logit: float) -> None:
    logits, survival = random_batch()
    expected = masked_shares(logits, survival)
    logits[survival == 0] = pad_logit
    assert torch.equal(masked_shares(logits, survival), expected)


def test_no_gradient_is_nan_where_tokens_are_gone() -> None:
    logits, survival = random_batch()
    logits.requires_grad_(), survival.requires_grad_()
    (masked_shares(logits, survival) * torch.arange(7.0)).sum().backward()
    assert logits.grad.isfinite().all() and survival.grad.isfinite().all()
    assert (logits.grad[survival.detach() <= 1e-6] == 0).all()


def soft_policy(
    layers: tuple[int, ...] = (0, 1, 2), eta: float = 0.9, **settings: bool
) -> SoftContributionPolicy:
    torch.manual_seed(0)
    settings = {"shares_reach_encoder": False, **settings}
    policy = SoftContributionPolicy(WIDTH, layers, 4, 1, threshold=eta, tape=Tape(), **settings)
    for parameter in policy.predictors.parameters():
        torch.nn.init.normal_(parameter)
    policy.is_active = True
    return policy


def hidden_states(batch: int = 4, width: int = 9, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, width, WIDTH, generator=generator) for _ in range(LAYERS)]


def real_tokens(width: int = 9) -> Tensor:
    return torch.arange(width) < torch.tensor([9, 5, 1, 2])[:, None]


def run(policy: SoftContributionPolicy, hidden: list[Tensor], real: Tensor) -> list[Tensor]:
    policy.tape.clear()
    state = policy.begin(real)
    return [policy.remove(layer, states, state) for layer, states in enumerate(hidden)]


def slow_soft_pass(
    policy: SoftContributionPolicy, hidden: list[Tensor], real: Tensor
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """The official equations for one text at a time, in plain numbers (first token's factor 1): biases and counts."""
    all_biases, all_counts = [], []
    for row, mask in enumerate(real):
        n = int(mask.sum())
        survival, bias, biases, counts = [1.0] * n, [0.0] * n, [], []
        for layer, states in enumerate(hidden):
            weights = policy.predictors[str(layer)](states[row, :n]).flatten().double().exp().tolist()
            total = sum(w * m for w, m in zip(weights, survival, strict=True))
            shares = [w * m / total for w, m in zip(weights, survival, strict=True)]
            delta = float(policy.eta_K[layer]) / sum(survival)
            for i in range(1, n):
                g = float(
                    soft_removal(torch.tensor(shares[i]).double(), torch.tensor(delta).double(), policy.slope)
                )
                edit = g * survival[i]
                bias[i] = max(-1e4, bias[i] + edit)
                survival[i] *= torch.tensor(edit).exp().item() if survival[i] > 1e-6 else 1.0
            biases.append(list(bias))
            counts.append(sum(survival))
        all_biases.append(biases)
        all_counts.append(counts)
    return all_biases, all_counts


@pytest.mark.parametrize("slope", [10.0, 1000.0])
def test_a_soft_pass_equals_the_equations_worked_text_by_text(slope: float) -> None:
    policy, hidden, real = soft_policy(), hidden_states(), real_tokens()
    policy.slope = slope
    with torch.no_grad():
        got = run(policy, hidden, real)
        biases, counts = slow_soft_pass(policy, hidden, real)
    tokens = policy.tape.read(ExpectedTokens)
    for row, mask in enumerate(real):
        for layer in range(LAYERS):
            expected = torch.tensor(biases[row][layer])
            assert torch.allclose(got[layer][row, mask], expected, rtol=1e-3, atol=1e-3)
            assert (got[layer][row, ~mask] == -1e4).all()
            assert float(tokens[layer].count_B[row]) == pytest.approx(counts[row][layer], rel=1e-4)
    assert any(count[-1] < count[0] - 0.5 for count in counts)


@pytest.mark.parametrize("training", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
def test_lengths_never_grow_from_layer_to_layer_and_the_first_token_always_stays(
    layers: tuple[int, ...], training: bool
) -> None:
    policy, real = soft_policy(layers).train(training), real_tokens()
    policy.slope = 100.0
    biases = run(policy, hidden_states(), real)
    records = policy.tape.read(ExpectedTokens)
    assert [record.layer for record in records] == [0, 1, 2]
    counts = torch.stack([record.count_B for record in records]).detach()
    assert (counts.diff(dim=0) <= 1e-6).all() and (counts >= 1).all() and (counts <= real.sum(1)).all()
    assert (counts[-1] < real.sum(1)).any()
    assert all((bias[:, 0] == 0).all() for bias in biases)
    undecided = set(range(LAYERS)) - set(layers)
    assert all(layer == 0 or torch.equal(counts[layer], counts[layer - 1]) for layer in undecided)


def test_every_layer_records_its_bias_twice_with_one_value() -> None:
    policy = soft_policy((0, 2))
    biases = run(policy, hidden_states(), real_tokens())
    records = policy.tape.read(KeyBias)
    assert [record.layer for record in records] == [0, 1, 2]
    for record, bias in zip(records, biases, strict=True):
        assert record.bias_BT is bias
        assert torch.allclose(record.threshold_bias_BT, bias, rtol=1e-5, atol=1e-5)


def test_recorded_shares_sum_to_one_and_padding_has_none() -> None:
    policy, real = soft_policy(), real_tokens()
    run(policy, hidden_states(), real)
    for record in policy.tape.read(ContributionShares):
        assert torch.allclose(record.share_BT.sum(1), torch.ones(4))
        assert (record.share_BT[~real] == 0).all() and not record.survival_BT.requires_grad


def counts_with_factor(policy: SoftContributionPolicy, place: int, factor: float, monkeypatch) -> Tensor:
    """Expected tokens of all layers if the first token's share is scaled at one layer."""
    scale, calls = module._scale_first, []

    def scaled(share: Tensor, theta: Tensor | None, real: Tensor) -> Tensor:
        calls.append(1)
        return scale(share, theta * factor if theta is not None and len(calls) - 1 == place else theta, real)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_scale_first", scaled)
        run(policy, [states.double() for states in hidden_states()], real_tokens())
    return torch.stack([record.count_B for record in policy.tape.read(ExpectedTokens)]).sum()


@pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("place", [1, 2])
def test_the_gradient_of_theta_is_that_of_its_factor_over_theta(
    place: int, theta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = soft_policy().double()
    with torch.no_grad():
        policy.theta_K[place] = theta
    counts_with_factor(policy, place, 1.0, monkeypatch).backward()
    step = 1e-5
    up, down = (counts_with_factor(policy, place, 1.0 + s, monkeypatch).item() for s in (step, -step))
    slope = (up - down) / (2 * step)
    assert abs(slope) > 1e-3
    assert float(policy.theta_K.grad[place]) == pytest.approx(slope / theta, rel=1e-3)
    assert float(policy.theta_K.grad[0]) == 0.0


def test_the_gradient_of_eta_in_the_expected_lengths_equals_finite_differences() -> None:
    policy, hidden = soft_policy().double(), [states.double() for states in hidden_states()]

    def length() -> Tensor:
        run(policy, hidden, real_tokens())
        return torch.stack([record.count_B for record in policy.tape.read(ExpectedTokens)]).sum()

    length().backward()
    step, last = 1e-6, LAYERS - 1  # what the last layer lets through changes no later share
    with torch.no_grad():
        policy.eta_K[last] += step
        up = length().item()
        policy.eta_K[last] -= 2 * step
        down = length().item()
    assert float(policy.eta_K.grad[last]) == pytest.approx((up - down) / (2 * step), rel=1e-5)
    assert (policy.eta_K.grad < 0).all()


def test_lengths_are_functions_of_the_thresholds_alone_and_biases_of_everything() -> None:
    policy, hidden = soft_policy(), [states.requires_grad_() for states in hidden_states()]
    biases = run(policy, hidden, real_tokens())
    length = torch.stack([record.count_B for record in policy.tape.read(ExpectedTokens)]).sum()
    others = [*hidden, *policy.predictors.parameters()]
    assert torch.autograd.grad(length, others, retain_graph=True, allow_unused=True) == (None,) * len(others)
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((biases[2] * weights).sum(), [*others, policy.eta_K, policy.theta_K])
    assert all(float(grad.abs().sum()) > 0 for grad in grads if grad.numel() > 1)


def test_recorded_shares_reach_the_hidden_states_only_where_that_is_wanted() -> None:
    for wanted in (False, True):
        policy = soft_policy(shares_reach_encoder=wanted)
        hidden = [states.requires_grad_() for states in hidden_states()]
        run(policy, hidden, real_tokens())
        shares = sum((r.share_BT**2).sum() for r in policy.tape.read(ContributionShares))
        grads = torch.autograd.grad(shares, hidden, allow_unused=True)
        assert all((grad is not None) == wanted for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slope", [10.0, 1e5])
def test_half_precision_gives_no_nan_soft_or_hard(dtype: torch.dtype, slope: float) -> None:
    for training in (True, False):
        policy = soft_policy().train(training)
        policy.predictors.to(dtype)
        policy.slope = slope
        hidden = [(states * 30).to(dtype).requires_grad_() for states in hidden_states()]
        biases = run(policy, hidden, real_tokens())
        assert not any(bias.to(dtype).isnan().any() for bias in biases)
        if training:
            assert all(bias.to(dtype).isfinite().all() for bias in biases)
            sum(bias.sum() for bias in biases).backward()
            assert all(p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_thresholds_learn_in_float32_whatever_the_policy_is_cast_to(dtype: torch.dtype) -> None:
    policy = soft_policy()
    eta, exact = policy.eta_K, torch.full_like(policy.eta_K, 0.1234567)
    eta.data.copy_(exact)
    policy.to(dtype)
    assert all(p.dtype == dtype for p in policy.predictors.parameters())
    wanted = torch.float32 if dtype.itemsize < 4 else dtype
    assert {t.dtype for t in (policy.eta_K, policy.theta_K, policy.scale)} == {wanted}
    assert policy.eta_K is eta and torch.equal(eta.detach(), exact.to(wanted))


def test_evaluation_has_the_thresholds_that_will_be_saved() -> None:
    policy, real = soft_policy((0,), eta=1.0).bfloat16().eval(), real_tokens()
    torch.nn.init.zeros_(policy.predictors["0"][2].weight)  # all have the mean share
    hidden = [states.bfloat16() for states in hidden_states()]
    policy.scale.fill_(1.001)  # the nearest number in bf16 is 1
    assert policy.deployed_eta_K.tolist() == [1.0] and policy.deployed_eta_K.dtype == torch.bfloat16
    assert torch.equal(run(policy, hidden, real)[0] == 0, real)
    policy.scale.fill_(1.01)
    assert (run(policy, hidden, real)[0] == 0).sum() == len(real)


def test_the_hard_rule_keeps_what_is_at_or_above_the_threshold_of_its_own_text() -> None:
    policy = ContributionPolicy(WIDTH, (0, 2), 4)
    assert policy.decide(1, torch.zeros(3, WIDTH), Segments.of(torch.ones(1, 3).bool())) is None
    torch.nn.init.zeros_(policy.predictors["0"][2].weight)
    policy.eta_K[0] = 1.0
    keep = policy.decide(0, torch.randn(5, WIDTH), Segments.of(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()))
    assert keep.tolist() == [True] * 5
    policy.scale.fill_(1.01)
    keep = policy.decide(0, torch.randn(5, WIDTH), Segments.of(torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()))
    assert keep.tolist() == [True, False, True, False, False]


def test_the_rule_on_rows_equals_the_rule_on_padded_batches_and_on_single_texts() -> None:
    soft, real = soft_policy(eta=0.95).double().eval(), real_tokens()
    policy = ContributionPolicy(WIDTH, (0, 1, 2), 4).double()
    policy.load_state_dict({n: v for n, v in soft.state_dict().items() if n != "theta_K"})
    hidden = [states.double() for states in hidden_states()]
    run(soft, hidden, real)
    padded = [bias.bias_BT == 0 for bias in soft.tape.read(KeyBias)]
    together = rows_kept(policy, hidden, real)
    assert all(torch.equal(a, b) for a, b in zip(together, padded, strict=True))
    for row in range(4):
        alone = rows_kept(policy, [states[row : row + 1] for states in hidden], real[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(padded[-1], padded[0]) and not torch.equal(padded[0], real)


def rows_kept(policy: ContributionPolicy, hidden: list[Tensor], real: Tensor) -> list[Tensor]:
    """Which tokens of a padded batch each layer sees, run over rows."""
    segments, kept = Segments.of(real, policy.protected(real)), []
    for layer, states in enumerate(hidden):
        keep = policy.decide(layer, states.flatten(0, 1)[segments.origin_N], segments)
        counts = [int(part.sum()) for part in keep.split(segments.lengths_B.tolist())]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        segments = segments.select(keep.nonzero().flatten(), offsets)
        kept.append(
            torch.zeros(real.numel(), dtype=torch.bool).index_fill(0, segments.origin_N, True).view_as(real)
        )
    return kept


@pytest.mark.parametrize("first", [1, 3])
def test_first_and_guarded_tokens_are_protected_and_padding_never(first: int) -> None:
    policy = ContributionPolicy(WIDTH, (0,), 4, protect_first=first)
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    expected = left & (left.cumsum(1) <= first)
    assert torch.equal(policy.protected(left), expected)
    policy.guarded_BT = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 1]]).bool()
    expected[0, 5] = expected[1, 3] = True
    assert torch.equal(policy.protected(left), expected)


def test_predictors_start_small_and_cost_what_their_products_cost() -> None:
    predictor = ContributionPredictor(768, 32)
    assert predictor.flops_per_token == 2 * (768 * 32 + 32)
    assert float(predictor[0].weight.detach().abs().max()) <= 0.04 and not predictor[0].bias.any()
    policy = ContributionPolicy(768, (1,), 32)
    assert (policy.flops_per_token_of(0), policy.flops_per_token_of(1)) == (0, predictor.flops_per_token)


def test_nothing_leaves_at_initialisation() -> None:
    policy = SoftContributionPolicy(
        WIDTH, (0, 1, 2), 4, 1, threshold=0.25, tape=Tape(), shares_reach_encoder=False
    ).eval()
    run(policy, hidden_states(), real_tokens())
    assert all(
        torch.equal(record.count_B, real_tokens().sum(1).float())
        for record in policy.tape.read(ExpectedTokens)
    )
