"""Recipes and profiles: bad numbers refused, warm-up, names, the models of the lessons."""

import math
from dataclasses import replace

import pytest

from advlab import paper, recipes
from advlab.recipes import FAST, PAPER, PROFILES, RS_FGSM, SMALL, Recipe, file_stem, model_name


def test_paper_recipe_is_the_papers():
    assert Recipe("paper", epochs=10, batch_size=64, lr=1e-3, flip=True) == PAPER


def test_fast_recipe_is_the_papers_annealed_in_under_half_of_the_images():
    assert (FAST.name, FAST.flip) == ("fast", PAPER.flip)
    assert FAST.one_cycle

    def passes(recipe):  # of a baseline and four augmented models, whose set is twice as large
        return recipe.epochs + 4 * 2 * recipe.for_augmented_set().epochs

    assert passes(PAPER) == 90
    assert passes(FAST) < 90 / 2


def test_augmented_set_has_its_own_number_of_epochs_and_no_flip():
    recipe = Recipe("r", 5, one_cycle=True, augmented_epochs=2)
    own = recipe.for_augmented_set()
    assert own == Recipe("r", 2, flip=False, one_cycle=True)
    assert own.for_augmented_set() == own
    assert PAPER.for_augmented_set() == replace(PAPER, flip=False)


PGD = {"adversary": "pgd", "eps": 0.1, "alpha": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"batch_size": -1}, "batch_size is -1; it must be positive"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"lr": math.nan}, "lr is nan; it must be positive"),
        ({"augmented_epochs": 0}, "augmented_epochs is 0; it must be positive"),
        ({"final_lr": 0.0}, "final_lr is 0.0"),
        ({"steps": 0}, "steps is 0; it must be positive"),
        ({"optimiser": "lion"}, "unknown optimiser 'lion'; choose one of adam, sgd"),
        ({"warm_up": 1.0}, "warm_up is 1.0"),
        ({"average": 1.0}, "average is 1.0; it must be from 0 to below 1"),
        ({"soft": 1.0, "average": 0.9, **PGD}, "soft is 1.0; it must be from 0 to below 1"),
        ({"soft": 0.5, **PGD}, "soft is 0.5; it needs an average of the weights"),
        ({"soft": 0.5, "average": 0.9}, 'soft is 0.5; .* the adversary "fgsm", "rs-fgsm" or "pgd"'),
        ({"crop": -1}, "crop is -1"),
        ({"adversary": "cw"}, "unknown adversary 'cw'; choose one of fixed, fgsm, rs-fgsm"),
        ({"adversary": "noise"}, r"sigma is 0.0 and the adversary 'noise'; \"noise\" needs one"),
        ({"adversary": "noise", "sigma": math.nan}, "sigma is nan and the adversary 'noise'"),
        ({"sigma": 0.25}, "sigma is 0.25 and the adversary 'fixed'; .* the others have none"),
        ({"sigma": -1, **PGD}, "sigma is -1 and the adversary 'pgd'"),
        ({"adversary": "pgd"}, r"eps is 0.0 and alpha 0.0; pgd needs both above 0"),
        ({"adversary": "pgd", "eps": 8}, "eps is 8; it must be a number from 0 to 1"),
        ({"adversary": "pgd", "eps": 0.1, "alpha": 2}, "alpha is 2; it must be a number from 0"),
    ],
)
def test_recipe_refuses_bad_numbers_and_names(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe("bad", **{"epochs": 1, **options})


def test_attack_grows_during_the_warm_up():
    recipe = replace(RS_FGSM, eps=0.05, alpha=0.06, warm_up=0.5)
    steps = [recipe.at_step(step, 8) for step in range(8)]
    growth = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [now.eps for now in steps] == pytest.approx([0.05 * share for share in growth])
    assert [now.alpha for now in steps] == pytest.approx([0.06 * share for share in growth])
    assert replace(recipe, warm_up=0.0).at_step(0, 8).eps == 0.05
    plain = Recipe("plain", 1, warm_up=0.5)
    assert plain.at_step(0, 8) is plain
    assert SMALL.noise.at_step(0, 8) is SMALL.noise  # noise has no warm-up


@pytest.mark.parametrize(
    ("arch", "training", "name", "stem"),
    [
        ("cnn", 0.0, "cnn baseline", "cnn-baseline-seed3"),
        ("cnn-lstm", 0.005, "cnn-lstm eps=0.005", "cnn-lstm-eps0.005-seed3"),
        ("cnn", RS_FGSM, "cnn rs-fgsm", "cnn-rs-fgsm-seed3"),
    ],
)
def test_a_model_has_one_name(arch, training, name, stem):
    assert model_name(arch, training) == name
    assert file_stem(arch, training, 3) == stem


def test_recipes_are_found_by_their_names():
    assert {name: recipe.name for name, recipe in recipes.RECIPES.items()} == {
        name: name for name in recipes.RECIPES
    }
    for profile in (*PROFILES.values(), SMALL):
        assert all(name == recipe.name for name, recipe in profile.adversarial.items())


@pytest.mark.parametrize("profile", [*PROFILES.values(), SMALL], ids=[*PROFILES, "small"])
def test_models_are_those_of_the_lessons(profile):
    wanted = profile.paper_models()
    assert len(wanted) == 16 or profile is not PROFILES["paper"]
    assert len(wanted) == len(set(wanted))
    assert {("cnn-lstm-positions", 0.0), ("cnn-lstm-positions", 0.2)} <= set(wanted)
    for eps in paper.TABLE_TRAIN_EPS:
        assert {("cnn", eps), ("cnn-lstm", eps)} <= set(wanted)
    assert {eps for arch, eps in wanted if arch == "cnn"} == set(profile.sweep)
    for arch in ("cnn", "cnn-lstm", "cnn-lstm-positions"):  # the directions are the baseline's
        assert min(wanted.index(m) for m in wanted if m[0] == arch) == wanted.index((arch, 0.0))
    adversarial = profile.adversarial_models()
    assert len(adversarial) == len(set(adversarial)) == 8
    assert {recipe.name for arch, recipe in adversarial if arch == "cnn"} == {*profile.adversarial}
    assert (profile.noise.name, profile.noise.sigma) == ("noise", 0.25)
    assert not profile.noise.on_the_fly


def test_profile_depends_on_the_data_for_lesson_alone():
    assert recipes.profile_for("lesson", papers=False) is SMALL
    for name, profile in PROFILES.items():
        assert recipes.profile_for(name, papers=True) is profile
        assert name == "lesson" or recipes.profile_for(name, papers=False) is profile
    assert [name for name, profile in PROFILES.items() if profile.keep] == ["fast", "paper"]
    assert not SMALL.keep
    with pytest.raises(ValueError, match="unknown profile 'slow'; choose one of quick, lesson"):
        recipes.profile_for("slow", papers=True)
