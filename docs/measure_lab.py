"""Measure the figures of docs/lab.md again: all runs of its experiments, the edited ones included.

    python docs/measure_lab.py WORK    # a new folder; a quarter of an hour on one thread

Clones this repository's last commit into WORK, makes the runs there, and prints their figures, and
while they run the CPU seconds of each. A run that is there already is not made again, so the same
command goes on after an interruption.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM = "--steps 0 --sft-steps 600"
TEN_UPDATES = "--minibatch-prompts 4"  # a step
MINIMUM = "loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)\n    if dual_clip:"
TEMPERATURE = "temperature=args.temperature,\n        on_tokens"
# The edits of the experiments: {name: (file, text, what takes its place)}.
EDITS = {
    "noclip": ("copo.py", MINIMUM, "loss = -ratio * advantages\n    if dual_clip and False:"),
    "maximum": ("copo.py", MINIMUM, MINIMUM.replace("minimum", "maximum")),
    "mismatch": ("train.py", TEMPERATURE, "temperature=0.5,\n        on_tokens"),
}
# {name: flags}; a run whose name begins with that of an edit is made with it.
RUNS = {
    "noclip": "",
    "noclip-off": f"{TEN_UPDATES} --lr 5e-4",
    "clip-off": f"{TEN_UPDATES} --lr 5e-4",
    "flags-off": f"{TEN_UPDATES} --lr 5e-4 --clip-low 1 --clip-high 1e9 --dual-clip 0",
    "maximum": TEN_UPDATES,
    "a": "--steps 8 --max-new-tokens 3",
    "b": "--steps 8 --algo grpo --temperature 0.01",
    "c": "--steps 8 --temperature 0.01",
}
SEEDED_RUNS = {
    "copo": "",
    "group": "--blend soft-zero-group",
    "grpo": "--algo grpo",
    "clip-small": TEN_UPDATES,
    "noclip-small": TEN_UPDATES,
    "mismatch": "",
    "half": "--temperature 0.5",
}
SEEDS = (0, 1, 2)
# Of each run: the first, the lowest and the highest value over its steps, and the last.
METRICS = (
    "accuracy",
    "mixed",
    "finished",
    "length_mean",
    "consistency_entropy",
    "token_entropy",
    "zero_gradient_groups",
    "grad_norm",
    "grad_norm_max",
    "clip_fraction_global",
    "sampler_difference",
    "sampler_difference_max",
)


def run_quietly(command, folder):
    """Run a command on one thread -> its output; its errors show."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout


def edit_of(name):
    for edit in EDITS:
        if name.startswith(edit):
            return edit
    return None


def apply_edit(folder, edit):
    """Edit the clone; ValueError if the text to edit is not there."""
    file, text, replacement = EDITS[edit]
    path = folder / file
    source = path.read_text(encoding="utf-8")
    if source.count(text) != 1:
        raise ValueError(f"{file} no longer has the text that the edit {edit} replaces")
    path.write_text(source.replace(text, replacement), encoding="utf-8")


def cpu_seconds():
    """CPU seconds of the commands that have ended; other work on the machine adds nothing."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_run(folder, name, flags):
    """One run of train.py in the clone, unless it is there; edited if its name says so."""
    directory = folder / "runs/small" / name
    if (directory / "model").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was interrupted
    run_quietly(["git", "checkout", "--quiet", "."], folder)  # and its edit
    edit = edit_of(name)
    if edit:
        apply_edit(folder, edit)
    before = cpu_seconds()
    command = [sys.executable, "train.py", *shlex.split(flags), "--run-dir", directory]
    run_quietly([str(word) for word in command], folder)
    if not (directory / "model").exists():
        raise ValueError(f"the run {name} has failed")
    print(f"{name}: {cpu_seconds() - before:.0f} s", file=sys.stderr, flush=True)


def failing_tests(folder, edit):
    """The last line of pytest on the mathematics, with an edit."""
    run_quietly(["git", "checkout", "--quiet", "."], folder)
    apply_edit(folder, edit)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_copo.py"]
    return run_quietly(command, folder).splitlines()[-1]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def print_run(folder, name):
    evaluations = read_lines(folder / "runs/small" / name / "eval.jsonl")
    metrics = read_lines(folder / "runs/small" / name / "metrics.jsonl")
    held_out = ", ".join(f"{line['mean']:.1%} after {line['step']}" for line in evaluations)
    print(f"\n{name}: held-out mean@8 {held_out}")
    for metric in METRICS:
        values = [line[metric] for line in metrics if line[metric] is not None]
        if values:
            low, high = min(values), max(values)
            print(f"  {metric:<22} {values[0]:.4g}, {low:.4g} to {high:.4g}, {values[-1]:.4g}")


def print_same(folder, first, second):
    texts = [
        (folder / "runs/small" / name / "groups.jsonl").read_text() for name in (first, second)
    ]
    print(f"groups of {first} and {second}: {'equal' if texts[0] == texts[1] else 'different'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of the clone")
    folder = parser.parse_args().work.resolve()
    if not folder.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    origin = run_quietly(["git", "remote", "get-url", "origin"], folder).strip()
    if origin != str(ROOT):  # edits are undone there: it must be a clone of ours
        parser.error(f"{folder} is no clone of {ROOT} made by this program; name a new folder")
    print("commit", run_quietly(["git", "log", "-1", "--format=%h"], folder).strip())
    make_run(folder, "warm", WARM)
    flags = (folder / "docs/small.flags").read_text(encoding="utf-8")
    runs = dict(RUNS)
    for name, more in SEEDED_RUNS.items():
        for seed in SEEDS:
            runs[f"{name}-{seed}"] = f"{more} --seed {seed}"
    for name, more in runs.items():
        make_run(folder, name, f"{flags} {more}")
    for name in runs:
        print_run(folder, name)
    print_same(folder, "noclip", "copo-0")
    print_same(folder, "noclip-off", "flags-off")
    for edit in ("noclip", "maximum"):
        print(f"tests with the edit {edit}: {failing_tests(folder, edit)}")
    three = ["runs/small/copo-?", "runs/small/group-?", "runs/small/grpo-?"]
    compare = [sys.executable, "study/compare.py", *three, "--baseline", "grpo"]
    print(run_quietly(compare, folder))
    lab = [sys.executable, "study/lab.py"]
    print(run_quietly([*lab, "runs/small/copo-0/groups.jsonl"], folder))
    print(run_quietly([*lab, "runs/small/c/groups.jsonl"], folder))


if __name__ == "__main__":
    main()
