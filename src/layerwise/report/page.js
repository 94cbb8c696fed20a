document.documentElement.classList.add("js");
// The theme is the system's until the button is pressed.
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = document.querySelector(".theme");
const wears = () => (document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
const offer = () => { theme.textContent = wears() ? "light" : "dark"; };
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = wears() ? "light" : "dark";
  offer();
  document.dispatchEvent(new Event("theme"));
});
dark.addEventListener("change", offer);
offer();
// A header sorts its table: first upwards, then downwards, then back to the order of the stack.
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[1];
  const rows = [...body.rows];
  for (const button of table.querySelectorAll("thead button")) {
    const head = button.closest("th");
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      const sign = next === "descending" ? -1 : 1;
      const known = rows.filter((row) => value(row) !== "");
      known.sort((a, b) => sign * (value(a) - value(b)));
      body.append(...(next ? [...known, ...rows.filter((row) => value(row) === "")] : rows));
      if (next) head.setAttribute("aria-sort", next);
      table.classList.toggle("sorted", Boolean(next));
    });
  }
}
