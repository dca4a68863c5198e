"""The judge of lesson 08: what keeps the rules is scored, what does not is refused by name."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from advlab import models
from advlab.attacks import pgd
from advlab.classroom import challenge
from advlab.classroom.challenge import EPS, SubmissionError, check_attack, read_attack, score
from advlab.cli import app
from advlab.evaluation import holds
from advlab.recipes import Recipe

TINY_RS = Recipe("robust", 1, 32, adversary="rs-fgsm", eps=EPS, alpha=EPS)


@pytest.fixture
def original(tiny_shapes):
    """The images (uint8) that are attacked, and their labels."""
    return tiny_shapes.test.images, tiny_shapes.test.labels


@pytest.fixture
def submission(original):
    """Images one step of 1/255 away, and the labels."""
    images, labels = original
    return (images.int() + 1).clamp(max=255).float() / 255, labels.clone()


@pytest.fixture
def hand_in(tmp_path):
    """Writes tensors to a file, and returns its path."""

    def write(**tensors):
        save_file(tensors, tmp_path / "mine.safetensors")
        return tmp_path / "mine.safetensors"

    return write


@pytest.fixture
def arena(monkeypatch, tiny_shapes, tmp_path, zoo, empty_home):
    """A challenge whose target is a model of the session's zoo, on 32 images."""
    opened = SimpleNamespace(
        data=tiny_shapes, zoo=zoo, settings=SimpleNamespace(adversarial={"robust": TINY_RS})
    )
    monkeypatch.setattr(challenge.lab, "start", lambda *args, **kwargs: opened)
    monkeypatch.setattr(challenge, "DEFENDED", 20)
    return opened


def test_attack_that_keeps_the_rules_is_accepted_as_it_is(submission, original):
    images, labels = submission
    for given in (images, (images * 255).round().to(torch.uint8)):
        assert torch.equal(check_attack(given, labels, *original), images)


def test_exactly_eps_is_allowed_and_a_step_more_is_not(original):
    images, labels = original
    moved = torch.where(images > 127, images.int() - 8, images.int() + 8)
    check_attack(moved.float() / 255, labels, *original)
    moved[3, 0, 0, 0] += 1 if images[3, 0, 0, 0] <= 127 else -1
    with pytest.raises(SubmissionError, match="1 images are moved by more than eps = 8/255"):
        check_attack(moved.float() / 255, labels, *original)


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [
        (lambda x, y: (x[:-1], y[:-1]), r"shape \(31, 3, 32, 32\)"),
        (lambda x, y: (x.flatten(1), y), "shape"),
        (lambda x, y: (x, (y + 1) % 10), "32 differ"),
        (lambda x, y: (x, y.float()), "labels are torch.float32; give int64"),
        (lambda x, y: (x, y.int()), "labels are torch.int32; give int64"),
        (lambda x, y: (x, y[:-1]), "all differ"),
        (lambda x, y: (x.double(), y), "float64"),
        (lambda x, y: (x.index_fill(0, torch.tensor([2]), float("nan")), y), "1 images hold NaN"),
        (lambda x, y: (x.index_fill(0, torch.tensor([2]), float("inf")), y), "infinity"),
        (lambda x, y: (x + 0.5, y), r"range from .* must be in \[0, 1\]"),
        (lambda x, y: (x - 0.5, y), "range from -0"),
        (lambda x, y: (x * 255, y), "range"),
        (lambda x, y: ((x + 0.3 / 255).clamp(0, 1), y), "whole steps of 1/255"),
        (lambda x, y: (x.flip(0), y), "moved by more than eps"),
    ],
)
def test_cheats_are_refused_with_the_reason(submission, original, cheat, reason):
    images, labels = cheat(*submission)
    with pytest.raises(SubmissionError, match=reason):
        check_attack(images, labels, *original)


def test_only_an_attack_is_read_as_one(tmp_path, submission):
    images, labels = submission
    attack, weights, half = (tmp_path / f"{name}.safetensors" for name in ("a", "w", "h"))
    save_file({"images": images, "labels": labels}, attack)
    save_file(models.build("cnn").state_dict(), weights)
    save_file({"images": images}, half)
    assert torch.equal(read_attack(attack)[0], images)
    assert read_attack(weights) is None
    torch.save(models.build("cnn").state_dict(), tmp_path / "weights.pth")
    assert read_attack(tmp_path / "weights.pth") is None
    save_file({"images": images, "labels": labels}, tmp_path / "renamed")
    assert torch.equal(read_attack(tmp_path / "renamed")[0], images)
    with pytest.raises(SubmissionError, match="holds images; an attack holds images and labels"):
        read_attack(half)
    for content, told in ((b"no tensors", "damaged"), (b"", "empty"), (b"<html>", "a web page")):
        attack.write_bytes(content)
        with pytest.raises(SubmissionError, match=f"{re.escape(str(attack))} is {told}"):
            read_attack(attack)


def test_attack_is_scored_against_pgd_and_noted(hand_in, submission, arena, tiny_shapes):
    images, labels = submission
    path = hand_in(images=images, labels=labels)
    row = score(path)
    target = arena.zoo.get("cnn", TINY_RS).model
    assert row["correct"] == int(holds(target, images, labels).sum())
    assert (row["kind"], row["data"], row["n"]) == ("attack", "Shapes-10", 32)
    reference = pgd(target, *tiny_shapes.test.batch(slice(None)), EPS, alpha=EPS / 8, steps=20)
    reference = (255 * reference).round() / 255
    assert row["reference"] == int(holds(target, reference, labels).sum()) / 32
    assert row["better"] == (row["accuracy"] < row["reference"])
    assert score(path)["sha256"] == row["sha256"]
    board = pd.read_csv(challenge.files.home() / "outputs" / "challenge" / "leaderboard.csv")
    assert list(board["correct"]) == [row["correct"]] * 2


def test_defence_is_scored_by_its_worst_case(hand_in, arena, monkeypatch):
    seen = []

    def weak_but_for_margin(model, images, labels, eps, *, loss, **options):
        seen.append(loss)
        return pgd(model, images, labels, 1.0 if loss == "margin" else 0.0, alpha=0.1, steps=5)

    monkeypatch.setattr(challenge, "pgd", weak_but_for_margin)
    row = score(hand_in(**models.build("cnn", 3).state_dict()))
    assert seen == ["ce", "dlr", "margin"] * 2
    assert (row["kind"], row["n"], row["accuracy"]) == ("defence", 20, 0)


def test_defence_whose_gradients_are_too_small_is_refused(hand_in, arena, tiny_shapes):
    plain = models.build("cnn", 3).eval()
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    norm = "network.2"  # behind the first convolution; powers of two change no answer
    for name in ("network.0.weight", "network.0.bias", f"{norm}.running_mean"):
        weights[name] *= 2.0**100
    weights[f"{norm}.running_var"] = (weights[f"{norm}.running_var"] + 1e-5) * 2.0**100
    weights[f"{norm}.weight"] *= 2.0**-50
    for name in [name for name in weights if name.startswith("network.19")]:
        weights[name] *= 2.0**-115
    other = models.build("cnn", 3).eval()
    other.load_state_dict(weights)
    images = tiny_shapes.test.batch(slice(None))[0]
    assert torch.equal(plain(images).argmax(1), other(images).argmax(1))
    with pytest.raises(SubmissionError, match=r"20 of 20 images the gradient is 0 in more than"):
        score(hand_in(**weights))


def test_defence_of_another_architecture_is_refused(hand_in, tmp_path, arena):
    with pytest.raises(SubmissionError, match="does not fit"):
        score(hand_in(**models.build("cnn-lstm").state_dict()))
    with pytest.raises(SubmissionError, match="there is no file"):
        score(tmp_path / "none.safetensors")


def test_command_prints_the_score_and_refuses_without_a_traceback(hand_in, submission, arena):
    images, labels = submission
    command = ["challenge", "score", str(hand_in(images=images, labels=labels))]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "attack on Shapes-10" in done.output
    hand_in(images=images * 2, labels=labels)
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "must be in [0, 1]" in refused.output
    assert "Traceback" not in refused.output
    board = pd.read_csv(challenge.files.home() / "outputs" / "challenge" / "leaderboard.csv")
    assert len(board) == 1  # what is refused is not noted
