"""Grade a folder of exercises: points, and for the first thing that is wrong what and why.

    python docs/exercises/grade.py mine           all eleven
    python docs/exercises/grade.py mine 1 4       only these

Each exercise runs in a process of its own with a time limit, so an endless loop or a crash costs
that exercise and nothing else. Exit code 0 for full points, 1 for fewer, 2 for a wrong command, 130
for Ctrl-C.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from blank import EXERCISES, exit_with_error, read_command

CHECKS = Path(__file__).resolve().with_name("checks.py")
TIME_LIMIT = 20  # seconds for the checks of an exercise
START_LIMIT = 120  # seconds to import what the checks need


def run_exercise(number, folder, time_limit=TIME_LIMIT):
    """Run the checks of one exercise in a process of its own -> report, a line (dict) a check.

    OSError if the checks cannot start, such as without torch.
    """
    too_long = f"nothing within {time_limit} s: an endless loop?"
    with tempfile.TemporaryDirectory() as temporary:
        report_path = Path(temporary) / "report.json"
        command = [sys.executable, CHECKS, report_path, folder, str(number), str(time_limit)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            process = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C goes to grade.py alone, which kills the process
                timeout=START_LIMIT + time_limit,
            )
            end = f"nothing: the process ended with exit code {process.returncode}"
            if process.returncode == -signal.SIGALRM:
                end = too_long
        except subprocess.TimeoutExpired:  # the student's file has switched the alarm off
            end = too_long
        if not report_path.exists():
            raise OSError(f"exercise {number}: the checks did not start; {end}")
        report = json.loads(report_path.read_text())
    for line in report:
        line.setdefault("got", end)
    return report


def print_report(number, report):
    """One line with the points; below it the first check that failed."""
    exercise = EXERCISES[number]
    points = sum(line["passed"] for line in report)
    print(f"{number:>2}  {points} of {len(report)} points  {', '.join(exercise.functions)}")
    for line in report:
        if not line["passed"]:
            print(f"    {line['why']}")
            print(f"      input     {line['input']}")
            print(f"      expected  {line['expected']}")
            print(f"      got       {line['got']}")
            break
    sys.stdout.flush()


def grade(folder, numbers):
    """Print the reports of these exercises -> whether they have full points."""
    for number in numbers:
        file = folder / EXERCISES[number].file
        if not file.is_file():
            exit_with_error(
                "grade.py", f"exercise {number}: there is no {file}; blank.py writes it"
            )
    points = 0
    total = 0
    for number in numbers:
        try:
            report = run_exercise(number, folder)
        except OSError as error:
            exit_with_error("grade.py", error)
        print_report(number, report)
        points += sum(line["passed"] for line in report)
        total += len(report)
    print(f"\n{points} of {total} points")
    return points == total


def main(argv=None):
    folder, numbers = read_command(
        "grade.py", __doc__.split("\n")[0], "folder that blank.py made", argv
    )
    with suppress(AttributeError):  # a notebook's stdout
        # a lone surrogate in an answer, or what the terminal lacks, is printed as \ud83d
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        full = grade(folder, numbers)
    except KeyboardInterrupt:
        print("grade.py: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if not full:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
