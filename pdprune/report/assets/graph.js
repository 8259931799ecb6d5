"use strict";
// The circuit as a graph, drawn by Cytoscape (vendor/): hover, pin, search, filter, keys.

pdprune.circuitGraph = () => {
  const { element, figures, colour, count, number } = pdprune;
  const { graph, sites } = figures;
  const container = document.getElementById("graph");
  const ANSWER = String(graph.nodes.length);
  const all = [
    ...graph.edges,
    ...graph.nodes.flatMap((node, place) => (node.direct ? [[place, graph.nodes.length, node.direct]] : [])),
  ].sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  const strongest = all.length ? Math.abs(all[0][2]) : 1;
  const state = {
    hovered: null,
    pinned: null,
    shown: Math.min(all.length, 40 + 2 * graph.nodes.length, 250),
    query: "",
    matches: null,
  };

  // -- how they look

  /** What sets a node apart within its site's band. */
  const shortLabel = (node) => {
    const prefix = `${sites[node.site].name}:`;
    return node.label.startsWith(prefix) ? node.label.slice(prefix.length) : node.label;
  };

  const harm = graph.nodes.map((node) =>
    node.removed === null || graph.worst === null ? 0 : Math.max(0, node.removed - graph.worst),
  );
  const mostHarm = Math.max(...harm, 1e-12);
  const mostEffect = Math.max(...graph.nodes.map((node) => Math.abs(node.effect ?? 0)), 1e-12);
  const toTheLeft = (band) =>
    Math.min(0, 8 - band.data("width") / 2 + band.data("label").length * band.data("font") * 0.28);
  const style = () => [
    {
      selector: "node[harm]",
      style: {
        width: "data(size)",
        height: "data(size)",
        "background-color": `mapData(harm, 0, 1, ${colour("node")}, ${colour("node-strong")})`,
        "border-width": 1,
        "border-color": colour("soft"),
        label: "data(short)",
        "text-wrap": "ellipsis",
        "text-max-width": 30,
        "font-size": 9,
        color: colour("ink"),
        "min-zoomed-font-size": 11,
        "text-valign": "bottom",
        "text-margin-y": 2,
        "text-outline-color": colour("card"),
        "text-outline-width": 2,
      },
    },
    {
      selector: ".site",
      style: {
        shape: "round-rectangle",
        "corner-radius": 8,
        width: "data(width)",
        height: "data(height)",
        "background-color": colour("plain-back"),
        "background-opacity": 0.55,
        "border-width": 0,
        "z-index": 0,
        "z-index-compare": "manual",
        label: "data(label)",
        "font-size": "data(font)",
        color: colour("soft"),
        "text-valign": "top",
        "text-halign": "center",
        "text-margin-y": 4,
        "text-margin-x": toTheLeft,
        "text-background-color": colour("card"),
        "text-background-opacity": 0.85,
        "text-background-padding": 2,
        "min-zoomed-font-size": 0,
        events: "no",
      },
    },
    {
      selector: ".answer",
      style: {
        shape: "round-rectangle",
        width: 120,
        height: 26,
        "background-color": colour("accent"),
        "border-width": 0,
        color: colour("card"),
        "text-valign": "center",
        "text-margin-y": 0,
        "text-outline-width": 0,
        "text-max-width": 120,
        "font-size": 14,
        "min-zoomed-font-size": 0,
      },
    },
    {
      selector: "edge",
      style: {
        "curve-style": "straight",
        width: "mapData(share, 0, 1, 0.5, 5)",
        "line-color": colour("soft"),
        opacity: "mapData(share, 0, 1, 0.18, 0.85)",
        events: "no",
      },
    },
    { selector: "edge.plus", style: { "line-color": `rgb(${colour("more")})` } },
    { selector: "edge.minus", style: { "line-color": `rgb(${colour("less")})` } },
    { selector: ".dim", style: { opacity: 0.12 } },
    { selector: "edge.near", style: { opacity: 0.95, width: "mapData(share, 0, 1, 1.2, 7)", "z-index": 9 } },
    { selector: "node.near", style: { "border-width": 2, "border-color": colour("ink") } },
    { selector: "node.match", style: { "border-width": 3, "border-color": colour("accent") } },
    {
      selector: "node.chosen",
      style: {
        "border-width": 4,
        "border-color": colour("ink"),
        "z-index": 10,
        label: "data(label)",
        "text-max-width": 400,
        "min-zoomed-font-size": 0,
        "font-size": 16,
        "text-outline-width": 3,
      },
    },
  ];
  const layOut = () => pdprune.layOut(graph, sites, { width: container.clientWidth, height: container.clientHeight });
  let layout = layOut();
  const bandData = (site) => ({ ...layout.bands[site], font: Math.max(11, Math.min(44, 12 / layout.scale)) });
  const cy = cytoscape({
    container,
    elements: [
      ...graph.nodes.map((node, place) => ({
        data: {
          id: String(place),
          label: node.label,
          short: shortLabel(node),
          harm: Math.sqrt(harm[place] / mostHarm),
          size: 9 + 15 * Math.sqrt(Math.abs(node.effect ?? 0) / mostEffect),
        },
        position: layout.positions[place],
      })),
      ...sites.map((site, index) => ({
        data: {
          id: `site-${index}`,
          label: `${site.name} · ${count(site.n_kept)} of ${count(site.n_nodes)}`,
          ...bandData(index),
        },
        position: layout.positions[`site-${index}`],
        classes: "site",
        selectable: false,
      })),
      {
        data: { id: ANSWER, label: "the answer", short: "the answer", size: 26, harm: 0 },
        position: layout.positions[ANSWER],
        classes: "answer",
      },
    ],
    layout: { name: "preset" },
    style: style(),
    minZoom: 0.05,
    maxZoom: 6,
    autoungrabify: true,
    boxSelectionEnabled: false,
    userZoomingEnabled: false,
    hideEdgesOnViewport: graph.nodes.length > 400,
    textureOnViewport: false,
  });
  let wholeAt = 1; // the zoom at which all of it can be seen
  const fit = () => {
    const largest = 1.6; // a few nodes need not fill the frame
    cy.fit(undefined, 12);
    if (cy.zoom() > largest) {
      cy.zoom(largest);
      cy.center();
    }
    wholeAt = cy.zoom();
    container.style.touchAction = "pan-y";
  };

  // -- which edges are shown: the strongest, and all of the chosen node

  const edgeElement = ([from, to, strength]) => ({
    group: "edges",
    data: { id: `${from}-${to}`, source: String(from), target: String(to), share: Math.abs(strength) / strongest },
    classes: strength > 0 ? "plus" : "minus",
  });
  const drawn = () => state.pinned ?? state.hovered;
  const refresh = () => {
    const chosen = drawn();
    const near =
      chosen === null ? [] : (({ into, out }) => [...into.slice(0, 40), ...out.slice(0, 40)])(pdprune.edgesOf(chosen));
    cy.batch(() => {
      cy.edges().remove();
      const wanted = new Map(all.slice(0, state.shown).map((edge) => [`${edge[0]}-${edge[1]}`, edge]));
      for (const edge of near) wanted.set(`${edge[0]}-${edge[1]}`, edge);
      cy.add([...wanted.values()].map(edgeElement));
      cy.elements().removeClass("dim near chosen match");
      if (state.matches !== null) {
        cy.nodes().not(".site, .answer").addClass("dim");
        for (const place of state.matches) cy.getElementById(String(place)).removeClass("dim").addClass("match");
        cy.edges().addClass("dim");
      }
      if (chosen !== null) {
        cy.edges().addClass("dim");
        if (state.matches === null) cy.nodes().not(".site, .answer").addClass("dim");
        for (const [from, to] of near) {
          cy.getElementById(`${from}-${to}`).removeClass("dim").addClass("near");
          for (const end of [from, to]) cy.getElementById(String(end)).removeClass("dim").addClass("near");
        }
        cy.getElementById(String(chosen)).removeClass("dim").addClass("chosen");
      }
    });
    container.dataset.chosen = chosen ?? "";
    container.dataset.edges = String(cy.edges().length);
    pdprune.showDetails(chosen, { pinned: state.pinned !== null, onLetGo: () => pin(null), onChoose: pin });
  };
  const hover = (place) => {
    if (state.pinned !== null || state.hovered === place) return;
    state.hovered = place;
    refresh();
  };
  const pin = (place) => {
    state.pinned = place;
    state.hovered = place;
    refresh();
    putInAddress(place);
    if (place === null) return;
    bringIntoView(place);
    if (matchMedia("(max-width: 900px)").matches)
      document.getElementById("details").scrollIntoView({ block: "nearest" });
  };
  // The address leads to the pinned node, so that it can be handed on; a page inside another has none of its own.
  const putInAddress = (place) => {
    try {
      history.replaceState(null, "", place === null ? "#" : `#node=${encodeURIComponent(graph.nodes[place].label)}`);
    } catch (error) {
      if (error.name !== "SecurityError") throw error;
    }
  };
  const inAddress = () => {
    const place = graph.nodes.findIndex((node) => location.hash === `#node=${encodeURIComponent(node.label)}`);
    return place < 0 ? null : place;
  };
  const bringIntoView = (place) => {
    const at = cy.getElementById(String(place)).renderedPosition();
    const inside = at.x > 0 && at.y > 0 && at.x < container.clientWidth && at.y < container.clientHeight;
    if (!inside) cy.center(cy.getElementById(String(place)));
  };

  cy.on("mouseover", "node", ({ target }) => {
    if (target.id() !== ANSWER && !target.hasClass("site")) hover(Number(target.id()));
  });
  cy.on("tap", "node", ({ target }) => {
    if (target.id() === ANSWER || target.hasClass("site")) return;
    const place = Number(target.id());
    pin(state.pinned === place ? null : place);
  });
  cy.on("tap", ({ target }) => {
    if (target === cy) pin(null);
  });
  container.addEventListener(
    "wheel",
    (event) => {
      if (!(event.ctrlKey || event.metaKey) && document.activeElement !== container) return;
      event.preventDefault();
      const box = container.getBoundingClientRect();
      cy.zoom({
        level: cy.zoom() * Math.exp(-event.deltaY / 400),
        renderedPosition: { x: event.clientX - box.left, y: event.clientY - box.top },
      });
    },
    { passive: false },
  );

  // Two fingers zoom. One scrolls the page while all of the graph can be seen, and moves the graph once it is larger.
  const isWhole = () => cy.zoom() < wholeAt * 1.02;
  for (const kind of ["touchstart", "touchend"])
    container.addEventListener(kind, (event) => cy.userZoomingEnabled(event.touches.length > 1), { capture: true });
  container.addEventListener(
    "touchmove",
    (event) => {
      if (event.touches.length === 1 && isWhole()) event.stopPropagation();
    },
    { capture: true },
  );
  cy.on("zoom", () => {
    container.style.touchAction = isWhole() ? "pan-y" : "none";
  });

  // -- keys

  const zoomBy = (factor) =>
    cy.zoom({
      level: cy.zoom() * factor,
      renderedPosition: { x: container.clientWidth / 2, y: container.clientHeight / 2 },
    });
  const step = (rows, columns) => {
    const grid = layout.rows;
    if (grid.length === 0) return;
    const current = drawn();
    const choose = (place) => (state.pinned === null ? hover(place) : pin(place));
    const row = grid.findIndex((places) => places.includes(current));
    if (row < 0) {
      choose(grid.at(-1)[Math.floor(grid.at(-1).length / 2)]);
      return;
    }
    if (columns !== 0) {
      choose(grid[row][(grid[row].indexOf(current) + columns + grid[row].length) % grid[row].length]);
      return;
    }
    const next = grid[Math.max(0, Math.min(grid.length - 1, row + rows))];
    const x = cy.getElementById(String(current)).position("x");
    choose(
      next.reduce((best, place) => {
        const away = (other) => Math.abs(cy.getElementById(String(other)).position("x") - x);
        return away(place) < away(best) ? place : best;
      }),
    );
  };
  const keys = {
    ArrowLeft: () => step(0, -1),
    ArrowRight: () => step(0, 1),
    ArrowUp: () => step(1, 0),
    ArrowDown: () => step(-1, 0),
    Enter: () => {
      if (drawn() !== null) pin(state.pinned === null ? drawn() : null);
    },
    Escape: () => {
      pin(null);
    },
    "+": () => zoomBy(1.3),
    "=": () => zoomBy(1.3),
    "-": () => zoomBy(1 / 1.3),
    0: fit,
  };
  container.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
    const chosen = drawn();
    if (chosen !== null) bringIntoView(chosen);
  });

  // -- controls

  const found = element("span", { class: "soft", role: "status", id: "found" });
  const search = (query) => {
    state.query = query.trim().toLowerCase();
    const said = (node) =>
      [node.label, sites[node.site].name, ...node.raised.slice(0, 3).map(([output]) => output)]
        .join("\n")
        .toLowerCase();
    state.matches =
      state.query === ""
        ? null
        : graph.nodes.flatMap((node, place) => (said(node).includes(state.query) ? [place] : []));
    found.textContent = state.matches === null ? "" : `${count(state.matches.length)} found`;
    refresh();
  };
  const toNextMatch = () => {
    if (!state.matches?.length) return;
    pin(state.matches[(state.matches.indexOf(state.pinned) + 1) % state.matches.length]);
  };
  const told = element("output", { id: "edges-shown" });
  const filter = (position) => {
    state.shown = position <= 0 ? 0 : Math.min(all.length, Math.round(all.length ** position));
    const weakest = state.shown ? Math.abs(all[state.shown - 1][2]) : null;
    told.textContent =
      state.shown === 0 ? "none" : `${count(state.shown)} of ${count(all.length)}, strength ≥ ${number(weakest)}`;
  };
  const start = all.length > 1 ? Math.log(Math.max(1, state.shown)) / Math.log(all.length) : 0;
  const button = (label, title, act) =>
    element("button", { type: "button", title, "aria-label": title, onclick: act }, label);
  pdprune.fill(
    "controls",
    element(
      "label",
      {},
      "Search",
      element("input", {
        type: "search",
        id: "search",
        placeholder: "label, site or raised token",
        oninput: (event) => search(event.target.value),
        onkeydown: (event) => {
          if (event.key === "Enter") toNextMatch();
        },
      }),
    ),
    found,
    element(
      "label",
      {},
      "Strongest edges",
      element("input", {
        type: "range",
        id: "strength",
        min: 0,
        max: 1,
        step: 0.005,
        value: start,
        oninput: (event) => {
          filter(Number(event.target.value));
          refresh();
        },
      }),
      told,
    ),
    element(
      "span",
      {},
      button("+", "Zoom in", () => zoomBy(1.3)),
      " ",
      button("−", "Zoom out", () => zoomBy(1 / 1.3)),
      " ",
      button("Fit", "Show all", fit),
    ),
  );
  pdprune.fill(
    "legend",
    element("span", {}, element("i", { class: "ramp" }), "worst case without the node: as before → higher"),
    element("span", {}, "size: effect on the answer"),
    element("span", {}, element("i", { class: "plus" }), "adds to the answer"),
    element("span", {}, element("i", { class: "minus" }), "takes from it"),
  );

  filter(start);
  let width = container.clientWidth;
  new ResizeObserver(() => {
    cy.resize();
    if (container.clientWidth !== width) {
      width = container.clientWidth;
      layout = layOut();
      cy.batch(() =>
        cy.nodes().forEach((node) => {
          node.position(layout.positions[node.id()]);
          if (node.hasClass("site")) node.data(bandData(Number(node.id().slice("site-".length))));
        }),
      );
    }
    fit();
  }).observe(container);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cy.style(style()));
  refresh();
  fit();
  pdprune.graph = { cy, pin, state };
  if (inAddress() !== null) {
    pin(inAddress());
    document.getElementById("circuit").scrollIntoView();
  }
};
