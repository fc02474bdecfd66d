"""One whole step, sampling and update, compared with TRL's GRPOTrainer: same weights, batch,
response lengths and threads.

    pip install -r requirements.txt -r tests/requirements-bench.txt
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive taskset -c 1 python tests/bench_step.py
    ... python tests/bench_step.py --model DIR --prompts 4 --micro-tokens 1024      # a directory

Each side runs in a process of its own; they alternate, and medians count. Memory is the peak of the
resident set less what was there once the model had been loaded. TRL shuffles its prompts, so that a
prompt's drawn lengths may go to another prompt; their sum is the same. Rewards are arbitrary on
both sides; no checker runs.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_rollout import QWEN2, SHAPES, workload
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

import copo
import train
from model import Transformer
from sampler import Rollout, generate

TEXT = "the sea is large and blue small boats go out every day to fish"


def load_tokenizer(path, vocab):
    """The directory's tokenizer, or one that has a word for each id of a random model."""
    if has_tokenizer(path):
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    words = {f"w{i}": i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="w0", pad_token="w0", padding_side="left"
    )


def has_tokenizer(path):
    return (Path(path) / "tokenizer.json").exists()


def texts_and_lengths(args, vocab):
    """The prompts as texts, and the length of each response."""
    prompts, lengths = workload(
        vocab, args.prompts, args.group_size, 8, args.max_new_tokens, seed=0
    )
    dice = random.Random(1)
    words = TEXT.split()
    texts = []
    for prompt in prompts:
        if has_tokenizer(args.model):
            texts.append(" ".join(dice.choice(words) for _ in prompt))
        else:
            texts.append(" ".join(f"w{max(token, 1)}" for token in prompt))  # w0 ends a response
    return texts, lengths


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(args):
    flags = {
        "model": args.model,
        "data": "none",  # never read: setup() does not run
        "device": "cpu",
        "prompts-per-step": args.prompts,
        "minibatch-prompts": args.prompts,
        "group-size": args.group_size,
        "max-new-tokens": args.max_new_tokens,
        "micro-tokens": args.micro_tokens,
    }
    run_args = train.parse_args([f"--{name}={value}" for name, value in flags.items()])
    model = Transformer.from_pretrained(args.model)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    texts, lengths = texts_and_lengths(args, model.config.vocab_size)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    run = make_run(run_args, model, tokenizer, prompts)
    base = peak_gib()
    started = time.perf_counter()
    run.optimizer = train.make_optimizer(model, run_args)
    with run.clock("decode"):
        samples = generate(model, prompts, args.group_size, lengths, clock=run.clock)
    rollout = grade_by_chance(samples, prompts, args.group_size)
    advantages = copo.compute_advantages(
        rollout.rewards,
        rollout.correct,
        rollout.classes,
        rollout.lengths,
        run.algorithm,
        args.max_new_tokens,
    )
    metrics = train.update_policy(run, rollout, advantages)
    seconds = time.perf_counter() - started
    assert metrics["sampler_difference_max"] < 1e-3
    assert run.state.updates == 1
    figures = {"seconds": seconds, "gib": peak_gib() - base, "tokens": sum(lengths)}
    return figures | run.clock.seconds()


def make_run(args, model, tokenizer, prompts):
    """A train.Run without files, data and checker."""
    return train.Run(
        args=args,
        algorithm=train.algorithm_of(args),
        directory=None,
        model=model,
        tokenizer=tokenizer,
        stop_ids=[],
        problems=[],
        prompts=prompts,
        held_out=[],
        held_out_prompts=[],
        verifier=None,
        sampler=model,
        clock=train.Clock("cpu"),
    )


def grade_by_chance(samples, prompts, group_size):
    """A Rollout of these samples with random verdicts."""
    shape = (len(prompts), group_size)
    tokens, logprobs, lengths, finished = (part.unflatten(0, shape) for part in samples)
    correct = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    empty = [[None] * group_size for _ in prompts]
    return Rollout(
        problems=[None] * len(prompts),
        prompts=prompts,
        tokens=tokens,
        logprobs=logprobs,
        lengths=lengths,
        finished=finished,
        correct=correct,
        rewards=correct.double(),
        classes=correct.long(),
        failed=empty,
        texts=empty,
        answers=empty,
    )


def theirs(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    texts, lengths = texts_and_lengths(args, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=len(lengths) // 8,
            max_steps=1,
            num_generations=args.group_size,
            max_completion_length=args.max_new_tokens,
            learning_rate=1e-6,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )

        def arbitrary_rewards(completions, **_):
            return [float(i % args.group_size) for i in range(len(completions))]

        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [
                i % args.group_size for i in range(len(lengths))
            ],
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": texts}),
        )
        seconds = stop_at_lengths(trainer.model, lengths, tokenizer.eos_token_id)
        base = peak_gib()
        started = time.perf_counter()
        trainer.train()
        figures = {"seconds": time.perf_counter() - started, "gib": peak_gib() - base}
        return figures | {"tokens": sum(lengths)} | seconds


def stop_at_lengths(model, lengths, end):
    """Make model.generate end each row with `end` at its length, and not before -> {"generate":
    seconds}, which fills as it runs."""
    generate_freely = model.generate
    wanted = torch.tensor(lengths)
    seconds = {"generate": 0.0}

    def generate_at_lengths(*rest, input_ids, **more):
        def allow_end(ids, scores):
            due = wanted[: len(ids)] <= ids.shape[1] - input_ids.shape[1] + 1
            scores[:, end] = -torch.inf
            scores[due] = -torch.inf
            scores[due, end] = 0.0
            return scores

        started = time.perf_counter()
        processors = LogitsProcessorList([allow_end])
        out = generate_freely(*rest, input_ids=input_ids, logits_processor=processors, **more)
        seconds["generate"] += time.perf_counter() - started
        return out

    model.generate = generate_at_lengths
    return seconds


def run_side(side, args):
    """One side, once, in a process of its own -> its figures."""
    command = [sys.executable, __file__, "--side", side]
    for name in ("model", "prompts", "group_size", "max_new_tokens", "micro_tokens"):
        command.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    figures = json.loads(done.stdout.split("RESULT")[1])
    rounded = {name: round(value, 2) for name, value in figures.items()}
    print(side, rounded, flush=True)
    return figures


def compare(args):
    """Runs of both sides in turn, and the table of their medians."""
    runs = {"ours": [], "theirs": []}
    for _ in range(args.repeats):
        for side in runs:
            runs[side].append(run_side(side, args))
    medians = {}
    for side, figures in runs.items():
        for name in ("seconds", "gib", "tokens"):
            medians[side, name] = statistics.median(run[name] for run in figures)
    times_as_fast = medians["theirs", "seconds"] / medians["ours", "seconds"]
    share_of_memory = medians["ours", "gib"] / medians["theirs", "gib"]
    tokens = medians["ours", "tokens"]
    threads = torch.get_num_threads()
    print(f"\n{tokens} response tokens, medians of {args.repeats}, {threads} threads")
    print("| | seconds | GiB over the model |\n|---|---|---|")
    for side, name in (("ours", "ours"), ("theirs", "TRL")):
        print(f"| {name} | {medians[side, 'seconds']:.1f} | {medians[side, 'gib']:.2f} |")
    print(f"| ratio | {times_as_fast:.2f} | {share_of_memory:.2f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(runs, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--model", help="directory (default: a tiny random Qwen2)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=1024, help="ours; TRL takes 8 rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side = {"ours": ours, "theirs": theirs}[args.side]
        print("RESULT" + json.dumps(side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            Transformer.from_config(QWEN2 | SHAPES["tiny"]).save_pretrained(folder)
        compare(args)


if __name__ == "__main__":
    main()
