"""Parsing of numbers in texts as exact fractions; ambiguous texts are rejected.

A text is read in three steps. `_TOKEN` splits it into tokens, and each token is written as one
letter for its kind, so that `x = - 3 km.` becomes `w = - n w.`. `_SIGNS` then joins signs to their
numbers (`w = -_n w.`), and the sides of an expression: `5 - 3`, or `n - n`, becomes `n×××n`.
`_AMOUNT` is the grammar of a number with its sign, currency and unit, in the same letters.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_LONGEST = 100  # characters of a number; Python refuses integers of some thousand digits

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

_SPACE = r"(?:[ \u00a0\u2009\u202f]|\\[,;! ])"
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]{1,3}(?:['\u2019][0-9]{3})+|[0-9]+)(?![0-9])"
_WHOLE = rf"(?>[1-9][0-9]{{0,2}}(?:{_SPACE}[0-9]{{3}})+(?![0-9])|{_DIGITS})"
_PART = r"\.[0-9]+(?:\\,[0-9]{3})*"
_DECIMAL = rf"(?:{_WHOLE}(?:{_PART})?|(?<!\.){_PART})"
_OVER = rf"{_SPACE}?[/\u2044]{_SPACE}?(?:{_DIGITS}(?:{_PART})?|{_PART})"
_SIGN = rf"[-+\u2212]{_SPACE}*"
_FRACTION = rf"(?:[¼-¾⅐-⅞]|\\[dt]?frac\{{\s*(?:{_SIGN})?{_DECIMAL}\s*\}}\{{\s*{_DECIMAL}\s*\}})"
_BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_POWER = r"\^?(?:[23]|\{[23]\})(?!\w)"
_LETTER = r"[^\W\d_¼-¾⅐-⅞]"  # \w has raised and lowered digits too: 10³ is no 10, 5 CO₂ are 5
_TOKEN = re.compile(
    rf"""
    [^\w\s\\^.~$]  # characters that begin no other token, first for speed
    # w, a word: cm^2 and \text{{cm}}^2 too
  | (?P<w> (?:[kcm]?m|ft|in){_POWER} | \\(?:text|mathrm|mathbf)\{{\s*{_LETTER}+\s*\}}(?=\^){_POWER}
      | (?![¹²³\u2070-\u209c]){_LETTER}+)
    # n, a number without its sign: 2½ or 2\frac{{1}}{{2}}, 1 1/2, .5 or 3/4, ½ or \frac{{1}}{{2}}
  | (?P<n> {_WHOLE}{_SPACE}{{0,2}}(?!\\[dt]?frac\{{\s*{_SIGN}){_FRACTION}
      | {_WHOLE}{_SPACE}{{1,2}}[0-9]+{_OVER} | {_DECIMAL}(?:{_OVER})? | {_FRACTION})
  | \^(?:\\circ|\{{\\circ\}})
    # N if it has digits, else x: x^{{2}}, \sqrt{{3}}, \frac{{x}}{{2}}
  | (?P<compound> (?:[_^] | \\(?:[dt]?frac|binom|sqrt(?:\[[^\[\]]*\])?))(?:{_BRACES})+)
    # a space, or the end of a line
  | (?P<gap> (?:[\s~] | \\(?![a-zA-Z$%{{}}()\[\]])[,;:!\ \\]?)+)
    # as `_KINDS` says; others are x, or an opening if they are commands with an argument
  | \\[a-zA-Z]+\{{? | \$\$ | \\?.
    """,
    re.VERBOSE | re.DOTALL,
)
_KINDS = {
    token: kind
    for kind, tokens in {
        "-": "- + \u2212",
        "*": "*",
        "/": "/",
        "×": r"× ÷ ^ \times \cdot \div",
        "=": r"= ≈ ≠ ≤ ≥ \ge \geq \geqslant \le \leq \leqslant \gt \lt \ne \neq \approx \sim \equiv"
        r" \in \to \rightarrow \Rightarrow \implies",
        "<": "< >",
        "$": "$ $$",
        "€": r"\$ € £ ¥",
        "%": r"% \% ° ^\circ ^{\circ}",
        "{": r"{ \{ \( \[ \boxed \text \mathrm \mathbf",
        "}": r"} \} \) \]",
        "(": "( [",
        ")": ") ]",
        ",": r", ; : \left \right",
        ".": ". ! ? # |",
        "'": "` \" ' _ “ ” ‘ ’",
    }.items()
    for token in tokens.split()
}
_FORMULA = re.compile(
    rf"(\\boxed{_BRACES}|\$\$[^$]+\$\$|\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]"
    # Money is no formula: from $5 to $6, from $5 up to ($ 6), US$5 or 6 US$.
    r"|(?<![\\A-Z0-9])\$(?![0-9.,]+ [a-zA-Z]+ [a-zA-Z]+)(?:[^$\\\n]|\\.)+"
    r"(?<![\s(\[{=+\-*])\$(?![0-9]))"
)
_FORMULA_KINDS = str.maketrans("-\n", "± ")  # a sign in a formula is ±: it is no dash
_SIGNS = re.compile(
    r"""
    (?<=[nN])\ ?[%$€}]*\ ?[-±*×/][\ $€]*+(?=n|[-±][\ $€]*n)  # an operator between numbers
  | (?P<opening> (?:[={(][\ $€]*+(?:['*]+[$€]*)? | [$€<])(?=-[\ $€]*n)
      | [={(<,$][\ '*€]*(?=±) ) [-±]\ ?                       # a sign of a number
  | \ ?±\ ?                                                    # an operator in a formula
    """,
    re.VERBOSE,
)
_AMOUNT = re.compile(
    r"""
    (?:[{}$€][\ \n]?|[().,'*])*+ (?:-_?(?:[$€]+\ ?)?)? (?P<number>n) \.?
    (?:[\ \n{}]*(?:[%$€] | %?w(?:[\ \n{}/]+w){0,4}))? [\ \n{}().,'*$€]*
    """,
    re.VERBOSE,
)


def read_number(text: str) -> Fraction | None:
    """Read a text that is one number, and return its exact value; None for any other text.

    Numbers are fractions (3/4), mixed numbers (1 1/2), decimals (.5) and thousands in three styles
    (1,000 and 1 000 and 1'000), with or without a sign. A currency sign, a per cent sign and a unit
    are ignored, so 50 % is 50. None is returned for a text with a second number, a word for a
    multiple (5 million), an exponent, a time of day or an expression.

    A sign may have spaces behind it: `- 3` is -3, and so is the only item of a list, `- 3 pears`.
    """
    kinds, tokens = _read(text)
    return _value(kinds, tokens, 0, len(kinds))


def final_number(text: str) -> str | None:
    r"""Return the final number of a text: the first after its last `####`, or else the last one.

    A sign with spaces behind it belongs to the number at the beginning of the text, and behind
    `####`, `=`, `\ge` and other relations, and the openings `(`, `[`, `{` and `$`. A text that
    begins with `- ` is a list only if another line does so too: `- 5 pears` is -5, and with a next
    line `- or so` it is 5. Behind a number the sign makes an expression, which is no number; in a
    box or a formula (`$...$`) behind anything. It is a dash elsewhere: behind words, colons and
    closing brackets, and where a line begins.

    The result is normalised (`number_text`), so equal numbers give equal texts: `$1,072.50` gives
    `1072.5`, and `4/6` gives `2/3`. The result is None if the text has no number, or if the word
    with the final number is not just a number, as in `3:30` or `10-3`.
    """
    _, mark, after = text.rpartition("####")
    for part, index in ((after if mark else "", 0), (text, -1)):
        kinds, tokens = _read(part)
        words = re.finditer(r"(?:(?<=[-_])[$€]\ (?=n)|[^ \n={}<])+", kinds)
        spans = [word.span() for word in words if {"n", "N"} & set(word[0])]
        if spans:
            begin, end = spans[index]
            multiplied = tokens[kinds.find("w", end)].lower() in _MULTIPLIERS
            value = None if multiplied else _value(kinds, tokens, begin, end)
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


def _read(text: str) -> tuple[str, list[str]]:
    """Return the kinds of a text's tokens, one letter each, and the tokens; one more at each end.

    The text stands behind an opening, `{`, or behind the end of a line if it is a list.
    """
    kinds, tokens = "{", [""]
    for place, part in enumerate(_FORMULA.split(text.strip())):
        letters = []
        for token in _TOKEN.finditer(part):
            tokens.append(token[0])
            letters.append(_KINDS.get(token[0]) or _kind(token))
        letters = "".join(letters)
        kinds += letters.translate(_FORMULA_KINDS) if place % 2 else letters
    if kinds.startswith("{- ") and "\n- " in kinds:
        kinds = f"\n{kinds[1:]}"
    return f"{_SIGNS.sub(_joined, kinds)}\n", [*tokens, ""]


def _kind(token: re.Match[str]) -> str:
    match token.lastgroup:
        case "gap":
            return "\n" if "\n" in token[0] else " "
        case "compound":
            return "N" if re.search("[0-9]", token[0]) else "x"
        case None:
            return "{" if token[0].endswith("{") else "x"
        case letter:
            return letter


def _joined(found: re.Match[str]) -> str:
    opening, length = found["opening"], len(found[0])
    return "×" * length if opening is None else f"{opening}-".ljust(length, "_")


def _value(kinds: str, tokens: list[str], begin: int, end: int) -> Fraction | None:
    """Return the value of tokens that are one number with its sign and unit; None for others."""
    found = _AMOUNT.fullmatch(kinds, begin, end)
    if found is None or len(number := tokens[found.start("number")]) > _LONGEST:
        return None
    units = tokens[found.end("number") : end]
    if _NO_UNITS & {unit.lower() for unit in units} or {"M", "K", "B"} & set(units):
        return None
    number = re.sub("[¼-¾⅐-⅞]", lambda sign: f" {unicodedata.normalize('NFKC', sign[0])}", number)
    parts = [re.sub("[^0-9.]", "", part) for part in re.findall(_DECIMAL, number)]
    *whole, top, bottom = map(Fraction, parts if len(parts) > 1 else [*parts, "1"])
    minus = re.findall("[-\u2212]", "".join(tokens[begin : found.end("number")]))
    return (-1) ** len(minus) * (sum(whole) + top / bottom) if bottom else None
