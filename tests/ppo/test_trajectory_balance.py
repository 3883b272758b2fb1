"""The objective `trajectory_balance` against exact answers: its optimum, its gradient, its memory of earlier rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from align.cli import verify
from align.cli.verify_languages import REWARDS, SMALL, optimal_logprobs
from align.config.load import load_recipe
from align.engine.distributed import World
from align.errors import UserError
from align.maths.advantages import gae, token_rewards
from align.maths.running_moments import RunningMoments
from align.maths.trajectory_balance import balance_loss, leave_one_out_excess, path_advantages, path_loss
from align.models.forward import response_logprobs
from align.ppo.ppo_run import PPORun
from align.ppo.replay import Replay
from align.ppo.rollout import Rollout
from align.ppo.self_checks import check_rollout
from align.ppo.train import run
from align.ppo.trajectory_balance import balance_steps, replay_minibatches
from align.runs.checkpoint import read_state
from tests.documented_metrics import undocumented
from tests.ppo.runs import ALONE, ppo_run, rollout_of
from tests.ppo.test_objectives import assert_gradients, assert_resumes, recipe_of, same_weights, whole
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.ranks import run_stage
from tests.worlds import LETTERS, deepspeed_file, write_jsonl

BALANCE = {
    "objective": "trajectory_balance", "num_generations": 4, "num_ppo_epochs": 4, "gradient_steps": 1, "replay_size": 2,
    "minibatch_size": 16, "per_device_train_batch_size": 3, "kl_coef": 0.3,
}  # fmt: skip


class TestMaths:
    """Of a small language, whose responses are enumerated: 40 responses to a prompt, in float64."""

    def test_loss_and_gradient_are_0_at_the_optimum_whatever_policy_sampled(self):
        namespace: dict = {}
        exec(REWARDS, namespace)
        score = SMALL.scores(namespace["letters"])[0]
        log_ref = torch.linspace(0, 3, len(score), dtype=torch.float64).log_softmax(0)
        for beta in (0.1, 0.5, 2.0):
            logits = optimal_logprobs(log_ref[None], score[None], beta)[0].clone().requires_grad_()
            for seed in range(5):  # mixtures of other policies, of which one never gives some responses
                generator = torch.Generator().manual_seed(seed)
                sampler = (seed * torch.randn(40, generator=generator)).softmax(0)
                drawn = torch.multinomial(sampler, 24, replacement=True, generator=generator)
                kl = (logits.log_softmax(0) - log_ref)[drawn]
                loss = balance_loss(leave_one_out_excess(score[drawn], kl, beta, 8), beta, 8)
                (gradient,) = torch.autograd.grad(loss, logits)
                assert loss.item() < 1e-28
                assert float(gradient.abs().max()) < 1e-14
            off = balance_loss(leave_one_out_excess(score[drawn], 0 * kl, beta, 8), beta, 8)
            assert off.item() > 1e-3, "the reference is no optimum"
            log_z = (log_ref + score / beta).logsumexp(0)  # of single responses, whose optimum needs log Z
            kl = (logits.log_softmax(0) - log_ref)[drawn]
            (gradient,) = torch.autograd.grad(loss := balance_loss(score[drawn] - beta * (kl + log_z), beta, 1), logits)
            assert loss.item() < 1e-28
            assert float(gradient.abs().max()) < 1e-14

    def test_every_path_is_balanced_at_the_optimum(self):
        """Of every response, whose states have the values beta log Z: at the optimum no token has a residual."""
        namespace: dict = {}
        exec(REWARDS, namespace)
        responses, score, beta = SMALL.responses(), SMALL.scores(namespace["letters"])[0], 0.5
        log_ref = torch.linspace(0, 3, len(score), dtype=torch.float64).log_softmax(0)
        log_best = log_ref + score / beta  # not normalized

        def mass(log_p: torch.Tensor, prefix: tuple[int, ...]) -> torch.Tensor:
            return log_p[[i for i, each in enumerate(responses) if each[: len(prefix)] == prefix]].logsumexp(0)

        mask = torch.tensor([[t < len(each) for t in range(SMALL.length)] for each in responses])
        kl, values = torch.zeros(2, *mask.shape, dtype=torch.float64)
        for row, each in enumerate(responses):
            gain = [mass(log_best, each[:t]) - mass(log_ref, each[:t]) for t in range(len(each) + 1)]
            for t in range(len(each)):
                kl[row, t], values[row, t] = gain[t + 1] - gain[t], beta * gain[t]
        residuals = gae(token_rewards(score, kl, mask, beta), values, mask, 1.0, 1.0)[0]
        assert float(residuals.abs().max()) < 1e-13
        off = gae(token_rewards(score, 0 * kl, mask, beta), values, mask, 1.0, 1.0)[0]
        assert float(path_loss(off, mask, beta)) > 1e-3

    def test_by_hand(self):
        scores, kl = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 3.0])
        excess = leave_one_out_excess(scores, kl, 0.5, 2)  # d = 1, 2 and 4.5, 3.5
        assert excess.tolist() == [-1.0, 1.0, 1.0, -1.0]
        assert float(balance_loss(excess, 0.5, 2)) == 0.5  # variances 0.5 and 0.5, over 2 beta
        assert float(balance_loss(torch.tensor([1.0, -3.0]), 0.5, 1)) == 5.0  # squares 1 and 9, over 2 beta
        residuals, mask = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        assert path_advantages(residuals, mask).tolist() == [[0.5, 2.0], [2.0, 0.0]]
        assert float(path_loss(residuals, mask, 0.5)) == 4.5  # means 5 and 4, over 2 beta


def trained(run: PPORun) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in run.models.policy.module.named_parameters() if p.requires_grad]


def move(run: PPORun) -> None:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trained(run):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logprobs_of(run: PPORun, rollout: Rollout) -> torch.Tensor:
    return response_logprobs(run.models.policy, *whole(rollout), 0.9)


def gradient_at(run: PPORun, replay: Replay, rollout: Rollout) -> dict[str, torch.Tensor]:
    """The policy's gradient at the first optimizer step on `rollout` alone; the step is not taken."""
    seen: list[dict[str, torch.Tensor]] = []
    policy = run.models.policy

    def step(_: float) -> float:
        seen.append({name: parameter.grad.clone() for name, parameter in trained(run)})
        policy.discard()
        return 0.0

    policy.step = step  # type: ignore[method-assign]
    balance_steps(run, replay, rollout, 0)
    return seen[0]


def start(folder: Path, **changes) -> tuple[PPORun, Rollout, Replay]:
    """A run, its first rollout, and a buffer without any."""
    run = ppo_run(recipe_of(folder, **{**BALANCE, **changes}))
    assert run.replay is not None
    run.replay.rows = None
    rollout = first_rollout(run)
    return run, rollout, run.replay


def first_rollout(run: PPORun) -> Rollout:
    """As PPO samples it, which keeps nothing."""
    estimator = "rloo" if run.models.value is None else "gae"
    recipe = dataclasses.replace(run.recipe, objective="ppo", advantage_estimator=estimator)
    return rollout_of(dataclasses.replace(run, recipe=recipe, replay=None))


class TestGradient:
    @pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 16, "method": "lora", "lora_r": 2}])
    def test_on_policy_it_is_reinforce_with_a_leave_one_out_baseline_and_the_losses(self, tmp_path, changes):
        """Of J = E[score] - beta KL, divided by `response_length`; microbatches cut through the groups."""
        run, _, replay = start(tmp_path, **changes)
        move(run)
        rollout = first_rollout(run)
        got = gradient_at(run, replay, rollout)

        def of_now() -> torch.Tensor:
            return logprobs_of(run, rollout).sum(1)

        log_ref = (rollout.ref_logprobs * rollout.mask).sum(1)
        reward = (rollout.scores - 0.3 * (of_now().detach() - log_ref)).view(4, 4)
        baseline = (reward.sum(1, keepdim=True) - reward) / 3
        reinforce = -((reward - baseline).flatten() * of_now()).mean() / run.recipe.response_length
        variance = (rollout.scores - 0.3 * (of_now() - log_ref)).view(4, 4).var(dim=1).mean() / (2 * 0.3)
        for objective in (reinforce, variance / run.recipe.response_length):
            run.models.policy.module.zero_grad()
            objective.backward()
            assert_gradients(got, {name: parameter.grad.clone() for name, parameter in trained(run)})

    def test_it_is_0_where_the_policy_is_the_optimum_of_the_scores(self, tmp_path):
        """Scores beta (log pi - log ref) and a constant for each prompt, for responses that other policies sampled."""
        run, theirs, replay = start(tmp_path)
        move(run)
        mine = first_rollout(run)
        for rollout in (theirs, mine):
            with torch.no_grad():
                kl = ((logprobs_of(run, rollout) - rollout.ref_logprobs) * rollout.mask).sum(1)
            rollout.scores = 0.3 * kl + torch.arange(4.0).repeat_interleave(4)
            worst = max(float(gradient.abs().max()) for gradient in gradient_at(run, replay, rollout).values())
            assert worst < 1e-6  # log-probabilities are rounded to 1e-6 or so
            rollout.scores[0] += 1.0
            replay.rows = None
            worst = max(float(gradient.abs().max()) for gradient in gradient_at(run, replay, rollout).values())
            assert worst > 1e-4
            replay.rows = None

    def test_a_single_response_is_compared_with_the_value_of_its_prompt(self, tmp_path):
        """Values by plain transformers on the prompt alone; the value model's loss is half the mean square of d - V."""
        run, _, replay = start(tmp_path, num_generations=1)
        move(run)
        value, beta, steps = run.models.value, 0.3, []
        torch.nn.init.normal_(value.module.score.weight, generator=torch.Generator().manual_seed(1))
        value.step = lambda _: (
            steps.append([p.grad.clone() for p in value.module.parameters()]) or value.discard() or 0.0
        )
        assert check_rollout(run).values.any(), "self-checks compare them with those of training"
        rollout = first_rollout(run)
        prompts = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        assert len({len(ids) for ids in prompts}) > 2
        values = torch.stack([value.module(input_ids=ids[None]).logits[0, -1, 0] for ids in prompts])
        logprobs = logprobs_of(run, rollout).sum(1)
        balance = rollout.scores - beta * (logprobs.detach() - (rollout.ref_logprobs * rollout.mask).sum(1))
        got = gradient_at(run, replay, rollout)
        run.models.policy.module.zero_grad()
        value.module.zero_grad()
        (-((balance - values.detach()) * logprobs).mean() / run.recipe.response_length).backward()
        assert_gradients(got, {name: parameter.grad.clone() for name, parameter in trained(run)})
        (0.5 * (balance - values).square().mean()).backward()
        names = [name for name, _ in value.module.named_parameters()]
        expected = {name: parameter.grad.clone() for name, parameter in value.module.named_parameters()}
        assert_gradients(dict(zip(names, steps[0], strict=True)), expected, 1e-5)

        replay.rows = None
        run.models.discard()
        rollout.scores += values.detach() - balance  # now at the optimum, whose log Z is that of the values
        worst = max(float(gradient.abs().max()) for gradient in gradient_at(run, replay, rollout).values())
        assert max(worst, *(float(gradient.abs().max()) for gradient in steps[1])) < 1e-5

    def test_path_consistency_has_a_residual_for_every_token(self, tmp_path):
        """Values by plain transformers; gradients by autograd through the loss, microbatches of several lengths."""
        run, _, replay = start(tmp_path, objective="path_consistency", num_generations=1)
        move(run)
        value, steps = run.models.value, []
        torch.nn.init.normal_(value.module.score.weight, generator=torch.Generator().manual_seed(1))
        value.step = lambda _: (
            steps.append([p.grad.clone() for p in value.module.parameters()]) or value.discard() or 0.0
        )
        rollout = first_rollout(run)
        rollout.token_scores = (
            torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2)) * rollout.mask
        )
        got = gradient_at(run, replay, rollout)
        run.models.policy.module.zero_grad()
        value.module.zero_grad()
        losses, squares = [], []
        for row, length in enumerate(rollout.lengths.tolist()):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            ids = torch.cat([prompt, rollout.response_ids[row, :length]])[None]
            values = value.module(input_ids=ids[:, :-1]).logits[0, -length:, 0]
            logits = run.models.policy.module(input_ids=ids[:, :-1]).logits[0, -length:] / 0.9
            kl = logits.log_softmax(-1)[range(length), ids[0, -length:]] - rollout.ref_logprobs[row, :length]
            rewards = rollout.token_scores[row, :length] - 0.3 * kl
            rewards[-1] += rollout.scores[row] - rollout.token_scores[row].sum()
            to_go = rewards.flip(0).cumsum(0).flip(0)
            losses.append((to_go - values.detach()).square().mean() / (2 * 0.3) / run.recipe.response_length)
            squares.append(0.5 * (to_go.detach() - values).square())
        torch.stack(losses).mean().backward()
        assert_gradients(got, {name: parameter.grad.clone() for name, parameter in trained(run)})
        replay.rows = None
        found = balance_steps(run, replay, rollout, 0)
        loss = float(torch.stack(losses).mean())
        assert found["policy/loss"] == pytest.approx(loss, rel=1e-5)
        assert found["policy/residual"] == pytest.approx((2 * loss * run.recipe.response_length / 0.3) ** 0.5, rel=1e-5)
        value.module.zero_grad()
        torch.cat(squares).mean().backward()
        named = [*value.module.named_parameters()]
        assert_gradients(
            {name: mine for (name, _), mine in zip(named, steps[0], strict=True)},
            {name: parameter.grad for name, parameter in named}, 1e-5,
        )  # fmt: skip

    def test_every_step_has_the_policy_and_the_moments_of_its_time(self, tmp_path):
        run, rollout, replay = start(tmp_path, normalize_scores=True, gradient_steps=2)
        run.progress.score_moments = RunningMoments().include(torch.tensor([0.0, 4.0]))
        replay.add(rollout)
        batches = replay_minibatches(run, replay, 0)
        first = next(batches)
        move(run)
        run.progress.score_moments = run.progress.score_moments.include(torch.tensor([-6.0, 10.0]))
        second = next(batches)
        for batch, now, std in ((first, first.ref_logprobs, 2.0), (second, logprobs_of(run, second), 34**0.5)):
            kl = ((now - batch.ref_logprobs) * batch.mask).sum(1)
            expected = leave_one_out_excess(batch.scores / std, kl, 0.3, 4)
            torch.testing.assert_close(batch.advantages, expected[:, None] * batch.mask)


def numbered(first: int, count: int, prompt: int, response: int) -> Rollout:
    """A rollout whose rows have the numbers from `first` on in all fields, with prompts and responses of these widths."""
    number = torch.arange(first, first + count)
    tokens = {"prompt_ids": prompt, "prompt_mask": prompt}
    ids = {name: number[:, None].expand(count, tokens.get(name, response)).clone() for name in Rollout.axes()}
    rows = {name: number.clone() for name in ("ended", "scores", "repetition")}
    masks = {name: torch.ones_like(ids[name], dtype=torch.bool) for name in ("prompt_mask", "mask")}
    return Rollout(**{**ids, **rows, **masks, "source_scores": number[:, None].float()})


class TestReplay:
    def test_the_newest_are_kept_without_padding_that_none_needs(self):
        replay = Replay(8, ALONE, pad_token_id=99)
        for number, widths in enumerate([(5, 6), (2, 3), (3, 2)]):
            replay.add(numbered(4 * number, 4, *widths))
        assert replay.rows.scores.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
        assert replay.rows.prompt_ids[0].tolist() == [99, 4, 4]
        assert replay.rows.response_ids[7].tolist() == [11, 11, 99]
        assert replay.rows.mask.sum().item() == 4 * 3 + 4 * 2

    def test_groups_are_drawn_whole_and_alike_often(self):
        replay = Replay(12, ALONE, 0, rows=numbered(0, 12, 1, 1))
        drawn = [index.tolist() for index in replay.draw(1, 5, steps=9, count=4, group_size=2)]
        for index in drawn:
            assert len(index) == 4
            assert all(first % 2 == 0 for first in index[::2])
            assert index[1::2] == [first + 1 for first in index[::2]]
        assert torch.bincount(torch.tensor(drawn).flatten()).tolist() == [3] * 12
        again = [index.tolist() for index in replay.draw(1, 5, steps=9, count=4, group_size=2)]
        other = [index.tolist() for index in replay.draw(1, 6, steps=9, count=4, group_size=2)]
        assert drawn == again != other

    def test_what_a_checkpoint_holds_is_the_same_to_the_bit(self, tmp_path):
        run, rollout, replay = start(tmp_path)
        replay.add(rollout)
        replay.add(dataclasses.replace(rollout, scores=rollout.scores + 1 / 3))
        for rank in (1, 0):  # two ranks wrote it, one reads it
            Replay(32, World(rank, 2, torch.device("cpu")), 0, replay.rows).save_checkpoint(tmp_path / "replay")
        found = Replay(32, ALONE, 0)
        found.load_checkpoint(tmp_path / "replay")
        for name in Rollout.axes():
            ours, theirs = getattr(found.rows, name), getattr(replay.rows, name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name
        ours, theirs = (next(replay_minibatches(run, each, 3)) for each in (found, replay))
        assert torch.equal(ours.advantages, theirs.advantages)
        (tmp_path / "replay" / "rank-00001.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match="replay: cannot be read as a saved state"):
            found.load_checkpoint(tmp_path / "replay")


def replaying(folder: Path, objective: str, num_generations: int, **changes) -> str:
    """Another objective, whose kept responses are a state too: at update 2 those of update 1 are among them."""
    texts = [{"text": LETTERS[: 3 + i % 5]} for i in range(7)]
    changes |= {"value_warmup_updates": 1, "value_learning_rate": 0.01} if num_generations == 1 else {}
    return make_recipe(
        folder, objective=objective, num_generations=num_generations, minibatch_size=8, gradient_steps=3, replay_size=3,
        num_ppo_epochs=4, kl_coef=0.1, kl_target=0.05, kl_horizon=100, normalize_scores=True, ema_decay=0.8,
        ptx_dataset=write_jsonl(folder / "texts.jsonl", texts), ptx_coef=0.1, ptx_batch_size=6, total_episodes=80, **changes,
    )  # fmt: skip


KINDS = [
    pytest.param("trajectory_balance", 4, id="groups"),
    pytest.param("trajectory_balance", 1, id="value_model", marks=pytest.mark.slow),
    pytest.param("path_consistency", 1, id="paths"),
]


@pytest.fixture(scope="module", params=[pytest.param(each.values, id=each.id, marks=each.marks) for each in KINDS])
def finished(request, tmp_path_factory) -> tuple[Callable[..., str], Path]:
    """What writes the recipe of a run, and its folder."""
    folder = tmp_path_factory.mktemp("balance")
    make = partial(replaying, objective=request.param[0], num_generations=request.param[1])
    run(load_recipe("ppo", make(folder)))
    return make, folder / "out"


class TestTogether:
    def test_resumed_to_the_bit(self, finished, tmp_path):
        assert_resumes(*finished, tmp_path)

    def test_every_metric_is_documented(self, finished):
        make, folder = finished
        rows = [row for row in metrics(folder) if "policy/residual" in row]
        assert [row["policy/steps"] for row in rows] == [3] * 5
        assert not undocumented({name for row in rows for name in row} - {"step", "time"})
        assert not {"policy/ratio", "policy/clipfrac", "policy/approx_kl", "policy/first_ratio"} & rows[0].keys()
        warms_up = "objective/entropy" not in rows[0]
        single = make.keywords["num_generations"] == 1
        assert warms_up == single == (abs(rows[1]["objective/kl"]) < 1e-6), "then the value model trains alone"
        losses = {"value/loss", "value/grad_norm", "value/learning_rate"} if single else set()
        assert {name for name in rows[0] if name.startswith("value/")} - {"value/clipfrac"} == losses

    def test_the_moments_are_of_all_scores_so_far(self, finished):
        assert read_state(finished[1] / "checkpoint-2")["progress"]["score_moments"]["count"] == 2 * 16

    @pytest.mark.slow
    def test_two_ranks_at_zero_3_do_what_one_does(self, finished, tmp_path):
        make, alone = finished
        done = run_stage("ppo", make(tmp_path, deepspeed=deepspeed_file(tmp_path / "policy.json", 3)))
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same_curve(metrics(alone), metrics(tmp_path / "out"), 5e-4)
        same_weights(alone, tmp_path / "out", 5e-4)


@pytest.mark.parametrize(
    ("objective", "each"),
    [
        ("trajectory_balance", 64),
        pytest.param("trajectory_balance", 1, marks=pytest.mark.slow),
        pytest.param("path_consistency", 1, marks=pytest.mark.slow),
    ],
)
def test_it_reaches_the_optimum(tmp_path, objective, each):
    """With a tenth of the episodes that PPO has in `align verify`."""
    case = verify.write_case(
        tmp_path, SMALL, 0.5, objective=objective, num_generations=each, gradient_steps=8, warmup_steps=0,
        total_episodes=2560,
    )  # fmt: skip
    verify.train(str(tmp_path), [case])
    found = verify.measure(case)
    print(found, found.normalised)
    assert found.normalised >= 0.98
    assert found.divergence < 0.02
