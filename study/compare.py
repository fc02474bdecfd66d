"""Compare runs of train.py by their files: statistics with 95 % intervals, and curves.

    python study/compare.py 'runs/*' --baseline grpo
    python study/compare.py 'runs/copo-?' 'runs/grpo-?' --plot curves.png --json report.json

Runs that differ only in seed, place and speed are one configuration. A difference to the baseline
is taken between runs of the same seed, problem by problem, at the steps that both evaluated.

Shapes: N held-out problems, S seeds of a configuration.
"""

import argparse
import glob
import itertools
import json
import signal
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out under PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plot import read_lines

import copo
from eval import bootstrap_interval
from sampler import exit_with_error

# Flags that say where, how fast or how safely a run was made, and its seed.
NOT_A_CONFIGURATION = {
    "activation_checkpointing",
    "compile",
    "cpu_offload",
    "date",
    "defer_gradient_sync",
    "device",
    "export_dtype",
    "export_every",
    "keep",
    "micro_tokens",
    "plan",
    "plot",
    "resume",
    "rollout_batch",
    "run_dir",
    "save_every",
    "seed",
    "timeout",
    "track",
    "verifier_memory",
    "verifier_timeout",
    "verifier_workers",
}
# Flags that older runs have and train.py no longer has
FORMER_FLAGS = {
    "eval_seed",
    "free_sampler",
    "max_bad_updates",
    "rollout_memory",
    "samples_every",
}
# Flags that older runs lack, with what those runs did
LATER_FLAGS = {
    "kl_estimator": "k3",
    "ratio": "token",
    "placebo": False,
    "float32_matmul_precision": "highest",
}
# How statistics are written that are no shares
FORMS = {
    "tokens sampled": ",.0f",
    "seconds": ",.0f",
    "token entropy, last step": ".3f",
    "response length, last step": ".1f",
}
STAR_SEEDS = 5  # of fewer, an interval over seeds is hardly more than the lowest and the highest


# ----------------------------------------------------------------------------------- reading a run


class TrainedRun(NamedTuple):
    path: str
    flags: dict  # of train.py, by name
    evaluations: dict  # step -> its line of eval.jsonl
    metrics: list  # lines of metrics.jsonl, one per step


def load_run(path):
    """Read a run's files -> TrainedRun; ValueError says why the run cannot be compared.

    A killed run leaves the same files as one that is still going: both count as far as they got.
    """
    try:
        info = json.loads(Path(path, "run.json").read_text(encoding="utf-8"))
        evaluations = {line["step"]: line for line in read_lines(Path(path, "eval.jsonl"))}
        metrics = read_lines(Path(path, "metrics.jsonl"))
        run = TrainedRun(path, info["flags"], evaluations, metrics)
        check_run(run, info)
        # A field that they need and that is missing raises here, not later.
        group_runs([run])
        run_statistics(run, run.evaluations)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"unreadable: {type(error).__name__}: {error}") from error
    return run


def check_run(run, info):
    """Raise ValueError for a run that failed, has no result or changed its configuration."""
    if info.get("format", 1) not in (1, 2):
        raise ValueError(f"run.json has format {info['format']}; this program reads 1 and 2")
    ended = info.get("ended", {})
    if ended.get("how") == "failed":
        raise ValueError(f"failed after step {ended['step']}: {ended['why']}")
    for resumed in info.get("resumed", ()):
        changed = ", ".join(name for name in resumed["changed"] if name not in NOT_A_CONFIGURATION)
        if changed:
            raise ValueError(
                f"two configurations in one run, which was resumed with another {changed}"
            )
    sizes = {len(line["per_problem"]) for line in run.evaluations.values()}
    if not sizes:
        raise ValueError("no evaluation yet")
    if len(sizes) > 1:
        raise ValueError("evaluations of different problems")
    if run.metrics:
        last = run.metrics[-1]
        if last["loss"] is None and last["prompts_trained"]:
            raise ValueError(f"no update of its last step, {last['step']}, was finite")


def find_runs(patterns):
    """Directories and globs -> ({path: TrainedRun}, {path: why it is left out})."""
    runs = {}
    failed = {}
    for pattern in patterns:
        paths = [str(Path(path)) for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]
        if not paths:
            raise ValueError(f"{pattern}: no such directory")
        for path in paths:
            try:
                runs[path] = load_run(path)
            except ValueError as error:
                failed[path] = str(error)
    if not runs:
        reasons = [f"{path}: {reason}" for path, reason in failed.items()]
        raise ValueError(f"nothing to compare: {'; '.join(reasons)}")
    return runs, failed


# ---------------------------------------------------------------------------------- configurations


def configuration(flags):
    """The flags in which two configurations may differ; a flag without a value counts as absent."""
    config = dict(LATER_FLAGS)
    for name, value in flags.items():
        if value is not None and name not in NOT_A_CONFIGURATION | FORMER_FLAGS:
            config[name] = value
    for name in ("data", "eval_data", "model"):
        # Only the last two names: a repository may lie anywhere.
        if flags.get(name):
            config[name] = "/".join(Path(flags[name]).parts[-2:])
    return config


def differing_flags(config, others):
    """The flags of a configuration that are not the same in all the others."""
    differing = {}
    for name in sorted(set().union(*others)):
        values = {json.dumps(other.get(name)) for other in others}
        if len(values) > 1:
            differing[name] = config.get(name)
    return differing


def group_runs(runs):
    """Group runs by configuration -> ({name: runs by seed}, {name: {flag: value}}).

    A configuration is named after its preset and what tells it both from that preset and from
    others of it. The flags are those in which the configurations differ.
    """
    configs = {}
    grouped = {}
    for run in sorted(runs, key=lambda run: run.flags["seed"]):
        config = configuration(run.flags)
        key = json.dumps(config, sort_keys=True)
        configs[key] = config
        same = grouped.setdefault(key, [])
        if same and same[-1].flags["seed"] == run.flags["seed"]:
            raise ValueError(
                f"{same[-1].path} and {run.path}: equal flags and one seed; leave out one of them"
            )
        same.append(run)
    by_config = {}
    flags = {}
    for key, config in configs.items():
        algo = config["algo"]
        rivals = [other for other in configs.values() if other["algo"] == algo]
        usual = dict(LATER_FLAGS)
        if algo in copo.PRESETS:
            usual |= asdict(copo.PRESETS[algo])
        parts = [algo]
        for flag, value in differing_flags(config, rivals).items():
            if flag not in usual or value != usual[flag]:
                parts.append(f"{flag}={value}")
        name = " ".join(parts)
        by_config[name] = grouped[key]
        flags[name] = differing_flags(config, list(configs.values()))
    return by_config, flags


# -------------------------------------------------------------------------------------- statistics


def area_under_curve(means, steps):
    """The mean accuracy along the way: means (steps,) or (steps,N) -> scalar or (N,)."""
    if len(steps) == 1:
        return means[0]
    # 1/(s_E − s_0) ∫ accuracy ds, by trapezoids
    return np.trapezoid(means, steps, axis=0) / (steps[-1] - steps[0])


def run_statistics(run, steps):
    """Statistics of the evaluations at `steps`, and of training up to the last of these steps.

    -> {name: (N,) one value per problem, or (1,)}
    """
    steps = sorted(steps)
    evaluations = [run.evaluations[step] for step in steps]
    k = evaluations[0]["k"]
    means = np.array([line["per_problem"] for line in evaluations])  # (steps,N)
    votes = np.array([line["per_problem_maj"] for line in evaluations])
    best = means.mean(axis=1).argmax()  # the first of the best; the vote is that of the same step
    solved = means > 0  # pass@k of k samples: one of them is correct
    statistics = {
        f"mean@{k}, last step": means[-1],
        f"mean@{k}, best step": means[best],
        f"maj@{k}, last step": votes[-1],
        f"maj@{k}, best step": votes[best],
        f"mean@{k}, area under the curve": area_under_curve(means, steps),
        f"mean@{k}, gain": means[-1] - means[0],
        f"pass@{k}, last step": solved[-1].astype(np.float64),
    }
    if not solved[0].all():
        # Of the problems without a correct sample at first, those that have one at last
        statistics["recovery"] = solved[-1][~solved[0]].mean()
    metrics = [line for line in run.metrics if line["step"] <= steps[-1]]
    if metrics:
        statistics["tokens sampled"] = metrics[-1]["tokens"]
        statistics["seconds"] = sum(line["seconds"] for line in metrics)
        # Groups that dynamic sampling dropped had equal verdicts too.
        equal = [line.get("equal_groups_drawn", 1 - line["mixed"]) for line in metrics]
        no_gradient = [line["zero_gradient_groups"] for line in metrics]
        pushed_up = [line["wrong_pushed_up"] for line in metrics]
        if metrics[-1].get("token_entropy") is not None:  # a step without an update has none
            statistics["token entropy, last step"] = metrics[-1]["token_entropy"]
        statistics["response length, last step"] = metrics[-1]["length_mean"]
        statistics["groups of equal verdicts"] = np.mean(equal)
        statistics["groups without gradient"] = np.mean(no_gradient)
        statistics["wrong responses pushed up"] = np.mean(pushed_up)
    return {name: np.atleast_1d(values) for name, values in statistics.items()}


def summary(by_run):
    """Mean and interval of values (S,N) or (S,1), and the mean of each run."""
    values = np.array(by_run, dtype=np.float64)
    interval = bootstrap_interval(values) if values.size > 1 else None
    return {"mean": values.mean(), "interval": interval, "runs": values.mean(axis=1).tolist()}


def pair_runs(runs, baseline_runs):
    """Pair runs with the baseline's of the same seed -> [(their statistics, the baseline's)].

    At the steps that both evaluated: half a run against a whole one says nothing.
    """
    by_seed = {run.flags["seed"]: run for run in baseline_runs}
    pairs = []
    for run in runs:
        other = by_seed.get(run.flags["seed"])
        if other is None:
            continue
        steps = set(run.evaluations) & set(other.evaluations)
        if steps:
            pairs.append((run_statistics(run, steps), run_statistics(other, steps)))
    return pairs


def compare_runs(by_config, baseline):
    """One dict per statistic and configuration: its mean, interval and difference to baseline."""
    rows = []
    for name, runs in by_config.items():
        by_run = [run_statistics(run, run.evaluations) for run in runs]
        pairs = []
        if baseline not in (None, name):
            pairs = pair_runs(runs, by_config[baseline])
        for statistic in dict.fromkeys(itertools.chain(*by_run)):
            values = [one[statistic] for one in by_run if statistic in one]
            differences = []
            for own, other in pairs:
                if statistic in own and statistic in other:
                    differences.append(own[statistic] - other[statistic])
            row = {"statistic": statistic, "configuration": name}
            row |= summary(values)
            row["difference"] = summary(differences) if differences else None
            rows.append(row)
    order = [row["statistic"] for row in rows]
    return sorted(rows, key=lambda row: order.index(row["statistic"]))


def make_report(runs, failed, baseline):
    """Compare the runs -> (the report that --json writes, {configuration: its runs})."""
    by_config, flags = group_runs(runs.values())
    evaluated = set()
    for run in runs.values():
        file = Path(run.flags["eval_data"]).name
        for line in run.evaluations.values():
            evaluated.add((line["k"], len(line["per_problem"]), file))
    if len(evaluated) > 1:
        raise ValueError(
            f"runs were evaluated on different things, (k, problems, file): {sorted(evaluated)}"
        )
    if baseline:
        config_of = {run.path: name for name, same in by_config.items() for run in same}
        baseline = config_of.get(str(Path(baseline)), baseline)
        if baseline not in by_config:
            names = "; ".join(by_config)
            raise ValueError(f"--baseline {baseline} is neither one of the runs nor one of {names}")
    described = {}
    for name, same in by_config.items():
        described[name] = [
            {
                "path": run.path,
                "seed": run.flags["seed"],
                "step": max(run.evaluations),
                "of": run.flags["steps"],
            }
            for run in same
        ]
    report = {
        "problems": min(evaluated)[1],
        "baseline": baseline,
        "flags": flags,
        "runs": described,
        "failed": failed,
        "statistics": compare_runs(by_config, baseline),
    }
    return report, by_config


# ------------------------------------------------------------------------------ tables and picture


def value_text(statistic, result, sign=""):
    """A mean with its interval, as text; sign "+" writes a plus before positive numbers."""
    form = f"{{:{sign}{FORMS.get(statistic, '.1%')}}}"
    text = form.format(result["mean"])
    if result["interval"]:
        low, high = result["interval"]
        text += f" [{form.format(low)}, {form.format(high)}]"
    return text


def difference_text(row):
    """The difference to the baseline as text, starred where its interval excludes 0 (see below)."""
    difference = row["difference"]
    if difference is None:
        return ""
    text = value_text(row["statistic"], difference, sign="+")
    if difference["interval"]:
        low, high = difference["interval"]
        if low * high > 0 and len(difference["runs"]) >= STAR_SEEDS:
            text += " *"
    return text


def print_table(rows):
    """Print rows of texts, the first of them the header: aligned, and valid Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    for row in [rows[0], rule, *rows[1:]]:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |")


def seed_text(run):
    if run["step"] < run["of"]:
        return f"{run['seed']} (unfinished: step {run['step']} of {run['of']})"
    return str(run["seed"])


def print_report(report):
    """Print the configurations, their statistics, and what one must know to read them."""
    names_of_flags = next(iter(report["flags"].values()))
    rows = [["configuration", *names_of_flags, "seeds"]]
    for name, flags in report["flags"].items():
        seeds = ", ".join(seed_text(run) for run in report["runs"][name])
        rows.append([name, *map(str, flags.values()), seeds])
    print_table(rows)
    print()
    for path, reason in report["failed"].items():
        print(f"failed, and in no statistic: {path}: {reason}\n")

    rows = [["statistic", "configuration", "value [95 % interval]"]]
    if report["baseline"]:
        rows[0].append(f"minus {report['baseline']}")
    for row in report["statistics"]:
        cells = [row["statistic"], row["configuration"], value_text(row["statistic"], row)]
        if report["baseline"]:
            cells.append(difference_text(row))
        rows.append(cells)
    print_table(rows)

    print_notes(report)


def print_notes(report):
    """What the statistics, intervals and stars mean, and how many stars chance would give."""
    print(f"\n{report['problems']} held-out problems. Best step: each run's evaluation with")
    print(
        "the highest mean, chosen on these same problems, which flatters it. Gain: last evaluation"
    )
    print("minus first. Recovery: of the problems without a correct sample at the first, the share")
    print(
        "that has one at the last. Rows from tokens on are of training, up to the last evaluation;"
    )
    print("entropy in nats, length in tokens; shares of groups and responses are means over steps.")
    print("Intervals: bootstrap over seeds, then problems; from recovery on over seeds alone.")
    lone = [name for name, runs in report["runs"].items() if len(runs) == 1]
    if lone:
        print(
            "One seed, so over problems only, which says nothing of other seeds:", "; ".join(lone)
        )
    differences = [row["difference"] for row in report["statistics"] if row["difference"]]
    if not differences:
        return
    print("Differences: seed by seed, problem by problem, up to the last step that both evaluated.")
    count = len([one for one in differences if len(one["runs"]) >= STAR_SEEDS])
    if count == 0:
        print(f"No stars: they take {STAR_SEEDS} seeds.")
        return
    print(f"* its interval excludes 0, over {STAR_SEEDS} seeds or more; of", end=" ")
    print(f"{count} such differences that were all 0, {count / 20:.1f} would by chance.")


def plot_curves(by_config, path):
    """Draw held-out mean@k with its 95 % band, at the steps that all runs of a config evaluated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for name, runs in by_config.items():
        steps = sorted(set.intersection(*(set(run.evaluations) for run in runs)))
        means = []
        lows = []
        highs = []
        for step in steps:
            values = np.array([run.evaluations[step]["per_problem"] for run in runs])  # (S,N)
            low, high = bootstrap_interval(values)
            means.append(values.mean())
            lows.append(low)
            highs.append(high)
        (line,) = axes.plot(steps, means, "o-", label=f"{name} (seeds: {len(runs)})")
        axes.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out accuracy, 95 % band", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = partial(exit_with_error, "compare.py")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories of runs, or globs in quotes")
    add("--baseline", metavar="RUN_OR_CONFIGURATION", help="what differences are taken to")
    add("--plot", metavar="PNG", help="draw the held-out curves with bands (needs matplotlib)")
    add("--json", metavar="FILE", help="write all statistics, those of each run too, to this file")
    args = parser.parse_args(argv)
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    try:
        runs, failed = find_runs(args.runs)
        report, by_config = make_report(runs, failed, args.baseline)
        if args.json:
            text = json.dumps(report, indent=1) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
        if args.plot:
            plot_curves(by_config, args.plot)
    except (ValueError, OSError) as error:
        exit_with_error("compare.py", error)
    print_report(report)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
