"""The pictures of docs/: a step's groups, the clip, metrics of runs, the loop (needs matplotlib).

    python study/pictures.py groups groups.png RUN/groups.jsonl --step 5 --rules grpo copo
    python study/pictures.py clip clip.png
    python study/pictures.py dashboard dashboard.png RUN/metrics.jsonl RUN/metrics.jsonl
    python study/pictures.py loop loop.png

Colours of advantages are those of the map of study/lab.py: blue is pushed up, red down, and a black
frame marks what goes the wrong way, a wrong response up or a right one down.

Shapes: P prompts of a step, G responses each.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copo
from sampler import exit_with_error

COLORS = {"cmap": "RdBu", "vmin": -2, "vmax": 2}  # of an effective advantage
FAINT = 0.05  # an |A| below it is never framed


def new_figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def read_jsonl(path):
    """The lines of a JSONL file; a last line without its end is left out. ValueError says which."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: no JSON: {error}") from error
    if not lines:
        raise ValueError(f"{path}: no lines")
    return lines


# ------------------------------------------------------------------------------- a step's groups


def groups_of_step(path, step):
    """The lines of one step (default: the last), those with fewest right responses first."""
    lines = read_jsonl(path)
    step = lines[-1]["step"] if step is None else step
    groups = [line for line in lines if line["step"] == step]
    if not groups:
        raise ValueError(f"{path}: no groups of step {step}")
    return sorted(groups, key=lambda group: (sum(group["correct"]), group["H"]))


def effective_advantages(groups, algorithm):
    """What a rule makes of saved groups: A (P,G)."""
    correct = torch.tensor([group["correct"] for group in groups]).bool()
    rewards = torch.tensor([group["reward"] for group in groups])
    classes = torch.tensor([group["class"] for group in groups])
    # The saved rewards hold the run's penalty on length already.
    algorithm = replace(algorithm, overlong_factor=0.0)
    return copo.compute_advantages(rewards, correct, classes, None, algorithm, None).effective


def draw_groups(args):
    """A table a rule: a line a group, a square an answer, coloured by its effective advantage."""
    groups = groups_of_step(args.groups, args.step)
    size = len(groups[0]["correct"])
    width = 2.2 + 0.55 * size * len(args.rules)
    figure = new_figure(width, 1.9 + 0.235 * len(groups))
    panels = figure.subplots(1, len(args.rules), squeeze=False)[0]
    for axes, rule in zip(panels, args.rules):
        advantages = effective_advantages(groups, copo.PRESETS[rule])
        image = draw_group_table(axes, groups, advantages)
        axes.set_title(rule, fontsize=14, fontweight="bold")
    labels = []
    for group in groups:
        labels.append(f"{sum(group['correct'])} of {size}   H {group['H']:.2f}")
    panels[0].set_yticks(range(len(groups)), labels, fontsize=9)
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    bar.set_label("effective advantage A: red is made rarer, blue likelier")
    figure.suptitle(
        f"Step {groups[0]['step']} of a run: a line a prompt, a square a response\n"
        "bold: right;   framed: pushed the wrong way;   –: no answer",
        fontsize=13,
    )
    return figure


def draw_group_table(axes, groups, advantages):
    """One rule's table -> the image, for its colours. advantages (P,G)."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(advantages.numpy(), aspect="auto", **COLORS)
    for row, group in enumerate(groups):
        for column, verdict in enumerate(group["correct"]):
            value = advantages[row, column].item()
            style = {"ha": "center", "va": "center", "fontsize": 8.5}
            style["color"] = "white" if abs(value) > 1.35 else "black"
            style["fontweight"] = "bold" if verdict else "normal"
            axes.text(column, row, answer_text(group, column), **style)
            good_sign = 1 if verdict else -1
            if good_sign * value < -FAINT:
                corner = (column - 0.44, row - 0.42)
                axes.add_patch(Rectangle(corner, 0.88, 0.84, fill=False, linewidth=1.6))
    for row in range(1, len(groups)):
        if kind(groups[row]) != kind(groups[row - 1]):
            axes.axhline(row - 0.5, color="black", linewidth=2.5)
        else:
            axes.axhline(row - 0.5, color="white", linewidth=1)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def answer_text(group, column):
    """The answer that a response gave, cut to what fits a square."""
    text = group["answers"].get(str(group["class"][column])) or "–"
    return text if len(text) <= 6 else text[:5] + "…"


def kind(group):
    """ "all wrong", "mixed" or "all right"."""
    num_right = sum(group["correct"])
    if num_right == 0:
        return "all wrong"
    return "all right" if num_right == len(group["correct"]) else "mixed"


# --------------------------------------------------------------------------------------- the clip

CLIP_LOW = 0.2
CLIP_HIGH = 0.28
DUAL_CLIP = 3.0
# What each of the four quadrants says, and the dual clip: (sign of A, q, height, text).
CLIP_TEXTS = (
    (
        1,
        0.26,
        -1.75,
        "q < 1: it became rarer,\nby mistake. The gradient\ncorrects it, however\nfar it went.",
    ),
    (1, 1.45, -0.55, "q > 1+ε: it is likelier\nby enough for this step.\nNo gradient."),
    (-1, 0.26, 1.15, "q < 1−ε: it is rarer by\nenough for this step.\nNo gradient."),
    (-1, 1.36, 0.5, "q > 1: it became likelier,\nby mistake. The gradient\ncorrects it ..."),
    (
        -1,
        1.06,
        3.35,
        "... but not from q = c on:\nthere −q·A has no bound.\nThe dual clip sets one.",
    ),
)


def loss_and_gradient(ratios, advantage):
    """The clipped loss over q, and where it has a gradient: q (N,) -> two (N,)."""
    logprobs = ratios.log().requires_grad_()
    advantages = torch.full_like(ratios, advantage)
    loss = copo.clipped_loss(
        logprobs[:, None], torch.zeros(len(ratios), 1), advantages, CLIP_LOW, CLIP_HIGH, DUAL_CLIP
    )[:, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.detach(), gradient != 0


def draw_clip(args):
    """ℓ(A) over q for A = 1 and A = −1: where it has a gradient, and where it has none."""
    figure = new_figure(12, 5.4)
    panels = dict(zip((1, -1), figure.subplots(1, 2)))
    ratios = torch.logspace(-2, 2, 4000, base=2)
    for advantage, axes in panels.items():
        loss, has_gradient = loss_and_gradient(ratios, advantage)
        axes.plot(ratios, -ratios * advantage, "--", color="0.6", label="−q·A, without a clip")
        with_gradient = torch.where(has_gradient, loss, torch.nan)
        axes.plot(ratios, with_gradient, color="C0", linewidth=4, label="ℓ(A), with a gradient")
        without = torch.where(has_gradient, torch.nan, loss)
        axes.plot(ratios, without, color="C3", linewidth=4, label="ℓ(A), flat: no gradient")
        axes.axvspan(0.25, 1, color="0.95", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.25, 4)
        axes.set_xlabel("q, new probability of the token / old (the scale is logarithmic)")
        mark_clips(axes, advantage)
    for advantage, ratio, height, text in CLIP_TEXTS:
        panels[advantage].text(ratio, height, text, fontsize=11, va="center")
    panels[1].set(ylim=(-4, 0.1), title="A > 0: the token should become likelier")
    panels[-1].set(ylim=(0, 4.1), title="A < 0: the token should become rarer")
    panels[1].set_ylabel("loss ℓ of the token, for |A| = 1")
    panels[1].legend(loc="lower left")
    return figure


def mark_clips(axes, advantage):
    """Vertical lines and ticks where the clip range and the dual clip lie."""
    places = {
        0.25: "¼",
        0.5: "½",
        1 - CLIP_LOW: "1−ε$_{low}$\n0.8",
        1.0: "1",
        1 + CLIP_HIGH: "1+ε$_{high}$\n1.28",
        2.0: "2",
        DUAL_CLIP: "3" if advantage > 0 else "c = 3",
        4.0: "4",
    }
    axes.set_xticks(list(places), list(places.values()))
    axes.minorticks_off()
    for place in (1 - CLIP_LOW, 1 + CLIP_HIGH):
        axes.axvline(place, color="0.7", linewidth=1, zorder=0)
    if advantage < 0:
        axes.axvline(DUAL_CLIP, color="0.7", linewidth=1, zorder=0)


# ---------------------------------------------------------------------------------- the dashboard


class Panel(NamedTuple):
    """One line of the dashboard: metrics drawn over each other, {name in metrics.jsonl: label}."""

    title: str
    metrics: dict
    share: bool = False  # from 0 to 1
    log: bool = False


PANELS = (
    Panel("responses", {"accuracy": "correct", "no_answer": "without an answer"}, share=True),
    Panel("responses", {"finished": "ended by themselves"}, share=True),
    Panel(
        "groups",
        {
            "all_wrong": "all wrong",
            "mixed": "mixed",
            "all_right": "all right",
            "zero_gradient_groups": "without a gradient",
        },
        share=True,
    ),
    Panel("entropies", {"consistency_entropy": "H, bits", "token_entropy": "of tokens, nats"}),
    Panel("gradient norm", {"grad_norm_max": "largest of the step"}, log=True),
    Panel("length, tokens", {"length_mean": "mean", "length_max": "greatest"}),
)


def draw_dashboard(args):
    """A column a run, a line a kind of metric, the same scale along a line."""
    runs = {path: read_jsonl(path) for path in args.metrics}
    titles = args.titles or [run_name(path) for path in args.metrics]
    if len(titles) != len(runs):
        raise ValueError(f"--titles names {len(titles)} runs; there are {len(runs)}")
    figure = new_figure(3 + 2.6 * len(runs), 1.55 * len(PANELS))
    grid = figure.subplots(len(PANELS), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, lines, title in zip(grid.T, runs.values(), titles):
        for axes, panel in zip(column, PANELS):
            draw_metrics(axes, lines, panel)
        column[0].set_title(title, fontsize=12, fontweight="bold")
        column[-1].set_xlabel("step")
    for row, panel in zip(grid, PANELS):
        row[0].set_ylabel(panel.title, fontsize=11)
        row[-1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def run_name(path):
    """A column's title: RUN of RUN/metrics.jsonl, else the file's own name."""
    path = Path(path)
    return path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem


def draw_metrics(axes, lines, panel):
    steps = [line["step"] for line in lines]
    for name, label in panel.metrics.items():
        if not any(name in line for line in lines):
            raise KeyError(name)
        # None: not finite, or nothing to take a mean of. A step without an update lacks some.
        values = [float("nan") if line.get(name) is None else line[name] for line in lines]
        axes.plot(steps, values, ".-", label=label)
    if panel.share:
        axes.set_ylim(-0.05, 1.05)
    if panel.log:
        axes.set_yscale("symlog", linthresh=0.1)
    axes.grid(color="0.92")


# --------------------------------------------------------------------------------------- the loop


class Box(NamedTuple):
    """One function of the loop: where it stands, what it does, and what comes out of it."""

    function: str
    file: str
    does: str
    result: str


FILE_COLORS = {
    "train.py": "#f2f2f2",
    "sampler.py": "#dbe9f6",
    "reward.py": "#fde9d9",
    "copo.py": "#e2f0d9",
    "model.py": "#efe3f5",
}
STEP_BOXES = (
    Box("draw_prompts", "train.py", "the next problems of the data order", "P prompts"),
    Box(
        "generate",
        "sampler.py",
        "G responses to each prompt",
        "tokens, logprobs (P,G,T);  lengths (P,G)",
    ),
    Box(
        "Verifier.grade_groups",
        "reward.py",
        "is it right? which answers are one?",
        "correct, rewards, classes (P,G)",
    ),
    Box("consistency_entropy", "copo.py", "do the answers agree?", "H (P,)"),
    Box("local_advantages", "copo.py", "response against its group", "A$^l$ (P,G)"),
    Box("global_advantages", "copo.py", "prompt against the batch", "A$^g$ (P,)"),
    Box("local_weight", "copo.py", "how much does the group count?", "w (P,G)"),
)
BLEND = "the blend"  # a line of copo_loss, no function of its own
UPDATE_BOXES = (
    Box("micro_batches", "train.py", "rows that fit into one forward pass", "B rows of the update"),
    Box("packed_logprobs", "model.py", "what the policy now gives its tokens", "logp (B,T)"),
    Box("clipped_loss", "copo.py", "once for A$^l$, once for A$^g$", "ℓ(A$^l$), ℓ(A$^g$) (B,T)"),
    Box(BLEND, "copo.py", "w·ℓ(A$^l$) + coef·(1−w)·ℓ(A$^g$)", "token loss (B,T)"),
    Box("aggregate", "copo.py", "over the whole update's counts", "its share of L;  backward()"),
    Box("optimizer_step", "train.py", "clip the gradient, step AdamW", "new weights"),
    Box(
        "sync_weights", "train.py", "after the last update of the step", "the sampler has them too"
    ),
)
LEFT = 0.7  # of the first column
RIGHT = 7.5  # of the second
WIDTH = 5.3  # of a box
HEIGHT = 0.76
PITCH = 1.08  # from one box to the next


def draw_loop(args):
    """Two columns of boxes: once a step, and once an update; an arrow back to the sampler."""
    figure = new_figure(13.5, 8)
    axes = figure.subplots()
    axes.set(xlim=(0, 13.5), ylim=(0, 8.3))
    axes.set_axis_off()
    axes.text(LEFT, 7.95, "once a step", fontsize=15, fontweight="bold")
    axes.text(RIGHT, 7.95, "once an update", fontsize=15, fontweight="bold")
    axes.text(RIGHT + WIDTH, 7.95, "an update: some of the step's groups", fontsize=11, ha="right")
    draw_boxes(axes, STEP_BOXES, LEFT)
    draw_boxes(axes, UPDATE_BOXES, RIGHT)
    draw_span(axes, LEFT - 0.12, 3, 6, "copo.compute_advantages", rotation=90)
    draw_span(axes, RIGHT - 0.12, 2, 4, "copo.copo_loss", rotation=90)
    draw_span(axes, RIGHT + WIDTH + 0.15, 0, 4, "for each micro-batch", rotation=270)
    to_update = [(LEFT + WIDTH, 6), (6.5, 6), (6.5, 0), (RIGHT, 0)]
    draw_path(axes, to_update, color="0.2", linestyle="-")
    to_sampler = [(RIGHT, 6), (7.0, 6), (7.0, 1), (LEFT + WIDTH, 1)]
    draw_path(axes, to_sampler, color="C0", linestyle="--")
    text = {"rotation": 90, "va": "center", "ha": "right", "fontsize": 10}
    axes.text(6.45, 3.2, "A$^l$, A$^g$, w of the rows (B,);  old logp (B,T)", color="0.2", **text)
    axes.text(6.95, 3.2, "weights for the next step", color="C0", **text)
    return figure


def middle(number):
    """Height of the middle of a column's box, counted from the top."""
    return 7.4 - PITCH * number


def draw_boxes(axes, boxes, left):
    for number, box in enumerate(boxes):
        draw_box(axes, box, left, middle(number) - HEIGHT / 2)
        if number < len(boxes) - 1:
            start = middle(number) - HEIGHT / 2
            end = middle(number + 1) + HEIGHT / 2
            draw_arrow(axes, (left + 1.2, start), (left + 1.2, end), color="0.2")


def draw_span(axes, x, first, last, text, rotation):
    """A bar along some boxes of a column, with words beside it."""
    top = middle(first) + HEIGHT / 2
    bottom = middle(last) - HEIGHT / 2
    axes.plot([x, x], [bottom, top], color="0.2", linewidth=2)
    side = -0.1 if rotation == 90 else 0.1
    style = {"ha": "right" if side < 0 else "left", "va": "center", "fontsize": 11}
    axes.text(x + side, (top + bottom) / 2, text, rotation=rotation, **style)


def draw_path(axes, corners, color, linestyle):
    """A line through corners (x, number of the box), with a head at its end."""
    points = [(x, middle(number)) for x, number in corners]
    xs, ys = zip(*points[:-1])
    axes.plot(xs, ys, color=color, linestyle=linestyle, linewidth=1.5)
    draw_arrow(axes, points[-2], points[-1], color=color)


def draw_box(axes, box, left, bottom):
    from matplotlib.patches import FancyBboxPatch

    color = FILE_COLORS[box.file]
    style = {"boxstyle": "round,pad=0.02", "facecolor": color, "edgecolor": "0.3"}
    axes.add_patch(FancyBboxPatch((left, bottom), WIDTH, HEIGHT, **style))
    axes.text(left + 0.12, bottom + 0.48, box.function, fontsize=12, family="monospace")
    axes.text(left + WIDTH - 0.12, bottom + 0.48, box.file, fontsize=9, color="0.35", ha="right")
    axes.text(left + 0.12, bottom + 0.14, box.does, fontsize=10, color="0.25")
    axes.text(left + WIDTH - 0.12, bottom + 0.14, f"→  {box.result}", fontsize=10, ha="right")


def draw_arrow(axes, start, end, color):
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


# ---------------------------------------------------------------------------------- the command


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, draw in PICTURES.items():
        picture = pictures.add_parser(name, help=draw.__doc__, allow_abbrev=False)
        picture.error = partial(exit_with_error, "pictures.py")
        picture.add_argument("out", metavar="PNG", help="file to write")
        if name == "groups":
            picture.add_argument("groups", metavar="GROUPS", help="groups.jsonl of a run")
            picture.add_argument("--step", type=int, help="which step (default: the last)")
            picture.add_argument(
                "--rules",
                nargs="+",
                choices=copo.PRESETS,
                default=["grpo", "copo", "copo-group"],
                help="presets, side by side",
            )
        if name == "dashboard":
            picture.add_argument("metrics", metavar="METRICS", nargs="+", help="metrics.jsonl")
            picture.add_argument(
                "--titles", nargs="+", help="one a run (default: names of runs or files)"
            )
    parser.error = partial(exit_with_error, "pictures.py")
    return parser


PICTURES = {
    "groups": draw_groups,
    "clip": draw_clip,
    "dashboard": draw_dashboard,
    "loop": draw_loop,
}


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not find_spec("matplotlib"):
        parser.error("needs matplotlib: pip install matplotlib")
    try:
        PICTURES[args.picture](args).savefig(args.out, dpi=100)
    except KeyError as error:
        parser.error(f"not the file of a run: {error} is missing in it")
    except (OSError, TypeError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
