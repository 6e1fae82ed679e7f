"""Opinions from templates: sentences in which a word, perhaps negated, says what is thought.

Beside the records for training there are two kinds that judge, each to choose by and held out: one
with things (nouns) and openings that training never has, in new sentences; and one with opinion
words, too, that it never has. A model from scratch can do the first, where it has to find the word
and see the negation. It can't do the second: nothing says what a word means that was never read. A
pretrained model can. What is held out shares nothing with what is chosen by either.
"""

from __future__ import annotations

import itertools
import random

from .records import Record

_GOOD = (
    "great excellent lovely superb pleasant wonderful delightful charming brilliant enjoyable "
    "impressive fantastic splendid remarkable satisfying perfect beautiful amazing magnificent "
    "marvellous"
).split()
_BAD = (
    "bad awful boring dreadful terrible poor disappointing horrible unpleasant dull annoying "
    "miserable tedious mediocre disgusting pathetic ugly lousy frustrating worthless"
).split()
_DEV_GOOD = (
    "outstanding fabulous terrific gorgeous admirable refreshing flawless captivating".split()
)
_DEV_BAD = "atrocious appalling hideous abysmal dismal shoddy unbearable revolting".split()
_HELD_OUT_GOOD = (
    "exquisite stunning glorious thrilling heavenly sublime memorable elegant stellar phenomenal "
    "graceful uplifting rewarding exceptional inspiring adorable"
).split()
_HELD_OUT_BAD = (
    "horrendous ghastly dreary repulsive insulting obnoxious vile clumsy inferior laughable "
    "disastrous unacceptable wretched nasty sloppy depressing"
).split()
_NOUNS = (
    "film book hotel meal trip concert phone lamp garden chair story song room teacher dinner play "
    "show museum camera jacket service actor painting game weather soup bicycle beach speech view "
    "car train bridge coffee bread cake salad wine tea cheese pizza breakfast lunch kitchen sofa "
    "bed window door house flat street town village city park lake river island mountain forest "
    "road airport station flight ticket bus ship harbour market shop price staff waiter doctor "
    "nurse singer dancer writer poet director editor guide driver pilot lawyer plumber school "
    "course lesson exam essay poem article magazine website app screen keyboard printer battery "
    "radio album guitar piano violin opera ballet match player team coach referee stadium shirt "
    "coat dress shoe hat watch ring bag umbrella wallet knife spoon plate bottle blanket pillow "
    "carpet curtain mirror clock toy puzzle doll bike tent map diary letter card gift party "
    "wedding parade festival tour cruise picnic"
).split()
_DEV_NOUNS = (
    "restaurant novel laptop apartment orchestra holiday sandwich lecture castle ferry".split()
)
_HELD_OUT_NOUNS = (
    "bakery telescope sculpture library musical tablet cottage pudding keynote trailer".split()
)
_OPENINGS = (
    "", "I think ", "We found that ", "My sister says ", "Everybody knows ", "In the end ",
    "To be honest, ", "As far as I can tell, ", "Yesterday ", "This time ", "Some say ",
    "Our neighbours told us that ", "For me ", "After all ", "Believe me, ", "I must say that ",
    "When we came, ", "On the whole, ", "As always, ", "It seems to me that ",
)  # fmt: skip
_DEV_OPENINGS = ("Between you and me, ", "Last year I noticed that ", "Frankly, ")
_HELD_OUT_OPENINGS = ("Honestly, ", "My colleagues agree that ", "Looking back, ")
_ADVERBS = ("", "very ", "really ", "quite ", "truly ", "rather ")
_PLAIN = (
    "It was on a Tuesday.", "We were there for two hours.", "It stands near the station.",
    "I paid with a card.", "There were four of us.", "It rained outside.", "",
    "He called me in the morning.", "They open at nine.", "My brother came with us.",
    "You can read about it.", "We took the long way.", "She told me so.", "I went alone.",
)  # fmt: skip


def _sentence(rng: random.Random, words: dict[str, list[str]], nouns: list[str],
              openings: tuple[str, ...]) -> Record:  # fmt: skip
    label = rng.choice(("positive", "negative"))
    negated = rng.random() < 0.3
    other = {"positive": "negative", "negative": "positive"}[label]
    word = rng.choice(words[other if negated else label])
    opening, noun, adverb = rng.choice(openings), rng.choice(nouns), rng.choice(_ADVERBS)
    verb = rng.choice(("is", "was", "seemed"))
    if negated:
        adverb = rng.choice(("", "at all "))
        verb = {"is": "is not", "was": "was not", "seemed": "did not seem"}[verb]
    text = f"{opening}the {noun} {verb} {adverb}{word}."
    pieces = [text[0].upper() + text[1:], rng.choice(_PLAIN)]
    rng.shuffle(pieces)
    return {"text": " ".join(piece for piece in pieces if piece), "label": label}


def records(count: int = 8000, seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, new things to choose by, and held out; new opinion words to choose by, and
    held out).

    >>> train, dev, held_out, dev_words, held_out_words = records(50)
    >>> len(train), train[0]["label"] in ("positive", "negative")
    (50, True)
    """
    rng = random.Random(seed)
    known = {"positive": _GOOD, "negative": _BAD}
    dev_words = {"positive": _DEV_GOOD, "negative": _DEV_BAD}
    held_out_words = {"positive": _HELD_OUT_GOOD, "negative": _HELD_OUT_BAD}
    dev_things = (_DEV_NOUNS, _DEV_OPENINGS)
    held_out_things = (_HELD_OUT_NOUNS, _HELD_OUT_OPENINGS)

    def some(count: int, *parts: object) -> list[Record]:
        unique: dict[str, Record] = {}
        for _ in itertools.takewhile(lambda _: len(unique) < count, range(20 * count)):
            record = _sentence(rng, *parts)  # type: ignore[arg-type]
            unique.setdefault(record["text"], record)
        return list(unique.values())

    tenth = max(count // 10, 1)
    return (
        some(count, known, _NOUNS, _OPENINGS),
        some(tenth, known, *dev_things),
        some(tenth, known, *held_out_things),
        some(tenth, dev_words, *dev_things),
        some(tenth, held_out_words, *held_out_things),
    )
