"""The claims about the method, each an experiment that anyone can rerun: `python -m pdprune.claims list`.

`experiment.py` says what an experiment is and keeps its results, cell by cell; `registry.py` lists them; there is one
file a claim. `planted/` holds networks whose circuits are known, `attribution.py` what else ranks nodes,
`recovery.py` how a found circuit is held against a known one. What came of it is told in docs/claims.md.
"""
