"""Train a language model with COPO (arXiv 2508.04138) on problems whose answers can be checked.

    python train.py                                          # the built-in demonstration: a tiny model, arithmetic
    python train.py --model DIR_OR_ID --data train.jsonl --eval-data test.jsonl --run-dir runs/mine
    python train.py --algo grpo --blend soft --gamma 20      # a preset, then single changes to it
    python train.py --run-dir runs/mine --resume latest      # go on where a run was stopped, however it was stopped

The main loop (train, at the end) is a list of verbs: sample groups of responses and verify them, turn verdicts into
advantages and weights (copo.py), update the weights, log, evaluate, save. Kept simple: AdamW at a constant rate after
its warm-up, one model, one kind of batch. Random choices (data order, updates, noise) are functions of the seed and of
counters, so a run that is stopped and resumed is the same run, bit for bit on a CPU.

Shapes: P prompts of a step, G responses each, B = P·G rows (row = prompt·G + response), R response tokens, T tokens.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import json
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import copo
import eval as evaluation
from eval import deal_out, gather, join_ranks, leave_ranks, number_in, rank, say, together, world
from model import WIDEN, Config, Transformer, model_directory, read_weights
from reward import SHAPES, Verifier, load_problems, same_text
from sampler import encode_prompt, rows_that_fit, sample

HERE = Path(__file__).resolve().parent
# Sizes of a run. The demonstration (no --model) fits two cores and a few minutes; with --model they are the authors'.
DEMO = {
    "data": str(HERE / "data/arithmetic_train.jsonl"), "eval_data": str(HERE / "data/arithmetic_test.jsonl"),
    "instruction": "", "max_prompt_tokens": 64, "max_new_tokens": 64, "steps": 60, "prompts_per_step": 40,
    "group_size": 6, "minibatch_prompts": 40, "rollout_batch": 0, "micro_tokens": 2048, "lr": 2e-4, "beta2": 0.95,
    "warmup_updates": 0, "sft_steps": 500, "sft_batch": 64, "sft_lr": 3e-3, "eval_every": 20, "save_every": 20,
}  # fmt: skip
AUTHORS = {
    "eval_data": None, "instruction": evaluation.INSTRUCTION,
    "max_prompt_tokens": 1024, "max_new_tokens": 2048, "steps": 60, "prompts_per_step": 512, "group_size": 6,
    "minibatch_prompts": 32, "rollout_batch": 256, "micro_tokens": 4096, "lr": 1e-6, "beta2": 0.999,
    "warmup_updates": 0, "sft_steps": 0, "sft_batch": 128, "sft_lr": 1e-5, "eval_every": 10, "save_every": 10,
}  # fmt: skip
# What may differ between a run and its continuation without a word: where, how long, how often, how fast.
NOT_THE_RUN = evaluation.NOT_A_CONFIGURATION - {"seed", "export_dtype", "verifier_timeout", "verifier_memory"}
NOT_THE_RUN |= {"steps", "eval_every"}
# What its checkpoints were made with, and may not differ at all.
FIXED = ("model", "dtype", "sft_steps", "sft_batch", "sft_lr")
RUN_FILES = ("metrics.jsonl", "groups.jsonl", "eval.jsonl", "samples.txt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------------------- Flags

def need(holds, message):
    """Refuses what cannot work before anything is written: one line that says what to do, exit code 2."""
    if not holds:
        raise ValueError(message)


def flags():
    """The parser. What has no default here gets one from the preset (--algo) or the size set (DEMO or AUTHORS)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: need(False, message)  # argparse would print the usage of sixty flags above it
    yes_no, whole, count = argparse.BooleanOptionalAction, number_in(int, "[0, 1e18]"), number_in(int, "[1, inf)")
    several, real, positive = number_in(int, "[2, inf)"), number_in(float, "[0, inf)"), number_in(float, "(0, inf)")
    share, part = number_in(float, "[0, 1)"), number_in(float, "(0, 1]")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="Hugging Face directory or Hub id (default: a tiny one, made on the spot)")
    add("--dtype", choices=DTYPES, default="float32", help="compute type; master weights are float32 or float64")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    add("--system", help="system message of the chat template (default: the template's own)")
    add("--instruction", help="text after every problem")
    add("--stop", action="append", default=[], metavar="TOKEN", help="one more token that ends a response; repeatable")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="training problems: JSONL or parquet, a local file or hf://datasets/OWNER/NAME/FILE")
    add("--eval-data", help="held-out problems, likewise (without: no evaluation)")
    add("--problem-field", help="field of the problem, a dot for one within another (default: known shapes)")
    add("--answer-field", help="field of the answer, likewise; the held-out file may also be of a known shape")
    add("--data-fraction", type=part, help="train on this part of the problems, drawn by --seed (default: all)")
    add("--max-prompt-tokens", type=count, help="problems with longer prompts are dropped, in tokens")
    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=several, help="P, prompts sampled in a step")
    add("--group-size", type=several, help="G, responses to each prompt")
    add("--max-new-tokens", type=count, help="response limit, in tokens")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring alike")
    add("--rollout-batch", type=whole, help="rows that a rank samples at the same time (0 = all of them)")
    add("--rollout-memory", type=real, default=0.0, help="cache of the rows that a rank samples, in GiB (0 = any size)")
    add("--max-rounds", type=count, default=4, help="rounds of dynamic sampling in a step")
    add("--verifier-workers", type=count, default=2, help="processes that check answers")
    add("--verifier-timeout", type=positive, default=10.0, help="last resort for one answer, in seconds")
    add("--verifier-memory", type=number_in(int, "[64, inf)"), default=1024, help="limit of a verifier process, in MiB")
    add = parser.add_argument_group("algorithm (defaults: the preset's)").add_argument
    add("--algo", choices=copo.PRESETS, default="copo", help="preset of all flags in this group")
    add("--blend", choices=copo.BLENDS, help="rule for w, the weight of the local loss")
    add("--gamma", type=real, help="γ, steepness of w in the entropy, per bit")
    add("--rho", type=number_in(float, "(-inf, inf)"), help="ρ, entropy at which w is one half, in bits")
    add("--advantage", choices=copo.ADVANTAGES, help="local advantage: within the group, the batch, or NGRPO's")
    add("--scale-advantages", action=yes_no, help="divide advantages by their standard deviation")
    add("--global-coef", type=real, help="factor of the global term (0 = disabled)")
    add("--consistency-coef", action=yes_no, help="lower the global reward of groups that disagree")
    add("--clip-low", type=part, help="ε below 1")
    add("--clip-high", type=positive, help="ε above 1")
    add("--dual-clip", type=real, help="c, bound on the loss where A < 0, above 1 (0 = disabled)")
    add("--aggregation", choices=copo.AGGREGATIONS, help="from token losses to one number")
    add("--kl-coef", type=real, help="β of the KL to the initial model, in the loss (0 = disabled)")
    add("--dynamic-sampling", action=yes_no, help="replace groups that are all right or all wrong")
    add("--overlong-factor", type=real, help="size of the penalty on length (0 = disabled)")
    add("--overlong-buffer", type=positive, help="tokens over which it grows; below 1: a share of the limit")
    add = parser.add_argument_group("optimisation").add_argument
    add("--minibatch-prompts", type=count, help="prompts of one optimiser update; divides P")
    add("--micro-tokens", type=count, help="tokens of one forward pass, shared prompts once (one row at least)")
    add("--old-logprobs", choices=["recompute", "sampler"], help="those of a step's later updates: from a forward pass "
        "before them, or as sampled (default: sampler, but recompute in bfloat16)")  # fmt: skip
    add("--lr", type=positive, help="learning rate of AdamW")
    add("--warmup-updates", type=whole, help="updates over which the rate rises to --lr (0 = disabled)")
    add("--beta1", type=share, default=0.9, help="AdamW's decay of the gradient's mean")
    add("--beta2", type=share, help="AdamW's decay of the gradient's square")
    add("--weight-decay", type=real, default=0.01, help="on matrices only (0 = disabled)")
    add("--max-grad-norm", type=real, default=1.0, help="gradients are scaled down to it (0 = disabled)")
    add("--max-bad-updates", type=count, default=5, help="non-finite updates in a row before the run ends")
    add = parser.add_argument_group("supervised warm start, on the data's solutions").add_argument
    add("--sft-steps", type=whole, help="updates before reinforcement learning (0 = disabled)")
    add("--sft-batch", type=count, help="solutions in one update")
    add("--sft-lr", type=positive, help="peak learning rate; rises over 5 %% of the steps, then falls to 5 %%")
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=whole, help="steps of reinforcement learning, those before a resume included")
    add("--seed", type=whole, default=0, help="of data order, updates, noise and the tiny model")
    add("--run-dir", help="directory of the run (default: runs/ALGO-DATE-TIME)")
    add("--resume", metavar="latest|DIR", help="go on from --run-dir's newest checkpoint, or from this one; all flags "
                                               "are as they were, except those given again")  # fmt: skip
    add("--eval-every", type=whole, help="steps between evaluations (0 = only before and after)")
    add("--eval-samples", type=count, default=8, help="k, responses to each held-out problem")
    add("--eval-problems", type=whole, default=0, help="first problems of the held-out file to use (0 = all)")
    add("--eval-temperature", type=real, default=1.0, help="0 = greedy")
    add("--eval-seed", type=whole, default=0, help="of the evaluation's noise, the same at every step")
    add("--save-every", type=whole, help="steps between checkpoints (0 = only at the end)")
    add("--keep", type=count, default=2, help="newest checkpoints to keep")
    add("--export-every", type=whole, default=0, help="steps between Hugging Face exports (0 = only at the end)")
    add("--export-dtype", choices=DTYPES, help="of exported weights (default: the source's)")
    add("--samples-every", type=whole, default=10, help="steps between entries in samples.txt (0 = disabled)")
    add = parser.add_argument_group("ranks and memory").add_argument
    add("--timeout", type=positive, default=600.0, help="seconds that a rank waits for another before it gives up")
    add("--activation-checkpointing", action=yes_no, default=False, help="keep one activation a layer, remake the rest")
    add("--cpu-offload", action=yes_no, default=False, help="masters, gradients and optimiser in the host's memory")
    add("--free-sampler", action=yes_no, default=False, help="give the sampling copy's memory back for the updates")
    add("--compile", metavar="BACKEND", help="torch.compile for the layers that are trained, such as inductor")
    add("--plan", type=count, metavar="RANKS", help="print the memory that each of so many ranks needs, and exit")
    return parser


def flag(name):
    return "--" + name.replace("_", "-")


def parse_args(argv):
    """Namespace of all flags: defaults, then sizes, preset, the run that is resumed, and what was typed on top."""
    parser = flags()
    defaults = vars(parser.parse_args([]))
    # Started from None everywhere, what is set afterwards is what was typed.
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    typed = {name: value for name, value in typed.items() if value is not None}
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        resume_if_begun(typed)
    known = resumed_flags(typed) if "resume" in typed else {}
    args = defaults | (AUTHORS if {**known, **typed}.get("model") else DEMO) | copo.PRESETS[defaults["algo"]]
    args |= known | (copo.PRESETS[typed["algo"]] if "algo" in typed else {}) | typed
    args = argparse.Namespace(**args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() or args.plan else "cpu"
    args.old_logprobs = args.old_logprobs or ("recompute" if args.dtype == "bfloat16" else "sampler")
    check_flags(args, typed)
    if not args.resume:
        args.run_dir = args.run_dir or f"runs/{args.algo}-{datetime.now():%Y%m%d-%H%M%S}" + launched_by()
        directory = Path(args.run_dir)
        # What a run leaves that is killed before it can write run.json does not count.
        inside = {path.name for path in directory.iterdir()} - {"init", "run.tmp"} if directory.is_dir() else ()
        need(not inside and (directory.is_dir() or not directory.exists()),
             f"--run-dir {args.run_dir} is in use: choose another, or --resume latest to go on with it")
    return args


def launched_by():
    """What torchrun's workers add to the name of a run, so that they find it again when torchrun restarts them."""
    return f"-p{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else ""


def resume_if_begun(typed):
    """After a restart by torchrun: the run that the killed workers had begun, if they came so far, is to go on."""
    found = sorted(Path("runs").glob(f"*{launched_by()}"))
    if typed.get("resume", "latest") != "latest":  # a checkpoint's path, which names the run as well
        found = [Path(typed["resume"]).resolve().parent.parent]
    typed.setdefault("run_dir", str(found[-1]) if found else None)
    typed.pop("resume", None)
    if typed["run_dir"] and (Path(typed["run_dir"]) / "run.json").is_file():
        typed["resume"] = "latest"


def resumed_flags(typed):
    """The flags of the run that --resume names; those that its checkpoints depend on may not be given another value."""
    checkpoint, run_dir = typed["resume"], typed.get("run_dir")
    if checkpoint != "latest":
        need((Path(checkpoint) / "state.json").is_file(), f"--resume {checkpoint}: no checkpoint there")
        home = Path(checkpoint).resolve().parent.parent
        run_dir = run_dir or str(home)
        need(Path(run_dir).resolve() == home, f"--resume {checkpoint} is of another run than --run-dir {run_dir}")
    need(run_dir, "--resume latest needs --run-dir, the run to go on with")
    need((Path(run_dir) / "run.json").is_file(), f"--run-dir {run_dir}: no run there to resume")
    known = json.loads((Path(run_dir) / "run.json").read_text())["flags"]
    for name in FIXED:
        need(typed.get(name, known[name]) == known[name], f"{flag(name)} was {known[name]} when the run began and "
             "cannot change on --resume")  # fmt: skip
    need(not (known["sft_steps"] and not known["kl_coef"] and typed.get("kl_coef")),
         "--kl-coef was 0 when the run began, which therefore kept no reference model: it cannot change on --resume")
    return known | {"run_dir": run_dir, "device": "auto"}


def check_flags(args, typed):
    """Flags against each other; `typed` are those of the command line."""
    need(args.dual_clip == 0 or args.dual_clip > 1, f"--dual-clip is {args.dual_clip}; it must be above 1, or 0")
    need(args.data or args.plan, "--model needs --data, a file of problems")
    need(bool(args.problem_field) == bool(args.answer_field), "--problem-field and --answer-field belong together")
    need(args.prompts_per_step % args.minibatch_prompts == 0,
         f"--minibatch-prompts {args.minibatch_prompts} does not divide --prompts-per-step {args.prompts_per_step}")
    need(args.overlong_buffer < 1 or args.overlong_buffer <= args.max_new_tokens,
         f"--overlong-buffer {args.overlong_buffer:g} is more than --max-new-tokens {args.max_new_tokens}")
    need(not args.dynamic_sampling or args.blend == "local",
         f"--dynamic-sampling drops the groups that --blend {args.blend} has its global term for; use --blend local")
    # A flag that was typed and changes nothing is a mistake in an ablation: better said now.
    idle = {
        "--blend local has no global term": (args.blend == "local", "global_coef consistency_coef"),
        "--blend global has no local term": (args.blend == "global", "advantage"),
        f"--blend {args.blend} does not look at the entropy": (not args.blend.startswith("soft"), "gamma rho"),
        "--overlong-factor is 0": (args.overlong_factor == 0, "overlong_buffer"),
        "--dynamic-sampling is off": (not args.dynamic_sampling, "max_rounds"),
        "--sft-steps is 0": (args.sft_steps == 0, "sft_lr sft_batch"),
        "one process in full precision samples with what it trains": (not sharded(args, args.plan), "free_sampler"),
        "there is no --eval-data": (
            not args.eval_data, "eval_every eval_samples eval_problems eval_temperature eval_seed"
        ),
    }  # fmt: skip
    for why, (applies, names) in idle.items():
        for name in names.split():
            need(not (applies and name in typed), f"{flag(name)} has no effect: {why}")
    need(not args.compile or args.compile in torch.compiler.list_backends(exclude_tags=()),
         f"--compile {args.compile}: no such backend of torch.compile")
    need(args.device == "cpu" or args.plan or torch.cuda.is_available(), "--device cuda: PyTorch sees no such device")


# --------------------------------------------------------------------------------------------------------------- Memory

def sharded(args, ranks=None):
    """Whether masters are kept apart from the weights that sample, by FSDP (which also casts, on a single rank)."""
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    return ranks > 1 or args.dtype == "bfloat16" or args.cpu_offload


def memory_plan(config, args, ranks):
    """GiB that one of `ranks` ranks needs for each purpose, at limits of lengths: {name: GiB}, "total" at the fullest.
    ValueError if --rollout-memory has no room for a single row.

    Letters as in model.py. Weights count exactly; activations are those that autograd keeps for one micro-batch."""
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = parameters - config.num_hidden_layers * block
    apart, wide, narrow = sharded(args, ranks), 8 if args.dtype == "float64" else 4, DTYPES[args.dtype].itemsize
    size, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads, longest = config.num_key_value_heads * config.head_dim, args.max_prompt_tokens + args.max_new_tokens
    rows = -(-args.prompts_per_step // ranks) * args.group_size
    rows = min(rows, args.rollout_batch or rows)
    if args.rollout_memory:
        limits, memory = (args.max_prompt_tokens, args.max_new_tokens), int(args.rollout_memory * 2**30)
        rows = min(rows, rows_that_fit(config, DTYPES[args.dtype], *limits, memory, args.device))
    # Numbers a token leaves in a layer: inputs of two norms, of q/k/v, of o_proj and of gate/up; gate, silu(gate), up
    # and their product; and q, k, v and what attention gives, once more for every row that shares the token's prompt.
    rows_of_token = args.group_size * longest / (args.max_prompt_tokens + args.group_size * args.max_new_tokens)
    inside = 4 * size + heads + 4 * config.intermediate_size + rows_of_token * 2 * (heads + kv_heads)
    layers = config.num_hidden_layers
    kept = layers * size + inside if args.activation_checkpointing else layers * inside
    held = {
        "masters": wide * parameters / ranks, "optimiser": 2 * wide * parameters / ranks,
        "gradients": wide * parameters / ranks,
        "sampler": narrow * parameters * apart,
        # Transformer.packed() keeps a second copy, in float32 where a CPU has no units for bf16.
        "packed": max(narrow, 4 * WIDEN) * parameters * (args.device == "cpu"),
        "reference": narrow * parameters / ranks * (args.kl_coef > 0),
        "kv cache": rows * longest * layers * 2 * kv_heads * narrow,
        # A block in use and the next on its way, the embeddings (and head) throughout; and the gradients of as much.
        "gathered": apart * ((2 * block + root) * narrow + (block + root) * (narrow + wide)),
        "activations": max(args.micro_tokens, longest) * kept * narrow,
        "logits": 3 * 4 * 2**24 + wide * config.vocab_size * size,  # a few chunks of them, and the head's gradient
    }  # fmt: skip
    if args.cpu_offload:
        held |= dict.fromkeys(("masters", "optimiser", "gradients"), 0)
    plan = {name: value / 2**30 for name, value in held.items()}
    update = sum(plan[name] for name in ("gradients", "gathered", "activations", "logits"))
    update += 0 if args.free_sampler else plan["sampler"]
    always = sum(plan[name] for name in ("masters", "optimiser", "reference"))
    return plan | {"total": always + max(update, sum(plan[name] for name in ("sampler", "packed", "kv cache")))}


def print_plan(args):
    """--plan: the row of the README's table for these flags."""
    source = args.model or "the demonstration's model"
    raw = json.loads((model_directory(args.model) / "config.json").read_text()) if args.model else TINY
    plan = memory_plan(Config.parse(raw), args, args.plan)
    print(f"GiB on each of {args.plan} ranks, {args.dtype}, {source}; at the fullest, not all at the same time")
    print("  ".join(f"{name:>{max(len(name), 7)}}" for name in plan))
    print("  ".join(f"{value:>{max(len(name), 7)}.2f}" for name, value in plan.items()))


def check_memory(config, args):
    """Refuses a run that cannot fit, before it has run for an hour."""
    total = memory_plan(config, args, world())["total"]
    if args.device == "cuda":
        there = torch.cuda.mem_get_info()[1] / 2**30
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        there /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need(total <= there, f"a rank would need {total:.1f} GiB at its fullest, and has {there:.1f}: use more ranks, "
         "--activation-checkpointing, --free-sampler, or a smaller --micro-tokens or --rollout-batch; --plan "
         f"{world()} shows what for")  # fmt: skip


# ------------------------------------------- The demonstration's model: a real Hugging Face directory, made on the spot

TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "initializer_range": 0.05, "torch_dtype": "float32", "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 351,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(path, seed):
    """Writes a Qwen2-shaped model of 0.8 million random parameters; its tokens are bytes and two-digit numbers."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without merges, because transformers gives every Qwen2 directory Qwen's own splitting and decoding.
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    # One token each, so that they take one step: what opens every answer, and the numbers of two digits.
    pieces = ["\\boxed{", *(str(number) for number in range(10, 100))]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], unk_token=special[0],
        additional_special_tokens=special[1:], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    Transformer.from_config(TINY, seed=seed).save_pretrained(path)


# ----------------------------------------------------------------------------------------------------------------- Data

def load_data(args, tokenizer):
    """((problems, their prompts' token ids), the same of the held-out file); what does not fit is dropped and said."""

    def load(path, *which):
        dropped = Counter()
        problems = load_problems(path, dropped, *which)
        prompts = [encode_prompt(tokenizer, p.problem, args.system, args.instruction) for p in problems]
        fits = [len(prompt) <= args.max_prompt_tokens for prompt in prompts]
        dropped[f"prompt over {args.max_prompt_tokens} tokens"] += fits.count(False)
        problems, prompts = ([x for x, fit in zip(xs, fits) if fit] for xs in (problems, prompts))
        reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items() if count)
        say(f"data    {path}: {len(problems)} problems{reasons}")
        return problems, prompts

    named = [(args.problem_field, args.answer_field, "solution")] if args.problem_field else []
    problems, prompts = load(args.data, named or SHAPES, args.data_fraction or 1.0, args.seed)
    need(len(problems) >= args.prompts_per_step,
         f"--prompts-per-step {args.prompts_per_step}, but {args.data} has {len(problems)} usable ones")
    held_out = load(args.eval_data, [*named, *SHAPES]) if args.eval_data else ([], [])
    held_out = [part[: args.eval_problems or None] for part in held_out]
    need(held_out[0] or not args.eval_data, f"--eval-data {args.eval_data} has no usable problems")
    seen = {same_text(p.problem) for p in problems}
    overlap = sum(same_text(p.problem) in seen for p in held_out[0])
    if overlap:
        say(f"WARNING {overlap} of {len(held_out[0])} held-out problems are in the training data too")
    return (problems, prompts), held_out


def draw_prompts(seed, cursor, count, size):
    """Data indices cursor .. cursor+count−1 of an endless order: each epoch is a permutation of (seed, epoch).

    Returns (index, epoch·size + index) pairs; the second keys the noise, so that a problem which comes twice in a step
    (at the seam of two epochs) is not answered the same way twice."""
    pairs = []
    for epoch in range(cursor // size, (cursor + count - 1) // size + 1):
        order = np.random.default_rng([seed, 1, epoch]).permutation(size)
        part = order[max(cursor - epoch * size, 0) : cursor + count - epoch * size]
        pairs += [(int(i), epoch * size + int(i)) for i in part]
    return pairs


# -------------------------------------------------------- Ranks: one process for each GPU under torchrun, else just one


def in_turn(run, items, work):
    """evaluation.deal_out, out of which a signal on any rank leads on all, once they have met."""

    def until_stopped(share):
        with contextlib.suppress(Interrupted):
            return work(share)

    found = deal_out(items, until_stopped)
    run.stop.check()
    return found


# ----------------------------------------------------------------------- Where a run stands, and what a step is made of

@dataclass
class State:
    """What a checkpoint holds besides weights and optimiser: where the run is. Counts are since its beginning."""

    step: int = 0  # finished steps of reinforcement learning
    sft_step: int = 0  # finished steps of the warm start
    cursor: int = 0  # prompts drawn
    updates: int = 0
    skipped_updates: int = 0
    bad_updates: int = 0  # non-finite ones in a row
    skipped_steps: int = 0  # dynamic sampling found no mixed group
    tokens: int = 0  # sampled
    responses: int = 0
    evaluations: list = field(default_factory=list)  # (step, mean@k) of those made
    alarms: dict = field(default_factory=dict)  # condition -> steps in a row that it has held
    files: dict = field(default_factory=dict)  # size in bytes of each of the run's files when this was saved


@dataclass
class Run:
    """What all phases share: flags, data, the model in its forms, and where the run stands."""

    args: argparse.Namespace
    model: Transformer  # the weights that are trained
    sampler: Transformer  # the weights that sample: the same object, or a copy in the compute type
    tokenizer: object
    stop_ids: list
    problems: list
    prompts: list  # token ids of each problem, ready for the reply
    replies: dict  # problem -> token ids of its solution, for the warm start
    held_out: list
    directory: Path
    optimizer: torch.optim.Optimizer = None
    reference: Transformer = None  # the frozen initial policy, if there is a KL term
    verifier: Verifier = None
    about: dict = None  # what stands in run.json, on rank 0
    clock: "Clock" = None
    stop: "Stop" = None
    state: State = field(default_factory=State)


class Batch(NamedTuple):
    """A step's prompts and the responses to each, on the CPU. The first dimension of every field is the prompts'."""

    indices: list  # of the problems
    prompts: list  # token ids
    tokens: torch.Tensor  # (P,G,R)
    logprobs: torch.Tensor  # (P,G,R) as the sampler saw them
    lengths: torch.Tensor  # (P,G)
    finished: torch.Tensor  # (P,G)
    correct: torch.Tensor  # (P,G) bool
    classes: torch.Tensor  # (P,G), −1 where there is no answer
    timed_out: torch.Tensor  # (P,G)
    texts: list  # P lists of G strings
    answers: list  # P lists of G strings or None

    def select(self, kept):
        """The batch of some of its prompts, in the order given."""
        return Batch(*([part[i] for i in kept] if isinstance(part, list) else part[kept] for part in self))

    def join(self, other):
        """This batch and then the other; shorter responses are padded."""
        width = max(self.tokens.shape[2], other.tokens.shape[2])

        def both(a, b):
            if isinstance(a, list):
                return a + b
            return torch.cat([F.pad(x, (0, width - x.shape[2])) if x.dim() == 3 else x for x in (a, b)])

        return Batch(*map(both, self, other))


class Signals(NamedTuple):
    """What the algorithm makes of a batch: computed once per step in float64, fixed through its updates."""

    rewards: torch.Tensor  # (P,G)
    entropy: torch.Tensor  # (P,) H
    global_rewards: torch.Tensor  # (P,) R
    local_adv: torch.Tensor  # (P,G) A^l
    global_adv: torch.Tensor  # (P,) A^g
    weight: torch.Tensor  # (P,G) w
    effective: torch.Tensor  # (P,G) w A^l + coef (1 − w) A^g


class Totals:
    """Means and maxima in the making: sums and counts are added up over micro-batches, and divided once, at the end."""

    def __init__(self):
        self.sums = {}  # name -> (sum, count) float64; of a name that ends in _max: (largest value, 1)

    def add(self, name, total, count=1):
        pair = [torch.as_tensor(x, dtype=torch.float64, device=total.device) for x in (total.detach(), count)]
        pair, join = torch.stack(pair), torch.maximum if name.endswith("_max") else torch.add
        self.sums[name] = join(self.sums.get(name, torch.zeros_like(pair)), pair)

    def reduced(self):
        """The totals of all ranks together."""
        everyone = Totals()
        for sums in gather({name: pair.cpu() for name, pair in self.sums.items()}):
            for name, pair in sums.items():
                everyone.add(name, *pair)
        return everyone

    def means(self):
        pairs = {name: pair.tolist() for name, pair in self.sums.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count > 0}


class Clock:
    """Seconds by phase since the last report: `with clock("verify"): ...`. A phase within another counts as its own."""

    def __init__(self, device):
        self.device, self.seconds, self.started = device, Counter(), time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        started, others = time.perf_counter(), self.seconds.total()
        try:
            yield
        finally:
            if self.device == "cuda":
                torch.cuda.synchronize()  # kernels run on after the call that queued them
            within = self.seconds.total() - others
            self.seconds[phase] += time.perf_counter() - started - within

    def report(self):
        """{"seconds": all, "seconds_PHASE": each, "seconds_other": what no phase has} since the last report."""
        now = time.perf_counter()
        result = {"seconds": now - self.started} | {f"seconds_{name}": s for name, s in self.seconds.items()}
        result["seconds_other"] = result["seconds"] - self.seconds.total()
        self.seconds, self.started = Counter(), now
        return result


class Interrupted(Exception):
    """SIGTERM or Ctrl-C has come, and this is a place where the run may stop."""


class Stop:
    """Remembers the first SIGTERM or Ctrl-C; the second Ctrl-C stops at once, as usual."""

    def __init__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, _frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{self.signal}: stopping at the next safe place; Ctrl-C (again) stops at once\n".encode())

    def check(self):
        """Between phases: stops here if a signal has reached any rank. All ranks ask, and all get the same answer."""
        heard = [name for name in gather(self.signal) if name]
        if heard:
            self.signal = heard[0]
            raise Interrupted

    def poll(self):
        """Within a phase: this rank leaves it, and meets the others at its end."""
        if self.signal:
            raise Interrupted

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------------- Rollout

@contextlib.contextmanager
def token_bar(run, label):
    """A callback for the sampler: a bar in tokens, and the place where a signal ends the sampling."""
    with tqdm(desc=label, unit="tok", leave=False, disable=None if rank() == 0 else True) as bar:
        yield lambda count: (bar.update(count), run.stop.poll())


def sample_groups(run, pairs, watch):
    """Samples and verifies one group for each (data index, noise key) pair -> Batch, the same on every rank."""
    parts, order = in_turn(run, pairs, lambda share: sample_share(run, share, watch))
    return functools.reduce(Batch.join, parts).select(order)


def sample_share(run, pairs, watch):
    """This rank's share of sample_groups -> Batch."""
    args, indices = run.args, [i for i, _ in pairs]
    prompts, asked = [run.prompts[i] for i in indices], [run.problems[i] for i in indices]
    with run.clock("decode"):
        samples = sample(
            run.sampler, prompts, args.group_size, args.max_new_tokens, args.temperature, stop_ids=run.stop_ids,
            seed=args.seed, step=run.state.step, rows=[key for _, key in pairs], on_tokens=watch,
            clock=run.clock, max_rows=args.rollout_batch, max_memory=int(args.rollout_memory * 2**30),
        )  # fmt: skip
    with run.clock("verify"):
        texts, groups = evaluation.check_samples(run.tokenizer, run.verifier, samples, asked)
    verdicts, classes, answers, timed_out = zip(*groups)
    samples = [part.unflatten(0, (len(pairs), args.group_size)) for part in samples]
    return Batch(indices, prompts, *samples, *map(torch.tensor, (verdicts, classes, timed_out)), texts, list(answers))


def rollout(run):
    """The groups drawn for a step -> (Batch, which of them to train on, metrics of the drawing).

    Dynamic sampling draws again, at most --max-rounds times, until there are P groups with both verdicts; what it
    drops was paid for, and counts in the metrics. Nothing of the run's state changes: a signal may end it anywhere."""
    args, batch, kept, rounds = run.args, None, [], 0
    with token_bar(run, f"step {run.state.step + 1}") as watch:
        while rounds < (args.max_rounds if args.dynamic_sampling else 1) and len(kept) < args.prompts_per_step:
            cursor = run.state.cursor + rounds * args.prompts_per_step
            drawn = draw_prompts(args.seed, cursor, args.prompts_per_step, len(run.problems))
            found = sample_groups(run, drawn, watch)
            batch, rounds = found if batch is None else batch.join(found), rounds + 1
            usable = copo.is_mixed(batch.correct) if args.dynamic_sampling else torch.ones(len(batch.indices))
            kept = usable.nonzero()[:, 0].tolist()[: args.prompts_per_step]
    run.stop.check()  # a step that was only sampled is abandoned
    return batch, kept, {
        "sampling_rounds": rounds, "prompts_drawn": len(batch.indices), "prompts_trained": len(kept),
        "accuracy_drawn": batch.correct.double().mean().item(),
        "equal_groups_drawn": (~copo.is_mixed(batch.correct)).double().mean().item(),
        "tokens_sampled": int(batch.lengths.sum()), "prompt_tokens": sum(map(len, batch.prompts)),
        "verifier_timeouts": int(batch.timed_out.sum()),
    }  # fmt: skip


def compute_signals(batch, args):
    """Rewards, entropies, advantages and weights of a whole step; copo.py has the formulas -> Signals."""
    rewards = batch.correct.double()
    if args.overlong_factor:
        rewards += copo.overlong_penalty(batch.lengths, args.max_new_tokens, args.overlong_buffer, args.overlong_factor)
    entropy = copo.consistency_entropy(batch.classes)
    prompt_rewards = copo.global_rewards(batch.correct, entropy, args.consistency_coef)
    local_adv = copo.local_advantages(rewards, args.advantage, args.scale_advantages)
    global_adv = copo.global_advantages(prompt_rewards, args.scale_advantages)
    weight = copo.local_weight(entropy, batch.correct, local_adv, args.blend, args.gamma, args.rho)
    effective = copo.effective_advantages(local_adv, global_adv, weight, args.global_coef)
    return Signals(rewards, entropy, prompt_rewards, local_adv, global_adv, weight, effective)


# -------------------------------------------------------------------------------------------------------------- Updates

def micro_batches(lengths, budget):
    """Splits pieces of `lengths` tokens into lists of pieces, longest first, of at most `budget` tokens or of one."""
    parts, total = [], 0
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        if not parts or total + lengths[piece] > budget:
            parts.append([])
            total = 0
        parts[-1].append(piece)
        total += lengths[piece]
    return parts


def deal(lengths, ranks):
    """Splits pieces of `lengths` tokens over ranks, as evenly as it goes: longest first, each to the least loaded rank.

    At most 5 % above the mean for 16 pieces a rank of lognormal lengths (σ 0.8), 8 ranks; tests/test_train_ranks.py."""
    shares, loads = [[] for _ in range(ranks)], [0] * ranks
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        lightest = loads.index(min(loads))
        shares[lightest].append(piece)
        loads[lightest] += lengths[piece]
    return shares


def pieces(pairs, args):
    """Rows that are run together: those of equal prompts, cut so that each fits into a micro-batch and there are some
    for every rank -> their rows, and how many tokens each has if it runs its prompt once."""
    together, parts, tokens = {}, [], []
    for row in sorted(range(len(pairs)), key=lambda row: -len(pairs[row][1])):
        together.setdefault(tuple(pairs[row][0]), []).append(row)
    most = len(pairs) if world() == 1 else max(1, len(pairs) // (4 * world()))  # four a rank can be dealt evenly
    for prompt, rows in together.items():
        for i, row in enumerate(rows):
            reply = len(pairs[row][1])
            if i == 0 or len(parts[-1]) == most or tokens[-1] + reply > args.micro_tokens:
                parts.append([])
                tokens.append(len(prompt))
            parts[-1].append(row)
            tokens[-1] += reply
    return parts, tokens


def packed_parts(pairs, args):
    """This rank's micro-batches of (prompt, reply) token ids, of which every rank has the same list.

    Yields (which pairs (b,), ids (b,T), prompt and reply lengths (b,), owners of the prompts (b,)), the latter as
    Transformer.score() takes them. Rows are padded on the right, with zeros that nothing looks at: lengths say what
    counts. Ranks with fewer micro-batches than others run empty ones, because in sharded training every forward and
    backward pass is a meeting of all ranks."""
    together, tokens = pieces(pairs, args)
    parts = [
        [[share[i] for i in part] for part in micro_batches([tokens[piece] for piece in share], args.micro_tokens)]
        for share in deal(tokens, world())
    ]
    mine = parts[rank()] + [[]] * (max(map(len, parts)) - len(parts[rank()]))
    for part in mine:
        part = [row for piece in part for row in together[piece]]
        chosen, first = [pairs[i] for i in part] or [([0], [])], {}
        owners = [first.setdefault(tuple(prompt), row) for row, (prompt, _) in enumerate(chosen)]
        ids = torch.zeros(len(chosen), max(len(prompt) + len(reply) for prompt, reply in chosen), dtype=torch.long)
        for row, (prompt, reply) in zip(ids, chosen):
            row[: len(prompt) + len(reply)] = torch.tensor(prompt + reply)
        lengths = [(len(prompt), len(reply), owner) for (prompt, reply), owner in zip(chosen, owners)]
        yield torch.tensor(part or [0]), ids.to(args.device), *torch.tensor(lengths, device=args.device).unbind(1)


def pairs_of(batch, rows):
    """(prompt, reply) token ids of some rows of a batch."""
    group_size, tokens, lengths = batch.lengths.shape[1], batch.tokens.flatten(0, 1), batch.lengths.flatten()
    return [(batch.prompts[row // group_size], tokens[row, : lengths[row]].tolist()) for row in rows]


def score_rows(model, batch, rows, args):
    """Log-probs of some rows under `model`, without gradients: (B,R) on the CPU, zero elsewhere."""
    result, rows = torch.zeros_like(batch.logprobs.flatten(0, 1)), torch.tensor(rows)
    with torch.no_grad():
        for part, ids, prompt_lengths, lengths, owner in packed_parts(pairs_of(batch, rows.tolist()), args):
            logprobs, _ = model.score(ids, prompt_lengths, lengths, args.temperature, owner=owner)
            result[rows[part], : logprobs.shape[1]] = logprobs.to("cpu", result.dtype)
    if world() > 1:
        dist.all_reduce(result)  # each row was scored by one rank
    if hasattr(model, "reshard"):
        model.reshard()  # FSDP keeps the embeddings whole for a backward pass that does not come
    return result


def train_on(run, batch, signals):
    """All optimiser updates of one step -> Totals. Groups are dealt to them by a permutation of (seed, step)."""
    args, totals, group_size = run.args, Totals(), batch.correct.shape[1]
    order = np.random.default_rng([args.seed, 2, run.state.step]).permutation(len(batch.indices)).tolist()
    parts = [order[i : i + args.minibatch_prompts] for i in range(0, len(order), args.minibatch_prompts)]
    parts = [[i * group_size + j for i in part for j in range(group_size)] for part in parts]
    # The first update needs none but its own, see update().
    old_logprobs = batch.logprobs.flatten(0, 1) if args.old_logprobs == "sampler" else None
    ref_logprobs = None
    if len(parts) > 1 and args.old_logprobs == "recompute":
        with run.clock("logprobs"):  # now, before the weights move
            old_logprobs = score_rows(run.model, batch, [row for part in parts[1:] for row in part], args)
    if run.reference is not None:
        with run.clock("logprobs"):
            ref_logprobs = score_rows(run.reference, batch, [row for part in parts for row in part], args)
    for number, rows in enumerate(parts):
        place = [name for name, holds in (("first", number == 0), ("last", rows is parts[-1])) if holds]
        attempt = copy.deepcopy(totals)
        if update(run, batch, rows, signals, old_logprobs if number else None, ref_logprobs, attempt, place):
            totals = attempt
    return totals.reduced()


def update(run, batch, rows, signals, old_logprobs, ref_logprobs, totals, place=()):
    """One optimiser step on some rows (whole groups) of the batch; adds its metrics to `totals`. Whether it was made.

    old_logprobs: None for a step's first update, whose own log-probs they are: the weights have not moved since.
    place: "first", "last" or both, the suffixes under which clip fractions are logged once more."""
    args, loss_sum, rows = run.args, 0.0, torch.tensor(rows)
    # Denominators are counts of the whole update, known before any micro-batch runs; shares of it are then summed.
    num_tokens, num_sequences = int(batch.lengths.flatten()[rows].sum()), len(rows)
    sampled = batch.logprobs.flatten(0, 1)
    per_row = {
        "local_adv": signals.local_adv.flatten(),
        "global_adv": signals.global_adv.repeat_interleave(batch.lengths.shape[1]),
        "weight": signals.weight.flatten(),
    }
    for part, ids, prompt_lengths, lengths, owner in packed_parts(pairs_of(batch, rows.tolist()), args):
        part = rows[part]
        with run.clock("forward"):
            logprobs, entropy = run.model.score(ids, prompt_lengths, lengths, args.temperature, owner=owner)
            width = logprobs.shape[1]
            mask = torch.arange(width, device=args.device) < lengths[:, None]
            old = logprobs.detach() if old_logprobs is None else old_logprobs[part, :width].to(logprobs)
            loss, metrics = copo.copo_loss(
                logprobs, old, mask, **{name: value[part].to(args.device) for name, value in per_row.items()},
                global_coef=args.global_coef, clip_low=args.clip_low, clip_high=args.clip_high,
                dual_clip=args.dual_clip, aggregation=args.aggregation, max_tokens=args.max_new_tokens,
                num_tokens=num_tokens, num_sequences=num_sequences, kl_coef=args.kl_coef,
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[part, :width].to(logprobs),
            )  # fmt: skip
        with run.clock("backward"):
            (loss * world()).backward()  # sharded gradients are means over ranks, and ours is their sum
        loss_sum += float(loss.detach())
        metrics["token_entropy"] = entropy.sum(), mask.sum()
        if old_logprobs is None or args.old_logprobs == "recompute":
            # Sampling and scoring are to agree up to rounding; where they do not, the sampler is not the policy.
            difference = torch.where(mask, old - sampled[part, :width].to(old), 0.0).abs().double()
            totals.add("sampler_difference_max", difference.max() if width else difference.sum())
            metrics["sampler_difference"] = difference.sum(), mask.sum()
        metrics |= {f"{name}_{suffix}": metrics[name] for name in list(metrics) if "clip" in name for suffix in place}
        for name, (total, count) in metrics.items():
            totals.add(name, total, count)
    rate = args.lr * min(1.0, (run.state.updates + 1) / max(args.warmup_updates, 1))
    with run.clock("optimizer"):
        return finish_update(run, loss_sum, rate, totals)


def finish_update(run, loss, rate, totals):
    """Clips the gradient and steps the optimiser; or skips the update and counts it, if anything is not finite.

    loss: this rank's share of the update's."""
    args, state = run.args, run.state
    loss = torch.tensor(sum(gather(loss)), dtype=torch.float64)
    norm = full(torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.max_grad_norm or math.inf))
    made = math.isfinite(loss) and math.isfinite(norm)
    if made:
        # Set at every update, since a checkpoint restores them too and the flags may have changed since.
        for group, decay in zip(run.optimizer.param_groups, (args.weight_decay, 0.0)):
            group.update(lr=rate, betas=(args.beta1, args.beta2), weight_decay=decay)
        run.optimizer.step()
        totals.add("loss", loss)
        totals.add("grad_norm", norm)
        totals.add("grad_norm_max", norm)
    run.optimizer.zero_grad(set_to_none=True)
    state.updates += 1
    state.skipped_updates += not made
    state.bad_updates = 0 if made else state.bad_updates + 1
    if not made:
        say(f"WARNING update {state.updates}: loss {float(loss):g}, gradient norm {float(norm):g}; skipped")
    if state.bad_updates >= args.max_bad_updates:
        raise ValueError(f"{state.bad_updates} updates in a row were not finite: lower --lr, or look at samples.txt")
    return made


def make_optimizer(model, args):
    """AdamW with weight decay on matrices only; its state is filled in now, so that checkpoints always hold it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    for p in model.parameters():
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def warm_start(run):
    """Supervised learning of the data's solutions (and of the end token after them), up to --sft-steps.

    The learning rate rises over the first 5 % of the steps and falls along a cosine to 5 % of its peak."""
    args, state, indices = run.args, run.state, sorted(run.replies)
    started, totals = time.perf_counter(), Totals()
    bar = tqdm(range(state.sft_step, args.sft_steps), "warm start", unit="update", leave=False,
               disable=None if rank() == 0 else True)  # fmt: skip
    for step in bar:
        # Asked before and not after: a checkpoint with the last step behind it must hold the next phase's optimiser.
        run.stop.check()
        drawn = draw_prompts(args.seed + 1, step * args.sft_batch, args.sft_batch, len(indices))
        pairs = [(run.prompts[indices[i]], run.replies[indices[i]]) for i, _ in drawn]
        num_tokens, loss_sum = sum(len(reply) for _, reply in pairs), 0.0
        for _, ids, prompt_lengths, lengths, owner in packed_parts(pairs, args):
            logprobs, _ = run.model.score(ids, prompt_lengths, lengths, owner=owner)
            loss = -logprobs.sum() / num_tokens  # score() leaves zeros beyond each reply
            (loss * world()).backward()
            loss_sum += float(loss.detach())
        rise, fall = (step + 1) / max(args.sft_steps * 0.05, 1), step / args.sft_steps
        rate = args.sft_lr * min(rise, 0.05 + 0.95 * (1 + math.cos(math.pi * fall)) / 2)
        finish_update(run, loss_sum, rate, totals)
        state.sft_step = step + 1
        if state.sft_step % 50 == 0 or state.sft_step == args.sft_steps:
            seconds = time.perf_counter() - started
            loss = totals.means().get("loss", math.nan)
            say(f"warm    {state.sft_step}/{args.sft_steps}  loss {loss:.3f}  {seconds:.0f} s")
            totals = Totals()
    # What is counted from here on is reinforcement learning's, the warm-up of the learning rate too.
    state.updates = state.skipped_updates = state.bad_updates = 0
    run.optimizer = make_optimizer(run.model, args)
    save_checkpoint(run)


# ------------------------------------------------------------------------------------------- Metrics and files of a run

def step_metrics(run, batch, signals, totals):
    """The step's line in metrics.jsonl (README explains each name); everything is over the whole step."""
    correct, wrong, lengths = batch.correct, ~batch.correct, batch.lengths.double()
    means = {
        "reward": signals.rewards, "consistency_entropy": signals.entropy, "local_weight": signals.weight,
        "length_mean": lengths, "all_wrong": wrong.all(dim=1), "all_right": correct.all(dim=1),
        "mixed": copo.is_mixed(correct), "zero_gradient_groups": signals.effective.abs().amax(dim=1) < 1e-9,
        "finished": batch.finished, "no_answer": batch.classes == -1, "accuracy": correct,
    }  # fmt: skip
    metrics = {"step": run.state.step, "loss": None, "grad_norm": None}  # None stays where there was no update
    metrics |= {name: value.double().mean().item() for name, value in means.items()}
    metrics |= {"length_max": lengths.max().item(), "lr": run.optimizer.param_groups[0]["lr"]}
    metrics["wrong_pushed_up"] = (((signals.effective > 0) & wrong).sum() / wrong.sum().clamp(min=1)).item()
    metrics |= totals.means()
    if "local_share" in metrics:
        metrics["global_share"] = 1 - metrics["local_share"]
    counters = ("updates", "skipped_updates", "skipped_steps", "cursor", "tokens", "responses")
    return metrics | {name: getattr(run.state, name) for name in counters}


def speed_metrics(clock, tokens_prefilled, tokens_sampled, tokens_trained):
    """Seconds by phase, tokens per second, peak memory: what a resumed run need not repeat."""
    metrics = clock.report()
    tokens = {"prefill": tokens_prefilled, "decode": tokens_sampled, "verify": tokens_sampled,
              "logprobs": tokens_trained, "forward": tokens_trained, "backward": tokens_trained}  # fmt: skip
    for phase, count in tokens.items():
        if count and metrics.get(f"seconds_{phase}"):
            metrics[f"tokens_per_second_{phase}"] = count / metrics[f"seconds_{phase}"]
    import resource  # not on Windows, which reward.py refuses by name

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if clock.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return metrics | {"peak_memory_gib": max(gather(peak)) / 2**30}


def group_lines(run, batch, signals):
    """The step's lines for groups.jsonl, a dict a prompt, in data order."""
    # Six digits are enough to recompute every formula, at a third of the size.
    short = Signals(*(part.mul(1e6).round().div(1e6).tolist() for part in signals))
    for i, index in enumerate(batch.indices):
        classes = batch.classes[i].tolist()
        yield {
            "step": run.state.step, "row": run.problems[index].row, "H": short.entropy[i],
            "R": short.global_rewards[i], "global_adv": short.global_adv[i], "correct": batch.correct[i].int().tolist(),
            "reward": short.rewards[i], "class": classes, "length": batch.lengths[i].tolist(),
            "finished": batch.finished[i].int().tolist(), "weight": short.weight[i], "local_adv": short.local_adv[i],
            "answers": {str(c): batch.answers[i][classes.index(c)] for c in sorted(set(classes))},
        }  # fmt: skip


def printable(text, width):
    """Model text as one line of at most `width` characters: nothing in it can move a cursor or break a log."""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text[: 4 * width])
    return text if len(text) <= width else text[: width - 1] + "…"


def sample_table(run, batch, signals):
    """A few responses to read: of the most mixed group and of the first one that is all wrong or all right."""
    mixed = int((batch.correct.double().mean(dim=1) - 0.5).abs().argmin())
    same = (~copo.is_mixed(batch.correct)).nonzero()[:, 0].tolist()
    lines = [f"step {run.state.step}"]
    for i in [mixed, *[i for i in same if i != mixed][:1]]:
        problem = run.problems[batch.indices[i]]
        lines.append(f"  {printable(problem.problem, 88)}   reference {printable(problem.answer, 20)}   "
                     f"H {signals.entropy[i]:.2f}  R {signals.global_rewards[i]:.2f}")  # fmt: skip
        for j, text in enumerate(batch.texts[i][:4]):
            verdict = "right" if batch.correct[i, j] else "wrong"
            lines.append(f"    {verdict}  A {signals.effective[i, j]:+.2f}  {printable(text, 90)}")
    return "\n".join(lines)


def console_line(m, steps):
    """One step for a person to read."""
    phases = {name.removeprefix("seconds_"): m[name] for name in m if name.startswith("seconds_")}
    phases = " ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05)
    return (
        f"step {m['step']:>{len(str(steps))}}/{steps}  reward {m['reward']:.3f}  wrong/mixed/right "
        f"{m['all_wrong']:3.0%}/{m['mixed']:3.0%}/{m['all_right']:3.0%}  H {m['consistency_entropy']:.2f}  "
        f"w {m['local_weight']:.2f}  loss {m['loss'] or 0:+.3f}  approx_kl {m.get('approx_kl', 0):.4f}  "
        f"grad {m['grad_norm'] or 0:.2f}  len {m['length_mean']:.0f}  {m['seconds']:.1f} s ({phases})"
    )


def raise_alarms(metrics, state):
    """Warns of a run that cannot learn: at the third such step in a row, and at every tenth from there on."""
    conditions = {
        "almost every response is cut off by --max-new-tokens": metrics["finished"] < 0.05,
        "almost no response has an answer that the checker finds; look at samples.txt": metrics["no_answer"] > 0.95,
        "no response has an advantage, since rewards are equal: nothing to learn":
            metrics["zero_gradient_groups"] == 1 or not metrics["prompts_trained"],
    }
    for message, holds in conditions.items():
        state.alarms[message] = state.alarms.get(message, 0) + 1 if holds else 0
        if state.alarms[message] % 10 == 3:
            say(f"WARNING {state.alarms[message]} steps in a row: {message}")


def log_step(run, batch, signals, drawing, totals):
    """Writes the step to metrics.jsonl, groups.jsonl, now and then samples.txt, and to the console."""
    step, every = run.state.step, run.args.samples_every
    metrics = step_metrics(run, batch, signals, totals) | drawing
    raise_alarms(metrics, run.state)
    append(run.directory / "groups.jsonl", [json.dumps(line) for line in group_lines(run, batch, signals)])
    trained = int(batch.lengths.sum()) if drawing["prompts_trained"] else 0
    metrics |= speed_metrics(run.clock, drawing["prompt_tokens"], drawing["tokens_sampled"], trained)
    append(run.directory / "metrics.jsonl", [json.dumps(metrics)])
    say(console_line(metrics, run.args.steps))
    if not drawing["prompts_trained"]:
        say(f"step {step}: no group has both verdicts among {drawing['prompts_drawn']} drawn; no update")
    if every and (step == 1 or step % every == 0):
        table = sample_table(run, batch, signals)
        append(run.directory / "samples.txt", [table])
        say(table)


def append(path, lines):
    """Adds lines to a file of the run, whole or, if the process is killed meanwhile, to be cut off on resume."""
    if rank() != 0:
        return
    with open(path, "a", encoding="utf-8", errors="replace") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------- Checkpoints and exports

def checkpoint_name(run):
    # "sft-" sorts before "step-", so that the newest checkpoint is the last name.
    warming = run.state.sft_step < run.args.sft_steps
    return f"sft-{run.state.sft_step:06d}" if warming else f"step-{run.state.step:06d}"


def save_checkpoint(run):
    """Writes checkpoints/NAME under a temporary name, renames it when it is whole, then prunes older ones."""
    target = run.directory / "checkpoints" / checkpoint_name(run)
    if gather(target.exists())[0]:  # what rank 0 sees counts: file systems may lag behind
        return target
    files = [run.directory / name for name in RUN_FILES]
    run.state.files = {path.name: path.stat().st_size for path in files if path.exists()}
    with whole_directory(target) as temporary, plain_errors(f"cannot write the checkpoint {target}"):
        weights, optimizer = get_state_dict(run.model, run.optimizer)
        dcp.save({"model": weights, "optimizer": optimizer}, checkpoint_id=temporary, no_dist=world() == 1)
        if rank() == 0:
            (temporary / "state.json").write_text(json.dumps(asdict(run.state)) + "\n")
    for old in list_checkpoints(run.directory)[: -run.args.keep] if rank() == 0 else ():
        discard(old)
    return target


def list_checkpoints(directory):
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (directory / "checkpoints").glob("s*/state.json"))


def go_back(run):
    """Restores the checkpoint that --resume names, if there is one, and removes what the run did after it."""
    found = list_checkpoints(run.directory) if run.args.resume == "latest" else [Path(run.args.resume).resolve()]
    found = gather(found)[0]
    if found:
        with plain_errors(f"cannot read the checkpoint {found[-1]}, go on from another one with --resume DIR"):
            weights, optimizer = get_state_dict(run.model, run.optimizer)
            dcp.load({"model": weights, "optimizer": optimizer}, checkpoint_id=found[-1], no_dist=world() == 1)
            set_state_dict(run.model, run.optimizer, model_state_dict=weights, optim_state_dict=optimizer)
            run.state = State(**json.loads((found[-1] / "state.json").read_text()))
    gather(None)  # all have read before anything is removed
    if rank() != 0:
        return
    for stale in [*run.directory.rglob(".*.tmp"), *run.directory.rglob(".*.old")]:
        shutil.rmtree(stale, ignore_errors=True)  # one may have lain in another
    for path in (run.directory / name for name in RUN_FILES):
        if path.exists():  # half-written lines lie beyond the length that was noted, and go too
            os.truncate(path, min(run.state.files.get(path.name, 0), path.stat().st_size))
    for checkpoint in list_checkpoints(run.directory):
        if checkpoint.name > checkpoint_name(run):
            discard(checkpoint)


@contextlib.contextmanager
def whole_directory(target):
    """A temporary directory that takes the place of `target` when all of it is written: whole or not at all."""
    temporary = target.with_name(f".{target.name}.tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    gather(None)
    try:
        yield temporary
    except BaseException:  # such as a full disk, which has better uses for the space
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    gather(None)
    if rank() == 0:
        if target.exists():
            discard(target)
        os.replace(temporary, target)
    gather(None)


@contextlib.contextmanager
def plain_errors(what):
    """Whatever torch makes of a full disk or a damaged file becomes an OSError of one line."""
    try:
        yield
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        raise OSError(f"{what}: {causes[0]}") from error


def discard(directory):
    """Deletes a directory; it is hidden first, so that nobody takes what is left of it for a whole one."""
    hidden = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(directory, hidden)
    shutil.rmtree(hidden)


def export(run, name, dtype):
    """Writes the weights as a Hugging Face directory of the run, tensor by tensor, none of them held for long."""
    with whole_directory(run.directory / name) as temporary:
        weights = ((key, full(tensor)) for key, tensor in run.model.state_dict().items())
        if rank() == 0:
            run.model.save_pretrained(temporary, DTYPES.get(dtype), weights)
        deque(weights, maxlen=0)  # every rank takes part in making each tensor whole; rank 0 has taken them all


# -------------------------------------------- Weights in two forms: masters that are trained, and the copy that samples

def full(tensor):
    """A sharded tensor as a whole one; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model, args):
    """FSDP2 over all ranks, block by block, of a model without weights, which are then read from its source's files.

    Computes in --dtype; masters and gradient reduction are float32, or float64."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Named, since FSDP would otherwise take the best device that this PyTorch was built for.
    mesh = init_device_mesh(args.device, (world(),))
    cast = fsdp.MixedPrecisionPolicy(DTYPES[args.dtype], reduce_dtype=next(model.parameters()).dtype)
    pin = args.device == "cuda"
    offload = fsdp.CPUOffloadPolicy(pin_memory=pin) if args.cpu_offload else fsdp.OffloadPolicy()
    for part in [*model.model.layers, model]:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=cast, offload_policy=offload)
    fsdp.register_fsdp_forward_method(model, "score")
    model.to_empty(device="cpu" if args.cpu_offload else args.device)
    weights = read_weights(Path(model.source))  # pages of files, of which one parameter at a time is taken in
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[name].to(parameter.dtype)
            parameter.copy_(distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None))


def second_copy(run, path, kept_apart=False):
    """A frozen copy in the compute type, with the weights of a directory: whole, or one shard of it on each rank."""
    device = "meta" if kept_apart else run.args.device
    copy = Transformer.from_pretrained(path, DTYPES[run.args.dtype], device).requires_grad_(False)
    copy.num_tokens = run.model.num_tokens
    if kept_apart:
        shard(copy, run.args)
    return copy


def sync_weights(run):
    """Copies the masters, parameter by parameter, into the copy that samples."""
    if run.sampler is not run.model:
        with torch.no_grad(), run.clock("sync"):
            for target, source in zip(run.sampler.parameters(), run.model.parameters()):
                if target.shape != source.shape:  # its memory was given back
                    target.data = target.new_empty(source.shape)
                target.copy_(full(source.detach()))


def free_sampler(run):
    """Gives the sampling copy's memory back until the next sync_weights(), if --free-sampler asks for it."""
    if run.args.free_sampler:
        for parameter in run.sampler.parameters():
            parameter.data = parameter.new_empty(0)


def load_reference(run):
    """The frozen initial policy for the KL term; after a warm start it is exported once, for continuations."""
    path = Path(run.model.source)
    if run.args.sft_steps:
        path = run.directory / "reference"
        if run.state.step == 0:
            export(run, path.name, "float64" if run.args.dtype == "float64" else "float32")
    return second_copy(run, path, kept_apart=world() > 1)


# -------------------------------------------------------------------------------------------------------------- The run

def due(step, every, last):
    """Whether something done every so many steps (0: only before and after) is to be done at this one."""
    return step in (0, last) or (every > 0 and step % every == 0)


def evaluate(run):
    """Evaluates the held-out problems, if it is time: a line in eval.jsonl and one on the console."""
    args, state = run.args, run.state
    made = [step for step, _ in state.evaluations]
    if not run.held_out or state.step in made or not due(state.step, args.eval_every, args.steps):
        return
    with run.clock("evaluate"), token_bar(run, "evaluation") as watch:
        found = evaluation.merge(*in_turn(run, run.held_out, lambda share: evaluation.evaluate(
            run.sampler, run.tokenizer, share, run.verifier, k=args.eval_samples, seed=args.eval_seed,
            max_new_tokens=args.max_new_tokens, temperature=args.eval_temperature, stop_ids=run.stop_ids,
            system=args.system, instruction=args.instruction, max_rows=args.rollout_batch, on_tokens=watch,
            max_memory=int(args.rollout_memory * 2**30),
        )))  # fmt: skip
    means, votes = evaluation.mean_at_k(found.verdicts), evaluation.maj_at_k(found.verdicts, found.classes)
    line = {
        "step": state.step, "k": args.eval_samples, "mean": float(means.mean()), "maj": float(votes.mean()),
        "equal_groups": float(np.isin(means, (0, 1)).mean()), "length_mean": float(found.lengths.mean()),
        "finished": float(found.finished.mean()), "no_answer": float((found.classes == -1).mean()),
        "tokens": state.tokens, "responses": state.responses, "seconds": run.clock.seconds["evaluate"],
        "per_problem": means.tolist(), "per_problem_maj": votes.tolist(),
    }  # fmt: skip
    append(run.directory / "eval.jsonl", [json.dumps(line)])
    state.evaluations.append([state.step, line["mean"]])
    say(f"eval    step {state.step}: mean@{line['k']} {line['mean']:.1%}  maj@{line['k']} {line['maj']:.1%}  "
        f"equal groups {line['equal_groups']:.0%}  len {line['length_mean']:.0f}  "
        f"({len(means)} problems, {line['seconds']:.1f} s)")  # fmt: skip


def prepare(args):
    """Loads model, tokenizer and data, and refuses what cannot work before anything is written -> Run."""
    directory, made = Path(args.run_dir), not args.model and not args.resume
    with tempfile.TemporaryDirectory(prefix="copo-") as scratch:
        source = args.model or (Path(scratch) if made else directory) / "init"
        if made:
            make_tiny_model(source, args.seed)
        masters = "float64" if args.dtype == "float64" else "float32"
        # Without weights where they will be sharded: start() reads each rank's part of them.
        device = "meta" if sharded(args) else args.device
        model, tokenizer, stop_ids = evaluation.load_checkpoint(source, masters, device, args.stop)
        check_memory(model.config, args)
        need(tokenizer.eos_token_id is not None or not args.sft_steps,
             f"{source}: the tokenizer has no end token, which the warm start would train")  # fmt: skip
        (problems, prompts), (held_out, held_out_prompts) = load_data(args, tokenizer)
        replies = {i: tokenizer(p.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                   for i, p in enumerate(problems) if p.solution and args.sft_steps}  # fmt: skip
        need(replies or not args.sft_steps,
             f"--sft-steps {args.sft_steps}, but no problem in {args.data} has a solution to learn from")  # fmt: skip
        longest = max(len(prompt) for prompt in prompts + held_out_prompts) + args.max_new_tokens
        positions = model.config.max_position_embeddings
        need(longest <= positions, f"the longest prompt and --max-new-tokens make {longest} tokens; the model has "
             f"{positions} positions: lower --max-prompt-tokens or --max-new-tokens")  # fmt: skip
        for i, reply in replies.items():
            need(len(prompts[i]) + len(reply) <= positions, f"{args.data}:{problems[i].row + 1}: prompt and solution "
                 f"make {len(prompts[i]) + len(reply)} tokens; the model has {positions} positions")  # fmt: skip
    if made:
        model.source = directory / "init"  # where claim() makes it again
    return Run(args, model, model, tokenizer, stop_ids, problems, prompts, replies, held_out, directory)


def claim(run):
    """Makes the run's directory, with the tiny model in it if that is the model."""
    if rank() == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
        if not run.args.model and not run.args.resume:
            make_tiny_model(run.directory / "init", run.args.seed)


def record_run(run):
    """run.json: every flag, versions, commit. On resume it says which flags differ from before, and notes them."""
    if rank() != 0:
        return
    flags = dict(sorted(vars(run.args).items()))
    if run.args.resume:
        run.about = json.loads((run.directory / "run.json").read_text())
        before = run.about["flags"]
        changed = {name: [before.get(name), value] for name, value in flags.items()
                   if name not in NOT_THE_RUN and before.get(name) != value}  # fmt: skip
        for name, (old, new) in changed.items():
            say(f"WARNING {flag(name)} was {old} and is now {new}: from here on this is another run")
        run.about.setdefault("resumed", []).append({"step": run.state.step, "changed": changed})
        run.about.pop("ended", None)
    else:
        git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        packages = ("torch", "transformers", "safetensors", "numpy", "tqdm", "sympy")
        run.about = {
            "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "command": sys.argv, "commit": git.stdout.strip() or None,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(), "host": platform.platform(), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in run.model.parameters()),
        }  # fmt: skip
    write_about(run, flags=flags)


def write_about(run, **news):
    """Adds to run.json, which is never seen half-written."""
    run.about |= news
    temporary = run.directory / "run.tmp"
    temporary.write_text(json.dumps(run.about, indent=1) + "\n")
    os.replace(temporary, run.directory / "run.json")


def start(run):
    """Puts the weights in their places, goes back to the checkpoint if there is one, and says what will be done."""
    args = run.args
    for block in run.model.model.layers:
        block.recompute = args.activation_checkpointing
        if args.compile:
            block.compute = torch.compile(block.compute, backend=args.compile, dynamic=True)
    if sharded(args):
        run.sampler = second_copy(run, run.model.source)
        shard(run.model, args)
    run.optimizer = make_optimizer(run.model, args)
    if args.resume:
        go_back(run)
    record_run(run)
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    say(f"model   {run.model.source}: {parameters:.1f} M parameters, {args.dtype}, {args.device}, "
        f"{world()} × {torch.get_num_threads()} threads")  # fmt: skip
    say(f"run     {run.directory}: {args.algo} (blend {args.blend}), P {args.prompts_per_step} × G {args.group_size}, "
        f"{args.prompts_per_step // args.minibatch_prompts} updates a step, lr {args.lr:g}, responses up to "
        f"{args.max_new_tokens} tokens, steps {run.state.step} to {args.steps}")  # fmt: skip


def train(run):
    """The run: a warm start; then evaluate, save, and a step of reinforcement learning, in turn, until --steps."""
    args, state = run.args, run.state
    if state.sft_step < args.sft_steps:
        warm_start(run)
    run.reference = load_reference(run) if args.kl_coef else None
    run.clock.report()  # the first step's seconds are its own
    while True:
        sync_weights(run)
        evaluate(run)
        with run.clock("save"):
            if state.step and due(state.step, args.save_every, args.steps):
                save_checkpoint(run)
            if state.step and args.export_every and state.step % args.export_every == 0:
                export(run, f"model-{state.step:06d}", args.export_dtype)
        if state.step >= args.steps:
            break
        run.stop.check()
        drawn, kept, drawing = rollout(run)
        free_sampler(run)
        batch = drawn.select(kept or range(len(drawn.indices)))
        signals = compute_signals(batch, args)
        totals = train_on(run, batch, signals) if kept else Totals()
        state.step += 1
        state.skipped_steps += not kept
        state.cursor += drawing["prompts_drawn"]
        state.tokens += drawing["tokens_sampled"]
        state.responses += drawn.correct.numel()
        log_step(run, batch, signals, drawing, totals)
    summarise(run)


def summarise(run):
    """Exports the model and says what came of the run, and where everything lies."""
    export(run, "model", run.args.export_dtype)
    if len(found := run.state.evaluations) > 1:
        step, best = max(found, key=lambda line: line[1])
        say(f"held-out mean@{run.args.eval_samples}: {found[0][1]:.1%} before, {found[-1][1]:.1%} after {found[-1][0]} "
            f"steps; the best of all evaluations, {best:.1%}, was at step {step}")  # fmt: skip
    say(f"run     {run.directory}: metrics.jsonl eval.jsonl groups.jsonl samples.txt run.json checkpoints/ model/")


def main(argv=None):
    # One process needs no process group for its checkpoints, and no word about that.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        args = parse_args(argv)
        if args.plan:
            return print_plan(args)
        join_ranks(args.device, args.timeout)
        args = gather(args)[0]  # torchrun's workers on several machines may see different things; rank 0's count
        run = together(lambda: prepare(args))
        together(lambda: claim(run))
    except (ValueError, OSError) as error:
        evaluation.refuse("train.py", error)
    run.clock, run.stop = Clock(args.device), Stop()
    run.verifier = Verifier(args.verifier_workers, timeout=args.verifier_timeout, memory_mb=args.verifier_memory)
    go_on = f"--run-dir {run.directory} --resume latest"
    ending, how, why = 0, "", ""  # ending: or a message, which goes to stderr with exit code 1
    try:
        start(run)
        how = "failed"  # unless it comes to another end
        train(run)
        how = "finished"
    except Interrupted:
        path = save_checkpoint(run)
        how, why = "stopped", run.stop.signal
        say(f"stopped by {run.stop.signal}; saved {path}. To go on: python train.py {go_on}")
    except KeyboardInterrupt:
        print(f"train.py: stopped at once; {go_on} goes back to the last checkpoint", file=sys.stderr)
        ending, how = 130, "stopped"
    except Exception as error:
        said = " ".join(str(error).split())
        why = f"{type(error).__name__}: {said}"
        if isinstance(error, OSError) or "not finite" in said:
            ending = f"train.py: after step {run.state.step}: {said}; {go_on} goes back to the last checkpoint"
        elif world() == 1:
            raise
        else:
            ending = f"train.py: rank {rank()}: {traceback.format_exc()}"
    finally:
        if how and run.about:
            with contextlib.suppress(OSError):  # such as a full disk, of which the run may have failed
                write_about(run, ended={"how": how, "step": run.state.step, "why": why})
        run.verifier.close()
        run.stop.restore()
    if ending and world() > 1:
        # Leaving in order would wait for peers that wait for this rank; torchrun ends them once it is gone.
        print(ending, file=sys.stderr, flush=True)
        os._exit(1)
    leave_ranks()
    if ending:
        raise SystemExit(ending)


if __name__ == "__main__":
    main()
