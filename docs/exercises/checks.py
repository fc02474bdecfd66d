"""Run the checks of an exercise on a student's file: what grade.py starts in a process of its own.

The checks stand in checks.toml: expressions, their values, and sentences. So nothing here solves an
exercise; only the values of exercise 10 are those of sampler.py.

    python docs/exercises/checks.py REPORT FOLDER NUMBER SECONDS    writes REPORT, a JSON list
"""

import importlib.util
import json
import math
import os
import signal
import sys
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import weak_checkers
from blank import EXERCISES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import reward

LONGEST = 200  # characters of a value or an exception that the student gets to read
# A model of two layers for exercise 10; float64, so that every machine draws the same tokens.
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 23,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
}


class Check(NamedTuple):
    """A table of checks.toml, which says what the fields mean."""

    call: str
    why: str
    expected: object = None
    expected_from: str = ""
    mistakes: tuple = ()
    tolerance: float = 1e-5


def read_checks(number):
    """The checks of an exercise and the names that their expressions use, the student's apart."""
    tables = tomllib.loads(Path(__file__).with_name("checks.toml").read_text(encoding="utf-8"))
    names = {name: getattr(torch, name) for name in ("tensor", "zeros", "ones", "eye", "float64")}
    names |= {"array": np.array, "nan": math.nan, "raised": raised}
    if number == 10:
        names |= sampler_names()
    if number == 11:
        names |= judge_names()
    checks = []
    for table in tables[str(number)]:
        check = Check(**table)
        if check.expected_from:
            check = check._replace(expected=eval(check.expected_from, names))
        checks.append(check)
    return checks, names


def raised(call):
    """Whether a call raises ValueError, in words; what else it raises goes on to the student."""
    try:
        call()
    except ValueError:
        return "ValueError"
    return "nothing"


def sampler_names():
    import sampler
    from model import Transformer

    def generate(*arguments, **options):
        """Tokens and log-probs of sampler.generate, as two lists of lists."""
        samples = sampler.generate(*arguments, **options)
        tokens = []
        logprobs = []
        for row, length in enumerate(samples.lengths.tolist()):
            tokens.append(samples.tokens[row, :length].tolist())
            logprobs.append(samples.logprobs[row, :length].tolist())
        return tokens, logprobs

    model = Transformer.from_config(MODEL, dtype=torch.float64, device="cpu", seed=0)
    return {"model": model, "generate": generate}


def judge_names():
    names = {name: getattr(weak_checkers, name) for name in weak_checkers.CHECKERS}
    return {"judge": judge, **names}


def judge(checker, pair):
    """What a weak checker and reward.grade say of (response, reference), in words."""
    response, reference = pair
    if not reward.grade(f"\\boxed{{{reference}}}", reference).correct:
        return f"reward.grade refuses \\boxed{{{reference}}}"
    weak = "accepts" if checker(response, reference) else "refuses"
    strong = "accepts" if reward.grade(response, reference).correct else "refuses"
    return f"{checker.__name__} {weak}, reward.grade {strong}"


def plain(value):
    """Tensors, arrays and tuples as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def agrees(got, expected, tolerance):
    """Whether two plain values are the same, numbers within the tolerance; NaN is NaN."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        return all(agrees(one, other, tolerance) for one, other in zip(got, expected))
    if isinstance(expected, str) or not isinstance(got, int | float):
        return got == expected
    if math.isnan(expected) or math.isinf(expected):
        return str(float(got)) == str(float(expected))
    return abs(got - expected) <= tolerance * max(1, abs(expected))


def shorten(text):
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def show(value):
    """A plain value as text, numbers to six digits; shortened, and so never long to make."""
    if not isinstance(value, list):
        return shorten(f"{value:.6g}" if isinstance(value, float) else str(value))
    text = ""
    for item in value:
        text += ", " + show(item)
        if len(text) > LONGEST + 2:
            break
    return shorten(f"[{text[2:]}]")


def describe(error, folder):
    """An exception in one line, with the last line of the student's files that it passed."""
    text = shorten(" ".join(f"{type(error).__name__}: {error}".split()))
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).parent == folder:
            place = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return text + place


def load_module(path):
    """Run a student's file as a module, under a name that hides none of ours."""
    name = f"student_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_check(check, names, folder):
    """Run one check -> the fields of its line in the report that depend on the student."""
    why = check.why
    try:
        got = plain(eval(check.call, names))
        for value, sentence in check.mistakes:
            if agrees(got, value, 1e-4):
                why = sentence
        passed = agrees(got, check.expected, check.tolerance)
        return {"passed": passed, "got": show(got), "why": why}
    except Exception as error:  # of the student's code, or of a value such as 10**400
        return {"passed": False, "got": describe(error, folder), "why": check.why}


def run_checks(number, folder, save=lambda report: None, time_limit=0):
    """Run the checks of an exercise on the files in a folder -> report, a line (dict) a check.

    save(report) is called before the student's code first runs and after each check; what has not
    run has no "got". After time_limit seconds of that code the process ends (0 = disabled).
    """
    checks, names = read_checks(number)
    report = []
    for check in checks:
        expected = show(check.expected)
        line = {"input": check.call, "expected": expected, "why": check.why, "passed": False}
        report.append(line)
    save(report)
    signal.alarm(time_limit)  # nothing handles the signal, so it ends whatever is running
    try:
        module = load_module(folder / EXERCISES[number].file)
    except Exception as error:
        for line in report:
            line["got"] = describe(error, folder)
        save(report)
        return report
    for check, line in zip(checks, report):
        line.update(run_check(check, {**vars(module), **names}, folder))
        save(report)
    return report


def main():
    report_path, folder, number, seconds = sys.argv[1:]
    folder = Path(folder).resolve()
    sys.path.append(str(folder))  # behind the repository: sampler.py must get its own model.py

    def save(report):  # whole or not at all: the process may be killed at any time
        partial = Path(f"{report_path}.partial")
        partial.write_text(json.dumps(report))
        os.replace(partial, report_path)

    run_checks(int(number), folder, save, int(seconds))


if __name__ == "__main__":
    main()
