"""Small grammars that write GLUE-like rows. Every sentence is our own; none is taken from GLUE.

A grammar is `f(draw, label) -> texts`: one row whose label is `label`, a class name (or, for a
regression task, the number of shared slots). Vocabularies are small on purpose: a two-layer BERT
with random weights has to learn every word from a few hundred rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices that are the same on every machine and Python.

    Only `random.Random.random()` is promised to keep its sequence between Python versions, so `choice`,
    `sample` and `shuffle` are done here.
    """

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        """True in `share` (0..1) of all draws."""
        return self._random.random() < share

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        return items[int(self._random.random() * len(items))]

    def other(self, items: Sequence[T], taken: T) -> T:
        """One of `items` that is not `taken`."""
        return self.pick([item for item in items if item != taken])

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different `items`, in random order."""
        return self.shuffled(items)[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list of all `items`, in random order."""
        keyed = sorted((self._random.random(), at) for at in range(len(items)))
        return [items[at] for _, at in keyed]


Grammar = Callable[[Draw, str], tuple[str, ...]]


def _sentence(words: str, end: str = ".") -> str:
    """Words with a capital first letter and a final mark; "a" before a vowel becomes "an"."""
    words = re.sub(r"\b(a) (?=[aeiou])", r"\1n ", " ".join(words.split()))
    return words[0].upper() + words[1:] + end


def _pool(text: str) -> tuple:
    """The choices in "a, b/c": one word, or a tuple of the forms between slashes."""
    return tuple(tuple(item.split("/")) if "/" in item else item for item in text.split(", "))


_BEINGS = _pool(
    "girl/girls/herself, boy/boys/himself, queen/queens/herself, uncle/uncles/himself, "
    "nurse/nurses/herself, monk/monks/himself"
)
_VERBS = _pool("sees/see, likes/like, follows/follow, draws/draw, helps/help")
_ADJECTIVES = ("old", "young", "tall", "quiet", "café-loving")
_PLACES = ("in the garden", "near the river", "at the station", "behind the house")
_DETERMINERS = (("this", "that", "one", "every"), ("these", "those", "two", "many"))


def _noun_phrase(draw: Draw, number: int, broken: str = "") -> str:
    """A determiner, sometimes an adjective, and a noun; `number` is 0 for singular, 1 for plural."""
    determiner = draw.pick(_DETERMINERS[1 - number if broken == "determiner" else number])
    noun = draw.pick(_BEINGS)[number]
    if broken == "adjective order":
        return f"{determiner} {noun} {draw.pick(_ADJECTIVES)}"
    adjective = draw.pick(_ADJECTIVES) if draw.chance(0.4) else ""
    return f"{determiner} {adjective} {noun}"


def acceptability(draw: Draw, label: str) -> tuple[str, ...]:
    """Acceptable "These tall boys help that nurse."; unacceptable "These tall boys helps that nurse."."""
    faults = ("agreement", "determiner", "adjective order", "reflexive", "no verb", "verb last")
    broken = "" if label == "acceptable" else draw.pick(faults)
    number = draw.pick((0, 1))
    verb = draw.pick(_VERBS)[1 - number if broken == "agreement" else number]
    place = draw.pick(_PLACES) if draw.chance(0.4) else ""
    if broken == "reflexive" or (not broken and draw.chance(0.3)):
        singular, _, reflexive = draw.pick(_BEINGS)
        if broken:
            reflexive = "himself" if reflexive == "herself" else "herself"
        subject = f"{draw.pick(_DETERMINERS[0])} {singular}"
        return (_sentence(f"{subject} {draw.pick(_VERBS)[0]} {reflexive} {place}"),)
    first = _noun_phrase(draw, number, broken)
    second = _noun_phrase(draw, draw.pick((0, 1)))
    orders = {"no verb": (first, second), "verb last": (first, second, verb)}
    return (_sentence(f"{' '.join(orders.get(broken, (first, verb, second)))} {place}"),)


_FILM = ("film", "plot", "acting", "dialogue", "music", "ending", "camera work", "opening scene", "cast")
_OPINIONS = {
    "positive": _pool("funny, moving, brilliant, fresh, gripping, charming, clever, tender, superb"),
    "negative": _pool("dull, clumsy, boring, stale, tedious, lifeless, silly, bland, feeble"),
}
_DEGREES = ("", "very", "truly", "rather", "quite", "surprisingly")


def sentiment(draw: Draw, label: str) -> tuple[str, ...]:
    """Positive "the plot is never dull", "despite a bland cast , the ending is superb"."""
    opposite = "negative" if label == "positive" else "positive"
    good, bad = _OPINIONS[label], _OPINIONS[opposite]
    aspect, other = draw.some(_FILM, 2)
    degree = draw.pick(_DEGREES)
    forms = (
        f"the {aspect} is {degree} {draw.pick(good)}",
        f"{degree} {draw.pick(good)} {aspect} and a {draw.pick(good)} {other}",
        f"a {draw.pick(good)} , {draw.pick(good)} piece of work",
        f"the {aspect} is never {draw.pick(bad)}",
        f"despite a {draw.pick(bad)} {aspect} , the {other} is {degree} {draw.pick(good)}",
    )
    return (" ".join(draw.pick(forms).split()) + draw.pick((" ", " .", " !", "")),)


# A word and its synonym mean the same slot value.
_FIRMS = _pool("Alvero, Brindle, Corvane, Dellmore, Estrava, Fennick")
_DEEDS = _pool("buy/purchase, sell/dispose of, close/shut, build/construct, rent/lease")
_ASSETS = _pool("factories/plants, shops/stores, ships/vessels, farms/ranches, planes/aircraft")
_CITIES = _pool("Ostrava, Malmö, Porto, Tampere, Girona, Lübeck")


def _news(draw: Draw, firm: str, deed: tuple, asset: tuple, city: str, day: str) -> str:
    action, things = (m[1 if draw.chance(0.2) else 0] for m in (deed, asset))
    what = f"{action} its {things} in {city}"
    forms = (
        f"{firm} said on {day} that it would {what}",
        f"on {day} , {firm} announced a plan to {what}",
        f"{firm} is going to {what} , a spokesman said {day}",
    )
    return _sentence(draw.pick(forms), " .")


def paraphrase(draw: Draw, label: str) -> tuple[str, ...]:
    """Equivalent "Brindle said on Monday that it would buy its shops in Porto ." and "On Monday ,
    Brindle announced a plan to purchase its stores in Porto ."; else one or more slots differ."""
    pools = (_FIRMS, _DEEDS, _ASSETS, _CITIES)
    first = [draw.pick(pool) for pool in pools]
    second = list(first)
    if label != "equivalent":
        for slot in draw.some(range(4), draw.pick((1, 3, 4, 4))):
            second[slot] = draw.other(pools[slot], first[slot])
    day = draw.pick(("Monday", "Tuesday", "Thursday"))
    return _news(draw, *first, day), _news(draw, *second, day)


_SCENE = (
    _pool("young/youthful, tired/weary, rich/wealthy, happy/cheerful, clever/smart"),
    _pool("doctor/physician, child/kid, thief/robber, sailor/seaman, painter/artist"),
    _pool("carries/brings, fixes/repairs, hides/conceals, throws/tosses, grabs/takes"),
    _pool("stone/rock, cup/mug, bicycle/bike, coat/jacket, picture/image"),
    _pool(
        "in the forest/in the woods, at the shop/at the store, on the road/on the street, "
        "by the sea/by the ocean, in the cellar/in the basement"
    ),
)


def similarity(draw: Draw, label: str) -> tuple[str, ...]:
    """Score 3 "The tired sailor hides a cup by the sea." and "The weary sailor hides a coat in the
    cellar.": of adjective, actor, action, thing and place, `label` are the same, a few as synonyms."""
    shared = set(draw.some(range(5), int(label)))
    first = [draw.pick(pool) for pool in _SCENE]
    second = [v if i in shared else draw.other(_SCENE[i], v) for i, v in enumerate(first)]

    def words(meanings: list[tuple[str, str]]) -> str:
        adjective, actor, action, thing, place = (m[1 if draw.chance(0.12) else 0] for m in meanings)
        return _sentence(f"the {adjective} {actor} {action} a {thing} {place}")

    return words(first), words(second)


_SUBJECTS = _pool("guitar, chess, Spanish, Python, swimming, cooking, yoga, poker, drawing, algebra")
_INTENTS = (
    ("how can I learn {} quickly", "what is the fastest way to get good at {}"),
    ("how much does a {} course cost", "what is the price of lessons in {}"),
    ("who is the most famous {} teacher", "which teacher of {} is known best"),
    ("is {} good for children", "should kids take up {}"),
    ("why do people give up {}", "what makes beginners quit {}"),
)


def duplicate(draw: Draw, label: str) -> tuple[str, ...]:
    """Duplicate "Is chess good for children?" and "Should kids take up chess?"; else another subject
    or another intent."""
    subjects, intents = [draw.pick(_SUBJECTS)] * 2, [draw.pick(_INTENTS)] * 2
    if label != "duplicate":
        if draw.chance(0.5):
            subjects[1] = draw.other(_SUBJECTS, subjects[0])
        else:
            intents[1] = draw.other(_INTENTS, intents[0])
    first, second = (_sentence(draw.pick(i).format(s), "?") for i, s in zip(intents, subjects, strict=True))
    return first, second


_WHO = _pool("woman/person, man/person, dog/animal, horse/animal, pilot/worker, baker/worker")
# What one does, what that is in general, and what rules it out.
_DOES = _pool(
    "is running/is moving/is resting, is dancing/is moving/is sleeping, is sleeping/is resting/is "
    "dancing, is lying down/is resting/is running, is singing/is making noise/is keeping silent, is "
    "whispering/is making noise/is keeping silent"
)
_WHERE = ("in the kitchen", "on the beach", "in the church", "on the roof")
_REASONS = _pool("to win a prize, because of the good news, for the first time, with an old friend, after a long trip")
_FRAMES = {"": ("{}", "today {}"), "other": ("we are told that {}", "the report says {}")}


def inference(draw: Draw, label: str, frames: str = "") -> tuple[str, ...]:
    """Premise "A pilot is dancing on the roof."; entailment "A worker is moving.", contradiction "No
    pilot is dancing.", "The pilot is sleeping on the roof.", neutral "A pilot is dancing to win a prize."."""
    who, does, where = draw.pick(_WHO), draw.pick(_DOES), draw.pick(_WHERE)
    premise = f"a {who[0]} {does[0]} {where}"
    place = where if draw.chance(0.5) else ""
    subject, action = draw.pick(who), draw.pick(does[:2])
    hypotheses = {
        "entailment": (f"a {subject} {action} {place}",),
        "neutral": (f"a {subject} {action} {place} {draw.pick(_REASONS)}",),
        "contradiction": (
            f"no {subject} {action} {place}",
            f"the {subject} {action.replace('is', 'is not', 1)} {place}",
            f"the {subject} {does[2]} {place}",
        ),
    }[label]
    return _sentence(draw.pick(_FRAMES[frames]).format(premise)), _sentence(draw.pick(hypotheses))


def inference_elsewhere(draw: Draw, label: str) -> tuple[str, ...]:
    """As `inference`, from another genre: "We are told that a pilot is dancing on the roof."."""
    return inference(draw, label, "other")


_TOWNS = ("Talbury", "Norwick", "Eskdale", "Calverton", "Zöllnau", "Marbeck")
_FACTS = (
    ("when was {} founded", "settlers built {} in the year 1{n}"),
    ("how many people live in {}", "about {n} thousand inhabitants have their home in {}"),
    ("which river flows through {}", "the water of the Ost divides {} into {n} quarters"),
    ("who is the mayor of {}", "citizens of {} elected Ms Harlow with {n} votes"),
    ("what is the climate of {} like", "summers in {} are warm , with {n} days of rain"),
    ("what do people in {} eat", "a soup of beans , served for {n} cents , is the local dish of {}"),
    ("which sport is popular in {}", "the hockey team of {} has won {n} games"),
    ("how do trains reach {}", "a railway line of {n} miles connects {} with the coast"),
)


def answer(draw: Draw, label: str) -> tuple[str, ...]:
    """Entailment "Who is the mayor of Marbeck?" and "Citizens of Marbeck elected Ms Harlow with 412
    votes."; else the sentence tells another fact of the same town."""
    town, asked = draw.pick(_TOWNS), draw.pick(_FACTS)
    told = asked if label == "entailment" else draw.other(_FACTS, asked)
    number = draw.pick(("212", "340", "412", "563", "780", "895"))
    return _sentence(asked[0].format(town), "?"), _sentence(told[1].format(town, n=number))


_NAMES = ("Ms Okoro", "Mr Lindt", "Ms Varga", "Mr Sato", "Ms Peña", "Mr Duval")
_JOBS = _pool("chairman/leads, lawyer/defends, accountant/does the books of, doctor/treats the staff of")


def entailment(draw: Draw, label: str) -> tuple[str, ...]:
    """Premise "Ms Varga , a lawyer from Porto , has worked for Corvane for years."; entailment "Ms Varga
    defends Corvane ."; else another name, firm or job."""
    pools = (_NAMES, _JOBS, _FIRMS)
    first = [draw.pick(pool) for pool in pools]
    second = list(first)
    if label != "entailment":
        for slot in draw.some(range(3), draw.pick((1, 2, 2))):
            second[slot] = draw.other(pools[slot], first[slot])
    name, job, firm = first
    forms = (
        f"{name} , a {job[0]} from {draw.pick(_CITIES)} , has worked for {firm} for years",
        f"last year {firm} made {name} its new {job[0]} in {draw.pick(_CITIES)}",
    )
    return _sentence(draw.pick(forms), " ."), _sentence(f"{second[0]} {second[1][1]} {second[2]}", " .")


_THINGS = ("trophy", "piano", "statue", "sofa", "ladder", "wardrobe")
_HOLDERS = ("suitcase", "van", "hallway", "lift", "cupboard", "garage")


def pronoun(draw: Draw, label: str) -> tuple[str, ...]:
    """Entailment "The piano did not fit into the van because it was too large." and "The piano was too
    large."; else the other noun. "It" is mostly the subject: with even odds most seeds learn nothing."""
    thing, holder = draw.pick(_THINGS), draw.pick(_HOLDERS)
    quality, about_thing = draw.pick((("large", True), ("wide", True), ("long", True), ("small", False)))
    verb = draw.pick(("did not fit into", "could not go into"))
    named = thing if about_thing == (label == "entailment") else holder
    premise = f"the {thing} {verb} the {holder} because it was too {quality}"
    return _sentence(premise), _sentence(f"the {named} was too {quality}")
