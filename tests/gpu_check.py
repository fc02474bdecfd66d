"""Run the program on a GPU, step by step, and write down what was seen: under five minutes, no
network, random weights of real shapes.

    python tests/gpu_check.py                       # on a GPU; writes gpu_check.json
    python tests/gpu_check.py --device cpu --quick  # tiny shapes: is this script itself in order?
    python tests/gpu_check.py --only samples        # one step, or several, by name

No step can end the others: each runs in a process of its own, under a time limit, and its error
stands in the table. Exit code 1 if a step failed. Please send gpu_check.json in with an issue, so
that README's "what has been run on what" can have a row for your GPU.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_rollout import bound, generate, machine, workload
from transformers import AutoModelForCausalLM

import sampler
from model import Config, Transformer

HERE = Path(__file__).resolve().parent
GIB = 2**30
KERNELS = ("math", "flash", "efficient", "cudnn", "overrideable")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}
SHAPES = {
    "0.5B": QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "3B": QWEN2
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "quick": QWEN2
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def now(device):
    """Seconds, once the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib(device):
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None


def empty_model(shape, dtype):
    """Config and sizes, no numbers."""
    with torch.device("meta"):
        return Transformer(Config.parse(SHAPES[shape]), source_dtype=dtype).to(dtype)


def random_model(shape, dtype, device):
    """A Transformer whose weights are drawn on the device itself: 3B numbers take the CPU long."""
    model = empty_model(shape, dtype).to_empty(device=device)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return model.requires_grad_(False)


def model_directory(args):
    """A directory of the smaller shape with weights, and a tokenizer with as many tokens."""
    place = Path(args.folder) / "model"
    if place.exists():
        return place
    shape = "quick" if args.quick else "0.5B"
    model = random_model(shape, torch.bfloat16, args.device)
    model.save_pretrained(place)
    tiny = HERE.parent / "data" / "tiny"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (place / name).write_text((tiny / name).read_text())
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    present = set(vocab) | {token["content"] for token in tokenizer["added_tokens"]}
    for token in tokenizer["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    for i in range(len(present), model.config.vocab_size):
        vocab[f"<{i}>"] = i
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    return place


def run_train(args, name, *flags, ranks=1):
    """train.py in a process of its own -> the lines of its metrics.jsonl."""
    directory = Path(args.folder) / name
    command = train_command(args, directory, *flags, ranks=ranks)
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError((result.stderr.strip() or result.stdout.strip()).splitlines()[-1])
    return read_metrics(directory)


def train_command(args, directory, *flags, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    common = ["--device", args.device, "--run-dir", directory]
    return [str(word) for word in (*launcher, "train.py", *common, *flags)]


def read_metrics(directory):
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def measure_machine(args):
    """Bytes/s of memory and flop/s of bfloat16 matmuls: what no program can beat."""
    size = 256 if args.quick else 4096
    return machine(torch.bfloat16, partial(now, args.device), args.device, size)


# ------------------------------------------------------------------------------------------ steps
# Each takes the flags and returns {what: figure}.


def environment(args):
    """Versions, and the attention kernel that PyTorch takes for our shapes."""
    figures = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version"]
        answer = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        figures["GPUs"] = answer.stdout.strip().splitlines()
        figures["CUDA"] = torch.version.cuda
        figures["cuDNN"] = torch.backends.cudnn.version()
    for dtype_name, dtype in DTYPES.items():
        q = torch.zeros(4, 14, 256, 64, dtype=dtype, device=args.device)
        k = torch.zeros(4, 2, 256, 64, dtype=dtype, device=args.device)
        mask = torch.zeros(4, 1, 1, 256, dtype=dtype, device=args.device)
        repeated = k.repeat_interleave(7, 1)
        calls = {
            "whole rows": (q, k, None, True, True),
            "whole rows, keys repeated": (q, repeated, None, True, False),
            "decoding": (q[:, :2, :7], k, mask, False, False),
        }
        for name, (query, key, attn_mask, causal, grouped) in calls.items():
            kernel = torch._fused_sdp_choice(
                query, key, key, attn_mask, 0.0, causal, enable_gqa=grouped
            )
            figures[f"{dtype_name} {name}"] = KERNELS[kernel]
    return figures


def demonstration(args, dtype):
    """The README's first command, shorter. bfloat16 is FSDP2 on one rank, with NCCL on a GPU."""
    flags = ["--steps", 10, "--sft-steps", 200, "--eval-problems", 100]
    if args.quick:
        flags = ["--steps", 2, "--sft-steps", 2, "--eval-problems", 4, "--eval-samples", 2]
        flags += ["--prompts-per-step", 4, "--minibatch-prompts", 4, "--max-new-tokens", 8]
    lines = run_train(args, f"demonstration-{dtype}", "--dtype", dtype, *flags)
    last = lines[-1]
    return {
        "steps": len(lines),
        "seconds a step": last["seconds"],
        "accuracy": last["accuracy"],
        "gradient norm": last["grad_norm"],
    }


def samples(args):
    """float64 tokens on this device and on the CPU, rows refilled: they must be the same."""
    config = json.loads((HERE.parent / "data" / "tiny" / "config.json").read_text())
    prompts, limits = workload(config["vocab_size"], 8, 4, 8, 40, seed=0)
    drawn = []
    for device in ("cpu", args.device):
        model = Transformer.from_config(config, torch.float64, device, seed=1)
        options = {"max_rows": 12, "stop_ids": [3, 4, 5], "top_p": 0.95}
        drawn.append(sampler.generate(model, prompts, 4, limits, **options))
    same = [torch.equal(a, b) for a, b in zip(drawn[0], drawn[1])]
    if not (same[0] and same[2]):
        differing = int((drawn[0].tokens != drawn[1].tokens).any(1).sum())
        raise RuntimeError(f"{differing} of {len(drawn[0].tokens)} responses differ from the CPU's")
    difference = (drawn[0].logprobs - drawn[1].logprobs).abs().max().item()
    return {"tokens": int(drawn[0].lengths.sum()), "log-probs differ by": difference}


def rollout(args, shape):
    """Sampling speed in bfloat16, beside the machine's bound and (smaller shape) generate."""
    dtype = torch.bfloat16
    groups, group_size, longest = (2, 2, 12) if args.quick else (32, 8, 256)
    model = random_model("quick" if args.quick else shape, dtype, args.device)
    prompts, limits = workload(model.config.vocab_size, groups, group_size, 8, longest, seed=0)
    clock = partial(now, args.device)

    def timed(sample):
        sample(prompts[:2], [8] * 2 * group_size)
        start = clock()
        sample(prompts, limits)
        return clock() - start

    seconds = timed(lambda some, limit: sampler.generate(model, some, group_size, limit))
    peak = peak_gib(args.device)
    read, rate = measure_machine(args)
    least = bound(model.config, dtype, prompts, group_size, limits, read, rate)
    figures = {
        "rows": len(limits),
        "tokens/s": sum(limits) / seconds,
        "of the bound": least / seconds,
        "ms a pass": 1000 * seconds / max(limits),
        "peak GiB": peak,
        "GB/s": read / 1e9,
        "TFLOP/s": rate / 1e12,
    }
    if shape == "0.5B":
        directory = model_directory(args)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(args.device)
        other = timed(
            lambda some, limit: generate(theirs.eval(), some, group_size, limit, "dynamic")
        )
        figures["to generate"] = other / seconds
    return figures


def training(args):
    """One step of train.py on the smaller shape, in bfloat16: speed, and peak memory beside the
    plan's."""
    prompts, group_size, new_tokens, micro_tokens = (
        (2, 2, 8, 200) if args.quick else (8, 4, 256, 4096)
    )
    data = HERE.parent / "data" / "arithmetic_train.jsonl"
    flags = ["--model", model_directory(args), "--data", data, "--instruction", ""]
    # A random policy answers nothing right: only the KL term has a gradient.
    flags += ["--dtype", "bfloat16", "--steps", 2, "--save-every", 0, "--kl-coef", 0.01]
    flags += ["--prompts-per-step", prompts, "--minibatch-prompts", prompts]
    flags += ["--group-size", group_size, "--max-prompt-tokens", 64, "--rollout-batch", 0]
    flags += ["--max-new-tokens", new_tokens, "--micro-tokens", micro_tokens]
    last = run_train(args, "training", *flags)[-1]
    command = train_command(args, Path(args.folder) / "plan", *flags, "--plan", 1)
    plan = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True).stdout
    total = [line.split()[-1] for line in plan.splitlines() if line.startswith("total")]
    model = empty_model("quick" if args.quick else "0.5B", torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _, rate = measure_machine(args)
    seconds = last["seconds_forward"] + last["seconds_backward"]
    tokens = prompts * group_size * last["length_mean"]
    return {
        "tokens": tokens,
        "tokens/s of an update": tokens / seconds,
        "of the matmul rate": 6 * parameters * tokens / seconds / rate,
        "seconds a step": last["seconds"],
        "peak GiB": last["peak_memory_gib"],
        "planned GiB": float(total[0]) if total else None,
    }


def ranks(args):
    """The demonstration on all GPUs, with FSDP2."""
    count = torch.cuda.device_count() if args.device == "cuda" else 1
    if count < 2:
        return {"skipped": f"{count} device"}
    flags = ["--dtype", "bfloat16", "--steps", 4, "--sft-steps", 50, "--eval-problems", 40]
    lines = run_train(args, "ranks", *flags, ranks=count)
    return {"ranks": count, "seconds a step": lines[-1]["seconds"]}


def resume(args):
    """A run that is killed in its third step or later, and resumed to its end."""
    directory = Path(args.folder) / "resume"
    flags = ["--steps", 8, "--sft-steps", 2, "--save-every", 1, "--eval-problems", 4]
    flags += ["--eval-samples", 2, "--prompts-per-step", 4, "--minibatch-prompts", 4]
    command = train_command(args, directory, *flags, "--max-new-tokens", 8)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True, **quiet)
    while child.poll() is None and len(read_metrics(directory)) < 2:
        time.sleep(0.05)
    killed = child.poll() is None
    if killed:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    before = len(read_metrics(directory))
    lines = run_train(args, "resume", "--resume", "latest")
    steps = [line["step"] for line in lines]
    if steps != list(range(1, 9)):
        raise RuntimeError(f"steps after the resume: {steps}")
    return {"killed": killed, "steps before": before, "steps after": len(steps)}


def fragmentation(args):
    """Ten rollouts with a cache of 1 GiB: the allocator must reserve no more than for the first."""
    model = random_model("quick" if args.quick else "0.5B", torch.bfloat16, args.device)
    row = sampler.cache_bytes(
        model.config, 1, sampler.cache_capacity(512, args.device), torch.bfloat16
    )
    rows = 4 if args.quick else GIB // row
    reserved = []
    for seed in range(10):
        prompts, limits = workload(model.config.vocab_size, rows, 1, 2, 8 + 2 * seed, seed)
        sampler.generate(model, prompts, 1, limits, max_rows=rows, cache_tokens=512)
        if args.device == "cuda":
            reserved.append(torch.cuda.memory_reserved() / GIB)
    if reserved and reserved[-1] > reserved[0]:
        raise RuntimeError(f"GiB reserved after each of ten rollouts: {reserved}")
    return {"rows": rows, "GiB reserved": reserved[-1] if reserved else None}


STEPS = {
    "environment": environment,
    "demonstration, float32": partial(demonstration, dtype="float32"),
    "demonstration, bfloat16": partial(demonstration, dtype="bfloat16"),
    "samples": samples,
    "rollout, 0.5B": partial(rollout, shape="0.5B"),
    "rollout, 3B": partial(rollout, shape="3B"),
    "training, 0.5B": training,
    "ranks": ranks,
    "resume": resume,
    "fragmentation": fragmentation,
}


# ------------------------------------------------------------------------------------------ table


def child(step, args, pipe):
    """Run one step, and send (its figures, the error's last line or None)."""
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as train.py does
    try:
        pipe.send((STEPS[step](args), None))
    except Exception as error:
        traceback.print_exc()
        pipe.send(({}, f"{type(error).__name__}: {error}".splitlines()[0]))


def run_step(step, args):
    """One step in a forked process, which starts CUDA for itself -> its entry in the report."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(step, args, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    figures, error = {}, None
    try:
        if receiver.poll(args.timeout):
            figures, error = receiver.recv()
        else:
            error = f"no end after {args.timeout:g} s"
            process.kill()
    except EOFError:
        process.join()
        error = f"the process ended with code {process.exitcode}"
    process.join()
    entry = {"ok": error is None, "seconds": time.perf_counter() - start, "figures": figures}
    if error:
        entry["error"] = error
    return entry


def in_words(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each step")
    parser.add_argument("--json", default="gpu_check.json", help="where the report goes")
    args = parser.parse_args()
    report = {"device": args.device, "quick": args.quick, "steps": {}}
    with tempfile.TemporaryDirectory() as args.folder:
        for step in args.only:
            entry = run_step(step, args)
            report["steps"][step] = entry
            figures = [f"{name} {in_words(value)}" for name, value in entry["figures"].items()]
            text = entry.get("error") or ", ".join(figures)
            verdict = "ok" if entry["ok"] else "FAILED"
            print(f"{step:24}{verdict:8}{entry['seconds']:6.1f} s  {text}", flush=True)
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    failed = [step for step, entry in report["steps"].items() if not entry["ok"]]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
