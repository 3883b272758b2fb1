"use strict";
// Search and order of the samples.
const list = document.getElementById("list");
if (list) {
  const all = [...list.children], search = document.getElementById("search"), order = document.getElementById("order");
  const words = new Map(all.map((each) => [each, [...each.querySelectorAll("h3, .text")].map((part) => part.textContent.toLowerCase())]));
  const update = () => {
    const key = order.value.replace("-", ""), sign = order.value[0] === "-" ? 1 : -1;
    const wanted = search.value.toLowerCase().trim();
    let shown = 0;
    for (const each of all) {
      each.hidden = !words.get(each).some((text) => text.includes(wanted));
      shown += !each.hidden;
    }
    list.append(...[...all].sort((a, b) => sign * (a.dataset[key] - b.dataset[key])));
    document.getElementById("shown").textContent = `${shown} of ${all.length} samples`;
  };
  search.form.hidden = false;
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", update);
  order.addEventListener("input", update);
}
// Values of the curves under the pointer.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
const short = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
for (const svg of document.querySelectorAll("svg[data-values]")) {
  const curves = [...svg.querySelectorAll(".curve")].map((curve) => ({
    name: curve.dataset.name,
    points: curve.querySelector("polyline").getAttribute("points").split(" ").filter(Boolean).map((p) => p.split(",").map(Number)),
  }));
  if (!curves.length) continue;
  const [x0, x1, y0, y1] = svg.dataset.values.split(" ").map(Number), [left, right, bottom, top] = svg.dataset.area.split(" ").map(Number);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const near = (points) => points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best));
    const points = curves.filter((curve) => curve.points.length).map((curve) => ({ name: curve.name, at: near(curve.points) }));
    const x = near(points.map((point) => point.at))[0];
    cursor.setAttribute("d", `M${x} ${top}V${bottom}`);
    tip.replaceChildren();
    const line = (text) => tip.append(Object.assign(document.createElement("div"), { textContent: text }));
    line(short(x0 + ((x - left) / (right - left)) * (x1 - x0)));
    for (const point of points)
      if (Math.abs(point.at[0] - x) < 3) line(`${point.name}: ${short(y0 + ((bottom - point.at[1]) / (bottom - top)) * (y1 - y0))}`);
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cursor.removeAttribute("d");
  });
}
