"""One whole step, sampling and update, beside TRL's GRPOTrainer: same weights, batch, drawn response lengths, threads.

    pip install -r tests/requirements-bench.txt
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive taskset -c 1 python tests/bench_step.py
    ... python tests/bench_step.py --model DIR --prompts 4 --micro-tokens 1024      # a model directory

Either side runs in a process of its own, in turn, several times; medians count. Memory is the peak of the resident set
less what there was once the model had been loaded. TRL shuffles its prompts, so that a prompt's drawn lengths may go to
another prompt; their sum is the same. Rewards are arbitrary on both sides, and checked by nobody.
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

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench_rollout import QWEN2, SHAPES, workload
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, PreTrainedTokenizerFast

import train
from model import Transformer
from sampler import sample

WORDS = ("the", "sea", "is", "large", "and", "blue", "small", "boats", "go", "out", "every", "day", "to", "fish")


def tokenizer_of(path, vocab):
    """The directory's, or one that has a word for each id of a random model."""
    if (Path(path) / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w0", padding_side="left")


def texts_and_lengths(args, tokenizer, vocab):
    ids, lengths = workload(vocab, args.prompts, args.group_size, 8, args.max_new_tokens, seed=0)
    dice = random.Random(1)
    real = (Path(args.model) / "tokenizer.json").exists()
    texts = [" ".join(dice.choice(WORDS) if real else f"w{max(i, 1)}" for i in prompt) for prompt in ids]
    return texts, lengths


def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(args):
    sizes = (
        f"--data none --device cpu --micro-tokens {args.micro_tokens} --prompts-per-step {args.prompts} --group-size "
        f"{args.group_size} --minibatch-prompts {args.prompts} --max-new-tokens {args.max_new_tokens}"
    )
    flags = train.parse_args([*sizes.split(), "--model", args.model])
    network = Transformer.from_pretrained(args.model)
    tokenizer = tokenizer_of(args.model, network.config.vocab_size)
    texts, lengths = texts_and_lengths(args, tokenizer, network.config.vocab_size)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    run = train.Run(flags, network, network, tokenizer, [], [], prompts, {}, [], None, clock=train.Clock("cpu"))
    base, started = rss(), time.perf_counter()
    run.optimizer = train.make_optimizer(network, flags)
    shape = (args.prompts, args.group_size)
    with run.clock("decode"):
        samples = sample(network, prompts, args.group_size, lengths, stop_ids=(), clock=run.clock)
    correct = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    parts = [part.unflatten(0, shape) for part in samples]
    batch = train.Batch(list(range(args.prompts)), prompts, *parts, correct, correct.long(), ~correct, [], [])
    totals = train.train_on(run, batch, train.compute_signals(batch, flags))
    seconds = time.perf_counter() - started
    assert totals.means()["sampler_difference_max"] < 1e-3 and run.state.updates == 1
    return {"seconds": seconds, "gib": rss() - base, "tokens": sum(lengths), **run.clock.seconds}


def theirs(args):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    network = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = tokenizer_of(args.model, network.config.vocab_size)
    texts, lengths = texts_and_lengths(args, tokenizer, network.config.vocab_size)
    rows, wanted, end = len(lengths), torch.tensor(lengths), tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=8, gradient_accumulation_steps=rows // 8, max_steps=1,
            num_generations=args.group_size, max_completion_length=args.max_new_tokens, learning_rate=1e-6, beta=0.0,
            temperature=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=1,
        )  # fmt: skip

        def reward(completions, **_):
            return [float(i % args.group_size) for i in range(len(completions))]

        trainer = GRPOTrainer(model=network, reward_funcs=reward, args=config, processing_class=tokenizer,
                              train_dataset=Dataset.from_dict({"prompt": texts}))  # fmt: skip
        generate, seconds = trainer.model.generate, {}

        def generate_drawn(*rest, input_ids, **more):
            def at_its_length(ids, scores):  # the end token when a row has its length, and not before
                due = wanted[: len(ids)] <= ids.shape[1] - input_ids.shape[1] + 1
                scores[:, end] = -torch.inf
                scores[due] = -torch.inf
                scores[due, end] = 0.0
                return scores

            begun = time.perf_counter()
            out = generate(*rest, input_ids=input_ids, logits_processor=LogitsProcessorList([at_its_length]), **more)
            seconds["generate"] = seconds.get("generate", 0) + time.perf_counter() - begun
            return out

        trainer.model.generate = generate_drawn
        base, started = rss(), time.perf_counter()
        trainer.train()
        return {"seconds": time.perf_counter() - started, "gib": rss() - base, "tokens": sum(lengths), **seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="directory (default: a tiny random Qwen2)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=1024, help="of ours; TRL takes 8 rows at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("RESULT" + json.dumps({"ours": ours, "theirs": theirs}[args.side](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            args.model = folder
            Transformer.from_config(QWEN2 | SHAPES["tiny"]).save_pretrained(folder)
        found = {"ours": [], "theirs": []}
        for _ in range(args.repeats):
            for side in found:
                flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()
                         if value is not None and name not in ("json", "side")]  # fmt: skip
                command = [sys.executable, __file__, *flags, "--side", side]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found[side].append(json.loads(done.stdout.split("RESULT")[1]))
                print(side, {name: round(value, 2) for name, value in found[side][-1].items()}, flush=True)
    us, them = ({name: statistics.median(one[name] for one in runs) for name in runs[0]} for runs in found.values())
    print(f"\n{us['tokens']} response tokens, medians of {args.repeats}, {torch.get_num_threads()} threads\n"
          f"| | seconds | GiB over the model |\n|---|---|---|\n"
          f"| ours | {us['seconds']:.1f} | {us['gib']:.2f} |\n| TRL | {them['seconds']:.1f} | {them['gib']:.2f} |\n"
          f"| ratio | {them['seconds'] / us['seconds']:.2f} | {us['gib'] / them['gib']:.2f} |")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
