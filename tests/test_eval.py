"""eval.py: metrics against hand-computed cases and brute force, the command against its own file.

Bugs these tests guard against: "no answer" winning a vote; a tie broken by the order of the
samples; a biased pass@k; an interval over samples where problems should be resampled; noise that
depends on the batch, on --limit or on the order of the problems; a share of correct answers that
disagrees with the file written beside it; half a file after a failure; a traceback where a sentence
would do; a grader of the user's that is not the one that runs; a run evaluated in another way than
it evaluates itself.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation  # the name would hide the builtin
import sampler
import train
from eval import (
    bootstrap_interval,
    main,
    maj_at_k,
    mean_at_k,
    metrics_per_problem,
    pass_at_k,
)
from reward import Verifier, load_problems
from sampler import Rollout, Samples, encode_prompt, generate_rollout, load_model

# ----------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("correct", "classes", "credit"),
    [
        ([1, 1, 0, 0], [0, 0, 1, 2], 1),
        ([0, 1, 0, 0], [1, 0, 1, 2], 0),  # 2 votes for a wrong answer, 1 for the right one
        ([1, 1, 0, 0], [0, 0, 1, 1], 1 / 2),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1 / 2),  # the same tie in the other order
        ([0, 1, 0, 0], [5, 7, 9, -1], 1 / 3),
        ([0, 0, 0, 0], [1, 1, 2, 2], 0),
        ([0, 0, 0, 1], [-1, -1, -1, 0], 1),  # silence is no candidate
        ([0, 0, 0, 0], [-1, -1, -1, -1], 0),
        ([1, 1, 1, 1], [0, 0, 0, 0], 1),
    ],
)
def test_majority_vote_by_hand(correct, classes, credit):
    credits = maj_at_k(np.array([correct], bool), np.array([classes]))
    assert credits.tolist() == [pytest.approx(credit)]


def test_mean_and_majority_are_per_problem():
    correct = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    classes = np.array([[0, 1, 1], [3, 3, 1], [-1, 0, 1]])
    assert mean_at_k(correct).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert maj_at_k(correct, classes).tolist() == [0, 1, 0]
    assert mean_at_k([[True, False]]).tolist() == [0.5]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    rows = list(itertools.product([False, True], repeat=n))
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        brute = [
            sum(any(row[i] for i in subset) for subset in subsets) / len(subsets) for row in rows
        ]
        assert pass_at_k(rows, k).tolist() == pytest.approx(brute)


def test_pass_at_k_by_hand():
    # 2 right of 4: 1 − C(2,2)/C(4,2) = 5/6, where the biased 1 − (1 − 2/4)² is 3/4
    assert pass_at_k([[1, 1, 0, 0]], 2).tolist() == pytest.approx([5 / 6])
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} needs"):
            pass_at_k([[1, 1, 0, 0]], k)


def test_names_of_the_metrics():
    def names(k):
        return list(metrics_per_problem(np.zeros((2, k), bool), np.zeros((2, k), int)))

    assert names(1) == ["mean@1"]
    assert names(2) == ["mean@2", "maj@2", "pass@2"]
    assert names(6) == ["mean@6", "maj@6", "pass@2", "pass@4", "pass@6"]
    assert names(8) == ["mean@8", "maj@8", "pass@2", "pass@4", "pass@8"]


def test_bootstrap_interval_by_hand():
    # Two problems, 0 and 1: the mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert bootstrap_interval([0, 1], level=0.95) == (0, 1)
    assert bootstrap_interval([0, 1], level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6) == (0, 1)
    assert bootstrap_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)
    assert bootstrap_interval([1.0], resamples=130) == (1, 1)
    # 30 of 100 right: the binomial's 2.5 % and 97.5 % points
    chance = [math.comb(100, c) * 0.3**c * 0.7 ** (100 - c) for c in range(101)]
    points = [
        next(c for c in range(101) if sum(chance[: c + 1]) >= q) / 100 for q in (0.025, 0.975)
    ]
    values = [1] * 30 + [0] * 70
    assert bootstrap_interval(values) == pytest.approx(points, abs=0.0101)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    spread = np.linspace(0, 1, 37) ** 2
    assert bootstrap_interval(spread, seed=3, resamples=250) != bootstrap_interval(
        spread, seed=4, resamples=250
    )


def test_interval_over_seeds_then_problems_is_the_exact_one():
    """Against all 4 draws of two seeds times all 27 of three problems, the same for both seeds."""
    values = np.array([[0.0, 0.2, 0.9], [0.5, 0.4, 1.0]])
    means = [
        values[np.ix_(seeds, problems)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for problems in itertools.product(range(3), repeat=3)
    ]
    exact = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert bootstrap_interval(values, level=0.8, resamples=40_000) == pytest.approx(exact, abs=1e-9)
    assert bootstrap_interval(values[:1]) == bootstrap_interval(
        values[0]
    )  # one seed: over problems


# ------------------------------------------------------------------------------------ a tiny model

# Byte-level names: Ġ is the space, Ċ the end of line. That is what transformers expects of a
# tokenizer beside a Qwen2 configuration; whatever tokenizer_config.json says, it replaces the
# splitter and the decoder by Qwen2's own.
CHARACTERS = sorted(set("0123456789+-*/=?.,:#$%()\\{}abcdefghijklmnopqrstuvwxyzAPWĠĊ"))
FLAGS = ["--max-new-tokens", "6", "--instruction", "", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Qwen2-shaped model with a character tokenizer, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *CHARACTERS])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges=[])
    )  # no merges: every character is a token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary) + 6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=48,
        tie_word_embeddings=True,
        initializer_range=0.6,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    problems = [("1+1=?", "2"), ("2*3=?", "6"), ("9-5=?", "4"), ("what is 8-8?", "0"), ("7", "7")]
    rows = [{"problem": problem, "answer": answer} for problem, answer in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint), "float32", "cpu")


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as pool:
        yield pool


def run(capsys, checkpoint, data, *flags):
    main(["--model", str(checkpoint), "--data", str(data), *FLAGS, *map(str, flags)])
    return capsys.readouterr().out


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------- sampling and grading


def test_what_is_graded_is_what_was_sampled(capsys, loaded, checkpoint, tmp_path, monkeypatch):
    """Known texts instead of a model's: verdicts, classes, answers and lengths land at their
    problem and sample."""
    _, tokenizer, stop_ids = loaded
    texts = [
        "it is \\boxed{4}",
        "\\boxed{5}",
        "\\boxed{2+2}",
        "dunno",
        "\\boxed{3+3}",
        "\\boxed{6}",
    ]
    seen = {}

    def known(model, prompts, group_size, max_new_tokens, **options):
        seen.update(options, prompts=prompts, group_size=group_size, max_new_tokens=max_new_tokens)
        rows = [tokenizer(text)["input_ids"] + [0] for text in texts]  # 0 ends a response
        lengths = torch.tensor([len(row) for row in rows])
        # Padding must not be read.
        tokens = torch.tensor([row + [7] * (20 - len(row)) for row in rows])
        finished = torch.tensor([True, True, True, False, True, True])
        return Samples(tokens, torch.zeros(tokens.shape), lengths, finished)

    monkeypatch.setattr(sampler, "generate", known)
    problems = [{"problem": "no reference", "answer": ""}] * 12  # dropped
    problems[3] = {"problem": "2+2=?", "answer": "4"}
    problems[11] = {"problem": "2*3=?", "answer": "6", "require_value": True}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in problems))
    argv = ["--model", checkpoint, "--data", data, "--device", "cpu", "--k", 3, "--seed", 5]
    argv += ["--max-new-tokens", 20, "--temperature", 0.7, "--top-p", 0.9, "--top-k", 5]
    argv += ["--system", "sys", "--instruction", "box it", "--rollout-batch", 4]
    main([str(argument) for argument in [*argv, "--out", tmp_path / "out"]])
    lines = read(tmp_path / "out")

    def column(name):
        values = [line[name] for line in lines]
        return [values[:3], values[3:]]

    assert column("row") == [[3] * 3, [11] * 3] and column("sample") == [[0, 1, 2]] * 2
    assert column("response") == [texts[:3], texts[3:]]
    assert column("correct") == [[True, False, True], [False, False, True]]
    assert column("reward") == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert column("answer")[0][:2] == ["4", "5"] and column("answer")[1][0] is None
    first, second = column("class")
    assert first[0] == first[2] != first[1] and second[0] == -1 and second[1] != second[2]
    assert column("length") == [[16, 10, 12], [6, 12, 10]]
    assert column("finished") == [[True, True, True], [False, True, True]]
    assert column("failed") == [[""] * 3] * 2
    assert list(seen["rows"]) == [3, 11] and seen["seed"] == 5 and seen["group_size"] == 3
    assert seen["max_rows"] == 4 and seen["max_new_tokens"] == 20 and seen["stop_ids"] == stop_ids
    assert (seen["temperature"], seen["top_p"], seen["top_k"]) == (0.7, 0.9, 5)
    prompts = [tokenizer.decode(prompt) for prompt in seen["prompts"]]
    assert prompts == ["sys\n2+2=?\nbox it\n", "sys\n2*3=?\nbox it\n"]


def test_noise_belongs_to_the_row_not_to_the_call(loaded, verifier, data):
    """One problem alone, all in another order, a bound on rows: the same responses per data row
    and sample."""
    model, tokenizer, stop_ids = loaded
    problems = load_problems(str(data))

    def responses(problems, k=3, **options):
        prompts = [encode_prompt(tokenizer, problem.problem) for problem in problems]
        options = {"stop_ids": stop_ids, "seed": 1, **options}
        rollout = generate_rollout(model, tokenizer, verifier, problems, prompts, k, 6, **options)
        return {problem.row: texts for problem, texts in zip(problems, rollout.texts)}

    whole = responses(problems)
    assert len({text for texts in whole.values() for text in texts}) > 5
    assert responses(problems[::-1], max_rows=2) == whole
    assert responses(problems[3:4])[3] == whole[3]
    assert responses(problems, seed=2) != whole
    shorter = [texts[:2] for texts in responses(problems, k=2).values()]
    assert shorter == [texts[:2] for texts in whole.values()]


def test_a_rank_without_problems_does_nothing_and_the_whole_is_the_others(monkeypatch):
    """Two problems on three ranks, seen from the third."""
    gathered = iter([[None] * 3, [["first"], ["second"], []]])  # errors, then what came of the work
    monkeypatch.setattr(sampler, "world_size", lambda: 3)
    monkeypatch.setattr(sampler, "rank", lambda: 2)
    monkeypatch.setattr(sampler, "all_gather", lambda _: next(gathered))
    work = sampler.map_over_ranks(["a", "b"], lambda share: pytest.fail(f"worked on {share}"))
    assert work == ["first", "second"]


def test_prompt_and_response_must_fit_the_model(capsys, loaded, checkpoint, tmp_path):
    data = tmp_path / "data.jsonl"
    dropped = json.dumps({"problem": "1", "answer": ""}) + "\n"
    data.write_text(8 * dropped + json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    length = len(encode_prompt(loaded[1], "1+1", None, ""))
    run(capsys, checkpoint, data, "--k", 1, "--max-new-tokens", 48 - length)
    arguments = ["--model", checkpoint, "--data", data, *FLAGS, "--max-new-tokens", 49 - length]
    words = "data row 8: prompt and response of 49 tokens exceed the model's positions (48)"
    assert words in refused(capsys, arguments)


# ------------------------------------------------------------------------------------- the command


def test_table_agrees_with_the_samples_file(capsys, checkpoint, data, tmp_path):
    out, longer = tmp_path / "samples.jsonl", tmp_path / "longer.jsonl"
    longer.write_text(data.read_text() + '{"problem": "no reference", "answer": ""}\n')
    text = run(
        capsys, checkpoint, longer, "--k", 4, "--out", out, "--seed", 3, "--temperature", 0.8
    )
    lines = read(out)
    assert [(line["row"], line["sample"]) for line in lines] == [
        (i, j) for i in range(5) for j in range(4)
    ]
    keys = "row sample correct reward class answer reference require_value in_thought length"
    keys += " finished failed response"
    assert all(list(line) == keys.split() for line in lines)
    assert [line["reference"] for line in lines[::4]] == ["2", "6", "4", "0", "7"]
    assert (
        sorted(os.listdir(tmp_path)) == ["longer.jsonl", "samples.jsonl"]
        and "\x1b" not in text
        and "\r" not in text
    )
    correct = np.array([line["correct"] for line in lines]).reshape(5, 4)
    rows = [row.split() for row in text.splitlines() if "@" in row.split(" ")[0]]
    statistics = {row[0]: row[1:] for row in rows}
    assert list(statistics) == ["mean@4", "maj@4", "pass@2", "pass@4"]
    assert statistics["mean@4"][0] == f"{correct.mean():.1%}"
    assert statistics["pass@4"][0] == f"{correct.any(axis=1).mean():.1%}"
    low, high = bootstrap_interval(correct.mean(axis=1), seed=3)
    assert statistics["mean@4"][1:] == [f"{low:.1%}", "..", f"{high:.1%}"]
    assert f"finished {np.mean([line['finished'] for line in lines]):.1%}" in text
    assert f"no answer {np.mean([line['class'] == -1 for line in lines]):.1%}" in text
    assert f"{np.mean([line['length'] for line in lines]):.1f} tokens a response" in text
    assert ("cut off" in text) == (np.mean([line["finished"] for line in lines]) < 0.5)
    assert "longer.jsonl: 5 problems, 1 dropped (" in text
    assert "4 samples each at temperature 0.8, top-p 1, top-k 0, seed 3" in text


def test_the_file_depends_on_the_seed_alone(capsys, checkpoint, data, tmp_path):
    def lines(name, *flags):
        run(capsys, checkpoint, data, "--k", 2, "--out", tmp_path / name, *flags)
        return read(tmp_path / name)

    whole = lines("a")
    assert lines("a") == whole  # an older file is replaced
    assert lines("b", "--rollout-batch", 3) == whole
    assert lines("c", "--limit", 2) == whole[:4]
    assert lines("d", "--seed", 1) != whole
    assert {line["sample"] for line in lines("e", "--top-k", 1)} == {0, 1}


def test_flags_reach_the_sampler(capsys, checkpoint, data, monkeypatch):
    seen = {}
    generate = sampler.generate

    def spy(model, prompts, group_size, max_new_tokens, **options):
        seen.update(options, k=group_size, length=max_new_tokens)
        seen["dtype"] = model.model.embed_tokens.weight.dtype
        return generate(model, prompts, group_size, max_new_tokens, **options)

    monkeypatch.setattr(sampler, "generate", spy)
    flags = "--k 3 --temperature 0.5 --top-p 0.9 --top-k 7 --rollout-batch 4 --seed 8 --limit 1"
    flags += " --dtype float64"
    text = run(capsys, checkpoint, data, *flags.split())
    assert (seen["k"], seen["length"], seen["seed"], list(seen["rows"])) == (3, 6, 8, [0])
    assert (seen["temperature"], seen["top_p"], seen["top_k"]) == (0.5, 0.9, 7)
    assert (seen["max_rows"], seen["dtype"]) == (4, torch.float64)
    assert "float64 on cpu" in text


def test_greedy_is_a_response_that_no_seed_changes(capsys, checkpoint, data, tmp_path):
    greedy = ["--temperature", 0, "--k", 1, "--out"]
    text = run(capsys, checkpoint, data, *greedy, tmp_path / "a")
    run(capsys, checkpoint, data, *greedy, tmp_path / "b", "--seed", 9)
    run(capsys, checkpoint, data, "--k", 1, "--top-k", 1, "--out", tmp_path / "c")
    assert read(tmp_path / "a") == read(tmp_path / "b") == read(tmp_path / "c")
    assert len(read(tmp_path / "a")) == 5
    assert "mean@1" in text and "maj@1" not in text
    assert "1 samples each at temperature 0," in text


def test_ids_beyond_the_tokenizer_are_masked(loaded):
    model, tokenizer, _ = loaded
    assert model.usable_vocab == len(tokenizer) == model.config.vocab_size - 6


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert (
        output.err.count("\n") == 1
        and output.err.startswith("eval.py: ")
        and "metric" not in output.out
    )
    return output.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", 0], "--k: 0 is not in [1"),
        (["--k", "many"], "--k: invalid int value"),
        (["--temperature", -1], "--temperature: -1 is not in [0"),
        (["--temperature", "nan"], "--temperature: nan"),
        (["--temperature", "inf"], "--temperature: inf"),
        (["--top-p", 0], "--top-p: 0 is not in (0, 1]"),
        (["--top-p", 1.5], "--top-p: 1.5"),
        (["--top-k", -1], "--top-k: -1 is not in [0"),
        (["--max-new-tokens", 0], "--max-new-tokens: 0"),
        (["--limit", -3], "--limit: -3"),
        (["--seed", -1], "--seed: -1"),
        (["--seed", 10**22], "--seed: 1"),
        (["--checkpoint", "step-000001"], "--checkpoint is one of --run's"),
        (["--rollout-batch", -1], "--rollout-batch: -1"),
        (["--answer-field", "gold"], "belong together"),
        (["--reward", "nowhere.py:grade"], "nowhere.py"),
        (["--compare", "runs/*"], "python study/compare.py"),
        (["--device", "tpu"], "--device: invalid choice"),
        (["--dtype", "float16"], "--dtype: invalid choice"),
        (["--temp", 1], "--temp"),  # no guessing at half a flag
        (["--max-new-tokens", 100], "exceed the model's positions (48)"),
    ],
)
def test_wrong_flags_end_in_one_line(capsys, checkpoint, data, tmp_path, flags, words):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", checkpoint, "--data", data, "--device", "cpu", "--out", out, *flags]
    assert words in refused(capsys, arguments)
    assert os.listdir(tmp_path) == []


def test_wrong_files_end_in_one_line(capsys, checkpoint, data, tmp_path):
    good = {
        "--model": checkpoint,
        "--data": data,
        "--device": "cpu",
        "--out": tmp_path / "out.jsonl",
    }

    def message(**changes):
        flags = {**good, **{f"--{name}": value for name, value in changes.items()}}
        return refused(capsys, itertools.chain(*flags.items()))

    assert "--data" in refused(capsys, ["--model", checkpoint])
    assert "nowhere.jsonl" in message(data=tmp_path / "nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": \n')
    assert f"{broken}:2" in message(data=broken)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"problem": "1+1", "answer": ""}\n')
    assert "no usable problem" in message(data=empty)
    assert "cannot be written" in message(out=tmp_path)
    assert "cannot be written" in message(out=tmp_path / "no" / "folder.jsonl")
    assert "no such directory" in message(model=tmp_path / "no-model")
    assert "no model" in message(model="no\nmodel")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    assert "cannot load --model" in message(model=damaged)  # an empty directory
    for name in os.listdir(checkpoint):
        (damaged / name).write_bytes((checkpoint / name).read_bytes())
    (damaged / "model.safetensors").write_bytes(
        (checkpoint / "model.safetensors").read_bytes()[:200]
    )
    assert "cannot load --model" in message(model=damaged)
    (damaged / "tokenizer.json").write_text('{"half": ')
    assert "cannot load --model" in message(model=damaged)
    assert not (tmp_path / "out.jsonl").exists()


def test_cuda_is_refused_where_there_is_none(capsys, checkpoint, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused(
        capsys, ["--model", checkpoint, "--data", data, "--device", "cuda"]
    )


def test_a_failure_while_writing_leaves_the_old_file(loaded, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    dumps, calls = json.dumps, []

    def full_disk(line):
        calls.append(line)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return dumps(line)

    problems = load_problems(str(data))
    zeros = torch.zeros(5, 1)
    texts = [[""]] * 5
    rollout = Rollout(problems, [[0]] * 5, *[zeros] * 7, texts, texts, texts)
    _, tokenizer, _ = loaded
    monkeypatch.setattr(evaluation.json, "dumps", full_disk)
    with pytest.raises(OSError, match="No space left"):
        evaluation.write_responses(str(out), rollout, tokenizer)
    assert os.listdir(tmp_path) == ["out.jsonl"] and out.read_text() == "old\n"


def test_interrupt_is_one_line(capsys, checkpoint, data, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "generate_rollout", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(capsys, checkpoint, data, "--out", tmp_path / "out.jsonl")
    assert (
        stop.value.code == 130
        and capsys.readouterr().err.strip() == "eval.py: interrupted, nothing written"
    )
    assert os.listdir(tmp_path) == []


def test_as_a_script(checkpoint, data):
    """As users run it: imports work, the table is on stdout, a log file gets no progress bar."""
    arguments = ["--model", checkpoint, "--data", data, *FLAGS, "--k", "2", "--limit", "1"]
    script = evaluation.__file__
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "pass@2" in done.stdout and "Traceback" not in done.stderr and " tokens" not in done.stderr
    )


# --------------------------------------------------------------------------- a grader of one's own

GRADER = """
from reward import Grade

def by_length(response, reference, *, problem="", require_value=False, in_thought=False):
    if reference == "7":
        raise RuntimeError("no opinion")
    return Grade(answer=str(len(response)), correct=len(response) > 3, reward=len(response) / 8)
"""


def test_ones_own_grader_decides_and_its_failures_are_counted(capsys, checkpoint, data, tmp_path):
    (tmp_path / "grader.py").write_text(GRADER)
    flags = ["--reward", f"{tmp_path}/grader.py:by_length", "--out", tmp_path / "out", "--k", 2]
    text = run(capsys, checkpoint, data, *flags)
    lines = read(tmp_path / "out")
    graded, failed = lines[:8], lines[8:]
    for line in graded:
        assert line["correct"] == (len(line["response"]) > 3) and line["failed"] == ""
        assert line["reward"] == len(line["response"]) / 8
        assert line["answer"] == str(len(line["response"]))
    for line in failed:
        assert line["failed"] == "exception" and not line["correct"] and line["reward"] == 0
    rewards = [line["reward"] for line in lines]
    assert "grading failed 2, 2 for exception" in text
    assert f"mean reward {np.mean(rewards):.4f}" in text and "by_length" in text
    assert "grading failed 0" in run(capsys, checkpoint, data, "--k", 1)


# -------------------------------------------------------------------------------- a run of train.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tiny_runs.Runs(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained(runs):
    """A run in float64 whose evaluation differs from eval.py's defaults in everything it can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        return runs.new(
            max_prompt_tokens=12,
            max_new_tokens=5,
            eval_samples=3,
            eval_problems=3,
            eval_temperature=0.7,
            instruction="=",
            system="1",
            stop=["<stop>"],
            keep=9,
            export_every=1,
        )


def own_evaluation(run, step):
    (line,) = [line for line in tiny_runs.evaluations(run) if line["step"] == step]
    return line


def correct_by_problem(path, k):
    return np.array([line["correct"] for line in read(path)]).reshape(-1, k).mean(axis=1).tolist()


def evaluate_run(capsys, tmp_path, run, *flags):
    main(["--run", str(run), "--device", "cpu", "--out", str(tmp_path / "out"), *map(str, flags)])
    return capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_is_evaluated_as_its_run_did(capsys, tmp_path, trained, step):
    """In float64, so the same responses, bit for bit."""
    own = own_evaluation(trained, step)
    name = f"step-{step:06d}"
    text = evaluate_run(capsys, tmp_path, trained, "--checkpoint", name)
    assert correct_by_problem(tmp_path / "out", 3) == own["per_problem"]
    assert name in text and f"mean@3    {own['mean']:>8.1%}" in text
    last = own_evaluation(trained, 2)
    beside = f"mean@3 {last['mean']:.1%}, maj@3 {last['maj']:.1%}, by the run itself at step 2"
    assert beside in text
    lengths = [line["length"] for line in read(tmp_path / "out")]
    assert np.mean(lengths) == own["length_mean"] and max(lengths) <= 5


def test_without_a_name_the_newest_checkpoint_is_evaluated_before_an_export(
    capsys, tmp_path, trained
):
    """A run that goes on has an older export; a bfloat16 source rounds every export."""
    assert "step-000002" in evaluate_run(capsys, tmp_path, trained)
    assert correct_by_problem(tmp_path / "out", 3) == own_evaluation(trained, 2)["per_problem"]
    without = tmp_path / "exported"
    shutil.copytree(trained, without, ignore=shutil.ignore_patterns("checkpoints"))
    assert f"{without}/model, float64 on cpu" in evaluate_run(capsys, tmp_path, without)
    assert read(tmp_path / "out")[0]["row"] == 0 and len(read(tmp_path / "out")) == 9
    text = evaluate_run(capsys, tmp_path, trained, "--checkpoint", "model-000001")
    assert f"{trained}/model-000001, float64" in text


def test_a_run_without_an_export_is_evaluated_from_its_newest_checkpoint(capsys, tmp_path, trained):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished, ignore=shutil.ignore_patterns("model", "eval.jsonl"))
    text = evaluate_run(capsys, tmp_path, unfinished)
    assert "step-000002" in text and "by the run itself" not in text
    assert correct_by_problem(tmp_path / "out", 3) == own_evaluation(trained, 2)["per_problem"]
    shutil.rmtree(unfinished / "checkpoints")
    assert "no checkpoint or exported model yet" in refused(capsys, ["--run", unfinished])


@pytest.mark.parametrize("left", ["", '{"step": 2, "me'])
def test_a_run_killed_in_its_first_evaluation_is_evaluated(capsys, tmp_path, trained, left):
    killed = shutil.copytree(trained, tmp_path / "killed")
    (killed / "eval.jsonl").write_text(left)
    text = evaluate_run(capsys, tmp_path, killed)
    assert "mean@3" in text and "tokens/s" in text and "by the run itself" not in text


def test_flags_of_a_run_can_be_overridden(capsys, tmp_path, runs, trained, data):
    flags = ["--k", 2, "--temperature", 1.0, "--max-new-tokens", 4, "--dtype", "float32"]
    flags += ["--data", data, "--limit", 0, "--model", runs.base["model"]]
    flags += ["--instruction", ""]
    text = evaluate_run(capsys, tmp_path, trained, *flags, "--max-prompt-tokens", 40)
    assert "2 samples each at temperature 1, top-p 1" in text and "at most 4 tokens" in text
    assert f"{runs.base['model']}, float32" in text and "problems.jsonl: 5 problems" in text
    assert "mean@2" in text and "mean@3" in text  # its own, with another k
    assert len(read(tmp_path / "out")) == 10
    text = evaluate_run(capsys, tmp_path, trained, "--temperature", 0, "--k", 1)
    assert "1 samples each at temperature 0," in text and len(read(tmp_path / "out")) == 3


def test_a_run_that_evaluates_greedily(capsys, tmp_path, trained):
    greedy = shutil.copytree(trained, tmp_path / "greedy")
    info = json.loads((greedy / "run.json").read_text())
    info["flags"]["eval_temperature"] = 0.0
    (greedy / "run.json").write_text(json.dumps(info))
    assert "3 samples each at temperature 0," in evaluate_run(capsys, tmp_path, greedy)
    responses = [line["response"] for line in read(tmp_path / "out")]
    assert responses[0::3] == responses[1::3] == responses[2::3]
    text = evaluate_run(capsys, tmp_path, greedy, "--temperature", 1.0)
    assert "3 samples each at temperature 1," in text


def test_what_is_no_run_is_refused(capsys, tmp_path, trained):
    assert "run.json" in refused(capsys, ["--run", tmp_path])
    assert "model step-9" in refused(capsys, ["--run", trained, "--checkpoint", "step-9"])
    assert "--run" in refused(capsys, ["--data", "x"])
    with_model = ["--run", trained, "--model", "x", "--checkpoint", "step-000001"]
    assert "goes without --model" in refused(capsys, with_model)
    broken = shutil.copytree(trained, tmp_path / "broken")
    for file in (broken / "checkpoints/step-000001").glob("*.distcp"):
        file.write_bytes(b"?")
    message = refused(capsys, ["--run", broken, "--checkpoint", "step-000001", "--device", "cpu"])
    assert "cannot read the checkpoint" in message and "step-000001" in message
