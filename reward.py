#!/usr/bin/env python3
r"""Problems and their grading: the reward of reinforcement learning with verifiable rewards.

    find the answer -> normalise -> tokens -> parse -> compare -> grade -> classes; killable workers

What a model writes is data and is never evaluated. A recursive-descent parser turns LaTeX or plain
maths into *inert* sympy trees (only rational arithmetic is carried out, with bounded digits). Two
trees are compared by their values at fixed points at high precision. Work is bounded by counting it
(characters, depth, digits, nodes), never by a clock or a signal: a verdict does not depend on the
thread or the load. Killable workers are the second line of defence.

    score(r"The area is $\boxed{\frac{10}{4}}$.", "2.5") -> 1.0
    is_equivalent("x^2+2x+1", "(x+1)^2") -> True
    answer_classes(["1/2", "0.5", None, "2"]) -> [0, 0, -1, 1]

    python reward.py --explain 'so $x = 5$' '10/2'    # what was found, how it was read, and why
    python reward.py --audit samples.jsonl            # what the checker made of many responses
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import Future
from functools import lru_cache, partial
from itertools import chain, pairwise
from typing import NamedTuple

import sympy
from mpmath.ctx_mp import MPContext
from sympy import Add, Integer, Mul, Pow, Rational, Symbol

# Limits count work. Beyond them an answer is text, equal only to the same text.
MAX_RESPONSE = 100_000  # characters of a response that are read, from its end
MAX_ANSWER = 2_000  # characters (the longest answer of MATH has about 300)
MAX_TOKENS = 500
MAX_DEPTH = 40  # of the parser's recursion
MAX_STEPS = 5_000  # of the parser, which may read a token more than once
MAX_LEAVES = 64  # values of a list, set or matrix (comparing two takes the square of it)
MAX_BITS = 40_000  # of a number that is computed exactly (2004! has 19,000)
MAX_WORK = 40_000  # of one numeric evaluation, see value_at; below 0.1 s
MAX_MAGNITUDE = 1 << 17  # bits before the point in numeric evaluation


# -- problems --------------------------------------------------------------------------------------
# Shapes in which problems are published: the fields of problem, answer, solution (a dot: within). A
# file has the first of them whose problem and answer are in its first line.
SHAPES = (
    ("problem", "answer", "solution"),  # ours; MATH-500; AIME 2024 and 2025, AMC as most have them
    ("question", "answer", "solution"),  # GSM8K (an answer ends in ####); AMC 2023; AIME 2025
    ("Problem", "Answer", "Solution"),  # AIME 2024
    ("prompt", "reward_model.ground_truth", ""),  # DAPO-Math-17k: a prompt is a list of one message
    ("problem", "solution", "solution"),  # AIME 2024 and MATH: the answer is boxed in the solution
)
# What DAPO-Math-17k puts around a problem. It asks for another form of answer than --instruction.
WRAPPED = re.compile(
    r"Solve the following math problem step by step\. .*?\n\n(.*)\n\n"
    r'Remember to put your answer .* "Answer:"\.',
    re.S,
)
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)")
SURROGATE = re.compile("[\ud800-\udfff]")  # stands for half of a character: no text has it
MISSING = object()


class Problem(NamedTuple):
    """A line of a data file."""

    row: int  # 0-based line of the file
    problem: str
    answer: str
    solution: str | None
    require_value: bool
    messages: list | None = None  # a conversation, which a prompt holds as it is


def same_text(problem: str) -> str:
    """The text without spaces and capitals: equal for two problems that differ only in these."""
    return " ".join(problem.casefold().split())


def download(path):
    """The local copy of hf://datasets/OWNER/NAME[@REVISION]/FILE, which huggingface_hub keeps."""
    place = HUB_FILE.fullmatch(path)
    if not place:
        raise ValueError(f"{path}: a file on the Hub is written hf://datasets/OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download  # comes with transformers

    repository, revision, file = place.groups()
    try:
        return hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def fingerprint(path):
    """Size and SHA-256 of a file; of weights, the SHA-256 of their names and shapes only."""
    if path.startswith("hf://"):
        path = download(path)
    with open(path, "rb") as file:
        if path.endswith(".safetensors"):
            header = int.from_bytes(file.read(8), "little")  # bytes
            digest = hashlib.sha256(file.read(header))
        else:
            digest = hashlib.file_digest(file, "sha256")
    return f"{os.path.getsize(path)} bytes, sha256 {digest.hexdigest()[:16]}"


def read_jsonl(path, file):
    with open(file, "rb") as lines:
        for row, line in enumerate(lines):
            try:
                text = line.decode("utf-8-sig")  # -sig: a byte order mark is no part of it
                if text.strip():
                    yield row, json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{row + 1}: not UTF-8 text ({error})") from None
            except ValueError as error:
                message = f"{path}:{row + 1}: not JSON ({error}); write one object a line"
                raise ValueError(message) from None


def read_parquet(path, file):
    try:
        from pyarrow import parquet
    except ImportError:
        message = f"{path}: to read parquet, pip install pyarrow, or turn the file into JSONL"
        raise ValueError(message) from None
    try:
        batches = parquet.ParquetFile(file).iter_batches()
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches))
    except (OSError, ValueError) as error:  # pyarrow's own errors are such
        raise ValueError(f"{path}: {error}") from error


def read_rows(path):
    """(0-based number, object) of each line of a JSONL file or each row of a .parquet file."""
    file = download(str(path)) if str(path).startswith("hf://") else path
    if str(file).endswith(".parquet"):
        return read_parquet(path, file)
    return read_jsonl(path, file)


def field_of(line, name):
    """line["a"]["b"] for the name "a.b", or MISSING."""
    for part in name.split("."):
        line = line.get(part, MISSING) if isinstance(line, dict) else MISSING
    return line


def find_shape(line, shapes, place):
    """The first shape whose problem and answer the line has."""
    for shape in shapes:
        if MISSING not in (field_of(line, shape[0]), field_of(line, shape[1])):
            return shape
    if len(shapes) > 1:
        raise ValueError(
            f"{place}: of no known shape; it has {', '.join(line)}: name two of them with "
            "--problem-field and --answer-field"
        )
    return shapes[0]  # named by the user; read_problem says what is missing


def read_messages(messages):
    """Chat messages with their contents as text, which may be parts; [] if one has no text."""
    read = []
    for message in messages:
        content = field_of(message, "content")
        if isinstance(content, list):
            texts = [field_of(part, "text") for part in content]
            content = MISSING if MISSING in texts else "".join(texts)
        if not isinstance(content, str):
            return []
        read.append(message | {"content": content})
    return read


def read_problem(line, row, shape, place):
    """The problem in a line, its answer as it stands. Fields are refused by file and line."""
    problem, answer, solution = (field_of(line, name) for name in shape)
    messages = []
    if problem and isinstance(problem, list):
        messages = read_messages(problem)
        asked = [m["content"] for m in messages if m.get("role") not in ("system", "assistant")]
        problem = "\n".join(asked) if messages else MISSING
    if type(answer) in (int, float):
        answer = str(answer)
    if solution is MISSING:
        solution = None
    require_value = line.get("require_value", False)
    for name, value, kind, words in (
        (shape[0], problem, str, "text"),
        (shape[1], answer, str, "text or a number"),
        (shape[2], solution, str | None, "text"),
        ("require_value", require_value, bool, "true or false"),
    ):
        if not isinstance(value, kind):
            wrong = "is missing" if value is MISSING else f"is {value!r:.40}"
            raise ValueError(f'{place}: the field "{name}" {wrong}; it must be {words}')
        if isinstance(value, str) and SURROGATE.search(value):
            raise ValueError(f'{place}: the field "{name}" has half a character, such as \\ud83d')
    wrapped = WRAPPED.fullmatch(problem.strip())
    if wrapped:
        problem = wrapped[1]
    if not solution:
        solution = answer if "####" in answer else None
    conversation = messages if len(messages) > 1 else None  # one message is no more than its text
    return Problem(row, problem, answer, solution, require_value, conversation)


def load_problems(
    path, dropped: Counter | None = None, shapes=SHAPES, fraction=1.0, seed=0
) -> list[Problem]:
    """The problems of a file in one of `shapes`, or the part `fraction` that `seed` draws of them.

    Malformed lines are refused by file and line. Counted in `dropped` by reason: answers that are
    empty or over the checker's limits, which no response could earn, and repeated problems."""
    dropped = Counter() if dropped is None else dropped
    problems = []
    answers = {}  # of the problems kept, by same_text
    shape = None
    for row, line in read_rows(path):
        place = f"{path}:{row + 1}"
        if not isinstance(line, dict):
            raise ValueError(f'{place}: not an object; write {{"problem": …, "answer": …}}')
        shape = shape or find_shape(line, shapes, place)
        problem = read_problem(line, row, shape, place)
        text = same_text(problem.problem)
        if text in answers:
            again = answers[text] == problem.answer
            dropped["came before" if again else "came before, with another answer"] += 1
            continue
        answer = reference_answer(problem.answer)
        if not answer:
            dropped["empty answer"] += 1
        elif len(answer) > MAX_ANSWER:
            dropped["answer over the checker's limits"] += 1
        else:
            answers[text] = problem.answer
            problems.append(problem._replace(answer=answer))
    if fraction < 1:
        kept = draw_part(problems, fraction, seed)
        dropped[f"not in the part of {fraction:g}"] += len(problems) - len(kept)
        problems = kept
    return problems


def draw_part(problems, fraction, seed):
    """Each problem gets a random key and the smallest keys are in: a larger part of the same seed
    holds each smaller one."""
    draw = random.Random(seed)
    keys = [draw.random() for _ in problems]
    order = sorted(range(len(problems)), key=keys.__getitem__)
    return [problems[i] for i in sorted(order[: round(fraction * len(problems))])]


# -- find the answer in a response -----------------------------------------------------------------
# No expression here repeats a repetition, and each stops at what begins it: a megabyte of "\(" or
# "$" takes linear time.
BOX = re.compile(
    r"\\(?:(?:begin)?boxed|f(?:rame)?box)\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]",
    re.S,
)
# The inside of a formula: no other delimiter, no empty line.
INSIDE = r"(?:\\(?![()\[\]]).|[^$\\\n]|\n(?![ \t]*\n))+"
# A dollar that a space follows closes no formula: "it costs $5 and $6" has none.
FORMULA = re.compile(
    rf"\\\$|\$\$({INSIDE})\$\$|\$(?!\s)({INSIDE})(?<!\s)\$|\$(?=\s)({INSIDE})\$"
    rf"|\\[(\[]({INSIDE})\\[)\]]",
    re.S,
)
# The name of a part: (b), b), Part (b):, 2., (ii)
PART = r"(?:[Pp]art )?\(?\b(?:(?:[b-h2-8]|i{1,3}v?)\)|[2-8]\.):?"
# Between two boxes or formulas that are one answer: spaces, a comma, "and", "or", a short \text,
# the name of a part.
JOIN = re.compile(
    r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad|\\(?:text|mbox)\{[^{}]{0,40}\}|\band\b|\bor\b"
    rf"|[.:](?=\s{{0,3}}{PART})|{PART})*"
)
NUMBER = re.compile(
    r"(?<![A-Za-z\d._^)])[-−‑]?(?<![A-Za-z\d._])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
    r"(?:\s?\\?%|[⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀-₉]+)?"
    r"|(?<!\d)\.\d+"
    r"|-?\\[dt]?frac\{\d+\}\{\d+\}"
)
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
LETTER = re.compile(
    r"\b(?i:it'?s|is|be|est|choose|option|choice|pick|select)\s?:?\s?[(*]{0,3}([A-J])(?![A-Za-z0-9'])"
    r"|\A\W{0,3}([A-J])(?=[.,:;)*]|\s*\Z|[^\x00-\x7f])"
)
CLAUSE_LETTER = re.compile(
    r"(?:^|(?<=[\s(]))(?P<letter>[A-J])(?=$|[\s,.):])(?! [a-z])|^(?P<subject>[B-J]) [a-z]{3}"
)
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>")
SENTENCE_END = re.compile(r"(?<!\.)[.!?](?:\s|$)|[。！]")
# What keeps a number behind it from being the answer: not 7, between 3 and 5, x \oplus 3 …
HEDGE = re.compile(
    r"\b(?:not|cannot|never|neither|nor|either|between|at (?:least|most)|or|except"
    r"|(?:more|less|fewer|greater) than)\b|n't\b|\\[a-z]+\s*$|[-+*/^_×·]\s*$",
    re.I,
)
NEGATED = re.compile(r"(?:\b(?:not|never|cannot|between \S+ and)|n't)(?:\s+be)?\s*[$*]*$")
# … and in front of it: 3 or 5, 5 \oplus 3.
CONTINUED = re.compile(
    r"\s*(?:[^\w\s,;:.(){}\]$%°\"'*/–—-]|[-–—*]\s*\d|or\b|(?:to|plus|minus) [\d\\$])",
    re.I,
)


class Piece(NamedTuple):
    """A box or formula of a response."""

    start: int
    end: int
    content: str


def after_thinking(text, in_thought=False):
    """The reply after the last </think>; None while a thought is open, which the prompt may have
    opened (in_thought)."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed or (in_thought and closed < 0):
        return None
    return text[closed + len("</think>") :] if closed >= 0 else text


def find_boxes(text: str) -> list[Piece]:
    r"""Every complete outermost box: those of 2 and 3 in "\boxed{\frac12}, \boxed 3, \boxed{4"."""
    boxes = []
    opened = []  # a box's start and content's start; None: a brace
    for token in BOX.finditer(text):
        if token["bare"]:
            boxes.append(Piece(token.start(), token.end(), token["bare"]))
        elif token["open"]:
            opened.append((token.start(), token.end()))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            box = opened.pop()
            if box is None:
                continue
            start, inside = box
            while boxes and boxes[-1].start > start:  # boxes inside this one
                boxes.pop()
            boxes.append(Piece(start, token.end(), text[inside : token.start()]))
    return [box for box in boxes if box.content.strip()]


def find_formulas(text):
    r"""Each $…$, $$…$$, \(…\), \[…\]; a lone dollar is money: "$5, then $x=2$" has "x=2"."""
    found = (match for match in FORMULA.finditer(text) if match.lastindex)
    return [Piece(*match.span(), match[match.lastindex]) for match in found]


def last_answers(pieces, text):
    r"""The last piece and those that only "and" or a comma joins to it: "\boxed1. \boxed2 and
    \boxed3" -> "2, 3"."""
    joined = pieces[-1:]
    for piece in reversed(pieces[-MAX_TOKENS:-1]):
        gap = text[piece.end : joined[0].start]
        new_paragraph = "\n\n" in gap and not re.search(PART, gap)
        if len(gap) > 80 or new_paragraph or not JOIN.fullmatch(gap):
            break
        joined.insert(0, piece)
    contents = [piece.content.strip() for piece in joined]
    if len(set(contents)) == 1:  # said twice
        return contents[0] or None
    return ", ".join(contents) or None


def is_readable(text):
    r"""True for mathematics: "3 apples", "\frac12"; not for "red" or "3 +"."""
    return bool(text) and not isinstance(parse(text).value, str | None)


def last_match(pattern, text):
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def from_clause(pattern, text):
    """What follows "Answer:" or "the answer is": " **12 apples**. I hope" -> "12 apples"; " for
    sure D, as" -> "D"."""
    match = last_match(pattern, text)
    if not match:
        return None
    line = text[match.end() :][:MAX_ANSWER].lstrip(" *:\r\n").partition("\n")[0].strip()
    sentence = SENTENCE_END.split(line, maxsplit=1)[0].strip(" *\"'`")
    letter = CLAUSE_LETTER.search(sentence)
    if not (letter and letter["subject"]):
        formulas = last_answers(find_formulas(line), line)
        for candidate in (sentence, formulas, from_bold(line)):
            if is_readable(candidate):
                return candidate
    if letter:
        return letter["letter"] or letter["subject"]
    numbers = [*NUMBER.finditer(sentence)]
    if numbers:  # "42, since 6 x 7 = 42", but "Jane started 3 hours ago"
        number = numbers[0] if numbers[0].start() == 0 else numbers[-1]
        before = sentence[max(0, number.start() - 40) : number.start()]
        hedged = HEDGE.search(before) and not before.rstrip(" $").endswith("=")
        hedged = hedged or CONTINUED.match(sentence, number.end())
        return sentence if hedged else number[0]
    return sentence if 0 < len(sentence.split()) <= 5 else None


def from_bold(text):
    """The last bold piece if it is mathematics: "**Note**: it is **92**" -> "92"."""
    bold = last_match(BOLD, text)
    content = bold[1].strip(" .") if bold else None
    return content if is_readable(content) else None


def from_letter(text):
    """A choice in prose, if no number follows: "It's not A, so I think it's B" -> "B"."""
    match = last_match(LETTER, text)
    if not match or re.search(r"[\d$]", text[match.end() :]):
        return None
    return match[1] or match[2]


def from_formula(text):
    """The last formula, if it is readable and no number follows one that is a mere symbol."""
    formulas = find_formulas(text)
    answer = last_answers(formulas, text)
    if not is_readable(answer):
        return None
    if not re.search(r"\d", answer) and NUMBER.search(text, formulas[-1].end):
        return None
    return answer


def from_number(text):
    """The last number, unless it is negated: "it is not 7"."""
    match = last_match(NUMBER, text)
    if not match or NEGATED.search(text, max(0, match.start() - 40), match.start()):
        return None
    return match[0].strip()


def from_box(text):
    return last_answers(find_boxes(text), text)


def last_group(pattern, text):
    """What the pattern's group holds where it matches last."""
    match = last_match(pattern, text)
    return match[match.lastindex or 0].strip() if match else None


def clause(pattern):
    """A rule: what follows the last match of this pattern."""
    return partial(from_clause, re.compile(pattern, re.I))


def last(pattern):
    """A rule: the group of the last match of this pattern."""
    return partial(last_group, re.compile(pattern, re.S))


ANSWER = r"(?:answer|réponse|respuesta|resposta|risposta|antwort|ответ|答案|答え|答)"
IS = r"(?:\b(?:is|are|est|es|ist|è|é)\b|是|为|為|は)"
RULES = {  # in the order of trust: the first rule that finds something decides
    "box": from_box,  # the last complete \boxed{…}: what prompts ask for
    "tag": last(r"<answer>((?:(?!</?answer>).)+)</answer>"),  # the other format of prompts
    # "Answer: …" stands for nothing else.
    "label": clause(rf"{ANSWER}\s?(?:\*\*|\}})?\s?[:：=]\s?(?:\*\*|\}})?"),
    "final": clause(r"final (?:answer|result) (?:is|are|=)\s?:?"),  # said once, at the end
    "hashes": last(r"####[\s:]*([^\n]+)"),  # GSM8K's own format
    # "The answer is …" may also be said of a part.
    "phrase": clause(rf"(?:{ANSWER}|solution|result)[^\n.:：$]{{0,40}}?{IS}\s?:?"),
    "bold": from_bold,  # what the model itself stresses, if it can be read as an answer
    "letter": from_letter,  # it's (B): only if no number follows
    "formula": from_formula,  # usually the result; two points better than the last number
    "number": from_number,  # the last number: a guess
}
# What may find an answer in a sentence that stands in a box.
INNER_RULES = ("label", "final", "hashes", "phrase", "bold", "letter", "formula")


class Found(NamedTuple):
    """The answer of a response, and the name of the rule that found it ("none": no rule did)."""

    answer: str | None
    rule: str


def find_answer(text: str, in_thought: bool = False) -> Found:
    """The answer by the first rule that finds one. A sentence in a box is read by INNER_RULES."""
    reply = after_thinking(text, in_thought) if isinstance(text, str) else None
    if not reply:
        return Found(None, "none")
    reply = SPECIAL.sub("\n", reply[-MAX_RESPONSE:])
    for name, rule in RULES.items():
        answer = rule(reply)
        if not answer:
            continue
        if name == "box" and not is_readable(answer):
            label = RULES["label"](reply[find_boxes(reply)[-1].end :])
            if label and re.fullmatch(
                r"\(?[A-J]\)?", label
            ):  # a statement in a box, then "Answer: D"
                return Found(label, "label")
            if parse(answer).value is None:  # perhaps a sentence
                inner = (RULES[other](answer) for other in INNER_RULES)
                answer = next(filter(None, inner), answer)
        return Found(answer, name)
    return Found(None, "none")


def extract_answer(text: str, in_thought: bool = False) -> str | None:
    r"""The final answer of a response, or None; never the whole response: "so $x=\boxed{\frac12}$."
    -> "\frac12"."""
    return find_answer(text, in_thought).answer


def reference_answer(text: str) -> str:
    """The answer in a reference, which may be bare, in dollars, boxed, or a whole solution that
    ends in #### or "the final answer is"."""
    for rule in ("box", "hashes", "final"):
        answer = RULES[rule](text)
        if answer:
            return answer
    return text.strip()


# -- normalise -------------------------------------------------------------------------------------
GREEK = str.split(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega Pi"
)


def greek_letter(name):
    """The letter of a LaTeX name: "alpha" -> "α"."""
    size = "SMALL" if name.islower() else "CAPITAL"
    return unicodedata.lookup(f"GREEK {size} LETTER {name.upper().replace('LAMB', 'LAM')}")


def read_table(text):
    """Lines of our spelling and those of others -> {each of the others: ours}."""
    lines = map(str.split, text.strip().splitlines())
    return {spelling: ours for ours, *spellings in lines for spelling in spellings}


# Our spelling of each sign. Words get a space on both sides.
SIGNS = {
    **read_table(r"""
- − – — ‐ ‑ ⁃ ﹣
* × · ⋅ ∙ ∗
/ ÷ ∕ ⁄
<= ≤ ⩽
>= ≥ ⩾
!= ≠
~ ≈
\$ € £ ¥ ₹
' ’ ′
° º
. 。
, 、
( ⟨
) ⟩
inf ∞
pi π
cents ¢
\sqrt √
\sqrt[3] ∛
\cup ∪
\setminus ∖
\emptyset ∅
\mathbb{R} ℝ
\mathbb{Z} ℤ
\mathbb{N} ℕ
\pm ±
\angle ∠
\equiv ≡
\lfloor ⌊
\rfloor ⌋
\lceil ⌈
\rceil ⌉
"""),
    **{greek_letter(name): f"\\{name}" for name in GREEK},
    **{sign: unicodedata.normalize("NFKC", sign) for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"},
}
SIGNS = str.maketrans(
    {sign: f" {new} " if len(new) > 2 or new == "pi" else new for sign, new in SIGNS.items()}
    | {'"': " ", "\u200b": "", "\ufeff": ""}
)
SIMPLE = re.compile(r"[-+\d/ ]*(?:\.\d+)?")  # has nothing to rewrite
# Runs of raised and lowered signs: 10¹², x₁, 101₂.
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
RAISED_FRACTION = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+[⁄/][₀₁₂₃₄₅₆₇₈₉]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED_THOUSANDS = re.compile(
    r"(?<![\d.])\d{1,3}(?:(?:\\[,;:! ]\s?|\{,\}|,\\!\s?|[ \u00a0\u202f])\d{3})+(?!\d)"
)
EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3}){2,}|-?\d{1,3}(?:\.\d{3})+,\d+")
TEXT = re.compile(
    r"\\(?:text|mbox|hbox|mathrm|mathsf|mathbf|operatorname)(?:bf|it|rm|normal|tt)?\s*\{([^{}]*)\}"
)
# What other spellings mean in ours: "pattern ==> replacement", in this order. No replacement is a
# space.
REWRITES = r"""
# the parts (a) 12, (b) 5 or (1) 12; (2) 5
^\W*(?:text\{)?\([a1i]\)[}\s]*(.+?)[,;.\s]{1,3}(?:\\text\{ ?)?\((?:b|2|ii)\)[}\s]*(.+)$ ==> \1, \2
^(.+, .+?)[,;.\s]{1,3}(?:\\text\{ ?)?\((?:c|3|iii)\)[}\s]*(.+)$ ==> \1, \2
# a remark behind an answer: 25 (attained at x = 5)
\\(?:text|mbox)\s*\{\s*(?=\((?:which|attained|achieved|reached|when|at|since|where|as|by)\b) ==>
(?<=[\d})a-z])\s*\((?:which is )?(?:attained|achieved|reached|occurs|obtained)\b.*\)\s*\}?\s*$ ==>
(?<=[\d})a-z])\s*\((?:when|at|since|because|where|as|by|double root)\b.*\)\s*\}?\s*$ ==>
(?<=[\d})])\s*,?\s*\\text\{\s*,?\s*(?:attained |achieved )?(?:when|at)\b[^{}]*\}.*=.*$ ==>
(?<=\d)\s*(?:\\ )?\([a-z]\s*=[^()]*\)$ ==>
# dots; 0.333... and 0.1(6) repeat, 3.14159... is rounded
(\.\s?){3,} ==> \\ldots
(?<=[.\d])(\d)\1{1,30}\s?\\[cl]?dots ==> \\overline{\1}
(\d\.\d+)\s?\\[cl]?dots\s*$ ==> \1
(\d*\.\d*)\((\d+)\) ==> \1\\overline{\2}
# a doubled backslash, unless it ends a row
(?<!\\)\\\\(?=[A-Za-z])(?![\s\S]*\\end) ==> \\
\\(?:left|right)\s*\.|\\[()\[\]](?!\d+(?:pt|em))|\\q?quad ==>
(?:\{\s*\})?\^\s*\{?\s*\\circ\s*\}? ==> °
°\s*([CF])\b ==> °"\1"
\\mathbb\s*\{?\s*R\s*\}?|(?i:\ball real numbers\b) ==> ℝ
(?:\\text\{\s*)?ℝ,?\s*except\s*(?:for)?\s*\}?\s*(?:[a-z]\s*=)?\s*([^{}]+)$ ==> ℝ\\setminus\\{\1\\}
ℝ\s*-\s*(?=\\\{) ==> ℝ\\setminus
# 1.5 x 10^3, (0,1) U (2,3), x in (0,1), log2(8), option B, 3 square feet, 10:45 a.m.
(?<=\d)\s*[xX]\s*(?=10\s?\^) ==> *
(?<=[)\]}])\s*U\s*(?=[(\[\\]) ==> \\cup
(?<!\\)\bin\b(?=\s*[(\[{\\]) ==> ∈
\blog(\d+)\( ==> log_{\1}(
(?i:^\W{0,3}(?:option|choice)\s+)(?=\W?[A-J]\W?$) ==>
\b(?:square|sq\.?) ([A-Za-z]+) ==> \1^2
(?i:\b([ap])\.m\b\.?) ==> \1m
# 3{:}45, 1{.}234, {10 \choose 3}, x^2_1, \color{red}
\{\s*([:.])\s*\} ==> \1
(?:\{\s*\})?[_^]\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}? ==> \\binom{\1}{\2}
\{\s*([^{}\\]+)\\choose\b\s*([^{}\\]+)\} ==> \\binom{\1}{\2}
([A-Za-z])\^(\w|\{[^{}]*\})\s*_(\w|\{[^{}]*\}) ==> \1_\3^\2
\\(?:text)?color\s*\{[^{}]*\} ==>
# rows: \left\{ that \right. closes; a comma or point at the end
\\left\s*\\\{\s*(?=\\begin) ==>
[.,;]\s*(?=\\\\(?!\w)|\\end\b|&) ==>
# (1010)_2, 1010_{(2)}, 1010_{\text{two}}, 1010 (base 2)
\((\d\w*)\)\s*_ ==> \1_
_\{\(?(\d+)\)?\} ==> _{\1}
_\{\\text\{base \}\s*(\d+)\} ==> _{\1}
\s*(?:\\text\s*\{)?\s*\(?\s*(?:in )?base\s+(\d+)\s*\)?\s*\}?$ ==> _{\1}
_\s*\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\} ==> _{\1}
_\{?two\}? ==> _2
_\{?eight\}? ==> _8
_\{?ten\}? ==> _{10}
# 3 to 4; is congruent to; 14 March; two-thirds; bold unit vectors; ohms; constants of Maxima
^(\W{0,9}\d+)\s*(?:\\text\{)?\s*(?:is )?to\s*\}?\s*(\d+\W{0,3})$ ==> \1:\2
(?i:\bis congruent to\b) ==> \\equiv
\b(\d\d?)(?:st|nd|rd|th)?(?: of)? ((?:Jan|Febr)uary|March|April|May|June|July|August)\b ==> \2 \1
\b(\d\d?)(?:st|nd|rd|th)?(?: of)? ((?:Septem|Octo|Novem|Decem)ber)\b ==> \2 \1
((?:uary|March|April|May|June|July|August|ber)) (\d\d?)(?:st|nd|rd|th)\b ==> \1 \2
(?i)\b(one|two|three|four|five|six|seven)-(\w*(?:ths?|thirds?|half|halves|quarters?))\b ==> \1 \2
\\(?:mathbf|hat|vec|bm|boldsymbol)\s*\{?\s*\\?([ijk])(?:math)?\b\s*\}? ==> \1_{unit}
(?<=\d)(?:\\[,;: ]|[\s~])*\\(?:Omega|ohm)\b ==> "ohm"
\\frac\{\\(?:text|mathrm)\{(\w+)\}\}\{\\(?:text|mathrm)\{(\w+)\}\} ==> \\text{\1/\2}
%(?=pi\b|[ei]\b) ==>
# families: where k ∈ ℤ; k is an integer; (k ∈ ℤ)
[,;]?\s*(?:\\text\s*\{\s*)?,?\s*(?:where|for|with)\b\s*\}?(?=\s*[a-z]\s*(?:\\in\b|\\text|is)) ==> ,
[,;]?\s*(?:\\text\s*\{\s*)?,?\s*for (?:all|any|some)\b\s*\}?(?=\s*[a-z]\s*\\in\b) ==> ,
([a-z])\s*(?:\\text\s*\{\s*)?(?:is )?an(?:y)? integer\s*\}?$ ==> \1 \\in Z
,?\s*(?:\\text\s*\{\s*)?for (?:all|any|some) integers?\s*\}?\s*([a-z])$ ==> , \1 \\in Z
(?:[,;]|\\[ ,;:])?\s*\(\s*([a-z]\s*\\in\b[^()]*)\)\s*$ ==> , \1
"""
REWRITES = [
    (re.compile(pattern), new.strip() or " ")
    for pattern, separator, new in (line.partition(" ==>") for line in REWRITES.splitlines())
    if separator
]


def quote_words(match):
    r"""\text{ square cm} -> "square" "cm"; a single letter (\text{C}) stays mathematics unless it
    is a unit."""
    return " " + re.sub(r"[A-Za-z]{2,}|[mgshL]|\ba(?= [a-z]{2})", r'"\g<0>"', match[1]) + " "


# A unit behind a number: 5\ \mathrm{N}, 12\,\text{kg\cdot m/s}.
UNIT_TEXT = re.compile(
    r"(?<=[\d})°])(?:\\[,;:! ]|[\s~])*\\(?:text|mbox|mathrm|textrm|operatorname|rm)\s*"
    r"(?:\{([^{}]*)\}|([A-Za-z])\b)"
)


def quote_unit(match):
    r"""As quote_words, but single letters that are units are quoted, too: "kg" \cdot "m" / "s"."""
    content = match[1] or match[2] or ""
    return " " + re.sub(r"(?<!\\)\b(?:[A-Za-z]{2,}|[NJWVACFKTmgshL])\b", r'"\g<0>"', content) + " "


def normalise(text: str, thousands: bool = True) -> str:
    r"""Undo what does not change the mathematics: "$1,234.50$." -> "1234.50", "12\,345" -> "12345",
    "3½" -> "3 1/2"."""
    text = RAISED_FRACTION.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = LOWERED.sub(r"_{\g<0>}", RAISED.sub(r"^{\g<0>}", text))
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).replace("⁄", "/")
    text = text.replace("\u2212", "-").replace(r"\$", ' "dollar" ').replace("$", " ")
    text = re.sub(r"\s+", " ", text)  # one space: the rules below take linear time
    text = COMPOUND_NUMBER.sub(
        lambda match: str(int(DIGITS[match[1].lower()]) + int(DIGITS[match[2].lower()])), text
    )
    for pattern, new in () if SIMPLE.fullmatch(text) else REWRITES:
        text = pattern.sub(new, text)
    text = UNIT_TEXT.sub(quote_unit, text)
    text = TEXT.sub(quote_words, text)
    text = SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(r"(?<!\\)\\[,;:!\s]", " ", text).strip().rstrip("\\.,; \n\t")
    # inside brackets a comma separates values
    if thousands and not re.search(r"[(\[]|\\\{|\\lbrace", text):
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if EUROPEAN.fullmatch(text):
        text = text.replace(".", "").replace(",", ".")
    return text


# -- tokens ----------------------------------------------------------------------------------------
FUNCTIONS = {  # our name -> sympy's
    "ln": "log",
    "lg": "log",
    "abs": "Abs",
    "ceil": "ceiling",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arccot": "acot",
    "sgn": "sign",
    "cis": "cis",
    **{
        name: name
        for name in str.split(
            "sin cos tan cot sec csc sinh cosh tanh asin acos atan log exp sqrt floor binomial"
        )
    },
}
CONSTANTS = {
    "pi": sympy.pi,
    "e": sympy.E,
    "i": sympy.I,
    **dict.fromkeys(("inf", "infinity", "oo"), sympy.oo),
}
KNOWN = {*FUNCTIONS, *CONSTANTS, *GREEK}


class Token(NamedTuple):
    """A piece of an answer. An operator that is a LaTeX command keeps its backslash, so that no
    word can be one."""

    kind: str  # number; name (symbol, function, constant); text (word); op; command (unknown); end
    text: str


TOKEN = re.compile(
    r"(?P<space>\s+|~(?=\\|\s))"
    r"|(?<![\^_])(?P<mixed>\d+(?:\s+\d+\s?/\s?\d+|\s*\\[dt]?frac\s?(?:\{\d+\}|\d)\s?(?:\{\d+\}|\d)))"
    r"(?![\d.])"
    r"|(?P<number>\d*\.\d*\\(?:overline|bar|dot)\{\d+\}"
    r"|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
    r"|\\(?P<bracket>(?:begin|end)\{[a-z]+\*?\})(?:\{[lcr| ]*\})?"
    r'|\\(?P<command>[A-Za-z]+|.)|"(?P<text>[A-Za-z]+)"'
    r"|(?P<subscript>_\s*(?:[A-Za-z0-9]|\{[A-Za-z0-9,\s]+\}))|(?P<word>[A-Za-z]+)"
    r"|(?P<op>\*\*|<=|>=|<>|!=|==|=<|=>|[-+*/^_=<>!%|(){}\[\],;:&'°ℝ~∈≡])",
    re.S,
)


DROPPED = str.split(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle "
    "scriptstyle limits nolimits mathbb mathbf boldsymbol bm vec mathit mathrm mathtt operatorname "
    "textsf emph underline rm bf it space large Large LARGE huge Huge small normalsize"
)
# Each command (without its backslash) or sign -> our spelling of it.
SPELLINGS = dict.fromkeys(DROPPED, "") | read_table(r"""
\frac dfrac tfrac cfrac
\binom dbinom tbinom
\setminus backslash
\emptyset varnothing
\{ { lbrace
\} } rbrace
/ div
* cdot times ast
<= le leq leqslant =<
>= ge geq geqslant =>
< lt
> gt
!= ne neq <>
~ approx simeq
= ==
| lvert rvert vert mid
( langle
) rangle
° degree
∈ in
≡ equiv
\mod pmod bmod pod mod modulo
, land lor
: colon
' prime
^ **
% %
phi varphi
epsilon varepsilon
inf infty
\ldots dots cdots dotsc
""")
LONG_NAMES = sorted((name for name in KNOWN if len(name) > 1), key=len, reverse=True)
GLUED = re.compile(rf"({'|'.join(LONG_NAMES)})([A-Za-z]{{1,2}})$")  # sinx, lnx, pir
NUMBER_WORDS = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = str.split("twenty thirty forty fifty sixty seventy eighty ninety")
DIGITS = {
    **{word: str(value) for value, word in enumerate(NUMBER_WORDS)},
    **{word: f"{value}0" for value, word in enumerate(TENS, 2)},
}
COMPOUND_NUMBER = re.compile(rf"\b({'|'.join(TENS)})[- ]({'|'.join(NUMBER_WORDS[1:10])})\b", re.I)
WORDS = {*str.split("yes no not are sum was but since")}  # no products of letters
WORD_OPERATORS = {"mod": "\\mod", "modulo": "\\mod", "negative": "-", "minus": "-"}
MATRICES = ("matrix", "pmatrix", "bmatrix")
ROWS = str.split("array cases aligned align align* alignat gathered split")
BRACKETS = {  # each with what may close it
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}",),
    "\\{": ("\\}",),
    "\\lfloor": ("\\rfloor",),
    "\\lceil": ("\\rceil",),
    **{f"begin{{{name}}}": (f"end{{{name}}}",) for name in (*MATRICES, *ROWS)},
}
CLOSING = {*chain.from_iterable(BRACKETS.values())}
# Operators that begin a value.
PREFIXES = {*BRACKETS, "\\frac", "\\binom", "\\sum", "\\prod", "\\emptyset"}
OPERATORS = PREFIXES | CLOSING | {*str.split(r"\cup \setminus \\ \pm \mp \mod")}
UNITS = read_table("""
cm cm centimeter centimetre
mm mm millimeter millimetre
km km kilometer kilometre
m m meter metre
ft ft foot feet
in in inch inche
yd yd yard
mi mi mile
kg kg kilogram
g g gram
mg mg milligram
lb lb pound
oz oz ounce
s s sec second
min min minute
h h hr hour
day day
week week
month month
mol mol
mi/h mi/h mph
/ / per
year year yr
L L l liter litre
mL mL ml milliliter
dollar dollar usd buck
cent cent
deg deg degree
rad rad radian
gallon gallon
N N newton
J J joule
W W watt
V V volt
A A amp ampere
C C coulomb celsius
F F fahrenheit farad
K K kelvin
T T tesla
Pa Pa pascal
Hz Hz hertz
kN kN kilonewton
kJ kJ kilojoule
kW kW kilowatt
kV kV kilovolt
kPa kPa kilopascal
% % percent pct percentage
am am
pm pm
""")
VALUE_WORDS = {*str.split("doubled tripled halved less below gross score tens wrong incorrect")}
UNIT_SIGNS = {*"^/*123{}-"}


def unit_name(word):
    """The unit that a word spells: "Inches" -> "in"; None for other words."""
    word = word if word in UNITS else word.lower()
    singulars = (word, word.removesuffix("s"), word.removesuffix("es"))
    return next((UNITS[name] for name in singulars if name in UNITS), None)


class Unparsed(ValueError):
    """Not in our grammar, or beyond the limits: the answer stays text."""


def tokenise(text: str) -> list[Token]:
    r"""LaTeX and plain maths in one spelling: "\dfrac12\cdot xy" -> \frac 1 2 * x y."""
    tokens = []
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise Unparsed(f"{text[position]!a} is not mathematics")
        if len(tokens) > MAX_TOKENS:
            raise Unparsed("too long")
        position = match.end()
        kind = match.lastgroup
        if kind != "space":
            before = tokens[-1] if tokens else Token("op", "")
            tokens += read_token(kind, match[kind], before)
    return tokens


def read_token(kind, value, before):
    """The tokens of one match of TOKEN; `before` is the token before it."""
    if kind == "word":
        return split_word(value, before)
    if kind == "text":
        return [read_quoted(value)]
    if kind == "command":
        return read_command(value)
    if kind == "number" and value.isdigit() and before.text == "\\frac":  # \frac12 is 1/2
        return [Token("number", digit) for digit in value]
    if kind == "subscript":
        return [Token(kind, re.sub(r"[\s{}]", "", value))]
    if kind == "mixed":
        return [Token("number", value)]
    if len(value) == 2:  # ** and such
        value = SPELLINGS.get(value, value)
    return [Token("op" if kind == "bracket" else kind, value)]


def read_quoted(word):
    r"""A word of \text{…}."""
    if word in DIGITS:
        return Token("number", DIGITS[word])
    if word in WORD_OPERATORS:
        return Token("op", WORD_OPERATORS[word])
    return Token("name" if word in KNOWN else "text", word)


def read_command(name):
    r"""A LaTeX command: \pi is a name, \cdot an operator, \left nothing, \foo unknown."""
    spelling = SPELLINGS.get(name)
    if spelling is None:
        spelling = name if name in KNOWN else f"\\{name}"
    if spelling in KNOWN:
        return [Token("name", spelling)]
    if spelling[:1] == "\\" and spelling not in OPERATORS:
        return [Token("command", spelling)]
    return [Token("op", spelling)] if spelling else []


def split_word(word, before):
    """A run of letters: a known name, a unit after a number, "sinx", a product of up to three
    letters, or a word."""
    if len(word) == 1 or word in KNOWN:
        return [Token("name", word)]
    lower = word.lower()
    if lower in DIGITS:
        return [Token("number", DIGITS[lower])]
    if lower in ("and", "or"):
        return [Token("text", lower)]
    if lower in WORD_OPERATORS:
        return [Token("op", WORD_OPERATORS[lower])]
    after_number = before.kind == "number" or before.text in (")", "}", "/")
    if before.kind == "text" or lower in WORDS or (after_number and unit_name(word)):
        return [Token("text", word)]
    glued = GLUED.match(word)
    if glued:
        return [Token("name", part) for part in (glued[1], *glued[2])]
    if len(word) > 3:
        return [Token("text", word)]
    return [Token("name", letter) for letter in word]


# -- values, and the arithmetic that builds them ---------------------------------------------------
class Leaf(NamedTuple):
    """A number or expression: 0.5, 5 cm, x + 1."""

    expr: sympy.Expr  # an inert tree
    approximate: bool = False  # holds a decimal that is no integer
    unit: str = ""  # a known unit, "%" for a percentage
    modulus: sympy.Expr | None = None  # of 3 (mod 7)


class Seq(NamedTuple):
    """A collection: (1,2), [0,1), {1,2}, "1, 2", a union, a matrix."""

    # By its brackets "()" "[]" "(]" "[)"; "set"; "list" (bare); "and", "or" (of conditions);
    # "union"; "matrix" (of rows, or a vector); "ratio"; "builder" {3k | k ∈ ℤ} and "family"
    # 3k, k ∈ ℤ (the template and a list of conditions); "cases" (pairs of value and condition).
    kind: str
    items: tuple


class Relation(NamedTuple):
    """A chain of values: x = 5, a = b = 3, 1 < x <= 2, x + y = 7."""

    sides: tuple  # values; a str for a side in words ("Area = 5")
    ops: tuple  # "=", "<", "<=", "!=", "∈"; a chain that begins with > is turned round


def is_kind(value, *kinds: str):
    return isinstance(value, Seq) and value.kind in kinds


def is_rational(value):
    expr = value.expr if isinstance(value, Leaf) else value
    return getattr(expr, "is_Rational", False)


def bits(value):
    """The size of a fraction: 7/2 -> 3 + 2."""
    return value.p.bit_length() + value.q.bit_length()


MIXED_NUMBER = re.compile(r"(\d+)(?:\s+|\s*\\\w*?frac\D*)(\d+?)\D*?(\d+)\}?")


def parse_number(text):
    r"""1.50 -> 3/2, .5e3 -> 500, 0.1\overline{6} -> 1/6, 1\frac45 -> 9/5."""
    mixed = MIXED_NUMBER.fullmatch(text)
    if mixed:
        whole, top, bottom = (Integer(int(part)) for part in mixed.groups())
        fraction = divide(top, bottom)
        return whole + fraction if fraction < 1 else whole * fraction
    decimal, _, period = text.partition("\\")
    mantissa, _, exponent = decimal.lower().partition("e")
    if len(exponent) > 5:
        raise Unparsed("exponent too large")
    value = Rational(f"{mantissa}0" if "." in mantissa else mantissa)
    if exponent:
        value *= Integer(10) ** int(exponent)
    if period:
        digits = re.sub(r"\D", "", period)
        places = len(mantissa.partition(".")[2])
        value += Rational(int(digits), (10 ** len(digits) - 1) * 10**places)
    return value


def number_in_base(digits, base):
    """52 in base 8 -> 42."""
    if base not in map(str, range(2, 11)) or not {*digits} <= {*"0123456789"[: int(base)]}:
        raise Unparsed("not a number in that base")
    return Integer(int(digits, int(base)))


def combine(kind, neutral, *items):
    """An inert sum or product whose rational part is computed: 1 + x + 2 -> x + 3."""
    rational = Integer(neutral)
    rest = []
    for item in items:
        for part in item.args if item.func is kind else (item,):
            if not part.is_Rational:
                rest.append(part)
                continue
            rational = rational + part if kind is Add else rational * part
            if bits(rational) > MAX_BITS:
                raise Unparsed("number too large")
    if not rest or (kind is Mul and rational == 0):
        return rational
    if rational != neutral:
        rest.append(rational)
    return kind(*rest, evaluate=False) if len(rest) > 1 else rest[0]


add = partial(combine, Add, 0)
multiply = partial(combine, Mul, 1)


def negate(value):
    return multiply(value, Integer(-1))


def power(base, exponent):
    """Computed only where exact and small: 2^-3 -> 1/8, (4/9)^(3/2) -> 8/27; 2^(1/2) stays."""
    if base.is_Rational and exponent.is_Rational:
        if base == 0 and exponent <= 0:
            raise Unparsed("0 to a power that is not positive")
        if abs(base) not in (0, 1) and bits(base) * abs(exponent) > MAX_BITS:
            raise Unparsed("power too large")
        if exponent.q == 1:
            return base**exponent
        if base >= 0 and exponent.q <= 100:
            top, top_is_exact = sympy.integer_nthroot(base.p, exponent.q)
            bottom, bottom_is_exact = sympy.integer_nthroot(base.q, exponent.q)
            if top_is_exact and bottom_is_exact:
                return Rational(top, bottom) ** exponent.p
    return Pow(base, exponent, evaluate=False)


def divide(numerator, denominator):
    """6, 4 -> 3/2; x, 2 -> x * 1/2."""
    if denominator == 0:
        raise Unparsed("division by zero")
    return multiply(numerator, power(denominator, Integer(-1)))


def root(value, index):
    r"""The real root of a negative number where the index is odd: \sqrt[3]{-8} -> -2."""
    exponent = divide(Integer(1), index)
    if value.is_Rational and value < 0 and index.is_Integer and index.p % 2:
        return negate(power(-value, exponent))
    return power(value, exponent)


def factorial(n):
    if not n.is_Rational:
        return sympy.factorial(n, evaluate=False)
    if not n.is_Integer or not 0 <= n <= 3_000:
        raise Unparsed("factorial out of range")
    return Integer(math.factorial(int(n)))


def binomial(n, k):
    if not (n.is_Rational and k.is_Rational):
        return sympy.binomial(n, k, evaluate=False)
    if not (n.is_Integer and k.is_Integer) or not 0 <= k <= n <= 20_000:
        raise Unparsed("binomial out of range")
    return Integer(math.comb(int(n), int(k)))


def apply_function(name, *values):
    """A function by its name: ln x, |x|, floor(7/2) -> 3, binomial(5, 2) -> 10."""
    name = FUNCTIONS.get(name, name)
    if len(values) != (2 if name == "binomial" else 1):
        raise Unparsed(f"{name} of {len(values)} values")
    if name == "binomial":
        return binomial(*values)
    (value,) = values
    if name == "sqrt":
        return root(value, Integer(2))
    if name == "exp":
        return power(sympy.E, value)
    if name == "cis":
        return power(sympy.E, multiply(sympy.I, value))
    exact = value.is_Rational and name in OF_REALS
    return getattr(sympy, name)(value, evaluate=exact)


def as_expr(value):
    """The sympy tree of a value in arithmetic."""
    expr = value.expr if isinstance(value, Leaf) else value
    if not isinstance(expr, sympy.Expr):
        raise Unparsed("arithmetic on what is not a number")
    return expr


def scale(value, factor):
    """A number times a number; a vector, point or matrix entry by entry."""
    if is_kind(value, "matrix", "()"):
        return Seq(value.kind, tuple(scale(item, factor) for item in value.items))
    product = multiply(as_expr(value), as_expr(factor))
    return value._replace(expr=product) if isinstance(value, Leaf) else product


# -- parse: parse_list > relation > union > leaf go along the top; expression goes down ------------
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
RELATIONS = {*TURNED, "=", "~", "!=", "∈", "≡"}
SEPARATORS = {",", ";", "and", "or"}
SIGNS_OF_TERMS = ("+", "-", "\\pm", "\\mp")
SUCH_THAT = "such that"  # stands for the bar of a set {x | x > 0}
LEVELS = {  # how tightly operators bind
    ":": 0.5,
    **dict.fromkeys(SIGNS_OF_TERMS, 1),
    **dict.fromkeys("*/", 2),
    **dict.fromkeys("^!°", 4),
}
WORD_FUNCTIONS = {  # words that change the value of a number before them
    word: partial(multiply, Rational(factor))
    for word, factor in read_table("""
100 hundred
1000 thousand
1000000 million
1000000000 billion
1000000000000 trillion
12 dozen
1/2 half halves
1/3 third thirds
1/4 fourth fourths quarter quarters
1/5 fifth fifths
1/6 sixth sixths
1/7 seventh sevenths
1/8 eighth eighths
1/9 ninth ninths
1/10 tenth tenths
1/100 hundredth hundredths
1/1000 thousandth thousandths
""").items()
}
WORD_FUNCTIONS |= {
    "squared": lambda value: power(value, Integer(2)),
    "cubed": lambda value: power(value, Integer(3)),
    "factorial": factorial,
}
REAL_LINE = Seq("()", (Leaf(negate(sympy.oo)), Leaf(sympy.oo)))
NO_SOLUTION = {
    "no solution",
    "no solutions",
    "no real solution",
    "no real solutions",
    "none",
    "empty set",
}


class Parser:
    """Recursive descent over the tokens of one answer: "x = 1, 2" -> Relation(x = 1), Leaf(2)."""

    def __init__(self, tokens):
        tokens = [token for i, token in enumerate(tokens) if not aligns(tokens, i)]
        self.tokens = [*tokens, *[Token("end", "")] * 3]  # three, for looking ahead
        self.at = 0
        self.partner = find_partners(tokens)
        self.depth = 0
        self.steps = 0
        self.sign = 1  # which of the two values of ± is being read
        self.unit = ""  # of the leaf being read
        self.rounded = False  # whether that leaf holds a decimal that is no integer
        self.bars = False  # whether | closes something
        self.summed = {}  # summation variables
        self.bound = []  # variables that may have any name: k in 3k, k ∈ ℤ

    @property
    def peek(self):
        """The text of the next token."""
        return self.tokens[self.at].text

    @property
    def kind(self):
        """The kind of the next token."""
        return self.tokens[self.at].kind

    def next(self):
        self.steps += 1
        if self.kind == "end":
            raise Unparsed("ends too early")
        if self.steps > MAX_STEPS:  # a loop over tokens stops here
            raise Unparsed("too long")
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, *texts: str):
        """Step over the next token if it is one of these."""
        return self.peek in texts and bool(self.next())

    def expect(self, *texts: str):
        """Step over these tokens."""
        for text in texts:
            if not self.accept(text):
                raise Unparsed(f"{text} expected, not {self.peek or 'the end'}")

    def answer(self):
        """All of the tokens: one value, or a bare list."""
        values = self.parse_list()
        if self.kind != "end":
            raise Unparsed(f"unexpected {self.peek}")
        return self.join(values, 0)

    def join(self, values, start):
        """One value, or what separates several since the token `start` makes of them."""
        if len(values) == 1:
            return values[0]
        words = {token.text for token in self.tokens[start : self.at]} & {"and", "or"}
        return join_values(values, words.pop() if len(words) == 1 else "")

    def parse_list(self, expand=True):
        r"""Values separated by commas, semicolons, "and" or "or". One with ± is read twice:
        1 \pm 2, 5 -> 3, -1, 5. In (1 \pm 2)/3 it is the whole that has two values, so brackets
        other than a set's do not expand it."""
        outer = self.sign
        values = []
        while not values or self.accept(*SEPARATORS):
            while values and self.accept("and", "or"):  # 1, 2, and 3
                pass
            start = self.at
            self.sign = 1 if expand else outer
            values.append(self.relation())
            texts = {token.text for token in self.tokens[start : self.at]}
            if expand and not texts.isdisjoint(("\\pm", "\\mp")):
                self.at = start
                self.sign = -1
                other = self.relation()
                if other != values[-1]:  # a set within has both already
                    values.append(other)
        self.sign = outer
        return values

    def relation(self):
        """A value, or a chain of them: "x = 5", "Area = 5", "3 > x > 1" as "1 < x < 3",
        "1/3 ~ 0.33" as 1/3."""
        self.accept("=", "~")  # "≈ 3.14"
        sides = [self.side()]
        ops = []
        while self.peek in RELATIONS:
            op = self.next().text
            if op == "∈":
                self.note_bound(self.at - 2, self.at - 1)
            side = self.side()
            if op == "~" and not name_of(sides[-1]):  # 1/3 ≈ 0.33 is 1/3; but x ≈ 11 is x = 11
                continue
            sides.append(side)
            ops.append("=" if op == "~" else op)
        if not ops:
            return sides[0]
        if ops[0][0] == ">":
            sides.reverse()
            ops = [TURNED.get(op, op) for op in reversed(ops)]
        return Relation(tuple(sides), tuple(ops))

    def side(self):
        """One side of a relation: words, or a value."""
        return self.words_ahead() or self.union()

    def words_ahead(self):
        r"""Step over a side that only names something, before "=": Area, \angle ABC, f(x), P(X=2),
        S_{\triangle A}."""
        start = self.at
        end = start
        stops = RELATIONS | SEPARATORS | CLOSING | {""}
        while self.tokens[end].text not in stops:
            end = self.partner.get(end, end) + 1
        side = self.tokens[start:end]
        if self.tokens[end].text not in ("=", "~") or not self.is_name(side, start, end):
            return ""
        self.at = end
        return "".join(token.text for token in side)

    def is_name(self, side, start, end):
        """Whether the tokens from start to end hold words, or call one letter: P(X=2), f(x)."""
        kinds = {token.kind for token in side}
        if kinds & {"text", "command"} and "number" not in kinds:
            return True
        if len(side) <= 3 or side[0].kind != "name" or self.partner.get(start + 1) != end - 1:
            return False
        return side[0].text.isupper() or {token.kind for token in side[2:-1]} <= {"name", "number"}

    def union(self):
        r"""(-\infty,1) \cup \{2\}; \mathbb{R} \setminus \{1\} as two intervals."""
        pieces = [self.leaf()]
        if pieces == [REAL_LINE] and self.accept("\\setminus"):
            return complement(self.leaf())
        while self.accept("\\cup"):
            pieces.append(self.leaf())
        if len(pieces) == 1:
            return pieces[0]
        parts = (piece.items if is_kind(piece, "set") else [piece] for piece in pieces)
        return Seq("union", tuple(chain.from_iterable(parts)))

    def leaf(self):
        """An expression with its unit or percent sign; or a bracketed value; or words (a str)."""
        outer = (self.unit, self.rounded)
        self.unit = "dollar" if self.accept("dollar") else ""
        self.rounded = False
        words = [] if self.unit else self.words()
        if words and (words[-1] != "is" or self.kind == "end"):
            value = value_of_words(words)
        else:
            value = self.expression()
        if isinstance(value, sympy.Expr):
            while self.peek in WORD_FUNCTIONS:
                value = WORD_FUNCTIONS[self.next().text](value)
            self.read_unit(bool(value.free_symbols))
            value = Leaf(value, self.rounded, self.unit, self.modulus())
        named = words[-1:] == ["is"] and self.peek not in RELATIONS
        if named and isinstance(value, Leaf | Seq):  # Ann is 5
            value = Relation((" ".join(words[:-1]), value), ("=",))
        self.unit, self.rounded = outer
        return value

    def modulus(self):
        r"""7 in (mod 7), mod 7 and \pmod{7}; None where there is none."""
        in_brackets = self.mod_ahead() and self.accept("(")
        if not self.accept("\\mod"):
            return None
        value = as_expr(self.expression(3))
        if in_brackets:
            self.expect(")")
        return value

    def mod_ahead(self):
        return self.peek == "(" and self.tokens[self.at + 1].text == "\\mod"

    def words(self):
        """Words, and the single letters behind the first of them."""
        words = []
        kinds = ("text",)
        while self.kind in kinds and self.peek not in SEPARATORS:
            words.append(self.next().text.casefold())
            kinds = ("text", "name")
        return words

    def read_unit(self, symbolic):
        r"""What follows a number: 33 pct, 5 cm, 3 \text{m/s}^2, 64 ft^2; other words (42 apples)
        are dropped."""
        start = self.at
        words = ["%"] if self.accept("%") else []
        while self.kind == "text" or (words and (self.kind == "name" or self.peek in UNIT_SIGNS)):
            in_exponent = words[-1:] in (["^"], ["{"], ["-"])
            if self.peek in ("and", "or") or (self.peek == "}" and "{" not in words):
                break
            if self.peek in {*"-123"} and not in_exponent:
                break
            words.append(self.next().text)
        if not VALUE_WORDS.isdisjoint(words):
            raise Unparsed("a word that changes the value")
        units = [word if word in UNIT_SIGNS else unit_name(word) for word in words]
        if None not in units:
            self.unit = re.sub("[{}]", "", "".join(units)) or self.unit
        elif symbolic or any(token.kind == "name" for token in self.tokens[start : self.at]):
            raise Unparsed("words after a formula")

    def expression(self, level=0):
        r"""A value and the operators behind it that bind more tightly than `level`: "2x^2 - y" is
        (2 (x^2)) - y. Every recursion of the parser passes here: this is where depth is bounded."""
        self.depth += 1
        self.steps += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("too deep")
        if self.peek in SIGNS_OF_TERMS:
            value = self.signed(max(level, 2))
        else:
            value = self.read(*self.next())
        while True:
            op = "*" if self.value_ahead() else self.peek
            if LEVELS.get(op, 0) <= level:
                self.depth -= 1
                return value
            if self.kind == "number" and self.tokens[self.at - 1].kind == "number":
                raise Unparsed("two numbers side by side")
            value = self.operate(value, op)

    def value_ahead(self):
        """Whether the next token begins a value, so that a product without a sign comes."""
        if self.kind in ("number", "name") or self.peek in PREFIXES:
            return not self.mod_ahead()
        return self.peek == "|" and not self.bars

    def signed(self, level):
        """A sign and what it stands before; of ± and ∓ the one that self.sign says."""
        sign = {"+": 1, "-": -1, "\\pm": self.sign, "\\mp": -self.sign}[self.next().text]
        value = self.expression(level)
        return scale(value, Integer(-1)) if sign < 0 else value

    def operate(self, left, op):
        r"""`left` with the operator that comes and what follows it; a product may have no sign: 2x,
        2(3), 2\frac12."""
        if op in SIGNS_OF_TERMS:
            return add(as_expr(left), as_expr(self.signed(1)))
        self.accept(op)
        if op == "!":
            self.steps += 50
            return factorial(as_expr(left))
        if op == "°":
            self.unit = "deg"
            return left
        if op == "^":  # powers are read from right to left
            return power(as_expr(left), as_expr(self.expression(3)))
        right = self.expression(LEVELS[op])
        if op == ":":
            return self.ratio(left, right)
        if op == "/":
            return divide(as_expr(left), as_expr(right))
        if not isinstance(right, Seq):
            return scale(left, right)
        if as_expr(left).is_Symbol and left.name.isupper():  # the point A(1, 2)
            return Relation((Leaf(left), right), ("=",))
        return scale(right, left)  # 2 (1, 2) is (2, 4)

    def ratio(self, left, right):
        """a:b is a quotient; a:b:c is not."""
        if not is_kind(left, "ratio"):
            if self.peek != ":":
                return divide(as_expr(left), as_expr(right))
            left = Seq("ratio", (Leaf(as_expr(left)),))
        return Seq("ratio", (*left.items, Leaf(as_expr(right))))

    def atom(self):
        """A value without operators: of a fraction, a root …"""
        return as_expr(self.expression(5))

    def read(self, kind, text):
        """What begins with this token."""
        if kind == "number":
            return self.number(text)
        if kind == "name":
            return self.function(text) if text in FUNCTIONS else self.symbol(text)
        if text in BRACKETS:
            return self.group(text)
        if text in ("\\frac", "\\binom"):
            top = self.atom()
            return (divide if text == "\\frac" else binomial)(top, self.atom())
        if text == "|":
            return self.absolute()
        if text in ("\\emptyset", "ℝ"):
            return REAL_LINE if text == "ℝ" else Seq("set", ())
        if text in ("\\sum", "\\prod"):
            return self.series(add if text == "\\sum" else multiply)
        raise Unparsed(f"{text} is not a value")

    def number(self, text):
        """A number, perhaps with the base it is written in: 101_2."""
        if self.kind == "subscript":
            return number_in_base(text, self.next().text[1:])
        value = parse_number(text)
        if "." in text and "\\" not in text and not value.is_Integer:
            self.rounded = True
        return value

    def absolute(self):
        """|x|, behind its first bar."""
        outer = self.bars
        self.bars = True
        value = apply_function("abs", as_expr(self.expression()))
        self.expect("|")
        self.bars = outer
        return value

    def symbol(self, name):
        """A constant; a variable with its subscript and primes; f(x), g'(2), h^2(x) of an unknown
        function, as text."""
        if name in self.summed:
            return self.summed[name]
        if self.kind == "subscript":
            name += self.next().text
        elif name in CONSTANTS:
            return CONSTANTS[name]
        while self.accept("'"):
            name += "'"
        behind = self.partner.get(self.at + 1, self.at + 1) + 1
        raised = self.peek == "^" and behind in self.partner  # f^2(x)
        if name[0] not in "fghFGH" or not (self.peek == "(" or raised):
            return Symbol(name)
        exponent = self.expression(5) if self.accept("^") else Integer(1)
        start = self.at
        self.at = self.partner[start] + 1
        arguments = "".join(token.text for token in self.tokens[start : self.at])
        return power(Symbol(name + arguments), exponent)

    def function(self, name):
        r"""\sin^2 x, \sin^{-1} x, \log_2 8, \sqrt[3]{2}, \sin 30^\circ; sin 2x cos x is
        sin(2x) cos(x)."""
        unit = self.unit
        base = self.base_or_index(name)
        exponent = None
        if name != "sqrt" and self.accept("^"):
            exponent = as_expr(self.expression(3))
            if exponent == -1 and f"arc{name}" in FUNCTIONS:
                name = f"arc{name}"
                exponent = None
        values = self.arguments(name)
        if self.unit == "deg" and unit != "deg":
            values = [divide(multiply(value, sympy.pi), Integer(180)) for value in values]
            self.unit = unit
        if name == "log" and len(values) == 2:
            base = values.pop()
        if name == "sqrt" and len(values) == 1:
            return root(values[0], base or Integer(2))
        result = apply_function(name, *values)
        if base is not None:
            result = divide(result, apply_function("log", base))
        return result if exponent is None else power(result, exponent)

    def base_or_index(self, name):
        r"""What stands between a function's name and its argument: 2 in \log_2 8, \sqrt[2]{x}."""
        if name == "log" and self.kind == "subscript":
            return as_expr(Parser(tokenise(self.next().text[1:])).answer())  # log_2, log_{10}
        if name == "log" and self.accept("_"):
            return self.atom()
        if name == "sqrt" and self.peek == "[":
            return self.atom()
        return Integer(10) if name == "lg" else None

    def arguments(self, name):
        """In brackets, or the product that follows: sin 2x."""
        if self.peek in ("(", "{") or name == "sqrt":
            value = self.expression(5)
            return [as_expr(item) for item in (value.items if isinstance(value, Seq) else [value])]
        value = as_expr(self.expression(2))
        while self.factor_ahead():
            value = multiply(value, as_expr(self.expression(3)))
        return [value]

    def factor_ahead(self):
        r"""Whether the argument of a function without brackets goes on: x in sin 2x, \frac in
        sin 2\frac x3."""
        if self.kind in ("number", "name"):
            return self.peek not in FUNCTIONS
        return self.peek in ("\\frac", "{")

    def group(self, opening):
        """One value in brackets, or several; {x | x > 0} is what stands after the bar."""
        stop = self.partner[self.at - 1]
        closing = self.tokens[stop].text
        if opening.startswith("begin"):
            return self.environment(closing)
        if opening in ("\\lfloor", "\\lceil"):
            name = "floor" if opening == "\\lfloor" else "ceil"
            value = apply_function(name, as_expr(self.expression()))
            self.expect(closing)
            return value
        outer = self.bars
        self.bars = False
        is_set = opening == "\\{"
        template = self.template(stop) if is_set else None
        start = self.at
        items = []
        if self.at < stop or not is_set:
            items = self.parse_list(expand=is_set)
        joined = self.join(items, start) if template else None
        self.expect(closing)
        self.bars = outer
        if template:
            return build_set(template, joined)
        if is_set and items and is_membership(items[-1]):  # {2k, k ∈ ℤ}
            return self.join(items, start)
        if is_set or (opening == "{" and len(items) > 1):
            return Seq("set", tuple(items))
        if len(items) > 1:
            return Seq(opening + closing, tuple(items))
        return self.bracketed(items[0])

    def template(self, stop):
        """In {3k | k ∈ ℤ}, 3k, and step over the bar; None in another set."""
        bars = 0
        start = self.at
        for place in range(start, stop):
            text = self.tokens[place].text
            is_bar = text in (":", SUCH_THAT) or (text == "|" and bars % 2 == 0)
            texts = [token.text for token in self.tokens[place:stop]]
            if is_bar and place > start and not RELATIONS.isdisjoint(texts):
                self.tokens[place] = Token("op", SUCH_THAT)
                self.note_bound(start, place)
                template = self.relation()
                self.expect(SUCH_THAT)
                return template
            if text == "|":
                bars += 1
        return None

    def note_bound(self, start, end):
        """The variables between two places may have any name."""
        for token in self.tokens[start:end]:
            if token.kind == "name" and token.text not in KNOWN:
                self.bound.append(token.text)

    def bracketed(self, value):
        """The value of (…); its unit goes to what is around it: (5 cm) + ..., (50%)."""
        if not isinstance(value, Leaf):
            return value
        if value.modulus is not None:
            raise Unparsed("arithmetic on a remainder")
        if value.unit == "%":
            return divide(value.expr, Integer(100))
        self.unit = self.unit or value.unit
        self.rounded = self.rounded or value.approximate
        return value.expr

    def environment(self, closing):
        r"""\begin{pmatrix}1&2\\3&4\end{pmatrix} and the like; see value_of_rows."""
        stop = self.partner[self.at - 1]
        rows = [[]]
        while True:
            if not rows[-1] and "matrix" not in closing:
                self.accept("&")
            rows[-1] += self.cell()
            if self.accept("\\\\"):
                if self.at == stop:
                    break
                rows.append([])
            elif not self.accept("&"):
                break
        self.expect(closing)
        return value_of_rows(rows, closing)

    def cell(self):
        """A cell of a matrix, or an equation or condition of a system: "if x > 0"."""
        while self.peek in ("if", "for", "when", "where"):
            self.next()
        return self.parse_list(expand=False)

    def series(self, combine_terms):
        r"""\sum_{k=a}^{b} term with integers a and b: the term is read once for each k."""
        self.expect("_", "{")
        variable = self.next().text
        self.expect("=")
        low = as_expr(self.expression())
        self.expect("}", "^")
        high = self.atom()
        if not (low.is_Integer and high.is_Integer and 0 <= high - low < MAX_STEPS):
            raise Unparsed("not a simple sum")
        start = self.at
        outer = self.summed
        terms = []
        for k in range(int(low), int(high) + 1):
            self.at = start
            self.summed = {**outer, variable: Integer(k)}
            terms.append(as_expr(self.expression(1)))
        self.summed = outer
        return combine_terms(*terms)


def aligns(tokens, place):
    """Whether this is an & that aligns equations: x &= 3."""
    if tokens[place].text != "&":
        return False
    around = {token.text for token in tokens[max(place - 1, 0) : place + 2]}
    return not RELATIONS.isdisjoint(around)


def value_of_rows(rows, closing):
    """A matrix of its rows; one row or column: of its entries. Equations one below the other: a
    list. Rows of a value and its condition: cases."""
    cells = [*chain.from_iterable(rows)]
    lengths = {len(row) for row in rows}
    is_matrix = all(isinstance(cell, Leaf) for cell in cells) and "cases" not in closing
    if len(lengths) == 1 and is_matrix:
        if len(rows) == 1 or lengths == {1}:
            return Seq("matrix", tuple(cells))
        return Seq("matrix", tuple(Seq("matrix", tuple(row)) for row in rows))
    if "matrix" in closing:
        raise Unparsed("not a matrix")
    if lengths == {2} and not isinstance(rows[0][0], Relation):
        return Seq("cases", tuple(Seq("case", tuple(row)) for row in rows))
    return join_values(cells, "")


def build_set(template, condition):
    """{x | x > 0} and {x ∈ ℝ | x > 0} are what the condition says; others keep the template."""
    conditions = [condition]
    if isinstance(template, Relation) and template.ops == ("∈",):
        template, domain = template.sides
        if domain != REAL_LINE:
            conditions.insert(0, Relation((template, domain), ("∈",)))
    is_variable = isinstance(template, Leaf) and template.expr.is_Symbol
    if is_variable and len(conditions) == 1:  # the name of the variable does not count
        return (is_condition(condition) and denoted_value(condition)) or condition
    return Seq("builder", (template, Seq("list", tuple(conditions))))


def is_condition(value):
    """An inequality."""
    return isinstance(value, Relation) and not {*value.ops} <= {"=", "∈", "≡"}


def join_values(values, word):
    """Several values between which `word` stands: "and", "or"; "" for commas or both."""
    real = [value for value in values if not is_of_reals(value)]  # x ∈ ℝ says nothing
    values = share_modulus(real or values)
    if len(values) == 1:
        return values[0]
    if is_membership(values[-1]):  # 3k, k ∈ ℤ
        count = next(i for i, value in enumerate(values) if is_membership(value))
        if count > 0 and all(map(is_membership, values[count:])):
            template = values[0] if count == 1 else join_values(values[:count], "")
            return Seq("family", (template, Seq("list", tuple(values[count:]))))
    names = {first_name(value) for value in values if isinstance(value, Relation)}
    relations = all(isinstance(value, Relation) for value in values)
    if word and relations and (len(names) > 1 or any(map(is_condition, values))):
        both = chained(values) if word == "and" and all(map(is_condition, values)) else None
        return both or Seq(word, tuple(values))
    return Seq("list", tuple(values))


def chained(relations):
    """2 < x and x < 5 -> 2 < x < 5; x ≠ 1 and x ≠ 2 -> intervals; None for other conditions."""
    names = {first_name(relation) for relation in relations}
    sides = [side for relation in relations for side in relation.sides]
    ops = [op for relation in relations for op in relation.ops]
    if len(names) > 1 or "" in names or len(sides) != 2 * len(ops):
        return None
    ends = [side for side in sides if not name_of(side)]
    if {*ops} == {"!="} and all(map(is_rational, ends)):
        return complement(Seq("set", tuple(ends)))
    if len(ops) == 2 and {*ops} <= {"<", "<="}:
        low, high = sorted(relations, key=lambda relation: bool(name_of(relation.sides[0])))
        if name_of(low.sides[1]) and name_of(high.sides[0]):
            return Relation((*low.sides, high.sides[1]), low.ops + high.ops)
    return None


def is_of_reals(value):
    return isinstance(value, Relation) and value.ops == ("∈",) and value.sides[1] == REAL_LINE


def is_membership(value):
    """k ∈ ℤ"""
    if not isinstance(value, Relation) or value.ops != ("∈",):
        return False
    domain = value.sides[1]
    return isinstance(domain, Leaf) and domain.expr.is_Symbol


def share_modulus(values):
    """x ≡ 1, 3 (mod 8) is x ≡ 1 (mod 8) and x ≡ 3 (mod 8)."""
    last = values[-1].sides[-1] if isinstance(values[-1], Relation) else values[-1]
    first = values[0]
    if not isinstance(last, Leaf) or last.modulus is None or not isinstance(first, Relation):
        return values
    rests = [value.sides[-1] if isinstance(value, Relation) else value for value in values]
    if not all(isinstance(rest, Leaf) for rest in rests):
        return values
    shared = [rest._replace(modulus=last.modulus) for rest in rests]
    return [Relation((*first.sides[:-1], rest), first.ops) for rest in shared]


def find_partners(tokens):
    """Where each bracket closes, by the place where it opens: "(1,2]" -> {0: 4}."""
    partner = {}
    opened = []
    for place, (_, text) in enumerate(tokens):
        if text in BRACKETS:
            opened.append(place)
        elif text in CLOSING:
            if not opened or text not in BRACKETS[tokens[opened[-1]].text]:
                raise Unparsed(f"unexpected {text}")
            partner[opened.pop()] = place
    if opened:
        raise Unparsed("a bracket is not closed")
    return partner


def name_of(side):
    r"""The spelling of a side that only names something: x_1, AB, (x,y), \cos A, f^{-1}(x), |AB|,
    AB/BC, words; "" for other sides."""
    if isinstance(side, str):
        return side
    if is_kind(side, "()", "ratio"):
        names = [name_of(item) for item in side.items]
        return f"({','.join(names)})" if all(names) else ""
    if not isinstance(side, Leaf) or side.unit:
        return ""
    name = name_of_expr(side.expr)
    return "" if name.startswith("/") else name  # 1/x


def name_of_expr(expr):
    if expr.is_Symbol:
        return expr.name
    if expr.is_Mul or expr.func is sympy.Abs:
        names = [name_of_expr(factor) for factor in expr.args]
        bar = "" if expr.is_Mul else "|"
        return f"{bar}{''.join(names)}{bar}" if all(names) else ""
    called = expr.is_Pow and expr.base.is_Symbol and "(" in expr.base.name
    if expr.is_Function or called:
        simple = all(argument.is_Symbol or argument == -1 for argument in expr.args)
        return str(expr) if simple else ""
    if expr.is_Pow and expr.exp == -1:
        name = name_of_expr(expr.base)
        return name and f"/{name}"
    return ""


def value_of_words(words):
    """Words without articles, or what they say a thing is: "The triangle is isosceles" ->
    "isosceles"; "no solution" -> the empty set."""
    words = [word for word in words if word not in ("a", "an", "the")]
    if "is" in words or "are" in words:
        last_is = max(place for place, word in enumerate(words) if word in ("is", "are"))
        words = words[last_is + 1 :] or words
    text = " ".join(words)
    if text in NO_SOLUTION:
        return Seq("set", ())
    return text.removesuffix(" solutions")  # infinitely many


def complement(points):
    """The real line without a set of rational points, as intervals."""
    if not is_kind(points, "set") or not all(map(is_rational, points.items)):
        raise Unparsed("a difference of sets")
    low, high = REAL_LINE.items
    ends = [low, *sorted(points.items, key=lambda leaf: leaf.expr), high]
    return Seq("union", tuple(Seq("()", pair) for pair in pairwise(ends)))


def count_leaves(value, depth=0):
    """The number of values in nested collections; too deep a nest counts as too many."""
    inside = ()
    if isinstance(value, Relation):
        inside = value.sides
    elif isinstance(value, Seq):
        inside = value.items
    if not inside:
        return 1
    if depth == 6:
        return MAX_LEAVES + 1
    return sum(count_leaves(item, depth + 1) for item in inside)


class Parsed(NamedTuple):
    """An answer as it was read."""

    text: str  # normalised spelling, for comparison as text
    value: object  # Leaf, Seq, Relation, str (words); None where the answer is not in the grammar
    why: str = ""  # why it is not
    bound: tuple = ()  # the variables that may have any name: k in 3k, k ∈ ℤ


def spelling_of(token):
    """Words without capitals; units of one or two letters keep theirs: mW is not MW."""
    is_word = token.kind == "text" and len(token.text) > 2
    return token.text.casefold() if is_word else token.text


@lru_cache(maxsize=512)
def parse(text: str, thousands: bool = True, renamed: tuple = ()) -> Parsed:
    """A whole answer: "1/2" -> Leaf(1/2). What is not in the grammar, or beyond the limits, is text
    and nothing else: "5 +" -> None, "ends too early"."""
    if len(text) > MAX_ANSWER:
        return Parsed(text, None, "longer than the limit")
    text = normalise(text, thousands)
    spelling = re.sub(r"\s+", "", text)
    try:
        tokens = tokenise(text)
        spelling = "".join(map(spelling_of, tokens))
        names = {Token("name", name): Token("name", f"bound {i}") for i, name in enumerate(renamed)}
        parser = Parser([names.get(token, token) for token in tokens])
        value = parser.answer()
        if count_leaves(value) > MAX_LEAVES:
            raise Unparsed("too many values")
        return Parsed(spelling, value, bound=tuple(dict.fromkeys(parser.bound)))
    except Unparsed as error:
        return Parsed(spelling, None, str(error))


# -- compare: the values of inert trees at fixed points --------------------------------------------
# No rewriting comes first (expand, cancel, trigonometric identities …): what it could show these
# points show too, with bounded work, while expand does not come back from (x^200000 - 1)/(x - 1)
# nor cancel from e^(10^9 ln 2).
NUMBERS = MPContext()  # our own mpmath context
LOCK = threading.RLock()  # held while the precision of NUMBERS is ours
MIN_PRECISION = 192  # bits
GAMMAS = ("factorial", "binomial")
ROUNDED = ("floor", "ceiling")
OF_REALS = ("Abs", "sign", *ROUNDED)
SATURATING = ("sinh", "cosh", "tanh")  # they differ, or differ from 1, by e^(-2x)


class Point(NamedTuple):
    """Where trees are evaluated: it gives each variable a value, by its name."""

    kind: str  # complex: near the positive axis, where roots and logarithms behave; positive; real
    k: int
    size: float = 1
    center: Rational = Integer(0)
    integers: tuple = ()  # the names of the variables that are integers

    def value(self, name):
        noise = zlib.crc32(f"{name} {self.k}".encode("utf-8", "replace"))
        if name in self.integers:
            return NUMBERS.mpf(self.integer(name, noise))
        distance = self.size * (0.3 + (noise & 0xFFFF) / 0x8000)
        if self.kind == "complex":
            return NUMBERS.mpc(distance, 0.05 + (noise >> 16) / 0x50000)
        if self.kind == "real" and self.is_negative(noise):
            distance = -distance
        return NUMBERS.mpf(self.center.p) / self.center.q + distance

    def is_negative(self, noise):
        """Of four points one is all positive and one all negative."""
        return self.k % 4 == 1 or (self.k % 4 > 1 and bool(noise >> 20 & 1))

    def integer(self, name, noise):
        """Small ones in a row, so that each remainder occurs; or large."""
        if self.size > 1:
            return self.size + noise % self.size
        return self.k + 1 if name == self.integers[0] else noise % 12


class Number(NamedTuple):
    """The value of a tree at a point."""

    value: object  # of mpmath
    spread: int  # bits between the largest and the smallest term that make it up


def numeric_value(expr, point: Point) -> Number:
    """The value at a point; ArithmeticError where there is none, or out of bounds."""
    if expr.is_Rational:
        return Number(NUMBERS.mpf(expr.p) / expr.q, 0)
    if expr.is_Symbol:
        return Number(point.value(expr.name), 0)
    if not expr.args:
        constant = {sympy.pi: NUMBERS.pi, sympy.E: NUMBERS.e, sympy.I: NUMBERS.j}[expr]
        return Number(constant * NUMBERS.one, 0)
    inner = [numeric_value(argument, point) for argument in expr.args]
    values = [number.value for number in inner]
    if expr.is_Add:
        result = numeric_sum(values)
    elif expr.is_Mul:
        result = Number(math.prod(values), 0)
    elif expr.is_Pow:
        result = numeric_power(*values, expr.exp, point.kind == "real")
    else:
        result = numeric_function(expr.func.__name__, values)
    if not NUMBERS.mag(result.value) <= MAX_MAGNITUDE:
        raise ArithmeticError("too large, or not a number")
    return Number(result.value, result.spread + max(number.spread for number in inner))


def numeric_sum(values):
    """A sum that nearly vanishes beside its terms is 0 seen through rounding: sin²1 + cos²1 - 1.
    The precision follows the spread of the terms, so that no term is lost like that."""
    total = sum(values)
    sizes = [NUMBERS.mag(value) for value in values if value]
    if not sizes:
        return Number(total, 0)
    if total and NUMBERS.mag(total) < max(sizes) - 3 * NUMBERS.prec // 4:
        total = NUMBERS.zero
    return Number(total, max(sizes) - min(sizes))


def numeric_power(base, exponent, exact, real):
    """base^exponent, or infinity or NaN where it is out of bounds. Over the reals an odd root of a
    negative number is negative."""
    if base == 0:
        return Number(base if exponent.real > 0 else NUMBERS.nan, 0)
    integral = exact.is_Integer or (not exponent.imag and exponent == NUMBERS.nint(exponent.real))
    if integral and abs(exponent) <= 10_000:
        small = abs(exponent * NUMBERS.mag(base)) < 4 * MAX_MAGNITUDE
        return Number(base ** int(exponent.real) if small else NUMBERS.inf, 0)
    if real and exact.is_Rational and exact.q % 2 and not base.imag and base.real < 0:
        result = numeric_power(-base, exponent, exact, real)
        return Number(-result.value, result.spread) if exact.p % 2 else result
    logarithm = exponent * NUMBERS.ln(base)
    if NUMBERS.mag(logarithm) > 16:
        return Number(NUMBERS.inf, 0)
    # e^tiny is 1 and a tiny term
    return Number(NUMBERS.exp(logarithm), max(0, -size_of(logarithm)))


def size_of(value):
    """The exponent of 2 that is about as large; 0 for 0."""
    return NUMBERS.mag(value) if value else 0


def numeric_function(name, values):
    """The function of sympy's name; ArithmeticError where its argument is out of bounds."""
    largest = 1_000
    if name in GAMMAS:
        largest = 12
    elif any(value.imag for value in values):
        largest = 16
    size = max(map(NUMBERS.mag, values))
    if size > largest:
        raise ArithmeticError("argument too large")
    if name in ROUNDED:
        nearest = NUMBERS.nint(values[0])
        if abs(values[0] - nearest) < 2.0**-90:  # an integer but for rounding
            values = [nearest]
    theirs = {"Abs": "fabs", "ceiling": "ceil"}.get(name, name)
    result = getattr(NUMBERS, theirs)(*values)
    spread = 0
    if name in SATURATING and size > 0:
        spread = 3 * int(abs(values[0]))
    elif name not in OF_REALS:  # f(0) and a tiny term; π/2 and a tiny term
        spread = 2 * abs(size_of(values[0]))
    return Number(result, spread)


@lru_cache(maxsize=512)
class ExprStats:
    """What chooses the points for a tree, and bounds the work on it."""

    def __init__(self, expr):
        nodes = list(sympy.preorder_traversal(expr))
        inner = [node for node in nodes if node.args and node.func not in (Add, Mul)]
        names = [node.func.__name__ for node in inner]
        rounded = [node for node, name in zip(inner, names) if name in ROUNDED]
        gammas = [node for node, name in zip(inner, names) if name in GAMMAS]
        rationals = [node for node in nodes if node.is_Rational]
        # Whole powers are cheap; a factorial takes as long as 30 sines.
        cheap = sum(node.is_Pow and node.exp.is_Integer for node in inner)
        self.nodes = len(nodes) + 8 * cheap
        self.cost = len(inner) - cheap + 29 * len(gammas)
        self.bits = max(map(bits, rationals), default=0)
        self.constants = {abs(node) for node in rationals if bits(node) < 64}
        self.rounded = bool(rounded)
        self.real = not set(OF_REALS).isdisjoint(names)
        # whether it holds a root or logarithm of a variable
        self.rooted = any(has_branches(node) and node.args[0].free_symbols for node in inner)
        # A variable under a floor is an integer, but in ⌊x⌋, which would then say nothing.
        plain = [node for node in rounded if is_integral(node.args[0])]
        self.not_integers = names_in(plain)
        self.integers = names_in(rounded + gammas) - self.not_integers


def has_branches(node):
    """A root or a logarithm."""
    return node.func is sympy.log or (node.is_Pow and not node.exp.is_Integer)


def is_integral(expr):
    """An integer wherever its variables are: 2x² + 1."""
    if expr.is_Add or expr.is_Mul:
        return all(map(is_integral, expr.args))
    if expr.is_Pow:
        return bool(is_integral(expr.base) and expr.exp.is_Integer and expr.exp > 0)
    return bool(expr.is_Symbol or expr.is_Integer)


def names_in(exprs):
    return {symbol.name for expr in exprs for symbol in expr.free_symbols}


@lru_cache(maxsize=4096)
def value_at(expr, point: Point, precision: int) -> Number | None:
    """numeric_value, remembered; None where there is no value, or where it would take too much
    work."""
    stats = ExprStats(expr)
    division = precision // 64 + (precision // 4096) ** 2
    sine = (precision // 64) ** 2
    if stats.nodes * division + stats.cost * sine > MAX_WORK:
        return None
    NUMBERS.prec = precision
    try:
        return numeric_value(expr, point)
    except (ArithmeticError, ValueError, KeyError, TypeError):
        return None


def values_at(exprs, point, precision):
    """The values of trees at a point, so precise that half of the bits show their smallest terms;
    None where one has no value."""
    numbers = [value_at(expr, point, precision) for expr in exprs]
    if None in numbers:
        return None
    needed = 128 + 2 * max(number.spread for number in numbers)
    if needed > precision:
        return values_at(exprs, point, (needed // 64 + 1) * 64)
    NUMBERS.prec = precision
    return *(number.value for number in numbers), precision


def equal_at(x, y, point, precision, approximate):
    """Whether two trees agree at a point; None where one has no value."""
    found = values_at((x, y), point, precision)
    if found is None:
        return None
    left, right, precision = found
    if point.kind == "positive" and left.imag and right.imag:
        return None  # neither is a real number: which branch it is on does not count
    tolerance = NUMBERS.mpf(1e-6) if approximate else NUMBERS.ldexp(1, -precision // 2)
    if abs(left - right) <= tolerance * max(abs(left), abs(right)):
        return True
    return is_zero_at(x, point, precision) and is_zero_at(y, point, precision)


def is_zero_at(expr, point, precision):
    """Whether a value shrinks as the precision grows: cos(π/2), which rounding keeps from 0."""
    rough = value_at(expr, point, precision)
    if size_of(rough.value) > -precision // 2:
        return not rough.value
    fine = value_at(expr, point, 4 * precision)
    return fine is not None and (not fine.value or size_of(fine.value) < 2 * size_of(rough.value))


def choose_points(x, y):
    """Where to compare two trees. One point is enough for constants. An absolute value, or a root
    or logarithm on one side only, asks for real points of both signs, of several sizes and around
    the constants, so that √(x²) is not x and |x - 5| not 5 - x."""
    one = ExprStats(x)
    other = ExprStats(y)
    if not (x.free_symbols or y.free_symbols):
        return [Point("complex", 0)]
    real = one.real or other.real or one.rooted != other.rooted
    kind = "real" if real else "positive"
    names = (one.integers | other.integers) - one.not_integers - other.not_integers
    if names:  # n first, above the others, for which C(n, k) has a value
        names = tuple(sorted(names, key=lambda name: (name[0] not in "nN", name)))
        sizes = [1] * 12 + [60, 60, 400, 400]
        if one.rounded or other.rounded:
            sizes = [1] * 24 + [60, 60, 400, 400, 10**6, 10**6]
        return [Point(kind, k, size, integers=names) for k, size in enumerate(sizes)]
    if real:
        constants = sorted(one.constants | other.constants)[:8]
        centers = [*constants, *(-constant for constant in constants)]
        points = [Point(kind, k, 0.25, center) for center in centers for k in (0, 1)]
        return points + [Point(kind, k, (1, 4, 20, 500)[k // 4]) for k in range(16)]
    points = [Point("complex", k) for k in range(4)]
    return points + [Point(kind, k, size) for k, size in enumerate((10, 500)) if one.rooted]


def choose_precision(x, y):
    """More bits for larger numbers: a changed digit must count."""
    precision = MIN_PRECISION
    while precision < 2 * max(ExprStats(x).bits, ExprStats(y).bits) + 64:
        precision *= 2
    return precision


def equal_exprs(x, y, approximate: bool = False) -> bool:
    """Two inert trees: by structure, as exact numbers, by their values at fixed points (a third of
    them must exist)."""
    if x == y:
        return True
    if x.is_Rational and y.is_Rational:
        near = abs(x - y) * 10**6 <= max(abs(x), abs(y))
        return approximate and bool(near)  # sympy's own truth is no bool
    with LOCK:
        points = choose_points(x, y)
        precision = choose_precision(x, y)
        agreed = 0
        for point in points:
            equal = equal_at(x, y, point, precision, approximate)
            if equal is False:
                return False
            if equal:
                agreed += 1
    return 3 * agreed > len(points)


def proportional(x, y, positive):
    """x = c y with a constant c that is not 0 (positive, for inequalities); or both vanish
    everywhere."""
    zeros = [equal_exprs(expr, Integer(0)) for expr in (x, y)]
    if any(zeros):
        return all(zeros)
    ratio = divide(x, y)
    with LOCK:
        precision = 2 * choose_precision(x, y)
        points = choose_points(x, y)
        if points[0].kind == "complex":
            points = points[:4]
        found = [values_at((ratio,), point, precision) for point in points]
        if any(pair and pair[1] > precision for pair in found):
            # near a large constant C the ratio of different sides varies by 1/C²
            precision = 2 * max(pair[1] for pair in found if pair)
            found = [values_at((ratio,), point, precision) for point in points]
        ratios = [pair[0] for pair in found if pair]
        if 3 * len(ratios) <= len(points):
            return False
        NUMBERS.prec = precision
        first = ratios[0]
        tolerance = NUMBERS.ldexp(abs(first), -precision // 2)
        if positive and not (first.real > 0 and abs(first.imag) <= tolerance):
            return False
        return all(abs(value - first) <= tolerance for value in ratios)


# -- compare: values -------------------------------------------------------------------------------
# What counts as equal: a kind of answer, its rule, and examples. The tests run the examples, and
# docs/checker.md is made from them.
EQUALITY = r"""
numbers: exactly the same; a decimal to a relative 1e-6
    1/2 == 0.5 == 50\% == \frac{2}{4}    0.33 != 1/3    1{,}234 == 1234    10^{20}+1 != 10^{20}
    1-e^{-100} != 1    10¹² == 10^{12}    101_2 == 5    0.1\overline{6} == 1/6
number words: with the words that change a value
    \text{two thirds} == 2/3    5\text{ dozen} == 60    5\text{ tenths} != 5    \text{not }7 != 7
expressions: the same values at fixed points, of all sizes and signs where a root or |…| needs them
    x^2+2x+1 == (x+1)^2    |x-5| != 5-x    \sqrt{x^2} != x    \ln x^2 == 2\ln x    x != X
under floors and factorials: the variables are integers
    \lfloor n/2 \rfloor == \lceil (n-1)/2 \rceil    \lfloor n/3 \rfloor != \lfloor n/4 \rfloor
percent, degrees, units: a side may lack its unit; other units must agree, and some are converted
    5\text{ cm} == 5    5\text{ cm} != 5\text{ m}    50\text{ cents} == \$0.50    5\,\mathrm{N} == 5
    180^\circ == \pi    1.5\text{ hours} == 90\text{ min}    25^\circ\text{C} != 25^\circ\text{F}
times of day: where a side says am or pm, or where the reference is h:mm
    4:20 PM == 16:20    4:20 PM != 6:30 PM    1:2 == 2:4
names: x = 5 is 5; two names must agree; an equation between constants must hold
    x=5 == 5    x=5 != y=5    |AB|=5 == 5    \frac ab=\frac34 == 3/4    2+3=5 == 5    3=5 != 5
equations: left - right are proportional
    y=2x+1 == 2x-y+1=0    x=y != y=2x
congruences: the same modulus, and remainders that agree by it
    x\equiv 5\pmod 7 == x\equiv 12\pmod{7}    n\equiv 1\pmod 4 != n\equiv 1\pmod 8
inequalities: the same numbers; "and" is not "or"
    1<x<2 == (1,2)    x>2\text{ and }x<5 == 2<x<5    x>2\text{ or }x<5 != 2<x<5    x<1 != x\le 1
intervals and unions: the same ends and brackets; unions in any order
    (0,1) != [0,1]    x\ne 1 == \mathbb R\setminus\{1\}
    (-\infty,1)\cup(2,\infty) == x<1\text{ or }x>2
tuples, vectors, matrices: entry by entry, in order
    (1,2) != (2,1)    (1,2) != \{1,2\}    \begin{pmatrix}1\\2\end{pmatrix} == \mathbf i+2\mathbf j
ratios: two terms are a quotient; more are proportional
    2:3 == 4/6    1:2:3 == 2:4:6    1:2:3 != 1:3:2
sets: in any order, repeated or not
    \{1,2\} == \{2,1,1\}    \{1,2\} != \{1,2,3\}
sets with a template: the bound variable may have any name
    \{3k\mid k\in\mathbb Z\} == \{3n:n\in\mathbb Z\}
    \{3k\mid k\in\mathbb Z\} != \{2k\mid k\in\mathbb Z\}
    \{x\mid x>0\} == (0,\infty)    k\pi,\ k\in\mathbb Z == k\pi
bare lists: in any order, each value as often (a point once is enough), with the same labels
    (1,2),(1,2),(3,4) == (3,4),(1,2)
    1,2 == 2,1    1,1,2 != 1,2,2    \pm 3 == 3,-3    1,3,5,\ldots != 1,3,5    (a) 12, (b) 5 == 12, 5
    \angle A=3,\angle B=6 != \angle A=6,\angle B=3    A(1,2),B(3,4) != A(3,4),B(1,2)
systems and cases: the equations as a list; the cases in any order
    \begin{cases}x=3\\y=-1\end{cases} == x=3,y=-1
    \begin{cases}x&x>0\\0&x<0\end{cases} == \begin{cases}0,&x<0\\x,&\text{if }x>0\end{cases}
choices: the letter, or what stands behind it
    (C) 15 == C    (C) 15 == 15    A != a
words, and what is not in the grammar: the same text
    \text{The triangle is isosceles} == isosceles    \text{east} != \text{west}    5+ != 5
"""
UNORDERED = ("set", "list", "union", "and", "or")
FAMILIES = ("builder", "family")
UNIT_VECTORS = [Symbol(f"{name}_unit") for name in "ijk"]
# In what some units are compared with others, and what one of them is.
BASE_UNITS = {"%": ("", Rational(1, 100)), "deg": ("", divide(sympy.pi, Integer(180)))}
BASE_UNITS |= {
    unit: (base, Rational(size))
    for unit, base, size in map(
        str.split,
        """
cent dollar 1/100
mm m 1/1000
cm m 1/100
km m 1000
g kg 1/1000
min s 60
h s 3600
""".strip().splitlines(),
    )
}


def equal_values(left, right):
    """By the table above: relations by what they say, leaves by value, collections by items."""
    left = unwrap_singleton(left)
    right = unwrap_singleton(right)
    if is_kind(left, *FAMILIES) != is_kind(right, *FAMILIES):  # 3k, k ∈ ℤ is 3k
        left = left.items[0] if is_kind(left, "family") else left
        right = right.items[0] if is_kind(right, "family") else right
    if isinstance(left, Relation) and isinstance(right, Relation):
        return equal_relations(left, right)
    left, right = (denoted_value(it) if isinstance(it, Relation) else it for it in (left, right))
    types = {type(left), type(right)}
    if types == {Leaf}:
        return equal_leaves(left, right)
    if types == {Seq}:
        return equal_collections(left, right)
    if types == {Leaf, Seq}:
        return equal_vectors(left, right) or equal_vectors(right, left)
    return types == {str} and left == right


def equal_vectors(leaf, vector):
    """2i + 3j and (2, 3)."""
    if not is_kind(vector, "matrix", "()") or leaf.expr.free_symbols.isdisjoint(UNIT_VECTORS):
        return False
    terms = [as_expr(scale(unit, item)) for unit, item in zip(UNIT_VECTORS, vector.items)]
    return len(vector.items) <= 3 and equal_exprs(leaf.expr, add(*terms))


def unwrap_singleton(value):
    """A collection of one value is that value; a set may repeat it."""
    while is_kind(value, *UNORDERED) and value.items:
        first, *others = value.items
        if others and (value.kind != "set" or not all(equal_values(first, it) for it in others)):
            break
        value = first
    return value


def equal_leaves(left, right):
    """Numbers with or without units: 5 cm is 5 and not 5 m; 50% is 50 and 0.5; 50 cents is 50 and
    $0.50."""
    if left.modulus is not None and right.modulus is not None:
        return equal_remainders(left, right)
    approximate = left.approximate or right.approximate
    agree = left.unit == right.unit or not (left.unit and right.unit)
    if agree and equal_exprs(left.expr, right.expr, approximate):
        return True
    if left.unit == right.unit:
        return False
    left = in_base_unit(left)
    right = in_base_unit(right)
    return left.unit == right.unit and equal_exprs(left.expr, right.expr, approximate)


def in_base_unit(leaf):
    """5 cm -> 1/20 m; 5% -> 1/20."""
    unit, size = BASE_UNITS.get(leaf.unit, (leaf.unit, Integer(1)))
    return leaf._replace(unit=unit, expr=multiply(leaf.expr, size))


def equal_remainders(left, right):
    """5 (mod 7) and 12 (mod 7); not 5 (mod 8)."""
    if not equal_exprs(left.modulus, right.modulus):
        return False
    turns = divide(add(left.expr, negate(right.expr)), left.modulus)
    return bool(turns.is_Integer) or equal_exprs(left.expr, right.expr)


def is_constant(value):
    """2 + 3 or sqrt 2; not x, not f(2)."""
    return isinstance(value, Leaf) and not value.expr.free_symbols


def denoted_value(relation):
    """What a relation says of one thing. The value: x = 5, f(x) = 5, 2 + 3 = 5, Area = 5, x in {5}
    -> 5. Intervals, for inequalities in one variable with constant ends: 1 < x <= 2 -> (1,2]. None
    for a real equation."""
    sides, ops = relation
    names = [name_of(side) for side in sides]
    if {*ops} <= {"=", "∈"}:
        if len(sides) == 2 and names[1] and is_constant(sides[0]):
            return sides[0]
        constants = [side for side in sides if is_constant(side)]
        if not any(names) and not all(equal_leaves(constants[0], it) for it in constants[1:]):
            return None  # 3 = 5
        calculated = is_constant(sides[-1]) and (len(sides) > 2 or is_constant(sides[0]))
        return sides[-1] if names[0] or calculated else None
    if ops == ("!=",):
        ends = [side for side, name in zip(sides, names) if not name]
        if len(ends) == 1 and is_rational(ends[0]):
            return complement(Seq("set", tuple(ends)))
        return None
    return interval_of(sides, ops)


def interval_of(sides, ops):
    """1 < x <= 2 -> (1,2]; x < 2 is -oo < x < 2. None if the ends are no constants."""
    if len(sides) == 2:
        low, high = REAL_LINE.items
        if name_of(sides[0]):
            sides = (low, *sides)
            ops = ("<", *ops)
        else:
            sides = (*sides, high)
            ops = (*ops, "<")
    if len(sides) > 3 or not {*ops} <= {"<", "<="} or not name_of(sides[1]):
        return None
    ends = sides[::2]
    if not all(map(is_constant, ends)):
        return None
    opening = "(" if ops[0] == "<" else "["
    closing = ")" if ops[1] == "<" else "]"
    return Seq(opening + closing, ends)


def equal_relations(left, right, in_list=False):
    """x = 5 and 5 = x; y = 2x + 1 and 2x - y + 1 = 0; x > 1 and -2 > -2x; not x = 5 and y = 5. What
    stands alone may have any name in words: Area = 5 and x = 5, f(x) = 2x and y = 2x."""
    one = first_name(left)
    other = first_name(right)
    in_words = any(isinstance(side, str) for side in left.sides + right.sides)
    if one == other or (not in_list and (in_words or ("(" in one) != ("(" in other))):
        denoted = [denoted_value(left), denoted_value(right)]
        if None not in denoted and equal_values(*denoted):
            return True
    if left.ops != right.ops:
        return False
    if "≡" in left.ops or "∈" in left.ops:
        return all(map(equal_values, left.sides, right.sides))
    if not all(isinstance(side, Leaf) for side in left.sides + right.sides):
        return False
    steps = zip(differences(left), differences(right), left.ops)
    return all(proportional(x, y, positive="<" in op) for x, y, op in steps)


def first_name(relation):
    """The first side that only names something."""
    return next(filter(None, map(name_of, relation.sides)), "")


def differences(relation):
    """Each side minus the next."""
    return [add(x.expr, negate(y.expr)) for x, y in pairwise(relation.sides)]


def equal_collections(left, right):
    """{1,2} and {2,1}; (1,2) and the bare 1,2; not (0,1) and [0,1], nor 1,1,2 and 1,2,2."""
    kinds = {left.kind, right.kind}
    if kinds == {"and", "or"}:
        return False
    if kinds <= {*FAMILIES}:
        return all(map(equal_values, left.items, right.items))
    if "ratio" in kinds:
        return len(kinds) == 1 and equal_ratios(left.items, right.items)
    for one, other in ((left, right), (right, left)):  # x > 2, x < 5 is also (2,5)
        conditions = one.kind == "list" and all(map(is_condition, one.items))
        both = chained(one.items) if conditions and other.kind != "or" else None
        if both and equal_values(both, other):
            return True
    if "union" in kinds or kinds == {"set"}:
        ones, others = (seq.items if seq.kind in UNORDERED else [seq] for seq in (left, right))
        return is_within(ones, others) and is_within(others, ones)
    if kinds <= {*UNORDERED}:
        return equal_lists(left, right)
    if kinds == {"cases"}:
        return equal_in_some_order(left.items, right.items)
    if len(left.items) != len(right.items) or "set" in kinds:
        return False
    brackets_differ = len(kinds) == 2 and kinds.isdisjoint(("list", "and", "matrix"))
    if brackets_differ and (len(left.items) == 2 or kinds != {"()", "[]"}):
        return False  # (0,1) and [0,1] are intervals
    return all(map(equal_values, left.items, right.items))


def is_within(ones, others):
    return all(any(equal_values(one, other) for other in others) for one in ones)


def equal_lists(left, right):
    """In any order, but each value as often: 1,1,2 is not 1,2,2. Labels count: not x = 1, y = 2 and
    x = 2, y = 1; a list without labels is in the order of one with labels."""
    labels = [labels_of(seq) for seq in (left, right)]
    in_order = bool(labels[0]) != bool(labels[1]) and "set" not in (left.kind, right.kind)
    if in_order and len({*labels[0], *labels[1]}) > 1:
        return len(left.items) == len(right.items) and all(
            map(equal_values, left.items, right.items)
        )
    if all(isinstance(item, Seq) for item in left.items + right.items):  # points repeat nothing
        return is_within(left.items, right.items) and is_within(right.items, left.items)
    return equal_in_some_order(left.items, right.items)


def labels_of(seq):
    """The labels of x = 1, y = 2; none where one value has none."""
    if not all(isinstance(item, Relation) and item.ops == ("=",) for item in seq.items):
        return []
    labels = [first_name(item) for item in seq.items]
    return labels if all(labels) else []


def equal_in_some_order(ones, others):
    """Each of one side equals one of the other, which is then taken."""
    rest = [*others]
    if len(ones) != len(rest):
        return False
    for one in ones:
        place = next((i for i, other in enumerate(rest) if equal_items(one, other)), None)
        if place is None:
            return False
        del rest[place]
    return True


def equal_items(one, other):
    """As equal_values, but labels must agree."""
    if isinstance(one, Relation) and isinstance(other, Relation):
        return equal_relations(one, other, in_list=True)
    return equal_values(one, other)


def equal_ratios(ones, others):
    """1:2:3 and 2:4:6."""
    if len(ones) != len(others):
        return False
    pairs = pairwise(zip(ones, others))
    return all(
        equal_exprs(multiply(a.expr, other_b.expr), multiply(b.expr, other_a.expr))
        for (a, other_a), (b, other_b) in pairs
    )


CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?(am|pm)?", re.I)
OPTION = re.compile(r"\W{0,3}([A-J])\s{0,2}[).:]\s*(\S.*)", re.S)
# What a value looks like: a sign; an integer, a decimal, one fraction or mixed number, a number
# times a power of ten, a power; a unit.
VALUE = re.compile(
    r"[-+]?(?:dollar)?(?:"
    r"(?P<mixed>\d+(?:\s+|\s*\\[dt]?frac\s?)[\d{}/\s]+)"
    r"|(?:\d+(?:\.\d*(?:\\(?:overline|bar|dot)\{\d+\})?)?|\.\d+)(?:e[+-]?\d+)?(?:\*10\^\{?-?\d+\}?)?"
    r"|\d+(?:\.\d+)?/\d+(?:\.\d+)?"
    r"|\\frac(?:\{[-+]?[\d.]+\}|\d)(?:\{[-+]?[\d.]+\}|\d)"
    r"|(?P<power>\d+\^\{?\d+\}?)"
    r")(?:°|%|°?(?!squared|cubed|factorial|.*pi)[A-Za-z]{2,}(?:[/*][A-Za-z]+)*(?:\^\{?-?\d\}?)?"
    r"|°?[mgshLNJWVACFKT](?:[/*][A-Za-z]+)*(?:\^\{?-?\d\}?)?)?"
)


def read_clock(text):
    """(minutes on a dial of 12 hours, am or pm or "") of 4:20 pm, 16:20 and 4:20; None for other
    text and for times that no clock shows."""
    match = CLOCK.fullmatch(text)
    hour, minute, half = match.groups("") if match else ("", "", "")
    if not (minute or half) or int(minute or 0) > 59 or int(hour) > (12 if half else 24):
        return None
    if not half and not 1 <= int(hour) <= 12:
        half = "pm" if int(hour) > 12 else "am"
    return int(hour) % 12 * 60 + int(minute or 0), half.lower()


def compare(answer, reference):
    """Two answers as they stand: as text, then by value, then in another reading of either. h:mm is
    a time of day where a side says am or pm, or where the reference is written so."""
    left = parse(answer)
    right = parse(reference)
    clocks = [read_clock(left.text), read_clock(right.text)]
    if clocks[1] or (clocks[0] and clocks[0][1]):
        if None in clocks:
            return left.text == right.text
        (minutes, half), (other_minutes, other_half) = clocks
        return minutes == other_minutes and (half == other_half or not (half and other_half))
    if left.bound and right.bound:
        left = parse(answer, renamed=left.bound)
        right = parse(reference, renamed=right.bound)
    return (
        left.text == right.text
        or equal_parsed(left, right)
        or equal_in_another_reading(left, right, reference)
        or equal_in_another_reading(right, left, answer)
    )


def equal_in_another_reading(one, other, spelling):
    """The other as an option "(C) 15", which is "C" and is "15"; or 1,234 as a list, beside a
    collection."""
    option = OPTION.match(other.text)
    if option:
        letter = re.fullmatch("[A-J]", one.text.strip("()"))
        if letter:
            return option[1] == letter[0]
        return parse(option[2]).text == one.text
    listed = isinstance(one.value, Seq) and isinstance(other.value, Leaf) and "," in spelling
    return listed and equal_parsed(one, parse(spelling, thousands=False))


def equal_parsed(one, other):
    """By value; False where one did not parse, or where a number grows too large on the way."""
    if one.value is None or other.value is None:
        return False
    with contextlib.suppress(Unparsed):
        return equal_values(one.value, other.value)
    return False


def is_value(answer, value):
    """Whether nothing is left to calculate: -5, 10/2, 1 4/5, 3 × 10^5, 3+2 = 5. Not 3+2, 5!, 52_8,
    {12}34; not 2^10 nor √25, which are shorter as 1024 and 5."""
    text = parse(answer).text.rpartition("=")[2]
    for opening, closing in (("(", ")"), ("{", "}"), (r"\{", r"\}")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    match = VALUE.fullmatch(text)
    if match and match["mixed"]:
        mixed = MIXED_NUMBER.fullmatch(match["mixed"])
        return bool(mixed) and int(mixed[2]) < int(mixed[3])  # 12 34/1 is a product
    return bool(match) and not (match["power"] and bits(value) < 4 * len(match["power"]))


def is_equivalent(answer: str, reference: str, require_value: bool = False) -> bool:
    """Whether two answers are equal by the table above: "3+2" is "5". With `require_value`, where
    the reference is a rational number, an answer that is not its spelling must be a value, too, see
    is_value (a policy would answer "3+2=" with the question)."""
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer = reference_answer(answer)
    reference = reference_answer(reference)
    if not answer or not reference:
        return False
    left = parse(answer)
    right = parse(reference)
    if require_value and is_rational(right.value) and left.text != right.text:
        return is_value(answer, right.value.expr) and compare(answer, reference)
    return compare(answer, reference)


# -- grade -----------------------------------------------------------------------------------------
class Grade(NamedTuple):
    """What `grade` says of one response."""

    answer: str | None  # None: the response gives no answer
    correct: bool  # the verdict: accuracy, gates and answer classes follow it
    reward: float  # what the group advantage is computed from; any finite number


def grade(
    response: str,
    reference: str,
    *,
    problem: str = "",
    require_value: bool = False,
    in_thought: bool = False,
) -> Grade:
    """Grade one response. Training, evaluation, `score` and --audit all run this function: change
    the reward here, or give train.py a function with this signature as --reward FILE.py:FUNCTION.

    problem: its text. require_value: see is_equivalent. in_thought: the prompt ended in an open
    thought, so a response that never closes it has no answer."""
    answer = extract_answer(response, in_thought)
    correct = answer is not None and (
        is_equivalent(answer, reference, require_value) or is_choice(answer, reference, problem)
    )
    return Grade(answer, correct, reward=float(correct))


def is_choice(answer, reference, problem):
    """c for C, where the reference is a letter and the problem offers choices."""
    offered = all(re.search(rf"\({letter}\)|\b{letter}[.):]", problem) for letter in "AB")
    letter = parse(answer).text.strip("()").upper()
    return offered and letter in set("ABCDEFGHIJ") and letter == reference.strip(" ().$")


def score(
    response: str, reference: str, require_value: bool = False, in_thought: bool = False
) -> float:
    """1.0 if the response is correct, else 0.0."""
    options = {"require_value": require_value, "in_thought": in_thought}
    return float(grade(response, reference, **options).correct)


class Explanation(NamedTuple):
    """What explain says of a response."""

    correct: bool
    answer: str | None
    rule: str  # the name in RULES of what found the answer, or "none"
    why: str  # right, wrong, no answer, not a value, unparsed answer: …


def explain(
    response: str, reference: str, require_value: bool = False, in_thought: bool = False
) -> Explanation:
    r"""grade's verdict and its reason: "\boxed{5+}" -> "unparsed answer: ends too early"."""
    options = {"require_value": require_value, "in_thought": in_thought}
    answer, correct, _ = grade(response, reference, **options)
    rule = find_answer(response, in_thought).rule
    if answer is None:
        why = "no answer"
    elif correct:
        why = "right"
    elif require_value and is_equivalent(answer, reference):
        why = "not a value"
    else:
        parsed = parse(reference_answer(answer))
        why = "wrong" if parsed.value is not None else f"unparsed answer: {parsed.why}"
    return Explanation(correct, answer, rule, why)


def describe(value):
    """How an answer was read: "1 < x <= 2", "set(1, 2)", "5 cm"."""
    if isinstance(value, Leaf):
        modulus = "" if value.modulus is None else f"(mod {value.modulus})"
        return f"{value.expr} {value.unit} {modulus}".strip()
    if isinstance(value, Relation):
        sides = [describe(side) for side in value.sides]
        return sides[0] + "".join(f" {op} {side}" for op, side in zip(value.ops, sides[1:]))
    if isinstance(value, Seq):
        return f"{value.kind}({', '.join(map(describe, value.items))})"
    return f"words: {value}"


def difference(left, right):
    """Why two answers are equal, or are not."""
    if left.text == right.text:
        return "the same spelling"
    if equal_parsed(left, right):
        return "the same value"
    for parsed in (left, right):
        if parsed.value is None:
            return f"only the same text is equal to {parsed.text}: {parsed.why}"
    one, other = (unwrap_singleton(parsed.value) for parsed in (left, right))
    if type(one) is not type(other) or not isinstance(one, Leaf):
        return "see docs/checker.md for what is equal to such answers"
    if one.unit and other.unit and one.unit != other.unit:
        return "other units"
    x, y = one.expr, other.expr
    with LOCK:
        precision = choose_precision(x, y)
        for point in choose_points(x, y):
            if equal_at(x, y, point, precision, approximate=False) is False:
                found = [value_at(expr, point, precision).value for expr in (x, y)]
                values = " and ".join(NUMBERS.nstr(value, 12) for value in found)
                names = sorted(names_in([x, y]))
                place = [f" at {name} = {NUMBERS.nstr(point.value(name), 5)}" for name in names]
                return values + "".join(place)
    return "their values could not be compared"


def print_explanation(response, reference):
    """What --explain says, in printable characters."""
    correct, answer, rule, why = explain(response, reference)
    lines = [f"{'correct' if correct else 'wrong'} ({why})", f"answer     {answer} (rule: {rule})"]
    if answer is not None:
        left = parse(reference_answer(answer))
        right = parse(reference_answer(reference))
        for name, parsed in (("read as", left), ("reference", right)):
            read = f"text ({parsed.why})" if parsed.value is None else describe(parsed.value)
            lines.append(f"{name:10} {read}")
        lines.append(f"because    {difference(left, right)}")
    for line in lines:
        print(line.encode("unicode_escape").decode().replace(r"\\", "\\"))


def equal_either_way(one, other):
    return compare(one, other) or (":" in one and compare(other, one))


def answer_classes(answers: list[str | None]) -> list[int]:
    """The class of each answer, numbered by first appearance; -1 where there is none. Equality (the
    same in both directions) is closed transitively, so the partition does not depend on the
    order."""
    spellings = {answer: reference_answer(answer) for answer in answers if answer is not None}
    groups = []
    for answer, spelling in spellings.items():
        joined = [answer]
        others = []
        for group in groups:  # times of day look at the reference: in either direction, then
            if any(equal_either_way(spelling, spellings[other]) for other in group):
                joined = group + joined
            else:
                others.append(group)
        groups = [*others, joined]
    group_of = {answer: i for i, group in enumerate(groups) for answer in group}
    numbers = {None: -1}
    for answer in answers:
        numbers.setdefault(group_of.get(answer), len(numbers) - 1)
    return [numbers[group_of.get(answer)] for answer in answers]


# -- the pool of workers ---------------------------------------------------------------------------
MAX_REQUESTS = 20_000  # of one worker, against slow growth of its memory
START_SECONDS = 120.0
MAX_WARNINGS = 20  # of one Verifier, about exceptions in graders


class Group(NamedTuple):
    """What the grader said of the responses to one prompt, in their order."""

    answers: list[str | None]
    correct: list[bool]
    rewards: list[float]
    classes: list[int]  # -1: no answer; all correct responses share one class
    failed: list[str]  # "", or what the grader died of: time, cpu, memory, crash, exception


class Job(NamedTuple):
    """The responses to one prompt, and what grade needs to know."""

    responses: list[str]
    reference: str
    options: dict  # grade's keywords


class Reply(NamedTuple):
    """What came back from a worker."""

    value: object = None
    failed: str = ""  # as in Group
    error: str = ""  # of an exception: its type and message


def to_bytes(message):
    """JSON in which any str survives: a pair of lone surrogates must not become one character."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")


def from_bytes(message):
    return json.loads(message.decode("utf-8", "surrogatepass"))


def printable(text, limit=200):
    """The end of a text in printable ASCII."""
    return ascii(text[-limit:])[:limit]


def checked_grade(result) -> Grade:
    """What a user's grader returned, as a Grade; ValueError or TypeError if it is none."""
    answer, correct, reward = result
    if not isinstance(answer, str | None):
        raise TypeError(f"grade returned {type(answer).__name__} as answer; it must be str or None")
    reward = float(reward)
    if not math.isfinite(reward):
        raise ValueError(f"grade returned {reward} as reward; it must be finite")
    return Grade(answer, bool(correct), reward)


def load_grader(name):
    """The function FUNCTION of FILE.py, named "FILE.py:FUNCTION"; ValueError in one line."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{name}: a reward is written FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_reward"] = module
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    sys.modules.setdefault("reward", sys.modules[__name__])  # the file may import this one
    options = {"problem": "", "require_value": False, "in_thought": False}
    try:
        spec.loader.exec_module(module)
        grader = getattr(module, function)
        inspect.signature(grader).bind("response", "reference", **options)
    except (Exception, SystemExit) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name}: cannot be loaded ({line[:200]})") from error
    return grader


class Worker:
    """One `python reward.py --worker` after another: started when first called, killed and replaced
    when an answer exceeds a limit, replaced now and then against slow growth."""

    def __init__(self, verifier):
        self.verifier = verifier
        self.process = None
        self.pipe = None
        self.requests = 0

    def start(self):
        """RuntimeError if no worker starts; ValueError if it cannot load the user's grader."""
        verifier = self.verifier
        self.pipe, other_end = multiprocessing.Pipe()
        descriptor = other_end.fileno()
        limits = (os.getpid(), verifier.timeout, verifier.memory_mb, verifier.reward or "")
        script = os.path.abspath(__file__)
        command = [sys.executable, script, "--worker", str(descriptor), *map(str, limits)]
        self.process = subprocess.Popen(
            command,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        other_end.close()
        self.requests = 0
        reply = self.receive(START_SECONDS)
        if reply == Reply("ready"):
            return
        self.end()
        if verifier.reward:
            error = f"{verifier.reward}: the process that loads it ended, or took too long"
            raise ValueError(reply.error if reply else error)
        raise RuntimeError(f"a checker worker did not start: {' '.join(command)}")

    def receive(self, timeout):
        """The reply; None if the process died or the time is over."""
        with contextlib.suppress(OSError, EOFError):
            if self.pipe.poll(timeout):
                return Reply(*from_bytes(self.pipe.recv_bytes()))
        return None

    def call(self, function: str, *arguments, **options) -> Reply:
        """Run a function of this file, or the user's grader, in the worker."""
        if self.requests >= MAX_REQUESTS:
            self.end()
        if not self.process:
            self.start()
        self.requests += 1
        with contextlib.suppress(OSError):  # it died; receive() says so
            self.pipe.send_bytes(to_bytes([function, arguments, options]))
        reply = self.receive(self.verifier.timeout)
        return reply or Reply(failed=self.end())

    def end(self):
        """Kill the process and return what it had died of."""
        if not self.process:
            return ""
        process = self.process
        self.process = None
        died_of = "time"
        # its pipe closes a moment before it ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            died_of = "cpu" if process.wait(0.1) == -signal.SIGXCPU else "crash"
        process.kill()
        process.wait()
        self.pipe.close()
        return died_of

    def grade_response(self, response: str, job: Job) -> tuple[Grade, str]:
        """(grade, what it failed of). A response that the grader failed on is wrong, reward 0."""
        reply = self.call("grade", response, job.reference, **job.options)
        if not reply.failed:
            return Grade(*reply.value), ""
        self.verifier.count_failure(reply, response)
        answer = None
        if not self.verifier.reward:  # its answer may still be known, for its class
            answer = self.call("extract_answer", response, job.options["in_thought"]).value
        return Grade(answer, False, 0.0), reply.failed

    def grade_group(self, job: Job) -> Group:
        """Grade each distinct response once, then sort the wrong answers into classes."""
        results = {}
        for response in dict.fromkeys(job.responses):
            results[response] = self.grade_response(response, job)
        wrong = [
            grade.answer for grade, failed in results.values() if not (grade.correct or failed)
        ]
        labels = self.label_answers(
            [answer for answer in dict.fromkeys(wrong) if answer is not None]
        )

        numbers = {}  # of the classes, by first appearance
        classes = []
        for grade, _ in map(results.get, job.responses):
            if grade.correct:
                key = "correct"
            elif grade.answer is None:
                classes.append(-1)
                continue
            else:  # an answer that grading failed on is classed by its spelling
                key = (labels.get(grade.answer, "".join(grade.answer.split())),)
            classes.append(numbers.setdefault(key, len(numbers)))

        grades = [results[response][0] for response in job.responses]
        return Group(
            answers=[grade.answer for grade in grades],
            correct=[grade.correct for grade in grades],
            rewards=[grade.reward for grade in grades],
            classes=classes,
            failed=[results[response][1] for response in job.responses],
        )

    def label_answers(self, answers):
        """The class of each distinct answer; its spelling where that takes too much."""
        if len(answers) < 2:
            return {answer: answer for answer in answers}
        reply = self.call("answer_classes", answers)
        if reply.failed:
            self.verifier.count_failure(reply, ", ".join(answers))
        return dict(zip(answers, reply.value or answers))


class Verifier(contextlib.AbstractContextManager):
    """A pool of killable processes that grades groups of responses:

        with Verifier(4) as pool:
            groups = pool.grade_groups([[response, …], …], [reference, …])

    No response can hang, crash or exhaust the caller. `timeout` (seconds that one response may
    take, of wall clock and of CPU) and `memory_mb` are a last resort: the checker's own bounds stop
    work long before. reward: "FILE.py:FUNCTION", a function with grade's signature, to run instead
    of it; ValueError if it cannot be loaded. Each thread owns one worker at a time (Linux ends a
    worker with the thread that started it)."""

    def __init__(self, workers=2, timeout=10.0, memory_mb=1024, reward=None):
        if sys.platform == "win32":
            raise ValueError(
                "Verifier runs on Linux and macOS, not on Windows; use WSL, or call score()"
            )
        if workers < 1 or timeout <= 0:
            raise ValueError(
                f"workers must be at least 1 and timeout above 0, not {workers} and {timeout}"
            )
        if sys.platform != "linux":
            warnings.warn("this system has no memory limit for the checker's workers", stacklevel=2)
        self.workers = workers
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.reward = reward
        self.failures = Counter()  # by kind, see Group.failed
        self.warned = set()
        self.jobs = queue.SimpleQueue()
        self.threads = []
        self.lock = threading.Lock()
        if reward:  # loaded once to see that it can be
            worker = Worker(self)
            worker.start()
            worker.end()

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the workers; the next grade_groups() starts new ones."""
        with self.lock:
            threads = self.threads
            self.threads = []
        for _ in threads:
            self.jobs.put(None)
        for thread in threads:
            thread.join()

    def grade_groups(
        self, responses, references, *, problems=None, require_value=None, in_thought=None
    ) -> list[Group]:
        """P lists of responses and P references -> P groups, in order. Each keyword is a list of
        length P: grade's arguments for the responses to one prompt."""
        count = len(references)
        columns = {
            "problem": [""] * count if problems is None else problems,
            "require_value": [False] * count if require_value is None else require_value,
            "in_thought": [False] * count if in_thought is None else in_thought,
        }
        lengths = [len(column) for column in (responses, references, *columns.values())]
        if len(set(lengths)) > 1:
            raise ValueError(
                "responses, references, problems, require_value and in_thought must have the same "
                f"length, not {lengths}"
            )
        with self.lock:
            while len(self.threads) < self.workers:
                thread = threading.Thread(target=self.serve, daemon=True)
                self.threads.append(thread)
                thread.start()
        futures = [Future() for _ in references]
        for future, group, reference, *values in zip(
            futures, responses, references, *columns.values()
        ):
            self.jobs.put((future, Job(group, reference, dict(zip(columns, values)))))
        return [future.result() for future in futures]

    def self_consistent(self, references) -> list[bool]:
        """Whether each reference equals itself in a box: no response could earn another."""
        responses = [[f"\\boxed{{{reference}}}"] for reference in references]
        return [group.correct[0] for group in self.grade_groups(responses, references)]

    def serve(self):
        """The life of a thread: jobs from the queue, for its own worker."""
        worker = Worker(self)
        while (entry := self.jobs.get()) is not None:
            future, job = entry
            try:
                future.set_result(worker.grade_group(job))
            except Exception as error:  # belongs to the caller of grade_groups()
                future.set_exception(error)
        worker.end()

    def count_failure(self, reply, text):
        """Count it; on stderr say each exception once, with the text that raised it."""
        self.failures[reply.failed] += 1
        if not reply.error or reply.error in self.warned or len(self.warned) >= MAX_WARNINGS:
            return
        self.warned.add(reply.error)
        line = f"WARNING grading raised {printable(reply.error)} on {printable(text)}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            print(f"{line}: counted as wrong", file=sys.stderr, flush=True)


def limit_worker(parent, memory_mb):
    """A worker ends with its parent and cannot exceed its memory."""
    import resource  # not there on Windows, where Verifier says so by name

    # Ctrl-C and preemption are the trainer's to handle
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    if os.getppid() != parent:  # it ended before the death signal was set
        sys.exit()


def limit_cpu(seconds):
    """From now on, this process is ended after so many seconds of CPU."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def answer_request(functions, request):
    """Run what was asked for. An exception is an answer, too: the worker stays."""
    name, arguments, options = request
    try:
        return Reply(functions[name](*arguments, **options))
    except MemoryError:
        return Reply(failed="memory")
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Reply(failed="exception", error=line[:200])


def serve_requests(pipe, parent, timeout, memory_mb, reward):
    """A worker's life. It ends with its parent (EOF, and the death signal on Linux) and on a
    runaway answer (CPU, memory)."""
    limit_worker(parent, memory_mb)
    connection = multiprocessing.connection.Connection(pipe)
    try:
        grader = load_grader(reward) if reward else grade
    except ValueError as error:
        connection.send_bytes(to_bytes(Reply(failed="exception", error=str(error))))
        return
    functions = {
        "grade": lambda *arguments, **options: checked_grade(grader(*arguments, **options)),
        "extract_answer": extract_answer,
        "answer_classes": answer_classes,
    }
    # sympy loads lazily: not on the first answer's time
    is_equivalent("x/2 + 1/2", r"\frac{x+1}{2}")
    reply = Reply("ready")
    with contextlib.suppress(OSError, EOFError):
        while True:
            connection.send_bytes(to_bytes(reply))
            request = from_bytes(connection.recv_bytes())
            limit_cpu(timeout)
            reply = answer_request(functions, request)


# -- audit -----------------------------------------------------------------------------------------
def text_of(fields, *names: str):
    """The first of these fields that is text."""
    return next((fields[name] for name in names if isinstance(fields.get(name), str)), None)


def audit_line(fields, place):
    """(seconds, rule, verdict, a line to show) of one line of a file."""
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: a JSON object is needed")
    response = text_of(fields, "response", "pred", "completion")
    reference = text_of(fields, "reference", "gold", "answer")
    if response is None or reference is None:
        raise ValueError(f'{place}: "response" and "reference" are needed, as text')
    start = time.perf_counter()
    options = {name: bool(fields.get(name)) for name in ("require_value", "in_thought")}
    _, answer, rule, why = explain(response, reference, **options)
    seconds = time.perf_counter() - start
    line = f"  {place}: {str(answer)[:60]!a} for {reference[:60]!a} ({rule}; {why})"
    return seconds, rule, why.split(":")[0], line


def audit(path: str, shown: int = 5) -> None:
    """What the checker made of a JSONL of responses: found by which rule, parsed or not, the
    slowest, and examples."""
    results = []
    with open(path, encoding="utf-8") as file:
        for row, text in enumerate(file, 1):
            place = f"{path}:{row}"
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            results.append(audit_line(fields, place))
    examples = {}
    for _, _, verdict, line in results:
        examples.setdefault(verdict, []).append(line)
    for title, column in (("found by", 1), ("verdicts", 2)):
        counts = Counter(result[column] for result in results).most_common()
        print(f"{title}:", ", ".join(f"{name} {n} ({n / len(results):.1%})" for name, n in counts))
    print("slowest:")
    for seconds, _, _, line in sorted(results, reverse=True)[:shown]:
        print(f"{line} {seconds * 1e3:.1f} ms")
    for verdict, lines in examples.items():
        print(f"{verdict}:", *lines[:: max(1, len(lines) // shown)][:shown], sep="\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:  # started by Worker.start
        pipe, parent, timeout, memory_mb, reward = argv[1:]
        serve_requests(int(pipe), int(parent), float(timeout), int(memory_mb), reward)
        return
    parser = argparse.ArgumentParser(description="Check answers of models.")
    commands = parser.add_mutually_exclusive_group(required=True)
    commands.add_argument("--audit", metavar="FILE", help="JSONL of response and reference")
    commands.add_argument(
        "--explain",
        metavar=("RESPONSE", "REFERENCE"),
        nargs=2,
        help="the answer found, how both are read, and why they are equal or not",
    )
    args = parser.parse_args(argv)
    if args.explain:
        print_explanation(*args.explain)
        return
    try:
        audit(args.audit)
    except (OSError, ValueError) as error:
        print(f"reward.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
