"""Send the numbers of a run of train.py to Weights & Biases or TensorBoard.

    python study/track.py runs/mine tensorboard       # a finished run
    python train.py … --track wandb                   # starts this program beside the run

Every number of metrics.jsonl goes there under its own name, those of eval.jsonl as eval/NAME, at
their steps. With --follow, new lines are sent until stdin is closed, which happens when train.py
ends, however it ends. Whatever goes wrong here does not touch the run, and the run can be sent
later. A resumed run is continued: TensorBoard's files are written anew, and wandb gets the steps
that it has not seen.
"""

import argparse
import contextlib
import hashlib
import json
import select
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from plot import fail, read_lines

SECONDS = 10  # between two looks at the files


def numbers_of(line, prefix):
    """The numbers of a line under their names; lists, texts and missing ones are left out."""
    numbers = {prefix + name: x for name, x in line.items() if isinstance(x, int | float)}
    return numbers | {"step": line["step"]}


class Tensorboard:
    """Event files in RUN/tensorboard, written anew from the run's first line."""

    def __init__(self, run, _):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(run / "tensorboard")

    def log(self, numbers):
        step = numbers.pop("step")
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    """A wandb run with an id of its own, which a resumed run finds again."""

    def __init__(self, run, info):
        import wandb

        name = f"{info['started']} {info['host']} {run.name}"
        self.run = wandb.init(
            project="copo",
            id=hashlib.sha256(name.encode()).hexdigest()[:16],
            name=run.name,
            dir=run,
            config=info["flags"],
            resume="allow",
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers):
        self.run.log(numbers)

    def close(self):
        self.run.finish()


class Sent:
    """The last step of each file that a tracker has, kept in the run's directory for wandb."""

    def __init__(self, path):
        self.path = path
        self.steps = json.loads(path.read_text()) if path.is_file() else {}

    def new_lines(self, run, file):
        """Lines of a file after the last step sent."""
        lines = []
        for line in read_lines(run / file):
            if line["step"] > self.steps.get(file, -1):
                lines.append(line)
        return lines

    def note(self, file, line):
        self.steps[file] = line["step"]
        self.path.write_text(json.dumps(self.steps))


def send_new_lines(run, tracker, sent):
    for file, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval/")):
        for line in sent.new_lines(run, file):
            tracker.log(numbers_of(line, prefix))
            sent.note(file, line)


def stdin_is_open():
    """Wait SECONDS for the end of stdin -> False if it came."""
    ready, _, _ = select.select([sys.stdin], [], [], SECONDS)
    return not ready


def send_run(run, kind, follow):
    """Send what is there and, to follow a run, what comes until stdin ends."""
    info = json.loads((run / "run.json").read_text())
    kept = run / f".{kind}-sent"
    if kind == "tensorboard":
        tracker = Tensorboard(run, info)
        kept.unlink(missing_ok=True)
    else:
        tracker = Wandb(run, info)
    sent = Sent(kept)
    with contextlib.closing(tracker):
        while follow and stdin_is_open():
            send_new_lines(run, tracker, sent)
        send_new_lines(run, tracker, sent)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: fail(f"track.py: {message}")
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument("kind", choices=("wandb", "tensorboard"))
    parser.add_argument("--follow", action="store_true", help="go on until stdin is closed")
    args = parser.parse_args(argv)
    later = f"python study/track.py {args.run} {args.kind}"
    try:
        send_run(args.run, args.kind, args.follow)
    except ImportError:
        fail(f"track.py: pip install {args.kind}, and then: {later}")
    except Exception as error:  # trackers have exceptions of their own
        fail(f"track.py: {args.kind}: {error}; to send the run later: {later}")


if __name__ == "__main__":
    main()
