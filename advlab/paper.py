"""The paper's published numbers, and the comparison of ours with them.

Liu and Qian, "Developing Robust Networks to Defend Against Adversarial Examples". Every number is
as printed, or more precise where the run behind the print is known. The slips a reader trips over
are in `SLIPS`.
"""

import pandas as pd

DATA = "CIFAR-10"  # what every number here was measured on
TEST_EPS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1)
# The finer sweep that the paper used while tuning.
FINE_TEST_EPS = (0.0, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.04, 0.08, 0.1)
# Training eps of Tables 1 and 2 (0: the baseline), and the CNN's sweep: seven of the paper's eight
# values can be identified; 0.1 stands for the eighth.
TABLE_TRAIN_EPS = (0.0, 0.005, 0.01, 0.015, 0.2)
SWEEP_TRAIN_EPS = (0.0, 0.005, 0.007, 0.01, 0.015, 0.1, 0.2, 0.3, 0.5)

# Tables 1 and 2 as printed: accuracy in percent, a row per training eps, a column per test eps.
TABLE_1 = {
    0.0: (80.4, 36.9, 19.7, 13.8, 10.8, 9.4),
    0.005: (76.0, 69.5, 58.7, 46.5, 38.0, 31.0),
    0.01: (75.4, 72.7, 67.5, 59.8, 51.0, 42.9),
    0.015: (75.1, 74.2, 69.8, 61.9, 51.6, 42.5),
    0.2: (70.3, 71.6, 73.0, 74.3, 75.0, 75.5),
}
TABLE_2 = {
    0.0: (79.0, 35.5, 21.4, 16.7, 14.1, 12.7),
    0.005: (75.1, 69.0, 58.1, 46.1, 36.7, 30.1),
    0.01: (73.3, 70.1, 62.9, 52.3, 42.7, 35.6),
    0.015: (74.0, 72.2, 67.5, 59.1, 49.3, 41.7),
    0.2: (69.7, 70.1, 72.0, 73.1, 73.8, 74.1),
}
TABLES = {"cnn": TABLE_1, "cnn-lstm": TABLE_2}

# Losses behind Figures 5 and 7, as far as they are known: (architecture, training eps) -> per test
# eps. Those of the CNN start at test eps 0.02.
LOSSES = {
    ("cnn", 0.0): (None, 3.0297, 4.6886, 5.5365, 6.0275, 6.3698),
    ("cnn", 0.2): (None, 1.1794, 1.1123, 1.0552, 1.0118, 0.9769),
    ("cnn-lstm", 0.0): (0.6435, 2.5815, 3.4595, 3.7455, 3.8329, 3.8892),
    ("cnn-lstm", 0.2): (1.0846, 1.0290, 0.9868, 0.9541, 0.9278, 0.9054),
}

# Hours of CPU that the paper gives for the five models of each architecture (section 3).
TRAINING_HOURS = {"cnn": 3.5, "cnn-lstm": 7.0}
PARAMETERS = {"cnn": 308_256, "cnn-lstm": 293_994}

SLIPS = (
    'Abstract and Results: "64.142 %" is the CNN\'s gain at eps = 0.08; at 0.1 it is '
    "75.488 - 9.375 = 66.113.",
    'Table 2 is captioned "Loss" and "CNNs"; it holds accuracies of the CNN-LSTM.',
    "Table 2, eps = 0.2 at test eps 0.02 prints 70.1; the run gave 70.9.",
    "Figures 4 and 5 show an eps = 0.5 model that Table 1 leaves out.",
    "Figure 2's accuracies are averages of batch averages: up to 0.06 points off.",
    "The text calls the threat model white box; the tables report transfer from the baseline.",
)


def published() -> pd.DataFrame:
    """Return Tables 1 and 2 and the known losses, tidy.

    Returns:
        60 rows: architecture, train_eps, test_eps, accuracy (fraction), loss (NaN where unknown).
    """
    rows = []
    for arch, table in TABLES.items():
        for train_eps, percents in table.items():
            losses = LOSSES.get((arch, train_eps), (None,) * len(TEST_EPS))
            for test_eps, percent, loss in zip(TEST_EPS, percents, losses, strict=True):
                rows.append((arch, train_eps, test_eps, percent / 100, loss))
    columns = ["architecture", "train_eps", "test_eps", "accuracy", "loss"]
    return pd.DataFrame(rows, columns=columns).astype({"loss": float})


def compare(ours: pd.DataFrame) -> pd.DataFrame:
    """Set our accuracies beside the paper's.

    Args:
        ours: Rows as from `evaluation.accuracy_table`, crafted as in the paper, on its data.

    Returns:
        A row per entry of both: architecture, train_eps, test_eps, ours, paper (percent) and
        difference (percentage points, ours minus the paper's).

    Raises:
        ValueError: if a row was measured on other data, which have nothing to compare with.
    """
    if "data" in ours and set(ours["data"]) != {DATA}:
        raise ValueError(
            f"these rows are from {', '.join(sorted(set(ours['data'])))}; the paper's numbers are "
            f"for {DATA} and are compared with nothing else"
        )
    keys = ["architecture", "train_eps", "test_eps"]
    both = ours[[*keys, "accuracy"]].merge(published()[[*keys, "accuracy"]], on=keys)
    both["ours"], both["paper"] = 100 * both.pop("accuracy_x"), 100 * both.pop("accuracy_y")
    both["difference"] = both["ours"] - both["paper"]
    return both


def wide(table: pd.DataFrame, value: str = "accuracy") -> pd.DataFrame:
    """Lay out tidy rows of one architecture as in the paper: training eps down, test eps across."""
    laid = table.pivot(index="train_eps", columns="test_eps", values=value)
    laid.index = pd.Index([eps_label(eps) for eps in laid.index], name="trained with")
    laid.columns = pd.Index([f"{eps:g}" for eps in laid.columns], name="test eps")
    return laid


def eps_label(train_eps: float) -> str:
    """Return how tables and figures call a training eps: "baseline" or "eps = 0.2"."""
    return f"eps = {train_eps:g}" if train_eps else "baseline"
