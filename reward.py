#!/usr/bin/env python3
"""Problems and their verification: the reward of reinforcement learning with verifiable rewards.

One pipeline of small functions, read from top to bottom:

    find the answer (extract_answer) -> normalise -> tokens -> parse -> compare (same) -> classes -> pool (Verifier)

What a model writes is data. It is never evaluated: a recursive-descent parser turns LaTeX or plain maths into *inert*
sympy trees (only rational arithmetic is carried out, under a bound on digits), and two trees are compared by their
values at fixed points at high precision. All work is bounded by counting it (characters, depth, digits, nodes), never
by a clock or a signal, so `score` gives the same verdict in any thread, on any machine, under any load. The pool of
killable workers is the second line of defence.

    score(r"... so the area is $\\boxed{\\frac{10}{4}}$.", "2.5")       -> 1.0
    is_equivalent("x^2+2x+1", "(x+1)^2")                              -> True
    answer_classes(["1/2", "0.5", None, "2"])                         -> [0, 0, -1, 1]
    python reward.py --audit samples.jsonl                            what was found by which rule, slowest cases

Only sympy is needed (its libmp does the arithmetic of the numeric test); neither torch nor transformers is imported.
"""

import argparse
import json
import math
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import sympy
from mpmath import libmp
from sympy import Add, Integer, Mul, Pow, Rational, Symbol

# ---------------------------------------------------------------------------------------------------------------------
# Limits. They count work; nothing here is a time. Beyond them an answer is text, equal only to the same text.
# ---------------------------------------------------------------------------------------------------------------------
MAX_RESPONSE = 100_000  # characters of a response that are read, from its end
MAX_ANSWER = 2_000  # characters of an answer (the longest of MATH has about 300)
MAX_TOKENS = 600
MAX_DEPTH = 160  # nested levels of the grammar; a pair of brackets takes four
MAX_BITS = 40_000  # size of a number that is computed exactly (2004! has 19,000 bits)
MAX_SUM = 1_000  # terms of a \sum or \prod
MAX_MAGNITUDE = 1 << 17  # bits before the point in numeric evaluation
MAX_EVALUATION = 40_000  # nodes x precision (squared for transcendental ones) of one evaluation, below 0.1 s


class Unparsed(ValueError):
    """The answer is not in our grammar, or beyond the limits: it stays text."""


# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------
class Problem(NamedTuple):
    row: int  # 0-based line of the file
    problem: str
    answer: str
    solution: str | None
    require_value: bool


def load_problems(path, dropped: Counter | None = None) -> list[Problem]:
    """Read a JSONL file of {"problem", "answer", optional "solution" and "require_value"}.

    Malformed lines are refused with file and line; empty answers and answers over the checker's limits are dropped
    and counted by reason in `dropped` (a reward could never be earned on them).
    """
    problems, dropped = [], Counter() if dropped is None else dropped
    with open(path, encoding="utf-8") as file:
        for row, line in enumerate(file):
            where = f"{path}:{row + 1}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error}); write one object a line") from None
            if not isinstance(fields, dict):
                raise ValueError(f'{where}: not an object; write {{"problem": …, "answer": …}}')
            for name in ("problem", "answer"):
                if name not in fields:
                    raise ValueError(f'{where}: the field "{name}" is missing; add it')
            answer = fields["answer"]
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                answer = repr(answer)
            solution = fields.get("solution")
            for name, value in (("problem", fields["problem"]), ("answer", answer), ("solution", solution or "")):
                if not isinstance(value, str):
                    raise ValueError(f'{where}: the field "{name}" is {type(value).__name__}, not text; quote it')
            require_value = fields.get("require_value", False)
            if not isinstance(require_value, bool):
                raise ValueError(f'{where}: the field "require_value" must be true or false')
            reference = reference_answer(answer)
            if not reference:
                dropped["empty answer"] += 1
            elif len(reference) > MAX_ANSWER:
                dropped["answer over the checker's limits"] += 1
            else:
                problems.append(Problem(row, fields["problem"], answer, solution, require_value))
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Extraction: where in a response the answer stands
# ---------------------------------------------------------------------------------------------------------------------
BOX_TOKENS = re.compile(
    r"(?P<box>\\(?:begin)?boxed|\\f(?:rame)?box)\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]", re.S
)
MATH_TOKENS = re.compile(r"\\\$|\$\$?|\\[()\[\]]|\n\s*\n")
# What may stand between two boxes or formulas that are one answer: spaces, a comma, "and", "or", a short \text.
JOIN = re.compile(r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad|\\(?:text|mbox)\{[^{}]{0,40}\}|\band\b|\bor\b)*")
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
LAST_NUMBER = re.compile(rf"(?<![A-Za-z\d.,_^)])-?(?<![A-Za-z\d._]){NUMBER.removeprefix('-?')}(?:/\d+)?(?:\s?\\?%)?|(?<!\d)\.\d+")
WORD = r"(?:answer|réponse|respuesta|resposta|risposta|antwort|ответ|答案|答え|答)"
LABEL = re.compile(rf"{WORD}\s?(?:\*\*|\}})?\s?[:：=]\s?(?:\*\*|\}})?", re.I)
FINAL = re.compile(r"final (?:answer|result) (?:is|are|=)\s?:?", re.I)
PHRASE = re.compile(rf"{WORD}[^\n.:：$]{{0,40}}?(?:\bis\b|\bare\b|\best\b|\bes\b|\bist\b|\bè\b|\bé\b|是|为|為|は)\s?:?", re.I)
LETTER = re.compile(r"(?:\bit'?s|\bis|\bbe|\best|\bchoose|\boption|\bchoice|\bpick|\bselect)\s?:?\s?[(*]{0,3}([A-J])(?![A-Za-z0-9'])")
FIRST_LETTER = re.compile(r"\W{0,3}([A-J])(?=[.,:;)*]|\s*$|[^\x00-\x7f])")
PROSE = re.compile(r"[A-Za-zÀ-ÿ]{2}[^\W\d]{0,20}[:,]?\s+(?:[^\W\d]{1,20}\s|[\\$(\d])|[^\W\d_a-zA-ZÀ-ÿα-ωΑ-Ω]{2}")
PARTS_OF_MATH = re.compile(r"\\(?:text|begin)")
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>")


def after_thinking(text: str) -> str | None:
    """The reply after the last </think>; an unclosed <think> is no reply.

    >>> after_thinking("<think>maybe 3</think> 4"), after_thinking("<think>maybe 3")
    (' 4', None)
    """
    closed, opened = text.rfind("</think>"), text.rfind("<think>")
    if opened > closed:
        return None
    return text[closed + len("</think>") :] if closed >= 0 else text


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every complete outermost \boxed{…}, \boxed 7 or \fbox{…}, in one pass.

    >>> [content for *_, content in find_boxes(r"\boxed{\frac{1}{2}} and \boxed 3 and \boxed{4")]
    ['\\frac{1}{2}', '3']
    """
    boxes, stack = [], []
    for token in BOX_TOKENS.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"]))
        elif token["open"]:
            stack.append((token.start(), token.end()))
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            while boxes and boxes[-1][0] > opened[0]:  # boxes inside this one
                boxes.pop()
            boxes.append((opened[0], token.end(), text[opened[1] : token.start()]))
    return [box for box in boxes if box[2].strip()]


def find_formulas(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every $…$, $$…$$, \(…\) and \[…\]; a lone dollar is money.

    >>> [content for *_, content in find_formulas(r"$5 and then $x=2$, so \(y\) costs \$3")]
    ['x=2', 'y']
    """
    formulas, opened = [], None
    closing = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
    for token in MATH_TOKENS.finditer(text):
        mark, start, end = token[0], token.start(), token.end()
        dollar = mark == "$"
        if opened and mark == closing[opened[0]] and not (dollar and text[start - 1 : start].isspace() and opened[2]):
            if text[opened[1] : start].strip():
                formulas.append((opened[1] - len(opened[0]), end, text[opened[1] : start]))
            opened = None
        elif mark in closing and (opened is None or dollar):
            opened = (mark, end, not text[end : end + 1].isspace())
        elif mark[0] == "\n":
            opened = None
    return formulas


def last_run(found: list[tuple[int, int, str]], text: str) -> str | None:
    r"""The last of the found pieces, together with those that a mere "and" or comma joins to it.

    >>> text = r"\boxed{1}. So \boxed{2} and \boxed{3}"; last_run(find_boxes(text), text)
    '2, 3'
    """
    if not found:
        return None
    run = [found[-1]]
    for piece in reversed(found[:-1]):
        gap = text[piece[1] : run[0][0]]
        if len(gap) > 80 or "\n\n" in gap or not JOIN.fullmatch(gap):
            break
        run.insert(0, piece)
        if len(run) > MAX_TOKENS:
            break
    return ", ".join(dict.fromkeys(content.strip() for *_, content in run))


def from_clause(clause: str) -> str | None:
    """The answer in the words that follow "Answer:" or "the answer is".

    >>> from_clause(" **12 apples**. I hope it is correct"), from_clause(" for sure D, it can't be A")
    ('12 apples', 'D')
    >>> from_clause(" Jane started 3 hours ago."), from_clause(" $x$ times $3$")
    ('3', '3')
    """
    lines = [line for line in clause.lstrip(" *:").split("\n", 3)[:3] if line.strip(" *\r")]
    if not lines:
        return None
    line = lines[0].strip()
    sentence = re.split(r"[.!?](?:\s|$)|[。！]", line, maxsplit=1)[0].strip(" *\"'`")
    bold = re.match(r"\*\*([^*]+)\*\*", line) or re.search(r"\*\*([^*]+)\*\*", line)
    formulas = find_formulas(line)
    for candidate in (sentence, last_run(formulas, line), bold and bold[1].rstrip(".")):
        if candidate and parse(candidate).value is not None and not isinstance(parse(candidate).value, Word):
            return candidate
    if letter := re.search(r"(?:^|(?<=\s)|(?<=\())([A-J])(?=$|[\s,.):])(?! [a-z])", sentence):
        return letter[1]
    numbers = [match for match in LAST_NUMBER.finditer(sentence)]
    if numbers:
        return (numbers[0] if numbers[0].start() == 0 else numbers[-1])[0]
    return sentence if 0 < len(sentence.split()) <= 5 else None


def last_after(pattern: re.Pattern, text: str) -> str | None:
    """What follows the last match, read as a clause."""
    last = None
    for last in pattern.finditer(text):
        pass
    return from_clause(text[last.end() : last.end() + MAX_ANSWER]) if last else None


def from_box(text: str) -> str | None:
    return last_run(find_boxes(text), text)


def from_tag(text: str) -> str | None:
    lower = text.lower()
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end].strip() or None if start >= 0 else None


def from_hashes(text: str) -> str | None:
    start = text.rfind("####")
    line = text[start + 4 :].strip(" :\r\n").split("\n", 1)[0].strip() if start >= 0 else ""
    return line or None


def from_bold(text: str) -> str | None:
    bold = [part.strip(" .") for part in text.split("**")[1::2]]
    return bold[-1] if bold and parse(bold[-1]).value is not None else None


def from_letter(text: str) -> str | None:
    """
    >>> from_letter("It's not A, therefore I think it's B"), from_letter("B不是 A"), from_letter("it is A 5")
    ('B', 'B', None)
    """
    last = None
    for last in LETTER.finditer(text):
        pass
    last = last or FIRST_LETTER.match(text)
    return last[1] if last and not re.search(r"[\d$]", text[last.end() :]) else None


def from_formula(text: str) -> str | None:
    """The last formula, if it can be read as an answer and no number follows one that is a mere symbol."""
    formulas = find_formulas(text)
    run = last_run(formulas, text)
    if not run or parse(run).value is None:
        return None
    return run if re.search(r"\d", run) or not LAST_NUMBER.search(text, formulas[-1][1]) else None


def from_number(text: str) -> str | None:
    last = None
    for last in LAST_NUMBER.finditer(text):
        pass
    return last[0] if last else None


# The order of trust: the first rule that finds something decides.
RULES = (
    ("box", from_box, r"the last complete \boxed{…}: what prompts ask for"),
    ("tag", from_tag, "<answer>…</answer>: the other format that prompts ask for"),
    ("label", lambda text: last_after(LABEL, text), "Answer: … stands for nothing else"),
    ("final", lambda text: last_after(FINAL, text), "the final answer is …: said once, at the end"),
    ("hashes", from_hashes, "#### …: GSM8K's own format"),
    ("phrase", lambda text: last_after(PHRASE, text), "the answer is …: may also be said of a part"),
    ("bold", from_bold, "the last **…** that can be read as an answer"),
    ("letter", from_letter, "it's (B): a choice in prose, only if no number follows"),
    ("formula", from_formula, "the last $…$: usually the result; about two points better than the last number"),
    ("number", from_number, "the last number: a guess, but a model that ends on it means it"),
)


def find_answer(text: str) -> tuple[str | None, str]:
    """(answer, name of the rule that found it)."""
    text = text if isinstance(text, str) else ""
    reply = after_thinking(text)
    if reply is not None:
        reply = SPECIAL.sub("\n", reply[-MAX_RESPONSE:])
        for name, rule, _ in RULES:
            if answer := rule(reply):
                if name == "box" and looks_like_prose(answer):  # a sentence in a box: what it says
                    inner = (rule(answer) for _, rule, _ in RULES[2:-1])
                    return next(filter(None, inner), answer), name
                return answer, name
    return None, "none"


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None. Never the whole response.

    >>> extract_answer(r"so $x = \boxed{\frac{1}{2}}$."), extract_answer("Answer: 41 was wrong.\nAnswer: 42")
    ('\\frac{1}{2}', '42')
    >>> extract_answer("so $x$ is 7, and 7 + 7 = 14"), extract_answer("I do not know.")
    ('14', None)
    """
    return find_answer(text)[0]


def looks_like_prose(answer: str) -> bool:
    """
    >>> looks_like_prose("The answer is (9+1)"), looks_like_prose("x+1"), looks_like_prose("B不是 A")
    (True, False, True)
    """
    return parse(answer).value is None and bool(PROSE.search(answer)) and not PARTS_OF_MATH.search(answer)


def reference_answer(text: str) -> str:
    r"""A reference may be bare, in dollars, boxed, a GSM8K solution (####) or a whole solution that ends in a box.

    >>> reference_answer(r"we get $\boxed{5}$."), reference_answer("6*7\n#### 42"), reference_answer(" $x$ ")
    ('5', '42', '$x$')
    """
    return from_box(text) or from_hashes(text) or last_after(FINAL, text) or text.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Normalise, then tokens
# ---------------------------------------------------------------------------------------------------------------------
SUPERSCRIPTS = str.maketrans({c: f"^{{{d}}}" for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")})
UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "∕": "/",
    "⁄": "/", "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "≈": "=", "≃": "=", "∞": " inf ", "π": " pi ",
    "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "∅": r"\emptyset ", "º": "°", "′": "'", "’": "'",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∖": r"\setminus ", "⟨": "(", "⟩": ")",
    "，": ",", "。": ".", "、": ",", "；": ";", "：": ":", "（": "(", "）": ")", "\u200b": "", "\ufeff": "",
    "€": " dollar ", "£": " dollar ", "¥": " dollar ", "₹": " dollar ", "∠": r"\angle ", "△": r"\triangle ",
})  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
).split()
GREEK_LETTERS = {unicodedata.lookup(f"GREEK {size} LETTER {name.replace('lambda', 'lamda')}"): title(name)
                 for name in GREEK for size, title in (("SMALL", str), ("CAPITAL", str.title))}  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)")
SPACED_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?:(?:\\[,;:! ]\s?|\{,\}|,\\!|[ \u00a0\u202f])\d{3})+)(?!\d)")
EUROPEAN = re.compile(r"(-?\d{1,3}(?:\.\d{3}){2,})|(-?\d{1,3}(?:\.\d{3})+,\d+)")
DOUBLED = re.compile(r"\\\\(?=(?:[dt]?frac|sqrt|left|right|l?n?eq?|geq?|text|mathrm|pi|cdot|times|in|cup|pm|infty|boxed|circ)(?![a-z]))")
ENCLOSED = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def normalise(text: str, thousands: bool = True) -> str:
    r"""Undo what does not change the mathematics: Unicode signs, thousands separators, dollars, a final period.

    >>> normalise("$1,234.50$."), normalise(r"12\,345"), normalise("(1,234)"), normalise("3½ ≤ x²")
    ('1234.50', '12345', '(1,234)', '3 1/2 <= x^{2}')
    """
    text = text.translate(SUPERSCRIPTS).translate(UNICODE)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if "\\begin" not in text:
        text = DOUBLED.sub("\\\\", text)
    text = text.replace(r"\$", " dollar ").replace("$", " ")
    for opening, closing in ENCLOSED[2:]:
        text = text.replace(opening, " ").replace(closing, " ")
    text = re.sub(r"\\mathbb\s*\{?\s*R\s*\}?", "ℝ", text)
    text = text.strip().rstrip("\\.,; \n\t") if not text.rstrip().endswith((r"\right.", r"\left.")) else text.strip()
    text = SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[1]), text)
    if thousands and not re.search(r"[(\[]|\\\{|\\lbrace", text):  # inside brackets a comma separates
        text = THOUSANDS.sub(lambda match: match[1].replace(",", ""), text)
    if match := EUROPEAN.fullmatch(text):
        text = match[0].replace(".", "").replace(",", ".")
    return text


class Token(NamedTuple):
    kind: str  # number, name (one symbol, function or constant), text (a word), command (of LaTeX), op, end
    text: str
    spaced: bool = False  # white space before it


TOKEN = re.compile(
    r"(?P<space>\s+|~)|(?P<repeat>\d*\.\d*\\(?:overline|dot)\{\d+\})"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
    r"|(?P<environment>\\(?:begin|end)\{[a-z]+\*?\}(?:\{[lcr| ]*\})?)|(?P<command>\\[A-Za-z]+|\\.)"
    r"|(?P<word>[A-Za-z]+)|(?P<op>\*\*|<=|>=|!=|==|=<|=>|[-+*/^_=<>!%|(){}\[\],;:&'°ℝ])|(?P<greek>[Α-ω])",
    re.S,
)
COMMANDS = {  # LaTeX's spelling -> ours; "" is dropped
    **dict.fromkeys(
        r"left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits nolimits quad qquad "
        r"mathbf boldsymbol bm vec mathit rm bf it , ; : ! space thinspace tfrac@".replace("tfrac@", "").split(), ""),
    " ": "", "\n": "", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "cdot": "*", "times": "*", "ast": "*",
    "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<",
    "gt": ">", "ne": "!=", "neq": "!=", "approx": "=", "simeq": "=", "equiv": "=", "in": "in", "cup": "cup",
    "setminus": "setminus", "backslash": "setminus", "{": "set{", "}": "set}", "lbrace": "set{", "rbrace": "set}",
    "langle": "(", "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "lparen": "(", "rparen": ")",
    "lbrack": "[", "rbrack": "]", "%": "%", "degree": "°", "dbinom": "binom", "tbinom": "binom", "land": ",", "lor": ",",
    "varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta", "infty": "inf", "infin": "inf", "varnothing": "emptyset",
    "lg": "lg", "colon": ":", "prime": "'", "|": "|", "&": "&", "\\": "row", "euro": "dollar", "pounds": "dollar",
}  # fmt: skip
OPERATORS = set("+-*/^_=<>!%|(){}[],;:&'°") | {"**", "<=", ">=", "!=", "in", "cup", "setminus", "set{", "set}", "row"}
TEXT_COMMANDS = {"text", "mbox", "textbf", "textit", "textrm", "mathrm", "hbox", "textnormal", "mathsf", "texttt"}
UNITS = {  # alias -> canonical
    alias: names.split()[0]
    for names in (
        "cm centimeter centimetre;mm millimeter millimetre;km kilometer kilometre;m meter metre;ft foot feet;in inch "
        "inche;yd yard;mi mile;kg kilogram;g gram;mg milligram;lb pound;oz ounce;s sec second;min minute;h hr hour;day;"
        "week;month;year yr;l liter litre;ml milliliter;dollar usd buck;cent;degree deg;radian rad;unit;mph;percent pct "
        "percentage;sq square;cubic;gallon;mol"
    ).split(";")
    for alias in names.split()
}
FUNCTIONS = {
    **{name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh asin acos atan log".split()},
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log, "lg": sympy.log, "exp": None,
    "sqrt": None, "cbrt": None, "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling, "ceiling": sympy.ceiling,
    "max": None, "min": None, "gcd": None, "lcm": None,
}  # fmt: skip
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo, "infinity": sympy.oo, "oo": sympy.oo}
CONJUNCTIONS = {"and", "or"}
KNOWN = FUNCTIONS.keys() | CONSTANTS.keys() | set(GREEK) | {name.title() for name in GREEK} | CONJUNCTIONS
LITERAL = {"frac", "binom", "sum", "prod", "lfloor", "rfloor", "lceil", "rceil", "pm", "mp", "circ", "choose", "emptyset"}


def tokenise(text: str) -> list[Token]:
    r"""Tokens of a normalised answer, spelled in one way for LaTeX and plain maths.

    >>> [token.text for token in tokenise(r"\dfrac{1}{2}\cdot xy \text{ cm}")]
    ['frac', '{', '1', '}', '{', '2', '}', '*', 'x', 'y', 'cm']
    """
    tokens: list[Token] = []
    position, spaced, text_braces = 0, False, []  # text_braces: for each open brace, whether it belongs to a \text

    def emit(kind, value):
        tokens.append(Token(kind, value, spaced))

    while position < len(text):
        match = TOKEN.match(text, position)
        if not match or len(tokens) > MAX_TOKENS:
            raise Unparsed("a character that is not mathematics" if not match else "too long")
        position, kind, value = match.end(), match.lastgroup, match[0]
        textual = any(text_braces)
        if kind == "space":
            spaced = True
            continue
        if kind in ("repeat", "number"):
            emit("number", value)
        elif kind == "environment":
            emit("op", re.sub(r"\\(begin|end)\{([a-z]+).*", r"\1 \2", value))
        elif kind == "greek":
            emit("name", GREEK_LETTERS[value] if value in GREEK_LETTERS else value)
        elif kind == "op" and value in "{}":
            if value == "{" and tokens and tokens[-1].text in TEXT_COMMANDS and tokens[-1].kind == "command":
                tokens.pop()
                text_braces.append(True)
            elif value == "{":
                text_braces.append(False)
                emit("op", value)
            elif not (text_braces and text_braces.pop()):
                emit("op", value)
        elif kind == "op":
            emit("op", {"**": "^", "==": "=", "=<": "<=", "=>": ">="}.get(value, value))
        elif kind == "command":
            name = value[1:]
            if name.startswith(("quad", "qquad")) and name not in COMMANDS:  # "\quadx" in real answers
                position -= len(name.removeprefix("q").removeprefix("quad").removeprefix("uad"))
                name = "quad"
            name = COMMANDS.get(name, name)
            if name in OPERATORS:
                emit("op", name)
            elif name in KNOWN or name in UNITS:
                emit("name" if name in KNOWN else "text", name)
            elif name == "operatorname" or name == "mathbb":
                continue
            elif name:
                emit("command", name)
            elif value in (r"\left", r"\right") and text.startswith(".", position):
                position += 1
        else:
            split_word(value, textual, emit, tokens)
        spaced = False
    return tokens


def split_word(word: str, textual: bool, emit, tokens: list[Token]) -> None:
    """A run of letters is a known name, a unit after a number, a product of up to three letters, or a word."""
    after_number = bool(tokens) and (tokens[-1].kind == "number" or tokens[-1].text in (")", "}", "^", "/"))
    if word in KNOWN and not textual or word.lower() in CONJUNCTIONS:
        emit("name", word.lower() if word.lower() in CONJUNCTIONS else word)
    elif textual and (len(word) > 1 or after_number):
        emit("text", word)
    elif after_number and len(word) > 1 and unit_name(word) or word == "dollar":
        emit("text", word)
    elif word == "in":
        emit("op", "in")
    elif word == "U" and tokens and tokens[-1].text in (")", "]", "}"):
        emit("op", "cup")
    elif len(word) == 1:
        emit("name", word)
    else:
        for cut in range(len(word) - 1, 1, -1):  # sinx, lnx, 2piR …
            if word[:cut] in KNOWN and len(word) - cut <= 2:
                emit("name", word[:cut])
                split_word(word[cut:], textual, emit, tokens)
                return
        if len(word) <= 3:
            for letter in word:
                emit("name", letter)
        else:
            emit("text", word)


def unit_name(word: str) -> str | None:
    """
    >>> unit_name("Inches"), unit_name("cm"), unit_name("apples")
    ('in', 'cm', None)
    """
    lower = word.lower()
    return UNITS.get(lower) or UNITS.get(lower.removesuffix("s")) or UNITS.get(lower.removesuffix("es"))


# ---------------------------------------------------------------------------------------------------------------------
# Values, and the arithmetic that builds them
# ---------------------------------------------------------------------------------------------------------------------
class Leaf(NamedTuple):
    """One value: an inert sympy tree and how it was written."""

    expr: sympy.Expr
    approximate: bool = False  # holds a decimal that is not an integer
    unit: str = ""  # canonical name of a known unit, "%" for a percentage
    plain: bool = True  # no + − × ÷ left to do between numbers, but one fraction (see require_value)


class Word(NamedTuple):
    text: str


class Seq(NamedTuple):
    """Several values. kind: "()" "[]" "(]" "[)" by its brackets, "set", "list" (bare), "union", "matrix" (of rows)."""

    kind: str
    items: tuple


class Relation(NamedTuple):
    sides: tuple  # of values; None where the left side is a mere name in words ("Area = 5")
    ops: tuple  # "=", "<", "<=", ">", ">=", "!=", "in", ":"
    names: tuple  # for each side, its spelling if it only names something (x, f(x), Area), else ""


def number(text: str) -> Rational:
    r"""
    >>> number("1.50"), number(".5e3"), number("0.1\\overline{6}")
    (3/2, 500, 1/6)
    """
    if "\\" in text:
        head, period = text[:-1].split("\\", 1)
        period = period.split("{")[1]
        scale = 10 ** len(head.partition(".")[2])
        return Rational(int(head.replace(".", "") or 0), scale) + Rational(int(period), (10 ** len(period) - 1) * scale)
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(exponent) > 5 or abs(shift := int(exponent or 0) - len(decimals)) > MAX_BITS // 4:
        raise Unparsed("exponent too large")
    digits = int(whole + decimals)
    return Integer(digits * 10**shift) if shift >= 0 else Rational(digits, 10**-shift)


def bits(value: Rational) -> int:
    return value.p.bit_length() + value.q.bit_length()


def bounded(value: Rational) -> Rational:
    if bits(value) > MAX_BITS:
        raise Unparsed("number too large")
    return value


def add(*terms):
    """The sum; rationals are folded, everything else stays inert."""
    rational, rest = Integer(0), []
    for term in terms:
        if term.is_Rational:
            rational = bounded(rational + term)
        else:
            rest.append(term)
    if not rest:
        return rational
    if rational != 0:
        rest.append(rational)
    return Add(*rest, evaluate=False) if len(rest) > 1 else rest[0]


def multiply(*factors):
    rational, rest = Integer(1), []
    for factor in factors:
        if factor.is_Rational:
            rational = bounded(rational * factor)
        else:
            rest.append(factor)
    if not rest or rational == 0:
        return rational
    if rational == -1 and rest == [sympy.oo]:
        return -sympy.oo
    if rational != 1:
        rest.insert(0, rational)
    return Mul(*rest, evaluate=False) if len(rest) > 1 else rest[0]


def power(base, exponent):
    """base^exponent; rational powers of rationals are folded where they are exact and small.

    >>> power(Integer(2), Integer(-3)), power(Rational(4, 9), Rational(3, 2)), power(Integer(2), Rational(1, 2))
    (1/8, 8/27, sqrt(2))
    """
    if not (base.is_Rational and exponent.is_Rational):
        return Pow(base, exponent, evaluate=False)
    if base == 0 and exponent <= 0:
        raise Unparsed("0 to a power that is not positive")
    if bits(base) * abs(exponent) > MAX_BITS and abs(base) != 1 and base != 0:
        raise Unparsed("power too large")
    if exponent.q == 1:
        return base**exponent
    if base >= 0 and exponent.q <= 100:
        (top, exact), (bottom, also) = (sympy.integer_nthroot(part, exponent.q) for part in (base.p, base.q))
        if exact and also:
            return Rational(top, bottom) ** exponent.p
    return Pow(base, exponent, evaluate=False)


def divide(numerator, denominator):
    if denominator == 0:
        raise Unparsed("division by zero")
    return multiply(numerator, power(denominator, Integer(-1)))


def root(value, index):
    """The real root of a negative number where the index is odd."""
    if value.is_Rational and value < 0 and index.is_Integer and index.p % 2:
        return multiply(Integer(-1), power(-value, divide(Integer(1), index)))
    return power(value, divide(Integer(1), index))


def factorial(value):
    if value.is_Integer and 0 <= value <= 3_000:
        return Integer(math.factorial(int(value)))
    if value.is_Rational:
        raise Unparsed("factorial out of range")
    return sympy.factorial(value, evaluate=False)


def binomial(n, k):
    if n.is_Integer and k.is_Integer and 0 <= k <= n and min(k, n - k) * bits(n) <= MAX_BITS:
        return bounded(Integer(math.comb(int(n), int(k))))
    if n.is_Rational and k.is_Rational:
        raise Unparsed("binomial out of range")
    return sympy.binomial(n, k, evaluate=False)


def apply(name: str, arguments: list, exponent=None, base=None):
    """A named function of its arguments; exponent is that of sin^2 x, base that of log_2 x."""
    if exponent == -1 and f"arc{name}" in FUNCTIONS:
        name, exponent = f"arc{name}", None
    value, make = arguments[0], FUNCTIONS[name]
    if name in ("max", "min", "gcd", "lcm"):
        if not all(argument.is_Rational if name[0] == "m" else argument.is_Integer for argument in arguments):
            raise Unparsed(f"{name} of symbols")
        fold = {"max": max, "min": min, "gcd": math.gcd, "lcm": math.lcm}[name]
        result = sympy.sympify(fold(arguments) if name[0] == "m" else fold(*map(int, arguments)))
    elif len(arguments) == 2 and name == "log":
        result = divide(sympy.log(value, evaluate=False), sympy.log(arguments[1], evaluate=False))
    elif len(arguments) != 1:
        raise Unparsed(f"{name} of several values")
    elif name in ("sqrt", "cbrt"):
        result = root(value, Integer(2 if name == "sqrt" else 3))
    elif name == "exp":
        result = power(sympy.E, value)
    elif value.is_Rational and make in (sympy.Abs, sympy.floor, sympy.ceiling):
        result = make(value)
    else:
        result = make(value, evaluate=False)
    if name == "lg":
        base = Integer(10)
    if base is not None:
        result = divide(result, sympy.log(base, evaluate=False))
    return result if exponent is None else power(result, exponent)


# ---------------------------------------------------------------------------------------------------------------------
# The parser: recursive descent, one method per level
#   items -> item -> relation -> side -> union -> leaf -> sum -> term -> factor -> atom
# ---------------------------------------------------------------------------------------------------------------------
RELATIONS = {"=", "<", "<=", ">", ">=", "!=", "in", ":"}
MAX_STEPS = 20_000


class Parser:
    def __init__(self, tokens: list[Token]):
        self.tokens = [*tokens, Token("end", "")]
        self.at = 0
        self.depth = self.steps = 0
        self.sign, self.saw_sign = 1, False  # which of the two values of ± is being read
        self.approximate = False
        self.operations = self.divisions = 0
        self.unit = ""
        self.bars = self.in_function = 0
        self.bound: dict[str, Integer] = {}  # summation variables

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def next(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, *texts: str) -> bool:
        if self.peek().text in texts and self.peek().kind != "end":
            self.at += 1
            return True
        return False

    def expect(self, *texts: str) -> None:
        if not self.accept(*texts):
            raise Unparsed(f"{texts[0]} expected")

    def enter(self) -> None:
        self.depth += 1
        self.steps += 1
        if self.depth > MAX_DEPTH or self.steps > MAX_STEPS:
            raise Unparsed("too deep" if self.depth > MAX_DEPTH else "too long")

    def answer(self):
        items = self.items()
        if self.peek().kind != "end":
            raise Unparsed(f"unexpected {self.peek().text}")
        return items[0] if len(items) == 1 else Seq("list", tuple(items))

    def items(self) -> list:
        """Values separated by commas, semicolons, "and" or "or"; ± gives two."""
        values = []
        while True:
            start, saved = self.at, (self.sign, self.saw_sign)
            self.sign, self.saw_sign = 1, False
            values.append(self.relation())
            if self.saw_sign:
                self.at, self.sign = start, -1
                values.append(self.relation())
            self.sign, self.saw_sign = saved
            if not self.accept(",", ";", "and", "or"):
                return values
            while self.accept("and", "or", ","):
                pass

    def relation(self):
        self.enter()
        sides, names, ops = [], [], []
        while True:
            name, length, words = self.name_ahead()
            if words:
                self.at += length
            sides.append(None if words else self.union())
            names.append(name)
            if self.peek().kind != "op" or self.peek().text not in RELATIONS:
                break
            ops.append(self.next().text)
        self.depth -= 1
        return Relation(tuple(sides), tuple(ops), tuple(names)) if ops else sides[0]

    def name_ahead(self) -> tuple[str, int, bool]:
        """(spelling, length, in words) if the coming side only names something: x, x_1, f(x), (p,q), Area, angle ABC."""
        depth, end = 0, self.at
        while True:
            token = self.tokens[end]
            depth += (token.text in OPENING) - (token.text in CLOSING) if token.kind == "op" else 0
            if token.kind == "end" or depth < 0 or depth == 0 and token.text in SEPARATORS:
                break
            end += 1
        side = self.tokens[self.at : end]
        spelling = "".join(token.text for token in side if token.text not in "{}")
        if not side or len(side) > 40 or any(token.text in CONSTANTS or token.text in FUNCTIONS for token in side):
            return "", 0, False
        words = any(token.kind == "text" or token.kind == "command" and token.text not in LITERAL for token in side)
        if words and token.text == "=" and all(token.kind != "number" for token in side):
            return spelling, end - self.at, True
        if side[0].kind in ("name", "op") and NAME.fullmatch(spelling):
            return spelling, end - self.at, False
        return "", 0, False

    def union(self):
        value = self.leaf()
        pieces = [value]
        while self.accept("cup"):
            pieces.append(self.leaf())
        if len(pieces) > 1:
            flat = [item for piece in pieces for item in (piece.items if is_kind(piece, "union") else (piece,))]
            return Seq("union", tuple(flat))
        if self.accept("setminus"):
            return without_points(value, self.leaf())
        return value

    def leaf(self):
        """A sum with its unit or percent sign, or a bracketed value, or words."""
        outer = (self.approximate, self.operations, self.divisions, self.unit)
        self.approximate, self.operations, self.divisions, self.unit = False, 0, 0, ""
        if self.peek().text == "dollar":
            self.at, self.unit = self.at + 1, "dollar"
        if self.peek().kind == "text":
            words = []
            while self.peek().kind in ("text", "name") and self.peek().text not in CONJUNCTIONS:
                words.append(self.next().text.casefold())
            value = Word(" ".join(words))
        else:
            value = self.sum()
            if isinstance(value, sympy.Expr):
                self.unit_tail(value)
                plain = self.operations == 0 and self.divisions <= 1
                value = Leaf(value, self.approximate, self.unit, plain)
        self.approximate |= outer[0]
        self.operations, self.divisions, self.unit = self.operations + outer[1], self.divisions + outer[2], outer[3]
        return value

    def unit_tail(self, value) -> None:
        r"""Units and words after a number: 5 cm, 64 square feet, 3 \text{ m/s}^2, 42 apples, 33 pct."""
        words, known, start = [], True, self.at
        while self.peek().kind == "text" or self.at > start and (self.peek().kind == "name" or self.peek().text in UNIT_OPS):
            token = self.next()
            if token.text in CONJUNCTIONS:
                self.at -= 1
                break
            if token.text in "{}":
                continue
            unit = unit_name(token.text) if token.kind in ("text", "name") else token.text
            known = known and unit is not None
            words.append(unit or token.text)
        if not words:
            return
        if not known and value.free_symbols:
            raise Unparsed("words after a formula")
        if words[0] == "percent":
            self.unit = "%"
        elif known:
            power = {"sq": "^2", "cubic": "^3"}.get(words[0], "")
            self.unit = "".join(words[bool(power):]) + power

    def sum(self):
        self.enter()
        terms = []
        sign = self.leading_sign()
        while True:
            term = self.term()
            if sign < 0:
                term = self.product(Integer(-1), term)
            terms.append(term)
            if self.peek().text not in ("+", "-", "pm", "mp"):
                break
            sign = self.leading_sign()
            self.operations += 1
        self.depth -= 1
        if len(terms) == 1:
            return terms[0]
        return add(*map(expression, terms))

    def leading_sign(self) -> int:
        sign = 1
        while self.peek().text in ("+", "-", "pm", "mp") and self.peek().kind != "end":
            token = self.next().text
            if token in ("pm", "mp"):
                self.saw_sign = True
                sign *= self.sign if token == "pm" else -self.sign
            elif token == "-":
                sign = -sign
        return sign

    def product(self, left, right):
        if is_kind(right, "matrix"):
            left, right = right, left
        if is_kind(left, "matrix"):
            scale = expression(right)
            return Seq("matrix", tuple(tuple(Leaf(multiply(scale, expression(cell))) for cell in row) for row in left.items))
        return multiply(expression(left), expression(right))

    def term(self):
        value = self.factor()
        while True:
            if self.accept("*"):
                scientific = self.peek().text == "10" and self.peek(1).text == "^"
                sign = self.leading_sign()
                right = self.factor()
                self.count_product(value, right, scientific)
                value = self.product(self.product(Integer(sign), value), right)
            elif self.accept("/"):
                sign = self.leading_sign()
                self.divisions += 1
                value = divide(multiply(Integer(sign), expression(value)), expression(self.factor()))
            elif self.starts_factor():
                if self.peek().kind == "number" and self.tokens[self.at - 1].kind == "number":
                    raise Unparsed("two numbers side by side")
                right = self.factor()
                self.count_product(value, right, False)
                value = self.product(value, right)
            else:
                return value

    def count_product(self, left, right, scientific: bool) -> None:
        rational = getattr(left, "is_Rational", False) and getattr(right, "is_Rational", False)
        self.operations += bool(rational and not scientific)

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind in ("number", "name"):
            return token.text not in CONJUNCTIONS
        if token.kind == "command":
            return token.text in LITERAL and token.text not in ("pm", "mp", "circ", "choose", "rfloor", "rceil")
        return token.text in ("(", "[", "{") or token.text == "|" and not self.bars

    def factor(self):
        self.enter()
        value = self.atom()
        while True:
            token = self.peek().text
            if token == "^":
                self.at += 1
                if self.accept("circ") or self.braced("circ"):
                    value = self.degrees(value)
                elif self.accept("'"):
                    raise Unparsed("a prime")
                else:
                    value = power(expression(value), self.exponent())
            elif token == "°":
                self.at += 1
                value = self.degrees(value)
            elif token == "!" and self.peek().kind == "op":
                self.at += 1
                value = factorial(expression(value))
            elif token == "%":
                self.at += 1
                if self.peek().kind == "end" or self.peek().text in SEPARATORS or self.peek().text in CLOSING:
                    self.unit = "%"
                else:
                    value = divide(expression(value), Integer(100))
            else:
                self.depth -= 1
                return value

    def braced(self, text: str) -> bool:
        if self.peek().text == "{" and self.peek(1).text == text and self.peek(2).text == "}":
            self.at += 3
            return True
        return False

    def degrees(self, value):
        if self.in_function:
            return divide(multiply(expression(value), sympy.pi), Integer(180))
        self.unit = "deg"
        return value

    def exponent(self):
        """What follows ^: one signed atom, itself perhaps raised (right to left)."""
        self.enter()
        sign = self.leading_sign()
        value = expression(self.atom())
        if self.accept("^"):
            value = power(value, self.exponent())
        self.depth -= 1
        return multiply(Integer(-1), value) if sign < 0 else value

    def atom(self):
        self.enter()
        token = self.next()
        if token.kind == "number":
            value = self.number(token)
        elif token.kind == "name":
            value = self.named(token.text)
        elif token.text in ("(", "[", "{", "set{"):
            value = self.group(token.text)
        elif token.text == "|":
            self.bars += 1
            value = apply("abs", [expression(self.sum())])
            self.expect("|")
            self.bars -= 1
        elif token.text == "ℝ":
            value = REAL_LINE
        elif token.text.startswith("begin "):
            value = self.matrix(token.text)
        elif token.kind == "command":
            value = self.command(token.text)
        else:
            raise Unparsed(f"unexpected {token.text or 'end'}")
        self.depth -= 1
        return value

    def number(self, token: Token):
        """A literal, in another base (52_8), or a mixed number (1 4/5, 1\\frac45)."""
        value = number(token.text)
        self.approximate |= not value.is_Integer and "\\" not in token.text
        if not token.text.isdigit():
            return value
        if self.accept("_"):
            base = self.group("{") if self.accept("{") else expression(self.atom())
            if not (base.is_Integer and 2 <= base <= 10) or any(int(digit) >= base for digit in token.text):
                raise Unparsed("not a number in that base")
            return Integer(int(token.text, int(base)))
        start, fraction = self.at, Integer(0)
        if self.accept("frac"):
            fraction = self.proper(self.integer(), self.integer())
        elif self.peek().spaced and self.peek().text.isdigit() and self.peek(1).text == "/":
            fraction = self.proper(self.integer(), self.integer() if self.accept("/") else None)
        if fraction:
            self.divisions += 1
            return add(value, fraction)
        self.at = start
        return value

    def integer(self) -> Integer | None:
        """A plain integer, alone or in braces, if one comes."""
        if self.accept("{"):
            inside = self.integer()
            return inside if self.accept("}") else None
        if not self.peek().text.isdigit():
            return None
        return self.first_digit() if self.tokens[self.at - 1].text == "frac" else number(self.next().text)

    def proper(self, top, bottom):
        return Rational(top, bottom) if top is not None and bottom is not None and 0 < top < bottom else Integer(0)

    def named(self, name: str):
        if name in self.bound:
            return self.bound[name]
        if name in FUNCTIONS:
            return self.function(name)
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in CONJUNCTIONS:
            raise Unparsed("a conjunction")
        if self.accept("_"):
            depth, part = 0, []
            while True:
                token = self.next()
                depth += (token.text == "{") - (token.text == "}")
                if token.kind not in ("number", "name", "text") and token.text not in ("{", "}", ","):
                    raise Unparsed("a subscript that is not a name")
                part.append(token.text.strip("{}"))
                if depth == 0:
                    break
            name = f"{name}_{''.join(part)}"
        while self.accept("'"):
            name += "'"
        if name[0] in "fghFGH" and (self.peek().text == "(" or self.peek().text == "^" and self.peek(2).text == "("):
            exponent = self.exponent() if self.accept("^") else None
            self.expect("(")
            value = sympy.Function(name)(*self.arguments("("))
            return value if exponent is None else power(value, exponent)
        return Symbol(name)

    def arguments(self, opening: str) -> list:
        """The values in brackets after a function's name; the bracket is open."""
        value = self.group(opening)
        return [expression(item) for item in value.items] if isinstance(value, Seq) else [expression(value)]

    def function(self, name: str):
        exponent = base = index = None
        if name == "sqrt" and self.accept("["):
            index = self.group("[")
        for _ in range(2):
            if name == "log" and self.accept("_"):
                base = self.group("{") if self.accept("{") else self.subscript_number()
            elif name != "sqrt" and self.accept("^"):
                exponent = self.exponent()
        self.in_function += 1
        if self.peek().text in ("(", "{"):
            arguments = self.arguments(self.next().text)
        elif name in ("sqrt", "cbrt"):
            arguments = [expression(self.atom())]
        else:
            sign = self.leading_sign()
            value = expression(self.factor())
            while self.starts_factor() and self.peek().text not in FUNCTIONS and self.peek().text not in ("(", "["):
                value = multiply(value, expression(self.factor()))
            arguments = [multiply(Integer(-1), value) if sign < 0 else value]
        self.in_function -= 1
        if index is not None:
            return root(arguments[0], expression(index))
        return apply(name, arguments, exponent, base)

    def subscript_number(self):
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1 and token.text != "10":  # \log_28 is \log_2 8
            return self.first_digit()
        return expression(self.atom())

    def first_digit(self):
        r"""The first digit of a number (\frac12 is 1/2); the rest becomes a token of its own."""
        token = self.next()
        if len(token.text) > 1:
            self.tokens[self.at - 1 : self.at] = [Token("number", token.text[0]), Token("number", token.text[1:])]
        return number(token.text[0])

    def group(self, opening: str):
        """What stands between brackets: one value, or several in order (set{: without)."""
        if opening == "set{" and self.accept("set}"):
            return Seq("set", ())
        bars, self.bars = self.bars, 0
        in_function, self.in_function = self.in_function, self.in_function
        items = self.items()
        if opening == "{" and self.accept("choose"):
            items = [binomial(expression(items[0]), expression(self.sum()))]
        closing = self.next().text
        self.bars, self.in_function = bars, in_function
        if closing not in BRACKETS[opening]:
            raise Unparsed(f"{BRACKETS[opening]} expected")
        if opening == "set{" or opening == "{" and len(items) > 1:
            return Seq("set", tuple(items))
        if len(items) == 1:
            item = items[0]
            if isinstance(item, Leaf):
                if item.unit == "%":
                    return divide(item.expr, Integer(100))
                self.unit = self.unit or item.unit
                return item.expr
            return item
        return Seq(opening + closing, tuple(items))

    def matrix(self, begin: str):
        if not begin.endswith("matrix") and not begin.endswith("array") or begin.endswith("vmatrix"):
            raise Unparsed("not a matrix")
        rows, row = [], []
        while not self.peek().text.startswith("end "):
            row.append(self.item_of_matrix())
            if self.accept("row"):
                rows.append(tuple(row))
                row = []
            elif not self.accept("&") and not self.peek().text.startswith("end "):
                raise Unparsed("a matrix is not closed")
        self.at += 1
        rows += [tuple(row)] if row else []
        if len({len(row) for row in rows}) != 1:
            raise Unparsed("not a matrix")
        return Seq("matrix", tuple(rows))

    def item_of_matrix(self):
        value = self.union()
        if not isinstance(value, Leaf):
            raise Unparsed("not a number in a matrix")
        return value

    def command(self, name: str):
        if name == "frac":
            top, bottom = self.fraction_part(), self.fraction_part()
            self.divisions += 1
            return divide(top, bottom)
        if name == "binom":
            return binomial(self.fraction_part(), self.fraction_part())
        if name in ("lfloor", "lceil"):
            value = apply("floor" if name == "lfloor" else "ceil", [expression(self.sum())])
            self.expect("r" + name[1:])
            return value
        if name == "emptyset":
            return Seq("set", ())
        if name in ("sum", "prod"):
            return self.series(name)
        raise Unparsed(f"\\{name} is not known")

    def fraction_part(self):
        if self.peek().text.isdigit():
            return self.first_digit()
        return expression(self.group("{") if self.accept("{") else self.atom())

    def series(self, name: str):
        r"""\sum_{k=a}^{b} term and \prod, where a and b are integers: the term is read once for each k."""
        self.expect("_")
        self.expect("{")
        variable = self.next()
        self.expect("=")
        low = expression(self.sum())
        self.expect("}")
        self.expect("^")
        high = expression(self.group("{") if self.accept("{") else self.atom())
        if variable.kind != "name" or not (low.is_Integer and high.is_Integer) or not 0 <= high - low < MAX_SUM:
            raise Unparsed("not a simple sum")
        start, values, saved = self.at, [], dict(self.bound)
        for k in range(int(low), int(high) + 1):
            self.at = start
            self.bound[variable.text] = Integer(k)
            values.append(expression(self.term()))
        self.bound = saved
        return add(*values) if name == "sum" else multiply(*values)


OPENING, CLOSING = {"(", "[", "{", "set{"}, {")", "]", "}", "set}"}
BRACKETS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "set{": ("set}",)}
SEPARATORS = RELATIONS | CONJUNCTIONS | {",", ";"}
UNIT_OPS = {"^", "/", "*", "-", "2", "3", "{", "}", "."}
NAME = re.compile(r"[A-Za-z]+(?:_[A-Za-z0-9]+)?'*(?:\([A-Za-z0-9_,]{1,40}\))?|\([A-Za-z0-9_,]{1,40}\)")
REAL_LINE = Seq("()", (Leaf(-sympy.oo), Leaf(sympy.oo)))


def expression(value):
    """A sympy tree, or it is no arithmetic."""
    if isinstance(value, Leaf):
        value = value.expr
    if not isinstance(value, sympy.Expr):
        raise Unparsed("arithmetic on what is not a number")
    return value


def is_kind(value, *kinds: str) -> bool:
    return isinstance(value, Seq) and value.kind in kinds


def without_points(line, points):
    r"""ℝ \ {1, 2} as the union of the intervals between."""
    if line != REAL_LINE or not is_kind(points, "set"):
        raise Unparsed("a difference of sets")
    return intervals_between([item for item in points.items if isinstance(item, Leaf) and item.expr.is_Rational])


def intervals_between(points: list[Leaf]) -> Seq:
    ends = [Leaf(-sympy.oo), *sorted(points, key=lambda leaf: leaf.expr), Leaf(sympy.oo)]
    return Seq("union", tuple(Seq("()", pair) for pair in zip(ends, ends[1:])))


class Parsed(NamedTuple):
    text: str  # spelling for comparison as text
    value: object  # Leaf, Seq, Relation, Word, or None where the answer is not in the grammar
    why: str = ""


@lru_cache(maxsize=4096)
def parse(text: str, thousands: bool = True) -> Parsed:
    r"""A whole answer. What is not in the grammar, or beyond the limits, is text and nothing else.

    >>> parse(r"\frac12").value.expr, parse("(1, 2]").value.kind, parse("x < 3").value.ops, parse("2+").value
    (1/2, '(]', ('<',), None)
    """
    if len(text) > MAX_ANSWER:
        return Parsed(text, None, "longer than the limit")
    text = normalise(text, thousands)
    spelling = re.sub(r"\s+", "", text)
    try:
        tokens = tokenise(text)
        spelling = "".join(token.text.casefold() if token.kind == "text" else token.text for token in tokens)
        return Parsed(spelling, Parser(tokens).answer())
    except Unparsed as error:
        return Parsed(spelling, None, str(error))


# ---------------------------------------------------------------------------------------------------------------------
# Numeric evaluation of inert trees at fixed points (libmp: pure functions with explicit precision, safe in any thread)
# ---------------------------------------------------------------------------------------------------------------------
class Undefined(ArithmeticError):
    """No value at this point: a pole, or beyond the limits."""


ROUND = libmp.round_nearest
ZERO, ONE = libmp.fzero, libmp.fone
REAL_ONLY = (sympy.Abs, sympy.floor, sympy.ceiling)
ONE_ARGUMENT = {
    sympy.sin: libmp.mpc_sin, sympy.cos: libmp.mpc_cos, sympy.tan: libmp.mpc_tan, sympy.sinh: libmp.mpc_sinh,
    sympy.cosh: libmp.mpc_cosh, sympy.tanh: libmp.mpc_tanh, sympy.asin: libmp.mpc_asin, sympy.acos: libmp.mpc_acos,
    sympy.atan: libmp.mpc_atan, sympy.log: libmp.mpc_log, sympy.factorial: libmp.mpc_factorial,
}  # fmt: skip
RECIPROCAL = {sympy.cot: sympy.tan, sympy.sec: sympy.cos, sympy.csc: sympy.sin}
CONSTANT_VALUES = {sympy.pi: libmp.mpf_pi, sympy.E: libmp.mpf_e}


def magnitude(z) -> int:
    """Bits before the point of the larger part; refuses what is not finite or is out of bounds."""
    largest = -(1 << 30)
    for _, mantissa, exponent, count in z:
        if not mantissa and exponent:
            raise Undefined("not finite")
        if mantissa:
            largest = max(largest, exponent + count)
    if largest > MAX_MAGNITUDE:
        raise Undefined("too large")
    return largest


def point(name: str, k: int, real: bool):
    """The value of a variable at the k-th point: near the positive axis (where roots and logarithms behave), or real."""
    noise = zlib.crc32(f"{name} {k}".encode("utf-8", "replace"))
    size, tilt = 0.3 + (noise & 0xFFFF) / 0x8000, 0.05 + (noise >> 16) / 0x50000
    if real:
        negative = k == 1 or k > 1 and noise >> 20 & 1
        return libmp.from_float(-size if negative else size), ZERO
    return libmp.from_float(size), libmp.from_float(tilt)


def evaluate(tree, k: int, real: bool, precision: int):
    """The complex value of a tree at the k-th point.

    A function without a definition, f(x), gets an arbitrary analytic one: an identity that holds for every f holds
    for it, and another one almost surely does not.
    """
    if tree.is_Rational:
        return libmp.from_rational(tree.p, tree.q, precision, ROUND), ZERO
    if tree.is_Symbol:
        return point(tree.name, k, real)
    if not tree.args:
        if tree is sympy.I:
            return ZERO, ONE
        if tree not in CONSTANT_VALUES:
            raise Undefined(str(tree))
        return CONSTANT_VALUES[tree](precision, ROUND), ZERO
    values = [evaluate(argument, k, real, precision) for argument in tree.args]
    kind = tree.func
    if kind is Add or kind is Mul:
        combine = libmp.mpc_add if kind is Add else libmp.mpc_mul
        result = values[0]
        for value in values[1:]:
            result = combine(result, value, precision, ROUND)
        magnitude(result)
        return result
    if kind is Pow:
        return complex_power(tree.args[1], *values, precision)
    if kind in REAL_ONLY:
        return real_only(kind, values[0], precision)
    if kind in RECIPROCAL:
        return libmp.mpc_reciprocal(one_argument(RECIPROCAL[kind], values[0], precision), precision, ROUND)
    if kind in ONE_ARGUMENT:
        return one_argument(kind, values[0], precision)
    if kind is sympy.binomial:
        n, k_, rest = values[0], values[1], libmp.mpc_sub(values[0], values[1], precision, ROUND)
        n, k_, rest = (one_argument(sympy.factorial, value, precision) for value in (n, k_, rest))
        return libmp.mpc_div(n, libmp.mpc_mul(k_, rest, precision, ROUND), precision, ROUND)
    if not values:
        raise Undefined(str(kind))
    mixed = (ZERO, ZERO)
    for place, value in enumerate(values):
        mixed = libmp.mpc_add(mixed, libmp.mpc_mul(value, point(f"{kind} {place}", 0, False), precision, ROUND), precision)
    return one_argument(sympy.sin, mixed, precision)


def one_argument(kind, value, precision: int):
    if magnitude(value) > (12 if kind is sympy.factorial else 16 if value[1] != ZERO else 1_000):
        raise Undefined("argument too large")
    try:
        result = ONE_ARGUMENT[kind](value, precision, ROUND)
    except (ValueError, ZeroDivisionError):
        raise Undefined("pole") from None
    magnitude(result)
    return result


def complex_power(exponent, base, value, precision: int):
    if base == (ZERO, ZERO):
        if value[0][0] or value[0] == ZERO:
            raise Undefined("0 to a power that is not positive")
        return base
    if exponent.is_Integer and abs(exponent) <= 10_000:
        if abs(int(exponent)) * abs(magnitude(base)) > 4 * MAX_MAGNITUDE:
            raise Undefined("too large")
        result = libmp.mpc_pow_int(base, int(exponent), precision, ROUND)
    elif exponent == sympy.S.Half:
        result = libmp.mpc_sqrt(base, precision, ROUND)
    else:
        logarithm = libmp.mpc_mul(libmp.mpc_log(base, precision + 20, ROUND), value, precision + 20, ROUND)
        if magnitude(logarithm) > 16:
            raise Undefined("too large")
        result = libmp.mpc_exp(logarithm, precision, ROUND)
    magnitude(result)
    return result


def real_only(kind, value, precision: int):
    magnitude(value)
    if kind is sympy.Abs:
        return libmp.mpc_abs(value, precision, ROUND), ZERO
    if value[1] != ZERO:
        raise Undefined("floor of a complex number")
    nearest = libmp.mpf_nint(value[0], precision, ROUND)
    off = libmp.mpf_abs(libmp.mpf_sub(value[0], nearest, precision, ROUND))
    if libmp.mpf_lt(off, libmp.mpf_shift(ONE, -precision // 2)):  # an integer but for rounding
        return nearest, ZERO
    return (libmp.mpf_floor if kind is sympy.floor else libmp.mpf_ceil)(value[0], precision, ROUND), ZERO


@lru_cache(maxsize=4096)
def survey(tree) -> tuple[int, int, int, bool, bool]:
    """(largest rational in bits, nodes, transcendental nodes, has variables, needs real points)."""
    largest, nodes, hard, variable, real = 0, 0, 0, False, False
    stack = [tree]
    while stack:
        node = stack.pop()
        nodes += 1
        stack.extend(node.args)
        if node.is_Rational:
            largest = max(largest, bits(node))
        elif node.is_Symbol:
            variable = True
        elif node.func not in (Add, Mul):
            hard += 30 if node.func in (sympy.factorial, sympy.binomial) else 1
            real = real or node.func in REAL_ONLY
            variable = variable or node.func not in KNOWN_NODES and bool(node.args)
    return largest, nodes, hard, variable, real


KNOWN_NODES = {Add, Mul, Pow, sympy.binomial, *ONE_ARGUMENT, *RECIPROCAL, *REAL_ONLY}


@lru_cache(maxsize=16384)
def value_at(tree, k: int, real: bool, precision: int):
    """evaluate, remembered, within a budget of nodes and precision; None where there is no value."""
    _, nodes, hard, *_ = survey(tree)
    if nodes * precision // 64 + hard * (precision // 64) ** 2 > MAX_EVALUATION:
        return None
    try:
        return evaluate(tree, k, real, precision)
    except (Undefined, ZeroDivisionError, ValueError, OverflowError):
        return None


def larger(a, b):
    return a if libmp.mpf_gt(a, b) else b


def size(z):
    """The larger absolute part, as a libmp float."""
    return larger(libmp.mpf_abs(z[0]), libmp.mpf_abs(z[1]))


def close(left, right, tolerance) -> bool:
    """|left - right| <= tolerance * the larger of both."""
    scale = larger(size(left), size(right))
    return libmp.mpf_le(size(libmp.mpc_sub(left, right)), libmp.mpf_mul(scale, tolerance))


def vanishes(left, right, exponent: int) -> bool:
    return libmp.mpf_lt(larger(size(left), size(right)), libmp.mpf_shift(ONE, -exponent))


MILLIONTH = libmp.from_rational(1, 10**6, 64, ROUND)
PRECISIONS = (192, 768, 3_072)


def equal_at(x, y, k: int, real: bool, precision: int, approximate: bool) -> bool | None:
    """Whether two trees agree at the k-th point; None where one of them has no value.

    Both may be zero, seen through rounding (sin 1 ² + cos 1 ² - 1): then they shrink as the precision grows.
    """
    left, right = value_at(x, k, real, precision), value_at(y, k, real, precision)
    if left is None or right is None:
        return None
    if close(left, right, MILLIONTH if approximate else libmp.mpf_shift(ONE, -precision // 2)):
        return True
    if not vanishes(left, right, precision // 3):
        return False
    left, right = value_at(x, k, real, 4 * precision), value_at(y, k, real, 4 * precision)
    if left is None or right is None:
        return None
    return vanishes(left, right, 4 * precision // 3) or close(left, right, libmp.mpf_shift(ONE, -2 * precision))


def points(*trees) -> tuple[list[int], bool, int]:
    """(points to try, whether real, precision) for a comparison: one point for constants, five or eight otherwise."""
    surveys = [survey(tree) for tree in trees]
    largest = max(entry[0] for entry in surveys)
    real = any(entry[4] for entry in surveys)
    precision = next((p for p in PRECISIONS if 2 * largest + 64 <= p), 4 * PRECISIONS[-1])
    return list(range((8 if real else 5) if any(entry[3] for entry in surveys) else 1)), real, precision


def same_tree(x, y, approximate: bool = False) -> bool:
    """Two inert trees: structure, then exact numbers, then values at fixed points, then a few bounded rewrites."""
    if x == y:
        return True
    if x.is_Rational and y.is_Rational:
        return approximate and abs(x - y) * 10**6 <= max(abs(x), abs(y))
    if not (x.is_finite is not False and y.is_finite is not False) or sympy.oo in (x, y) or -sympy.oo in (x, y):
        return False
    ks, real, precision = points(x, y)
    agreed = 0
    for k in ks:
        verdict = equal_at(x, y, k, real, precision, approximate)
        if verdict is False:
            return False
        agreed += verdict is True
    return agreed * 2 > len(ks) or not agreed and rewrites_to_zero(add(x, multiply(Integer(-1), y)))


def terms(tree) -> int:
    """An upper bound on the terms of the expanded tree."""
    if tree.func is Add:
        return sum(map(terms, tree.args))
    if tree.func is Mul:
        return math.prod(map(terms, tree.args))
    if tree.func is Pow and tree.args[1].is_Integer:
        inside, exponent = terms(tree.args[0]), abs(int(tree.args[1]))
        return 1 if inside == 1 else math.comb(inside + exponent - 1, exponent) if exponent <= 20 else MAX_TOKENS
    return 1


def rewrites_to_zero(tree) -> bool:
    """For what has no value at our points (x^200000): a fixed list of sympy's rewrites, only on small trees."""
    largest, nodes, hard, *_ = survey(tree)
    if nodes > 40 or largest > 64 or hard > 10 or terms(tree) > 100:
        return False
    return any(rewrite(tree) == 0 for rewrite in (sympy.expand, lambda t: sympy.cancel(sympy.together(t))))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of values
# ---------------------------------------------------------------------------------------------------------------------
# kind                     equal when                                              not equal
# numbers                  exactly; a decimal to a relative 1e-6                   0.33 and 1/3; 2.23 and 2.232
# expressions              the same values at fixed points                         x and X; e^x and e^x + C
# percent, money, units    5% is 5 or 0.05; units are compared if both are known   5 cm and 5 m
# x = 5, a = b = 5         as 5; both named: the same name                         x = 5 and y = 5; a + b = 0 and 0
# other equations          left - right are proportional                          x = y and |x| = |y|
# inequalities             the same interval; or proportional, the same sign       x < 1 and x <= 1
# intervals, unions        the same ends and brackets; unions in any order         (0,1) and [0,1]
# tuples, matrices         entry by entry, in order                                (1,2) and (2,1); (1,2) and {1,2}
# sets, bare lists         in any order; a bare list also as a tuple in order      {1,2} and {1,2,3}; 1 and {1,2}
# words                    the same text                                           what did not parse and anything else
def same(left: Parsed, right: Parsed) -> bool:
    """
    >>> [same(parse(a), parse(b)) for a, b in (("x=5", "5"), ("1/2", "0.5"), ("(1,2)", "{1,2}"), ("x<3", "(-oo,3)"))]
    [True, True, False, True]
    """
    if left.text == right.text:
        return True
    return left.value is not None and right.value is not None and same_value(left.value, right.value)


def same_value(left, right) -> bool:
    left, right = single(left), single(right)
    if isinstance(left, Relation) and isinstance(right, Relation):
        return same_relation(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Relation) or is_kind(one, "list") and any(isinstance(item, Relation) for item in one.items):
            value = meaning(one) if isinstance(one, Relation) else None
            if value is not None:
                return same_value(value, other)
            region = as_region(one)
            if region is not None and not (is_kind(other, "list") and as_region(other) is None):
                return same_value(region, as_region(other) or other)
            if isinstance(one, Relation):
                return False
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return same_leaf(left, right)
    if isinstance(left, Word) and isinstance(right, Word):
        return left.text == right.text
    if isinstance(left, Seq) and isinstance(right, Seq):
        return same_seq(left, right)
    return False


def single(value):
    """A set or list of one value is that value, repeated or not."""
    while is_kind(value, "set", "list", "union") and len(value.items) == 1:
        value = value.items[0]
    return value


def same_leaf(left: Leaf, right: Leaf) -> bool:
    approximate = left.approximate or right.approximate
    if left.unit and right.unit and left.unit != right.unit and "%" not in (left.unit, right.unit):
        return False
    if same_tree(left.expr, right.expr, approximate):
        return True
    if (left.unit == "%") == (right.unit == "%"):
        return False
    left, right = (tree.expr if tree.unit != "%" else divide(tree.expr, Integer(100)) for tree in (left, right))
    return same_tree(left, right, approximate)


def meaning(relation: Relation):
    """What x = 5, f(x) = 5, 2 + 3 = 5, Area = 5 or x in {5} says: the last value; None for a real equation."""
    if any(op not in ("=", "in") for op in relation.ops):
        return None
    first, last = relation.sides[0], relation.sides[-1]
    if relation.names[0] or is_constant(first) and (is_constant(last) or len(relation.sides) > 2):
        return last
    if len(relation.sides) == 2 and relation.names[-1] and is_constant(first):
        return first
    return last if len(relation.sides) > 2 and is_constant(last) else None


def is_constant(value) -> bool:
    return isinstance(value, Leaf) and not survey(value.expr)[3]


def same_relation(left: Relation, right: Relation) -> bool:
    values = meaning(left), meaning(right)
    names = left.names[0] or left.names[-1], right.names[0] or right.names[-1]
    if None not in values and all(names):
        in_words = None in left.sides or None in right.sides
        one_function = ("(" in names[0]) != ("(" in names[1]) and "," not in names[0] + names[1]
        if (names[0] == names[1] or in_words or one_function) and same_value(*values):
            return True
    regions = as_region(left), as_region(right)
    if None not in regions and not (values[0] and values[1]):
        return same_value(*regions)
    if len(left.ops) != len(right.ops):
        return False
    if set(left.ops + right.ops) == {":"}:
        return all(map(same_value, left.sides, right.sides))
    return same_steps(steps(left), steps(right)) or same_steps(steps(left), steps(right)[::-1])


def steps(relation: Relation) -> list:
    """Each adjacent pair as (difference, sign): difference = 0, < 0, <= 0 or != 0."""
    result = []
    for left, op, right in zip(relation.sides, relation.ops, relation.sides[1:]):
        if not isinstance(left, Leaf) or not isinstance(right, Leaf) or op in ("in", ":"):
            return []
        if op[0] == ">":
            left, right, op = right, left, op.replace(">", "<")
        result.append((add(left.expr, multiply(Integer(-1), right.expr)), op, left.approximate or right.approximate))
    return result


def same_steps(left: list, right: list) -> bool:
    return bool(left) and len(left) == len(right) and all(
        a[1] == b[1] and proportional(a[0], b[0], a[1] in ("<", "<="), a[2] or b[2]) for a, b in zip(left, right))


def proportional(x, y, positive: bool, approximate: bool) -> bool:
    """x = c y with a constant c that is not 0 (for inequalities: positive); both may vanish everywhere."""
    if same_tree(x, Integer(0)) or same_tree(y, Integer(0)):
        return same_tree(x, y)
    ratios = [divide_at(x, y, k) for k in range(4)]
    if None in ratios or positive and (libmp.mpf_le(ratios[0][0], ZERO) or not vanishes((ratios[0][1], ZERO), ratios[0], 400)
                                       and libmp.mpf_gt(libmp.mpf_abs(ratios[0][1]), libmp.mpf_shift(ONE, -90))):
        return False
    return all(close(ratios[0], ratio, MILLIONTH if approximate else libmp.mpf_shift(ONE, -90)) for ratio in ratios[1:])


def divide_at(x, y, k: int):
    _, real, precision = points(x, y)
    left, right = value_at(x, k, real, precision), value_at(y, k, real, precision)
    if left is None or right is None or right == (ZERO, ZERO):
        return None
    return libmp.mpc_div(left, right, precision, ROUND)


def as_region(value):
    """Inequalities in one variable with constant ends as intervals, an "or" of them as a union; else None."""
    if isinstance(value, Seq):
        if value.kind != "list" or not all(isinstance(item, Relation) for item in value.items):
            return None
        regions = [as_region(item) for item in value.items]
        return None if None in regions else Seq("union", tuple(piece for r in regions for piece in pieces(r)))
    if not isinstance(value, Relation):
        return None
    sides, ops = value.sides, value.ops
    if ops == ("in",) and value.names[0]:
        return sides[1]
    if len(ops) == 1 and value.names[1] and is_constant(sides[0]):
        sides, ops = sides[::-1], tuple(op.translate(str.maketrans("<>", "><")) for op in ops)
        names = value.names[::-1]
    else:
        names = value.names
    if len(ops) == 1 and names[0] and is_constant(sides[1]):
        end, op = sides[1], ops[0]
        if op == "=":
            return Seq("set", (end,))
        if op == "!=" and end.expr.is_Rational:
            return intervals_between([end])
        if op in ("<", "<="):
            return Seq("()" if op == "<" else "(]", (Leaf(-sympy.oo), end))
        if op in (">", ">="):
            return Seq("()" if op == ">" else "[)", (end, Leaf(sympy.oo)))
    if len(ops) == 2 and names[1] and is_constant(sides[0]) and is_constant(sides[2]):
        if ops[0][0] == ops[1][0] == ">":
            sides, ops = sides[::-1], (ops[1].replace(">", "<"), ops[0].replace(">", "<"))
        if ops[0][0] == ops[1][0] == "<":
            return Seq(("[" if ops[0] == "<=" else "(") + ("]" if ops[1] == "<=" else ")"), (sides[0], sides[2]))
    return None


def pieces(region) -> tuple:
    return region.items if is_kind(region, "union") else (region,)


def same_seq(left: Seq, right: Seq) -> bool:
    if left.kind == "matrix" or right.kind == "matrix":
        left, right = as_rows(left), as_rows(right)
        return left is not None and right is not None and len(left) == len(right) and all(
            len(a) == len(b) and all(map(same_value, a, b)) for a, b in zip(left, right))
    loose = {"set", "list"}
    if "union" in (left.kind, right.kind):
        return unordered(pieces(left), pieces(right))
    if left.kind in loose and right.kind in loose:
        return unordered(left.items, right.items, repeats=False)
    if "set" in (left.kind, right.kind) or len(left.items) != len(right.items):
        return False
    if left.kind != right.kind and "list" not in (left.kind, right.kind) and len(left.items) == 2:
        return False  # (0,1) and [0,1] are intervals
    if {"(]", "[)"} & {left.kind, right.kind} and left.kind != right.kind:
        return False
    return all(map(same_value, left.items, right.items))


def as_rows(seq: Seq):
    """Rows of a matrix; a column or row vector may be written as a tuple, a matrix as [[1,2],[3,4]]."""
    if seq.kind == "matrix":
        return seq.items if len(seq.items[0]) > 1 else [tuple(row[0] for row in seq.items)]
    if seq.kind in ("()", "[]"):
        if all(isinstance(item, Leaf) for item in seq.items):
            return [seq.items]
        if all(is_kind(item, "[]") for item in seq.items):
            return [item.items for item in seq.items]
    return None


def unordered(left: tuple, right: tuple, repeats: bool = True) -> bool:
    """Whether two collections hold the same values in any order."""
    if not repeats:
        left, right = distinct(left), distinct(right)
    if len(left) != len(right):
        return False
    rest = list(right)
    for item in left:
        found = next((place for place, other in enumerate(rest) if same_value(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def distinct(items) -> list:
    kept = []
    for item in items:
        if not any(same_value(item, other) for other in kept):
            kept.append(item)
    return kept


OPTION = re.compile(r"\W{0,3}([A-J])\s{0,2}[).:]\s?\S")


def compare(answer: str, reference: str) -> bool:
    """Two answers, as they stand, by value."""
    left, right = parse(answer), parse(reference)
    if same(left, right):
        return True
    for one, other, spelling in ((left, right, reference), (right, left, answer)):
        if re.fullmatch(r"[A-J]", one.text.strip("()")) and (option := OPTION.match(spelling)):
            return option[1] == one.text.strip("()")  # "B" and "(B) 12 apples"
        if isinstance(one.value, Seq) and isinstance(other.value, Leaf) and "," in spelling:
            return same(one, parse(spelling, thousands=False))  # 100,200 may be a list
    return False


def is_value(answer: str) -> bool:
    """Whether nothing is left to calculate: a sign, one fraction, mixed number, root, power or 3 × 10^5 is a value.

    >>> [is_value(text) for text in ("5", "-3/4", "x=5", "3+2", "3+2=5", "5=3+2", "3*10^5", "10/4/2", "2(3)")]
    [True, True, True, False, True, False, True, False, False]
    """
    value = single(parse(answer).value)
    if isinstance(value, Relation):
        value = single(meaning(value))
    return not isinstance(value, Leaf) or value.plain


def is_equivalent(answer: str, reference: str, require_value: bool = False) -> bool:
    r"""Whether two answers are equal by the table above. `require_value`: see is_value; only for rational references.

    >>> is_equivalent(r"\frac{1}{2}", "0.5"), is_equivalent("3+2", "5"), is_equivalent("3+2", "5", require_value=True)
    (True, True, False)
    """
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer, reference = reference_answer(answer), reference_answer(reference)
    if not answer or not reference:
        return False
    if require_value and not is_value(answer):
        value = single(parse(reference).value)
        value = single(meaning(value)) if isinstance(value, Relation) else value
        if isinstance(value, Leaf) and value.expr.is_Rational:
            return False
    return compare(answer, reference)


def score(response: str, reference: str, require_value: bool = False) -> float:
    r"""1.0 if the final answer of a response equals the reference, else 0.0.

    >>> score(r"I get $\boxed{0.5}$", r"\frac12"), score("no idea", "1")
    (1.0, 0.0)
    """
    answer = extract_answer(response)
    return float(answer is not None and is_equivalent(answer, reference, require_value))


class Explanation(NamedTuple):
    right: bool
    answer: str | None
    rule: str  # name of the rule of RULES that found the answer, or "none"
    why: str  # right, wrong, no answer, unparsed answer: …, not a value


def explain(response: str, reference: str, require_value: bool = False) -> Explanation:
    """
    >>> explain("#### 3", "3")
    Explanation(right=True, answer='3', rule='hashes', why='right')
    """
    answer, rule = find_answer(response)
    if answer is None:
        return Explanation(False, None, rule, "no answer")
    if is_equivalent(answer, reference, require_value):
        return Explanation(True, answer, rule, "right")
    if require_value and is_equivalent(answer, reference):
        return Explanation(False, answer, rule, "not a value")
    parsed = parse(reference_answer(answer))
    return Explanation(False, answer, rule, "wrong" if parsed.value is not None else f"unparsed answer: {parsed.why}")


def answer_classes(answers: list[str | None]) -> list[int]:
    """Class of each answer: equal answers share one, numbered by first appearance; -1 where there is none.

    Equality is closed transitively, so the partition does not depend on the order.

    >>> answer_classes(["1/2", None, "3", "0.5", "x = 3"])
    [0, -1, 1, 0, 1]
    """
    spellings = list(dict.fromkeys(answer for answer in answers if answer is not None))
    label = list(range(len(spellings)))
    for j, later in enumerate(spellings):
        for i in range(j):
            if label[i] != label[j] and (is_equivalent(later, spellings[i]) or is_equivalent(spellings[i], later)):
                low, high = sorted((label[i], label[j]))
                label = [low if entry == high else entry for entry in label]
    by_spelling, numbers = dict(zip(spellings, label)), {}
    return [-1 if answer is None else numbers.setdefault(by_spelling[answer], len(numbers)) for answer in answers]


# ---------------------------------------------------------------------------------------------------------------------
# The pool of workers
# ---------------------------------------------------------------------------------------------------------------------
class Group(NamedTuple):
    verdicts: list[bool]
    classes: list[int]  # -1: no answer; all right ones share one class
    answers: list[str | None]
    timed_out: list[bool]  # lost to a limit (of time, memory …) and so counted as wrong


class Worker:
    """One `python reward.py --worker` and its pipes. Requests and replies are lines of JSON."""

    def __init__(self, timeout: float, memory_mb: int):
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(os.getpid()), str(timeout), str(memory_mb)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.timeout, self.pending, self.asked = timeout, b"", 0
        self.poll = select.poll()
        self.poll.register(self.process.stdout, select.POLLIN | select.POLLHUP)
        if self.read(120.0) != "ready":
            self.kill()
            raise RuntimeError(f"a checker worker did not start: {' '.join(command)}")

    def send(self, request) -> None:
        self.asked += 1
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it died; read() says so

    def read(self, timeout: float | None = None):
        """The next reply; None if the worker died or the time is over."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            if left <= 0 or not self.poll.poll(left * 1000):
                return None
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            self.pending += chunk
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> str:
        """End it; says what it had died of."""
        dead = self.process.poll()
        if dead is None:
            try:
                dead = self.process.wait(0.05 if b"" == self.pending else 0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return "time" if dead is None else "cpu" if dead == -signal.SIGXCPU else "crash"


class Verifier:
    """A pool that judges groups of responses; order is kept, and no answer can hang, crash or exhaust the caller.

    with Verifier(workers=4) as verifier:
        groups = verifier.check([[response, …], …], [reference, …])

    One thread owns one worker (Linux ends a worker when the thread that started it ends, so the threads live as long
    as the pool). `timeout` (seconds an answer, wall clock and CPU time) and `memory_mb` are a last resort.
    """

    RECYCLE = 20_000  # requests after which a worker is replaced, against slow growth

    def __init__(self, workers: int = 2, timeout: float = 10.0, memory_mb: int = 1024):
        if sys.platform == "win32":
            raise ValueError("Verifier needs Linux or macOS; on Windows call score() or use WSL")
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers must be at least 1 and timeout above 0, not {workers} and {timeout}")
        self.workers, self.timeout, self.memory_mb = workers, timeout, memory_mb
        self.failures = Counter()  # time, cpu, memory, crash
        self.jobs, self.threads, self.lock = queue.SimpleQueue(), [], threading.Lock()

    @property
    def timeouts(self) -> int:
        return self.failures["time"] + self.failures["cpu"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        with self.lock:
            threads, self.threads = self.threads, []
            for _ in threads:
                self.jobs.put(None)
        for thread in threads:
            thread.join()

    def check(self, responses, references, require_value=None) -> list[Group]:
        """P lists of G responses and P references -> P groups, in order."""
        require_value = [False] * len(references) if require_value is None else require_value
        if not len(responses) == len(references) == len(require_value):
            raise ValueError(f"{len(responses)} groups, {len(references)} references, {len(require_value)} require_value")
        with self.lock:
            while len(self.threads) < self.workers:
                self.threads.append(threading.Thread(target=self.serve, daemon=True))
                self.threads[-1].start()
        results, done = [None] * len(references), queue.SimpleQueue()
        for index, job in enumerate(zip(responses, references, require_value)):
            self.jobs.put((index, job, results, done))
        for _ in results:
            if error := done.get():
                raise error
        return results

    def verify(self, responses, references, require_value=None) -> tuple[list[list[bool]], list[list[int]]]:
        groups = self.check(responses, references, require_value)
        return [group.verdicts for group in groups], [group.classes for group in groups]

    def serve(self) -> None:
        """The life of one thread: jobs from the queue, judged by its own worker."""
        worker = None
        while (job := self.jobs.get()) is not None:
            index, (responses, reference, require_value), results, done = job
            try:
                worker, results[index] = self.judge(worker, list(responses), reference, bool(require_value))
                done.put(None)
            except Exception as error:  # to the caller of check(), not to the thread's own stderr
                worker = None
                done.put(error)
        if worker:
            worker.kill()

    def judge(self, worker, responses: list[str], reference: str, require_value: bool):
        """One group: distinct responses to one worker, replaced whenever it fails."""
        texts = list(dict.fromkeys(responses))
        found = {}  # response -> (answer, right, lost)
        while len(found) < len(texts):
            worker = self.alive(worker)
            rest = texts[len(found) :]
            worker.send({"reference": reference, "value": require_value, "responses": [reply_of(text) for text in rest]})
            for text in rest:
                answer = worker.read()
                right = None if answer is None else worker.read()
                if right is None or right == "memory":
                    self.failures["memory" if right else (kind := worker.kill())] += 1
                    found[text] = (answer and answer[0], False, True)
                    if right is None:
                        worker = None
                        break
                else:
                    found[text] = (answer[0], right, False)
        wrong = [answer for answer, right, lost in found.values() if not right and not lost and answer is not None]
        label = {}
        if len(wrong := list(dict.fromkeys(wrong))) > 1:
            worker = self.alive(worker)
            worker.send({"spellings": wrong})
            if (classes := worker.read()) is None:
                self.failures[worker.kill()] += 1
                worker = None
            label = dict(zip(wrong, classes)) if isinstance(classes, list) else {}
        keys = [-1 if a is None and not right else True if right else label.get(a, re.sub(r"\s+", "", a or ""))
                for a, right, _ in map(found.get, responses)]  # fmt: skip
        numbers: dict = {}
        classes = [-1 if key == -1 else numbers.setdefault((key is True, key), len(numbers)) for key in keys]
        answers, verdicts, lost = map(list, zip(*map(found.get, responses))) if responses else ([], [], [])
        return worker, Group(verdicts, classes, answers, lost)

    def alive(self, worker):
        if worker and worker.asked > self.RECYCLE:
            worker.kill()
            worker = None
        return worker or Worker(self.timeout, self.memory_mb)


def reply_of(text: str) -> str:
    """What the worker has to see of a response."""
    reply = after_thinking(text)
    return "" if reply is None else reply[-MAX_RESPONSE:]


def serve_requests(parent: int, timeout: float, memory_mb: int) -> None:
    """A worker: ends with its parent (EOF; the death signal on Linux) and with a runaway answer (CPU and memory)."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and preemption are the trainer's to handle
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    if os.getppid() != parent:
        return
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but replies reaches the pipe

    def reply(value):
        replies.write(json.dumps(value).encode() + b"\n")
        replies.flush()

    def allow_seconds():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(usage.ru_utime + usage.ru_stime + timeout) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))

    score(r"$\boxed{\frac{x+1}{2}}$", "x/2 + 1/2")
    reply("ready")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        allow_seconds()
        if "spellings" in request:
            try:
                reply(answer_classes(request["spellings"]))
            except (MemoryError, RecursionError):
                reply("memory")
            continue
        for response in request["responses"]:
            allow_seconds()
            answer = None
            try:
                answer = extract_answer(response)
                reply([answer])
                reply(answer is not None and is_equivalent(answer, request["reference"], request["value"]))
            except (MemoryError, RecursionError):
                reply("memory")


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        serve_requests(int(argv[1]), float(argv[2]), int(argv[3]))


if __name__ == "__main__":
    main()
