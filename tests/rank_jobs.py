"""What test_train_ranks.py has several ranks do besides whole runs: work(JOB, FILE, FLAGS), or,
where it matters that torchrun started them, torchrun rank_jobs.py JOB FILE FLAGS…

updates: one step's updates with every blend, with one q per response and with several token
         budgets, from the same weights; gradients, metrics.
steps:   each step of another run again, from its checkpoint and with its responses (in FILE); the
         losses.
uneven:  a run in which every second prompt's responses end at their first token, and all others run
         to the limit.
broken:  a run in which rank 1 fails in the second step.
ending:  a run after which the interpreter ends while a thread of gloo's waits for its lock, to let
         go of a tensor."""

import atexit
import dataclasses
import sys
import time
from pathlib import Path

import tiny_runs
import torch

import copo
import sampler
import train

BUDGETS = (1, 40, 10**6)  # tokens of a micro-batch: a sequence at a time, a few, all of a rank's


def begin(argv):
    """What train.main does before its first step."""
    args = train.parse_args(argv)
    train.init_distributed(args.device, args.timeout)
    run = train.on_all_ranks(lambda: train.setup(args))
    train.on_all_ranks(lambda: train.create_run_dir(run))
    run.stop = train.StopSignal()
    train.load_state(run)
    return run


def advantages_of(run, rollout):
    return copo.compute_advantages(
        rollout.rewards,
        rollout.correct,
        rollout.classes,
        rollout.lengths,
        run.algorithm,
        run.args.max_new_tokens,
    )


def updates(argv, file):
    run = begin(argv)
    train.sync_weights(run)
    rollout, _ = train.collect_rollout(run)
    inner = train.compute_logprobs
    gradients = []
    found = {"lengths": rollout.lengths}

    def moved(*rest):  # log-probs of another policy, so that ratios are not 1 and clips matter
        logprobs = inner(*rest)
        return logprobs + 0.4 * torch.sin(
            torch.arange(logprobs.numel(), dtype=logprobs.dtype)
        ).view_as(logprobs)

    def step():  # takes the gradients down and leaves the weights as they are
        gradients.append(
            {name: train.full_tensor(p.grad).clone() for name, p in run.model.named_parameters()}
        )

    train.compute_logprobs = moved
    run.optimizer.step = step
    run.args.old_logprobs = "recompute"
    exchanges = []
    if train.world_size() > 1:
        set_sync = run.model.set_requires_gradient_sync
        run.model.set_requires_gradient_sync = lambda now: (exchanges.append(now), set_sync(now))
    given = run.algorithm
    rules = {blend: {"blend": blend} for blend in copo.BLENDS}
    rules["sequence"] = {"ratio": "sequence"}
    rules["deferred"] = {}  # gradients exchanged once an update
    for name, changes in rules.items():
        several = name in ("soft-zero", "sequence", "deferred")
        for budget in BUDGETS if several else BUDGETS[1:2]:
            run.algorithm = dataclasses.replace(given, **changes)
            run.args.defer_gradient_sync = name == "deferred" and train.world_size() > 1
            run.args.micro_tokens = budget
            metrics = train.update_policy(run, rollout, advantages_of(run, rollout))
            found[f"{name}, {budget} tokens"] = {"gradients": list(gradients), "metrics": metrics}
            gradients.clear()
    if train.rank() == 0:
        torch.save(found | {"exchanges": exchanges}, file)


def steps(argv, file):
    run = begin(argv)
    losses = []
    rollouts, checkpoints = torch.load(file, weights_only=False)
    # load_checkpoint removes later checkpoints, which are to be loaded next.
    train.delete_directory = lambda path: None
    for rollout, checkpoint in zip(rollouts, checkpoints, strict=True):
        if checkpoint is not None:
            run.args.resume = str(checkpoint)
            train.load_checkpoint(run)
        metrics = train.update_policy(run, rollout, advantages_of(run, rollout))
        losses.append(metrics["loss"])
    if train.rank() == 0:
        torch.save(losses, file)


def uneven(argv, _):
    generate = sampler.generate

    def limited(model, prompts, group_size, max_new_tokens, *rest, rows, **more):
        limits = [1 if row % 2 == 0 else max_new_tokens for row in rows for _ in range(group_size)]
        return generate(model, prompts, group_size, limits, *rest, rows=rows, **more)

    sampler.generate = limited
    # In the order of the data: of two ranks, to which prompts are dealt in turn, one gets all the
    # short ones.
    train.draw_prompts = lambda seed, cursor, count, size: [
        (i % size, i) for i in range(cursor, cursor + count)
    ]
    train.main(argv)


def broken(argv, file):
    inner = train.update_policy

    def update_policy(run, *rest):
        if train.rank() == 1 and run.state.step == 1:
            file.touch()  # when it fails
            raise RuntimeError("this rank was told to fail")
        return inner(run, *rest)

    train.update_policy = update_policy
    train.main(argv)


class Slow:
    """Something that the end of an interpreter has to wait for."""

    def __del__(self):
        time.sleep(1)


def ending(argv, _):
    def busy():  # never lets go of the interpreter's lock
        until = time.monotonic() + 3
        while time.monotonic() < until:
            pass

    def meet_once_more():
        if train.rank() == 0:
            time.sleep(1)
        train.dist.all_reduce(torch.ones(4), async_op=True)
        if train.rank() == 0:
            time.sleep(1)
        sys.setswitchinterval(1000)
        atexit._clear()  # others would let go of it
        atexit.register(busy)
        sys.modules["slow"] = Slow()

    train.dist.destroy_process_group = meet_once_more
    train.main(argv)


def work(name, file, argv):
    train.Verifier = tiny_runs.Judge
    globals()[name](argv, Path(file))
    train.shutdown_distributed()


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3:])
