"""Accuracy of a checkpoint on a file of problems: mean@k, exact maj@k, unbiased pass@k, with intervals over problems.

    python eval.py --model runs/demo/model --data data/arithmetic_test.jsonl --instruction "" --max-new-tokens 64
    python eval.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data problems.jsonl --greedy --limit 100
    torchrun --nproc-per-node 8 eval.py --model DIR --data problems.jsonl      # the problems dealt to eight GPUs

Same sampler and same checker as in training, which calls evaluate() from here. The noise of a response is a function of
(seed, data row, sample) alone, so that two checkpoints, or one at two steps, are compared on the same draws.

Shapes: N problems, k samples of each.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import Transformer
from reward import Verifier, load_problems
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
    """Deals items to the ranks in turn: (what work(share) gave on each rank, the order that puts items back in place).

    Ranks meet once all have finished; a ValueError on one of them then ends it on all."""
    shares = [range(r, len(items), world()) for r in range(world())]
    parts = gather(together(lambda: work([items[i] for i in shares[rank()]])))
    return parts, np.argsort([i for share in shares for i in share]).tolist()


def say(text):
    if rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------- sampling and checking


class Evaluation(NamedTuple):
    """What k samples of N problems came to: arrays (N,k), and N lists of k strings."""

    verdicts: np.ndarray  # bool: right
    classes: np.ndarray  # equivalent answers of a problem share a number; -1: no answer
    lengths: np.ndarray  # tokens, the stop token counted
    finished: np.ndarray  # bool: ended by a stop token, not by the limit
    timed_out: np.ndarray  # bool: the checker gave up, which counts as wrong
    answers: list  # extracted answers, None where there is none
    responses: list  # texts


def evaluate(
    model, tokenizer, problems, verifier, *, k, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stop_ids=(),
    seed=0, system=None, instruction=INSTRUCTION, max_rows=0, on_tokens=None,
):  # fmt: skip
    """Samples and checks k responses to each problem -> Evaluation, in the order of `problems` (which may be a rank's
    share of the data, or empty). temperature 0 is greedy. max_rows bounds the rows in flight (0: all at once)."""
    prompts = [encode_prompt(tokenizer, problem.problem, system, instruction) for problem in problems]
    for problem, prompt in zip(problems, prompts):
        if len(prompt) + max_new_tokens > model.config.max_position_embeddings:
            raise ValueError(
                f"data row {problem.row}: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's"
                f" {model.config.max_position_embeddings} positions"
            )
    responses, lengths, finished = [], [], []
    if prompts:
        samples = sample(
            model, prompts, k, max_new_tokens, temperature, top_p, top_k, stop_ids=stop_ids, seed=seed,
            rows=[problem.row for problem in problems], max_rows=max_rows, on_tokens=on_tokens,
        )  # fmt: skip
        lengths, finished = samples.lengths.tolist(), samples.finished.tolist()
        tokens = [row[:length] for row, length in zip(samples.tokens.tolist(), lengths)]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        responses = [texts[i : i + k] for i in range(0, len(texts), k)]
    groups = verifier.check(responses, [p.answer for p in problems], [p.require_value for p in problems])

    def table(rows, dtype):
        return np.array(rows, dtype=dtype).reshape(len(problems), k)

    return Evaluation(
        table([group.verdicts for group in groups], bool),
        table([group.classes for group in groups], np.int64),
        table(lengths, np.int64),
        table(finished, bool),
        table([group.timed_out for group in groups], bool),
        [group.answers for group in groups],
        responses,
    )


def merge(parts, order):
    """The Evaluations of the ranks' shares as one, in the order of the problems: what deal_out() gives."""

    def joined(field):
        if isinstance(field[0], np.ndarray):
            return np.concatenate(field)[order]
        rows = [row for share in field for row in share]
        return [rows[i] for i in order]

    return Evaluation(*map(joined, zip(*parts)))


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


def bootstrap_interval(values, level=0.95, resamples=10_000, seed=0):
    """Percentile interval of the mean of values (N,), resampling problems with replacement -> (low, high)."""
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rounds = [100] * (resamples // 100) + [resamples % 100]  # in rounds, since (resamples, N) indices may be gigabytes
    means = [values[generator.integers(0, len(values), (size, len(values)))].mean(axis=1) for size in rounds]
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


def _refuse(message):
    """One line on stderr and exit code 2: what every wrong flag and unreadable file ends in."""
    if os.environ.get("RANK", "0") == "0":
        print(f"eval.py: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv):
    """Flags, checked against each other; what is wrong ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = _refuse
    add = parser.add_argument
    add("--model", required=True, help="directory or Hub id of a model")
    add("--data", required=True, help="JSONL file of problems with their answers")
    add("--k", type=int, help="samples per problem (default 8, with --greedy 1)")
    add("--temperature", type=float, default=1.0, help="sampling temperature, above 0")
    add("--top-p", type=float, default=1.0, help="sample from the fewest tokens with this much probability (1 = all)")
    add("--top-k", type=int, default=0, help="sample from this many most likely tokens (0 = all)")
    add("--greedy", action="store_true", help="the most likely token each time, one response per problem")
    add("--max-new-tokens", type=int, default=512, help="longest response in tokens")
    add("--limit", type=int, default=0, help="first so many problems only (0 = all)")
    add("--seed", type=int, default=0, help="seed of the sampling noise and of the intervals")
    add("--system", help="system message (default: none, or the chat template's own)")
    add("--stop", action="append", default=[], metavar="TOKEN", help="one more token that ends a response; repeatable")
    add("--instruction", default=INSTRUCTION, help="what follows the problem ('' = nothing; default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="default: float32 on cpu, bfloat16 on cuda")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--rollout-batch", type=int, default=256, help="most responses in flight, bounds memory (0 = all)")
    add("--out", help="write one JSON line per sample to this file, whole or not at all")
    args = parser.parse_args(argv)
    if args.greedy and (args.k not in (None, 1) or args.temperature != 1 or args.top_p != 1 or args.top_k != 0):
        parser.error("--greedy has one response and no distribution: leave out --k, --temperature, --top-p and --top-k")
    args.k = args.k if args.k is not None else 1 if args.greedy else 8
    for flag, least in (("k", 1), ("top_k", 0), ("max_new_tokens", 1), ("limit", 0), ("seed", 0), ("rollout_batch", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least {least}")
    if not 0 < args.temperature < math.inf:
        parser.error(f"--temperature is {args.temperature}; it must be above 0 (for 0 say --greedy)")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p is {args.top_p}; it must be above 0 and at most 1")
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
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for i, problem in enumerate(problems):
                for j in range(evaluation.verdicts.shape[1]):
                    line = {
                        "row": problem.row,
                        "sample": j,
                        "right": bool(evaluation.verdicts[i, j]),
                        "class": int(evaluation.classes[i, j]),
                        "answer": evaluation.answers[i][j],
                        "reference": problem.answer,
                        "length": int(evaluation.lengths[i, j]),
                        "finished": bool(evaluation.finished[i, j]),
                        "timed_out": bool(evaluation.timed_out[i, j]),
                        "response": evaluation.responses[i][j],
                    }
                    file.write(json.dumps(line) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def main(argv=None):
    args = parse_args(argv)
    try:
        join_ranks(args.device, timeout=7200)
        dropped = Counter()
        problems = load_problems(args.data, dropped)
        problems = problems[: args.limit or None]
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
        # disable=None: a bar on a terminal, nothing in a log file
        quiet = None if rank() == 0 else True
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
        if world() > 1:
            dist.destroy_process_group()
    except (ValueError, OSError) as error:
        _refuse(error)
    except KeyboardInterrupt:
        print("eval.py: interrupted, nothing written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
