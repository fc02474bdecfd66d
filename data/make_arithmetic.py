"""Make the built-in task: short arithmetic in five levels, as JSONL.

    python data/make_arithmetic.py   # writes arithmetic_train.jsonl and arithmetic_test.jsonl here

Level 1  one-digit sums and differences         7+8
Level 2  a two-digit and a one-digit number     27-9
Level 3  three terms                            7+8-4
Level 4  a product and two or three more terms  3*4+7-2+5
Level 5  two fractions of one denominator       5/9+1/9   (2/3, 6/9 and \\frac{2}{3} are correct)

All whole numbers on the way stay within 0 .. 39: few enough facts for a tiny model to learn in some
two minutes.

A problem is asked as an exercise ("Solve 7+8-4") or in a quiz ("Quiz: 7+8-4"). Every `solution` in
the training file is correct, in one of two styles: *worked*, a line for each operation and then the
boxed result, or *bare*, the boxed result alone. Exercises come with worked solutions. Half of the
quizzes come with a solution, nearly always a bare one, as in text found in the wild. So a tiny
model that is warmed up on them can work problems out, but in a quiz it gives an answer without
working, which it cannot find for the harder levels. Reinforcement learning has to discover that
showing the work pays there too. `require_value` asks for a value: `\\boxed{7+8}` is no answer to
7+8.
"""

import argparse
import json
import os
import random
from fractions import Fraction

# Question -> share of held-out expressions asked so, share of training problems with a solution,
# share of those solutions that are worked.
QUESTIONS = {"Quiz: {}": (1.0, 0.5, 0.05), "Solve {}": (0.4, 1.0, 0.97)}
TRAIN_EXPRESSIONS = {
    1: 100,
    2: 250,
    3: 1200,
    4: 1200,
    5: 250,
}  # there are 126 of level 1, 288 of level 5
TEST_EXPRESSIONS = {1: 12, 2: 16, 3: 44, 4: 52, 5: 16}
LARGEST = 39


def chain(terms):
    """[(sign, value, text), ...] -> the lines of a left-to-right sum, and its value.

    (None, None) if it leaves 0 .. LARGEST."""
    total = terms[0][1]
    lines = []
    for sign, value, _ in terms[1:]:
        result = total + value if sign == "+" else total - value
        if not 0 <= result <= LARGEST:
            return None, None
        lines.append(f"{total}{sign}{value}={result}")
        total = result
    return lines, total


def fraction_problem(rng):
    """A sum or difference of two fractions of one denominator -> (text, worked lines, value)."""
    d = rng.randint(2, 9)
    a = rng.randint(1, d - 1)
    b = rng.randint(1, d - 1)
    sign = "+" if a <= b else rng.choice("+-")
    total = a + b if sign == "+" else a - b
    value = Fraction(total, d)
    lines = [f"{a}/{d}{sign}{b}/{d}={total}/{d}"]
    if str(value) != f"{total}/{d}":
        lines.append(f"{total}/{d}={value}")
    return f"{a}/{d}{sign}{b}/{d}", lines, value


def problem(level, rng):
    """One problem of a level -> (text, worked lines, value)."""
    if level == 5:
        return fraction_problem(rng)
    while True:
        if level == 4:
            a = rng.randint(2, 6)
            b = rng.randint(2, 6)
            terms = [("+", a * b, f"{a}*{b}")]
            first = [f"{a}*{b}={a * b}"]
        else:
            one_digit = level == 1 or (level == 3 and rng.random() < 0.5)
            a = rng.randint(1, 9) if one_digit else rng.randint(10, LARGEST)
            terms = [("+", a, str(a))]
            first = []
        more_terms = {1: 1, 2: 1, 3: 2, 4: rng.randint(2, 3)}
        for _ in range(more_terms[level]):
            d = rng.randint(1, 9)
            terms.append((rng.choice("+-"), d, str(d)))
        lines, value = chain(terms)
        if lines is not None:
            text = "".join(sign + shown for sign, _, shown in terms)
            return text.removeprefix("+"), first + lines, value


def make(counts, rng, taken, held_out):
    """Problems of `counts[level]` distinct expressions of each level, none of them in `taken`.

    Adds the expressions to `taken`."""
    rows = []
    for level, count in counts.items():
        while count:
            text, lines, value = problem(level, rng)
            if text in taken:
                continue
            taken.add(text)
            count -= 1
            for question, (asked, shown, worked) in QUESTIONS.items():
                row = {
                    "problem": question.format(text),
                    "answer": str(value),
                    "level": level,
                    "require_value": True,
                }
                if held_out and rng.random() >= asked:
                    continue
                if not held_out and rng.random() < shown:
                    steps = lines if rng.random() < worked else []
                    row["solution"] = "\n".join([*steps, f"\\boxed{{{value}}}"])
                rows.append(row)
    rng.shuffle(rows)
    return rows


def write(task, description, make_all):
    """The command of a script of this folder: writes TASK_train.jsonl and TASK_test.jsonl.

    make_all(random generator) -> (training rows, held-out rows)."""
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", default=here, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, rows in zip(("train", "test"), make_all(random.Random(args.seed))):
        path = os.path.join(args.out, f"{task}_{name}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{path}: {len(rows)} problems")


def make_all(rng):
    taken = set()
    test = make(TEST_EXPRESSIONS, rng, taken, held_out=True)
    return make(TRAIN_EXPRESSIONS, rng, taken, held_out=False), test


if __name__ == "__main__":
    write("arithmetic", __doc__.splitlines()[0], make_all)
