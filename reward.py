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
import re
import signal
import subprocess
import sys
import threading
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
MAX_WORK = 2_400_000  # of one numeric evaluation, see value_at; below 0.1 s
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


def local_file(path):
    """The path itself, or the local copy of hf://datasets/OWNER/NAME[@REVISION]/FILE, which
    huggingface_hub keeps."""
    if not path.startswith("hf://"):
        return path
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
    path = local_file(path)
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
            except (ValueError, RecursionError) as error:  # of the encoding, too
                message = (
                    f"{path}:{row + 1}: not UTF-8 text or not JSON ({error}); write one a line"
                )
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
    file = local_file(str(path))
    if file.endswith(".parquet"):
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
    if type(answer) in (int, float) and answer * 0 == 0:  # neither NaN nor infinite
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


def load_problems(path, dropped: Counter | None = None, shapes=SHAPES) -> list[Problem]:
    """The problems of a file in one of `shapes`.

    Malformed lines are refused by file and line. Counted in `dropped` by reason: answers that are
    empty or over the checker's limits, which no response could earn, and empty or repeated
    problems."""
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
        if not (answer and text):
            dropped["empty problem or answer"] += 1
        elif len(answer) > MAX_ANSWER:
            dropped["answer over the checker's limits"] += 1
        else:
            answers[text] = problem.answer
            problems.append(problem._replace(answer=answer))
    return problems


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


def find_boxes(text):
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
        return sentence if hedged or CONTINUED.match(sentence, number.end()) else number[0]
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
    return match[match.lastindex]


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


def find_answer(text, in_thought=False):
    """The answer by the first rule that finds one. A sentence in a box is read by INNER_RULES."""
    reply = after_thinking(text, in_thought) if isinstance(text, str) else None
    if not reply:
        return Found(None, "none")
    reply = SPECIAL.sub("\n", reply[-MAX_RESPONSE:])
    for name, rule in RULES.items():
        answer = rule(reply)
        if name == "box" and answer and not is_readable(answer):
            label = RULES["label"](reply[find_boxes(reply)[-1].end :])
            if label and re.fullmatch(r"\(?[A-J]\)?", label):  # a statement, then "Answer: D"
                return Found(label, "label")
            if parse(answer).value is None:  # perhaps a sentence
                inner = (RULES[other](answer) for other in INNER_RULES)
                answer = next(filter(None, inner), answer)
        if answer:
            return Found(answer, name)
    return Found(None, "none")


def extract_answer(text: str, in_thought: bool = False) -> str | None:
    r"""The final answer of a response, or None; never the whole response: "so $x=\boxed{\frac12}$."
    -> "\frac12"."""
    return find_answer(text, in_thought).answer


@lru_cache(maxsize=512)
def reference_answer(text):
    """The answer in a reference, which may be bare, in dollars, boxed, or a whole solution that
    ends in #### or "the final answer is"."""
    for rule in ("box", "hashes", "final"):
        answer = RULES[rule](text)
        if answer:
            return answer
    return text.strip()


# -- normalise -------------------------------------------------------------------------------------
def read_table(text):
    """Lines of our spelling and those of others -> {each of the others: ours}."""
    lines = map(str.split, text.strip().splitlines())
    return {spelling: ours for ours, *spellings in lines for spelling in spellings}


GREEK = read_table("""
alpha α
beta β
gamma γ
delta δ
epsilon ε
zeta ζ
eta η
theta θ
iota ι
kappa κ
lambda λ
mu μ
nu ν
xi ξ
rho ρ
sigma σ
tau τ
upsilon υ
phi φ
chi χ
psi ψ
omega ω
Gamma Γ
Delta Δ
Theta Θ
Lambda Λ
Xi Ξ
Sigma Σ
Phi Φ
Psi Ψ
Omega Ω
Pi Π
""")
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
\lfloor ⌊
\rfloor ⌋
\lceil ⌈
\rceil ⌉
"""),
    **{letter: f"\\{name}" for letter, name in GREEK.items()},
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
# \frac12; m\angle A; \overline{AB}; Ann is 5; lg
(\\[dtc]?frac|\\[dt]?binom)\s*(\d)\s*(\d)(?!\d) ==> \1{\2}{\3}
\bm\s*(?=\\angle) ==>
\\(?:overline|widehat)\s*\{\s*([A-Z]{2,3})\s*\} ==> \1
^([^,=\d]*)\b(?:is|are)\s*(\}?)\s*(?=[-\d.(]|\\(?:frac|sqrt|pi)) ==> \1\2=
\bbinomial\(([^(),]+),([^(),]+)\) ==> \\binom{\1}{\2}
\blog\(([^(),]+),([^(),]+)\) ==> \\log_{\2}(\1)
\\?\blg\b ==> \\log_{10}
# twenty-one
(?i)\b((?:twen|thir|for|fif|six|seven|eigh|nine)ty)[- ](one|two|three|four|five|six)\b ==> (\1+\2)
(?i)\b((?:twen|thir|for|fif|six|seven|eigh|nine)ty)[- ](seven|eight|nine)\b ==> (\1+\2)
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
(?i:\bis congruent to\b)|\\equiv\b ==> ≡
# a variable that is real; {x | x > 0}
[,;]\s*[a-z]\s*(?:\\in|∈)\s*ℝ\s*$ ==>
(\\\{\s*[a-z])\s*(?:\\in|∈)\s*ℝ(?=\s*(?:[|:]|\\mid|\\colon)) ==> \1
\\(?:mid|colon)\b(?=.*\\\}) ==> :
(\\\{\s*(?![\s|])(?:[^|:\\]|\\[^{}])+?)[|:](?=.*(?:[<>=∈≡]|\\(?:in|[lg]eq?|neq?)\b)) ==> \1∣
# (mod 7); x ≡ 1, 3 (mod 8)
\\text\s*\{\s*\(\s*mod\s*([^(){}]*)\)\s*\} ==> \\mod{\1}
(?:\\text\s*\{\s*)?\(\s*(?:\\text\s*\{\s*)?\\?[bp]?mod(?:ulo)?\b\s*\}?\s*([^()]+)\) ==> \\mod{\1}
(\w ?≡)(\s*-?\d+)\s*(?:,|(?:\\text\{ ?)?(?:or|and) ?\}?)(?=[^≡]*(\\[bp]?mod\b.*)$) ==> \1\2\3, \1
(\w ?≡)(\s*-?\d+)\s*(?:,|(?:\\text\{ ?)?(?:or|and) ?\}?)(?=[^≡]*(\\[bp]?mod\b.*)$) ==> \1\2\3, \1
# 1.5 x 10^3, (0,1) U (2,3), x in (0,1), log2(8), option B, 3 square feet, 10:45 a.m.
(?<=\d)\s*[xX]\s*(?=10\s?\^) ==> *
(?<=[)\]}])\s*U\s*(?=[(\[\\]) ==> \\cup
(?<!\\)\bin\b(?=\s*[(\[{\\]) ==> ∈
\blog(\d+)\( ==> log_{\1}(
(?i:^\W{0,3}(?:option|choice)\s+)(?=\W?[A-J]\W?$) ==>
\b(?:square|sq\.?) ([A-Za-z]+) ==> "\1"^2
(?i:\b([ap])\.m\b\.?) ==> \1m
# 3{:}45, 1{.}234, {10 \choose 3}, x^2_1, \color{red}
\{\s*([:.])\s*\} ==> \1
^\s*(-?\d{1,3})\.(\d{3})\.(\d{3})(?:\.(\d{3}))?\s*$ ==> \1\2\3\4
^\s*(-?\d{1,3})\.(\d{3})(?:\.(\d{3}))?,(\d+)\s*$ ==> \1\2\3.\4
(?:\{\s*\})?[_^]\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}? ==> \\binom{\1}{\2}
\{\s*([^{}\\]+)\\choose\b\s*([^{}\\]+)\} ==> \\binom{\1}{\2}
([A-Za-z])\^(\w|\{[^{}]*\})\s*_(\w|\{[^{}]*\}) ==> \1_\3^\2
\\(?:text)?color\s*\{[^{}]*\} ==>
# rows: \left\{ that \right. closes; a comma or point at the end
\\left\s*\\\{\s*(?=\\begin) ==>
[.,;]\s*(?=\\\\(?!\w)|\\end\b|&) ==>
\\\\\s*(?=\\end\b) ==>
&\s*(?=[<>=~≡]|\\(?:[lg]eq?|neq?|approx)\b) ==>
([<>=~≡]|\\(?:[lg]eq?|neq?|approx)\b)\s*& ==> \1
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
\b(\d\d?)(?:st|nd|rd|th)?(?: of)? ((?:Jan|Febr)uary|March|April|May|June|July|August)\b ==> \2 \1
\b(\d\d?)(?:st|nd|rd|th)?(?: of)? ((?:Septem|Octo|Novem|Decem)ber)\b ==> \2 \1
((?:uary|March|April|May|June|July|August|ber)) (\d\d?)(?:st|nd|rd|th)\b ==> \1 \2
(?i)\b(one|two|three|four|five|six|seven)-(\w*(?:ths?|thirds?|half|halves|quarters?))\b ==> \1 \2
\\(?:mathbf|hat|vec|bm|boldsymbol)\s*\{?\s*\\?([ijk])(?:math)?\b\s*\}? ==> \1_{unit}
^\s*([^_,]*)i_\{unit\}\s*\+?([^_,]*)j_\{unit\}\s*\+?([^_,]*)k_\{unit\}\s*$ ==> (\1(1),\2(1),\3(1))
^\s*([^_,]*)i_\{unit\}\s*\+?([^_,]*)j_\{unit\}\s*$ ==> (\1(1),\2(1))
(?<=\d)(?:\\[,;: ]|[\s~])*\\(?:Omega|ohm)\b ==> "ohm"
\\frac\{\\(?:text|mathrm)\{(\w+)\}\}\{\\(?:text|mathrm)\{(\w+)\}\} ==> \\text{\1/\2}
# units of one letter: 5\ \mathrm N, 5\,\mathrm{N\cdot m}
(?<=[\d})°])(?:\\[,;:! ]|[\s~])*\\(?:text|mathrm|rm)\s*\{?\s*([NJWVACFKT])(?![\w.]) ==> \\text{"\1"
(\\text\{"\w")(?=\s*(?:[^\s}\\*/]|\\[^c]|$)) ==> \1}
%(?=pi\b|[ei]\b) ==>
# 5 squared
(?i)\\text\s*\{\s*squared\s*\}|\bsquared\b ==> ^2
(?i)\\text\s*\{\s*cubed\s*\}|\bcubed\b ==> ^3
(?i)\\text\s*\{\s*factorial\s*\}|\bfactorial\b ==> !
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
    word = r'(?<![A-Za-z\\"])(?:[A-Za-z]{2,}|[mgshL](?![A-Za-z])|a(?= [a-z]{2}))'
    return " " + re.sub(word, r'"\g<0>"', match[1]) + " "


def normalise(text, thousands=True):
    r"""Undo what does not change the mathematics: "$1,234.50$." -> "1234.50", "12\,345" -> "12345",
    "3½" -> "3 1/2"."""
    text = RAISED_FRACTION.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = LOWERED.sub(r"_{\g<0>}", RAISED.sub(r"^{\g<0>}", text))
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).replace("⁄", "/")
    text = text.replace("\u2212", "-").replace(r"\$", ' "dollar" ').replace("$", " ")
    text = re.sub(r"\s+", " ", text)  # one space: the rules below take linear time
    for pattern, new in () if SIMPLE.fullmatch(text) else REWRITES:
        text = pattern.sub(new, text)
    text = PLAIN_UNIT.sub(r' "\1"', TEXT.sub(quote_words, text))
    text = SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(r"(?<!\\)\\[,;:!\s]", " ", text).strip().rstrip("\\.,; \n\t")
    # inside brackets a comma separates values
    if thousands and not re.search(r"[(\[]|\\\{|\\lbrace", text):
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text


# -- tokens ----------------------------------------------------------------------------------------
FUNCTIONS = {  # our name -> sympy's
    "ln": "log",
    "abs": "Abs",
    "ceil": "ceiling",
    "sgn": "sign",
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot")},
    **{
        name: name
        for name in str.split(
            "sin cos tan cot sec csc sinh cosh tanh asin acos atan log exp sqrt floor cis"
        )
    },
}
CONSTANTS = {
    "pi": sympy.pi,
    "e": sympy.E,
    "i": sympy.I,
    **dict.fromkeys(("inf", "infinity", "oo"), sympy.oo),
}
KNOWN = {*FUNCTIONS, *CONSTANTS, *GREEK.values()}


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
    # f(x), f^{-1}(x); P(X=2) and "Var"(X) before an equals sign
    r"|(?P<call>(?:[fghFGH]'*(?:\^\{?-?\d\}?)?\s?(?=\()|(?:[A-Z]|\"[A-Za-z]+\")\s?(?=\([^=]*(?:=[^=]*)?\)\s*[=~]))"
    r"\((?:[^()]|\([^()]*\))*\)|[a-z]\([\w\s\\]*\)(?=\s*[=~]))"
    # a word in quotes, as units are: "m", "kg" \cdot "m" / "s"^2
    r'|(?P<text>"[A-Za-z]+"(?:\s*(?:[*/]|\\cdot)\s*"?[A-Za-z]+"?|\s*\^\s*\{?-?[123]\}?)*)'
    r"|\\(?P<command>[A-Za-z]+|.)|(?P<word>[A-Za-z]+)"
    r"|(?P<subscript>_\s*(?:[A-Za-z0-9]|\\[a-z]+|\{(?:[^{}]|\{[^{}]*\})*\}))"
    r"|(?P<op>\*\*|<=|>=|<>|!=|==|=<|=>|[-+*/^_=<>!%|(){}\[\],;:&'°ℝ~∈≡∣])",
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
DIGITS = read_table("""
0 zero
1 one
2 two
3 three
4 four
5 five
6 six
7 seven
8 eight
9 nine
10 ten
11 eleven
12 twelve
13 thirteen
14 fourteen
15 fifteen
16 sixteen
17 seventeen
18 eighteen
19 nineteen
20 twenty
30 thirty
40 forty
50 fifty
60 sixty
70 seventy
80 eighty
90 ninety
""")
KINDS = {"bracket": "op", "mixed": "number", "call": "name"}  # of tokens, where TOKEN has others
# Words, and what they are whether quoted or not.
VOCABULARY = {
    **{word: Token("number", digits) for word, digits in DIGITS.items()},
    **{word: Token("text", word) for word in str.split("and or yes no not are sum was but since")},
    **dict.fromkeys(("negative", "minus"), Token("op", "-")),
    **dict.fromkeys(("mod", "modulo"), Token("op", "\\mod")),
    **{name: Token("name", name) for name in KNOWN if len(name) > 1},
}
ENVIRONMENTS = str.split(
    "matrix pmatrix bmatrix array cases aligned align align* alignat gathered split"
)
BRACKETS = {  # each with what may close it
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}",),
    "\\{": ("\\}",),
    "|": ("|",),
    "\\lfloor": ("\\rfloor",),
    "\\lceil": ("\\rceil",),
    **{f"begin{{{name}}}": (f"end{{{name}}}",) for name in ENVIRONMENTS},
}
BRACKET_FUNCTIONS = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}
SUCH_THAT = "∣"  # the bar of a set {x | x > 0}
# Operators that begin a value.
PREFIXES = {*BRACKETS, *str.split(r"\frac \binom \sum \prod \emptyset")}
OPERATORS = PREFIXES | {
    *chain.from_iterable(BRACKETS.values()),
    *str.split(r"\cup \setminus \ldots \\ \pm \mp \mod"),
}
UNITS = read_table("""
cm cm centimeter centimetre
mm mm millimeter millimetre
km km kilometer kilometre
m m meter metre
ft ft foot feet
in in inch inches
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
UNITS |= {f"{name}s": unit for name, unit in UNITS.items() if len(name) > 1}
# A unit that is not in \text{…}.
PLAIN_UNIT = re.compile(
    rf"(?<=[\d)}}])\s*({'|'.join(name for name in UNITS if len(name) > 1)})(?![A-Za-z])", re.I
)


def unit_name(word):
    """The unit that a word spells: "Inches" -> "in"; "?" for other words."""
    return UNITS.get(word) or UNITS.get(word.lower(), "?")


class Unparsed(ValueError):
    """Not in our grammar, or beyond the limits: the answer stays text."""


def tokenise(text):
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
            tokens += read_token(kind, match[kind], tokens[-1:])
    return tokens


def read_token(kind, value, before):
    """The tokens of one match of TOKEN; `before` holds the token before it."""
    if kind in ("word", "text"):
        word = value.strip('"')
        known = VOCABULARY.get(word) or VOCABULARY.get(word.lower())
        if known:
            return [known]
    if kind == "word" and len(value) > (1 if before and before[0].kind == "text" else 3):
        return [Token("text", value)]
    if kind == "word":  # a product of letters
        return [Token("name", letter) for letter in value]
    if kind == "command":
        return read_command(value)
    if kind in ("text", "call"):
        value = re.sub(r'["\s{}]', "", value.replace(r"\cdot", "*"))
    elif kind == "subscript":
        value = "_" + re.sub(r"^_\s*\{?|\}$|\s", "", value)
    elif len(value) == 2:  # ** and such
        value = SPELLINGS.get(value, value)
    return [Token(KINDS.get(kind, kind), value)]


def read_command(name):
    r"""A LaTeX command: \pi is a name, \cdot an operator, \left nothing, \foo unknown."""
    spelling = SPELLINGS.get(name, name if name in KNOWN else f"\\{name}")
    if spelling in KNOWN:
        return [Token("name", spelling)]
    if spelling[:1] == "\\" and spelling not in OPERATORS:
        return [Token("command", spelling)]
    return [Token("op", spelling)] if spelling else []


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


def is_kind(value, *kinds):
    return isinstance(value, Seq) and value.kind in kinds


def is_rational(value):
    return isinstance(value, Leaf) and value.expr.is_Rational


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
    if len(decimal.lower().partition("e")[2]) > 5:
        raise Unparsed("exponent too large")
    value = Rational(f"0{decimal}")
    digits = re.sub(r"\D", "", period)
    if digits:
        places = len(decimal.partition(".")[2])
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


def apply_function(name, value):
    """A function of one value by its name: ln x, |x|, floor(7/2) -> 3."""
    if name == "exp":
        return power(sympy.E, value)
    if name == "cis":
        return power(sympy.E, multiply(sympy.I, value))
    function = getattr(sympy, FUNCTIONS[name])
    return function(value, evaluate=value.is_Rational and function in OF_REALS)


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
LEVELS = {  # how tightly operators bind
    ":": 0.5,
    **dict.fromkeys(SIGNS_OF_TERMS, 1),
    **dict.fromkeys("*/", 2),
    **dict.fromkeys("^!°", 4),
}
# Words behind a number, and what they multiply it by.
FACTORS = read_table("""
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
""")
DEGREE = divide(sympy.pi, Integer(180))
REAL_LINE = Seq("()", (Leaf(negate(sympy.oo)), Leaf(sympy.oo)))
FRACTIONS = {"\\frac": divide, "\\binom": binomial}
SERIES = {"\\sum": add, "\\prod": multiply}
SETS = {"\\emptyset": Seq("set", ()), "ℝ": REAL_LINE}
NO_SOLUTION = re.compile("no (?:real )?solutions?|none|empty set")


class Parser:
    """Recursive descent over the tokens of one answer: "x = 1, 2" -> Relation(x = 1), Leaf(2)."""

    def __init__(self, tokens):
        self.tokens = [*tokens, Token("end", "")]
        self.at = 0
        self.depth = 0
        self.steps = 0
        self.leaves = 0
        self.sign = 1  # which of the two values of ± is being read
        self.unit = ""  # of the leaf being read
        self.rounded = False  # whether that leaf holds a decimal that is no integer
        self.bars = False  # whether | closes something
        self.in_function = False  # whether the argument of a function is being read
        self.summed = {}  # summation variables

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

    def accept(self, *texts):
        """Step over the next token if it is one of these."""
        return self.peek in texts and bool(self.next())

    def expect(self, *texts):
        """Step over the next token, which must be one of these."""
        if not self.accept(*texts):
            raise Unparsed(f"{texts[0]} expected")

    def answer(self):
        """All of the tokens: one value, or a bare list."""
        value = join_values(*self.parse_list())
        if self.kind != "end":
            raise Unparsed(f"unexpected {self.peek}")
        return value

    def parse_list(self, expand=True):
        r"""Values between separators, and "and" or "or" if one of them is what separates them. A
        value with ± is read twice: 1 \pm 2, 5 -> 3, -1, 5. In (1 \pm 2)/3 it is the whole that has
        two values, so brackets other than a set's do not expand it."""
        outer = self.sign
        values = []
        words = set()
        while not values or self.peek in SEPARATORS:
            if values:
                words.add(self.next().text)
            while values and self.peek in ("and", "or"):  # 1, 2, and 3
                words.add(self.next().text)
            start = self.at
            self.sign = 1 if expand else outer
            values.append(self.relation())
            signs = [it for it in self.tokens[start : self.at] if it.text in ("\\pm", "\\mp")]
            if expand and signs:
                self.at = start
                self.sign = -1
                other = self.relation()
                if other != values[-1]:  # a set within has both already
                    values.append(other)
        self.sign = outer
        words &= {"and", "or"}
        return values, words.pop() if len(words) == 1 else ""

    def relation(self):
        """A value, or a chain of them: "x = 5", "Area = 5", "3 > x > 1" as "1 < x < 3",
        "1/3 ~ 0.33" as 1/3."""
        self.accept("=", "~")  # "≈ 3.14"
        sides = [self.union()]
        ops = []
        while self.peek in RELATIONS:
            op = self.next().text
            side = self.union()
            if op == "~" and not name_of(sides[-1]):  # 1/3 ≈ 0.33 is 1/3; but x ≈ 11 is x = 11
                continue
            sides.append(side)
            ops.append(op.replace("~", "="))
        if not ops:
            return sides[0]
        if ops[0] in (">", ">="):
            sides.reverse()
            ops = [TURNED.get(op, op) for op in reversed(ops)]
        return Relation(tuple(sides), tuple(ops))

    def union(self):
        r"""(-\infty,1) \cup \{2\}; \mathbb{R} \setminus \{1\} as two intervals."""
        pieces = [self.leaf()]
        if pieces == [REAL_LINE] and self.accept("\\setminus"):
            return complement(self.leaf())
        while self.accept("\\cup"):
            pieces.append(self.leaf())
        return pieces[0] if len(pieces) == 1 else Seq("union", tuple(pieces))

    def leaf(self):
        """An expression with its unit or percent sign; or a bracketed value; or words (a str)."""
        self.leaves += 1
        if self.leaves > MAX_LEAVES:
            raise Unparsed("too many values")
        outer = (self.unit, self.rounded)
        self.unit = "dollar" if self.accept("dollar") else ""
        self.rounded = False
        value = self.words() or self.expression()
        if isinstance(value, sympy.Expr):
            while self.peek in FACTORS:
                value = multiply(value, Rational(FACTORS[self.next().text]))
            self.read_unit(value)
            modulus = self.operand(3) if self.accept("\\mod") else None
            value = Leaf(value, self.rounded, self.unit, modulus)
        self.unit, self.rounded = outer
        return value

    def words(self):
        r"""Words and the single letters among them, without articles, or what they say a thing is:
        "The triangle is isosceles" -> "isosceles"; \angle A. "" where no word comes."""
        words = []
        while self.kind in ("text", "command") or (words and self.kind == "name"):
            if self.peek in SEPARATORS:
                break
            words.append(self.next().text)
        text = " ".join(words).casefold()
        text = re.sub(r".*\b(?:is|are) |\b(?:an?|the) ", "", text)
        if NO_SOLUTION.fullmatch(text):
            return Seq("set", ())
        return text.removesuffix(" solutions")  # infinitely many

    def read_unit(self, value):
        r"""What follows a number: 33 pct, 5 cm, 3 \text{m/s}^2; other words (42 apples) are
        dropped."""
        words = ["%"] if self.accept("%") else []
        while self.kind == "text" and self.peek not in SEPARATORS:
            words.append(self.next().text)
        if not VALUE_WORDS.isdisjoint(words):
            raise Unparsed("a word that changes the value")
        unit = re.sub("[A-Za-z]+", lambda word: unit_name(word[0]), " ".join(words)).replace(
            " ", ""
        )
        if "?" not in unit:
            self.unit = unit or self.unit
        elif value.free_symbols:
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
        if self.peek == "|":
            return not self.bars
        return self.kind in ("number", "name") or self.peek in PREFIXES

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
        if op == "*":
            return self.product(left)
        if op == "°" and not self.in_function:
            self.unit = "deg"
            return left
        left = as_expr(left)
        if op == "°":
            return multiply(left, DEGREE)
        if op == "!":
            return factorial(left)
        if op == "^":  # powers are read from right to left
            return power(left, self.operand(3))
        if op == "/":
            return divide(left, self.operand(2))
        terms = [left, self.operand(LEVELS[":"])]
        while self.accept(":"):  # a:b:c is no quotient
            terms.append(self.operand(LEVELS[":"]))
        return divide(*terms) if len(terms) == 2 else Seq("ratio", tuple(map(Leaf, terms)))

    def product(self, left):
        """2x; 2 (1, 2) is (2, 4); A(1, 2) is a point and its name."""
        right = self.expression(2)
        if not isinstance(right, Seq):
            return scale(left, right)
        if as_expr(left).is_Symbol and left.name.isupper():
            return Relation((Leaf(left), right), ("=",))
        return scale(right, left)

    def operand(self, level=5):
        """A value in arithmetic. At level 5 it is without operators: of a fraction, a root …"""
        return as_expr(self.expression(level))

    def read(self, kind, text):
        """What begins with this token."""
        if kind == "number":
            return self.number(text)
        if kind == "name":
            return self.function(text) if text in FUNCTIONS else self.symbol(text)
        if text in BRACKETS:
            return self.environment(text) if "begin" in text else self.group(text)
        if text in FRACTIONS:
            top = self.operand()
            return FRACTIONS[text](top, self.operand())
        if text in SERIES:
            return self.series(SERIES[text])
        if text in SETS:
            return SETS[text]
        raise Unparsed(f"{text} is not a value")

    def number(self, text):
        """A number, perhaps with the base it is written in: 101_2."""
        if self.kind == "subscript":
            return number_in_base(text, self.next().text[1:])
        value = parse_number(text)
        if "." in text and "\\" not in text and not value.is_Integer:
            self.rounded = True
        return value

    def symbol(self, name):
        """A constant, or a variable with its subscript and primes."""
        if name in self.summed:
            return self.summed[name]
        if self.kind == "subscript":
            name += self.next().text
        elif name in CONSTANTS:
            return CONSTANTS[name]
        while self.accept("'"):
            name += "'"
        return Symbol(name)

    def function(self, name):
        r"""\sin^2 x, \sin^{-1} x, \log_2 8, \sqrt[3]{2}; sin 2x cos x is sin(2x) cos(x)."""
        if name == "sqrt":
            index = self.operand() if self.peek == "[" else Integer(2)
            return root(self.operand(), index)
        base = parse_within(self.next().text[1:]) if self.kind == "subscript" else None
        exponent = self.operand(3) if self.accept("^") else None
        if exponent == -1 and f"arc{name}" in FUNCTIONS:
            name = f"arc{name}"
            exponent = None
        outer = self.in_function
        self.in_function = True
        result = apply_function(name, self.argument())
        self.in_function = outer
        if base is not None:
            result = divide(result, apply_function("log", base))
        return result if exponent is None else power(result, exponent)

    def argument(self):
        r"""In brackets, or the product that follows: x in sin 2x, \frac in sin 2\frac x3."""
        if self.peek in ("(", "{"):
            return self.operand()
        value = self.operand(2)
        while self.value_ahead() and self.peek not in ("(", *FUNCTIONS):
            value = multiply(value, self.operand(3))
        return value

    def group(self, opening):
        """One value in brackets, or several; {3k | k ∈ ℤ}; ⌊x⌋; |x|."""
        outer = self.bars
        self.bars = opening == "|"
        is_set = opening == "\\{"
        items, word = ([], "") if self.peek == "\\}" else self.parse_list(expand=is_set)
        condition = join_values(*self.parse_list()) if self.accept(SUCH_THAT) else None
        closing = self.peek
        self.expect(*BRACKETS[opening])
        self.bars = outer
        if condition:
            return build_set(items[0], condition)
        if is_set and items and is_membership(items[-1]):  # {2k, k ∈ ℤ}
            return join_values(items, word)
        if is_set or (opening == "{" and len(items) > 1):
            return Seq("set", tuple(items))
        if len(items) > 1:
            return Seq(opening + closing, tuple(items))
        value = self.bracketed(items[0])
        if opening in BRACKET_FUNCTIONS:
            return apply_function(BRACKET_FUNCTIONS[opening], as_expr(value))
        return value

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

    def environment(self, opening):
        r"""\begin{pmatrix}1&2\\3&4\end{pmatrix}; equations one below the other; cases."""
        rows = [[]]
        separator = "&"
        while separator not in BRACKETS[opening]:
            while self.accept("&", "if", "for", "when", "where"):
                pass
            rows[-1] += self.parse_list(expand=False)[0]
            separator = self.peek
            self.expect("&", "\\\\", *BRACKETS[opening])
            if separator == "\\\\":
                rows.append([])
        return value_of_rows(rows, opening)

    def series(self, combine_terms):
        r"""\sum_{k=a}^{b} term with integers a and b: the term is read once for each k."""
        variable, _, low = self.next().text[1:].partition("=")
        self.expect("^")
        high = self.operand()
        low = parse_within(low)
        if not (low.is_Integer and high.is_Integer and 0 <= high - low < MAX_STEPS):
            raise Unparsed("not a simple sum")
        start = self.at
        outer = self.summed
        terms = []
        for k in range(int(low), int(high) + 1):
            self.at = start
            self.summed = {**outer, variable: Integer(k)}
            terms.append(self.operand(1))
        self.summed = outer
        return combine_terms(*terms)


def parse_within(text):
    """The expression in a subscript: 2 in log_2."""
    return as_expr(Parser(tokenise(text)).answer())


def value_of_rows(rows, opening):
    """A matrix of its rows; one row or column: of its entries. Equations one below the other: a
    list. Rows of a value and its condition: cases."""
    cells = tuple(chain.from_iterable(rows))
    lengths = {len(row) for row in rows}
    is_matrix = all(isinstance(cell, Leaf) for cell in cells) and "cases" not in opening
    if len(lengths) == 1 and is_matrix:
        if len(rows) == 1 or lengths == {1}:
            return Seq("matrix", cells)
        return Seq("matrix", tuple(Seq("matrix", tuple(row)) for row in rows))
    if "matrix" in opening:
        raise Unparsed("not a matrix")
    if lengths == {2} and not isinstance(cells[0], Relation):
        return Seq("cases", tuple(Seq("case", tuple(row)) for row in rows))
    return join_values(cells)


def build_set(template, condition):
    """{x | x > 0} is what the condition says; others keep the template."""
    if isinstance(template, Relation) and template.ops == ("∈",):
        condition = Seq("list", (template, condition))
        template = template.sides[0]
    elif isinstance(template, Leaf) and template.expr.is_Symbol:  # whose name does not count
        return (is_condition(condition) and denoted_value(condition)) or condition
    return Seq("builder", (template, condition))


def is_condition(value):
    """An inequality."""
    return isinstance(value, Relation) and not {*value.ops} <= {"=", "∈", "≡"}


def is_membership(value):
    """k ∈ ℤ"""
    return (
        isinstance(value, Relation)
        and value.ops == ("∈",)
        and isinstance(value.sides[1], Leaf)
        and value.sides[1].expr.is_Symbol
    )


def join_values(values, word=""):
    """Several values between which `word` stands: "and", "or"; "" for commas or both."""
    if len(values) == 1:
        return values[0]
    conditions = tuple(filter(is_membership, values))
    if 0 < len(conditions) < len(values):  # 3k, k ∈ ℤ
        template = join_values([value for value in values if not is_membership(value)])
        return Seq("builder", (template, Seq("list", conditions)))
    names = {first_name(value) for value in values if isinstance(value, Relation)}
    relations = all(isinstance(value, Relation) for value in values)
    if word and relations and (len(names) > 1 or any(map(is_condition, values))):
        return Seq(word, tuple(values))
    return Seq("list", tuple(values))


@lru_cache(maxsize=512)
def name_of(side):
    r"""The spelling of a side that only names something: x_1, AB, (x,y), \cos A, f^{-1}(x), |AB|,
    AB/BC, words; "" for other sides."""
    if isinstance(side, str):
        return side
    if is_kind(side, "()", "ratio"):
        names = [name_of(item) for item in side.items]
        return f"({','.join(names)})" if all(names) else ""
    if not isinstance(side, Leaf) or side.unit or side.expr.is_Pow or not side.expr.free_symbols:
        return ""
    parts = list(sympy.preorder_traversal(side.expr))
    if not all(map(may_be_named, parts)):
        return ""
    return " ".join(part.name if part.is_Symbol else part.func.__name__ for part in parts)


def may_be_named(part):
    """Of the parts of a name: a product has no sign, a power is a reciprocal."""
    if part.is_Mul:
        return -1 not in part.args
    return part.is_Symbol or part.is_Function or -1 in (part, *part.args[1:])


def first_name(relation):
    """The first side that only names something."""
    return next(filter(None, map(name_of, relation.sides)), "")


def complement(points):
    """The real line without a set of rational points, as intervals."""
    if not is_kind(points, "set") or not all(map(is_rational, points.items)):
        raise Unparsed("a difference of sets")
    low, high = REAL_LINE.items
    ends = [low, *sorted(points.items, key=lambda leaf: leaf.expr), high]
    return Seq("union", tuple(Seq("()", pair) for pair in pairwise(ends)))


class Parsed(NamedTuple):
    """An answer as it was read."""

    text: str  # normalised spelling, for comparison as text
    value: object  # Leaf, Seq, Relation, str (words); None where the answer is not in the grammar
    why: str = ""  # why it is not


@lru_cache(maxsize=512)
def parse(text, thousands=True, renamed=False):
    """A whole answer: "1/2" -> Leaf(1/2). What is not in the grammar, or beyond the limits, is text
    and nothing else: "5 +" -> None, "ends too early". `renamed`: k in 3k, k ∈ ℤ, which may have
    any name, gets ours."""
    if len(text) > MAX_ANSWER:
        return Parsed(text, None, "longer than the limit")
    text = normalise(text, thousands)
    spelling = re.sub(r"\s+", "", text)
    try:
        tokens = tokenise(text)
        spelling = "".join(map(spelling_of, tokens))
        if renamed:
            bound = [token for token, following in pairwise(tokens) if following.text == "∈"]
            ours = {token: Token("name", f"bound {place}") for place, token in enumerate(bound)}
            tokens = [ours.get(token, token) for token in tokens]
        return Parsed(spelling, Parser(tokens).answer())
    except Unparsed as error:
        return Parsed(spelling, None, str(error))


def spelling_of(token):
    """Words without capitals; units of one or two letters keep theirs: mW is not MW."""
    is_word = token.kind == "text" and len(token.text) > 2
    return token.text.casefold() if is_word else token.text


# -- compare: the values of inert trees at fixed points --------------------------------------------
# No rewriting comes first (expand, cancel, trigonometric identities …): what it could show these
# points show too, with bounded work, while expand does not come back from (x^200000 - 1)/(x - 1)
# nor cancel from e^(10^9 ln 2).
NUMBERS = MPContext()  # our own mpmath context
LOCK = threading.RLock()  # held while the precision of NUMBERS is ours
MIN_PRECISION = 256  # bits
CONSTANT_VALUES = {sympy.pi: NUMBERS.pi, sympy.E: NUMBERS.e, sympy.I: NUMBERS.j}
GAMMAS = (sympy.factorial, sympy.binomial)
ROUNDED = (sympy.floor, sympy.ceiling)
OF_REALS = (sympy.Abs, sympy.sign, *ROUNDED)
SATURATING = (sympy.sinh, sympy.cosh, sympy.tanh)  # they differ, or differ from 1, by e^(-2x)


class Point(NamedTuple):
    """Where trees are evaluated: it gives each variable a value, by its name."""

    kind: str  # complex: near the positive axis, where roots and logarithms behave; positive; real
    k: int
    size: float = 1
    center: Rational = Integer(0)
    integers: tuple = ()  # the names of the variables that are integers

    def value(self, name):
        noise = zlib.crc32(f"{name} {self.k}".encode("utf-8", "replace"))
        if name in self.integers:  # large; or small ones in a row, so that each remainder occurs
            small = self.k + 1 if name == self.integers[0] else noise % 12
            return NUMBERS.mpf(self.size + noise % self.size if self.size > 1 else small)
        distance = self.size * (0.3 + (noise & 0xFFFF) / 0x8000)
        if self.kind == "complex":
            return NUMBERS.mpc(distance, 0.05 + (noise >> 16) / 0x50000)
        # of four real points one is all positive and one all negative
        if self.kind == "real" and (self.k % 4 == 1 or (self.k % 4 > 1 and noise >> 20 & 1)):
            distance = -distance
        return NUMBERS.mpf(self.center.p) / self.center.q + distance


def size_of(value):
    """The exponent of 2 that is about as large; 0 for 0."""
    return NUMBERS.mag(value) if value else 0


def numeric_value(expr, point, sizes):
    """The value at a point; ArithmeticError where there is none, or out of bounds. `sizes` gets the
    size of every number on the way: how far apart they are says what precision shows them all."""
    if expr.is_Rational:
        sizes += expr.p.bit_length(), -expr.q.bit_length()
        return NUMBERS.mpf(expr.p) / expr.q
    if expr.is_Symbol:
        value = point.value(expr.name)
    elif not expr.args:
        value = CONSTANT_VALUES[expr] * NUMBERS.one
    else:
        values = [numeric_value(argument, point, sizes) for argument in expr.args]
        if expr.is_Mul:
            value = math.prod(values)
        elif expr.is_Pow:
            value = numeric_power(*values, expr.exp, point.kind == "real")
        else:
            value = sum(values) if expr.is_Add else numeric_function(expr.func, values, sizes)
            # what nearly vanishes is 0 seen through rounding: sin²1 + cos²1 - 1, cos(π/2)
            if value and NUMBERS.mag(value) < max(map(size_of, values)) - 3 * NUMBERS.prec // 4:
                value = NUMBERS.zero
    if not NUMBERS.mag(value) <= MAX_MAGNITUDE:
        raise ArithmeticError("too large, or not a number")
    sizes.append(size_of(value))
    return value


def numeric_power(base, exponent, exact, real):
    """base^exponent, or infinity or NaN where it is out of bounds. Over the reals an odd root of a
    negative number is negative."""
    if base == 0:
        return base if exponent.real > 0 else NUMBERS.nan
    if abs(exponent) * max(1, abs(NUMBERS.mag(base))) > 4 * MAX_MAGNITUDE:
        return NUMBERS.inf
    if real and exact.is_Rational and exact.q % 2 and not base.imag and base.real < 0:
        return (-1) ** exact.p * (-base) ** exponent
    return base**exponent


def numeric_function(function, values, sizes):
    """A function of sympy's; ArithmeticError where its argument is out of bounds."""
    largest = 16 if any(value.imag for value in values) else 1_000
    if max(map(NUMBERS.mag, values)) > (12 if function in GAMMAS else largest):
        raise ArithmeticError("argument too large")
    if function in ROUNDED:
        nearest = NUMBERS.nint(values[0])
        if abs(values[0] - nearest) < 2.0**-90:  # an integer but for rounding
            return nearest
    if function in SATURATING:
        sizes.append(3 * int(abs(values[0])))
    sizes.append(2 * size_of(values[0]))  # cos x is 1 and a term of x²
    name = function.__name__
    return getattr(NUMBERS, {"Abs": "fabs", "ceiling": "ceil"}.get(name, name))(*values)


@lru_cache(maxsize=512)
def work_of(expr):
    """The work of one evaluation, in sums of two numbers: a factorial takes as long as 30 sines."""
    work = 0
    for node in sympy.preorder_traversal(expr):
        if node.is_Add or node.is_Mul or not node.args:
            work += 1
        elif node.is_Pow and node.exp.is_Rational and node.exp.q <= 2:
            work += 4
        else:
            work += 1200 if node.func in GAMMAS else 40
    return work


def has_branches(expr):
    """Whether it holds a root or logarithm of a variable."""
    for node in sympy.preorder_traversal(expr):
        root_or_log = node.func is sympy.log or (node.is_Pow and not node.exp.is_Integer)
        if root_or_log and node.args[0].free_symbols:
            return True
    return False


def is_floor_of_integer(node):
    """⌊2x² + 1⌋: no fraction or function stands within."""
    parts = sympy.preorder_traversal(node.args[0])
    return all(isinstance(part, Symbol | Integer | Add | Mul | Pow) for part in parts)


def names_in(exprs):
    return {symbol.name for expr in exprs for symbol in expr.free_symbols}


@lru_cache(maxsize=4096)
def value_at(expr, point, precision):
    """(value, its needed precision) at a point; None where there is no value, or where it would
    take too much work."""
    if work_of(expr) * (precision // 64) ** 2 > MAX_WORK:
        return None
    NUMBERS.prec = precision
    sizes = [0]
    try:
        value = numeric_value(expr, point, sizes)
    except (ArithmeticError, ValueError, KeyError, TypeError):
        return None
    return value, 128 + 4 * (max(sizes) - min(sizes))


def values_at(x, y, point, precision=MIN_PRECISION):
    """The values of two trees, so precise that half of the bits show their smallest terms, and the
    tolerance in which equal ones agree; None where one has no value."""
    found = value_at(x, point, precision), value_at(y, point, precision)
    if None in found:
        return None
    (left, needed), (right, other_needed) = found
    needed = max(needed, other_needed)
    if needed > precision:
        return values_at(x, y, point, (needed // 64 + 1) * 64)
    NUMBERS.prec = precision
    return left, right, NUMBERS.ldexp(1, -precision // 2)


@lru_cache(maxsize=512)
def choose_points(x, y):
    """Where to compare two trees. One point is enough for constants. An absolute value, or a root
    or logarithm on one side only, asks for real points of both signs, of several sizes and around
    the constants, so that √(x²) is not x and |x - 5| not 5 - x."""
    if not names_in([x, y]):
        return [Point("complex", 0)]
    nodes = [*sympy.preorder_traversal(x), *sympy.preorder_traversal(y)]
    rooted = has_branches(x)
    real = rooted != has_branches(y) or any(node.func in OF_REALS for node in nodes)
    kind = "real" if real else "positive"
    # A variable under a floor is an integer, but in ⌊x⌋, which would then say nothing.
    rounded = [node for node in nodes if node.func in ROUNDED]
    integers = names_in(rounded + [node for node in nodes if node.func in GAMMAS])
    integers -= names_in(filter(is_floor_of_integer, rounded))
    if integers:  # n first, above the others, for which C(n, k) has a value
        names = tuple(sorted(integers, key=lambda name: (name[0] not in "nN", name)))
        sizes = [1] * 24 + [60, 60, 400, 400, 10**6, 10**6] if rounded else [1] * 12 + [60, 400]
        return [Point(kind, k, size, integers=names) for k, size in enumerate(sizes)]
    if real:
        constants = {abs(node) for node in nodes if node.is_Rational and bits(node) < 64}
        centers = [sign * constant for constant in sorted(constants)[:8] for sign in (1, -1)]
        points = [Point(kind, k, 0.25, center) for center in centers for k in (0, 1)]
        return points + [Point(kind, k, (1, 4, 20, 80)[k // 4]) for k in range(16)]
    points = [Point("complex", k) for k in range(4)]
    return points + [Point(kind, k, size) for k, size in enumerate((10, 80)) if rooted]


def agree(x, y, same):
    """Whether same(x's value, y's value, tolerance) at the points, of which a third must exist."""
    agreed = 0
    with LOCK:
        points = choose_points(x, y)
        for point in points:
            found = values_at(x, y, point)
            # where neither is a real number, which branch it is on does not count
            if found and not (point.kind == "positive" and found[0].imag and found[1].imag):
                if not same(*found):
                    return False
                agreed += 1
    return 3 * agreed > len(points)


def is_close(left, right, tolerance):
    return abs(left - right) <= tolerance * max(abs(left), abs(right))


def equal_exprs(x, y, approximate=False):
    """Two inert trees: by structure, as exact numbers, by their values at fixed points."""
    if x == y:
        return True
    if x.is_Rational and y.is_Rational:
        near = abs(x - y) * 10**6 <= max(abs(x), abs(y))
        return approximate and bool(near)  # sympy's own truth is no bool

    def same(left, right, tolerance):
        return is_close(left, right, 1e-6 if approximate else tolerance)

    return agree(x, y, same)


def proportional(x, y, positive):
    """x = c y with a constant c that is not 0 (positive, for inequalities); or both vanish
    everywhere."""
    zeros = [equal_exprs(expr, Integer(0)) for expr in (x, y)]
    if any(zeros):
        return all(zeros)
    found = []  # pairs of values

    def same_ratio(left, right, tolerance):
        if positive and not (left * NUMBERS.conj(right)).real > 0:
            return False
        found.append((left, right))
        first, other = found[0]
        return is_close(left * other, right * first, tolerance)

    return agree(x, y, same_ratio)


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
# In what some units are compared with others, and what one of them is.
BASE_UNITS = {
    unit: (base, Rational(size))
    for unit, base, size in map(
        str.split,
        """\
cent dollar 1/100
mm m 1/1000
cm m 1/100
km m 1000
g kg 1/1000
min s 60
h s 3600
""".splitlines(),
    )
}
BASE_UNITS |= {"%": ("", Rational(1, 100)), "deg": ("", DEGREE)}


def equal_values(left, right, in_list=False):
    """By the table above: relations by what they say, leaves by value, collections by items."""
    left = unwrap_singleton(left)
    right = unwrap_singleton(right)
    if isinstance(left, Relation) and isinstance(right, Relation):
        return equal_relations(left, right, in_list)
    if is_kind(left, "builder") != is_kind(right, "builder"):  # 3k, k ∈ ℤ is 3k
        left = left.items[0] if is_kind(left, "builder") else left
        right = right.items[0] if is_kind(right, "builder") else right
    left = denoted_value(left)
    right = denoted_value(right)
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return equal_leaves(left, right)
    if isinstance(left, Seq) and isinstance(right, Seq):
        return equal_collections(left, right)
    return isinstance(left, str) and left == right


def unwrap_singleton(value):
    """A collection of one value is that value; a set may repeat it."""
    while is_kind(value, *UNORDERED) and value.items:
        first, *others = value.items
        if others and (value.kind != "set" or not is_within(others, [first])):
            break
        value = first
    return value


def equal_leaves(left, right):
    """Numbers with or without units: 5 cm is 5 and not 5 m; 50% is 50 and 0.5; 50 cents is 50 and
    $0.50. 5 (mod 7) is 12 (mod 7) and not 5 (mod 8)."""
    if left.modulus is not None and right.modulus is not None:
        if not equal_exprs(left.modulus, right.modulus):
            return False
        turns = divide(add(left.expr, negate(right.expr)), left.modulus)
        return bool(turns.is_Integer) or equal_exprs(left.expr, right.expr)
    approximate = left.approximate or right.approximate
    agree = left.unit == right.unit or not (left.unit and right.unit)
    if agree and equal_exprs(left.expr, right.expr, approximate):
        return True
    unit, size = BASE_UNITS.get(left.unit, (left.unit, Integer(1)))
    other_unit, other_size = BASE_UNITS.get(right.unit, (right.unit, Integer(1)))
    converted = left.unit != right.unit and unit == other_unit
    x = multiply(left.expr, size)
    return converted and equal_exprs(x, multiply(right.expr, other_size), approximate)


def is_constant(value):
    """2 + 3 or sqrt 2; not x, not f(2)."""
    return isinstance(value, Leaf) and not value.expr.free_symbols


def denoted_value(value):
    """What a relation says of one thing. The value: x = 5, f(x) = 5, 2 + 3 = 5, Area = 5, x in {5}
    -> 5. Intervals, for inequalities in one variable with constant ends: 1 < x <= 2 -> (1,2]. None
    for a real equation. Other values stay."""
    if not isinstance(value, Relation):
        return value
    sides, ops = value
    names = [name_of(side) for side in sides]
    if {*ops} <= {"=", "∈"}:
        constants = [side for side in sides if is_constant(side)]
        if not any(names) and not all(equal_leaves(constants[0], it) for it in constants[1:]):
            return None  # 3 = 5
        calculated = is_constant(sides[-1]) and (len(sides) > 2 or is_constant(sides[0]))
        return sides[-1] if names[0] or calculated else None
    ends = [side for side, name in zip(sides, names) if not name]
    if ops == ("!=",) and len(ends) == 1 and is_rational(ends[0]):
        return complement(Seq("set", tuple(ends)))
    return interval_of(sides, ops)


def interval_of(sides, ops):
    """1 < x <= 2 -> (1,2]; x < 2 is -oo < x < 2. None if the ends are no constants."""
    if not {*ops} <= {"<", "<="}:
        return None
    low, high = REAL_LINE.items
    if name_of(sides[0]):
        sides = (low, *sides)
        ops = ("<", *ops)
    if name_of(sides[-1]):
        sides = (*sides, high)
        ops = (*ops, "<")
    if len(sides) != 3 or not name_of(sides[1]) or not all(map(is_constant, sides[::2])):
        return None
    kind = ("(" if ops[0] == "<" else "[") + (")" if ops[1] == "<" else "]")
    return Seq(kind, sides[::2])


def intersection(conditions):
    """x > 2 and x < 5 -> (2,5); None for other conditions."""
    if not all(map(is_condition, conditions)) or len({*map(first_name, conditions)}) > 1:
        return None
    rays = [interval_of(*condition) for condition in conditions]
    lowest, highest = REAL_LINE.items
    if len(rays) == 2 and None not in rays:
        low, high = sorted(rays, key=lambda ray: ray.items[0] == lowest)
        if low.items[1] == highest and high.items[0] == lowest:
            return Seq(low.kind[0] + high.kind[1], (low.items[0], high.items[1]))
    return None


def equal_relations(left, right, in_list):
    """x = 5 and 5 = x; y = 2x + 1 and 2x - y + 1 = 0; x > 1 and -2 > -2x; not x = 5 and y = 5. What
    stands alone may have any name in words: Area = 5 and x = 5, f(x) = 2x and y = 2x."""
    one = first_name(left)
    other = first_name(right)
    sides = left.sides + right.sides
    in_words = any(isinstance(side, str) for side in sides)
    if one == other or (not in_list and (in_words or ("(" in one) != ("(" in other))):
        denoted = [denoted_value(left), denoted_value(right)]
        if None not in denoted and equal_values(*denoted):
            return True
    if left.ops != right.ops:
        return False
    if "≡" in left.ops or "∈" in left.ops:
        return all(map(equal_values, left.sides, right.sides))
    if not all(isinstance(side, Leaf) for side in sides):
        return False
    steps = zip(differences(left), differences(right), left.ops)
    return all(proportional(x, y, positive="<" in op) for x, y, op in steps)


def differences(relation):
    """Each side minus the next."""
    return [add(x.expr, negate(y.expr)) for x, y in pairwise(relation.sides)]


def equal_collections(left, right):
    """{1,2} and {2,1}; (1,2) and the bare 1,2; not (0,1) and [0,1], nor 1,1,2 and 1,2,2."""
    kinds = {left.kind, right.kind}
    if kinds == {"and", "or"}:
        return False
    for one, other in ((left, right), (right, left)):  # x > 2, x < 5 is also (2,5)
        if one.kind in ("list", "and") and other.kind != "or":
            both = intersection(one.items)
            if both and equal_values(both, other):
                return True
    points = kinds <= {*UNORDERED} and all(isinstance(it, Seq) for it in left.items + right.items)
    if points or "union" in kinds or kinds == {"set"}:  # these repeat nothing
        ones, others = (seq.items if seq.kind in UNORDERED else [seq] for seq in (left, right))
        return is_within(ones, others) and is_within(others, ones)
    if kinds <= {*UNORDERED}:
        return equal_lists(left, right)
    if len(left.items) != len(right.items):
        return False
    pairs = list(zip(left.items, right.items))
    if kinds == {"ratio"}:
        first, other = pairs[0]
        return all(
            equal_exprs(multiply(first.expr, y.expr), multiply(other.expr, x.expr))
            for x, y in pairs
        )
    if kinds == {"cases"}:
        return equal_in_some_order(left.items, right.items)
    brackets_differ = len(kinds) == 2 and kinds.isdisjoint(("list", "and", "matrix"))
    if brackets_differ and (len(pairs) == 2 or kinds != {"()", "[]"}):
        return False  # (0,1) and [0,1] are intervals
    return kinds.isdisjoint(("set", "or")) and all(equal_values(x, y) for x, y in pairs)


def is_within(ones, others):
    return all(any(equal_values(one, other) for other in others) for one in ones)


def equal_lists(left, right):
    """In any order, but each value as often: 1,1,2 is not 1,2,2. Labels count: not x = 1, y = 2 and
    x = 2, y = 1; a list without labels is in the order of one with labels."""
    labels = labels_of(left)
    others = labels_of(right)
    in_order = bool(labels) != bool(others) and "set" not in (left.kind, right.kind)
    if in_order and len({*labels, *others}) > 1:
        same_length = len(left.items) == len(right.items)
        return same_length and all(map(equal_values, left.items, right.items))
    return equal_in_some_order(left.items, right.items)


def labels_of(seq):
    """The labels of x = 1, y = 2; none where one value has none."""
    labels = [
        first_name(item) if isinstance(item, Relation) and item.ops == ("=",) else ""
        for item in seq.items
    ]
    return labels if all(labels) else []


def equal_in_some_order(ones, others):
    """Each of one side equals one of the other, which is then taken. Labels must agree."""
    rest = [*others]
    for one in ones:
        for place, other in enumerate(rest):
            if equal_values(one, other, in_list=True):
                del rest[place]
                break
        else:
            return False
    return not rest


CLOCK = re.compile(r"(\d|[01]\d|2[0-4])(?=:|[ap]m)(?::([0-5]\d))?([ap]m)?", re.I)
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
    r")(?:°|%|°?(?!.*pi)[A-Za-z]{2,}(?:[/*][A-Za-z]+)*(?:\^\{?-?\d\}?)?"
    r"|°?[mgshLNJWVACFKT](?:[/*][A-Za-z]+)*(?:\^\{?-?\d\}?)?)?"
)


def read_clock(text):
    """(minutes on a dial of 12 hours, am or pm or "") of 4:20 pm, 16:20 and 4:20; None for other
    text and for times that no clock shows."""
    match = CLOCK.fullmatch(text)
    if not match:
        return None
    hour = int(match[1])
    half = (match[3] or "").lower()
    if not half and not 1 <= hour <= 12:
        half = "pm" if hour > 12 else "am"
    return hour % 12 * 60 + int(match[2] or 0), half


def compare(answer, reference):
    """Two answers as they stand: as text, then by value, then in another reading of either. h:mm is
    a time of day where a side says am or pm, or where the reference is written so."""
    left = parse(answer)
    right = parse(reference)
    clock = read_clock(left.text)
    other = read_clock(right.text)
    if other or (clock and clock[1]):
        if not (clock and other):
            return left.text == right.text
        return clock[0] == other[0] and (clock[1] == other[1] or "" in (clock[1], other[1]))
    if "∈" in left.text and "∈" in right.text:
        left = parse(answer, renamed=True)
        right = parse(reference, renamed=True)
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
    letter = re.fullmatch(r"\(?([A-J])\)?", one.text)
    if option and letter:
        return option[1] == letter[1]
    if option:
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
    bracketed = re.fullmatch(r"(?:\(|\\?\{)(.*?)(?:\)|\\?\})", text)
    text = bracketed[1] if bracketed else text
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
    if answer is None:
        why = "no answer"
    elif correct:
        why = "right"
    elif require_value and is_equivalent(answer, reference):
        why = "not a value"
    else:
        parsed = parse(reference_answer(answer))
        why = "wrong" if parsed.value is not None else f"unparsed answer: {parsed.why}"
    return Explanation(correct, answer, find_answer(response, in_thought).rule, why)


def describe(value):
    """How an answer was read: "1 < x <= 2", "set(1, 2)", "5 cm"."""
    if isinstance(value, Parsed):
        return f"text ({value.why})" if value.value is None else describe(value.value)
    if isinstance(value, Leaf):
        return f"{value.expr} {value.unit}".strip()
    if isinstance(value, Seq):
        return f"{value.kind}({', '.join(map(describe, value.items))})"
    if not isinstance(value, Relation):
        return f"words: {value}"
    sides = map(describe, value.sides)
    return " ".join(chain.from_iterable(zip(sides, (*value.ops, "")))).strip()


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
    if not isinstance(one, Leaf) or not isinstance(other, Leaf):
        return "see docs/checker.md for what is equal to such answers"
    if one.unit and other.unit and one.unit != other.unit:
        return "other units"
    with LOCK:
        for point in choose_points(one.expr, other.expr):
            found = values_at(one.expr, other.expr, point)
            if found and not is_close(*found):
                said = " and ".join(NUMBERS.nstr(value) for value in found[:2])
                for name in sorted(names_in([one.expr, other.expr])):
                    said += f" at {name} = {NUMBERS.nstr(point.value(name), 5)}"
                return said
    return "their values could not be compared"


def print_explanation(response, reference):
    """What --explain says, in printable characters."""
    correct, answer, rule, why = explain(response, reference)
    lines = [f"{'correct' if correct else 'wrong'} ({why})", f"answer     {answer} (rule: {rule})"]
    if answer is not None:
        left, right = (parse(reference_answer(text)) for text in (answer, reference))
        lines.append(f"read as    {describe(left)}")
        lines.append(f"reference  {describe(right)}")
        lines.append(f"because    {difference(left, right)}")
    for line in lines:
        print(line.encode("unicode_escape").decode().replace(r"\\", "\\"))


def is_same_class(answer, other):
    """Equal; times of day look at which is the reference: in either direction, then."""
    return is_equivalent(answer, other) or (":" in answer and is_equivalent(other, answer))


def answer_classes(answers: list[str | None]) -> list[int]:
    """The class of each answer, numbered by first appearance; -1 where there is none. Equality (the
    same in both directions) is closed transitively, so the partition does not depend on the
    order."""
    groups = []
    for answer in dict.fromkeys(answers):
        if answer is not None:
            equal = [group for group in groups if any(is_same_class(answer, it) for it in group)]
            groups = [group for group in groups if group not in equal]
            groups.append([answer, *chain.from_iterable(equal)])
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


def exception_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def printable(text):
    """The end of a text in printable ASCII."""
    return ascii(text[-200:])[:200]


def checked_grade(result):
    """What a user's grader returned, as a Grade; ValueError or TypeError if it is none."""
    answer, correct, reward = result
    if not (isinstance(answer, str | None) and correct in (True, False) and math.isfinite(reward)):
        raise ValueError(
            f"grade returned {result!r:.80}; it must be an answer (str or None), a verdict (True "
            "or False) and a finite reward"
        )
    return Grade(answer, bool(correct), float(reward))


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
    except BaseException as error:  # sys.exit() too
        raise ValueError(f"{name}: cannot be loaded ({exception_line(error)})") from error
    return grader


class Worker:
    """One `python reward.py --worker` after another: started when first called, killed and replaced
    when an answer exceeds a limit, replaced now and then against slow growth."""

    def __init__(self, verifier):
        self.verifier = verifier
        self.process = None

    def start(self):
        """RuntimeError if no worker starts; ValueError if it cannot load the user's grader."""
        verifier = self.verifier
        self.pipe, other_end = multiprocessing.Pipe()
        # The arguments of serve_requests
        arguments = (
            other_end.fileno(),
            os.getpid(),
            verifier.timeout,
            verifier.memory_mb,
            verifier.reward or "",
        )
        command = [sys.executable, os.path.abspath(__file__), "--worker", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            pass_fds=[other_end.fileno()],
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

    def call(self, function, *arguments, **options):
        """Run a function of this file, or the user's grader, in the worker."""
        if not self.process or self.requests >= MAX_REQUESTS:
            self.end()
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

    def grade_response(self, response, reference, options):
        """(grade, what it failed of). A response that the grader failed on is wrong, reward 0."""
        reply = self.call("grade", response, reference, **options)
        if not reply.failed:
            return Grade(*reply.value), ""
        self.verifier.count_failure(reply, response)
        answer = None
        if not self.verifier.reward:  # its answer may still be known, for its class
            answer = self.call("extract_answer", response, options["in_thought"]).value
        return Grade(answer, False, 0.0), reply.failed

    def grade_group(self, responses, reference, options):
        """Grade each distinct response once, then sort the wrong answers into classes. An answer
        that grading failed on is classed by its spelling."""
        results = {}
        for response in dict.fromkeys(responses):
            results[response] = self.grade_response(response, reference, options)
        keys = {None: -1}  # of an answer: what its class is called
        wrong = {}
        for grade, failed in results.values():
            if not grade.correct and grade.answer is not None:
                keys[grade.answer] = ("".join(grade.answer.split()),)
                if not failed:
                    wrong[grade.answer] = None
        keys |= self.label_answers([*wrong])

        numbers = {-1: -1}  # of the classes, by first appearance
        group = Group([], [], [], [], [])
        for grade, failed in map(results.get, responses):
            key = "correct" if grade.correct else keys[grade.answer]
            group.answers.append(grade.answer)
            group.correct.append(grade.correct)
            group.rewards.append(grade.reward)
            group.classes.append(numbers.setdefault(key, len(numbers) - 1))
            group.failed.append(failed)
        return group

    def label_answers(self, answers):
        """The class of each distinct answer; none where that takes too much."""
        reply = self.call("answer_classes", answers) if len(answers) > 1 else Reply([])
        if reply.failed:
            self.verifier.count_failure(reply, ", ".join(answers))
        return dict(zip(answers, reply.value or ()))


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
                f"workers must be at least 1 and timeout above 0, not {workers}, {timeout}"
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
        """End the workers, cancel what waits; the next grade_groups() starts new ones."""
        with self.lock:
            threads = self.threads
            self.threads = []
        with contextlib.suppress(queue.Empty):  # after Ctrl-C: jobs that nobody waits for
            while threads:
                self.jobs.get_nowait()[0].cancel()
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
            "problem": problems or [""] * count,
            "require_value": require_value or [False] * count,
            "in_thought": in_thought or [False] * count,
        }
        lengths = {len(column) for column in (responses, references, *columns.values())}
        if len(lengths) > 1:
            raise ValueError(
                "responses, references, problems, require_value and in_thought must have the same "
                f"length, not {lengths}"
            )
        with self.lock:
            while len(self.threads) < self.workers:
                self.threads.append(threading.Thread(target=self.serve, daemon=True))
                self.threads[-1].start()
        futures = []
        for group, reference, *values in zip(responses, references, *columns.values()):
            futures.append(Future())
            self.jobs.put((futures[-1], group, reference, dict(zip(columns, values))))
        return [future.result() for future in futures]

    def self_consistent(self, references):
        """Whether a response could earn each reference: in a box it equals itself, or grading it
        died, which says nothing of it."""
        responses = [[f"\\boxed{{{reference}}}"] for reference in references]
        return [
            group.correct[0] or group.failed != [""]
            for group in self.grade_groups(responses, references)
        ]

    def serve(self):
        """The life of a thread: jobs from the queue, for its own worker."""
        worker = Worker(self)
        while job := self.jobs.get():
            future, *arguments = job
            try:
                future.set_result(worker.grade_group(*arguments))
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
    except BaseException as error:  # sys.exit() too
        return Reply(failed="exception", error=exception_line(error))


def serve_requests(pipe, parent, timeout, memory_mb, reward):
    """A worker's life. It ends with its parent (EOF, and the death signal on Linux) and on a
    runaway answer (CPU, memory)."""
    limit_worker(int(parent), int(memory_mb))
    connection = multiprocessing.connection.Connection(int(pipe))
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
            limit_cpu(float(timeout))
            reply = answer_request(functions, request)


# -- audit -----------------------------------------------------------------------------------------
def audit(path, shown=5):
    """What the checker made of a JSONL of responses: found by which rule, parsed or not, and
    examples."""
    rules = Counter()
    verdicts = Counter()
    examples = {}
    for row, fields in read_jsonl(path, path):
        place = f"{path}:{row + 1}"
        if not isinstance(fields, dict):
            raise ValueError(f"{place}: a JSON object is needed")
        response = fields.get("response", fields.get("pred"))
        reference = fields.get("reference", fields.get("gold"))
        if not isinstance(response, str) or not isinstance(reference, str):
            raise ValueError(f'{place}: "response" and "reference" are needed, as text')
        options = [bool(fields.get(name)) for name in ("require_value", "in_thought")]
        _, answer, rule, why = explain(response, reference, *options)
        verdict = why.partition(":")[0]
        rules[rule] += 1
        verdicts[verdict] += 1
        line = f"  {place}: {str(answer)[:60]!a} for {reference[:60]!a} ({rule}; {why})"
        examples.setdefault(verdict, []).append(line)
    for title, counts in (("found by", rules), ("verdicts", verdicts)):
        shares = (f"{name} {n} ({n / counts.total():.1%})" for name, n in counts.most_common())
        print(f"{title}:", ", ".join(shares))
    for verdict, lines in examples.items():
        print(f"{verdict}:", *lines[:: max(1, len(lines) // shown)][:shown], sep="\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check answers of models.")
    commands = parser.add_mutually_exclusive_group(required=True)
    commands.add_argument("--audit", metavar="FILE", help="JSONL of response and reference")
    commands.add_argument(
        "--explain",
        metavar=("RESPONSE", "REFERENCE"),
        nargs=2,
        help="the answer found, how both are read, and why they are equal or not",
    )
    commands.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)  # see Worker.start
    args = parser.parse_args(argv)
    if args.worker:
        serve_requests(*args.worker)
    elif args.explain:
        print_explanation(*args.explain)
    else:
        try:
            audit(args.audit)
        except (OSError, ValueError) as error:
            print(f"reward.py: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
