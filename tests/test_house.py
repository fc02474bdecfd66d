"""The rules of the house that a reader relies on, read from the syntax of the files.

Bugs these tests guard against: one name for two things, a file that imports what it should not
know, a line or a function that has grown too long to read, a benchmark that its own installation
command does not prepare, a renamed argument that other people's scripts pass by name.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
SIX = ("copo.py", "reward.py", "model.py", "sampler.py", "eval.py", "train.py")
FOLDERS = (".", "data", "study", "tests")
PYTHON = sorted(path for folder in FOLDERS for path in (HERE / folder).glob("*.py"))
OURS = {path.stem for path in PYTHON}
PROGRAM = [path for path in PYTHON if path.parent.name != "tests"]
# Which of our files each of the six imports.
IMPORTS = {
    "copo.py": set(),
    "reward.py": set(),
    "model.py": set(),
    "sampler.py": {"model"},
    "eval.py": {"sampler", "reward"},
    "train.py": {"copo", "reward", "model", "sampler", "eval"},
}
LONGEST_FUNCTION = 60
LONGEST_LINE = 100
# What notebooks and scripts of others call: these arguments in this order. More may follow them.
PUBLIC = """
copo consistency_entropy(classes)
copo local_advantages(rewards, kind='group', scale=True)
copo global_rewards(correct, entropy, consistency_coef=False)
copo global_advantages(global_rewards, scale=True)
copo local_weight(entropy, correct, local_adv, blend, gamma, rho)
copo clipped_loss(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip)
copo aggregate(token_loss, mask, mode, max_tokens=None, num_tokens=None, num_sequences=None)
copo compute_advantages(rewards, correct, classes, lengths, algorithm, max_new_tokens)
copo copo_loss(logprobs, old_logprobs, mask, advantages, algorithm)
reward grade(response, reference, *, problem='', require_value=False, in_thought=False)
reward score(response, reference)
reward extract_answer(text)
reward is_equivalent(answer, reference)
reward answer_classes(answers)
reward load_problems(path)
model token_logprobs(hidden, weight, targets, temperature=1.0)
model from_config(cls, config, dtype=torch.float32, device='cpu', seed=0)
model from_pretrained(cls, path_or_id, dtype=torch.float32, device='cpu')
model save_pretrained(self, path)
model response_logprobs(self, ids, prompt_lengths, response_lengths, temperature=1.0)
model logits(self, hidden)
sampler generate(model, prompts, group_size, max_new_tokens, temperature=1.0, top_p=1.0, \
top_k=0, stop_ids=(), seed=0, step=0, rows=None, max_rows=0)
"""
# This file names the comment without containing it.
SKIP = "# fmt: " + "skip"


def syntax(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree):
    """Every function of a syntax tree, methods and nested ones included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imported(tree):
    """First parts of the names of all imported modules, imports within functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def pins(*paths):
    """{package: version} of requirements files; every line must pin one exact version."""
    found = {}
    for path in paths:
        for line in (HERE / path).read_text().splitlines():
            match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert match, f"{path}: {line!r} pins no exact version"
            name, version = match.groups()
            assert found.setdefault(name, version) == version, f"{path}: {name} is pinned twice"
    return found


def test_a_function_name_stands_in_one_of_the_six_files():
    """A reader who searches for a name finds one definition; `main` is the entry of each file."""
    places = defaultdict(set)
    for name in SIX:
        for node in syntax(HERE / name).body:
            if isinstance(node, ast.FunctionDef):
                places[node.name].add(name)
    assert len(places) > 100
    shared = {function: files for function, files in places.items() if len(files) > 1}
    shared.pop("main", None)
    assert not shared


@pytest.mark.parametrize("line", PUBLIC.strip().splitlines())
def test_public_signatures_stay(line):
    file, signature = line.split(" ", 1)
    name, promised = signature.rstrip(")").split("(", 1)
    found = [f for f in functions(syntax(HERE / f"{file}.py")) if f.name == name]
    assert len(found) == 1
    for node in ast.walk(found[0].args):
        if isinstance(node, ast.arg):
            node.annotation = None
    arguments = ast.unparse(found[0].args) + ", "
    assert arguments.startswith(promised + ", "), arguments


@pytest.mark.parametrize("name", SIX)
def test_imports_of_our_files(name):
    """The mathematics, the checker and the model can each be read, and used, alone."""
    assert imported(syntax(HERE / name)) & OURS == IMPORTS[name]


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.name)
def test_functions_fit_a_screen(path):
    for function in functions(syntax(path)):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= LONGEST_FUNCTION or function.name == "build_parser", function.name


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_lines_are_narrow_and_the_formatter_is_never_switched_off(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        # Like ruff's rule, this lets a regular expression without a blank be as long as it is.
        narrow = len(line) <= LONGEST_LINE or len(line.split()) == 1
        assert narrow, f"line {number} has {len(line)} columns"
        assert SKIP not in line, f"line {number} switches the formatter off"


def test_benchmarks_import_what_their_requirements_install():
    """Both requirements files together prepare every benchmark, as their first lines say."""
    installed = set(pins("requirements.txt", "tests/requirements-bench.txt"))
    benchmarks = sorted((HERE / "tests").glob("bench_*.py"))
    assert len(benchmarks) > 3
    peers = set()
    for path in benchmarks:
        modules = imported(syntax(path)) - OURS - sys.stdlib_module_names
        packages = {module.replace("_", "-") for module in modules}
        assert packages <= installed, f"{path.name} imports {sorted(packages - installed)}"
        peers |= packages
    assert {"trl", "math-verify", "transformers"} <= peers


def test_the_suite_and_the_benchmarks_pin_the_same_versions():
    pins("requirements.txt", "tests/requirements.txt", "tests/requirements-bench.txt")
