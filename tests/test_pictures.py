"""study/pictures.py: what the pictures claim is what the code does, and bad input ends in one line.

Bugs these tests guard against: a caption that says a quadrant is flat where the loss has a
gradient; a frame around a response that is pushed the right way; a picture that no page shows.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

import copo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))

import pictures

pytest.importorskip("matplotlib")
HERE = Path(__file__).resolve().parent.parent
GROUPS = HERE / "docs/pictures/groups.jsonl"


def drawn(argv):
    args = pictures.build_parser().parse_args([str(word) for word in argv])
    return pictures.PICTURES[args.picture](args)


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_the_clip_is_flat_where_its_captions_say():
    """Each case is (A, q, whether the loss has a gradient there)."""
    cases = [(1, 0.3, True), (1, 1.2, True), (1, 1.3, False), (1, 3.9, False)]
    cases += [(-1, 0.3, False), (-1, 0.75, False), (-1, 0.85, True), (-1, 2.9, True)]
    cases += [(-1, 3.1, False)]
    for advantage, ratio, expected in cases:
        loss, has_gradient = pictures.loss_and_gradient(torch.tensor([ratio]), advantage)
        assert has_gradient.item() == expected, (advantage, ratio)
    # at q = 2 and A < 0 the loss is q itself; beyond c it is c
    loss, _ = pictures.loss_and_gradient(torch.tensor([2.0, 3.9]), -1)
    assert loss.tolist() == pytest.approx([2.0, pictures.DUAL_CLIP])


def test_the_group_table_shows_the_advantages_of_each_rule():
    figure = drawn(["groups", "out.png", GROUPS, "--rules", "grpo", "copo"])
    groups = pictures.groups_of_step(GROUPS, None)
    for axes, rule in zip(figure.axes, ("grpo", "copo")):
        assert axes.get_title() == rule
        shown = torch.tensor(axes.images[0].get_array().data)
        rewards = torch.tensor([group["correct"] for group in groups])
        classes = torch.tensor([group["class"] for group in groups])
        result = copo.compute_advantages(
            rewards, rewards.bool(), classes, None, copo.PRESETS[rule], None
        )
        torch.testing.assert_close(shown, result.effective)
        assert len(axes.texts) == rewards.numel()
    num_right = [sum(group["correct"]) for group in groups]
    assert num_right == sorted(num_right)


def test_a_frame_marks_what_goes_the_wrong_way_and_nothing_else():
    frames = {}
    for rule in ("grpo", "copo", "copo-forced"):
        figure = drawn(["groups", "out.png", GROUPS, "--rules", rule])
        frames[rule] = len(figure.axes[0].patches)
    groups = pictures.groups_of_step(GROUPS, None)
    advantages = pictures.effective_advantages(groups, copo.PRESETS["copo"])
    correct = torch.tensor([group["correct"] for group in groups]).bool()
    wrong_way = torch.where(correct, advantages < -pictures.FAINT, advantages > pictures.FAINT)
    assert frames == {"grpo": 0, "copo": int(wrong_way.sum()), "copo-forced": 0}
    assert frames["copo"] > 10


def test_an_answer_that_is_missing_or_long():
    group = {"class": [-1, 0, 1, 2], "answers": {"0": "1234567", "1": "3/4", "2": None}}
    assert [pictures.answer_text(group, i) for i in range(4)] == ["–", "12345…", "3/4", "–"]


def test_the_dashboard_draws_every_run_and_breaks_where_a_value_is_none(tmp_path):
    lines = pictures.read_jsonl(HERE / "docs/unnamed/x.jsonl")
    lines[2]["accuracy"] = None
    del lines[3]["token_entropy"]  # a step without an update
    path = tmp_path / "gap/metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = drawn(["dashboard", "out.png", path, HERE / "docs/unnamed/w.jsonl"])
    assert len(figure.axes) == 2 * len(pictures.PANELS)
    values = figure.axes[0].lines[0].get_ydata()
    assert len(values) == 10
    assert [i for i, value in enumerate(values) if value != value] == [2]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["gap", "w"]


def test_the_loop_names_functions_that_exist():
    import model
    import reward
    import sampler
    import train

    owners = {"copo.py": copo, "train.py": train, "sampler.py": sampler}
    owners |= {"reward.py": reward, "model.py": model.Transformer}
    shown = words(drawn(["loop", "out.png"]).axes[0])
    for box in pictures.STEP_BOXES + pictures.UPDATE_BOXES:
        assert box.function in shown
        if box.function == pictures.BLEND:
            continue
        found = owners[box.file]
        for name in box.function.split("."):
            found = getattr(found, name)
        assert callable(found)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["groups", "out.png", "missing.jsonl"], "No such file"),
        (["groups", "out.png", "bad.jsonl"], "bad.jsonl:1: no JSON"),
        (["groups", "out.png", "metrics.jsonl"], "not the file of a run"),
        (["groups", "out.png", "empty.jsonl"], "no lines"),
        (["groups", "out.png", str(GROUPS), "--step", "99"], "no groups of step 99"),
        (["groups", "out.png", str(GROUPS), "--rules", "ppo"], "ppo"),
        (["dashboard", "out.png", str(GROUPS)], "not the file of a run"),
        (["dashboard", "out.png", "metrics.jsonl", "--titles", "a", "b"], "--titles names 2 runs"),
        (["clip", "no/such/folder/out.png"], "No such file"),
        (["nothing", "out.png"], "nothing"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, argv, reason):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("no JSON\n")
    Path("empty.jsonl").write_text("")
    Path("metrics.jsonl").write_text((HERE / "docs/unnamed/x.jsonl").read_text())
    with pytest.raises(SystemExit) as end:
        pictures.main(argv)
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.err.startswith("pictures.py: ") and printed.err.count("\n") == 1
    assert reason in printed.err


def test_every_picture_is_on_a_page():
    pages = "".join(
        path.read_text() for path in [HERE / "README.md", *(HERE / "docs").glob("*.md")]
    )
    for picture in (HERE / "docs/pictures").glob("*.png"):
        assert f"pictures/{picture.name}" in pages
