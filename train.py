"""Train a language model with COPO (arXiv 2508.04138) on problems whose answers can be checked.

    python train.py                                          # the built-in demonstration: a tiny model, arithmetic
    python train.py --model DIR_OR_ID --data train.jsonl --eval-data test.jsonl --run-dir runs/mine
    python train.py --algo grpo --blend soft --gamma 20      # a preset, then single changes to it
    python train.py --run-dir runs/mine --resume latest      # go on where a run was stopped, however it was stopped

The main loop (main, at the end) is a list of verbs: draw prompts, sample a group of responses to each, verify them,
turn verdicts into advantages and weights (copo.py), update the weights, log. Kept simple: AdamW at a constant rate
after its warm-up, one model, one kind of batch. Random choices (data order, updates, noise) are functions of the seed
and of counters, so a run that is stopped and resumed is the same run, bit for bit on a CPU.

Shapes: P prompts of a step, G responses each, B = P·G rows (row = prompt·G + response), R response tokens, T tokens.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

import copo
from eval import INSTRUCTION, evaluate, maj_at_k, mean_at_k
from model import Config, Transformer, model_directory
from reward import Verifier, load_problems
from sampler import encode_prompt, load_tokenizer, sample, stop_token_ids

HERE = Path(__file__).resolve().parent
# Sizes of a run. The demonstration (no --model) fits two cores and a few minutes; with --model they are the authors'.
DEMO = {
    "data": str(HERE / "data/arithmetic_train.jsonl"), "eval_data": str(HERE / "data/arithmetic_test.jsonl"),
    "instruction": "", "max_prompt_tokens": 64, "max_new_tokens": 64, "steps": 40, "prompts_per_step": 32,
    "group_size": 8, "minibatch_prompts": 32, "lr": 2e-4, "beta2": 0.95, "warmup_updates": 0, "sft_steps": 400,
    "sft_lr": 3e-3, "eval_every": 20, "save_every": 20,
}  # fmt: skip
AUTHORS = {
    "eval_data": None, "instruction": INSTRUCTION,
    "max_prompt_tokens": 1024, "max_new_tokens": 2048, "steps": 60, "prompts_per_step": 512, "group_size": 6,
    "minibatch_prompts": 32, "lr": 1e-6, "beta2": 0.999, "warmup_updates": 0, "sft_steps": 0,
    "sft_lr": 1e-5, "eval_every": 10, "save_every": 10,
}  # fmt: skip
# What may differ between a run and its continuation without a word: where, how long, how often, how fast.
NOT_THE_RUN = {"steps", "run_dir", "resume", "eval_every", "save_every", "keep", "export_every", "samples_every",
               "device", "micro_tokens", "rollout_batch", "verifier_workers"}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """Something the user asked for cannot work: one line that says what to do, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage of sixty flags above its one useful line
        raise Refusal(message)


def flags():
    """The parser. A default of None is filled in by the preset (--algo) or by the size set (DEMO or AUTHORS)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--model", help="Hugging Face directory or Hub id (default: a tiny one, made on the spot)")
    add("--dtype", choices=DTYPES, default="float32", help="compute type; master weights are float32 or float64")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    add("--system", help="system message of the chat template (default: the template's own)")
    add("--instruction", help="text after every problem")
    add("--stop", action="append", default=[], metavar="TOKEN", help="one more token that ends a response; repeatable")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="training problems, JSONL with problem, answer and perhaps solution")
    add("--eval-data", help="held-out problems, JSONL (without: no evaluation)")
    add("--max-prompt-tokens", type=int, help="problems with longer prompts are dropped, in tokens")
    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=int, help="P, prompts sampled in a step")
    add("--group-size", type=int, help="G, responses to each prompt")
    add("--max-new-tokens", type=int, help="response limit, in tokens")
    add("--temperature", type=float, default=1.0, help="of sampling and of scoring alike")
    add("--rollout-batch", type=int, default=0, help="rows sampled at the same time (0 = all of them)")
    add("--max-rounds", type=int, help="rounds of dynamic sampling in a step (default 4)")
    add("--verifier-workers", type=int, default=2, help="processes that check answers")
    add("--verifier-timeout", type=float, default=10.0, help="last resort for one answer, in seconds")
    add("--verifier-memory", type=int, default=1024, help="limit of one verifier process, in MiB")
    add = parser.add_argument_group("algorithm (defaults: the preset's)").add_argument
    add("--algo", choices=copo.PRESETS, default="copo", help="preset of all flags in this group")
    add("--blend", choices=copo.BLENDS, help="rule for w, the weight of the local loss")
    add("--gamma", type=float, help="γ, steepness of w in the entropy, per bit")
    add("--rho", type=float, help="ρ, entropy at which w is one half, in bits")
    add("--advantage", choices=copo.ADVANTAGES, help="local advantage: within the group, the batch, or NGRPO's")
    add("--scale-advantages", action=yes_no, help="divide advantages by their standard deviation")
    add("--global-coef", type=float, help="factor of the global term (0 = disabled)")
    add("--consistency-coef", action=yes_no, help="lower the global reward of groups that disagree")
    add("--clip-low", type=float, help="ε below 1")
    add("--clip-high", type=float, help="ε above 1")
    add("--dual-clip", type=float, help="c, bound on the loss where A < 0, above 1 (0 = disabled)")
    add("--aggregation", choices=copo.AGGREGATIONS, help="from token losses to one number")
    add("--kl-coef", type=float, help="β of the KL to the initial model, in the loss (0 = disabled)")
    add("--dynamic-sampling", action=yes_no, help="replace groups that are all right or all wrong")
    add("--overlong-factor", type=float, help="size of the penalty on length (0 = disabled)")
    add("--overlong-buffer", type=float, help="tokens over which it grows; below 1: a share of the limit")
    add = parser.add_argument_group("optimisation").add_argument
    add("--minibatch-prompts", type=int, help="prompts of one optimiser update; divides P")
    add("--micro-tokens", type=int, default=16384, help="padded tokens in one forward pass (one row at least)")
    add("--lr", type=float, help="learning rate of AdamW")
    add("--warmup-updates", type=int, help="updates over which the rate rises to --lr (0 = disabled)")
    add("--beta1", type=float, default=0.9, help="AdamW's decay of the gradient's mean")
    add("--beta2", type=float, help="AdamW's decay of the gradient's square")
    add("--weight-decay", type=float, default=0.01, help="on matrices only (0 = disabled)")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to it (0 = disabled)")
    add("--max-bad-updates", type=int, default=5, help="non-finite updates in a row before the run ends")
    add = parser.add_argument_group("supervised warm start, on the data's solutions").add_argument
    add("--sft-steps", type=int, help="updates before reinforcement learning (0 = disabled)")
    add("--sft-batch", type=int, default=128, help="solutions in one update")
    add("--sft-lr", type=float, help="peak learning rate; rises over 5 %% of the steps, then falls to 5 %%")
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=int, help="steps of reinforcement learning, those before a resume included")
    add("--seed", type=int, default=0, help="of data order, updates, noise and the tiny model")
    add("--run-dir", help="directory of the run (default: runs/ALGO-DATE-TIME)")
    add("--resume", metavar="latest|DIR", help="go on from the newest checkpoint of --run-dir, or from this one")
    add("--eval-every", type=int, help="steps between evaluations (0 = only before and after)")
    add("--eval-samples", type=int, default=8, help="k, responses to each held-out problem")
    add("--eval-problems", type=int, default=0, help="first problems of the held-out file to use (0 = all)")
    add("--eval-temperature", type=float, default=1.0, help="0 = greedy")
    add("--eval-seed", type=int, default=0, help="of the evaluation's noise, the same at every step")
    add("--save-every", type=int, help="steps between checkpoints (0 = only at the end)")
    add("--keep", type=int, default=2, help="newest checkpoints to keep")
    add("--export-every", type=int, default=0, help="steps between Hugging Face exports (0 = only at the end)")
    add("--export-dtype", choices=DTYPES, help="of exported weights (default: the source's)")
    add("--samples-every", type=int, default=10, help="steps between entries in samples.txt (0 = disabled)")
    return parser


def parse_args(argv):
    """Namespace of all flags, defaults filled in and checked against each other; Refusal with one line otherwise."""
    args = flags().parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    for name, value in ((AUTHORS if args.model else DEMO) | copo.PRESETS[args.algo]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.max_rounds is None:
        args.max_rounds = 4
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"

    def need(holds, message):
        if not holds:
            raise Refusal(message)

    def flag(name):
        return "--" + name.replace("_", "-")

    need(args.data, "--model needs --data, a JSONL file of problems")
    at_least = {
        0: "steps sft_steps warmup_updates rollout_batch eval_every eval_problems save_every export_every seed "
           "eval_seed samples_every gamma global_coef kl_coef overlong_factor weight_decay max_grad_norm "
           "eval_temperature dual_clip",
        1: "max_prompt_tokens max_new_tokens minibatch_prompts micro_tokens max_bad_updates sft_batch eval_samples "
           "keep max_rounds verifier_workers",
        2: "prompts_per_step group_size",
        64: "verifier_memory",
    }  # fmt: skip
    for low, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            need(value >= low and math.isfinite(value), f"{flag(name)} is {value}; it must be at least {low}")
    for name in ("temperature", "lr", "sft_lr", "verifier_timeout", "clip_high", "overlong_buffer"):
        value = getattr(args, name)
        need(value > 0 and math.isfinite(value), f"{flag(name)} is {value}; it must be above 0")
    for name in ("beta1", "beta2"):
        need(0 <= getattr(args, name) < 1, f"{flag(name)} is {getattr(args, name)}; it must be at least 0 and below 1")
    need(math.isfinite(args.rho), f"--rho is {args.rho}; it must be a number")
    need(0 < args.clip_low <= 1, f"--clip-low is {args.clip_low}; it must be above 0 and at most 1")
    need(args.dual_clip == 0 or args.dual_clip > 1, f"--dual-clip is {args.dual_clip}; it must be above 1, or 0")
    need(
        args.prompts_per_step % args.minibatch_prompts == 0,
        f"--minibatch-prompts {args.minibatch_prompts} does not divide --prompts-per-step {args.prompts_per_step}",
    )
    buffer = args.overlong_buffer * (args.max_new_tokens if args.overlong_buffer < 1 else 1)
    need(
        buffer <= args.max_new_tokens,
        f"--overlong-buffer {args.overlong_buffer:g} is more than --max-new-tokens {args.max_new_tokens}",
    )
    need(
        not args.dynamic_sampling or args.blend == "local",
        f"--dynamic-sampling drops the groups that --blend {args.blend} has its global term for; use --blend local",
    )
    # A flag that was typed and changes nothing is a mistake in an ablation: better said now.
    idle = {
        "--blend local has no global term": (args.blend == "local", "global_coef consistency_coef"),
        "--blend global has no local term": (args.blend == "global", "advantage"),
        f"--blend {args.blend} does not look at the entropy": (not args.blend.startswith("soft"), "gamma rho"),
        "--overlong-factor is 0": (args.overlong_factor == 0, "overlong_buffer"),
        "--dynamic-sampling is off": (not args.dynamic_sampling, "max_rounds"),
        "--sft-steps is 0": (args.sft_steps == 0, "sft_lr"),
    }
    for why, (applies, names) in idle.items():
        for name in names.split():
            need(not (applies and name in given), f"{flag(name)} has no effect: {why}")
    need(args.device == "cpu" or torch.cuda.is_available(), "--device cuda: PyTorch sees no CUDA device here")
    need(int(os.environ.get("WORLD_SIZE", 1)) == 1, "train.py runs on one process; start it with python, not torchrun")
    if args.resume == "latest":
        need(args.run_dir, "--resume latest needs --run-dir, the run to go on with")
    elif args.resume:
        need((Path(args.resume) / "state.json").is_file(), f"--resume {args.resume}: no checkpoint there")
        args.run_dir = args.run_dir or str(Path(args.resume).resolve().parent.parent)
    if args.resume:
        need((Path(args.run_dir) / "run.json").is_file(), f"--run-dir {args.run_dir}: no run there to resume")
    else:
        args.run_dir = args.run_dir or f"runs/{args.algo}-{datetime.now():%Y%m%d-%H%M%S}"
        used = Path(args.run_dir).exists() and (not Path(args.run_dir).is_dir() or any(Path(args.run_dir).iterdir()))
        need(not used, f"--run-dir {args.run_dir} is in use: choose another, or --resume latest to go on with it")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The demonstration's model: a real Hugging Face directory, made on the spot
# ---------------------------------------------------------------------------------------------------------------------

TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "initializer_range": 0.05, "torch_dtype": "float32", "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(path, seed):
    """Writes a Qwen2-shaped model of 0.8 million random parameters to `path`, with a tokenizer of single bytes."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE without merges, because transformers gives every Qwen2 directory Qwen's own splitting and decoding.
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    # `\\boxed{` is one token, so that writing it takes one step instead of seven.
    backend.add_tokens([AddedToken("\\boxed{", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], unk_token=special[0],
        additional_special_tokens=special[1:], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    Transformer.from_config(TINY | {"vocab_size": len(tokenizer)}, seed=seed).save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def load_data(args, tokenizer):
    """(problems, their prompts' token ids, held-out problems), what does not fit dropped and the counts printed."""

    def load(path):
        dropped = Counter()
        problems = load_problems(path, dropped)
        prompts = [encode_prompt(tokenizer, p.problem, args.system, args.instruction) for p in problems]
        fits = [len(prompt) <= args.max_prompt_tokens for prompt in prompts]
        dropped[f"prompt over {args.max_prompt_tokens} tokens"] += fits.count(False)
        problems, prompts = ([x for x, fit in zip(xs, fits) if fit] for xs in (problems, prompts))
        reasons = "".join(f", {count} dropped: {reason}" for reason, count in dropped.items() if count)
        print(f"data    {path}: {len(problems)} problems{reasons}")
        return problems, prompts

    problems, prompts = load(args.data)
    if len(problems) < args.prompts_per_step:
        raise Refusal(f"--prompts-per-step {args.prompts_per_step}, but {args.data} has {len(problems)} usable ones")
    held_out = load(args.eval_data)[0] if args.eval_data else []
    held_out = held_out[: args.eval_problems or None]
    if args.eval_data and not held_out:
        raise Refusal(f"--eval-data {args.eval_data} has no usable problems")
    seen = {" ".join(p.problem.casefold().split()) for p in problems}
    overlap = sum(" ".join(p.problem.casefold().split()) in seen for p in held_out)
    if overlap:
        print(f"WARNING {overlap} of {len(held_out)} held-out problems are in the training data too")
    return problems, prompts, held_out


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


# ---------------------------------------------------------------------------------------------------------------------
# A step: rollout, advantages, updates
# ---------------------------------------------------------------------------------------------------------------------


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
    alarms: dict = field(default_factory=dict)  # condition -> steps in a row that it has held


class Batch(NamedTuple):
    """A step's prompts and responses, on the CPU. Rows of tokens, logprobs, lengths and finished are B = P·G."""

    indices: list  # of the problems, P
    prompts: list  # token ids, P
    tokens: torch.Tensor  # (B,R)
    logprobs: torch.Tensor  # (B,R) as the sampler saw them
    lengths: torch.Tensor  # (B,)
    finished: torch.Tensor  # (B,)
    correct: torch.Tensor  # (P,G) bool
    classes: torch.Tensor  # (P,G), −1 where there is no answer
    texts: list  # P lists of G strings
    answers: list  # P lists of G strings or None
    timed_out: torch.Tensor  # (P,G)

    def select(self, kept):
        """The batch of some of its prompts, in the order given."""
        group_size = self.correct.shape[1]
        rows = (torch.as_tensor(kept, dtype=torch.long)[:, None] * group_size + torch.arange(group_size)).flatten()
        by_row = {"tokens", "logprobs", "lengths", "finished"}
        picked = {}
        for name, value in self._asdict().items():
            if isinstance(value, list):
                picked[name] = [value[i] for i in kept]
            else:
                picked[name] = value[rows if name in by_row else torch.as_tensor(kept, dtype=torch.long)]
        return Batch(**picked)

    def join(self, other):
        """This batch and then the other."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])

        def both(a, b):
            if isinstance(a, list):
                return a + b
            if a.dtype != torch.bool and a.dim() == 2 and len(a) == len(self.lengths):
                a, b = (F.pad(x, (0, width - x.shape[1])) for x in (a, b))
            return torch.cat([a, b])

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


def sample_groups(model, verifier, problems, prompts, tokenizer, stop_ids, pairs, args, step, clock, watch):
    """Samples and verifies one group for each (data index, noise key) pair -> Batch."""
    chosen = [prompts[i] for i, _ in pairs]
    with clock("sample"):
        samples = sample(
            model, chosen, args.group_size, args.max_new_tokens, temperature=args.temperature, stop_ids=stop_ids,
            seed=args.seed, step=step, rows=[key for _, key in pairs], max_rows=args.rollout_batch, on_tokens=watch,
        )  # fmt: skip
    with clock("verify"):
        texts = [
            tokenizer.decode(row[:length], skip_special_tokens=True)
            for row, length in zip(samples.tokens.tolist(), samples.lengths.tolist())
        ]
        texts = [texts[i : i + args.group_size] for i in range(0, len(texts), args.group_size)]
        asked = [problems[i] for i, _ in pairs]
        groups = verifier.check(texts, [p.answer for p in asked], [p.require_value for p in asked])
    return Batch(
        [i for i, _ in pairs], chosen, *samples, torch.tensor([g.verdicts for g in groups], dtype=torch.bool),
        torch.tensor([g.classes for g in groups]), texts, [g.answers for g in groups],
        torch.tensor([g.timed_out for g in groups], dtype=torch.bool),
    )  # fmt: skip


def rollout(model, verifier, problems, prompts, tokenizer, stop_ids, args, state, clock, watch):
    """The step's batch (None: dynamic sampling found nothing to learn from) and what drawing it took, as metrics.

    Moves the cursor, and counts the tokens and responses of dropped groups too: they were paid for."""
    batch, kept, rounds, drawn = None, [], 0, 0
    while rounds < (args.max_rounds if args.dynamic_sampling else 1) and len(kept) < args.prompts_per_step:
        pairs = draw_prompts(args.seed, state.cursor, args.prompts_per_step, len(problems))
        found = sample_groups(
            model, verifier, problems, prompts, tokenizer, stop_ids, pairs, args, state.step, clock, watch
        )  # fmt: skip
        rounds, drawn, state.cursor = rounds + 1, drawn + len(pairs), state.cursor + len(pairs)
        state.responses += found.lengths.numel()
        state.tokens += int(found.lengths.sum())
        batch = found if batch is None else batch.join(found)
        usable = copo.is_mixed(batch.correct) | (not args.dynamic_sampling)
        kept = usable.nonzero()[:, 0].tolist()[: args.prompts_per_step]
    sampled = {"sampling_rounds": rounds, "prompts_drawn": drawn, "tokens_sampled": int(batch.lengths.sum())}
    return batch.select(kept) if kept else None, sampled


def compute_signals(batch, args):
    """Rewards, entropies, advantages and weights of a whole step (design: copo.py has the formulas) -> Signals."""
    rewards = batch.correct.double()
    if args.overlong_factor:
        penalty = copo.overlong_penalty(batch.lengths, args.max_new_tokens, args.overlong_buffer, args.overlong_factor)
        rewards = rewards + penalty.view_as(rewards)
    entropy = copo.consistency_entropy(batch.classes)
    prompt_rewards = copo.global_rewards(batch.correct, entropy, args.consistency_coef)
    local_adv = copo.local_advantages(rewards, args.advantage, args.scale_advantages)
    global_adv = copo.global_advantages(prompt_rewards, args.scale_advantages)
    weight = copo.local_weight(entropy, batch.correct, local_adv, args.blend, args.gamma, args.rho)
    effective = copo.effective_advantages(local_adv, global_adv, weight, args.global_coef)
    return Signals(rewards, entropy, prompt_rewards, local_adv, global_adv, weight, effective)


def micro_batches(lengths, budget):
    """Splits rows of `lengths` tokens into lists of rows, longest first, each at most `budget` tokens when padded."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = []
    for row in order:
        # Rows come in falling length, so a part's first row sets its padded width.
        if not parts or (len(parts[-1]) + 1) * lengths[parts[-1][0]] > budget:
            parts.append([])
        parts[-1].append(row)
    return parts


def pack(prompts, replies, device):
    """Pads prompt + reply (lists of token ids) on the right: ids (b,T), prompt lengths (b,), reply lengths (b,)."""
    rows = [prompt + reply for prompt, reply in zip(prompts, replies)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    lengths = [torch.tensor([len(part) for part in parts]) for parts in (prompts, replies)]
    return ids.to(device), lengths[0].to(device), lengths[1].to(device)


def packed_parts(batch, rows, args):
    """The micro-batches of some rows of a batch, one by one: (row indices (b,), ids, prompt lengths, reply lengths)."""
    group_size, lengths = batch.correct.shape[1], batch.lengths.tolist()
    totals = [len(batch.prompts[row // group_size]) + lengths[row] for row in rows]
    for part in micro_batches(totals, args.micro_tokens):
        chosen = [rows[i] for i in part]
        prompts = [batch.prompts[row // group_size] for row in chosen]
        replies = [batch.tokens[row, : lengths[row]].tolist() for row in chosen]
        yield torch.tensor(chosen), *pack(prompts, replies, args.device)


def score_rows(model, batch, rows, args):
    """Log-probs of some rows under `model`, without gradients: (B,R) on the CPU, zero elsewhere."""
    result = torch.zeros_like(batch.logprobs)
    with torch.no_grad():
        for part, ids, prompt_lengths, lengths in packed_parts(batch, rows, args):
            logprobs, _ = model.score(ids, prompt_lengths, lengths, args.temperature)
            result[part, : logprobs.shape[1]] = logprobs.to("cpu", result.dtype)
    return result


class Totals(defaultdict):
    """name -> (sum, count) as one float64 tensor: added up over micro-batches, divided once, at the end of a step."""

    def __init__(self):
        super().__init__(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, name, total, count):
        self[name] = self[name] + torch.stack([torch.as_tensor(x).detach().double().cpu() for x in (total, count)])

    def means(self):
        return {name: float(total / count) for name, (total, count) in self.items() if count > 0}


def update(model, optimizer, batch, rows, signals, old_logprobs, ref_logprobs, args, state, totals, place):
    """One optimiser step on some rows (whole groups) of the batch. Adds its metrics to `totals`.

    old_logprobs: None for the first update, whose own log-probs they are: the weights have not moved since sampling.
    place: "first", "last", "" or both, the suffixes under which clip fractions are logged once more."""
    device, group_size = args.device, batch.correct.shape[1]
    # Denominators are counts of the whole update, known before any micro-batch runs; shares of it are then summed.
    num_tokens, num_sequences = int(batch.lengths[rows].sum()), len(rows)
    per_row = {
        "local_adv": signals.local_adv.flatten(),
        "global_adv": signals.global_adv.repeat_interleave(group_size),
        "weight": signals.weight.flatten(),
    }
    set_lr(optimizer, args.lr * min(1.0, (state.updates + 1) / max(args.warmup_updates, 1)))
    loss_sum = 0.0
    for part, ids, prompt_lengths, lengths in packed_parts(batch, rows, args):
        logprobs, entropy = model.score(ids, prompt_lengths, lengths, args.temperature)
        width = logprobs.shape[1]
        mask = torch.arange(width, device=device) < lengths[:, None]
        old = logprobs.detach() if old_logprobs is None else old_logprobs[part, :width].to(device)
        reference = None if ref_logprobs is None else ref_logprobs[part, :width].to(device)
        loss, metrics = copo.copo_loss(
            logprobs, old, mask, **{name: value[part].to(device) for name, value in per_row.items()},
            global_coef=args.global_coef, clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip,
            aggregation=args.aggregation, max_tokens=args.max_new_tokens, num_tokens=num_tokens,
            num_sequences=num_sequences, ref_logprobs=reference, kl_coef=args.kl_coef,
        )  # fmt: skip
        loss.backward()
        loss_sum += loss.detach().double()
        metrics["token_entropy"] = entropy.double().sum(), mask.sum()
        if old_logprobs is None:
            difference = torch.where(mask, logprobs.detach() - batch.logprobs[part, :width].to(logprobs), 0.0).abs()
            metrics["sampler_difference"] = difference.double().sum(), mask.sum()
            totals["sampler_difference_max"] = torch.maximum(
                totals["sampler_difference_max"], torch.tensor([difference.max().double().item(), 1.0])
            )
        for name, (total, count) in metrics.items():
            totals.add(name, total, count)
            for suffix in place if name.startswith("clip_fraction") else ():
                totals.add(f"{name}_{suffix}", total, count)
    totals.add("loss", loss_sum, 1)
    finish_update(model, optimizer, loss_sum, args, state, totals)


def finish_update(model, optimizer, loss_sum, args, state, totals):
    """Clips the gradient and steps the optimiser, or skips the update (and counts it) if anything is not finite."""
    limit = args.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    totals.add("grad_norm", norm, 1)
    totals["grad_norm_max"] = torch.maximum(totals["grad_norm_max"], torch.tensor([norm.double().item(), 1.0]))
    if math.isfinite(float(loss_sum)) and math.isfinite(float(norm)):
        optimizer.step()
        state.bad_updates = 0
    else:
        state.bad_updates += 1
        state.skipped_updates += 1
        print(f"WARNING update {state.updates}: loss {float(loss_sum):g}, gradient norm {float(norm):g}; skipped")
        if state.bad_updates >= args.max_bad_updates:
            raise SystemExit(
                f"train.py: {state.bad_updates} updates in a row were not finite; lower --lr or look at samples.txt, "
                f"then go on from the last good checkpoint: --run-dir {args.run_dir} --resume latest"
            )
    optimizer.zero_grad(set_to_none=True)
    state.updates += 1


def train_on(model, reference, optimizer, batch, signals, args, state, clock, totals):
    """All optimiser updates of one step. Groups are dealt to them by a permutation of (seed, step)."""
    group_size, count = batch.correct.shape[1], len(batch.indices)
    order = np.random.default_rng([args.seed, 2, state.step]).permutation(count)
    parts = [order[i : i + args.minibatch_prompts] for i in range(0, count, args.minibatch_prompts)]
    parts = [[int(i) * group_size + j for i in part for j in range(group_size)] for part in parts]
    # The first update needs no old log-probs but its own; the others' are taken now, before the weights move.
    with clock("logprobs"):
        later = [row for part in parts[1:] for row in part]
        old = score_rows(model, batch, later, args) if later else None
        every = [row for part in parts for row in part]
        ref_logprobs = score_rows(reference, batch, every, args) if reference is not None else None
    with clock("update"):
        for number, rows in enumerate(parts):
            place = (["first"] if number == 0 else []) + (["last"] if number == len(parts) - 1 else [])
            old_logprobs = old if number else None
            update(model, optimizer, batch, rows, signals, old_logprobs, ref_logprobs, args, state, totals, place)


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


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def warm_start(model, optimizer, problems, prompts, tokenizer, args, state, stop):
    """Supervised learning of the data's solutions (and of the end token after them), up to --sft-steps.

    The learning rate rises over the first 5 % of the steps and falls along a cosine to 5 % of its peak."""
    replies = {
        i: tokenizer(p.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for i, p in enumerate(problems)
        if p.solution
    }
    indices = sorted(replies)
    started, totals = time.perf_counter(), Totals()
    for step in tqdm(range(state.sft_step, args.sft_steps), "warm start", unit="update", leave=False, disable=None):
        pairs = draw_prompts(args.seed + 1, step * args.sft_batch, args.sft_batch, len(indices))
        chosen = [indices[i] for i, _ in pairs]
        num_tokens = sum(len(replies[i]) for i in chosen)
        rise, fall = (step + 1) / max(args.sft_steps * 0.05, 1), step / args.sft_steps
        set_lr(optimizer, args.sft_lr * min(rise, 0.05 + 0.95 * (1 + math.cos(math.pi * fall)) / 2))
        loss_sum = 0.0
        for part in micro_batches([len(prompts[i]) + len(replies[i]) for i in chosen], args.micro_tokens):
            ids, prompt_lengths, lengths = pack(
                [prompts[chosen[i]] for i in part], [replies[chosen[i]] for i in part], args.device
            )  # fmt: skip
            logprobs, _ = model.score(ids, prompt_lengths, lengths)
            loss = -logprobs.sum() / num_tokens  # score() leaves zeros beyond each reply
            loss.backward()
            loss_sum += loss.detach().double()
        totals.add("loss", loss_sum, 1)
        finish_update(model, optimizer, loss_sum, args, state, totals)
        state.sft_step = step + 1
        if state.sft_step % 50 == 0 or state.sft_step == args.sft_steps:
            seconds = time.perf_counter() - started
            loss = totals.means()["loss"]
            print(f"warm    {state.sft_step}/{args.sft_steps}  loss {loss:.3f}  {seconds:.0f} s", flush=True)
            totals = Totals()
        stop.check()
    state.updates = 0  # warm-up of the learning rate counts those of reinforcement learning


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and files of a run
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by phase since the last report: `with clock("sample"): ...`."""

    def __init__(self, device):
        self.device, self.seconds, self.started = device, Counter(), time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase):
        started = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()  # kernels run on after the call that queued them
        self.seconds[phase] += time.perf_counter() - started

    def report(self):
        """{"seconds": all, "seconds_PHASE": each} since the last report."""
        now = time.perf_counter()
        result = {"seconds": now - self.started} | {f"seconds_{name}": s for name, s in self.seconds.items()}
        self.seconds, self.started = Counter(), now
        return result


def step_metrics(batch, signals, sampled, totals, state, args, optimizer):
    """The step's line in metrics.jsonl (README explains each name); everything is over the whole step."""
    correct, lengths = batch.correct, batch.lengths.double()
    wrong = ~correct
    right, mixed = correct.all(dim=1), copo.is_mixed(correct)
    metrics = {
        "step": state.step,
        "reward": signals.rewards.mean(),
        "accuracy": correct.double().mean(),
        "all_wrong": (~correct.any(dim=1)).double().mean(),
        "all_right": right.double().mean(),
        "mixed": mixed.double().mean(),
        "consistency_entropy": signals.entropy.mean(),
        "local_weight": signals.weight.mean(),
        "zero_gradient_groups": (signals.effective.abs().amax(dim=1) < 1e-9).double().mean(),
        "wrong_pushed_up": ((signals.effective > 0) & wrong).sum() / wrong.sum().clamp(min=1),
        "length_mean": lengths.mean(),
        "length_max": lengths.max(),
        "finished": batch.finished.double().mean(),
        "no_answer": (batch.classes == -1).double().mean(),
        "verifier_timeouts": batch.timed_out.sum(),
        "lr": optimizer.param_groups[0]["lr"],
    }
    metrics = {name: value.item() if torch.is_tensor(value) else value for name, value in metrics.items()}
    counters = ("updates", "skipped_updates", "skipped_steps", "cursor", "tokens", "responses")
    return metrics | totals.means() | sampled | {name: getattr(state, name) for name in counters}


def speed_metrics(clock, tokens_sampled, tokens_trained, device):
    """Seconds by phase, tokens per second, peak memory in GiB: what a resumed run need not repeat."""
    seconds = clock.report()
    speed = {"tokens_per_second_sample": tokens_sampled / max(seconds.get("seconds_sample", 0), 1e-9)}
    if tokens_trained:
        speed["tokens_per_second_update"] = tokens_trained / max(seconds.get("seconds_update", 0), 1e-9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return seconds | speed | {"peak_memory_gib": peak / 2**30}


def group_lines(batch, signals, state):
    """The step's lines for groups.jsonl, a dict a prompt, in data order."""

    def short(values):  # six digits: enough to recompute every formula, at a third of the size
        return [float(f"{x:.6g}") for x in values.tolist()]

    shape = batch.correct.shape
    lengths, finished = batch.lengths.view(shape), batch.finished.view(shape)
    for i, index in enumerate(batch.indices):
        classes = batch.classes[i].tolist()
        yield {
            "step": state.step, "row": index, "H": short(signals.entropy[i : i + 1])[0],
            "R": short(signals.global_rewards[i : i + 1])[0], "global_adv": short(signals.global_adv[i : i + 1])[0],
            "correct": batch.correct[i].int().tolist(), "reward": short(signals.rewards[i]), "class": classes,
            "length": lengths[i].tolist(), "finished": finished[i].int().tolist(), "weight": short(signals.weight[i]),
            "local_adv": short(signals.local_adv[i]),
            "answers": {str(c): batch.answers[i][classes.index(c)] for c in sorted(set(classes))},
        }  # fmt: skip


def printable(text, width):
    """Model text as one line of at most `width` characters: nothing in it can move a cursor or break a log."""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text[: 4 * width])
    return text if len(text) <= width else text[: width - 1] + "…"


def sample_table(batch, signals, problems, state):
    """A few responses to read: of the most mixed group and of the first one that is all wrong or all right."""
    share = batch.correct.double().mean(dim=1)
    mixed = int((share - 0.5).abs().argmin())
    same = (~copo.is_mixed(batch.correct)).nonzero()[:, 0].tolist()
    lines = [f"step {state.step}"]
    for i in [mixed, *[i for i in same if i != mixed][:1]]:
        problem = problems[batch.indices[i]]
        lines.append(f"  {printable(problem.problem, 88)}   reference {printable(problem.answer, 20)}   "
                     f"H {signals.entropy[i]:.2f}  R {signals.global_rewards[i]:.2f}")  # fmt: skip
        for j in range(min(len(batch.texts[i]), 4)):
            verdict = "right" if batch.correct[i, j] else "wrong"
            lines.append(f"    {verdict}  A {signals.effective[i, j]:+.2f}  {printable(batch.texts[i][j], 90)}")
    return "\n".join(lines)


def console_line(m, steps):
    """One step for a person to read."""
    phases = " ".join(f"{name} {m[f'seconds_{name}']:.1f}" for name in ("sample", "verify", "logprobs", "update")
                      if m.get(f"seconds_{name}", 0) >= 0.05)  # fmt: skip
    return (
        f"step {m['step']:>{len(str(steps))}}/{steps}  reward {m['reward']:.3f}  wrong/mixed/right "
        f"{m['all_wrong']:3.0%}/{m['mixed']:3.0%}/{m['all_right']:3.0%}  H {m['consistency_entropy']:.2f}  "
        f"w {m['local_weight']:.2f}  loss {m.get('loss', 0):+.3f}  kl {m.get('approx_kl', 0):.4f}  "
        f"grad {m.get('grad_norm', 0):.2f}  len {m['length_mean']:.0f}  {m['seconds']:.1f} s ({phases})"
    )


def raise_alarms(metrics, state):
    """Warns, now and every tenth step while it lasts, of a run that cannot learn. Needs three such steps in a row."""
    conditions = {
        "almost every response is cut off by --max-new-tokens": metrics["finished"] < 0.05,
        "almost no response has an answer that the checker finds; look at samples.txt": metrics["no_answer"] > 0.95,
        "all rewards are equal: there is nothing to learn from": metrics["accuracy"] in (0.0, 1.0),
    }
    for message, holds in conditions.items():
        state.alarms[message] = state.alarms.get(message, 0) + 1 if holds else 0
        if state.alarms[message] % 10 == 3:
            print(f"WARNING {state.alarms[message]} steps in a row: {message}", flush=True)


def append(path, lines):
    """Adds lines to a file of the run, whole or, if the process is killed meanwhile, to be cut off on resume."""
    with open(path, "a", encoding="utf-8", errors="replace") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def cut_back(run_dir, state):
    """Cuts the run's files to what belongs to the checkpoint's steps; half-written last lines go too."""
    # Before the first step nothing of reinforcement learning belongs to the run yet.
    last = state.step if state.updates or state.step else -1
    for name in ("metrics.jsonl", "groups.jsonl", "eval.jsonl", "samples.txt"):
        path, kept, step = run_dir / name, [], -1
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if name != "samples.txt":
                try:
                    step = json.loads(line)["step"]
                except ValueError:
                    break
            elif line.startswith("step "):
                step = int(line.split()[1]) if line.split()[1:] and line.endswith("\n") else last + 1
            if step > last or not line.endswith("\n"):
                break
            kept.append(line)
        write_whole(path, "".join(kept))


def write_whole(path, text):
    """Writes a small file under another name first, so that it is never seen half-written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_checkpoint(run_dir, model, optimizer, state, args):
    """Writes checkpoints/NAME under a temporary name, renames it when it is whole, then prunes older ones."""
    # "sft-" sorts before "step-", so that the newest checkpoint is the last name.
    name = f"step-{state.step:06d}" if state.sft_step >= args.sft_steps else f"sft-{state.sft_step:06d}"
    target, temporary = run_dir / "checkpoints" / name, run_dir / "checkpoints" / f".{name}.tmp"
    if target.exists():
        return target
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=temporary, no_dist=True)
    (temporary / "state.json").write_text(json.dumps(asdict(state)) + "\n")
    os.replace(temporary, target)
    for old in list_checkpoints(run_dir)[: -args.keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(run_dir):
    """Complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    return [folder / name for name in names if (folder / name / "state.json").is_file()]


def load_checkpoint(path, model, optimizer):
    """Restores weights and optimiser in place; returns the State."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": optimizer_state}, checkpoint_id=path, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
    return State(**json.loads((Path(path) / "state.json").read_text()))


def export(model, path, dtype):
    """Writes a Hugging Face directory, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    weights = {name: full(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(temporary, dtype=DTYPES.get(dtype), state_dict=weights)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in two forms: masters that are trained, and the copy that samples
# ---------------------------------------------------------------------------------------------------------------------


def full(tensor):
    """A sharded tensor as a whole one; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model, dtype):
    """FSDP2 over all processes (here: one): float32 masters and gradient reduction, compute in `dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if not torch.distributed.is_initialized():
        backend = "nccl" if next(model.parameters()).is_cuda else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    register_fsdp_forward_method(model, "score")


def load_models(source, args, num_tokens):
    """(trained model, sampling model): the same object where both compute in the masters' type."""
    master = torch.float64 if args.dtype == "float64" else torch.float32
    model = Transformer.from_pretrained(source, dtype=master, device=args.device)
    model.num_tokens = num_tokens
    if args.dtype != "bfloat16":
        return model, model
    sampler = Transformer.from_pretrained(source, dtype=torch.bfloat16, device=args.device).requires_grad_(False)
    sampler.num_tokens = num_tokens
    shard(model, torch.bfloat16)
    return model, sampler


def sync_weights(model, sampler):
    """Copies the masters, parameter by parameter, into the copy that samples."""
    if sampler is not model:
        with torch.no_grad():
            for target, source in zip(sampler.parameters(), model.parameters()):
                target.copy_(full(source.detach()))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """SIGTERM or Ctrl-C has come, and this is a place where the run may stop."""


class Stop:
    """Remembers the first SIGTERM or Ctrl-C; the second Ctrl-C stops at once, as usual."""

    def __init__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, _frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def check(self):
        if self.signal:
            raise Interrupted

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def token_bar(label, stop):
    """A callback for the sampler: a bar in tokens, and the place where a signal ends the sampling."""
    with tqdm(desc=label, unit="tok", leave=False, disable=None) as bar:

        def watch(count):
            bar.update(count)
            stop.check()

        yield watch


def run_evaluation(model, tokenizer, held_out, verifier, stop_ids, args, state, clock, stop):
    """Evaluates the held-out problems: a line in eval.jsonl and one on the console."""
    with clock("evaluate"), token_bar("evaluation", stop) as watch:
        result = evaluate(
            model, tokenizer, held_out, verifier, k=args.eval_samples, max_new_tokens=args.max_new_tokens,
            temperature=args.eval_temperature, stop_ids=stop_ids, seed=args.eval_seed, system=args.system,
            instruction=args.instruction, max_rows=args.rollout_batch, on_tokens=watch,
        )  # fmt: skip
    means, votes = mean_at_k(result.verdicts), maj_at_k(result.verdicts, result.classes)
    equal = float(np.mean([len(set(row)) == 1 for row in result.verdicts.tolist()]))
    line = {
        "step": state.step, "k": args.eval_samples, "mean": float(np.mean(means)), "maj": float(np.mean(votes)),
        "equal_groups": equal, "length_mean": float(result.lengths.mean()), "finished": float(result.finished.mean()),
        "tokens": state.tokens, "responses": state.responses, "seconds": clock.seconds["evaluate"],
        "per_problem": [float(x) for x in means], "per_problem_maj": [float(x) for x in votes],
    }  # fmt: skip
    append(Path(args.run_dir) / "eval.jsonl", [json.dumps(line)])
    print(
        f"eval    step {state.step}: mean@{line['k']} {line['mean']:.1%}  maj@{line['k']} {line['maj']:.1%}  "
        f"equal groups {equal:.0%}  len {line['length_mean']:.0f}  ({len(held_out)} problems, {line['seconds']:.1f} s)",
        flush=True,
    )


def evaluations(run_dir):
    """Lines of eval.jsonl so far, by step."""
    path = Path(run_dir) / "eval.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["step"]: line for line in map(json.loads, lines)}


def prepare(args):
    """Everything that can be refused, before anything is written: tokenizer, data, model directory, stop ids."""
    run_dir = Path(args.run_dir)
    made = None
    source = args.model or run_dir / "init"
    if not args.model and not args.resume:
        made = tempfile.mkdtemp(prefix="copo-")  # on the disk of --run-dir only once all checks have passed
        source = Path(made) / "init"
        make_tiny_model(source, args.seed)
    try:
        directory = model_directory(source)
        tokenizer = load_tokenizer(str(directory))
        config = Config.parse(json.loads((directory / "config.json").read_text()))
        if len(tokenizer) > config.vocab_size:
            raise Refusal(f"{source}: {len(tokenizer)} tokens in the tokenizer, {config.vocab_size} in the model")
        if tokenizer.eos_token_id is None and args.sft_steps:
            raise Refusal(f"{source}: the tokenizer has no end token, which the warm start would train")
        stop_ids = stop_token_ids(directory, tokenizer, args.stop)
        problems, prompts, held_out = load_data(args, tokenizer)
        if args.sft_steps and not any(p.solution for p in problems):
            raise Refusal(f"--sft-steps {args.sft_steps}, but no problem in {args.data} has a solution to learn from")
        longest = max(map(len, prompts)) + args.max_new_tokens
        if longest > config.max_position_embeddings:
            raise Refusal(
                f"the longest prompt and --max-new-tokens make {longest} tokens; the model has "
                f"{config.max_position_embeddings} positions: lower --max-prompt-tokens or --max-new-tokens"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        if made:
            shutil.copytree(source, run_dir / "init", dirs_exist_ok=True)
            source = run_dir / "init"
    finally:
        if made:
            shutil.rmtree(made)
    return source, tokenizer, stop_ids, problems, prompts, held_out


def record_run(args, model):
    """run.json: every flag, versions, commit. On resume: says which flags differ from the run's, and notes them."""
    path, known = Path(args.run_dir) / "run.json", {}
    flags_now = dict(sorted(vars(args).items()))
    if args.resume:
        known = json.loads(path.read_text())
        changed = {
            name: [known["flags"].get(name), value]
            for name, value in flags_now.items()
            if name not in NOT_THE_RUN and known["flags"].get(name) != value
        }
        for name, (old, new) in changed.items():
            print(f"WARNING --{name.replace('_', '-')} was {old} and is now {new}: from here on this is another run")
        known.setdefault("resumed", []).append({"flags": flags_now, "changed": sorted(changed)})
        write_whole(path, json.dumps(known, indent=1) + "\n")
        return
    git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "safetensors", "numpy", "tqdm", "sympy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    about = {
        "flags": flags_now, "command": sys.argv, "commit": git.stdout.strip() or None,
        "python": platform.python_version(), "versions": versions, "host": platform.platform(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
    }  # fmt: skip
    write_whole(path, json.dumps(about, indent=1) + "\n")


def main(argv=None):
    try:
        args = parse_args(argv)
        setup = prepare(args)
    except (Refusal, ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    stop = Stop()
    try:
        train(args, *setup, stop)
    finally:
        stop.restore()


def train(args, source, tokenizer, stop_ids, problems, prompts, held_out, stop):
    """The run: warm start, then evaluate, save, and a step, in turn, until --steps. Ends the process on a signal."""
    run_dir, clock = Path(args.run_dir), Clock(args.device)
    model, sampler = load_models(source, args, num_tokens=len(tokenizer))
    optimizer, state = make_optimizer(model, args), State()
    record_run(args, model)
    if args.resume:
        found = list_checkpoints(run_dir) if args.resume == "latest" else [Path(args.resume)]
        state = load_checkpoint(found[-1], model, optimizer) if found else state
        cut_back(run_dir, state)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model   {source}: {parameters / 1e6:.1f} M parameters, {args.dtype}, {args.device}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"run     {run_dir}: {args.algo} (blend {args.blend}), P {args.prompts_per_step} × G {args.group_size}, "
          f"{args.prompts_per_step // args.minibatch_prompts} updates a step, lr {args.lr:g}, responses up to "
          f"{args.max_new_tokens} tokens, steps {state.step} to {args.steps}", flush=True)  # fmt: skip
    verifier = Verifier(args.verifier_workers, timeout=args.verifier_timeout, memory_mb=args.verifier_memory)
    try:
        if state.sft_step < args.sft_steps:
            warm_start(model, optimizer, problems, prompts, tokenizer, args, state, stop)
            optimizer = make_optimizer(model, args)
            save_checkpoint(run_dir, model, optimizer, state, args)
        reference = load_reference(model, run_dir, source, args, state) if args.kl_coef else None

        while True:
            sync_weights(model, sampler)
            if held_out and due(state.step, args.eval_every, args.steps) and state.step not in evaluations(run_dir):
                run_evaluation(sampler, tokenizer, held_out, verifier, stop_ids, args, state, clock, stop)
            with clock("save"):
                if state.step and due(state.step, args.save_every, args.steps):
                    save_checkpoint(run_dir, model, optimizer, state, args)
                if state.step and args.export_every and state.step % args.export_every == 0:
                    export(model, run_dir / f"model-{state.step:06d}", args.export_dtype)
            if state.step >= args.steps:
                break
            stop.check()

            before = State(**asdict(state))
            try:
                with token_bar(f"step {state.step + 1}", stop) as watch:
                    batch, sampled = rollout(
                        sampler, verifier, problems, prompts, tokenizer, stop_ids, args, state, clock, watch
                    )  # fmt: skip
                stop.check()
            except Interrupted:
                state = before  # the abandoned step leaves no trace
                raise
            state.step += 1
            if batch is None:
                state.skipped_steps += 1
                print(f"step {state.step}: no mixed group in {sampled['prompts_drawn']} prompts; skipped", flush=True)
                continue
            signals, totals = compute_signals(batch, args), Totals()
            train_on(model, reference, optimizer, batch, signals, args, state, clock, totals)
            log_step(batch, signals, sampled, totals, problems, optimizer, args, state, clock)

        export(model, run_dir / "model", args.export_dtype)
        summarise(args, state)
    except Interrupted:
        path = save_checkpoint(run_dir, model, optimizer, state, args)
        print(f"stopped by {stop.signal}; saved {path}. To go on: same flags, --run-dir {run_dir} --resume latest")
    finally:
        verifier.close()


def due(step, every, last):
    """Whether something done every so many steps (0: only before and after) is to be done at this one."""
    return step in (0, last) or (every > 0 and step % every == 0)


def load_reference(model, run_dir, source, args, state):
    """The frozen initial policy for the KL term; after a warm start it is exported once, for continuations."""
    path = Path(source)
    if args.sft_steps:
        path = run_dir / "reference"
        if not path.exists():
            export(model, path, "float64" if args.dtype == "float64" else "float32")
    reference = Transformer.from_pretrained(path, dtype=DTYPES[args.dtype], device=args.device).requires_grad_(False)
    reference.num_tokens = model.num_tokens
    return reference


def log_step(batch, signals, sampled, totals, problems, optimizer, args, state, clock):
    """Writes the step to metrics.jsonl, groups.jsonl, now and then samples.txt, and to the console."""
    run_dir = Path(args.run_dir)
    metrics = step_metrics(batch, signals, sampled, totals, state, args, optimizer)
    raise_alarms(metrics, state)
    append(run_dir / "groups.jsonl", [json.dumps(line) for line in group_lines(batch, signals, state)])
    metrics |= speed_metrics(clock, sampled["tokens_sampled"], int(batch.lengths.sum()), args.device)
    append(run_dir / "metrics.jsonl", [json.dumps(metrics)])
    print(console_line(metrics, args.steps), flush=True)
    if args.samples_every and (state.step == 1 or state.step % args.samples_every == 0):
        table = sample_table(batch, signals, problems, state)
        append(run_dir / "samples.txt", [table])
        print(table, flush=True)


def summarise(args, state):
    """What came of it and where everything lies."""
    found = evaluations(args.run_dir)
    if len(found) > 1:
        first, last = found[min(found)], found[max(found)]
        print(f"held-out mean@{last['k']}: {first['mean']:.1%} before, {last['mean']:.1%} after {state.step} steps")
    print(f"run     {args.run_dir}: metrics.jsonl eval.jsonl groups.jsonl samples.txt run.json checkpoints/ model/")


if __name__ == "__main__":
    main()
