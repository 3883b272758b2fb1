"""The mathematics of PPO against numbers worked by hand, and against identities."""

import itertools
import math

import pytest
import torch
from torch import tensor

from align.maths import advantages as estimators
from align.maths.advantages import gae, token_rewards
from align.maths.estimators import ESTIMATORS
from align.maths.kl import adapted_kl_coef, k1, k2, k3
from align.maths.losses import loss_weights, policy_loss, token_entropy, token_logprobs, value_loss
from align.maths.masked import last_index, masked_mean, masked_var, masked_whiten
from align.maths.running_moments import RunningMoments

REAL = torch.ones(1, 3, dtype=torch.bool)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(got).double(), torch.as_tensor(want).double(), atol=tolerance, rtol=0)


class TestMasked:
    values = tensor([[1.0, 2.0, 3.0, 4.0, 100.0]])
    mask = tensor([[True, True, True, True, False]])

    def test_mean_and_variance_leave_padding_out(self):
        close(masked_mean(self.values, self.mask), 2.5)
        close(masked_var(self.values, self.mask), 1.25)

    def test_nan_under_the_mask_is_ignored(self):
        close(masked_mean(tensor([[2.0, math.nan]]), tensor([[True, False]])), 2.0)

    def test_whitening(self):
        close(masked_whiten(self.values, self.mask), [[-1.341641, -0.447214, 0.447214, 1.341641, 0.0]])

    def test_whitening_that_keeps_the_mean(self):
        close(masked_whiten(self.values, self.mask, shift_mean=False), [[1.158359, 2.052786, 2.947214, 3.841641, 0.0]])

    def test_whitening_is_of_the_whole_batch(self):
        whole = tensor([[1.0, 2.0, 5.0, 6.0, 7.0, 9.0]])
        close(masked_whiten(whole, torch.ones_like(whole, dtype=torch.bool)),
              [[-1.4446, -1.0835, 0.0, 0.3612, 0.7223, 1.4446]], 1e-4)  # fmt: skip

    def test_equal_values_whiten_to_zero(self):
        close(masked_whiten(torch.full((1, 3), 7.0), REAL), [[0.0, 0.0, 0.0]])

    def test_last_index_on_either_side_of_the_padding(self):
        mask = tensor([[True, True, False, False], [False, False, True, True], [True, False, True, False]])
        assert last_index(mask).tolist() == [1, 3, 2]


class TestKL:
    def test_estimators_are_unbiased_over_an_enumerable_distribution(self):
        torch.manual_seed(0)
        log_p, log_q = (
            torch.randn(50, dtype=torch.double).log_softmax(0),
            torch.randn(50, dtype=torch.double).log_softmax(0),
        )
        p = log_p.exp()
        exact = (p * (log_p - log_q)).sum()
        close((p * k1(log_p, log_q)).sum(), exact, 1e-12)
        close((p * k3(log_p, log_q)).sum(), exact, 1e-12)
        assert (k3(log_p, log_q) >= 0).all()
        assert abs((p * k2(log_p, log_q)).sum() - exact) > 1e-2, "k2 is biased"

    def test_where_each_estimator_has_the_gradient_of_the_kl(self):
        """Section 2 of arXiv 2510.01555: as a weight on log pi (in the reward), or differentiated itself (in the loss)."""
        torch.manual_seed(1)
        logits = torch.randn(30, dtype=torch.double, requires_grad=True)
        log_q = (logits.detach() + 0.5 * torch.randn(30, dtype=torch.double)).log_softmax(0)
        log_p = logits.log_softmax(0)
        p = log_p.exp().detach()

        def gradient(objective):
            return torch.autograd.grad(objective, logits, retain_graph=True)[0]

        forward = gradient((log_p.exp() * (log_p - log_q)).sum())  # KL(pi || ref), exactly
        backward = gradient((log_q.exp() * (log_q - log_p)).sum())  # KL(ref || pi)
        close(gradient((p * k1(log_p, log_q).detach() * log_p).sum()), forward, 1e-12)
        close(gradient((p * k1(log_p, log_q)).sum()), torch.zeros(30), 1e-12)
        close(gradient((p * k2(log_p, log_q)).sum()), forward, 1e-12)
        close(gradient((p * k3(log_p, log_q)).sum()), backward, 1e-12)
        close(gradient((p * k3(log_p, log_q).detach() * log_p).sum()), forward - backward, 1e-12)

    def test_the_adaptive_coefficient_by_hand(self):
        coefficient, seen = 0.15, []
        for kl in (12.0, 12.0, 3.0, 6.0, 6.6):
            coefficient = adapted_kl_coef(coefficient, kl, target=6.0, episodes=512, horizon=10_000)
            seen.append(coefficient)
        close(tensor(seen), [0.151536, 0.15308773, 0.15152011, 0.15152011, 0.15229589], 1e-7)


class TestTokenRewards:
    def test_score_lands_on_the_last_real_token_whatever_the_length(self):
        kl = tensor([[0.5, -0.25, 9.0], [1.0, 2.0, 4.0], [0.1, 9.0, 9.0]])
        mask = tensor([[True, True, False], [True, True, True], [True, False, False]])
        rewards = token_rewards(tensor([1.0, 2.0, -3.0]), kl, mask, kl_coef=0.1)
        close(rewards, [[-0.05, 0.025 + 1.0, 0.0], [-0.1, -0.2, -0.4 + 2.0], [-0.01 - 3.0, 0.0, 0.0]])

    def test_each_row_sums_to_score_minus_kl(self):
        torch.manual_seed(1)
        kl, scores = torch.randn(8, 6), torch.randn(8)
        mask = torch.arange(6)[None] < torch.randint(1, 7, (8, 1))
        rewards = token_rewards(scores, kl, mask, kl_coef=0.3)
        close(rewards.sum(1), scores - 0.3 * (kl * mask).sum(1))


class TestGAE:
    rewards, values = tensor([[-0.1, 0.2, 1.0]]), tensor([[0.5, 0.4, 0.3]])

    @pytest.mark.parametrize(
        ("lam", "advantages"),
        [(0.0, [-0.2, 0.1, 0.7]), (0.95, [0.52675, 0.765, 0.7]), (1.0, [0.6, 0.8, 0.7])],
    )
    def test_by_hand(self, lam, advantages):
        got, returns = gae(self.rewards, self.values, REAL, 1.0, lam)
        close(got, [advantages])
        close(returns, [[a + v for a, v in zip(advantages, [0.5, 0.4, 0.3], strict=True)]])

    def test_discount(self):
        got, _ = gae(self.rewards, self.values, REAL, 0.5, 0.0)
        close(got, [[-0.1 + 0.5 * 0.4 - 0.5, 0.2 + 0.5 * 0.3 - 0.4, 0.7]])

    def test_what_lies_in_the_padding_does_not_matter(self):
        padded = [torch.cat([x, torch.full((1, 2), 9.0)], dim=1) for x in (self.rewards, self.values)]
        mask = tensor([[True, True, True, False, False]])
        got, returns = gae(*padded, mask, 1.0, 0.95)
        close(got, [[0.52675, 0.765, 0.7, 0.0, 0.0]])
        close(returns, [[1.02675, 1.165, 1.0, 0.0, 0.0]])


class TestCriticFree:
    """Four responses of 1, 2, 3 and 1 tokens to one prompt, worth 1, 0, 0 and 3; what lies in the padding is noise."""

    mask = torch.arange(3)[None] < tensor([[1], [2], [3], [1]])
    rewards = torch.where(mask, tensor([[1.0, 0, 0], [1.0, -1, 0], [0.5, 0, -0.5], [3.0, 0, 0]]), tensor(9.0))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("rloo", [0.0, -1.3333, -1.3333, 2.6667]),
            ("grpo", [0.0, -0.70706, -0.70706, 1.41411]),
            ("dr_grpo", [0.0, -1.0, -1.0, 2.0]),
        ],
    )
    def test_groups_by_hand(self, name, expected):
        got = getattr(estimators, name)(self.rewards, self.mask, 4, 1.0)
        close(got, tensor(expected)[:, None] * self.mask, 1e-4)

    @pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
    def test_prompts_are_compared_with_themselves_only(self, name):
        other = torch.cat([self.rewards, 100 + self.rewards])
        got = getattr(estimators, name)(other, self.mask.repeat(2, 1), 4, 1.0)
        close(got[:4], getattr(estimators, name)(self.rewards, self.mask, 4, 1.0))

    @pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if not estimator.value_model])
    def test_equal_rewards_have_no_advantage(self, name):
        rewards = torch.zeros(4, 3).scatter(1, last_index(self.mask)[:, None], 7.0)
        close(getattr(estimators, name)(rewards, self.mask, 2, 1.0), torch.zeros(4, 3))

    def test_reinforce_plus_plus_whitens_the_reward_to_go(self):
        # To go, at discount 1/2: 1 | 1 - 1/2, -1 | 1/2 - 1/8, -1/4, -1/2 | 3
        to_go = tensor([1.0, 0.5, -1.0, 0.375, -0.25, -0.5, 3.0])
        expected = (to_go - to_go.mean()) / to_go.std(correction=0)
        got = estimators.reinforce_plus_plus(self.rewards, self.mask, 1, 0.5)
        close(got[self.mask], expected)
        assert not got[~self.mask].any()


class TestAggregation:
    """Responses of 1 and 3 tokens whose losses are 1 and 0, 0, 0."""

    mask = tensor([[True, False, False], [True, True, True]])
    losses = tensor([[1.0, 0, 0], [0.0, 0, 0]])

    @pytest.mark.parametrize(
        ("aggregation", "expected"), [("token_mean", 0.25), ("sequence_mean", 0.5), ("constant", 0.125)]
    )
    def test_by_hand(self, aggregation, expected):
        close((self.losses * loss_weights(self.mask, aggregation, 4)).sum(), expected)

    @pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
    def test_weights_sum_to_one(self, aggregation):
        weights = loss_weights(self.mask, aggregation, 4)
        close(weights.sum(), 1.0)
        assert not weights[~self.mask].any()


def test_running_moments_are_those_of_the_whole_stream():
    torch.manual_seed(4)
    stream = 3 + 2 * torch.randn(60, dtype=torch.double)
    moments = RunningMoments()
    for part in torch.split(stream, [1, 9, 30, 20]):
        moments = moments.include(part)
    assert moments.mean == pytest.approx(float(stream.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(stream.std(correction=0)), rel=1e-12)


class TestLogprobs:
    logits = tensor([[2.0, 0.0, -1.0]])

    @pytest.mark.parametrize(
        ("temperature", "expected"),
        [(1.0, [-0.16985, -2.16985, -3.16985]), (0.7, [-0.06878, -2.92592, -4.35449])],
    )
    def test_by_hand_at_a_temperature(self, temperature, expected):
        got = token_logprobs(self.logits.repeat(3, 1), tensor([0, 1, 2]), temperature)
        close(got, expected)

    def test_bfloat16_logits_are_normalised_in_float32(self):
        logits = torch.linspace(-3, 3, 1000).bfloat16()[None]
        total = sum(token_logprobs(logits, tensor([i]), 1.0).double().exp().item() for i in range(1000))
        assert abs(total - 1) < 1e-5

    def test_entropy_of_a_uniform_distribution_is_log_v(self):
        close(token_entropy(torch.full((1, 2), 3.0), 0.5), [math.log(2)])

    def test_entropy_is_of_the_tempered_distribution(self):
        p = (self.logits / 0.7).softmax(-1)
        close(token_entropy(self.logits, 0.7), -(p * p.log()).sum(-1))


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("advantage", "ratio", "loss", "gradient"),
        [(1.0, 1.5, -1.2, 0.0), (-1.0, 0.5, 0.8, 0.0), (-1.0, 1.5, 1.5, 1.0), (1.0, 0.5, -0.5, -1.0)],
    )
    def test_clipping_by_hand(self, advantage, ratio, loss, gradient):
        logprobs = tensor([math.log(ratio)], requires_grad=True)
        got = policy_loss(logprobs, torch.zeros(1), tensor([advantage]), 0.2)
        got.loss.sum().backward()
        close(got.loss.detach(), [loss])
        close(logprobs.grad, [gradient * ratio])  # d/dlogp = d/dratio * ratio
        close(got.clipped, float(gradient == 0.0))

    @pytest.mark.parametrize(
        ("advantage", "ratio", "loss", "gradient"),
        [(-1.0, 2.0, 2.0, 1.0), (-1.0, 5.0, 3.0, 0.0), (1.0, 5.0, -1.2, 0.0), (-1.0, 0.5, 0.8, 0.0)],
    )
    def test_dual_clip_by_hand(self, advantage, ratio, loss, gradient):
        logprobs = tensor([math.log(ratio)], requires_grad=True)
        got = policy_loss(logprobs, torch.zeros(1), tensor([advantage]), 0.2, dual_clip=3.0)
        got.loss.sum().backward()
        close(got.loss.detach(), [loss])
        close(logprobs.grad, [gradient * ratio])
        close(got.clipped, float(gradient == 0.0))

    def test_sums_by_hand(self):
        got = policy_loss(tensor([0.1, -0.1]), torch.zeros(2), tensor([2.0, 1.0]), 0.2)
        close(got.loss, [-2 * math.exp(0.1), -math.exp(-0.1)])
        close(got.ratio, math.exp(0.1) + math.exp(-0.1))
        close(got.approx_kl, 0.01)

    def test_a_minibatch_may_be_cut_anywhere(self):
        torch.manual_seed(2)
        new, old, advantages = torch.randn(3, 6)
        whole = policy_loss(new, old, advantages, 0.2)
        for size in (1, 2, 3):
            parts = [policy_loss(*(x[i : i + size] for x in (new, old, advantages)), 0.2) for i in range(0, 6, size)]
            close(torch.cat([part.loss for part in parts]), whole.loss)
            for name in ("ratio", "clipped", "approx_kl"):
                close(sum(getattr(part, name) for part in parts), getattr(whole, name))


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "loss", "gradient"),
        [(0.5, 1.125, -1.5), (0.9, 0.605, -1.1), (1.1, 0.405, -0.9), (1.3, 0.32, 0.0), (2.5, 0.32, 0.0)],
    )
    def test_clipping_by_hand(self, value, loss, gradient):
        values = tensor([[value]], requires_grad=True)
        one = torch.ones(1, 1, dtype=torch.bool)
        got = value_loss(values, tensor([[1.0]]), tensor([[2.0]]), one, 0.2)
        got.loss.sum().backward()
        close(got.loss.detach(), [[loss]])
        close(values.grad, [[gradient]])

    def test_padding_is_left_out(self):
        got = value_loss(
            tensor([[1.0, 50.0]]), tensor([[1.0, 0.0]]), tensor([[2.0, 0.0]]), tensor([[True, False]]), 0.2
        )
        close(got.loss, [[0.5, 0.0]])


def test_the_token_form_of_the_objective_is_the_sequence_form():
    """Summed over an enumerable language, the rewards are score - beta KL: J(pi) + beta KL(pi || pi*) = J*, for any pi."""
    torch.manual_seed(3)
    beta, vocabulary, length = 0.5, 3, 3
    sequences = list(itertools.product(range(vocabulary), repeat=length))
    scores = torch.tensor([s.count(0) - 0.5 * s.count(1) for s in sequences], dtype=torch.double)

    def tables():
        return [torch.randn(*([vocabulary] * (t + 1)), dtype=torch.double).log_softmax(-1) for t in range(length)]

    def logprobs(table):
        return torch.stack([torch.stack([table[t][s[: t + 1]] for t in range(length)]) for s in sequences])

    reference = logprobs(tables())
    mask = torch.ones(len(sequences), length, dtype=torch.bool)
    optimum = reference.sum(1) + scores / beta
    best, log_optimal = beta * optimum.logsumexp(0), optimum.log_softmax(0)
    for _ in range(3):
        policy = logprobs(tables())
        log_p = policy.sum(1)
        rewards = token_rewards(scores, k1(policy, reference), mask, beta).sum(1)
        objective = (log_p.exp() * rewards).sum()
        divergence = (log_p.exp() * (log_p - log_optimal)).sum()
        close(objective + beta * divergence, best, 1e-12)
