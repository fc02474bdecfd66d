"""The checker beside math-verify on labelled pairs, one process, in turn: checks a second, worst
case, correct verdicts.

    pip install -r tests/requirements-bench.txt
    python tests/bench_reward.py ../shared/checker/dev.jsonl
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

import reward


def theirs(response: str, reference: str) -> bool:
    """As verl calls it: the reference boxed, both extractors for it, the default ones for the
    response."""
    configs = (LatexExtractionConfig(), ExprExtractionConfig())
    gold = parse(f"\\boxed{{{reference}}}", extraction_config=configs)
    return verify(gold, parse(response))


def ours(response: str, reference: str) -> bool:
    return reward.score(response, reference) > 0


def response_of(row: dict) -> str:
    """A bare answer is boxed, as a policy would write it."""
    return f"\\boxed{{{row['pred'].strip(' $')}}}" if row["form"] == "bare" else row["pred"]


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rates = {}
    for name, check in (("ours", ours), ("math-verify", theirs)):
        check(r"\boxed{\frac{1}{2}}", "1/2")
        seconds = []
        correct = 0
        for row in rows:
            response = response_of(row)
            start = time.perf_counter()
            verdict = check(response, row["gold"])
            seconds.append(time.perf_counter() - start)
            correct += verdict == row["expect"]
        rates[name] = len(seconds) / sum(seconds)
        print(
            f"{name:12} {rates[name]:7.0f} checks/s, "
            f"median {1e3 * statistics.median(seconds):.2f} ms, "
            f"worst {1e3 * max(seconds):.0f} ms, correct {correct / len(rows):.1%}"
        )
    print(f"{rates['ours'] / rates['math-verify']:.1f} times as fast")


if __name__ == "__main__":
    main()
