"""The demo's figure: true reward against KL(q || p), a curve for each method over its weight, and the ceiling."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pargs_jax.demo.task import frontier
from pargs_jax.evaluation.statistics import Estimate

_COLOURS = {"PARGS": "#0072b2", "ARGS, sampled": "#d55e00", "GenARM": "#cc79a7", "best of n": "#009e73"}
"""Told apart by colour-blind readers too."""
_LEAST_REWARD, _MOST_KL = -3.0, 40.0


class Curve(NamedTuple):
    """A method over its weights: for each the KL in nats, the true reward, and the label of the point."""

    name: str
    points: list[tuple[float, Estimate, str]]


def draw_comparison(path: Path, curves: list[Curve], points: dict[str, tuple[float, Estimate]]) -> str:
    """Draws the curves, and single points for methods by name, into a PNG file; returns a line that says so.

    Where matplotlib is not installed, nothing is drawn and the line says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure: it needs matplotlib (pip install 'pargs-jax[report]')"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    ceiling = np.array(frontier(np.geomspace(0.2, 50, 60).tolist()))
    axis.plot(*ceiling.T, color="black", linestyle="--", linewidth=1, label="best possible (exact)")
    for curve in curves:
        colour = _COLOURS[curve.name]
        kls = [kl for kl, _, _ in curve.points]
        rewards = [reward.mean for _, reward, _ in curve.points]
        errors = [reward.standard_error for _, reward, _ in curve.points]
        axis.errorbar(kls, rewards, errors, color=colour, marker="o", markersize=4, capsize=2, label=curve.name)
        for kl, reward, label in curve.points:
            if reward.mean > _LEAST_REWARD and kl < _MOST_KL:
                axis.annotate(
                    label, (kl, reward.mean), xytext=(4, -10), textcoords="offset points", fontsize=8, color=colour
                )
    for name, marker in (("greedy", "s"), ("args", "v"), ("pargs_greedy", "^")):
        kl, reward = points[name]
        axis.errorbar([kl], [reward.mean], [reward.standard_error], color="gray", marker=marker, capsize=2)
        axis.annotate(name, (kl, reward.mean), xytext=(6, 4), textcoords="offset points", fontsize=8, color="gray")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(0, _MOST_KL)
    axis.set_ylim(bottom=_LEAST_REWARD)
    axis.set_xlabel("KL(q || p) of whole answers, nats")
    axis.set_ylabel("true reward (oracle)")
    axis.set_title("The demo: what guidance gains, and how far it goes from the language model", fontsize=11)
    axis.legend(loc="upper left", fontsize=9)
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"true reward against KL, with the ceiling: {path}"
