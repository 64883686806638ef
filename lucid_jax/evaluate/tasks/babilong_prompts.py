"""BABILong's prompts, word for word (github.com/booydar/babilong, `prompts.py`), slips included.

They are part of the benchmark: scores depend on their wording.
"""

import dataclasses

TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\n"
    "Question: {question}"
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The parts before the context; `post_prompt` describes the form of an answer."""

    instruction: str
    examples: str
    post_prompt: str


def _examples(*examples: str, apart: str = "\n", end: str = "\n") -> str:
    return apart.join(f"<example>\n{text}\n</example>" for text in examples) + end


_HIDDEN = (
    "{} hidden in some random text and a question. You need to answer the question based only"
    " on the information from the facts."
)
_PEOPLE = _HIDDEN.format("I will give you context with the facts about people and their locations")
_LATEST = (
    f"{_PEOPLE} If a person was in different locations, use the latest location the person was"
    " in to answer the question."
)
_CARRIED = _HIDDEN.format(
    "I will give you context with the facts about people and objects they carry,"
)
_MOVED = (
    "If a person got an item in the first location and travelled to the second location the item"
    " is also in the second location. If a person dropped an item in the first location and moved"
    " to the second location the item remains in the first location."
)
_ACTIONS = (
    "I give you context with the facts about locations and actions of different persons hidden in"
    " some random text and a question."
)

PROMPTS = {
    "qa1": Prompt(
        _HIDDEN.format(
            "I will give you context with the facts about positions of different persons"
        )
        + " If a person was in different locations, use the latest location to answer the"
        " question.",
        _examples(
            "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to"
            " balcony. Where is Charlie?\nAnswer: The most recent location of Charlie is balcony.",
            "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse"
            " travelled to balcony. Where is Alan?\nAnswer: The most recent location of Alan is"
            " shop.",
            apart="\n\n",
            end="",
        ),
        "Always return your answer in the following format: The most recent location of ’person’"
        " is ’location’. Do not write anything else after that.",
    ),
    "qa2": Prompt(
        f"{_ACTIONS}You need to answer the question based only on the information from the facts."
        f"\n{_MOVED}",
        _examples(
            "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony."
            " Where is the bottle?\nAnswer: The bottle is in the balcony.",
            "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where"
            " is the screw driver?\nAnswer: The screw driver is in the kitchen.",
            end="",
        ),
        "Always return your answer in the following format: The ’item’ is in ’location’. Do not"
        " write anything else after that.",
    ),
    "qa3": Prompt(
        f"{_ACTIONS} You need to answer the question based only on the information from the facts."
        f"\n{_MOVED}",
        _examples(
            "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the"
            " bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary"
            " travelled to the kitchen. Where was the apple before the kitchen?\nAnswer: Before"
            " the kitchen the apple was in the bathroom.",
            "John went back to the bedroom. John went back to the garden. John went back to the"
            " kitchen. Sandra took the football. Sandra travelled to the garden. Sandra journeyed"
            " to the bedroom. Where was the football before the bedroom?\nAnswer: Before the"
            " bedroom the football was in the garden.",
            end="",
        ),
        "Always return your answer in the following format: Before the $location_1$ the $item$"
        " was in the $location_2$. Do not write anything else after that.",
    ),
    "qa4": Prompt(
        _HIDDEN.format(
            "I will give you context with the facts about different people, their location and"
            " actions,"
        ),
        _examples(
            "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the"
            " kitchen south of?\nAnswer: bedroom",
            "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west"
            " of the bedroom?\nAnswer: garden",
            end="",
        ),
        "Your answer should contain only one word - location. Do not write anything else after"
        " that.",
    ),
    "qa5": Prompt(
        _HIDDEN.format(
            "I will give you context with the facts about locations and their relations"
        ),
        _examples(
            "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the"
            " bedroom. Bill took the milk there. Who did Mary give the apple to?\nAnswer: Fred",
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk"
            " there. Bill travelled to the bedroom. Who gave the football?\nAnswer: Jeff",
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the"
            " bedroom. Jeff went back to the garden. What did Fred give to Bill?\nAnswer: apple",
            end="",
        ),
        "Your answer should contain only one word. Do not write anything else after that. Do not"
        " explain your answer.",
    ),
    "qa6": Prompt(
        _LATEST,
        _examples(
            "John travelled to the hallway. John travelled to the garden. Is John in the"
            " garden?\nAnswer: yes",
            "Mary went to the office. Daniel journeyed to the hallway. Mary went to the bedroom."
            " Sandra went to the garden. Is Mary in the office?\nAnswer: no",
        ),
        "Your answer should contain only one word - $yes$ or $no$. Do not write anything else"
        " after that. Do not explain your answer.",
    ),
    "qa7": Prompt(
        _CARRIED,
        _examples(
            "Daniel went to the bedroom. Daniel got the apple there. How many objects is Daniel"
            " carrying?\nAnswer: one",
            "Mary grabbed the apple there. Mary gave the apple to John. How many objects is Mary"
            " carrying?\nAnswer: none",
            "Sandra travelled to the hallway. Sandra picked up the milk there. Sandra took the"
            " apple there. Mary travelled to the garden. How many objects is Sandra"
            " carrying?\nAnswer: two",
        ),
        "Your answer should contain only one word - $none$ or $number_of_objects$. Do not write"
        " anything else after that. Do not explain your answer.",
    ),
    "qa8": Prompt(
        _CARRIED,
        _examples(
            "Sandra travelled to the garden. Mary grabbed the milk there. What is Mary"
            " carrying?\nAnswer: milk",
            "Mary travelled to the kitchen. Sandra travelled to the office. John travelled to the"
            " office. Sandra discarded the milk there. What is Sandra carrying?\nAnswer: nothing",
            "Daniel grabbed the apple there. Mary went to the office. Daniel moved to the garden."
            " Daniel grabbed the milk there. Mary went to the kitchen. What is Daniel"
            " carrying?\nAnswer: apple,milk",
        ),
        "Your answer should contain only one or two words: $nothing$ or $object$ or $object_1$,"
        " $object_2$. Do not write anything else. Do not explain your answer.",
    ),
    "qa9": Prompt(
        _LATEST,
        _examples(
            "John is not in the bathroom. Sandra is not in the bedroom. Is John in the"
            " bathroom?\nAnswer: no",
            "Mary journeyed to the kitchen. John is in the bedroom. Sandra is not in the garden."
            " Is Mary in the kitchen?\nAnswer: yes",
        ),
        "Your answer should contain only one word - $yes$ or $no$. Do not write anything else."
        " Do not explain your answer.",
    ),
    "qa10": Prompt(
        _LATEST,
        _examples(
            "Bill is in the kitchen. Julie is either in the school or the cinema. Is Bill in the"
            " bedroom?\nAnswer: no",
            "Fred is in the bedroom. Mary is either in the school or the cinema. Is Mary in the"
            " school?\nAnswer: maybe",
            "Fred is either in the kitchen or the park. Bill moved to the cinema. Is Bill in the"
            " cinema?\nAnswer: yes",
            end="\n<context>\n",
        ),
        "Your answer should contain only one word - $yes$ or $no$ or $maybe$. Do not write"
        " anything else. Do not explain your answer.",
    ),
}
