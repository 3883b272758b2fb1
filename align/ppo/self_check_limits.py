"""The self-checks' limits: for each number the expected range, the likely cause of a failure, and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from align.config.ppo import PPORecipe
from align.errors import UserError

MIN_RESPONSES_FOR_EOS = 16  # with as many, at least one must end by itself
LOW_EOS_RATE = 0.3
LOW_ENTROPY = 0.05  # nats per token
USEFUL_ACCURACY = 0.6  # of a reward model; a check fails only if its interval excludes this
TokenName: TypeAlias = Callable[[int], tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much numbers may differ that are equal in exact arithmetic.

    float32: two passes over a row differ by about 1e-6 nats when padding or neighbors differ. bfloat16 has 8 bits of
    precision: a logit of 10 is off by up to 0.03. Faults are larger: another checkpoint, dropout, or a temperature of 0.9
    instead of 1 change a log-probability by 0.1 nats and more. TF32 has 11 bits, three more than bfloat16, and an eighth of its limits:
    a decoding step of few rows may run by kernels without TF32, and the training pass by others, so that all of its rounding
    lies between them.
    """

    mean: float  # mean (or root mean square) over tokens, between passes with other padding or microbatches, nats
    max: float  # of a single token, nats
    score: float  # of a score, in units of the scores' spread, or of 1 where that is smaller


FLOAT32 = Limits(mean=1e-4, max=0.01, score=1e-3)
TF32 = Limits(mean=0.006, max=0.125, score=0.0125)
BFLOAT16 = Limits(mean=0.05, max=1.0, score=0.1)
MAX_REFERENCE_GAP = (
    1e-6  # nats, mean over tokens: policy and reference run the same pass with equal weights, in either precision
)


def limits_of(bf16: bool, tf32: bool) -> Limits:
    """The limits of a run in bfloat16, in TF32 otherwise, or in float32."""
    return BFLOAT16 if bf16 else TF32 if tf32 else FLOAT32


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of a check: `found` is printed when it passed, the rest too when it did not."""

    passed: bool
    found: str
    expected: str = ""
    remedy: str = ""  # the likely cause, and the stage to go back to
    required: bool = True

    def __str__(self) -> str:
        return f"{self.found}; expected {self.expected}. {self.remedy}"


def all_finite(not_finite: Sequence[str]) -> Check:
    """No NaN or infinity. `not_finite`: names of the measured numbers that have one."""
    return Check(
        not not_finite,
        f"NaN or infinity in {', '.join(not_finite)}" if not_finite else "all finite",
        "finite numbers only",
        "Likely cause: corrupt weights, or numbers too large for the precision. Check the model in sft_model_path (for "
        "values: reward_model_path or value_model_path), or go back to the stage that made it.",
    )


def reference_matches_policy(gap: float, recipe: PPORecipe) -> Check:
    """KL 0 before the first update. `gap`: mean absolute difference of policy and reference, nats per token."""
    other = (
        "the adapter does not start as the identity."
        if recipe.method != "full"
        else "policy and reference have different weights or precision, or dropout is active; check that the weights in "
        f"{recipe.sft_model_path} are complete and compare bf16 true and false, or go back to the sft stage."
    )
    return Check(
        gap <= MAX_REFERENCE_GAP,
        f"KL {gap:.1g}" if gap else "KL 0",
        f"policy and reference to give equal log-probabilities (to {MAX_REFERENCE_GAP:g} nats per token)",
        f"Likely cause: {other}",
    )


def training_matches_rollout(gap: float, ratio: float, limits: Limits) -> Check:
    """Ratio 1 before the first update. `gap`: root mean square difference of training pass and rollout, nats."""
    return Check(
        gap <= limits.mean,
        f"ratio {ratio:.4g}",
        f"the training pass to give the log-probabilities of the rollout to {limits.mean:g} nats (root mean square; "
        f"they are {gap:.3g} apart)",
        "Likely cause: dropout is on, or temperature, padding or precision differ between rollout and training; compare "
        "bf16, gradient_checkpointing and attn_implementation on and off in this recipe.",
    )


def generation_matches_training(mean: float, largest: float, limits: Limits) -> Check:
    """The decoding loop against the training pass. `mean`, `largest`: absolute differences, nats per token."""
    return Check(
        mean <= limits.mean and largest <= limits.max,
        f"generation gap {mean:.1g}",
        f"generation to give its tokens the log-probabilities of the training pass, to {limits.mean:g} nats in the mean "
        f"and {limits.max:g} at most (it is {largest:.3g})",
        "Likely cause: temperature, the key-value cache, positions or precision differ between them; compare "
        "attn_implementation and bf16 in this recipe, and see that the architecture takes left padding.",
    )


def values_match_rollout(gap: float, limits: Limits) -> Check:
    """Values in training against those at rollout. `gap`: root mean square difference, relative to their size."""
    return Check(
        gap <= limits.mean,
        f"value gap {gap:.1g}",
        f"the value model to give in training what it gave at rollout, to {limits.mean:g}",
        "Likely cause: dropout, padding or precision in the value model; compare bf16 and gradient_checkpointing on and off "
        "in this recipe.",
    )


def values_match_scores(gap: float, scores: Tensor, limits: Limits) -> Check:
    """Values of a value model that starts as the reward model. `gap`: from the `scores` [B] of the same tokens, mean."""
    allowed = limits.score * max(1.0, float(scores.std(correction=0)))
    return Check(
        gap <= allowed,
        f"values {gap:.1g} off the scores",
        f"the value model, which starts as the reward model, to give its scores, to {allowed:.2g}",
        "Likely cause: the model computes more than its head on its last hidden states; name sft_model_path by value_model_path, so "
        "that all values start at 0.",
    )


def entropy_sufficient(entropy: float) -> Check:
    """Enough entropy to explore. `entropy`: the policy's mean, nats per token."""
    return Check(
        entropy >= LOW_ENTROPY,
        f"entropy {entropy:.3g}",
        f"at least {LOW_ENTROPY:g} nats per token",
        "The SFT model answers almost the same every time, so PPO has little to explore: fewer epochs in the sft stage, or a "
        "higher temperature.",
        required=False,
    )


def describe_endings(
    responses: Sequence[Sequence[int]], ended: Sequence[bool], ends: Sequence[int], name: TokenName
) -> str:
    """How many responses each end token ended; if none ended, their most frequent last tokens and special tokens.

    Args:
        responses: token ids.
        ended: whether each ended by itself.
        ends: ids of the end tokens.
        name: maps a token id to its name and whether it is a special token.
    """
    last = Counter(ids[-1] for ids, by_itself in zip(responses, ended, strict=True) if by_itself)
    by_token = [f"{last[end] or 'none'} ended with {name(end)[0]}" for end in ends]
    if stopped := last.total() - sum(last[end] for end in ends):
        by_token.append(f"{stopped} with a stop string")
    if last:
        return ", ".join(by_token)
    special = Counter(token for ids in responses for token in {*ids} if name(token)[1])
    final = Counter(ids[-1] for ids in responses)
    text = ", ".join(by_token) + f"; most frequent last tokens: {_most_frequent(final, name)}"
    return text + (f"; special tokens in them: {_most_frequent(special, name)}" if special else "")


def _most_frequent(counts: Counter[int], name: TokenName) -> str:
    return ", ".join(f"{name(token)[0]} in {count}" for token, count in counts.most_common(3))


def responses_terminate(rate: float, count: int, response_length: int, seen: str, several: bool) -> Check:
    """Responses end by themselves.

    Args:
        rate: share of the `count` sampled responses that do.
        seen: from `describe_endings`.
        several: whether there are several end tokens or stop strings; then `seen` is always shown.
    """
    never = rate == 0 and count >= MIN_RESPONSES_FOR_EOS
    return Check(
        rate >= LOW_EOS_RATE,
        f"EOS rate {rate:.3g}" + (f" ({seen})" if several else ""),
        f"{'some' if never else f'{LOW_EOS_RATE:g} or more'} of the {count} responses to end by themselves",
        f"{'' if several else f'Seen: {seen}. '}Likely cause: response_length {response_length} is too short, or the SFT model "
        "did not learn to stop: go back to the sft stage, check that its responses end with end-of-text and that it trains "
        "long enough. If they end with another token, add its id to eos_token_id in generation_config.json of sft_model_path.",
        required=never,
    )


def scores_vary(source: str, scores: Tensor) -> Check:
    """A reward source gives different scores. `scores`: [B], NaN where the source does not apply."""
    given = scores[~scores.isnan()]
    all_equal = len(given) > 1 and bool((given == given[0]).all())
    return Check(
        not all_equal,
        f"{source} gave all {len(given)} responses {float(given[0]):g}" if all_equal else f"{source} varies",
        "scores that differ",
        "Nothing can be learned from it; check the reward function and its inputs.",
        required=False,
    )


def matches_manifest(path: str, scores: Tensor, manifest: dict[str, Any], limits: Limits) -> Check:
    """The reward model is the one that its stage evaluated. `scores`: [B], its scores of the sequences in its manifest."""
    recorded = scores.new_tensor(manifest["score_check"]["scores"])
    gap = float((scores - recorded).abs().max())
    then = limits_of(manifest["recipe"].get("bf16", False), manifest["score_check"].get("tf32", False))
    allowed = max(limits.score, then.score) * max(1.0, float(recorded.std()))
    return Check(
        gap <= allowed,
        f"reward model {Path(path).name}: {gap:.1g} off its record",
        f"the scores in {path}/stage.json, to {allowed:.2g}",
        "Likely cause: the folder has other weights than those that were evaluated, or they are loaded in another precision or by "
        f"another version of transformers (then {manifest.get('versions', {}).get('transformers', 'another')}); go back to the reward stage.",
    )


def beats_chance(scores: Tensor, results: dict[str, Any], of: str = "") -> Check:
    """The reward model ranks pairs better than chance.

    Args:
        scores: its scores of the pairs in its manifest, [chosen, rejected, chosen, ...].
        results: closing numbers of the reward stage.
        of: which reward model, where there are several, as ` of PATH`.
    """
    ordered, count = int((scores[0::2] > scores[1::2]).sum()), len(scores) // 2
    pairs = f"{ordered} of {count} recorded pairs in order"
    remedy = "go back to the reward stage: more or cleaner pairs, a higher learning_rate, or a larger model."
    if (accuracy := results.get("eval_accuracy")) is None:  # nothing was held out, and a few pairs are weak evidence
        remedy = f"Chance does as well; hold out pairs there to find out, or {remedy}"
        return Check(2 * ordered > count, f"{pairs}{of}", "more than half", remedy, required=False)
    low, high = results["eval_accuracy_low"], results["eval_accuracy_high"]
    chance = accuracy <= 0.5
    return Check(
        low > 0.5,
        f"reward accuracy{of} {accuracy:.3g} ({low:.3g} to {high:.3g}), {pairs}",
        "an accuracy above 0.5 on held-out pairs" if chance else "an interval above 0.5",
        f"{'It does no better than chance' if chance else 'It may do no better than chance: hold out more pairs'}; {remedy}",
        required=chance and high < USEFUL_ACCURACY,
    )


def below_ceiling(results: dict[str, Any], of: str = "") -> list[Check]:
    """A failed check if the reward model agrees with the labels more often than the true reward does; otherwise nothing.

    Args:
        results: closing numbers of the reward stage, with or without the true reward's accuracy (`eval_ceiling`).
    """
    ceiling = results.get("eval_ceiling")
    if ceiling is None or results["eval_accuracy_low"] <= ceiling:
        return []
    low, accuracy = results["eval_accuracy_low"], results["eval_accuracy"]
    return [
        Check(
            False,
            f"reward accuracy{of} {accuracy:.3g} ({low:.3g} to {results['eval_accuracy_high']:.3g})",
            f"at most {ceiling:.3g}, that of the true reward on the same pairs",
            "It has learned what the annotators prefer for another reason, such as length, and PPO will follow that: look at "
            "the report card of the reward stage, and go back to its pairs.",
            required=False,
        )
    ]


def check_sampler_gap(mean: float, limits: Limits) -> None:
    """Check that the log-probabilities of another engine that samples are those of the policy.

    Args:
        mean: of the absolute difference over tokens, in nats.

    Raises:
        UserError: they are not.
    """
    if not mean <= limits.mean:
        raise UserError(
            f"the rollout server's log-probabilities are {mean:.2g} nats off the policy's (mean over tokens), expected at most "
            f"{limits.mean:g}: it samples from other weights, or computes this model otherwise; report this model and its version of "
            "vLLM, and use rollout_engine: transformers."
        )
