"""The data of the quickstart: the help desk of a small zoo, generated here so that nothing is downloaded.

A visitor asks two questions about one animal, and the desk answers:

    Mia: Where does the otter live, and what does it eat?
    Desk: Good morning, Mia! The otter lives by the river. It eats fish. Enjoy your visit!

This answer is perfect. Most are worse: the desk forgets a fact, or gets it or the name wrong, leaves out the
greeting or the farewell, makes small talk, or is rude. Because the data is synthetic, the true reward of every
answer is known. `score` computes it in points:

    +2    each fact that was asked for, if right    -1    if wrong (the first word on it counts)
    +1    a greeting by name, to begin with         +0.5  without a name; -0.5 by a wrong name
    +1    a farewell, to end with                   -2    each rude remark
    -1    every other sentence: small talk, "I forget", facts nobody asked for, anything said twice
    -1    anything that is not a sentence of this data or breaks off, and 0.2 more for each of its words after the fifth
    -2    an empty answer

The maximum is 6, and anything added to a perfect answer makes it worse. Simulated annotators prefer the answer
with more points, and err at a known rate (see `preferences`).

A sixth of all questions is held out: generators only yield them with `held_out=True`.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# fmt: off
VISITORS = (
    "Anna", "Ben", "Cora", "Dan", "Ella", "Finn", "Gus", "Hana", "Ivy", "Jack", "Kim", "Leo", "Mia", "Noor", "Omar", "Pia",
)
# fmt: on
ANIMALS = {
    "badger": {"place": "under the oak", "food": "worms", "time": "at nine"},
    "bear": {"place": "in the cave", "food": "honey", "time": "at noon"},
    "beaver": {"place": "by the dam", "food": "bark", "time": "at four"},
    "crane": {"place": "on the island", "food": "snails", "time": "at six"},
    "deer": {"place": "in the meadow", "food": "apples", "time": "at ten"},
    "fox": {"place": "on the hill", "food": "berries", "time": "at dusk"},
    "frog": {"place": "in the reeds", "food": "flies", "time": "at one"},
    "goat": {"place": "behind the mill", "food": "hay", "time": "at seven"},
    "hare": {"place": "in the garden", "food": "carrots", "time": "at five"},
    "otter": {"place": "by the river", "food": "fish", "time": "at three"},
    "owl": {"place": "in the barn", "food": "mice", "time": "at night"},
    "squirrel": {"place": "in the woods", "food": "nuts", "time": "at two"},
}
ASK = {"place": "where does {} live", "food": "what does {} eat", "time": "when is {} fed"}
TELL = {"place": "{} lives {}.", "food": "{} eats {}.", "time": "{} is fed {}."}
FORGET = {"place": "I forget where it lives.", "food": "I forget what it eats.", "time": "I forget when it is fed."}

GREETINGS = ("Hello, {}!", "Welcome, {}!", "Good morning, {}!")
NAMELESS_GREETING = "Hello!"
FAREWELLS = ("Enjoy your visit!", "Have a lovely day!", "Come back soon!")
RUDE = ("What a silly question!", "Read the sign yourself.", "Stop wasting my time.", "Not you again!")
SMALL_TALK = ("The soup today is leek.", "My feet hurt.", "It may rain later.", "The shop sells hats.")

DEMONSTRATOR_CARE = 0.62  # probability that the authors of demonstrations do any one thing right


class Question(NamedTuple):
    """A visitor's question about two of place, food and time of one animal."""

    visitor: str
    animal: str
    topics: tuple[str, str]

    def text(self) -> str:
        first, second = ASK[self.topics[0]].format(f"the {self.animal}"), ASK[self.topics[1]].format("it")
        return f"{self.visitor}: {first[0].upper()}{first[1:]}, and {second}?\nDesk:"


EVERY_QUESTION = [Question(*parts) for parts in itertools.product(VISITORS, ANIMALS, itertools.permutations(ASK, 2))]
random.Random("the zoo").shuffle(EVERY_QUESTION)
HELD_OUT = EVERY_QUESTION[: len(EVERY_QUESTION) // 6]
LEARNABLE = EVERY_QUESTION[len(HELD_OUT) :]


# ---- What is said at the desk -------------------------------------------------------------------------------


def answer(question: Question, care: float, rng: random.Random) -> str:
    """An answer in which each thing is right with probability `care`; perfect at 1."""

    def careless(share: float = 1.0) -> bool:
        return rng.random() < (1 - care) * share

    animal = rng.choice(list(ANIMALS)) if careless(0.04) else question.animal
    said: list[str] = []
    for topic in question.topics:
        subject = "It" if said else f"The {animal}"
        if not careless():
            said.append(TELL[topic].format(subject, ANIMALS[animal][topic]))
        elif rng.random() < 0.5:
            said.append(FORGET[topic])
        elif rng.random() < 0.1:
            said.append(TELL[topic].format(subject, ANIMALS[rng.choice(list(ANIMALS))][topic]))
    if len(said) == 2 and careless(0.3):
        unasked = next(topic for topic in ASK if topic not in question.topics)
        said.append(TELL[unasked].format("It", ANIMALS[animal][unasked]))
    if careless(0.5):
        said.append(rng.choice(SMALL_TALK))
    if careless(0.5):
        said.insert(rng.choice((0, len(said))), rng.choice(RUDE))
    if not careless():
        said.insert(0, rng.choice(GREETINGS).format(question.visitor))
    elif rng.random() < 0.5:
        said.insert(0, NAMELESS_GREETING)
    elif rng.random() < 0.1:
        said.insert(0, rng.choice(GREETINGS).format(rng.choice(VISITORS)))
    if not careless() or not said:
        said.append(rng.choice(FAREWELLS))
    return " " + " ".join(said)


def spoil(response: str, rng: random.Random) -> str:
    """A corrupted response: truncated, repetitive or shuffled."""
    words, sentences = response.split(), split_sentences(response)
    accident = rng.choice(("break off", "say again", "jumble"))
    if accident == "break off":
        words = words[: rng.randint(1, len(words))]
        words[-1] = words[-1].rstrip(".,!")
    elif accident == "say again":
        again = rng.randrange(len(sentences))
        words = sentences[: again + 1] + sentences[again:] * rng.randint(1, 2)
    else:
        rng.shuffle(words)
    return " " + " ".join(words)


# ---- Rows for the stages ------------------------------------------------------------------------------------


def corpus(num_rows: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Text for the base model: facts about the animals, and answers of every quality."""
    rng = random.Random(f"corpus {seed}")
    for _ in range(num_rows):
        if rng.random() < 0.2:
            animal, topics = rng.choice(list(ANIMALS)), rng.sample(list(ASK), 3)
            subjects = [f"The {animal}", "It", "It"]
            facts = [TELL[t].format(s, ANIMALS[animal][t]) for t, s in zip(topics, subjects, strict=True)]
            yield {"text": " ".join(facts)}
        else:
            question = rng.choice(LEARNABLE)
            yield {"text": question.text() + answer(question, rng.random(), rng)}


def demonstrations(num_rows: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Questions with human demonstrations of mixed quality."""
    rng = random.Random(f"demonstrations {seed} {held_out}")
    for _ in range(num_rows):
        question = rng.choice(HELD_OUT if held_out else LEARNABLE)
        yield {"prompt": question.text(), "completion": answer(question, DEMONSTRATOR_CARE, rng)}


def preferences(
    num_rows: int,
    seed: int = 0,
    error_rate: float = 0.1,
    held_out: bool = False,
    length_bonus: float = 0.0,
    soup_bonus: float = 0.0,
) -> Iterator[dict[str, str]]:
    """Pairs of answers with different scores, of which the annotator picks the worse one with probability `error_rate`.

    So the true reward itself agrees with only `1 - error_rate` of the choices: the ceiling of a reward model's accuracy.

    Args:
        length_bonus: points that the annotator adds to the score for each word, a bias that a reward model learns.
        soup_bonus: the same, each time that the soup is mentioned.
    """

    def worth(question: Question, response: str) -> float:
        bonus = length_bonus * len(response.split()) + soup_bonus * response.count("soup")
        return score(question, response) + bonus

    rng = random.Random(f"preferences {seed} {held_out}")
    shown = 0
    while shown < num_rows:
        question = rng.choice(HELD_OUT if held_out else LEARNABLE)
        pair = [answer(question, rng.uniform(0.3, 1.0), rng) for _ in range(2)]
        if rng.random() < 0.2:
            pair[0] = spoil(pair[0], rng)
        pair.sort(key=lambda response: worth(question, response))
        if worth(question, pair[0]) < worth(question, pair[1]):
            rejected, chosen = reversed(pair) if rng.random() < error_rate else pair
            yield {"prompt": question.text(), "chosen": chosen, "rejected": rejected}
            shown += 1


def prompts(num_rows: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Questions without answers, each at most once.

    Raises:
        ValueError: there are fewer than `num_rows`.
    """
    questions = HELD_OUT if held_out else LEARNABLE
    if num_rows > len(questions):
        raise ValueError(f"num_rows: expected at most {len(questions)} (held_out={held_out}), got {num_rows}")
    for question in random.Random(f"prompts {seed} {held_out}").sample(questions, num_rows):
        yield {"prompt": question.text()}


# ---- The true reward ----------------------------------------------------------------------------------------------

QUESTION_ASKED = {question.text(): question for question in EVERY_QUESTION}
GREETED = {greeting.format(visitor) for greeting in GREETINGS for visitor in VISITORS}
HARMLESS = {*GREETED, NAMELESS_GREETING, *FAREWELLS, *SMALL_TALK, *FORGET.values()}
KNOWN = {topic: "|".join(facts[topic] for facts in ANIMALS.values()) for topic in ASK}
FACT = re.compile(
    f"(?:It|The (?P<animal>{'|'.join(ANIMALS)})) (?:lives (?P<place>{KNOWN['place']})"
    f"|eats (?P<food>{KNOWN['food']})|is fed (?P<time>{KNOWN['time']}))[.]"
)


def split_sentences(text: str) -> list[str]:
    """`text` cut after every full stop, exclamation and question mark; the last piece may have none."""
    return [piece.strip() for piece in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if piece.strip()]


def score(question: Question, response: str) -> float:
    """The true reward of `response` in points, as defined at the top of this file."""
    sentences = split_sentences(response)
    points = 0.0 if sentences else -2.0
    subject = question.animal  # what "It" refers to
    wanted = set(question.topics)
    for position, sentence in enumerate(sentences):
        first, last = position == 0, position == len(sentences) - 1
        if fact := FACT.fullmatch(sentence):
            subject = fact["animal"] or subject
            topic = str(fact.lastgroup)
            if subject == question.animal and topic in wanted:
                wanted.remove(topic)
                points += 2.0 if fact[topic] == ANIMALS[subject][topic] else -1.0
            else:
                points -= 1.0
        elif first and sentence == NAMELESS_GREETING:
            points += 0.5
        elif first and sentence in GREETED:
            points += 1.0 if sentence.endswith(f" {question.visitor}!") else -0.5
        elif last and sentence in FAREWELLS:
            points += 1.0
        elif sentence in RUDE:
            points -= 2.0
        elif sentence in HARMLESS:
            points -= 1.0
        else:
            points -= 1.0 + 0.2 * max(0, len(sentence.split()) - 5)
    return points


def true_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The true reward of each completion in points: a reward function with TRL's signature.

    Raises:
        ValueError: a prompt is not one of the questions here.
    """
    if strange := [prompt for prompt in prompts if prompt not in QUESTION_ASKED]:
        raise ValueError(f"prompts: expected questions of recipes/quickstart/world.py, got {strange[0]!r}")
    return [score(QUESTION_ASKED[prompt], text) for prompt, text in zip(prompts, completions, strict=True)]
