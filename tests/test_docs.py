"""README.md and docs/*.md against the code: their quick commands run as printed, their Python prints what they say.

Bugs these tests guard against: a command whose flag has been renamed; a number in a document that the code no longer
prints; a long command that nobody has timed. Everything happens in a copy of the repository in a temporary folder.

Every command is run, unless a comment behind it says how long it took, or LONG does or says why it cannot be run here.
Those are not run, but their flags must be known. Commands that need runs (runs/lab/...) get them from a model of two
layers, so what they print is not compared.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_runs

import eval as evaluation
import train

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([HERE / "README.md", *(HERE / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.S | re.M)
TIMED = re.compile(r"\b\d[\d.]* (s|seconds|minutes)\b")  # such as "# 24 s"
HUB = "needs a model or data from the Hub, and a GPU or days; never run as printed"
# Commands, or their beginnings up to "..." -> when they last ran and how long they took, or why they are not run here.
LONG = {
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python train.py":
        "the demonstration, 209 s on two cores of the Intel, after the installation",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/pip install -r tests/...":
        ".ci/run does it",
    "python train.py": "the demonstration, as above",
    "python train.py --seed SEED": "the same with seeds 0 to 2",
    "python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct ...": "36 minutes on one core at fbe0b8e",
    "python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --eval-data ...": HUB,
    "python eval.py --model runs/mine/model ...": "needs the run above it",
    "python train.py --run-dir runs/mine ...": "needs the run above it",
    "python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --dtype bfloat16": HUB,
    "torchrun --nproc-per-node 2 train.py ...": HUB,
    "torchrun --nproc-per-node 8 --shutdown-timeout ...": HUB,
    "torchrun --nnodes 2 ...": HUB,
    "torchrun --nproc-per-node 8 eval.py --model runs/paper/model --data hf://datasets/HuggingFaceH4/MATH...": HUB,
    "python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct ...": "23 minutes on one core at a1da687",
    "torchrun --nproc-per-node 8 eval.py --model runs/paper/model --data hf://datasets/HuggingFaceH4/aime...": HUB,
    "python train.py … --plan 8": "any flags; tests/test_train_flags.py runs --plan",
    "python tests/bench_rollout.py --cpu-time --repeat 3": "the times stand in the table below it",
    "python tests/bench_step.py": "the times stand in the table below it",
    "python copo.py --groups RUN/groups.jsonl": "a placeholder; the lab's commands of this form are run",
    "python tests/kill_ranks.py --kills 50": "343 s (docs/ranks.md)",
    "python tests/bench_ranks.py": "its table stands below it",
    "python docs/study.py --jobs 2": "a minute a cell of two at a time, 3 a warm start, 15 on SmolLM2-135M",
    "python docs/study.py --only 'hard/copo-0' --again": "a minute or two, after the warm start",
}  # fmt: skip


def blocks(text):
    """(language, body) of every fenced block, in order."""
    return [(match.group(1), match.group(2)) for match in FENCE.finditer(text)]


def commands(path):
    """{command: the comment behind it} of a document: of its bash blocks, continued lines joined, and of its text where
    it says `python FILE.py ...` or `torchrun ...`."""
    text, found = path.read_text(), []
    for language, body in blocks(text):
        if language == "bash":
            found += re.sub(r"\\\n\s*", "", body).splitlines()
    prose = FENCE.sub("", text).replace("\n", " ")
    found += re.findall(r"`((?:python \w|torchrun )[^`]*\.py[^`]*)`", prose)
    found = [re.split(r"\s+#", command, maxsplit=1) for command in found]
    return {command.strip(): "".join(comment) for command, *comment in found if command.strip()}


def listed(command):
    """The keys of LONG that mean a command: itself, or its beginnings."""
    return [key for key in LONG if command == key or (key.endswith("...") and command.startswith(key[:-3]))]


def is_long(command, comment):
    return bool(TIMED.search(comment) or listed(command))


def quick(path):
    return [command for command, comment in commands(path).items() if not is_long(command, comment)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with the runs that the documents speak of, and a `python` that is this one."""
    place = tmp_path_factory.mktemp("docs") / "repository"
    place.mkdir()
    for source in HERE.glob("*.py"):
        shutil.copy(source, place)
    for name in ("data", "docs"):
        shutil.copytree(HERE / name, place / name)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        runs = tiny_runs.Runs(place.parent)
        for seed in (0, 1):
            for name, flags in (("copo", {}), ("grpo", {"algo": "grpo"}), ("group", {"blend": "soft-zero-group"})):
                train.main(runs.argv(flags, seed=seed, run_dir=place / f"runs/lab/{name}-{seed}"))
        for name in re.findall(r"runs/lab/([\w-]+)/", "".join(path.read_text() for path in DOCUMENTS)):
            if not (place / "runs/lab" / name).exists():  # a run of which only the files' shape matters
                shutil.copytree(place / "runs/lab/copo-0", place / "runs/lab" / name)
    shim = place.parent / "bin/python"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    shim.chmod(0o755)
    return place


@functools.cache  # a command that stands in two documents is run once
def run(copy, command):
    environment = os.environ | {"PATH": f"{copy.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=copy, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}\n(a command that is not quick belongs in LONG)"
    return done.stdout


@pytest.mark.parametrize(
    ("document", "command"),
    [pytest.param(path, command, id=f"{path.name}: {command[:70]}") for path in DOCUMENTS for command in quick(path)],
)
def test_quick_commands_run_as_printed(copy, document, command):
    if "plot" in command:
        pytest.importorskip("matplotlib")
    if "runs/study/runs/" in command:  # which is made by another command, which may be another worker's
        run(copy, "python docs/study.py --unpack runs/study/runs")
    run(copy, command)


@pytest.mark.filterwarnings("ignore:std")  # of one number, which an example is about
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_prints_what_the_document_says(copy, document, monkeypatch):
    """Each Python block on its own, and the text block behind it."""
    monkeypatch.chdir(copy)
    found = blocks(document.read_text())
    for (language, body), (following, expected) in zip(found, [*found[1:], ("", "")]):
        if language == "python" and following == "text":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(body, str(document), "exec"), {"__name__": "document"})
            assert output.getvalue() == expected, body


def test_the_worked_batch_of_the_lab_is_the_one_that_is_printed(copy):
    """Text that follows `python copo.py` in a document is part of what that prints."""
    printed, excerpts = run(copy, "python copo.py").splitlines(), []
    for found in (blocks(path.read_text()) for path in DOCUMENTS):
        excerpts += [text for before, (_, text) in pairwise(found) if before == ("bash", "python copo.py\n")]
    assert excerpts and set("".join(excerpts).splitlines()) <= set(printed)


def test_every_long_command_is_still_in_a_document():
    """A line of LONG that no document has is a timing of nothing; one that means several, or a quick one, is none."""
    everything = {command for path in DOCUMENTS for command in commands(path)}
    assert len(everything) > 10
    for key in LONG:
        assert len({command for command in everything if listed(command)[:1] == [key]}) == 1, key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_of_long_commands_are_known(document, tmp_path, monkeypatch):
    """The shell reads the long commands and its variables, a `python` that only notes its arguments stands for ours."""
    lines = [command for command, comment in commands(document).items() if is_long(command, comment)]
    lines = [line for line in lines if re.match(r"python (train|eval)|torchrun|for ", line)]
    lines = [line.replace(" …", "").replace("SEED", "0") for line in lines]
    variables = [command for command in commands(document) if command.startswith("LAB=")]
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$NOTES"; printf "\\n" >> "$NOTES"\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
    subprocess.run(["bash", "-c", "\n".join([*variables, *lines])], check=True, env=environment, cwd=tmp_path)
    noted = (tmp_path / "notes").read_text().splitlines() if lines else []
    assert len(noted) >= len(lines)
    for words in (line.split("\0")[:-1] for line in noted):
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1 :]
        if script == "train.py":
            train.flags().parse_args(arguments)
        elif arguments:
            evaluation.parse_args([*arguments, "--device", "cpu"])
