"""Draw a run's accuracy over its steps: sampled training groups, and held-out evaluations with their mean@k.

    python docs/plot_run.py RUN_DIR OUT.png        # needs matplotlib, which nothing else here does
"""

import json
import sys
from pathlib import Path


def main(run_dir, out):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("docs/plot_run.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def read(name):
        return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]

    metrics, held_out = read("metrics.jsonl"), read("eval.jsonl")
    steps = [line["step"] for line in metrics]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[3, 2])
    top.plot(steps, [line["accuracy"] for line in metrics], color="0.6", label="training groups, this step")
    points = [line["step"] for line in held_out], [line["mean"] for line in held_out]
    top.plot(*points, "o-", color="C0", label=f"held out, mean@{held_out[0]['k']}")
    top.set(ylabel="accuracy", ylim=(0, 1))
    top.legend(loc="upper left", frameon=False)
    shares = [[line[name] for line in metrics] for name in ("all_wrong", "mixed", "all_right")]
    labels, colors = ["all wrong", "mixed", "all right"], ["#d98880", "#f7dc6f", "#7dcea0"]
    bottom.stackplot(steps, shares, labels=labels, colors=colors)
    bottom.set(xlabel="step", ylabel="share of groups", ylim=(0, 1))
    bottom.legend(loc="lower left", frameon=True, ncols=3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python docs/plot_run.py RUN_DIR OUT.png")
    main(*sys.argv[1:])
