"use strict";
document.documentElement.classList.add("js");

// Numbers travel as [largest, base64 of int16]; -32768 stands for none.
function unpack([peak, packed]) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return (place) => {
    const found = view.getInt16(2 * place, true);
    return found === -32768 ? NaN : (found / 32000) * peak;
  };
}

function element(name, kind, ...inner) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...inner);
  return made;
}

const shown = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));

function explore(map) {
  const told = JSON.parse(map.querySelector(".numbers").textContent);
  const panels = new Map([...map.querySelectorAll(".panel")].map((panel) => [panel.dataset.score, panel]));
  const scores = new Map();
  let score = panels.keys().next().value;
  let cell = [Math.min(1, told.rows - 1), Math.min(1, told.columns - 1)];

  function numbers(name) {
    if (!scores.has(name)) {
      const { score: packed, nulls, interval } = told.scores[name];
      scores.set(name, {
        at: unpack(packed),
        nulls: Object.entries(nulls).map(([null_, value]) => [null_, unpack(value)]),
        interval: interval && interval.map(unpack),
      });
    }
    return scores.get(name);
  }

  function titles(panel) {
    return [...panel.querySelectorAll(".nulls b")].map((title) => title.textContent);
  }

  // A shared token stands there as its complement.
  function chips(tokens) {
    return tokens.flatMap((word) => [element("bdi", word < 0 ? "chip shared" : "chip", told.words[word < 0 ? ~word : word]), " "]);
  }

  function neurons(title, entries) {
    const items = entries.map(([neuron, share, a, b]) =>
      element("li", "", `${neuron} (${(share / 1000).toFixed(2)}) `, ...chips(a), "| ", ...chips(b)));
    return [element("h5", "", title), element("ul", "", ...items)];
  }

  function where() {
    const after = (name, count) => (count ? `${name} after ${count} block${count > 1 ? "s" : ""}` : `${name}'s embedding`);
    return `${after(told.donors[0], cell[0])} against ${after(told.donors[1], cell[1])}`;
  }

  function show(aloud) {
    const panel = panels.get(score), found = numbers(score), place = cell[0] * told.columns + cell[1];
    const value = shown(found.at(place)), named = titles(panel);
    const ends = found.interval && found.interval.map((end) => shown(end(place)));
    const nulls = found.nulls.map(([, at], number) => `${named[number].toLowerCase()} ${shown(at(place))}`);
    const chance = nulls.length ? `By chance: ${nulls.join(", ")}.` : "";
    const parts = [element("p", "where", where()), element("p", "", element("span", "big", value), ends ? ` (${ends[0]} to ${ends[1]})` : "")];
    parts.push(element("p", "soft", chance));
    const known = told.cells[cell.join()];
    if (known && known.length) {
      const half = known.length / 2;
      parts.push(element("p", "soft", `Neuron (top tokens shared), then the best tokens of ${told.donors[0]} | ${told.donors[1]}.`));
      parts.push(...neurons("Agree most", known.slice(0, half)), ...neurons("Agree least", known.slice(half)));
    } else {
      parts.push(element("p", "soft", "Neurons are told for cells near equal depth and for seams, to keep this page small."));
    }
    map.querySelector(".detail").replaceChildren(...parts);
    panel.querySelector(".brief").textContent = `${where()}: ${value}`;
    if (aloud) map.querySelector(".live").textContent = `${where()}: ${value}. ${chance}`;
    for (const heat of map.querySelectorAll(".heatbox .heat")) {
      const { left, top, side } = heat.dataset, cursor = heat.querySelector(".cursor");
      heat.classList.add("on");
      cursor.setAttribute("x", Number(left) + cell[1] * side);
      cursor.setAttribute("y", Number(top) + cell[0] * side);
    }
  }

  function go(row, column, aloud) {
    cell = [Math.max(0, Math.min(told.rows - 1, row)), Math.max(0, Math.min(told.columns - 1, column))];
    show(aloud);
  }

  function point(event) {
    const heat = event.currentTarget.querySelector(".heat"), { left, top, side } = heat.dataset;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(heat.getScreenCTM().inverse());
    const row = Math.floor((at.y - top) / side), column = Math.floor((at.x - left) / side);
    if (row >= 0 && column >= 0 && row < told.rows && column < told.columns) go(row, column, false);
  }

  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  function press(event) {
    const step = steps[event.key];
    if (!step && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    if (step) go(cell[0] + step[0], cell[1] + step[1], true);
    else go(cell[0], event.key === "Home" ? 0 : told.columns - 1, true);
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
