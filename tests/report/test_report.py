"""Reports of real runs, through the command line: what they hold, and that they never cost a run its results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from targets.tiny_models import save_byte_level, save_model
from tiny_circuit import CONFIG, PROMPTS, network

from pdprune.export import main as export
from pdprune.report import AuditedRun
from pdprune.report.__main__ import main as report
from pdprune.report.gather import gather
from pdprune.report.worst_case import replay, spread_examples
from pdprune.targets.store import save_target
from pdprune.train import main

HOSTILE = ["</script>", "<script>a()", "<img src=x>", "<!--"]
TOY: dict[str, Any] = {
    "trainer": {"accelerator": "cpu", "max_steps": 5, "check_val_every_n_epoch": 1000},
    "model": {
        "class_path": "pdprune.CircuitPruner",
        "init_args": {
            "decomposition": {"target": "tms_5-2", "sites": ["linear1", "linear2"]},
            "loss": "mse",
            "target_nodes": 5,
            "selection": {"swap_scores": 4},
        },
    },
    "data": {
        "class_path": "pdprune.targets.toy_data.SparseFeatures",
        "init_args": {
            "n_features": 5,
            "probability": 0.3,
            "batch_size": 64,
            "audit_batch_size": 32,
            "audit_batches": 2,
        },
    },
}

pytestmark = pytest.mark.usefixtures("in_a_copy")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs of one task, some of its prompts hostile."""
    folder = tmp_path_factory.mktemp("report")
    save_target(network(), folder / "tiny")
    prompts = [*PROMPTS, *({"prompt": text, "answer": "'", "wrong": '"'} for text in HOSTILE)]
    (folder / "quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "circuit.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "circuit.yaml"]) == 0
        small = ["--model.scheme", "complete", "--trainer.default_root_dir", "runs/small"]
        assert main(["fit", "--config", "circuit.yaml", *small]) == 0
    return folder


def kept_by(name: str) -> set[int]:
    return {node["node"] for node in json.loads(Path(f"runs/{name}/circuit.json").read_text())["kept"]}


def figures_in(path: Path) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', path.read_text(), re.DOTALL)
    return dict(json.loads(data))


def test_a_fit_ends_with_a_report_and_the_command_makes_the_same_one(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("runs/circuit/report.html")
    written = page.read_bytes()
    page.unlink()
    assert report(["runs/circuit"]) == 0
    assert page.read_bytes() == written
    assert "Wrote runs/circuit/report.html" in capsys.readouterr().out
    assert report(["runs/circuit", "--out", "elsewhere.html"]) == 0
    assert Path("elsewhere.html").read_bytes() == written


def test_figures_are_those_of_the_audit() -> None:
    figures = figures_in(Path("runs/circuit/report.html"))
    audit, circuit = (json.loads(Path("runs/circuit", name).read_text()) for name in ("audit.json", "circuit.json"))
    assert figures["verdict"]["standing"] == ("faithful" if audit["faithful"] else "unfaithful")
    assert f"{audit['n_kept']} of {audit['n_nodes']} nodes" in figures["verdict"]["sentence"]
    assert f"{audit['adversarial']['loss']:.3f}" in figures["verdict"]["sentence"]
    assert "4 starts for up to 20 steps of 0.1" in figures["verdict"]["budget"]
    assert "was not tried" in figures["verdict"]["convergence"]
    assert [node["node"] for node in figures["graph"]["nodes"]] == [kept["node"] for kept in circuit["kept"]]
    assert sum(site["n_kept"] for site in figures["sites"]) == audit["n_kept"]
    assert [site["name"] for site in figures["sites"]] == ["blocks.0.attn.out", "blocks.0.mlp.down"]
    assert {series["name"] for series in figures["training"]} >= {"loss", "kept", "price"}
    assert "target_loss: 0.05" in figures["origin"]["config"]
    assert "pdprune.train fit --config runs/circuit/config.yaml" in figures["origin"]["command"]


def test_the_adversarys_line_never_rises_and_ends_at_the_model() -> None:
    curve = figures_in(Path("runs/circuit/report.html"))["curve"]
    points = curve["points"]
    assert [point["size"] for point in points] == sorted({point["size"] for point in points})
    assert curve["chosen"]["size"] in {point["size"] for point in points} and points[-1]["size"] == curve["total"]
    worst = [point["adversarial"] for point in points]
    assert worst == sorted(worst, reverse=True)
    assert points[-1]["complete"] == pytest.approx(curve["model_loss"], abs=1e-6)
    drawn_at_random = [point["random"] for point in points]
    assert drawn_at_random == sorted(drawn_at_random, reverse=True)
    assert drawn_at_random[-1] == pytest.approx(worst[-1], abs=1e-6), "of all nodes there is one circuit"
    for point in points:
        assert point["adversarial"] >= max(point["complete"], point["stochastic"]) - 1e-6


def test_nodes_have_contexts_removals_and_outputs() -> None:
    run = AuditedRun.load(Path("runs/circuit"))
    figures = gather(run)
    assert run.tokenizer is not None and run.batches[0].choices is not None
    choices = run.batches[0].choices[0].tolist()
    for node in figures.graph.nodes:
        assert sorted(name for name, _ in node.choices) == sorted(run.tokenizer.decode([id]) for id in choices)
        assert node.contexts and node.raised and node.lowered and node.removed is not None
        assert node.gate > 0 and node.removed >= (figures.graph.worst or 0)
        for context in node.contexts:
            text = figures.texts[context.text]
            assert context.start >= 0 and context.start + len(context.values) <= len(text.tokens)
    assert max(node.removed or 0 for node in figures.graph.nodes) > (figures.graph.worst or 0)
    read = ["".join(figures.vocabulary[token] for token in text.tokens) for text in figures.texts]
    assert read == [prompt.text for prompt in run.prompts]
    replayed = replay(run, run.batches[0])
    assert float(replayed.losses(replayed.mask).mean()) == pytest.approx(run.audit.adversarial.loss, abs=1e-5)
    some = spread_examples(replayed, 4)
    assert some.size == 4 and figures.graph.worst == pytest.approx(run.audit.adversarial.loss, rel=0.5)
    for example in figures.adversary.sufferers:
        assert example.model.probability is not None and example.attacked_loss >= 0
    assert [row.attacked_loss for row in figures.adversary.sufferers] == sorted(
        (row.attacked_loss for row in figures.adversary.sufferers), reverse=True
    )


def test_prompts_with_markup_stay_data() -> None:
    text = Path("runs/circuit/report.html").read_text()
    assert "<img" not in text and "<script>a()" not in text
    assert text.count("<script") == text.count("</script>")
    assert not re.findall(r'(?:src|href)="(?!#)', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))


def test_an_export_has_the_edges_that_the_report_draws() -> None:
    graph = figures_in(Path("runs/circuit/report.html"))["graph"]
    drawn = {
        (graph["nodes"][start]["node"], graph["nodes"][end]["node"]): strength
        for start, end, strength in graph["edges"]
    }
    assert export(["runs/circuit"]) == 0
    content = json.loads(Path("runs/circuit/export/circuit.node_link.json").read_text())
    exported = {(edge["source"], edge["target"]): edge["strength"] for edge in content["edges"]}
    assert exported == pytest.approx(drawn, rel=1e-3) and exported  # a page carries four figures


def test_several_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["runs/circuit", "runs/small", "--out", "pages/both.html"]) == 0
    figures = figures_in(Path("pages/both.html"))
    assert [run["name"] for run in figures["runs"]] == ["circuit", "small"]
    assert [run["link"] for run in figures["runs"]] == ["../runs/circuit/report.html", "../runs/small/report.html"]
    assert figures["runs"][0]["curve"] == figures_in(Path("runs/circuit/report.html"))["curve"], "one curve, two pages"
    first, second = kept_by("circuit"), kept_by("small")
    (overlap,) = figures["overlaps"]
    assert overlap["both"] == len(first & second)
    assert overlap["jaccard"] == pytest.approx(len(first & second) / len(first | second), rel=1e-3)
    capsys.readouterr()
    other = json.loads(Path("runs/small/audit.json").read_text()) | {"loss": "mse"}
    Path("runs/small/audit.json").write_text(json.dumps(other))
    assert report(["runs/circuit", "runs/small"]) == 2
    assert "expected runs of one loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda: shutil.rmtree("runs/circuit"), "runs/circuit: there is no such folder"),
        (lambda: Path("runs/circuit/audit.json").unlink(), "audit.json: cannot be read"),
        (lambda: Path("runs/circuit/config.yaml").write_text("{}"), "config.yaml: it lacks or garbles 'model'"),
        (lambda: Path("quotes.jsonl").unlink(), "quotes.jsonl"),
        (lambda: save_target(torch.nn.Module.apply(network(), _other), Path("tiny")), "another one"),
    ],
)
def test_what_is_missing_is_told_in_one_line(spoil: Any, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil()
    assert report(["runs/circuit"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert expected in printed.err and "damaged" not in printed.err


def _other(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data.mul_(2)


def test_a_report_that_fails_costs_no_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault\nin the page")

    monkeypatch.setattr("pdprune.report.gather", broken)
    before = {name: Path("runs/circuit", name).read_text() for name in ("circuit.json", "audit.json")}
    assert main(["fit", "--config", "circuit.yaml", "--overwrite"]) == 0
    assert {name: Path("runs/circuit", name).read_text() for name in before} == before
    assert not Path("runs/circuit/report.html").exists()
    assert "no report.html was written: a fault in the page\n" in capsys.readouterr().err
    monkeypatch.undo()


def test_toys_without_tokens() -> None:
    Path("toy.yaml").write_text(yaml.safe_dump(TOY))
    assert main(["fit", "--config", "toy.yaml"]) == 0
    figures = figures_in(Path("runs/toy/report.html"))
    assert figures["verdict"]["standing"] == "no_target"
    assert len(figures["graph"]["nodes"]) == 5
    for node in figures["graph"]["nodes"]:
        for context in node["contexts"]:
            assert figures["texts"][context["text"]]["numbers"].startswith("x")
            assert len(context["values"]) == 1
    assert any(name.startswith("y") for node in figures["graph"]["nodes"] for name, _ in node["raised"])
    assert figures["adversary"]["sufferers"][0]["model"]["text"].startswith("y")


def test_circuits_by_position_say_what_is_left_out() -> None:
    args = ["--model.per_position", "true", "--model.target_loss", "null", "--model.target_nodes", "60"]
    quick = ["--model.selection.swap_scores", "2", "--trainer.default_root_dir", "runs/by_position"]
    prompts = [
        {"prompt": f"a = {quote}{n:02}", "answer": quote, "wrong": other}
        for n in range(20)
        for quote, other in (("'", '"'), ('"', "'"))
    ]
    Path("quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    assert main(["fit", "--config", "circuit.yaml", *args, *quick]) == 0
    figures = figures_in(Path("runs/by_position/report.html"))
    assert figures["curve"]["unit"] == "node positions" and figures["curve"]["chosen"]["size"] == 60
    assert any("position by position" in note for note in figures["graph"]["notes"])
    assert all(node["positions"] for node in figures["graph"]["nodes"])


def test_a_hugging_face_model_with_its_tokenizer() -> None:
    save_model(Path("folder"), "llama")
    save_byte_level(Path("folder"))
    prompts = [{"prompt": f"the cat {n}", "answer": " sat", "wrong": " ran"} for n in range(10)]
    Path("quotes.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    args = ["--model.decomposition.target", "folder", "--data.target", "folder", "--trainer.max_steps", "3"]
    size = ["--model.target_nodes", "20", "--model.selection.swap_scores", "2"]
    sites = ["--model.decomposition.sites", "['*.down_proj', '*.o_proj']", "--model.target_loss", "null"]
    assert main(["fit", "--config", "circuit.yaml", *args, *sites, *size, "--trainer.default_root_dir", "runs/hf"]) == 0
    figures = figures_in(Path("runs/hf/report.html"))
    assert " cat" in figures["vocabulary"]
    assert all(node["raised"] and node["contexts"] for node in figures["graph"]["nodes"])
    assert figures["graph"]["edges"]
