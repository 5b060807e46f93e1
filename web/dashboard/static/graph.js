"use strict";
// The graph as a picture, drawn from the rows of its table: things pushed apart, connections pulling together. What stands in the
// picture are links; a click on one shows what is behind it in the panel beside.

(() => {
  const figure = document.getElementById("graph");
  if (!figure) return;
  const SVG = "http://www.w3.org/2000/svg";
  const IDEAL = 120; // between two things that are connected
  const ROUNDS = 300;
  const MARGIN = 70;
  const MANY_EDGES = 40; // with more, what they say is shown of those that are pointed at
  const LONGEST_NAME = 26;
  const panel = document.getElementById("panel");
  const table = document.getElementById("graph-table");

  const things = [...document.querySelectorAll("#things [data-thing]")].map((row) => ({
    id: row.dataset.thing, kind: row.dataset.kind, size: 1 + Math.min(1, Math.log10(Number(row.dataset.mentions) || 1) / 2),
    around: "around" in row.dataset, link: row.querySelector("a"), said: [...row.cells].map((cell) => cell.textContent).join(", "),
  }));
  const byId = new Map(things.map((thing) => [thing.id, thing]));
  const edges = [...document.querySelectorAll("#edges [data-edge]")].map((row) => ({
    from: byId.get(row.dataset.from), to: byId.get(row.dataset.to), link: row.querySelector("a"),
    said: [...row.cells].map((cell) => cell.textContent).join(" "),
  }));

  // ---- where they stand (Fruchterman and Reingold, 1991); always the same for the same rows ----

  function layOut(stretch) {
    things.forEach((thing, n) => { // a sunflower's seeds: nowhere two in one place
      thing.x = 40 * Math.sqrt(n + 0.5) * Math.cos(n * 2.4) * stretch;
      thing.y = 40 * Math.sqrt(n + 0.5) * Math.sin(n * 2.4);
    });
    for (let round = 0; round < ROUNDS; round += 1) {
      const heat = IDEAL * (1 - round / ROUNDS) ** 1.5 + 0.5;
      for (const thing of things) { thing.dx = -thing.x * 0.12 / stretch; thing.dy = -thing.y * 0.12 * stretch; }
      for (let a = 0; a < things.length; a += 1) {
        for (let b = a + 1; b < things.length; b += 1) push(things[a], things[b]);
      }
      for (const { from, to } of edges) pull(from, to);
      for (const thing of things) {
        const length = Math.hypot(thing.dx, thing.dy) || 1;
        thing.x += thing.dx / length * Math.min(length, heat);
        thing.y += thing.dy / length * Math.min(length, heat);
      }
    }
  }

  function push(one, other) {
    const x = one.x - other.x || 0.01;
    const y = one.y - other.y;
    const force = IDEAL ** 2 / Math.max(x * x + y * y, 1);
    one.dx += x * force; one.dy += y * force;
    other.dx -= x * force; other.dy -= y * force;
  }

  function pull(one, other) {
    const x = one.x - other.x;
    const y = one.y - other.y;
    const force = Math.hypot(x, y) / IDEAL;
    one.dx -= x * force; one.dy -= y * force;
    other.dx += x * force; other.dy += y * force;
  }

  // ---- drawing ----

  function make(name, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function linkTo(item, className, ...children) {
    item.element = make("a", { class: className, href: item.link.getAttribute("href"), "aria-label": item.said, tabindex: -1 }, ...children);
    item.element.item = item;
    return item.element;
  }

  const short = (text) => (text.length > LONGEST_NAME ? `${text.slice(0, LONGEST_NAME - 1)}…` : text);

  function drawEdge(edge) {
    edge.line = make("path", { class: "line", "marker-end": "url(#arrow)" });
    edge.hit = make("path", { class: "hit" });
    edge.label = make("text", {}, short(edge.link.textContent));
    return linkTo(edge, "edge", edge.hit, edge.line, edge.label);
  }

  function drawThing(thing) {
    thing.shape = make("use", { href: `#kind-${thing.kind}`, transform: `scale(${thing.size})` });
    thing.label = make("text", {}, short(thing.link.textContent));
    return linkTo(thing, `thing kind-${thing.kind}${thing.around ? " around" : ""}`, thing.shape, thing.label);
  }

  // Several connections of the same two stand side by side.
  const sides = new Map();
  for (const edge of edges) {
    const pair = [edge.from.id, edge.to.id].sort().join();
    edge.side = sides.get(pair) ?? 0;
    sides.set(pair, edge.side + 1);
    edge.first = pair.startsWith(edge.from.id);
  }

  function place() {
    for (const edge of edges) {
      const { from, to } = edge;
      const x = to.x - from.x;
      const y = to.y - from.y;
      const length = Math.hypot(x, y) || 1;
      const bend = Math.ceil(edge.side / 2) * 44 * (edge.side % 2 ? 1 : -1) * (edge.first ? 1 : -1);
      const middle = [(from.x + to.x) / 2 - y / length * bend, (from.y + to.y) / 2 + x / length * bend];
      const gap = 13 * to.size + 4;
      const toX = to.x - middle[0];
      const toY = to.y - middle[1];
      const rest = Math.hypot(toX, toY) || 1;
      const path = `M${from.x} ${from.y}Q${middle[0]} ${middle[1]} ${to.x - toX / rest * gap} ${to.y - toY / rest * gap}`;
      edge.line.setAttribute("d", path);
      edge.hit.setAttribute("d", path);
      edge.x = (from.x + to.x) / 4 + middle[0] / 2;
      edge.y = (from.y + to.y) / 4 + middle[1] / 2;
      edge.label.setAttribute("x", edge.x);
      edge.label.setAttribute("y", edge.y);
    }
    for (const thing of things) {
      thing.element.setAttribute("transform", `translate(${thing.x} ${thing.y})`);
      thing.label.setAttribute("y", 13 * thing.size + 4);
    }
  }

  // ---- what is seen of it ----

  const svg = make("svg", { role: "group", "aria-label": document.querySelector("h1").textContent, "aria-describedby": "graph-how" });
  let view = null;

  function look() {
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
    // Texts are as large as elsewhere on the page, however much is seen.
    const scale = Math.max(view.width / (svg.clientWidth || 1), view.height / (svg.clientHeight || 1));
    svg.setAttribute("font-size", Math.min(22, Math.max(10, 11.5 * scale)));
    svg.classList.toggle("near", view.width < view.whole * 0.95);
  }

  function fit() {
    const xs = things.map((thing) => thing.x);
    const ys = things.map((thing) => thing.y);
    const x = Math.min(...xs) - MARGIN;
    const y = Math.min(...ys) - MARGIN;
    const width = Math.max(...xs) + MARGIN - x;
    view = { x, y, width, whole: width, height: Math.max(...ys) + MARGIN - y };
    look();
  }

  function zoom(factor, x = view.x + view.width / 2, y = view.y + view.height / 2) {
    if (view.width * factor > view.whole * 2 || view.width * factor < 60) return;
    view = { ...view, x: x - (x - view.x) * factor, y: y - (y - view.y) * factor, width: view.width * factor, height: view.height * factor };
    look();
  }

  function pointAt(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [point.x, point.y];
  }

  for (const button of figure.querySelectorAll("[data-zoom]")) {
    const wanted = button.dataset.zoom;
    button.addEventListener("click", () => (wanted === "fit" ? fit() : zoom(wanted === "in" ? 0.75 : 1 / 0.75)));
  }
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page is scrolled
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, ...pointAt(event));
  }, { passive: false });

  // ---- dragging: a thing to another place, or all of it ----

  let drag = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || (event.pointerType === "touch" && !svg.classList.contains("near"))) return;
    const thing = event.target.closest(".thing")?.item;
    drag = { thing, at: pointAt(event), moved: false };
  });
  addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = pointAt(event);
    const [dx, dy] = [x - drag.at[0], y - drag.at[1]];
    if (!drag.moved && Math.hypot(dx, dy) * svg.clientWidth / view.width < 4) return;
    drag.moved = true;
    if (drag.thing) {
      drag.thing.x += dx; drag.thing.y += dy; drag.at = [x, y];
      place();
    } else {
      view = { ...view, x: view.x - dx, y: view.y - dy };
      look();
    }
  });
  addEventListener("pointerup", () => { const was = drag; setTimeout(() => { if (drag === was) drag = null; }); });
  addEventListener("pointercancel", () => { drag = null; });
  svg.addEventListener("dragstart", (event) => event.preventDefault());

  // ---- what is behind it ----

  let chosen = null;
  async function open(link) {
    const address = new URL(link.getAttribute("href"), location);
    address.searchParams.set("part", "panel");
    chosen?.classList.remove("chosen");
    chosen = link.closest("svg") ? link : chosen;
    chosen?.classList.add("chosen");
    await htmx.ajax("GET", address.pathname + address.search, { target: panel, swap: "innerHTML" });
    const here = new URL(location);
    if (link.matches(".thing")) here.searchParams.delete("edge");
    else here.searchParams.set("edge", address.pathname.split("/").at(-1)); // as it is loaded again, or sent to somebody
    history.replaceState(null, "", here);
    panel.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
  }

  function clicked(event) {
    const link = event.target.closest("svg#picture a, [data-panel]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    if (!drag?.moved) open(link);
  }
  svg.addEventListener("click", clicked);
  panel.addEventListener("click", clicked);
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") chosen?.focus(); });

  // ---- by keys: to the nearest one in a direction ----

  const WAYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  svg.addEventListener("keydown", (event) => {
    const way = WAYS[event.key];
    const here = event.target.closest("a")?.item;
    if (!way || !here) return;
    event.preventDefault();
    let best = null;
    for (const item of [...things, ...edges]) {
      const x = item.x - here.x;
      const y = item.y - here.y;
      const ahead = x * way[0] + y * way[1];
      const aside = Math.abs(x * way[1] - y * way[0]);
      if (item !== here && ahead > 1 && ahead > aside * 0.5) {
        const far = ahead + 2 * aside;
        if (!best || far < best.far) best = { item, far };
      }
    }
    if (best) go(here, best.item);
  });

  function go(from, to) {
    from.element.setAttribute("tabindex", -1);
    to.element.setAttribute("tabindex", 0);
    to.element.focus();
  }
  svg.addEventListener("focusin", (event) => { // also by a click
    const item = event.target.closest("a")?.item;
    for (const each of [...things, ...edges]) each.element.setAttribute("tabindex", each === item ? 0 : -1);
  });

  // ---- begin ----

  svg.id = "picture";
  svg.classList.toggle("busy", edges.length > MANY_EDGES);
  const arrow = make("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" });
  arrow.append(make("path", { d: "M0 0 8 4 0 8z" }));
  svg.append(make("defs", {}, arrow), make("g", {}, ...edges.map(drawEdge)), make("g", {}, ...things.map(drawThing)));
  figure.append(svg);
  figure.hidden = false;
  table.open = false;
  layOut(Math.min(1.6, Math.max(0.7, Math.sqrt(svg.clientWidth / svg.clientHeight))));
  place();
  fit();
  (things.find((thing) => thing.around) ?? things[0]).element.setAttribute("tabindex", 0);
  addEventListener("resize", look);
  figure.dataset.ready = things.length;
})();
