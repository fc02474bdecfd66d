"""A run that is stopped, however and wherever, and resumed is the run that was never stopped: bit
for bit.

Guards against: a cursor, a counter or an optimiser state that a checkpoint forgets; files with
lines of an abandoned step, or with half lines; half-written checkpoints taken for whole ones; the
warm start's optimiser going on into reinforcement learning; a KL reference made of the wrong
weights; flags that silently change on resume; signals that lose a step or end with an error."""

import json
import os
import shutil
import signal
import time

import pytest
import tiny_runs

import train

# Two updates a step, a warm start, a KL term with a reference of its own, evaluations and samples:
# all that has state.
FLAGS = {
    "steps": 6,
    "dtype": "float32",
    "sft_steps": 4,
    "sft_batch": 6,
    "sft_lr": 1e-3,
    "kl_coef": 0.1,
    "eval_every": 3,
    "save_every": 2,
    "warmup_updates": 5,
    "eval_problems": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        patch.setattr(train, "SAMPLES_EVERY", tiny_runs.SAMPLES_EVERY)
        yield tiny_runs.Runs(tmp_path_factory.mktemp("runs"))


def resume(directory, *more):
    train.main(["--run-dir", str(directory), "--resume", "latest", *map(str, more)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_steps_and_three_more_are_six(runs, dtype):
    whole = runs.shared(**FLAGS | {"dtype": dtype})
    parts = runs.new(**FLAGS | {"dtype": dtype, "steps": 3})
    assert len(tiny_runs.metrics(parts)) == 3
    resume(parts, "--steps", 6)
    assert tiny_runs.difference(parts, whole) is None


def test_a_placebo_goes_on_as_the_same_run(runs):
    flags = {"placebo": True, "ratio": "sequence", "prompts_per_step": 8, "group_size": 8}
    whole = runs.new(**flags, steps=4)
    parts = runs.new(**flags, steps=2)
    resume(parts, "--steps", 4)
    assert tiny_runs.difference(parts, whole) is None
    groups = tiny_runs.lines(whole / "groups.jsonl")
    assert any(line["correct"] != line["verdict"] for line in groups)


PLACES = [
    ("after log_step", 1),  # between steps, before the first checkpoint of a step
    ("before sample_groups", 4),  # during a step
    ("after sample_groups", 2),
    ("after optimizer_step", 7),  # in the middle of the updates of step 2
    ("after optimizer_step", 3),  # during the warm start
    ("after run_evaluation", 1),  # before its line is written
    ("in eval.jsonl", 3),  # half a line
    ("in metrics.jsonl", 5),
    ("in samples.txt", 3),
    ("after save", 1),  # while saving: written, not renamed; the warm start's
    ("after save", 3),
    ("before delete_directory", 1),  # while an old checkpoint is deleted
    ("after export", 1),  # the reference is there, nothing else
    ("after export", 2),  # when all is done
]


@pytest.mark.parametrize("event, count", PLACES)
def test_killed_and_resumed_is_the_same_run(runs, event, count):
    whole, directory = runs.shared(**FLAGS), runs.directory()
    process = tiny_runs.start(tiny_runs.child, runs.argv(FLAGS, run_dir=directory), event, count)
    process.join(tiny_runs.PATIENCE)
    assert process.exitcode == -signal.SIGKILL and tiny_runs.ended(directory) is None
    resume(directory)
    assert tiny_runs.difference(directory, whole) is None and tiny_runs.ended(directory) == (
        "finished",
        6,
        "",
    )
    assert all((path / "state.json").exists() for path in (directory / "checkpoints").iterdir())
    hidden = [path for path in directory.rglob(".*") if path.name.endswith((".tmp", ".old"))]
    assert hidden == []


def test_killed_again_and_again(runs):
    """At ever other events of one run, the resumed parts included; progress is from checkpoint to
    checkpoint."""
    whole, directory, deaths = runs.shared(**FLAGS), runs.directory(), 0
    argv = runs.argv(FLAGS, run_dir=directory)
    for count in (9, 14, 25, 31, 17, 40, 23, 200):
        process = tiny_runs.start(tiny_runs.child, argv, "", count)
        process.join(tiny_runs.PATIENCE)
        deaths += process.exitcode == -signal.SIGKILL
        argv = ["--run-dir", str(directory), "--resume", "latest"]
    assert deaths >= 5 and process.exitcode == 0
    assert tiny_runs.difference(directory, whole) is None


def test_half_lines_and_later_steps_are_cut(runs):
    whole, directory = runs.shared(**FLAGS), runs.new(**FLAGS | {"steps": 4, "eval_every": 2})
    for name in ("metrics.jsonl", "groups.jsonl", "eval.jsonl", "samples.txt"):
        with open(directory / name, "ab") as file:
            file.write(b'{"step": 5, "reward": 1.0}\n{"step": 5, "\xe2\x8f')
    resume(directory, "--steps", 6)
    assert tiny_runs.metrics(directory) == tiny_runs.metrics(whole)
    assert (directory / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    assert [line["step"] for line in tiny_runs.evaluations(directory)] == [0, 2, 4, 6]


# --------------------------------------------------------------------------------------------------
# ---------- signals


def signal_at(monkeypatch, event, count, *numbers):
    """Sends signals to this process at an event of the run."""
    seen = []

    def act(name):
        seen.append(name)
        if event in name and sum(event in one for one in seen) == count:
            for number in numbers:
                os.kill(os.getpid(), number)

    for module, name in ((train, "append"), *tiny_runs.EVENTS):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they are put back
    tiny_runs.watch_events(act)


# event, its count, the checkpoint that is then the newest, finished steps
STOPS = [
    ("after optimizer_step", 2, "sft-000002", 0),
    ("after optimizer_step", 4, "step-000000", 0),  # the last of the warm start
    ("before run_evaluation", 1, "step-000000", 0),
    ("after run_evaluation", 2, "step-000003", 3),
    ("before sample_groups", 3, "step-000002", 2),  # the third step is abandoned
    ("after sample_groups", 4, "step-000003", 3),
    ("after optimizer_step", 9, "step-000003", 3),  # the third step is finished first
    ("after save", 2, "step-000002", 2),
]


@pytest.mark.parametrize(
    "event, count, checkpoint, steps, number",
    [
        *[(*stop, signal.SIGTERM) for stop in STOPS],
        (*STOPS[4], signal.SIGINT),
        (*STOPS[6], signal.SIGINT),
    ],
)
def test_a_signal_saves_and_ends_well(
    runs, monkeypatch, capsys, event, count, checkpoint, steps, number
):
    whole, directory = runs.shared(**FLAGS), runs.directory()
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_at(patch, event, count, number)
        train.main(runs.argv(FLAGS, run_dir=directory))  # returns: exit code 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"--run-dir {directory} --resume latest" in said
        and checkpoint in said
        and number.name in said
    )
    assert sorted(path.name for path in (directory / "checkpoints").iterdir())[-1] == checkpoint
    done = directory / "metrics.jsonl"
    assert (len(tiny_runs.metrics(directory)) if done.exists() else 0) == steps
    assert tiny_runs.ended(directory) == ("stopped", steps, number.name)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resume(directory)
    assert tiny_runs.difference(directory, whole) is None


def test_second_ctrl_c_stops_at_once(runs, monkeypatch, capsys):
    directory = runs.directory()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        signal_at(patch, "after optimizer_step", 9, signal.SIGINT, signal.SIGINT)
        train.main(runs.argv(FLAGS, run_dir=directory))
    assert end.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert tiny_runs.ended(directory) == ("stopped", 2, "")
    resume(directory)
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is None


def test_sigterm_from_outside_ends_the_process_with_0(runs):
    directory = runs.directory()
    process = tiny_runs.start(
        tiny_runs.quiet_child, runs.argv(FLAGS, run_dir=directory, steps=10_000, eval_every=0)
    )
    deadline = time.monotonic() + tiny_runs.PATIENCE
    while not (directory / "samples.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.join(tiny_runs.PATIENCE)
    assert process.exitcode == 0
    newest = sorted((directory / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{len(tiny_runs.metrics(directory)):06d}"


# --------------------------------------------------------------------------------------------------
# - flags on resume


def test_resume_takes_the_flags_of_the_run_and_says_what_changed(runs, capsys):
    directory = runs.new(**FLAGS | {"steps": 2})
    capsys.readouterr()
    resume(directory, "--steps", 4, "--lr", "0.5", "--weight-decay", "0.25", "--beta2", "0.5")
    said = capsys.readouterr().out
    assert said.count("WARNING") == 3 and "WARNING --lr was 0.01 and is now 0.5" in said
    assert [line["lr"] for line in tiny_runs.metrics(directory)[1:]] == pytest.approx(
        [0.008, 0.5, 0.5]
    )
    state = tiny_runs.saved(directory / "checkpoints/step-000004", directory / "scratch.pt")
    groups = state["/optimizer/param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [
        (0.25, (0.9, 0.5)),
        (0.0, (0.9, 0.5)),
    ]
    record = json.loads((directory / "run.json").read_text())
    assert record["flags"]["lr"] == 0.5 and set(record["resumed"][0]["changed"]) == {
        "lr",
        "weight_decay",
        "beta2",
    }
    resume(directory, "--algo", "grpo")
    said = capsys.readouterr().out
    assert "--lr" not in said and "WARNING --blend was soft-zero and is now local" in said


def test_resume_says_which_flags_are_gone(runs, capsys):
    """A run of 10 % of the data would have gone on with all of it, without a word."""
    directory = runs.new(steps=1)
    info = json.loads((directory / "run.json").read_text())
    info["flags"] |= {"data_fraction": 0.1, "free_sampler": False}
    (directory / "run.json").write_text(json.dumps(info))
    capsys.readouterr()
    resume(directory, "--steps", 2)
    printed = capsys.readouterr().out
    assert "WARNING the run began with --data-fraction, which this code no longer has" in printed
    assert "free-sampler" not in printed


def test_resume_from_an_earlier_checkpoint_forgets_the_later_ones(runs):
    directory = runs.new(**FLAGS | {"keep": 9, "eval_every": 2})
    train.main(["--resume", str(directory / "checkpoints/step-000002"), "--lr", "0.02"])
    changed = runs.new(**FLAGS | {"steps": 2, "keep": 9, "eval_every": 2})
    resume(changed, "--steps", 6, "--lr", "0.02")
    assert tiny_runs.difference(directory, changed) is None
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is not None


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "elsewhere"],
        ["--seed", "7"],
        ["--dtype", "float64"],
        ["--sft-steps", "9"],
        ["--sft-lr", "1"],
        ["--sft-batch", "3"],
    ],
)
def test_flags_that_checkpoints_depend_on_cannot_change(runs, capsys, flags):
    with pytest.raises(SystemExit) as end:
        resume(runs.shared(**FLAGS), *flags)
    message = capsys.readouterr().err
    assert (
        end.value.code == 2
        and flags[0] in message
        and "cannot change" in message
        and message.count("\n") == 1
    )


def test_a_run_of_older_code_is_refused(runs, capsys):
    """Its checkpoints and flags are of another format; the commit that can go on is named."""
    directory = shutil.copytree(runs.shared(**FLAGS), runs.directory())
    run_info = json.loads((directory / "run.json").read_text())
    assert run_info.pop("format") == 2
    (directory / "run.json").write_text(json.dumps(run_info))
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        resume(directory, "--steps", "9")
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and "ce7ac25" in message
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_kl_cannot_begin_later_after_a_warm_start(runs, capsys):
    directory = runs.new(**FLAGS | {"kl_coef": 0.0, "steps": 1})
    with pytest.raises(SystemExit) as end:
        resume(directory, "--kl-coef", "0.1")
    assert end.value.code == 2 and "no reference" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_refused(runs, capsys):
    whole, other = runs.shared(**FLAGS), runs.shared(**FLAGS | {"dtype": "bfloat16"})
    with pytest.raises(SystemExit) as end:
        train.main(
            ["--resume", str(next((whole / "checkpoints").iterdir())), "--run-dir", str(other)]
        )
    assert end.value.code == 2 and "another run" in capsys.readouterr().err


def test_the_reference_is_the_policy_after_the_warm_start(runs):
    """KL is exactly 0 at the first update, and grows; the resumed run has it too (the tests above
    compare it)."""
    whole = runs.shared(**FLAGS | {"minibatch_prompts": 4, "dtype": "float64"})
    found = [line["kl"] for line in tiny_runs.metrics(whole)]
    assert found[0] == 0 and min(found[1:]) > 1e-6


def test_reinforcement_learning_starts_with_a_fresh_optimiser(runs):
    directory = runs.shared(**FLAGS | {"keep": 9})
    state = tiny_runs.saved(directory / "checkpoints/step-000000", directory / "scratch.pt")
    moments = [value for name, value in state.items() if name.startswith("/optimizer/state/")]
    assert (
        len(moments) > 30
        and not any(value.any() for value in moments)
        and state["state/updates"] == 0
    )


def test_resuming_a_finished_run_changes_nothing(runs):
    directory = shutil.copytree(runs.shared(**FLAGS), runs.directory())
    resume(directory)
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is None


def test_a_run_of_ranks_that_deferred_their_gradients_goes_on_alone(runs):
    directory = runs.new(steps=1)
    info = json.loads((directory / "run.json").read_text())
    info["flags"]["defer_gradient_sync"] = True  # which one process would refuse
    (directory / "run.json").write_text(json.dumps(info))
    resume(directory, "--steps", "2")
    assert tiny_runs.ended(directory)[:2] == ("finished", 2)


def test_a_resume_from_an_earlier_step_removes_later_exports_too(runs):
    directory = runs.new(steps=3, save_every=1, keep=9, export_every=1)
    assert (directory / "model-000003").is_dir()
    first = directory / "checkpoints/step-000001"
    train.main(["--resume", str(first), "--steps", "2"])
    exports = sorted(path.name for path in directory.glob("model-*"))
    assert exports == ["model-000001", "model-000002"]


def test_what_a_killed_save_left_behind_is_swept_up(runs):
    """One leftover lies in another: the checkpoint library writes its own metadata under a
    temporary name too."""
    directory = runs.new(steps=1)
    stale = directory / "checkpoints/.step-000002.tmp"
    (stale / ".metadata.tmp").mkdir(parents=True)
    train.main(["--run-dir", str(directory), "--resume", "latest", "--steps", "2"])
    assert not stale.exists() and (directory / "checkpoints/step-000002/state.json").is_file()


# --------------------------------------------------------------------------------------- disks that
# fail, damaged files


def limited_child(argv, limit, errors):
    """A run that may write no file beyond `limit` bytes, as on a full disk."""
    import resource

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    tiny_runs.quiet_child(argv)


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(runs, tmp_path):
    directory = runs.new(**FLAGS | {"steps": 3})
    last = directory / "checkpoints/step-000003"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    size = max(len(content) for content in before.values())
    argv, errors = (
        ["--run-dir", str(directory), "--resume", "latest", "--steps", "6"],
        tmp_path / "errors",
    )
    process = tiny_runs.start(limited_child, argv, size // 2, errors)
    process.join(tiny_runs.PATIENCE)
    assert process.exitcode == 1
    message = errors.read_text().splitlines()[-1]
    assert (
        "train.py: after step 4: cannot write the checkpoint" in message and "too large" in message
    )
    assert "--resume latest" in message
    how, step, why = tiny_runs.ended(directory)
    assert (how, step) == ("failed", 4) and why.removeprefix("OSError: ") in message
    # The last checkpoint is whole, and half of another one does not fill the disk.
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before
    assert not list((directory / "checkpoints").glob(".*"))
    resume(directory, "--steps", "6")
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "empty metadata", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_still_works(runs, damage, capsys):
    directory = runs.new(**FLAGS | {"steps": 2, "save_every": 1})
    last = directory / "checkpoints/step-000002"
    file = last / ".metadata" if damage == "empty metadata" else next(last.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "empty metadata": b"",
            "garbage": b"?" * 2000,
        }[damage]
    )
    capsys.readouterr()
    lines = {path.name: path.read_bytes() for path in directory.glob("*.jsonl")}
    with pytest.raises(SystemExit) as end:
        resume(directory, "--steps", "6")
    assert "cannot read the checkpoint" in end.value.code and "step-000002" in end.value.code
    assert "\n" not in end.value.code and "--resume DIR: " in end.value.code
    assert "latest" not in end.value.code and not end.value.code.endswith(": ")
    # nothing was cut back
    assert {path.name: path.read_bytes() for path in directory.glob("*.jsonl")} == lines
    assert tiny_runs.ended(directory) == ("finished", 2, "")  # it has not gone on
    train.main(["--resume", str(directory / "checkpoints/step-000001"), "--steps", "6"])
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is None


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(runs, capsys):
    blocked = runs.folder / "a file"
    blocked.write_text("")
    with pytest.raises(SystemExit) as end:
        train.main(runs.argv(FLAGS, run_dir=blocked / "run"))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and "a file" in message


def test_what_a_run_killed_before_run_json_left_is_no_run_and_no_obstacle(runs):
    directory = runs.directory()
    directory.mkdir()
    (directory / "run.tmp").write_text("{")
    train.main(runs.argv(FLAGS, run_dir=directory))
    assert tiny_runs.difference(directory, runs.shared(**FLAGS)) is None


def test_torchruns_restart_goes_on_where_it_can(runs, monkeypatch, tmp_path):
    """By the default directory, which carries torchrun's process id; and from the start if nothing
    was begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    flags = FLAGS | {"steps": 2}
    train.main(runs.argv(flags))
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.endswith(f"-p{os.getppid()}")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = train.parse_args(runs.argv(flags))
    assert (args.run_dir, args.resume) == (f"runs/{directory.name}", "latest")
    newest = max((directory / "checkpoints").iterdir())
    args = train.parse_args(["--resume", str(newest)])
    assert os.path.samefile(args.run_dir, directory) and args.resume == "latest"
    args = train.parse_args(runs.argv(flags, run_dir=tmp_path / "new"))
    assert (args.run_dir, args.resume) == (str(tmp_path / "new"), None)
    # Another torchrun's run of the same name is none of ours.
    monkeypatch.setattr(train.os, "getppid", lambda: 999_999_999)
    assert train.parse_args(runs.argv(flags)).resume is None
