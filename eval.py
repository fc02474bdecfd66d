"""Accuracy of a checkpoint on a file of problems: mean@k, exact maj@k, unbiased pass@k, with intervals over problems.

    python eval.py --model runs/demo/model --data data/arithmetic_test.jsonl --instruction "" --max-new-tokens 64
    python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data problems.jsonl --greedy --limit 100
    torchrun --nproc-per-node 8 eval.py --model DIR --data problems.jsonl      # the problems dealt to eight GPUs
    python eval.py --compare 'runs/*' --baseline grpo                          # runs of train.py, by their files

Same sampler and same checker as in training, which calls evaluate() from here. The noise of a response is a function of
(seed, data row, sample) alone, so that two checkpoints, or one at two steps, are compared on the same draws.

Shapes: N problems, k samples of each, S seeds.
"""

import argparse
import glob
import json
import math
import os
import sys
import time
from collections import Counter, namedtuple
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import Transformer
from reward import SHAPES, Verifier, load_problems
from sampler import encode_prompt, load_tokenizer, sample, stop_token_ids

# What follows a problem unless --instruction says otherwise: the words that the Qwen2.5 models were tuned with
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


# -------------------------------------------------------- ranks: one process for each GPU under torchrun, else just one


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device, timeout):
    """Meets the other processes that torchrun started, if it did. No rank waits for another for over `timeout` s."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Python objects and offloaded shards are exchanged on the CPU also where there are GPUs.
        backend, patience = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timedelta(seconds=timeout)
        store, number, count = next(dist.rendezvous("env://", timeout=patience))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store over its restarts (PyTorch 2.13), and in it the addresses of dead ranks. On one
            # machine all ranks count restarts alike; on several they do not, see README.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)


def leave_ranks():
    """Ends this process, if it is one of several and its work is done; its peers need nothing more from it.

    Without the interpreter's own ending: a thread of gloo's that is about to let go of a tensor at that moment wants
    the interpreter's lock, is ended instead, and takes the process down with it (SIGABRT, PyTorch 2.13)."""
    several = world() > 1
    if dist.is_initialized():
        dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def gather(value):
    """Every rank's value, in the order of ranks, on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def together(work):
    """work() on every rank; if it cannot be done on one of them, a ValueError with its line on all."""
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as problem:
        error = str(problem)
    errors = [line for line in gather(error) if line]
    if errors:
        raise ValueError(errors[0])
    return result


def deal_out(items, work):
    """Deals items to the ranks in turn: (what work(share) gave on each rank that has a share, the order that puts items
    back in place). Ranks meet once all have finished; a ValueError on one of them then ends it on all."""
    shares = [range(r, len(items), world()) for r in range(world())]
    parts = gather(together(lambda: work([items[i] for i in shares[rank()]]) if shares[rank()] else None))
    return [part for part in parts if part is not None], np.argsort([i for share in shares for i in share]).tolist()


def say(text):
    if rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------- sampling and checking


class Evaluation(NamedTuple):
    """What k samples of N problems came to: arrays (N,k)."""

    verdicts: np.ndarray  # bool: right
    classes: np.ndarray  # equivalent answers of a problem share a number; -1: no answer
    answers: np.ndarray  # extracted from the responses, None where there is none
    timed_out: np.ndarray  # bool: the checker gave up, which counts as wrong
    lengths: np.ndarray  # tokens, the stop token counted
    finished: np.ndarray  # bool: ended by a stop token, not by the limit
    responses: np.ndarray  # texts


def evaluate(
    model, tokenizer, problems, verifier, *, k, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, system=None,
    instruction=INSTRUCTION, **options,
):  # fmt: skip
    """Samples and checks k responses to each problem -> Evaluation, in the order of `problems` (which may be a rank's
    share of the data). temperature 0 is greedy. options: further ones of sample()."""
    prompts = [encode_prompt(tokenizer, problem.problem, system, instruction) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + max_new_tokens > model.config.max_position_embeddings:
            raise ValueError(
                f"data row {problem.row}: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's"
                f" {model.config.max_position_embeddings} positions"
            )
    rows = [problem.row for problem in problems]
    samples = sample(model, prompts, k, max_new_tokens, temperature, top_p, top_k, rows=rows, **options)
    texts, groups = check_samples(tokenizer, verifier, samples, problems)
    verdicts, classes, answers, timed_out = zip(*groups)
    columns = verdicts, classes, answers, timed_out, samples.lengths.tolist(), samples.finished.tolist(), texts
    kinds = bool, np.int64, object, bool, np.int64, bool, object
    return Evaluation(*(np.array(column, kind).reshape(len(problems), k) for column, kind in zip(columns, kinds)))


def check_samples(tokenizer, verifier, samples, problems):
    """What sample() gave for these problems, as text and checked: N lists of k responses, N of reward.Group."""
    replies = [row[:length] for row, length in zip(samples.tokens.tolist(), samples.lengths.tolist())]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    k = len(texts) // len(problems)
    texts = [texts[i : i + k] for i in range(0, len(texts), k)]
    return texts, verifier.check(texts, [p.answer for p in problems], [p.require_value for p in problems])


def merge(parts, order):
    """The Evaluations of the ranks' shares as one, in the order of the problems: what deal_out() gives."""
    return Evaluation(*(np.concatenate(field)[order] for field in zip(*parts)))


# ---------------------------------------------------------------------------------- metrics, one value per problem


def mean_at_k(verdicts):
    """Share of right samples: (N,k) -> (N,). Its mean is the accuracy of one sample."""
    return np.asarray(verdicts, dtype=np.float64).mean(axis=1)


def maj_at_k(verdicts, classes):
    """Exact majority vote over answer classes: (N,k) bool, (N,k) int -> credit (N,).

    "No answer" (-1) does not vote. Classes tied for the most votes share the credit: one right among two is 1/2, which
    is the mean over a fair coin, not one throw of it. A problem where nobody votes is wrong.
    """
    credit = np.zeros(len(verdicts))
    for i, (right, labels) in enumerate(zip(np.asarray(verdicts), np.asarray(classes))):
        votes = Counter(labels[labels >= 0].tolist())
        winners = [label for label, count in votes.items() if count == max(votes.values())]
        # credit = #(right classes among the winners) / #winners
        credit[i] = sum(right[labels == label].any() for label in winners) / max(len(winners), 1)
    return credit


def pass_at_k(verdicts, k):
    """Chance that k of the n samples, drawn without replacement, hold a right one: (N,n) -> (N,)."""
    verdicts = np.asarray(verdicts, dtype=bool)
    n = verdicts.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n}, the samples of a problem")
    # pass@k = 1 − C(n−c, k) / C(n, k), c right of n; unbiased, unlike 1 − (1 − c/n)^k   (arXiv 2107.03374, eq. 1)
    by_count = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return by_count[verdicts.sum(axis=1)]


def bootstrap_best_at_k(verdicts, k, resamples=1000, seed=42):
    """The authors' best@k, which is verl's: (N,n) -> (N,). Simulated chance that k samples drawn with replacement hold
    a right one: near 1 − (1 − c/n)^k, hence below pass_at_k. The same draws serve every problem."""
    verdicts = np.asarray(verdicts, dtype=bool)
    # RandomState, numpy's old generator: the very draws of verl's np.random.seed(42); np.random.choice(n, k)
    draws = np.random.RandomState(seed).randint(0, verdicts.shape[1], (resamples, k))
    return np.array([row[draws].any(axis=1).mean() for row in verdicts])


def bootstrap_maj_at_k(verdicts, classes, k, resamples=1000, seed=42):
    """The authors' maj@k, which is verl's: (N,n), (N,n) -> (N,). The vote of k samples drawn with replacement.

    A tie goes to the class that was drawn first. "No answer" (-1) votes like an answer, and may win. (Over strings, as
    theirs is, equal values written differently would be two candidates; here they are one class.)
    """
    verdicts, classes = np.asarray(verdicts, dtype=bool), np.asarray(classes)
    draws = np.random.RandomState(seed).randint(0, verdicts.shape[1], (resamples, k))
    credit = np.zeros(len(verdicts))
    for i, (right, labels) in enumerate(zip(verdicts, classes)):
        drawn = labels[draws]  # (resamples,k)
        votes = (drawn[:, :, None] == drawn[:, None, :]).sum(axis=2)  # of each draw's class
        winner = draws[np.arange(resamples), votes.argmax(axis=1)]  # argmax: the first of the largest
        credit[i] = right[winner].mean()
    return credit


def bootstrap_interval(values, level=0.95, resamples=10_000, seed=0):
    """Percentile interval of the mean of values (N,), resampling problems with replacement -> (low, high).

    Of (S,N), seeds first and then problems: those of a resample are the same for all its seeds, as they are in reality;
    drawn for each seed anew, what makes this set of problems hard or easy would be averaged away.
    """
    values, means = np.atleast_2d(np.asarray(values, dtype=np.float64)), []
    generator, (num_seeds, num_problems) = np.random.default_rng(seed), values.shape
    for size in [100] * (resamples // 100) + [resamples % 100]:  # since (resamples, N) indices may be gigabytes
        problems = generator.integers(0, num_problems, (size, num_problems))
        by_problem = values.mean(axis=0, keepdims=True)
        if num_seeds > 1:
            by_problem = values[generator.integers(0, num_seeds, (size, num_seeds))].mean(axis=1)
        means.append(np.take_along_axis(by_problem, problems, axis=1).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def metrics_per_problem(verdicts, classes):
    """Every metric that k samples support, by name: (N,k), (N,k) -> {name: (N,)}; pass@ at powers of two and at k."""
    k = np.shape(verdicts)[1]
    metrics = {f"mean@{k}": mean_at_k(verdicts)}
    if k > 1:
        metrics[f"maj@{k}"] = maj_at_k(verdicts, classes)
    for size in sorted({2**i for i in range(1, k.bit_length())} | ({k} - {1})):
        metrics[f"pass@{size}"] = pass_at_k(verdicts, size)
    return metrics


# ---------------------------------------------------------------------------------- the command


def refuse(script, message):
    """One line on stderr and exit code 2: what every wrong flag and unreadable file ends in."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def number_in(kind, interval):
    """An argparse type: an int or a float of an interval, "(0, 1]" for one that is above 0 and at most 1."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        value = kind(text)
        above = value > low if interval[0] == "(" else value >= low
        if not (above and (value < high if interval[-1] == ")" else value <= high)):
            raise argparse.ArgumentTypeError(f"{text} is not in {interval}")
        return value

    parse.__name__ = kind.__name__  # argparse's word for what is not a number at all
    return parse


def parse_args(argv):
    """Flags, checked against each other; what is wrong ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.epilog = "python eval.py --compare RUN ... compares runs of train.py (--compare --help)"
    parser.error = partial(refuse, "eval.py")
    whole, count, part = number_in(int, "[0, inf)"), number_in(int, "[1, inf)"), number_in(float, "(0, 1]")
    add = parser.add_argument
    add("--model", required=True, help="directory or Hub id of a model")
    add("--data", required=True, help="problems: JSONL or parquet, a local file or hf://datasets/OWNER/NAME/FILE")
    add("--problem-field", help="field of the problem, a dot for one within another (default: known shapes)")
    add("--answer-field", help="field of the answer, likewise")
    add("--data-fraction", type=part, default=1.0, help="use this part of the problems, drawn by --seed")
    add("--k", type=count, help="samples per problem (default 8, with --greedy 1)")
    add("--temperature", type=number_in(float, "(0, inf)"), default=1.0, help="of sampling (for 0 say --greedy)")
    add("--top-p", type=part, default=1.0, help="sample from the fewest tokens with this much probability (1 = all)")
    add("--top-k", type=whole, default=0, help="sample from this many most likely tokens (0 = all)")
    add("--greedy", action="store_true", help="the most likely token each time, one response per problem")
    add("--max-new-tokens", type=count, default=512, help="longest response in tokens")
    add("--limit", type=whole, default=0, help="first so many problems only (0 = all)")
    add("--seed", type=whole, default=0, help="seed of the sampling noise and of the intervals")
    add("--system", help="system message (default: none, or the chat template's own)")
    add("--stop", action="append", default=[], metavar="TOKEN", help="one more token that ends a response; repeatable")
    add("--instruction", default=INSTRUCTION, help="what follows the problem ('' = nothing; default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="default: float32 on cpu, bfloat16 on cuda")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--rollout-batch", type=whole, default=256, help="most responses in flight, bounds memory (0 = all)")
    add("--out", help="write one JSON line per sample to this file, whole or not at all")
    add("--authors-metrics", action="store_true", help="print the authors' bootstrap maj@k and best@k as well")
    args = parser.parse_args(argv)
    if args.greedy and (args.k not in (None, 1) or args.temperature != 1 or args.top_p != 1 or args.top_k != 0):
        parser.error("--greedy has one response and no distribution: leave out --k, --temperature, --top-p and --top-k")
    args.k = args.k or (1 if args.greedy else 8)
    if args.authors_metrics and args.k < 2:
        parser.error("--authors-metrics needs --k of at least 2: there is no vote of one")
    if bool(args.problem_field) != bool(args.answer_field):
        parser.error("--problem-field and --answer-field belong together")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device here")
    if args.out and (Path(args.out).is_dir() or not os.access(Path(args.out).parent, os.W_OK)):
        parser.error(f"--out {args.out} cannot be written: it needs a file name in an existing, writable directory")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def load_checkpoint(path_or_id, dtype, device, stop=()):
    """Model, tokenizer and stop ids of a directory or Hub id; ValueError in one line if any of them cannot be read."""
    try:
        tokenizer = load_tokenizer(path_or_id)
        model = Transformer.from_pretrained(path_or_id, dtype=getattr(torch, dtype), device=device)
        stop_ids = stop_token_ids(path_or_id, tokenizer, stop)
    except Exception as error:  # damaged files raise what they like: tokenizers and safetensors have types of their own
        place = "" if Path(path_or_id).is_dir() else "no such directory, and as a Hub id: "
        raise ValueError(f"cannot load --model {path_or_id}: {place}{str(error).strip().splitlines()[0]}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"--model {path_or_id}: {len(tokenizer)} tokens, but embeddings for {model.config.vocab_size}")
    model.num_tokens = len(tokenizer)  # ids beyond it have rows in the matrix but mean nothing
    return model, tokenizer, stop_ids


def write_samples(path, problems, evaluation):
    """One JSON line per sample, under a temporary name until all of it is there."""
    unfinished = Path(f"{path}.partial")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for problem, *columns in zip(problems, *(part.tolist() for part in evaluation)):
                for j, values in enumerate(zip(*columns)):
                    right, label, answer, timed_out, length, finished, response = values
                    line = {
                        "row": problem.row, "sample": j, "right": right, "class": label, "answer": answer,
                        "reference": problem.answer, "length": length, "finished": finished, "timed_out": timed_out,
                        "response": response,
                    }  # fmt: skip
                    file.write(json.dumps(line) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def print_summary(evaluation, seconds, seed):
    """The table on the console: every metric with its interval, then what explains it."""
    print(f"\n{'metric':<10}{'value':>8}    95 % interval")
    for name, values in metrics_per_problem(evaluation.verdicts, evaluation.classes).items():
        low, high = bootstrap_interval(values, seed=seed)
        print(f"{name:<10}{values.mean():>8.1%}    {low:6.1%} .. {high:6.1%}")
    finished, silent, lengths = evaluation.finished.mean(), (evaluation.classes == -1).mean(), evaluation.lengths
    print("\nIntervals: bootstrap over problems. maj@k: missing answers do not vote, ties share the credit.")
    print(f"finished {finished:.1%}, no answer {silent:.1%}, checker time-outs {evaluation.timed_out.sum()}")
    print(f"{lengths.mean():.1f} tokens a response, {seconds:.1f} s, {lengths.sum() / seconds:,.0f} tokens/s")
    if finished < 0.5:
        print("Warning: most responses were cut off; a larger --max-new-tokens may change the figures.")


def print_authors_metrics(evaluation):
    """The figures as the authors' code would state them, beside ours and never in their place."""
    k = evaluation.verdicts.shape[1]
    print("\nThe authors' bootstrap: k samples drawn with replacement, 1,000 times, seed 42; missing answers vote")
    for size in sorted({2**i for i in range(1, k.bit_length())} | ({k} - {1})):
        maj = bootstrap_maj_at_k(evaluation.verdicts, evaluation.classes, size).mean()
        best = bootstrap_best_at_k(evaluation.verdicts, size).mean()
        print(f"bootstrap maj@{size:<4}{maj:>7.1%}    bootstrap best@{size:<4}{best:>7.1%}")


# ---------------------------------------------------------------------------------- comparison of runs

# Flags that say where, how fast or how safely a run was made; runs that differ in nothing else are one configuration.
NOT_A_CONFIGURATION = {
    "seed", "run_dir", "resume", "device", "keep", "save_every", "export_every", "export_dtype", "samples_every",
    "micro_tokens", "rollout_batch", "rollout_memory", "verifier_workers", "verifier_timeout", "verifier_memory",
    "timeout", "activation_checkpointing", "cpu_offload", "free_sampler", "compile", "plan",
}  # fmt: skip
TrainedRun = namedtuple("TrainedRun", "path flags evaluations metrics")  # evaluations by step; metrics: a line a step


def read_lines(path):
    """The lines of a run's file, which need not exist yet; a last one without its end was being written."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def load_run(path):
    """The run in a directory -> TrainedRun. ValueError if it has failed: nothing in it can be compared, and why.

    The files of a run that was killed are those of one that is still going. Failed is therefore what says so, has no
    figure to show (no flags, no evaluation, damaged lines), changed its configuration on the way, or came to updates
    that are not finite; the rest counts as far as it came."""

    try:
        about = json.loads(Path(path, "run.json").read_text(encoding="utf-8"))
        evaluations = {line["step"]: line for line in read_lines(f"{path}/eval.jsonl")}
        run = TrainedRun(path, about["flags"], evaluations, read_lines(f"{path}/metrics.jsonl"))
        if (ended := about.get("ended", {})).get("how") == "failed":
            raise ValueError(f"failed after step {ended['step']}: {ended['why']}")
        if changed := [name for resumed in about.get("resumed", ()) for name in resumed["changed"]]:
            raise ValueError(f"two configurations in one run, which was resumed with another {', '.join(changed)}")
        if len({len(line["per_problem"]) for line in run.evaluations.values()}) != 1:
            raise ValueError("evaluations of different problems, or no evaluation when it ended, or yet")
        if run.metrics and run.metrics[-1]["loss"] is None and run.metrics[-1]["prompts_trained"]:
            raise ValueError(f"no update of its last step, {run.metrics[-1]['step']}, was finite")
        group_runs([run])
        run_figures(run, run.evaluations)  # what they need and is not there is noticed now
        return run
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"unreadable: {type(error).__name__}: {error}") from error


def group_runs(runs):
    """Runs by configuration -> ({name: its runs, by seed}, {name: the flags in which configurations differ}).

    A name is the preset, and what tells it from other configurations of that preset."""
    grouped, kinds = {}, {}
    for run in sorted(runs, key=lambda run: run.flags["seed"]):
        # of data files the last two names, since a repository may lie anywhere
        places = {name: "/".join(Path(run.flags[name] or "").parts[-2:]) for name in ("data", "eval_data")}
        kind = {name: value for name, value in (run.flags | places).items() if name not in NOT_A_CONFIGURATION}
        kinds[key := json.dumps(kind, sort_keys=True)] = kind
        same = grouped.setdefault(key, [])
        if same and same[-1].flags["seed"] == run.flags["seed"]:
            raise ValueError(f"{same[-1].path} and {run.path}: equal flags and one seed; leave out one of them")
        same.append(run)

    def differing(kind, others):
        names = sorted(set().union(*others))  # an older run may lack a flag
        return {name: kind.get(name) for name in names if len({json.dumps(one.get(name)) for one in others}) > 1}

    named, flags = {}, {}
    for key, kind in kinds.items():
        rivals = differing(kind, [other for other in kinds.values() if other["algo"] == kind["algo"]])
        name = " ".join([kind["algo"], *(f"{flag}={value}" for flag, value in rivals.items())])
        named[name], flags[name] = grouped[key], differing(kind, list(kinds.values()))
    return named, flags


def run_figures(run, steps):
    """What the evaluations at `steps`, and training up to the last of them, come to: {name: (N,) problems, or (1,)}."""
    steps, k = sorted(steps), next(iter(run.evaluations.values()))["k"]
    means, votes = (np.array([run.evaluations[s][name] for s in steps]) for name in ("per_problem", "per_problem_maj"))
    best = means.mean(axis=1).argmax()  # the first of the best; the vote is that of the same step
    # 1/(s_E − s_0) ∫ accuracy ds, by trapezoids: the mean accuracy along the way
    area = np.trapezoid(means, steps, axis=0) / (steps[-1] - steps[0]) if len(steps) > 1 else means[0]
    figures = {
        f"mean@{k}, last step": means[-1], f"mean@{k}, best step": means[best], f"maj@{k}, last step": votes[-1],
        f"maj@{k}, best step": votes[best], f"mean@{k}, area under the curve": area,
    }  # fmt: skip
    if lines := [line for line in run.metrics if line["step"] <= steps[-1]]:
        figures |= {
            "tokens sampled": lines[-1]["tokens"],
            "seconds": sum(line["seconds"] for line in lines),
            "groups of equal verdicts": np.mean([line.get("equal_groups_drawn", 1 - line["mixed"]) for line in lines]),
            "groups without gradient": np.mean([line["zero_gradient_groups"] for line in lines]),
            "wrong responses pushed up": np.mean([line["wrong_pushed_up"] for line in lines]),
        }
    return {name: np.atleast_1d(values) for name, values in figures.items()}


def compare_runs(named, baseline):
    """One dict for each figure and configuration: its mean over runs, the interval, and both of the difference to the
    baseline's runs of the same seeds, at the steps that both evaluated: half a run against a whole one says nothing."""

    def summary(by_run):
        values = np.array(by_run, dtype=np.float64)  # (S,N) or (S,1)
        interval = bootstrap_interval(values) if values.size > 1 else None
        return {"mean": values.mean(), "interval": interval, "runs": values.mean(axis=1).tolist()}

    rows, others = [], {run.flags["seed"]: run for run in named.get(baseline, ())}
    for name, same in named.items():
        own, pairs = [run_figures(run, run.evaluations) for run in same], []
        for run in same:
            other = others.get(run.flags["seed"]) if name != baseline else None
            if other and (steps := set(run.evaluations) & set(other.evaluations)):
                pairs.append((run_figures(run, steps), run_figures(other, steps)))
        for key in own[0]:
            rows.append({"figure": key, "configuration": name} | summary([one[key] for one in own if key in one]))
            gaps = [one[key] - two[key] for one, two in pairs if key in one and key in two]
            rows[-1]["difference"] = summary(gaps) if gaps else None
    order = [row["figure"] for row in rows]
    return sorted(rows, key=lambda row: order.index(row["figure"]))


def figure_text(row, sign=""):
    """A figure with its interval or, with "+" for a sign, its difference, and a star where that excludes 0."""
    one = row["difference"] if sign else row
    form = (f"{{:{sign},.0f}}" if row["figure"] in ("tokens sampled", "seconds") else f"{{:{sign}.1%}}").format
    if one is None or one["interval"] is None:
        return form(one["mean"]) if one else ""
    low, high = one["interval"]
    return f"{form(one['mean'])} [{form(low)}, {form(high)}]" + " *" * (sign == "+" and low * high > 0)


def print_comparison(report):
    """Tables, aligned on the console and in Markdown."""

    def show(*rows):
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
            print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |")

    seeds = {name: ", ".join(f"{r['seed']}" + f" (unfinished: step {r['step']} of {r['of']})" * (r["step"] < r["of"])
                             for r in runs) for name, runs in report["runs"].items()}  # fmt: skip
    show(["configuration", *next(iter(report["flags"].values())), "seeds"],
         *([name, *map(str, flags.values()), seeds[name]] for name, flags in report["flags"].items()))  # fmt: skip
    print("".join(f"\nfailed, and in no figure: {path}: {reason}" for path, reason in report["failed"].items()))
    minus = [f"minus {report['baseline']}"] if report["baseline"] else []
    show(["figure", "configuration", "value [95 % interval]", *minus],
         *([row["figure"], row["configuration"], figure_text(row), *[figure_text(row, "+") for _ in minus]]
           for row in report["figures"]))  # fmt: skip
    print(f"\n{report['problems']} held-out problems. Best step: each run's evaluation with the highest mean, chosen "
          "on these same problems,\nwhich flatters it. Tokens, seconds and groups: training up to the last evaluation; "
          "shares are means over steps.\nIntervals: bootstrap over seeds, then problems; the lower five over seeds.")
    if lone := [name for name, runs in report["runs"].items() if len(runs) == 1]:
        print(f"One seed, so over problems only, which says nothing of other seeds: {'; '.join(lone)}")
    if count := sum(bool(row["difference"]) for row in report["figures"]):
        print("Differences: seed by seed, problem by problem, up to the last step that both evaluated. * its interval "
              f"excludes 0;\nof {count} differences that were all 0, {count / 20:.1f} would by chance.")  # fmt: skip


def plot_curves(named, path):
    """Held-out mean@k over the steps that all runs of a configuration evaluated, with its 95 % band."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.5), layout="tight")
    axes = drawing.subplots()
    for name, same in named.items():
        steps = sorted(set.intersection(*(set(run.evaluations) for run in same)))
        values = [np.array([run.evaluations[step]["per_problem"] for run in same]) for step in steps]  # (S,N) each
        (line,) = axes.plot(steps, [v.mean() for v in values], "o-", label=f"{name} (seeds: {len(same)})")
        bands = np.transpose([bootstrap_interval(v) for v in values])
        axes.fill_between(steps, *bands, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out accuracy, 95 % band", ylim=(0, 1))
    axes.legend(frameon=False)
    drawing.savefig(path, dpi=110)


def compare(argv):
    """python eval.py --compare ...: runs of train.py, from their files alone."""
    parser = argparse.ArgumentParser(description="Compare runs of train.py by their files.", allow_abbrev=False)
    parser.error = partial(refuse, "eval.py")
    add = parser.add_argument
    add("--compare", nargs="+", required=True, metavar="RUN", help="directories of runs, or globs in quotes")
    add("--baseline", metavar="RUN_OR_CONFIGURATION", help="what differences are taken to")
    add("--plot", metavar="PNG", help="draw the held-out curves with their bands (needs matplotlib)")
    add("--json", metavar="FILE", help="write all figures, each run's too, to this file")
    args = parser.parse_args(argv)
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    runs, failed = {}, {}
    try:
        for pattern in args.compare:
            if not (found := [str(Path(path)) for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]):
                raise ValueError(f"--compare {pattern}: no such directory")
            for path in found:
                try:
                    runs[path] = load_run(path)
                except ValueError as error:
                    failed[path] = str(error)
        if not runs:
            raise ValueError(f"nothing to compare: {'; '.join(f'{path}: {why}' for path, why in failed.items())}")
        named, flags = group_runs(runs.values())
        judged = {(line["k"], len(line["per_problem"]), Path(run.flags["eval_data"]).name)
                  for run in runs.values() for line in run.evaluations.values()}  # fmt: skip
        if len(judged) > 1:
            raise ValueError(f"runs were evaluated on different things, (k, problems, file): {sorted(judged)}")
        places = {run.path: name for name, same in named.items() for run in same}
        baseline = args.baseline and places.get(str(Path(args.baseline)), args.baseline)
        if baseline not in (None, *named):
            raise ValueError(f"--baseline {baseline} is neither one of the runs nor one of: {'; '.join(named)}")
        about = {name: [{"path": run.path, "seed": run.flags["seed"], "step": max(run.evaluations),
                         "of": run.flags["steps"]} for run in same] for name, same in named.items()}  # fmt: skip
        report = {"problems": min(judged)[1], "baseline": baseline, "flags": flags, "runs": about, "failed": failed,
                  "figures": compare_runs(named, baseline)}  # fmt: skip
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if args.plot:
            plot_curves(named, args.plot)
    except (ValueError, OSError) as error:
        refuse("eval.py", error)
    print_comparison(report)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--compare" in argv:
        return compare(argv)
    args = parse_args(argv)
    try:
        join_ranks(args.device, timeout=7200)
        dropped = Counter()
        shapes = [(args.problem_field, args.answer_field, "solution")] if args.problem_field else SHAPES
        problems = load_problems(args.data, dropped, shapes, args.data_fraction, args.seed)[: args.limit or None]
        if not problems:
            raise ValueError(f"{args.data} holds no usable problem (dropped: {dict(dropped) or 'none'})")
        model, tokenizer, stop_ids = load_checkpoint(args.model, args.dtype, args.device, args.stop)
        reasons = "".join(f", {count} dropped ({reason})" for reason, count in sorted(dropped.items()))
        shape = f"temperature {args.temperature:g}, top-p {args.top_p:g}, top-k {args.top_k}"
        how = "one greedy response each" if args.greedy else f"{args.k} samples each at {shape}, seed {args.seed}"
        say(f"model     {args.model}, {args.dtype} on {args.device}" + f", {world()} ranks" * (world() > 1))
        say(f"data      {args.data}: {len(problems)} problems{reasons}")
        say(f"sampling  {how}, at most {args.max_new_tokens} tokens")
        started = time.monotonic()
        quiet = rank() > 0 or None  # None: a bar on a terminal, nothing in a log file
        with Verifier() as verifier, tqdm(unit=" tokens", unit_scale=True, disable=quiet, leave=False) as bar:
            parts, order = deal_out(problems, lambda share: evaluate(
                model, tokenizer, share, verifier, k=args.k, max_new_tokens=args.max_new_tokens,
                temperature=0.0 if args.greedy else args.temperature, top_p=args.top_p, top_k=args.top_k,
                stop_ids=stop_ids, seed=args.seed, system=args.system, instruction=args.instruction,
                max_rows=args.rollout_batch, on_tokens=bar.update,
            ))  # fmt: skip
        if rank() == 0:
            evaluation = merge(parts, order)
            if args.out:
                write_samples(args.out, problems, evaluation)
            print_summary(evaluation, time.monotonic() - started, args.seed)
            if args.authors_metrics:
                print_authors_metrics(evaluation)
        leave_ranks()
    except (ValueError, OSError) as error:
        refuse("eval.py", error)
    except KeyboardInterrupt:
        print("eval.py: interrupted, nothing written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
