"""eval.py: metrics against hand-computed cases and brute force, the command against its own per-sample file.

Bugs these tests guard against: "no answer" winning a vote; a tie broken by the order of the samples; a biased pass@k;
an interval over samples where problems should be resampled; noise that depends on the batch, on --limit or on the order
of the problems; a share of right answers that disagrees with the file written beside it; half a file after a failure;
a traceback where a sentence would do; a comparison that pairs seeds or problems with others, sets half a run against a
whole one, or counts a failed run.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import eval as evaluation_module  # the name would hide the builtin
import train
from eval import (
    bootstrap_best_at_k,
    bootstrap_interval,
    bootstrap_maj_at_k,
    evaluate,
    main,
    maj_at_k,
    mean_at_k,
    metrics_per_problem,
    pass_at_k,
)  # fmt: skip
from reward import Problem, Verifier, load_problems
from sampler import Samples

# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("right", "classes", "credit"),
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
def test_majority_vote_by_hand(right, classes, credit):
    assert maj_at_k(np.array([right], bool), np.array([classes])).tolist() == [pytest.approx(credit)]


def test_mean_and_majority_are_per_problem():
    right, classes = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool), np.array([[0, 1, 1], [3, 3, 1], [-1, 0, 1]])
    assert mean_at_k(right).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert maj_at_k(right, classes).tolist() == [0, 1, 0]
    assert mean_at_k([[True, False]]).tolist() == [0.5]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    rows = list(itertools.product([False, True], repeat=n))
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        brute = [sum(any(row[i] for i in subset) for subset in subsets) / len(subsets) for row in rows]
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
    points = [next(c for c in range(101) if sum(chance[: c + 1]) >= q) / 100 for q in (0.025, 0.975)]
    values = [1] * 30 + [0] * 70
    assert bootstrap_interval(values) == pytest.approx(points, abs=0.0101)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    spread = np.linspace(0, 1, 37) ** 2
    assert bootstrap_interval(spread, seed=3, resamples=250) != bootstrap_interval(spread, seed=4, resamples=250)


# ------------------------------------------------------------------------------------------------ a tiny model

# Byte-level names: Ġ is the space, Ċ the end of line. That is what transformers expects of a tokenizer beside a Qwen2
# configuration; whatever tokenizer_config.json says, it replaces the splitter and the decoder by Qwen2's own.
CHARACTERS = sorted(set("0123456789+-*/=?.,:#$%()\\{}abcdefghijklmnopqrstuvwxyzAPWĠĊ"))
FLAGS = ["--max-new-tokens", "6", "--instruction", "", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Qwen2-shaped model with a character tokenizer, as an ordinary Hugging Face directory."""
    path = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))  # no merges: every character is a token
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocabulary) + 6, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=48, tie_word_embeddings=True,
        initializer_range=0.6, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    problems = [("1+1=?", "2"), ("2*3=?", "6"), ("9-5=?", "4"), ("what is 8-8?", "0"), ("7", "7")]
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in problems))
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return evaluation_module.load_checkpoint(str(checkpoint), "float32", "cpu")


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as pool:
        yield pool


def run(capsys, checkpoint, data, *flags):
    main(["--model", str(checkpoint), "--data", str(data), *FLAGS, *map(str, flags)])
    return capsys.readouterr().out


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_reads_what_was_sampled(loaded, verifier, monkeypatch):
    """Known texts instead of a model's: verdicts, classes, answers and lengths land at their problem and sample."""
    model, tokenizer, stop_ids = loaded
    texts = ["it is \\boxed{4}", "\\boxed{5}", "\\boxed{2+2}", "dunno", "\\boxed{3+3}", "\\boxed{6}"]
    seen = {}

    def known(model, prompts, group_size, max_new_tokens, temperature, top_p, top_k, **options):
        seen.update(options, prompts=prompts, group_size=group_size, max_new_tokens=max_new_tokens)
        seen["numbers"] = (temperature, top_p, top_k)
        rows = [tokenizer(text)["input_ids"] + [0] for text in texts]  # 0 ends a response
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([row + [7] * (20 - len(row)) for row in rows])  # padding must not be read
        return Samples(tokens, torch.zeros(tokens.shape), lengths, torch.tensor([True, True, True, False, True, True]))

    monkeypatch.setattr(evaluation_module, "sample", known)
    problems = [Problem(3, "2+2=?", "4", None, False), Problem(11, "2*3=?", "6", None, True)]  # a value is asked for
    result = evaluate(
        model, tokenizer, problems, verifier, k=3, max_new_tokens=20, temperature=0.7, top_p=0.9, top_k=5,
        stop_ids=stop_ids, seed=5, system="sys", instruction="box it", max_rows=4,
    )  # fmt: skip
    assert result.responses.tolist() == [texts[:3], texts[3:]]
    assert result.verdicts.tolist() == [[True, False, True], [False, False, True]]
    assert result.answers[0, :2].tolist() == ["4", "5"] and result.answers[1, 0] is None
    first, second = result.classes.tolist()
    assert first[0] == first[2] != first[1] and second[0] == -1 and second[1] != second[2]
    assert result.lengths.tolist() == [[16, 10, 12], [6, 12, 10]]
    assert result.finished.tolist() == [[True, True, True], [False, True, True]]
    assert not result.timed_out.any()
    assert seen["rows"] == [3, 11] and seen["seed"] == 5 and seen["group_size"] == 3 and seen["max_rows"] == 4
    assert seen["max_new_tokens"] == 20 and seen["numbers"] == (0.7, 0.9, 5) and seen["stop_ids"] == stop_ids
    texts = [tokenizer.decode(prompt) for prompt in seen["prompts"]]
    assert texts == ["sys\n2+2=?\nbox it\n", "sys\n2*3=?\nbox it\n"]


def test_noise_belongs_to_the_row_not_to_the_call(loaded, verifier, data):
    """One problem alone, all in another order, a bound on rows: the same responses per data row and sample."""
    model, tokenizer, stop_ids = loaded
    problems = load_problems(str(data))

    def responses(problems, **options):
        options = {"k": 3, "max_new_tokens": 6, "stop_ids": stop_ids, "instruction": "", "seed": 1, **options}
        result = evaluate(model, tokenizer, problems, verifier, **options)
        return {problem.row: row for problem, row in zip(problems, result.responses.tolist())}

    whole = responses(problems)
    assert len({text for row in whole.values() for text in row}) > 5
    assert responses(problems[::-1], max_rows=2) == whole
    assert responses(problems[3:4])[3] == whole[3]
    assert responses(problems, seed=2) != whole
    assert [row[:2] for row in responses(problems, k=2).values()] == [row[:2] for row in whole.values()]


def test_a_rank_without_problems_does_nothing_and_the_whole_is_the_others(monkeypatch):
    """Two problems on three ranks, seen from the third."""
    gathered = iter([[None] * 3, ["first", "second", None]])  # errors, then what came of the work
    for name, value in (("world", 3), ("rank", 2)):
        monkeypatch.setattr(evaluation_module, name, lambda value=value: value)
    monkeypatch.setattr(evaluation_module, "gather", lambda _: next(gathered))
    parts, order = evaluation_module.deal_out(["a", "b"], lambda share: pytest.fail(f"worked on {share}"))
    assert parts == ["first", "second"] and order == [0, 1]


def test_prompt_and_response_must_fit_the_model(loaded, verifier):
    model, tokenizer, stop_ids = loaded
    options = {"k": 1, "stop_ids": stop_ids, "instruction": ""}
    length = len(evaluation_module.encode_prompt(tokenizer, "1+1", None, ""))
    problems = [Problem(8, "1+1", "2", None, False)]
    evaluate(model, tokenizer, problems, verifier, max_new_tokens=48 - length, **options)
    with pytest.raises(ValueError, match=f"data row 8: {length} prompt tokens and {49 - length} new ones exceed .* 48"):
        evaluate(model, tokenizer, problems, verifier, max_new_tokens=49 - length, **options)


# ------------------------------------------------------------------------------------------------ the command


def test_table_agrees_with_the_samples_file(capsys, checkpoint, data, tmp_path):
    out, longer = tmp_path / "samples.jsonl", tmp_path / "longer.jsonl"
    longer.write_text(data.read_text() + '{"problem": "no reference", "answer": ""}\n')
    text = run(capsys, checkpoint, longer, "--k", 4, "--out", out, "--seed", 3, "--temperature", 0.8)
    lines = read(out)
    assert [(line["row"], line["sample"]) for line in lines] == [(i, j) for i in range(5) for j in range(4)]
    keys = "row sample right class answer reference length finished timed_out response"
    assert all(list(line) == keys.split() for line in lines)
    assert [line["reference"] for line in lines[::4]] == ["2", "6", "4", "0", "7"]
    assert sorted(os.listdir(tmp_path)) == ["longer.jsonl", "samples.jsonl"] and "\x1b" not in text and "\r" not in text
    right = np.array([line["right"] for line in lines]).reshape(5, 4)
    figures = {row.split()[0]: row.split()[1:] for row in text.splitlines() if "@" in row.split(" ")[0]}
    assert list(figures) == ["mean@4", "maj@4", "pass@2", "pass@4"]
    assert figures["mean@4"][0] == f"{right.mean():.1%}"
    assert figures["pass@4"][0] == f"{right.any(axis=1).mean():.1%}"
    low, high = bootstrap_interval(right.mean(axis=1), seed=3)
    assert figures["mean@4"][1:] == [f"{low:.1%}", "..", f"{high:.1%}"]
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
    seen, sample = {}, evaluation_module.sample

    def spy(model, prompts, group_size, max_new_tokens, *numbers, **options):
        seen.update(options, k=group_size, length=max_new_tokens, numbers=numbers)
        seen["dtype"] = model.model.embed_tokens.weight.dtype
        return sample(model, prompts, group_size, max_new_tokens, *numbers, **options)

    monkeypatch.setattr(evaluation_module, "sample", spy)
    flags = "--k 3 --temperature 0.5 --top-p 0.9 --top-k 7 --rollout-batch 4 --seed 8 --limit 1 --dtype float64"
    text = run(capsys, checkpoint, data, *flags.split())
    assert (seen["k"], seen["length"], seen["numbers"]) == (3, 6, (0.5, 0.9, 7))
    assert (seen["max_rows"], seen["seed"], seen["rows"], seen["dtype"]) == (4, 8, [0], torch.float64)
    assert "float64 on cpu" in text


def test_greedy_is_one_response_that_no_seed_changes(capsys, checkpoint, data, tmp_path):
    text = run(capsys, checkpoint, data, "--greedy", "--out", tmp_path / "a")
    run(capsys, checkpoint, data, "--greedy", "--out", tmp_path / "b", "--seed", 9)
    run(capsys, checkpoint, data, "--k", 1, "--top-k", 1, "--out", tmp_path / "c")
    assert read(tmp_path / "a") == read(tmp_path / "b") == read(tmp_path / "c")
    assert len(read(tmp_path / "a")) == 5
    assert "mean@1" in text and "maj@1" not in text and "one greedy response each" in text


def test_ids_beyond_the_tokenizer_are_masked(loaded):
    model, tokenizer, _ = loaded
    assert model.num_tokens == len(tokenizer) == model.config.vocab_size - 6


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.err.count("\n") == 1 and output.err.startswith("eval.py: ") and "metric" not in output.out
    return output.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", 0], "--k: 0 is not in [1"),
        (["--k", "many"], "--k: invalid int value"),
        (["--temperature", 0], "--temperature: 0 is not in (0"),
        (["--temperature", "nan"], "--temperature: nan"),
        (["--temperature", "inf"], "--temperature: inf"),
        (["--top-p", 0], "--top-p: 0 is not in (0, 1]"),
        (["--top-p", 1.5], "--top-p: 1.5"),
        (["--top-k", -1], "--top-k: -1 is not in [0"),
        (["--max-new-tokens", 0], "--max-new-tokens: 0"),
        (["--limit", -3], "--limit: -3"),
        (["--seed", -1], "--seed: -1"),
        (["--rollout-batch", -1], "--rollout-batch: -1"),
        (["--data-fraction", 0], "--data-fraction: 0 is"),
        (["--data-fraction", "nan"], "--data-fraction: nan"),
        (["--answer-field", "gold"], "belong together"),
        (["--greedy", "--k", 4], "--greedy has one response"),
        (["--greedy", "--top-p", 0.5], "--greedy has one response"),
        (["--greedy", "--authors-metrics"], "--authors-metrics needs --k"),
        (["--device", "tpu"], "--device: invalid choice"),
        (["--dtype", "float16"], "--dtype: invalid choice"),
        (["--temp", 1], "--temp"),  # no guessing at half a flag
        (["--max-new-tokens", 100], "exceed the model's 48 positions"),
    ],
)
def test_wrong_flags_end_in_one_line(capsys, checkpoint, data, tmp_path, flags, words):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", checkpoint, "--data", data, "--device", "cpu", "--out", out, *flags]
    assert words in refused(capsys, arguments)
    assert os.listdir(tmp_path) == []


def test_wrong_files_end_in_one_line(capsys, checkpoint, data, tmp_path):
    good = {"--model": checkpoint, "--data": data, "--device": "cpu", "--out": tmp_path / "out.jsonl"}

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
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:200])
    assert "cannot load --model" in message(model=damaged)
    (damaged / "tokenizer.json").write_text('{"half": ')
    assert "cannot load --model" in message(model=damaged)
    assert not (tmp_path / "out.jsonl").exists()


def test_cuda_is_refused_where_there_is_none(capsys, checkpoint, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused(capsys, ["--model", checkpoint, "--data", data, "--device", "cuda"])


def test_a_failure_while_writing_leaves_the_old_file(capsys, checkpoint, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    dumps, calls = json.dumps, []

    def full_disk(line):
        calls.append(line)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return dumps(line)

    monkeypatch.setattr(evaluation_module.json, "dumps", full_disk)
    with pytest.raises(OSError, match="No space left"):
        result = evaluation_module.Evaluation(*[np.zeros((5, 1), int)] * 7)
        evaluation_module.write_samples(str(out), load_problems(str(data)), result)
    assert os.listdir(tmp_path) == ["out.jsonl"] and out.read_text() == "old\n"


def test_interrupt_is_one_line(capsys, checkpoint, data, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_module, "sample", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(capsys, checkpoint, data, "--out", tmp_path / "out.jsonl")
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "eval.py: interrupted, nothing written"
    assert os.listdir(tmp_path) == []


def test_as_a_script(checkpoint, data):
    """The file run as users run it: imports work, the table is on stdout, and a log file gets no progress bar."""
    arguments = ["--model", checkpoint, "--data", data, *FLAGS, "--k", "2", "--limit", "1"]
    script = evaluation_module.__file__
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pass@2" in done.stdout and "Traceback" not in done.stderr and " tokens" not in done.stderr


# ------------------------------------------------------------------------------------------------ authors' bootstrap


def test_bootstrap_metrics_are_verls_to_the_digit():
    """The definition written out as a loop: numpy's old generator, one seed for every problem, first of a tie wins."""
    right = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    classes = np.array([[2, 0, 0, 2, -1], [-1, -1, 4, 4, 4], [0, 0, 0, 0, 0]])
    for k in (2, 3, 5):
        maj, best = [], []
        for row, labels in zip(right, classes):
            np.random.seed(42)
            votes, hits = [], []
            for _ in range(1000):
                drawn = np.random.choice(5, size=k, replace=True)
                winner = Counter(labels[drawn].tolist()).most_common(1)[0][0]  # in the order of first sight
                votes.append(row[list(labels).index(winner)])
                hits.append(row[drawn].any())
            maj.append(np.mean(votes))
            best.append(np.mean(hits))
        assert bootstrap_maj_at_k(right, classes, k).tolist() == maj
        assert bootstrap_best_at_k(right, k).tolist() == best


def test_bootstrap_metrics_by_hand():
    # Two samples, one right. Drawn with replacement, two hold a right one with chance 3/4 (without: always), and the
    # vote is right where the right one is drawn first: 1/2, up to the noise of 1,000 draws (3 standard errors: .047)
    right, classes = [[True, False]], [[0, 1]]
    assert bootstrap_best_at_k(right, 2)[0] == pytest.approx(3 / 4, abs=0.041)
    assert bootstrap_maj_at_k(right, classes, 2)[0] == pytest.approx(1 / 2, abs=0.047)
    assert pass_at_k(right, 2)[0] == 1
    # one right and three silent: silence loses a tie half the time, and to three or four; exact maj@4 says 1
    chance = sum(math.comb(4, c) * 0.25**c * 0.75 ** (4 - c) * (1 if c > 2 else 0.5 if c == 2 else 0) for c in range(5))
    assert chance == pytest.approx(0.15625)
    silent = [[0, -1, -1, -1]]
    assert bootstrap_maj_at_k([[1, 0, 0, 0]], silent, 4)[0] == pytest.approx(chance, abs=0.035)
    assert maj_at_k(np.array([[1, 0, 0, 0]], bool), np.array(silent))[0] == 1
    for value in (0, 1):  # no noise where there is no doubt
        assert bootstrap_maj_at_k([[value] * 4], [[0] * 4], 3)[0] == value == bootstrap_best_at_k([[value] * 4], 3)[0]


def test_authors_metrics_are_printed_beside_ours(capsys, checkpoint, data):
    text = run(capsys, checkpoint, data, "--k", 4)
    more = run(capsys, checkpoint, data, "--k", 4, "--authors-metrics")
    lines = [line.split() for line in more.splitlines() if line.startswith("bootstrap")]
    assert "bootstrap maj" not in text and "authors" in more and "with replacement" in more
    assert [(words[1], words[4]) for words in lines] == [("maj@2", "best@2"), ("maj@4", "best@4")]
    table = [[line for line in out.splitlines() if line.startswith(("mean@", "maj@", "pass@"))] for out in (text, more)]
    assert table[0] == table[1]


# ------------------------------------------------------------------------------------------------ --compare

FLAGS_OF_A_RUN = {
    "algo": "copo", "blend": "soft-zero", "gamma": 5.0, "seed": 0, "steps": 20, "micro_tokens": 64,
    "data": "/here/data/train.jsonl", "eval_data": "/here/data/test.jsonl", "run_dir": "x",
}  # fmt: skip


def fake_run(path, evaluations, metrics, **flags):
    """A run's files: evaluations {step: (per problem, per problem of the vote)}, metrics [(step, tokens, ...)]."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"flags": FLAGS_OF_A_RUN | {"run_dir": str(path)} | flags}))
    names = ("step", "tokens", "seconds", "mixed", "zero_gradient_groups", "wrong_pushed_up")
    lines = [dict(zip(names, row)) | {"loss": 0.1, "prompts_trained": 4} for row in metrics]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"step": s, "k": 2, "per_problem": p, "per_problem_maj": m} for s, (p, m) in evaluations.items()]
    (path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def three_runs(tmp_path):
    """copo with seeds 0 and 1; grpo with seed 0, which stopped half way."""
    fake_run(
        tmp_path / "copo-0",
        {0: ([0, 0, 0.5, 0.5], [0] * 4), 10: ([1, 1, 0.5, 0.5], [1, 1, 0, 0.5]),
         20: ([1, 0.5, 0.5, 0], [1, 0.5, 0, 0])},
        [(1, 100, 2.0, 0.5, 0.0, 0.1), (20, 300, 3.0, 0.25, 0.5, 0.3)],
    )  # fmt: skip
    fake_run(
        tmp_path / "copo-1",
        {0: ([0] * 4, [0] * 4), 10: ([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]), 20: ([1, 1, 1, 0], [1, 1, 1, 0])},
        [(20, 500, 7.0, 0.5, 0.0, 0.4)], seed=1, data="/there/data/train.jsonl", micro_tokens=99,
    )  # fmt: skip
    fake_run(
        tmp_path / "grpo-0",
        {0: ([0, 0, 0.5, 0.5], [0, 0, 0, 1]), 10: ([0.5] * 4, [0, 0, 0, 1])},
        [(1, 60, 1.0, 0.5, 0.5, 0.0), (12, 900, 9.0, 0.0, 1.0, 0.0)], algo="grpo", blend="local",
    )  # fmt: skip
    return tmp_path


def compared(capsys, tmp_path, *arguments):
    main(["--compare", *map(str, arguments), "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    figures = {(row["configuration"], row["figure"]): row for row in report["figures"]}
    return capsys.readouterr().out, report, figures


def test_three_runs_by_hand(capsys, three_runs):
    paths = three_runs / "*-0", three_runs / "copo-1"
    text, report, figures = compared(capsys, three_runs, *paths, "--baseline", "grpo")
    assert report["flags"] == {
        "copo": {"algo": "copo", "blend": "soft-zero"}, "grpo": {"algo": "grpo", "blend": "local"}
    }  # fmt: skip
    assert (report["problems"], report["baseline"], report["failed"]) == (4, "grpo", {})
    assert [(r["seed"], r["step"], r["of"]) for r in report["runs"]["copo"]] == [(0, 20, 20), (1, 20, 20)]
    assert "0 (unfinished: step 10 of 20)" in text and "One seed, so over problems only" in text
    # copo, seeds 0 and 1, by hand. Curves of seed 0 by problem, steps 0 10 20: 0 1 1, 0 1 ½, ½ ½ ½, ½ ½ 0; trapezoids
    # over 20 steps: .75, .625, .5, .375. Of seed 1: 0 ½ 1, 0 ½ 1, 0 0 1, 0 0 0: .5, .5, .25, 0. Seed 0 is best at 10.
    by_hand = {
        "mean@2, last step": (0.5, 0.75), "mean@2, best step": (0.75, 0.75), "maj@2, last step": (0.375, 0.75),
        "maj@2, best step": (0.625, 0.75), "mean@2, area under the curve": (0.5625, 0.3125),
        "tokens sampled": (300, 500), "seconds": (5, 7), "groups of equal verdicts": (0.625, 0.5),
        "groups without gradient": (0.25, 0), "wrong responses pushed up": (0.2, 0.4),
    }  # fmt: skip
    assert list(by_hand) == list(dict.fromkeys(row["figure"] for row in report["figures"]))
    for name, runs in by_hand.items():
        assert figures["copo", name]["runs"] == pytest.approx(runs)
        assert figures["copo", name]["mean"] == pytest.approx(sum(runs) / 2)
    # grpo: its line of step 12 lies beyond its last evaluation and counts nowhere
    by_hand = (0.5, 0.5, 0.25, 0.25, 0.375, 60, 1, 0.5, 0.5, 0)
    assert [row["mean"] for row in report["figures"] if row["configuration"] == "grpo"] == pytest.approx(by_hand)
    # Differences: of seed 0 alone, and up to step 10 alone, where both are. copo-0 there: mean ¾, maj ⅝, area ½, its
    # first line of metrics.
    by_hand = (0.25, 0.25, 0.375, 0.375, 0.125, 40, 1, 0, -0.5, 0.1)
    found = [row["difference"]["mean"] for row in report["figures"] if row["configuration"] == "copo"]
    assert found == pytest.approx(by_hand)
    assert all(row["difference"] is None for row in report["figures"] if row["configuration"] == "grpo")
    # Intervals. Two seeds, one figure each: both bounds are drawn with chance ¼. One seed and ½ ½ 0 0 over problems: a
    # sixteenth for 0, another for ½. One seed, one figure: none.
    # Two seeds and four problems, all 4 · 256 draws: 1.2 % are below 3/16, 2.7 % at most 3/16; 8.2 % are 1.
    assert figures["copo", "mean@2, last step"]["interval"] == [3 / 16, 1]
    assert figures["copo", "tokens sampled"]["interval"] == [300, 500]
    assert figures["copo", "mean@2, last step"]["difference"]["interval"] == [0, 0.5]
    assert figures["copo", "tokens sampled"]["difference"]["interval"] is None
    assert figures["grpo", "seconds"]["interval"] is None
    assert figures["grpo", "mean@2, last step"]["interval"] == [0.5, 0.5]
    # The table says what the file says.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["mean@2, last step", "copo", "62.5% [18.8%, 100.0%]", "+25.0% [+0.0%, +50.0%]"] in rows
    assert ["tokens sampled", "copo", "400 [300, 500]", "+40"] in rows
    assert ["groups without gradient", "copo", "12.5% [0.0%, 25.0%]", "-50.0%"] in rows
    assert "chosen on these same problems" in text and "10 differences" in text


def test_interval_over_seeds_then_problems_is_the_exact_one(capsys):
    """Against all 4 draws of two seeds times all 27 draws of three problems, which are the same for both seeds."""
    values = np.array([[0.0, 0.2, 0.9], [0.5, 0.4, 1.0]])
    means = [
        values[np.ix_(seeds, problems)].mean()
        for seeds in itertools.product(range(2), repeat=2) for problems in itertools.product(range(3), repeat=3)
    ]  # fmt: skip
    exact = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert bootstrap_interval(values, level=0.8, resamples=40_000) == pytest.approx(exact, abs=1e-9)
    assert bootstrap_interval(values[:1]) == bootstrap_interval(values[0])  # one seed: over problems


def test_a_marked_difference_excludes_zero(capsys, tmp_path):
    for seed in range(3):
        for algo, value in (("copo", 0.75), ("grpo", 0.5)):
            pair = ([value] * 4, [value, 0.5, 0.5, 0.5])
            fake_run(tmp_path / f"{algo}{seed}", {0: pair}, [], algo=algo, seed=seed, steps=0)
    text, _, figures = compared(capsys, tmp_path, tmp_path / "*o[0-2]", "--baseline", tmp_path / "grpo1")
    assert "+25.0% [+25.0%, +25.0%] *" in text
    assert figures["copo", "maj@2, last step"]["difference"]["interval"][0] == 0  # a problem may be drawn never
    assert "tokens sampled" not in text and "unfinished" not in text


def test_groups_that_dynamic_sampling_dropped_count_as_equal(capsys, tmp_path):
    fake_run(tmp_path / "dapo", {1: ([1] * 4, [1] * 4)}, [(1, 60, 1.0, 1.0, 0.0, 0.0)], algo="dapo")
    line = json.loads((tmp_path / "dapo/metrics.jsonl").read_text())
    (tmp_path / "dapo/metrics.jsonl").write_text(json.dumps(line | {"equal_groups_drawn": 0.75}) + "\n")
    _, _, figures = compared(capsys, tmp_path, tmp_path / "dapo")
    assert figures["dapo", "groups of equal verdicts"]["mean"] == 0.75


def test_configurations_are_named_by_what_sets_them_apart(capsys, three_runs):
    curve = {0: ([0] * 4, [0] * 4)}
    fake_run(three_runs / "soft", curve, [], blend="soft", gamma=20.0)
    text, report, _ = compared(capsys, three_runs, three_runs / "*")
    assert list(report["flags"]) == ["copo blend=soft-zero gamma=5.0", "grpo", "copo blend=soft gamma=20.0"]
    assert report["baseline"] is None and "minus" not in text and "Differences" not in text
    assert report["flags"]["grpo"] == {"algo": "grpo", "blend": "local", "gamma": 5.0}
    fake_run(three_runs / "newer", curve, [], algo="dapo", blend="local", kl_coef=0.5)  # a flag that the others lack
    text, report, _ = compared(capsys, three_runs, three_runs / "*")
    assert report["flags"]["dapo"]["kl_coef"] == 0.5 and report["flags"]["grpo"]["kl_coef"] is None
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1
    fake_run(three_runs / "again", curve, [], seed=1, save_every=3)
    assert "copo-1" in refused(capsys, ["--compare", three_runs / "*"])  # the same seed of the same configuration


def test_flags_of_speed_make_no_configuration():
    """What may change on resume without a word, lengths apart, tells no configurations; new flags of that kind too."""
    ours, known = evaluation_module.NOT_A_CONFIGURATION, set(vars(train.flags().parse_args([])))
    assert ours.issubset(known) and ours.issuperset(train.NOT_THE_RUN - {"steps", "eval_every"})


def test_failed_runs_are_listed_and_unfinished_ones_count(capsys, three_runs):
    runs = three_runs / "bad"
    (runs / "empty").mkdir(parents=True)
    fake_run(runs / "killed-in-warm-start", {}, [])
    fake_run(runs / "diverged", {0: ([0] * 4, [0] * 4)}, [(7, 1, 1.0, 0.5, 0.0, 0.0)])
    line = json.loads((runs / "diverged/metrics.jsonl").read_text())
    (runs / "diverged/metrics.jsonl").write_text(json.dumps(line | {"loss": None}) + "\n")
    fake_run(runs / "damaged", {0: ([0] * 4, [0] * 4)}, [])
    (runs / "damaged/eval.jsonl").write_text('{"step": 0,\n{"step": 1}\n')
    fake_run(runs / "older", {1: ([0] * 4, [0] * 4)}, [])
    (runs / "older/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    fake_run(runs / "changed", {1: ([0] * 4, [0] * 4)}, [])
    about = json.loads((runs / "changed/run.json").read_text())
    about["resumed"] = [{"step": 0, "changed": {}}, {"step": 1, "changed": {"gamma": [1.0, 5.0]}}]
    (runs / "changed/run.json").write_text(json.dumps(about))
    for name, how in (("stopped", "stopped"), ("broken", "failed")):
        fake_run(runs / name, {0: ([0] * 4, [0] * 4)}, [], algo="dapo", seed=len(name))
        about = json.loads((runs / name / "run.json").read_text())
        ended = {"how": how, "step": 3, "why": "OSError: disk full"}
        (runs / name / "run.json").write_text(json.dumps(about | {"ended": ended}))
    with open(three_runs / "copo-1/eval.jsonl", "a") as file:
        file.write('{"step": 30, "k":')  # killed while writing: the line before counts
    text, report, _ = compared(capsys, three_runs, three_runs / "copo-*", runs / "*")
    reasons = {path.split("/")[-1]: reason for path, reason in report["failed"].items()}
    assert reasons.keys() == {"empty", "killed-in-warm-start", "diverged", "damaged", "older", "changed", "broken"}
    assert reasons["broken"] == "failed after step 3: OSError: disk full"
    assert [Path(run["path"]).name for run in report["runs"]["dapo"]] == ["stopped"]
    assert "resumed with another gamma" in reasons["changed"]
    assert "run.json" in reasons["empty"] and "no evaluation" in reasons["killed-in-warm-start"]
    assert "step, 7, was finite" in reasons["diverged"] and "unreadable: JSONDecodeError" in reasons["damaged"]
    assert "'tokens'" in reasons["older"]
    assert text.count("failed, and in no figure") == 7 and len(report["runs"]["copo"]) == 2


def test_a_real_run_is_read(capsys, tmp_path, monkeypatch):
    """The field names are those that train.py writes: runs made here and now show every figure."""
    monkeypatch.setattr(train, "Verifier", tiny_runs.Judge)
    runs = tiny_runs.Runs(tmp_path)
    for algo in ("copo", "grpo"):
        train.main(runs.argv(algo=algo, run_dir=tmp_path / algo))
    _, report, figures = compared(capsys, tmp_path, tmp_path / "copo", tmp_path / "grpo", "--baseline", "copo")
    assert report["failed"] == {} and list(report["flags"]) == ["copo", "grpo"] and len(figures) == 20
    assert [flag for flag, value in report["flags"]["grpo"].items()] == ["algo", "blend"]


def test_plot_of_curves(capsys, three_runs, monkeypatch):
    arguments = [three_runs / "*o-?", "--plot", three_runs / "curves.png"]
    monkeypatch.setattr(evaluation_module, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, ["--compare", *arguments])
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    compared(capsys, three_runs, *arguments)
    assert (three_runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_comparisons_end_in_one_line(capsys, three_runs):
    def message(*arguments):
        return refused(capsys, ["--compare", *arguments])

    assert "no such directory" in message(three_runs / "nowhere*")
    assert "--compare" in message()
    assert "--model" in message(three_runs / "copo-0", "--model", "x")
    assert "--baseline dapo is neither" in message(three_runs / "*", "--baseline", "dapo")
    (three_runs / "nothing").mkdir()
    assert "nothing to compare" in message(three_runs / "nothing")
    assert "json" in message(three_runs / "copo-0", "--json", three_runs / "no" / "where.json")
    fake_run(three_runs / "other", {0: ([0], [0])}, [], algo="dapo")
    assert "different things, (k, problems, file): [(2, 1, 'test.jsonl'), (2, 4" in message(three_runs / "*")
