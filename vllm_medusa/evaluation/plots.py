# SPDX-License-Identifier: Apache-2.0
"""Show an evaluation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_medusa.evaluation.calibration import Calibration
from vllm_medusa.evaluation.measure import Evaluation
from vllm_medusa.evaluation.reliability import DraftReliability
from vllm_medusa.evaluation.report import TREE_SIZES, calibrated_by
from vllm_medusa.files import replaced_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_NODES = 20
"""A point in the plot of scores stands for at least so many nodes; fewer say little."""


def draw(path: Path, evaluation: Evaluation, calibration: Calibration) -> None:
    """Plot accuracy by head and rank, the expected acceptance length by nodes, and scores against acceptance."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, ((left, right), scores) = pyplot.subplots(2, 2, figsize=(10, 7.2), layout="constrained")
    for head, top_k in enumerate(evaluation.top_k, start=1):
        left.plot(range(1, len(top_k) + 1), top_k, marker="o", markersize=3, label=f"head {head}")
    left.set(xlabel="first tokens of a head", ylabel="right token among them", ylim=(0, 1))
    left.legend()
    lengths = calibration.expected_lengths
    right.plot(range(1, len(lengths) + 1), lengths, label="best tree")
    right.plot(
        len(calibration.accuracies),
        calibration.expected_length_of_chain,
        "o",
        color="#9aa5b1",
        label="chain of all heads",
    )
    right.set(xlabel="nodes", ylabel="expected tokens per step", xscale="log", ylim=(1, None))
    ticks = [nodes for nodes in (1, 2, *TREE_SIZES) if nodes <= len(lengths)]
    right.set_xticks(ticks, list(map(str, ticks)))
    right.minorticks_off()
    right.legend()
    titles = ("temperature 1", f"fitted {calibrated_by(evaluation)}")
    for axis, title, drafts in zip(scores, titles, (evaluation.before, evaluation.after), strict=True):
        _reliability(axis, drafts)
        axis.set_title(title)
    for axis in (left, right, *scores):
        axis.spines[["top", "right"]].set_visible(False)
    with replaced_file(path, "wb") as stream:
        figure.savefig(stream, dpi=150, format="png")
    pyplot.close(figure)


def _reliability(axis: Axes, drafts: DraftReliability) -> None:
    axis.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1)
    for depth, of_depth in enumerate(drafts.depths, start=1):
        shown = [each for each in of_depth.bins if each.nodes >= LEAST_NODES]
        places = [each.score for each in shown], [each.accepted for each in shown]
        axis.plot(*places, marker="o", markersize=3, label=f"depth {depth}")
    axis.set(xlabel="score of a node", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))
    axis.legend()
