"""A compiled target answers as before, notices hooks, and says in one line why it cannot be compiled."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decomposition.small_nets import VOCAB, random_decomposition, small_lm
from torch import Tensor, nn

from pdprune.decomposition import DecomposedModel, decompose, mean_reference
from pdprune.decomposition.clusters import regroup
from pdprune.decomposition.settings import Decomposition
from pdprune.errors import UserError

IDS = torch.arange(12).reshape(3, 4) % VOCAB


class Counting:
    """Compiles to what was traced, and counts the passes that go through it."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, traced: Any, examples: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.passes += 1
            return traced(*args)

        return run


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def made() -> DecomposedModel:
    model = random_decomposition(small_lm(4), torch.Generator().manual_seed(4), with_delta=True, n_nodes=None)
    assert model.delta_sites.any()
    return model


@pytest.fixture
def eager() -> DecomposedModel:
    return made()


@pytest.fixture
def backend() -> Counting:
    return Counting()


@pytest.fixture
def compiled(backend: Counting) -> DecomposedModel:
    model = made()
    model.compile(backend=backend)
    return model


def answers(model: DecomposedModel, ids: Tensor, lead: tuple[int, ...] = (), **more: Any) -> list[Tensor]:
    """The output, and its gradients into both masks."""
    rng = torch.Generator().manual_seed(0)
    masks = [torch.rand(*lead, n, generator=rng).double().requires_grad_() for n in (model.n_nodes, model.n_sites)]
    output = model(ids, *masks, **more)
    return [output, *torch.autograd.grad(output.square().sum(), masks)]


def test_one_mask_for_all_tokens_is_compiled(
    eager: DecomposedModel, compiled: DecomposedModel, backend: Counting
) -> None:
    mean = mean_reference(eager, [IDS])
    for ids in (IDS, IDS[:2], IDS[:, :3], IDS):
        for reference in (None, mean):
            passes = backend.passes
            torch.testing.assert_close(
                answers(compiled, ids, reference=reference), answers(eager, ids, reference=reference)
            )
            assert backend.passes > passes
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), eager(IDS))
        everything = torch.ones(eager.n_nodes)
        assert torch.equal(compiled(IDS, everything), compiled(IDS)), "what is kept is left alone bit by bit"


def test_in_half_precision_as_well(eager: DecomposedModel, compiled: DecomposedModel, backend: Counting) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            torch.testing.assert_close(answers(compiled, IDS), answers(eager, IDS))
    torch.testing.assert_close(answers(compiled, IDS), answers(eager, IDS))
    assert backend.passes


def test_what_needs_hooks_is_not_compiled(eager: DecomposedModel, compiled: DecomposedModel, backend: Counting) -> None:
    answers(compiled, IDS)
    passes = backend.passes
    by_position = mean_reference(eager, [IDS], per_position=True)
    for lead, more in (((4,), {}), ((3, 4), {}), ((), {"reference": by_position})):
        torch.testing.assert_close(answers(compiled, IDS, lead, **more), answers(eager, IDS, lead, **more))
    scales = eager.norm_scales(IDS)
    other = IDS.roll(1, 0)
    torch.testing.assert_close(answers(compiled, other, norm_scales=scales), answers(eager, other, norm_scales=scales))
    assert backend.passes == passes


def test_a_hook_that_comes_later_is_heard(compiled: DecomposedModel, backend: Counting) -> None:
    before, passes = answers(compiled, IDS)[0], backend.passes
    handle = compiled.target.get_submodule("mix").register_forward_hook(lambda module, args, output: 0 * output)
    assert not torch.equal(answers(compiled, IDS)[0], before) and backend.passes == passes
    handle.remove()
    assert torch.equal(answers(compiled, IDS)[0], before) and backend.passes > passes


def test_several_masks_as_one_batch(eager: DecomposedModel, compiled: DecomposedModel) -> None:
    masks = torch.rand(3, eager.n_nodes, generator=torch.Generator().manual_seed(0)).double()
    one_by_one = torch.stack([eager(IDS, mask) for mask in masks])
    torch.testing.assert_close(torch.vmap(lambda mask: compiled(IDS, mask))(masks), one_by_one)


def test_why_nothing_can_be_compiled_is_said_in_one_line_and_at_once() -> None:
    def broken(traced: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwas found")

    with pytest.raises(
        UserError, match=r"compile: nothing can be compiled here .*no C\+\+ compiler was found"
    ) as found:
        made().compile(backend=broken)
    assert "\n" not in str(found.value)


def test_why_the_target_cannot_be_compiled_is_said_in_one_line() -> None:
    def picky(traced: Any, examples: Any) -> Any:
        if len(examples) > 1:
            raise RuntimeError("too much")
        return traced.forward

    model = made()
    model.compile(backend=picky)
    with pytest.raises(UserError, match=r"compile: SmallLM cannot be compiled here .*too much") as found:
        answers(model, IDS)
    assert "\n" not in str(found.value)


def test_models_do_not_share_what_may_be_compiled(backend: Counting) -> None:
    for _ in range(10):  # more than PyTorch compiles of one function
        model, passes = made(), backend.passes
        model.compile(backend=backend)
        answers(model, IDS)
        assert backend.passes == passes + 2, "one to find out, one that answers"


def test_a_regrouped_model_is_compiled_as_well(compiled: DecomposedModel, backend: Counting) -> None:
    site = compiled.site_names[0]
    grouped = regroup(compiled, [[(site, 0), (site, 1)]])
    passes = backend.passes
    torch.testing.assert_close(grouped(IDS, torch.ones(grouped.n_nodes).double()), compiled.target(IDS))
    assert backend.passes == passes + 1


def test_many_kinds_of_passes_are_compiled(compiled: DecomposedModel, backend: Counting) -> None:
    for precision in (torch.float32, torch.bfloat16):
        for ids in (IDS, IDS[:2], IDS[:1], IDS[:, :3], IDS[:1, :1]):
            for gradients in (False, True):
                passes = backend.passes
                half = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
                with half, torch.set_grad_enabled(gradients):
                    compiled(ids, torch.ones(compiled.n_nodes))
                assert backend.passes == passes + 1


def test_copies_are_compiled_as_well(compiled: DecomposedModel, backend: Counting) -> None:
    expected = answers(compiled, IDS)
    copied = copy.deepcopy(compiled)
    torch.testing.assert_close(answers(copied, IDS), expected)
    assert copied._compiled is not None and copied._compiled.options["backend"].passes > backend.passes
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(answers(pickle.loads(pickle.dumps(compiled)), IDS), expected)


def test_warnings_are_still_given_once(compiled: DecomposedModel) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("once", UserWarning, stacklevel=1)
            compiled(IDS)
    assert [str(one.message) for one in given] == ["once"]


def test_it_is_asked_for_beside_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(DecomposedModel, "compile", lambda self: asked.append(self))
    for wanted in (False, True):
        model = Decomposition(target="dense-py", sites=["*.mlp.down"], compile=wanted).load()
        assert asked == ([model] if wanted else [])


def test_a_real_compiler_gives_the_same_but_for_rounding() -> None:
    target = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double().requires_grad_(False)
    eager, compiled = decompose(target, "*", "svd"), decompose(target, "*", "svd")
    try:
        compiled.compile()
    except UserError as error:
        pytest.skip(f"nothing to compile with: {error}")
    x = torch.linspace(-1, 1, 15).double().reshape(5, 3)
    mask = torch.linspace(0, 1, eager.n_nodes).double()
    torch.testing.assert_close(compiled(x, mask), eager(x, mask))
