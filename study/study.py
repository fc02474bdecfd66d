"""The study of docs/study.md: seventeen configurations on three mixes of problems, and more runs.

    python study/study.py --jobs 2                      # every cell that is not on record yet
    python study/study.py --only 'hard/copo-0' --again  # does a cell give its record again?
    python study/study.py --list --only 'hard/*'        # the cells, each with its command
    python study/study.py --tables                      # tables and pictures of the record
    python study/study.py --unpack runs/study/runs      # the record as runs, for compare.py

A cell is one run of train.py in a process of its own. What compare.py needs of it goes on record,
into study/record.json. A cell on record is done, so after an interruption the same command goes on.
Two commands may run at a time, on cells of different seeds. Problems are the built-in ones. All
runs of a seed start from the same weights: those of its warm start on all built-in problems (the
cell warm-SEED).

What the search for learning rates finds is filled in by hand, LEARNING_RATES below, and so is the
rule that runs longer, BEST_OTHER. Cells that need either wait for it.

A step is P·G sampled responses. dapo draws more of them for one of its own steps. So a step of dapo
on record is what dapo had made of as many responses, or of slightly fewer; it is stopped when it
has used up its share.
"""

import argparse
import contextlib
import fcntl
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
from statistics import fmean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "study")]
import compare  # noqa: E402
import make_arithmetic  # noqa: E402
from plot import read_lines  # noqa: E402

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
    "copo-group": "--algo copo-group",
    "copo-group-γ20ρ1.5": "--algo copo-group --gamma 20 --rho 1.5",
    "copo-forced": "--algo copo-forced",
    "copo-forced-0.3": "--algo copo-forced --global-coef 0.3",
    "global": "--blend global",
    "dr-grpo": "--algo dr-grpo",
    "dapo": "--algo dapo",
    "batch": "--algo grpo --advantage batch",
    "ngrpo": "--algo grpo --advantage ngrpo",
    "sign": "--algo grpo --advantage sign",
    "w-reinforce": "--algo grpo --advantage w-reinforce",
    "ebpo": "--algo grpo --advantage ebpo",
    "gspo": "--algo grpo --ratio sequence --clip-low 3e-4 --clip-high 4e-4",
    "placebo": "--algo grpo --placebo",
}
RATES = ("1e-4", "2e-4", "4e-4")  # that the search tries
# What it found for each rule that it is run for: the best mean area on the even mix, seeds 5 and 6.
LEARNING_RATES = {
    "grpo": "2e-4",
    "copo": "1e-4",
    "copo-group": "2e-4",
    "copo-forced": "2e-4",
    "ngrpo": "2e-4",
    "w-reinforce": "2e-4",
}
COMMON_RATE = "2e-4"  # of all others, except for
RATE_OF = {"copo-group-γ20ρ1.5": "copo-group", "copo-forced-0.3": "copo-forced", "placebo": "grpo"}
# The best rule beside grpo, copo and copo-forced, by mean area on the hard mix, seeds 0 to 2.
BEST_OTHER = "ebpo"
NOT_OTHER = ("grpo", "copo", "copo-forced", "copo-forced-0.3", "placebo")
ON_SMOLLM2 = ("grpo", "copo-forced", "copo-forced-0.3", "ngrpo")

STEPS = 16  # of a run
RESPONSES = 240  # of a step: P·G
EVAL_EVERY = 4  # steps
EVERY_CELL = "--instruction '' --eval-samples 4 --save-every 0 --verifier-workers 1"
WARM_START = "--sft-steps 600 --run-dir warm"  # the demonstration's, a little longer
SIZES = (
    "--model warm/model --max-prompt-tokens 64 --max-new-tokens 64 --prompts-per-step 40 "
    "--group-size 6 --rollout-batch 0 --beta2 0.95 --minibatch-prompts 10"
)
REAL_MODEL = (
    "--model MODEL --max-prompt-tokens 128 --max-new-tokens 28 --prompts-per-step 8 "
    "--group-size 8 --minibatch-prompts 8 --lr 2e-5 --eval-problems 50 --micro-tokens 2048"
)


# ------------------------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    name: str  # PART/CONFIGURATION-SEED, or warm-SEED; a part is a mix, rate, long or smollm2
    seed: int
    flags: str  # of train.py, but for steps; MODEL stands for --model
    steps: int = 0
    eval_every: int = 0  # steps between the evaluations that go on record

    @property
    def is_warm_start(self):
        return self.name.startswith("warm-")

    @property
    def part(self):
        return self.name.split("/")[0]

    @property
    def configuration(self):
        return configuration_of(self.name)

    @property
    def directory(self):
        """Where its run lies, within the seed's directory."""
        return "warm" if self.is_warm_start else self.name


def configuration_of(name):
    """hard/copo-0 -> copo"""
    return Path(name).name.rsplit("-", 1)[0]


def learning_rate(configuration):
    return LEARNING_RATES.get(RATE_OF.get(configuration, configuration), COMMON_RATE)


def mix_cell(part, mix, configuration, rate, seed, steps=STEPS, eval_every=EVAL_EVERY):
    """A run on a mix, whose files lie beside the seeds' directories."""
    name = f"{part}/{configuration}-{seed}"
    rule = configuration.split("@")[0]
    data = f"--data ../data/{mix}_train.jsonl --eval-data ../data/{mix}_test.jsonl"
    flags = f"{CONFIGURATIONS[rule]} {data} {SIZES} --lr {rate}"
    return Cell(name, seed, flags, steps, eval_every)


def rate_cells(seed):
    cells = [Cell(f"warm-{seed}", seed, WARM_START)]
    for rule in LEARNING_RATES:
        cells += [mix_cell("rate", "even", f"{rule}@{rate}", rate, seed) for rate in RATES]
    return cells


def main_cells(seed):
    cells = [Cell(f"warm-{seed}", seed, WARM_START)]
    for mix in MIXES:
        cells += [mix_cell(mix, mix, name, learning_rate(name), seed) for name in CONFIGURATIONS]
    return cells


def long_cells(seed):
    names = ("grpo", "copo", "copo-forced", BEST_OTHER)
    return [mix_cell("long", "hard", name, learning_rate(name), seed, 64, 8) for name in names]


def real_cells(seed):
    data = f"--data {ROOT}/data/words_train.jsonl --eval-data {ROOT}/data/words_test.jsonl"
    cells = []
    for name in ON_SMOLLM2:
        flags = f"{CONFIGURATIONS[name]} {data} {REAL_MODEL}"
        cells.append(Cell(f"smollm2/{name}-{seed}", seed, flags, steps=24, eval_every=8))
    return cells


def all_cells():
    """Every cell, in the order of running: if time runs out, the last ones are missing."""
    cells = rate_cells(5) + rate_cells(6)
    cells += main_cells(0) + real_cells(0)
    cells += main_cells(1) + main_cells(2) + real_cells(1)
    cells += main_cells(3) + main_cells(4) + real_cells(2)
    cells += long_cells(0) + long_cells(1) + long_cells(2)
    return cells


# -------------------------------------------------------------------------------------- the search


def accuracies(cell):
    """Held-out mean@k of each evaluation of a cell on record."""
    return [fmean(line["correct"]) / line["k"] for line in cell["held_out"]]


def area(cell):
    """The area under a cell's curve: its mean accuracy along the way."""
    steps = [line["step"] for line in cell["held_out"]]
    return float(compare.area_under_curve(accuracies(cell), steps))


def mean_area(record, part, configuration, seeds):
    """Its mean over seeds; None while one of them is not on record."""
    names = [f"{part}/{configuration}-{seed}" for seed in seeds]
    if not all(name in record for name in names):
        return None
    return fmean(area(record[name]) for name in names)


def best(areas):
    """The key of the greatest area, the first of equals; None while one is missing."""
    if None in areas.values():
        return None
    return max(areas, key=areas.get)


def best_rate(record, rule):
    return best({rate: mean_area(record, "rate", f"{rule}@{rate}", (5, 6)) for rate in RATES})


def best_other(record):
    others = [name for name in CONFIGURATIONS if name not in NOT_OTHER]
    return best({name: mean_area(record, "hard", name, (0, 1, 2)) for name in others})


def unsettled(cell, record):
    """What must be settled before a cell may run, in words; "" for nothing."""
    rule = RATE_OF.get(cell.configuration, cell.configuration)
    if cell.part in (*MIXES, "long") and rule in LEARNING_RATES:
        found = best_rate(record, rule)
        if found is None:
            return f"the search for {rule}'s learning rate is not done: --only 'rate/{rule}@*'"
        if found != LEARNING_RATES[rule]:
            return f"{rule}'s best learning rate is {found}: write it into LEARNING_RATES"
    if cell.part == "long" and cell.configuration == BEST_OTHER:
        found = best_other(record)
        if found is None:
            return "BEST_OTHER is not known before 'hard/*-[012]' are on record"
        if found != BEST_OTHER:
            return f"the best other rule is {found}: write it into BEST_OTHER"
    return ""


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
    "right_pushed_down",
    "token_entropy",
    "length_mean",
    "loss",
    "prompts_trained",
    "prompts_drawn",
)


def vote_unit(k):
    """What every credit of a vote of k samples is a whole number of parts of: ties share 1."""
    return math.lcm(*range(1, k + 1))


def equal_groups(directory, coef):
    """What became of the groups of equal verdicts, by step: {column: values}, None without a group.

    share: of the all-wrong (all-right) groups, those with a gradient; adv: their mean effective
    advantage A = w A^l + coef (1 − w) A^g. Both of the groups trained on.
    """
    found = {}  # (verdict, step) -> A of each of its groups
    for line in read_lines(directory / "groups.jsonl"):
        if len(set(line["correct"])) > 1:
            continue
        effective = []
        for weight, local_adv in zip(line["weight"], line["local_adv"]):
            effective.append(weight * local_adv + coef * (1 - weight) * line["global_adv"])
        found.setdefault((line["correct"][0], line["step"]), []).append(effective)
    columns = {}
    for verdict, name in enumerate(("all_wrong", "all_right")):
        shares = columns[f"{name}_share"] = []
        advantages = columns[f"{name}_adv"] = []
        for line in read_lines(directory / "metrics.jsonl"):
            alike = found.get((verdict, line["step"]))
            shares.append(fmean(map(any, alike)) if alike else None)
            advantages.append(fmean(map(fmean, alike)) if alike else None)
    return columns


def read_run(directory, eval_every):
    """A finished run as it goes on record, with steps counted in P·G responses (see above)."""
    info = json.loads((directory / "run.json").read_text())
    flags = info["flags"]
    for name in ("model", "data", "eval_data"):  # they may lie anywhere
        flags[name] = "/".join(Path(flags[name]).parts[-2:])
    unit = flags["prompts_per_step"] * flags["group_size"]

    equal = equal_groups(directory, flags["global_coef"])
    metrics = {name: [] for name in (*COLUMNS, *equal)}
    for i, line in enumerate(read_lines(directory / "metrics.jsonl")):
        if line["responses"] > flags["steps"] * unit:
            break
        line |= {name: values[i] for name, values in equal.items()}
        line["step"] = line["responses"] / unit
        for name in metrics:
            value = line.get(name)  # a step without an update lacks some
            metrics[name].append(round(value, 4) if value else value)

    held_out = []
    evaluations = read_lines(directory / "eval.jsonl")
    for step in range(0, flags["steps"] + 1, eval_every):
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


@contextlib.contextmanager
def record_lock():
    """Held by one command at a time: what another has added in between is not to be lost."""
    RECORD.parent.mkdir(exist_ok=True)
    folder = os.open(RECORD.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def save_record(record):
    first, *others = [cell["flags"] for cell in record.values()]
    shared = {}
    for flag, value in first.items():
        if all(flag in flags and flags[flag] == value for flags in others):
            shared[flag] = value
    lines = []
    for name, cell in sorted(record.items()):
        own = {flag: value for flag, value in cell["flags"].items() if flag not in shared}
        lines.append(f"{json.dumps(name)}: {compact(cell | {'flags': own})}")
    cells = ",\n".join(lines)
    unfinished = RECORD.with_suffix(".partial")
    unfinished.write_text(f'{{"flags": {json.dumps(shared)}, "cells": {{\n{cells}\n}}}}\n')
    os.replace(unfinished, RECORD)


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def unpack(record, folder):
    """Write each cell on record as a run's directory, folder/PART/CONFIGURATION-SEED."""
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
    flags = shlex.split(f"{cell.flags} {EVERY_CELL} --steps {cell.steps} --seed {cell.seed}")
    if not cell.is_warm_start:
        # One of dapo's own steps may be worth four of the others.
        every = 1 if cell.configuration == "dapo" else cell.eval_every
        flags += ["--eval-every", str(every), "--run-dir", cell.name]
    if model:
        flags = [model if flag == "MODEL" else flag for flag in flags]
    return [sys.executable, str(ROOT / "train.py"), *flags]


def run_cells(waiting, args):
    """Run cells, --jobs at a time, always the first that can start.

    One that fails is named, and the others go on. What is left at the end waits for something.
    """
    runs = Path(args.runs).resolve()
    if not (runs / "data").exists():
        make_mixes(runs / "data")
    jobs = []
    failed = []
    record = load_record()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # here it must end the runs too
    # As Ctrl-C does, SIGTERM ends them too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while True:
            cell = next((cell for cell in waiting if not obstacle(cell, runs, record)), None)
            if cell and len(jobs) < args.jobs:
                waiting.remove(cell)
                jobs.append(start(cell, runs, args.model))
            if not jobs:
                break
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
                record = load_record()
    finally:
        signal.signal(signal.SIGTERM, before)
        for job in jobs:
            job.process.kill()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if waiting:
        why = obstacle(waiting[0], runs, record)
        exit_with_error("study.py", f"{waiting[0].name} and {len(waiting) - 1} more wait: {why}")


def obstacle(cell, runs, record):
    """Why a cell cannot start yet, in words; "" if it can."""
    if not is_warm(cell, runs):
        return f"warm-{cell.seed} is not there"
    return unsettled(cell, record)


def is_warm(cell, runs):
    """Whether what a cell starts from, which may be its seed's warm model, is there."""
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
    metrics = read_lines(job.directory / "metrics.jsonl")
    if metrics and metrics[-1]["responses"] >= job.cell.steps * RESPONSES:
        job.stopped = True
        job.process.terminate()  # train.py saves and ends; a second signal would kill it


def finish(job, again):
    """Put a run on record, or compare it with its record -> what to print of it.

    Checkpoints and the model are deleted; the files worth reading stay.
    """
    if job.cell.is_warm_start:
        return "ready"
    new = read_run(job.directory, job.cell.eval_every)
    for folder in ("checkpoints", "model"):
        shutil.rmtree(job.directory / folder, ignore_errors=True)
    text = " ".join(f"{share:.1%}" for share in accuracies(new))
    with record_lock():
        record = load_record()
        old = record.get(job.cell.name)
        if old is None or not again:
            record[job.cell.name] = new
            save_record(record)
            return text
    old["metrics"]["seconds"] = new["metrics"]["seconds"]  # the one number that may differ
    if old["metrics"] == new["metrics"] and old["held_out"] == new["held_out"]:
        return f"{text}; every number is the one on record"
    return f"{text}; NOT the one on record (other CPUs and versions of PyTorch round otherwise)"


# ----------------------------------------------------------------------------------------- reports

LAST = "mean@4, last step"
AREA = "mean@4, area under the curve"
GAIN = "mean@4, gain"
BESIDE = {  # statistics that stand beside accuracy, with their columns' names
    "pass@4, last step": "pass@4",
    "maj@4, last step": "maj@4",
    "recovery": "recovery",
    "token entropy, last step": "token entropy",
    "response length, last step": "length",
    "wrong responses pushed up": "wrong pushed up",
}
LEVEL = 0.05  # of significance
TEST_SEEDS = 5  # of the paired t test, which so has 4 degrees of freedom
CURVES = ("grpo", "copo", "copo-group", "copo-forced", "ngrpo", "w-reinforce", "placebo")


def select(record, part, configuration=None):
    """The cells on record of a part, or of one configuration in it: {name: cell}."""
    selected = {}
    for name, cell in record.items():
        if name.startswith(f"{part}/") and configuration in (None, configuration_of(name)):
            selected[name] = cell
    return selected


def compare_part(record, part, folder):
    """Run compare.py on a part, unpacked in `folder`, and write what it prints.

    -> {configuration: {statistic: its row of the report}}
    """
    argv = [str(folder / name) for name in select(record, part)]
    grpo = next(iter(select(record, part, "grpo")), None)
    if grpo:
        argv += ["--baseline", str(folder / grpo)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compare.main([*argv, "--json", str(folder / "report.json")])
    (ATTACHMENTS / f"{part}.txt").write_text(printed.getvalue())
    report = json.loads((folder / "report.json").read_text())
    rows = {}
    for row in report["statistics"]:
        first_run = report["runs"][row["configuration"]][0]["path"]
        rows.setdefault(configuration_of(first_run), {})[row["statistic"]] = row
    return {name: rows[name] for name in CONFIGURATIONS if name in rows}


def compare_parts(record, folder):
    """{part: what compare_part() gives}, for every part on record but the search."""
    ATTACHMENTS.mkdir(parents=True, exist_ok=True)
    unpack(record, folder)
    parts = [part for part in (*MIXES, "long", "smollm2") if select(record, part)]
    return {part: compare_part(record, part, folder) for part in parts}


def gradient_share(cell):
    """Share of the sampled groups that gave a gradient; groups dropped by dapo did not."""
    metrics = cell["metrics"]
    shares = []
    for trained, drawn, no_gradient in zip(
        metrics["prompts_trained"], metrics["prompts_drawn"], metrics["zero_gradient_groups"]
    ):
        shares.append(trained / drawn * (1 - no_gradient))
    return fmean(shares)


def mean_over_steps(cells, column):
    """The mean of a column of metrics over cells and steps that have a value; None without one."""
    values = []
    for cell in cells:
        values += [value for value in cell["metrics"][column] if value is not None]
    return fmean(values) if values else None


# --------------------------------------------------------------------------------------- the t test


def student_cdf(t):
    """The distribution function of Student's t with 4 degrees of freedom, in closed form."""
    s = t / math.sqrt(4 + t * t)
    return 1 / 2 + 3 / 4 * (s - s**3 / 3)


def p_value(differences):
    """Two-sided, of a paired t test on one difference a seed."""
    assert len(differences) == TEST_SEEDS
    error = stdev(differences) / math.sqrt(TEST_SEEDS)
    if error == 0:
        return 0.0 if any(differences) else 1.0
    return 2 * (1 - student_cdf(abs(fmean(differences)) / error))


def holm(p_values):
    """Corrected for their number, by Holm's steps: {key: p} -> {key: corrected p}, least first."""
    corrected = {}
    largest = 0.0
    for i, key in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, p_values[key] * (len(p_values) - i)))
        corrected[key] = largest
    return corrected


def area_tests(reports):
    """p of the area's difference to grpo, for each (mix, configuration) with all seeds."""
    p_values = {}
    for mix in MIXES:
        for name, statistics in reports.get(mix, {}).items():
            difference = statistics[AREA]["difference"]
            if difference and len(difference["runs"]) == TEST_SEEDS:
                p_values[mix, name] = p_value(difference["runs"])
    return p_values


# ------------------------------------------------------------------------------ tables and picture


def markdown_table(title, header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def percent(share):
    return "" if share is None else f"{share:.1%}"


def rate_table(record):
    """Area under the curve, mean of the search's seeds, for each rate that was tried."""
    rows = []
    for rule in LEARNING_RATES:
        areas = [mean_area(record, "rate", f"{rule}@{rate}", (5, 6)) for rate in RATES]
        rows.append([rule, *map(percent, areas), best_rate(record, rule) or ""])
    title = "The search: area under the curve on the even mix, mean of seeds 5 and 6"
    return markdown_table(title, ["rule", *RATES, "best"], rows)


def mixes_table(record, reports):
    rows = []
    for mix in MIXES:
        cells = select(record, mix, "grpo").values()
        if not cells:
            continue
        all_wrong = fmean(cell["metrics"]["all_wrong"][0] for cell in cells)
        mixed = fmean(cell["metrics"]["mixed"][0] for cell in cells)
        all_right = abs(1 - all_wrong - mixed)  # abs: no "-0.0%"
        before = fmean(accuracies(cell)[0] for cell in cells)
        row = [mix, *map(percent, (all_wrong, mixed, all_right, before))]
        gain = reports[mix].get("placebo", {}).get(GAIN)
        row.append(compare.value_text(GAIN, gain, sign="+") if gain else "")
        rows.append(row)
    header = ["mix", "all wrong", "mixed", "all right", "mean@4", "placebo's change of mean@4"]
    title = (
        "The mixes: grpo's groups at step 1, held-out mean@4 before it, and what the control does"
    )
    return markdown_table(title, header, rows)


def accuracy_table(record, part, report, corrected):
    """Accuracy of each configuration, with its differences to grpo and both marks."""
    rows = []
    for name, statistics in report.items():
        cells = select(record, part, name).values()
        rate = next(iter(cells))["flags"]["lr"]
        row = [name, f"{rate:.0e}".replace("e-0", "e-"), len(cells)]
        for statistic in (LAST, AREA):
            row.append(compare.value_text(statistic, statistics[statistic]))
            row.append(compare.difference_text(statistics[statistic]))
        if corrected.get((part, name), 1) < LEVEL:
            row[-1] += " †"
        rows.append(row)
    header = ["configuration", "rate", "seeds", "mean@4, last step", "minus grpo"]
    header += ["area under the curve", "minus grpo"]
    return markdown_table(f"{part}: accuracy", header, rows)


def beside_table(record, part, report):
    """What goes with the accuracies, as means over seeds."""
    rows = []
    for name, statistics in report.items():
        row = [name]
        for statistic in BESIDE:
            text = ""
            if statistic in statistics:
                mean = {"mean": statistics[statistic]["mean"], "interval": None}
                text = compare.value_text(statistic, mean)
            row.append(text)
        cells = select(record, part, name).values()
        rows.append([*row, percent(fmean(map(gradient_share, cells)))])
    header = ["configuration", *BESIDE.values(), "groups with a gradient"]
    return markdown_table(f"{part}: what goes with it", header, rows)


def equal_groups_table(record, reports):
    """The share of all-wrong and all-right groups with a gradient, and their mean advantage."""
    mixes = [mix for mix in MIXES if mix in reports]
    rows = []
    for name in CONFIGURATIONS:
        row = [name]
        for mix in mixes:
            cells = select(record, mix, name).values()
            for kind in ("all_wrong", "all_right"):
                share = mean_over_steps(cells, f"{kind}_share")
                advantage = mean_over_steps(cells, f"{kind}_adv")
                row.append("" if share is None else f"{share:.0%}, {advantage:+.2f}")
        if any(row[1:]):
            rows.append(row)
    header = ["configuration"]
    for mix in mixes:
        header += [f"{mix}: all wrong", f"{mix}: all right"]
    title = "Groups of equal verdicts: the share with a gradient, their mean effective advantage"
    return markdown_table(title, header, rows)


def steps_table(record, part, report):
    """Accuracy along the way, mean over seeds, and of each seed at the last step."""
    rows = []
    for name in report:
        curves = [accuracies(cell) for cell in select(record, part, name).values()]
        lasts = ", ".join(percent(curve[-1]) for curve in curves)
        rows.append([name, *(percent(fmean(values)) for values in zip(*curves)), lasts])
    cell = next(iter(select(record, part).values()))
    steps = [f"step {line['step']}" for line in cell["held_out"]]
    header = ["configuration", *steps, "each seed, last step"]
    return markdown_table(f"{part}: mean@4 along the way", header, rows)


def marks_table(reports, corrected):
    """How many differences on the mixes are marked, and how many would be by chance."""
    rows = []
    for statistic in (LAST, AREA):
        texts = []
        for mix in MIXES:
            for statistics in reports.get(mix, {}).values():
                difference = statistics[statistic]["difference"]
                if difference and len(difference["runs"]) >= compare.STAR_SEEDS:
                    texts.append(compare.difference_text(statistics[statistic]))
        starred = [text for text in texts if text.endswith("*")]
        rows.append([f"* {statistic}", len(texts), len(starred), f"{len(texts) / 20:.1f}"])
    daggers = [p for p in corrected.values() if p < LEVEL]
    rows.append([f"† {AREA}", len(corrected), len(daggers), "0.05 at most"])
    header = ["mark", "differences to grpo", "marked", "by chance, were all of them 0"]
    return markdown_table("The marks, over rules and mixes", header, rows)


def seeds_table(reports, statistic):
    """The difference to grpo of each seed by itself, in points, from seed 0 on."""
    rows = []
    for name in CONFIGURATIONS:
        row = [name]
        for mix in MIXES:
            results = reports.get(mix, {}).get(name, {}).get(statistic)
            by_seed = results["difference"]["runs"] if results and results["difference"] else []
            row.append(", ".join(f"{100 * difference:+.1f}" for difference in by_seed))
        if any(row[1:]):
            rows.append(row)
    title = f"Each seed minus grpo's, points: {statistic}"
    return markdown_table(title, ["configuration", *MIXES], rows)


def make_tables(record, reports):
    """The tables of docs/study.md, in Markdown."""
    corrected = holm(area_tests(reports))
    tables = [rate_table(record), mixes_table(record, reports)]
    for part, report in reports.items():
        tables.append(accuracy_table(record, part, report, corrected))
        if part not in MIXES:
            tables.append(steps_table(record, part, report))
        tables.append(beside_table(record, part, report))
    tables += [equal_groups_table(record, reports), marks_table(reports, corrected)]
    tables += [seeds_table(reports, statistic) for statistic in (LAST, AREA)]
    return "\n".join(tables)


def draw_curves(record, folder):
    """Draw held-out curves of some rules, and of all long runs -> docs/study/PART.png."""
    for part in (*MIXES, "long"):
        names = list(CONFIGURATIONS) if part == "long" else CURVES
        runs = {}
        for name in names:
            cells = select(record, part, name)
            if cells:
                runs[name] = [compare.load_run(str(folder / cell)) for cell in cells]
        if runs:
            compare.plot_curves(runs, ATTACHMENTS / f"{part}.png")


def draw_difference(axes, place, name, difference, marked):
    """A point with its interval, filled if marked; rules with a global term are blue."""
    color = "0.35"
    if "copo" in name or name == "global":
        color = "C0"
    axes.plot([100 * bound for bound in difference["interval"]], [place, place], color=color)
    inside = color if marked else "white"
    axes.plot(100 * difference["mean"], place, "o", color=color, markerfacecolor=inside)


def draw_differences(reports):
    """Draw each rule's area minus grpo's, with its interval, a panel a mix -> study.png."""
    from matplotlib.figure import Figure

    corrected = holm(area_tests(reports))
    mixes = [mix for mix in MIXES if mix in reports]
    if not mixes:
        return
    names = [name for name in CONFIGURATIONS if name != "grpo"]
    figure = Figure(figsize=(10, 5), layout="tight")
    panels = figure.subplots(1, len(mixes), sharey=True, squeeze=False)[0]
    for axes, mix in zip(panels, mixes):
        for place, name in enumerate(names):
            row = reports[mix].get(name, {}).get(AREA)
            if row and row["difference"]:
                marked = corrected.get((mix, name), 1) < LEVEL
                draw_difference(axes, place, name, row["difference"], marked)
        axes.axvline(0, color="0.6", lw=0.8, zorder=0)
        axes.set(title=f"{mix} mix", xlabel="points")
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    figure.suptitle(
        "area under the held-out curve minus GRPO's, 95 % intervals\n"
        "blue: with a global term; filled: significant after correction"
    )
    figure.savefig(ATTACHMENTS / "study.png", dpi=110)


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
        if not is_warm(cell, Path(args.runs)):
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
    if args.model and Path(args.model).exists():
        args.model = str(Path(args.model).resolve())  # cells run in directories of their own
    record = load_record()
    chosen = [cell for cell in all_cells() if fnmatch(cell.name, args.only)]
    if args.unpack:
        try:
            unpack(record, Path(args.unpack))
        except OSError as error:
            parser.error(error)
    elif args.list:
        list_cells(chosen, record, args.model)
    elif args.tables:
        with tempfile.TemporaryDirectory() as folder:
            reports = compare_parts(record, Path(folder))
            if find_spec("matplotlib"):
                draw_curves(record, Path(folder))
                draw_differences(reports)
        print(make_tables(record, reports), end="")
    else:
        run_cells(cells_to_run(chosen, record, args), args)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
