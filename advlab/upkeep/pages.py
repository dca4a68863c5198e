"""The report of an audit: Markdown, a figure, and one HTML page that holds both."""

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mistune
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from advlab import files
from advlab.plots import MARKERS

# What an alarm means, and what to try next: a sentence each.
MEANING = {
    "clean accuracy is above chance": (
        "Whoever always names the most frequent class is right as often, so there is nothing that "
        "an attack could take away.",
        "Check that the classes are in the order of the data and the images prepared as in "
        "training (--dataset), and train first.",
    ),
    "the same answer to the same image": (
        "The model draws something at random, so an attack that asks once a step follows the "
        "gradient of one draw and is judged by another: such figures are too high.",
        "Average every gradient over many draws (EOT): the row with several answers a step did so, "
        '--autoattack does, and so do `pgd(..., eot=20)` and `auto_attack(..., version="rand")`.',
    ),
    "a gradient leads from the answers to the pixels": (
        "The model detaches what it computes, or leaves PyTorch (JPEG, NumPy, no_grad), so no "
        "attack could follow its gradient, and nothing here is a white box.",
        "Attack through a function that has a derivative in the place of what stops it (BPDA): "
        "`adaptive.StraightThrough(step)`, and the audit of that model.",
    ),
    "iterated attack at least as strong as one step": (
        "Many small steps break fewer images than one large step, so the small ones lose their "
        "way: the gradient is masked, or the answers are drawn at random.",
        "Average the gradient over many draws (EOT), replace a layer without a useful derivative "
        "by one that has it (BPDA), and attack again.",
    ),
    "white box at least as strong as transfer": (
        "Images attacked on another model break more than those made with this model's own "
        "gradient, so that gradient points the wrong way.",
        "Look for the layer that hides it (rounding, saturation, a preparation of the images), and "
        "until then report the transferred figure.",
    ),
    "black box weaker than white box": (
        "An attack that only asks for answers breaks more than the gradient does, so the gradient "
        "is masked.",
        "Report the figure under Square as an upper bound, and run AutoAttack (--autoattack).",
    ),
    "accuracy falls to 0 as eps grows": (
        "At eps 0.5 every image can be made grey, where no model can be right: the attack failed, "
        "it was not withstood.",
        "Attack with other step sizes and with the margin loss, and look for what stops the "
        "gradient.",
    ),
    "more steps and restarts change little": (
        "A longer attack breaks clearly more, so 20 steps had not converged and their figure is "
        "too high.",
        "Raise steps and restarts until the figure stays (pgd-50x3, AutoAttack), and report that "
        "one.",
    ),
    "noise of the same size does little": (
        "Random signs alone cost much of the accuracy, so the model does not stand small changes "
        "of any kind.",
        "Check the range and the preparation of the images first, then train with noise or "
        "augmentation.",
    ),
    "never more accurate than on clean images": (
        "The model is right more often under attack than without, which a working attack cannot "
        "bring about.",
        "Check that the classes are in the order of the data, that the outputs are logits, and "
        "that nothing in the model answers at random.",
    ),
    "gradients neither vanish nor explode": (
        "The gradients are 0 or out of all proportion, so attacks that follow them go nowhere.",
        "Look for a factor on the logits, rounding or saturation, and attack with a loss that no "
        'factor changes (loss="dlr" of advlab\'s pgd).',
    ),
    "accuracy falls steadily along the attack": (
        "A longer step in the same direction leaves more images right, so one step says little "
        "about this model.",
        "Judge it by the iterated attacks, and draw the loss along the direction.",
    ),
    "a tiny step does what the gradient says": (
        "A step of a quarter of 1/255 changes the loss by less than half or more than twice of "
        "what the gradient promises, so attacks follow a wrong map: k-winners, rounding behind a "
        "made-up derivative, or answers at random.",
        "Put a smooth stand-in before the model for the attack (BPDA) or average the gradient over "
        "noise; if the derivative is such a stand-in already, trust the figures that Square bears "
        "out.",
    ),
    "the loss hides nothing that the margin shows": (
        "The margin (the best wrong logit minus the right one) breaks clearly more than the cross "
        "entropy, so the logits are too large, too small or saturated for the softmax.",
        "Report the figure on the margin, and run AutoAttack (--autoattack), whose losses no "
        "factor changes.",
    ),
    "every answer is a class of the data": (
        "The model answers with an output beyond the classes: it abstains, and here that counts as "
        "a broken image.",
        "Report how often it abstains on clean images, and attack it so that it is wrong without "
        "abstaining.",
    ),
    "the worst attack leaves what is claimed": (
        "An attack within the claimed eps breaks more images than the claim allows, so the claim "
        "is wrong, whatever the other lines say of how it was measured.",
        "Name the attack and its source in the claim, or claim what the worst attack leaves.",
    ),
}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 54rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif;
  color: #222; background: #fff; overflow-wrap: break-word; }}
h1, h2 {{ line-height: 1.25; }}
h2 {{ margin-top: 2.2rem; }}
table {{ width: 100%; border-collapse: collapse; font-size: 0.92rem; }}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid #ccc; vertical-align: top; }}
th {{ border-bottom: 2px solid #666; }}
td strong {{ color: #b00020; }}
img {{ display: block; width: 100%; max-width: 46rem; margin: 1rem auto; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 10pt; }}
  tr, img, li {{ break-inside: avoid; }} h2 {{ break-after: avoid; }} }}
</style>
</head>
<body>
{body}</body>
</html>
"""


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Args:
        name: What the model is called; any text.
        summary: What is said first; plain text.
        checklist: As `audit.Trial.checklist`.
        accuracies: As `audit.Trial.accuracies`, with a row for AutoAttack if it was asked for.
        distance: How far the model is from its next mistake; plain text.
        settings: What was measured, on what and with what: plain text by name.
    """

    name: str
    summary: str
    checklist: pd.DataFrame
    accuracies: pd.DataFrame
    distance: str
    settings: dict[str, str]

    def markdown(self) -> str:
        """Return it as Markdown; the figure is report.png beside it."""
        checklist = self.checklist.map(lambda value: escape(str(value)))
        alarms = self.checklist.loc[self.checklist["verdict"] == "ALARM", "check"]
        settings = pd.DataFrame(self.settings.items(), columns=["setting", "value"])
        meant = [f"- **{check}.** {' '.join(MEANING[check])}" for check in alarms]
        blocks = [
            f"# Audit of {escape(self.name)}",
            f"**{escape(self.summary)}**",
            "## Checklist",
            _table(checklist.mask(checklist == "ALARM", "**ALARM**"), "left left left right"),
            "An alarm does not prove that the model is weak, but that its figures cannot be "
            "trusted before somebody has found out why. A list without alarms does not prove that "
            "the model is robust.",
            *(["## What the alarms mean, and what to try next", *meant] if meant else []),
            "## Accuracies",
            _table(_readable(self.accuracies), "left right right right right right"),
            "Every attack knows the model, but for noise, transfer and Square. Intervals are "
            "Wilson's.",
            "![Accuracy against eps; the numbers are those of the table](report.png)",
            escape(self.distance),
            "## Settings",
            _table(settings.map(escape), "left left"),
        ]
        return "\n\n".join(blocks) + "\n"

    def figure(self) -> Figure:
        """Draw accuracy against eps, with 95 % intervals; larger sizes are left to the table."""
        clean, eps = self.accuracies.iloc[:1], self.accuracies["eps"].iloc[1]
        swept = pd.concat([clean, self.accuracies[self.accuracies["test"] == "FGSM"]])
        rest = self.accuracies[self.accuracies["eps"] == eps].drop_duplicates("test")
        points = [rest[rest["test"] == test] for test in rest["test"] if test != "FGSM"]
        drawn = Figure(figsize=(6.8, 3.9), layout="constrained")
        axis = drawn.subplots()
        colours = sns.color_palette("colorblind", len(points) + 1)
        for place, rows in enumerate([swept, *points]):
            middle, low, high = (100 * rows[name] for name in ("accuracy", "low", "high"))
            style = {"color": colours[place], "label": rows["test"].iloc[-1], "capsize": 3}
            style["fmt"] = MARKERS[place] + "-" * (place == 0)
            shift = 0.05 * eps * place  # side by side, for all of them are at eps
            axis.errorbar(rows["eps"] + shift, middle, [middle - low, high - middle], **style)
        end = eps * (1.05 + 0.05 * len(points))
        axis.axvspan(eps * 1.025, end, color="0.93", zorder=0, label="at eps, side by side")
        axis.axhline(100 * clean["accuracy"].iloc[0], color="0.4", linestyle=":", label="clean")
        axis.set(xlim=(-0.04 * eps, end), ylim=(-3, 103), ylabel="accuracy (%)")
        axis.set_xlabel("eps (L-inf, pixel range [0, 1])")
        axis.set_xticks(swept["eps"], [f"{tick:.2g}" for tick in swept["eps"]])
        axis.grid(visible=True, color="0.85", linewidth=0.6)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
        n = int(clean["n"].iloc[0])
        foot = f"{self.name}; {self.settings['data']}, n = {n:,}; bars: 95 % intervals"
        drawn.supxlabel(foot, size=7.5, color="0.3", parse_math=False)
        return drawn

    def write(self, folder: Path) -> None:
        """Write report.png, report.md and report.html, which needs neither of the others.

        Raises:
            OSError: if they cannot be written.
        """
        drawn, text = io.BytesIO(), self.markdown()
        self.figure().savefig(drawn, format="png", dpi=130)
        body = str(mistune.create_markdown(plugins=["table"])(text))
        inside = base64.b64encode(drawn.getvalue()).decode()
        body = body.replace('src="report.png"', f'src="data:image/png;base64,{inside}"')
        page = PAGE.format(title=html.escape(f"Audit of {self.name}"), body=body)
        files.write_bytes(folder / "report.png", drawn.getvalue())
        files.write_bytes(folder / "report.md", text.encode())
        files.write_bytes(folder / "report.html", page.encode())


def escape(text: str) -> str:
    """Return text whose Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def interval(row: Any) -> str:
    """Return the 95 % interval of a row of accuracies, in percent."""
    return f"{100 * row.low:.1f} to {100 * row.high:.1f}"


def size(eps: float) -> str:
    """Return an eps as text, with its 255ths if they are whole."""
    steps = 255 * eps
    whole = eps > 0 and abs(steps - round(steps)) < 1e-6
    return f"{eps:.4g} ({round(steps)}/255)" if whole else f"{eps:.4g}"


def _readable(accuracies: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "attack": row.test,
            "eps": size(row.eps),
            "accuracy %": f"{100 * row.accuracy:.1f}",
            "95 % interval": interval(row),
            "correct": f"{row.correct:,}",
            "n": f"{row.n:,}",
        }
        for row in accuracies.itertuples()
    )


def _table(rows: pd.DataFrame, align: str) -> str:
    return rows.to_markdown(index=False, disable_numparse=True, colalign=align.split())
