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
# No expression here repeats a repetition, and each stops at what begins it: a megabyte of "\(" or "$" stays linear.
BOX = re.compile(r"\\(?:(?:begin)?boxed|f(?:rame)?box)\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\.,]+))|\\.|[{}]", re.S)
INSIDE = r"(?:\\(?![()\[\]]).|[^$\\\n]|\n(?![ \t]*\n))+"  # of a formula: no other delimiter, no empty line
FORMULA = re.compile(  # a dollar that a space follows closes none: "it costs $5 and $6" has no formula
    rf"\\\$|\$\$({INSIDE})\$\$|\$(?!\s)({INSIDE})(?<!\s)\$|\$(?=\s)({INSIDE})\$|\\[(\[]({INSIDE})\\[)\]]", re.S
)
# What may stand between two boxes or formulas that are one answer: spaces, a comma, "and", "or", a short \text.
JOIN = re.compile(r"(?:[\s$,;&]|\\[,;:! ()\[\]]|\\q?quad|\\(?:text|mbox)\{[^{}]{0,40}\}|\band\b|\bor\b)*")
NUMBER = re.compile(
    r"(?<![A-Za-z\d._^)])-?(?<![A-Za-z\d._])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?|(?<!\d)\.\d+"
    r"|-?\\[dt]?frac\{\d+\}\{\d+\}"
)
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
LETTER = re.compile(
    r"\b(?i:it'?s|is|be|est|choose|option|choice|pick|select)\s?:?\s?[(*]{0,3}([A-J])(?![A-Za-z0-9'])"
    r"|\A\W{0,3}([A-J])(?=[.,:;)*]|\s*\Z|[^\x00-\x7f])"
)
CLAUSE_LETTER = re.compile(r"(?:^|(?<=[\s(]))([A-J])(?=$|[\s,.):])(?! [a-z])|^([B-J]) [a-z]{3}")
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</s>|<eos>|<end_of_turn>")


def after_thinking(text: str, in_thought: bool = False) -> str | None:
    """The reply after the last </think>; None while a thought is open, which the prompt may have opened."""
    closed = text.rfind("</think>")
    if text.rfind("<think>") > closed or (in_thought and closed < 0):
        return None
    return text[closed + len("</think>") :] if closed >= 0 else text


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every complete outermost box: 2 in "\boxed{\frac12}, \boxed 3, \boxed{4"."""
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
    return [(*found.span(), found[found.lastindex]) for found in FORMULA.finditer(text) if found.lastindex]


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


def from_letter(text: str) -> str | None:
    """A choice in prose, if no number follows: "It's not A, so I think it's B" -> "B", "B不是 A" -> "B"."""
    last = last_match(LETTER, text)
    return last[1] or last[2] if last and not re.search(r"[\d$]", text[last.end() :]) else None


def from_formula(text: str) -> str | None:
    """The last formula, if it is readable and no number follows one that is a mere symbol."""
    formulas = find_formulas(text)
    run = last_run(formulas, text)
    return run if readable(run) and (re.search(r"\d", run) or not NUMBER.search(text, formulas[-1][1])) else None


def last_group(pattern: re.Pattern, text: str) -> str | None:
    """What the pattern's group holds where it matches last."""
    found = last_match(pattern, text)
    return found[found.lastindex or 0].strip() if found else None


def clause(pattern: str):
    """A rule: what follows the last match of this pattern."""
    return partial(from_clause, re.compile(pattern, re.I))


def last(pattern: str):
    """A rule: the group of the last match of this pattern."""
    return partial(last_group, re.compile(pattern, re.S))


ANSWER = r"(?:answer|réponse|respuesta|resposta|risposta|antwort|ответ|答案|答え|答)"
IS = r"(?:\b(?:is|are|est|es|ist|è|é)\b|是|为|為|は)"
RULES = (  # in the order of trust: the first rule that finds something decides
    ("box", lambda text: last_run(find_boxes(text), text)),  # the last complete \boxed{…}: what prompts ask for
    ("tag", last(r"<answer>((?:(?!</?answer>).)+)</answer>")),  # <answer>…</answer>: the other format of prompts
    ("label", clause(rf"{ANSWER}\s?(?:\*\*|\}})?\s?[:：=]\s?(?:\*\*|\}})?")),  # Answer: … stands for nothing else
    ("final", clause(r"final (?:answer|result) (?:is|are|=)\s?:?")),  # said once, at the end
    ("hashes", last(r"####[\s:]*([^\n]+)")),  # GSM8K's own format
    ("phrase", clause(rf"(?:{ANSWER}|solution|result)[^\n.:：$]{{0,40}}?{IS}\s?:?")),  # may also be said of a part
    ("bold", from_bold),  # **…**: what the model itself stresses, if it can be read as an answer
    ("letter", from_letter),  # it's (B): only if no number follows
    ("formula", from_formula),  # the last $…$: usually the result; two points better than the last number
    ("number", partial(last_group, NUMBER)),  # the last number: a guess
)
FIND = dict(RULES)


def find_answer(text: str, in_thought: bool = False) -> tuple[str | None, str]:
    """(answer, name of the rule that found it). A whole sentence in a box is read by the other rules but the last."""
    reply = after_thinking(text, in_thought) if isinstance(text, str) else None
    reply = SPECIAL.sub("\n", reply[-MAX_RESPONSE:]) if reply else ""
    for name, rule in RULES:
        if answer := rule(reply):
            if name == "box" and parse(answer).value is None:  # perhaps a sentence
                answer = next(filter(None, (inner(answer) for _, inner in RULES[2:-1])), answer)
            return answer, name
    return None, "none"


def extract_answer(text: str, in_thought: bool = False) -> str | None:
    r"""The final answer of a response, or None; never the whole response: "so $x=\boxed{\frac12}$." -> "\frac12"."""
    return find_answer(text, in_thought)[0]


def reference_answer(text: str) -> str:
    r"""A reference may be bare, in dollars, boxed, or a whole solution that ends in #### or "the final answer is"."""
    return FIND["box"](text) or FIND["hashes"](text) or FIND["final"](text) or text.strip()


# -- normalise, tokens -------------------------------------------------------------------------------------------------
FUNCTIONS = {"ln": "log", "lg": "log", "abs": "Abs", "ceil": "ceiling",  # our name -> sympy's
             "arcsin": "asin", "arccos": "acos", "arctan": "atan", **{name: name for name in str.split(
             "sin cos tan cot sec csc sinh cosh tanh asin acos atan log exp sqrt floor binomial")}}  # fmt: skip
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo, "infinity": sympy.oo, "oo": sympy.oo}
GREEK = str.split("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
                  "chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega Pi")  # fmt: skip
KNOWN = {*FUNCTIONS, *CONSTANTS, *GREEK}
LETTERS = {  # α -> \\alpha
    unicodedata.lookup(f"GREEK {size} LETTER {name.upper().replace('LAMB', 'LAM')}"): f"\\{name} "
    for name in GREEK for size in ("SMALL" if name.islower() else "CAPITAL",)}  # fmt: skip
SIGNS = str.maketrans({
    **LETTERS, **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "≠": "!=", "≈": "~", '"': " ",
    **{sign: new for signs, new in (("−–—‐", "-"), ("×·⋅∙∗", "*"), ("÷∕⁄", "/"), ("≤⩽", "<="), ("≥⩾", ">="),
                                    ("€£¥₹", r"\$")) for sign in signs},
    "∞": " inf ", "π": " pi ", "√": r"\sqrt ", "∪": r"\cup ", "±": r"\pm ", "ℝ": r"\mathbb{R}", "º": "°", "¢": " cents",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "∅": r"\emptyset ", "∠": r"\angle ", "′": "'",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∖": r"\setminus ", "⟨": "(", "⟩": ")",
    "’": "'", "。": ".", "、": ",", "\u200b": "", "\ufeff": "",
})  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;:! ]\s?|\{,\}|,\\!\s?|[ \u00a0\u202f])\d{3})+(?!\d)")
EUROPEAN = re.compile(r"-?\d{1,3}(?:\.\d{3}){2,}|-?\d{1,3}(?:\.\d{3})+,\d+")
TEXT = re.compile(r"\\(?:text|mbox|hbox|mathrm|mathsf|mathbf|operatorname)(?:bf|it|rm|normal|tt)?\s*\{([^{}]*)\}")
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<!\\)\\\\(?=[A-Za-z])(?![\s\S]*\\end)", r"\\"),  # a doubled backslash, unless it ends a row
    (r"\\(?:left|right)\s*\.|\\[()\[\]](?!\d+(?:pt|em))|\\q?quad|\\pmod\s*\{[^{}]*\}", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\\mathbb\s*\{?\s*R\s*\}?|(?i:\ball real numbers\b)", "ℝ"),
    (r"(?<=\d)\s*[xX]\s*(?=10\s?\^)", "*"),  # 1.5 x 10^3
    (r"(?<=[)\]}])\s*U\s*(?=[(\[\\])", r"\\cup "),
    (r"(?<!\\)\bin\b(?=\s*[(\[{\\])", " ∈ "),
    (r"\blog(\d+)\(", r"log_{\1}("),
    (r"(?i:^\W{0,3}(?:option|choice)\s+)(?=\W?[A-J]\W?$)", ""),
    (r"\b(?:square|sq\.?) ([A-Za-z]+)", r"\1^2"),  # square feet
    (r"(?i:\b([ap])\.m\b\.?)", r"\1m"),  # 10:45 a.m.
    (r"(?<=[.\d])(\d)\1{1,30}\s?(?:\.\.\.|\\[cl]?dots)", r"\\overline{\1}"),  # 0.333...
    (r"%(?=pi\b|[ei]\b)", ""),  # the constants of Maxima
)]  # fmt: skip


def quote_words(match: re.Match) -> str:
    r"""\text{ square cm} -> "square" "cm"; a single letter (\text{C}) stays mathematics unless it is a unit."""
    return " " + re.sub(r"[A-Za-z]{2,}|[mgshL]|\ba(?= [a-z]{2})", r'"\g<0>"', match[1]) + " "


def normalise(text: str, thousands: bool = True) -> str:
    r"""Undo what does not change the mathematics: "$1,234.50$." -> "1234.50", "12\,345" -> "12345", "3½" -> "3 1/2"."""
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).replace(r"\$", ' "dollar" ').replace("$", " ")
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), TEXT.sub(quote_words, text))
    text = re.sub(r"(?<!\\)\\[,;:!\s]", " ", text).strip().rstrip("\\.,; \n\t")
    if thousands and not re.search(r"[(\[]|\\\{|\\lbrace", text):  # inside brackets a comma separates values
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text.replace(".", "").replace(",", ".") if EUROPEAN.fullmatch(text) else text


class Token(NamedTuple):
    """A piece of an answer."""
    kind: str  # number; name (a symbol, function or constant); text (a word); op; command (of LaTeX, unknown); end
    text: str  # an operator that is a LaTeX command keeps its backslash, so that no word can be one


TOKEN = re.compile(
    r"(?P<space>\s+|~(?=\\|\s))"
    r"|(?<![\^_])(?P<mixed>\d+(?:\s+\d+\s?/\s?\d+|\s*\\[dt]?frac\s?(?:\{\d+\}|\d)\s?(?:\{\d+\}|\d)))(?![\d.])"
    r"|(?P<number>\d*\.\d*\\(?:overline|bar|dot)\{\d+\}|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d]))?)"
    r'|\\(?P<bracket>(?:begin|end)\{[a-z]+\*?\})(?:\{[lcr| ]*\})?|\\(?P<command>[A-Za-z]+|.)|"(?P<text>[A-Za-z]+)"'
    r"|(?P<subscript>_\s*(?:[A-Za-z0-9]|\{[A-Za-z0-9,\s]+\}))|(?P<word>[A-Za-z]+)"
    r"|(?P<op>\*\*|<=|>=|<>|!=|==|=<|=>|[-+*/^_=<>!%|(){}\[\],;:&'°ℝ~∈])", re.S,
)  # fmt: skip
DROPPED = str.split("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits "
                    "nolimits mathbb mathbf boldsymbol bm vec mathit mathrm operatorname rm bf it space large Large")
SPELLINGS = {spelling: ours for spellings, ours in (  # of LaTeX commands and of signs
    (DROPPED, ""), (("dfrac", "tfrac", "cfrac"), "\\frac"), (("dbinom", "tbinom"), "\\binom"), (("div",), "/"),
    (("cdot", "times", "ast"), "*"), (("le", "leq", "leqslant", "=<"), "<="), (("ge", "geq", "geqslant", "=>"), ">="),
    (("lt",), "<"), (("gt",), ">"), (("ne", "neq", "<>"), "!="), (("lvert", "rvert", "vert", "mid"), "|"),
    (("approx", "simeq"), "~"), (("backslash",), "\\setminus"), (("{", "lbrace"), "\\{"), (("}", "rbrace"), "\\}"),
    (("langle",), "("), (("rangle",), ")"), (("degree",), "°"), (("in",), "∈"), (("land", "lor"), ","),
    (("varphi",), "phi"), (("varepsilon",), "epsilon"), (("infty",), "inf"), (("varnothing",), "\\emptyset"),
    (("colon",), ":"), (("prime",), "'"), (("**",), "^"), (("==",), "="), (("%",), "%"),
) for spelling in spellings}  # fmt: skip
LONG_NAMES = "|".join(sorted((name for name in KNOWN if len(name) > 1), key=len, reverse=True))
GLUED = re.compile(rf"({LONG_NAMES})([A-Za-z]{{1,2}})$")  # sinx, lnx, pir
DIGITS = {word: str(n) for n, word in enumerate(str.split("zero one two three four five six seven eight nine ten"))}
BRACKETS = {  # each with what may close it
    "(": (")", "]"), "[": (")", "]"), "{": ("}",), "\\{": ("\\}",), "\\lfloor": ("\\rfloor",), "\\lceil": ("\\rceil",),
    **{f"begin{{{name}}}": (f"end{{{name}}}",) for name in ("matrix", "pmatrix", "bmatrix", "array")}}  # fmt: skip
CLOSING = {*chain.from_iterable(BRACKETS.values())}
PREFIXES = {*BRACKETS, "\\frac", "\\binom", "\\sum", "\\prod", "\\emptyset"}  # operators that begin a value
OPERATORS = PREFIXES | CLOSING | {"\\cup", "\\setminus", "\\\\", "\\pm", "\\mp"}
UNITS = {alias: names.split()[0] for names in str.split((  # every spelling -> the first
    "cm centimeter centimetre;mm millimeter millimetre;km kilometer kilometre;m meter metre;ft foot feet;in inch inche;"
    "yd yard;mi mile;kg kilogram;g gram;mg milligram;lb pound;oz ounce;s sec second;min minute;h hr hour;day;week;"
    "month;mol;mi/h mph;/ per;year yr;L l liter litre;mL ml milliliter;dollar usd buck;cent;deg degree;rad radian;"
    "gallon;% percent pct percentage;am;pm"), ";") for alias in names.split()}  # fmt: skip
UNIT_SIGNS = {"^", "/", "*", "2", "3", "{", "}"}


def unit_name(word: str) -> str | None:
    """"Inches" -> "in"; None for a word that is no unit."""
    word = word if word in UNITS else word.lower()
    return UNITS.get(word) or UNITS.get(word.removesuffix("s")) or UNITS.get(word.removesuffix("es"))


class Unparsed(ValueError):
    """Not in our grammar, or beyond the limits: the answer stays text."""


def tokenise(text: str) -> list[Token]:
    r"""LaTeX and plain maths in one spelling: "\dfrac12\cdot xy" -> \frac 1 2 * x y."""
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match or len(tokens) > MAX_TOKENS:
            raise Unparsed("too long" if match else f"{text[position]!a} is not mathematics")
        position, kind, value = match.end(), match.lastgroup, match[match.lastgroup]
        before = tokens[-1] if tokens else Token("op", "")
        if kind == "word":
            tokens += split_word(value, before)
        elif kind == "text":
            kind = "number" if value in DIGITS else "name" if value in KNOWN else "text"
            tokens.append(Token(kind, DIGITS.get(value, value)))
        elif kind == "command":
            value = SPELLINGS.get(value, value if value in KNOWN else f"\\{value}")
            kind = "name" if value in KNOWN else "command" if value[:1] == "\\" and value not in OPERATORS else "op"
            tokens += [Token(kind, value)] if value else []
        elif kind == "number" and value.isdigit() and before.text == "\\frac":  # \frac12 is 1/2
            tokens += [Token(kind, digit) for digit in value]
        elif kind != "space":
            value = re.sub(r"[\s{}]", "", value) if kind == "subscript" else value
            value = SPELLINGS.get(value, value) if len(value) == 2 else value  # ** and such
            tokens.append(Token({"mixed": "number", "bracket": "op"}.get(kind, kind), value))
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


class Seq(NamedTuple):
    """A collection: (1,2), [0,1), {1,2}, "1, 2", a union, a matrix."""
    kind: str  # by its brackets "()" "[]" "(]" "[)"; "set"; "list" (bare); "union"; "matrix" (of its rows, or a vector)
    items: tuple


class Relation(NamedTuple):
    """A chain of values: x = 5, a = b = 3, 1 < x <= 2, x + y = 7."""
    sides: tuple  # values; a str for a side in words ("Area = 5")
    ops: tuple  # "=", "<", "<=", "!=", "∈"; a chain that begins with > is turned round


def is_kind(value, *kinds: str) -> bool:
    return isinstance(value, Seq) and value.kind in kinds


def is_rational(value) -> bool:
    return getattr(value.expr if isinstance(value, Leaf) else value, "is_Rational", False)


def bits(value: Rational) -> int:
    """The size of a fraction: 7/2 -> 3 + 2."""
    return value.p.bit_length() + value.q.bit_length()


def number(text: str, base: str = "") -> Rational:
    r"""1.50 -> 3/2, .5e3 -> 500, 0.1\overline{6} -> 1/6, 1\frac45 -> 9/5, 52 in base 8 -> 42."""
    if base:
        if base not in map(str, range(2, 11)) or not {*text} <= {*"0123456789"[: int(base)]}:
            raise Unparsed("not a number in that base")
        return Integer(int(text, int(base)))
    if mixed := re.fullmatch(r"(\d+)(?:\s+|\s*\\\w*?frac\D*)(\d+?)\D*?(\d+)\}?", text):
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


def fold(kind, neutral: int, *items):
    """An inert sum or product whose rational part is computed: 1 + x + 2 -> x + 3, 2 * x * 3 -> x * 6."""
    items = [part for item in items for part in (item.args if item.func is kind else [item])]
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
    name, rational = FUNCTIONS.get(name, name), all(value.is_Rational for value in values)
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


def scale(value, factor):
    """A number times a number; a vector, point or matrix entry by entry."""
    if is_kind(value, "matrix", "()"):
        return Seq(value.kind, tuple(scale(item, factor) for item in value.items))
    result = multiply(tree(value), tree(factor))
    return value._replace(expr=result) if isinstance(value, Leaf) else result


# -- the parser: several > relation > union > leaf cut or step along the top; expression reads by binding power --------
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
RELATIONS, SEPARATORS = {*TURNED, "=", "~", "!=", "∈"}, {",", ";", "and", "or"}
SIGNS_OF_TERMS = ("+", "-", "\\pm", "\\mp")
LEVELS = {**dict.fromkeys(SIGNS_OF_TERMS, 1), "*": 2, "/": 2, ":": 2, "^": 4, "!": 4, "°": 4}  # how tightly they bind
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
REAL_LINE = Seq("()", (Leaf(multiply(sympy.oo, Integer(-1))), Leaf(sympy.oo)))
NO_SOLUTION = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set"}


class Parser:
    """Recursive descent over the tokens of one answer: "x = 1, 2" -> Relation(x = 1), Leaf(2)."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at = [*tokens, *[Token("end", "")] * 3], 0  # three, for looking ahead
        self.partner = partners(tokens)
        self.depth = self.steps = 0
        self.sign = 1  # which of the two values of ± is being read
        self.unit, self.rounded = "", False  # of the leaf being read; whether it holds a decimal that is no integer
        self.bars = False  # whether | closes something
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
        return self.coming in texts and bool(self.next())

    def expect(self, *texts: str) -> None:
        for text in texts:
            if not self.accept(text):
                raise Unparsed(f"{text} expected, not {self.coming or 'the end'}")

    def answer(self):
        """All of the tokens: one value, or a bare list."""
        values = self.several()
        if self.kind != "end":
            raise Unparsed(f"unexpected {self.coming}")
        return values[0] if len(values) == 1 else Seq("list", tuple(values))

    def several(self, expand: bool = True) -> list:
        r"""Values separated by commas, semicolons, "and" or "or"; one with ± is read twice: 1 \pm 2, 5 -> 3, -1, 5. In
        (1 \pm 2)/3 it is the whole that has two values, so that brackets other than a set's do not expand it."""
        values, outer = [], self.sign
        while not values or self.accept(*SEPARATORS):
            while values and self.accept("and", "or"):  # 1, 2, and 3
                pass
            start = self.at
            for self.sign in (1, -1) if expand else (outer,):
                self.at = start
                values.append(self.relation())
                if all(token.text not in ("\\pm", "\\mp") for token in self.tokens[start : self.at]):
                    break
        self.sign = outer
        return values

    def relation(self):
        """A value, or a chain of them: "x = 5", "Area = 5", "3 > x > 1" as "1 < x < 3", "1/3 ~ 0.33" as 1/3."""
        sides, ops = [], []
        self.accept("=", "~")  # "≈ 3.14"
        while not sides or self.coming in RELATIONS:
            op = self.next().text if sides else ""
            side = self.words_ahead() or self.union()
            if op != "~" or name_of(sides[-1]):  # 1/3 ≈ 0.33 is 1/3; but x ≈ 11 is x = 11
                sides.append(side)
                ops += ["=" if op == "~" else op] if op else []
        if ops and ops[0][0] == ">":
            sides, ops = sides[::-1], [TURNED.get(op, op) for op in ops[::-1]]
        return Relation(tuple(sides), tuple(ops)) if ops else sides[0]

    def words_ahead(self) -> str:
        r"""Step over a side that only names something, before "=": Area, \angle ABC, f(x), P(X=2), S_{\triangle A}."""
        start = end = self.at
        while self.tokens[end].text not in RELATIONS | SEPARATORS | CLOSING | {""}:
            end = self.partner.get(end, end) + 1
        side = self.tokens[start:end]
        kinds = {token.kind for token in side}
        called = len(side) > 3 and side[0].kind == "name" and self.partner.get(start + 1) == end - 1
        words = kinds & {"text", "command"} and "number" not in kinds
        called = called and (side[0].text.isupper() or {token.kind for token in side[2:-1]} <= {"name", "number"})
        if self.tokens[end].text not in ("=", "~") or not (words or called):
            return ""
        self.at = end
        return "".join(token.text for token in side)

    def union(self):
        r"""(-\infty,1) \cup \{2\}; \mathbb{R} \setminus \{1\} as two intervals."""
        pieces = [self.leaf()]
        if pieces == [REAL_LINE] and self.accept("\\setminus"):
            return complement(self.leaf())
        while self.accept("\\cup"):
            pieces.append(self.leaf())
        points = (piece.items if is_kind(piece, "set") else [piece] for piece in pieces)
        return Seq("union", tuple(chain.from_iterable(points))) if len(pieces) > 1 else pieces[0]

    def leaf(self):
        """An expression with its unit or percent sign; or a bracketed value; or words (a str)."""
        outer = self.unit, self.rounded
        self.unit, self.rounded = "dollar" if self.accept("dollar") else "", False
        words, spoken_kinds = [], ("text",) if not self.unit else ()
        while self.kind in spoken_kinds and self.coming not in SEPARATORS:
            words.append(self.next().text.casefold())
            spoken_kinds = ("text", "name")
        value = spoken(words) if words and (words[-1] != "is" or self.kind == "end") else self.expression()
        if isinstance(value, sympy.Expr):
            if self.coming in SCALES:  # 2 million
                value = multiply(value, Integer(10) ** SCALES[self.next().text])
            self.unit_tail(bool(value.free_symbols))
            value = Leaf(value, self.rounded, self.unit)
        self.unit, self.rounded = outer
        return value

    def unit_tail(self, symbolic: bool) -> None:
        r"""What follows a number: 33 pct, 5 cm, 3 \text{m/s}^2, 64 ft^2; other words (42 apples) are dropped."""
        words, start = ["%"] if self.accept("%") else [], self.at
        while self.kind == "text" or (words and (self.kind == "name" or self.coming in UNIT_SIGNS)):
            if self.coming in ("and", "or") or (self.coming == "}" and "{" not in words):
                break
            words.append(self.next().text)
        units = [word if word in UNIT_SIGNS else unit_name(word) for word in words]
        if None not in units:
            self.unit = re.sub("[{}]", "", "".join(units)) or self.unit
        elif symbolic or any(token.kind == "name" for token in self.tokens[start : self.at]):
            raise Unparsed("words after a formula")

    def expression(self, level: int = 0):
        r"""A value and the operators behind it that bind more tightly than `level`: "2x^2 - y" is (2 (x^2)) - y. Every
        recursion of the parser passes here: this is where depth is bounded."""
        self.depth, self.steps = self.depth + 1, self.steps + 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("too deep")
        value = self.signed(max(level, 2)) if self.coming in SIGNS_OF_TERMS else self.read(*self.next())
        while True:
            times = self.kind in ("number", "name") or self.coming in PREFIXES or (self.coming == "|" and not self.bars)
            op = "*" if times else self.coming
            if LEVELS.get(op, 0) <= level:
                self.depth -= 1
                return value
            if times and self.kind == self.tokens[self.at - 1].kind == "number":
                raise Unparsed("two numbers side by side")
            value = self.combine(value, op)

    def signed(self, level: int):
        """A sign and what it stands before; of ± and ∓ the one that self.sign says."""
        minus = {"+": 1, "-": -1, "\\pm": self.sign, "\\mp": -self.sign}[self.next().text] < 0
        value = self.expression(level)
        return scale(value, Integer(-1)) if minus else value

    def combine(self, left, op: str):
        r"""`left` with the operator that comes and what follows it; a product may have no sign: 2x, 2(3), 2\frac12."""
        if op in SIGNS_OF_TERMS:
            return add(tree(left), tree(self.signed(1)))
        self.accept(op)
        if op == "!":
            self.steps += 50
            return apply("factorial", tree(left))
        if op == "°":
            self.unit = "deg"
            return left
        right = self.expression(3 if op == "^" else 2)  # powers are read from right to left
        if op == "*" and isinstance(right, Seq):  # 2 (1, 2) is (2, 4); but the point A(1, 2) is (1, 2)
            return right if tree(left).is_Symbol and left.name.isupper() else scale(right, left)
        if op == "*":
            return scale(left, right)
        return (power if op == "^" else divide)(tree(left), tree(right))

    def atom(self):
        """A value without operators: of a fraction, a root …"""
        return tree(self.expression(5))

    def read(self, kind: str, text: str):
        """What begins with this token."""
        if kind == "number":
            value = number(text, self.next().text[1:] if self.kind == "subscript" else "")
            self.rounded |= "." in text and "\\" not in text and not value.is_Integer
            return value
        if kind == "name":
            return self.function(text) if text in FUNCTIONS else self.symbol(text)
        if text in BRACKETS:
            return self.group(text)
        if text in ("\\frac", "\\binom"):
            top, bottom = self.atom(), self.atom()
            return divide(top, bottom) if text == "\\frac" else apply("binomial", top, bottom)
        if text == "|":
            outer, self.bars = self.bars, True
            value = apply("abs", tree(self.expression()))
            self.expect("|")
            self.bars = outer
            return value
        if text in ("\\emptyset", "ℝ"):
            return REAL_LINE if text == "ℝ" else Seq("set", ())
        if text in ("\\sum", "\\prod"):
            return self.series(add if text == "\\sum" else multiply)
        raise Unparsed(f"{text} is not a value")

    def symbol(self, name: str):
        """A constant; a variable with its subscript and primes; f(x), g'(2), h^2(x) of an unknown function, as text."""
        if name in self.bound or (name in CONSTANTS and self.kind != "subscript"):
            return self.bound.get(name, CONSTANTS.get(name))
        name += self.next().text if self.kind == "subscript" else ""
        while self.accept("'"):
            name += "'"
        behind = self.partner.get(self.at + 1, self.at + 1) + 1
        raised = self.coming == "^" and behind in self.partner  # f^2(x)
        if name[0] not in "fghFGH" or not (self.coming == "(" or raised):
            return Symbol(name)
        exponent = self.expression(5) if self.accept("^") else Integer(1)
        start, self.at = self.at, self.partner[self.at] + 1
        return power(Symbol(name + "".join(token.text for token in self.tokens[start : self.at])), exponent)

    def function(self, name: str):
        r"""\sin^2 x, \sin^{-1} x, \log_2 8, \sqrt[3]{2}, \sin 30^\circ; sin 2x cos x is sin(2x) cos(x)."""
        below, exponent, unit = Integer(10) if name == "lg" else None, None, self.unit
        if name == "log" and self.kind == "subscript":
            below = tree(Parser(tokenise(self.next().text[1:])).answer())  # log_2, log_{10}, log_a
        elif (name == "log" and self.accept("_")) or (name == "sqrt" and self.coming == "["):
            below = self.atom()
        if name != "sqrt" and self.accept("^"):
            exponent = tree(self.expression(3))
            if exponent == -1 and f"arc{name}" in FUNCTIONS:
                name, exponent = f"arc{name}", None
        if self.coming in ("(", "{") or name == "sqrt":
            value = self.expression(5)
            values = [tree(item) for item in (value.items if isinstance(value, Seq) else [value])]
        else:
            values = [tree(self.expression(2))]
            while (self.kind in ("number", "name") and self.coming not in FUNCTIONS) or self.coming in ("\\frac", "{"):
                values = [multiply(values[0], tree(self.expression(3)))]
        if self.unit == "deg" and unit != "deg":
            values, self.unit = [divide(multiply(value, sympy.pi), Integer(180)) for value in values], unit
        if name == "log" and len(values) == 2:
            below = values.pop()
        if name == "sqrt" and len(values) == 1:
            return root(values[0], below or Integer(2))
        result = apply(name, *values)
        result = divide(result, apply("log", below)) if below is not None else result
        return result if exponent is None else power(result, exponent)

    def group(self, opening: str):
        """What stands in brackets: one value, or several; {x | x > 0} is what stands after the bar."""
        stop = self.partner[self.at - 1]
        if opening.startswith("begin"):
            return self.matrix()
        if opening in ("\\lfloor", "\\lceil"):
            value = apply("floor" if opening == "\\lfloor" else "ceil", tree(self.expression()))
            self.expect(self.tokens[stop].text)
            return value
        a_set, outer, self.bars = opening == "\\{", self.bars, False
        if a_set:
            texts = [token.text for token in self.tokens[self.at : stop]]
            bar = next((place for place, text in enumerate(texts) if text in ("|", ":")), 0)
            self.at += bar + 1 if bar and not RELATIONS.isdisjoint(texts[bar:]) else 0
        items = self.several(a_set) if self.at < stop or not a_set else []
        self.expect(self.tokens[stop].text)
        self.bars = outer
        if a_set or (opening == "{" and len(items) > 1):
            relations = items and all(isinstance(item, Relation) for item in items)
            return Seq("list" if relations else "set", tuple(items))
        if len(items) > 1:
            return Seq(opening + self.tokens[stop].text, tuple(items))
        if not isinstance(items[0], Leaf):
            return items[0]
        if items[0].unit == "%":
            return divide(items[0].expr, Integer(100))
        self.unit, self.rounded = self.unit or items[0].unit, self.rounded or items[0].approximate
        return items[0].expr

    def matrix(self) -> Seq:
        r"""\begin{pmatrix}1&2\\3&4\end{pmatrix}: a matrix of its rows; one row or column: of its entries."""
        rows, stop = [[]], self.partner[self.at - 1]
        while self.at < stop:
            rows[-1].append(self.leaf())
            if self.accept("\\\\"):
                rows += [[]] if self.at < stop else []
            elif self.at < stop:
                self.expect("&")
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
        low = tree(self.expression())
        self.expect("}", "^")
        high = self.atom()
        if not (low.is_Integer and high.is_Integer and 0 <= high - low < MAX_STEPS):
            raise Unparsed("not a simple sum")
        start, values, outer = self.at, [], self.bound
        for k in range(int(low), int(high) + 1):
            self.at, self.bound = start, {**outer, variable: Integer(k)}
            values.append(tree(self.expression(1)))
        self.bound = outer
        return combine(*values)


def partners(tokens: list[Token]) -> dict[int, int]:
    """Where each bracket closes, by the place where it opens: "(1,2]" -> {0: 4}."""
    partner, opened = {}, []
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


def name_of(side) -> str:
    r"""The spelling of a side that only names something: x_1, AB, (x,y), \cos A, f^{-1}(x), words; else ""."""
    if isinstance(side, str):
        return side
    if is_kind(side, "()"):
        names = [*map(name_of, side.items)]
        return f"({','.join(names)})" if all(names) else ""
    expr = side.expr if isinstance(side, Leaf) and not side.unit else Integer(0)
    if expr.is_Mul and all(factor.is_Symbol for factor in expr.args):
        return "".join(factor.name for factor in expr.args)
    if expr.is_Function or (expr.is_Pow and expr.base.is_Symbol and "(" in expr.base.name):
        return str(expr) if all(argument.is_Symbol or argument == -1 for argument in expr.args) else ""
    return expr.name if expr.is_Symbol else ""


def spoken(words: list[str]):
    """Words without articles, or what they say a thing is: "The triangle is isosceles" -> "isosceles"."""
    words = [word for word in words if word not in ("a", "an", "the")]
    words = words[max((place for place, word in enumerate(words) if word == "is"), default=-1) + 1 :] or words
    text = " ".join(words)
    return Seq("set", ()) if text in NO_SOLUTION else text


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
GAMMAS = ("factorial", "binomial")
OF_REALS = ("Abs", "floor", "ceiling")


def point(name: str, k: int, real: bool):
    """A variable's k-th value: near the positive axis, where roots and logarithms behave; or real, of both signs."""
    noise = zlib.crc32(f"{name} {k}".encode("utf-8", "replace"))
    size, tilt = 0.3 + (noise & 0xFFFF) / 0x8000, 0.05 + (noise >> 16) / 0x50000
    below = k == 1 or (k > 1 and noise >> 20 & 1)
    return NUMBERS.mpf(-size if below else size) if real else NUMBERS.mpc(size, tilt)


def evaluate(expr, k: int, real: bool):
    """The value at the k-th point; ArithmeticError where there is none, or out of bounds."""
    if expr.is_Rational:
        return NUMBERS.mpf(expr.p) / expr.q
    if expr.is_Symbol:
        return point(expr.name, k, real)
    if not expr.args:
        return {sympy.pi: NUMBERS.pi, sympy.E: NUMBERS.e, sympy.I: NUMBERS.j}[expr] * NUMBERS.one
    name, values = expr.func.__name__, [evaluate(argument, k, real) for argument in expr.args]
    if name in ("Add", "Mul"):
        result = sum(values) if name == "Add" else math.prod(values)
    elif name == "Pow":
        base, exponent = values
        if base == 0:
            result = base if exponent.real > 0 else NUMBERS.nan
        elif expr.args[1].is_Integer and abs(exponent) <= 10_000:
            result = base ** int(exponent) if abs(exponent * NUMBERS.mag(base)) < 4 * MAX_MAGNITUDE else NUMBERS.inf
        else:
            logarithm = exponent * NUMBERS.ln(base)
            result = NUMBERS.exp(logarithm) if NUMBERS.mag(logarithm) <= 16 else NUMBERS.inf
    else:
        largest = 12 if name in GAMMAS else 16 if any(value.imag for value in values) else 1_000
        if max(map(NUMBERS.mag, values)) > largest:
            raise ArithmeticError("argument too large")
        if name in ("floor", "ceiling") and abs(values[0] - NUMBERS.nint(values[0])) < 2.0**-90:
            values = [NUMBERS.nint(values[0])]  # an integer but for rounding
        result = getattr(NUMBERS, {"Abs": "fabs", "ceiling": "ceil"}.get(name, name))(*values)
    if not NUMBERS.mag(result) <= MAX_MAGNITUDE:
        raise ArithmeticError("too large, or not a number")
    return result


@lru_cache(maxsize=512)
class Facts:
    """What chooses the points for a tree, and bounds the work on it."""

    def __init__(self, expr):
        nodes = list(sympy.preorder_traversal(expr))
        inner = [node for node in nodes if node.args and node.func not in (Add, Mul)]
        names = [node.func.__name__ for node in inner]
        roots = [node for node in inner if node.func is sympy.log or (node.is_Pow and not node.exp.is_Integer)]
        self.nodes, self.cost = len(nodes), sum(30 if name in GAMMAS else 1 for name in names)
        self.bits = max((bits(node) for node in nodes if node.is_Rational), default=0)
        self.real = not set(OF_REALS).isdisjoint(names)
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
    return (8 if real else 5) if x.free_symbols or y.free_symbols else 1, real, precision


def same_tree(x, y, approximate: bool = False) -> bool:
    """Two inert trees: by structure, as exact numbers, by their values at fixed points (most of them must exist)."""
    if x == y:
        return True
    if x.is_Rational and y.is_Rational:
        return approximate and bool(abs(x - y) * 10**6 <= max(abs(x), abs(y)))  # sympy's is no bool
    with LOCK:
        count, *how = sampling(x, y)
        verdicts = []
        while len(verdicts) < count and False not in verdicts:
            verdicts.append(equal_at(x, y, len(verdicts), *how, approximate))
    return False not in verdicts and 2 * verdicts.count(True) > count


def proportional(x, y, positive: bool) -> bool:
    """x = c y with a constant c that is not 0 (positive, for inequalities); or both vanish everywhere."""
    zeros = [same_tree(expr, Integer(0)) for expr in (x, y)]
    if any(zeros):
        return all(zeros)
    ratio = divide(x, y)
    with LOCK:
        _, real, precision = sampling(x, y)
        precision *= 2  # near a large constant C the ratio of different sides varies by 1/C²
        values = [value_at(ratio, k, real, precision) for k in range(4)]
        NUMBERS.prec = precision
        if None in values:
            return False
        first, limit = values[0], NUMBERS.ldexp(abs(values[0]), -precision // 2)
        if positive and not (first.real > 0 and abs(first.imag) <= limit):
            return False
        return all(abs(value - first) <= limit for value in values)


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
UNORDERED = ("set", "list", "union")
BASE_UNITS = {  # in what some units are compared with others, and what one of them is
    "%": ("", Rational(1, 100)), "deg": ("", divide(sympy.pi, Integer(180))), "cent": ("dollar", Rational(1, 100)),
    "mm": ("m", Rational(1, 1000)), "cm": ("m", Rational(1, 100)), "km": ("m", Integer(1000)),
    "g": ("kg", Rational(1, 1000)), "min": ("s", Integer(60)), "h": ("s", Integer(3600))}  # fmt: skip


def same(left, right) -> bool:
    """By the table above: relations by what they say, leaves by value, collections by their items."""
    left, right = single(left), single(right)
    if isinstance(left, Relation) and isinstance(right, Relation):
        return same_relation(left, right)
    left, right = (meaning(side) if isinstance(side, Relation) else side for side in (left, right))
    if isinstance(left, Leaf) and isinstance(right, Leaf):
        return same_leaf(left, right)
    if isinstance(left, Seq) and isinstance(right, Seq):
        return same_seq(left, right)
    return isinstance(left, str) and left == right


def single(value):
    """A collection of one value, repeated or not, is that value."""
    while is_kind(value, *UNORDERED) and value.items and all(same(value.items[0], other) for other in value.items[1:]):
        value = value.items[0]
    return value


def same_leaf(left: Leaf, right: Leaf) -> bool:
    """Numbers with or without units: 5 cm is 5 and not 5 m; 50% is 50 and 0.5; 50 cents is 50 and $0.50."""
    approximate, units = left.approximate or right.approximate, {left.unit, right.unit}
    if (len(units) == 1 or "" in units) and same_tree(left.expr, right.expr, approximate):
        return True
    (unit, one), (other_unit, other) = (BASE_UNITS.get(leaf.unit, (leaf.unit, Integer(1))) for leaf in (left, right))
    values = multiply(left.expr, one), multiply(right.expr, other)
    return len(units) == 2 and unit == other_unit and same_tree(*values, approximate)


def is_constant(value) -> bool:
    """2 + 3 or sqrt 2; not x, not f(2)."""
    return isinstance(value, Leaf) and not value.expr.free_symbols


def meaning(relation: Relation):
    """What a relation says of one thing. The value: x = 5, f(x) = 5, 2 + 3 = 5, Area = 5, x in {5} -> 5. Intervals, for
    inequalities in one variable with constant ends: 1 < x <= 2 -> (1,2]. None for a real equation."""
    sides, ops = relation
    names = [*map(name_of, sides)]
    if {*ops} <= {"=", "∈"}:
        if len(sides) == 2 and names[1] and is_constant(sides[0]):
            return sides[0]
        calculated = is_constant(sides[-1]) and (len(sides) > 2 or is_constant(sides[0]))
        return sides[-1] if names[0] or calculated else None
    if ops == ("!=",):
        ends = tuple(side for side, name in zip(sides, names) if not name)
        return complement(Seq("set", ends)) if len(ends) == 1 and is_rational(ends[0]) else None
    if len(sides) == 2:  # x < 2 is -oo < x < 2
        low, high = REAL_LINE.items
        sides, ops = ((low, *sides), ("<", *ops)) if names[0] else ((*sides, high), (*ops, "<"))
    if len(sides) > 3 or not {*ops} <= {"<", "<="} or not name_of(sides[1]) or not all(map(is_constant, sides[::2])):
        return None
    return Seq("[("[ops[0] == "<"] + "])"[ops[1] == "<"], sides[::2])


def same_relation(left: Relation, right: Relation) -> bool:
    """x = 5 and 5 = x; y = 2x + 1 and 2x - y + 1 = 0; x > 1 and -2 > -2x; not x = 5 and y = 5."""
    one, other = (next(filter(None, map(name_of, relation.sides)), "") for relation in (left, right))
    loose = any(isinstance(side, str) for side in left.sides + right.sides) or ("(" in one) != ("(" in other)
    if (loose or one == other) and None not in (values := [meaning(left), meaning(right)]) and same(*values):
        return True  # also Area = 5 and x = 5; f(x) = 2x and y = 2x
    if left.ops != right.ops or not all(isinstance(side, Leaf) for side in left.sides + right.sides):
        return False
    steps, others = ([add(x.expr, multiply(y.expr, Integer(-1))) for x, y in pairwise(relation.sides)]
                     for relation in (left, right))  # fmt: skip
    return all(proportional(x, y, "<" in op) for x, y, op in zip(steps, others, left.ops))


def same_seq(left: Seq, right: Seq) -> bool:
    """{1,2} and {2,1}; (1,2) and the bare 1,2; not (0,1) and [0,1]."""
    kinds = {left.kind, right.kind}
    if "union" in kinds or kinds <= {"set", "list"}:
        one, other = (seq.items if seq.kind in UNORDERED else [seq] for seq in (left, right))
        return all(any(same(a, b) for b in other) for a in one) and all(any(same(a, b) for a in one) for b in other)
    if len(left.items) != len(right.items) or "set" in kinds:
        return False
    if len(kinds) == 2 and kinds.isdisjoint(("list", "matrix")) and (len(left.items) == 2 or kinds != {"()", "[]"}):
        return False  # (0,1) and [0,1] are intervals
    return all(map(same, left.items, right.items))


OPTION = re.compile(r"\W{0,3}([A-J])\s{0,2}[).:]\s*(\S.*)", re.S)
CALCULATED = re.compile(r"[\d)}](?:[+-]|\*(?!10\^)|\()")  # a binary operator, or a product without a sign


def compare(answer: str, reference: str) -> bool:
    """Two answers as they stand: as text, then by value, then in another reading of either."""
    left, right = parse(answer), parse(reference)
    return (left.text == right.text or equal(left, right)
            or reread(left, right, reference) or reread(right, left, answer))  # fmt: skip


def reread(one: Parsed, other: Parsed, spelling: str) -> bool:
    """The other as an option "(C) 15", which is "C" and is "15"; or 1,234 as a list, beside a collection."""
    if option := OPTION.match(other.text):
        letter = re.fullmatch("[A-J]", one.text.strip("()"))
        return option[1] == letter[0] if letter else parse(option[2]).text == one.text
    listed = isinstance(one.value, Seq) and isinstance(other.value, Leaf) and "," in spelling
    return listed and equal(one, parse(spelling, thousands=False))


def equal(one: Parsed, other: Parsed) -> bool:
    """By value; False where one did not parse, or where a number grows too large on the way."""
    with contextlib.suppress(Unparsed):
        return None not in (one.value, other.value) and same(one.value, other.value)
    return False


def unfinished(answer: str) -> bool:
    """Whether there is something left to calculate: 3+2, 2(5), 10/2/1; not in -5, 10/2, 25^{1/2}, 3 × 10^5, 3+2 = 5."""
    text = parse(answer).text.rpartition("=")[2]
    return bool(CALCULATED.search(text)) or len(re.findall("[/:]|frac", text)) > 1


def is_equivalent(answer: str, reference: str, require_value: bool = False) -> bool:
    """Whether two answers are equal by the table above: "3+2" is "5". With `require_value`, where the reference is a
    rational number, an answer with something left to calculate is wrong: a sign, one fraction, mixed number, root,
    power or 3 × 10^5 is a value, 3+2 is not (a policy would answer "3+2=" with the question)."""
    if not isinstance(answer, str) or not isinstance(reference, str):
        return False
    answer, reference = reference_answer(answer), reference_answer(reference)
    if require_value and is_rational(parse(reference).value) and unfinished(answer):
        return False
    return bool(answer and reference) and compare(answer, reference)


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
    correct = answer is not None and is_equivalent(answer, reference, require_value)
    return Grade(answer, correct, reward=float(correct))


def score(response: str, reference: str, require_value: bool = False) -> float:
    """1.0 if the response is correct, else 0.0."""
    return float(grade(response, reference, require_value=require_value).correct)


class Explanation(NamedTuple):
    """What explain says of a response."""

    correct: bool
    answer: str | None
    rule: str  # the name in RULES of what found the answer, or "none"
    why: str  # right, wrong, no answer, not a value, unparsed answer: …


def explain(response: str, reference: str, require_value: bool = False) -> Explanation:
    r"""grade's verdict and its reason: "\boxed{5+}" for "5" -> "unparsed answer: ends too early"."""
    answer, correct, _ = grade(response, reference, require_value=require_value)
    rule = find_answer(response)[1]
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
MAX_REQUESTS = 20_000  # of one worker, against slow growth of its memory
START_SECONDS = 120.0
MAX_WARNINGS = 20  # of one Verifier, about exceptions in graders


class Group(NamedTuple):
    """What the grader said of the responses to one prompt, in their order."""

    answers: list[str | None]
    correct: list[bool]
    rewards: list[float]
    classes: list[int]  # -1: no answer; all correct responses share one class
    failed: list[str]  # "": graded; else what the grader died of: time, cpu, memory, crash, exception


class Job(NamedTuple):
    """The responses to one prompt, and what grade needs to know."""

    responses: list[str]
    reference: str
    problem: str
    require_value: bool
    in_thought: bool


class Reply(NamedTuple):
    """What came back from a worker."""

    value: object = None
    failed: str = ""  # as in Group
    error: str = ""  # of an exception: its type and message


def to_bytes(message) -> bytes:
    """JSON in which any str survives: a pair of lone surrogates must not become one character."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")


def from_bytes(message: bytes):
    return json.loads(message.decode("utf-8", "surrogatepass"))


def printable(text: str, limit: int = 200) -> str:
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


def load_grader(name: str):
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

    def __init__(self, verifier: "Verifier"):
        self.verifier = verifier
        self.process = None
        self.pipe = None
        self.requests = 0

    def start(self) -> None:
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

    def receive(self, timeout: float) -> Reply | None:
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

    def end(self) -> str:
        """Kill the process and return what it had died of."""
        if not self.process:
            return ""
        process = self.process
        self.process = None
        died_of = "time"
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it ends
            died_of = "cpu" if process.wait(0.1) == -signal.SIGXCPU else "crash"
        process.kill()
        process.wait()
        self.pipe.close()
        return died_of

    def grade_response(self, response: str, job: Job) -> tuple[Grade, str]:
        """(grade, what it failed of). A response that the grader failed on is wrong, reward 0."""
        options = {
            "problem": job.problem,
            "require_value": job.require_value,
            "in_thought": job.in_thought,
        }
        reply = self.call("grade", response, job.reference, **options)
        if not reply.failed:
            return Grade(*reply.value), ""
        self.verifier.count_failure(reply, response)
        answer = None
        if not self.verifier.reward:  # its answer may still be known, for its class
            answer = self.call("extract_answer", response, job.in_thought).value
        return Grade(answer, False, 0.0), reply.failed

    def grade_group(self, job: Job) -> Group:
        """Grade each distinct response once, then sort the wrong answers into classes."""
        results = {}
        for response in dict.fromkeys(job.responses):
            results[response] = self.grade_response(response, job)
        wrong = [grade.answer for grade, failed in results.values() if not (grade.correct or failed)]
        labels = self.label_answers([answer for answer in dict.fromkeys(wrong) if answer is not None])

        numbers: dict = {}  # of the classes, by first appearance
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

    def label_answers(self, answers: list[str]) -> dict:
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

    def __init__(self, workers=2, timeout=10.0, memory_mb=1024, reward: str | None = None):
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
        self.failures: Counter = Counter()  # by kind, see Group.failed
        self.warned: set[str] = set()
        self.jobs = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        if reward:  # loaded once to see that it can be
            worker = Worker(self)
            worker.start()
            worker.end()

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
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
        problems = [""] * count if problems is None else problems
        require_value = [False] * count if require_value is None else require_value
        in_thought = [False] * count if in_thought is None else in_thought
        columns = (responses, references, problems, require_value, in_thought)
        lengths = [len(column) for column in columns]
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
        futures = []
        for job in map(Job, *columns):
            futures.append(Future())
            self.jobs.put((futures[-1], job))
        return [future.result() for future in futures]

    def serve(self) -> None:
        """The life of a thread: jobs from the queue, for its own worker."""
        worker = Worker(self)
        while (entry := self.jobs.get()) is not None:
            future, job = entry
            try:
                future.set_result(worker.grade_group(job))
            except Exception as error:  # belongs to the caller of grade_groups()
                future.set_exception(error)
        worker.end()

    def count_failure(self, reply: Reply, text: str) -> None:
        """Count it; on stderr say each exception once, with the text that raised it."""
        self.failures[reply.failed] += 1
        if not reply.error or reply.error in self.warned or len(self.warned) >= MAX_WARNINGS:
            return
        self.warned.add(reply.error)
        line = f"WARNING grading raised {printable(reply.error)} on {printable(text)}"
        print(f"{line}: counted as wrong", file=sys.stderr, flush=True)


def limit_worker(parent: int, memory_mb: int) -> None:
    """A worker ends with its parent and cannot exceed its memory."""
    import resource  # not there on Windows, where Verifier says so by name

    for ignored in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and preemption are the trainer's to handle
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    if os.getppid() != parent:  # it ended before the death signal was set
        sys.exit()


def limit_cpu(seconds: float) -> None:
    """From now on, this process is ended after so many seconds of CPU."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def answer_request(functions: dict, request: list) -> Reply:
    """Run what was asked for. An exception is an answer, too: the worker stays."""
    name, arguments, options = request
    try:
        return Reply(functions[name](*arguments, **options))
    except MemoryError:
        return Reply(failed="memory")
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Reply(failed="exception", error=line[:200])


def serve_requests(pipe: int, parent: int, timeout: float, memory_mb: int, reward: str) -> None:
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
    is_equivalent("x/2 + 1/2", r"\frac{x+1}{2}")  # sympy loads lazily: not on the first answer's time
    reply = Reply("ready")
    with contextlib.suppress(OSError, EOFError):
        while True:
            connection.send_bytes(to_bytes(reply))
            request = from_bytes(connection.recv_bytes())
            limit_cpu(timeout)
            reply = answer_request(functions, request)


# -- audit -------------------------------------------------------------------------------------------------------------
def audit(path: str, shown: int = 5) -> None:
    """What the checker made of a JSONL of responses: found by which rule, parsed or not, the slowest, and examples."""
    results = []  # (seconds, rule, verdict, a line to show)
    with open(path, encoding="utf-8") as file:
        for row, fields in enumerate(map(json.loads, file), 1):
            response, reference = (
                next((fields[name] for name in names if isinstance(fields.get(name), str)), None)
                for names in (("response", "pred", "completion"), ("reference", "gold", "answer"))
            )
            if response is None or reference is None:
                raise ValueError(f'{path}:{row}: "response" and "reference" are needed, as text')
            start = time.perf_counter()
            _, answer, rule, why = explain(response, reference, bool(fields.get("require_value")))
            line = f"  {path}:{row}: {str(answer)[:60]!a} for {reference[:60]!a} ({rule}; {why})"
            results.append((time.perf_counter() - start, rule, why.split(":")[0], line))
    for title, column in (("found by", 1), ("verdicts", 2)):
        counts = Counter(result[column] for result in results)
        print(f"{title}: " + ", ".join(f"{name} {n} ({n / len(results):.1%})" for name, n in counts.most_common()))
    slowest = sorted(results, reverse=True)[:shown]
    print("slowest:", *(f"{line} {seconds * 1e3:.1f} ms" for seconds, *_, line in slowest), sep="\n")
    for verdict in counts:
        lines = [line for *_, found, line in results if found == verdict]
        print(f"{verdict}:", *lines[:: max(1, len(lines) // shown)][:shown], sep="\n")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:  # started by Worker.start
        pipe, parent, timeout, memory_mb, reward = argv[1:]
        serve_requests(int(pipe), int(parent), float(timeout), int(memory_mb), reward)
        return
    parser = argparse.ArgumentParser(description="Check answers of models.")
    parser.add_argument("--audit", metavar="FILE", required=True, help="JSONL with response and reference in each line")
    audit(parser.parse_args(argv).audit)


if __name__ == "__main__":
    main()
