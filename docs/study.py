"""The study of docs/study.md: nine configurations on three mixes of problems; a grid of γ and ρ, one update a step in
place of four, and a small real model for some of them.

    python docs/study.py --jobs 2                          # every cell that is not on record yet, in order
    python docs/study.py --only 'hard/copo-0' --again      # cells by name; again: are these the figures on record?
    python docs/study.py --list --only 'hard/*'            # the cells, each with its command
    python docs/study.py --tables                          # tables and pictures of what is on record
    python docs/study.py --unpack runs/study/runs          # what is on record as runs, for eval.py --compare

A cell is one run of train.py in a process of its own. What eval.py --compare needs of it goes on record, into
docs/study/results.json, and what is on record is done: after an interruption the same command goes on. Problems are
the built-in ones. All runs of a seed start from the same weights: its warm start on all built-in problems (warm-SEED).

A step is P·G sampled responses. dapo draws more of them for one of its own steps; so what is on record as a step of
dapo is what it had made of as many responses, or of slightly fewer, and it is stopped when it has used up its share.
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
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import make_arithmetic  # noqa: E402

from eval import compare, figure_text, read_lines  # noqa: E402

RECORD = ROOT / "docs/study/results.json"

# (level, question) of data/make_arithmetic.py -> its share of a mix, in percent. Level 6 is level 3 with three more
# terms: longer than anything in the warm start.
MIXES = {
    "hard": {(3, "Quiz:"): 15, (6, "Quiz:"): 85},
    "even": {(3, "Quiz:"): 65, (6, "Quiz:"): 35},
    "easy": {(3, "Solve"): 30, (3, "Quiz:"): 70},
}
CONFIGURATIONS = {
    "grpo": "--algo grpo", "copo": "--algo copo", "copo-paper": "--algo copo-paper",
    "soft-zero-group": "--blend soft-zero-group", "global": "--blend global", "dr-grpo": "--algo dr-grpo",
    "dapo": "--algo dapo", "batch": "--algo grpo --advantage batch", "ngrpo": "--algo grpo --advantage ngrpo",
}  # fmt: skip
GRID = {f"γ{g}ρ{r}": f"--gamma {g} --rho {r}" for g in (1, 5, 20) for r in (0.5, 1, 1.5) if (g, r) != (5, 1)}
STEPS, RESPONSES, EVERY = 16, 240, 4  # of a run; of a step, P·G; steps between evaluations
ALL = "--instruction '' --eval-samples 4 --save-every 0 --samples-every 0 --verifier-workers 1"
WARM = "--steps 0 --sft-steps 600 --run-dir warm"  # the demonstration's, a little longer
SIZES = ("--model warm/model --max-prompt-tokens 64 --max-new-tokens 64 --prompts-per-step 40 --group-size 6 "
         "--rollout-batch 0 --lr 2e-4 --beta2 0.95")  # fmt: skip
FOUR = f"--minibatch-prompts 10 --steps {STEPS}"  # updates a step
ONE = f"--minibatch-prompts 40 --steps {2 * STEPS}"  # as in the demonstration
REAL = ("--model MODEL --max-prompt-tokens 128 --max-new-tokens 28 --prompts-per-step 8 --group-size 8 --steps 8 "
        "--minibatch-prompts 8 --lr 2e-5 --eval-problems 50 --micro-tokens 2048")  # fmt: skip
TRAIN, HELD_OUT = 1000, 100  # problems of a mix
COLUMNS = ("step", "tokens", "seconds", "mixed", "all_wrong", "zero_gradient_groups", "wrong_pushed_up", "loss",
           "prompts_trained", "prompts_drawn")  # fmt: skip


class Cell(NamedTuple):
    name: str  # MIX/CONFIGURATION-SEED
    seed: int
    flags: str  # of train.py


def cells():
    """Every cell, in the order in which it is made: what there is no time for is missing at the end."""

    def several(folder, seed, configurations, data, sizes):
        data = f"--data {data}_train.jsonl --eval-data {data}_test.jsonl"
        for name, flags in configurations.items():
            every = 1 if name == "dapo" else EVERY  # one of its own steps may be worth four of the others
            yield Cell(f"{folder}/{name}-{seed}", seed, f"{flags} {data} {sizes} --eval-every {every}")

    def main(seed):
        yield Cell(f"warm-{seed}", seed, WARM)
        for mix in MIXES:
            yield from several(mix, seed, CONFIGURATIONS, f"../data/{mix}", f"{SIZES} {FOUR}")

    def grid(seed):
        return several("grid", seed, GRID, "../data/even", f"{SIZES} {FOUR}")

    some = {name: CONFIGURATIONS[name] for name in ("copo", "soft-zero-group", "grpo")}

    def single(seed):
        return several("single", seed, some, "../data/even", f"{SIZES} {ONE}")

    def real(seed):
        return several("smollm2", seed, some, f"{ROOT}/data/words", REAL)

    parts = [main(0), main(1), main(2), single(0), grid(0), real(0), main(3), main(4), single(1), single(2), grid(1),
             real(1)]  # fmt: skip
    return [cell for part in parts for cell in part]


def longer(row, rng):
    """A problem of level 3 with three more terms, its values within the bounds of all others."""
    text, value = row["problem"], int(row["answer"])
    for _ in range(3):
        term = rng.randint(1, 9)
        sign = rng.choice([sign for sign in (1, -1) if 0 <= value + sign * term <= make_arithmetic.LARGEST])
        text, value = f"{text}{'+-'[sign < 0]}{term}", value + sign * term
    return {"problem": text, "answer": str(value), "level": 6, "require_value": True}


def make_mixes(folder):
    """Writes MIX_train.jsonl, of built-in training problems, and MIX_test.jsonl, of expressions not among them."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    built_in = [json.loads(line) for line in (ROOT / "data/arithmetic_train.jsonl").read_text().splitlines()]
    taken = {row["problem"].removeprefix("Quiz: ").removeprefix("Solve ") for row in built_in}
    fresh = make_arithmetic.make({3: 600}, rng, taken, held_out=True)
    for mix, shares in MIXES.items():
        for name, rows, size in (("train", built_in, TRAIN), ("test", fresh, HELD_OUT)):
            rows, chosen = rows + [longer(row, rng) for row in rows if row["level"] == 3], []
            for kind, percent in shares.items():
                chosen += [r for r in rows if (r["level"], r["problem"].split()[0]) == kind][: size * percent // 100]
            rng.shuffle(chosen)
            (folder / f"{mix}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


# --------------------------------------------------------------------------------------------------------- the record


def collect(run):
    """A finished run as it goes on record; steps are counted in P·G responses, which changes those of dapo alone."""
    about = json.loads((run / "run.json").read_text())
    flags, unit = about["flags"], about["flags"]["prompts_per_step"] * about["flags"]["group_size"]
    for name in ("model", "data", "eval_data"):  # they may lie anywhere
        flags[name] = "/".join(Path(flags[name]).parts[-2:])
    metrics = [line for line in read_lines(run / "metrics.jsonl") if line["responses"] <= flags["steps"] * unit]
    metrics = [line | {"step": line["responses"] / unit} for line in metrics]
    lines, held_out = read_lines(run / "eval.jsonl"), []
    for step in range(0, flags["steps"] + 1, EVERY):
        line = [line for line in lines if line["responses"] <= step * unit][-1]
        votes = math.lcm(*range(1, line["k"] + 1))  # shares of k, and of what ties in a vote leave, as whole numbers
        held_out.append({"step": step, "k": line["k"], "right": [round(x * line["k"]) for x in line["per_problem"]],
                         "votes": [round(x * votes) for x in line["per_problem_maj"]]})  # fmt: skip
    columns = {name: [round(line[name], 4) if line[name] else line[name] for line in metrics] for name in COLUMNS}
    return {"commit": about["commit"], "flags": flags, "held_out": held_out, "metrics": columns}


def load_record():
    """{cell: what collect() gave}. In the file, flags that all cells share stand once."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"flags": {}, "cells": {}}
    return {name: cell | {"flags": record["flags"] | cell["flags"]} for name, cell in record["cells"].items()}


def save_record(found):
    first, *others = [cell["flags"] for cell in found.values()]
    shared = {key: value for key, value in first.items() if all(flags.get(key) == value for flags in others)}
    slim = {name: cell | {"flags": {key: value for key, value in cell["flags"].items() if key not in shared}}
            for name, cell in sorted(found.items())}  # fmt: skip
    lines = [f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in slim.items()]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.with_suffix(".partial").write_text(
        f'{{"flags": {json.dumps(shared)}, "cells": {{\n' + ",\n".join(lines) + "\n}}\n")
    os.replace(RECORD.with_suffix(".partial"), RECORD)


def unpack(found, folder):
    """Each cell on record as the directory of a run, folder/MIX/CONFIGURATION-SEED, for eval.py --compare."""
    for name, cell in found.items():
        lines, metrics = [], cell["metrics"]
        for line in cell["held_out"]:
            votes = math.lcm(*range(1, line["k"] + 1))
            lines.append({"step": line["step"], "k": line["k"], "per_problem": [n / line["k"] for n in line["right"]],
                          "per_problem_maj": [n / votes for n in line["votes"]]})  # fmt: skip
        files = {"run.json": [{"flags": cell["flags"]}], "eval.jsonl": lines,
                 "metrics.jsonl": [dict(zip(metrics, row)) for row in zip(*metrics.values())]}  # fmt: skip
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / name / file).write_text("".join(json.dumps(line) + "\n" for line in content))


# ------------------------------------------------------------------------------------------------------- making cells


def make(waiting, args):
    """Runs cells, --jobs at a time, always the first that can start. One that fails is named, and the rest goes on."""
    runs, running, told, failed = Path(args.runs).resolve(), {}, set(), []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, it ends the runs too
    if not (runs / "data").exists():
        make_mixes(runs / "data")
    try:
        while waiting or running:
            ready = [cell for cell in waiting if "warm/model" not in cell.flags or
                     (runs / f"seed-{cell.seed}/warm/model").exists()][: max(args.jobs - len(running), 0)]  # fmt: skip
            for cell in ready[:1]:
                waiting.remove(cell)
                place = runs / f"seed-{cell.seed}"
                run = place / ("warm" if "warm-" in cell.name else cell.name)
                shutil.rmtree(run, ignore_errors=True)  # what an interruption left
                place.mkdir(exist_ok=True)
                with open(place / "log.txt", "a") as log:
                    process = subprocess.Popen(command(cell, args), cwd=place, env=environment, stdout=log, stderr=log)
                running[process] = cell, run, time.monotonic()
            if waiting and not running:
                raise SystemExit(f"{waiting[0].name} needs warm-{waiting[0].seed}, which is not there")
            time.sleep(0.2)
            for process, (cell, run, started) in list(running.items()):
                lines = read_lines(run / "metrics.jsonl") if "dapo" in cell.name and process not in told else ()
                if lines and lines[-1]["responses"] >= STEPS * RESPONSES:
                    told.add(process)
                    process.terminate()  # once: it saves and ends, see train.py
                if process.poll() is not None:
                    running.pop(process)
                    if process.returncode:
                        failed.append(cell.name)
                        said = f"FAILED, see {runs}/seed-{cell.seed}/log.txt"
                    else:
                        said = finish(cell, run, args.again)
                    print(f"{cell.name}: {time.monotonic() - started:.0f} s, {said}", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            process.kill()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def command(cell, args):
    """The command of a cell, to be run in the directory seed-SEED of the study's runs."""
    flags = f"{cell.flags} {ALL} --seed {cell.seed}" + ("" if "warm-" in cell.name else f" --run-dir {cell.name}")
    return [sys.executable, str(ROOT / "train.py"), *(args.model if f == "MODEL" else f for f in shlex.split(flags))]


def finish(cell, run, again):
    """Puts a run on record, or compares it with what is there; of its files those worth reading stay. What it says."""
    if "warm-" in cell.name:
        return "ready"
    record, new = load_record(), collect(run)
    said = " ".join(f"{mean(line['right']) / line['k']:.1%}" for line in new["held_out"])
    for folder in ("checkpoints", "model"):
        shutil.rmtree(run / folder, ignore_errors=True)
    if again and cell.name in record:
        old = record[cell.name]
        old["metrics"]["seconds"] = new["metrics"]["seconds"]
        same = old["metrics"] == new["metrics"] and old["held_out"] == new["held_out"]
        return f"{said}; {'every figure is' if same else 'NOT'} the one on record"
    save_record(record | {cell.name: new})
    return said


# ---------------------------------------------------------------------------------------------------- tables, pictures

MEAN, AREA, PUSHED = "mean@4, last step", "mean@4, area under the curve", "wrong responses pushed up"


def of(found, mix, configuration=None):
    """{name: cell} of a mix, or of one configuration on it. The middle of γ × ρ is copo on the even mix."""
    own = {name: cell for name, cell in found.items() if name.startswith(f"{mix}/")}
    if mix == "grid":
        own |= {name: found[name] for name in sorted({f"even/copo-{name[-1]}" for name in own} & found.keys())}
    return {name: cell for name, cell in own.items() if configuration in (None, Path(name).name.rsplit("-", 1)[0])}


def compared(found, folder):
    """{mix: {(figure, configuration): its row in the report of eval.py --compare}}; what that prints goes to docs."""
    unpack(found, folder)
    made = {}
    for mix in dict.fromkeys(name.split("/")[0] for name in found):
        runs = list(of(found, mix))
        base = next((name for name in runs if ("/grpo-", "/copo-")[mix == "grid"] in name), None)
        flags = ["--baseline", str(folder / base)] if base else []
        flags += ["--plot", str(RECORD.with_name(f"{mix}.png"))] if find_spec("matplotlib") and mix in MIXES else []
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            flags += ["--json", str(folder / "json")]
            compare(["--compare", *(str(folder / name) for name in runs), *flags])
        RECORD.with_name(f"{mix}.txt").write_text(printed.getvalue())
        report = json.loads((folder / "json").read_text())
        names = {name: Path(same[0]["path"]).name[:-2] for name, same in report["runs"].items()}
        made[mix] = {(row["figure"], names[row["configuration"]]): row for row in report["figures"]}
    return made


def alive(cell):
    """Share of the sampled groups that gave a gradient, by step; those that dapo dropped gave none."""
    metrics = cell["metrics"]
    columns = zip(*(metrics[name] for name in ("prompts_trained", "prompts_drawn", "zero_gradient_groups")))
    return [trained / drawn * (1 - zero) for trained, drawn, zero in columns]


def tables(found, made):
    """The tables of docs/study.md, in Markdown."""
    parts = []

    def table(title, *rows):
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        parts.append("\n".join([f"{title}\n", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n")

    def accuracy(cell, i):
        return mean(cell["held_out"][i]["right"]) / cell["held_out"][i]["k"]

    mixes = [mix for mix in MIXES if of(found, mix, "grpo") and of(found, mix, "copo")]
    rows = []
    for mix in mixes:
        runs = of(found, mix, "grpo").values()
        wrong, mixed = (mean(cell["metrics"][name][0] for cell in runs) for name in ("all_wrong", "mixed"))
        before, right = mean(accuracy(cell, 0) for cell in runs), abs(1 - wrong - mixed)  # abs: no "-0.0%"
        rows.append([mix, *(f"{x:.1%}" for x in (wrong, mixed, right, before))])
    table("Mixes: groups at step 1, held-out mean@4 before it",
          ["mix", "all wrong", "mixed", "all right", "mean@4"], *rows)  # fmt: skip
    for mix in [*mixes, *(mix for mix in ("single", "grid") if mix in made)]:
        rows, base = [], "copo" if mix == "grid" else "grpo"
        steps = next(iter(of(found, mix).values()))["flags"]["steps"]
        for name in [*CONFIGURATIONS, *GRID]:
            if runs := of(found, mix, name).values():
                last, area, pushed = (made[mix][figure, name] for figure in (MEAN, AREA, PUSHED))
                living = f"{mean(mean(alive(cell)) for cell in runs):.1%}"
                rows.append([name, len(runs), figure_text(last), figure_text(last, "+"), figure_text(area),
                             figure_text(area, "+"), living, f"{pushed['mean']:.1%}"])  # fmt: skip
        table(f"{mix}, {steps} steps", ["configuration", "seeds", "mean@4, last step", f"minus {base}",
              "area under the curve", f"minus {base}", "groups with a gradient", "wrong pushed up"], *rows)  # fmt: skip
    rows = []
    for mix in mixes:
        shares = [[mean(step) for step in zip(*map(alive, of(found, mix, name).values()))] for name in ("grpo", "copo")]
        steps = [(step, grpo, copo, copo / max(grpo, 1e-9)) for step, (grpo, copo) in enumerate(zip(*shares), 1)]
        lowest = min(steps, key=lambda row: row[-1])
        for step, grpo, copo, ratio in [steps[0], *steps[EVERY - 1 :: EVERY], (f"{lowest[0]} (lowest)", *lowest[1:])]:
            rows.append([mix, step, f"{grpo:.1%}", f"{copo:.1%}", f"{ratio:.2f}"])
    table("Share of the groups that give a gradient", ["mix", "step", "grpo", "copo", "ratio"], *rows)
    if real := of(found, "smollm2"):
        steps = [line["step"] for line in next(iter(real.values()))["held_out"]]
        rows = [[name.removeprefix("smollm2/"), *(f"{accuracy(cell, i):.1%}" for i in range(len(steps))),
                 f"{mean(alive(cell)):.1%}"] for name, cell in real.items()]  # fmt: skip
        table("SmolLM2-135M, held-out mean@4 of each run", ["run", *(f"after step {step}" for step in steps),
              "groups with a gradient"], *rows)  # fmt: skip
    return "\n".join(parts)


def draw(found, made):
    """One picture: who gets a gradient, and what becomes of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    mixes = [mix for mix in MIXES if mix in made]
    names = [name for name in CONFIGURATIONS if name != "grpo" and any((AREA, name) in made[mix] for mix in mixes)]
    for i, mix in enumerate(mixes):
        for j, name in enumerate(("grpo", "copo")):
            first = mean(alive(cell)[0] for cell in of(found, mix, name).values())
            left.bar(i + 0.4 * j - 0.2, first, 0.38, color=("0.6", "C0")[j], label=None if i else name)
        rows = [(j, made[mix].get((MEAN, name))) for j, name in enumerate(names)]
        rows = [(j, row["difference"]) for j, row in rows if row and row["difference"]]
        for j, row in rows:
            place = j + 0.22 * (1 - i)
            right.plot([100 * x for x in row["interval"]], [place] * 2, color=f"C{i}")
            right.plot(100 * row["mean"], place, "o", color=f"C{i}", ms=4, label=mix if j == rows[0][0] else None)
    left.set(xticks=range(len(mixes)), xticklabels=mixes, ylim=(0, 1.15), title="groups with a gradient, step 1")
    right.axvline(0, color="0.6", lw=0.8)
    right.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5),
              title=f"held-out accuracy after {STEPS} steps, minus grpo",
              xlabel="points, 95 % interval over seeds, then problems")  # fmt: skip
    left.legend(frameon=False, loc="upper center", ncols=2)
    right.legend(frameon=False, title="mix")
    figure.savefig(RECORD.with_name("study.png"), dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    add("--only", default="*", metavar="PATTERN", help="cells by name: MIX/CONFIGURATION-SEED, with * for any")
    add("--again", action="store_true", help="cells that are on record too, and whether their figures come out again")
    add("--model", metavar="DIR_OR_ID", help="SmolLM2-135M-Instruct, for the cells smollm2/*, else left out")
    add("--runs", default="runs/study", metavar="DIR", help="where the runs lie (default %(default)s)")
    add("--list", action="store_true", help="print the cells and their commands, and what is on record")
    add("--tables", action="store_true", help="print the tables; write those of eval.py, and pictures, to docs/study")
    add("--unpack", metavar="DIR", help="write what is on record there, as runs")
    args, record = parser.parse_args(argv), load_record()
    chosen = [cell for cell in cells() if fnmatch(cell.name, args.only)]
    if args.unpack:
        unpack(record, Path(args.unpack))
    elif args.list:
        for cell in chosen:
            state = "done" if cell.name in record else "to do"
            print(f"{state:<6}{cell.name:<28}{shlex.join(command(cell, args)[1:])}")
    elif args.tables:
        with tempfile.TemporaryDirectory() as folder:
            made = compared(record, Path(folder))
        print(tables(record, made), end="")
        if find_spec("matplotlib"):
            draw(record, made)
    else:
        wanted = [cell for cell in chosen if (args.again or cell.name not in record) and "warm-" not in cell.name
                  and (args.model or "MODEL" not in cell.flags)]  # fmt: skip
        seeds = {cell.seed for cell in wanted if "warm/model" in cell.flags}
        seeds -= {seed for seed in seeds if Path(args.runs, f"seed-{seed}/warm/model").exists()}
        make([cell for cell in cells() if cell in wanted or cell.name in {f"warm-{seed}" for seed in seeds}], args)


if __name__ == "__main__":
    main()
