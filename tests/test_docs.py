"""README.md and docs/*.md against the code: quick commands run as printed, Python prints what the
page says, quotations are in the code, metrics are those that a run logs.

Bugs these tests guard against: a command whose flag has been renamed; a number on a page that the
code no longer prints; a long command that nobody has timed; a quotation or a link that has gone
stale. Everything runs in a copy of the repository in a temporary folder.

Every command is run, unless a comment behind it says how long it took, or LONG does or says why it
cannot be run here. Those are not run, but their flags must be known. Commands that need runs
(runs/small/...) get them from a model of two layers, so what they print is not compared.
"""

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_runs
import torch

import copo
import eval as evaluation
import train

HERE = Path(__file__).resolve().parent.parent
README = HERE / "README.md"
DOCUMENTS = sorted([README, *(HERE / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.S | re.M)
TIMED = re.compile(r"\b\d[\d.]* (s|seconds|minutes)\b")  # such as "# 24 s"
HUB = "needs a model or data from the Hub, and a GPU or days; never run as printed"
# Commands, or their beginnings up to "..." -> when they last ran and how long they took, or why
# they are not run here.
LONG = {
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python ...": (
        "the demonstration: some minutes on two cores, after the installation"
    ),
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/pip ...": (
        ".ci/run does it"
    ),
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -r tests/...": (
        "installs TRL: a minute"
    ),
    "python3 -m venv .venv": "the installation of the course, with the two commands below it",
    ".venv/bin/pip install -r requirements.txt -r tests/requirements.txt": "some minutes",
    ". .venv/bin/activate": "of the environment made above it",
    "pip install jupyterlab && jupyter lab docs/copo.ipynb": "opens a browser",
    "python docs/measure_lab.py WORK": "makes all runs of docs/lab.md: a quarter of an hour",
    "python train.py": "the demonstration, as above",
    "python train.py --reward format.py:grade": (
        "the demonstration with another reward; a test below trains a tiny model with it"
    ),
    "python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/words_train...": (
        "36 minutes on one core at fbe0b8e"
    ),
    "python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --eval-data "
    "test.jsonl --run-dir runs/mine ...": "72 s on one core (docs/running.md)",
    "python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --eval-data "
    "test.jsonl --run-dir runs/gpu ...": HUB,
    "python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --eval-data ...": HUB,
    "python eval.py --run runs/mine": "needs the run above it; 10 s",
    "python to_jsonl.py": "a script and a CSV of the reader's",
    "python reward.py --audit before.jsonl": "needs the evaluation above it; 3 s",
    "cat runs/mine/samples.txt": "needs the run above it",
    "python study/plot.py runs/mine": "needs the run above it; tests/test_reports.py draws one",
    "python study/track.py runs/mine wandb": "needs an account; tests/test_reports.py has a fake",
    "python train.py --run-dir runs/mine ...": "needs the run above it",
    "python train.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --dtype bfloat16": HUB,
    "torchrun --nproc-per-node 2 train.py ...": HUB,
    "torchrun --nproc-per-node 8 --shutdown-timeout ...": HUB,
    "torchrun --nnodes 2 ...": HUB,
    "torchrun --nproc-per-node 8 eval.py --model runs/paper/model "
    "--data hf://datasets/HuggingFaceH4/MATH...": HUB,
    "python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data hf...": (
        "23 minutes on one core at a1da687"
    ),
    "python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data test.jsonl ...": (
        "13 s on one core (docs/running.md)"
    ),
    "torchrun --nproc-per-node 8 eval.py --model runs/paper/model "
    "--data hf://datasets/HuggingFaceH4/aime...": HUB,
    "python train.py … --plan 8": "any flags; tests/test_train_flags.py runs --plan",
    "python tests/gpu_check.py": "needs a GPU; tests/test_gpu.py runs it on the CPU",
    "python tests/bench_rollout.py --cpu-time --repeat 3": "the times stand in the table below it",
    "python tests/bench_step.py": "the times stand in the table below it",
    "python tests/bench_memory.py --repeat 3": "its figures stand beside it",
    "python study/lab.py RUN/groups.jsonl": "a placeholder; docs/lab.md's of this form are run",
    "python tests/kill_ranks.py --kills 50": "552 s (docs/ranks.md)",
    "python tests/bench_ranks.py": "its table stands below it",
    "python study/study.py --jobs 2": (
        "a minute a cell of two at a time, 3 a warm start, 15 on SmolLM2-135M"
    ),
    "python study/study.py --only 'hard/copo-0' --again": ("a minute or two, after the warm start"),
}


def blocks(text):
    """(language, body) of every fenced block, in order."""
    return [(match.group(1), match.group(2)) for match in FENCE.finditer(text)]


def commands(path):
    """{command: the comment behind it} of a document: of its bash blocks, continued lines joined,
    and of its text where it says `python FILE.py ...` or `torchrun ...`."""
    text = path.read_text()
    lines = []
    for language, body in blocks(text):
        if language == "bash":
            lines += re.sub(r"\\\n\s*", "", body).splitlines()
    prose = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.S).replace("\n", " ")
    lines += re.findall(r"`((?:python \w|torchrun )[^`]*\.py[^`]*)`", prose)
    found = {}
    for line in lines:
        command, *comment = re.split(r"\s+#", line, maxsplit=1)
        if command.strip():
            found[command.strip()] = "".join(comment)
    return found


def listed(command):
    """The keys of LONG that mean a command: itself, or its beginnings."""
    keys = []
    for key in LONG:
        begins = key.endswith("...") and command.startswith(key.removesuffix("..."))
        if command == key or begins:
            keys.append(key)
    return keys


def is_long(command, comment):
    return bool(TIMED.search(comment) or listed(command))


def quick(path):
    return [command for command, comment in commands(path).items() if not is_long(command, comment)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with the runs that the documents speak of, and a `python` that is
    this one."""
    folder = tmp_path_factory.mktemp("docs") / "repository"
    folder.mkdir()
    for source in HERE.glob("*.py"):
        shutil.copy(source, folder)
    for name in ("data", "docs", "study"):
        shutil.copytree(HERE / name, folder / name)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        runs = tiny_runs.Runs(folder.parent)
        kinds = {"copo": {}, "grpo": {"algo": "grpo"}, "group": {"blend": "soft-zero-group"}}
        for seed in (0, 1):
            for name, flags in kinds.items():
                train.main(
                    runs.argv(flags, seed=seed, run_dir=folder / f"runs/small/{name}-{seed}")
                )
        text = "".join(path.read_text() for path in DOCUMENTS)
        for name in re.findall(r"runs/small/([\w-]+)/", text):
            if not (folder / "runs/small" / name).exists():  # only the shape of its files matters
                shutil.copytree(folder / "runs/small/copo-0", folder / "runs/small" / name)
    shim = folder.parent / "bin/python"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    shim.chmod(0o755)
    return folder


@functools.cache  # a command that stands in two documents is run once
def run(copy, command):
    path = f"{copy.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=copy,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    hint = "(a command that is not quick belongs in LONG)"
    assert done.returncode == 0, f"{command}\n{done.stderr}\n{hint}"
    return done.stdout


def quick_commands():
    for path in DOCUMENTS:
        for command in quick(path):
            yield pytest.param(path, command, id=f"{path.name}: {command[:70]}")


@pytest.mark.parametrize(("document", "command"), list(quick_commands()))
def test_quick_commands_run_as_printed(copy, document, command):
    if re.search("--plot|--map|pictures.py", command):
        pytest.importorskip("matplotlib")
    if "runs/study/runs/" in command:  # made by another command, which may be another worker's
        run(copy, "python study/study.py --unpack runs/study/runs")
    run(copy, command)


@pytest.mark.filterwarnings("ignore:std")  # of one number, which an example is about
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_prints_what_the_document_says(copy, document, monkeypatch):
    """Each Python block on its own, and the text block behind it."""
    monkeypatch.chdir(copy)
    found = blocks(document.read_text())
    for (language, body), (following, expected) in pairwise([*found, ("", "")]):
        if language == "python" and following == "text":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(body, str(document), "exec"), {"__name__": "document"})
            assert output.getvalue() == expected, body


def test_the_worked_batch_of_the_lab_is_the_one_that_is_printed(copy):
    """Text that follows `python copo.py` in a document is part of what that prints."""
    printed = run(copy, "python copo.py").splitlines()
    excerpts = []
    for path in DOCUMENTS:
        for before, (_, text) in pairwise(blocks(path.read_text())):
            if before == ("bash", "python copo.py\n"):
                excerpts += text.splitlines()
    assert excerpts
    assert set(excerpts) <= set(printed)


def test_every_long_command_is_still_in_a_document():
    """A line of LONG that no document has is a timing of nothing; one that means several, or a
    quick one, is none."""
    everything = {command for path in DOCUMENTS for command in commands(path)}
    assert len(everything) > 10
    for key in LONG:
        meant = {command for command in everything if listed(command)[:1] == [key]}
        assert len(meant) == 1, (key, meant)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_of_long_commands_are_known(document, tmp_path):
    """The shell reads the long commands, and the file of flags; a `python` that only notes its
    arguments stands for ours."""
    found = commands(document)
    lines = []
    for command, comment in found.items():
        ours = re.match(r"python (train|eval)|torchrun|for ", command)
        if ours and is_long(command, comment):
            lines.append(command.replace(" …", "").replace("SEED", "0"))
    note = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$NOTES"; printf "\\n" >> "$NOTES"\n'
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(note)
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes)}
    (tmp_path / "docs").mkdir()
    shutil.copy(HERE / "docs/small.flags", tmp_path / "docs")
    script = "\n".join(lines)
    subprocess.run(["bash", "-c", script], check=True, env=environment, cwd=tmp_path)
    noted = notes.read_text().splitlines() if lines else []
    assert len(noted) >= len(lines)
    for line in noted:
        words = line.split("\0")[:-1]
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1 :]
        if script == "train.py":
            train.build_parser().parse_args(arguments)
        elif arguments:
            evaluation.make_parser().parse_args(arguments)


# ------------------------------------------------------------------------------- README and metrics


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


def test_the_loop_is_quoted_from_train():
    """The README shows the loop as it is, line for line; a line of three dots leaves some out."""
    loops = [body for language, body in blocks(README.read_text()) if "while True" in body]
    assert len(loops) == 1
    rest = inspect.getsource(train.train)
    for part in re.split(r"^ *\.\.\.\n", loops[0], flags=re.M):
        quoted = textwrap.indent(part, "    ")
        assert quoted in rest, part
        rest = rest.partition(quoted)[2]


def test_the_readmes_reward_trains(copy, monkeypatch):
    """The example of a reward of one's own pays for the format, and the real workers run it: with
    its bonus paid to every response, since the tiny model cannot write a box."""
    bodies = [body for language, body in blocks(README.read_text()) if "def grade" in body]
    assert len(bodies) == 1
    example = {}
    exec(bodies[0], example)
    grades = [example["grade"](text, "2") for text in (r"\boxed{2}", r"\boxed{3}", "2", "3")]
    assert [round(grade.reward, 9) for grade in grades] == [1.1, 0.1, 1.0, 0.0]
    assert [grade.correct for grade in grades] == [True, False, True, False]

    monkeypatch.chdir(copy)
    Path("format.py").write_text(bodies[0].replace("0.0", "0.1"))
    folder = copy.parent / "format"
    folder.mkdir()
    runs = tiny_runs.Runs(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(runs.argv({"reward": "format.py:grade"}, run_dir="runs/format", steps=1))
    groups = tiny_runs.lines("runs/format/groups.jsonl")
    assert groups
    for line in groups:
        assert line["reward"] == pytest.approx([correct + 0.1 for correct in line["correct"]])


def table_names(section):
    """The names in the first column of all tables of a section of docs/metrics.md."""
    text = (HERE / "docs/metrics.md").read_text()
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    names = re.findall(r"^\| `(\w+)` \|", body, flags=re.M)
    assert len(names) == len(set(names))
    return set(names)


def phases(name):
    """The names that a row such as seconds_PHASE of docs/metrics.md stands for."""
    text = (HERE / "docs/metrics.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, flags=re.M)
    return {name.replace("PHASE", phase) for phase in re.findall(r"`(\w+)`", row)}


def test_the_edits_of_the_experiments_still_apply():
    """docs/measure_lab.py finds each text that it replaces, once."""
    spec = importlib.util.spec_from_file_location("measure_lab", HERE / "docs/measure_lab.py")
    measure_lab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure_lab)
    assert len(measure_lab.EDITS) == 3
    for file, text, replacement in measure_lab.EDITS.values():
        assert (HERE / file).read_text().count(text) == 1 and replacement != text


def test_metrics_page_names_what_runs_log(tmp_path, monkeypatch):
    """Runs that between them switch on everything that is logged; nothing else is on the page."""
    monkeypatch.setattr(train, "Verifier", tiny_runs.Judge)
    runs = tiny_runs.Runs(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = runs.new()
        everything = runs.new(kl_coef=0.1, old_logprobs="recompute", dtype="bfloat16", placebo=True)
    logged = {"metrics": set(), "eval": set(), "groups": set()}
    for directory in (plain, everything):
        for name, names in logged.items():
            for line in tiny_runs.lines(directory / f"{name}.jsonl"):
                names.update(line)
    named = table_names("metrics.jsonl")
    for row in ("seconds_PHASE", "tokens_per_second_PHASE"):
        named = named - {row} | phases(row)
    assert logged["metrics"] == named
    assert logged["eval"] == table_names("eval.jsonl")
    assert logged["groups"] == table_names("groups.jsonl")
    assert json.loads((plain / "run.json").read_text())["format"] == 2


# ------------------------------------------------------------------------------------------- rules


def section(path, heading):
    """The text of a page below the heading that begins with these words, up to the next one."""
    (body,) = re.findall(
        rf"^## {re.escape(heading)}.*?\n(.*?)(?=^## |\Z)", path.read_text(), flags=re.S | re.M
    )
    return body


def first_names(text):
    """The `names` that begin the rows of the tables of a text, in order."""
    return re.findall(r"^\| `(\w[\w-]*)`", text, flags=re.M)


def test_the_page_of_rules_has_every_rule():
    page = HERE / "docs/rules.md"
    tables = {
        "`--advantage`": copo.ADVANTAGES,
        "`--ratio`": copo.RATIOS,
        "`--aggregation`": copo.AGGREGATIONS,
        "`--kl-estimator`": copo.KL_ESTIMATORS,
    }
    for heading, table in tables.items():
        assert sorted(first_names(section(page, heading))) == sorted(table), heading
    assert first_names(section(README, "Presets and ablations")) == list(copo.PRESETS)


def test_the_page_of_rules_describes_the_blends_as_they_are():
    """Each blend's gate in words, and whether it looks at the entropy."""
    gates = {
        "correct responses": copo.correct_response,
        "every response": copo.every_response,
        "groups with a correct response": copo.solved_group,
        "groups with both verdicts": copo.mixed_group,
        "no response": copo.no_response,
    }
    table = section(HERE / "docs/rules.md", "`--blend`")
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\| ([^|]+) \| (yes|no) \|", table, flags=re.M)
    described = {}
    for name, gate, uses_entropy in rows:
        described[name] = copo.Blend(uses_entropy == "yes", gates[gate])
    assert described == copo.BLENDS


def test_a_lone_correct_answer_is_pushed_down_as_the_readme_says():
    correct = torch.tensor([[True, False, False, False, False, False]])
    entropy = copo.consistency_entropy(correct.long())
    local_adv = copo.local_advantages(correct)
    weight = copo.local_weight(entropy, correct, local_adv, "soft-zero", gamma=5.0, rho=1.0)
    global_adv = torch.tensor([(1 / 6 - 0.5) / 0.4])
    effective = copo.effective_advantages(local_adv, global_adv, weight)
    text = section(README, "Three consequences")
    assert f"H is {entropy[0]:.2f} and w {weight[0, 0]:.2f}" in text
    assert f"A = {effective[0, 0]:.2f}".replace("-", "−") in text
    assert f"{local_adv[0, 0]:+.2f}" in text


def effective(answers, prompt, preset):
    """H of one prompt (from 1) of a batch written as copo.ANSWERS, and A of its first response."""
    classes = torch.tensor([[ord(answer) for answer in row] for row in answers])
    correct = classes == ord("A")
    algorithm = copo.PRESETS[preset]
    result = copo.compute_advantages(correct, correct, classes, None, algorithm, None)
    return result.entropy[prompt - 1].item(), result.effective[prompt - 1, 0].item()


def test_answers_about_the_worked_batch():
    """Answers 3 and 4 of the course, on the batch as the questions change it."""
    answers = section(HERE / "docs/course.md", "Answers").replace("\n   ", "")
    third, fourth = re.findall(r"^[34]\. (.*)$", answers, flags=re.M)
    before = list(copo.ANSWERS)
    assert before[5] == "bbbccd" and before[3] == "Abcdef"
    changed = [*before[:5], "ebbccd", *before[6:]]
    for batch, place in ((before, "from"), (changed, "to")):
        entropy, value = effective(batch, 6, "copo-paper")
        assert f"{place} {entropy:.3f}" in third
        assert f"{place} {value:.3f}".replace("-", "−") in third
        for preset in ("grpo", "copo", "copo-group"):
            assert effective(batch, 6, preset)[1] == effective(before, 6, preset)[1]
    lone = [*before[:3], "Abbbbb", *before[4:]]
    for preset in ("grpo", "copo", "copo-group", "copo-paper"):
        assert f"{effective(lone, 4, preset)[1]:+.3f}".replace("-", "−") in fourth


# ------------------------------------------------------------------------------------------- links


def anchors(path):
    """Anchors that GitHub makes of a document's headings."""
    text = FENCE.sub("", path.read_text())
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = FENCE.sub("", document.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
