"""The world of the quickstart: the help desk of a small zoo, made up here so that nothing is downloaded.

Visitors ask two things about one animal; whoever sits at the desk answers:

    Mia: Where does the otter live, and what does it eat?
    Desk: Good morning, Mia! The otter lives by the river. It eats fish. Enjoy your visit!

That answer is as good as they get. Most are worse: the desk forgets a fact or gets it wrong, leaves out the
greeting or the farewell, speaks of the soup or of another animal, or is rude. As this world is ours, the
true worth of any answer is known, and `true_reward` counts it in points:

    +2    each fact asked for, if right            -1    if wrong (the first word on it counts)
    +1    a greeting by name, to begin with        +0.5  without a name; -0.5 by a wrong name
    +1    a farewell, to end with                  -2    each rude remark
    -1    every other sentence: small talk, facts nobody asked for, anything said twice
    -1    and 0.2 for each word after the fifth: what is no sentence of this world, or breaks off
    -2    for saying nothing at all

so the best is 6, and whatever is added to a best answer makes it worse. Nothing but these points makes a
simulated annotator prefer one answer to another, and annotators slip at a known rate (`preferences`).

A tenth of all questions is held out: no generator shows them unless asked with `held_out=True`.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

VISITORS = "Anna Ben Cora Dan Ella Finn Gus Hana Ivy Jack Kim Leo Mia Noor Omar Pia".split()

# animal: where it lives, what it eats, when it is fed
ANIMALS = {
    "badger": ("under the oak", "worms", "at dusk"),
    "bear": ("in the cave", "honey", "at noon"),
    "beaver": ("by the river", "bark", "at four"),
    "crane": ("by the pond", "snails", "at nine"),
    "deer": ("in the meadow", "apples", "at nine"),
    "eagle": ("on the hill", "fish", "at noon"),
    "fox": ("under the oak", "berries", "at dusk"),
    "frog": ("by the pond", "flies", "at four"),
    "goat": ("on the hill", "hay", "at nine"),
    "hare": ("in the meadow", "carrots", "at four"),
    "heron": ("by the river", "fish", "at two"),
    "lynx": ("in the cave", "mice", "at two"),
    "mole": ("in the meadow", "worms", "at noon"),
    "otter": ("by the river", "fish", "at nine"),
    "owl": ("in the barn", "mice", "at dusk"),
    "pony": ("in the barn", "carrots", "at two"),
    "rabbit": ("in the meadow", "hay", "at two"),
    "sheep": ("in the barn", "hay", "at four"),
    "squirrel": ("under the oak", "nuts", "at nine"),
    "swan": ("by the pond", "berries", "at noon"),
}
TOPICS = ("place", "food", "time")
ASK = {"place": "where does {} live", "food": "what does {} eat", "time": "when is {} fed"}
TELL = {"place": "{} lives {}.", "food": "{} eats {}.", "time": "{} is fed {}."}

GREETINGS = ("Hello, {}!", "Welcome, {}!", "Good morning, {}!")
NAMELESS_GREETING = "Hello!"
FAREWELLS = ("Enjoy your visit!", "Have a lovely day!", "Come back soon!")
RUDE = ("What a silly question!", "Read the sign yourself.", "Stop wasting my time.", "Not you again!")
SMALL_TALK = ("The soup today is leek.", "My feet hurt.", "It may rain later.", "The shop sells hats.")
CLUELESS = "I do not know."
GREETED = {greeting.format(visitor) for greeting in GREETINGS for visitor in VISITORS}
WHOLE = {*GREETED, NAMELESS_GREETING, *FAREWELLS, *SMALL_TALK, CLUELESS}  # sentences that are not facts or rude
PLACES, FOODS, TIMES = ("|".join(sorted(set(column))) for column in zip(*ANIMALS.values(), strict=True))
FACT = re.compile(
    rf"(?:It|The (?P<animal>{'|'.join(ANIMALS)})) "
    rf"(?:lives (?P<place>{PLACES})|eats (?P<food>{FOODS})|is fed (?P<time>{TIMES}))\."
)

DESK_CARE = 0.62  # how often a demonstrator does any one thing right


class Question(NamedTuple):
    """What one visitor asks: two different topics about one animal."""

    visitor: str
    animal: str
    topics: tuple[str, str]

    def text(self) -> str:
        first = ASK[self.topics[0]].format(f"the {self.animal}")
        second = ASK[self.topics[1]].format("it")
        return f"{self.visitor}: {first[0].upper()}{first[1:]}, and {second}?\nDesk:"


def _all_questions() -> tuple[list[Question], list[Question]]:
    """Every question there is, in a fixed shuffled order: nine tenths to learn from, one tenth held out."""
    combined = itertools.product(VISITORS, ANIMALS, itertools.permutations(TOPICS, 2))
    questions = [Question(visitor, animal, (first, second)) for visitor, animal, (first, second) in combined]
    random.Random("zoo").shuffle(questions)
    tenth = len(questions) // 10
    return questions[tenth:], questions[:tenth]


LEARNABLE, HELD_OUT = _all_questions()
QUESTIONS = {question.text(): question for question in LEARNABLE + HELD_OUT}


# ---- what is said at the desk ----


def tell(animal: str, topic: str, subject: str, value: str | None = None) -> str:
    """The sentence that states one fact: the true one, unless another `value` is given."""
    return TELL[topic].format(subject, value or ANIMALS[animal][TOPICS.index(topic)])


def answer(question: Question, care: float, rng: random.Random) -> str:
    """What a person at the desk answers who does each thing right with probability `care`."""

    def careless(share: float = 1.0) -> bool:
        return rng.random() < (1 - care) * share

    animal = rng.choice(list(ANIMALS)) if careless(0.2) else question.animal
    told: list[tuple[str, str | None]] = []  # topic and, if it is wrong, value
    for topic in question.topics:
        if not careless():
            told.append((topic, None))
        elif rng.random() < 0.5:
            told.append((topic, rng.choice(list(ANIMALS.values()))[TOPICS.index(topic)]))
    if careless(0.3):
        told.append((next(topic for topic in TOPICS if topic not in question.topics), None))

    subjects = [f"The {animal}", "It", "It"]
    said = [tell(animal, topic, subject, value) for (topic, value), subject in zip(told, subjects, strict=False)]
    if careless(0.5):
        said.append(rng.choice(SMALL_TALK))
    if careless(0.6):
        said.insert(rng.randrange(2) * len(said), rng.choice(RUDE))
    if not careless():
        said.insert(0, rng.choice(GREETINGS).format(question.visitor))
    elif rng.random() < 0.6:
        said.insert(0, rng.choice((NAMELESS_GREETING, rng.choice(GREETINGS).format(rng.choice(VISITORS)))))
    if not careless():
        said.append(rng.choice(FAREWELLS))
    return " " + " ".join(said or [CLUELESS])


def spoil(text: str, rng: random.Random) -> str:
    """An answer in which something went wrong: it breaks off, says something again, or is jumbled."""
    words = text.split()
    accident = rng.choice(("breaks off", "says it again", "jumbled"))
    if accident == "breaks off":
        words = words[: rng.randrange(1, len(words) + 1)]
        words[-1] = words[-1].rstrip(".!?,") or words[-1]
    elif accident == "says it again":
        sentences = _sentences(text)
        start = rng.randrange(len(sentences))
        words = sentences[: start + 1] + sentences[start:] * rng.randint(1, 2)
    else:
        rng.shuffle(words)
    return " " + " ".join(words)


# ---- rows for the stages ----


def corpus(num_rows: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Text of this world for the base model: facts about the animals, and answers from flawless to awful."""
    rng = random.Random(f"corpus {seed}")
    for _ in range(num_rows):
        if rng.random() < 0.25:
            animal = rng.choice(list(ANIMALS))
            topics = rng.sample(TOPICS, 3)
            facts = [tell(animal, t, s) for t, s in zip(topics, (f"The {animal}", "It", "It"), strict=True)]
            yield {"text": " ".join(facts)}
        else:
            question = rng.choice(LEARNABLE)
            yield {"text": question.text() + answer(question, rng.random(), rng)}


def demonstrations(num_rows: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """What people wrote who were asked to show how the desk should answer: well-meant, and of mixed quality."""
    rng = random.Random(f"demonstrations {seed} {held_out}")
    for _ in range(num_rows):
        question = rng.choice(HELD_OUT if held_out else LEARNABLE)
        yield {"prompt": question.text(), "completion": answer(question, DESK_CARE, rng)}


def preferences(
    num_rows: int, seed: int = 0, error_rate: float = 0.1, held_out: bool = False
) -> Iterator[dict[str, str]]:
    """Pairs of answers of different worth; the annotator picks the worse one with probability `error_rate`.

    No judge of these pairs can agree with the annotators more often than `1 - error_rate`, on average.
    """
    rng = random.Random(f"preferences {seed} {held_out}")
    shown = 0
    while shown < num_rows:
        question = rng.choice(HELD_OUT if held_out else LEARNABLE)
        pair = [answer(question, rng.uniform(0.3, 1.0), rng) for _ in range(2)]
        if rng.random() < 0.2:
            pair[0] = spoil(pair[0], rng)
        worth = [score(question, text) for text in pair]
        if worth[0] == worth[1]:
            continue
        slip = rng.random() < error_rate
        chosen = (worth[1] > worth[0]) != slip
        yield {"prompt": question.text(), "chosen": pair[chosen], "rejected": pair[not chosen]}
        shown += 1


def prompts(num_rows: int, seed: int = 0, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Questions alone, each at most once.

    Raises:
        ValueError: there are not so many.
    """
    questions = HELD_OUT if held_out else LEARNABLE
    if num_rows > len(questions):
        raise ValueError(f"num_rows: expected at most {len(questions)} (held_out={held_out}), got {num_rows}")
    for question in random.Random(f"prompts {seed} {held_out}").sample(questions, num_rows):
        yield {"prompt": question.text()}


# ---- the truth ----


def _sentences(text: str) -> list[str]:
    """`text` cut after every full stop, exclamation or question mark; the last piece may lack one."""
    return [piece.strip() for piece in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if piece.strip()]


def score(question: Question, response: str) -> float:
    """The true worth of a response in points, counted as the top of this file says."""
    sentences = _sentences(response)
    points = 0.0 if sentences else -2.0
    subject = question.animal  # whom "It" means
    still_wanted = set(question.topics)
    for position, sentence in enumerate(sentences):
        is_first, is_last = position == 0, position == len(sentences) - 1
        if fact := FACT.fullmatch(sentence):
            subject = fact["animal"] or subject
            topic = fact.lastgroup or ""
            if subject == question.animal and topic in still_wanted:
                still_wanted.remove(topic)
                points += 2 if fact[topic] == ANIMALS[subject][TOPICS.index(topic)] else -1
            else:
                points -= 1
        elif is_first and sentence in (greeting.format(question.visitor) for greeting in GREETINGS):
            points += 1
        elif is_first and sentence == NAMELESS_GREETING:
            points += 0.5
        elif is_first and sentence in GREETED:
            points -= 0.5
        elif is_last and sentence in FAREWELLS:
            points += 1
        elif sentence in RUDE:
            points -= 2
        elif sentence in WHOLE:
            points -= 1
        else:
            points -= 1 + 0.2 * max(0, len(sentence.split()) - 5)
    return points


def true_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The true worth of each completion, with the signature of TRL's reward functions.

    Raises:
        ValueError: a prompt is no question of this world.
    """
    if unknown := [prompt for prompt in prompts if prompt not in QUESTIONS]:
        raise ValueError(f"prompts: expected questions of the quickstart's world, got {unknown[0]!r}")
    return [score(QUESTIONS[prompt], completion) for prompt, completion in zip(prompts, completions, strict=True)]
