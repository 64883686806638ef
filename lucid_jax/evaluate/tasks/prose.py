"""Generated prose for haystacks, used if the user has no essays, books or questions.

Sentences are built from templates in plain English, without digits, hyphens, or any of the
names, places and things of BABILong's facts, so that they hold no answer. Results on it are
marked `[prose]`, since they differ from results on the benchmark's own text.
"""

import dataclasses
import functools

import numpy as np

# These have about 110,000 words. Longer haystacks repeat them, as they do RULER's essays.
SENTENCES = 8192
_SEED = 20_260_210

_WHO = (
    "the old miller", "a travelling clockmaker", "the harbour pilot", "her elder sister",
    "the village doctor", "a retired surveyor", "the ferryman", "one of the weavers",
    "the new librarian", "an English painter", "the captain of the guard", "his former tutor",
    "the lighthouse keeper", "a young botanist", "the widow next door", "the stone carver",
    "a merchant from the coast", "the choir master", "the last of the shepherds",
    "an honest printer", "the judge", "a quiet traveller", "the gardener's uncle",
    "the founder of the mill", "a student of law", "the night watchman",
)  # fmt: skip
_DID = (
    "kept a careful record of the weather", "argued about the price of timber",
    "spoke of the long winter", "repaired the broken sluice", "sold a pair of grey horses",
    "wrote a letter that nobody answered", "measured the height of the tower",
    "collected shells and dried flowers", "taught the children to read maps",
    "borrowed a lantern and a coil of rope", "waited for the evening coach",
    "counted the sacks of barley", "told the story of the shipwreck",
    "refused to sign the agreement", "planted a row of young elms",
    "bought a book of sea charts", "complained about the noise of the forge",
    "walked the length of the old wall", "drew a plan of the new bridge",
    "carried the news of the harvest", "watched the geese fly south",
    "made a small fortune in wool", "lost the key to the tool chest",
    "copied out the names of the tenants",
)  # fmt: skip
_WHERE = (
    "beside the river", "in the market square", "at the edge of the moor", "near the lime kiln",
    "under the chapel roof", "on the road to the coast", "behind the customs house",
    "at the foot of the hill", "in a room above the bakery", "along the canal",
    "across the valley", "by the north gate", "in the shade of the walnut trees",
    "outside the town hall", "on the upper terrace", "among the fishing boats",
    "in the reading room", "close to the quarry", "at the mouth of the estuary",
    "on the far side of the common",
)  # fmt: skip
_WHEN = (
    "that autumn", "before the first frost", "on the second day of the fair", "after the flood",
    "early in the spring", "during the long drought", "late one evening", "in those years",
    "at the turn of the tide", "as soon as the roads were dry", "on market days",
    "a week before the feast", "long after dark", "when the bells had stopped",
)  # fmt: skip
_REMARK = (
    "nobody thought it strange", "the matter was soon forgotten", "it took most of the day",
    "people still speak of it", "the cost was shared by all", "there was little else to do",
    "the result pleased everyone", "it made no difference in the end",
    "the habit lasted for many years", "even the neighbours agreed",
    "the weather held until nightfall", "so the work went on as before",
)  # fmt: skip
_SHAPES = (
    "{when}, {who} {did} {where}.",
    "{who} {did} {where}, and {remark}.",
    "{who} {did} {when}.",
    "{where}, {who} {did}, though {remark}.",
    "it was {when} that {who} {did}.",
    "{who} {did}; {remark}.",
    "some say that {who} {did} {where} {when}.",
)


@functools.cache
def sentences(count: int) -> tuple[str, ...]:
    """Returns the first `count` sentences of a fixed sequence of distinct ones."""
    rng = np.random.default_rng(_SEED)
    parts = {"who": _WHO, "did": _DID, "where": _WHERE, "when": _WHEN, "remark": _REMARK}
    # A dictionary is a set that keeps its order.
    distinct: dict[str, None] = {}
    while len(distinct) < count:
        words = {name: _pick(rng, choices) for name, choices in parts.items()}
        sentence = _pick(rng, _SHAPES).format(**words)
        distinct[sentence[0].upper() + sentence[1:]] = None
    return tuple(distinct)


@dataclasses.dataclass(frozen=True)
class Person:
    """The subject of a document; `teacher` is the index of another person."""

    name: str
    town: str
    trade: str
    teacher: int


_FIRST = (
    "Alban", "Berit", "Casimir", "Dorothea", "Edmund", "Florian", "Greta", "Hester", "Ignatius",
    "Jolanda", "Konrad", "Leonora", "Matthias", "Nadia", "Oswald", "Petra", "Quentin",
    "Rosalind", "Sylvester", "Theodora", "Ulrich", "Valentina", "Wilhelm", "Ysolde",
)  # fmt: skip
_LAST = (
    "Abernathy", "Bellweather", "Carrow", "Dunmore", "Eastlake", "Fairbrother", "Goldwater",
    "Harkness", "Inglewood", "Jessop", "Kettering", "Lockhart", "Merriweather", "Northcott",
    "Oakhurst", "Pemberton", "Ravenscroft", "Stanhope", "Thackeray", "Underhill", "Vandermeer",
    "Wainwright", "Yarborough", "Zimmerman",
)  # fmt: skip
_TOWN_BEGINNINGS = ("Ash", "Birch", "Crow", "Dun", "Elm", "Fern", "Gold", "Hazel", "Iron", "Kings")
_TOWN_ENDINGS = ("bourne", "caster", "dale", "ford", "haven", "leigh", "mouth", "stead", "wick")
_TRADES = (
    "bookbinder", "cartographer", "cooper", "engraver", "glazier", "instrument maker", "notary",
    "pharmacist", "potter", "saddler", "shipwright", "thatcher",
)  # fmt: skip


@functools.cache
def people() -> tuple[Person, ...]:
    """Returns 576 invented people in a fixed random order."""
    rng = np.random.default_rng(_SEED)
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    names = [names[i] for i in rng.permutation(len(names))]
    towns = [begin + end for begin in _TOWN_BEGINNINGS for end in _TOWN_ENDINGS]
    steps = rng.integers(1, len(names), len(names))
    return tuple(
        Person(name, _pick(rng, towns), _pick(rng, _TRADES), (i + int(step)) % len(names))
        for i, (name, step) in enumerate(zip(names, steps))
    )


@functools.cache
def biographies() -> tuple[str, ...]:
    """Returns a document about each of `people()`."""
    filler = sentences(SENTENCES)
    return tuple(
        f"{p.name}\n{p.name} was born in {p.town} and became a {p.trade}. {filler[3 * i]}"
        f" {p.name} learned the trade from {people()[p.teacher].name}. {filler[3 * i + 1]}"
        f" {filler[3 * i + 2]}"
        for i, p in enumerate(people())
    )


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]
