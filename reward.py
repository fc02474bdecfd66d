#!/usr/bin/env python3
"""Problems and their verification: the reward of reinforcement learning with verifiable rewards.

    find the answer -> normalise -> tokens -> parse -> compare -> classes, and a pool of workers that does it

What a model writes is data and is never evaluated. A recursive-descent parser turns LaTeX or plain maths into *inert*
sympy trees (only rational arithmetic is carried out, with bounded digits), and two trees are compared by their values
at fixed points at high precision. All work is bounded by counting it (characters, depth, digits, nodes), never by a
clock or a signal: `score` gives the same verdict in any thread, under any load. Killable workers come second.

    score(r"The area is $\\boxed{\\frac{10}{4}}$.", "2.5") -> 1.0       is_equivalent("x^2+2x+1", "(x+1)^2") -> True
    answer_classes(["1/2", "0.5", None, "2"]) -> [0, 0, -1, 1]        python reward.py --audit samples.jsonl
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import queue
import random
import re
import select
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
MAX_TOKENS, MAX_DEPTH, MAX_STEPS = 500, 40, 5_000  # of the parser; it may read a token more than once
MAX_LEAVES = 64  # values of a list, set or matrix (comparing two takes the square of it)
MAX_BITS = 40_000  # of a number that is computed exactly (2004! has 19,000)
MAX_WORK = 40_000  # of one numeric evaluation, see value_at; below 0.1 s
MAX_MAGNITUDE = 1 << 17  # bits before the point in numeric evaluation


# -- problems ----------------------------------------------------------------------------------------------------------
# Shapes in which problems are published: the fields of problem, answer and solution (a dot: within). A file has the
# first of them whose problem and answer are in its first line.
SHAPES = (
    ("problem", "answer", "solution"),  # ours; MATH-500; AIME 2024 and 2025, AMC as most publish them
    ("question", "answer", "solution"),  # GSM8K, whose answer is a solution that ends in ####; AMC 2023, AIME 2025
    ("Problem", "Answer", "Solution"),  # AIME 2024
    ("prompt", "reward_model.ground_truth", ""),  # DAPO-Math-17k, whose prompt is a list of one chat message
    ("problem", "solution", "solution"),  # AIME 2024 and MATH: the answer stands in the solution's box
)
# What DAPO-Math-17k puts around each problem. It asks for another form of answer than --instruction does.
WRAPPED = re.compile(
    r'Solve the following math problem step by step\. .*?\n\n(.*)\n\nRemember to put your answer .* "Answer:"\.', re.S
)


class Problem(NamedTuple):
    """A line of a data file."""
    row: int  # 0-based line of the file
    problem: str
    answer: str
    solution: str | None
    require_value: bool


def same_text(problem: str) -> str:
    """What two problems share that are one but for spaces and capitals."""
    return " ".join(problem.casefold().split())


def read_lines(path):
    """(0-based number, object) of each line of a JSONL file or each row of a .parquet file, which needs pyarrow.

    hf://datasets/OWNER/NAME[@REVISION]/FILE is a file on the Hugging Face Hub, kept by huggingface_hub once fetched."""
    file = path
    if str(path).startswith("hf://"):
        if not (parts := re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", str(path))):
            raise ValueError(f"{path}: a file on the Hub is written hf://datasets/OWNER/NAME/FILE")
        from huggingface_hub import hf_hub_download  # comes with transformers
        try:
            file = hf_hub_download(parts[1], parts[3], repo_type="dataset", revision=parts[2])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    if not str(file).endswith(".parquet"):
        with open(file, encoding="utf-8") as text:
            for row, line in enumerate(text):
                try:
                    if line.strip():
                        yield row, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{row + 1}: not JSON ({error}); write one object a line") from None
        return
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: to read parquet, pip install pyarrow, or turn the file into JSONL") from None
    try:
        yield from enumerate(chain.from_iterable(part.to_pylist() for part in parquet.ParquetFile(file).iter_batches()))
    except (OSError, ValueError) as error:  # pyarrow's own errors are such
        raise ValueError(f"{path}: {error}") from error


def load_problems(path, dropped: Counter | None = None, shapes=SHAPES, fraction=1.0, seed=0) -> list[Problem]:
    """The problems of a file in one of `shapes`, or the part `fraction` of them that `seed` draws.

    Malformed lines are refused by file and line. Dropped, and counted by reason: answers that are empty or over the
    checker's limits, which could never earn a reward, and problems that came before."""
    problems, shape, seen = [], None, {}
    dropped = Counter() if dropped is None else dropped

    def field(fields, name):
        for part in name.split("."):
            fields = fields.get(part, ...) if isinstance(fields, dict) else ...
        return fields

    for row, line in read_lines(path):
        if not isinstance(line, dict):
            raise ValueError(f'{path}:{row + 1}: not an object; write {{"problem": …, "answer": …}}')
        fitting = (names for names in shapes if all(field(line, name) is not ... for name in names[:2]))
        shape = shape or next(fitting, shapes[0] if len(shapes) == 1 else None)
        if not shape:
            raise ValueError(f"{path}:{row + 1}: of no known shape; it has {', '.join(line)}: name two of them with "
                             "--problem-field and --answer-field")  # fmt: skip
        problem, answer, solution = (field(line, name) for name in shape)
        if isinstance(problem, list) and len(problem) == 1:
            problem = field(problem[0], "content")
        answer = str(answer) if type(answer) in (int, float) else answer
        solution = None if solution is ... else solution
        require_value = line.get("require_value", False)
        for name, value, kind, words in (
            (shape[0], problem, str, "text"), (shape[1], answer, str, "text or a number"),
            (shape[2], solution, (str, type(None)), "text"), ("require_value", require_value, bool, "true or false"),
        ):  # fmt: skip
            if not isinstance(value, kind):
                wrong = "is missing" if value is ... else f"is {value!r:.40}"
                raise ValueError(f'{path}:{row + 1}: the field "{name}" {wrong}; it must be {words}')
        if wrapped := WRAPPED.fullmatch(problem.strip()):
            problem = wrapped[1]
        solution, same = solution or (answer if "####" in answer else None), same_text(problem)
        if same in seen:
            dropped["came before" if seen[same] == answer else "came before, with another answer"] += 1
        elif 0 < len(final := reference_answer(answer)) <= MAX_ANSWER:
            seen[same] = answer
            problems.append(Problem(row, problem, final, solution, require_value))
        else:
            dropped["answer over the checker's limits" if final else "empty answer"] += 1
    if fraction < 1:
        draw, whole = random.Random(seed), len(problems)
        keys = [draw.random() for _ in problems]  # the smallest are in: a larger part holds each smaller one
        kept = sorted(sorted(range(whole), key=keys.__getitem__)[: round(fraction * whole)])
        problems = [problems[i] for i in kept]
        dropped[f"not in the part of {fraction:g}"] += whole - len(problems)
    return problems


# -- extraction: where in a response the answer stands -----------------------------------------------------------------
BOX = re.compile(r"\\(?:(?:begin)?boxed|f(?:rame)?box)\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]", re.S)
DELIMITER = re.compile(r"\\\$|\$\$?|\\[()\[\]]|\n\s*\n")
CLOSING_DELIMITER = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
# What may stand between two boxes or formulas that are one answer: spaces, a comma, "and", "or", a short \text.
JOIN = re.compile(r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad|\\(?:text|mbox)\{[^{}]{0,40}\}|\band\b|\bor\b)*")
NUMBER = re.compile(
    r"(?<![A-Za-z\d._^)])-?(?<![A-Za-z\d._])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?|(?<!\d)\.\d+"
)
ANSWER = r"(?:answer|réponse|respuesta|resposta|risposta|antwort|ответ|答案|答え|答)"
LABEL = re.compile(rf"{ANSWER}\s?(?:\*\*|\}})?\s?[:：=]\s?(?:\*\*|\}})?", re.I)
FINAL = re.compile(r"final (?:answer|result) (?:is|are|=)\s?:?", re.I)
IS = r"(?:\b(?:is|are|est|es|ist|è|é)\b|是|为|為|は)"
PHRASE = re.compile(rf"(?:{ANSWER}|solution|result)[^\n.:：$]{{0,40}}?{IS}\s?:?", re.I)
LETTER = re.compile(
    r"\b(?i:it'?s|is|be|est|choose|option|choice|pick|select)\s?:?\s?[(*]{0,3}([A-J])(?![A-Za-z0-9'])"
    r"|\A\W{0,3}([A-J])(?=[.,:;)*]|\s*\Z|[^\x00-\x7f])")  # fmt: skip
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
CLAUSE_LETTER = re.compile(r"(?:^|(?<=[\s(]))([A-J])(?=$|[\s,.):])(?! [a-z])|^([B-J]) [a-z]{3}")
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>")
# Two words side by side, or two letters of a script without spaces; LaTeX's own words do not count.
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-zÀ-ÿ]{2,20}[:,]?\s+(?:[^\W\d]{1,20}\s|[\\$(\d])|[^\W\d_A-Za-zÀ-ÿα-ωΑ-Ω]{2}")


def after_thinking(text: str) -> str | None:
    """The reply after the last </think>; an unclosed <think> is no reply."""
    closed, opened = text.rfind("</think>"), text.rfind("<think>")
    return None if opened > closed else text[closed + len("</think>") :] if closed >= 0 else text


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every complete outermost box one pass: 2 in "\boxed{\frac12}, \boxed 3, \boxed{4"."""
    boxes, stack = [], []
    for token in BOX.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"]))
        elif token["open"] or token[0] == "{":
            stack.append((token.start(), token.end()) if token["open"] else None)
        elif token[0] == "}" and stack and (opened := stack.pop()):
            while boxes and boxes[-1][0] > opened[0]:  # boxes inside this one
                boxes.pop()
            boxes.append((opened[0], token.end(), text[opened[1] : token.start()]))
    return [box for box in boxes if box[2].strip()]


def find_formulas(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each $…$, $$…$$, \(…\), \[…\]; a lone dollar is money: "$5, then $x=2$" has "x=2"."""
    formulas, opened = [], None
    for token in DELIMITER.finditer(text):
        mark, start, end = token[0], token.start(), token.end()
        spaced = mark == "$" and text[start - 1 : start].isspace()
        if opened and mark == CLOSING_DELIMITER[opened[0]] and not (spaced and opened[2]):
            if text[opened[1] : start].strip():
                formulas.append((opened[1] - len(opened[0]), end, text[opened[1] : start]))
            opened = None
        elif mark in CLOSING_DELIMITER and (opened is None or mark == "$"):
            opened = (mark, end, not text[end : end + 1].isspace())
        elif mark[0] == "\n":
            opened = None
    return formulas


def last_run(found: list[tuple[int, int, str]], text: str) -> str | None:
    r"""The last piece and those that only "and" or a comma joins to it: "\boxed1. \boxed2 and \boxed3" -> "2, 3"."""
    run = found[-1:]
    for piece in reversed(found[-MAX_TOKENS:-1]):
        gap = text[piece[1] : run[0][0]]
        if len(gap) > 80 or "\n\n" in gap or not JOIN.fullmatch(gap):
            break
        run.insert(0, piece)
    return ", ".join(dict.fromkeys(content.strip() for *_, content in run)) or None


def readable(text: str | None) -> bool:
    r"""Whether it is mathematics: "3 apples", "\frac12"; not "red", not "3 +"."""
    return bool(text) and not isinstance(parse(text).value, str | None)


def last_match(pattern: re.Pattern, text: str) -> re.Match | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def from_clause(pattern: re.Pattern, text: str) -> str | None:
    """What follows "Answer:" or "the answer is": " **12 apples**. I hope" -> "12 apples", " for sure D, as" -> "D"."""
    match = last_match(pattern, text)
    line = text[match.end() :][:MAX_ANSWER].lstrip(" *:\r\n").partition("\n")[0].strip() if match else ""
    sentence = re.split(r"[.!?](?:\s|$)|[。！]", line, maxsplit=1)[0].strip(" *\"'`")
    letter, numbers = CLAUSE_LETTER.search(sentence), NUMBER.findall(sentence)
    for candidate in (sentence, last_run(find_formulas(line), line), from_bold(line)):
        if readable(candidate) and not (letter and letter[2]):
            return candidate
    if letter:
        return letter[1] or letter[2]
    if numbers:  # "42, since 6 x 7 = 42", but "Jane started 3 hours ago"
        return numbers[0 if sentence.startswith(numbers[0]) else -1]
    return sentence if 0 < len(sentence.split()) <= 5 else None


def from_bold(text: str) -> str | None:
    """The last bold piece that is mathematics: "**Note**: it is **92**" -> "92"."""
    bold = last_match(BOLD, text)
    return bold[1].strip(" .") if bold and readable(bold[1].strip(" .")) else None


def from_tag(text: str) -> str | None:
    """<answer> 12 </answer> -> "12"."""
    _, opened, content = text.rpartition("</answer>")[0].rpartition("<answer>")
    return content.strip() if opened else None


def from_hashes(text: str) -> str | None:
    """6*7 = 42\\n#### 42 -> "42"."""
    return text.rpartition("####")[2].strip(" :\r\n").split("\n")[0] if "####" in text else None


def from_letter(text: str) -> str | None:
    """A choice in prose, if no number follows: "It's not A, so I think it's B" -> "B", "B不是 A" -> "B"."""
    last = last_match(LETTER, text)
    return last[1] or last[2] if last and not re.search(r"[\d$]", text[last.end() :]) else None


def from_formula(text: str) -> str | None:
    """The last formula, if it is readable and no number follows one that is a mere symbol."""
    formulas = find_formulas(text)
    run = last_run(formulas, text)
    return run if readable(run) and (re.search(r"\d", run) or not NUMBER.search(text, formulas[-1][1])) else None


RULES = (  # in the order of trust: the first rule that finds something decides
    ("box", lambda text: last_run(find_boxes(text), text)),  # the last complete \boxed{…}: what prompts ask for
    ("tag", from_tag),  # <answer>…</answer>: the other format of prompts
    ("label", lambda text: from_clause(LABEL, text)),  # Answer: … stands for nothing else
    ("final", lambda text: from_clause(FINAL, text)),  # the final answer is …: said once, at the end
    ("hashes", from_hashes),  # #### 42: GSM8K's own format
    ("phrase", lambda text: from_clause(PHRASE, text)),  # the answer is …: may also be said of a part
    ("bold", from_bold),  # **…**: what the model itself stresses, if it can be read as an answer
    ("letter", from_letter),  # it's (B): only if no number follows
    ("formula", from_formula),  # the last $…$: usually the result; two points better than the last number
    ("number", lambda text: getattr(last_match(NUMBER, text), "group", str)()),  # the last number: a guess
)
FIND = dict(RULES)


def find_answer(text: str) -> tuple[str | None, str]:
    """(answer, name of the rule that found it). A whole sentence in a box is read by the other rules but the last."""
    reply = after_thinking(text) if isinstance(text, str) else None
    reply = SPECIAL.sub("\n", reply[-MAX_RESPONSE:]) if reply else ""
    for name, rule in FIND.items():
        if answer := rule(reply):
            if name == "box" and PROSE.search(answer) and parse(answer).value is None and "\\begin" not in answer:
                answer = next(filter(None, (inner(answer) for _, inner in RULES[2:-1])), answer)
            return answer, name
    return None, "none"


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None; never the whole response: "so $x=\boxed{\frac12}$." -> "\frac12"."""
    return find_answer(text)[0]


def reference_answer(text: str) -> str:
    r"""A reference may be bare, in dollars, boxed, or a whole solution that ends in #### or "the final answer is"."""
    return FIND["box"](text) or FIND["hashes"](text) or FIND["final"](text) or text.strip()


# -- normalise, tokens -------------------------------------------------------------------------------------------------
SIGNS = str.maketrans({
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "⁄": "/", '"': " ", "≠": "!=", "≈": "~",
    **{sign: new for signs, new in (("−–—‐", "-"), ("×·⋅∙∗", "*"), ("÷∕", "/"), ("≤⩽", "<="), ("≥⩾", ">="),
                                    ("€£¥₹", r"\$")) for sign in signs},
    "∞": " inf ", "π": " pi ", "√": r"\sqrt ", "∪": r"\cup ", "±": r"\pm ", "ℝ": r"\mathbb{R}", "º": "°",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "∅": r"\emptyset ", "∠": r"\angle ", "′": "'",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∖": r"\setminus ", "⟨": "(", "⟩": ")",
    "’": "'", "。": ".", "、": ",", "\u200b": "", "\ufeff": "",
})  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;:! ]\s?|\{,\}|,\\!|[ \u00a0\u202f])\d{3})+(?!\d)")
EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3}){2,}|-?\d{1,3}(?:\.\d{3})+,\d+")
TEXT = re.compile(r"\\(?:text|mbox|hbox|mathrm|mathsf|mathbf|operatorname)(?:bf|it|rm|normal|tt)?\s*\{([^{}]*)\}")
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\\\(?=[A-Za-z])(?![\s\S]*\\end)", r"\\"),  # a doubled backslash, unless it ends a row
    (r"\\(?:left|right)\s*\.|\\[()\[\]](?!\d+(?:pt|em))|\\q?quad", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\mathbb\s*\{?\s*R\s*\}?|(?i:\ball real numbers\b)", "ℝ"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s?\^)", "*"),  # 1.5 x 10^3
    (r"(?<=[)\]}])\s*U\s*(?=[(\[\\])", r"\\cup "),
    (r"(?<!\\)\bin\b(?=\s*[(\[{\\])", " ∈ "),
    (r"\blog(\d+)\(", r"log_{\1}("),
    (r"(?i:^\W{0,3}(?:option|choice)\s+)(?=\W?[A-J]\W?$)", ""),
    (r"\b(?:square|sq\.?) ([A-Za-z]+)", r"\1^2"),  # square feet
)]  # fmt: skip


def quote_words(match: re.Match) -> str:
    r"""\text{ square cm} -> "square" "cm"; a single letter (\text{C}) stays mathematics unless it is a unit."""
    return " " + re.sub("[A-Za-z]{2,}|[mgshL]", r'"\g<0>"', match[1]) + " "


def normalise(text: str, thousands: bool = True) -> str:
    r"""Undo what does not change the mathematics: "$1,234.50$." -> "1234.50", "12\,345" -> "12345", "3½" -> "3 1/2"."""
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).replace(r"\$", ' "dollar" ').replace("$", " ")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), TEXT.sub(quote_words, text))
    text = text.strip().rstrip("\\.,; \n\t")
    if thousands and not re.search(r"[(\[]|\\\{|\\lbrace", text):  # inside brackets a comma separates values
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text.replace(".", "").replace(",", ".") if EUROPEAN.fullmatch(text) else text


class Token(NamedTuple):
    """A piece of an answer; "end" follows the last."""
    kind: str  # number; name (a symbol, function or constant); text (a word); op; command (of LaTeX, unknown); end
    text: str


TOKEN = re.compile(
    r"(?P<space>\s+|~(?=\\|\s))"
    r"|(?<![\^_])(?P<mixed>\d+(?:\s+\d+\s?/\s?\d+|\s?\\[dt]?frac\s?(?:\{\d+\}|\d)\s?(?:\{\d+\}|\d)))(?![\d.])"
    r"|(?P<number>\d*\.\d*\\(?:overline|bar|dot)\{\d+\}|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
    r'|\\(?P<environment>(?:begin|end)\{[a-z]+\*?\})(?:\{[lcr| ]*\})?|\\(?P<command>[A-Za-z]+|.)|"(?P<text>[A-Za-z]+)"'
    r"|(?P<subscript>_\s*(?:[A-Za-z0-9]|\{[A-Za-z0-9,\s]+\}))|(?P<word>[A-Za-z]+)|(?P<greek>[Α-ω])"
    r"|(?P<op>\*\*|<=|>=|!=|==|=<|=>|[-+*/^_=<>!%|(){}\[\],;:&'°ℝ~∈])", re.S,
)  # fmt: skip
GREEK = {  # α -> alpha
    unicodedata.lookup(f"GREEK {size} LETTER {name.replace('LAMBDA', 'LAMDA')}"): title(name)
    for name in str.split("ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA LAMBDA MU NU XI RHO SIGMA TAU "
                          "UPSILON PHI CHI PSI OMEGA") for size, title in (("SMALL", str.lower), ("CAPITAL", str.title))
}  # fmt: skip
DROPPED = ("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits nolimits mathbb "
           "mathbf boldsymbol bm vec mathit mathrm operatorname rm bf it , ; : ! space")  # fmt: skip
SPELLINGS = {  # of commands and signs: another -> ours; "" is dropped
    **dict.fromkeys([*DROPPED.split(), " ", "\n"], ""), **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("cdot", "times", "ast"), "*"), **dict.fromkeys(("le", "leq", "leqslant", "=<"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant", "=>"), ">="), **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    "div": "/", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~", "backslash": "setminus",
    "{": "set{", "}": "set}", "lbrace": "set{", "rbrace": "set}", "langle": "(", "rangle": ")", "\\": "row",
    "degree": "°", "in": "∈", "dbinom": "binom", "tbinom": "binom", "land": ",", "lor": ",", "varphi": "phi",
    "infty": "inf", "varepsilon": "epsilon", "varnothing": "emptyset", "colon": ":", "prime": "'", "**": "^", "==": "=",
}  # fmt: skip
SYMPY_NAMES = {"ln": "log", "lg": "log", "abs": "Abs", "ceil": "ceiling", "arcsin": "asin", "arccos": "acos"}
SYMPY_NAMES["arctan"] = "atan"
FUNCTIONS = {*SYMPY_NAMES, *str.split("sin cos tan cot sec csc sinh cosh tanh asin acos atan log exp sqrt floor")}
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo, "infinity": sympy.oo, "oo": sympy.oo}
KNOWN = {*FUNCTIONS, *CONSTANTS, *GREEK.values()}
LONG_NAMES = "|".join(sorted((name for name in KNOWN if len(name) > 1), key=len, reverse=True))
GLUED = re.compile(rf"({LONG_NAMES})([A-Za-z]{{1,2}})$")  # sinx, lnx, pir
DIGITS = {word: str(n) for n, word in enumerate(str.split("zero one two three four five six seven eight nine ten"))}
PREFIXES = {"frac", "binom", "sum", "prod", "lfloor", "lceil", "emptyset"}  # commands that begin a value
OPERATORS = PREFIXES | {*"+-*/^=<>%|(){}[],:&'°~∈", "<=", ">=", "!=", "cup", "setminus", "set{", "set}", "row"}
OPERATORS |= {"rfloor", "rceil", "pm", "mp"}
UNITS = {alias: names.split()[0] for names in str.split((  # every spelling -> the first
    "cm centimeter centimetre;mm millimeter millimetre;km kilometer kilometre;m meter metre;ft foot feet;in inch inche;"
    "yd yard;mi mile;kg kilogram;g gram;mg milligram;lb pound;oz ounce;s sec second;min minute;h hr hour;day;week;"
    "month;mol;mph;year yr;L l liter litre;mL ml milliliter;dollar usd buck;cent;deg degree;rad radian;gallon;"
    "% percent pct percentage;am;pm"), ";") for alias in names.split()}  # fmt: skip
UNIT_SIGNS = {"^", "/", "*", "2", "3", "{", "}"}


def unit_name(word: str) -> str | None:
    """"Inches" -> "in"; None for a word that is no unit."""
    word = word if word in UNITS else word.lower()
    return UNITS.get(word) or UNITS.get(word.removesuffix("s")) or UNITS.get(word.removesuffix("es"))


class Unparsed(ValueError):
    """Not in our grammar, or beyond the limits: the answer stays text."""


def tokenise(text: str) -> list[Token]:
    r"""LaTeX and plain maths in one spelling: "\dfrac12\cdot xy" -> frac 12 * x y."""
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match or len(tokens) > MAX_TOKENS:
            raise Unparsed("too long" if match else f"{text[position]!a} is not mathematics")
        position, kind, value = match.end(), match.lastgroup, match[match.lastgroup]
        if kind == "word":
            tokens += split_word(value, tokens[-1] if tokens else Token("op", ""))
        elif kind == "text":
            kind = "number" if value in DIGITS else "name" if value in KNOWN else "text"
            tokens.append(Token(kind, DIGITS.get(value, value)))
        elif kind in ("command", "op"):
            value = SPELLINGS.get(value, value) if kind == "command" or len(value) == 2 else value
            kind = "op" if kind == "op" or value in OPERATORS else "name" if value in KNOWN else "command"
            tokens += [Token(kind, value)] if value else []
        elif kind == "subscript":
            tokens.append(Token(kind, re.sub(r"[\s{}]", "", value)))
        elif kind != "space":
            kind = {"greek": "name", "environment": "op"}.get(kind, "number")
            tokens.append(Token(kind, GREEK.get(value, value)))
    return tokens


def split_word(word: str, before: Token) -> list[Token]:
    """A run of letters: a known name, a unit after a number, "sinx", a product of up to three letters, or a word."""
    lower, glued = word.lower(), GLUED.match(word)
    if len(word) == 1 or word in KNOWN:
        return [Token("name", word)]
    if lower in DIGITS:
        return [Token("number", DIGITS[lower])]
    a_unit = unit_name(word) and (before.kind == "number" or before.text in (")", "}", "/"))
    if a_unit or before.kind == "text" or lower in ("and", "or", "yes", "no") or (len(word) > 3 and not glued):
        return [Token("text", lower if lower in ("and", "or") else word)]
    return [Token("name", part) for part in ([glued[1], *glued[2]] if glued else word)]


# -- values, and the arithmetic that builds them -----------------------------------------------------------------------
class Leaf(NamedTuple):
    """A number or expression: 0.5, 5 cm, x + 1."""
    expr: sympy.Expr  # an inert tree
    approximate: bool = False  # holds a decimal that is no integer
    unit: str = ""  # a known unit, "%" for a percentage
    plain: bool = True  # nothing left to calculate, see is_equivalent


class Seq(NamedTuple):
    """A collection: (1,2), [0,1), {1,2}, "1, 2", a union, a matrix."""
    kind: str  # by its brackets "()" "[]" "(]" "[)"; "set"; "list" (bare); "union"; "matrix" (of its rows, or a vector)
    items: tuple


class Relation(NamedTuple):
    """A chain of values: x = 5, a = b = 3, 1 < x <= 2, x + y = 7."""
    sides: tuple  # values; None for a side in words ("Area = 5")
    ops: tuple  # "=", "<", "<=", "!=", "∈"; a chain that begins with > is turned round
    names: tuple  # the spelling of each side that only names something (x, x_1, f(x), Area), else ""


def is_kind(value, *kinds: str) -> bool:
    return isinstance(value, Seq) and value.kind in kinds


def is_rational(value) -> bool:
    return getattr(value.expr if isinstance(value, Leaf) else value, "is_Rational", False)


def bits(value: Rational) -> int:
    """The size of a fraction: 7/2 -> 3 + 2."""
    return value.p.bit_length() + value.q.bit_length()


def number(text: str) -> Rational:
    r"""1.50 -> 3/2, .5e3 -> 500, 0.1\overline{6} -> 1/6, 1\frac45 -> 9/5."""
    if mixed := re.fullmatch(r"(\d+)(?:\s+|\s?\\\w*?frac\D*)(\d+?)\D*?(\d+)\}?", text):
        whole, top, bottom = (Integer(int(part)) for part in mixed.groups())
        fraction = divide(top, bottom)
        return whole + fraction if fraction < 1 else whole * fraction
    decimal, _, period = text.partition("\\")
    mantissa, _, exponent = decimal.lower().partition("e")
    if len(exponent) > 5:
        raise Unparsed("exponent too large")
    value = Rational(f"{mantissa}0" if "." in mantissa else mantissa) * Integer(10) ** int(exponent or 0)
    digits = re.sub(r"\D", "", period)
    return value + Rational(int(digits or 0), (10 ** len(digits) - 1 or 1) * 10 ** len(mantissa.partition(".")[2]))


def number_in_base(digits: str, base: str) -> Integer:
    """52_8 -> 42."""
    if base not in map(str, range(2, 11)) or any(digit not in "0123456789"[: int(base)] for digit in digits):
        raise Unparsed("not a number in that base")
    return Integer(int(digits, int(base)))


def fold(kind, neutral: int, *items):
    """An inert sum or product whose rational part is computed: 1 + x + 2 -> x + 3, 2 * x * 3 -> x * 6."""
    rational, rest = Integer(neutral), [item for item in items if not item.is_Rational]
    for item in items:
        if item.is_Rational:
            rational = rational + item if kind is Add else rational * item
            if bits(rational) > MAX_BITS:
                raise Unparsed("number too large")
    if not rest or (kind is Mul and rational == 0):
        return rational
    rest += [rational] if rational != neutral else []
    return kind(*rest, evaluate=False) if len(rest) > 1 else rest[0]


add, multiply = partial(fold, Add, 0), partial(fold, Mul, 1)


def power(base, exponent):
    """Computed only where it is exact and small: 2^-3 -> 1/8, (4/9)^(3/2) -> 8/27; 2^(1/2) stays."""
    if base.is_Rational and exponent.is_Rational:
        if base == 0 and exponent <= 0:
            raise Unparsed("0 to a power that is not positive")
        if abs(base) not in (0, 1) and bits(base) * abs(exponent) > MAX_BITS:
            raise Unparsed("power too large")
        if exponent.q == 1:
            return base**exponent
        if base >= 0 and exponent.q <= 100:
            (top, exact), (bottom, also) = (sympy.integer_nthroot(part, exponent.q) for part in (base.p, base.q))
            if exact and also:
                return Rational(top, bottom) ** exponent.p
    return Pow(base, exponent, evaluate=False)


def divide(numerator, denominator):
    """6, 4 -> 3/2; x, 2 -> x * 1/2."""
    if denominator == 0:
        raise Unparsed("division by zero")
    return multiply(numerator, power(denominator, Integer(-1)))


def root(value, index):
    r"""The real root of a negative number where the index is odd: \sqrt[3]{-8} -> -2."""
    flip = value.is_Rational and value < 0 and index.is_Integer and index.p % 2
    result = power(-value if flip else value, divide(Integer(1), index))
    return multiply(result, Integer(-1)) if flip else result


def apply(name: str, *values):
    """A function by its name: ln x, |x|, floor(7/2) -> 3, factorial(5) -> 120, binomial(5, 2) -> 10."""
    name, rational = SYMPY_NAMES.get(name, name), all(value.is_Rational for value in values)
    if len(values) != 1 + (name == "binomial"):
        raise Unparsed(f"{name} of {len(values)} values")
    if name in ("factorial", "binomial") and rational:
        n, *k = values
        if not all(value.is_Integer for value in values) or not 0 <= [*k, n][0] <= n <= (20_000 if k else 3_000):
            raise Unparsed(f"{name} out of range")
        return Integer(math.comb(int(n), int(k[0])) if k else math.factorial(int(n)))
    if name in ("sqrt", "exp"):
        return root(values[0], Integer(2)) if name == "sqrt" else power(sympy.E, values[0])
    return getattr(sympy, name)(*values, evaluate=rational and name in ("Abs", "floor", "ceiling"))


def tree(value):
    """The sympy tree of a value in arithmetic."""
    value = value.expr if isinstance(value, Leaf) else value
    if not isinstance(value, sympy.Expr):
        raise Unparsed("arithmetic on what is not a number")
    return value


def product(factors: list):
    """Of numbers; of numbers and one matrix, entry by entry."""
    if matrix := next((factor for factor in factors if is_kind(factor, "matrix")), None):
        others = [factor for factor in factors if factor is not matrix]
        return Seq("matrix", tuple(product([entry, *others]) for entry in matrix.items))
    result = multiply(*map(tree, factors))
    return Leaf(result) if isinstance(factors[0], Leaf) else result  # an entry of a matrix


# -- the parser, one method a level: items > relation > union > leaf > sum > term > factor > atom ----------------------
RELATIONS = {"=", "~", "<", "<=", ">", ">=", "!=", "∈"}
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
SEPARATORS = RELATIONS | {",", ";", "and", "or"}
BRACKETS = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "set{": ("set}",)}  # each with what may close it
PAIRS = {"|": ("|", "Abs"), "lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
ARGUMENT = r"\([A-Za-z0-9_,]{1,40}\)"
NAME = re.compile(rf"[A-Za-z]+(?:_[A-Za-z0-9]+)?'*(?:\^-1)?(?:{ARGUMENT})?|{ARGUMENT}")  # x_1, f(x), (x,y)
EVENT = re.compile(r"[A-Z]\([^()]{1,40}\)")  # P(X = 2)
REAL_LINE = Seq("()", (Leaf(multiply(sympy.oo, Integer(-1))), Leaf(sympy.oo)))


class Parser:
    """Recursive descent over the tokens of one answer: "x = 1, 2" -> Relation(x = 1), Leaf(2)."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at = [*tokens, *[Token("end", "")] * 3], 0  # three, for looking ahead
        self.depth = self.steps = 0
        self.sign, self.two_signs = 1, False  # which of the two values of ± is being read, and whether there is a ±
        self.unit, self.operations = "", 0  # of the leaf being read; operations left to calculate, so far
        self.bars = 0  # 1 where | closes something
        self.bound: dict[str, Integer] = {}  # summation variables

    @property
    def coming(self) -> str:
        return self.tokens[self.at].text

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind

    def next(self) -> Token:
        self.steps += 1
        if self.kind == "end" or self.steps > MAX_STEPS:  # a loop over tokens stops here
            raise Unparsed("ends too early" if self.kind == "end" else "too long")
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, *texts: str) -> bool:
        """Step over the coming token if it is one of these."""
        return self.coming in texts and self.kind != "end" and bool(self.next())

    def expect(self, *texts: str) -> None:
        for text in texts:
            if not self.accept(text):
                raise Unparsed(f"{text} expected, not {self.coming or 'the end'}")

    def answer(self):
        """All of the tokens: one value, or a bare list."""
        items = self.items()
        if self.kind != "end":
            raise Unparsed(f"unexpected {self.coming}")
        return items[0] if len(items) == 1 else Seq("list", tuple(items))

    def items(self, expand: bool = True) -> list:
        r"""Values separated by commas, semicolons, "and" or "or"; one with ± is read twice: 1 \pm 2, 5 -> 3, -1, 5. In
        (1 \pm 2)/3 it is the whole that has two values, so that brackets other than a set's do not expand it."""
        values, saved = [], (self.sign, self.two_signs)
        while not values or self.accept(",", ";", "and", "or"):
            while values and self.accept("and", "or"):
                pass
            start = self.at
            self.sign, self.two_signs = (1, False) if expand else (self.sign, self.two_signs)
            values.append(self.relation())
            if expand and self.two_signs:
                self.at, self.sign = start, -1
                values.append(self.relation())
        self.sign, self.two_signs = saved if expand else (self.sign, self.two_signs)
        return values

    def relation(self):
        """A value, or a chain of them: "x = 5", "Area = 5", "3 > x > 1" as "1 < x < 3", "1/3 ~ 0.33" as 1/3."""
        sides, names, ops = [], [], []
        self.accept("=", "~")  # "≈ 3.14"
        while not sides or (self.kind == "op" and self.coming in RELATIONS):
            op = self.next().text if sides else ""
            name, words = self.name_ahead()
            self.at += words
            side = None if words else self.union()
            if op == "~" and not names[-1]:
                continue  # the value stands before it; but x ≈ 11 is x = 11
            sides, names = [*sides, side], [*names, name]
            ops += ["=" if op == "~" else op] if op else []
        if ops and ops[0][0] == ">":
            sides, names, ops = sides[::-1], names[::-1], [TURNED.get(op, op) for op in ops[::-1]]
        return Relation(tuple(sides), tuple(ops), tuple(names)) if ops else sides[0]

    def name_ahead(self) -> tuple[str, int]:
        r"""(the spelling of a side that only names something: x_1, f(x), (x,y), \cos A, else ""; how many tokens of it
        to skip, if it is words or an event before "=": Area = 5, P(X=2) = 1/4)."""
        depth, end = 0, self.at
        while (token := self.tokens[end]).kind != "end" and depth >= 0 and (depth or token.text not in SEPARATORS):
            depth += (token.text in BRACKETS) - (token.text in (")", "]", "}", "set}"))
            end += 1
        side = self.tokens[self.at : end]
        spelling = "".join(part.text for part in side if part.text not in "{}")
        kinds, named = {part.kind for part in side}, NAME.fullmatch(spelling)
        words = not kinds.isdisjoint(("text", "command"))
        event = EVENT.fullmatch(spelling) and not named
        if token.text in ("=", "~") and (event or (words and "number" not in kinds)):
            return spelling, len(side)
        known = any(part.text in FUNCTIONS or part.text in CONSTANTS for part in side)
        cos_a = len(side) == 2 and side[1].kind == "name"
        return (spelling if named and not words and (not known or cos_a) else ""), 0

    def union(self):
        r"""(-\infty,1) \cup \{2\}; \mathbb{R} \setminus \{1\} as two intervals."""
        pieces = [self.leaf()]
        if pieces == [REAL_LINE] and self.accept("setminus"):
            return complement(self.leaf())
        while self.accept("cup"):
            pieces.append(self.leaf())
        return Seq("union", tuple(pieces)) if len(pieces) > 1 else pieces[0]

    def leaf(self):
        """A sum with its unit or percent sign; or a bracketed value; or words (a str)."""
        start, before, outer = self.at, self.operations, self.unit
        self.unit = "dollar" if self.accept("dollar") else ""
        if self.kind == "text" and not self.unit:
            while self.kind in ("text", "name") and self.coming not in SEPARATORS:
                self.next()
            return " ".join(token.text.casefold() for token in self.tokens[start : self.at])
        value = self.sum()
        if isinstance(value, sympy.Expr):
            if self.coming in SCALES:  # 2 million
                value = multiply(value, Integer(10) ** SCALES[self.next().text])
            self.unit_tail(bool(value.free_symbols))
            approximate = any(is_decimal(token) for token in self.tokens[start : self.at])
            value = Leaf(value, approximate, self.unit, self.operations - before < 2)
        self.unit = outer
        return value

    def unit_tail(self, symbolic: bool) -> None:
        r"""What follows a number: 33 pct, 5 cm, 3 \text{m/s}^2, 64 ft^2; other words (42 apples) are dropped."""
        words, start = ["%"] if self.accept("%") else [], self.at
        while self.kind == "text" or (words and (self.kind == "name" or self.coming in UNIT_SIGNS)):
            if self.coming in SEPARATORS or (self.coming == "}" and "{" not in words):
                break
            words.append(self.next().text)
        units = [word if word in UNIT_SIGNS else unit_name(word) for word in words]
        if None not in units:
            self.unit = re.sub("[{}]", "", "".join(units)) or self.unit
        elif symbolic or any(token.kind == "name" for token in self.tokens[start : self.at]):
            raise Unparsed("words after a formula")

    def sum(self):
        """2x - y + 1; a leading sign."""
        terms = []
        while not terms or self.coming in ("+", "-", "pm", "mp"):
            self.operations += 2 * bool(terms)
            sign, term = self.signs(), self.term()
            terms.append(term if sign > 0 else product([term, Integer(-1)]))
        return terms[0] if len(terms) == 1 else add(*map(tree, terms))

    def signs(self) -> int:
        """Any run of signs: "--" -> 1; ± and ∓ as self.sign says."""
        sign = 1
        while self.coming in ("+", "-", "pm", "mp"):
            token = self.next().text
            self.two_signs |= token in ("pm", "mp")
            sign *= {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}[token]
        return sign

    def term(self):
        """A product or quotient: "2x/3 y" is 2, x, 1/3, y."""
        factors = [self.factor()]
        while True:
            op = self.coming if self.kind == "op" and self.coming in ("*", "/", ":" if not self.bars else "/") else ""
            if not op and not self.starts_factor():
                return factors[0] if len(factors) == 1 else product(factors)
            if not op and self.kind == self.tokens[self.at - 1].kind == "number":
                raise Unparsed("two numbers side by side")
            self.at += bool(op)
            scientific = op == "*" and self.coming == "10" and self.tokens[self.at + 1].text == "^"
            sign, right = Integer(self.signs() if op else 1), self.factor()
            if op in ("/", ":"):
                self.operations += 1
                factors.append(divide(sign, tree(right)))
            else:  # a product of numbers is something left to calculate; 3 × 10^5 and 2π are not
                self.operations += 2 * (is_rational(right) and any(map(is_rational, factors)) and not scientific)
                factors += [right] if sign > 0 else [right, sign]

    def starts_factor(self) -> bool:
        """Whether an implicit product goes on: 2x, 2(3), 2\\frac12."""
        kind, text = self.tokens[self.at]
        opens = text in PREFIXES or text in ("(", "[", "{", "|"[self.bars :]) or text.startswith("begin{")
        return kind in ("number", "name") or (kind == "op" and opens)

    def factor(self):
        """An atom with its powers, factorials and degrees: x^2, n!, 30°."""
        value = self.atom()
        while self.kind == "op" and self.coming in ("^", "°", "!"):
            op = self.next().text
            if op == "^":
                value = power(tree(value), self.exponent())
            elif op == "!":
                value, self.steps = apply("factorial", tree(value)), self.steps + 50
            else:
                self.unit = "deg"
        return value

    def exponent(self):
        """What follows ^: one signed atom, itself perhaps raised (right to left)."""
        self.depth += 1
        sign, value = self.signs(), tree(self.atom())
        if self.accept("^"):
            value = power(value, self.exponent())
        self.depth -= 1
        return value if sign > 0 else multiply(value, Integer(-1))

    def atom(self):
        """The smallest value. Every recursion of the parser passes here: this is where depth is bounded."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("too deep")
        value = self.read(*self.next())
        self.depth -= 1
        return value

    def read(self, kind: str, text: str):
        """What begins with this token, by its kind."""
        if kind == "number":
            self.operations += "frac" in text or "/" in text
            return number_in_base(text, self.next().text[1:]) if self.kind == "subscript" else number(text)
        if kind == "name":
            return self.function(text) if text in FUNCTIONS else self.symbol(text)
        if text in BRACKETS:
            return self.group(text)
        if text in ("frac", "binom"):
            top, bottom = self.digit_or_atom(), self.digit_or_atom()
            self.operations += text == "frac"
            return divide(top, bottom) if text == "frac" else apply("binomial", top, bottom)
        if text in PAIRS:  # |x|, floor and ceiling
            closing, name = PAIRS[text]
            outer, self.bars = self.bars, int(text == "|")
            value = apply(name, tree(self.sum()))
            self.expect(closing)
            self.bars = outer
            return value
        if text in ("emptyset", "ℝ"):
            return REAL_LINE if text == "ℝ" else Seq("set", ())
        if text in ("sum", "prod"):
            return self.series(add if text == "sum" else multiply)
        if text.startswith("begin{"):
            return self.matrix(text)
        raise Unparsed(f"{text or 'the end'} is not a value")

    def symbol(self, name: str):
        """A constant, a variable with its subscript and primes, or an undefined function f, g, h of arguments."""
        if name in self.bound or (name in CONSTANTS and self.kind != "subscript"):
            return self.bound.get(name, CONSTANTS.get(name))
        name += self.next().text if self.kind == "subscript" else ""
        while self.accept("'"):
            name += "'"
        raised = self.coming == "^" and self.tokens[self.at + 2].text == "("  # f^2(x)
        if name[0] in "fghFGH" and (self.coming == "(" or raised):
            exponent = self.exponent() if self.accept("^") else Integer(1)
            return power(sympy.Function(name)(*self.arguments()), exponent)
        return Symbol(name)

    def arguments(self) -> list:
        """(x, y) of a function."""
        value = self.group(self.next().text)
        return [tree(item) for item in (value.items if isinstance(value, Seq) else [value])]

    def function(self, name: str):
        r"""\sin^2 x, \sin^{-1} x, \log_2 8, \sqrt[3]{2}, \sin 30^\circ; sin 2x cos x is sin(2x) cos(x)."""
        base, exponent, unit = Integer(10) if name == "lg" else None, None, self.unit
        index = tree(self.group("[")) if name == "sqrt" and self.accept("[") else Integer(2)
        if name == "log" and self.kind == "subscript":
            base = tree(Parser(tokenise(self.next().text[1:])).answer())  # log_2, log_{10}, log_a
        elif name == "log" and self.accept("_"):
            base = tree(self.atom())
        if name != "sqrt" and self.accept("^"):
            exponent = self.exponent()
            if exponent == -1 and f"arc{name}" in FUNCTIONS:
                name, exponent = f"arc{name}", None
        if self.coming in ("(", "{"):
            values = self.arguments()
        elif name == "sqrt":
            values = [tree(self.atom())]
        else:
            factors = [Integer(self.signs()), tree(self.factor())]
            while self.starts_factor() and self.coming not in FUNCTIONS | {"(", "["}:
                factors.append(tree(self.factor()))
            values = [multiply(*factors)]
        if name == "log" and len(values) == 2:
            base = values.pop()
        if self.unit == "deg" and unit != "deg":
            values, self.unit = [divide(multiply(value, sympy.pi), Integer(180)) for value in values], unit
        result = root(values[0], index) if name == "sqrt" else apply(name, *values)
        result = divide(result, apply("log", base)) if base is not None else result
        return result if exponent is None else power(result, exponent)

    def digit_or_atom(self):
        r"""\frac12 is 1/2: of a number only the first digit; the rest becomes a token of its own."""
        if self.kind == "number" and self.coming.isdigit():
            text = self.next().text
            self.tokens[self.at - 1 : self.at] = [Token("number", part) for part in (text[0], text[1:]) if part]
            return number(text[0])
        return tree(self.atom())

    def group(self, opening: str):
        """What stands in brackets: one value, or several; {x | x > 0} is what stands after the bar."""
        outer, self.bars = self.bars, int(opening == "set{")
        items = [] if opening == "set{" and self.coming == "set}" else self.items(expand=opening == "set{")
        if opening == "set{" and self.accept("|", ":"):
            items = self.items()
        closing, self.bars = self.next().text, outer
        if closing not in BRACKETS[opening]:
            raise Unparsed(f"{BRACKETS[opening][0]} expected")
        if opening == "set{" or (opening == "{" and len(items) > 1):
            relations = items and all(isinstance(item, Relation) for item in items)
            return Seq("list" if relations else "set", tuple(items))
        if len(items) > 1:
            return Seq(opening + closing, tuple(items))
        if not isinstance(items[0], Leaf):
            return items[0]
        if items[0].unit == "%":
            return divide(items[0].expr, Integer(100))
        self.unit = self.unit or items[0].unit
        return items[0].expr

    def matrix(self, begin: str) -> Seq:
        r"""\begin{pmatrix}1&2\\3&4\end{pmatrix}: a matrix of its rows; one row or column: of its entries."""
        rows: list[list] = [[]]
        while begin.endswith(("{matrix}", "pmatrix}", "bmatrix}", "array}")) and not self.coming.startswith("end{"):
            rows[-1].append(self.leaf())
            if self.accept("row"):
                rows += [] if self.coming.startswith("end{") else [[]]
            elif not self.accept("&") and not self.coming.startswith("end{"):
                raise Unparsed("a matrix is not closed")
        self.next()
        if not rows[0] or len({*map(len, rows)}) > 1 or not all(isinstance(cell, Leaf) for cell in chain(*rows)):
            raise Unparsed("not a matrix")
        if len(rows) == 1 or len(rows[0]) == 1:
            return Seq("matrix", tuple(chain(*rows)))
        return Seq("matrix", tuple(Seq("matrix", tuple(row)) for row in rows))

    def series(self, combine):
        r"""\sum_{k=a}^{b} term with integers a and b: the term is read once for each k."""
        self.expect("_", "{")
        variable = self.next().text
        self.expect("=")
        low = tree(self.sum())
        self.expect("}", "^")
        high = tree(self.atom())
        if not (low.is_Integer and high.is_Integer and 0 <= high - low < MAX_STEPS):
            raise Unparsed("not a simple sum")
        start, values, outer = self.at, [], self.bound
        for k in range(int(low), int(high) + 1):
            self.at, self.bound = start, {**outer, variable: Integer(k)}
            values.append(tree(self.term()))
        self.bound = outer
        return combine(*values)


def is_decimal(token: Token) -> bool:
    r"""0.33 was perhaps rounded; 2.0 and 0.\overline{3} are exact."""
    return token.kind == "number" and "." in token.text and "\\" not in token.text and not number(token.text).is_Integer


def complement(points) -> Seq:
    """The real line without a set of rational points, as intervals."""
    if not is_kind(points, "set") or not all(map(is_rational, points.items)):
        raise Unparsed("a difference of sets")
    ends = [REAL_LINE.items[0], *sorted(points.items, key=lambda leaf: leaf.expr), REAL_LINE.items[1]]
    return Seq("union", tuple(Seq("()", pair) for pair in pairwise(ends)))


def leaves(value, depth: int = 0) -> int:
    """The number of values in collections within collections; too deep a nest counts as too many."""
    inside = value.sides if isinstance(value, Relation) else value.items if isinstance(value, Seq) else ()
    if inside and depth == 4:
        return MAX_LEAVES + 1
    return sum(leaves(item, depth + 1) for item in inside) if inside else 1


class Parsed(NamedTuple):
    text: str  # normalised spelling, for comparison as text
    value: object  # Leaf, Seq, Relation, str (words); None where the answer is not in the grammar
    why: str = ""


@lru_cache(maxsize=512)
def parse(text: str, thousands: bool = True) -> Parsed:
    """A whole answer: "1/2" -> Leaf(1/2). What is not in the grammar, or beyond the limits, is text and nothing else:
    "5 +" -> None, "ends too early"."""
    if len(text) > MAX_ANSWER:
        return Parsed(text, None, "longer than the limit")
    text = normalise(text, thousands)
    spelling = re.sub(r"\s+", "", text)
    try:
        tokens = tokenise(text)
        spelling = "".join(token.text.casefold() if token.kind == "text" else token.text for token in tokens)
        value = Parser(tokens).answer()
        if leaves(value) > MAX_LEAVES:
            raise Unparsed("too many values")
        return Parsed(spelling, value)
    except Unparsed as error:
        return Parsed(spelling, None, str(error))


# -- the values of inert trees at fixed points -------------------------------------------------------------------------
# No rewriting comes first (expand, cancel, trigonometric identities …): what it could show these points show too, with
# bounded work, while expand does not come back from (x^200000 - 1)/(x - 1) nor cancel from e^(10^9 ln 2).
NUMBERS, LOCK = MPContext(), threading.RLock()  # our own mpmath context; its precision is set under the lock
EVALUATORS = {
    **{getattr(sympy, name): name for name in str.split("sin cos tan cot sec csc sinh cosh tanh asin acos atan floor")},
    sympy.log: "ln", sympy.Abs: "fabs", sympy.ceiling: "ceil", sympy.factorial: "factorial", sympy.binomial: "binomial",
}  # fmt: skip
GAMMAS = {sympy.factorial, sympy.binomial}


def point(name: str, k: int, real: bool):
    """A variable's k-th value: near the positive axis, where roots and logarithms behave; or real, of both signs."""
    noise = zlib.crc32(f"{name} {k}".encode("utf-8", "replace"))
    size, tilt = 0.3 + (noise & 0xFFFF) / 0x8000, 0.05 + (noise >> 16) / 0x50000
    below = k == 1 or (k > 1 and noise >> 20 & 1)
    return NUMBERS.mpf(-size if below else size) if real else NUMBERS.mpc(size, tilt)


def evaluate(expr, k: int, real: bool):
    """The value at the k-th point; ArithmeticError where there is none, or out of bounds. An undefined f(x) gets an
    arbitrary analytic function: an identity for every f holds for it, and what is none almost surely fails."""
    if expr.is_Rational:
        return NUMBERS.mpf(expr.p) / expr.q
    if expr.is_Symbol:
        return point(expr.name, k, real)
    if not expr.args:
        return {sympy.pi: NUMBERS.pi, sympy.E: NUMBERS.e, sympy.I: NUMBERS.j}[expr] * NUMBERS.one
    kind, values = expr.func, [evaluate(argument, k, real) for argument in expr.args]
    sizes = [NUMBERS.mag(value) for value in values]
    if kind in (Add, Mul):
        result = sum(values) if kind is Add else math.prod(values)
    elif kind is Pow:
        base, exponent = values
        if base == 0:
            result = base if exponent.real > 0 else NUMBERS.nan
        elif expr.args[1].is_Integer and abs(exponent) <= 10_000:
            result = base ** int(exponent) if abs(exponent * sizes[0]) < 4 * MAX_MAGNITUDE else NUMBERS.inf
        else:
            logarithm = exponent * NUMBERS.ln(base)
            result = NUMBERS.exp(logarithm) if NUMBERS.mag(logarithm) <= 16 else NUMBERS.inf
    elif kind in EVALUATORS:
        if max(sizes) > (12 if kind in GAMMAS else 16 if any(value.imag for value in values) else 1_000):
            raise ArithmeticError("argument too large")
        if kind in (sympy.floor, sympy.ceiling) and abs(values[0] - NUMBERS.nint(values[0])) < 2.0**-90:
            values = [NUMBERS.nint(values[0])]  # an integer but for rounding
        result = getattr(NUMBERS, EVALUATORS[kind])(*values)
    else:
        result = NUMBERS.sin(sum(value * point(f"{kind} {place}", 0, False) for place, value in enumerate(values)))
    if not NUMBERS.mag(result) <= MAX_MAGNITUDE:
        raise ArithmeticError("too large, or not a number")
    return result


@lru_cache(maxsize=512)
class Facts:
    """What chooses the points for a tree, and bounds the work on it."""

    def __init__(self, expr):
        nodes = list(sympy.preorder_traversal(expr))
        inner = [node for node in nodes if node.args and node.func not in (Add, Mul)]
        kinds = {node.func for node in inner}
        roots = [node for node in inner if node.func is sympy.log or (node.func is Pow and not node.exp.is_Integer)]
        self.nodes, self.cost = len(nodes), sum(30 if node.func in GAMMAS else 1 for node in inner)
        self.bits = max((bits(node) for node in nodes if node.is_Rational), default=0)
        self.variable = any(node.is_Symbol for node in nodes) or not {*EVALUATORS, Pow}.issuperset(kinds)
        self.real = not kinds.isdisjoint((sympy.Abs, sympy.floor, sympy.ceiling))  # of real numbers
        self.rooted = any(node.args[0].free_symbols for node in roots)  # of positive numbers


@lru_cache(maxsize=4096)
def value_at(expr, k: int, real: bool, precision: int):
    """evaluate, remembered; None where there is no value, or where it would take too much work."""
    simple, hard = precision // 64 + (precision // 4096) ** 2, (precision // 64) ** 2  # of a division, of a sine
    if Facts(expr).nodes * simple + Facts(expr).cost * hard > MAX_WORK:
        return None
    NUMBERS.prec = precision
    try:
        return evaluate(expr, k, real)
    except (ArithmeticError, ValueError, KeyError, TypeError):
        return None


def equal_at(x, y, k: int, real: bool, precision: int, approximate: bool) -> bool | None:
    """Whether two trees agree at the k-th point; None where one has no value. Two sides that are both tiny may be zero
    seen through rounding (sin 1 ² + cos 1 ² - 1); then they shrink as the precision grows."""
    for now in (precision, 4 * precision):
        left, right = value_at(x, k, real, now), value_at(y, k, real, now)
        if left is None or right is None:
            return None
        NUMBERS.prec = now
        tolerance = NUMBERS.mpf(1e-6) if approximate and now == precision else NUMBERS.ldexp(1, -now // 2)
        if abs(left - right) <= tolerance * (scale := max(abs(left), abs(right))):
            return True
        if NUMBERS.mag(scale) > -now // 3:
            return False
    return True


def sampling(x, y) -> tuple[int, bool, int]:
    """(number of points, whether real, precision): one point for constants; more bits for larger numbers; points of
    both signs where only one side has a root, so that \\sqrt{x^2} is not x."""
    one, other = Facts(x), Facts(y)
    real = one.real or other.real or one.rooted != other.rooted
    precision = 192
    while precision < 2 * max(one.bits, other.bits) + 64:
        precision *= 2
    return (8 if real else 5) if one.variable or other.variable else 1, real, precision


def same_tree(x, y, approximate: bool = False) -> bool:
    """Two inert trees: by structure, as exact numbers, by their values at fixed points."""
    if x == y:
        return True
    if x.is_Rational and y.is_Rational:
        return approximate and abs(x - y) * 10**6 <= max(abs(x), abs(y))
    with LOCK:
        count, real, precision = sampling(x, y)
        agreed = 0
        for k in range(count):
            if (verdict := equal_at(x, y, k, real, precision, approximate)) is False:
                return False
            agreed += bool(verdict)
    return 2 * agreed > count


def proportional(x, y, positive: bool) -> bool:
    """x = c y with a constant c that is not 0 (positive, for inequalities); or both vanish everywhere."""
    zeros = [same_tree(expr, Integer(0)) for expr in (x, y)]
    if any(zeros):
        return all(zeros)
    with LOCK:
        _, real, precision = sampling(x, y)
        precision *= 2  # near a large constant C the ratio of different sides varies by 1/C²
        pairs = [(value_at(x, k, real, precision), value_at(y, k, real, precision)) for k in range(4)]
        if any(None in pair or not pair[1] for pair in pairs):
            return False
        NUMBERS.prec = precision
        first, *others = (left / right for left, right in pairs)
        limit = NUMBERS.ldexp(abs(first), -precision // 2)
        return all(abs(ratio - first) <= limit for ratio in others) and (not positive or first.real > 0)


# -- comparison of values ----------------------------------------------------------------------------------------------
# kind                     equal when                                              not equal
# numbers                  exactly; a decimal to a relative 1e-6                   0.33 and 1/3; 2.23 and 2.232
# expressions              the same values at fixed points                         x and X; √(x²) and x; e^x and e^x + C
# percent, degrees, units  5% is 5 or 0.05; 50 cents are $0.50; units must agree   5 cm and 5 m
# x = 5, a = b = 5         as 5; both named: the same name                         x = 5 and y = 5; a + b = 0 and 0
# other equations          left - right are proportional                           x = y and |x| = |y|
# inequalities             the same variable and intervals; or proportional        x < 1 and x <= 1, nor y < 1
# intervals, unions        the same ends and brackets; unions in any order         (0,1) and [0,1]
# tuples, matrices         entry by entry, in order                                (1,2) and (2,1); (1,2) and {1,2}
# sets, bare lists         in any order; a bare list also as a tuple, in order     {1,2} and {1,2,3}; 1 and {1,2}
# words, unparsed          the same text                                           what did not parse and anything else
def same(left, right) -> bool:
    """By the table above: relations by what they say, leaves by value, collections by their items."""
    left, right = single(left), single(right)
    if isinstance(left, Relation) and isinstance(right, Relation):
        return same_relation(left, right)
    if isinstance(left, Relation) or isinstance(right, Relation):
        left, right = (meaning(side) if isinstance(side, Relation) else side for side in (left, right))
        return None not in (left, right) and same(left, right)
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return same_leaf(left, right)
    if isinstance(left, Seq) and isinstance(right, Seq):
        return same_seq(left, right)
    return isinstance(left, str) and left == right


def single(value):
    """A collection of one value, repeated or not, is that value."""
    while is_kind(value, "set", "list", "union") and value.items:
        first, *rest = value.items
        if not all(same(first, other) for other in rest):
            return value
        value = first
    return value


PER_CENT = Rational(1, 100)
BASE_UNITS = {"%": ("", PER_CENT), "deg": ("", divide(sympy.pi, Integer(180))), "cent": ("dollar", PER_CENT)}


def same_leaf(left: Leaf, right: Leaf) -> bool:
    """Numbers with or without units: 5 cm is 5 and not 5 m; 50% is 50 and 0.5; 50 cents is 50 and $0.50."""
    for scaled in (False, True):
        values, units = [left.expr, right.expr], [left.unit, right.unit]
        for place, unit in enumerate(units):
            if scaled and unit in BASE_UNITS:
                units[place], values[place] = BASE_UNITS[unit][0], multiply(values[place], BASE_UNITS[unit][1])
        alike = units[0] == units[1] or "" in units
        if alike and same_tree(*values, approximate=left.approximate or right.approximate):
            return True
        if left.unit == right.unit:
            return False
    return False


def is_constant(value) -> bool:
    """2 + 3 or sqrt 2; not x, not f(2)."""
    return isinstance(value, Leaf) and not Facts(value.expr).variable


def meaning(relation: Relation):
    """What a relation says of one thing. The value: x = 5, f(x) = 5, 2 + 3 = 5, Area = 5, x in {5} -> 5. Intervals, for
    inequalities in one variable with constant ends: 1 < x <= 2 -> (1,2]. None for a real equation."""
    sides, ops, names = relation
    if all(op in ("=", "∈") for op in ops):
        if len(sides) == 2 and names[1] and not names[0] and is_constant(sides[0]):
            return sides[0]
        calculated = is_constant(sides[-1]) and (len(sides) > 2 or is_constant(sides[0]))
        return sides[-1] if names[0] or calculated else None
    place = next((place for place, side in enumerate(sides) if names[place] and not is_constant(side)), None)
    ends = [side for other, side in enumerate(sides) if other != place]
    if place is None or not all(map(is_constant, ends)):
        return None
    if ops == ("!=",):
        return complement(Seq("set", tuple(ends))) if is_rational(ends[0]) else None
    if any(op[0] != "<" for op in ops) or len(sides) > 3 or (len(sides) == 3 and place != 1):
        return None
    low, high = (ends[0] if place else REAL_LINE.items[0]), (ends[-1] if place + 1 < len(sides) else REAL_LINE.items[1])
    left, right = place and ops[place - 1] == "<=", place < len(ops) and ops[place] == "<="
    return Seq("[("[not left] + "])"[not right], (low, high))


def same_relation(left: Relation, right: Relation) -> bool:
    """x = 5 and 5 = x; y = 2x + 1 and 2x - y + 1 = 0; x > 1 and -2 > -2x; not x = 5 and y = 5."""
    values, names = [meaning(left), meaning(right)], [next(filter(None, side.names), "") for side in (left, right)]
    loose = None in left.sides + right.sides or ("(" in names[0]) != ("(" in names[1])
    if None not in values and (loose or names[0] == names[1]) and same(*values):
        return True  # also Area = 5 and x = 5; f(x) = 2x and y = 2x
    steps, others = steps_of(left), steps_of(right)
    return 0 < len(steps) == len(others) and all(
        op == sign and proportional(x, y, "<" in op) for (x, op), (y, sign) in zip(steps, others))  # fmt: skip


def steps_of(relation: Relation) -> list:
    """Each adjacent pair as (difference, sign): difference = 0, < 0, <= 0 or != 0."""
    if not all(isinstance(side, Leaf) for side in relation.sides) or not {*relation.ops} <= {"=", "<", "<=", "!="}:
        return []
    pairs = pairwise(side.expr for side in relation.sides)
    return [(add(left, multiply(right, Integer(-1))), op) for (left, right), op in zip(pairs, relation.ops)]


def parts(seq: Seq) -> list:
    """What is compared in any order: the items of a set or list, the pieces of a union."""
    if seq.kind == "union":
        return [part for item in seq.items for part in (item.items if is_kind(item, "set") else [item])]
    return list(seq.items) if seq.kind in ("set", "list") else [seq]


def same_seq(left: Seq, right: Seq) -> bool:
    """{1,2} and {2,1}; (1,2) and the bare 1,2; not (0,1) and [0,1]."""
    kinds = {left.kind, right.kind}
    if "union" in kinds or kinds <= {"set", "list"}:
        one, other = parts(left), parts(right)
        return all(any(same(a, b) for b in other) for a in one) and all(any(same(a, b) for a in one) for b in other)
    if len(left.items) != len(right.items) or "set" in kinds:
        return False
    if len(kinds) == 2 and kinds.isdisjoint(("list", "matrix")) and (len(left.items) == 2 or kinds != {"()", "[]"}):
        return False  # (0,1) and [0,1] are intervals
    return all(map(same, left.items, right.items))


OPTION = re.compile(r"\W{0,3}([A-J])\s{0,2}[).:]\s*(\S.*)", re.S)


def compare(answer: str, reference: str) -> bool:
    """Two answers as they stand: as text, then by value, then in another reading of either."""
    left, right = parse(answer), parse(reference)
    if left.text == right.text or equal(left, right):
        return True
    return reread(left, right, reference) or reread(right, left, answer)


def reread(one: Parsed, other: Parsed, spelling: str) -> bool:
    """The other as an option "(C) 15", which is "C" and is "15"; or 1,234 as a list, beside a collection."""
    if option := OPTION.match(normalise(spelling)):
        letter = re.fullmatch("[A-J]", one.text.strip("()"))
        return option[1] == letter[0] if letter else parse(option[2]).text == one.text
    listed = isinstance(one.value, Seq) and isinstance(other.value, Leaf) and "," in spelling
    return listed and equal(one, parse(spelling, thousands=False))


def equal(one: Parsed, other: Parsed) -> bool:
    """By value; False where one did not parse, or where a number grows too large on the way."""
    with contextlib.suppress(Unparsed):
        return None not in (one.value, other.value) and same(one.value, other.value)
    return False


def leaf_of(answer: str) -> Leaf | None:
    """The number that an answer says, if it says one: "5", "x = 5", "3 + 2 = 5"."""
    value = single(parse(answer).value)
    value = single(meaning(value)) if isinstance(value, Relation) else value
    return value if isinstance(value, Leaf) else None


def is_equivalent(answer: str, reference: str, require_value: bool = False) -> bool:
    """Whether two answers are equal by the table above: "3+2" is "5". With `require_value`, where the reference is a
    rational number, an answer with something left to calculate is wrong: a sign, one fraction, mixed number, root,
    power or 3 × 10^5 is a value, 3+2 is not (a policy would answer "3+2=" with the question)."""
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer, reference = reference_answer(answer), reference_answer(reference)
    if not answer or not reference:
        return False
    if require_value and is_rational(leaf_of(reference)) and (leaf := leaf_of(answer)) and not leaf.plain:
        return False
    return compare(answer, reference)


def score(response: str, reference: str, require_value: bool = False) -> float:
    """1.0 if the final answer of a response equals the reference, else 0.0."""
    answer = extract_answer(response)
    return float(answer is not None and is_equivalent(answer, reference, require_value))


class Explanation(NamedTuple):
    """What explain says of a response."""
    right: bool
    answer: str | None
    rule: str  # the name in RULES of what found the answer, or "none"
    why: str  # right, wrong, no answer, not a value, unparsed answer: …


def explain(response: str, reference: str, require_value: bool = False) -> Explanation:
    r"""The verdict and its reason: "\boxed{5+}" for "5" -> (False, "5+", "box", "unparsed answer: ends too early")."""
    answer, rule = find_answer(response)
    if answer is None:
        return Explanation(False, None, rule, "no answer")
    if is_equivalent(answer, reference, require_value):
        return Explanation(True, answer, rule, "right")
    parsed = parse(reference_answer(answer))
    if require_value and is_equivalent(answer, reference):
        return Explanation(False, answer, rule, "not a value")
    return Explanation(False, answer, rule, "wrong" if parsed.value is not None else f"unparsed answer: {parsed.why}")


def answer_classes(answers: list[str | None]) -> list[int]:
    """The class of each answer, numbered by first appearance; -1 where there is none. Equality (the same in both
    directions) is closed transitively, so the partition does not depend on the order."""
    spellings = {answer: reference_answer(answer) for answer in answers if answer is not None}
    classes: list[list[str]] = []
    for answer, spelling in spellings.items():
        joined = [group for group in classes if any(compare(spelling, spellings[other]) for other in group)]
        classes = [group for group in classes if group not in joined] + [[*chain.from_iterable(joined), answer]]
    first, numbers = {answer: group[0] for group in classes for answer in group}, {}
    return [-1 if answer is None else numbers.setdefault(first[answer], len(numbers)) for answer in answers]


# -- the pool of workers -----------------------------------------------------------------------------------------------
class Group(NamedTuple):
    """What became of the responses to one prompt, in their order."""
    verdicts: list[bool]
    classes: list[int]  # -1: no answer; all right ones share one class
    answers: list[str | None]
    timed_out: list[bool]  # lost to a limit (of time, memory …), and so counted as wrong


class Worker:
    """One `python reward.py --worker` after another: started when asked, killed and replaced when an answer exceeds a
    limit, recycled against slow growth. Requests and replies are lines of JSON."""

    def __init__(self, timeout: float, memory_mb: int, failures: Counter):
        self.timeout, self.memory_mb, self.failures = timeout, memory_mb, failures
        self.process, self.pending, self.asked = None, b"", 0

    def start(self) -> None:
        limits = map(str, (os.getpid(), self.timeout, self.memory_mb))
        command = [sys.executable, os.path.abspath(__file__), "--worker", *limits]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.pending, self.asked = b"", 0
        if self.read(120.0) != "ready":
            self.end()
            raise RuntimeError(f"a checker worker did not start: {' '.join(command)}")

    def ask(self, **request) -> None:
        if self.asked > 20_000:
            self.end()
        if not self.process:
            self.start()
        self.asked += 1
        with contextlib.suppress(OSError):  # it died; reply() says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def read(self, timeout: float):
        """The next line; None if the process died or the time is over."""
        deadline, stdout, poll = time.monotonic() + timeout, self.process.stdout.fileno(), select.poll()
        poll.register(stdout, select.POLLIN)
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            chunk = os.read(stdout, 1 << 16) if left > 0 and poll.poll(left * 1000) else b""
            if not chunk:
                return None
            self.pending += chunk
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)

    def reply(self):
        """The next reply; None where the answer exceeded a limit."""
        reply = self.read(self.timeout)
        if reply is None or reply == "memory":
            self.failures[reply or self.end()] += 1
        return None if reply == "memory" else reply

    def end(self) -> str:
        """Kill it and say what it had died of."""
        if not (process := self.process):
            return ""
        died_of, self.process = "time", None
        with contextlib.suppress(subprocess.TimeoutExpired):  # a pipe closes a moment before its process is gone
            died_of = "cpu" if process.wait(0.1) == -signal.SIGXCPU else "crash"
        process.kill()
        process.wait()
        process.stdin.close(), process.stdout.close()
        return died_of

    def judge(self, responses: list[str], reference: str, require_value: bool) -> Group:
        """One group: each distinct response is sent once; the worker says [answer] and then the verdict for each."""
        found: dict[str, tuple] = dict.fromkeys(responses)  # -> (answer, right, lost)
        while rest := [text for text, entry in found.items() if entry is None]:
            replies = [(after_thinking(text) or "")[-MAX_RESPONSE:] for text in rest]
            self.ask(responses=replies, reference=reference, require_value=bool(require_value))
            for text in rest:
                answer = self.reply()
                right = self.reply() if answer and self.process else None
                found[text] = (answer and answer[0], bool(right), right is None)
                if not self.process:
                    break  # the next one sees what is left
        wrong = list(dict.fromkeys(answer for answer, right, lost in found.values() if answer and not (right or lost)))
        labels = wrong
        if len(wrong) > 1:
            self.ask(answers=wrong)
            labels = self.reply() or wrong
        label, numbers, classes = dict(zip(wrong, labels)), {}, []
        for answer, right, _ in map(found.get, responses):  # an answer that was lost is classed by its spelling
            key = (right, "" if right else label.get(answer, "".join((answer or "").split())))
            classes.append(-1 if key == (False, "") else numbers.setdefault(key, len(numbers)))
        answers, verdicts, lost = ([found[text][part] for text in responses] for part in range(3))
        return Group(verdicts, classes, answers, lost)


class Verifier(contextlib.AbstractContextManager):
    """A pool that judges groups of responses in order: `with Verifier(4) as pool: pool.check([[response, …], …],
    [reference, …])`. No answer can hang, crash or exhaust the caller. Each thread owns one worker at a time (Linux ends
    a worker with the thread that started it). `timeout` (seconds an answer may take, on the wall and of CPU) and
    `memory_mb` are a last resort: the checker's own bounds stop work long before."""

    def __init__(self, workers: int = 2, timeout: float = 10.0, memory_mb: int = 1024):
        if sys.platform == "win32":
            raise ValueError("Verifier runs on Linux and macOS, not on Windows; use WSL, or call score()")
        if workers < 1 or timeout <= 0:
            raise ValueError(f"workers must be at least 1 and timeout above 0, not {workers} and {timeout}")
        if sys.platform != "linux":
            warnings.warn("this system has no memory limit for the checker's workers", stacklevel=2)
        self.workers, self.timeout, self.memory_mb = workers, timeout, memory_mb
        self.failures: Counter = Counter()  # by kind: time, cpu, memory, crash
        self.jobs, self.threads, self.lock = queue.SimpleQueue(), [], threading.Lock()

    @property
    def timeouts(self) -> int:
        return self.failures["time"] + self.failures["cpu"]

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the workers; the next check() starts new ones."""
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
            raise ValueError(f"{len(responses)} groups but {len(references)} references and {len(require_value)} flags")
        with self.lock:
            for _ in range(self.workers - len(self.threads)):
                self.threads.append(threading.Thread(target=self.serve, daemon=True))
                self.threads[-1].start()
        jobs = [(Future(), job) for job in zip(responses, references, require_value)]
        for job in jobs:
            self.jobs.put(job)
        return [future.result() for future, _ in jobs]

    def verify(self, responses, references, require_value=None) -> tuple[list[list[bool]], list[list[int]]]:
        """check() without the answers: (verdicts, classes), each P lists of G."""
        groups = self.check(responses, references, require_value)
        return [group.verdicts for group in groups], [group.classes for group in groups]

    def serve(self) -> None:
        """The life of a thread: jobs from the queue, for its own worker."""
        worker = Worker(self.timeout, self.memory_mb, self.failures)
        while (entry := self.jobs.get()) is not None:
            future, job = entry
            try:
                future.set_result(worker.judge(*job))
            except Exception as error:  # belongs to the caller of check()
                future.set_exception(error)
        worker.end()


def serve_requests(parent: int, timeout: float, memory_mb: int) -> None:
    """A worker. It ends with its parent (EOF, and the death signal on Linux) and on a runaway answer (CPU, memory)."""
    import resource  # not there on Windows, where Verifier says so by name

    for ignored in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and preemption are the trainer's to handle
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    if os.getppid() != parent:
        return
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but replies reaches the pipe

    def reply(work, *arguments):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime + timeout) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            value = work(*arguments)
        except (MemoryError, RecursionError):
            value = "memory"
        replies.write(json.dumps(value).encode() + b"\n")
        replies.flush()
        return value

    reply(lambda: "ready" if score(r"$\boxed{\frac{x+1}{2}}$", "x/2 + 1/2") else "broken")
    for request in map(json.loads, sys.stdin.buffer):
        if "answers" in request:
            reply(answer_classes, request["answers"])
        for response in request.get("responses", ()):
            answer = reply(lambda text: [extract_answer(text)], response)
            if answer != "memory":
                reply(is_equivalent, answer[0], request["reference"], request["require_value"])


# -- audit -------------------------------------------------------------------------------------------------------------
def audit(path: str, shown: int = 5) -> None:
    """What the checker made of a JSONL of responses: found by which rule, parsed or not, the slowest, and examples."""
    rules, verdicts, slowest, examples = Counter(), Counter(), [], {}
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row, fields in enumerate(rows):
        response, reference = (
            next((fields[name] for name in names if isinstance(fields.get(name), str)), None)
            for names in (("response", "pred", "completion"), ("reference", "gold", "answer"))
        )
        if response is None or reference is None:
            raise ValueError(f'{path}:{row + 1}: "response" and "reference" are needed, as text')
        start = time.perf_counter()
        result = explain(response, reference, bool(fields.get("require_value")))
        seconds, verdict = time.perf_counter() - start, result.why.split(":")[0]
        rules[result.rule], verdicts[verdict] = rules[result.rule] + 1, verdicts[verdict] + 1
        line = f"  {path}:{row + 1}: {str(result.answer)[:60]!a} for {reference[:60]!a} ({result.rule}; {result.why})"
        slowest = sorted([*slowest, (seconds, line)])[-shown:]
        examples.setdefault(verdict, []).append(line)
    for title, counts in (("found by", rules), ("verdicts", verdicts)):
        print(f"{title}: " + ", ".join(f"{name} {n} ({n / len(rows):.1%})" for name, n in counts.most_common()))
    print("slowest:", *(f"{line} {seconds * 1e3:.1f} ms" for seconds, line in slowest[::-1]), sep="\n")
    for verdict, lines in examples.items():
        print(f"{verdict}:", *lines[:: max(1, len(lines) // shown)][:shown], sep="\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:  # started by Verifier
        return serve_requests(int(argv[1]), float(argv[2]), int(argv[3]))
    parser = argparse.ArgumentParser(description="Check answers of models.")
    parser.add_argument("--audit", metavar="FILE", required=True, help="JSONL with response and reference in each line")
    audit(parser.parse_args(argv).audit)


if __name__ == "__main__":
    main()
