"use strict";
// What is told of one node: what it reads and writes, and what it is worth.

/** The tokens of an example, those of a context shaded by how active the node is at them. */
pdprune.shadedTokens = (text, start = 0, values = null) => {
  const { element, figures, visible, number } = pdprune;
  if (text.tokens.length === 0) return [element("span", {}, text.numbers)];
  const shown = values === null ? text.tokens : text.tokens.slice(start, start + values.length);
  const most = values === null ? 1 : Math.max(...values.map(Math.abs)) || 1;
  const peak = values === null ? -1 : values.findIndex((value) => Math.abs(value) === most);
  const spans = shown.map((token, place) => {
    const value = values === null ? 0 : values[place];
    const strength = Math.abs(value) / most;
    const tone = value > 0 ? "--more" : "--less";
    return element(
      "span",
      {
        class: place === peak ? "token peak" : "token",
        style: strength > 0.08 ? `background: rgba(var(${tone}), ${(0.08 + 0.6 * strength).toFixed(2)})` : null,
        title: values === null ? null : number(value),
      },
      visible(figures.vocabulary[token]),
    );
  });
  const before = values !== null && start > 0 ? ["…"] : [];
  const after = values !== null && start + values.length < text.tokens.length ? ["…"] : [];
  return [...before, ...spans, ...after];
};

/** Fill the panel with a node; null tells how to choose one. */
pdprune.showDetails = (place, { pinned, onLetGo, onChoose }) => {
  const { element, figures, number, signed, visible } = pdprune;
  const { graph, sites, texts } = figures;
  const panel = document.getElementById("details");
  panel.classList.toggle("pinned", pinned);
  if (place === null) {
    const most = graph.nodes
      .map((node, at) => [node.removed, at])
      .filter(([removed]) => removed !== null && removed > graph.worst)
      .sort(([a], [b]) => b - a)
      .slice(0, 8);
    panel.replaceChildren(
      element(
        "p",
        { class: "soft" },
        "Hover, tap or use the arrow keys in the graph to see what a node reads and writes.",
      ),
      ...(most.length === 0
        ? []
        : [
            element("h3", {}, "Without them the worst case rises most"),
            element(
              "div",
              { class: "links" },
              most.map(([removed, at]) =>
                element(
                  "button",
                  {
                    class: "link",
                    type: "button",
                    style: `--tone: var(--more); --share: ${((100 * Math.max(0, removed - graph.worst)) / Math.max(1e-30, most[0][0] - graph.worst)).toFixed(0)}%`,
                    onclick: () => onChoose(at),
                  },
                  element("span", {}, graph.nodes[at].label),
                  element("span", {}, signed(removed - graph.worst)),
                ),
              ),
            ),
          ]),
    );
    return;
  }
  const node = graph.nodes[place];
  const answer = graph.nodes.length;
  const fact = (term, ...told) => [element("dt", {}, term), element("dd", {}, ...told)];

  const chips = (outputs) =>
    element(
      "div",
      { class: "chips" },
      outputs.length === 0
        ? element("span", { class: "soft" }, "none")
        : outputs.map(([output, value]) =>
            element("span", { class: "chip" }, visible(output, true), element("small", {}, signed(value))),
          ),
    );

  const links = (edges, end) => {
    const most = Math.max(...edges.map((edge) => Math.abs(edge[2])), 1e-30);
    if (edges.length === 0) return element("p", { class: "soft note" }, "none among the strongest edges");
    return element(
      "div",
      { class: "links" },
      edges.slice(0, 7).map((edge) => {
        const other = edge[end];
        const style = `--tone: var(${edge[2] > 0 ? "--more" : "--less"}); --share: ${((100 * Math.abs(edge[2])) / most).toFixed(0)}%`;
        const parts = [
          element("span", {}, other === answer ? "the answer" : graph.nodes[other].label),
          element("span", {}, signed(edge[2])),
        ];
        return other === answer
          ? element("div", { class: "link", style }, parts)
          : element("button", { class: "link", type: "button", style, onclick: () => onChoose(other) }, parts);
      }),
    );
  };
  const { into, out } = pdprune.edgesOf(place);

  const contexts = node.contexts.map((context) => {
    const text = texts[context.text];
    const peak = context.values.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
    return element(
      "div",
      { class: "context" },
      pdprune.shadedTokens(text, context.start, context.values),
      element(
        "div",
        { class: "said" },
        `activation ${signed(peak)}${text.answer === null ? "" : ` · right answer ${visible(text.answer, true)}`}`,
      ),
    );
  });

  panel.replaceChildren(
    element(
      "div",
      { class: "top" },
      element("h3", { class: "name" }, node.label),
      pinned
        ? element("button", { type: "button", onclick: onLetGo, "aria-label": "Let go of this node" }, "Unpin")
        : null,
    ),
    element(
      "dl",
      { class: "facts" },
      fact("site", sites[node.site].name),
      node.n_components > 1 ? fact("components", String(node.n_components)) : [],
      node.positions === null ? [] : fact("kept at positions", node.positions.join(", ")),
      fact("gate", number(node.gate)),
      node.effect === null
        ? []
        : fact("effect on the answer", `${signed(node.effect)} (directly ${signed(node.direct)})`),
      node.removed === null
        ? []
        : fact(
            "worst case without it",
            element("b", {}, signed(node.removed - graph.worst)),
            ` (${number(graph.worst)} → ${number(node.removed)})`,
          ),
    ),
    ...(node.raised.length + node.lowered.length === 0
      ? [
          element("h3", {}, "Raises and lowers"),
          element("p", { class: "note" }, "not available: it writes to the outputs through later layers only"),
        ]
      : [
          element("h3", {}, "Raises, where it is most active"),
          chips(node.raised),
          element("h3", {}, "Lowers"),
          chips(node.lowered),
          ...(node.choices.length ? [element("h3", {}, "And the answers to choose from"), chips(node.choices)] : []),
        ]),
    element("h3", {}, "Where it is most active"),
    ...(contexts.length > 0
      ? contexts
      : [element("p", { class: "note" }, "nowhere on the held-out examples, measured from its reference")]),
    ...(node.effect === null
      ? []
      : [element("h3", {}, "Reads from"), links(into, 0), element("h3", {}, "Writes to"), links(out, 1)]),
  );
  panel.scrollTop = 0;
};

/** The strongest edges into and out of a node, and to the answer, the strongest first. */
pdprune.edgesOf = (place) => {
  const { graph } = pdprune.figures;
  const direct = graph.nodes[place].direct;
  const out = graph.edges.filter((edge) => edge[0] === place);
  if (direct) out.push([place, graph.nodes.length, direct]);
  const strongest = (edges) => edges.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  return { into: strongest(graph.edges.filter((edge) => edge[1] === place)), out: strongest(out) };
};
