"""Parsing of numbers in texts as exact fractions; ambiguous texts are rejected."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_LONGEST = 100  # characters of a number; Python refuses integers of some thousand digits

_SPACES = " \u00a0\u2009\u202f"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:['\u2019][0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
# \w has raised and lowered digits too: 10³ is no 10, but 5 CO₂ are 5.
_UNIT = r"(?:(?:[kcm]?m|ft|in)\^?[23]|[^\W\d_¹²³\u2070-\u209c][^\W\d_]*)"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)[$€£¥]?(?P<inner>[-+]?)"
    rf"(?:(?P<mixed>{_DIGITS})&)?(?P<top>{_DECIMAL})(?:/(?P<bottom>{_DECIMAL}))?"
    rf"(?:\s?[%°$€£¥]|\s?°?(?P<unit>{_UNIT}(?:(?:/|\s|\sper\s){_UNIT}){{0,4}}))?"
)

# Words that change the value of the number before them, or announce a second number.
_MULTIPLIERS = frozenset(
    word + plural
    for word in ("hundred", "thousand", "million", "billion", "trillion", "dozen")
    for plural in ("", "s")
)
_NO_UNITS = _MULTIPLIERS | frozenset(
    ["k", "b", "bn", "mn", "e", "x", "i", "pi", "π", "half", "halves", "third", "thirds", "quarter",
     "quarters", "score", "and", "or", "to", "minus", "plus", "times", "point", "th", "st", "nd",
     "rd"]
)  # fmt: skip

_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}(?=\^)"), r" \1"),  # cm^2 is one word
    (re.compile(r"\^\{?\\circ\b\}?"), "°"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), lambda found: f" √{found[1].strip()} "),
    (
        re.compile(r"([-+]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"),
        lambda found: f"{found[1] or ' '}{found[2].strip()}/{found[3].strip()} ",
    ),
    (re.compile(r"\^\{([^{}]*)\}"), lambda found: f"^{found[1].strip()}"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[,;! ]"), ""),
    (re.compile(r"\\(?:boxed|text|mathrm|mathbf)\b|[{}\\]"), " "),
)
_FRACTION_SIGN = re.compile("([-+]?)([¼-¾⅐-⅞])")
_THOUSANDS = re.compile(
    rf"(?<![0-9.,/:'])(?<![0-9][{_SPACES}])([1-9][0-9]{{0,2}})((?:[{_SPACES}][0-9]{{3}})+)(?![0-9])"
)
_MIXED = re.compile(r"(?<![0-9./:,])([0-9]+)[ \u00a0]{1,2}([0-9]+[ ]?/[ ]?[0-9])")
_FORMULA = re.compile(
    r"\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\$\$[^$]+\$\$"
    r"|(?<!\\)\$(?:[^$\\\n]|\\.)+(?<!\s)\$(?![0-9])"  # but not from $5 to $6
    r"|\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]"
)
_GAP = rf"(?:[{_SPACES}\t]|\\[,;! ])"
_SPACED_SIGN = re.compile(rf"([-+]){_GAP}+")
# Ends of the text before a sign that belongs to the number behind it, and that of a number.
_OPENING = re.compile(
    rf"(?:^[\s$\\]*[*_`\"'“‘$\\]*|(?:####|[=(\[{{])(?:{_GAP}|[*_`\"'“‘$\\])*|(?<![^\s(\[{{=:*])\$+)\Z"
)
_OPERAND = re.compile(rf"[0-9¼-¾⅐-⅞]{_GAP}?[%°$€£¥}}\\]*{_GAP}*\Z")
_AMOUNT = re.compile(r"[\\$€£¥]*(?:\.?[0-9]|[dt]?frac\b|[¼-¾⅐-⅞])")
_ITEM = re.compile(rf"\n{_GAP}{{0,20}}[-+]{_GAP}")
_OPERATOR = re.compile(r"(?<=[0-9])[ \t]?([-+*×÷/^])[ \t]?(?=[0-9])")
_OUTSIDE = "()[]*_`\"'“”‘’.,;:!?#~≈|"


def read_number(text: str) -> Fraction | None:
    """Read a text that is one number, and return its exact value; None for any other text.

    Numbers are fractions (3/4), mixed numbers (1 1/2), decimals (.5) and thousands in three styles
    (1,000 and 1 000 and 1'000), with or without a sign. A currency sign, a per cent sign and a unit
    are ignored, so 50 % is 50. None is returned for a text with a second number, a word for a
    multiple (5 million), an exponent, a time of day or an expression.

    A sign may have spaces behind it (`- 3`).
    """
    return _value(_normal(text).strip())


def final_number(text: str) -> str | None:
    """Return the final number of a text: the first after its last `####`, or else the last one.

    A sign with spaces behind it belongs to the number at the beginning of the text, unless a list
    begins there, and behind `####`, `=` and the openings `(`, `[`, `{` and `$`. Behind a number it
    makes an expression, which is no number; in a box or a formula (`$...$`) behind anything. It is
    a dash elsewhere: behind words, colons and closing brackets, and where a line begins.

    The result is normalised (`number_text`), so equal numbers give equal texts: `$1,072.50` gives
    `1072.5`, and `4/6` gives `2/3`. The result is None if the text has no number, or if the word
    with the final number is not just a number, as in `3:30` or `10-3`.
    """
    _, mark, after = text.rpartition("####")
    for part, index in ((after if mark else "", 0), (text, -1)):
        words = _words(part)
        found = [n for n, word in enumerate(words) if _has_number(word)]
        if found:
            place = found[index]
            scaled = words[place + 1 : place + 2] and words[place + 1].lower() in _MULTIPLIERS
            value = None if scaled else _value(words[place])
            return None if value is None else number_text(value)
    return None


def answers_after_mark(text: str) -> bool:
    """Return whether the text has a `####` and a number follows the last `####`."""
    _, mark, after = text.rpartition("####")
    return bool(mark) and final_number(f"####{after}") is not None


def number_text(value: Fraction) -> str:
    """Write a number exactly, as a finite decimal or else as a fraction in lowest terms."""
    places = 0
    rest = value.denominator
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest //= prime
            count += 1
        places = max(places, count)
    if rest != 1:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    whole, part = digits[: len(digits) - places], digits[len(digits) - places :]
    return "-" * (value < 0) + whole + f".{part}" * bool(places)


def _normal(text: str) -> str:
    """Rewrite a text so that numbers have no spaces; a mixed number gets `&` between its parts."""
    text = text.replace("\u2212", "-").strip()
    text = _signed(_FORMULA.sub(lambda found: _signed(found[0], formula=True), text))
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    fraction = lambda found: f"{found[1] or ' '}{unicodedata.normalize('NFKC', found[2])}"  # noqa: E731
    text = _FRACTION_SIGN.sub(fraction, text).replace("\u2044", "/")
    text = _THOUSANDS.sub(lambda found: re.sub(rf"[{_SPACES}]", "", found[0]), text)
    text = _MIXED.sub(r"\1&\2", text)
    text = "∓".join(part.strip() for part in text.split("∓"))
    return _OPERATOR.sub(r"\1", text)


def _signed(text: str, formula: bool = False) -> str:
    """Join signs with the numbers behind them, and write ∓ for those that add or subtract.

    Args:
        text: Text, or a formula with its delimiters.
        formula: Whether the text is a formula, in which no sign is a dash.
    """

    def sign(found: re.Match[str]) -> str:
        start, end = found.span()
        before = text, max(0, start - 20), start
        if not formula and not _AMOUNT.match(text, end):
            return found[0]
        if _OPENING.search(*before):
            return found[0] if start == 0 and _ITEM.search(text) else found[1]
        return "∓" if formula or _OPERAND.search(*before) else found[0]

    return _SPACED_SIGN.sub(sign, text)


def _words(text: str) -> list[str]:
    """Split a text into words without the punctuation around them."""
    words = re.split(r"[\s=<>]+", _normal(text))
    return [_stripped(word) for word in words]


def _has_number(word: str) -> bool:
    """Return whether a word has a digit and is not just a unit such as m^2."""
    return re.search("[0-9]", word) is not None and not re.fullmatch(_UNIT, word)


def _stripped(word: str) -> str:
    word = word.rstrip(f"{_OUTSIDE}$ \t\n")
    begin = word.lstrip(_OUTSIDE)
    before = word[: -len(begin)]
    if before.endswith(".") and not before.endswith(".."):  # one point belongs to a decimal
        return f".{begin}"
    if begin.startswith("$"):  # of a formula such as $\$5$, whose marks go
        begin = re.sub(r"^\$+(?=[-+]?\$)|(?<=^\$) +(?=[-+])", "", begin)
    return begin


def _value(text: str) -> Fraction | None:
    text = _stripped(text)
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None or (found["sign"] and found["inner"]):
        return None
    unit = (found["unit"] or "").lower()
    if _NO_UNITS & set(re.split(r"[\s/]+", unit)) or (found["unit"] or "") in ("M", "K", "B"):
        return None
    top, bottom = (_decimal(found[name] or "1") for name in ("top", "bottom"))
    if bottom == 0 or (found["mixed"] and not found["bottom"]):
        return None
    value = top / bottom + _decimal(found["mixed"] or "0")
    return -value if "-" in found["sign"] + found["inner"] else value


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub("[,'\u2019]", "", text).removesuffix("."))
