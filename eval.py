"""Accuracy of a checkpoint on a file of problems: mean@k, exact maj@k, unbiased pass@k.

    python eval.py --model runs/demo/model --data data/arithmetic_test.jsonl --instruction "" \\
        --max-new-tokens 64
    python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data problems.jsonl --k 4
    python eval.py --run runs/mine                # a run's model, as the run itself evaluates
    torchrun --nproc-per-node 8 eval.py --model DIR --data problems.jsonl     # on eight GPUs

Sampler and grader are those of training. The noise of a response depends on (seed, data row,
sample) alone, so two checkpoints, or one at two steps, are compared on the same draws. Every
accuracy comes with a 95 % interval, by bootstrap over problems. study/compare.py compares runs.

Shapes: N problems, k samples of each, S seeds.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out under PYTHONSAFEPATH
from reward import SHAPES, Verifier, load_problems
from sampler import (
    INSTRUCTION,
    encode_prompts,
    exit_with_error,
    fix_date,
    generate_rollout,
    init_distributed,
    load_model,
    opens_thought,
    print0,
    rank,
    replace_unprintable,
    shutdown_distributed,
    world_size,
)

# ------------------------------------------------------------------- metrics: one value per problem


def mean_at_k(correct):
    """Share of correct samples: (N,k) -> (N,). Its mean is the accuracy of one sample."""
    return np.asarray(correct, dtype=np.float64).mean(axis=1)


def maj_at_k(correct, classes):
    """Exact majority vote over answer classes: (N,k) bool, (N,k) int -> credit (N,).

    "No answer" (-1) does not vote. Classes tied for the most votes share the credit: with one
    correct among two it is 1/2, the mean of a fair coin and not one throw of it. A problem where
    nobody votes gets 0.
    """
    credit = np.zeros(len(correct))
    for i, (verdicts, labels) in enumerate(zip(np.asarray(correct), np.asarray(classes))):
        votes = Counter(labels[labels >= 0].tolist())
        most = max(votes.values(), default=0)
        winners = [label for label, count in votes.items() if count == most]
        correct_winners = [label for label in winners if verdicts[labels == label].any()]
        if winners:
            credit[i] = len(correct_winners) / len(winners)
    return credit


def pass_at_k(correct, k):
    """Chance that k of n samples, drawn without replacement, hold a correct one: (N,n) -> (N,)."""
    correct = np.asarray(correct, dtype=bool)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n}, the samples of a problem")
    # pass@k = 1 − C(n−c, k) / C(n, k) for c correct of n: unbiased, as 1 − (1 − c/n)^k is not
    # (arXiv 2107.03374, eq. 1)
    by_count = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return by_count[correct.sum(axis=1)]


def metrics_per_problem(correct, classes):
    """Every metric that k samples support, by name: (N,k), (N,k) -> {name: (N,)}."""
    k = np.shape(correct)[1]
    metrics = {f"mean@{k}": mean_at_k(correct)}
    if k > 1:
        metrics[f"maj@{k}"] = maj_at_k(correct, classes)
        sizes = {2**i for i in range(1, k.bit_length())} | {k}
        for size in sorted(sizes):
            metrics[f"pass@{size}"] = pass_at_k(correct, size)
    return metrics


def bootstrap_interval(values, level=0.95, resamples=10_000, seed=0):
    """Percentile interval of the mean of values (N,), resampling problems -> (low, high).

    Values (S,N) are resampled over seeds, then over problems. All seeds of a resample get the same
    problems, as real runs do: drawn anew for each seed, what makes this set of problems hard or
    easy would average out.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    num_seeds, num_problems = values.shape
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, 100):  # all (resamples, N) indices at once may be gigabytes
        size = min(100, resamples - start)
        problems = generator.integers(0, num_problems, (size, num_problems))
        by_problem = values
        if num_seeds > 1:
            seeds = generator.integers(0, num_seeds, (size, num_seeds))
            by_problem = values[seeds].mean(axis=1)  # (size,N)
        means.append(np.take_along_axis(by_problem, problems, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -------------------------------------------------------------------------------------- the command


def number_in(kind, interval):
    """An argparse type: an int or a float in an interval; "(0, 1]" means above 0 and at most 1."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" where text is no number
    return parse


def json_object(text):
    """An argparse type: {"enable_thinking": false}, for one."""
    return dict(json.loads(text))


def add_prompt_flags(add):
    """Flags that train.py has too: what is read of a file, and what makes a prompt of it."""
    add("--problem-field", help="field of the problem, a.b for b in a (default: known shapes)")
    add(
        "--answer-field",
        help="field of the answer, likewise; held-out files may have a known shape",
    )
    add("--max-prompt-tokens", type=number_in(int, "[1, inf)"), help="drop longer prompts")
    add("--system", help="system message (default: none, or the chat template's own)")
    add("--instruction", help="text after every problem (default: asks for a boxed answer)")
    add(
        "--template-args",
        type=json_object,
        metavar="JSON",
        help='what else the chat template gets, such as {"enable_thinking": false}',
    )
    add(
        "--date",
        type=datetime.fromisoformat,
        help="moment that the chat template may print, such as 2026-01-31 (default: now)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        help="one more token that ends a response; repeatable",
    )
    add(
        "--reward",
        type=os.path.realpath,
        metavar="FILE.py:FUNCTION",
        help="your own grader, called like reward.grade",
    )


def make_parser():
    """All flags. Those of --run's run replace the defaults, see flags_of_run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = partial(exit_with_error, "eval.py")
    whole = number_in(int, "[0, 1e18]")
    count = number_in(int, "[1, inf)")
    not_negative = number_in(float, "[0, inf)")
    add = parser.add_argument
    add("--run", type=Path, metavar="DIR", help="evaluate a run of train.py as it evaluates itself")
    add("--checkpoint", metavar="NAME", help="of the run: step-000020, or an export, model-000020")
    add("--model", help="directory or Hub id of a model")
    add("--data", help="problems: JSONL, parquet or hf://datasets/OWNER/NAME/FILE")
    add_prompt_flags(add)
    add("--k", type=count, default=8, help="samples of each problem")
    add("--temperature", type=not_negative, default=1.0, help="0 = greedy, for which --k 1 will do")
    add("--top-p", type=number_in(float, "(0, 1]"), default=1.0, help="nucleus's share (1 = all)")
    add("--top-k", type=whole, default=0, help="sample from this many likeliest tokens (0 = all)")
    add("--max-new-tokens", type=count, default=512, help="longest response in tokens")
    add("--limit", type=whole, default=0, help="only the first so many problems (0 = all)")
    add("--seed", type=whole, default=0, help="of sampling noise, intervals, random_init weights")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        help="default: float32 on cpu, bfloat16 on cuda",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda if there is one")
    add("--rollout-batch", type=whole, default=256, help="most responses in flight (0 = all)")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write a JSON line per response, all of them or none",
    )
    # weights: a checkpoint of --run, which has nothing else
    parser.set_defaults(instruction=INSTRUCTION, weights=None)
    return parser


def parse_flags(argv):
    """The command line's flags on top of those of --run's run; ValueError if any is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.checkpoint and (args.model or not args.run):
        raise ValueError("--checkpoint is one of --run's, and goes without --model: give --run")
    if args.run:
        parser.set_defaults(**flags_of_run(args))
        args = parser.parse_args(argv)
    if not (args.model and args.data):
        raise ValueError("--model and --data are needed, or --run, which knows its own")
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        raise ValueError(
            f"--out {args.out} cannot be written: it needs a file name in an existing, writable "
            "directory"
        )
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


# ------------------------------------------------------------------------------- a run of train.py

# The demonstration's model, of a run without --model; its weights are drawn from --seed
TINY_MODEL = Path(__file__).resolve().parent / "data/tiny"
# Flags that have one name in train.py and here
RUN_FLAGS = (
    "problem_field answer_field max_prompt_tokens max_new_tokens system stop instruction reward "
    "template_args date dtype rollout_batch"
)


def flags_of_run(args):
    """What evaluates --run as it evaluates itself: defaults of this program's flags."""
    flags = json.loads((args.run / "run.json").read_text())["flags"]
    values = {name: flags.get(name) for name in RUN_FLAGS.split()}
    values |= {"data": flags["eval_data"], "limit": flags["eval_problems"]}
    values |= {"k": flags["eval_samples"], "temperature": flags["eval_temperature"]}
    if not args.model:
        values |= find_weights(args.run, args.checkpoint, flags["model"])
    return values


def find_weights(run, name, base):
    """The weights of a run called `name`, else the newest -> {"model": …, "weights": …}.

    A checkpoint comes before an export, which is rounded to the type of the run's first model, and
    is older in a run that goes on. base: that first model, which gets the checkpoint's weights.
    """
    export = run / (name or "model")
    checkpoints = sorted(run.glob(f"checkpoints/{name or 's*'}/state.json"))
    if checkpoints:
        return {"model": base or str(TINY_MODEL), "weights": checkpoints[-1].parent}
    if (export / "config.json").is_file():
        return {"model": str(export)}
    raise ValueError(f"--run {run} has no checkpoint or exported model {name or 'yet'}")


# -------------------------------------------------------------------------------------- evaluation


def read_problems(args, model, tokenizer, path, limit=0, known_shapes=False):
    """The first `limit` problems of a file (0: all) that have at most --max-prompt-tokens, and
    their prompts; says what was dropped.

    known_shapes: the file may have one of the known shapes although --problem-field names another.
    """
    if bool(args.problem_field) != bool(args.answer_field):
        raise ValueError("--problem-field and --answer-field belong together")
    shapes = SHAPES
    if args.problem_field:
        shapes = [(args.problem_field, args.answer_field, "solution")]
        if known_shapes:
            shapes.extend(SHAPES)
    dropped = Counter()
    loaded = load_problems(path, dropped, shapes)
    template = (args.system, args.instruction, args.template_args)
    usable = []
    for problem, prompt in zip(loaded, encode_prompts(tokenizer, loaded, *template)):
        if len(prompt) <= (args.max_prompt_tokens or math.inf):
            usable.append((problem, prompt))
        else:
            dropped[f"prompt over {args.max_prompt_tokens} tokens"] += 1
    usable = usable[: limit or None]
    reasons = [f", {count} dropped ({reason})" for reason, count in sorted(dropped.items())]
    print0(f"data    {path}: {len(usable)} problems{''.join(reasons)}")
    if not usable:
        raise ValueError(f"{path} has no usable problem")
    problems, prompts = map(list, zip(*usable))
    largest = max(map(max, prompts))
    if largest >= model.config.vocab_size:
        raise ValueError(f"{path}: a prompt has tokens up to {largest}, beyond the model's")
    return problems, prompts


def progress_bar(*items, **options):
    """tqdm on rank 0, if its output is a terminal."""
    return tqdm(*items, leave=False, disable=None if rank() == 0 else True, **options)


def evaluate(args):
    """Sample and grade k responses to each problem; print the metrics, write the responses."""
    model, tokenizer, stop_ids = load_model(
        args.model, args.dtype, args.device, args.stop, seed=args.seed
    )
    if args.weights:
        model.load_checkpoint(args.weights, alone=world_size() == 1)
    fix_date(tokenizer, str(args.date or datetime.now()))
    problems, prompts = read_problems(
        args, model, tokenizer, args.data, args.limit, known_shapes=args.run is not None
    )
    source = args.weights or args.model
    print0(f"model   {source}, {args.dtype} on {args.device}, ranks: {world_size()}")
    print0(
        f"sample  {args.k} samples each at temperature {args.temperature:g}, top-p {args.top_p:g}, "
        f"top-k {args.top_k}, seed {args.seed}, at most {args.max_new_tokens} tokens"
    )
    if args.reward:
        print0(f"reward  {args.reward}")
    started = time.monotonic()
    with (
        Verifier(reward=args.reward) as verifier,
        progress_bar(unit=" tokens", unit_scale=True) as bar,
    ):
        rollout = generate_rollout(
            model,
            tokenizer,
            verifier,
            problems,
            prompts,
            args.k,
            args.max_new_tokens,
            seed=args.seed,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop_ids=stop_ids,
            max_rows=args.rollout_batch,
            on_tokens=bar.update,
        )
    seconds = time.monotonic() - started
    if rank() == 0:
        if args.out:
            write_responses(args.out, rollout, tokenizer)
        print_metrics(rollout, args)
        print_statistics(rollout, args, seconds)


def print_metrics(rollout, args):
    """Print every metric with its interval, and then what the run itself found last."""
    print0(f"\n{'metric':<10}{'value':>8}    95 % interval")
    for name, values in metrics_per_problem(rollout.correct, rollout.classes).items():
        low, high = bootstrap_interval(values, seed=args.seed)
        print0(f"{name:<10}{values.mean():>8.1%}    {low:6.1%} .. {high:6.1%}")
    if args.run and (args.run / "eval.jsonl").is_file():
        whole_lines = (args.run / "eval.jsonl").read_text().rpartition("\n")[0]
        if whole_lines:
            print0(
                "{k} samples: mean@{k} {mean:.1%}, maj@{k} {maj:.1%}, by the run itself at step "
                "{step}".format(**json.loads(whole_lines.splitlines()[-1]))
            )
    print0(
        "\nIntervals: bootstrap over problems. maj@k: silence has no vote, ties share the credit"
    )


def print_statistics(rollout, args, seconds):
    """Print what explains the metrics."""
    lengths = rollout.lengths.double()
    finished = rollout.finished.double().mean()
    no_answer = (rollout.classes == -1).double().mean()
    failures = Counter(kind for group in rollout.failed for kind in group if kind)
    kinds = [f", {count} for {kind}" for kind, count in sorted(failures.items())]
    failed = f"grading failed {failures.total()}{''.join(kinds)}"
    print0(f"finished {finished:.1%}, no answer {no_answer:.1%}, {failed}")
    speed = lengths.sum() / seconds
    print0(f"{lengths.mean():.1f} tokens a response, {seconds:.1f} s, {speed:,.0f} tokens/s")
    if args.reward:
        print0(f"mean reward {rollout.rewards.mean():.4f}")
    if finished < 0.5:
        print0("Warning: most responses were cut off; a larger --max-new-tokens may change this.")


def write_responses(path, rollout, tokenizer):
    """Write one JSON line per response, under a temporary name until all of them are there.

    python reward.py --audit reads these lines.
    """
    partial_path = Path(f"{path}.partial")
    try:
        with open(partial_path, "w", encoding="utf-8") as file:
            for i, problem in enumerate(rollout.problems):
                in_thought = opens_thought(tokenizer, rollout.prompts[i])
                for j, response in enumerate(rollout.texts[i]):
                    line = {
                        "row": problem.row,
                        "sample": j,
                        "correct": bool(rollout.correct[i, j]),
                        "reward": float(rollout.rewards[i, j]),
                        "class": int(rollout.classes[i, j]),
                        "answer": rollout.answers[i][j],
                        "reference": problem.answer,
                        "require_value": problem.require_value,
                        "in_thought": in_thought,
                        "length": int(rollout.lengths[i, j]),
                        "finished": bool(rollout.finished[i, j]),
                        "failed": rollout.failed[i][j],
                        "response": response,
                    }
                    file.write(json.dumps(line) + "\n")
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--compare" in argv:
        exit_with_error("eval.py", "runs are compared by: python study/compare.py RUN ...")
    replace_unprintable()
    try:
        args = parse_flags(argv)
        init_distributed(args.device, timeout=7200)
        evaluate(args)
        shutdown_distributed()
    except (ValueError, OSError) as error:
        exit_with_error("eval.py", error)
    except KeyboardInterrupt:
        print("eval.py: interrupted, nothing written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
