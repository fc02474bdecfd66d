"""Kills ranks of a run of two, again and again, and asks whether the run is still the one that was
left in peace.

    python tests/kill_ranks.py --kills 50     # about ten minutes; docs/ranks.md has the results

SIGKILL goes to a random rank at a random moment: while it starts, within a step, between a step's
metrics and its checkpoint, within a save. torchrun --max-restarts starts the ranks again, and they
go on by themselves. At the end weights, optimiser state, metrics and files are compared bit for bit
with those of a run that nobody killed."""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny_runs  # noqa: E402

import train  # noqa: E402

FLAGS = {
    "steps": 12,
    "prompts_per_step": 10,
    "minibatch_prompts": 5,
    "micro_tokens": 40,
    "eval_every": 4,
    "keep": 3,
}


def torchrun(argv, restarts, log):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", str(restarts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *argv],
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


def ranks_of(process):
    return {
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    }


def wait(process, happened):
    """Polls for something to happen while the job runs."""
    while not happened():
        if process.poll() is not None:
            raise SystemExit(f"the run ended too early, with {process.returncode}")
        time.sleep(0.002)


def moment(kind, process, directory, dice):
    """Waits for a moment of that kind."""
    saved, metrics = set(directory.glob("checkpoints/step-*")), directory / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    if kind == "starting":
        time.sleep(dice.uniform(0, 4))
    elif kind == "in a step":
        wait(process, lambda: set(directory.glob("checkpoints/step-*")) - saved)
        time.sleep(dice.uniform(0, 0.3))
    elif kind == "after a step":
        wait(process, lambda: metrics.exists() and metrics.stat().st_size not in (0, size))
    else:
        wait(process, lambda: any(directory.glob("checkpoints/.step-*.tmp")))
        time.sleep(dice.uniform(0, 0.03))


def kill_and_compare(folder, kills, seed=0, say=print):
    """The whole experiment -> why the disturbed run is another one, or None; and how many kills
    there were by kind."""
    runs, dice = tiny_runs.Runs(folder), random.Random(seed)
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    log = folder / "log"
    tiny_runs.on_ranks(2, folder / "quiet's log", train.main, runs.argv(FLAGS, run_dir=quiet))
    # "In a step" lets a step pass, of which there are twelve; after the others it is done again.
    others = ("starting", "after a step", "saving")
    kinds = ["in a step" if i < min(10, kills // 4) else others[i % 3] for i in range(kills)]
    dice.shuffle(kinds)
    process, before = torchrun(runs.argv(FLAGS, run_dir=disturbed), kills + 3, log), set()
    done = Counter()
    for kind in kinds:
        wait(process, lambda old=before: len(ranks_of(process) - old) == 2)
        before |= ranks_of(process)
        moment(kind, process, disturbed, dice)
        alive = sorted(ranks_of(process) & before)
        os.kill(dice.choice(alive), signal.SIGKILL)
        done[kind] += 1
        say(
            f"kill {done.total()}/{kills} {kind}; "
            f"{len(list(disturbed.glob('checkpoints/step-*')))} checkpoints"
        )
    assert process.wait(300) == 0, log.read_text()[-3000:]
    return tiny_runs.difference(quiet, disturbed), done


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="copo-kills-") as folder:
        found, done = kill_and_compare(Path(folder), args.kills, args.seed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    print(
        f"{done.total()} kills ({kinds}), "
        f"{time.monotonic() - started:.0f} s: {found or 'the same run, bit for bit'}"
    )
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
