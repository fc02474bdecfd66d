"""docs/exercises: what blank.py takes out, and the grader graded.

Each mutant of exercise_mutants.toml is a bug seen in public code, a replacement of text in the
sources. It must cost its own exercise a point, with the sentence that names it.

Bugs these tests guard against: a grader that accepts a misconception; a misconception that gets
another one's sentence; a solution left in a student's file; a student's endless loop, crash or odd
answer that takes the grader along; a traceback for Ctrl-C; a source that has moved on, so that a
mutant tests nothing.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "exercises"))
import blank
import checks
import grade

ROOT = blank.ROOT
NUMBERS = list(blank.EXERCISES)
MUTANTS = tomllib.loads(Path(__file__).with_name("exercise_mutants.toml").read_text())["mutants"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A folder with the repository's own files, which solve every exercise."""
    folder = tmp_path_factory.mktemp("solved")
    for exercise in blank.EXERCISES.values():
        shutil.copy(ROOT / exercise.source, folder / exercise.file)
    return folder


@pytest.fixture(scope="module")
def blanked(tmp_path_factory):
    """A folder as a student gets it."""
    folder = tmp_path_factory.mktemp("blanked") / "mine"
    blank.main([str(folder)])
    return folder


def functions_of(text):
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def run_script(script, *arguments):
    command = [sys.executable, ROOT / "docs" / "exercises" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


# ------------------------------------------------------------------------------------- the grader


@pytest.mark.parametrize("number", NUMBERS)
def test_the_repository_has_full_marks(number, solved):
    for line in checks.run_checks(number, solved):
        assert line["passed"], line


@pytest.mark.parametrize("number", NUMBERS)
def test_blanked_files_score_nothing_and_are_told_what_to_write(number, blanked):
    for line in checks.run_checks(number, blanked):
        assert not line["passed"]
        assert f"exercise {number}: " in line["got"]
        assert "is still to be written" in line["got"]


def replace_once(text, names, old, new):
    """Replace the only occurrence of `old` in these functions of the text."""
    holders = []
    for name, node in functions_of(text).items():
        if name in names and old in ast.get_source_segment(text, node):
            holders.append(ast.get_source_segment(text, node))
    assert len(holders) == 1, f"{old!r} is in {len(holders)} functions of {', '.join(names)}"
    assert holders[0].count(old) == 1
    return text.replace(holders[0], holders[0].replace(old, new))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["replace"][0][1].strip())
def test_a_mutant_costs_its_exercise_a_point(mutant, tmp_path):
    number = mutant["exercise"]
    exercise = blank.EXERCISES[number]
    text = (ROOT / exercise.source).read_text()
    for old, new in mutant["replace"]:
        text = replace_once(text, exercise.functions, old, new)
    (tmp_path / exercise.file).write_text(text)
    report = checks.run_checks(number, tmp_path)
    failed = [line for line in report if not line["passed"]]
    assert failed, "the grader takes it for right"
    assert mutant["says"] in failed[0]["why"]  # the one that the student sees
    assert failed[0]["got"] != failed[0]["expected"]
    assert not re.match(r"\w+Error", failed[0]["got"])  # it runs, and computes something else


def test_every_exercise_has_a_mutant_and_every_known_mistake_is_wrong():
    assert {mutant["exercise"] for mutant in MUTANTS} == set(NUMBERS)
    for number in NUMBERS:
        for check in checks.read_checks(number)[0]:
            for value, _ in check.mistakes:
                assert not checks.agrees(value, check.expected, 2e-4), check


def test_the_stop_token_of_exercise_10_is_sampled():
    """The check of stop_ids compares with a response that the stop token cuts short."""
    lengths = []
    for check in checks.read_checks(10)[0]:
        if "stop_ids" in check.call:
            lengths.append(len(check.expected[0]))
    assert lengths == [4]


def test_numbers_agree_within_the_tolerance_only():
    assert checks.agrees([1.0, 2], [1.0 + 1e-9, 2], 1e-5)
    assert not checks.agrees([1.0], [1.0, 2.0], 1e-5)
    assert not checks.agrees(1.0, [1.0], 1e-5)
    assert not checks.agrees(float("nan"), 0.0, 1e-5)
    assert not checks.agrees(None, 0.0, 1e-5)
    assert checks.agrees(float("nan"), float("nan"), 0.0)
    assert not checks.agrees(1e-17, 0.0, 0.0)


# ------------------------------------------------------------------- a student's code is contained


LOOP = """
def response_lengths(tokens, stop_ids):
    return tokens.new_tensor([3])

def response_mask(lengths, width):
    while True:
        pass
"""
FAILURES = {
    "a loop": (LOOP, "nothing within 2 s: an endless loop?", 2),
    "a loop at import": ("while True: pass", "nothing within 2 s: an endless loop?", 0),
    "a crash": ("import os\nos.kill(os.getpid(), 11)", "the process ended with exit code -11", 0),
    "an exit": ("raise SystemExit(0)", "the process ended with exit code 0", 0),
    "a syntax error": ("def broken(:", "SyntaxError", 0),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_bad_file_costs_its_exercise_only(kind, tmp_path):
    text, said, points = FAILURES[kind]
    (tmp_path / "lengths.py").write_text(text)
    report = grade.run_exercise(6, tmp_path, time_limit=2)
    passed = [line for line in report if line["passed"]]
    assert len(report) == 4
    assert len(passed) == points
    assert said in report[-1]["got"]
    assert not report[-1]["passed"]


ODD_ANSWERS = {
    "a lone surrogate": ("'abc\\ud83d'", "abc\\ud83d"),
    "a long tensor": ("tokens.new_zeros(3_000_000)", "[" + "0, " * 66 + "0…"),
    "a deep tensor": ("tokens.new_zeros(150, 150, 150)", "[[[" + "0, " * 65 + "0,…"),
    "a long error": ("{}['x' * 10**6]", "KeyError: 'xxx"),
    "an int that has no text": ("10**5000", "ValueError: Exceeds the limit"),
}


@pytest.mark.parametrize("kind", ODD_ANSWERS)
def test_an_odd_answer_is_printed_in_one_short_line(kind, tmp_path):
    expression, said = ODD_ANSWERS[kind]
    (tmp_path / "lengths.py").write_text(
        f"def response_lengths(tokens, stop_ids):\n    return {expression}\n"
    )
    graded = run_script("grade.py", tmp_path, 6)
    assert graded.returncode == 1 and graded.stderr == ""
    got = re.search("got +(.*)", graded.stdout)[1]
    assert got.startswith(said)
    assert len(got) < 230  # 200, an ellipsis, and the line of an error


def test_ctrl_c_is_one_line(tmp_path):
    """As a terminal sends it: to all of the group. The process of the exercise ends too."""
    (tmp_path / "lengths.py").write_text("print('here', flush=True)\nwhile True: pass")
    process = subprocess.Popen(
        [sys.executable, ROOT / "docs" / "exercises" / "grade.py", tmp_path, "6"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a job in the background of a shell script inherits that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "here\n"
    os.killpg(process.pid, signal.SIGINT)
    # until nobody holds the pipes: the loop's own alarm would take 20 s
    printed, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert (printed, errors) == ("", "grade.py: interrupted\n")


def test_commands(solved, tmp_path):
    """From blank to points, as a student types it."""
    mine = tmp_path / "mine"
    made = run_script("blank.py", mine, 6, 7)
    assert made.returncode == 0
    assert sorted(path.name for path in mine.iterdir()) == ["lengths.py", "logprobs.py"]
    again = run_script("blank.py", mine, 6)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and "is there already" in again.stderr

    shutil.copy(solved / "lengths.py", mine)
    graded = run_script("grade.py", mine, 6, 7)
    assert graded.returncode == 1
    lines = graded.stdout.splitlines()
    assert lines[0] == " 6  4 of 4 points  response_lengths, response_mask"
    assert lines[1] == " 7  0 of 4 points  plain_logprobs"
    assert re.search(r"input +plain_logprobs\(", graded.stdout)
    assert lines[-1] == "4 of 8 points"
    assert run_script("grade.py", mine, 6).returncode == 0

    for arguments in ((mine, 12), (mine, 1), (mine, "one"), ()):
        wrong = run_script("grade.py", *arguments)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("grade.py: ") and wrong.stderr.count("\n") == 1


def test_a_file_may_print_and_import_another_of_its_folder(solved, tmp_path):
    shutil.copy(solved / "lengths.py", tmp_path / "my_lengths.py")
    text = "from my_lengths import response_lengths, response_mask\nprint('hello')\n"
    (tmp_path / "lengths.py").write_text(text)
    graded = run_script("grade.py", tmp_path, 6)
    assert graded.returncode == 0
    assert graded.stdout.startswith("hello\n 6  4 of 4 points")


# -------------------------------------------------------------------------------------- blank.py


@pytest.mark.parametrize("number", NUMBERS)
def test_a_blank_keeps_signature_docstring_and_nothing_of_the_code(number, solved, blanked):
    exercise = blank.EXERCISES[number]
    whole = functions_of((solved / exercise.file).read_text())
    blanks = functions_of((blanked / exercise.file).read_text())
    assert list(blanks) == list(whole)
    for name in exercise.functions:
        assert ast.dump(blanks[name].args) == ast.dump(whole[name].args)
        assert ast.get_docstring(blanks[name]) == ast.get_docstring(whole[name])
        for node in ast.walk(blanks[name]):
            assert not isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.For)
    to_write = {name for each in blank.EXERCISES.values() for name in each.functions}
    for name in set(whole) - to_write:
        assert ast.dump(blanks[name]) == ast.dump(whole[name])


def test_equations_stay_in_their_places_and_other_comments_go():
    source = '''
def f(x, mode):
    """Doc."""
    # not an equation
    y = x + 1  # y = trailing
    # f = x²    (source)
    # goes on
    if mode == "a":
        # f_a = 2x
        return 2 * y
    if y:
        # f_y = x/2
        return y
    # last
    return x


def g(x):  # 1[x]
    return x
'''
    raised = "raise " + blank.EXCEPTION
    expected = f'''
def f(x, mode):
    """Doc."""
    # f = x²    (source)
    # goes on
    if mode == "a":
        # f_a = 2x
        {raised}("exercise 1: f is still to be written")
    # f_y = x/2
    {raised}("exercise 1: f is still to be written")


def g(x):  # 1[x]
    {raised}("exercise 2: g is still to be written")
'''
    assert blank.blank_functions(source, {"f": 1, "g": 2}) == expected
    with pytest.raises(ValueError, match="no function h"):
        blank.blank_functions(source, {"h": 1})


def test_only_the_functions_of_the_numbers_are_taken_out(tmp_path):
    files = blank.blanked_files([4])
    assert list(files) == ["copo.py"]
    assert files["copo.py"].count("is still to be written") == 2
    assert "exercise 4: clipped_loss" in files["copo.py"]


def test_the_page_lists_the_exercises():
    page = (ROOT / "docs" / "exercises" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\S+)` \| (.+?) \| .+? \| (\d+) \|$", page, flags=re.M)
    listed = {}
    for number, file, functions, minutes in rows:
        listed[int(number)] = (file, tuple(re.findall(r"`(\w+)`", functions)), int(minutes))
    assert listed == {
        number: (exercise.file, exercise.functions, exercise.minutes)
        for number, exercise in blank.EXERCISES.items()
    }


def test_the_page_shows_what_the_grader_prints(tmp_path, capsys):
    """The example of the page: exercise 1 in nats."""
    text = (ROOT / "copo.py").read_text()
    (tmp_path / "copo.py").write_text(text.replace("torch.log2(1 / share)", "torch.log(1 / share)"))
    grade.print_report(1, checks.run_checks(1, tmp_path))
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "exercises" / "README.md").read_text()
    shown = re.search(r"```text\n(.*?)```", page, flags=re.S)[1]
    assert printed == shown
