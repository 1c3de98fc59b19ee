"use strict";
document.documentElement.classList.add("js");

// Numbers are packed as [largest, base64 of int16]; -32768 is a missing value.
function unpack([peak, packed]) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return (place) => {
    const packedValue = view.getInt16(2 * place, true);
    return packedValue === -32768 ? NaN : (packedValue / 32000) * peak;
  };
}

function element(name, kind, ...inner) {
  const created = document.createElement(name);
  if (kind) created.className = kind;
  created.append(...inner);
  return created;
}

const shown = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));

// The frame around the current cell of a heatmap.
function cursorOf(heat) {
  const cursor = heat.querySelector(".cursor") ?? document.createElementNS(heat.namespaceURI, "rect");
  if (!cursor.parentNode) {
    cursor.setAttribute("class", "cursor");
    heat.querySelector(".cells").after(cursor);
  }
  return cursor;
}

function explore(map) {
  const data = JSON.parse(map.querySelector(".numbers").textContent);
  const panels = new Map([...map.querySelectorAll(".panel")].map((panel) => [panel.dataset.score, panel]));
  const scores = new Map();
  let score = panels.keys().next().value;
  let cell = [Math.min(1, data.rows - 1), Math.min(1, data.columns - 1)];

  function numbers(name) {
    if (!scores.has(name)) {
      const { score: packed, nulls, interval } = data.scores[name];
      scores.set(name, {
        at: unpack(packed),
        nulls: Object.entries(nulls).map(([null_, value]) => [null_, unpack(value)]),
        interval: interval && interval.map(unpack),
      });
    }
    return scores.get(name);
  }

  function geometry(heat) {
    const cells = heat.querySelector(".cells");
    const [left, top, width] = ["x", "y", "width"].map((name) => Number(cells.getAttribute(name)));
    return { left, top, side: width / data.columns };
  }

  function titles(panel) {
    return [...panel.querySelectorAll(".nulls b")].map((title) => title.textContent);
  }

  // A token that both donors have is given as its complement.
  function chips(tokens) {
    return tokens.flatMap((word) => [element("bdi", word < 0 ? "chip shared" : "chip", data.words[word < 0 ? ~word : word]), " "]);
  }

  function neurons(title, entries) {
    const items = entries.map(([neuron, share, a, b]) =>
      element("li", "", `${neuron} (${(share / 1000).toFixed(2)}) `, ...chips(a), "| ", ...chips(b)));
    return [element("h5", "", title), element("ul", "", ...items)];
  }

  function where() {
    const after = (name, count) => (count ? `${name} after ${count} block${count > 1 ? "s" : ""}` : `${name}'s embedding`);
    return `${after(data.donors[0], cell[0])} and ${after(data.donors[1], cell[1])}`;
  }

  function show(aloud) {
    const panel = panels.get(score), values = numbers(score), place = cell[0] * data.columns + cell[1];
    const value = shown(values.at(place)), named = titles(panel);
    const ends = values.interval && values.interval.map((end) => shown(end(place)));
    const nulls = values.nulls.map(([, at], number) => `${named[number].toLowerCase()} ${shown(at(place))}`);
    const chance = nulls.length ? `By chance: ${nulls.join(", ")}.` : "";
    const parts = [element("p", "where", where()), element("p", "", element("span", "big", value), ends ? ` (${ends[0]} to ${ends[1]})` : "")];
    parts.push(element("p", "soft", chance));
    const known = data.cells[cell.join()];
    if (known && known.length) {
      const half = known.length / 2;
      parts.push(element("p", "soft", `Neuron (top tokens shared), then the top-activating tokens of ${data.donors[0]} | ${data.donors[1]}.`));
      parts.push(...neurons("Agree most", known.slice(0, half)), ...neurons("Agree least", known.slice(half)));
    } else {
      parts.push(element("p", "soft", "To keep this page small, it has neurons only for cells near equal depth and for seams."));
    }
    map.querySelector(".detail").replaceChildren(...parts);
    panel.querySelector(".brief").textContent = `${where()}: ${value}`;
    if (aloud) map.querySelector(".live").textContent = `${where()}: ${value}. ${chance}`;
    for (const heat of map.querySelectorAll(".heatbox .heat")) {
      const { left, top, side } = geometry(heat), cursor = cursorOf(heat);
      const place = { x: left + cell[1] * side, y: top + cell[0] * side, width: side, height: side };
      for (const [name, value] of Object.entries(place)) cursor.setAttribute(name, value);
    }
  }

  function go(row, column, aloud) {
    cell = [Math.max(0, Math.min(data.rows - 1, row)), Math.max(0, Math.min(data.columns - 1, column))];
    show(aloud);
  }

  function point(event) {
    const heat = event.currentTarget.querySelector(".heat"), { left, top, side } = geometry(heat);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(heat.getScreenCTM().inverse());
    const row = Math.floor((at.y - top) / side), column = Math.floor((at.x - left) / side);
    if (row >= 0 && column >= 0 && row < data.rows && column < data.columns) go(row, column, false);
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function press(event) {
    const step = steps[event.key];
    if (!step && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    if (step) go(cell[0] + step[0], cell[1] + step[1], true);
    else go(cell[0], event.key === "Home" ? 0 : data.columns - 1, true);
  }

  for (const box of map.querySelectorAll(".heatbox")) {
    box.addEventListener("pointermove", point);
    box.addEventListener("pointerdown", point);
    box.addEventListener("keydown", press);
    box.addEventListener("focus", () => show(true));
  }
  map.addEventListener("change", (event) => {
    score = event.target.value;
    for (const [name, panel] of panels) panel.classList.toggle("current", name === score);
    show(false);
  });
  for (const button of map.querySelectorAll(".seams button")) {
    button.addEventListener("click", () => go(Number(button.dataset.row), Number(button.dataset.column), true));
  }
  const first = map.querySelector(".seams button");
  if (first) cell = [Number(first.dataset.row), Number(first.dataset.column)];
  map.querySelector("input[type=radio]").checked = true;
  show(false);
}

function searchable(field) {
  const rows = [...document.querySelectorAll(".features tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const closed = [...document.querySelectorAll(".features details")].filter((part) => !part.open);
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase().replaceAll(" ", "␣");
    let count = 0;
    for (const [row, text] of rows) {
      row.hidden = !text.includes(wanted);
      count += !row.hidden;
    }
    for (const part of closed) part.open = wanted !== "" && part.querySelector("tbody tr:not([hidden])") !== null;
    document.getElementById("found").textContent = wanted ? `${count} of ${rows.length} rows` : "";
  });
}

for (const map of document.querySelectorAll(".map")) explore(map);
const field = document.getElementById("find");
if (field) searchable(field);

// Older browsers print closed sections closed.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const part of opened) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of opened) part.open = false;
});
