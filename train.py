"""Train a language model with COPO (arXiv 2508.04138) on problems whose answers can be checked.

    python train.py                                       # demonstration: a tiny model, arithmetic
    python train.py --model DIR_OR_ID --data train.jsonl --eval-data test.jsonl --run-dir runs/mine
    python train.py --algo grpo --blend soft --gamma 20   # a preset, then single changes to it
    python train.py --run-dir runs/mine --resume latest   # continue a run, however it was stopped

The story comes first: the loop (train), a rollout (collect_rollout), the updates (update_policy,
train_minibatch, optimizer_step), the warm start. The machinery follows: evaluation, metrics, files
of a run, checkpoints, sharding, memory, data, flags. Kept simple: AdamW, one model, one learning
rate after its warm-up. Every random choice is a function of the seed and of counters, so a run that
is stopped and resumed is the same run, bit for bit on a CPU.

Shapes: P prompts of a step, G responses each, B rows (of a step P·G, row = prompt·G + response), R
response tokens, T tokens of a row. A micro-batch has N tokens without padding, of which M predict a
response token.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers.utils import cached_file

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out under PYTHONSAFEPATH
import copo
from eval import (
    TINY_MODEL,
    add_prompt_flags,
    maj_at_k,
    mean_at_k,
    number_in,
    progress_bar,
    read_problems,
)
from model import CHUNK_LOGITS, Config, Packing, Transformer, read_weights
from reward import Verifier, fingerprint, same_text
from sampler import (
    INSTRUCTION,
    Interrupted,
    all_gather,
    cache_bytes,
    cache_capacity,
    exit_with_error,
    fix_date,
    generate_rollout,
    init_distributed,
    load_model,
    on_all_ranks,
    print0,
    rank,
    replace_unprintable,
    shutdown_distributed,
    world_size,
)

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------- The loop


def train(run):
    """Warm start; then evaluate, save and take a step of reinforcement learning, until --steps."""
    args = run.args
    state = run.state
    if state.sft_step < args.sft_steps:
        warm_start(run)
    if run.algorithm.kl_coef:
        run.reference = load_reference(run)
    run.clock.report()  # the first step's seconds are its own
    while True:
        sync_weights(run)
        if is_due(state.step, args.eval_every, args.steps) and needs_evaluation(run):
            log_evaluation(run, run_evaluation(run))
        with run.clock("save"):
            if state.step > 0 and is_due(state.step, args.save_every, args.steps):
                save_checkpoint(run)
            if args.export_every and state.step > 0 and state.step % args.export_every == 0:
                export(run, f"model-{state.step:06d}")
        if state.step >= args.steps:
            break
        run.stop.raise_if_any_rank()
        rollout, rollout_metrics = collect_rollout(run)  # P groups of G graded responses
        free_sampler(run)
        rewards = rollout.rewards
        correct = rollout.correct
        if args.placebo:  # dealt to the responses at random, on every rank in the same way
            rewards, correct = copo.permute_rewards(rewards, correct, args.seed, state.step)
        advantages = copo.compute_advantages(
            rewards,
            correct,
            rollout.classes,
            rollout.lengths,
            run.algorithm,
            args.max_new_tokens,
        )
        update_metrics = {}
        if rollout_metrics["prompts_trained"] > 0:
            update_metrics = update_policy(run, rollout, advantages)
        state.count(rollout_metrics, args.group_size)
        log_step(run, rollout, correct, advantages, rollout_metrics | update_metrics)
    summarise(run)


def is_due(step, every, last):
    """True at step 0, at the last step and, unless `every` is 0, every `every` steps between."""
    return step in (0, last) or (every > 0 and step % every == 0)


# ----------------------------------------------------------------------------------------- Rollout


def collect_rollout(run):
    """Sample and grade the groups of a step -> (Rollout to train on, metrics of all drawn).

    Dynamic sampling draws P more prompts, up to --max-rounds times, until P groups are mixed, and
    trains on the first P of those. If none is mixed, prompts_trained is 0 and the Rollout is all
    that was drawn. run.state stays as it is: a signal may end the step anywhere.
    """
    args = run.args
    dynamic = run.algorithm.dynamic_sampling
    drawn = None
    with token_bar(run, f"step {run.state.step + 1}") as on_tokens:
        for rounds in range(args.max_rounds):
            cursor = run.state.cursor + rounds * args.prompts_per_step
            rollout = sample_groups(run, cursor, on_tokens)
            drawn = rollout if drawn is None else drawn.join(rollout)
            mixed = copo.is_mixed(drawn.correct)
            if not dynamic or mixed.sum() >= args.prompts_per_step:
                break
    run.stop.raise_if_any_rank()  # a step that was only sampled is abandoned
    kept = range(len(drawn.problems))
    if dynamic:
        kept = mixed.nonzero()[:, 0].tolist()[: args.prompts_per_step]
    if not kept:
        print0(f"no group has both verdicts among {len(drawn.problems)} drawn: no update")
    failed = Counter(itertools.chain.from_iterable(drawn.failed))
    metrics = {
        "sampling_rounds": rounds + 1,
        "prompts_drawn": len(drawn.problems),
        "prompts_trained": len(kept),
        "accuracy_drawn": mean(drawn.correct),
        "equal_groups_drawn": mean(~mixed),
        "tokens_sampled": int(drawn.lengths.sum()),
        "prompt_tokens": sum(map(len, drawn.prompts)),
        "verifier_timeouts": failed["time"] + failed["cpu"] + failed["memory"],
        "verifier_exceptions": failed["crash"] + failed["exception"],
    }
    return drawn.select(kept) if kept else drawn, metrics


def sample_groups(run, cursor, on_tokens):
    """G graded responses to each of the next P prompts of the data order -> Rollout."""
    args = run.args
    drawn = draw_prompts(args.seed, cursor, args.prompts_per_step, len(run.problems))
    return sample_and_grade(
        run,
        [run.problems[index] for index, _ in drawn],
        [run.prompts[index] for index, _ in drawn],
        args.group_size,
        rows=[noise_row for _, noise_row in drawn],
        seed=args.seed,
        step=run.state.step,
        temperature=args.temperature,
        on_tokens=on_tokens,
        clock=run.clock,
    )


def sample_and_grade(run, problems, prompts, group_size, **options):
    """Responses of the present policy -> Rollout; options: further ones of generate_rollout."""
    args = run.args
    return generate_rollout(
        run.sampler,
        run.tokenizer,
        run.verifier,
        problems,
        prompts,
        group_size,
        args.max_new_tokens,
        stop_ids=run.stop_ids,
        max_rows=args.rollout_batch,
        cache_tokens=args.max_prompt_tokens + args.max_new_tokens,
        **options,
    )


def draw_prompts(seed, cursor, count, size):
    """Places cursor .. cursor+count−1 of an endless order: each epoch is a permutation of the data.

    Returns (index, epoch·size + index) pairs. The second keys the noise, so that a problem that
    comes twice in a step, where two epochs meet, is not answered the same way twice.
    """
    pairs = []
    for epoch in range(cursor // size, (cursor + count - 1) // size + 1):
        order = np.random.default_rng([seed, 1, epoch]).permutation(size).tolist()
        start = epoch * size
        drawn = order[max(cursor - start, 0) : cursor + count - start]
        pairs += [(index, start + index) for index in drawn]
    return pairs


@contextlib.contextmanager
def token_bar(run, label):
    """A callback for the sampler: a progress bar in tokens; a signal ends the sampling in it."""

    def on_tokens(count):
        bar.update(count)
        run.stop.raise_if_set()

    with progress_bar(desc=label, unit="tok") as bar:
        yield on_tokens


# ----------------------------------------------------------------------------------------- Updates


def update_policy(run, rollout, advantages):
    """Make all optimiser updates of one step -> metrics over all of them.

    Old and reference log-probs are computed before the first update moves the weights.
    """
    args = run.args
    rollout = rollout._replace(logprobs=rollout.logprobs.to(args.device))
    advantages = copo.Advantages(*(value.to(args.device) for value in advantages))
    minibatches = split_into_minibatches(args, run.state.step, rollout.lengths.shape)
    # The first update takes its own log-probs for the old ones, see train_minibatch.
    later_rows = list(itertools.chain.from_iterable(minibatches[1:]))
    old_logprobs = rollout.logprobs.flatten(0, 1)
    if later_rows and args.old_logprobs == "recompute":
        old_logprobs = compute_logprobs(run, run.model, rollout, later_rows)
    ref_logprobs = None
    if run.reference is not None:
        ref_logprobs = compute_logprobs(run, run.reference, rollout, minibatches[0] + later_rows)
    step_sums = MetricSums()
    for number, rows in enumerate(minibatches):
        old = old_logprobs if number > 0 else None
        applied, sums = train_minibatch(run, rollout, rows, advantages, old, ref_logprobs)
        if applied:
            step_sums.add(sums)
            if number == 0:
                step_sums.add(clip_fractions(sums, "first"))
            if number == len(minibatches) - 1:
                step_sums.add(clip_fractions(sums, "last"))
    return step_sums.means()


def clip_fractions(sums, suffix):
    """The clip fractions of one update, to be logged once more under names of their own."""
    names = ("clip_fraction_local", "clip_fraction_global")
    return {f"{name}_{suffix}": sums[name] for name in names}


def split_into_minibatches(args, step, shape):
    """The rows of each update: whole groups, in the order of a permutation of (seed, step)."""
    num_prompts, group_size = shape
    prompts = np.random.default_rng([args.seed, 2, step]).permutation(num_prompts)
    minibatches = []
    for start in range(0, num_prompts, args.minibatch_prompts):
        chosen = prompts[start : start + args.minibatch_prompts]
        rows = chosen[:, None] * group_size + np.arange(group_size)
        minibatches.append(rows.flatten().tolist())
    return minibatches


def train_minibatch(run, rollout, rows, advantages, old_logprobs, ref_logprobs):
    """One optimiser update on `rows` of the rollout -> (True if it was applied, its MetricSums).

    old_logprobs, ref_logprobs (B,R) of all rows of the step. old_logprobs is None in the first
    update of a step: its own log-probs are the old ones, since the weights have not moved.
    """
    args = run.args
    sums = MetricSums()
    loss_sum = torch.zeros((), dtype=torch.float64, device=args.device)
    # Denominators count the whole update on all ranks, before any micro-batch runs: the shares of
    # micro-batches are then summed, never averaged.
    num_tokens = int(rollout.lengths.flatten()[rows].sum())
    num_tokens = torch.full((), num_tokens, device=args.device)
    num_sequences = torch.full((), len(rows), device=args.device)
    for batch, is_last in micro_batches(prompt_response_pairs(rollout, rows), args):
        with run.clock("forward"):
            logprobs, entropy = batch.response_logprobs(run.model, args.temperature)
            old = logprobs.detach() if old_logprobs is None else batch.rows_of(old_logprobs)
            loss, metrics = copo.copo_loss(
                logprobs,
                old,
                batch.mask,
                advantages.rows(batch.rows),
                run.algorithm,
                max_tokens=args.max_new_tokens,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                ref_logprobs=None if ref_logprobs is None else batch.rows_of(ref_logprobs),
            )
        with run.clock("backward"):
            backward(run, loss, is_last)
        loss_sum += loss.detach()
        metrics["token_entropy"] = copo.sum_and_count(entropy, batch.mask)
        if old_logprobs is None or args.old_logprobs == "recompute":
            # Sampler and model agree up to rounding; more is a bug.
            sampled = batch.rows_of(rollout.logprobs.flatten(0, 1))
            distance = torch.where(batch.mask, old - sampled, 0.0).abs()
            metrics["sampler_difference"] = copo.sum_and_count(distance, batch.mask)
            metrics["sampler_difference_max"] = (distance.max(), batch.mask.any())
        sums.add(metrics)
    lr = args.lr * min(1.0, (run.state.updates + 1) / max(args.warmup_updates, 1))
    with run.clock("optimizer"):
        applied = optimizer_step(run, loss_sum, lr, sums)
    return applied, sums


def backward(run, loss, is_last):
    """Add the gradient of a micro-batch; is_last: of its update.

    Ranks exchange gradients in every backward pass, or in the last one if --defer-gradient-sync.
    """
    if run.args.defer_gradient_sync and is_sharded(run.args):
        run.model.set_requires_gradient_sync(is_last)
    # FSDP averages gradients over ranks; the loss is the sum of the ranks' shares.
    (loss * world_size()).backward()


MAX_BAD_UPDATES = 5  # non-finite updates in a row before the run ends


def optimizer_step(run, loss, lr, sums):
    """Clip the gradient and step AdamW -> True; False if loss or gradient is not finite.

    Such an update is skipped and counted. loss is this rank's share; sums gets the whole loss.
    """
    args = run.args
    state = run.state
    if world_size() > 1:
        dist.all_reduce(loss)
    max_norm = args.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
    norm = full_tensor(norm).to(loss)
    # The one place of an update where the host waits for the device.
    values = torch.stack([loss, norm]).tolist()
    applied = all(map(math.isfinite, values))
    state.updates += 1
    if applied:
        # Set at every update: a checkpoint restores them, and flags may have changed since.
        for group, weight_decay in zip(run.optimizer.param_groups, (args.weight_decay, 0.0)):
            group.update(lr=lr, betas=(args.beta1, args.beta2), weight_decay=weight_decay)
        run.optimizer.step()
        one = torch.ones_like(loss)
        sums.add({"loss": (loss, one), "grad_norm": (norm, one), "grad_norm_max": (norm, one)})
        state.bad_updates = 0
    else:
        state.skipped_updates += 1
        state.bad_updates += 1
        loss, norm = values
        print0(f"WARNING update {state.updates}: loss {loss:g}, gradient norm {norm:g}; skipped")
    run.optimizer.zero_grad(set_to_none=True)
    if state.bad_updates >= MAX_BAD_UPDATES:
        raise ValueError(
            f"{state.bad_updates} updates in a row were not finite: lower --lr, or look at "
            "samples.txt"
        )
    return applied


def make_optimizer(model, args):
    """AdamW, with weight decay on matrices only. Its state exists at once, for checkpoints."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def compute_logprobs(run, model, rollout, rows):
    """Log-probs of `rows` of the rollout under `model`, without gradients: (B,R), elsewhere 0."""
    result = torch.zeros_like(rollout.logprobs.flatten(0, 1))
    pairs = prompt_response_pairs(rollout, rows)
    with torch.no_grad(), run.clock("logprobs"):
        for batch, _ in micro_batches(pairs, run.args):
            logprobs, _ = batch.response_logprobs(model, run.args.temperature)
            # Added, not assigned: a micro-batch without a response names row 0, and gives it zeros.
            result[batch.rows, : logprobs.shape[1]] += logprobs.to(result.dtype)
        if world_size() > 1:
            dist.all_reduce(result)  # one rank has computed each row, the others hold zeros
    if hasattr(model, "reshard"):
        model.reshard()  # FSDP keeps the embeddings whole for a backward pass that does not come
    return result


# -------------------------------------------------------------------------------------- Warm start


def warm_start(run):
    """Supervised learning of the data's solutions and of the end token after them: --sft-steps."""
    args = run.args
    state = run.state
    sums = MetricSums()
    for step in progress_bar(range(state.sft_step, args.sft_steps), "warm start", unit="update"):
        # Here and not at the end: the checkpoint of the last step has the next phase's optimiser.
        run.stop.raise_if_any_rank()
        size = len(run.demonstrations)
        drawn = draw_prompts(args.seed + 1, step * args.sft_batch, args.sft_batch, size)
        pairs = {number: run.demonstrations[i] for number, (i, _) in enumerate(drawn)}
        sft_minibatch(run, pairs, sums)
        state.sft_step += 1
        if state.sft_step % 50 == 0 or state.sft_step == args.sft_steps:
            loss = sums.means().get("loss", math.nan)
            print0(f"warm    {state.sft_step}/{args.sft_steps}  loss {loss:.3f}")
            sums = MetricSums()
    # From here on counters, and the warm-up of the learning rate, are reinforcement learning's.
    state.updates = 0
    state.skipped_updates = 0
    state.bad_updates = 0
    run.optimizer = make_optimizer(run.model, args)
    save_checkpoint(run)


def sft_minibatch(run, pairs, sums):
    """One update on the mean cross-entropy of the solutions' tokens.

    The learning rate rises over the first 5 % of the steps, then falls on a cosine to 5 %.
    """
    args = run.args
    num_tokens = sum(len(solution) for _, solution in pairs.values())
    loss_sum = torch.zeros((), dtype=torch.float64, device=args.device)
    for batch, is_last in micro_batches(pairs, args):
        logprobs, _ = batch.response_logprobs(run.model)
        loss = -logprobs.sum() / num_tokens
        backward(run, loss, is_last)
        loss_sum += loss.detach()
    step = run.state.sft_step
    rise = (step + 1) / max(args.sft_steps * 0.05, 1)
    cosine = (1 + math.cos(math.pi * step / args.sft_steps)) / 2
    optimizer_step(run, loss_sum, args.sft_lr * min(rise, 0.05 + 0.95 * cosine), sums)


# ----------------------------------------------------------------------------------- Micro-batches


class MicroBatch(NamedTuple):
    """Some rows as Transformer.packed_logprobs takes them: their N tokens in one line, no padding.

    A prompt that several rows share is there once. A response's last token is not there: it
    predicts nothing. All are tensors on the device.
    """

    ids: torch.Tensor  # (N,)
    positions: torch.Tensor  # (N,)
    packing: Packing  # the padded rows that attention sees
    predictors: torch.Tensor  # (M,) those of the N tokens that predict a response token
    targets: torch.Tensor  # (M,) the token ids that they predict
    places: torch.Tensor  # (M,) at which of the B·R places these stand
    mask: torch.Tensor  # (B,R) True on response tokens
    rows: torch.Tensor  # (B,) which rows of the rollout these are

    def response_logprobs(self, model, temperature=1.0):
        """Log-probs and entropy (nats) of the response tokens: both (B,R), 0 beyond each row."""
        logprobs, entropy = model.packed_logprobs(
            self.ids,
            self.positions,
            self.packing,
            self.predictors,
            self.targets,
            temperature,
        )
        return self.pad(logprobs), self.pad(entropy)

    def pad(self, values):
        """(M,) -> (B,R)"""
        empty = values.new_zeros(self.mask.numel())
        return empty.index_copy(0, self.places, values).view_as(self.mask)

    def rows_of(self, logprobs):
        """These rows of a step's log-probs (P·G,R), cut to their longest -> (B,R)."""
        return logprobs[self.rows, : self.mask.shape[1]]


def collate(chunks, pairs, device):
    """Chunks of pairs {row: (prompt, response)} -> MicroBatch."""
    if not chunks:  # an empty micro-batch: one token that predicts nothing
        chunks = [Chunk([0], 1)]
        pairs = {0: ([0], [])}
    tokens = []  # (id, position in its row) of each of the N
    padded = []  # of each row, which of them it holds
    predictions = []  # (which of them predicts, token id that it predicts)
    rows = []
    lengths = []

    def run_tokens(ids, position):
        """Append tokens of the row to come; returns which of the N they are."""
        first = len(tokens)
        tokens.extend((token_id, position + i) for i, token_id in enumerate(ids))
        return list(range(first, len(tokens)))

    for chunk in chunks:
        prompt, _ = pairs[chunk.rows[0]]
        shared = run_tokens(prompt, 0)
        for row in chunk.rows:
            _, response = pairs[row]
            row_tokens = shared + run_tokens(response[:-1], len(prompt))
            predictions += zip(row_tokens[len(prompt) - 1 :], response)
            padded.append(torch.tensor(row_tokens))
            rows.append(row)
            lengths.append(len(response))
    ids, positions = torch.tensor(tokens).T.contiguous()
    predictors, targets = torch.tensor(predictions, dtype=torch.long).view(-1, 2).T.contiguous()
    mask = torch.arange(max(lengths) or 1) < torch.tensor(lengths)[:, None]
    batch = MicroBatch(
        ids=ids,
        positions=positions,
        packing=pack_rows(padded),
        predictors=predictors,
        targets=targets,
        places=mask.flatten().nonzero()[:, 0],
        mask=mask,
        rows=torch.tensor(rows),
    )
    return to_device(batch, device)


def pack_rows(rows):
    """rows: of each row, which of the tokens 0…N−1 it holds -> their Packing."""
    index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    order = index.flatten().argsort(stable=True)
    sum_index = order[(index < 0).sum() :]
    counts = torch.cat(rows).bincount()  # of each token, the places it has
    sum_starts = counts.cumsum(0) - counts
    return Packing(index.clamp(min=0), sum_index[sum_starts], sum_index, sum_starts)


def to_device(value, device):
    """A tensor, or a named tuple of tensors and of such tuples, on the device."""
    if not isinstance(value, torch.Tensor):
        return type(value)(*(to_device(part, device) for part in value))
    if device == "cuda":
        value = value.pin_memory()  # a copy from there does not make the host wait
    return value.to(device, non_blocking=True)


def prompt_response_pairs(rollout, rows):
    """{row: (prompt, response)}, both lists of token ids."""
    group_size = rollout.lengths.shape[1]
    pairs = {}
    for row in rows:
        prompt, number = divmod(row, group_size)
        length = rollout.lengths[prompt, number]
        response = rollout.tokens[prompt, number, :length].tolist()
        pairs[row] = (rollout.prompts[prompt], response)
    return pairs


def micro_batches(pairs, args):
    """This rank's MicroBatches of {row: (prompt, response)}, the same on every rank, each with True
    if it is the last.

    Every FSDP forward and backward is a collective, so all ranks need the same number of
    micro-batches: a rank that has fewer runs empty ones.
    """
    chunks = chunks_by_prompt(pairs, args.micro_tokens, world_size())
    parts = []
    for share in balance_over_ranks(chunks, world_size()):
        parts.append(split_by_token_budget(share, args.micro_tokens))
    mine = parts[rank()]
    count = max(map(len, parts))
    for number in range(count):
        chunks = mine[number] if number < len(mine) else []
        yield collate(chunks, pairs, args.device), number == count - 1


@dataclass
class Chunk:
    """Rows of one prompt that run together, and their tokens, the prompt counted once."""

    rows: list
    tokens: int


def chunks_by_prompt(pairs, micro_tokens, ranks):
    """Cut the rows of each prompt into Chunks that fit a micro-batch, some for every rank."""
    by_prompt = {}
    for row, (prompt, _) in pairs.items():
        by_prompt.setdefault(tuple(prompt), []).append(row)
    max_rows = len(pairs)
    if ranks > 1:
        max_rows = max(1, len(pairs) // (4 * ranks))  # four chunks a rank can be dealt evenly
    chunks = []
    for prompt, rows in by_prompt.items():
        chunk = None
        for row in sorted(rows, key=lambda row: -len(pairs[row][1])):
            length = len(pairs[row][1])
            full = chunk is None or len(chunk.rows) == max_rows
            if full or chunk.tokens + length > micro_tokens:
                chunk = Chunk([], len(prompt))
                chunks.append(chunk)
            chunk.rows.append(row)
            chunk.tokens += length
    return chunks


def longest_first(chunks):
    return sorted(chunks, key=lambda chunk: -chunk.tokens)


def balance_over_ranks(chunks, ranks):
    """Deal chunks to ranks, longest first, each to the rank with the fewest tokens.

    At 16 chunks a rank of lognormal lengths (σ 0.8) on 8 ranks, at most 5 % above the mean; see
    tests/test_train_ranks.py.
    """
    shares = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for chunk in longest_first(chunks):
        lightest = loads.index(min(loads))
        shares[lightest].append(chunk)
        loads[lightest] += chunk.tokens
    return shares


def split_by_token_budget(chunks, budget):
    """Lists of chunks, longest first, that hold at most `budget` tokens or a single chunk."""
    parts = []
    tokens = 0
    for chunk in longest_first(chunks):
        if not parts or tokens + chunk.tokens > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(chunk)
        tokens += chunk.tokens
    return parts


# -------------------------------------------------------------------------------------- Evaluation

EVAL_SEED = 0  # of an evaluation's noise, which is the same at every step and in every run


def needs_evaluation(run):
    """False without held-out problems, and where a resumed run has evaluated this step before."""
    return bool(run.held_out) and run.state.step not in dict(run.state.evaluations)


def run_evaluation(run):
    """Sample and grade --eval-samples responses to each held-out problem -> Rollout."""
    args = run.args
    with run.clock("evaluate"), token_bar(run, "evaluation") as on_tokens:
        return sample_and_grade(
            run,
            run.held_out,
            run.held_out_prompts,
            args.eval_samples,
            seed=EVAL_SEED,
            temperature=args.eval_temperature,
            on_tokens=on_tokens,
        )


def log_evaluation(run, rollout):
    """Write a line to eval.jsonl and to the console."""
    state = run.state
    means = mean_at_k(rollout.correct)
    votes = maj_at_k(rollout.correct, rollout.classes)
    line = {
        "step": state.step,
        "k": run.args.eval_samples,
        "mean": float(means.mean()),
        "maj": float(votes.mean()),
        "equal_groups": mean(~copo.is_mixed(rollout.correct)),
        "length_mean": mean(rollout.lengths),
        "finished": mean(rollout.finished),
        "no_answer": mean(rollout.classes == -1),
        "tokens": state.tokens,
        "responses": state.responses,
        "seconds": run.clock.seconds()["evaluate"],
        "per_problem": means.tolist(),
        "per_problem_maj": votes.tolist(),
    }
    append(run.directory / "eval.jsonl", [json.dumps(line)])
    state.evaluations.append([state.step, line["mean"]])
    print0(
        "eval    step {step}: mean@{k} {mean:.1%}  maj@{k} {maj:.1%}  equal groups "
        "{equal_groups:.0%}  len {length_mean:.0f}  ({seconds:.1f} s)".format(**line)
    )


# -------------------------------------------------------------------------- What all phases share


@dataclass
class State:
    """Where the run is: what a checkpoint holds besides weights and optimiser.

    Counts are since the run's beginning.
    """

    step: int = 0  # finished steps of reinforcement learning
    sft_step: int = 0  # finished steps of the warm start
    cursor: int = 0  # prompts drawn
    updates: int = 0
    skipped_updates: int = 0
    bad_updates: int = 0  # non-finite ones in a row
    skipped_steps: int = 0  # dynamic sampling found no mixed group
    tokens: int = 0  # sampled
    responses: int = 0
    evaluations: list = field(default_factory=list)  # [step, mean@k] of each
    alarms: dict = field(default_factory=dict)  # condition -> steps in a row that it has held
    files: dict = field(default_factory=dict)  # bytes of each of RUN_FILES at this checkpoint

    def count(self, rollout_metrics, group_size):
        """A step is finished."""
        self.step += 1
        self.cursor += rollout_metrics["prompts_drawn"]
        self.tokens += rollout_metrics["tokens_sampled"]
        self.responses += rollout_metrics["prompts_drawn"] * group_size
        if rollout_metrics["prompts_trained"] == 0:
            self.skipped_steps += 1


@dataclass
class Run:
    """Flags, data, the model in its forms, and where the run is."""

    args: argparse.Namespace
    algorithm: copo.Algorithm
    directory: Path
    model: Transformer  # the weights that are trained
    tokenizer: object
    stop_ids: list
    problems: list
    prompts: list  # token ids of each problem
    held_out: list
    held_out_prompts: list
    verifier: Verifier
    clock: "Clock"
    demonstrations: list = None  # (prompt, solution) of the warm start, token ids
    sampler: Transformer = None  # the weights that sample: run.model, or a copy in the compute type
    reference: Transformer = None  # the frozen initial policy, if there is a KL term
    optimizer: torch.optim.Optimizer = None
    stop: "StopSignal" = None
    run_info: dict = None  # run.json, on rank 0
    lock: object = None  # the file that keeps other runs out of the directory
    tracker: subprocess.Popen = None  # study/track.py, on rank 0 with --track
    state: State = field(default_factory=State)


class MetricSums(dict):
    """Metrics in the making: name -> float64 (2,), the sum and the count so far, on the device.

    Of a name that ends in _max, the largest value instead.
    """

    def add(self, metrics):
        """metrics: {name: (sum, count)}, tensors. Another MetricSums will do."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.double(), count.double()]).detach()
            join = torch.maximum if name.endswith("_max") else torch.add
            self[name] = join(pair, self.get(name, torch.zeros_like(pair)))

    def means(self):
        """{name: mean over all ranks}. All ranks call it; the host waits for the device once."""
        pairs = torch.stack(list(self.values())).cpu() if self else []
        everyone = MetricSums()
        for sums in all_gather(dict(zip(self, pairs))):
            everyone.add(sums)
        return {
            name: float(total / count) for name, (total, count) in everyone.items() if count > 0
        }


class Clock:
    """Seconds by phase since the last report: `with clock("verify"): ...`.

    A phase within another counts as its own. On a GPU, events in its queue take the times: no phase
    waits for the device.
    """

    def __init__(self, device):
        self.device = device
        self.phases = ["other"]  # those that are open, the innermost last
        self.marks = []  # (moment, the phase from then on)
        self.mark()

    @contextlib.contextmanager
    def __call__(self, phase):
        self.phases.append(phase)
        self.mark()
        try:
            yield
        finally:
            self.phases.pop()
            self.mark()

    def mark(self):
        moment = time.perf_counter()
        if self.device == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((moment, self.phases[-1]))

    def seconds(self):
        """Counter of the seconds of each phase."""
        seconds = Counter()
        for (start, phase), (end, _) in itertools.pairwise(self.marks):
            if self.device == "cuda":
                end.synchronize()
                seconds[phase] += start.elapsed_time(end) / 1000
            else:
                seconds[phase] += end - start
        return seconds

    def report(self):
        """{"seconds": all, "seconds_PHASE": each, "seconds_other": the rest}, and start anew."""
        self.mark()
        seconds = self.seconds()
        self.marks = self.marks[-1:]
        report = {f"seconds_{phase}": value for phase, value in seconds.items()}
        return {"seconds": seconds.total()} | report


class StopSignal:
    """Remembers the first SIGTERM, SIGHUP or Ctrl-C, for the next place where the run can stop.

    A second Ctrl-C stops at once, as usual.
    """

    def __init__(self):
        self.name = None
        self.previous = {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self.previous[number] = signal.signal(number, self.handle)

    def handle(self, number, _frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        message = f"\n{self.name}: stopping at the next safe place; Ctrl-C (again) stops at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, message.encode())  # not print(): the signal may have come within one

    def raise_if_set(self):
        """Within a phase: raise Interrupted here; other ranks learn of it when the phase ends."""
        if self.name:
            raise Interrupted(self.name)

    def raise_if_any_rank(self):
        """Between phases: if any rank got a signal, all ranks raise Interrupted together."""
        on_all_ranks(self.raise_if_set)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------- Metrics, files of a run

RUN_FILES = ("metrics.jsonl", "groups.jsonl", "eval.jsonl", "samples.txt")
SAMPLES_EVERY = 10  # steps between entries in samples.txt


def log_step(run, rollout, correct, advantages, metrics):
    """Write the step to metrics.jsonl, groups.jsonl, now and then samples.txt, and the console.

    correct (P,G): the verdicts that trained, those of the rollout unless --placebo dealt others.
    """
    step = run.state.step
    metrics = step_metrics(run, rollout, correct, advantages) | metrics
    if "local_share" in metrics:
        metrics["global_share"] = 1 - metrics["local_share"]
    warn_if_stuck(metrics, run.state)
    groups = [json.dumps(line) for line in group_lines(run, rollout, correct, advantages)]
    append(run.directory / "groups.jsonl", groups)
    metrics |= speed_metrics(run.clock, metrics, int(rollout.lengths.sum()))
    append(run.directory / "metrics.jsonl", [json.dumps(metrics)])
    print0(console_line(metrics, run.args.steps))
    if step == 1 or step % SAMPLES_EVERY == 0:
        table = sample_table(step, rollout, advantages)
        append(run.directory / "samples.txt", [table])
        print0(table)


def step_metrics(run, rollout, correct, advantages):
    """What the groups of a step say, over all of them; docs/metrics.md explains each name."""
    effective = advantages.effective
    metrics = {
        "step": run.state.step,
        "loss": None,  # stays None if there was no update
        "grad_norm": None,
        "reward": mean(advantages.rewards),
        "accuracy": mean(rollout.correct),
        "consistency_entropy": mean(advantages.entropy),
        "local_weight": mean(advantages.weight),
        "length_mean": mean(rollout.lengths),
        "length_max": float(rollout.lengths.max()),
        "all_wrong": mean(~correct.any(dim=1)),
        "all_right": mean(correct.all(dim=1)),
        "mixed": mean(copo.is_mixed(correct)),
        "zero_gradient_groups": mean(effective.abs().amax(dim=1) < 1e-9),
        "finished": mean(rollout.finished),
        "no_answer": mean(rollout.classes == -1),
        "wrong_pushed_up": share_of(effective > 0, ~correct),
        "right_pushed_down": share_of(effective < 0, correct),
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    for name in ("updates", "skipped_updates", "skipped_steps", "cursor", "tokens", "responses"):
        metrics[name] = getattr(run.state, name)
    return metrics


def mean(values):
    return values.double().mean().item()


def share_of(holds, responses):
    """Share of these responses for which something holds; 0 if there are none."""
    return ((holds & responses).sum() / responses.sum().clamp(min=1)).item()


def speed_metrics(clock, metrics, tokens_trained):
    """Seconds by phase, tokens per second and peak memory: what a resumed run need not repeat."""
    speed = clock.report()
    tokens = {
        "prefill": metrics["prompt_tokens"],
        "decode": metrics["tokens_sampled"],
        "verify": metrics["tokens_sampled"],
        "forward": tokens_trained,
        "backward": tokens_trained,
    }
    for phase, count in tokens.items():
        seconds = speed.get(f"seconds_{phase}")
        if seconds:
            speed[f"tokens_per_second_{phase}"] = count / seconds
    speed["peak_memory_gib"] = max(all_gather(peak_memory(clock.device))) / 2**30
    return speed


def peak_memory(device):
    """Bytes: allocated on the GPU, or the process's largest resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, which reward.py refuses by name

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def group_lines(run, rollout, correct, advantages):
    """The step's lines for groups.jsonl: a dict a prompt, in data order."""
    # Six digits are enough to recompute every formula, at a third of the size.
    rounded = copo.Advantages(*(x.mul(1e6).round().div(1e6).tolist() for x in advantages))
    for i, problem in enumerate(rollout.problems):
        classes = rollout.classes[i].tolist()
        firsts = {label: classes.index(label) for label in sorted(set(classes))}
        line = {
            "step": run.state.step,
            "row": problem.row,
            "H": rounded.entropy[i],
            "R": rounded.global_rewards[i],
            "global_adv": rounded.global_adv[i],
            "correct": correct[i].int().tolist(),
            "reward": rounded.rewards[i],
            "class": classes,
            "length": rollout.lengths[i].tolist(),
            "finished": rollout.finished[i].int().tolist(),
            "weight": rounded.weight[i],
            "local_adv": rounded.local_adv[i],
            "answers": {str(label): rollout.answers[i][j] for label, j in firsts.items()},
        }
        if run.args.placebo:
            line["verdict"] = rollout.correct[i].int().tolist()  # the truth
        yield line


def one_line(text, width):
    """Model text in at most `width` characters that cannot move a cursor or break a log."""
    text = text[: 4 * width].replace("\n", "⏎")
    text = "".join(c if c.isprintable() else "·" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def sample_table(step, rollout, advantages):
    """A few responses to read, of the most mixed group and of one with equal verdicts."""
    mixed = int((rollout.correct.double().mean(dim=1) - 0.5).abs().argmin())
    equal = (~copo.is_mixed(rollout.correct)).nonzero()[:, 0].tolist()
    lines = [f"step {step}"]
    for i in list(dict.fromkeys([mixed, *equal]))[:2]:
        problem = rollout.problems[i]
        lines.append(
            f"  {one_line(problem.problem, 88)}   reference {one_line(problem.answer, 20)}   "
            f"H {advantages.entropy[i]:.2f}  R {advantages.global_rewards[i]:.2f}"
        )
        for j, text in enumerate(rollout.texts[i][:4]):
            verdict = "right" if rollout.correct[i, j] else "wrong"
            lines.append(
                f"    {verdict}  A {advantages.effective[i, j]:+.2f}  {one_line(text, 90)}"
            )
    return "\n".join(lines)


def console_line(metrics, steps):
    """One step for a person to read."""
    phases = []
    for name, seconds in metrics.items():
        if name.startswith("seconds_") and seconds >= 0.05:
            phases.append(f"{name.removeprefix('seconds_')} {seconds:.1f}")
    nothing = {"loss": 0, "grad_norm": 0, "approx_kl": 0}  # of a step without an update
    numbers = nothing | {name: value for name, value in metrics.items() if value is not None}
    return (
        "step {step:>3}/{steps}  reward {reward:.3f}  wrong/mixed/right {all_wrong:3.0%}/"
        "{mixed:3.0%}/{all_right:3.0%}  H {consistency_entropy:.2f}  w {local_weight:.2f}  "
        "loss {loss:+.3f}  approx_kl {approx_kl:.4f}  grad {grad_norm:.2f}  len {length_mean:.0f}  "
        "{seconds:.1f} s ({phases})"
    ).format(**numbers, steps=steps, phases=" ".join(phases))


def warn_if_stuck(metrics, state):
    """Warn of a run that cannot learn: at the third such step in a row, then at every tenth."""
    equal_rewards = metrics["zero_gradient_groups"] == 1 or metrics["prompts_trained"] == 0
    conditions = {
        "almost every response is cut off by --max-new-tokens": metrics["finished"] < 0.05,
        "almost no response has an answer; look at samples.txt": metrics["no_answer"] > 0.95,
        "no response has an advantage, since rewards are equal: nothing to learn": equal_rewards,
    }
    for message, holds in conditions.items():
        steps = state.alarms.get(message, 0) + 1 if holds else 0
        state.alarms[message] = steps
        if steps % 10 == 3:
            print0(f"WARNING {steps} steps in a row: {message}")


def append(path, lines):
    """Add lines to a file of the run. What a killed process writes by half, a resume cuts off."""
    if rank() != 0:
        return
    with open(path, "a", encoding="utf-8", errors="replace") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def summarise(run):
    """Export the model, and say what came of the run and where everything is."""
    export(run, "model")
    if run.args.plot and rank() == 0:
        subprocess.run([sys.executable, HERE / "study/plot.py", run.directory], check=False)
    evaluations = run.state.evaluations
    if len(evaluations) > 1:
        _, before = evaluations[0]
        last_step, after = evaluations[-1]
        best_step, best = max(evaluations, key=lambda evaluation: evaluation[1])
        print0(
            f"held-out mean@{run.args.eval_samples}: {before:.1%} before, {after:.1%} after "
            f"{last_step} steps; the best of all evaluations, {best:.1%}, was at step {best_step}"
        )
    print0(f"run     {run.directory}: {' '.join(RUN_FILES)} run.json checkpoints/ model/")


# -------------------------------------------------------------------------- Checkpoints and exports


def checkpoint_name(run):
    """ "sft-" sorts before "step-", so that the newest checkpoint has the last name."""
    warming = run.state.sft_step < run.args.sft_steps
    return f"sft-{run.state.sft_step:06d}" if warming else f"step-{run.state.step:06d}"


def save_checkpoint(run):
    """Write checkpoints/NAME, whole or not at all, and delete the oldest beyond --keep -> path."""
    target = run.directory / "checkpoints" / checkpoint_name(run)
    if all_gather(target.exists())[0]:  # what rank 0 sees counts: file systems may lag behind
        return target
    files = [path for path in run.directory.iterdir() if path.name in RUN_FILES]
    run.state.files = {path.name: path.stat().st_size for path in files}
    with (
        atomic_directory(target) as temporary,
        one_line_errors(f"cannot write the checkpoint {target}"),
    ):
        weights, optimizer = get_state_dict(run.model, run.optimizer)
        contents = {"model": weights, "optimizer": optimizer}
        dcp.save(contents, checkpoint_id=temporary, no_dist=world_size() == 1)
        if rank() == 0:
            state = json.dumps(dataclasses.asdict(run.state))
            (temporary / "state.json").write_text(state + "\n")
    if rank() == 0:
        for old in list_checkpoints(run.directory)[: -run.args.keep]:
            delete_directory(old)
    return target


def list_checkpoints(directory):
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (directory / "checkpoints").glob("s*/state.json"))


def load_checkpoint(run):
    """Restore the checkpoint that --resume names, if there is one, and undo what came after it."""
    checkpoints = list_checkpoints(run.directory)
    if run.args.resume != "latest":
        checkpoints = [Path(run.args.resume).resolve()]
    checkpoints = all_gather(checkpoints)[0]
    if checkpoints:
        newest = checkpoints[-1]
        with one_line_errors(
            f"cannot read the checkpoint {newest}, go on from another one with --resume DIR"
        ):
            weights, optimizer = get_state_dict(run.model, run.optimizer)
            contents = {"model": weights, "optimizer": optimizer}
            dcp.load(contents, checkpoint_id=newest, no_dist=world_size() == 1)
            set_state_dict(
                run.model, run.optimizer, model_state_dict=weights, optim_state_dict=optimizer
            )
            run.state = State(**json.loads((newest / "state.json").read_text()))
    all_gather(None)  # every rank has read before rank 0 removes anything
    if rank() == 0:
        cut_back_files(run)


def cut_back_files(run):
    """Remove what the run wrote after the checkpoint, and what a killed process left behind."""
    for leftover in [*run.directory.rglob(".*.tmp"), *run.directory.rglob(".*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)  # one may have lain in another
    for name in RUN_FILES:
        path = run.directory / name
        if path.exists():
            os.truncate(path, min(run.state.files.get(name, 0), path.stat().st_size))
    # step-000003 and model-000003, its export
    for saved in [*list_checkpoints(run.directory), *run.directory.glob("model-*")]:
        if saved.name.replace("model", "step") > checkpoint_name(run):
            delete_directory(saved)


@contextlib.contextmanager
def atomic_directory(target):
    """A temporary directory that becomes `target` once all of it is written."""
    temporary = target.with_name(f".{target.name}.tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    all_gather(None)
    try:
        yield temporary
    except BaseException:  # a full disk has better uses for the space
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    all_gather(None)
    if rank() == 0:
        if target.exists():
            delete_directory(target)
        os.replace(temporary, target)
    all_gather(None)


@contextlib.contextmanager
def one_line_errors(what):
    """Whatever torch makes of a full disk or a damaged file becomes an OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise OSError(f"{what}: {str(reason) or repr(reason)}") from error
    except Exception as error:  # of many kinds
        raise OSError(f"{what}: {error}") from error


def delete_directory(directory):
    """Rename it first, so that nobody takes what is left of it for a whole one."""
    hidden = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(directory, hidden)
    shutil.rmtree(hidden)


def export(run, name, dtype=None):
    """Write the weights as a Hugging Face directory of the run, one whole tensor at a time.

    dtype: --export-dtype's unless given.
    """
    with atomic_directory(run.directory / name) as temporary:
        weights = ((key, full_tensor(tensor)) for key, tensor in run.model.state_dict().items())
        if rank() == 0:
            run.model.save_pretrained(
                temporary, DTYPES.get(dtype or run.args.export_dtype), weights
            )
        # full_tensor is a collective: the other ranks take part in each, rank 0 has had them all.
        deque(weights, maxlen=0)


# ----------------------- Weights in two forms: masters that are trained, and the copy that samples


def is_sharded(args, ranks=None):
    """True if FSDP keeps masters apart from the weights that sample (it casts on one rank too)."""
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 1))
    return ranks > 1 or args.dtype == "bfloat16" or args.cpu_offload


def load_weights(run):
    """Load the model that is trained and the one that samples: one and the same, unless sharded."""
    args = run.args
    run.sampler = load_copy(run, run.model.source)
    if is_sharded(args):
        shard(run.model, args)
    else:
        run.model = run.sampler.requires_grad_(True)
    for block in run.model.model.layers:
        block.activation_checkpointing = args.activation_checkpointing
        if args.compile:
            block.compiled = torch.compile(block.compute, backend=args.compile, dynamic=True)


def load_copy(run, path, sharded=False):
    """The weights of a directory in the compute type: all, or this rank's shard of them."""
    args = run.args
    device = "meta" if sharded else args.device
    copy = Transformer.from_pretrained(path, DTYPES[args.dtype], device, args.seed)
    copy.requires_grad_(False)
    copy.usable_vocab = run.model.usable_vocab
    if sharded:
        shard(copy, args)
    return copy


def shard(model, args):
    """Split a model without weights over all ranks (FSDP2), block by block, and load its weights.

    It computes in --dtype; masters and gradient reduction are float32, or float64.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Named, since FSDP would otherwise take the best device that this PyTorch was built for.
    mesh = init_device_mesh(args.device, (world_size(),))
    master_dtype = next(model.parameters()).dtype
    precision = fsdp.MixedPrecisionPolicy(DTYPES[args.dtype], reduce_dtype=master_dtype)
    offload = fsdp.OffloadPolicy()
    if args.cpu_offload:
        offload = fsdp.CPUOffloadPolicy(pin_memory=args.device == "cuda")
    for part in [*model.model.layers, model]:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fsdp.register_fsdp_forward_method(model, "packed_logprobs")
    model.to_empty(device="cpu" if args.cpu_offload else args.device)
    weights = read_weights(model.source, args.seed)  # pages of files: only one tensor is in memory
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = weights[name].to(parameter.dtype)
            sharded = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(sharded)


def full_tensor(tensor):
    """A sharded tensor as a whole one (a collective); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sync_weights(run):
    """Give the copy that samples the masters' values, parameter by parameter."""
    if run.sampler is run.model:
        return
    with run.clock("sync"):
        for target, source in zip(run.sampler.parameters(), run.model.parameters()):
            # Cast before it is gathered: half the bytes in bfloat16.
            whole = full_tensor(source.detach().to(target.dtype))
            target.data = whole.to(target.device)


def free_sampler(run):
    """Give the copy's memory back for the updates, until the next sync_weights()."""
    if run.sampler is not run.model:
        for parameter in run.sampler.parameters():
            parameter.data = parameter.new_empty(0)


def load_reference(run):
    """The frozen initial policy for the KL term.

    After a warm start that is no model on disk: it is exported once, for continuations too.
    """
    path = run.model.source
    if run.args.sft_steps:
        path = run.directory / "reference"
        if run.state.step == 0:
            export(run, path.name, "float64" if run.args.dtype == "float64" else "float32")
    return load_copy(run, path, sharded=world_size() > 1)


# ------------------------------------------------------------------------------- Start of the run


def require(condition, message):
    """Stop with a one-line message and exit code 2. Only called before any file is written."""
    if not condition:
        raise ValueError(message)


def setup(args):
    """Read model and data and check that they fit together -> Run. Writes nothing.

    The weights are only checked: load_weights() reads them, once it is clear that they will fit.
    """
    masters = "float64" if args.dtype == "float64" else "float32"
    source = args.model or TINY_MODEL
    model, tokenizer, stop_ids = load_model(source, masters, "meta", args.stop, args.seed)
    fix_date(tokenizer, args.date)
    if args.device == "cuda" and args.rollout_batch == 0:
        choose_rollout_batch(model.config, args)
    check_memory(model.config, args)
    problems, prompts = read_problems(args, model, tokenizer, args.data)
    held_out = []
    held_out_prompts = []
    if args.eval_data:
        held_out, held_out_prompts = read_problems(
            args, model, tokenizer, args.eval_data, args.eval_problems, known_shapes=True
        )
    warn_of_overlap(problems, held_out)
    positions = model.config.max_position_embeddings
    longest = max(map(len, prompts + held_out_prompts)) + args.max_new_tokens
    require(
        longest <= positions,
        f"the longest prompt and --max-new-tokens make {longest} tokens; the model has {positions} "
        "positions: lower --max-prompt-tokens or --max-new-tokens",
    )
    return Run(
        args=args,
        algorithm=algorithm_of(args),
        directory=Path(args.run_dir),
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        problems=problems,
        prompts=prompts,
        held_out=held_out,
        held_out_prompts=held_out_prompts,
        verifier=Verifier(
            args.verifier_workers, args.verifier_timeout, args.verifier_memory, args.reward
        ),
        clock=Clock(args.device),
    )


def warn_of_overlap(problems, held_out):
    seen = {same_text(problem.problem) for problem in problems}
    overlap = [problem for problem in held_out if same_text(problem.problem) in seen]
    if overlap:
        print0(
            f"WARNING {len(overlap)} of {len(held_out)} held-out problems are in the training data "
            "too"
        )


def drop_unearnable_problems(run):
    """Drop training problems whose reference does not equal itself: no response can be correct.

    Rank 0 decides for all. Not with --reward, which may ask something else of a reference.
    """
    args = run.args
    earnable = [True] * len(run.problems)
    if rank() == 0 and not args.reward:
        earnable = run.verifier.self_consistent([problem.answer for problem in run.problems])
    earnable = all_gather(earnable)[0]
    if not all(earnable):
        count = earnable.count(False)
        print0(
            f"data    {count} dropped: no response can be correct, as the reference has no value"
        )
    run.problems = list(itertools.compress(run.problems, earnable))
    run.prompts = list(itertools.compress(run.prompts, earnable))
    require(
        len(run.problems) >= args.prompts_per_step,
        f"--prompts-per-step {args.prompts_per_step}, but {args.data} has {len(run.problems)} "
        "usable problems",
    )


def encode_demonstrations(run):
    """Prompt, solution and end token of each problem that has a solution, for the warm start."""
    args = run.args
    end = run.tokenizer.eos_token_id
    require(end is not None, "--sft-steps trains the end token, and the tokenizer has none")
    positions = run.model.config.max_position_embeddings
    run.demonstrations = []
    for problem, prompt in zip(run.problems, run.prompts):
        if problem.solution:
            ids = run.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
            length = len(prompt) + len(ids) + 1
            require(
                length <= positions,
                f"{args.data}:{problem.row + 1}: prompt and solution make {length} tokens; the "
                f"model has {positions} positions",
            )
            run.demonstrations.append((prompt, [*ids, end]))
    require(
        run.demonstrations,
        f"--sft-steps {args.sft_steps}, but no problem in {args.data} has a solution to learn from",
    )


def create_run_dir(run):
    """Make the run's directory and keep other runs out of it until every rank has ended."""
    on_all_ranks(lambda: rank() > 0 or claim_run_dir(run))
    on_all_ranks(lambda: lock_run_dir(run, fcntl.LOCK_SH))


def claim_run_dir(run):
    """Rank 0: nobody has the directory, and from here on this run has it."""
    run.directory.mkdir(parents=True, exist_ok=True)
    lock_run_dir(run, fcntl.LOCK_EX)
    if not run.args.resume:
        check_run_dir(run.directory)  # another run may have come and gone since the flags were read
    lock_run_dir(run, fcntl.LOCK_SH)  # with the other ranks, which may outlive this one


def lock_run_dir(run, kind):
    """Lock the run's directory, shared or exclusively, until this process ends."""
    run.lock = run.lock or open(run.directory / ".lock", "a")  # noqa: SIM115 (main closes it)
    try:
        fcntl.flock(run.lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run-dir {run.directory} is of a run that is still going on") from None
    except OSError as error:
        print0(f"WARNING {run.directory} has no locks ({error}): start no second run there")


def load_state(run):
    """Load the weights and the checkpoint, if there is one, and say what will be done."""
    args = run.args
    load_weights(run)
    run.optimizer = make_optimizer(run.model, args)
    if args.resume:
        load_checkpoint(run)
    parameters = sum(p.numel() for p in run.model.parameters())
    if rank() == 0:
        record_run(run, parameters)
        if args.track:
            # It ends when its stdin is closed, so with this process.
            argv = [sys.executable, HERE / "study/track.py", run.directory, args.track, "--follow"]
            run.tracker = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
    print0(
        f"model   {run.model.source}: {parameters / 1e6:.1f} M parameters, {args.dtype}, "
        f"{args.device}, {world_size()} × {torch.get_num_threads()} threads"
    )
    print0(
        "run     {run_dir}: {algo} (blend {blend}), P {prompts_per_step} × G {group_size}, "
        "{minibatch_prompts} prompts an update, lr {lr:g}, responses of at most {max_new_tokens} "
        "tokens, steps {step} to {steps}".format(**vars(args), step=run.state.step)
    )


FORMAT = 2  # of run.json and what lies beside it


def record_run(run, parameters):
    """Write run.json: format, flags, inputs, versions; on resume, also what of them has changed."""
    flags = dict(sorted(vars(run.args).items()))
    inputs = fingerprints(run.args, run.model.source)
    if run.args.resume:
        run.run_info = json.loads((run.directory / "run.json").read_text())
        before = run.run_info["flags"] | run.run_info.get("inputs", inputs)
        now = flags | inputs
        changed = {}
        for name in sorted(before.keys() | now.keys()):
            old = before.get(name)
            new = now.get(name)
            if name not in MAY_CHANGE_ON_RESUME and old != new:
                changed[name] = [old, new]
                label = flag(name) if name in flags else name
                print0(
                    f"WARNING {label} was {old} and is now {new}: from here on this is another run"
                )
        resumed = {"step": run.state.step, "changed": changed}
        run.run_info.setdefault("resumed", []).append(resumed)
        run.run_info.pop("ended", None)
    else:
        command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        packages = ("torch", "transformers", "safetensors", "numpy", "tqdm", "sympy")
        run.run_info = {
            "format": FORMAT,
            "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "command": sys.argv,
            "commit": commit.strip() or None,  # None: outside of git
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(),
            "host": platform.platform(),
            "threads": torch.get_num_threads(),
            "parameters": parameters,
        }
    write_run_info(run, flags=flags, inputs=inputs)


def write_run_info(run, **entries):
    """Add to run.json, which is never seen half-written."""
    run.run_info |= entries
    temporary = run.directory / "run.tmp"
    temporary.write_text(json.dumps(run.run_info, indent=1) + "\n")
    os.replace(temporary, run.directory / "run.json")


def fingerprints(args, model):
    """{"--model config.json": its fingerprint, …} of the files that the run reads.

    model: the model's directory.
    """
    files = {"--data contents": args.data, "--eval-data contents": args.eval_data}
    files["--reward contents"], _, _ = (args.reward or "").rpartition(":")
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".safetensors"):
            files[f"--model {file.name}"] = str(file)
    found = {name: fingerprint(path) for name, path in files.items() if path}
    # The local copy of a Hub id is named after its revision.
    return found | {"--model directory": model.name}


# ----------------------------------------------------------------------------------------- Memory


def memory_plan(config, args, ranks):
    """GiB that each of `ranks` ranks needs at the longest prompts and responses: {purpose: GiB}.

    "exact" sums up the weights, gradients and optimiser that are there at the same time. "update"
    and "rollout" add estimates of what else these phases hold; "total" is the larger of the two.
    """
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    layers = config.num_hidden_layers
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    wide = 8 if args.dtype == "float64" else 4  # bytes of a number in masters and gradients
    narrow = DTYPES[args.dtype].itemsize  # in the compute type
    masters = 0 if args.cpu_offload else wide * parameters / ranks
    sampler = narrow * parameters
    # Embeddings, head and two blocks, and the gradients of as much.
    gathered = (outside + 2 * (parameters - outside) / layers) * (2 * narrow + wide)
    if not is_sharded(args, ranks):
        sampler = gathered = 0
    reference = narrow * parameters / ranks if args.kl_coef else 0
    all_gradients = wide * parameters if args.defer_gradient_sync else 0
    longest = args.max_prompt_tokens + args.max_new_tokens
    rows = rows_in_flight(args, ranks)
    capacity = cache_capacity(longest, args.device)
    cache = cache_bytes(config, rows, capacity, DTYPES[args.dtype])
    # The mask, and what drawing a token makes of the logits: float32 twice and float64 once.
    decoding = rows * (capacity * narrow + 16 * config.vocab_size)
    # A chunk of logits, its exponentials and its gradient.
    chunks = 3 * wide * CHUNK_LOGITS[args.device]
    # Each layer keeps of a token the inputs of its norms, its matrices and its attention.
    kv_size = 2 * config.num_key_value_heads * config.head_dim
    in_layer = 7 * config.hidden_size + 4 * config.intermediate_size + kv_size
    kept = layers * in_layer
    if args.activation_checkpointing:
        kept = layers * config.hidden_size + in_layer
    activations = max(args.micro_tokens, longest) * kept * narrow
    always = 3 * masters + reference
    update = always + masters + all_gradients
    rollout = always + sampler
    plan = {
        "masters": masters,
        "gradients": masters + all_gradients,
        "optimiser": 2 * masters,
        "sampler": sampler,
        "reference": reference,
        "kv cache": cache,
        "decoding": decoding,
        "gathered": gathered,
        "activations": activations,
        "logits": chunks,
        "exact": max(update, rollout),
        "update": update + gathered + activations + chunks,
        "rollout": rollout + cache + decoding,
    }
    plan["total"] = max(plan["update"], plan["rollout"])
    return {name: size / 2**30 for name, size in plan.items()}


def rows_in_flight(args, ranks):
    """Rows that a rank samples at the same time, at most: all of a step's, or --rollout-batch,
    which an evaluation fills where a step does not."""
    rows = math.ceil(args.prompts_per_step / ranks) * args.group_size
    limit = args.rollout_batch or rows
    return limit if args.eval_data else min(rows, limit)


def choose_rollout_batch(config, args):
    """What --rollout-batch 0 means on a GPU: all of a rank's rows, or half of them, and so on,
    until the plan of a rollout fits in 0.9 of the device.

    Chosen once and kept in run.json; what is free at the moment has no say.
    """
    total, _ = device_memory(args.device)
    args.rollout_batch = rows_in_flight(args, world_size())
    limit = 0.9 * total
    while args.rollout_batch > 1 and memory_plan(config, args, world_size())["rollout"] > limit:
        args.rollout_batch = math.ceil(args.rollout_batch / 2)


def print_plan(args):
    """--plan: the memory that these flags need."""
    model = args.model or TINY_MODEL
    path = cached_file(model, "config.json")  # of a Hub id this file alone
    require(path, f"--model {model} has no config.json: name a model's directory or Hub id")
    config = Config.parse(json.loads(Path(path).read_text()))
    print(f"GiB on each of {args.plan} ranks, {args.dtype}, {model}")
    for name, size in memory_plan(config, args, args.plan).items():
        print(f"{name:<12}{size:10.2f}")


def check_memory(config, args):
    """Refuse what cannot fit; warn of what may not, since the estimates are rough."""
    plan = memory_plan(config, args, world_size())
    total, free = device_memory(args.device)
    see = f"--plan {world_size()} shows what for"
    require(
        plan["exact"] <= total,
        f"weights, gradients and optimiser need {plan['exact']:.1f} GiB on each rank, which has "
        f"{total:.1f}: use more ranks, --cpu-offload or a smaller model; {see}",
    )
    if plan["total"] > 0.9 * free:
        print0(
            f"WARNING a rank may need {plan['total']:.1f} GiB at its fullest, and {free:.1f} are "
            "free: if it runs out, use --activation-checkpointing, or a smaller --micro-tokens or "
            f"--rollout-batch; {see}"
        )


def device_memory(device):
    """GiB that a rank has, and how much of it is free. Ranks share the memory of their machine."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = free = total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return total / 2**30, free / 2**30


# ------------------------------------------------------------------------------------------ Flags

# Sizes of a run. The demonstration (no --model) fits two cores and a few minutes.
DEMO_SIZES = {
    "data": str(HERE / "data/arithmetic_train.jsonl"),
    "eval_data": str(HERE / "data/arithmetic_test.jsonl"),
    "instruction": "",
    "max_prompt_tokens": 64,
    "max_new_tokens": 64,
    "steps": 60,
    "prompts_per_step": 40,
    "group_size": 6,
    "minibatch_prompts": 40,
    "rollout_batch": 0,
    "lr": 2e-4,
    "beta2": 0.95,
    "warmup_updates": 0,
    "sft_steps": 500,
    "sft_batch": 64,
    "sft_lr": 3e-3,
    "eval_every": 20,
    "save_every": 20,
}
# With --model they are those of the paper's runs.
PAPER_SIZES = {
    "instruction": INSTRUCTION,
    "max_prompt_tokens": 1024,
    "max_new_tokens": 2048,
    "steps": 60,
    "prompts_per_step": 512,
    "group_size": 6,
    "minibatch_prompts": 32,
    "rollout_batch": 256,
    "lr": 1e-6,
    "beta2": 0.999,
    "warmup_updates": 0,
    "sft_steps": 0,
    "sft_batch": 128,
    "sft_lr": 1e-5,
    "eval_every": 10,
    "save_every": 10,
}
# --micro-tokens unless it is given: a CPU is as fast with few, a GPU wants many.
MICRO_TOKENS = {"cpu": 2048, "cuda": 8192}
# Where, how long, how often, how fast: a resumed run may change these without a word.
MAY_CHANGE_ON_RESUME = {
    "run_dir",
    "resume",
    "steps",
    "eval_every",
    "save_every",
    "keep",
    "export_every",
    "track",
    "plot",
    "device",
    "micro_tokens",
    "rollout_batch",
    "verifier_workers",
    "timeout",
    "activation_checkpointing",
    "cpu_offload",
    "compile",
    "defer_gradient_sync",
    "plan",
}
# What its checkpoints were made with. Other flags may change, with a warning.
MUST_MATCH_ON_RESUME = ("model", "seed", "dtype", "sft_steps", "sft_batch", "sft_lr")


def real_path(text):
    """An argparse type: a file's or directory's whole path, which means the same wherever the run
    goes on; a place on the Hub as it is."""
    return os.path.realpath(text) if os.path.exists(text) else text


def build_parser():
    """All flags. What has no default here gets one from the preset or from the set of sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # argparse would print the usage of all flags above its message.
    parser.error = functools.partial(require, False)
    yes_no = argparse.BooleanOptionalAction
    whole = number_in(int, "[0, 1e18]")
    count = number_in(int, "[1, inf)")
    at_least_two = number_in(int, "[2, inf)")
    not_negative = number_in(float, "[0, inf)")
    positive = number_in(float, "(0, inf)")
    decay = number_in(float, "[0, 1)")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        type=real_path,
        help="Hugging Face directory or Hub id (default: data/tiny, random weights)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="compute type; master weights are float32 or float64",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: cuda if there is one",
    )
    add = parser.add_argument_group("problems and prompts").add_argument
    add(
        "--data",
        type=real_path,
        help="problems: JSONL or parquet, a local file or hf://datasets/OWNER/NAME/FILE",
    )
    add("--eval-data", type=real_path, help="held-out problems, likewise (without: no evaluation)")
    add_prompt_flags(add)
    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=at_least_two, help="P, prompts sampled in a step")
    add("--group-size", type=at_least_two, help="G, responses to each prompt")
    add("--max-new-tokens", type=count, help="response limit, in tokens")
    add("--temperature", type=positive, default=1.0, help="of sampling and of scoring alike")
    add("--rollout-batch", type=whole, help="rows that a rank samples at the same time (0 = all)")
    add("--max-rounds", type=count, default=4, help="rounds of dynamic sampling in a step")
    add(
        "--placebo",
        action=yes_no,
        default=False,
        help="a control: deal each step's rewards and verdicts to its responses at random",
    )
    add = parser.add_argument_group("grading").add_argument
    add("--verifier-workers", type=count, default=2, help="processes that grade responses")
    add(
        "--verifier-timeout",
        type=positive,
        default=10.0,
        help="last resort for one response, in seconds",
    )
    add(
        "--verifier-memory",
        type=number_in(int, "[64, inf)"),
        default=1024,
        help="limit of each of these processes, in MiB",
    )
    add_algorithm_flags(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add("--minibatch-prompts", type=count, help="prompts of one optimiser update; divides P")
    add(
        "--micro-tokens", type=count, help="tokens of one forward pass, shared prompts counted once"
    )
    add(
        "--old-logprobs",
        choices=["recompute", "sampler"],
        help="those of a step's later updates: from a forward pass before them, or as sampled "
        "(default: sampler, but recompute in bfloat16)",
    )
    add("--lr", type=positive, help="learning rate of AdamW")
    add(
        "--warmup-updates",
        type=whole,
        help="updates over which the rate rises to --lr (0 = disabled)",
    )
    add("--beta1", type=decay, default=0.9, help="AdamW's decay of the gradient's mean")
    add("--beta2", type=decay, help="AdamW's decay of the gradient's square")
    add("--weight-decay", type=not_negative, default=0.01, help="on matrices only (0 = disabled)")
    add(
        "--max-grad-norm",
        type=not_negative,
        default=1.0,
        help="gradients are scaled down to this norm (0 = disabled)",
    )
    add = parser.add_argument_group("supervised warm start, on the data's solutions").add_argument
    add("--sft-steps", type=whole, help="updates before reinforcement learning (0 = disabled)")
    add("--sft-batch", type=count, help="solutions in one update")
    add(
        "--sft-lr",
        type=positive,
        help="peak learning rate; rises over 5 %% of the steps, then falls to 5 %%",
    )
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=whole, help="steps of reinforcement learning, with those before a resume")
    add("--seed", type=whole, default=0, help="of data order, updates, noise and random weights")
    add("--run-dir", help="directory of the run (default: runs/ALGO-DATE-TIME)")
    add(
        "--resume",
        metavar="latest|DIR",
        help="go on from --run-dir's newest checkpoint, or from this one, with the flags of the "
        "run, except those given again",
    )
    add("--eval-every", type=whole, help="steps between evaluations (0 = only before and after)")
    add("--eval-samples", type=count, default=8, help="k, responses to each held-out problem")
    add("--eval-problems", type=whole, default=0, help="first held-out problems to use (0 = all)")
    add("--eval-temperature", type=not_negative, default=1.0, help="0 = greedy")
    add("--save-every", type=whole, help="steps between checkpoints (0 = only at the end)")
    add("--keep", type=count, default=2, help="newest checkpoints to keep; exports all stay")
    add("--export-every", type=whole, default=0, help="steps between exports (0 = only at the end)")
    add("--export-dtype", choices=DTYPES, help="of exported weights (default: the source's)")
    add("--track", choices=["wandb", "tensorboard"], help="also log to this package")
    add("--plot", action=yes_no, default=False, help="draw curves.png at the end (matplotlib)")
    add = parser.add_argument_group("ranks and memory").add_argument
    add(
        "--timeout",
        type=positive,
        default=600.0,
        help="seconds that a rank waits for another before it gives up",
    )
    add(
        "--activation-checkpointing",
        action=yes_no,
        default=False,
        help="keep one activation a layer and compute the others again",
    )
    add(
        "--cpu-offload",
        action=yes_no,
        default=False,
        help="masters, gradients and optimiser in the host's memory",
    )
    add(
        "--defer-gradient-sync",
        action=yes_no,
        default=False,
        help="exchange gradients once an update, not in every micro-batch: less traffic, but whole "
        "gradients on every rank",
    )
    add(
        "--float32-matmul-precision",
        choices=["highest", "high", "medium"],
        default="highest",
        help="of float32 matrix products; high: TF32 on a GPU",
    )
    add(
        "--compile",
        choices=torch.compiler.list_backends(exclude_tags=()),
        metavar="BACKEND",
        help="torch.compile for the layers that are trained, such as inductor",
    )
    add(
        "--plan",
        type=count,
        metavar="RANKS",
        help="print the memory that each of so many ranks needs, and exit",
    )
    return parser


def add_algorithm_flags(parser):
    """A flag for each field of copo.Algorithm; choices are the tables of copo.py themselves."""
    add = parser.add_argument_group("algorithm (defaults: the preset's)").add_argument
    add("--algo", choices=copo.PRESETS, default="copo", help="preset of all flags in this group")
    for option in dataclasses.fields(copo.Algorithm):
        explanation = option.metadata["help"]
        if option.type is bool:
            add(flag(option.name), action=argparse.BooleanOptionalAction, help=explanation)
        elif option.metadata["interval"]:
            number = number_in(option.type, option.metadata["interval"])
            add(flag(option.name), type=number, help=explanation)
        else:
            add(flag(option.name), choices=option.metadata["choices"], help=explanation)


def flag(name):
    return "--" + name.replace("_", "-")


def algorithm_of(args):
    """The flags of copo.Algorithm's fields -> Algorithm."""
    names = [option.name for option in dataclasses.fields(copo.Algorithm)]
    return copo.Algorithm(**{name: getattr(args, name) for name in names})


def parse_args(argv):
    """All flags: defaults, then sizes, preset, the resumed run's, and the command line on top."""
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    # Started from None everywhere, what is set afterwards was on the command line.
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    cli_args = vars(parser.parse_args(argv, unset))
    cli_args = {name: value for name, value in cli_args.items() if value is not None}
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        resume_after_restart(cli_args)
    resumed = resumed_flags(cli_args) if "resume" in cli_args else {}
    gone = [flag(name) for name in sorted(resumed.keys() - defaults.keys()) if resumed[name]]
    if gone:
        print0(f"WARNING the run began with {', '.join(gone)}, which this code no longer has")
    model = (resumed | cli_args).get("model")
    require(model != "", "--model is empty: name a model, or leave it out for the demonstration")
    values = defaults | (PAPER_SIZES if model else DEMO_SIZES)
    values |= dataclasses.asdict(copo.PRESETS[defaults["algo"]])
    values |= resumed
    if "algo" in cli_args:
        values |= dataclasses.asdict(copo.PRESETS[cli_args["algo"]])
    args = argparse.Namespace(**(values | cli_args))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() or args.plan else "cpu"
    if not args.micro_tokens:
        args.micro_tokens = MICRO_TOKENS[args.device]
    args.date = str(args.date or datetime.now())[:19]
    if not args.old_logprobs:
        args.old_logprobs = "recompute" if args.dtype == "bfloat16" else "sampler"
    check_flags(args)
    check_idle_flags(args, cli_args)
    if not args.resume:
        name = f"{args.algo}-{datetime.now():%Y%m%d-%H%M%S}{process_suffix()}"
        args.run_dir = args.run_dir or f"runs/{name}"
        check_run_dir(Path(args.run_dir))
    return args


def check_run_dir(directory):
    """A new run needs a directory of its own. These are left by one killed before run.json."""
    require(
        {path.name for path in directory.glob("*")} <= {"run.tmp", ".lock"},
        f"--run-dir {directory} is in use: choose another, or --resume latest to go on with it",
    )


def process_suffix():
    """What tells the names of runs apart that start in one second. torchrun's workers have one in
    common, which finds their run again when torchrun restarts them."""
    workers = "TORCHELASTIC_RUN_ID" in os.environ
    return f"-p{os.getppid() if workers else os.getpid()}"


def resume_after_restart(cli_args):
    """After a restart by torchrun: go on with the run that the killed workers began, if any."""
    checkpoint = cli_args.pop("resume", "latest")
    found = sorted(Path("runs").glob(f"*{process_suffix()}"))
    if checkpoint != "latest":
        found = [Path(checkpoint).resolve().parent.parent]
    if found:
        cli_args.setdefault("run_dir", str(found[-1]))
    if "run_dir" in cli_args and Path(cli_args["run_dir"], "run.json").is_file():
        cli_args["resume"] = "latest"


def resumed_flags(cli_args):
    """The flags of the run that --resume names. Refuses changes that its checkpoints forbid."""
    checkpoint = cli_args["resume"]
    run_dir = cli_args.get("run_dir")
    if checkpoint != "latest":
        require(
            Path(checkpoint, "state.json").is_file(), f"--resume {checkpoint}: no checkpoint there"
        )
        home = Path(checkpoint).resolve().parent.parent
        run_dir = run_dir or str(home)
        require(
            Path(run_dir).resolve() == home,
            f"--resume {checkpoint} is of another run than --run-dir {run_dir}",
        )
    require(run_dir, "--resume latest needs --run-dir, the run to go on with")
    path = Path(run_dir, "run.json")
    require(path.is_file(), f"--run-dir {run_dir}: no run there to resume")
    run_info = json.loads(path.read_text())
    require(
        run_info.get("format") == FORMAT,
        f"--run-dir {run_dir} was made by older code; commit ce7ac25 can resume it",
    )
    flags = run_info["flags"]
    for name in MUST_MATCH_ON_RESUME:
        require(
            cli_args.get(name, flags[name]) == flags[name],
            f"{flag(name)} was {flags[name]} when the run began and cannot change on --resume",
        )
    require(
        not cli_args.get("kl_coef") or flags["kl_coef"] or not flags["sft_steps"],
        "--kl-coef was 0 when the run began, which therefore kept no reference model: it cannot "
        "change on --resume",
    )
    return flags | {"run_dir": run_dir, "device": "auto"}


def check_flags(args):
    """Refuse flags that cannot work together."""
    global_term = copo.BLENDS[args.blend].has_global_term()
    rules = [
        (
            args.dual_clip == 0 or args.dual_clip > 1,
            "--dual-clip is {dual_clip}; it must be above 1, or 0",
        ),
        (
            args.data or args.plan,
            "--model needs --data, a file of problems",
        ),
        (
            args.prompts_per_step % args.minibatch_prompts == 0,
            "--minibatch-prompts {minibatch_prompts} does not divide --prompts-per-step "
            "{prompts_per_step}",
        ),
        (
            args.overlong_buffer < 1 or args.overlong_buffer <= args.max_new_tokens,
            "--overlong-buffer {overlong_buffer:g} is more than --max-new-tokens {max_new_tokens}",
        ),
        (
            not (args.dynamic_sampling and global_term),
            "--dynamic-sampling drops the groups that --blend {blend} has its global term for; use "
            "--blend local",
        ),
        (
            not (args.placebo and args.dynamic_sampling),
            "--placebo deals out the verdicts of all groups, --dynamic-sampling drops groups by "
            "their verdicts: leave one of them out",
        ),
    ]
    for holds, message in rules:
        require(holds, message.format(**vars(args)))
    copo.check_algorithm(algorithm_of(args))


def check_idle_flags(args, cli_args):
    """Refuse flags of the command line that change nothing: a mistake in an ablation."""
    blend = copo.BLENDS[args.blend]
    idle = [
        (
            not blend.has_global_term(),
            "global_coef consistency_coef",
            "--blend {blend} has no global term",
        ),
        (
            not blend.has_local_term(),
            "advantage overlong_factor overlong_buffer",  # the penalty enters A^l alone
            "--blend {blend} has no local term",
        ),
        (not blend.uses_entropy, "gamma rho", "--blend {blend} does not look at the entropy"),
        (args.kl_coef == 0, "kl_estimator", "--kl-coef is 0"),
        (args.overlong_factor == 0, "overlong_buffer", "--overlong-factor is 0"),
        (not args.dynamic_sampling, "max_rounds", "--dynamic-sampling is off"),
        (args.sft_steps == 0, "sft_lr sft_batch", "--sft-steps is 0"),
        (
            args.minibatch_prompts == args.prompts_per_step,
            "ratio clip_low clip_high dual_clip old_logprobs",
            "in the one update of a step q is 1; a smaller --minibatch-prompts makes more updates",
        ),
        (
            not args.eval_data,
            "eval_every eval_samples eval_problems eval_temperature",
            "there is no --eval-data",
        ),
        (
            not is_sharded(args, args.plan),
            "defer_gradient_sync",
            "one process in full precision has its gradients whole",
        ),
    ]
    for applies, names, reason in idle:
        for name in names.split():
            why = reason.format(**vars(args))
            require(not (applies and name in cli_args), f"{flag(name)} has no effect: {why}")


# ------------------------------------------------------------------------------------------- Main


def run_until_end(run):
    """Train, and record in run.json how the run ends -> what to exit with: None, a line or a code.

    Signals, full disks and updates that are not finite end in one line that says how to go on.
    """
    resume = f"--run-dir {shlex.quote(str(run.directory))} --resume latest"
    try:
        load_state(run)
        try:
            train(run)
            record_ending(run, "finished")
        except Interrupted as signal_name:
            path = save_checkpoint(run)
            record_ending(run, "stopped", str(signal_name))
            print0(f"stopped by {signal_name}; saved {path}. To go on: python train.py {resume}")
        return None
    except KeyboardInterrupt:
        record_ending(run, "stopped")
        print(
            f"train.py: stopped at once; {resume} goes back to the last checkpoint", file=sys.stderr
        )
        return 130
    except Exception as error:
        line = " ".join(str(error).split())
        record_ending(run, "failed", f"{type(error).__name__}: {line}")
        if isinstance(error, OSError) or "not finite" in line:
            if not run.run_info:  # not loaded yet: the newest checkpoint may be what is damaged
                return f"train.py: {line}"
            return (
                f"train.py: after step {run.state.step}: {line}; {resume} goes back to the last "
                "checkpoint"
            )
        if world_size() == 1:
            raise
        return f"train.py: rank {rank()}: {traceback.format_exc()}"


def record_ending(run, how, why=""):
    if run.run_info:  # before load_state() is done, what run.json says of the last ending stays
        with contextlib.suppress(OSError):  # a full disk, for one, of which the run may have failed
            write_run_info(run, ended={"how": how, "step": run.state.step, "why": why})


def main(argv=None):
    # One process needs no process group for its checkpoints, and no word about that.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    replace_unprintable()
    try:
        args = parse_args(argv)
        if args.plan:
            return print_plan(args)
        torch.set_float32_matmul_precision(args.float32_matmul_precision)
        init_distributed(args.device, args.timeout)
        # torchrun's workers on several machines may see different things: rank 0's flags count.
        args = all_gather(args)[0]
        run = on_all_ranks(lambda: setup(args))
        drop_unearnable_problems(run)
        if args.sft_steps:
            on_all_ranks(lambda: encode_demonstrations(run))
        create_run_dir(run)
    except (ValueError, OSError) as error:
        exit_with_error("train.py", error)
    run.stop = StopSignal()
    try:
        message = run_until_end(run)
    finally:
        run.verifier.close()
        run.stop.restore()
        if run.tracker:
            run.tracker.communicate()
        run.lock.close()
    if message and world_size() > 1:
        # Leaving in order would wait for peers that wait for this rank: torchrun ends them.
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
    shutdown_distributed()
    if message:
        raise SystemExit(message)


if __name__ == "__main__":
    main()
