// A header sorts its table: first upwards, then downwards, then back to the order of the stack.
for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[1];
  const given = [...body.rows];
  for (const button of table.querySelectorAll("thead button")) {
    const head = button.closest("th");
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      const sign = next === "descending" ? -1 : 1;
      const known = given.filter((row) => value(row) !== "");
      known.sort((a, b) => sign * (value(a) - value(b)));
      body.append(...(next ? [...known, ...given.filter((row) => value(row) === "")] : given));
      if (next) head.setAttribute("aria-sort", next);
      table.classList.toggle("sorted", Boolean(next));
    });
  }
}
