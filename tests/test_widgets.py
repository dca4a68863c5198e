"""The attack explorer: what it computes, and what its controls do."""

import io
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from conftest import make_small_cnn
from PIL import ExifTags, Image

from advlab import data, widgets
from advlab.attacks import fgsm
from advlab.widgets import ATTACKS, AttackExplorer, CancelledError, attack_one, read_upload


@pytest.fixture(scope="module")
def shapes():
    return data.Shapes10(100, 60)


@pytest.fixture
def models():
    return {"one": make_small_cnn(0), "two": make_small_cnn(1)}


@pytest.fixture
def explorer(models, shapes):
    return AttackExplorer(models, shapes)


def picture(size, kind="PNG"):
    written = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(written, kind)
    return written.getvalue()


@pytest.mark.parametrize("attack", ATTACKS)
def test_outcome_says_what_was_done(attack, models, shapes):
    images, labels = shapes.test.batch(slice(0, 1))
    target = (int(labels[0]) + 1) % 10
    found = attack_one(models, "one", images[0], int(labels[0]), attack, 0.03, target=target)
    change = found.attacked - images[0]
    assert found.linf == pytest.approx(255 * float(change.abs().max()))
    assert 0 < found.linf <= 255 * 0.03 + 1e-3
    assert found.l2 == pytest.approx(float(change.norm()))
    for answers in (found.before, found.after):
        assert list(answers) == ["one", "two"]
        assert all(float(p.sum()) == pytest.approx(1) for p in answers.values())


def test_fgsm_is_the_package_s(models, shapes):
    images, labels = shapes.test.batch(slice(3, 4))
    found = attack_one(models, "two", images[0], int(labels[0]), "fgsm", 0.02)
    assert torch.equal(found.attacked, fgsm(models["two"], images, labels, 0.02)[0])


def test_nothing_is_moved_at_eps_0(models, shapes):
    images, labels = shapes.test.batch(slice(0, 1))
    found = attack_one(models, "one", images[0], int(labels[0]), "pgd", 0.0)
    assert torch.equal(found.attacked, images[0])
    assert found.survives


@pytest.mark.parametrize(("source", "attack"), [("three", "fgsm"), ("one", "magic")])
def test_unknown_names_are_refused(source, attack, models, shapes):
    image = shapes.test.batch(slice(0, 1))[0][0]
    with pytest.raises(ValueError, match=r"unknown .*choose one of"):
        attack_one(models, source, image, 0, attack, 0.1)


@pytest.mark.parametrize(
    ("steps", "eps", "told"), [(0, 0.1, "^steps is 0;"), (20, 1.5, "^eps is 1.5;")]
)
def test_numbers_out_of_range_are_refused(steps, eps, told, models, shapes):
    image = shapes.test.batch(slice(0, 1))[0][0]
    with pytest.raises(ValueError, match=told):
        attack_one(models, "one", image, 0, "pgd", eps, steps=steps)


def test_one_large_step_is_a_step_across_the_image(models, shapes):
    image = shapes.test.batch(slice(0, 1))[0][0]
    assert attack_one(models, "one", image, 0, "pgd", 0.9, steps=1).linf > 100


def test_models_keep_their_mode(models, shapes):
    image = shapes.test.batch(slice(0, 1))[0][0]
    models["one"].train()
    models["two"].eval()
    for attack in ATTACKS:
        attack_one(models, "one", image, 0, attack, 0.1, target=1)
    assert models["one"].training
    assert not models["two"].training


def test_an_attack_can_be_stopped(models, shapes):
    passes = []

    def report():
        passes.append(1)
        if len(passes) == 3:
            raise CancelledError

    image = shapes.test.batch(slice(0, 1))[0][0]
    label = int(models["one"](image[None]).argmax())
    with pytest.raises(CancelledError):
        attack_one(models, "one", image, label, "pgd", 1e-4, steps=50, report=report)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_upload_is_cut_to_its_central_square(kind, size):
    drawn, written = Image.new("RGB", size, (0, 0, 255)), io.BytesIO()
    left, top = ((length - 32) // 2 for length in size)
    drawn.paste((255, 0, 0), (left, top, left + 32, top + 32))
    drawn.save(written, kind, quality=100, subsampling=0)
    found = read_upload(written.getvalue())
    assert found.shape == (3, 32, 32)
    assert float(found[0].min()) > 0.98
    assert float(found[1:].max()) < 0.02


def test_upload_is_turned_as_its_camera_was_held():
    drawn, written = Image.new("RGB", (64, 64), (0, 0, 0)), io.BytesIO()
    drawn.paste((255, 255, 255), (0, 0, 32, 64))
    exif = drawn.getexif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned right: its left side is the top
    drawn.save(written, "JPEG", exif=exif)
    found = read_upload(written.getvalue())
    assert float(found[:, :14].min()) > 0.9
    assert float(found[:, 18:].max()) < 0.1


def damaged_exif():
    """Return a JPEG whose EXIF data hold a text where a number goes, over which Pillow stumbles."""
    written, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.5
    Image.new("RGB", (8, 8)).save(written, "JPEG", exif=exif)
    return written.getvalue().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")


@pytest.mark.parametrize("content", [b"", b"not a picture", picture((8, 8))[:40], damaged_exif()])
def test_upload_that_is_no_picture_is_refused(content):
    with pytest.raises(ValueError, match="not a PNG or JPEG"):
        read_upload(content)


def test_upload_with_16_bits_a_pixel_is_refused():
    written = io.BytesIO()
    Image.fromarray(np.full((40, 40), 20_000, dtype=np.uint16)).save(written, "PNG")
    with pytest.raises(ValueError, match="16 bits a pixel; save it with 8"):
        read_upload(written.getvalue())


def test_upload_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="11 MB"):
        read_upload(b" " * 11_000_000)


def test_slider_changes_what_is_shown(explorer):
    before = explorer.numbers.value, explorer.pictures[2].value
    explorer.eps.value = 40
    assert "L-inf 40.0/255" in explorer.numbers.value
    assert (explorer.numbers.value, explorer.pictures[2].value) != before
    assert explorer.bars.value.count("<tr>") == 11


def test_bad_choice_is_told_in_the_panel(explorer):
    _, label = explorer.image()
    explorer.target.value = label
    explorer.attack.value = "fgsm towards a class"
    assert "cannot be attacked" in explorer.message.value
    explorer.target.value = (label + 1) % 10
    assert explorer.message.value == ""


def test_pgd_runs_beside_and_is_finished_for_the_figure(explorer):
    explorer.attack.value = "pgd"
    figure = explorer.figure()
    assert explorer.cancel.disabled
    assert explorer.progress.value == explorer.progress.max
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[2:] == ["attacked, eps 8/255", "one", "two"]


def test_random_image_is_of_the_wanted_class(explorer, shapes):
    assert explorer.kind.label == "any"
    explorer.kind.value = 4
    assert explorer.image()[1] == 4
    seen = set()
    for _ in range(40):  # six images of this class: one of forty draws is another one
        explorer.random.click()
        assert explorer.image()[1] == 4
        seen.add(explorer.index.value)
    assert len(seen) > 1


def upload(explorer, content):
    day = datetime(2026, 1, 1, tzinfo=UTC)
    entry = {"name": "x.png", "type": "image/png", "size": len(content), "last_modified": day}
    explorer.upload.value = [{**entry, "content": memoryview(content)}]


def test_own_picture_is_attacked_too(explorer):
    upload(explorer, picture((50, 50)))
    assert explorer.image()[1] is None
    assert float(explorer.outcome.original[0].min()) > 0.98
    explorer.index.value = 5
    assert explorer.image()[1] is not None
    upload(explorer, picture((50, 50)))  # the same once more
    assert explorer.image()[1] is None


def test_upload_that_fails_is_told_in_the_panel(explorer):
    upload(explorer, b"x")
    assert "not a PNG" in explorer.message.value


def test_every_control_has_a_name(explorer):
    for control in (explorer.first, explorer.eps, explorer.attack, explorer.index, explorer.random):
        assert control.description


def test_a_batch_run_shows_a_figure(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert "here is its picture" in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_no_model_is_refused(shapes):
    with pytest.raises(ValueError, match="no model was given"):
        AttackExplorer({}, shapes)


@pytest.mark.parametrize("wrong", [{"eps": 8 / 255}, {"eps": 65}, {"index": -1}, {"index": 60}])
def test_what_the_controls_cannot_show_is_refused(wrong, models, shapes):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number from 0 to"):
        AttackExplorer(models, shapes, **wrong)


def test_pixels_are_enlarged_unchanged():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    shown = Image.open(io.BytesIO(widgets._png(image.float() / 255, 2)))
    assert torch.equal(torch.from_numpy(np.array(shown)).permute(2, 0, 1)[:, ::2, 1::2], image)
