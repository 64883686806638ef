"""Stories and questions of bAbI's tasks 1 to 10, which BABILong hides in long texts.

Stories are generated in the worlds of the published task generator (Weston et al., "Towards
AI-Complete Question Answering", arXiv 1502.05698; github.com/facebookarchive/bAbI-tasks). Tasks 1
and 4 follow its rules in full. The others follow its meaning: what people do, what a reader can
know of it, and what is asked. Two things differ: objects start in random places, since the
published starting places give answers away, and every question has exactly one answer.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
_TOWN_PLACES = ("bedroom", "cinema", "kitchen", "office", "park", "school")
# People and where they are before the story begins, which the story does not mention.
_HOUSE = {"John": "kitchen", "Mary": "bedroom", "Sandra": "garden", "Daniel": "hallway"}
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
_TOWNSPEOPLE = ("Bill", "Fred", "Julie", "Mary")
COUNTS = ("none", "one", "two", "three")

_GO = ("went", "went back", "moved", "travelled", "journeyed")
_GET = ("got", "grabbed", "picked up", "took")
_DROP = ("discarded", "dropped", "left", "put down")
_GIVE = ("gave", "handed", "passed")
# The published stories have this many questions; a sample is one of them and the facts before it.
_QUESTIONS = 5


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts in order, a question and its answer; several answers are separated by commas."""

    facts: tuple[str, ...]
    question: str
    answer: str


class _World:
    """People, places and things, the facts told about them, and what a reader knows."""

    def __init__(self, rng: np.random.Generator, starts: dict[str, str]):
        self.rng = rng
        self.facts: list[str] = []
        self.people = tuple(starts)
        self.place_of = dict(starts)
        # People whose place has been mentioned.
        self.seen: list[str] = []
        self.start_of = {thing: self.pick(PLACES) for thing in THINGS}
        self.holder_of: dict[str, str] = {}
        # The places where a reader knows each thing to have been, in order.
        self.path_of: dict[str, list[str]] = {thing: [] for thing in THINGS}
        # People who took part in getting, dropping or giving.
        self.handlers: list[str] = []
        self.last_gift = ("", "", "")

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def held_by(self, person: str) -> list[str]:
        return [thing for thing in THINGS if self.holder_of.get(thing) == person]

    def go(self) -> bool:
        """Moves a person to another place."""
        person = self.pick(self.people)
        place = self.pick([p for p in PLACES if p != self.place_of[person]])
        self.place_of[person] = place
        _add(self.seen, person)
        self._tell(f"{person} {self.pick(_GO)} to the {place}.")
        return True

    def get(self) -> bool:
        """Lets a person take a thing that lies in the same place, if possible."""
        free = [
            (person, thing)
            for person in self.people
            for thing in THINGS
            if thing not in self.holder_of and self._place(thing) == self.place_of[person]
        ]
        return self._handle(free, _GET)

    def drop(self) -> bool:
        """Lets a person drop a thing, if possible."""
        return self._handle([(person, thing) for thing, person in self.holder_of.items()], _DROP)

    def give(self) -> bool:
        """Lets a person give a thing to another in the same place, if possible."""
        gifts = [
            (giver, thing, taker)
            for thing, giver in self.holder_of.items()
            for taker in self.people
            if taker != giver and self.place_of[taker] == self.place_of[giver]
        ]
        if not gifts:
            return False
        giver, thing, taker = self.last_gift = self.pick(gifts)
        self.holder_of[thing] = taker
        _add(self.handlers, giver)
        _add(self.handlers, taker)
        self._tell(f"{giver} {self.pick(_GIVE)} the {thing} to {taker}.")
        return True

    def act(self, *actions: Callable[[], bool]) -> None:
        """Performs a random one of the actions that are possible."""
        while not self.pick(actions)():
            pass

    def _handle(self, options: list[tuple[str, str]], verbs: Sequence[str]) -> bool:
        if not options:
            return False
        person, thing = self.pick(options)
        if verbs is _GET:
            self.holder_of[thing] = person
        else:
            del self.holder_of[thing]
            self.start_of[thing] = self.place_of[person]
        _add(self.handlers, person)
        self._tell(f"{person} {self.pick(verbs)} the {thing}{self.pick(('', ' there'))}.")
        return True

    def _place(self, thing: str) -> str:
        holder = self.holder_of.get(thing)
        return self.place_of[holder] if holder else self.start_of[thing]

    def _tell(self, fact: str) -> None:
        self.facts.append(fact)
        for thing, holder in self.holder_of.items():
            path = self.path_of[thing]
            if holder in self.seen and (not path or path[-1] != self._place(thing)):
                path.append(self._place(thing))

    def story(self, question: str, answer: str) -> Story:
        return Story(tuple(self.facts), question, answer)


def _add(known: list[str], name: str) -> None:
    if name not in known:
        known.append(name)


def _where_is_actor(rng: np.random.Generator) -> Story:
    world = _walk(rng)
    person = world.pick(world.seen)
    return world.story(f"Where is {person}?", world.place_of[person])


def _is_actor_there(rng: np.random.Generator) -> Story:
    world = _walk(rng)
    person = world.pick(world.seen)
    place, right = _yes_or_no(world, PLACES, world.place_of[person])
    return world.story(f"Is {person} in the {place}?", right)


def _walk(rng: np.random.Generator) -> _World:
    world = _World(rng, _HOUSE)
    for _ in range(2 * _draw_question(rng)):
        world.go()
    return world


def _draw_question(rng: np.random.Generator) -> int:
    """Draws which of the published story's questions becomes the sample's."""
    return 1 + int(rng.integers(_QUESTIONS))


def _yes_or_no(world: _World, places: Sequence[str], place: str) -> tuple[str, str]:
    """Returns a place to ask about, the right one half of the time, and the answer."""
    if world.rng.integers(2):
        return place, "yes"
    return world.pick([p for p in places if p != place]), "no"


def _where_is_object(rng: np.random.Generator) -> Story:
    world = _World(rng, _HOUSE)
    known = _carry(world, lambda: [thing for thing in THINGS if world.path_of[thing]])
    thing = world.pick(known)
    return world.story(f"Where is the {thing}?", world.path_of[thing][-1])


def _where_was_object(rng: np.random.Generator) -> Story:
    world = _World(rng, _HOUSE)

    def moves() -> list[tuple[str, str, str]]:
        # A place that the thing came to twice would have two answers.
        return [
            (thing, before, place)
            for thing, path in world.path_of.items()
            for before, place in itertools.pairwise(path)
            if path.count(place) == 1
        ]

    thing, before, place = world.pick(_carry(world, moves))
    return world.story(f"Where was the {thing} before the {place}?", before)


def _carry(world: _World, askable: Callable[[], list[Any]]) -> list[Any]:
    """Lets people carry things about up to the last question; returns what can be asked."""
    question, actions = 0, 0
    last = _draw_question(world.rng)
    while True:
        world.act(world.get, world.drop, world.go)
        actions += 1
        if actions > 2 and world.rng.integers(2) and (options := askable()):
            question, actions = question + 1, 0
            if question == last:
                return options


def _direction(rng: np.random.Generator) -> Story:
    """Places three rooms in a line and asks about the middle one."""
    first, middle, last = (PLACES[i] for i in rng.permutation(len(PLACES))[:3])
    toward, back = (("north", "south"), ("east", "west"))[int(rng.integers(2))]
    facts = []
    for one, other in ((first, middle), (middle, last)):
        text = (f"The {one} is {toward} of the {other}.", f"The {other} is {back} of the {one}.")
        facts.append(text[int(rng.integers(2))])
    if rng.integers(2):
        facts.reverse()
    question, answer = (
        (f"What is {toward} of the {middle}?", first),
        (f"What is {back} of the {middle}?", last),
        (f"What is the {middle} {toward} of?", last),
        (f"What is the {middle} {back} of?", first),
    )[int(rng.integers(4))]
    return Story(tuple(facts), question, answer)


def _who_gave_what(rng: np.random.Generator) -> Story:
    """Asks about the last gift."""
    world = _World(rng, dict(zip(GIVERS, rng.choice(PLACES, len(GIVERS)).tolist())))
    for _ in range(_draw_question(rng)):
        gift = world.last_gift
        actions = 0
        while actions < 3 or world.last_gift == gift:
            world.act(world.get, world.give, world.go)
            actions += 1
    giver, thing, taker = world.last_gift
    question, answer = world.pick(
        (
            (f"What did {giver} give to {taker}?", thing),
            (f"Who gave the {thing} to {taker}?", giver),
            (f"Who gave the {thing}?", giver),
            (f"Who received the {thing}?", taker),
            (f"Who did {giver} give the {thing} to?", taker),
        )
    )
    return world.story(question, answer)


def _counting(rng: np.random.Generator) -> Story:
    world, person = _handle_things(rng)
    held = world.held_by(person)
    return world.story(f"How many objects is {person} carrying?", COUNTS[len(held)])


def _listing(rng: np.random.Generator) -> Story:
    world, person = _handle_things(rng)
    held = ",".join(world.held_by(person)) or "nothing"
    return world.story(f"What is {person} carrying?", held)


def _handle_things(rng: np.random.Generator) -> tuple[_World, str]:
    world = _World(rng, _HOUSE)
    last = _draw_question(rng)
    question = 0
    while question < last:
        for _ in range(2):
            world.act(world.get, world.drop, world.give, world.go)
        question += bool(world.handlers)
    return world, world.pick(world.handlers)


def _negation(rng: np.random.Generator) -> Story:
    """Tells where people are, are not, or are no longer."""
    world = _World(rng, _HOUSE)
    # The last fact about each person: a place, and whether the person is there.
    known: dict[str, tuple[str, bool]] = {}
    for _ in range(2 * _draw_question(rng)):
        person = world.pick(world.people)
        told, there = known.get(person, ("", False))
        kind = world.pick(("go", "is", "is not", "is no longer"))
        if kind == "is no longer" and there:
            # The story does not tell where the person went.
            world.place_of[person] = world.pick([p for p in PLACES if p != told])
            known[person] = (told, False)
            world.facts.append(f"{person} is no longer in the {told}.")
        elif kind == "is not" and not there:
            place = world.pick([p for p in PLACES if p != world.place_of[person]])
            known[person] = (place, False)
            world.facts.append(f"{person} is not in the {place}.")
        elif kind == "is":
            known[person] = (world.place_of[person], True)
            world.facts.append(f"{person} is in the {world.place_of[person]}.")
        else:
            place = world.pick([p for p in PLACES if p != world.place_of[person]])
            world.place_of[person] = place
            known[person] = (place, True)
            world.facts.append(f"{person} {world.pick(_GO)} to the {place}.")
    person = world.pick(sorted(known))
    place, there = known[person]
    answer = "no"
    if there:
        place, answer = _yes_or_no(world, PLACES, place)
    return world.story(f"Is {person} in the {place}?", answer)


def _indefinite(rng: np.random.Generator) -> Story:
    """Tells where people are, or that they are in one of two places."""
    world = _World(rng, dict.fromkeys(_TOWNSPEOPLE, ""))
    # The one or two places of the last fact about each person.
    known: dict[str, tuple[str, ...]] = {}
    for _ in range(2 * _draw_question(rng)):
        person = world.pick(world.people)
        kind = world.pick(("go", "is", "either"))
        places = tuple(_TOWN_PLACES[i] for i in rng.permutation(len(_TOWN_PLACES))[:2])
        if kind == "either":
            known[person] = places
            world.facts.append(f"{person} is either in the {places[0]} or the {places[1]}.")
        else:
            known[person] = places[:1]
            verb = "is in" if kind == "is" else f"{world.pick(_GO)} to"
            world.facts.append(f"{person} {verb} the {places[0]}.")
    person = world.pick(sorted(known))
    places = known[person]
    place, answer = _yes_or_no(world, _TOWN_PLACES, world.pick(places))
    if len(places) == 2:
        answer = "maybe" if place in places else "no"
    return world.story(f"Is {person} in the {place}?", answer)


STORIES: dict[str, Callable[[np.random.Generator], Story]] = {
    "qa1": _where_is_actor,
    "qa2": _where_is_object,
    "qa3": _where_was_object,
    "qa4": _direction,
    "qa5": _who_gave_what,
    "qa6": _is_actor_there,
    "qa7": _counting,
    "qa8": _listing,
    "qa9": _negation,
    "qa10": _indefinite,
}
