// The theme's button, and the values under the pointer. Without script the page is complete, in the system's theme.
const root = document.documentElement;
const button = document.querySelector("#theme");
const stored = (value) => {
  try {
    return value === undefined ? localStorage.getItem("theme") : localStorage.setItem("theme", value);
  } catch {
    return null;  // a browser may deny storage to files
  }
};
const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
if (stored()) root.dataset.theme = stored();
label();
button.hidden = false;
button.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  stored(root.dataset.theme);
  label();
});

const round = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
for (const chart of document.querySelectorAll("svg[data-x]")) {
  const [xLow, xHigh, left, right] = chart.dataset.x.split(" ").map(Number);
  const [yLow, yHigh, bottom, top] = chart.dataset.y.split(" ").map(Number);
  const points = [...chart.querySelectorAll("polyline[data-name]")].map((line) => ({
    name: line.dataset.name,
    at: [...line.points],
  }));
  const cursor = chart.querySelector(".cursor");
  const words = chart.closest("figure").querySelector(".readout");
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    if (x < left || x > right) return;
    const shown = new Map();
    for (const { name, at } of points) {
      const near = at.reduce((best, point) => Math.abs(point.x - x) < Math.abs(best.x - x) ? point : best);
      const known = shown.get(name);
      if (!known || Math.abs(near.x - x) < Math.abs(known.x - x)) shown.set(name, near);
    }
    const value = (point) => yLow + (point.y - bottom) / (top - bottom) * (yHigh - yLow);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.classList.add("on");
    words.textContent = `${round(xLow + (x - left) / (right - left) * (xHigh - xLow))} tokens: `
      + [...shown].map(([name, point]) => `${name.split("/")[0]} ${round(value(point))}`).join(", ");
  });
  chart.addEventListener("pointerleave", () => {
    cursor.classList.remove("on");
    words.textContent = "";
  });
}
