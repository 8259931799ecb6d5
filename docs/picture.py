"""The README's picture: after `make quickstart` and `pip install '.[report]'`,

python docs/picture.py runs/quickstart-complete runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pdprune import Audit

SCHEMES = {"complete": "all ablated", "stochastic": "ablated at random", "adversarial": "ablated by the adversary"}
COLOURS = ("#d08770", "#3b6ea5")


def draw(folders: list[Path], path: Path) -> None:
    """Task cross-entropy of each circuit, by what is done to the nodes that are not kept."""
    audits = [Audit.load(folder) for folder in folders]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(audits)
    for index, audit in enumerate(audits):
        assert audit.task is not None, "the picture is of a task with right answers"
        heights = [getattr(audit.task, scheme).ce for scheme in SCHEMES]
        places = [place + (index - (len(audits) - 1) / 2) * width for place in range(len(SCHEMES))]
        label = f"pruned with {audit.scheme} ablation: {audit.n_kept} of {audit.n_nodes} nodes"
        bars = axes.bar(places, heights, width, label=label, color=COLOURS[index % len(COLOURS)])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    model = audits[0].task
    assert model is not None
    axes.axhline(
        model.model.ce, color="grey", linestyle="--", linewidth=1, label=f"the model itself: {model.model.ce:.2f}"
    )
    axes.set_xticks(range(len(SCHEMES)), [f"the rest\n{how}" for how in SCHEMES.values()])
    axes.set_ylabel("task cross-entropy (nats)")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(path, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    draw([Path(folder) for folder in sys.argv[1:]], Path(__file__).with_name("quickstart.png"))
