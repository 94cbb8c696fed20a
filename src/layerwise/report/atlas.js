// The atlas: a chosen layer is the same everywhere; cells tell what they are; rows sort the layers.
const given = Object.fromEntries([...document.querySelectorAll("script[data-of]")].map((s) => [s.dataset.of, JSON.parse(s.textContent)]));
const figures = given.figures ?? { layers: [], columns: [] };
const safe = (text) => String(text).replace(/[<>&"]/g, (c) => `&#${c.charCodeAt(0)};`);
const shown = (x) => x === null || x === undefined ? "–" : Math.abs(x) >= 1e5 || (x && Math.abs(x) < 1e-3) ? x.toExponential(1) : Number(x.toPrecision(4)).toLocaleString("en");
const seen = (token) => safe(token.replaceAll("\n", "⏎").replaceAll("\t", "⇥")) || "∅";
const place = (c, x) => c.signed ? 100 * Math.max(-1, Math.min(1, x / (Math.max(Math.abs(c.low), Math.abs(c.high)) || 1))) : c.high > c.low ? 100 * Math.max(0, Math.min(1, (x - c.low) / (c.high - c.low))) : 50;
const middle = (values) => { const s = values.filter((x) => x !== null).sort((a, b) => a - b), h = s.length >> 1; return s.length % 2 ? s[h] : (s[h - 1] + s[h]) / 2; };

// --- the stack -------------------------------------------------------------------------------
const floors = document.querySelector(".floors");
const layers = floors ? [...floors.querySelectorAll("[role=option]")] : [];
const card = document.querySelector(".card");
let chosen = -1;

function choose(i, focus = false) {
  if (i < 0 || i >= layers.length || !floors) return;
  layers[chosen]?.setAttribute("aria-selected", "false");
  chosen = i;
  layers[i].setAttribute("aria-selected", "true");
  floors.setAttribute("aria-activedescendant", layers[i].id);
  if (focus) layers[i].scrollIntoView({ block: "nearest" });
  for (const cell of document.querySelectorAll(".strips .here, .lens .here, .voids .here, .frame .here")) cell.classList.remove("here");
  for (const head of document.querySelectorAll(`.strips th[data-i="${i}"]`)) head.classList.add("here");
  const key = figures.layers[i];
  for (const path of document.querySelectorAll(".frame path")) path.classList.toggle("here", path.dataset.key === key);
  for (const path of document.querySelectorAll(".frame path.here")) path.parentNode.append(path);
  for (const head of document.querySelectorAll(".lens tbody th, .voids tbody th")) if (head.title === key) head.parentNode.classList.add("here");
  describe(i);
}

function line(column, i) {
  const [low, high] = column.signed ? [-100, 100] : [0, 100];
  const left = (x) => (100 * (place(column, x) - low)) / (high - low);
  const ticks = column.values.map((x) => (x === null ? "" : `<i style="left:${left(x).toFixed(1)}%"></i>`)).join("");
  return `<span class="line">${ticks}<b style="left:${left(column.values[i]).toFixed(1)}%"></b></span>`;
}

function table(columns, i) {
  let group = "", rows = "";
  for (const c of columns) {
    const x = c.values[i];
    if (x === null) continue;
    if (c.group !== group) rows += `<tr><td class="group" colspan="4">${safe(c.group.replaceAll("_", " "))}</td></tr>`;
    group = c.group;
    const known = c.values.filter((v) => v !== null);
    const rank = 1 + known.filter((v) => v > x).length;
    rows += `<tr><th scope="row">${safe(c.name)}</th><td>${shown(x)}</td><td>${line(c, i)}</td><td class="rank">${rank} of ${known.length}</td></tr>`;
  }
  return `<table>${rows}</table>`;
}

function describe(i) {
  const option = layers[i], [first, ...rest] = option.getAttribute("aria-label").split(", ");
  const size = rest.find((word) => /^[\d.,]+ \w?B$|bytes$/.test(word)) ?? "";
  const parts = [...option.querySelectorAll(".bar i[title]")].map((p) => safe(p.title.split(" · ")[0])).join(" · ");
  const said = [...option.querySelectorAll(".signs b")].map((b) => `<li><b class="${b.className}">${b.textContent}</b>${safe(b.className)}: ${safe(b.title)}</li>`).join("");
  const count = {};
  const main = figures.columns.filter((c) => (count[c.group] = (count[c.group] ?? 0) + 1) <= 3).slice(0, 16);
  const more = figures.columns.length > main.length ? `<details><summary>all ${figures.columns.length} figures</summary>${table(figures.columns, i)}</details>` : "";
  const open = card.querySelector("details")?.open;
  card.innerHTML = `<h3>${safe(first)}</h3><p class="sub">${[size, parts].filter(Boolean).join(" — ")}</p>${said ? `<ul>${said}</ul>` : ""}${table(main, i)}${more}`;
  if (open) card.querySelector("details")?.setAttribute("open", "");
}

function colour(key) {
  const scale = floors.parentNode.querySelector(".scale");
  const by = key.includes("*") ? (part) => figures.columns.find((c) => c.key === key.replace("*", part)) : () => figures.columns.find((c) => c.key === key);
  const used = key ? [...new Set([...floors.querySelectorAll(".bar i")].map((cell) => by(cell.dataset.part)).filter(Boolean))] : [];
  const whole = { low: Math.min(...used.map((c) => c.low)), high: Math.max(...used.map((c) => c.high)), signed: used.some((c) => c.signed) };
  floors.classList.toggle("signed", whole.signed);
  floors.parentNode.classList.toggle("shaded", used.length > 0);
  layers.forEach((option, i) => {
    for (const cell of option.querySelectorAll(".bar i")) {
      const x = key ? by(cell.dataset.part)?.values[i] : undefined;
      cell.title = cell.title.split(" · ")[0] + (x === undefined || x === null ? "" : ` · ${shown(x)}`);
      if (x === undefined || x === null) cell.style.removeProperty("--t");
      else cell.style.setProperty("--t", place(whole, x).toFixed(0));
    }
  });
  scale.hidden = !used.length;
  scale.children[0].textContent = whole.signed ? shown(-Math.max(-whole.low, whole.high)) : shown(whole.low);
  scale.children[2].textContent = whole.signed ? shown(Math.max(-whole.low, whole.high)) : shown(whole.high);
  scale.children[1].classList.toggle("signed", whole.signed);
}

if (floors) {
  floors.addEventListener("click", (event) => { const option = event.target.closest("[role=option]"); if (option) choose(+option.dataset.i); });
  floors.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: layers.length, End: -layers.length }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(layers.length - 1, chosen + step)), true);
  });
  const select = floors.parentNode.querySelector("select");
  select?.addEventListener("change", () => colour(select.value));
  if (select) colour(select.value);
  for (const link of document.querySelectorAll("a[data-layer]")) link.addEventListener("click", () => choose(+link.dataset.layer));
  choose(Math.max(0, layers.findIndex((option) => option.querySelector(".signs b"))));
}

// --- tables of cells: arrow keys move, the readout tells -------------------------------------
function cells(table, tell, act = () => {}) {
  const rows = () => [...table.tBodies].flatMap((b) => [...b.rows]).filter((r) => r.querySelector("td") && r.offsetParent);
  const readout = table.closest("section").querySelectorAll(".readout");
  const mine = [...readout].filter((p) => p.compareDocumentPosition(table) & 4).pop();
  const say = (cell) => { if (mine && cell) mine.innerHTML = tell(cell) || "&nbsp;"; };
  const first = table.querySelector("tbody td");
  if (first) first.tabIndex = 0;
  table.addEventListener("pointerover", (event) => say(event.target.closest("tbody td")));
  table.addEventListener("focusin", (event) => say(event.target.closest("tbody td")));
  table.addEventListener("click", (event) => { const cell = event.target.closest("tbody td"); if (cell) act(cell); });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("tbody td");
    if (!cell) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return act(cell); }
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    const all = rows(), next = all[all.indexOf(cell.parentNode) + dy]?.cells[cell.cellIndex + dx];
    if (next?.tagName !== "TD") return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

for (const table of document.querySelectorAll(".strips")) {
  let order = figures.layers.map((_, i) => i);
  const rows = [...table.tBodies].flatMap((b) => [...b.rows]).filter((r) => r.cells.length > 1);
  const heads = [...table.tHead.rows].at(-1);
  const arrange = (next) => {
    for (const row of [heads, ...rows]) {
      const now = [...row.cells].slice(1, 1 + order.length), by = [];
      order.forEach((layer, at) => { by[layer] = now[at]; });
      now[0].before(...[]);
      row.lastElementChild.before(...next.map((layer) => by[layer]));
    }
    order = next;
    table.classList.toggle("sorted", next.some((layer, at) => layer !== at));
  };
  const plain = figures.layers.map((_, i) => i);
  const unsorted = () => { for (const th of table.querySelectorAll("[aria-sort]")) th.removeAttribute("aria-sort"); };
  rows.forEach((row, r) => {
    const column = figures.columns[r], head = row.cells[0];
    head.querySelector("button").addEventListener("click", () => {
      const next = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      unsorted();
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1, far = sign * Infinity;
      arrange(next ? [...plain].sort((a, b) => sign * ((column.values[a] ?? far) - (column.values[b] ?? far)) || a - b) : plain);
    });
  });
  table.querySelector("[data-order]").addEventListener("click", () => { unsorted(); arrange(plain); });
  const at = (cell) => [order[cell.cellIndex - 1], figures.columns[rows.indexOf(cell.parentNode)]];
  cells(table, (cell) => {
    const [i, c] = at(cell);
    if (!c || i === undefined) return "";
    const x = c.values[i], known = c.values.filter((v) => v !== null);
    const others = c.values.filter((v, j) => j !== i && v !== null);
    const rank = x === null ? "not measured" : `${1 + known.filter((v) => v > x).length} of ${known.length} from the top, median of the others ${shown(others.length ? middle(others) : null)}`;
    return `<b>${safe(figures.layers[i])}</b> ${safe(c.group.replaceAll("_", " "))}, ${safe(c.name)}: <b>${safe(cell.title || shown(x))}</b><span class="dim">${rank}</span>`;
  }, (cell) => choose(at(cell)[0]));
  for (const button of table.querySelectorAll(".more")) {
    const extra = [...button.closest("tbody").rows].filter((r) => r.classList.contains("extra"));
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "fewer" : `${extra.length} more`;
      for (const row of extra) row.classList.toggle("open", open);
    });
  }
}

for (const table of document.querySelectorAll(".lens")) {
  const read = given.reads[+table.dataset.read];
  cells(table, (cell) => {
    const b = +cell.parentNode.dataset.b, t = cell.cellIndex - 1;
    const five = read.words[b][t].map((word, i) => `<b>${seen(read.list[word])}</b> ${shown(read.shares[b][t][i] / 10)}%`).join(", ");
    return `after ${safe(read.boundaries[b])}, at “${seen(read.tokens[t])}”: ${five}<span class="dim">KL to the answer ${shown(read.kl[b][t])} nats</span>`;
  }, (cell) => choose(figures.layers.indexOf(read.boundaries[+cell.parentNode.dataset.b])));
}
for (const table of document.querySelectorAll(".voids")) cells(table, () => "");

// --- likeness --------------------------------------------------------------------------------
const canvases = [...document.querySelectorAll("canvas")];
function rgb(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
  probe.remove();
  return found;
}
function paint() {
  if (!canvases.length) return;
  const stops = ["--r0", "--r1", "--r2"].map(rgb);
  canvases.forEach((canvas, m) => {
    const { values } = given.maps[m], flat = values.flat();
    const low = Math.min(...flat), high = Math.max(...flat);
    canvas.width = values[0].length;
    canvas.height = values.length;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    flat.forEach((x, i) => {
      const t = (2 * (x - low)) / (high - low || 1), k = Math.min(1, Math.floor(t));
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = stops[k][c] + (t - k) * (stops[k + 1][c] - stops[k][c]);
      image.data[4 * i + 3] = 255;
    });
    context.putImageData(image, 0, 0);
  });
}
canvases.forEach((canvas, m) => {
  const map = given.maps[m], readout = canvas.closest("section").querySelector(".readout");
  let here = [0, 0];
  const tell = () => { readout.innerHTML = `<b>${safe(map.rows[here[1]])}</b> and <b>${safe(map.columns[here[0]])}</b>: ${shown(map.values[here[1]][here[0]])}`; };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), part = (x, start, size, n) => Math.max(0, Math.min(n - 1, Math.floor((n * (x - start)) / size)));
    here = [part(event.clientX, box.left, box.width, map.columns.length), part(event.clientY, box.top, box.height, map.rows.length)];
    tell();
  });
  canvas.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (!dx && !dy) return;
    event.preventDefault();
    here = [Math.max(0, Math.min(map.columns.length - 1, here[0] + dx)), Math.max(0, Math.min(map.rows.length - 1, here[1] + dy))];
    tell();
  });
});
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
addEventListener("beforeprint", paint);
addEventListener("afterprint", paint);
document.addEventListener("theme", paint);
