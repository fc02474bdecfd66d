"""Make one-step arithmetic word problems for a small pretrained model, as JSONL (`problem`, `answer`, `operation`).

    python data/make_words.py                 # writes words_train.jsonl and words_test.jsonl beside this file

Each is one sum, difference or product of numbers from 2 to 10 told as a story of one or two
sentences. Held-out problems share the stories' patterns with the training problems but no problem text.
"""

import argparse
import json
import os
import random

NAMES = ["Anna", "Ben", "Chloe", "David", "Emma", "Hugo", "Iris", "Jonas", "Lena", "Maria", "Noah", "Sam", "Tara"]
THINGS = ["apples", "marbles", "stickers", "books", "coins", "pencils", "cookies", "shells", "cards", "balloons"]
STORIES = {
    "+": [
        "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
        "There are {a} {t} in a box. {n} puts in another {b}. How many {t} are in the box?",
        "{n} found {a} {t} in the morning and {b} {t} in the afternoon. How many {t} did {n} find in all?",
        "{n} has {a} {t} and {m} has {b} {t}. How many {t} do they have together?",
    ],
    "-": [
        "{n} has {a} {t} and gives {b} of them to {m}. How many {t} does {n} have left?",
        "There were {a} {t} on the table. {n} took {b} away. How many {t} are still on the table?",
        "{n} had {a} {t} but lost {b}. How many {t} remain?",
        "{n} has {a} {t} and {m} has {b} {t}. How many more {t} does {n} have than {m}?",
    ],
    "*": [
        "{n} has {a} bags with {b} {t} in each. How many {t} does {n} have?",
        "One box holds {b} {t}. How many {t} are in {a} boxes?",
        "{n} buys {b} {t} every day for {a} days. How many {t} is that?",
    ],
}


def problem(rng):
    operation = rng.choice("++--*")
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if operation == "-":
        a, b = max(a, b) + 1, min(a, b)
    n, m = rng.sample(NAMES, 2)
    text = rng.choice(STORIES[operation]).format(n=n, m=m, a=a, b=b, t=rng.choice(THINGS))
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return {"problem": text, "answer": str(answer), "operation": operation, "require_value": True}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, seen = random.Random(args.seed), {}
    while len(seen) < 1100:
        row = problem(rng)
        seen.setdefault(row["problem"], row)
    rows = list(seen.values())
    for name, part in (("test", rows[:100]), ("train", rows[100:])):
        path = os.path.join(args.out, f"words_{name}.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
        print(f"{path}: {len(part)} problems")


if __name__ == "__main__":
    main()
