"""Several ranks give the numbers of one process: under torchrun where its own part matters, else
forked and as it would start them, which saves each of them five seconds of imports.

Guards against: gradients averaged over ranks; counts, advantages or metrics of one rank only;
prompts or held-out problems that change their noise with the rank that samples them; ranks with
fewer sequences than others that leave them waiting; checkpoints that only the same number of ranks
can read; files written twice."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_ranks
import numpy as np
import pytest
import rank_jobs
import tiny_runs
import torch

import eval as evaluation
import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tiny_runs.Runs(tmp_path_factory.mktemp("ranks"))


def launch(ranks, argv, script=train.__file__, options=()):
    """torchrun, started; the launcher is this interpreter's."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        *options,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(train.__file__).parent),
    }
    return subprocess.Popen(
        [*launcher, script, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def torchrun(ranks, argv, script=train.__file__, code=0, options=()):
    """A run on several processes; what it printed."""
    process = launch(ranks, argv, script, options)
    output, errors = process.communicate(timeout=tiny_runs.PATIENCE)
    assert process.returncode == code, errors[-3000:]
    return output + errors


def forked(runs, ranks, function, *args, **more):
    """The same on ranks that start at once."""
    runs.count += 1
    return tiny_runs.on_ranks(ranks, runs.folder / f"log{runs.count}", function, *args, **more)


def job(runs, ranks, name, file, argv):
    return forked(runs, ranks, rank_jobs.work, name, file, argv)


def assert_same(ours, theirs):
    """Lines of metrics or evaluations: equal to 1e-9 of each value, name for name."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-9), (
                f"step {one['step']}: {name}"
            )


def weights_agree(one, other):
    one, other = tiny_runs.weights(one), tiny_runs.weights(other)
    return all(
        (one[name] - other[name]).abs().max() <= 1e-9 * one[name].abs().max() for name in one
    )


# Ten prompts in two updates of five groups of four; some three rows in a micro-batch. Of two, three
# or four ranks,
# some divide neither the prompts, nor four held-out problems, nor the twenty rows of an update.
FLAGS = {
    "steps": 10,
    "prompts_per_step": 10,
    "minibatch_prompts": 5,
    "micro_tokens": 40,
    "export_dtype": "float64",
    "eval_every": 4,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def alone(runs):
    return runs.shared(**FLAGS)


def assert_same_run(one, other):
    assert_same(tiny_runs.metrics(one), tiny_runs.metrics(other))
    assert_same(tiny_runs.evaluations(one), tiny_runs.evaluations(other))
    assert_same_groups(one, other)
    assert weights_agree(one, other)


def assert_same_groups(one, other):
    """The same responses, as far as answers, lengths and classes tell, and the same rewards."""
    groups = [tiny_runs.lines(directory / "groups.jsonl") for directory in (one, other)]
    for ours, theirs in zip(*groups, strict=True):
        assert all(
            ours[name] == theirs[name]
            for name in ("step", "row", "answers", "reward", "length", "class")
        )


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_several_ranks_give_the_run_of_one(runs, alone, ranks):
    """Ten steps in float64: the same responses and rewards, metrics and weights to 1e-9. Two are
    torchrun's own."""
    directory = runs.directory()
    argv = runs.argv(FLAGS, run_dir=directory)
    output = torchrun(2, argv) if ranks == 2 else forked(runs, ranks, train.main, argv)
    assert output.count("held-out mean@2") == 1  # one rank speaks
    assert_same_run(alone, directory)
    # there was something to learn
    assert any(line["mixed"] > 0 for line in tiny_runs.metrics(alone))


def test_a_placebo_is_the_same_on_two_ranks(runs):
    """With one q per response and an advantage of the whole step besides."""
    flags = {**FLAGS, "steps": 3, "placebo": True, "ratio": "sequence", "advantage": "ebpo"}
    flags |= {"blend": "soft"}
    directory = runs.directory()
    forked(runs, 2, train.main, runs.argv(flags, run_dir=directory))
    alone = runs.new(**flags)
    assert_same_run(alone, directory)
    dealt = [tiny_runs.lines(path / "groups.jsonl") for path in (alone, directory)]
    for ours, theirs in zip(*dealt, strict=True):
        assert ours["correct"] == theirs["correct"] and ours["verdict"] == theirs["verdict"]
    assert any(line["correct"] != line["verdict"] for line in dealt[0])


def test_a_run_goes_from_one_rank_to_two_to_four_and_back(runs, alone):
    directory = runs.directory()
    train.main(runs.argv(FLAGS, run_dir=directory, steps=2))
    on = ["--run-dir", str(directory), "--resume", "latest", "--steps"]
    forked(runs, 2, train.main, [*on, "4"])
    forked(runs, 4, train.main, [*on, "8"])
    train.main([*on, "10"])
    # The parts were evaluated where they ended, besides every fourth step.
    assert_same(tiny_runs.metrics(alone), tiny_runs.metrics(directory))
    assert_same_groups(alone, directory)
    assert weights_agree(alone, directory)


def test_gradients_do_not_depend_on_ranks_or_budgets(runs):
    """Every blend, one q per response, gradients exchanged once an update, ratios that are not 1,
    ragged rows: gradients and metrics to 1e-9 of each tensor's largest."""
    flags = {**FLAGS, "max_grad_norm": 0.0}
    files = {ranks: runs.folder / f"updates{ranks}.pt" for ranks in (1, 2, 4)}
    for ranks, file in files.items():
        job(runs, ranks, "updates", file, runs.argv(flags, run_dir=runs.directory()))
    found = {ranks: torch.load(file) for ranks, file in files.items()}
    exchanges = {ranks: each.pop("exchanges") for ranks, each in found.items()}
    for ranks in (
        2,
        4,
    ):  # three budgets of two updates each: the last micro-batch of each exchanges
        assert exchanges[ranks].count(True) == 6 < len(exchanges[ranks])
    one = found[1]
    assert len({*one.pop("lengths").flatten().tolist()}) > 2
    assert len(one) == len(train.copo.BLENDS) + 8
    pairs = [(one[name], found[ranks][name]) for name in one for ranks in (2, 4)]
    for rule in ("soft-zero", "sequence", "deferred"):
        budgets = [one[f"{rule}, {budget} tokens"] for budget in rank_jobs.BUDGETS]
        pairs += [(budgets[0], budgets[1]), (budgets[0], budgets[2])]
    for ours, theirs in pairs:
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-9, abs=1e-12)
        for before, after in zip(ours["gradients"], theirs["gradients"], strict=True):
            for name, gradient in before.items():
                assert (gradient - after[name]).abs().max() <= 1e-9 * gradient.abs().max(), name
    assert any(ours["metrics"]["clip_fraction_global"] > 0 for ours, _ in pairs)
    distinct = {tuple(one[name]["gradients"][0]["model.norm.weight"].tolist()) for name in one}
    assert len(distinct) > 5  # the blends are not all the same here


def test_float32_steps_agree_from_the_same_start(runs, monkeypatch):
    """Each of ten steps on two ranks, from one rank's checkpoint and with its responses: losses to
    1e-5."""
    rollouts, losses, inner = [], [], train.update_policy

    def watched(run, rollout, advantages):
        rollouts.append(rollout)
        metrics = inner(run, rollout, advantages)
        losses.append(metrics["loss"])
        return metrics

    flags = {**FLAGS, "dtype": "float32", "save_every": 1, "keep": 20}
    monkeypatch.setattr(train, "update_policy", watched)
    directory, file = runs.new(**flags), runs.folder / "steps.pt"
    checkpoints = [None, *sorted((directory / "checkpoints").glob("step-*"))[:9]]
    torch.save((rollouts, checkpoints), file)
    job(runs, 2, "steps", file, runs.argv(flags, run_dir=runs.directory()))
    assert torch.load(file) == pytest.approx(losses, abs=1e-5) and len(losses) == 10
    assert max(map(abs, losses)) > 1e-3


def test_one_rank_has_nothing_but_short_responses(runs):
    flags = {**FLAGS, "steps": 2, "eval_every": 0}
    one, two = runs.directory(), runs.directory()
    job(runs, 1, "uneven", "-", runs.argv(flags, run_dir=one))
    job(runs, 2, "uneven", "-", runs.argv(flags, run_dir=two))
    lengths = [line["length"] for line in tiny_runs.lines(two / "groups.jsonl")]
    assert all(max(short) == 1 < max(long) for short, long in zip(lengths[::2], lengths[1::2]))
    assert_same_run(one, two)


def test_more_ranks_than_sequences_and_a_warm_start_with_a_reference(runs):
    """Two prompts of two responses on three ranks, one row an update less than there are ranks."""
    flags = {
        "steps": 2,
        "prompts_per_step": 2,
        "minibatch_prompts": 1,
        "group_size": 2,
        "sft_steps": 2,
        "sft_batch": 2,
        "kl_coef": 0.1,
        "overlong_factor": 1.0,
        "overlong_buffer": 6.0,
        "stop": ["=", "+", "?"],
        "export_dtype": "float64",
        "blend": "local",
    }
    alone, directory = runs.shared(**flags), runs.directory()
    forked(runs, 3, train.main, runs.argv(flags, run_dir=directory))
    # Lengths, and so rewards, differ. With the KL term alone the first gradient is nothing but
    # rounding, which AdamW
    # blows up (g / (|g| + 1e-8)): its next gradient then agreed to 1e-5, not 1e-9, on one make of
    # CPU.
    assert all(line["grad_norm"] > 0.01 for line in tiny_runs.metrics(alone))
    assert_same(tiny_runs.metrics(alone), tiny_runs.metrics(directory))
    assert weights_agree(alone, directory)


def test_shares_of_tokens_are_even():
    """At most 5 % above the mean on a lognormal mix at 8 ranks, as the docstring says."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.lognormal(5.5, 0.8, size=128).clip(1, 2048).astype(int).tolist()
        chunks = [train.Chunk([row], length) for row, length in enumerate(lengths)]
        shares = train.balance_over_ranks(chunks, 8)
        assert sorted(chunk.rows[0] for share in shares for chunk in share) == list(range(128))
        loads = [sum(chunk.tokens for chunk in share) for share in shares]
        assert max(loads) <= 1.05 * sum(loads) / 8


def test_empty_micro_batches_fill_up_the_shorter_ranks(monkeypatch):
    pairs = {row: ([1, 2], [3] * n) for row, n in enumerate((6, 1, 1))}
    monkeypatch.setattr(train, "world_size", lambda: 2)
    args = argparse.Namespace(micro_tokens=3, device="cpu")
    seen = []
    for rank in range(2):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        batches = [batch for batch, _ in train.micro_batches(pairs, args)]
        seen.append([(batch.rows.tolist(), batch.mask.sum(1).tolist()) for batch in batches])
    assert seen[0] == [([0], [6]), ([0], [0])]  # the second has no tokens: its row is a stand-in
    assert seen[1] == [([1], [1]), ([2], [1])]


def test_metrics_of_ranks_are_sums_and_maxima(monkeypatch):
    ours = train.MetricSums()
    ours.add({"x": (torch.tensor(3.0), torch.tensor(2)), "y_max": torch.tensor([1.0, 1.0])})
    theirs = {
        "x": torch.tensor([5.0, 2.0]),
        "z": torch.tensor([1.0, 1.0]),
        "y_max": torch.tensor([4.0, 1.0]),
    }
    monkeypatch.setattr(train, "all_gather", lambda value: [value, theirs])
    assert ours.means() == {"x": 2.0, "z": 1.0, "y_max": 4.0}


# --------------------------------------------------------------------------------------------------
# ----------- faults


def newest(directory):
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))[-1]


def wait_for(path, process):
    """Until a checkpoint of a run is there."""
    for _ in range(10 * tiny_runs.PATIENCE):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    raise AssertionError(f"{path} has not come")


def children(process):
    """Process ids of a launcher's ranks."""
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def test_a_failing_rank_ends_the_job_with_its_reason(runs):
    directory, failed = runs.directory(), runs.folder / "failed"
    argv = ["broken", failed, *runs.argv(FLAGS, run_dir=directory, save_every=1)]
    output = torchrun(2, argv, rank_jobs.__file__, code=1)
    assert "rank 1" in output and "this rank was told to fail" in output
    assert newest(directory) == "step-000001"
    assert time.time() - failed.stat().st_mtime < 30


def test_a_rank_that_hangs_ends_the_job_in_bounded_time(runs, alone):
    """A stopped process neither answers nor dies: its peer gives up after --timeout, torchrun then
    kills it."""
    directory = runs.directory()
    argv = runs.argv(FLAGS, run_dir=directory, timeout=10, save_every=1, steps=10_000)
    process = launch(2, argv, options=["--shutdown-timeout", "3"])
    wait_for(directory / "checkpoints/step-000002/state.json", process)
    os.kill(children(process)[1], signal.SIGSTOP)
    started = time.monotonic()
    process.communicate(timeout=tiny_runs.PATIENCE)
    assert process.returncode == 1
    # torchrun gives what is left 30 seconds after the first rank's death, a constant of its own.
    assert time.monotonic() - started < 10 + 30 + 15
    train.main(["--run-dir", str(directory), "--resume", newest_path(directory), "--steps", "10"])
    # Nothing of the stopped steps is left over.
    assert [line["step"] for line in tiny_runs.metrics(directory)] == list(range(1, 11))


def newest_path(directory):
    return str(directory / "checkpoints" / newest(directory))


def test_sigterm_saves_once_and_exits_in_order(runs):
    directory = runs.directory()
    process = launch(2, runs.argv(FLAGS, run_dir=directory, save_every=0, steps=10_000))
    metrics = directory / "metrics.jsonl"
    wait_for(metrics, process)
    for pid in children(process):
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=tiny_runs.PATIENCE)
    assert process.returncode == 0, errors[-3000:]
    assert output.count("stopped by SIGTERM; saved") == 1 and "--resume latest" in output
    assert tiny_runs.ended(directory) == ("stopped", len(tiny_runs.metrics(directory)), "SIGTERM")
    assert newest(directory) == f"step-{len(tiny_runs.metrics(directory)):06d}"


def test_a_rank_ends_well_whatever_gloo_s_threads_still_hold(runs):
    """They waited for the lock of an interpreter that was ending, and aborted a job whose work was
    done."""
    argv = runs.argv(FLAGS, run_dir=runs.directory(), steps=1, eval_every=0)
    torchrun(2, ["ending", "-", *argv], rank_jobs.__file__)


def test_killed_ranks_that_torchrun_restarts_make_the_same_run(tmp_path):
    """Five kills; tests/kill_ranks.py --kills 50 is the long version."""
    found, done = kill_ranks.kill_and_compare(tmp_path, kills=5, seed=1)
    assert found is None and done.total() == 5


def test_evaluation_on_ranks_is_that_of_one(runs, tmp_path, capsys):
    argv = [
        "--model",
        str(runs.base["model"]),
        "--data",
        str(runs.base["data"]),
        "--k",
        "3",
        "--max-new-tokens",
        "6",
        "--dtype",
        "float64",
        "--device",
        "cpu",
        "--instruction",
        "",
        "--limit",
        "7",
        "--out",
    ]
    evaluation.main([*argv, str(tmp_path / "one")])
    output = torchrun(2, [*argv, tmp_path / "two"], evaluation.__file__)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    table = [line for line in capsys.readouterr().out.splitlines() if "@" in line]
    assert len(table) > 3 and all(line in output for line in table)
    wrong = [*argv[:3], "/no/such", *argv[4:], str(tmp_path / "no")]
    refused = forked(runs, 2, evaluation.main, wrong, code=2)
    assert refused.count("eval.py: ") == 1
