"""English and Chinese by rule: numbers, dates, times of day, counted things, short sentences.

Each record is one direction, (source, target), and both directions are made; which one is wanted is
plain from the source's script. A number that stands alone, a date, a time, or a pair of noun and
adjective is in one file alone, in both directions. Words are shared: counts, minutes and years are
made of the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from .records import Record
from .split import PARTS, side_of

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_DIGITS = "零一二三四五六七八九"
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
#: noun → (Chinese, measure word)
_NOUNS = {
    "apple": ("苹果", "个"), "book": ("书", "本"), "cat": ("猫", "只"), "dog": ("狗", "只"),
    "car": ("车", "辆"), "ticket": ("票", "张"), "table": ("桌子", "张"), "chair": ("椅子", "把"),
    "knife": ("刀", "把"), "horse": ("马", "匹"), "letter": ("信", "封"), "flower": ("花", "朵"),
    "tree": ("树", "棵"), "house": ("房子", "座"), "bridge": ("桥", "座"), "fish": ("鱼", "条"),
    "shirt": ("衬衫", "件"), "photo": ("照片", "张"), "bird": ("鸟", "只"), "pen": ("笔", "支"),
    "dictionary": ("词典", "本"), "bicycle": ("自行车", "辆"), "river": ("河", "条"),
    "newspaper": ("报纸", "份"), "computer": ("电脑", "台"), "cup": ("杯子", "个"),
}  # fmt: skip
_ADJECTIVES = {
    "red": "红", "white": "白", "black": "黑", "green": "绿", "yellow": "黄", "big": "大",
    "small": "小", "new": "新", "old": "旧", "beautiful": "漂亮的", "cheap": "便宜的",
    "expensive": "贵的",
}  # fmt: skip
#: (English before and behind, Chinese before and behind)
_FRAMES = (
    ("", "", "", ""), ("I have ", ".", "我有", "。"), ("She bought ", ".", "她买了", "。"),
    ("There are ", " here.", "这里有", "。"), ("We need ", ".", "我们需要", "。"),
    ("He sees ", ".", "他看见", "。"), ("They sold ", ".", "他们卖了", "。"),
    ("Do you have ", "?", "你有", "吗？"),
)  # fmt: skip


def english_number(n: int) -> str:
    """A number in words.

    >>> english_number(1_020_305)
    'one million twenty thousand three hundred and five'
    """
    if not 0 <= n < 10**9:
        raise ValueError(f"english_number: n is {n}; it must be in [0, 10^9)")
    if n < 20:
        return _ONES[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    for unit, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= unit:
            head, rest = divmod(n, unit)
            joined = "" if not rest else f" {'and ' if rest < 100 else ''}{english_number(rest)}"
            return f"{english_number(head)} {name}{joined}"
    raise AssertionError


def chinese_number(n: int) -> str:
    """A number in Chinese characters: digits with 十, 百, 千 in groups of 万, 零 for a gap.

    >>> [chinese_number(n) for n in (10, 15, 105, 120, 20005, 1_020_305)]
    ['十', '十五', '一百零五', '一百二十', '二万零五', '一百零二万零三百零五']
    """
    if not 0 <= n < 10**8:
        raise ValueError(f"chinese_number: n is {n}; it must be in [0, 10^8)")
    if n == 0:
        return "零"
    high, low = divmod(n, 10**4)
    text = ""
    if high:
        text = _group(high) + "万"
        if low:
            text += ("零" if low < 1000 else "") + _group(low)
    else:
        text = _group(low)
    return text[1:] if text.startswith("一十") else text


def _group(n: int) -> str:
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, unit)
        if digit:
            text += ("零" if gap else "") + _DIGITS[digit] + name
            gap = False
        else:
            gap = bool(text)
    return text


def _ordinal(n: int) -> str:
    suffix = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def _date(rng: random.Random) -> tuple[str, str, str, str]:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    weekday = rng.randrange(7)
    usual = f"{_MONTHS[month - 1]} {day}, {year}"
    english = rng.choice((
        usual, f"{day} {_MONTHS[month - 1]} {year}",
        f"the {_ordinal(day)} of {_MONTHS[month - 1]} {year}",
    ))  # fmt: skip
    chinese = f"{year}年{month}月{day}日"
    if rng.random() < 0.3:
        english, usual = (f"{_WEEKDAYS[weekday]}, {date}" for date in (english, usual))
        chinese += "，星期" + "一二三四五六日"[weekday]
    return f"date {year}-{month}-{day}", english, chinese, usual


def _time(rng: random.Random) -> tuple[str, str, str, str]:
    hour, minute = rng.randint(1, 11), rng.randrange(0, 60)
    if minute == 0:
        english, chinese = f"{_ONES[hour]} o'clock", f"{_hour(hour)}点"
    elif minute == 30:
        english, chinese = f"half past {_ONES[hour]}", f"{_hour(hour)}点半"
    elif minute == 15:
        english, chinese = f"a quarter past {_ONES[hour]}", f"{_hour(hour)}点一刻"
    else:
        english = f"{_ONES[hour]} {'oh ' if minute < 10 else ''}{english_number(minute)}"
        chinese = f"{_hour(hour)}点{'零' if minute < 10 else ''}{chinese_number(minute)}分"
    before, prefix = rng.choice((
        (" in the morning", "早上"), (" in the evening", "晚上"), ("", ""),
    ))  # fmt: skip
    english += before
    return f"time {hour}:{minute}", english, prefix + chinese, english


def _hour(n: int) -> str:
    return "两" if n == 2 else chinese_number(n)


def _number(rng: random.Random) -> tuple[str, str, str, str]:
    n = rng.randrange(10 ** rng.randint(1, 7))
    return f"number {n}", english_number(n), chinese_number(n), english_number(n)


def _things(rng: random.Random) -> tuple[str, str, str, str]:
    count = rng.randint(2, 12)
    noun, (thing, measure) = rng.choice(list(_NOUNS.items()))
    adjective, quality = rng.choice(list(_ADJECTIVES.items()))
    front, behind, before, after = rng.choice(_FRAMES)
    plural = {"knife": "knives", "fish": "fish", "dictionary": "dictionaries"}.get(noun, noun + "s")
    english = f"{front}{_ONES[count]} {adjective} {plural}{behind}"
    chinese = f"{before}{_hour(count)}{measure}{quality}{thing}{after}"
    return f"things {adjective} {noun}", english, chinese, english


_KINDS = (_number, _date, _time, _things)


def _pairs(count: int, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """(what is in one file alone, English, Chinese, the Chinese in the usual English form)."""
    rng = random.Random(seed)
    seen = set()
    for i in range(count * 20):
        key, english, chinese, usual = _KINDS[i % len(_KINDS)](rng)
        if english not in seen:
            seen.add(english)
            yield key, english, chinese, usual
        if len(seen) == count:
            return


def records(count: int = 12000, seed: int = 0) -> tuple[list[Record], ...]:
    """(for training, to choose by, held out) of about ``count`` pairs, two records each.

    >>> train, dev, held_out = records(40)
    >>> sorted(train[0]), {r["source"] for r in train} & {r["source"] for r in dev + held_out}
    (['source', 'target'], set())
    """
    sides: tuple[list[Record], ...] = ([], [], [])
    for key, english, chinese, usual in _pairs(count, seed):
        side = sides[side_of(key, PARTS, seed)]
        side.append({"source": english, "target": chinese})
        side.append({"source": chinese, "target": usual})
    return sides
