"""What people report of trainers like this one, and how this one behaves.

Each test is named after what a user did. Bugs these tests guard against: two runs in one directory,
one run in two processes; prompts without the problem; bad input that ends in a traceback; printing
that ends a run; replies that can never end; a continued run that reads other files.
"""

import codecs
import datetime
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import reward
import sampler
import train
from model import Transformer
from sampler import encode_prompts, load_model, opens_thought

ROOT = Path(train.__file__).resolve().parent
PARTS = (
    "{% for m in messages %}<|user|>{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    "<|assistant|>"
)
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
LONG = {"steps": 10_000, "eval_every": 0, "save_every": 5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        yield tiny_runs.Runs(tmp_path_factory.mktemp("reports"))


def make_model(path, template=PLAIN, **changes):
    """The demonstration's tokenizer and a model of next to nothing, with another chat template."""
    shutil.copytree(ROOT / "data/tiny", path)
    config = json.loads((path / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config | small | changes))
    (path / "chat_template.jinja").write_text(template)
    return path


def make_tokenizer(path, template=PLAIN):
    return sampler.load_tokenizer(make_model(path, template))


def problems_in(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return reward.load_problems(path)


def text_of(tokenizer, problems, **options):
    """The prompts as texts."""
    values = {"system": None, "instruction": "", "template_args": None} | options
    return [tokenizer.decode(ids) for ids in encode_prompts(tokenizer, problems, *values.values())]


def refusal(capsys, main, argv):
    """The one line that main ends with, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1, message
    return message


def wait_for(condition):
    deadline = time.monotonic() + tiny_runs.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def resume(directory, *flags):
    train.main(["--run-dir", str(directory), "--resume", "latest", *map(str, flags)])


# ------------------------------------------------------------------- one directory for one process


def run_at_one_moment(folder, argv, errors):
    """A run in a process of its own, with a clock that stands still."""

    class Moment(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    os.chdir(folder)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    train.datetime = Moment
    tiny_runs.quiet_child(argv)


def test_runs_started_in_the_same_second_get_a_directory_each(runs, tmp_path):
    started = []
    for seed in range(3):
        argv = runs.argv(seed=seed, steps=3, save_every=0)
        started.append(tiny_runs.start(run_at_one_moment, tmp_path, argv, tmp_path / "errors"))
    for process in started:
        process.join(tiny_runs.PATIENCE)
    assert [process.exitcode for process in started] == [0, 0, 0]
    directories = sorted((tmp_path / "runs").iterdir())
    assert len(directories) == 3
    assert all(path.name.startswith("copo-20260102-030405-p") for path in directories)
    seeds = set()
    for path in directories:
        info = json.loads((path / "run.json").read_text())
        seeds.add(info["flags"]["seed"])
        assert Path(info["flags"]["run_dir"]).name == path.name
        assert [line["step"] for line in tiny_runs.metrics(path)] == [1, 2, 3]
    assert seeds == {0, 1, 2}


def test_one_directory_typed_twice_is_one_run_and_one_line(runs, tmp_path):
    argv = runs.argv(LONG, run_dir=tmp_path / "one", steps=8)
    errors = [tmp_path / "first", tmp_path / "second"]
    started = [tiny_runs.start(run_at_one_moment, tmp_path, argv, log) for log in errors]
    for process in started:
        process.join(tiny_runs.PATIENCE)
    assert sorted(process.exitcode for process in started) == [0, 2]
    said = errors[0].read_text() + errors[1].read_text()
    assert said.count("\n") == 1 and "--run-dir" in said
    assert [line["step"] for line in tiny_runs.metrics(tmp_path / "one")] == list(range(1, 9))


def test_a_living_run_cannot_be_resumed_and_a_killed_one_can(runs, capsys):
    directory = runs.directory()
    living = tiny_runs.start(tiny_runs.quiet_child, runs.argv(LONG, run_dir=directory))
    wait_for(lambda: (directory / "checkpoints/step-000005/state.json").exists())
    message = refusal(capsys, train.main, ["--run-dir", directory, "--resume", "latest"])
    assert "still going on" in message and str(directory) in message
    assert "in use" in refusal(capsys, train.main, runs.argv(LONG, run_dir=directory))
    os.kill(living.pid, signal.SIGKILL)
    living.join(tiny_runs.PATIENCE)
    metrics = len(tiny_runs.metrics(directory))
    steps = 5 * (metrics // 5) + 1
    resume(directory, "--steps", steps)
    assert [line["step"] for line in tiny_runs.metrics(directory)] == list(range(1, steps + 1))


def test_a_directory_is_locked_until_its_last_rank_has_ended(tmp_path):
    ranks = [types.SimpleNamespace(directory=tmp_path, lock=None) for _ in range(3)]
    *first, other = ranks
    train.lock_run_dir(first[0], fcntl.LOCK_EX)
    for run in first:
        train.lock_run_dir(run, fcntl.LOCK_SH)
    first[0].lock.close()
    with pytest.raises(ValueError, match="is still going on"):
        train.lock_run_dir(other, fcntl.LOCK_EX)
    first[1].lock.close()
    train.lock_run_dir(other, fcntl.LOCK_EX)
    other.lock.close()


def test_a_file_system_without_locks_is_said_once(runs, capsys, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(train.fcntl, "flock", unsupported)
    runs.new(steps=1, eval_data=None, eval_every=None, eval_samples=None)
    assert "has no locks" in capsys.readouterr().out


# -------------------------------------------------------------- prompts are what their author meant


def test_a_thought_that_the_prompt_opened_must_be_closed(tmp_path, runs):
    assert reward.score("so far 2+2 = 4", "4") == 1
    assert reward.score("so far 2+2 = 4", "4", in_thought=True) == 0
    assert reward.score("so far 2+2 = 5</think> 4", "4", in_thought=True) == 1
    assert reward.explain("so far 2+2 = 4", "4", in_thought=True).why == "no answer"
    tokenizer = make_tokenizer(tmp_path / "thinks", PLAIN + "<think>\n")
    problems = problems_in(tmp_path / "p", {"problem": "2+2", "answer": "4"})
    (prompt,) = encode_prompts(tokenizer, problems)
    assert opens_thought(tokenizer, prompt)
    for ending in ("", "<think>\n\n</think>\n", "a <think> b"):
        other = make_tokenizer(tmp_path / f"m{len(ending)}", PLAIN + ending)
        assert not opens_thought(other, encode_prompts(other, problems)[0])


def test_training_evaluation_and_audit_know_of_the_open_thought(tmp_path, monkeypatch, capsys):
    directory = make_model(tmp_path / "thinks", PLAIN + "<think>\n")
    data = tmp_path / "data.jsonl"
    problems_in(data, *({"problem": f"{i}+2", "answer": str(i + 2)} for i in range(4)))
    seen = []

    class Watch(tiny_runs.Judge):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def grade_groups(self, responses, references, *, in_thought, **rest):
            seen.extend(in_thought)
            return super().grade_groups(responses, references)

    monkeypatch.setattr(train, "Verifier", Watch)
    monkeypatch.setattr(evaluation, "Verifier", Watch)
    flags = ["--model", directory, "--data", data, "--device", "cpu", "--max-new-tokens", 3]
    sizes = ["--prompts-per-step", 2, "--group-size", 2, "--minibatch-prompts", 2, "--steps", 1]
    train.main([str(word) for word in [*flags, *sizes, "--run-dir", tmp_path / "run"]])
    evaluation.main([str(word) for word in [*flags, "--k", 1, "--out", tmp_path / "out"]])
    assert seen == [True] * 6
    lines = tiny_runs.lines(tmp_path / "out")
    assert all(line["in_thought"] is True for line in lines)
    lines[0] |= {"response": "so far 2", "in_thought": True}
    lines[1] |= {"response": "so far 3", "in_thought": False}
    (tmp_path / "out").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    capsys.readouterr()
    reward.main(["--audit", str(tmp_path / "out")])
    assert "no answer 1 (50.0%)" in capsys.readouterr().out


def test_a_template_that_wants_content_parts_gets_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "m", PARTS)
    problems = problems_in(tmp_path / "p", {"problem": "1 +\n 1", "answer": "2"})
    assert text_of(tokenizer, problems, instruction="Box it.") == [
        "<|user|>1 +\n 1\nBox it.<|assistant|>"
    ]


@pytest.mark.parametrize(
    "template",
    [
        "<|user|>Answer me.<|assistant|>",  # leaves the problem out
        "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",  # cuts it off
        "{{ raise_exception('System role not supported') }}",
        "{{ nothing.there }}",
        "{{ messages[7]['content'] }}",
        "{% for m in messages %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(tmp_path, runs, capsys, template):
    directory = make_model(tmp_path / "m", template)
    data = tmp_path / "d.jsonl"
    problems_in(data, *({"problem": f"what is {i}+2?", "answer": str(i + 2)} for i in range(4)))
    argv = runs.argv(model=directory, data=data, run_dir=tmp_path / "run", system="Be brief.")
    assert "chat template" in refusal(capsys, train.main, argv)
    assert not (tmp_path / "run").exists()
    argv = ["--model", directory, "--data", data, "--device", "cpu"]
    assert "chat template" in refusal(capsys, evaluation.main, argv)


def test_a_system_message_that_the_template_ignores_is_refused(tmp_path):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path / "m", template)
    problems = problems_in(tmp_path / "p", {"problem": "1+1", "answer": "2"})
    assert text_of(tokenizer, problems) == ["1+1"]
    with pytest.raises(ValueError, match=r"leaves out \['Be brief\.'\]"):
        encode_prompts(tokenizer, problems, "Be brief.")


def test_a_tokenizer_for_which_all_problems_are_one_is_refused(runs, tmp_path):
    """The letters of this tokenizer are 0 to 6; all others become the same unknown token."""
    tokenizer = sampler.load_tokenizer(runs.base["model"])
    problems = problems_in(
        tmp_path / "p", {"problem": "ab", "answer": "2"}, {"problem": "cd", "answer": "3"}
    )
    with pytest.raises(ValueError, match="prompts are the same"):
        encode_prompts(tokenizer, problems)


def test_the_date_in_a_prompt_is_that_of_the_runs_start(tmp_path, runs, monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }} " + PLAIN
    directory = make_model(tmp_path / "m", template)
    data = tmp_path / "d.jsonl"
    problems_in(data, *({"problem": f"{i}+2", "answer": str(i + 2)} for i in range(4)))
    prompts = []
    generate = sampler.generate

    def spy(model, texts, *rest, **options):
        prompts.extend(texts)
        return generate(model, texts, *rest, **options)

    monkeypatch.setattr(sampler, "generate", spy)
    changes = {"model": directory, "data": data, "eval_data": data, "max_prompt_tokens": 60}
    run = runs.new(**changes, steps=1, date="2025-03-04T10:00:00", max_new_tokens=2)
    first = prompts[:]
    prompts.clear()
    resume(run, "--steps", 2)
    tokenizer = sampler.load_tokenizer(directory)
    texts = {tokenizer.decode(prompt) for prompt in first + prompts}
    assert len(texts) == 4 and all(text.startswith("04 Mar 2025") for text in texts)
    again = runs.new(**changes, steps=0)
    started = json.loads((again / "run.json").read_text())["flags"]["date"]
    assert abs(datetime.datetime.fromisoformat(started) - datetime.datetime.now()).days == 0
    prompts.clear()
    evaluation.main(["--run", str(run), "--device", "cpu", "--limit", "1"])
    assert tokenizer.decode(prompts[0]).startswith("04 Mar 2025")


def test_template_arguments_reach_the_template(tmp_path, runs, capsys):
    template = PLAIN + "{% if enable_thinking is false %}<think></think>{% endif %}"
    tokenizer = make_tokenizer(tmp_path / "m", template)
    problems = problems_in(tmp_path / "p", {"problem": "1+1", "answer": "2"})
    (without,) = text_of(tokenizer, problems)
    (with_it,) = text_of(tokenizer, problems, template_args={"enable_thinking": False})
    assert with_it == without + "<think></think>"
    argv = runs.argv(run_dir=tmp_path / "run", template_args='{"enable_thinking": false}')
    assert train.parse_args(argv).template_args == {"enable_thinking": False}
    for wrong in ("{", "[1]"):
        argv = runs.argv(run_dir=tmp_path / "run", template_args=wrong)
        assert "--template-args" in refusal(capsys, train.main, argv)


def test_chat_messages_are_used_as_they_are(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "m")
    system = {"role": "system", "content": "Be brief."}
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2"}]
    truth = {"reward_model": {"ground_truth": "2"}}
    problems = problems_in(
        tmp_path / "p",
        {"prompt": [system, {"role": "user", "content": "1+1"}]} | truth,
        {"prompt": [system, {"role": "user", "content": parts}]} | truth,
        {"prompt": [{"role": "user", "content": "3+3"}]} | truth,
        {"prompt": [system, {"role": "user", "content": "1+1"}]} | truth,
    )
    assert [problem.problem for problem in problems] == ["1+1", "2+2", "3+3"]
    assert text_of(tokenizer, problems, instruction="Box it.", system="Hi.") == [
        "<|system|>Be brief.<|user|>1+1<|assistant|>",
        "<|system|>Be brief.<|user|>2+2<|assistant|>",
        "<|system|>Hi.<|user|>3+3\nBox it.<|assistant|>",
    ]


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}], ["1"]]
)
def test_chat_messages_without_text_are_refused_by_line(tmp_path, messages):
    line = {"prompt": messages, "reward_model": {"ground_truth": "2"}}
    with pytest.raises(ValueError, match='p:1: the field "prompt"'):
        problems_in(tmp_path / "p", line)


def test_an_empty_system_message_is_one(tmp_path):
    template = "{% if messages[0].role != 'system' %}<|system|>You are Qwen.{% endif %}" + PLAIN
    tokenizer = make_tokenizer(tmp_path / "m", template)
    problems = problems_in(tmp_path / "p", {"problem": "1+1", "answer": "2"})
    assert text_of(tokenizer, problems)[0].startswith("<|system|>You are Qwen.")
    assert text_of(tokenizer, problems, system="")[0].startswith("<|system|><|user|>")


# ------------------------------------------------------------------------------ bad input, one line


def test_half_a_surrogate_pair_is_refused_by_line(tmp_path, runs, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"problem": "1", "answer": "2"}\n{"problem": "smile \\ud83d", "answer": "2"}\n'
    )
    argv = runs.argv(data=data, run_dir=tmp_path / "run")
    assert f"{data}:2" in refusal(capsys, train.main, argv)


@pytest.mark.parametrize("encode", [lambda text: text.encode("utf-16"), gzip.compress])
def test_files_in_another_encoding_are_refused_by_name(tmp_path, encode):
    data = tmp_path / "d.jsonl"
    text = '{"problem": "1", "answer": "2"}\n'
    data.write_bytes(encode(text if encode is not gzip.compress else text.encode()))
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not UTF-8"):
        reward.load_problems(data)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_bytes(codecs.BOM_UTF8 + b'{"problem": "1", "answer": "2"}\n')
    assert [problem.problem for problem in reward.load_problems(data)] == ["1"]


def wait_alone(rank, argv, errors):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    train.main(argv)


def test_a_peer_that_never_came_is_one_line(runs, tmp_path):
    log = tmp_path / "errors"
    argv = runs.argv(run_dir=tmp_path / "run", timeout=2)
    process = tiny_runs.start(wait_alone, 0, argv, log)
    process.join(tiny_runs.PATIENCE)
    said = [line for line in log.read_text().splitlines() if not line.startswith("[W")]
    assert process.exitcode == 2 and len(said) == 1, said
    assert "rank 0" in said[0] and "did not come" in said[0]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------ printing never ends a run


@pytest.fixture(scope="module")
def scripts(runs, tmp_path_factory):
    """Two real runs side by side: one prints ASCII, one prints to a pipe that nobody reads."""
    folder = tmp_path_factory.mktemp("scripts")
    plain = {"dtype": "float32", "steps": 4}
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HOME": str(folder)}
    found = {}
    for name in ("ascii", "closed"):
        argv = runs.argv(plain, run_dir=folder / name)
        command = [sys.executable, str(ROOT / "train.py"), *argv]
        options = {"env": environment | {"PYTHONIOENCODING": "ascii"}}
        if name == "closed":
            options["env"] = environment
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, **options
        )
        if name == "closed":
            process.stdout.close()
        found[name] = (folder / name, process)
    ended = {}
    for name, (directory, process) in found.items():
        output = process.stdout.read() if name == "ascii" else b""
        errors = process.stderr.read().decode()
        ended[name] = (directory, process.wait(tiny_runs.PATIENCE), output, errors)
    return ended


@pytest.mark.parametrize("name", ["ascii", "closed"])
def test_a_run_goes_on_whatever_becomes_of_its_output(scripts, name):
    directory, code, output, errors = scripts[name]
    assert code == 0 and "Traceback" not in errors and "Exception" not in errors, errors
    assert len(tiny_runs.metrics(directory)) == 4 and tiny_runs.ended(directory)[0] == "finished"
    assert (directory / "model/config.json").is_file()
    if name == "ascii":
        assert b"P 4 ? G 4" in output and b"run     " in output


@pytest.mark.parametrize("stream", ["closed", "none", "no reader"])
def test_main_goes_on_without_a_stdout(runs, monkeypatch, stream):
    end, beginning = os.pipe()
    os.close(end)
    pipe = os.fdopen(beginning, "w", encoding="ascii")
    if stream == "closed":
        pipe.close()
    monkeypatch.setattr(sys, "stdout", None if stream == "none" else pipe)
    directory = runs.directory()
    train.main(runs.argv(run_dir=directory, steps=1))
    assert tiny_runs.ended(directory)[0] == "finished"
    pipe.close()  # nothing is left in it that cannot be written


# ---------------------------------------------------------------- what is read is what is meant


def change_tokenizer(path, change):
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))


def test_an_end_token_behind_a_hole_can_be_sampled(tmp_path):
    """<|end|> moves from 0 to 371: the largest id counts, not how many there are."""
    directory = make_model(tmp_path / "m", vocab_size=400, eos_token_id=371)

    def move(tokenizer):
        tokenizer["added_tokens"][0]["id"] = 371
        tokenizer["model"]["vocab"]["<|end|>"] = 371
        tokenizer["added_tokens"].append(tokenizer["added_tokens"].pop(0))

    change_tokenizer(directory, move)
    model, tokenizer, stop_ids = load_model(directory, "float32", "cpu")
    assert (model.usable_vocab, stop_ids, len(tokenizer)) == (372, [371], 351)


def test_stop_ids_that_cannot_be_sampled_are_refused(tmp_path):
    directory = make_model(tmp_path / "m", eos_token_id=9999)
    with pytest.raises(ValueError, match="9999"):
        load_model(directory, "float32", "cpu")


def test_a_model_whose_replies_can_never_end_is_refused(tmp_path):
    directory = make_model(tmp_path / "m", eos_token_id=None)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("eos_token")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--stop"):
        load_model(directory, "float32", "cpu")


def test_a_token_beyond_the_embeddings_is_no_fault_until_it_is_used(tmp_path, runs, capsys):
    directory = make_model(tmp_path / "m")

    def pad(tokenizer):
        last = {**tokenizer["added_tokens"][-1], "id": 351, "content": "[PAD]", "special": True}
        tokenizer["added_tokens"].append(last)

    change_tokenizer(directory, pad)
    model, tokenizer, _ = load_model(directory, "float32", "cpu")
    assert len(tokenizer) == 352 and model.usable_vocab == 351
    data = tmp_path / "d.jsonl"
    problems_in(data, *({"problem": f"[PAD]{i}+2", "answer": str(i + 2)} for i in range(4)))
    argv = runs.argv(model=directory, data=data, run_dir=tmp_path / "run")
    assert "351" in refusal(capsys, train.main, argv)
    flags = ["--model", directory, "--data", data, "--device", "cpu"]
    assert "351" in refusal(capsys, evaluation.main, flags)


@pytest.mark.parametrize("alias", ["old buffers", "head"])
def test_weight_files_as_other_exporters_write_them(tmp_path, alias):
    config = json.loads((ROOT / "data/tiny/config.json").read_text())
    model = Transformer.from_config(config | {"num_hidden_layers": 1}, seed=3)
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    weights = load_file(file)
    if alias == "old buffers":
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    else:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, file, metadata={"format": "pt"})
    loaded = Transformer.from_pretrained(tmp_path / "m").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], w) for name, w in model.state_dict().items())


# ------------------------------------------------------------------ a continued run is the same run


@pytest.fixture()
def moved(runs, tmp_path, monkeypatch):
    """A run of one step whose files were typed relative to a directory that it has left."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(runs.base["model"], home / "model")
    tiny_runs.make_data(home / "d.jsonl", range(0, 8))
    tiny_runs.make_data(home / "e.jsonl", range(8, 10))
    monkeypatch.chdir(home)
    train.main(runs.argv(model="model", data="d.jsonl", eval_data="e.jsonl", run_dir="r", steps=1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tiny_runs.make_data(elsewhere / "d.jsonl", range(12, 24))
    tiny_runs.make_data(elsewhere / "e.jsonl", range(24, 26))
    monkeypatch.chdir(elsewhere)
    return home


def last_changes(run):
    return json.loads((run / "run.json").read_text())["resumed"][-1]["changed"]


def test_a_run_goes_on_with_its_own_files_wherever_it_is_resumed(moved, capsys):
    capsys.readouterr()
    resume(moved / "r", "--steps", 2)
    said = capsys.readouterr().out
    assert "WARNING" not in said and f"{moved}/d.jsonl: 8 problems" in said
    assert last_changes(moved / "r") == {}


def test_the_same_file_typed_in_another_way_is_the_same_file(moved, capsys):
    os.chdir(moved / "model")
    typed = ["--model", ".", "--data", "../d.jsonl", "--eval-data", "../model/../e.jsonl"]
    resume(moved / "r", "--steps", 2, *typed)
    assert "WARNING" not in capsys.readouterr().out and last_changes(moved / "r") == {}


def test_files_that_changed_under_a_run_are_named(moved, capsys):
    tiny_runs.make_data(moved / "d.jsonl", range(1, 9))
    (moved / "model/chat_template.jinja").write_text(PLAIN)
    weights = load_file(moved / "model/model.safetensors")
    save_file(weights, moved / "model/model.safetensors", metadata={"format": "another"})
    capsys.readouterr()
    resume(moved / "r", "--steps", 2)
    said = capsys.readouterr().out
    changed = last_changes(moved / "r")
    assert set(changed) == {
        "--data contents",
        "--model chat_template.jinja",
        "--model model.safetensors",
    }
    assert all(f"WARNING {name} was" in said for name in changed)


def test_fingerprints_are_of_contents_and_weights_of_names_and_shapes(moved):
    inputs = json.loads((moved / "r/run.json").read_text())["inputs"]
    assert {"--data contents", "--eval-data contents", "--model config.json"} <= inputs.keys()
    assert f"{(moved / 'd.jsonl').stat().st_size} bytes" in inputs["--data contents"]
    before = inputs["--model model.safetensors"]
    weights = load_file(moved / "model/model.safetensors")
    save_file(
        {name: w + 1 for name, w in weights.items()},
        moved / "model/model.safetensors",
        metadata={"format": "pt"},
    )
    assert train.fingerprint(f"{moved}/model/model.safetensors") == before


# --------------------------------------------------------------------------- trackers and a picture


@pytest.fixture(scope="module")
def logged(runs, tmp_path_factory):
    """A folder with modules in place of wandb and torch.utils.tensorboard, which write what they
    are told into $LOGGED."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "wandb.py").write_text(FAKE_WANDB)
    (folder / "sitecustomize.py").write_text(FAKE_TENSORBOARD)
    return folder


FAKE_WANDB = """
import json, os
def write(*words):
    with open(os.environ["LOGGED"], "a") as file:
        file.write(json.dumps(words) + chr(10))
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, values): write("log", values)
    def finish(self, *_, **__): write("finish")
def init(**options):
    write("init", options["id"], options["resume"], options["config"]["seed"])
    return Run()
"""
FAKE_TENSORBOARD = """
import sys, types
class SummaryWriter:
    def __init__(self, folder):
        import wandb
        self.write = wandb.write
        self.write("init", str(folder))
    def add_scalar(self, name, value, step): self.write("scalar", name, value, step)
    def flush(self): pass
    def close(self): self.write("finish")
fake = types.ModuleType("torch.utils.tensorboard")
fake.SummaryWriter = SummaryWriter
sys.modules["torch.utils.tensorboard"] = fake
"""


def numbers_of_run(directory):
    """Every number of metrics.jsonl and eval.jsonl by (step, name)."""
    numbers = {}
    for prefix, name in (("", "metrics.jsonl"), ("eval/", "eval.jsonl")):
        for line in tiny_runs.lines(directory / name):
            for key, value in line.items():
                if isinstance(value, int | float):
                    numbers[line["step"], prefix + key] = value
    return numbers


def test_wandb_gets_all_numbers_and_a_resumed_run_goes_on(runs, logged, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(logged))
    monkeypatch.setenv("LOGGED", str(logged / "wandb.log"))
    directory = runs.directory()
    train.main(runs.argv(run_dir=directory, steps=1, track="wandb"))
    resume(directory, "--steps", 2)
    calls = tiny_runs.lines(logged / "wandb.log")
    first, second = [call for call in calls if call[0] == "init"]
    assert first == second and first[2:] == ["allow", 0] and calls[-1] == ["finish"]
    sent = {}
    for values in (call[1] for call in calls if call[0] == "log"):
        step = values["step"]
        for name, value in values.items():
            assert sent.setdefault((step, name), value) == value
    expected = numbers_of_run(directory)
    assert expected.items() <= sent.items()
    assert len([call for call in calls if call[0] == "log"]) == 2 + 3  # steps and evaluations


def test_tensorboard_gets_all_numbers_of_a_finished_run(runs, logged, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(logged))
    monkeypatch.setenv("LOGGED", str(logged / "tensorboard.log"))
    directory = runs.shared()
    script = ROOT / "study/track.py"
    subprocess.run([sys.executable, script, directory, "tensorboard"], check=True)
    first, *scalars, last = tiny_runs.lines(logged / "tensorboard.log")
    assert first == ["init", str(directory / "tensorboard")] and last == ["finish"]
    sent = {(step, name): value for _, name, value, step in scalars}
    expected = numbers_of_run(directory)
    assert sent == {key: value for key, value in expected.items() if key[1] != "step"}


def test_a_tracker_that_is_not_there_ends_no_run(runs, capfd):
    directory = runs.directory()
    train.main(runs.argv(run_dir=directory, steps=1, track="tensorboard"))
    assert tiny_runs.ended(directory)[0] == "finished"
    assert f"pip install tensorboard, and then: python study/track.py {directory}" in (
        capfd.readouterr().err
    )


def test_plot_draws_the_run(runs):
    directory = runs.new(plot=True, eval_data=None, eval_every=None, eval_samples=None)
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs.shared() / "curves.png").exists()


# ----------------------------------------------------------------------------- signals and exports


def test_a_hangup_saves_as_sigterm_does(runs):
    directory = runs.directory()
    process = tiny_runs.start(tiny_runs.quiet_child, runs.argv(LONG, run_dir=directory))
    wait_for((directory / "metrics.jsonl").exists)
    os.kill(process.pid, signal.SIGHUP)
    process.join(tiny_runs.PATIENCE)
    assert process.exitcode == 0 and tiny_runs.ended(directory)[2] == "SIGHUP"
    assert train.list_checkpoints(directory)


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = train.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stop.restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_is_a_run(runs):
    directory = runs.directory()
    failures = []

    def work():
        try:
            train.main(runs.argv(run_dir=directory, steps=1))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(tiny_runs.PATIENCE)
    assert not failures and tiny_runs.ended(directory)[0] == "finished"


def test_the_way_to_go_on_can_be_typed(runs, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "my runs" / "a"
    log_step = train.log_step

    def then_stop(*arguments):
        log_step(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "log_step", then_stop)
    train.main(runs.argv(run_dir=directory, steps=2))
    assert f"--run-dir '{directory}' --resume latest" in capsys.readouterr().out


def test_a_signal_whose_checkpoint_cannot_be_written_ends_in_one_line(runs, capsys, monkeypatch):
    directory = runs.new(steps=1)

    def no_space(run):
        raise OSError("cannot write the checkpoint: no space left")

    monkeypatch.setattr(train, "log_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(train, "save_checkpoint", no_space)
    with pytest.raises(SystemExit) as end:
        train.main(["--run-dir", str(directory), "--resume", "latest", "--steps", "3"])
    assert "no space left" in end.value.code and "--resume latest" in end.value.code
    assert tiny_runs.ended(directory)[0] == "failed"


def test_exports_can_be_read_by_others_and_hold_nothing_else(tmp_path):
    source = make_model(tmp_path / "m")
    for name in ("README.md", "trainer_state.json", "training_args.json", "notes.txt", "run.py"):
        (source / name).write_text("{}")
    (source / "runs").mkdir()
    (source / "runs/log.txt").write_text("")
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    before = os.umask(0o022)
    try:
        Transformer.from_pretrained(source).save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == kept | {"model.safetensors"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_keep_says_that_exports_all_stay(runs):
    directory = runs.new(steps=3, save_every=1, export_every=1, keep=1)
    assert len(list(directory.glob("model-*"))) == 3 and len(train.list_checkpoints(directory)) == 1
    assert "exports all stay" in " ".join(train.build_parser().format_help().split())
