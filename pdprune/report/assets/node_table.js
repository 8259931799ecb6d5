"use strict";
// The kept nodes as a table.

/** All nodes as a table that can be sorted; a label chooses the node. */
pdprune.nodeTable = () => {
  const { element, figures, number, signed, visible } = pdprune;
  const { graph, sites } = figures;
  const columns = [
    {
      title: "node",
      sort: (node) => node.node,
      cell: (node, place) =>
        element("button", { type: "button", class: "plain", onclick: () => choose(place) }, node.label),
    },
    { title: "site", sort: (node) => node.site, cell: (node) => sites[node.site].name },
    { title: "gate", number: true, sort: (node) => -node.gate, cell: (node) => number(node.gate) },
    {
      title: "effect",
      number: true,
      sort: (node) => -Math.abs(node.effect ?? 0),
      cell: (node) => (node.effect === null ? "–" : signed(node.effect)),
    },
    {
      title: "worst case without it",
      number: true,
      sort: (node) => -(node.removed ?? -Infinity),
      cell: (node) => (node.removed === null ? "–" : signed(node.removed - graph.worst)),
    },
    {
      title: "raises",
      sort: (node) => (node.raised.length ? node.raised[0][0] : "\uffff"),
      cell: (node) =>
        element(
          "code",
          {},
          node.raised
            .slice(0, 4)
            .map(([output]) => visible(output, true))
            .join("  "),
        ),
    },
  ];
  const choose = (place) => {
    pdprune.graph.pin(place);
    document.getElementById("circuit").scrollIntoView();
  };
  const draw = (column) => {
    const order = graph.nodes
      .map((node, place) => [column.sort(node), place])
      .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
    const heads = columns.map((each) =>
      element(
        "th",
        { scope: "col", class: each.number ? "number" : null, "aria-sort": each === column ? "other" : null },
        element(
          "button",
          { type: "button", onclick: () => draw(each) },
          each === column ? `${each.title} ▾` : each.title,
        ),
      ),
    );
    const rows = order.map(([, place]) =>
      element(
        "tr",
        {},
        columns.map((each) =>
          element("td", { class: each.number ? "number" : null }, each.cell(graph.nodes[place], place)),
        ),
      ),
    );
    pdprune.fill(
      "node-table",
      element(
        "div",
        { class: "scroll" },
        element("table", {}, element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows)),
      ),
    );
  };
  document.getElementById("node-table-title").textContent = `All ${pdprune.count(graph.nodes.length)} nodes as a table`;
  // A thousand rows are made when they are asked for.
  document.querySelector("#circuit .fold").addEventListener("toggle", () => draw(columns[4]), { once: true });
};
