"""The table of what counts as equal (reward.EQUALITY): its examples hold, and docs/checker.md is
made from it.

    python tests/test_reward_rules.py    # writes docs/checker.md

Guards against: a rule that is told and not kept; a page that tells another story than the code.
"""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reward

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checker.md"
INTRODUCTION = r"""# What counts as equal

<!-- Made from reward.EQUALITY and reward.RULES by `python tests/test_reward_rules.py`. -->

`reward.grade` finds the final answer of a response, reads it and the reference with a small parser
of LaTeX and plain maths, and compares the two values. It evaluates nothing that a model wrote.

    python reward.py --explain RESPONSE REFERENCE

prints the answer found, the rule that found it, how both sides were read, and why they are equal
or not.

## Where the answer is found

The first of these rules that finds something decides; the text after the last `</think>` is
searched. An open thought has no answer.

"""
FINDING = {
    "box": r"the last complete `\boxed{…}`, and boxes that only a comma, “and” or (b) joins to it",
    "tag": "`<answer>…</answer>`",
    "label": "what follows `Answer:`",
    "final": "what follows “final answer is”",
    "hashes": "what follows `####`",
    "phrase": "what follows “the answer is”",
    "bold": "the last bold piece that can be read as mathematics",
    "letter": "a choice in prose: “so it is (B)”",
    "formula": "the last formula that can be read",
    "number": "the last number, unless it is negated",
}
VALUES = r"""
## Values

Where a problem asks for a value (`require_value`) and its reference is a rational number, the
answer must be one, too: a sign; an integer, a decimal, one fraction or mixed number, a number times
a power of ten, or a power that has no shorter form; a unit. So `3+2`, `5!`, `52_8`, `\sqrt{25}` and
`\sum_{k=2}^{3} k` are not answers to a question whose answer is 5, 120 or 42.

## Kinds of answers

"""


def rules() -> list[tuple[str, str, list[list[str]]]]:
    """(kind, rule, examples) of each entry; an example is [answer, "==" or "!=", answer, …]."""
    found = []
    for line in reward.EQUALITY.strip().splitlines():
        if not line.startswith(" "):
            kind, _, rule = line.partition(": ")
            found.append((kind, rule, []))
            continue
        for example in re.split(r"\s{4,}", line.strip()):
            found[-1][2].append(re.split(r" (==|!=) ", example))
    return found


def pairs() -> list[tuple[str, str, bool]]:
    found = []
    for _, _, examples in rules():
        for example in examples:
            for left, sign, right in zip(example[::2], example[1::2], example[2::2]):
                found.append((left, right, sign == "=="))
    return found


@pytest.mark.parametrize("left, right, equal", pairs())
def test_examples_hold(left, right, equal):
    assert reward.is_equivalent(left, right) == equal
    assert reward.is_equivalent(right, left) == equal
    assert reward.score(rf"so $\boxed{{{left}}}$.", right) == equal


def test_every_kind_has_examples_of_both():
    lone = [
        kind
        for kind, _, examples in rules()
        if len({sign for e in examples for sign in e[1::2]}) < 2
    ]
    assert len(rules()) > 15 and len(lone) <= 3, lone


def code(answer: str) -> str:
    fence = "``" if "`" in answer else "`"
    return fence + answer.replace("|", r"\|") + fence


def page() -> str:
    lines = [INTRODUCTION.rstrip(), ""]
    assert list(FINDING) == list(reward.RULES)
    for name, words in FINDING.items():
        lines.append(f"1. `{name}`: {words}")
    lines += [VALUES.rstrip(), "", "| kind | equal when | equal | not equal |", "|---|---|---|---|"]
    for kind, rule, examples in rules():
        equal = [e for e in examples if set(e[1::2]) == {"=="}]
        unequal = [e for e in examples if e not in equal]
        shown = []
        for some, sign in ((equal, " = "), (unequal, " ≠ ")):
            shown.append("<br>".join(sign.join(map(code, e[::2])) for e in some))
        lines.append(f"| {kind} | {rule.replace('|', chr(92) + '|')} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines) + "\n"


def test_the_page_is_made_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/test_reward_rules.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
