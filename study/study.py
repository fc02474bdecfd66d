"""The study of docs/study.md: nine configurations on three mixes of problems, and a few more runs.

    python study/study.py --jobs 2                      # every cell that is not on record yet
    python study/study.py --only 'hard/copo-0' --again  # does a cell give its record again?
    python study/study.py --list --only 'hard/*'        # the cells, each with its command
    python study/study.py --tables                      # tables and pictures of the record
    python study/study.py --unpack runs/study/runs      # the record as runs, for compare.py

A cell is one run of train.py in a process of its own. What compare.py needs of it goes on record,
into study/record.json. A cell on record is done, so after an interruption the same command goes on.
Problems are the built-in ones. All runs of a seed start from the same weights: those of its warm
start on all built-in problems (the cell warm-SEED).

A step is P·G sampled responses. dapo draws more of them for one of its own steps. So a step of dapo
on record is what dapo had made of as many responses, or of slightly fewer; it is stopped when it
has used up its share.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "study")]
import compare  # noqa: E402
import make_arithmetic  # noqa: E402

from eval import number_in  # noqa: E402
from sampler import exit_with_error  # noqa: E402

RECORD = ROOT / "study/record.json"
ATTACHMENTS = ROOT / "docs/study"  # what --tables writes: pictures, and all that compare.py prints

# Share of each kind of problem in a mix, in percent. A kind is (level, question) of
# data/make_arithmetic.py; level 6 is level 3 with three more terms, longer than anything in the
# warm start.
MIXES = {
    "hard": {(3, "Quiz:"): 15, (6, "Quiz:"): 85},
    "even": {(3, "Quiz:"): 65, (6, "Quiz:"): 35},
    "easy": {(3, "Solve"): 30, (3, "Quiz:"): 70},
}
TRAIN_PROBLEMS = 1000
TEST_PROBLEMS = 100

CONFIGURATIONS = {
    "grpo": "--algo grpo",
    "copo": "--algo copo",
    "copo-paper": "--algo copo-paper",
    "soft-zero-group": "--blend soft-zero-group",
    "global": "--blend global",
    "dr-grpo": "--algo dr-grpo",
    "dapo": "--algo dapo",
    "batch": "--algo grpo --advantage batch",
    "ngrpo": "--algo grpo --advantage ngrpo",
}
# γ and ρ of copo; γ 5, ρ 1 is copo itself.
GRID = {
    "γ1ρ0.5": "--gamma 1 --rho 0.5",
    "γ1ρ1": "--gamma 1 --rho 1",
    "γ1ρ1.5": "--gamma 1 --rho 1.5",
    "γ5ρ0.5": "--gamma 5 --rho 0.5",
    "γ5ρ1.5": "--gamma 5 --rho 1.5",
    "γ20ρ0.5": "--gamma 20 --rho 0.5",
    "γ20ρ1": "--gamma 20 --rho 1",
    "γ20ρ1.5": "--gamma 20 --rho 1.5",
}
SOME = ("copo", "soft-zero-group", "grpo")  # also with one update a step, and on a real model

STEPS = 16  # of a run
RESPONSES = 240  # of a step: P·G
EVAL_EVERY = 4  # steps
EVERY_CELL = "--instruction '' --eval-samples 4 --save-every 0 --verifier-workers 1"
WARM_START = "--steps 0 --sft-steps 600 --run-dir warm"  # the demonstration's, a little longer
SIZES = (
    "--model warm/model --max-prompt-tokens 64 --max-new-tokens 64 --prompts-per-step 40 "
    "--group-size 6 --rollout-batch 0 --lr 2e-4 --beta2 0.95"
)
FOUR_UPDATES = f"{SIZES} --minibatch-prompts 10 --steps {STEPS}"  # a step
ONE_UPDATE = f"{SIZES} --minibatch-prompts 40 --steps {2 * STEPS}"  # as in the demonstration
REAL_MODEL = (
    "--model MODEL --max-prompt-tokens 128 --max-new-tokens 28 --prompts-per-step 8 "
    "--group-size 8 --steps 8 --minibatch-prompts 8 --lr 2e-5 --eval-problems 50 "
    "--micro-tokens 2048"
)


# ------------------------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    name: str  # MIX/CONFIGURATION-SEED, or warm-SEED
    seed: int
    flags: str  # of train.py; MODEL stands for --model

    @property
    def is_warm_start(self):
        return self.name.startswith("warm-")

    @property
    def directory(self):
        """Where its run lies, within the seed's directory."""
        return "warm" if self.is_warm_start else self.name


def make_cells(mix, seed, configurations, data, sizes):
    """One cell per configuration, {name: flags}, on the data files DATA_train and DATA_test."""
    cells = []
    for name, flags in configurations.items():
        every = EVAL_EVERY
        if name == "dapo":
            every = 1  # one of its own steps may be worth four of the others
        flags += f" --data {data}_train.jsonl --eval-data {data}_test.jsonl"
        cells.append(Cell(f"{mix}/{name}-{seed}", seed, f"{flags} {sizes} --eval-every {every}"))
    return cells


def all_cells():
    """Every cell, in the order of running: if time runs out, the last ones are missing."""
    some = {name: CONFIGURATIONS[name] for name in SOME}

    def main_cells(seed):
        cells = [Cell(f"warm-{seed}", seed, WARM_START)]
        for mix in MIXES:
            cells += make_cells(mix, seed, CONFIGURATIONS, f"../data/{mix}", FOUR_UPDATES)
        return cells

    def single_cells(seed):
        return make_cells("single", seed, some, "../data/even", ONE_UPDATE)

    def grid_cells(seed):
        return make_cells("grid", seed, GRID, "../data/even", FOUR_UPDATES)

    def real_cells(seed):
        return make_cells("smollm2", seed, some, f"{ROOT}/data/words", REAL_MODEL)

    cells = main_cells(0) + main_cells(1) + main_cells(2)
    cells += single_cells(0) + grid_cells(0) + real_cells(0)
    cells += main_cells(3) + main_cells(4)
    cells += single_cells(1) + single_cells(2) + grid_cells(1) + real_cells(1)
    return cells


# ---------------------------------------------------------------------------------------- problems


def lengthen(row, rng):
    """A problem of level 3 with three more terms; values stay within the bounds of all others."""
    text = row["problem"]
    value = int(row["answer"])
    for _ in range(3):
        term = rng.randint(1, 9)
        allowed = []
        if value + term <= make_arithmetic.LARGEST:
            allowed.append("+")
        if value - term >= 0:
            allowed.append("-")
        sign = rng.choice(allowed)
        text += f"{sign}{term}"
        value += term if sign == "+" else -term
    return {"problem": text, "answer": str(value), "level": 6, "require_value": True}


def make_mixes(folder):
    """Write MIX_train.jsonl, of built-in problems, and MIX_test.jsonl, of new expressions."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    lines = (ROOT / "data/arithmetic_train.jsonl").read_text().splitlines()
    built_in = [json.loads(line) for line in lines]
    taken = {row["problem"].removeprefix("Quiz: ").removeprefix("Solve ") for row in built_in}
    fresh = make_arithmetic.make({3: 600}, rng, taken, held_out=True)
    sources = {"train": (built_in, TRAIN_PROBLEMS), "test": (fresh, TEST_PROBLEMS)}
    for mix, shares in MIXES.items():
        for name, (source, size) in sources.items():
            longer = [lengthen(row, rng) for row in source if row["level"] == 3]
            rows = pick_problems(source + longer, shares, size)
            rng.shuffle(rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{mix}_{name}.jsonl").write_text(text)


def pick_problems(rows, shares, size):
    """The first problems of each kind, as many as its share of `size`."""
    picked = []
    for kind, percent in shares.items():
        alike = [row for row in rows if (row["level"], row["problem"].split()[0]) == kind]
        picked += alike[: size * percent // 100]
    return picked


# -------------------------------------------------------------------------------------- the record

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "mixed",
    "all_wrong",
    "zero_gradient_groups",
    "wrong_pushed_up",
    "loss",
    "prompts_trained",
    "prompts_drawn",
)


def vote_unit(k):
    """What every credit of a vote of k samples is a whole number of parts of: ties share 1."""
    return math.lcm(*range(1, k + 1))


def read_run(directory):
    """A finished run as it goes on record, with steps counted in P·G responses (see above)."""
    info = json.loads((directory / "run.json").read_text())
    flags = info["flags"]
    for name in ("model", "data", "eval_data"):  # they may lie anywhere
        flags[name] = "/".join(Path(flags[name]).parts[-2:])
    unit = flags["prompts_per_step"] * flags["group_size"]

    metrics = {name: [] for name in COLUMNS}
    for line in compare.read_lines(directory / "metrics.jsonl"):
        if line["responses"] > flags["steps"] * unit:
            break
        line["step"] = line["responses"] / unit
        for name in COLUMNS:
            value = line[name]
            metrics[name].append(round(value, 4) if value else value)

    held_out = []
    evaluations = compare.read_lines(directory / "eval.jsonl")
    for step in range(0, flags["steps"] + 1, EVAL_EVERY):
        line = [line for line in evaluations if line["responses"] <= step * unit][-1]
        k = line["k"]
        # Shares as whole numbers: exact, and short.
        correct = [round(share * k) for share in line["per_problem"]]
        votes = [round(credit * vote_unit(k)) for credit in line["per_problem_maj"]]
        held_out.append({"step": step, "k": k, "correct": correct, "votes": votes})
    return {"commit": info["commit"], "flags": flags, "held_out": held_out, "metrics": metrics}


def load_record():
    """{cell: what read_run() gave}. In the file, flags that all cells share stand only once."""
    if not RECORD.exists():
        return {}
    file = json.loads(RECORD.read_text())
    record = {}
    for name, cell in file["cells"].items():
        record[name] = cell | {"flags": file["flags"] | cell["flags"]}
    return record


def save_record(record):
    first, *others = [cell["flags"] for cell in record.values()]
    shared = {}
    for flag, value in first.items():
        if all(flag in flags and flags[flag] == value for flags in others):
            shared[flag] = value
    lines = []
    for name, cell in sorted(record.items()):
        own = {flag: value for flag, value in cell["flags"].items() if flag not in shared}
        lines.append(f"{json.dumps(name)}: {json.dumps(cell | {'flags': own})}")
    cells = ",\n".join(lines)
    RECORD.parent.mkdir(exist_ok=True)
    unfinished = RECORD.with_suffix(".partial")
    unfinished.write_text(f'{{"flags": {json.dumps(shared)}, "cells": {{\n{cells}\n}}}}\n')
    os.replace(unfinished, RECORD)


def unpack(record, folder):
    """Write each cell on record as a run's directory, folder/MIX/CONFIGURATION-SEED."""
    for name, cell in record.items():
        evaluations = []
        for line in cell["held_out"]:
            k = line["k"]
            means = [count / k for count in line["correct"]]
            votes = [count / vote_unit(k) for count in line["votes"]]
            evaluations.append(
                {"step": line["step"], "k": k, "per_problem": means, "per_problem_maj": votes}
            )
        columns = cell["metrics"]
        metrics = [dict(zip(columns, values)) for values in zip(*columns.values())]
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        write_lines(directory / "run.json", [{"flags": cell["flags"]}])
        write_lines(directory / "eval.jsonl", evaluations)
        write_lines(directory / "metrics.jsonl", metrics)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ----------------------------------------------------------------------------------- running cells


@dataclass
class Job:
    cell: Cell
    directory: Path  # of its run
    process: subprocess.Popen
    started: float
    stopped: bool = False


def command(cell, model):
    """The command of a cell, to be run in the seed's directory."""
    flags = shlex.split(f"{cell.flags} {EVERY_CELL} --seed {cell.seed}")
    if not cell.is_warm_start:
        flags += ["--run-dir", cell.name]
    if model:
        flags = [model if flag == "MODEL" else flag for flag in flags]
    return [sys.executable, str(ROOT / "train.py"), *flags]


def run_cells(waiting, args):
    """Run cells, --jobs at a time, always the first that can start.

    One that fails is named, and the others go on.
    """
    runs = Path(args.runs).resolve()
    if not (runs / "data").exists():
        make_mixes(runs / "data")
    jobs = []
    failed = []
    # As Ctrl-C does, SIGTERM ends the runs too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or jobs:
            cell = next((cell for cell in waiting if can_start(cell, runs)), None)
            if cell and len(jobs) < args.jobs:
                waiting.remove(cell)
                jobs.append(start(cell, runs, args.model))
            if waiting and not jobs:
                seed = waiting[0].seed
                raise SystemExit(f"{waiting[0].name} needs warm-{seed}, which is not there")
            time.sleep(0.2)
            for job in list(jobs):
                if job.process.poll() is None:
                    stop_if_done(job)
                    continue
                jobs.remove(job)
                outcome = f"FAILED, see {runs}/seed-{job.cell.seed}/log.txt"
                if job.process.returncode == 0:
                    outcome = finish(job, args.again)
                else:
                    failed.append(job.cell.name)
                print(f"{job.cell.name}: {time.monotonic() - job.started:.0f} s, {outcome}")
                sys.stdout.flush()
    finally:
        signal.signal(signal.SIGTERM, before)
        for job in jobs:
            job.process.kill()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def can_start(cell, runs):
    """A cell that starts from its seed's warm model must wait for it."""
    return "warm/model" not in cell.flags or (runs / f"seed-{cell.seed}/warm/model").exists()


def start(cell, runs, model):
    seed_directory = runs / f"seed-{cell.seed}"
    seed_directory.mkdir(exist_ok=True)
    directory = seed_directory / cell.directory
    shutil.rmtree(directory, ignore_errors=True)  # what an interruption left
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(seed_directory / "log.txt", "a") as log:
        process = subprocess.Popen(
            command(cell, model), cwd=seed_directory, env=environment, stdout=log, stderr=log
        )
    return Job(cell, directory, process, time.monotonic())


def stop_if_done(job):
    """Stop a run of dapo that has sampled as many responses as the others do."""
    if "dapo" not in job.cell.name or job.stopped:
        return
    metrics = compare.read_lines(job.directory / "metrics.jsonl")
    if metrics and metrics[-1]["responses"] >= STEPS * RESPONSES:
        job.stopped = True
        job.process.terminate()  # train.py saves and ends; a second signal would kill it


def finish(job, again):
    """Put a run on record, or compare it with its record -> what to print of it.

    Checkpoints and the model are deleted; the files worth reading stay.
    """
    if job.cell.is_warm_start:
        return "ready"
    record = load_record()
    new = read_run(job.directory)
    for folder in ("checkpoints", "model"):
        shutil.rmtree(job.directory / folder, ignore_errors=True)
    accuracies = [f"{fmean(line['correct']) / line['k']:.1%}" for line in new["held_out"]]
    text = " ".join(accuracies)
    if again and job.cell.name in record:
        old = record[job.cell.name]
        old["metrics"]["seconds"] = new["metrics"]["seconds"]  # the one number that may differ
        if old["metrics"] == new["metrics"] and old["held_out"] == new["held_out"]:
            return f"{text}; every number is the one on record"
        return f"{text}; NOT the one on record (other CPUs and versions of PyTorch round otherwise)"
    record[job.cell.name] = new
    save_record(record)
    return text


# ----------------------------------------------------------------------------------------- reports

LAST = "mean@4, last step"
AREA = "mean@4, area under the curve"
PUSHED_UP = "wrong responses pushed up"


def configuration_of(name):
    """hard/copo-0 -> copo"""
    return Path(name).name.rsplit("-", 1)[0]


def select(record, mix, configuration=None):
    """The cells on record of a mix, or of one configuration on it: {name: cell}.

    The middle of the grid of γ and ρ is copo on the even mix, with the grid's seeds.
    """
    selected = {name: cell for name, cell in record.items() if name.startswith(f"{mix}/")}
    if mix == "grid":
        seeds = {cell["flags"]["seed"] for cell in selected.values()}
        for seed in sorted(seeds):
            if f"even/copo-{seed}" in record:
                selected[f"even/copo-{seed}"] = record[f"even/copo-{seed}"]
    if configuration:
        for name in list(selected):
            if configuration_of(name) != configuration:
                del selected[name]
    return selected


def compare_mix(record, mix, folder):
    """Run compare.py on a mix, unpacked in `folder`, and write what it prints and draws.

    -> {(statistic, configuration): its row of the report}
    """
    names = list(select(record, mix))
    argv = [str(folder / name) for name in names]
    baseline = "copo" if mix == "grid" else "grpo"
    for name in names:
        if configuration_of(name) == baseline:
            argv += ["--baseline", str(folder / name)]
            break
    if mix in MIXES and find_spec("matplotlib"):
        argv += ["--plot", str(ATTACHMENTS / f"{mix}.png")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare.main([*argv, "--json", str(folder / "report.json")])
    (ATTACHMENTS / f"{mix}.txt").write_text(printed.getvalue())
    report = json.loads((folder / "report.json").read_text())
    rows = {}
    for row in report["statistics"]:
        first_run = report["runs"][row["configuration"]][0]["path"]
        rows[row["statistic"], configuration_of(first_run)] = row
    return rows


def compare_mixes(record, folder):
    """{mix: what compare_mix() gives}, for every mix on record."""
    ATTACHMENTS.mkdir(parents=True, exist_ok=True)
    unpack(record, folder)
    mixes = dict.fromkeys(name.split("/")[0] for name in record)
    return {mix: compare_mix(record, mix, folder) for mix in mixes}


def gradient_shares(cell):
    """Share of the sampled groups that gave a gradient, by step; groups dropped by dapo did not."""
    metrics = cell["metrics"]
    shares = []
    for trained, drawn, no_gradient in zip(
        metrics["prompts_trained"], metrics["prompts_drawn"], metrics["zero_gradient_groups"]
    ):
        shares.append(trained / drawn * (1 - no_gradient))
    return shares


def mean_gradient_shares(cells):
    """The same, averaged over cells."""
    return [fmean(shares) for shares in zip(*map(gradient_shares, cells))]


def accuracy(cell, i):
    """Held-out mean@k of a cell's i-th evaluation."""
    line = cell["held_out"][i]
    return fmean(line["correct"]) / line["k"]


# ------------------------------------------------------------------------------ tables and picture


def markdown_table(title, header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def mixes_table(record, mixes):
    rows = []
    for mix in mixes:
        cells = select(record, mix, "grpo").values()
        all_wrong = fmean(cell["metrics"]["all_wrong"][0] for cell in cells)
        mixed = fmean(cell["metrics"]["mixed"][0] for cell in cells)
        all_right = abs(1 - all_wrong - mixed)  # abs: no "-0.0%"
        before = fmean(accuracy(cell, 0) for cell in cells)
        shares = [f"{share:.1%}" for share in (all_wrong, mixed, all_right, before)]
        rows.append([mix, *shares])
    title = "Mixes: groups at step 1, held-out mean@4 before it"
    return markdown_table(title, ["mix", "all wrong", "mixed", "all right", "mean@4"], rows)


def results_table(record, mix, report):
    baseline = "copo" if mix == "grid" else "grpo"
    rows = []
    for name in [*CONFIGURATIONS, *GRID]:
        cells = select(record, mix, name).values()
        if not cells:
            continue
        last = report[LAST, name]
        area = report[AREA, name]
        with_gradient = fmean(fmean(gradient_shares(cell)) for cell in cells)
        row = [name, len(cells)]
        row += [compare.value_text(LAST, last), compare.difference_text(last)]
        row += [compare.value_text(AREA, area), compare.difference_text(area)]
        row += [f"{with_gradient:.1%}", f"{report[PUSHED_UP, name]['mean']:.1%}"]
        rows.append(row)
    steps = next(iter(select(record, mix).values()))["flags"]["steps"]
    header = ["configuration", "seeds", "mean@4, last step", f"minus {baseline}"]
    header += ["area under the curve", f"minus {baseline}"]
    header += ["groups with a gradient", "wrong pushed up"]
    return markdown_table(f"{mix}, {steps} steps", header, rows)


def gradient_table(record, mixes):
    rows = []
    for mix in mixes:
        grpo = mean_gradient_shares(select(record, mix, "grpo").values())
        copo = mean_gradient_shares(select(record, mix, "copo").values())
        ratios = [two / max(one, 1e-9) for one, two in zip(grpo, copo)]
        lowest = ratios.index(min(ratios))
        shown = {0: "1"}
        for i in range(EVAL_EVERY - 1, len(ratios), EVAL_EVERY):
            shown[i] = str(i + 1)
        labels = [*shown.items(), (lowest, f"{lowest + 1} (lowest)")]
        for i, label in labels:
            rows.append([mix, label, f"{grpo[i]:.1%}", f"{copo[i]:.1%}", f"{ratios[i]:.2f}"])
    title = "Share of the groups that give a gradient"
    return markdown_table(title, ["mix", "step", "grpo", "copo", "ratio"], rows)


def real_model_table(cells):
    steps = [line["step"] for line in next(iter(cells.values()))["held_out"]]
    rows = []
    for name, cell in cells.items():
        accuracies = [f"{accuracy(cell, i):.1%}" for i in range(len(steps))]
        with_gradient = f"{fmean(gradient_shares(cell)):.1%}"
        rows.append([name.removeprefix("smollm2/"), *accuracies, with_gradient])
    header = ["run", *(f"after step {step}" for step in steps), "groups with a gradient"]
    return markdown_table("SmolLM2-135M, held-out mean@4 of each run", header, rows)


def make_tables(record, reports):
    """The tables of docs/study.md, in Markdown."""
    mixes = []
    for mix in MIXES:
        if select(record, mix, "grpo") and select(record, mix, "copo"):
            mixes.append(mix)
    tables = [mixes_table(record, mixes)]
    for mix in [*mixes, "single", "grid"]:
        if mix in reports:
            tables.append(results_table(record, mix, reports[mix]))
    tables.append(gradient_table(record, mixes))
    real = select(record, "smollm2")
    if real:
        tables.append(real_model_table(real))
    return "\n".join(tables)


def draw_picture(record, reports):
    """Draw who gets a gradient, and what becomes of it -> docs/study/study.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    mixes = [mix for mix in MIXES if mix in reports]
    draw_gradients(left, record, mixes)
    draw_differences(right, reports, mixes)
    figure.savefig(ATTACHMENTS / "study.png", dpi=110)


def draw_gradients(axes, record, mixes):
    """Bars: share of the groups with a gradient at step 1, for grpo and copo."""
    for name, color, offset in (("grpo", "0.6", -0.2), ("copo", "C0", 0.2)):
        heights = []
        for mix in mixes:
            heights.append(mean_gradient_shares(select(record, mix, name).values())[0])
        places = [i + offset for i in range(len(mixes))]
        axes.bar(places, heights, 0.38, color=color, label=name)
    axes.set(xticks=range(len(mixes)), xticklabels=mixes, ylim=(0, 1.15))
    axes.set(title="groups with a gradient, step 1")
    axes.legend(frameon=False, loc="upper center", ncols=2)


def draw_differences(axes, reports, mixes):
    """Points and intervals: accuracy at the last step minus grpo's, by configuration and mix."""
    names = []
    for name in CONFIGURATIONS:
        if name != "grpo" and any((LAST, name) in reports[mix] for mix in mixes):
            names.append(name)
    for i, mix in enumerate(mixes):
        label = mix
        for j, name in enumerate(names):
            row = reports[mix].get((LAST, name))
            if not row or not row["difference"]:
                continue
            mean = 100 * row["difference"]["mean"]
            interval = [100 * bound for bound in row["difference"]["interval"]]
            place = j + 0.22 * (1 - i)
            axes.plot(interval, [place, place], color=f"C{i}")
            axes.plot(mean, place, "o", color=f"C{i}", ms=4, label=label)
            label = None  # once in the legend
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set(title=f"held-out accuracy after {STEPS} steps, minus grpo")
    axes.set(xlabel="points, 95 % interval over seeds, then problems")
    axes.legend(frameon=False, title="mix")


# ------------------------------------------------------------------------------------- the command


def list_cells(cells, record, model):
    for cell in cells:
        state = "done" if cell.name in record else "to do"
        print(f"{state:<6}{cell.name:<28}{shlex.join(command(cell, model)[1:])}")


def cells_to_run(chosen, record, args):
    """The chosen cells that are not on record, and the warm starts that they need."""
    wanted = []
    for cell in chosen:
        on_record = cell.name in record and not args.again
        without_model = "MODEL" in cell.flags and not args.model
        if not (on_record or without_model or cell.is_warm_start):
            wanted.append(cell)
    warm_starts = set()
    for cell in wanted:
        if not can_start(cell, Path(args.runs)):
            warm_starts.add(f"warm-{cell.seed}")
    return [cell for cell in all_cells() if cell in wanted or cell.name in warm_starts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = partial(exit_with_error, "study.py")
    count = number_in(int, "[1, inf)")
    add = parser.add_argument
    add("--jobs", type=count, default=1, help="runs at a time, of one thread each")
    add("--only", default="*", metavar="PATTERN", help="cells whose names match, with * for any")
    add("--again", action="store_true", help="run cells on record too, and compare with the record")
    add("--model", metavar="DIR_OR_ID", help="SmolLM2-135M-Instruct, else no cells smollm2/*")
    add("--runs", default="runs/study", metavar="DIR", help="where the runs go (%(default)s)")
    add("--list", action="store_true", help="print the cells, which are done, and their commands")
    add("--tables", action="store_true", help="print the tables; write pictures to docs/study")
    add("--unpack", metavar="DIR", help="write what is on record there, as runs")
    args = parser.parse_args(argv)
    record = load_record()
    chosen = [cell for cell in all_cells() if fnmatch(cell.name, args.only)]
    if args.unpack:
        unpack(record, Path(args.unpack))
    elif args.list:
        list_cells(chosen, record, args.model)
    elif args.tables:
        with tempfile.TemporaryDirectory() as folder:
            reports = compare_mixes(record, Path(folder))
        print(make_tables(record, reports), end="")
        if find_spec("matplotlib"):
            draw_picture(record, reports)
    else:
        run_cells(cells_to_run(chosen, record, args), args)


if __name__ == "__main__":
    main()
