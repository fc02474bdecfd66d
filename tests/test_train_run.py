"""What a whole run of train.py does with data, groups, faults and precision.

Guards against: metrics that say something else than groups.jsonl does, or that are NaN; data that
is drawn twice or never; dynamic sampling that keeps the wrong groups or forgets what it drew; a
warm start or an update that does not train the end token; a sampler that is not the policy; masters
or optimiser state in bf16; one bad update that ruins the weights; a run that cannot learn and does
not say so."""

import json
import math
import warnings

import numpy as np
import pytest
import tiny_runs
import torch

import copo
import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        patch.setattr(train, "SAMPLES_EVERY", 1)
        yield tiny_runs.Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def hopeless(runs):
    """Problems whose answer no reply can hold."""
    path = runs.folder / "hopeless.jsonl"
    path.write_text(
        "".join(json.dumps({"problem": f"{i}+1=?", "answer": "789"}) + "\n" for i in range(6))
    )
    return path


def watch(monkeypatch, module, name, results):
    """Keeps what each call of a function returned."""
    inner = getattr(module, name)

    def wrapped(*args, **kwargs):
        results.append(inner(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(module, name, wrapped)
    return results


# --------------------------------------------------------------------------------------------------
# ---------- metrics

STEP_METRICS = {
    "step",
    "reward",
    "accuracy",
    "loss",
    "grad_norm",
    "grad_norm_max",
    "all_wrong",
    "all_right",
    "mixed",
    "consistency_entropy",
    "local_weight",
    "local_share",
    "global_share",
    "zero_gradient_groups",
    "wrong_pushed_up",
    "right_pushed_down",
    "length_mean",
    "length_max",
    "finished",
    "no_answer",
    "lr",
    "ratio",
    "approx_kl",
    "clip_fraction_local",
    "clip_fraction_global",
    "clip_fraction_local_first",
    "clip_fraction_global_first",
    "clip_fraction_local_last",
    "clip_fraction_global_last",
    "token_entropy",
    "sampler_difference",
    "sampler_difference_max",
    "updates",
    "skipped_updates",
    "skipped_steps",
    "cursor",
    "tokens",
    "responses",
    "sampling_rounds",
    "prompts_drawn",
    "prompts_trained",
    "accuracy_drawn",
    "equal_groups_drawn",
    "tokens_sampled",
    "prompt_tokens",
    "verifier_timeouts",
    "verifier_exceptions",
    "seconds",
    "peak_memory_gib",
    "seconds_other",
    *(
        f"seconds_{phase}"
        for phase in (
            "prefill",
            "decode",
            "verify",
            "forward",
            "backward",
            "optimizer",
            "evaluate",
            "save",
        )
    ),
    *(
        f"tokens_per_second_{phase}"
        for phase in ("prefill", "decode", "verify", "forward", "backward")
    ),
}


def test_every_metric_is_there_and_a_number(runs):
    for line in tiny_runs.lines(runs.shared() / "metrics.jsonl"):
        assert line.keys() == STEP_METRICS
        assert all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in line.values()
        )
        assert sum(line[k] for k in line if k.startswith("seconds_")) == pytest.approx(
            line["seconds"]
        )
        assert min(line[k] for k in line if k.startswith("seconds_")) >= 0
        assert line["tokens_per_second_decode"] == pytest.approx(
            line["tokens_sampled"] / line["seconds_decode"]
        )


def test_a_phase_within_another_counts_once(monkeypatch):
    # made; decode, prefill, its end, decode's end; report twice
    times = iter([0, 10, 12, 15, 19, 30, 31])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    clock = train.Clock("cpu")
    with clock("decode"), clock("prefill"):
        pass
    assert clock.report() == {
        "seconds": 30,
        "seconds_prefill": 3,
        "seconds_decode": 6,
        "seconds_other": 21,
    }
    assert clock.report() == {"seconds": 1, "seconds_other": 1}


def test_metrics_are_those_of_the_groups(runs):
    """Every figure that groups.jsonl determines, recomputed from it with plain sums, and its own w
    and A too."""
    directory = runs.shared(group_size=6, prompts_per_step=8, overlong_factor=0.5)
    groups, steps = tiny_runs.lines(directory / "groups.jsonl"), tiny_runs.metrics(directory)
    for line in steps:
        mine = [group for group in groups if group["step"] == line["step"]]
        right = np.array([group["correct"] for group in mine])
        reward, length = (
            np.array([g["reward"] for g in mine]),
            np.array([g["length"] for g in mine]),
        )
        entropy = [
            -sum(p * math.log2(p) for p in (g["class"].count(c) / 6 for c in set(g["class"])))
            for g in mine
        ]
        weight = np.array(
            [[v / (1 + math.exp(-5 * (h - 1))) for v in row] for h, row in zip(entropy, right)]
        )
        prompt = right.mean(1)
        effective = weight * np.array([g["local_adv"] for g in mine])
        effective += (1 - weight) * ((prompt - prompt.mean()) / (prompt.std(ddof=1) + 1e-6))[
            :, None
        ]
        local = (reward - reward.mean(1, keepdims=True)) / (
            reward.std(1, ddof=1, keepdims=True) + 1e-6
        )
        expected = {
            "reward": reward.mean(),
            "accuracy": right.mean(),
            "all_wrong": (right.sum(1) == 0).mean(),
            "all_right": (right.sum(1) == 6).mean(),
            "mixed": ((right.sum(1) > 0) & (right.sum(1) < 6)).mean(),
            "consistency_entropy": np.mean(entropy),
            "local_weight": weight.mean(),
            "length_mean": length.mean(),
            "length_max": length.max(),
            "finished": np.mean([g["finished"] for g in mine]),
            "no_answer": np.mean([[c == -1 for c in g["class"]] for g in mine]),
            "wrong_pushed_up": (effective[right == 0] > 0).mean(),
            "right_pushed_down": (effective[right == 1] < 0).mean(),
            "equal_groups_drawn": 1 - ((right.sum(1) > 0) & (right.sum(1) < 6)).mean(),
            "tokens_sampled": length.sum(),
        }
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=2e-6)
        assert [g["H"] for g in mine] == pytest.approx(entropy, abs=1e-5)
        assert np.array([g["local_adv"] for g in mine]) == pytest.approx(local, abs=1e-4)
        assert [g["R"] for g in mine] == pytest.approx(prompt, abs=1e-5)
        assert line["local_share"] + line["global_share"] == 1
        for group in mine:
            assert set(group["answers"]) == {str(c) for c in group["class"]}
    assert steps[-1]["tokens"] == sum(line["tokens_sampled"] for line in steps)
    assert steps[-1]["responses"] == 96 and steps[-1]["cursor"] == 16


def test_a_placebo_trains_on_the_steps_rewards_dealt_at_random(runs):
    """What trained is "correct" with its reward, the truth is "verdict": the same as without, in
    the first step, as is everything that no reward touches. Accuracy is the truth's."""
    flags = {"group_size": 8, "prompts_per_step": 8, "overlong_factor": 0.5}
    plain, placebo = runs.shared(**flags), runs.shared(**flags, placebo=True)
    groups = tiny_runs.lines(placebo / "groups.jsonl")
    moved = 0
    for line in tiny_runs.metrics(placebo):
        mine = [group for group in groups if group["step"] == line["step"]]
        truth = torch.tensor([group["verdict"] for group in mine])
        trained = torch.tensor([group["correct"] for group in mine])
        dealt, _ = copo.permute_rewards(truth, truth.bool(), 0, line["step"] - 1)
        assert torch.equal(trained, dealt)
        assert line["accuracy"] == line["accuracy_drawn"] == pytest.approx(truth.double().mean())
        # The penalty on length stays with the response that is long.
        lengths = torch.tensor([group["length"] for group in mine])
        penalty = copo.overlong_penalty(lengths, 6, 0.2, 0.5)
        rewards = torch.tensor([group["reward"] for group in mine], dtype=torch.float64)
        torch.testing.assert_close(rewards, dealt + penalty, atol=1e-6, rtol=0)
        result = copo.compute_advantages(
            rewards,
            dealt.bool(),
            torch.tensor([g["class"] for g in mine]),
            None,
            copo.Algorithm(),
            6,
        )
        for name in ("local_adv", "weight"):
            saved = torch.tensor([group[name] for group in mine], dtype=torch.float64)
            torch.testing.assert_close(saved, getattr(result, name), atol=1e-5, rtol=0)
        moved += int((trained != truth).sum())
    assert moved > 0, "choose another seed"
    untouched = ("row", "class", "length", "finished", "answers", "H")
    for ours, theirs in zip(groups, tiny_runs.lines(plain / "groups.jsonl")):
        if ours["step"] == 1:
            assert ours["verdict"] == theirs["correct"] and "verdict" not in theirs
            assert [ours[name] for name in untouched] == [theirs[name] for name in untouched]
    sampled = (placebo / "samples.txt").read_text().split("step 2")[0]
    of_plain = (plain / "samples.txt").read_text().split("step 2")[0]
    for word in ("right", "wrong"):  # the truth, too
        assert sampled.count(f"    {word}  A") == of_plain.count(f"    {word}  A")


def test_run_json_says_what_was_run(runs):
    record = json.loads((runs.shared() / "run.json").read_text())
    assert set(record["flags"]) == set(vars(train.build_parser().parse_args([])))
    assert record["flags"]["blend"] == "soft-zero" and record["flags"]["group_size"] == 4
    assert record["ended"] == {"how": "finished", "step": 2, "why": ""}
    assert record["format"] == 2
    assert record["versions"]["torch"] == torch.__version__ and record["parameters"] > 1000


def test_evaluations_are_per_problem_and_on_the_same_noise(runs):
    """With a rate that moves nothing, every evaluation is the first one again."""
    found = tiny_runs.evaluations(
        runs.shared(lr=1e-30, weight_decay=0.0, eval_samples=8, eval_data=runs.base["data"])
    )
    assert [line["step"] for line in found] == [0, 1, 2]
    for line in found:
        assert {k: v for k, v in line.items() if k not in ("step", "tokens", "responses")} == {
            k: v for k, v in found[0].items() if k not in ("step", "tokens", "responses")
        }
        assert line["mean"] == pytest.approx(np.mean(line["per_problem"])) and line["mean"] > 0
        assert len(line["per_problem"]) == 24 and line["k"] == 8


# --------------------------------------------------------------------------------------------------
# ------------- data


def test_each_epoch_is_a_permutation_and_leftovers_carry_over():
    size, drawn = 7, []
    for cursor in range(0, 35, 5):
        drawn += train.draw_prompts(3, cursor, 5, size)
    epochs = [[i for i, _ in drawn[k : k + size]] for k in range(0, 35, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [i for i, _ in train.draw_prompts(3, 0, 35, size)] == [
        i for epoch in epochs for i in epoch
    ]
    assert len({key for _, key in drawn}) == 35 and all(key % size == i for i, key in drawn)
    assert train.draw_prompts(4, 0, 35, size) != train.draw_prompts(3, 0, 35, size)


def test_a_run_draws_its_prompts_in_that_order(runs):
    # 40 of 24: into a 2nd epoch
    directory = runs.shared(prompts_per_step=10, steps=4, eval_every=0)
    rows = [line["row"] for line in tiny_runs.lines(directory / "groups.jsonl")]
    assert rows == [i for i, _ in train.draw_prompts(0, 0, 40, 24)]
    assert sorted(rows[:24]) == list(range(24))


def test_references_that_no_response_can_earn_are_dropped(runs, capsys, monkeypatch):
    """From training, where they would only be all wrong; held out they stay, as the benchmark has
    them. A grader of one's own may earn them."""
    data, held_out = runs.folder / "unearnable.jsonl", runs.folder / "unearnable_test.jsonl"
    unequal = {"problem": "6+6=?", "answer": "(a) 0, (b) {", "solution": "0"}
    line = json.dumps(unequal) + "\n"
    data.write_text(line + (runs.folder / "train.jsonl").read_text())
    held_out.write_text(line.replace("6+6", "6+6+6") + (runs.folder / "test.jsonl").read_text())
    directory = runs.new(data=data, eval_data=held_out, steps=6, sft_steps=1)
    assert "data    1 dropped: no response can be correct" in capsys.readouterr().out
    rows = {line["row"] for line in tiny_runs.lines(directory / "groups.jsonl")}
    assert rows == set(range(1, 25))  # one epoch of what is left
    per_problem = tiny_runs.evaluations(directory)[0]["per_problem"]
    assert len(per_problem) == 5
    (runs.folder / "any.py").write_text("from reward import grade\n")
    runs.new(data=data, reward=f"{runs.folder / 'any.py'}:grade", steps=0)
    assert "1 dropped" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runs.new(data=data, prompts_per_step=25, minibatch_prompts=25)
    assert "has 24 usable problems" in capsys.readouterr().err


def test_what_is_dropped_and_what_overlaps_is_said(runs, capsys):
    lines = (runs.folder / "train.jsonl").read_text().splitlines()
    data, held_out = runs.folder / "dropped.jsonl", runs.folder / "overlap.jsonl"
    data.write_text("\n".join([json.dumps({"problem": "1+1=?", "answer": " "}), *lines]))
    held_out.write_text(
        "\n".join([lines[0].replace("0+0", " 0+0"), (runs.folder / "test.jsonl").read_text()])
    )
    directory = runs.new(data=data, eval_data=held_out, max_prompt_tokens=7, steps=1)
    said = capsys.readouterr().out
    short = [i for i, line in enumerate(lines) if json.loads(line)["problem"].count("+") == 1]
    assert (
        f"{len(short)} problems" in said
        and "18 dropped (prompt over 7 tokens)" in said
        and ", 1 dropped (" in said
    )
    assert "WARNING 1 of 2 held-out problems" in said
    rows = {line["row"] for line in tiny_runs.lines(directory / "groups.jsonl")}
    assert rows <= {i + 1 for i in short}  # lines of the file, the dropped ones counted


# --------------------------------------------------------------------------------------------------
# - dynamic sampling

DAPO = {"algo": "dapo", "steps": 3, "max_rounds": 3, "group_size": 6, "eval_every": 0}


@pytest.mark.parametrize("group_size, wanted", [(6, "fewer than P"), (16, "more than P")])
def test_dynamic_sampling_keeps_the_first_mixed_groups_in_data_order(
    runs, monkeypatch, group_size, wanted
):
    rounds, starts, inner = [], [], train.draw_prompts

    def draw(seed, cursor, count, size):
        starts.append(cursor)
        return inner(seed, cursor, count, size)

    monkeypatch.setattr(train, "draw_prompts", draw)
    watch(monkeypatch, train, "sample_groups", rounds)
    directory = runs.new(**DAPO | {"group_size": group_size})
    groups, cursor, kinds = tiny_runs.lines(directory / "groups.jsonl"), 0, set()
    for line in tiny_runs.metrics(directory):
        mine, rounds = rounds[: line["sampling_rounds"]], rounds[line["sampling_rounds"] :]
        drawn = []
        for rollout in mine:
            rows = [problem.row for problem in rollout.problems]
            drawn += zip(rows, rollout.correct.int().tolist())
        assert [i for i, _ in drawn] == [i for i, _ in inner(0, cursor, len(drawn), 24)]
        cursor += len(drawn)
        assert line["cursor"] == cursor and line["prompts_drawn"] == len(drawn)
        mixed = [(i, right) for i, right in drawn if 0 < sum(right) < group_size]
        kinds.add("fewer than P" if len(mixed) < 4 else "more than P" if len(mixed) > 4 else "P")
        mixed = mixed[:4]
        kept = [(g["row"], g["correct"]) for g in groups if g["step"] == line["step"]]
        assert kept == mixed and line["prompts_trained"] == len(mixed) and line["mixed"] == 1
        assert line["sampling_rounds"] == 3 or len(mixed) == 4
        assert (
            line["accuracy_drawn"]
            == pytest.approx(np.mean([right for _, right in drawn]))
            != line["accuracy"]
        )
        equal = [sum(right) in (0, group_size) for _, right in drawn]
        assert line["equal_groups_drawn"] == pytest.approx(np.mean(equal))
        assert line["tokens_sampled"] == sum(int(rollout.lengths.sum()) for rollout in mine)
    assert rounds == [] and wanted in kinds, "choose another seed"
    last = tiny_runs.metrics(directory)[-1]
    assert last["updates"] == sum(
        math.ceil(m["prompts_trained"] / 2) for m in tiny_runs.metrics(directory)
    )
    assert starts == list(range(0, cursor, 4))


def test_a_step_without_mixed_groups_is_skipped_and_counted(runs, hopeless, capsys):
    directory = runs.new(
        **DAPO | {"data": hopeless, "eval_data": None, "eval_samples": None, "eval_every": None}
    )
    for number, line in enumerate(tiny_runs.metrics(directory), start=1):
        assert (
            line["skipped_steps"] == number
            and line["cursor"] == 12 * number
            and line["updates"] == 0
        )
        assert line["loss"] is None and line["accuracy"] == 0
    assert "WARNING 3 steps in a row: no response has an advantage" in capsys.readouterr().out
    start = train.Transformer.from_pretrained(runs.base["model"], dtype=torch.float64).state_dict()
    assert all(
        torch.equal(start[name], value) for name, value in tiny_runs.weights(directory).items()
    )


# --------------------------------------------------------------------------------------------------
# ----------- faults


def test_a_bad_update_is_skipped_and_counted(runs, monkeypatch, capsys):
    calls, inner = [], copo.copo_loss

    def broken(*args, **kwargs):
        loss, metrics = inner(*args, **kwargs)
        calls.append(loss.detach())
        # a finite loss whose gradient is not; and before that, the other way round
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss + (math.inf if len(calls) == 2 else 0), metrics

    before, after, step = [], [], train.optimizer_step

    def watched(run, *rest):
        before.append([p.detach().clone() for p in run.model.parameters()])
        applied = step(run, *rest)
        after.append([p.detach().clone() for p in run.model.parameters()])
        return applied

    monkeypatch.setattr(copo, "copo_loss", broken)
    monkeypatch.setattr(train, "optimizer_step", watched)
    directory = runs.new()
    same = [all(map(torch.equal, one, other)) for one, other in zip(before, after)]
    assert same == [False, True, True, False]
    lines = tiny_runs.lines(directory / "metrics.jsonl")
    assert [line["skipped_updates"] for line in lines] == [1, 2] and lines[-1]["updates"] == 4
    assert "NaN" not in (directory / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count("WARNING update") == 2
    assert lines[0]["loss"] == pytest.approx(float(calls[0])) and lines[1]["loss"] == pytest.approx(
        float(calls[3])
    )
    assert lines[0]["clip_fraction_local_first"] == 0 and "clip_fraction_local_last" not in lines[0]


def test_many_bad_updates_in_a_row_end_the_run(runs, monkeypatch, capsys):
    inner = copo.copo_loss

    def broken(*args, **kwargs):
        loss, metrics = inner(*args, **kwargs)
        return loss * math.nan, metrics

    monkeypatch.setattr(copo, "copo_loss", broken)
    monkeypatch.setattr(train, "MAX_BAD_UPDATES", 3)
    with pytest.raises(SystemExit) as end:
        runs.new(steps=5)
    # a message means exit code 1
    assert "3 updates in a row" in end.value.code and "\n" not in end.value.code
    assert capsys.readouterr().out.count("WARNING update") == 3
    why = "ValueError: 3 updates in a row were not finite: lower --lr, or look at samples.txt"
    assert tiny_runs.ended(runs.folder / f"run{runs.count}") == ("failed", 1, why)


def test_weights_that_are_no_numbers_end_the_run_in_one_line(runs, monkeypatch):
    inner = train.log_step

    def spoil(run, *rest):
        inner(run, *rest)
        with torch.no_grad():
            run.model.model.norm.weight.fill_(math.nan)

    monkeypatch.setattr(train, "log_step", spoil)
    for flags in ({}, {"eval_every": 0}):
        with pytest.raises(SystemExit) as end:
            runs.new(**flags)
        assert (
            "after step 1" in end.value.code
            and "not finite" in end.value.code
            and "\n" not in end.value.code
        )


def test_alarms_come_at_the_third_step_and_every_tenth(capsys):
    good = {"finished": 1.0, "no_answer": 0.0, "zero_gradient_groups": 0.5, "prompts_trained": 4}
    for name, value, word in (
        ("finished", 0.01, "cut off"),
        ("no_answer", 0.99, "no response has an answer"),
        ("zero_gradient_groups", 1.0, "advantage"),
        ("prompts_trained", 0, "advantage"),
    ):
        state, heard = train.State(), []
        for step in range(30):
            train.warn_if_stuck(good | ({name: value} if step != 4 else {}), state)
            if word in capsys.readouterr().out:
                heard.append(step)
        assert heard == [2, 7, 17, 27]


def test_all_equal_rewards_warn_and_move_nothing(runs, hopeless, capsys):
    directory = runs.new(steps=3, data=hopeless, weight_decay=0.0)
    assert "WARNING 3 steps in a row: no response has an advantage" in capsys.readouterr().out
    for line in tiny_runs.metrics(directory):
        assert (
            line["loss"] == line["grad_norm"] == line["wrong_pushed_up"] == 0
            and line["zero_gradient_groups"] == 1
        )
        assert all(value is None or math.isfinite(value) for value in line.values())
    start = train.Transformer.from_pretrained(runs.base["model"], dtype=torch.float64).state_dict()
    assert all(
        torch.equal(start[name], value) for name, value in tiny_runs.weights(directory).items()
    )


def test_model_text_cannot_break_the_log(runs):
    table = train.one_line("a\x1b[2J\r\nb\u202e" + "x" * 99, 20)
    assert table == "a·[2J·⏎b·" + "x" * 10 + "…" and len(table) == 20
    text = (runs.shared() / "samples.txt").read_text()
    assert text.count("step ") == 2 and "reference" in text and "wrong" in text


# ------------------------------------------------------------------------------------------------
# sampling, precision


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-9), ("float32", 1e-5), ("bfloat16", 0.2)])
def test_sampling_and_scoring_are_one_distribution(runs, dtype, bound):
    directory = runs.shared(dtype=dtype, temperature=0.7, stop=["<stop>"], lr=1e-3)
    for line in tiny_runs.metrics(directory):
        assert line["sampler_difference"] <= line["sampler_difference_max"] < bound
        assert dtype != "bfloat16" or line["sampler_difference"] > 0


def test_finished_responses_end_with_their_stop_token_and_it_is_trained(runs, monkeypatch):
    rollouts = watch(monkeypatch, train, "sample_groups", [])
    trained = watch(monkeypatch, train, "prompt_response_pairs", [])
    runs.new(stop=["<stop>"], steps=1)
    rollout = rollouts[0]
    assert 0 < rollout.finished.float().mean() < 1
    assert all(reply for pairs in trained for _, reply in pairs.values())
    ends = {True: set(), False: set()}
    for i in range(4):
        for j in range(4):
            reply = rollout.tokens[i, j, : rollout.lengths[i, j]].tolist()
            ends[bool(rollout.finished[i, j])].add(reply[-1])
            assert not set(reply[:-1]) & {0, 1} and (rollout.finished[i, j] or len(reply) == 6)
            assert any((rollout.prompts[i], reply) in pairs.values() for pairs in trained)
    assert ends[True] <= {0, 1} and not ends[False] & {0, 1}


def test_masters_state_and_gradients_stay_float32_under_bf16(runs, monkeypatch):
    kept, syncs, step, collect = [], [], train.optimizer_step, train.collect_rollout

    def stepping(run, *rest):
        gradients = {p.grad.dtype for p in run.model.parameters()}
        applied = step(run, *rest)
        state = {value.dtype for entry in run.optimizer.state.values() for value in entry.values()}
        kept.append((gradients, {p.dtype for p in run.model.parameters()}, state))
        return applied

    def collecting(run):
        pairs = zip(run.sampler.parameters(), run.model.parameters())
        syncs.append(
            all(
                torch.equal(ours, train.full_tensor(theirs.detach()).bfloat16())
                for ours, theirs in pairs
            )
        )
        return collect(run)

    monkeypatch.setattr(train, "optimizer_step", stepping)
    monkeypatch.setattr(train, "collect_rollout", collecting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Python 3.12's and torch's own: nothing of theirs may reach the console of a run.
        directory = runs.new(dtype="bfloat16", kl_coef=0.1)
    assert kept == [({torch.float32},) * 3] * 4 and syncs == [True, True]
    assert json.loads((directory / "model/config.json").read_text())["torch_dtype"] == "float32"
    assert not torch.distributed.is_initialized()


def test_float64_is_float64_throughout(runs, monkeypatch):
    kept, step = set(), train.optimizer_step

    def stepping(run, *rest):
        kept.update(p.grad.dtype for p in run.model.parameters())
        kept.update(entry["exp_avg"].dtype for entry in run.optimizer.state.values())
        return step(run, *rest)

    monkeypatch.setattr(train, "optimizer_step", stepping)
    runs.new(kl_coef=0.1)
    assert kept == {torch.float64}


def test_exports_are_the_weights_of_the_run(runs):
    """In the source's type unless another is asked for; the tokenizer comes along."""
    directory = runs.shared(dtype="float32", export_every=1, keep=5)
    state = tiny_runs.saved(directory / "checkpoints/step-000001", directory / "scratch.pt")
    (directory / "scratch.pt").unlink()
    early = train.Transformer.from_pretrained(directory / "model-000001")
    for name, value in early.state_dict().items():
        assert torch.equal(value, state[f"/model/{name}"])
    assert (directory / "model-000001/tokenizer.json").exists() and not tiny_runs.same_weights(
        directory, runs.shared(dtype="float32", steps=1)
    )


# --------------------------------------------------------------------------------------------------
# ---------- learning


def test_the_warm_start_teaches_the_answer_and_the_end(runs, capsys):
    """Solutions are one digit and the end token: afterwards replies are two tokens long."""
    directory = runs.new(
        sft_steps=60, sft_batch=8, sft_lr=1e-2, steps=1, dtype="float32", eval_samples=4
    )
    first = tiny_runs.evaluations(directory)[0]
    assert first["finished"] > 0.95 and first["length_mean"] < 2.2 and first["no_answer"] < 0.05
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warm")]
    assert said[-1].startswith("warm    60/60") and float(said[-1].split()[3]) < float(
        said[0].split()[3]
    )


@pytest.mark.parametrize("algo", ["copo", "grpo", "dr-grpo"])
def test_reinforcement_learning_raises_the_reward(runs, algo):
    """One answer is right for all problems; every preset must find it more often than chance
    does."""
    data = runs.folder / "ones.jsonl"
    data.write_text(
        "".join(
            json.dumps({"problem": f"{i}+{j}=?", "answer": "1"}) + "\n"
            for i in "012"
            for j in "0123"
        )
    )
    directory = runs.new(
        algo=algo,
        data=data,
        steps=15,
        dtype="float32",
        prompts_per_step=6,
        group_size=8,
        lr=5e-3,
        eval_every=0,
        save_every=0,
        eval_data=data,
    )
    found = [line["reward"] for line in tiny_runs.metrics(directory)]
    assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.3
