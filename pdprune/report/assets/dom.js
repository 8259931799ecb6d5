"use strict";
// Small helpers of all pages. Whatever comes from the data goes into the page as text: no string is read as HTML.

const pdprune = { figures: JSON.parse(document.getElementById("figures").textContent) };

/** An element with attributes, listeners (`onclick: ...`) and children; strings among the children become text. */
pdprune.element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
};

/** Replace what the element with this id holds. */
pdprune.fill = (id, ...children) =>
  document.getElementById(id).replaceChildren(...children.flat(Infinity).filter((child) => child !== null));

/** Three decimals, or two digits where a number is small. */
pdprune.number = (value) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : size >= 0.01 ? value.toFixed(3) : value.toPrecision(2);
};
pdprune.count = (value) => value.toLocaleString("en");
pdprune.signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + pdprune.number(Math.abs(value));
pdprune.percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)}%`);

/** A token as it can be seen: line ends and tabs as signs, spaces too where they stand alone, the rest escaped. */
pdprune.visible = (token, spaces = false) => {
  const signs = { "\n": "↵", "\t": "⇥", "\r": "␍" };
  const shown = token.replace(
    /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (character) => signs[character] ?? `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
  return spaces ? shown.replace(/ /g, "␣") : shown;
};

/** Text in which what stands between backquotes is code. */
pdprune.prose = (text) => text.split("`").map((part, index) => (index % 2 ? pdprune.element("code", {}, part) : part));

/** The value of a colour of report.css, in the theme that is on. */
pdprune.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Call `draw` now and whenever the theme changes. */
pdprune.inEachTheme = (draw) => {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
};

/** A table. Columns: `{title, number, cell(row)}`; a cell is text or an element. On narrow screens rows are stacked. */
pdprune.table = (columns, rows, { stacked = true, rowClass = () => null } = {}) => {
  const { element } = pdprune;
  const head = columns.map((column) =>
    element("th", { scope: "col", class: column.number ? "number" : null }, column.title),
  );
  const body = rows.map((row) =>
    element(
      "tr",
      { class: rowClass(row) },
      columns.map((column) =>
        element("td", { class: column.number ? "number" : null, "data-label": column.title || null }, column.cell(row)),
      ),
    ),
  );
  return element(
    "div",
    { class: "scroll" },
    element(
      "table",
      { class: stacked ? "stacked" : null },
      element("thead", {}, element("tr", {}, head)),
      element("tbody", {}, body),
    ),
  );
};
