"""What the benchmarks say about themselves: formulas that are in the documentation match what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_formulas_of_memory_and_work_match_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("scale", None)
    import scale

    found = scale.check()
    assert len(found) == 10
    for name, (formula, counted) in found.items():
        exact = not name.startswith("activations")
        assert formula == (counted if exact else pytest.approx(counted, rel=0.05)), name
    assert scale.tables() in (ROOT / "docs/scale.md").read_text()
