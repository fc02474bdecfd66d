"""The advantage lab: what every rule makes of the groups that a run saved, or of any group.

    python study/lab.py RUN/groups.jsonl                        all steps of the run
    python study/lab.py RUN/groups.jsonl --step 20              one step
    python study/lab.py RUN/groups.jsonl --blend soft           a blend for the sweep over γ and ρ
    python study/lab.py RUN/groups.jsonl --plot lab.png         draw a chart (needs matplotlib)
    python study/lab.py --map map.png --rules grpo copo         draw every possible group of six

Each rule goes through copo.compute_advantages, as in training: for the tables on the saved rewards
and answer classes, for the map on a step that stands in this file. They show what a rule does to
given groups, not which groups a policy trained with it would have sampled. Advantages are those of
a step's first update, where q = 1: there --ratio changes nothing, and its row is that of grpo.
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
SHARES = {  # the columns that follow, with the two lines of each head
    "from all wrong": ("all", "wrong"),
    "from mixed": ("", "mixed"),
    "from all right": ("all", "right"),
    "all wrong reached": ("all", "wrong"),
    "all right reached": ("all", "right"),
    "wrong pushed up": ("wrong", "up"),
    "right pushed down": ("right", "down"),
    "idle groups": ("idle", "groups"),
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
    each kind of group has; of the all-wrong and of the all-right groups, the share that gets a
    gradient; the shares of wrong responses pushed up, of right responses pushed down, and of groups
    without a gradient.
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
    for kind in ("all wrong", "all right"):
        statistics[f"{kind} reached"] = mean(~columns["idle"][columns[kind]])
    statistics["wrong pushed up"] = mean(columns["A"][wrong] > 0)
    statistics["right pushed down"] = mean(columns["A"][right] < 0)
    statistics["idle groups"] = mean(columns["idle"])
    return statistics


def all_rules():
    """The rules of the first table: {name: Algorithm}, None for the run's own."""
    rules = {"the run's own": None} | copo.PRESETS
    grpo = copo.PRESETS["grpo"]
    others = {blend: copo.Algorithm(blend=blend) for blend in copo.BLENDS}
    others |= {kind: replace(grpo, advantage=kind) for kind in copo.ADVANTAGES}
    others |= {ratio: replace(grpo, ratio=ratio) for ratio in copo.RATIOS}
    for name, algorithm in others.items():
        if algorithm not in copo.PRESETS.values():
            rules[name] = algorithm
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
    print(f"{'':<16}{names}{'gradient from':^21}{'with gradient':^14}".rstrip())
    first = "".join(f"{head[0]:>7}" for head in SHARES.values())
    print(" " * (16 + len(names)) + first)
    sides = f"{'right':>7}{'wrong':>7}" * len(QUANTITIES)
    second = "".join(f"{head[1]:>7}" for head in SHARES.values())
    print(f"{'':<16}{sides}{second}")
    for rule, statistics in table.items():
        line = f"{rule:<16}"
        for name in QUANTITIES:
            line += cell(statistics[f"{name} right"], 7, ".2f")
            line += cell(statistics[f"{name} wrong"], 7, ".2f")
        for name in SHARES:
            line += cell(statistics[name], 7, ".1%")
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


# ------------------------------------------------------------------------------------------ the map

# The step that the map assumes: 1,000 groups of six, this many of which have 0, 1 .. 6 right
# responses. R then has mean .255 and standard deviation .346.
GROUPS_BY_RIGHT = (560, 80, 70, 70, 75, 70, 75)
GROUP_SIZE = 6
MAP_RULES = ("grpo", "soft", "copo", "copo-group", "copo-forced")
FAINT = 0.05  # an |A| below it is written ≈0 and never framed
SIDES = {"right": "RIGHT responses, should be blue", "wrong": "WRONG responses, should be red"}
# How the legend's marks are drawn.
FRAME = {"facecolor": "none", "edgecolor": "black", "linewidth": 2.5}
IMPOSSIBLE = {"facecolor": "#d4d4d4", "edgecolor": "#d4d4d4"}
NO_GRADIENT = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.5}
AVERAGE = {"color": "black", "linestyle": "--", "linewidth": 1.5}
CAPTION = (
    "Assumed step: 1,000 groups, 56 % of them all wrong and 7.5 % all right; share of right "
    "responses of a group: mean .255, standard deviation .346"
)


def partitions(total, largest):
    """Every way to split `total` answers into classes of at most `largest`: lists of sizes."""
    if total == 0:
        return [[]]
    ways = []
    for size in range(min(total, largest), 0, -1):
        for rest in partitions(total - size, size):
            ways.append([size, *rest])
    return ways


def assumed_classes():
    """Answer classes (P,G) of the step that the map assumes; class 0 is the right answer.

    Groups with the same number of right responses take turns at every way in which their wrong
    answers can agree and differ.
    """
    rows = []
    for num_right, num_groups in enumerate(GROUPS_BY_RIGHT):
        ways = partitions(GROUP_SIZE - num_right, GROUP_SIZE)
        for number in range(num_groups):
            sizes = [num_right, *ways[number % len(ways)]]
            row = []
            for label, size in enumerate(sizes):
                row += [label] * size
            rows.append(row)
    return torch.tensor(rows)


def map_cells(algorithm):
    """Every possible group -> {(number right, H): {"right": A, "wrong": A}}.

    NaN where the group has no such response.
    """
    classes = assumed_classes()
    correct = classes == 0
    algorithm = replace(algorithm, overlong_factor=0.0)
    result = copo.compute_advantages(correct, correct, classes, None, algorithm, None)
    cells = {}
    for verdicts, entropy, effective in zip(correct, result.entropy, result.effective):
        place = (int(verdicts.sum()), round(entropy.item(), 3))
        if place not in cells:
            cells[place] = {"right": mean(effective[verdicts]), "wrong": mean(effective[~verdicts])}
    return cells


def draw_map(path, names):
    """Draw A over (number right, H): a column for each rule, right responses above wrong ones."""
    from matplotlib.figure import Figure

    rules = all_rules()
    figure = Figure(figsize=(max(12.5, 3 + 2.7 * len(names)), 11), layout="constrained")
    grid = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for column, name in zip(grid.T, names):
        cells = map_cells(rules[name])
        for axes, side in zip(column, SIDES):
            values = {place: by_side[side] for place, by_side in cells.items()}
            image = draw_panel(axes, values, good_sign=1 if side == "right" else -1)
        column[0].set_title(name, fontsize=17, fontweight="bold", pad=22)
        column[0].text(0.5, 1.02, describe(rules[name]), ha="center", transform=column[0].transAxes)
        column[1].set_xlabel("number of right responses", fontsize=12)
    for axes, words in zip(grid[:, 0], SIDES.values()):
        axes.set_ylabel(f"{words}\nentropy H of the answers, bits", fontsize=14)
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.7, aspect=35, pad=0.01)
    bar.set_label("effective advantage A: below 0 made rarer, above 0 made likelier", fontsize=13)
    figure.suptitle(
        "What each rule makes of a response, in every possible group of six", fontsize=19
    )
    add_legend(figure)
    figure.savefig(path, dpi=100)


def draw_panel(axes, values, good_sign):
    """Draw a square for each place (number right, H) -> the image, for its colours.

    values: {place: A}; good_sign: the sign that A should have.
    """
    from matplotlib.patches import Rectangle

    entropies = sorted({entropy for _, entropy in values})
    table = torch.full((len(entropies), GROUP_SIZE + 1), math.nan)
    axes.patch.set(**IMPOSSIBLE)
    for (num_right, entropy), value in values.items():
        row = entropies.index(entropy)
        table[row, num_right] = value
        if math.isnan(value):
            continue
        color = "white" if abs(value) > 1.35 else "black"
        label = {"color": color, "ha": "center", "va": "center", "fontsize": 9.5}
        axes.text(num_right, row, advantage_text(value), **label)
        if good_sign * value < -FAINT:
            axes.add_patch(Rectangle((num_right - 0.45, row - 0.45), 0.9, 0.9, **FRAME))
        elif abs(value) < FAINT:
            axes.add_patch(Rectangle((num_right - 0.5, row - 0.5), 1, 1, **NO_GRADIENT))
    axes.axvline(GROUP_SIZE * 0.255, **AVERAGE)
    axes.set_xticks(range(GROUP_SIZE + 1), ["0\nall\nwrong", *"12345", "6\nall\nright"])
    labels = [f"{entropy:.2f}" for entropy in entropies]
    labels[0] = "all alike  0.00"
    labels[-1] = f"all differ  {labels[-1]}"
    axes.set_yticks(range(len(entropies)), labels)
    axes.tick_params(length=0)
    style = {"cmap": "RdBu", "vmin": -2, "vmax": 2, "edgecolors": "white", "zorder": 0}
    squares = range(GROUP_SIZE + 1), range(len(entropies))
    return axes.pcolormesh(*squares, table, shading="nearest", **style)


def advantage_text(value):
    """A to one decimal; 0 only where a response gets no gradient at all."""
    if abs(value) < 1e-9:
        return "0"
    return "≈0" if abs(value) < FAINT else f"{value:+.1f}".replace("-", "−")


def describe(algorithm):
    """What stands behind a rule's name, in the words of the flags."""
    words = f"blend {algorithm.blend}"
    if copo.BLENDS[algorithm.blend].uses_entropy:
        words += f", γ {algorithm.gamma:g}, ρ {algorithm.rho:g}"
    if algorithm.advantage != "group":
        words = f"advantage {algorithm.advantage}"
    return words


def add_legend(figure):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(label="the wrong way round: wrong made likelier, or right made rarer", **FRAME),
        Patch(label="no gradient (≈0: below .05): nothing is learnt", **NO_GRADIENT),
        Patch(label="there is no such group, or no such response in it", **IMPOSSIBLE),
        Line2D([], [], label="average prompt: A$^g$ < 0 on its left, > 0 on its right", **AVERAGE),
    ]
    style = {"ncols": 2, "fontsize": 12, "title": CAPTION, "title_fontsize": 12}
    figure.legend(handles=handles, loc="outside lower center", **style)


def exit_with(message):
    print(f"lab.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def print_tables(args):
    """The two tables of a saved run; with --plot also their chart."""
    steps = read_groups(args.groups, args.step)
    rules = {}
    for name, algorithm in all_rules().items():
        rules[name] = rule_statistics(steps, algorithm)
    sweep = {}
    for name, algorithm in sweep_rules(args.blend).items():
        sweep[name] = rule_statistics(steps, algorithm)
    if args.plot:
        draw_statistics(args.plot, rules | sweep)
    num_groups = sum(len(saved["correct"]) for saved in steps)
    print(f"{args.groups}: {num_groups} groups of {len(steps)} steps")
    print_statistics(
        "Every preset, every other blend (else as copo), advantage and ratio (else as grpo)", rules
    )
    print_statistics(f"Blend {args.blend} over γ and ρ", sweep)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = exit_with
    add = parser.add_argument
    add("groups", metavar="GROUPS", nargs="?", help="groups.jsonl of a run of train.py")
    add("--step", type=int, help="only this step of it")
    add("--blend", choices=copo.BLENDS, default="soft-zero", help="rule of the sweep over γ and ρ")
    add("--plot", metavar="PNG", help="draw both tables (needs matplotlib)")
    add("--map", metavar="PNG", help="draw A over every possible group (needs matplotlib)")
    names = [name for name, algorithm in all_rules().items() if algorithm]
    add("--rules", nargs="+", choices=names, metavar="RULE", help="of the map, side by side")
    args = parser.parse_args(argv)
    if not args.groups and not args.map:
        exit_with("needs GROUPS, the groups.jsonl of a run, or --map")
    if args.rules and not args.map:
        exit_with("--rules are those of --map")
    try:
        if args.map:
            draw_map(args.map, args.rules or MAP_RULES)
        if args.groups:
            print_tables(args)
    except ImportError as error:
        exit_with(f"{error}; pip install matplotlib, or leave --plot and --map out")
    except (OSError, ValueError) as error:
        exit_with(error)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
