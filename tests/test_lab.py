"""The advantage lab, study/lab.py, against numbers computed by hand and against a run of train.py.

Bugs these tests guard against: a lab that speaks of another algorithm than the one that trains; a
length counted where the loss takes the mean over a response's tokens; NaN in a table where a run
has no wrong response; a half-written last line taken for a fault; a traceback for a bad file; a map
of another step than its caption says, or with a group left out.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch

import copo
import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))

import lab


def close(actual, expected, tol):
    actual = torch.tensor(actual, dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64)
    # NaN where NaN is expected, and nowhere else: a kind of group or response that is not there
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol, equal_nan=True)


def group(step, correct, classes, lengths=None, **more):
    """A line of groups.jsonl: rewards are the verdicts; w, A^l and A^g of a run with w = 0."""
    size = len(correct)
    line = {
        "step": step,
        "row": 7,
        "H": 0,
        "R": 0,
        "global_adv": 2.0,
        "correct": correct,
        "reward": correct,
        "class": classes,
        "length": lengths or [4] * size,
        "finished": [1] * size,
        "weight": [0] * size,
        "local_adv": [9] * size,
        "answers": {},
    }
    return json.dumps(line | more) + "\n"


@pytest.fixture
def saved(tmp_path):
    """Step 1: R 1, 1/2, 0, so A^g 1, 0, −1; H 0, 1, 1. Step 2: R 1/2, 0, so A^g ±.7071; H 1, 0."""
    path = tmp_path / "groups.jsonl"
    path.write_text(
        group(1, [1, 1], [0, 0])
        + group(1, [1, 0], [0, 1], [10, 30])
        + group(1, [0, 0], [1, 2], [5, 5])
        + group(2, [1, 0], [0, 1])
        + group(2, [0, 0], [-1, -1])
    )
    return path


def table_rows(text):
    """The lines of both tables as {rule: words}; the heads stand under ""."""
    rows = {}
    for line in text.splitlines():
        if line[16:17] == " ":
            rows[line[:16].strip()] = line[16:].split()
    return rows


# ----------------------------------------------------------------------------------- the statistics


def test_statistics_by_hand(saved):
    steps = lab.read_groups(saved)
    assert [tuple(step["correct"].shape) for step in steps] == [(3, 2), (2, 2)]
    statistics = lab.rule_statistics(lab.read_groups(saved, 1), copo.PRESETS["copo"])
    # w of the group that is all right; that of the mixed group's right answer is 1/2
    low = 1 / (1 + math.exp(5))
    half = math.sqrt(0.5)  # A^l of the mixed group: (1 − 1/2)/√(1/2)
    right = [1 - low, 1 - low, 0.5 * half]  # effective, A^g of the mixed group being 0
    total = sum(right) + 2  # the wrong ones: 0 −1 −1
    by_hand = {
        "w right": (2 * low + 0.5) / 3,
        "w wrong": 0,
        "A^l right": half / 3,
        "A^l wrong": -half / 3,
        "A^g right": 2 / 3,
        "A^g wrong": -2 / 3,
        "A right": sum(right) / 3,
        "A wrong": -2 / 3,
        "from all wrong": 2 / total,
        "from mixed": 0.5 * half / total,
        "from all right": 2 * (1 - low) / total,
        "all wrong reached": 1,
        "all right reached": 1,
        "wrong pushed up": 0,
        "right pushed down": 0,
        "idle groups": 0,
    }
    assert list(statistics) == list(by_hand)
    close(list(statistics.values()), list(by_hand.values()), 1e-5)


def test_group_gate_and_grpo_by_hand(saved):
    # Step 2: the mixed group is above the mean, and its wrong answer gets all of that; with the
    # group's gate half of that and half of A^l, which cancel. In both steps 6 wrong responses, one
    # of them pushed up.
    steps = lab.read_groups(saved)
    half = math.sqrt(0.5)
    statistics = lab.rule_statistics(steps, copo.PRESETS["copo"])
    assert statistics["wrong pushed up"] == pytest.approx(1 / 6)
    group_gate = copo.Algorithm(blend="soft-zero-group")
    second = lab.rule_statistics(steps[1:], group_gate)
    assert second["A wrong"] == pytest.approx(-2 * half / 3, abs=1e-5)
    assert lab.rule_statistics(steps, group_gate)["wrong pushed up"] == 0
    grpo = lab.rule_statistics(steps, copo.PRESETS["grpo"])
    assert (grpo["idle groups"], grpo["from mixed"], grpo["wrong pushed up"]) == (3 / 5, 1, 0)
    assert (grpo["all wrong reached"], grpo["all right reached"]) == (0, 0)


def test_groups_of_equal_verdicts_that_get_a_gradient(tmp_path):
    """Two all-wrong groups, of which one has a response below the other by its penalty on length,
    and two that are all right. GRPO reaches one of the first; NGRPO both, and none of the right."""
    path = tmp_path / "groups.jsonl"
    path.write_text(
        group(1, [0, 0], [1, 2])
        + group(1, [0, 0], [1, 1], reward=[0, -0.5])
        + group(1, [1, 1], [0, 0]) * 2
        + group(1, [1, 0], [0, 1])
    )
    steps = lab.read_groups(path)
    shares = {}
    for name, algorithm in lab.all_rules().items():
        statistics = lab.rule_statistics(steps, algorithm)
        shares[name] = (statistics["all wrong reached"], statistics["all right reached"])
    assert shares["grpo"] == shares["sequence"] == (0.5, 0)
    assert shares["ngrpo"] == (1, 0)
    assert shares["zero"] == (1, 0) and shares["copo-forced"] == (1, 1)
    assert shares["sign"] == shares["w-reinforce"] == shares["ebpo"] == (1, 1)


def test_right_pushed_down(tmp_path):
    """R 1, 1, 1/2: the third group is below the mean, and the global loss lowers its right one."""
    path = tmp_path / "groups.jsonl"
    path.write_text(group(1, [1, 1], [0, 0]) * 2 + group(1, [1, 0], [0, 1], global_adv=-1.0))
    steps = lab.read_groups(path)
    below = lab.rule_statistics(steps, copo.Algorithm(blend="global"))
    assert (below["right pushed down"], below["wrong pushed up"]) == (1 / 5, 0)
    assert lab.rule_statistics(steps, copo.PRESETS["grpo"])["right pushed down"] == 0
    assert lab.rule_statistics(steps, None)["right pushed down"] == 1 / 5  # the saved A^g


def test_lengths_count_where_the_aggregation_sums_over_tokens(saved):
    # global term alone, step 1: sizes 1 1, 0 0, 1 1 and lengths 4 4, 10 30, 5 5
    rule = copo.Algorithm(blend="global")
    steps = lab.read_groups(saved, 1)
    assert lab.rule_statistics(steps, rule)["from all wrong"] == pytest.approx(1 / 2)
    for aggregation in ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        statistics = lab.rule_statistics(steps, replace(rule, aggregation=aggregation))
        assert statistics["from all wrong"] == pytest.approx(5 / 9)


def test_saved_rewards_hold_the_penalty_on_length(tmp_path):
    """A rule with a penalty on length adds none to the saved rewards: they hold the run's own."""
    path = tmp_path / "groups.jsonl"
    path.write_text(group(1, [1, 1], [0, 0], [5, 9], reward=[1.0, 0.5]))
    steps = lab.read_groups(path)
    grpo = copo.PRESETS["grpo"]
    expected = lab.recompute(steps[0], grpo)["A^l"]
    close(expected.tolist(), [[math.sqrt(0.5), -math.sqrt(0.5)]], 1e-5)
    penalised = lab.recompute(steps[0], replace(grpo, overlong_factor=1.0))["A^l"]
    assert torch.equal(penalised, expected)


def test_the_run_itself(saved):
    statistics = lab.rule_statistics(lab.read_groups(saved), None)
    names = ("w right", "A^l wrong", "A^g right", "A wrong", "wrong pushed up")
    assert [statistics[name] for name in names] == [0, 9, 2, 2, 1]


def test_agrees_with_a_real_run(tmp_path, monkeypatch):
    """What train.py saved is what its preset gives here: the lab speaks of the same algorithm."""
    monkeypatch.setattr(train, "Verifier", tiny_runs.Judge)
    runs = tiny_runs.Runs(tmp_path)
    for algo in ("copo", "copo-paper", "grpo"):
        steps = lab.read_groups(runs.new(algo=algo, prompts_per_step=8) / "groups.jsonl")
        own = lab.rule_statistics(steps, None)
        recomputed = lab.rule_statistics(steps, copo.PRESETS[algo])
        assert own["A right"] != 0
        close(list(own.values()), list(recomputed.values()), 1e-5)


# ---------------------------------------------------------------------------------- what it prints


def test_groups_without_wrong_responses(tmp_path, capsys):
    path = tmp_path / "groups.jsonl"
    path.write_text(group(1, [1, 1], [0, 0]))
    statistics = lab.rule_statistics(lab.read_groups(path), copo.PRESETS["copo"])
    assert math.isnan(statistics["wrong pushed up"])
    assert math.isnan(statistics["all wrong reached"]) and statistics["all right reached"] == 0
    lab.main([str(path)])
    assert "nan" not in capsys.readouterr().out


def test_every_rule_and_the_sweep_are_printed(saved, capsys):
    lab.main([str(saved)])
    text = capsys.readouterr().out
    rows = table_rows(text)
    rules = {"the run's own", *copo.PRESETS, *copo.BLENDS, *copo.ADVANTAGES, *copo.RATIOS}
    # these are rules of the presets copo, copo-group, copo-forced and grpo
    rules -= {"soft-zero", "soft-zero-group", "forced", "local", "group", "token"}
    assert rules | {"γ 20  ρ 0.5", "γ 1   ρ 2"} <= rows.keys()
    assert len(rows) == len(rules) + 20 + 1  # and the heads
    # Four right answers: A .9933 .9933 .3536 .7071; six wrong ones: A 0 −1 −1 .7071 −.7071 −.7071.
    # Of Σ|A| = 7.169 all wrong groups have 3.414, mixed ones 1.768.
    means = "0.25 0.00 0.35 -0.24 0.68 -0.45 0.76 -0.45"
    assert " ".join(rows["copo"]) == f"{means} 47.6% 24.7% 27.7% 100.0% 100.0% 16.7% 0.0% 0.0%"
    shares = ["0.0%", "100.0%", "0.0%", "0.0%", "0.0%", "0.0%", "0.0%", "60.0%"]
    assert rows["grpo"][-8:] == shares
    assert rows["sequence"] == rows["grpo"]
    assert rows["γ 5   ρ 1"] == rows["copo"] and "5 groups of 2 steps" in text
    assert max(map(len, text.splitlines())) <= 130
    lab.main([str(saved), "--step", "2", "--blend", "soft"])
    text = capsys.readouterr().out
    assert "2 groups of 1 steps" in text and "Blend soft over" in text


def test_a_new_advantage_and_a_new_blend_get_their_rows(saved, capsys, monkeypatch):
    blend = copo.Blend(uses_entropy=False, gate=copo.every_response)
    monkeypatch.setitem(copo.BLENDS, "mine", blend)
    monkeypatch.setitem(copo.ADVANTAGES, "two", lambda rewards, correct, scale: 4.0 * correct - 2)
    monkeypatch.setitem(copo.RATIOS, "one", lambda logprobs, old, mask: (logprobs - logprobs, old))
    lab.main([str(saved), "--blend", "mine"])
    rows = table_rows(capsys.readouterr().out)
    assert rows["mine"] == rows["grpo"] == rows["γ 5   ρ 1"] == rows["one"]
    # w, then A^l and A^g of right and of wrong responses, and A = A^l: +2 and −2
    assert rows["two"][:4] == ["1.00", "1.00", "2.00", "-2.00"]
    assert rows["two"][6:8] == ["2.00", "-2.00"]


def test_later_formats_with_more_fields_read_the_same(saved, tmp_path, capsys):
    lab.main([str(saved)])
    before = capsys.readouterr().out.split("\n", 1)[1]
    longer = tmp_path / "longer.jsonl"
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    longer.write_text("".join(json.dumps(line | {"failed": ["", ""]}) + "\n" for line in lines))
    lab.main([str(longer)])
    assert capsys.readouterr().out.split("\n", 1)[1] == before


def test_a_closed_pipe_ends_it_without_a_traceback(saved):
    """`python study/lab.py … | head -1` used to end in a BrokenPipeError on the console."""
    command = [sys.executable, lab.__file__, str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # long before it prints: it has to import torch first
    error = process.stderr.read()
    assert process.wait() != 0 and error == ""


def test_plot(saved, capsys, monkeypatch):
    picture = saved.parent / "lab.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        lab.main([str(saved), "--plot", str(picture)])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    lab.main([str(saved), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ the map


def test_the_assumed_step_is_what_the_map_says_of_it():
    classes = lab.assumed_classes()
    assert classes.shape == (1000, 6) and lab.GROUP_SIZE == 6
    num_right = (classes == 0).sum(dim=1)
    shares = [(num_right == number).double().mean().item() for number in (0, 6)]
    rewards = num_right.double() / 6
    words = f"{shares[0]:.0%} of them all wrong and {shares[1]:.1%} all right"
    assert words.replace("%", " %") in lab.CAPTION
    mean, std = f"{rewards.mean():.3f}".lstrip("0"), f"{rewards.std():.3f}".lstrip("0")
    assert f"mean {mean}, standard deviation {std}" in lab.CAPTION
    assert mean == ".255" and std == ".346"  # the step of the design, section 2


def test_the_map_holds_every_possible_group():
    """Wrong answers of six, five .. none can agree in 11, 7, 5, 3, 2, 1, 1 ways; no two of those
    with as many right responses have the same entropy."""
    cells = lab.map_cells(copo.PRESETS["grpo"])
    counts = [sum(place[0] == num_right for place in cells) for num_right in range(7)]
    assert counts == [11, 7, 5, 3, 2, 1, 1]
    # 2 right, wrong ones b b c d: shares 2 2 1 1 of 6, as prompt 3 of the worked batch
    assert (2, 1.918) in cells and (6, 0.0) in cells and (0, round(math.log2(6), 3)) in cells
    assert lab.partitions(4, 4) == [[4], [3, 1], [2, 2], [2, 1, 1], [1, 1, 1, 1]]


def test_the_map_by_hand():
    """Five of six right: GRPO +.41 −2.04, copo +1.48 +1.67, copo-group +1.48 +1.12. With A^g =
    (0 − .255)/.346 = −.74 for a group that is all wrong."""
    place = (5, 0.65)
    expected = {
        "grpo": (0.41, -2.04),
        "copo": (1.48, 1.67),
        "copo-group": (1.48, 1.12),
        "copo-forced": (0.41, -2.04),
        "sign": (1, -1),
        "w-reinforce": (0.1, -1),
    }
    rules = lab.all_rules()
    for name, pair in expected.items():
        cells = lab.map_cells(rules[name])
        close(list(cells[place].values()), list(pair), 0.01)
        # no response that is not there
        assert math.isnan(cells[0, 0.0]["right"]) and math.isnan(cells[6, 0.0]["wrong"])
    all_wrong = (0, 2.585)
    assert lab.map_cells(rules["copo-forced"])[all_wrong]["wrong"] == pytest.approx(-0.74, abs=0.01)
    assert lab.map_cells(rules["grpo"])[all_wrong]["wrong"] == 0
    starved = lab.map_cells(rules["soft"])[all_wrong]["wrong"]
    assert starved == pytest.approx(-0.74 * 3.6e-4, rel=0.02)
    # DAPO's penalty on length is no part of it
    assert lab.map_cells(rules["dapo"])[place] == lab.map_cells(rules["grpo"])[place]


def test_the_map_writes_and_frames_what_it_is_given():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    values = {(0, 0.0): math.nan, (1, 0.65): 0.0, (2, 0.65): -1e-3, (1, 1.0): -1.26, (2, 1.0): 0.3}
    axes = figure.subplots()
    lab.draw_panel(axes, values, good_sign=-1)
    assert [text.get_text() for text in axes.texts] == ["0", "≈0", "−1.3", "+0.3"]
    # Of wrong responses, the one that is made likelier has a thick frame; thin ones: no gradient
    frames = {patch.get_xy(): patch.get_linewidth() for patch in axes.patches}
    assert frames == {(1.55, 1.55): 2.5, (0.5, 0.5): 0.5, (1.5, 0.5): 0.5}
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["all alike  0.00", "0.65", "all differ  1.00"]


def test_map(tmp_path, saved, capsys, monkeypatch):
    picture = tmp_path / "map.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        lab.main(["--map", str(picture)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install matplotlib" in error and error.count("\n") == 1
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    lab.main(["--map", str(picture), "--rules", "grpo", "ebpo"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""  # no run, no tables
    picture.unlink()
    lab.main([str(saved), "--map", str(picture), "--rules", "copo-group"])
    assert picture.exists() and "5 groups of 2 steps" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ("{}", "KeyError"),
        (group(1, [1], [0]), "ValueError: 1 responses, but 2"),
        (group(1, [1, 0], [0, 1, 1]), "ValueError"),
        (group(1, [1, 0], ["a", "b"]), "Error"),
        (group(1, [1, 0], [0, 1], reward=[math.nan, 0]), "not finite"),
        (group(1, [1, 0], [0, 1], weight=1), "Error"),
        (group([], [1, 0], [0, 1]), "TypeError"),
    ],
)
def test_bad_files_are_refused_by_line(saved, capsys, line, words):
    good = saved.read_text()
    saved.write_text(good + line.rstrip() + "\n" + good)
    with pytest.raises(SystemExit) as stop:
        lab.main([str(saved)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"{saved}:6: not a group" in error and words in error


def test_what_is_not_there_is_refused(saved, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            lab.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        return error

    assert "no groups of step 3" in refused(saved, "--step", 3)
    assert "nowhere" in refused(saved.parent / "nowhere")
    assert "directory" in refused(saved.parent)
    assert "GROUPS" in refused()
    assert "--nope" in refused(saved, "--nope")
    assert "--map" in refused(saved, "--rules", "grpo")
    assert "'gpro'" in refused("--map", "map.png", "--rules", "gpro")
    assert "the run's own" in refused("--map", "map.png", "--rules", "the run's own")
    assert "nowhere" in refused("--map", saved.parent / "nowhere" / "map.png")
    # a run that is being written, or was killed
    saved.write_text(saved.read_text() + '{"step": 3, "cor')
    lab.main([str(saved)])
    assert "5 groups" in capsys.readouterr().out
    saved.write_bytes(b"\xff\xfe\n")
    assert f"{saved}:1: not a group" in refused(saved)
