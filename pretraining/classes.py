"""The 32 classes of the base, each a merge of emoji-datasource subcategories, and which of them may be mirrored."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EmojiClass:
    """One class: its name, the subcategories it gathers, and whether a mirror image still means the same."""

    name: str
    subcategories: tuple[str, ...]
    may_flip: bool = True


# Order is the class id. Hands, flags, clocks, arrows, letters, signs, music (notes, keys), paper and devices (writing
# on them) are never mirrored: a mirrored one is another sign, or a wrong one.
CLASSES: tuple[EmojiClass, ...] = (
    EmojiClass(
        "face",
        (
            "face-smiling",
            "face-affection",
            "face-concerned",
            "face-costume",
            "face-glasses",
            "face-hand",
            "face-hat",
            "face-negative",
            "face-neutral-skeptical",
            "face-sleepy",
            "face-tongue",
            "face-unwell",
        ),
    ),
    EmojiClass("animal-face", ("cat-face", "monkey-face")),  # and every animal whose name says FACE, see `class_of`
    EmojiClass(
        "hand",
        (
            "body-parts",
            "hand-fingers-closed",
            "hand-fingers-open",
            "hand-fingers-partial",
            "hand-prop",
            "hand-single-finger",
            "hands",
        ),
        may_flip=False,
    ),
    EmojiClass("person", ("person", "person-gesture", "person-fantasy")),
    EmojiClass("profession", ("person-role",)),
    EmojiClass("people-active", ("person-activity", "person-sport", "person-resting", "family", "person-symbol")),
    EmojiClass("mammal", ("animal-mammal",)),
    EmojiClass("bird", ("animal-bird",)),
    EmojiClass("fish-reptile", ("animal-marine", "animal-reptile", "animal-amphibian")),
    EmojiClass("bug", ("animal-bug",)),
    EmojiClass("plant", ("plant-flower", "plant-other")),
    EmojiClass("fruit", ("food-fruit",)),
    EmojiClass("vegetable", ("food-vegetable",)),
    EmojiClass("meal", ("food-prepared", "food-asian")),
    EmojiClass("sweet", ("food-sweet",)),
    EmojiClass("drink", ("drink",)),
    EmojiClass("building", ("place-building", "place-religious", "place-geographic", "place-other")),
    EmojiClass("vehicle", ("transport-ground",)),
    EmojiClass("boat-aircraft", ("transport-water", "transport-air")),
    EmojiClass("sky-weather", ("sky & weather", "place-map")),
    EmojiClass("clock", ("time",), may_flip=False),
    EmojiClass("leisure", ("sport", "game", "award-medal", "event", "arts & crafts")),
    EmojiClass("music", ("music", "musical-instrument", "sound"), may_flip=False),
    EmojiClass("clothing", ("clothing",)),
    EmojiClass("tool", ("tool", "science", "medical", "lock", "household", "dishware", "hotel", "other-object")),
    EmojiClass("device", ("computer", "phone", "light & video"), may_flip=False),
    EmojiClass("paper", ("book-paper", "office", "mail", "writing", "money"), may_flip=False),
    EmojiClass("flag", ("country-flag", "flag", "subdivision-flag"), may_flip=False),
    EmojiClass("heart", ("heart", "emotion"), may_flip=False),
    EmojiClass("arrow", ("arrow", "av-symbol"), may_flip=False),
    EmojiClass("letter", ("alphanum", "keycap", "punctuation", "math", "zodiac", "currency"), may_flip=False),
    EmojiClass(
        "sign",
        ("warning", "transport-sign", "geometric", "religion", "other-symbol", "gender"),
        may_flip=False,
    ),
)

NULL_CLASS = len(CLASSES)
"""The id that a dropped label takes: the last row of the class table."""

ID2LABEL: dict[int, str] = {number: kind.name for number, kind in enumerate(CLASSES)}

_BY_SUBCATEGORY = {sub: number for number, kind in enumerate(CLASSES) for sub in kind.subcategories}
_ANIMALS = {"animal-mammal", "animal-amphibian", "animal-reptile"}
# Drawn as a head alone in every style, though the name does not say so.
_HEADS = {"FROG FACE", "BEAR FACE", "PANDA FACE", "KOALA", "RACCOON", "POLAR BEAR"}
_LEFT_OUT = {"skin-tone"}


def class_of(name: str, subcategory: str) -> int | None:
    """The class id of an emoji of emoji-datasource; None for what is no picture of its own (the skin swatches)."""
    if subcategory in _LEFT_OUT:
        return None
    if subcategory in _ANIMALS and ("FACE" in name.upper() or name.upper() in _HEADS):
        return next(number for number, kind in enumerate(CLASSES) if kind.name == "animal-face")
    return _BY_SUBCATEGORY[subcategory]
