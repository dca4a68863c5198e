"""An attack to play with: choose an image, an attack and its size, and watch two networks answer.

The computation is apart from the panel (`attack_one`), so it can be tested and used without one.
"""

import base64
import html
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import ipywidgets as w
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from advlab.attacks import fgsm, pgd
from advlab.catalogue import ATTACKS
from advlab.data import ImageData, check_name, to_float
from advlab.datasets import read_picture
from advlab.forward import predict
from advlab.plots import as_picture, show_image

# Two that have a control of their own here, beside those of the catalogue.
TARGETED, STEPPED = "fgsm towards a class", "pgd"
CHOICES = ("fgsm", TARGETED, STEPPED, *(name for name in ATTACKS if name != "fgsm"))
# Of one pass or none; the others run beside, and can be cancelled.
QUICK = (TARGETED, *(attack.name for attack in ATTACKS.values() if attack.one_direction))
LARGEST_UPLOAD = 10_000_000  # bytes
LARGEST_EPS = 64  # in steps of 1/255
# By field of `Outcome`, blue and orange of the Okabe-Ito palette; the numbers beside the bars say
# the same without colour.
COLOURS = {"before": "#0072B2", "after": "#E69F00"}


class CancelledError(RuntimeError):
    """The reader cancelled the attack."""


@dataclass(frozen=True)
class Outcome:
    """What an attack did to one image.

    Attributes:
        original, attacked: (C, H, W) float in [0, 1].
        before, after: By model, (classes,) probabilities.
        linf, l2: Size of the change, L-infinity in steps of 1/255.
        survives: Whether the first model answers the same after saving in 8 bits.
    """

    original: Tensor
    attacked: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    linf: float
    l2: float
    survives: bool


class _Watched(nn.Module):
    """A model that reports each forward pass, and stops when it is told to."""

    def __init__(self, model: nn.Module, report: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.report = model, report

    def forward(self, x: Tensor) -> Tensor:
        self.report()
        return self.model(x)


def craft(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str,
    eps: float,
    *,
    steps: int = 20,
    target: int = 0,
) -> Tensor:
    """Return images attacked as the panel does it.

    Args:
        model: Whose gradient is used.
        images: (N, C, H, W) float in [0, 1].
        labels: (N,) int64, the true classes.
        attack, eps, steps, target: As in `attack_one`.

    Raises:
        ValueError: if there is no such attack, or eps or steps is out of range.
    """
    check_name("attack", attack, CHOICES)
    if eps == 0:
        return images
    if attack == TARGETED:
        return fgsm(model, images, labels, eps, targeted=torch.full_like(labels, target))
    if attack == STEPPED:
        alpha = min(1, max(eps / 8, 2.5 * eps / max(steps, 1)))  # `pgd` refuses steps below 1
        return pgd(model, images, labels, eps, alpha=alpha, steps=steps, seed=0)
    return ATTACKS[attack](model, images, labels, eps)


def attack_one(
    models: Mapping[str, nn.Module],
    source: str,
    image: Tensor,
    label: int,
    attack: str,
    eps: float,
    *,
    steps: int = 20,
    target: int = 0,
    classes: int | None = None,
    report: Callable[[], None] = lambda: None,
) -> Outcome:
    """Attack one image with the gradient of `source`, and ask every model before and after.

    Args:
        models: By name; the first is the one asked about 8 bits.
        source: Name of the model whose gradient is used.
        image: (C, H, W) float in [0, 1].
        label: The true class.
        attack: One of `CHOICES`.
        eps: L-infinity size, from 0 to 1.
        steps: Of "pgd", at least 1.
        target: Of "fgsm towards a class".
        classes: How many logits have a name; others are left out of the probabilities.
        report: Called at every forward pass of the attack; may raise to stop it.

    Raises:
        ValueError: if there is no such attack or source, or eps or steps is out of range.
    """
    check_name("source", source, models)
    x, y = image[None], torch.tensor([label], device=image.device)
    made = craft(_Watched(models[source], report), x, y, attack, eps, steps=steps, target=target)
    saved = (made * 255).round() / 255
    before, after, in_8_bits = (
        {name: predict(model, shown)[0, :classes].cpu() for name, model in models.items()}
        for shown in (x, made, saved)
    )
    first = next(iter(models))
    change = made - x
    return Outcome(
        image.cpu(),
        made[0].cpu(),
        {name: logits.softmax(0) for name, logits in before.items()},
        {name: logits.softmax(0) for name, logits in after.items()},
        255 * float(change.abs().max()),
        float(change.norm()),
        bool(in_8_bits[first].argmax() == after[first].argmax()),
    )


def likeliest(outcome: Outcome, label: int | None, most: int = 10) -> list[int]:
    """Return the numbers of up to `most` classes: the true one, and those of high probability."""
    shares = torch.stack([*outcome.before.values(), *outcome.after.values()]).amax(0)
    if label is not None:
        shares[label] = 2
    return sorted(shares.topk(min(most, len(shares))).indices.tolist())


def _picture(image: Tensor, caption: str) -> str:
    """Return an image in [0, 1] with its caption, as HTML."""
    written = io.BytesIO()
    Image.fromarray(as_picture((image.clamp(0, 1) * 255).round().byte())).save(written, "PNG")
    source = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return (
        '<figure style="display:inline-block;margin:4px">'
        f'<img src="{source}" alt="{caption}" width=128 style="image-rendering:pixelated">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _bars(
    outcome: Outcome, models: Sequence[str], classes: Sequence[str], label: int | None
) -> str:
    """Return a table of probabilities before and after, a column per model, as HTML."""
    heads = (f"<th colspan=2>{html.escape(name)}: before, after</th>" for name in models)
    told = f"<tr><th></th>{''.join(heads)}</tr>"
    for k in likeliest(outcome, label):
        name = html.escape(classes[k])
        name = f"<b>{name} (true)</b>" if k == label else name
        told += f'<tr><td style="white-space:nowrap">{name}</td>'
        for model, (when, colour) in product(models, COLOURS.items()):
            share = 100 * float(getattr(outcome, when)[model][k])
            # So narrow that two models fit beside the controls.
            cell, width = "min-width:80px;white-space:nowrap", f"width:{0.4 * share:.0f}px"
            bar = f"background:{colour};{width};height:10px;display:inline-block"
            told += f'<td style="{cell}"><span style="{bar}"></span> {share:.0f} %</td>'
        told += "</tr>"
    return f'<table style="line-height:1.4">{told}</table>'


class AttackExplorer:
    """A panel to attack images by hand. Display it as the last line of a cell.

    Where no browser is attached (papermill, nbval, nbconvert), the same cell shows a figure.

    Args:
        models: By name; two are shown side by side.
        data: Where the images come from.
        index: Of the first image, in the test split.
        eps: The first size, in steps of 1/255.

    Raises:
        ValueError: without a model; if `eps` is no whole number from 0 to 64; for an `index`
            outside the split, or for images that have neither 1 nor 3 channels.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], data: ImageData, *, index: int = 0, eps: int = 8
    ) -> None:
        if not models:
            raise ValueError("no model was given; give at least one, by name")
        for name, value, most in (("eps", eps, LARGEST_EPS), ("index", index, len(data.test) - 1)):
            # The controls would cut it off, or take True for 1, and say nothing.
            if isinstance(value, bool) or value not in range(most + 1):
                raise ValueError(f"{name} is {value}; it must be a whole number from 0 to {most}")
        as_picture(data.test.images[index])  # refuses what cannot be drawn
        self.models, self.data = dict(models), data
        names, classes = list(self.models), [(name, k) for k, name in enumerate(data.classes)]
        # So narrow that pictures and bars stand beside them on a page of 1280, its files shown.
        wide = {"style": {"description_width": "90px"}, "layout": w.Layout(width="330px")}
        self.first = w.Dropdown(options=names, description="model", **wide)
        self.second = w.Dropdown(options=names, value=names[-1], description="beside it", **wide)
        self.source = w.Dropdown(options=names, description="gradient of", **wide)
        self.attack = w.Dropdown(options=CHOICES, description="attack", **wide)
        self.target = w.Dropdown(options=classes, description="towards", **wide)
        self.eps = w.IntSlider(eps, 0, LARGEST_EPS, description="eps (of 255)", **wide)
        self.steps = w.IntSlider(20, 1, 200, description="steps", **wide)
        self.index = w.BoundedIntText(index, 0, len(data.test) - 1, description="image", **wide)
        self.kind = w.Dropdown(options=[("any", -1), *classes], description="of class", **wide)
        self.random = w.Button(description="Random image")
        self.upload = w.FileUpload(accept="image/*", description="Own picture")
        self.cancel = w.Button(description="Cancel", disabled=True)
        narrow = {"style": {"description_width": "45px"}, "layout": w.Layout(width="174px")}
        self.progress = w.IntProgress(0, 0, 1, description="attack", **narrow)
        self.shown, self.message = w.HTML(), w.HTML()
        self.own: Tensor | None = None
        self.outcome: Outcome | None = None
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._controls = [self.first, self.second, self.source]
        self._controls += [self.attack, self.target, self.eps, self.steps]
        for control in self._controls:
            control.observe(lambda _: self.update(), "value")
        self.index.observe(lambda _: self._choose(None), "value")
        self.kind.observe(lambda _: self._draw(), "value")
        self.random.on_click(lambda _: self._draw())
        self.upload.observe(self._uploaded, "value")
        self.cancel.on_click(lambda _: self._stop.set())
        self.update()

    def panel(self) -> w.Widget:
        """Return all controls and pictures as one widget."""
        controls = [*self._controls, self.kind, self.index, w.HBox([self.random, self.upload])]
        controls += [w.HBox([self.cancel, self.progress])]
        parts = [w.VBox(controls), w.VBox([self.message, self.shown])]
        return w.Box(parts, layout=w.Layout(flex_flow="row wrap"))  # on a narrow page, below

    def image(self) -> tuple[Tensor, int | None]:
        """Return the chosen image, and its class; None for an own picture."""
        if self.own is not None:
            return self.own, None
        images, labels = self.data.test.batch(slice(self.index.value, self.index.value + 1))
        return images[0], int(labels[0])

    def update(self) -> None:
        """Attack again as the controls say; slow attacks run beside, and can be cancelled."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()
        self._stop = threading.Event()
        self.target.disabled = self.attack.value != TARGETED
        self.steps.disabled = self.attack.value != STEPPED
        if self.attack.value in QUICK:
            self._worker = None
            self._run(self._stop)
        else:
            self._worker = threading.Thread(target=self._run, args=(self._stop,), daemon=True)
            self._worker.start()

    def _run(self, stop: threading.Event) -> None:
        image, label = self.image()
        names = [*self._names(), self.source.value]
        models = {name: self.models[name] for name in names}
        self.outcome = None
        self.progress.max, self.progress.value = self.steps.value, 0
        self.cancel.disabled, self.message.value = self.attack.value in QUICK, ""

        def report() -> None:
            if stop.is_set():
                raise CancelledError
            self.progress.value += 1

        try:
            if label is None:  # an own picture has no label: attack the model's own answer
                logits = predict(models[self.first.value], image[None])
                answer = int(logits[0, : len(self.data.classes)].argmax())
            away = answer if label is None else label
            self.outcome = attack_one(
                models, self.source.value, image, away,
                self.attack.value, self.eps.value / 255, steps=self.steps.value,
                target=self.target.value, classes=len(self.data.classes), report=report,
            )  # fmt: skip
            self._show(self.outcome, label, away)
        except CancelledError:
            self.message.value = "Cancelled; what is shown is of the last attack that finished."
        except Exception as error:  # a model of the reader's may raise any
            self.message.value = f"This cannot be attacked: {html.escape(str(error))}"
        self.cancel.disabled, self.progress.value = True, 0

    def _aim(self, away: int) -> str:
        """Return in words where the attack goes: away from a class, or towards one."""
        if self.attack.value == TARGETED:
            return f"towards {self.data.classes[self.target.value]}"
        chosen = ATTACKS.get(self.attack.value)
        if chosen and not chosen.gradient:
            return "in random directions"
        return f"away from {self.data.classes[away]}"

    def _show(self, outcome: Outcome, label: int | None, away: int) -> None:
        views = self._views(outcome)
        pictures = "".join(_picture(image, title) for title, image in views.items())
        self.shown.value = (
            f'{pictures}<p style="max-width:480px">'
            f"The attack moves {html.escape(self._aim(away))}. "
            f"L-inf {outcome.linf:.1f}/255, L2 {outcome.l2:.2f}; the answer of "
            f"{html.escape(self.first.value)} {'is the same' if outcome.survives else 'is another'}"
            f" after saving in 8 bits</p>{_bars(outcome, self._names(), self.data.classes, label)}"
        )

    def _views(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return the pictures to show, by title; the change is signed, and grey where none is."""
        change = outcome.attacked - outcome.original
        factor = max(1, int(0.5 / max(float(change.abs().max()), 1e-3)))
        return {
            "your picture" if self.own is not None else "original": outcome.original,
            f"change x {factor} (grey: none)": 0.5 + factor * change,
            f"attacked, eps {self.eps.value}/255": outcome.attacked,
        }

    def _names(self) -> list[str]:
        """Return the names of the models that are shown side by side: two, or one twice chosen."""
        return list(dict.fromkeys([self.first.value, self.second.value]))

    def _choose(self, own: Tensor | None) -> None:
        self.own = own
        self.update()

    def _draw(self) -> None:
        """Choose a random test image of the wanted class."""
        labels = self.data.test.labels
        wanted = self.kind.value
        found = (labels == wanted).nonzero()[:, 0] if wanted >= 0 else torch.arange(len(labels))
        if not len(found):
            self.message.value = "there is no test image of this class"
            return
        chosen = int(found[int(torch.randint(len(found), (1,)))])
        if chosen == self.index.value:
            self._choose(None)
        self.index.value = chosen

    def _uploaded(self, _: Any) -> None:
        if not self.upload.value:
            return
        content = bytes(self.upload.value[0]["content"])
        self.upload.value = ()  # else the same picture, chosen again, would be no change
        if len(content) > LARGEST_UPLOAD:
            self.message.value = f"the file has {len(content) / 1e6:.0f} MB; at most 10 are read"
            return
        try:
            picture = to_float(read_picture(content, self.data.shape))
            self._choose(picture.to(self.data.test.images.device))
        except ValueError as error:
            self.message.value = html.escape(str(error))

    def figure(self) -> Figure:
        """Return what the panel shows as a figure.

        Raises:
            ValueError: if the last attack failed or was cancelled; says why.
        """
        if self._worker is not None:
            self._worker.join()
        if self.outcome is None:
            raise ValueError(html.unescape(self.message.value))
        outcome, (_, label) = self.outcome, self.image()
        names = self._names()
        figure = Figure(figsize=(6 + 2.4 * len(names), 3))
        axes = figure.subplots(1, 3 + len(names), width_ratios=[1] * 3 + [1.4] * len(names))
        for axis, (title, image) in zip(axes, self._views(outcome).items(), strict=False):
            show_image(axis, image.clamp(0, 1), title)
        chosen = likeliest(outcome, label)
        places = np.arange(len(chosen))
        classes = [self.data.classes[k] + (" (true)" if k == label else "") for k in chosen]
        for axis, name in zip(axes[3:], names, strict=True):
            for shift, (when, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
                shares = 100 * getattr(outcome, when)[name][chosen].numpy()
                axis.barh(places + shift, shares, 0.4, color=colour, label=when)
            axis.set_yticks(places, classes if axis is axes[3] else [], fontsize="x-small")
            axis.set(xlabel="probability (%)", xlim=(0, 100))
            axis.set_title(name, fontsize="small")
            axis.invert_yaxis()
        axes[-1].legend(fontsize="x-small")
        figure.suptitle(
            f"{self.attack.value}, gradient of {self.source.value}; L-inf {outcome.linf:.1f}/255, "
            f"L2 {outcome.l2:.2f}",
            fontsize="small",
        )
        figure.set_layout_engine("constrained")
        return figure

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = self.panel()._repr_mimebundle_(**options) or {}
        written = io.BytesIO()
        try:
            self.figure().savefig(written, format="png", dpi=80)
        except ValueError as error:  # no attack has finished: the panel says why, and so does this
            return {**bundle, "text/plain": str(error)}
        told = "AttackExplorer: run this cell in JupyterLab for the panel; here is its picture."
        return {**bundle, "text/plain": told, "image/png": written.getvalue()}
