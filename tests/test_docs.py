"""README.md and docs/*.md against the code: their quick commands run as printed, their Python prints what they say.

Bugs these tests guard against: a command whose flag has been renamed; a number in a document that the code no longer
prints; a long command that nobody has timed. Everything happens in a copy of the repository in a temporary folder.

Which commands are quick is decided here: what stands in LONG is not run, with the reason or the last measured time.
Commands that need runs (runs/lab/...) get them from a model of two layers, so what they print is not compared.
"""

import contextlib
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

import train

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([HERE / "README.md", *(HERE / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.S | re.M)
# Beginning of a command -> why it is not run here. Times: two shared cores, one thread (seconds where not said).
LONG = {
    "python3 -m venv": "the installation and the tests: .ci/run does it",
    "python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct": "36 minutes, and the model from the Hub",
    "python train.py --model Qwen/": "a model from the Hub",
    "python eval.py --model runs/mine/model": "needs the run above it",
    "python eval.py --model runs/lab/copo-0/model": "17 seconds, after the run",
    "python train.py --run-dir runs/mine": "needs the run above it",
    "torchrun": "never run as printed: several GPUs; tests/test_train_ranks.py runs the like on CPUs",
    "python train.py --seed": "3.8 minutes on two cores (README)",
    "python train.py --steps 0 --run-dir runs/lab/warm": "4.2 minutes",
    'python train.py "${LAB[@]}"': "half a minute each, after the warm start",
    "for seed in": "half a minute each, after the warm start",
    "python train.py": "3.8 minutes on two cores (README)",
    "python -m pytest": "the tests themselves",
    "python docs/study.py --jobs": "35 seconds a cell, 157 cells, and five warm starts of 4 minutes",
    "python docs/study.py --only": "35 seconds, after a warm start of 4 minutes",
    "python tests/": "benchmarks and stress tests, of minutes each; their results stand beside the command",
}


def blocks(text):
    """(language, body) of every fenced block, in order."""
    return [(match.group(1), match.group(2)) for match in FENCE.finditer(text)]


def commands(path):
    """The commands of a document: those of its bash blocks, continued lines joined, and `python ...` in its text."""
    text, found = path.read_text(), []
    for language, body in blocks(text):
        if language == "bash":
            found += re.sub(r"\\\n\s*", "", body).splitlines()
    prose = FENCE.sub("", text).replace("\n", " ")
    found += re.findall(r"`(python \w[^`]*\.py[^`]*)`", prose)
    found = [re.sub(r"\s+#.*", "", command).strip() for command in found]
    return list(dict.fromkeys(command for command in found if command and not command.startswith("#")))


def quick(path):
    """The commands that are run: not long, and without a placeholder in capitals."""
    return [c for c in commands(path) if not c.startswith(tuple(LONG)) and not re.search(r"\b[A-Z]{3}", c)]


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
    """A line of LONG that no document has is a timing of nothing."""
    everything = [command for path in DOCUMENTS for command in commands(path)]
    assert len(everything) > 10
    for beginning in LONG:
        assert any(command.startswith(beginning) for command in everything), beginning
