"""Our sampler beside transformers' generate, in one process: same weights, prompts, drawn response
lengths and threads.

    python tests/bench_rollout.py                               # a tiny random model
    python tests/bench_rollout.py --model DIR --dtype bfloat16  # a model directory
    python tests/bench_rollout.py --shape 0.5b                  # Qwen2.5-0.5B's, random weights
    python tests/bench_rollout.py --scaling                     # ours: more rows, longer responses

The sides take turns; medians count. The bound is what the machine allows: every pass takes the
longer of reading weights and cache at the memory bandwidth and of multiplying at the matmul rate,
both measured between the runs, for a sampler that runs each prompt once and drops finished rows.
For steady figures pin one thread to a quiet core:

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive taskset -c 1 python tests/bench_rollout.py
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import sampler
from model import Transformer

QWEN2 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
SHAPES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 1e4,
    },
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
}


def workload(vocab, prompts, group_size, shortest, longest, seed):
    """Random prompts of 16 to 128 tokens and a drawn length for each response."""
    r = random.Random(seed)
    texts = [[r.randrange(vocab) for _ in range(r.randint(16, 128))] for _ in range(prompts)]
    return texts, [r.randint(shortest, longest) for _ in range(prompts * group_size)]


def generate(model, prompts, group_size, lengths, cache):
    """transformers' side: left-padded prompts; each row stops at its drawn length and at nothing
    else."""
    device = model.device
    wanted = torch.tensor(lengths, device=device)
    width = max(map(len, prompts))

    class Drawn(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return wanted <= input_ids.shape[1] - width

    padding = [width - len(prompt) for prompt in prompts]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    ids = [[0] * pad + prompt for pad, prompt in zip(padding, prompts)]
    options = {}
    if cache == "static":
        options = {"cache_implementation": "static", "disable_compile": True}
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        num_return_sequences=group_size,
        max_new_tokens=max(lengths),
        stopping_criteria=StoppingCriteriaList([Drawn()]),
        **options,
    )
    assert out.shape == (len(lengths), width + max(lengths))


def best_of(run, clock, repeats=5):
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


def machine(dtype, clock, device="cpu", size=2048):
    """Memory bandwidth in bytes/s (reading 512 MiB) and matmul rate in flop/s (size³), each the
    best of several."""
    block = torch.ones(2**27, device=device)
    square = torch.randn(size, size, device=device).to(dtype)
    bandwidth = block.nbytes / best_of(block.sum, clock)
    return bandwidth, 2 * size**3 / best_of(lambda: square @ square, clock)


def bound(config, dtype, prompts, group_size, lengths, bandwidth, rate):
    """Seconds that the machine needs at least."""
    layers = config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    pairs = 2 * config.num_key_value_heads * config.head_dim  # numbers a token adds to one layer
    body = layers * config.hidden_size * (2 * heads + pairs + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size

    def at_least(flop, numbers):
        return max(flop / rate, numbers * dtype.itemsize / bandwidth)

    prompt_flop = 0
    for prompt in prompts:
        prompt_flop += 2 * body * len(prompt) + 2 * head + 2 * layers * heads * len(prompt) ** 2
    seconds = at_least(prompt_flop, body + head)
    starts = [len(prompt) for prompt in prompts for _ in range(group_size)]
    for t in range(1, max(lengths)):
        read = [start + t for start, length in zip(starts, lengths) if length > t]
        flop = 2 * (body + head) * len(read) + 4 * layers * heads * sum(read)
        seconds += at_least(flop, body + head + layers * pairs * sum(read))
    return seconds


def compare(args, ours, theirs, report):
    vocab = ours.config.vocab_size
    prompts, lengths = workload(vocab, args.prompts, args.group_size, 8, args.max_new, args.seed)
    sides = {"ours": lambda p, g, n: sampler.generate(ours, p, g, n, max_rows=args.max_rows)}
    for cache in ("dynamic", "static") if theirs else ():
        sides[f"generate, {cache} cache"] = partial(generate, theirs, cache=cache)
    for side in sides.values():
        side(prompts[:2], 2, [8] * 4)
    seconds = {name: [] for name in sides}
    bounds = []
    for _ in range(args.repeat):
        read, rate = machine(args.dtype, args.clock)
        least = bound(ours.config, args.dtype, prompts, args.group_size, lengths, read, rate)
        bounds.append(least)
        print(
            f"read {read / 1e9:.1f} GB/s, matmul {rate / 1e9:.0f} GFLOP/s: {least:.2f} s at least"
        )
        for name, side in sides.items():
            start = args.clock()
            side(prompts, args.group_size, lengths)
            seconds[name].append(args.clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    theirs_best = min([medians[name] for name in list(sides)[1:]], default=None)
    report |= {"tokens": sum(lengths), "rows": len(lengths), "seconds": seconds, "bound_s": bounds}
    print(f"{sum(lengths)} tokens of {len(lengths)} responses, medians of {args.repeat}\n")
    print(
        f"{'':24}{'seconds':>9}{'tokens/s':>10}{'of the bound':>14}{'to the better generate':>24}"
    )
    for name, median in medians.items():
        share = statistics.median(least / s for least, s in zip(bounds, seconds[name]))
        ratio = f"{theirs_best / median:.2f}" if theirs_best else ""
        print(f"{name:24}{median:9.2f}{sum(lengths) / median:10.1f}{share:14.1%}{ratio:>24}")
        report[f"{name}: share of the bound"] = share
        report[f"{name}: to the better generate"] = ratio


def scaling(args, ours, report):
    """Ours alone: time per token as rows are added at 64 tokens each, and as 16 responses grow to
    1,024 tokens. The time inside the attention operation is taken apart: it grows with the context
    by its nature."""
    attention = torch.nn.functional.scaled_dot_product_attention
    spent = 0.0

    def timed(*tensors, **options):
        nonlocal spent
        start = args.clock()
        result = attention(*tensors, **options)
        spent += args.clock() - start
        return result

    torch.nn.functional.scaled_dot_product_attention = timed
    cases = [(rows, 64) for rows in (16, 64, 128, 512)]
    cases += [(16, length) for length in (128, 256, 512, 1024)]
    times = {case: [] for case in cases}
    for _ in range(args.repeat + 1):  # the first round warms up
        for rows, length in cases:
            count = rows // args.group_size
            prompts, _ = workload(ours.config.vocab_size, count, 1, 1, 1, args.seed)
            prompts = [(prompt * 8)[:64] for prompt in prompts]
            spent = 0.0
            start = args.clock()
            sampler.generate(ours, prompts, args.group_size, length, max_rows=args.max_rows)
            times[rows, length].append((args.clock() - start, spent))
    print(f"{'rows':>6}{'tokens each':>13}{'µs/token':>11}{'attention':>11}{'the rest':>10}")
    for (rows, length), runs in times.items():
        per_token = 1e6 / rows / length
        whole, inside = (per_token * statistics.median(part) for part in zip(*runs[1:]))
        print(f"{rows:6}{length:13}{whole:11.1f}{inside:11.1f}{whole - inside:10.1f}")
        report[f"{rows} rows of {length}"] = {"us_per_token": whole, "attention": inside}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="model directory (default: random weights of --shape)")
    add("--shape", choices=SHAPES, default="tiny", help="shape of the random model")
    add("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    add("--prompts", type=int, default=16, help="of 16 to 128 tokens")
    add("--group-size", type=int, default=8, help="responses to a prompt")
    add("--max-new", type=int, default=128, help="longest response; lengths are drawn from 8 to it")
    add("--max-rows", type=int, default=0, help="our rows in flight (0 = all)")
    add("--repeat", type=int, default=3, help="runs of each side, in turn")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0, help="of prompts, lengths and random weights")
    add("--ours", action="store_true", help="leave out generate")
    add("--scaling", action="store_true", help="ours alone, by rows and by length")
    add(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="one thread's CPU time, where others use the machine",
    )
    add("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = f"{folder}/model"
            config = QWEN2 | SHAPES[args.shape]
            model = Transformer.from_config(config, args.dtype, seed=args.seed)
            model.save_pretrained(args.model)
        ours = Transformer.from_pretrained(args.model, args.dtype)
        theirs = None
        if not (args.ours or args.scaling):
            theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        report = {name: str(value) for name, value in vars(args).items()}
        report["torch"] = torch.__version__
        if args.scaling:
            scaling(args, ours, report)
        else:
            compare(args, ours, theirs, report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
