"""Make one-step arithmetic word problems for a small pretrained model, as JSONL.

    python data/make_words.py     # writes words_train.jsonl and words_test.jsonl here

Each is a sum or a product of two numbers from 2 to 9, told as a story that ends with the operation
in words: hard enough for a model of 135 million parameters, which is right on one in eight within
40 tokens. Held-out problems share the stories' patterns and the pairs of numbers with the training
problems, but no problem text.
"""

from make_arithmetic import write

NAMES = [
    "Anna",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Hugo",
    "Iris",
    "Jonas",
    "Lena",
    "Maria",
    "Noah",
    "Sam",
    "Tara",
]
THINGS = [
    "apples",
    "marbles",
    "stickers",
    "books",
    "coins",
    "pencils",
    "cookies",
    "shells",
    "cards",
    "balloons",
]
STORIES = {
    "plus": [
        "{n} has {a} {t} and gets {b} more. What is {a} + {b}?",
        "There are {a} {t} in a box and {b} {t} on the table. What is {a} plus {b}?",
        "{n} found {a} {t} in the morning and {b} in the afternoon. What is {a} + {b}?",
        "{n} has {a} {t} and {m} has {b} {t}. What is {a} plus {b}?",
    ],
    "times": [
        "{n} has {a} bags with {b} {t} in each. What is {a} times {b}?",
        "There are {b} {t} in each of {a} boxes. What is {a} times {b}?",
        "{n} buys {b} {t} every day for {a} days. What is {a} times {b}?",
    ],
}


def problem(rng):
    operation = rng.choice(list(STORIES))
    a = rng.randint(2, 9)
    b = rng.randint(2, 9)
    n, m = rng.sample(NAMES, 2)
    text = rng.choice(STORIES[operation]).format(n=n, m=m, a=a, b=b, t=rng.choice(THINGS))
    answer = a + b if operation == "plus" else a * b
    return {"problem": text, "answer": str(answer), "operation": operation, "require_value": True}


def make_all(rng):
    seen = {}
    while len(seen) < 1100:
        row = problem(rng)
        seen.setdefault(row["problem"], row)
    rows = list(seen.values())
    return rows[100:], rows[:100]


if __name__ == "__main__":
    write("words", __doc__.splitlines()[0], make_all)
