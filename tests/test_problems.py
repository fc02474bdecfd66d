"""reward.load_problems on the shapes in which problems are published, each in a file written by
hand.

Bugs these tests guard against: a published field name that is not known; a solution taken for an
answer; a prompt that keeps another data set's instruction; a problem that comes a hundred times; a
subset that is another one on resume; a flag that reaches only one of the two files."""

import json
import subprocess
import sys
from collections import Counter

import huggingface_hub
import pytest
import tiny_runs

import eval as evaluation
import reward
import train

# The words around each problem of DAPO-Math-17k and of the AIME file that goes with it
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}"
    '\n\nRemember to put your answer on its own line after "Answer:".'
)


def dapo(problem, answer, wrapped=True):
    return {
        "data_source": "math_dapo",
        "ability": "MATH",
        "prompt": [{"content": DAPO.format(problem) if wrapped else problem, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


# name -> (a line with the fields that its card or its files show, problem, answer, solution)
PUBLISHED = {
    "openai/gsm8k": (
        {"question": "3 boxes of 4 pens?", "answer": "3 * 4 = <<3*4=12>>12 pens\n#### 12"},
        "3 boxes of 4 pens?",
        "12",
        "3 * 4 = <<3*4=12>>12 pens\n#### 12",
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": "Half of $\\pi$?",
            "solution": "It is $\\boxed{\\frac{\\pi}{2}}$.",
            "answer": "\\frac{\\pi}{2}",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "Half of $\\pi$?",
        "\\frac{\\pi}{2}",
        "It is $\\boxed{\\frac{\\pi}{2}}$.",
    ),
    "HuggingFaceH4/aime_2024": (
        {
            "id": 60,
            "problem": "Walk?",
            "solution": "so \\boxed{033}",
            "answer": "033",
            "url": "…",
            "year": "2024",
        },
        "Walk?",
        "033",
        "so \\boxed{033}",
    ),
    "Maxwell-Jia/AIME_2024": (
        {"ID": "2024-II-4", "Problem": "Walk?", "Solution": "$m+n = \\boxed{33}$", "Answer": 33},
        "Walk?",
        "33",
        "$m+n = \\boxed{33}$",
    ),
    "math-ai/aime24": (
        {"id": 60, "problem": "Walk?", "solution": "\\boxed{204}", "url": "https://…"},
        "Walk?",
        "204",
        "\\boxed{204}",
    ),
    "math-ai/aime25": ({"problem": "Bases?", "answer": "70", "id": "0"}, "Bases?", "70", None),
    "opencompass/AIME2025": ({"question": "Bases?", "answer": "70"}, "Bases?", "70", None),
    "AI-MO/aimo-validation-amc": (
        {"id": 0, "problem": "Cost?", "answer": 142.0, "url": "https://…"},
        "Cost?",
        "142.0",
        None,
    ),
    "math-ai/amc23": (
        {"id": 0, "question": "Meet?", "answer": "27", "url": "https://…"},
        "Meet?",
        "27",
        None,
    ),
    "BytedTsinghua-SIA/DAPO-Math-17k": (dapo("Find\n\n$n$.", "34"), "Find\n\n$n$.", "34", None),
    "open-r1/DAPO-Math-17k-Processed": (
        {
            "prompt": "Find $n$.",
            "solution": "34",
            "data_source": "math_dapo",
            "source_prompt": [],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "9a"},
        },
        "Find $n$.",
        "34",
        None,
    ),
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_known_by_their_fields(tmp_path, name):
    line, problem, answer, solution = PUBLISHED[name]
    found = reward.load_problems(write(tmp_path / "data.jsonl", line))
    assert found == [reward.Problem(0, problem, answer, solution, False)]
    assert reward.is_equivalent(answer.lstrip("0").removesuffix(".0"), found[0].answer)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parquet_is_read_as_the_same_lines_are(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    line = PUBLISHED[name][0]
    parquet.write_table(
        pyarrow.Table.from_pylist([line] * 3), tmp_path / "data.parquet", row_group_size=2
    )
    dropped = Counter()
    found = reward.load_problems(tmp_path / "data.parquet", dropped)
    assert found == reward.load_problems(write(tmp_path / "data.jsonl", line))
    assert dropped == {"came before": 2}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match=r"bad\.parquet: .*[Pp]arquet"):
        reward.load_problems(tmp_path / "bad.parquet")
    parquet.write_table(
        pyarrow.table({"problem": ["1+1", None], "answer": ["2", "3"]}), tmp_path / "null.parquet"
    )
    with pytest.raises(ValueError, match=r'null\.parquet:2: the field "problem" is None'):
        reward.load_problems(tmp_path / "null.parquet")


def test_parquet_without_pyarrow_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"data.parquet: to read parquet, pip install pyarrow"
    ) as caught:
        reward.load_problems(tmp_path / "data.parquet")
    assert "\n" not in str(caught.value)


def test_the_checker_needs_neither_hub_nor_parquet_until_a_file_does():
    heavy = "torch", "transformers", "huggingface_hub", "pyarrow"
    code = f"import reward, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=train.HERE
    )
    assert done.stdout.strip() == "[]"


def test_files_on_the_hub_are_fetched_by_huggingface_hub(tmp_path, monkeypatch):
    asked, file = [], write(tmp_path / "main.jsonl", {"question": "1+1?", "answer": "#### 2"})

    def download(repository, name, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        if name == "gone.jsonl":
            raise FileNotFoundError("not on the Hub")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert reward.load_problems("hf://datasets/openai/gsm8k/main/test.jsonl")[0].answer == "2"
    assert reward.load_problems("hf://datasets/openai/gsm8k@1a2b/test.jsonl")[0].answer == "2"
    assert asked == [
        ("openai/gsm8k", "main/test.jsonl", "dataset", None),
        ("openai/gsm8k", "test.jsonl", "dataset", "1a2b"),
    ]
    with pytest.raises(ValueError, match=r"hf://datasets/a/b/gone.jsonl: not on the Hub"):
        reward.load_problems("hf://datasets/a/b/gone.jsonl")
    for wrong in ("hf://datasets/a/b", "hf://a/b/c.jsonl"):
        with pytest.raises(
            ValueError,
            match=rf"{wrong}: a file on the Hub is written hf://datasets/OWNER/NAME/FILE",
        ):
            reward.load_problems(wrong)
    file.write_text("{")  # named as it was typed, not by its place in a cache
    with pytest.raises(
        ValueError, match=r"^hf://datasets/a/b/c.jsonl:1: not UTF-8 text or not JSON"
    ):
        reward.load_problems("hf://datasets/a/b/c.jsonl")


def test_duplicates_are_dropped_and_counted(tmp_path):
    """DAPO-Math-17k has every problem a hundred times, a few of them with two answers: the first
    one stays."""
    path = write(
        tmp_path / "data.jsonl",
        dapo("Find $n$.", ""),
        dapo("Find $n$.", "34"),
        dapo("find  $n$.", "34", wrapped=False),
        dapo("Find $m$.", "7"),
        dapo("Find $n$.", "35"),
        dapo("Find $n$.", "34"),
    )
    dropped = Counter()
    found = reward.load_problems(path, dropped)
    assert [(p.row, p.problem, p.answer) for p in found] == [
        (1, "Find $n$.", "34"),
        (3, "Find $m$.", "7"),
    ]
    assert dropped == {
        "empty problem or answer": 1,
        "came before": 2,
        "came before, with another answer": 1,
    }


@pytest.mark.parametrize(
    "line, message",
    [
        (
            {"prompt": [], "reward_model": {"ground_truth": "1"}},
            'the field "prompt" is []; it must be text',
        ),
        (
            {"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}},
            'the field "prompt" is missing',
        ),
        ({"prompt": "x", "reward_model": "1"}, 'the field "reward_model.ground_truth" is missing'),
        (
            {"prompt": "x", "reward_model": {"ground_truth": None}},
            'the field "reward_model.ground_truth" is None',
        ),
        ({"problem": "x", "answer": "1"}, 'the field "prompt" is missing'),  # a file has one shape
    ],
)
def test_malformed_lines_are_refused_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", dapo("1+1?", "2"), line)
    with pytest.raises(ValueError) as caught:
        reward.load_problems(path)
    assert str(caught.value).startswith(f"{path}:2: {message}") and "\n" not in str(caught.value)


def test_other_fields_are_named(tmp_path):
    line = {"text": "1+1?", "meta": {"gold": 2}, "solution": "\\boxed{2}"}
    path = write(tmp_path / "data.jsonl", line, line | {"text": "2+2?", "meta": {}})
    with pytest.raises(
        ValueError, match=r"data.jsonl:1: of no known shape; it has text, meta, solution: .*--prob"
    ):
        reward.load_problems(path)
    shapes = [("text", "meta.gold", "solution")]
    with pytest.raises(ValueError, match=r'data.jsonl:2: the field "meta.gold" is missing'):
        reward.load_problems(path, shapes=shapes)
    write(path, line)
    assert reward.load_problems(path, shapes=shapes) == [
        reward.Problem(0, "1+1?", "2", "\\boxed{2}", False)
    ]
    with pytest.raises(ValueError, match=r'data.jsonl:1: the field "txt" is missing'):
        reward.load_problems(path, shapes=[("txt", "meta.gold", "solution")])


# -- the two commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Verifier", tiny_runs.Judge)
        yield tiny_runs.Runs(tmp_path_factory.mktemp("runs"))


def renamed(runs, name):
    """The training problems with other names for their fields."""
    lines = [
        {"q": line["problem"], "a": {"b": line["answer"]}}
        for line in tiny_runs.lines(runs.base["data"])
    ]
    return write(runs.folder / name, *lines)


def test_train_reads_named_fields_and_a_held_out_file_of_a_known_shape(runs, capsys):
    named = {"problem_field": "q", "answer_field": "a.b"}
    directory = runs.new(data=renamed(runs, "named.jsonl"), **named)
    assert tiny_runs.metrics(directory) == tiny_runs.metrics(runs.shared())
    assert tiny_runs.evaluations(directory) == tiny_runs.evaluations(runs.shared())
    both = runs.new(
        data=runs.folder / "named.jsonl", eval_data=runs.folder / "named.jsonl", **named
    )
    assert len(tiny_runs.evaluations(both)[0]["per_problem"]) == 24
    capsys.readouterr()
    with pytest.raises(SystemExit):
        runs.new(
            **named
        )  # the training file has no such fields, and is not read by others than were named
    assert 'train.jsonl:1: the field "q" is missing' in capsys.readouterr().err


def test_eval_takes_the_same_flags(runs, monkeypatch, capsys):
    seen = []

    def look(model, tokenizer, verifier, problems, *_, **__):
        seen.append(problems)
        raise ValueError("enough")

    monkeypatch.setattr(evaluation, "generate_rollout", look)
    argv = [
        "--model",
        runs.base["model"],
        "--data",
        renamed(runs, "eval.jsonl"),
        "--problem-field",
        "q",
        "--answer-field",
        "a.b",
        "--limit",
        "7",
    ]
    with pytest.raises(SystemExit):
        evaluation.main(list(map(str, argv)))
    expected = reward.load_problems(runs.base["data"])[:7]
    assert [(p.row, p.problem, p.answer) for p in seen[0]] == [
        (p.row, p.problem, p.answer) for p in expected
    ]
    assert "eval.jsonl: 7 problems\n" in capsys.readouterr().out
