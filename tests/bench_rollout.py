"""Our sampler beside transformers' generate: same weights, prompts, drawn response lengths and threads, in one process.

    python tests/bench_rollout.py                                           # a tiny random model
    python tests/bench_rollout.py --model DIR --dtype bfloat16 --prompts 4  # a model directory
    python tests/bench_rollout.py --shape 0.5b --dtype bfloat16             # Qwen2.5-0.5B's shape, random weights
    python tests/bench_rollout.py --scaling                                 # ours: more rows, longer responses

The sides take turns; medians count. The bound is what the machine allows: for every pass the longer of reading weights
and cache at the memory bandwidth and of multiplying at the matmul rate, both measured between the runs, for a sampler
that runs each prompt once and drops finished rows. "With torch": the same where torch's own matmul sets the rate.
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
from operator import truediv
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import model as model_file
from model import Transformer, product
from sampler import sample

QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "eos_token_id": 0}
SHAPES = {
    "tiny": dict(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=2048, rope_theta=1e4),
    "0.5b": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6),
}  # fmt: skip


def workload(vocab, prompts, group_size, shortest, longest, seed):
    """Random prompts of 16 to 128 tokens and a drawn length for each response."""
    r = random.Random(seed)
    texts = [[r.randrange(vocab) for _ in range(r.randint(16, 128))] for _ in range(prompts)]
    return texts, [r.randint(shortest, longest) for _ in range(prompts * group_size)]


def generate(model, prompts, group_size, lengths, cache):
    """transformers' side: left-padded prompts, each row stopped at its drawn length, nothing else that ends one."""
    wanted, width = torch.tensor(lengths), max(map(len, prompts))

    class Drawn(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return wanted <= input_ids.shape[1] - width

    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                         num_return_sequences=group_size, max_new_tokens=max(lengths),
                         stopping_criteria=StoppingCriteriaList([Drawn()]), **static)  # fmt: skip
    assert out.shape == (len(lengths), width + max(lengths))


def best_of(run, clock, repeats=5):
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


def machine(dtype, clock):
    """Memory bandwidth in bytes/s (reading 512 MiB), and matmul rates in flop/s (2,048³): of the faster of torch's and
    our product, which no side is to beat, and of torch's; the best of several."""
    block, square = torch.ones(2**27), torch.randn(2048, 2048).to(dtype)
    theirs, ours = best_of(lambda: square @ square, clock), best_of(lambda: product(square, square), clock)
    return block.nbytes / best_of(block.sum, clock), 2 * 2048**3 / min(theirs, ours), 2 * 2048**3 / theirs


def bound(config, dtype, prompts, group_size, lengths, bandwidth, rate):
    """Seconds that the machine needs at least."""
    c, heads = config, config.num_attention_heads * config.head_dim
    pairs = 2 * c.num_key_value_heads * c.head_dim  # numbers that one token adds to one layer's cache
    body = c.num_hidden_layers * c.hidden_size * (2 * heads + pairs + 3 * c.intermediate_size)
    head, layers = c.vocab_size * c.hidden_size, c.num_hidden_layers

    def at_least(flop, numbers):
        return max(flop / rate, numbers * dtype.itemsize / bandwidth)

    prompt_flop = sum(2 * body * len(p) + 2 * head + 2 * layers * heads * len(p) ** 2 for p in prompts)
    seconds = at_least(prompt_flop, body + head)
    starts = [len(prompt) for prompt in prompts for _ in range(group_size)]
    for t in range(1, max(lengths)):
        read = [start + t for start, length in zip(starts, lengths) if length > t]
        flop = 2 * (body + head) * len(read) + 4 * layers * heads * sum(read)
        seconds += at_least(flop, body + head + layers * pairs * sum(read))
    return seconds


def compare(args, ours, theirs, report):
    prompts, lengths = workload(ours.config.vocab_size, args.prompts, args.group_size, 8, args.max_new, args.seed)
    sides = {"ours": lambda p, g, n: sample(ours, p, g, n, max_rows=args.max_rows)}
    for cache in ("dynamic", "static") if theirs else ():
        sides[f"generate, {cache} cache"] = lambda p, g, n, cache=cache: generate(theirs, p, g, n, cache)
    for side in sides.values():
        side(prompts[:2], 2, [8] * 4)
    seconds, bounds, easier = {name: [] for name in sides}, [], []
    for _ in range(args.repeat):
        read, *rates = machine(args.dtype, args.clock)
        for rate, limits in zip(rates, (bounds, easier)):
            limits.append(bound(ours.config, args.dtype, prompts, args.group_size, lengths, read, rate))
        print(f"read {read / 1e9:.1f} GB/s, matmul {rates[0] / 1e9:.0f} GFLOP/s: {bounds[-1]:.2f} s at least;"
              f" with torch's matmul, {rates[1] / 1e9:.0f} GFLOP/s: {easier[-1]:.2f} s")  # fmt: skip
        for name, side in sides.items():
            start = args.clock()
            side(prompts, args.group_size, lengths)
            seconds[name].append(args.clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    theirs_best = min([medians[name] for name in list(sides)[1:]], default=None)
    report |= {"tokens": sum(lengths), "rows": len(lengths), "seconds": seconds}
    report |= {"bound_s": bounds, "bound_with_torch_s": easier}
    print(f"{sum(lengths)} tokens of {len(lengths)} responses, medians of {args.repeat}\n")
    print(f"{'':24}{'seconds':>9}{'tokens/s':>10}{'of the bound':>14}{'with torch':>12}{'to the better generate':>24}")
    for name, median in medians.items():
        share, other = (statistics.median(map(truediv, limits, seconds[name])) for limits in (bounds, easier))
        ratio = f"{theirs_best / median:.2f}" if theirs_best else ""
        print(f"{name:24}{median:9.2f}{sum(lengths) / median:10.1f}{share:14.1%}{other:12.1%}{ratio:>24}")
        report |= {f"{name}: share of the bound": share, f"{name}: share with torch's matmul": other}
        report |= {f"{name}: to the better generate": ratio}


def scaling(args, ours, report):
    """Ours alone: time per token as rows are added at 64 tokens each, and as 16 responses grow to 1,024 tokens.

    The time inside the attention operation is taken apart: it grows with the context by its nature."""
    attention, spent = model_file.F.scaled_dot_product_attention, [0.0]

    def timed(*tensors, **options):
        start = args.clock()
        result = attention(*tensors, **options)
        spent[0] += args.clock() - start
        return result

    model_file.F.scaled_dot_product_attention = timed
    cases = [(rows, 64) for rows in (16, 64, 128, 512)] + [(16, length) for length in (128, 256, 512, 1024)]
    times = {case: [] for case in cases}
    for _ in range(args.repeat + 1):  # the first round warms up
        for rows, length in cases:
            prompts, _ = workload(ours.config.vocab_size, rows // args.group_size, args.group_size, 1, 1, args.seed)
            prompts, spent[0] = [(prompt * 8)[:64] for prompt in prompts], 0.0
            start = args.clock()
            sample(ours, prompts, args.group_size, length, max_rows=args.max_rows)
            times[rows, length].append((args.clock() - start, spent[0]))
    print(f"{'rows':>6}{'tokens each':>13}{'µs/token':>11}{'attention':>11}{'the rest':>10}  medians of {args.repeat}")
    for (rows, length), runs in times.items():
        whole, inside = (1e6 * statistics.median(part) / rows / length for part in zip(*runs[1:]))
        print(f"{rows:6}{length:13}{whole:11.1f}{inside:11.1f}{whole - inside:10.1f}")
        report[f"{rows} rows of {length}"] = {"us_per_token": whole, "attention": inside}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory (default: random weights of --shape)")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the random model")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--prompts", type=int, default=16, help="of 16 to 128 tokens")
    parser.add_argument("--group-size", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--max-new", type=int, default=128, help="longest response; lengths are drawn from 8 to this")
    parser.add_argument("--max-rows", type=int, default=0, help="our rows in flight (0 = all)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of prompts, lengths and random weights")
    parser.add_argument("--ours", action="store_true", help="leave out generate")
    parser.add_argument("--scaling", action="store_true", help="ours against itself instead, by rows and by length")
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time,
                        default=time.perf_counter, help="one thread's CPU time, where others use the machine")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = f"{folder}/model"
            Transformer.from_config(QWEN2 | SHAPES[args.shape], args.dtype, seed=args.seed).save_pretrained(args.model)
        ours, theirs = Transformer.from_pretrained(args.model, args.dtype), None
        if not (args.ours or args.scaling):
            theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
        report = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
        if args.scaling:
            scaling(args, ours, report)
        else:
            compare(args, ours, theirs, report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
