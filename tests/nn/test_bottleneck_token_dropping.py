"""Samplers, straight-through decisions, the masked softmax, and decisions over padded and packed tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lightning_compress.nn.bottleneck_token_dropping import (
    BottleneckPolicy,
    ExpectedSurvival,
    SampledTokens,
    SoftBottleneckPolicy,
    TokenSampler,
    keep_gate,
    mask_bias,
)
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.flops import flops_per_token
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.tape import Tape, TokensKept
from tests.toys import tiny_bert

D, T = 8, 6
REAL_BT = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]).bool()


def soft_policy(seed: int = 0, layers: tuple[int, ...] = (0, 1), **settings: Any) -> SoftBottleneckPolicy:
    torch.manual_seed(seed)
    return SoftBottleneckPolicy(D, layers, 5, 1, tape=Tape(), **settings)


def at_the_edge(policy: BottleneckPolicy, width: float = 60.0) -> BottleneckPolicy:
    """Let decisions depend on the token: the threshold among widely spread log odds."""
    with torch.no_grad():
        for sampler in policy.samplers.values():
            sampler[4].weight *= width
        policy.threshold.fill_(10.0)
    return policy


def states(seed: int = 1, layers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*REAL_BT.shape, D, generator=generator) for _ in range(layers)]


def run(policy: SoftBottleneckPolicy, hidden: list[Tensor]) -> tuple[list[Tensor], Any]:
    """The biases of all layers, and the state after them."""
    policy.tape.clear()
    state = policy.begin(REAL_BT)
    return [policy.remove(layer, hidden_BTD, state) for layer, hidden_BTD in enumerate(hidden)], state


# the sampler


def test_a_token_is_kept_with_probability_0_99995_at_the_start() -> None:
    torch.manual_seed(0)
    probability = TokenSampler(384, 384).log_odds(torch.randn(500, 384)).sigmoid().detach()
    assert float(probability.min()) > 0.9998 and float(probability.mean()) == pytest.approx(0.99995, abs=3e-5)


def test_a_sampler_costs_what_its_linears_cost() -> None:
    sampler = TokenSampler(12, 5)
    assert sampler.flops_per_token == flops_per_token(nn.Sequential(*sampler)) == 2 * (12 * 5 + 5 * 2)
    policy = BottleneckPolicy(12, [1], 5)
    assert (policy.flops_per_token_of(0), policy.flops_per_token_of(1)) == (0, sampler.flops_per_token)


def test_log_odds_are_those_of_the_softmax_over_drop_and_keep() -> None:
    sampler, hidden = TokenSampler(D, 4), torch.randn(7, D)
    expected = sampler(hidden).softmax(-1)[:, 1]
    assert torch.allclose(sampler.log_odds(hidden).sigmoid(), expected, atol=1e-6)
    assert sampler.bfloat16().log_odds(hidden.bfloat16()).dtype == torch.float32


def test_log_odds_under_autocast_keep_differences_that_bf16_outputs_would_lose() -> None:
    torch.manual_seed(0)
    sampler, hidden = TokenSampler(D, 64), torch.randn(200, D)
    exact = sampler.log_odds(hidden).detach()
    with torch.autocast("cpu", torch.bfloat16):
        seen, outputs = sampler.log_odds(hidden).detach(), sampler(hidden).detach().float()
    lost = (outputs[:, 1] - outputs[:, 0] - exact).abs().max()
    assert float((seen - exact).abs().max()) < 0.2 * float(lost)


# decisions


def test_decisions_are_drawn_by_their_probability() -> None:
    torch.manual_seed(0)
    log_odds = torch.tensor([-2.0, 0.0, 1.0]).expand(40000, 3)
    gate, sample = keep_gate(log_odds)
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(gate, (sample >= 0.5).float())
    assert torch.allclose(gate.mean(0), log_odds[0].sigmoid(), atol=0.01)
    gumbel = nn.functional.gumbel_softmax(torch.stack([torch.zeros(40000, 3), log_odds], -1), tau=1.0)
    for power in (1, 2, 3):  # the same distribution as two-class Gumbel-softmax
        assert torch.allclose((sample**power).mean(0), (gumbel[..., 1] ** power).mean(0), atol=0.01)


def test_the_gradient_goes_straight_through_to_the_soft_sample() -> None:
    log_odds = torch.tensor([-3.0, 0.2, 2.0], requires_grad=True)
    gate, sample = keep_gate(log_odds, noise=0.0)
    assert gate.tolist() == [0.0, 1.0, 1.0]
    gate.sum().backward()
    assert torch.allclose(log_odds.grad, (sample * (1 - sample)).detach())


# the masked softmax


def masked_softmax(scores_QK: Tensor, mask_K: Tensor) -> Tensor:
    weights = mask_K * (scores_QK - scores_QK.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_the_bias_has_the_value_and_the_gradient_of_a_masked_softmax(
    dtype: torch.dtype, error: float
) -> None:
    torch.manual_seed(0)
    scores_QK, direction_QK = 3 * torch.randn(5, 9, dtype=dtype), torch.randn(5, 9, dtype=dtype)
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1, 1], dtype=dtype)
    slow, fast = (mask.clone().requires_grad_() for _ in range(2))
    expected, actual = masked_softmax(scores_QK, slow), (scores_QK + mask_bias(fast)).softmax(-1)
    assert torch.allclose(actual, expected, atol=1e-7)
    assert torch.allclose(actual.sum(-1), torch.ones(5, dtype=dtype))
    (expected * direction_QK).sum().backward()
    (actual * direction_QK).sum().backward()
    assert torch.allclose(fast.grad, slow.grad, rtol=error, atol=error)
    assert float(slow.grad[mask == 0].abs().min()) > 1e-3  # what a plain large negative bias would lose


def explicit_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> Any:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (masked_softmax(scores, mask) @ value).transpose(1, 2), None


class FixedMask(nn.Module):
    """A policy whose mask is given, as a bias or as it is."""

    is_active = True

    def __init__(self, mask_BT: Tensor, as_bias: bool) -> None:
        super().__init__()
        self.mask_BT, self.as_bias = mask_BT, as_bias

    def begin(self, real_BT: Tensor) -> None:
        return None if real_BT is None else real_BT

    def remove(self, layer: int, hidden_BTD: Tensor, state: Any) -> Tensor:
        return mask_bias(self.mask_BT) if self.as_bias else self.mask_BT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [7, 200])
def test_gradients_through_the_familys_attention_are_those_of_the_masked_softmax(
    attention: str, tokens: int
) -> None:
    AttentionInterface.register("explicit_mask", explicit_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("explicit_mask", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    gradients, outputs = [], []
    torch.manual_seed(3)
    mask_BT = (torch.rand(2, tokens) > 0.4).float()
    mask_BT[:, 0] = 1.0
    ids_BT = torch.randint(1, 40, (2, tokens))
    for implementation, as_bias in ((attention, True), ("explicit_mask", False)):
        model = tiny_bert(max_position_embeddings=tokens).train()
        model.config._attn_implementation = implementation
        leaf_BT = mask_BT.clone().requires_grad_()
        model.bert.encoder = DroppingEncoder(model.bert.encoder, FixedMask(leaf_BT, as_bias)).train()
        logits = model(ids_BT).logits
        logits[:, 0].sum().backward()
        gradients.append(leaf_BT.grad)
        outputs.append(logits.detach())
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    assert float(gradients[1][mask_BT == 0].abs().max()) > 0


# the trainable policy


def test_masks_multiply_up_and_leave_padding_and_the_first_token_alone() -> None:
    policy = at_the_edge(soft_policy(layers=(0, 1, 2))).train()
    torch.manual_seed(5)
    biases, state = run(policy, states(layers=3))
    kept = [record.keep_BT for record in policy.tape.read(TokensKept)]
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(kept))
    assert 0 < float(kept[2].sum()) < float(REAL_BT.sum()) and torch.equal(kept[2], state.mask_BT)
    assert all(bool((keep[:, 0] == 1).all()) and bool((keep[~REAL_BT] == 0).all()) for keep in kept)
    for bias_BT, keep_BT in zip(biases, kept, strict=True):
        assert torch.equal(bias_BT == 0, keep_BT == 1)
        assert bool((bias_BT[REAL_BT & (keep_BT == 0)] == -30).all()) and bool(
            (bias_BT[~REAL_BT] == -1e4).all()
        )


def test_fp16_has_a_bias_that_it_can_represent_the_inverse_of() -> None:
    policy = at_the_edge(soft_policy()).train()
    with torch.autocast("cpu", torch.float16):
        biases, _ = run(policy, states())
    assert set(biases[1][REAL_BT].tolist()) == {0.0, -9.0}


def test_a_later_layers_attention_teaches_the_samplers_before_it() -> None:
    policy = at_the_edge(soft_policy(), width=5.0).train()
    biases, _ = run(policy, states())
    biases[1].sum().backward()
    assert all(float(sampler[1].weight.grad.abs().sum()) > 0 for sampler in policy.samplers.children())


def test_layers_that_do_not_decide_keep_the_mask_of_the_ones_before() -> None:
    policy = at_the_edge(soft_policy(layers=(1,))).train()
    biases, _ = run(policy, states(layers=3))
    assert bool((biases[0][REAL_BT] == 0).all()) and torch.equal(biases[1], biases[2])
    assert [record.layer for record in policy.tape.read(SampledTokens)] == [1]
    assert [record.layer for record in policy.tape.read(TokensKept)] == [0, 1, 2]


@pytest.mark.parametrize("penalize", ["probabilities", "samples"])
def test_losses_see_probabilities_of_those_that_arrive_or_samples_multiplied_up(penalize: Any) -> None:
    policy = at_the_edge(soft_policy(penalize=penalize), width=10.0).train()
    policy.noise = 0.0
    hidden = states()
    run(policy, hidden)
    first, second = (record.keep_BT for record in policy.tape.read(SampledTokens))
    raw = [(policy.scores(layer, hidden[layer]) - 10.0).sigmoid() for layer in (0, 1)]
    arrived = (raw[0] >= 0.5) & REAL_BT
    others = REAL_BT.clone()
    others[:, 0] = False
    assert torch.allclose(first[others], raw[0][others])
    expected = raw[1] * (arrived if penalize == "probabilities" else raw[0])
    assert torch.allclose(second[others], expected[others], atol=1e-6)
    assert bool((second[:, 0] == 1).all()) and bool((second[~REAL_BT] == 0).all())


@pytest.mark.parametrize("noise", [1.0, 0.3])
def test_the_slope_is_the_derivative_of_the_expected_tokens_by_the_threshold(noise: float) -> None:
    policy, hidden, step = at_the_edge(soft_policy(), width=10.0).double().train(), states(), 1e-4
    policy.noise = noise
    hidden = [hidden_BTD.double() for hidden_BTD in hidden]

    def expected(threshold: float) -> list[ExpectedSurvival]:
        policy.threshold.fill_(threshold)
        run(policy, hidden)
        return policy.tape.read(ExpectedSurvival)

    low, middle, high = (expected(10.0 + offset) for offset in (-step, 0.0, step))
    for below, record, above in zip(low, middle, high, strict=True):
        slope_B = (above.count_B - below.count_B) / (2 * step)
        assert torch.allclose(record.slope_B.double(), slope_B.double(), atol=2e-3)
        assert float(record.slope_B.sum()) < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_the_threshold_add_up_in_half_precision(dtype: torch.dtype) -> None:
    policy = soft_policy().to(dtype)
    policy.threshold.fill_(12.0)
    for _ in range(100):
        policy.threshold += 0.001
    assert float(policy.threshold) == pytest.approx(12.1, abs=1e-4)
    assert policy.scale.dtype == torch.float32 and policy.samplers["0"][1].weight.dtype == dtype


# the deployed policy


def test_evaluation_asks_for_the_log_odds_that_will_be_saved_and_training_for_those_that_move() -> None:
    policy = soft_policy(layers=(0,)).bfloat16()
    policy.noise = 0.0
    with torch.no_grad():
        policy.samplers["0"][4].weight.zero_()
        policy.samplers["0"][4].bias.copy_(torch.tensor([-6.1875, 6.1875]))
    policy.threshold.fill_(12.376)  # a token has 12.375, the nearest number in bf16
    hidden = [states()[0].bfloat16()]
    assert float(policy.deployed_threshold) == 12.375
    assert torch.equal(run(policy.eval(), hidden)[1].mask_BT.bool(), REAL_BT)
    assert run(policy.train(), hidden)[1].mask_BT.sum() == len(REAL_BT)


def test_deployment_keeps_what_evaluation_sees_for_a_batch_and_for_each_text_alone() -> None:
    soft = at_the_edge(soft_policy()).eval()
    hidden = states()
    biases, _ = run(soft, hidden)
    deployed = at_the_edge(BottleneckPolicy(D, (0, 1), 5))
    deployed.load_state_dict(soft.state_dict())
    segments = Segments.of(REAL_BT)
    keep_N = deployed.decide(0, hidden[0][REAL_BT], segments)
    assert torch.equal(keep_N, biases[0][REAL_BT] == 0) and 0 < int(keep_N.sum()) < len(keep_N)
    assert bool((biases[0][~REAL_BT] == -torch.inf).all())
    for row in range(3):
        alone = deployed.decide(0, hidden[0][row][REAL_BT[row]], Segments.of(REAL_BT[row : row + 1]))
        assert torch.equal(alone, keep_N[segments.sequence_N == row])


def test_protected_rows_stay_whatever_their_odds() -> None:
    policy = BottleneckPolicy(D, (0,), 5)
    policy.threshold.fill_(1e4)
    protected_BT = policy.protected(REAL_BT)
    protected_BT[0, 3] = True
    keep_N = policy.decide(0, states()[0][REAL_BT], Segments.of(REAL_BT, protected_BT))
    assert keep_N.int().tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert policy.decide(1, states()[0][REAL_BT], Segments.of(REAL_BT)) is None
    assert policy.scores(1, states()[0]) is None


def test_the_dial_moves_the_threshold_by_four_log_odds_an_e_fold_from_all_to_nothing() -> None:
    policy, hidden_ND, segments = (
        at_the_edge(BottleneckPolicy(D, (0,), 5)),
        states()[0][REAL_BT],
        Segments.of(REAL_BT),
    )
    log_odds_N = policy.scores(0, hidden_ND)

    def kept(scale: float) -> Tensor:
        policy.scale.fill_(scale)
        return policy.decide(0, hidden_ND, segments)

    firsts = torch.zeros(len(hidden_ND), dtype=torch.bool)
    firsts[segments.firsts_B] = True
    assert torch.equal(kept(1.0), (log_odds_N >= 10.0) | firsts)
    assert torch.equal(kept(2.0), (log_odds_N >= 10.0 + 4 * torch.tensor(2.0).log()) | firsts)
    assert bool(kept(0.0).all()) and torch.equal(kept(2.0**17), firsts)
