"""Draw a run of train.py as curves.png: held-out accuracy, reward, kinds of groups, lengths.

python study/plot.py runs/mine        # what train.py --plot does at the end of a run
"""

import json
import sys
from pathlib import Path

# Title, file and fields of each picture
PANELS = (
    ("held-out accuracy", "eval.jsonl", ("mean", "maj")),
    ("training", "metrics.jsonl", ("reward", "accuracy")),
    ("kinds of groups", "metrics.jsonl", ("all_wrong", "mixed", "all_right")),
    ("tokens of a response", "metrics.jsonl", ("length_mean", "length_max")),
)


def read_lines(path):
    """The whole lines of a run's JSONL file, which need not exist yet."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def fail(message):
    """One line on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def plot_run(run):
    """Write curves.png into the run's directory -> its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="tight")
    for axes, (title, file, fields) in zip(figure.subplots(2, 2).flat, PANELS):
        lines = read_lines(run / file)
        steps = [line["step"] for line in lines]
        for name in fields:
            axes.plot(steps, [line[name] for line in lines], "o-", markersize=3, label=name)
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
    figure.savefig(run / "curves.png", dpi=110)
    return run / "curves.png"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not Path(argv[0], "run.json").is_file():
        fail("plot.py: name one directory of a run: python study/plot.py runs/mine")
    try:
        print(plot_run(Path(argv[0])))
    except ImportError:
        fail("plot.py: pip install matplotlib, and then: python study/plot.py RUN")
    except (ValueError, OSError, KeyError) as error:
        fail(f"plot.py: {argv[0]}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
