"""Log-probs with backward for 8 x 512 tokens at a vocabulary of 151,936: ours beside full logits
and log_softmax.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python tests/bench_memory.py

The other side takes about 10 GB.
Each side runs in a process of its own, in turn, from the same numbers. Memory is the peak over what
inputs and libraries take beforehand, gradients included; the two sides' values and gradients are
then compared."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import token_logprobs

SIDES = ("ours", "log_softmax")


def resident(field):
    """MB of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def child(side, tokens, vocab, size, threads, file):
    """One side, once: its results to `file`, its figures to standard output."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size).requires_grad_()
    weight = (torch.randn(vocab, size) * 0.02).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    outer = torch.randn(tokens)
    torch.randn(512, 512) @ torch.randn(
        512, 512
    )  # a library's own buffers are no part of either side
    before = resident("VmRSS")
    start = time.perf_counter()
    cpu_start = time.process_time()
    if side == "ours":
        logprobs, _ = token_logprobs(hidden, weight, targets)
    else:
        logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (logprobs * outer).sum().backward()
    figures = {"mb": resident("VmHWM") - before, "seconds": time.perf_counter() - start}
    figures["cpu_seconds"] = time.process_time() - cpu_start
    print(json.dumps(figures))
    torch.save([logprobs.detach(), hidden.grad, weight.grad], file)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8 * 512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--size", type=int, default=896, help="hidden size")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        side, file = args.child
        return child(side, args.tokens, args.vocab, args.size, args.threads, file)
    figures = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for side in SIDES:
                place = f"{folder}/{side}"
                command = [sys.executable, __file__, *sys.argv[1:], "--child", side, place]
                output = subprocess.run(command, check=True, capture_output=True).stdout
                figures[side].append(json.loads(output))
        ours, theirs = (torch.load(f"{folder}/{side}") for side in SIDES)
    medians = {}
    for side, runs in figures.items():
        medians[side] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    title = f"medians of {args.repeat}"
    print(f"{title:16}{'MB over the base':>18}{'seconds':>10}{'CPU seconds':>13}")
    for side, m in medians.items():
        print(f"{side:16}{m['mb']:18.0f}{m['seconds']:10.1f}{m['cpu_seconds']:13.1f}")
    ratios = {key: medians["ours"][key] / medians["log_softmax"][key] for key in medians["ours"]}
    print(
        f"{'ours / theirs':16}{ratios['mb']:18.3f}{ratios['seconds']:10.2f}"
        f"{ratios['cpu_seconds']:13.2f}"
    )
    names = ("log-probs", "gradient of hidden", "gradient of weight")
    worst = {}
    for name, a, b in zip(names, ours, theirs):
        worst[name] = float((a - b).abs().max() / b.abs().max())
    listed = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    print("greatest difference over greatest value:", listed)
    if args.json:
        report = {"runs": figures, "ratios": ratios, "differences": worst}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
