"""The advantage lab: what every preset, blend and advantage makes of the groups that a run saved.

    python study/lab.py RUN/groups.jsonl                        all steps of the run
    python study/lab.py RUN/groups.jsonl --step 20              one step
    python study/lab.py RUN/groups.jsonl --blend soft           a blend for the sweep over γ and ρ
    python study/lab.py RUN/groups.jsonl --plot lab.png         draw a chart (needs matplotlib)

Each rule goes through copo.compute_advantages, as in training, on the saved rewards and answer
classes. The tables show what a rule does to these groups. They do not show which groups a policy
trained with it would have sampled.
"""

import argparse
import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copo

# The fields of groups.jsonl that hold one number for each response.
RESPONSE_FIELDS = ("correct", "reward", "class", "length", "weight", "local_adv")
QUANTITIES = ("w", "A^l", "A^g", "A")
KINDS = ("all wrong", "mixed", "all right")
SHARES = {  # their columns in the tables, with the widths
    "from all wrong": 10,
    "from mixed": 7,
    "from all right": 10,
    "wrong pushed up": 7,
    "right pushed down": 7,
    "idle groups": 7,
}
COLORS = ("#d98880", "#f7dc6f", "#7dcea0")  # of the kinds, in the chart


# ------------------------------------------------------------------------------------ saved groups


def parse_group(line):
    """One line of groups.jsonl -> (step, {field: (G,) float64}).

    Raises KeyError, TypeError or ValueError for a line that is no group.
    """
    saved = json.loads(line)
    step = saved["step"]
    if not isinstance(step, int):
        raise TypeError("step is not an integer")
    table = torch.tensor([saved[name] for name in RESPONSE_FIELDS], dtype=torch.float64)
    group = dict(zip(RESPONSE_FIELDS, table))
    group["global_adv"] = torch.full_like(table[0], saved["global_adv"])
    for name, values in group.items():
        if not values.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return step, group


def append_group(groups, group):
    """Append a group to those of its step. ValueError if it has another number of responses."""
    size = len(group["correct"])
    if groups and size != len(groups[0]["correct"]):
        expected = len(groups[0]["correct"])
        raise ValueError(f"{size} responses, but {expected} in the groups before it")
    groups.append(group)


def read_groups(path, only_step=None):
    """A run's groups.jsonl -> a list of its steps, each {field: (P,G) float64}.

    ValueError names the file and the line. A last line without its end is left out: the run is
    still writing it, or was killed.
    """
    steps = {}
    # errors="replace": bytes that are no text are then refused with their line, as no JSON.
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                step, group = parse_group(line)
                if only_step is None or step == only_step:
                    append_group(steps.setdefault(step, []), group)
            except (IndexError, KeyError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path}:{number}: not a group: {reason}") from error
    if not steps and only_step is None:
        raise ValueError(f"{path}: no groups")
    if not steps:
        raise ValueError(f"{path}: no groups of step {only_step}")
    return [stack_groups(groups) for groups in steps.values()]


def stack_groups(groups):
    """P groups, each {field: (G,)} -> {field: (P,G)}."""
    return {name: torch.stack([group[name] for group in groups]) for name in groups[0]}


# -------------------------------------------------------------------------------- what a rule does


def recompute(saved, algorithm):
    """One step under a rule -> {quantity: (P,G)}; size is a response's share of the gradient.

    algorithm None: the run's own w, A^l and A^g as it saved them, with a global coefficient of 1.
    """
    correct = saved["correct"].bool()
    if algorithm is None:
        weight = saved["weight"]
        local_adv = saved["local_adv"]
        global_adv = saved["global_adv"][:, 0]
        effective = copo.effective_advantages(local_adv, global_adv, weight)
    else:
        # The saved rewards hold the run's penalty on length already.
        algorithm = replace(algorithm, overlong_factor=0.0)
        _, _, _, local_adv, global_adv, weight, effective = copo.compute_advantages(
            saved["reward"], correct, saved["class"], saved["length"], algorithm, None
        )
    # Σ_t |A| of a response; its length cancels where the mean over its tokens is taken first.
    size = effective.abs()
    if algorithm is not None and algorithm.aggregation != "seq-mean-token-mean":
        size = size * saved["length"]
    largest = effective.abs().amax(dim=1, keepdim=True)
    return {
        "correct": correct,
        "w": weight,
        "A^l": local_adv,
        "A^g": global_adv[:, None].expand_as(local_adv),
        "A": effective,
        "size": size,
        "idle": (largest < 1e-9).expand_as(correct),
        "all wrong": ~copo.solved_group(correct),
        "mixed": copo.mixed_group(correct),
        "all right": correct.all(dim=1, keepdim=True).expand_as(correct),
    }


def mean(values):
    """The mean as a float; NaN where there is nothing to take a mean of."""
    return values.double().mean().item()


def rule_statistics(steps, algorithm):
    """Statistics of one rule, recomputed on saved groups -> {name: float}.

    Means over right and over wrong responses of w, A^l, A^g and A; the share of the gradient that
    each kind of group has; the shares of wrong responses pushed up, of right responses pushed down,
    and of groups without a gradient.
    """
    recomputed = [recompute(saved, algorithm) for saved in steps]
    columns = {}
    for name in recomputed[0]:
        columns[name] = torch.cat([step[name].flatten() for step in recomputed])
    right = columns["correct"]
    wrong = ~right
    statistics = {}
    for name in QUANTITIES:
        statistics[f"{name} right"] = mean(columns[name][right])
        statistics[f"{name} wrong"] = mean(columns[name][wrong])
    size = columns["size"]
    for kind in KINDS:
        statistics[f"from {kind}"] = (size[columns[kind]].sum() / size.sum()).item()
    statistics["wrong pushed up"] = mean(columns["A"][wrong] > 0)
    statistics["right pushed down"] = mean(columns["A"][right] < 0)
    statistics["idle groups"] = mean(columns["idle"])
    return statistics


def all_rules():
    """The rules of the first table: {name: Algorithm}, None for the run's own."""
    rules = {"the run's own": None} | copo.PRESETS
    for blend in copo.BLENDS:
        if blend not in ("soft-zero", "local"):  # those of the presets copo and grpo
            rules[blend] = copo.Algorithm(blend=blend)
    for kind in copo.ADVANTAGES:
        if kind != "group":
            rules[f"grpo, {kind}"] = replace(copo.PRESETS["grpo"], advantage=kind)
    return rules


def sweep_rules(blend):
    """The rules of the second table: one blend with several γ and ρ."""
    rules = {}
    for gamma in (1, 2, 5, 10, 20):
        for rho in (0.5, 1, 1.5, 2):
            name = f"γ {gamma:<3g} ρ {rho:g}"
            rules[name] = copo.Algorithm(blend=blend, gamma=gamma, rho=rho)
    return rules


# ---------------------------------------------------------------------------- the table, the chart


def print_statistics(title, table):
    """Print {rule: statistics}, a line a rule."""
    print(f"\n{title}\n")
    names = "".join(f"{name:^14}" for name in QUANTITIES)
    print(f"{'':<16}{names}{'gradient from groups':^27}{'wrong':>7}{'right':>7}{'idle':>7}")
    sides = f"{'right':>7}{'wrong':>7}" * len(QUANTITIES)
    kinds = f"{'all wrong':>10}{'mixed':>7}{'all right':>10}"
    print(f"{'':<16}{sides}{kinds}{'up':>7}{'down':>7}{'groups':>7}")
    for rule, statistics in table.items():
        line = f"{rule:<16}"
        for name in QUANTITIES:
            line += cell(statistics[f"{name} right"], 7, ".2f")
            line += cell(statistics[f"{name} wrong"], 7, ".2f")
        for name, width in SHARES.items():
            line += cell(statistics[name], width, ".1%")
        print(line)


def cell(value, width, form):
    text = "." if math.isnan(value) else format(value, form)
    return text.rjust(width)


def draw_statistics(path, table):
    """Bars: where the gradient comes from. Crosses: the share of wrong responses pushed up."""
    from matplotlib.figure import Figure

    rules = list(table)
    chart = Figure(figsize=(8, 9), layout="tight")
    axes = chart.subplots()
    start = [0.0] * len(rules)
    for kind, color in zip(KINDS, COLORS):
        width = [statistics[f"from {kind}"] for statistics in table.values()]
        label = f"gradient from {kind} groups"
        axes.barh(rules, width, left=start, color=color, label=label)
        start = [left + step for left, step in zip(start, width)]
    pushed_up = [statistics["wrong pushed up"] for statistics in table.values()]
    axes.plot(pushed_up, rules, "kx", label="wrong pushed up")
    axes.invert_yaxis()
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    chart.savefig(path, dpi=110)


def exit_with(message):
    print(f"lab.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = exit_with
    parser.add_argument("groups", metavar="GROUPS", help="groups.jsonl of a run of train.py")
    parser.add_argument("--step", type=int, help="only this step of it")
    parser.add_argument(
        "--blend", choices=copo.BLENDS, default="soft-zero", help="rule of the sweep over γ and ρ"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw both tables (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        steps = read_groups(args.groups, args.step)
        rules = {}
        for name, algorithm in all_rules().items():
            rules[name] = rule_statistics(steps, algorithm)
        sweep = {}
        for name, algorithm in sweep_rules(args.blend).items():
            sweep[name] = rule_statistics(steps, algorithm)
        if args.plot:
            draw_statistics(args.plot, rules | sweep)
    except ImportError as error:
        exit_with(f"{error}; pip install matplotlib, or leave --plot out")
    except (OSError, ValueError) as error:
        exit_with(error)
    num_groups = sum(len(saved["correct"]) for saved in steps)
    print(f"{args.groups}: {num_groups} groups of {len(steps)} steps")
    print_statistics(
        "Every preset, every other blend (else as copo) and advantage, on these groups and rewards",
        rules,
    )
    print_statistics(f"Blend {args.blend} over γ and ρ", sweep)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
