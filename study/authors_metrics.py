"""The authors' maj@k and best@k of the responses that eval.py wrote, below ours.

    python eval.py --model DIR --data problems.jsonl --out responses.jsonl
    python study/authors_metrics.py responses.jsonl

They are verl's: simulated, with k of n samples drawn with replacement, 1,000 times. So best@k is
smaller than the chance that k real samples hold a correct one, and maj@k is larger or smaller than
the vote of the n samples. docs/paper-and-code.md shows both beside ours.

Shapes: N problems, n samples of each.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import metrics_per_problem
from sampler import exit_with_error


def draw_samples(n, k, resamples, seed):
    """Indices (resamples,k) of samples; the same for every problem, as verl draws them."""
    # numpy's old generator: the very draws of verl's np.random.seed(42); np.random.choice(n, k)
    return np.random.RandomState(seed).randint(0, n, (resamples, k))


def bootstrap_best_at_k(correct, k, resamples=1000, seed=42):
    """The authors' best@k: (N,n) -> (N,). How often k drawn samples hold a correct one.

    Near 1 − (1 − c/n)^k for c correct of n, hence below eval.pass_at_k.
    """
    correct = np.asarray(correct, dtype=bool)
    draws = draw_samples(correct.shape[1], k, resamples, seed)
    return np.array([verdicts[draws].any(axis=1).mean() for verdicts in correct])


def bootstrap_maj_at_k(correct, classes, k, resamples=1000, seed=42):
    """The authors' maj@k: (N,n) bool, (N,n) int -> (N,). How often the vote of k samples is right.

    A tie goes to the class that was drawn first. "No answer" (-1) votes as an answer does, and may
    win. (Theirs votes over strings, where one value written in two ways is two candidates.)
    """
    correct = np.asarray(correct, dtype=bool)
    classes = np.asarray(classes)
    draws = draw_samples(correct.shape[1], k, resamples, seed)
    credit = np.zeros(len(correct))
    for i, (verdicts, labels) in enumerate(zip(correct, classes)):
        drawn = labels[draws]  # (resamples,k)
        votes = (drawn[:, :, None] == drawn[:, None, :]).sum(axis=2)  # for the class of each draw
        first = votes.argmax(axis=1)  # the first of those with the most votes
        winner = draws[np.arange(resamples), first]
        credit[i] = verdicts[winner].mean()
    return credit


def read_responses(path):
    """Verdicts (N,n) and classes (N,n) of a file that eval.py --out wrote."""
    correct = {}
    classes = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                correct.setdefault(line["row"], []).append(line["correct"])
                classes.setdefault(line["row"], []).append(line["class"])
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{path}:{number} is no line of eval.py --out ({reason})"
                ) from error
    sizes = {len(samples) for samples in correct.values()}
    if len(sizes) != 1:
        raise ValueError(f"{path}: problems with different numbers of responses, or none at all")
    if sizes == {1}:
        raise ValueError(f"{path} has one response per problem: there is no vote of one; use --k 8")
    return np.array(list(correct.values())), np.array(list(classes.values()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = partial(exit_with_error, "authors_metrics.py")
    parser.add_argument("responses", metavar="FILE", help="what eval.py --out wrote")
    args = parser.parse_args(argv)
    try:
        correct, classes = read_responses(args.responses)
    except (ValueError, OSError) as error:
        exit_with_error("authors_metrics.py", error)
    for name, values in metrics_per_problem(correct, classes).items():
        print(f"{name:<10}{values.mean():>8.1%}")
    n = correct.shape[1]
    sizes = {2**i for i in range(1, n.bit_length())} | {n}
    print(
        f"\nThe authors' bootstrap: k of {n} samples drawn with replacement, 1,000 times, seed 42"
    )
    for k in sorted(sizes):
        maj = bootstrap_maj_at_k(correct, classes, k).mean()
        best = bootstrap_best_at_k(correct, k).mean()
        print(f"bootstrap maj@{k:<4}{maj:>7.1%}    bootstrap best@{k:<4}{best:>7.1%}")


if __name__ == "__main__":
    main()
