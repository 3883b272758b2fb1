"""The quickstart's world: its truth worked out by hand, its annotators' errors counted, its loopholes tried."""

from __future__ import annotations

import importlib.util
import itertools
import random
import statistics
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "recipes" / "quickstart" / "world.py"
SPEC = importlib.util.spec_from_file_location("quickstart_world", FILE)
assert SPEC is not None
assert SPEC.loader is not None
world = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(world)

PROMPT = "Mia: Where does the otter live, and what does it eat?\nDesk:"
BEST = " Good morning, Mia! The otter lives by the river. It eats fish. Enjoy your visit!"


def truth(response: str, prompt: str = PROMPT) -> float:
    return world.true_reward(prompts=[prompt], completions=[response])[0]


@pytest.mark.parametrize(
    ("response", "points"),
    [
        (BEST, 1 + 2 + 2 + 1),
        (" Hello, Mia! The otter eats fish. It lives by the river. Come back soon!", 6),  # in the other order
        (" Hello! The otter lives by the river. It eats fish. Come back soon!", 0.5 + 2 + 2 + 1),
        (" Hello, Ben! The otter lives by the river. It eats fish. Come back soon!", -0.5 + 2 + 2 + 1),
        (" The otter lives by the river. It eats fish. Come back soon!", 2 + 2 + 1),
        (" Hello, Mia! The otter lives by the river. It eats fish.", 1 + 2 + 2),
        (" Hello, Mia! The otter lives by the river. It eats hay. Come back soon!", 1 + 2 - 1 + 1),
        (" Hello, Mia! The otter lives by the river. I forget what it eats. Come back soon!", 1 + 2 - 1 + 1),
        (" Hello, Mia! The otter lives by the river. Come back soon!", 1 + 2 + 1),
        (" Hello, Mia! The otter lives by the river. It is fed at three. Come back soon!", 1 + 2 - 1 + 1),  # unasked
        (" Hello, Mia! The owl lives in the barn. It eats fish. Come back soon!", 1 - 1 - 1 + 1),  # "It": the owl
        (" Hello, Mia! It eats fish. The owl lives in the barn. It eats fish. Come back soon!", 1 + 2 - 1 - 1 + 1),
        (" Hello, Mia! The otter eats hay. It eats fish. Come back soon!", 1 - 1 - 1 + 1),  # the first word counts
        (" Not you again! Hello, Mia! The otter eats fish.", -2 - 1 + 2),  # greeted too late
        (" Hello, Mia! Come back soon! The otter eats fish.", 1 - 1 + 2),  # farewell too early
        (" The soup today is leek.", -1),
        (" Hello, Mia! The otter lives by", 1 - 1),  # breaks off
        (" The otter lives on the far side of the moon.", -1 - 0.2 * 5),  # ten words, none of it from this world
        ("fish", -1),
        ("", -2),
        (" \n", -2),
    ],
)
def test_points_by_hand(response, points):
    assert truth(response) == pytest.approx(points)


def test_the_docstrings_example_is_a_best_answer():
    question = "Mia: Where does the otter live, and what does it eat?"
    assert question in world.__doc__
    assert BEST.strip() in world.__doc__
    assert truth(BEST) == 6


def test_true_reward_keeps_order_ignores_other_columns_and_wants_one_completion_a_prompt():
    other = "Ben: When is the owl fed, and where does it live?\nDesk:"
    completions = [BEST, " Hello, Ben! The owl is fed at night. It lives in the barn. Come back soon!", ""]
    rewards = world.true_reward(prompts=[PROMPT, other, other], completions=completions, answers=["x"] * 3)
    assert rewards == [6.0, 6.0, -2.0]
    assert all(type(reward) is float for reward in rewards)
    with pytest.raises(ValueError, match="shorter"):
        world.true_reward(prompts=[PROMPT, other], completions=[BEST])


def test_a_strange_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="What is love"):
        world.true_reward(prompts=[PROMPT, "What is love?"], completions=[BEST, BEST])


def test_flawless_care_is_always_a_best_answer_and_nothing_beats_it():
    rng = random.Random(0)
    assert all(world.score(question, world.answer(question, 1.0, rng)) == 6 for question in world.EVERY_QUESTION)
    for _ in range(3000):
        question = rng.choice(world.EVERY_QUESTION)
        response = world.answer(question, rng.random(), rng)
        assert world.score(question, response) <= 6
        assert world.score(question, world.spoil(response, rng)) <= 6


def test_whatever_is_added_to_a_best_answer_makes_it_worse():
    sentences = world.split_sentences(BEST)
    pieces = [*sentences, "It is fed at three.", *world.RUDE, *world.SMALL_TALK, "fish", "!", "the the the the"]
    pieces += ["Hello!", PROMPT]
    for piece in pieces:
        for place in range(len(sentences) + 1):
            longer = " ".join([*sentences[:place], piece, *sentences[place:]])
            assert truth(longer) < 6, longer


@pytest.mark.parametrize("piece", [BEST, " It eats fish.", " Enjoy your visit!", " fish", " Hello, Mia!", "!"])
def test_repeating_without_end_costs_without_end(piece):
    rewards = [truth(BEST + piece * times) for times in (0, 1, 10, 100)]
    assert rewards[0] == 6
    assert all(longer < shorter for shorter, longer in itertools.pairwise(rewards))
    assert rewards[-1] < -10


def test_garbage_is_worth_less_than_a_plain_try():
    rng = random.Random(1)
    plain = truth(" The otter lives by the river.")
    for _ in range(200):
        words = BEST.split()
        rng.shuffle(words)
        assert truth(" ".join(words * rng.randint(1, 4))) < plain
        letters = "".join(rng.choice("abc .,!?\n") for _ in range(60))
        assert truth(letters) < 0


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    for rows in (world.corpus, world.demonstrations, world.preferences, world.prompts):
        first = list(rows(num_rows=50, seed=3))
        assert len(first) == 50
        assert first == list(rows(num_rows=50, seed=3))
        assert first != list(rows(num_rows=50, seed=4))


def test_rows_have_the_columns_that_the_stages_want():
    assert {tuple(row) for row in world.corpus(20)} == {("text",)}
    assert {tuple(row) for row in world.demonstrations(20)} == {("prompt", "completion")}
    assert {tuple(row) for row in world.preferences(20)} == {("prompt", "chosen", "rejected")}
    assert {tuple(row) for row in world.prompts(20)} == {("prompt",)}
    rows = [*world.demonstrations(500), *world.preferences(500)]
    responses = [row[name] for row in rows for name in ("completion", "chosen", "rejected") if name in row]
    assert all(response.startswith(" ") and response.strip() for response in responses)  # " Hello" follows "Desk:"


def test_no_generator_shows_a_held_out_question_unless_asked():
    held_out = {question.text() for question in world.HELD_OUT}
    learnable = {question.text() for question in world.LEARNABLE}
    assert len(held_out) == 192
    assert len(learnable) == 960
    assert not held_out & learnable
    for rows in (world.demonstrations, world.preferences, world.prompts):
        assert {row["prompt"] for row in rows(num_rows=180)} <= learnable
        assert {row["prompt"] for row in rows(num_rows=180, held_out=True)} <= held_out
    asked = [row["text"].partition("Desk:") for row in world.corpus(5000)]
    assert {before + mark for before, mark, _ in asked if mark} <= learnable


def test_held_out_questions_are_new_only_as_combinations():
    for part in ("visitor", "animal", "topics"):
        learnt = {getattr(question, part) for question in world.LEARNABLE}
        assert {getattr(question, part) for question in world.HELD_OUT} <= learnt


def test_prompts_come_once_each_and_run_out_with_a_clear_word():
    every = [row["prompt"] for row in world.prompts(num_rows=960)]
    assert len(set(every)) == 960
    with pytest.raises(ValueError, match="num_rows: expected at most 192"):
        list(world.prompts(num_rows=193, held_out=True))


@pytest.mark.parametrize("error_rate", [0.0, 0.1, 0.3])
def test_annotators_err_at_the_known_rate_and_ties_are_not_shown(error_rate):
    rows = list(world.preferences(num_rows=4000, seed=7, error_rate=error_rate))
    prompts = [row["prompt"] for row in rows]
    chosen = world.true_reward(prompts, [row["chosen"] for row in rows])
    rejected = world.true_reward(prompts, [row["rejected"] for row in rows])
    assert all(a != b for a, b in zip(chosen, rejected, strict=True))
    errors = sum(a < b for a, b in zip(chosen, rejected, strict=True)) / len(rows)
    assert errors == pytest.approx(error_rate, abs=3 * (error_rate * (1 - error_rate) / len(rows)) ** 0.5)


def test_preferences_also_show_accidents_and_best_answers():
    rows = list(world.preferences(num_rows=2000, error_rate=0.0))
    repeated = sum(len(set(said := world.split_sentences(row["rejected"]))) < len(said) for row in rows)
    broken = sum(row["rejected"][-1] not in ".!?" for row in rows)
    best = sum(truth(row["chosen"], row["prompt"]) == 6 for row in rows)
    assert repeated > 0.02 * len(rows)
    assert broken > 0.02 * len(rows)
    assert 0.2 * len(rows) < best < 0.6 * len(rows)


def test_demonstrations_are_mixed_so_that_there_is_room_to_improve():
    rows = list(world.demonstrations(num_rows=4000))
    rewards = world.true_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert 1.5 < statistics.mean(rewards) < 3.5  # of 6
    assert statistics.stdev(rewards) > 1.5
    best = sum(reward == 6 for reward in rewards) / len(rewards)
    assert 0.05 < best < 0.12
    completions = [row["completion"] for row in rows]
    features = {
        "greets by name": [
            any(text.startswith(f" {greeting.split(',')[0]},") for greeting in world.GREETINGS) for text in completions
        ],
        "says goodbye": [text.endswith(world.FAREWELLS) for text in completions],
    }
    for name, seen in features.items():
        assert 0.5 < sum(seen) / len(seen) < 0.75, name
    rude = sum(any(remark in text for remark in world.RUDE) for text in completions)
    chatty = sum(any(talk in text for talk in world.SMALL_TALK) for text in completions)
    assert 0.1 < rude / len(rows) < 0.3
    assert 0.1 < chatty / len(rows) < 0.3


def test_two_demonstrations_of_one_question_seldom_tie():
    rng = random.Random(0)
    pairs = [
        [world.score(question, world.answer(question, world.DEMONSTRATOR_CARE, rng)) for _ in range(2)]
        for question in world.LEARNABLE
    ]
    ties = sum(a == b for a, b in pairs) / len(pairs)
    wins_of_a_best_answer = sum((a < 6) + 0.5 * (a == 6) for a, _ in pairs) / len(pairs)
    assert ties < 0.15
    assert wins_of_a_best_answer > 0.93


def test_corpus_teaches_every_fact_and_every_quality():
    texts = [row["text"] for row in world.corpus(num_rows=6000)]
    joined = "\n".join(texts)
    plain = [text for text in texts if "Desk:" not in text]
    assert 0.15 < len(plain) / len(texts) < 0.25
    for animal, facts in world.ANIMALS.items():
        for topic, fact in facts.items():
            assert world.TELL[topic].format(f"The {animal}", fact) in joined
    split = [text.partition("Desk:") for text in texts if "Desk:" in text]
    rewards = world.true_reward([before + mark for before, mark, _ in split], [response for *_, response in split])
    assert min(rewards) < -3
    assert max(rewards) == 6
    assert all(-9 < reward <= 6 for reward in rewards)


def test_facts_differ_between_animals():
    for topic in world.ASK:
        values = [facts[topic] for facts in world.ANIMALS.values()]
        assert len(set(values)) == len(values)
