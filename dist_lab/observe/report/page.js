"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const say = text => { document.getElementById("said").textContent = text; };

// Colors: the system's, until the button is used.
const themeButton = document.getElementById("theme");
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = dark => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  themeButton.textContent = dark ? "Light" : "Dark";
  themeButton.setAttribute("aria-pressed", dark);
  dispatchEvent(new Event("theme"));
};
let dark = systemIsDark.matches;
setTheme(dark);
themeButton.addEventListener("click", () => setTheme(dark = !dark));
systemIsDark.addEventListener("change", event => setTheme(dark = event.matches));

// Sortable tables: by the exact numbers where there are any, else by the text.
for (const button of all("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const th = button.closest("th"), table = th.closest("table"), column = th.cellIndex;
    const down = th.getAttribute("aria-sort") === "ascending";
    for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[column];
      return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
    };
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (down ? -1 : 1) * (typeof x === "number" ? x - y : x.localeCompare(y, "en", {numeric: true}));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    say(`sorted by ${button.textContent}, ${down ? "descending" : "ascending"}`);
  });
}

// A cursor on a chart, which walks along the rows of the table in the same figure.
for (const svg of all("svg[data-x]")) {
  const table = svg.closest("figure").querySelector("table");
  const [low, high] = svg.dataset.x.split(" ").map(Number);
  const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
  const rows = [...table.tBodies[0].rows].map(row => ({
    x: Number(row.cells[0].dataset.sort),
    text: [...row.cells].map((cell, i) => cell.textContent && `${heads[i]} ${cell.textContent}`).filter(Boolean).join("  "),
  }));
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("class", "cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  svg.append(line);
  svg.parentNode.append(tip);
  let at = -1;
  const show = index => {
    at = Math.max(0, Math.min(rows.length - 1, index));
    const share = (rows[at].x - low) / (high - low);
    line.setAttribute("d", `M${1000 * share} 0v1000`);
    tip.textContent = rows[at].text;
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(svg.clientWidth * share + 8, svg.clientWidth - tip.offsetWidth))}px`;
  };
  const hide = () => { tip.hidden = true; line.removeAttribute("d"); at = -1; };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = low + (event.clientX - box.left) / box.width * (high - low);
    const distances = rows.map(row => Math.abs(row.x - x));
    show(distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(at < 0 && step === -1 ? rows.length - 1 : at + step);
    say(rows[at].text);
  });
}

// The mesh: which part of the chosen parameter each rank holds.
for (const figure of all("figure[data-held]")) {
  const held = JSON.parse(figure.querySelector("script").textContent);
  const select = figure.querySelector("select"), drawing = figure.querySelector(".drawing");
  const ranks = all("[data-rank]", figure);
  const shade = (i, count) => `color-mix(in oklab, var(--accent) ${Math.round(14 + 36 * (count > 1 ? i / (count - 1) : 1))}%, var(--paper))`;
  const choose = () => {
    const {parts, of} = held[select.value];  // part: [text, [[top, left, height, width], ...]]
    for (const cell of ranks) {
      const part = of[cell.dataset.rank];
      cell.classList.toggle("nothing", part < 0);
      cell.style.background = part < 0 ? "" : shade(part, parts.length);
      cell.querySelector("small.part").textContent = part < 0 ? "nothing" : parts[part][0];
    }
    drawing.replaceChildren(...parts.flatMap(([text, boxes, who], i) => boxes.map(([top, left, height, width]) => {
      const box = document.createElement("span");
      box.style.cssText = `top:${top}%;left:${left}%;height:${height}%;width:${width}%;background:${shade(i, parts.length)}`;
      box.textContent = who;
      return box;
    })));
  };
  select.addEventListener("change", choose);
  choose();
}

// The list of sections shows where the reader is.
const links = new Map(all("nav a").map(link => [link.hash.slice(1), link]));
const seen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) {
    if (!isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(target.id)?.setAttribute("aria-current", "true");
  }
}, {rootMargin: "-10% 0px -80% 0px"});
for (const section of all("main > section")) seen.observe(section);
