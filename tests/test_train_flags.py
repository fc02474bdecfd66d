"""Every flag of train.py does what it says, and every wrong use of one is refused before anything
is written.

A flag that is read and then not passed on makes an ablation that compares a run with itself; a new
flag without a row in the table below fails. Flags of speed and memory must change no number. Guards
against: refusals with a traceback, with another exit code, or with an empty run directory left
behind; flags of a resumed run that are silently others."""

import argparse
import dataclasses
import json
import shutil

import pytest
import tiny_runs
import torch

import reward
import sampler
import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        patch.setattr(train, "SAMPLES_EVERY", 1)
        yield tiny_runs.Runs(tmp_path_factory.mktemp("runs"))


def metric(name, step=-1):
    return lambda directory: tiny_runs.metrics(directory)[step][name]


def groups(field):
    return lambda directory: [line[field] for line in tiny_runs.lines(directory / "groups.jsonl")]


def evals(field):
    return lambda directory: [line[field] for line in tiny_runs.evaluations(directory)]


def entries(folder=""):
    return lambda directory: sorted(path.name for path in (directory / folder).glob("[!.]*"))


def weight(directory):
    return tiny_runs.weights(directory)["model.layers.0.mlp.up_proj.weight"].tolist()


def clipped(directory):
    return [
        line[f"clip_fraction_{term}"]
        for line in tiny_runs.metrics(directory)
        for term in ("local", "global")
    ]


def told(name):
    """What is typed for a flag stands in run.json: for those whose effect another test shows."""
    return lambda directory: json.loads((directory / "run.json").read_text())["flags"][name]


# flag -> (flags of the run to compare with, the flag's value, what must differ). The base run has
# two steps of two
# updates in float64, an evaluation and a checkpoint at every step.
# Several updates that move the policy, so that clips matter.
MANY = {"blend": "soft", "lr": 0.005, "prompts_per_step": 8, "group_size": 8}
FIELDS = {"problem_field": "problem", "answer_field": "answer"}
CHANGES = {
    "model": ({}, lambda runs: runs.other_model, weight),
    "dtype": ({}, "float32", metric("loss")),
    "system": ({}, "1+1", groups("answers")),
    "instruction": ({}, "=", groups("answers")),
    "stop": ({}, ["="], metric("length_mean", 0)),
    # tests/test_reports.py has templates that ask for these two
    "template_args": ({}, '{"enable_thinking": false}', told("template_args")),
    "date": ({}, "2025-03-04", told("date")),
    "data": ({}, lambda runs: runs.base["eval_data"], groups("answers")),
    "eval_data": ({}, None, lambda directory: (directory / "eval.jsonl").exists()),
    "problem_field": (FIELDS, "solution", groups("answers")),
    "answer_field": (FIELDS, "problem", groups("R")),
    "max_prompt_tokens": ({}, 7, groups("row")),
    "prompts_per_step": ({}, 6, metric("prompts_drawn")),
    "group_size": ({}, 3, lambda directory: len(groups("correct")(directory)[0])),
    "max_new_tokens": ({}, 4, metric("length_max")),
    "temperature": ({}, 0.5, metric("token_entropy", 0)),
    "max_rounds": ({"algo": "dapo", "group_size": 2}, 1, metric("sampling_rounds", 0)),
    "placebo": ({"group_size": 8}, True, groups("local_adv")),
    "reward": ({}, lambda runs: f"{train.HERE}/reward.py:grade", told("reward")),
    "verifier_timeout": ({}, 3.0, told("verifier_timeout")),
    "verifier_memory": ({}, 500, told("verifier_memory")),
    "algo": ({}, "grpo", groups("weight")),
    "blend": ({}, "zero-group", groups("weight")),
    "gamma": ({}, 9.0, groups("weight")),
    "rho": ({}, 0.3, groups("weight")),
    "advantage": ({}, "ngrpo", groups("local_adv")),
    "scale_advantages": ({}, False, groups("local_adv")),
    "global_coef": ({}, 0.1, metric("loss", 0)),
    "consistency_coef": ({}, True, groups("R")),
    "clip_low": (MANY, 0.01, clipped),
    "clip_high": (MANY, 0.01, clipped),
    "dual_clip": ({**MANY, "lr": 0.2}, 1.01, metric("loss", 0)),
    "ratio": (MANY, "sequence", clipped),
    "aggregation": ({}, "token-mean", metric("loss", 0)),
    "kl_coef": ({}, 0.5, metric("loss")),
    "kl_estimator": ({"kl_coef": 0.5}, "k2", metric("loss")),
    "dynamic_sampling": ({"algo": "grpo"}, True, metric("mixed", 0)),
    "overlong_factor": ({}, 0.5, metric("reward", 0)),
    "overlong_buffer": ({"overlong_factor": 0.5}, 4.0, metric("reward", 0)),
    "minibatch_prompts": ({}, 4, metric("updates")),
    "lr": ({}, 0.02, weight),
    "warmup_updates": ({}, 10, metric("lr")),
    "beta1": ({}, 0.5, weight),
    "beta2": ({}, 0.5, weight),
    "weight_decay": ({}, 0.5, weight),
    "max_grad_norm": ({}, 1e-9, weight),
    "sft_steps": ({}, 2, weight),
    "sft_batch": ({"sft_steps": 2}, 5, weight),
    "sft_lr": ({"sft_steps": 2}, 1e-2, weight),
    "steps": ({}, 3, lambda directory: len(tiny_runs.metrics(directory))),
    "seed": ({}, 1, groups("row")),
    "run_dir": ({}, lambda runs: runs.folder / "elsewhere", lambda directory: directory.name),
    "resume": ({}, None, None),  # tests/test_train_resume.py
    "eval_every": ({}, 0, evals("step")),
    "eval_samples": ({}, 3, evals("k")),
    "eval_problems": ({}, 3, lambda directory: len(evals("per_problem")(directory)[0])),
    "eval_temperature": ({}, 0.0, evals("length_mean")),
    "save_every": ({}, 0, entries("checkpoints")),
    "keep": ({}, 1, entries("checkpoints")),
    "export_every": ({}, 1, entries()),
    "export_dtype": (
        {},
        "bfloat16",
        lambda directory: json.loads((directory / "model/config.json").read_text()),
    ),
}
# flag -> (value, what says that it was obeyed); everything else must be the same.
SAME_NUMBERS = {
    "micro_tokens": (30, "rows of a forward pass"),
    "rollout_batch": (3, "rows in flight"),
    "verifier_workers": (2, "workers of the pool"),
    "device": ("auto", "device of the weights"),
    "activation_checkpointing": (True, "runs of a layer"),
    "cpu_offload": (True, "place of the masters"),
    "old_logprobs": ("recompute", "calls of compute_logprobs"),
    "compile": ("eager", "backend of the layers"),
    "defer_gradient_sync": (True, "exchanges of an update"),  # test_train_ranks.py
    "float32_matmul_precision": ("high", "what torch was told"),
    "timeout": (5.0, "time-out of the process group"),
    "plan": (8, "what is printed instead of a run"),
    # tests/test_reports.py
    "track": (None, "what a tracker is told"),
    "plot": (None, "a picture"),
}


def test_every_flag_has_a_row():
    flags = set(vars(train.build_parser().parse_args([])))
    assert flags == set(CHANGES) | set(SAME_NUMBERS)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "resume"])
def test_flag_changes_what_it_says(runs, name):
    with_these, value, look = CHANGES[name]
    if name == "model":
        runs.other_model = shutil.copytree(
            runs.base["model"], runs.folder / "other_model", dirs_exist_ok=True
        )
        network = train.Transformer.from_pretrained(runs.base["model"])
        with torch.no_grad():
            network.model.norm.weight.mul_(1.1)
        network.save_pretrained(runs.folder / "other")
        runs.other_model = runs.folder / "other"
    value = value(runs) if callable(value) else value
    base = runs.shared(**with_these)
    if name == "eval_data":  # without it, the flags of evaluation may not be given either
        with_these = {**with_these, "eval_every": None, "eval_samples": None}
    assert look(runs.new(**{**with_these, name: value})) != look(base)


@pytest.mark.parametrize("name", ["micro_tokens", "rollout_batch"])
def test_flag_of_speed_changes_no_number(runs, name, monkeypatch):
    sizes, forward = {"micro_tokens": [], "rollout_batch": []}, train.Transformer.forward

    def watched(network, ids, *rest, attention=None, packing=None, **more):
        sizes["rollout_batch"] += [len(ids)] if attention is not None and ids.shape[1] == 1 else []
        sizes["micro_tokens"] += (
            [ids.numel()] if packing is not None and len(packing[0]) > 1 else []
        )
        return forward(network, ids, *rest, attention=attention, packing=packing, **more)

    monkeypatch.setattr(train.Transformer, "forward", watched)
    warm = {"sft_steps": 2, "sft_batch": 6, "sft_lr": 1e-2}
    base, (value, _) = runs.new(**warm), SAME_NUMBERS[name]
    before = max(sizes[name])
    sizes[name].clear()
    other = runs.new(**warm, **{name: value})
    assert 0 < max(sizes[name]) <= value < before
    assert groups("answers")(other) == groups("answers")(base)
    for ours, theirs in zip(tiny_runs.metrics(other), tiny_runs.metrics(base)):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert tiny_runs.evaluations(other) == tiny_runs.evaluations(base)


def test_verifier_flags_reach_the_pool_and_change_no_number(runs, monkeypatch):
    """With the real pool of processes, which must agree with the checker in this process."""
    made = []

    class Pool(reward.Verifier):
        def __init__(self, workers, timeout, memory_mb, reward):
            made.append((workers, timeout, memory_mb, reward))
            super().__init__(workers, timeout, memory_mb, reward)

    monkeypatch.setattr(train, "Verifier", Pool)
    other = runs.new(verifier_workers=2, verifier_timeout=20.0, verifier_memory=900)
    assert made == [(2, 20.0, 900, None)]
    assert tiny_runs.metrics(other) == tiny_runs.metrics(runs.shared())
    assert tiny_runs.same_weights(other, runs.shared())


def test_activation_checkpointing_runs_each_layer_again_and_changes_no_number(runs, monkeypatch):
    calls, inner = [], train.Transformer.packed_logprobs

    def packed_logprobs(network, *rest, **more):
        before = len(calls)
        result = inner(network, *rest, **more)
        recomputing.append(len(calls) - before if torch.is_grad_enabled() else 0)
        return result

    block = type(train.Transformer.from_pretrained(runs.base["model"]).model.layers[0])
    compute, recomputing = block.compute, []
    monkeypatch.setattr(
        block, "compute", lambda self, *rest: (calls.append(1), compute(self, *rest))[1]
    )
    monkeypatch.setattr(train.Transformer, "packed_logprobs", packed_logprobs)
    base = runs.new()
    once = len(calls)
    calls.clear()
    other = runs.new(activation_checkpointing=True)
    in_updates = sum(recomputing) // 2  # of either run
    assert in_updates > 0 and len(calls) == once + in_updates
    assert tiny_runs.difference(other, base) is None


def test_offloaded_masters_change_no_number(runs, monkeypatch):
    places, inner = [], train.sync_weights

    def sync(run):
        places.extend(type(p).__name__ for p in run.model.parameters())
        inner(run)

    monkeypatch.setattr(train, "sync_weights", sync)
    other = runs.new(cpu_offload=True)
    assert set(places) == {"DTensor"}
    for ours, theirs in zip(
        tiny_runs.metrics(other), tiny_runs.metrics(runs.shared()), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_copy_that_samples_is_gone_in_updates_and_new_for_every_rollout(
    runs, monkeypatch, dtype
):
    """Its memory is what an update may need. Without a copy the weights stay, of course."""
    sizes, synced = [], []
    update, sample = train.update_policy, train.generate_rollout

    def watched(run, *rest):
        sizes.append(sum(p.numel() for p in run.sampler.parameters()))
        return update(run, *rest)

    def sampling(network, *rest, **more):
        synced.append({name: p.clone() for name, p in network.named_parameters()})
        return sample(network, *rest, **more)

    monkeypatch.setattr(train, "update_policy", watched)
    monkeypatch.setattr(train, "generate_rollout", sampling)
    directory = runs.new(dtype=dtype, steps=3, export_every=1, eval_every=0)
    rollouts = synced[1:-1]  # between the first and the last evaluation
    assert len(sizes) == 3 == len(rollouts) and (sum(sizes) == 0) == (dtype == "bfloat16")
    for step in (1, 2):
        path = directory / f"model-{step:06d}"
        export = train.Transformer.from_pretrained(path, dtype=getattr(torch, dtype))
        for name, weight in export.named_parameters():
            assert torch.allclose(rollouts[step][name], weight, rtol=1e-6, atol=0)


def test_old_logprobs_come_from_where_the_flag_says(runs, monkeypatch):
    """In float64 both are the same numbers; in bfloat16 they are not, and another forward pass is
    the default."""
    calls, inner = [], train.compute_logprobs
    monkeypatch.setattr(train, "compute_logprobs", lambda *rest: (calls.append(1), inner(*rest))[1])
    sampled = runs.new()
    assert not calls
    again = runs.new(old_logprobs="recompute")
    assert len(calls) == 2  # steps
    for ours, theirs in zip(tiny_runs.metrics(sampled), tiny_runs.metrics(again), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    recomputed, narrow = (
        runs.new(dtype="bfloat16"),
        runs.new(dtype="bfloat16", old_logprobs="sampler"),
    )
    assert len(calls) == 4
    assert tiny_runs.metrics(recomputed)[0]["ratio"] != tiny_runs.metrics(narrow)[0]["ratio"]


def test_compiled_layers_change_no_number(runs, monkeypatch):
    seen, inner = [], torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *rest, **more: (seen.append(more["backend"]), inner(*rest, **more))[1],
    )
    passes = []
    block = train.Transformer.forward

    def watched(model, *args, packing=None, **more):
        passes.append((packing is not None, torch.is_grad_enabled()))
        return block(model, *args, packing=packing, **more)

    monkeypatch.setattr(train.Transformer, "forward", watched)
    other = runs.new(compile="eager")
    assert seen == ["eager", "eager"]  # layers
    # Only packed passes run compiled layers, and those that sample are not packed.
    assert {packed for packed, with_gradient in passes if with_gradient} == {True}
    assert (False, False) in passes
    for ours, theirs in zip(
        tiny_runs.metrics(other), tiny_runs.metrics(runs.shared()), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_sampling_never_runs_a_compiled_layer():
    from model import Block, Config

    block = Block(Config.parse(tiny_runs.CONFIG | {"vocab_size": 14}))
    block.compute = lambda *_: "as it is"
    block.compiled = lambda *_: "compiled"
    assert block(None, None, None, None, None) == "as it is"
    assert block(None, None, None, None, ("pad_index", "unpad_index")) == "compiled"


def test_matmul_precision_is_what_the_flag_says(runs, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    runs.new(float32_matmul_precision="high", steps=0)
    runs.new(steps=0)
    assert said == ["high", "highest"]


def test_rows_in_flight_on_a_gpu_follow_from_the_plan(runs, monkeypatch):
    """--rollout-batch 0: all rows where they fit into 0.9 of the device, else the halves that do,
    whatever is free."""
    config = train.Config.parse(QWEN_7B)
    argv = ["--model", "x", "--data", "y", "--rollout-batch", "0", "--plan", "1"]
    args = train.parse_args([*argv, "--prompts-per-step", "64", "--minibatch-prompts", "64"])
    args.device, args.cpu_offload, chosen = "cuda", True, []
    for rows in (384, 192, 96):
        args.rollout_batch = rows
        needed = train.memory_plan(config, args, 1)["rollout"]
        for free in (0.0, 2**20):
            monkeypatch.setattr(
                train, "device_memory", lambda _, size=needed, free=free: (size / 0.899, free)
            )
            args.rollout_batch = 0
            train.choose_rollout_batch(config, args)
            chosen.append(args.rollout_batch)
    assert chosen == [384, 384, 192, 192, 96, 96]


def test_an_evaluation_has_no_more_rows_in_flight_than_the_plan_counts(runs, monkeypatch):
    made = []
    cache = sampler.KVCache

    def watched(config, rows, *rest):
        made.append(rows)
        return cache(config, rows, *rest)

    monkeypatch.setattr(sampler, "KVCache", watched)
    sizes = {"prompts_per_step": 2, "minibatch_prompts": 2, "group_size": 2, "rollout_batch": 16}
    directory = runs.new(eval_samples=16, steps=1, **sizes)
    flags = json.loads((directory / "run.json").read_text())["flags"]
    args = argparse.Namespace(**flags)
    assert train.rows_in_flight(args, 1) == 16
    args.eval_data = None
    assert train.rows_in_flight(args, 1) == 4
    assert max(made) == 16


def test_timeout_is_that_of_the_process_group(runs, monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "rendezvous", lambda *_, timeout: iter([(None, 0, 2)]))
    monkeypatch.setattr(
        train.dist, "init_process_group", lambda *_, timeout, **__: seen.append(timeout.seconds)
    )
    train.init_distributed(
        "cpu", train.parse_args(runs.argv(timeout=5.0, run_dir=runs.directory())).timeout
    )
    assert seen == [5.0]


# A grader that pays for more than the verdict, and looks at the problem.
GRADER = """
def grade(response, reference, *, problem="", require_value=False, in_thought=False):
    correct = response.startswith(reference)
    return response or None, correct, 0.5 * correct - 0.125 * problem.count("+")

def picky(response, reference, **rest):
    if "1" in response:
        raise ValueError("this one dislikes 1")
    return grade(response, reference, **rest)
"""


@pytest.fixture
def grader(runs, monkeypatch):
    """A file of graders, run by the real workers."""
    monkeypatch.setattr(train, "Verifier", reward.Verifier)
    path = runs.folder / "grader.py"
    path.write_text(GRADER)
    return path


def test_a_reward_of_ones_own_trains(runs, grader):
    """Rewards are the function's numbers, verdicts its bools: A^l takes the one, R the other."""
    directory = runs.new(reward=f"{grader}:grade", group_size=8)
    assert told("reward")(directory) == f"{grader}:grade"
    problems = [line["problem"] for line in tiny_runs.lines(runs.base["data"])]
    found = tiny_runs.lines(directory / "groups.jsonl")
    for group in found:
        pluses = problems[group["row"]].count("+")
        rewards = torch.tensor([0.5 * right - 0.125 * pluses for right in group["correct"]])
        assert group["reward"] == pytest.approx(rewards.tolist())
        assert group["R"] == pytest.approx(sum(group["correct"]) / 8)
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        assert group["local_adv"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert any(0 < sum(group["correct"]) < 8 for group in found), "choose another seed"
    for step, line in enumerate(tiny_runs.metrics(directory), start=1):
        mine = [group for group in found if group["step"] == step]
        paid = [value for group in mine for value in group["reward"]]
        assert line["reward"] == pytest.approx(sum(paid) / len(paid))
        assert line["accuracy"] == pytest.approx(sum(sum(g["correct"]) for g in mine) / len(paid))
        assert line["verifier_timeouts"] == line["verifier_exceptions"] == 0


def test_a_reward_that_fails_is_counted_as_an_exception(runs, grader, capfd):
    line = tiny_runs.metrics(runs.new(reward=f"{grader}:picky", steps=1))[0]
    assert line["verifier_exceptions"] > 0 and line["verifier_timeouts"] == 0
    assert "this one dislikes 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name, word",
    [("/no/such.py:grade", "/no/such.py"), (":other", "other"), ("", "FILE.py:FUNCTION")],
)
def test_a_reward_that_cannot_be_loaded_is_refused(runs, grader, capsys, name, word):
    directory = runs.directory()
    name = name if name.startswith("/") else f"{grader}{name}"
    with pytest.raises(SystemExit) as end:
        train.main(runs.argv(run_dir=directory, reward=name))
    message = capsys.readouterr().err
    assert end.value.code == 2 and not directory.exists()
    assert message.count("\n") == 1 and message.startswith("train.py: ") and word in message


def test_what_joins_the_tables_of_copo_is_a_flag_and_trains(runs, monkeypatch):
    """A blend, an advantage and a KL estimator of someone else, without a change to train.py."""

    def wrong_response(correct):
        return ~correct

    def signs(rewards, correct, scale):
        return 2.0 * correct.double() - 1

    def k1(distance):
        return -distance

    new = {"blend": "wrong", "advantage": "signs", "kl_estimator": "k1"}
    for name, value in new.items():  # unknown so far
        with pytest.raises(ValueError, match=value):
            train.parse_args(runs.argv({name: value, "kl_coef": 0.5, "run_dir": "none"}))
    blend = train.copo.Blend(uses_entropy=False, gate=wrong_response)
    monkeypatch.setitem(train.copo.BLENDS, "wrong", blend)
    monkeypatch.setitem(train.copo.ADVANTAGES, "signs", signs)
    monkeypatch.setitem(train.copo.KL_ESTIMATORS, "k1", k1)
    base = runs.new(steps=1, kl_coef=0.5)
    for name, value in new.items():
        directory = runs.new(steps=1, kl_coef=0.5, **{name: value})
        assert told(name)(directory) == value
        assert not tiny_runs.same_weights(directory, base)
        for group in tiny_runs.lines(directory / "groups.jsonl"):
            if name == "blend":
                assert group["weight"] == [1 - right for right in group["correct"]]
            if name == "advantage":
                assert group["local_adv"] == [2 * right - 1 for right in group["correct"]]
        if name == "kl_estimator":
            kl = metric("kl", 0)
            assert kl(directory) != pytest.approx(kl(base), rel=1e-3)
    with pytest.raises(ValueError, match="--gamma has no effect: --blend wrong"):
        train.parse_args(runs.argv(blend="wrong", gamma=2, run_dir="none"))


# Qwen2.5-7B's config.json: 7.62 billion parameters.
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def test_plan_counts_by_hand(tmp_path, capsys):
    """7,615,616,512 parameters on 8 ranks: 28.37 GiB of float32, of which each holds an eighth."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    train.main(["--model", str(tmp_path), "--plan", "8", "--dtype", "bfloat16"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert "each of 8 ranks" in head
    plan = {name: float(size) for name, size in (line.rsplit(maxsplit=1) for line in lines)}
    assert (plan["masters"], plan["gradients"], plan["optimiser"]) == (3.55, 3.55, 7.09)
    assert plan["sampler"] == 14.19  # two bytes each, whole on every rank
    # 256 rows of 3,072 tokens; 28 layers of 4 key and 4 value heads of 128 numbers of two bytes
    assert plan["kv cache"] == round(256 * 3072 * 28 * 8 * 128 * 2 / 2**30, 2)
    # An update has gradients and no copy that samples, a rollout the copy and no gradients.
    assert plan["exact"] == pytest.approx(3.55 + 7.09 + 14.19, abs=0.02)
    assert plan["total"] > plan["exact"]
    # the mask of bfloat16, and 16 bytes for each id of a row's logits
    assert plan["decoding"] == round(256 * (3072 * 2 + 16 * 152064) / 2**30, 2)
    assert plan["logits"] == round(3 * 4 * train.CHUNK_LOGITS["cuda"] / 2**30, 2)
    # which one process would refuse
    train.main(["--model", str(tmp_path), "--plan", "2", "--defer-gradient-sync"])
    assert "each of 2 ranks" in capsys.readouterr().out
    alone = train.memory_plan(
        train.Config.parse(QWEN_7B),
        train.parse_args(
            [
                "--model",
                str(tmp_path),
                "--plan",
                "1",
                "--dtype",
                "bfloat16",
                "--cpu-offload",
            ]
        ),
        1,
    )
    assert alone["masters"] == alone["optimiser"] == 0


def test_weights_beyond_the_device_are_refused(runs, monkeypatch, capsys):
    """What is counted exactly: 4 bytes each of weights and gradients, 8 of the optimiser."""
    directory = runs.directory()
    argv = runs.argv(run_dir=directory, dtype="float32")
    network = train.Transformer.from_pretrained(runs.base["model"])
    needed = 16 * sum(p.numel() for p in network.parameters()) / 2**30
    monkeypatch.setattr(train, "device_memory", lambda _: (0.99 * needed, 2**30))
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and not directory.exists()
    assert "weights, gradients and optimiser need" in message and "--plan 1" in message
    monkeypatch.setattr(train, "device_memory", lambda _: (1.01 * needed, 2**30))
    train.main(argv)
    assert "WARNING" not in capsys.readouterr().out


def test_estimates_beyond_what_is_free_are_a_warning(runs, capsys):
    runs.new(micro_tokens=10**12)
    warning = capsys.readouterr().out.splitlines()[0]
    assert warning.startswith("WARNING a rank may need") and "GiB at its fullest" in warning
    there, free = train.device_memory("cpu")
    assert 0.1 < free <= there < 2**20


def test_device_auto_is_named(runs):
    flags = json.loads((runs.new(device="auto", dtype="float32") / "run.json").read_text())["flags"]
    assert flags["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_presets_and_sizes_lie_below_what_is_typed(runs):
    args = train.parse_args(["--algo", "grpo", "--blend", "soft", "--gamma", "20"])
    assert (args.blend, args.gamma, args.rho, args.group_size) == (
        "soft",
        20.0,
        1.0,
        train.DEMO_SIZES["group_size"],
    )
    args = train.parse_args(
        ["--model", "x", "--data", "y", "--algo", "dapo", "--no-dynamic-sampling"]
    )
    assert (args.group_size, args.lr, args.clip_high, args.dynamic_sampling) == (
        6,
        1e-6,
        0.28,
        False,
    )
    for name, preset in train.copo.PRESETS.items():
        args = vars(train.parse_args(["--algo", name]))
        assert dataclasses.asdict(preset).items() <= args.items()


REFUSALS = {
    "no such compiler": ({"compile": "gcc"}, "--compile: invalid choice: 'gcc'"),
    "an unknown estimator": ({"kl_coef": 0.1, "kl_estimator": "k4"}, "k4"),
    "estimator without KL": ({"kl_estimator": "k2"}, "--kl-estimator has no effect"),
    "a clip without a second update": (
        {"clip_high": 0.3, "prompts_per_step": 4, "minibatch_prompts": 4},
        "--clip-high has no effect: in the one update of a step q is 1",
    ),
    "a ratio without a second update": (
        {"ratio": "sequence", "prompts_per_step": 4, "minibatch_prompts": 4},
        "--ratio has no effect",
    ),
    "nothing to defer": (
        {"defer_gradient_sync": True},
        "--defer-gradient-sync has no effect",
    ),
    "an unknown flag": ({"run_dir": "RUN", "colour": 3}, "--colour"),
    "an unknown blend": ({"blend": "softest"}, "softest"),
    "an unknown preset": ({"algo": "ppo"}, "ppo"),
    "no number": ({"lr": "fast"}, "fast"),
    "no model there": ({"model": "/no/such/model"}, "/no/such/model"),
    "no data": ({"data": None}, "--data"),
    "an empty model": ({"model": ""}, "--model is empty"),
    "no such data": ({"data": "/no/such.jsonl"}, "/no/such.jsonl"),
    "malformed data": ({"data": "BAD"}, ":2:"),
    "half of two names": ({"problem_field": "problem"}, "belong together"),
    "no such field": (
        {"problem_field": "problem", "answer_field": "gold"},
        ':1: the field "gold" is missing',
    ),
    "parquet that is none": ({"data": "no.parquet"}, "no.parquet"),
    "no such place": ({"eval_data": "hf://datasets/x.jsonl"}, "hf://datasets/OWNER/NAME/FILE"),
    "no usable held-out problem": ({"eval_data": "LONG"}, "no usable"),
    "fewer problems than P": ({"prompts_per_step": 32, "minibatch_prompts": 32}, "24 usable"),
    "G below 2": ({"group_size": 1}, "--group-size"),
    "P below 2": ({"prompts_per_step": 1, "minibatch_prompts": 1}, "--prompts-per-step"),
    "minibatch does not divide": ({"minibatch_prompts": 3}, "does not divide"),
    "buffer above the limit": ({"overlong_factor": 1, "overlong_buffer": 7}, "--max-new-tokens 6"),
    "buffer of nothing": ({"overlong_factor": 1, "overlong_buffer": 0}, "--overlong-buffer"),
    "beyond the positions": ({"max_new_tokens": 60}, "64 positions"),
    "dynamic sampling with a global term": ({"dynamic_sampling": True}, "--blend local"),
    "dual clip below 1": ({"dual_clip": 0.5}, "--dual-clip"),
    "clip low above 1": ({"clip_low": 1.5}, "--clip-low"),
    "gamma without soft": ({"blend": "zero", "gamma": 2}, "--gamma has no effect"),
    "rho without soft": ({"algo": "grpo", "rho": 2}, "--rho has no effect"),
    "global factor of grpo": ({"algo": "grpo", "global_coef": 0.1}, "--global-coef has no effect"),
    "consistency of grpo": (
        {"algo": "grpo", "consistency_coef": True},
        "--consistency-coef has no effect",
    ),
    "advantage without local": (
        {"blend": "global", "advantage": "batch"},
        "--advantage has no effect",
    ),
    "a penalty without local": (
        {"blend": "global", "overlong_factor": 1},
        "--overlong-factor has no effect: --blend global has no local term",
    ),
    "a sign with a penalty": ({"advantage": "sign", "overlong_factor": 1}, "--overlong-factor"),
    "a sign of dapo": ({"algo": "dapo", "advantage": "sign"}, "--overlong-factor must be 0"),
    "unscaled verdicts": (
        {"advantage": "w-reinforce", "scale_advantages": False},
        "use --scale-advantages",
    ),
    "a placebo for dapo": ({"algo": "dapo", "placebo": True}, "--placebo"),
    "an unknown ratio": ({"ratio": "word"}, "word"),
    "buffer without factor": ({"overlong_buffer": 2}, "--overlong-buffer has no effect"),
    "rounds without dynamic": ({"max_rounds": 2}, "--max-rounds has no effect"),
    "sft rate without steps": ({"sft_lr": 0.1}, "--sft-lr has no effect"),
    "sft batch without steps": ({"sft_batch": 4}, "--sft-batch has no effect"),
    "evaluation without data": (
        {"eval_data": None, "eval_every": None},
        "--eval-samples has no effect",
    ),
    "no solutions": ({"sft_steps": 3, "data": "BARE"}, "no problem"),
    "solution beyond the positions": (
        {"sft_steps": 3, "data": "WORDY"},
        "WORDY:5: prompt and solution",
    ),
    "stop of two tokens": ({"stop": ["12"]}, "'12'"),
    "resume nothing": ({"resume": "latest", "run_dir": "RUN"}, "no run there"),
    "resume what": ({"resume": "latest", "run_dir": None}, "needs --run-dir"),
    "resume no checkpoint": ({"resume": "/no/such"}, "no checkpoint there"),
    "a directory in use": ({"run_dir": "USED"}, "in use"),
    "a directory that cannot be": ({"run_dir": "USED/file/run"}, "file"),
    "more tokens than embeddings": ({"model": "SMALL"}, "tokens"),
    "a wrong weight": ({"model": "TORN"}, "TORN"),
    "a family that is not known": ({"model": "ALIEN"}, "gpt2"),
} | {
    f"{train.flag(name)} {value}": ({name: value}, train.flag(name))
    for value, names in {
        -1: "steps sft_steps warmup_updates rollout_batch eval_every eval_problems save_every "
        "export_every seed gamma global_coef kl_coef overlong_factor weight_decay max_grad_norm "
        "eval_temperature dual_clip",
        0: "max_prompt_tokens max_new_tokens minibatch_prompts micro_tokens eval_samples keep "
        "verifier_workers temperature lr verifier_timeout clip_high clip_low",
        1: "beta1 beta2 verifier_memory",
        "nan": "lr temperature gamma rho kl_coef clip_low clip_high dual_clip beta1 weight_decay",
        "inf": "lr temperature gamma rho",
        10**30: "seed",
    }.items()
    for name in names.split()
}


@pytest.fixture(scope="module")
def places(runs):
    """Directories and files that refusals are about."""
    folder = runs.folder
    long = json.dumps({"problem": "1+" * 20 + "1=?", "answer": "21"})
    (folder / "LONG").write_text(long + "\n")
    good = (folder / "train.jsonl").read_text().splitlines()
    (folder / "BAD").write_text("\n".join([good[0], good[1][:20], *good[2:]]))
    (folder / "BARE").write_text("\n".join(line.split(', "solution"')[0] + "}" for line in good))
    wordy = json.loads(good[4]) | {"solution": "1+" * 40}
    (folder / "WORDY").write_text("\n".join([*good[:4], json.dumps(wordy), *good[5:]]))
    (folder / "USED").mkdir()
    (folder / "USED" / "file").write_text("")
    for name in ("SMALL", "TORN", "ALIEN"):
        shutil.copytree(folder / "model", folder / name)
    config = json.loads((folder / "model/config.json").read_text())
    network = train.Transformer.from_config(config | {"vocab_size": 9})
    network.save_pretrained(folder / "SMALL")
    (folder / "ALIEN/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    weights = (folder / "model/model.safetensors").read_bytes()
    (folder / "TORN/model.safetensors").write_bytes(weights[:2000])
    return {
        name: str(folder / name)
        for name in ("LONG", "BAD", "BARE", "WORDY", "USED", "SMALL", "TORN", "ALIEN")
    }


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_is_one_line_and_leaves_nothing(runs, places, name, capsys):
    flags, word = REFUSALS[name]
    for place, path in places.items():
        flags = {k: v.replace(place, path) if isinstance(v, str) else v for k, v in flags.items()}
        word = word.replace(place, path) if word.startswith(place) else word
    directory = runs.directory()
    argv = runs.argv({"run_dir": directory, **flags})
    argv = [str(directory) if word == "RUN" else word for word in argv]
    before = sorted(runs.folder.iterdir())
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.count("\n") == 1 and message.startswith("train.py: ") and word in message, (
        message
    )
    assert sorted(runs.folder.iterdir()) == before


def test_the_plan_of_a_directory_without_a_config_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--model", str(tmp_path), "--plan", "2"])
    assert end.value.code == 2 and capsys.readouterr().err.count("config.json") == 1


def test_the_plan_of_a_hub_model_asks_for_its_config_alone(tmp_path, monkeypatch, capsys):
    asked = []
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))

    def cached_file(model, name):
        asked.append((model, name))
        return str(tmp_path / name)

    monkeypatch.setattr(train, "cached_file", cached_file)
    train.main(["--model", "owner/name", "--plan", "2"])
    assert asked == [("owner/name", "config.json")]
    assert "each of 2 ranks, float32, owner/name" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_layer_compiles_whole(runs, dtype):
    """A break in the graph changes no number, so only a count shows it. bfloat16 is sharded."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    runs.new(dtype=dtype, compile="eager", steps=1)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_missing_cuda_is_refused(runs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.main(runs.argv(run_dir=runs.directory(), device="cuda"))
    assert "--device cuda" in capsys.readouterr().err
