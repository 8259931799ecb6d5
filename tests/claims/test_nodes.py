"""Kinds of nodes of the shipped language models."""

from __future__ import annotations

import pytest
import torch

from pdprune.claims.nodes import CHANNELS, HEADS, LEARNED, READS, SINGULAR, SITES, in_nodes
from pdprune.errors import UserError

IDS = torch.randint(32, 127, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        (CHANNELS, 2 * (384 + 96)),
        (HEADS, 2 * (384 + 4)),
        (READS, 2 * (384 + 96) + 2 * (96 + 96) + 96),
        (SINGULAR, 4 * 96),
        (LEARNED, 768),
    ],
)
def test_how_many_there_are_and_that_all_of_them_are_the_target(nodes: str, count: int) -> None:
    model = in_nodes("dense-py", nodes)
    assert model.n_nodes == count and model.target_name == "dense-py"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, torch.ones(count)), model.target(IDS), atol=1e-4, rtol=1e-4)


def test_a_head_is_its_channels() -> None:
    heads, channels = in_nodes("dense-py", HEADS), in_nodes("dense-py", CHANNELS)
    without_head, without_channels = torch.ones(heads.n_nodes), torch.ones(channels.n_nodes)
    (head,) = (i for i, node in enumerate(heads.nodes) if node.label == "blocks.1.attn.out:head2")
    without_head[head] = 0
    for i, node in enumerate(channels.nodes):
        if node.components[0] in heads.nodes[head].components:
            without_channels[i] = 0
    assert int((without_channels == 0).sum()) == 96 // 4
    with torch.no_grad():
        torch.testing.assert_close(heads(IDS, without_head), channels(IDS, without_channels))


def test_what_attention_reads_is_one_node_for_queries_keys_and_values() -> None:
    model = in_nodes("dense-py", READS)
    (read,) = (node for node in model.nodes if node.label == "blocks.0.attn:read5")
    assert list(read.components) == [(f"blocks.0.attn.{name}", 5) for name in "qkv"]


def test_all_but_reads_are_of_the_same_matrices() -> None:
    names = {nodes: set(in_nodes("dense-py", nodes).site_names) for nodes in (CHANNELS, HEADS, SINGULAR, LEARNED)}
    assert len(SITES) == 2 and all(found == names[CHANNELS] for found in names.values())


def test_another_name_is_a_path(tmp_path: object) -> None:
    with pytest.raises(UserError, match="nowhere"):
        in_nodes("dense-py", f"{tmp_path}/nowhere")
